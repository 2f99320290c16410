"""All answers of all models, in the order of what they cost: to the texts, word by word, and those of shadow models.

How long it will take is known from a few texts and said before anything starts. What an earlier call has computed is not computed
again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ._compare_attribution import Attributed, Attributor, torch_form, why_not
from ._compare_figures import Answers
from ._compare_inside import Inside, Insider
from ._compare_look import Look
from ._compare_shadows import Shadows
from ._compare_targets import Predictor
from ._compare_work import ByText, Work
from ._report_words import duration
from .core.reporting import report as report_progress
from .progress import Progress

CHUNK = 512
"""Texts between two reports of progress."""
FIGURES = 5.0
"""Seconds for all figures and the page, about."""
ATTRIBUTIONS, INSIDE, SHADOWS = "attributions", "layers", "shadow models"
KNOWN = ("test", "validation", "shift", "members")


def gather(
    look: Look, predictors: Mapping[str, Predictor], task: Any, work: Work, progress: Progress, shadows: Shadows | None, seed: int
) -> dict[str, Answers]:
    """Every model's answers; why there are no attributions, where there are none, goes to the notes of `look`."""
    sets = look.sets()
    forms = {role: torch_form(predictor.folder) for role, predictor in predictors.items()}
    attributors = _attributors(look, forms, task, seed)
    insiders = {role: Insider(attributor, task, look.steps) for role, attributor in attributors.items()}
    plan = _plan(sets, predictors, {ATTRIBUTIONS: attributors, INSIDE: insiders}, work, shadows)
    progress.plan([*plan, ("figures", FIGURES)])
    progress.say(cost([*plan, ("figures", FIGURES)]))
    logits: dict[str, dict[str, np.ndarray]] = {}
    for role, predictor in predictors.items():
        with progress.stage(role):
            logits[role] = _answers(role, predictor, sets, work)
    words: dict[str, Attributed] = {}
    for role, attributor in attributors.items():
        with progress.stage(f"{ATTRIBUTIONS} {role}"):
            words[role] = attributor.run(work, _kept(ATTRIBUTIONS, role))
    insides: dict[str, Inside] = {}
    for role, insider in insiders.items():
        with progress.stage(f"{INSIDE} {role}"):
            insides[role] = insider.run(work, _kept(INSIDE, role))
    confidences: dict[str, np.ndarray] = {}
    if shadows:
        with progress.stage(SHADOWS):
            confidences = shadows.run(work)
    return {
        role: Answers(
            **{name: logits[role].get(name) for name in KNOWN},  # type: ignore[arg-type]
            perturbed={name: logits[role][name] for name in look.changes()},
            attribution=words.get(role),
            inside=insides.get(role),
            shadows=confidences.get(role),
            shadows_inside=shadows.inside if shadows else None,
        )
        for role in predictors
    }


def cost(plan: Sequence[tuple[str, float]]) -> str:
    """What a plan will take, all in all and by its larger parts."""
    total = sum(seconds for _, seconds in plan)
    parts = ", ".join(f"{name} {duration(seconds)}" for name, seconds in plan if seconds >= 0.1 * total)
    return f"About {duration(total)}: {parts}. Stopped, the same command goes on where it was."


def _attributors(look: Look, forms: dict[str, Path | None], task: Any, seed: int) -> dict[str, Attributor]:
    if not look.attributed:
        return {}
    if reason := why_not(forms):
        look.notes.append(reason)
        return {}
    texts = [look.texts[at] for at in look.attributed]
    return {role: Attributor(form, task, texts, look.points, seed) for role, form in forms.items() if form}


def _plan(
    sets: Mapping[str, Sequence[Any]],
    predictors: Mapping[str, Predictor],
    looks: Mapping[str, Mapping[str, ByText]],
    work: Work,
    shadows: Shadows | None,
) -> list[tuple[str, float]]:
    """Stages and their seconds, without what is there already."""
    plan = []
    for role, predictor in predictors.items():
        left = sum(len(texts) for name, texts in sets.items() if not work.has(f"{role}-{name}"))
        plan.append((role, left * predictor.seconds(sets["test"]) if left else 0.0))
    for kind, of in looks.items():
        plan += [(f"{kind} {role}", one.seconds(work, _kept(kind, role))) for role, one in of.items()]
    return [*plan, *([(SHADOWS, shadows.seconds(work))] if shadows else [])]


def _kept(kind: str, role: str) -> str:
    """The name under which what is computed text by text is kept."""
    return f"{kind.removesuffix('s')}-{role}"


def _answers(role: str, predictor: Predictor, sets: Mapping[str, Sequence[Any]], work: Work) -> dict[str, np.ndarray]:
    count, done = sum(map(len, sets.values())), 0
    found = {}
    for name, texts in sets.items():
        found[name] = work.array(f"{role}-{name}", _later(predictor, texts, done, count))
        done += len(texts)
        report_progress(done / count)
    return found


def _later(predictor: Predictor, texts: Sequence[Any], done: int, count: int) -> Callable[[], np.ndarray]:
    def ask() -> np.ndarray:
        parts = []
        for start in range(0, len(texts), CHUNK):
            parts.append(predictor.predict(texts[start : start + CHUNK]))
            report_progress((done + start) / count)
        return np.concatenate(parts)

    return ask
