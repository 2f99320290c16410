"""What shrinking cost: the original in torch against what ships, from the answers to the test split that `measure` kept of both.

The figures are those of a comparison (`_compare_figures`, of other tasks `_compare_outputs`), and nothing is executed for them.
They stand in the run's `cost.json` as `comparison.json` would have them.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from math import isclose
from pathlib import Path
from typing import Any

import numpy as np

from . import _compare_figures as classes
from . import _compare_outputs as outputs
from ._compare_look import TEST, VALIDATION, Level, Look
from ._compare_tasks import WRITTEN, Seen, View, view_of
from .core.folders import write_json
from .evidence.groups import ENOUGH
from .run_folder import RunFolder

COST = "cost.json"
LOOK = Level(texts=20_000, draws=2000, perturbed=0, attributed=0, points=0, steps=0)
"""All texts, unless the bootstrap of so many would take minutes."""
FEWER = 2000
"""Of other tasks, whose outputs take longer to compare."""
LISTED = 20
"""Texts of each kind at most."""
MARGIN = 0.01
"""Where the drop allowed is no margin: nothing can be shown equal within 0, and everything is within 100 points."""


def write_cost(run: RunFolder, task: Any, best: Mapping[str, Any]) -> None:
    """Write `cost.json` into the run; what an earlier choice left there goes if nothing can be said of this one.

    Args:
        run: measured on the test split.
        task: on its data.
        best: the candidate that ships.
    """
    found = cost(run.path, run.values, task, best)
    if found is None:
        (run.path / COST).unlink(missing_ok=True)
    else:
        write_json(run.path / COST, found)


def cost(folder: Path, run: Mapping[str, Any], task: Any, best: Mapping[str, Any]) -> dict[str, Any] | None:
    """The figures, shares and not points. None where the original itself ships, where answers are no longer there, and of too few
    texts to claim anything.

    Args:
        folder: of the run.
        run: its `run.json`.
    """
    original = run["candidates"][0]
    models, view, source = {"before": original, "after": best}, view_of(task), Path(run["arguments"]["data"])
    if best["name"] == original["name"] or len(task.inputs(TEST)) < ENOUGH:
        return None
    splits = (TEST,) if view else (TEST, VALIDATION)
    kept = {role: _kept(folder / one["target"], task, one, splits) for role, one in models.items()}
    if not all(kept.values()):
        return None
    drop, seed = run["budget"]["max_drop"] / 100, run["seed"]
    margin = drop if 0 < drop < 1 else MARGIN
    found = _of_outputs(task, view, kept, margin, seed) if view else _of_classes(task, kept, margin, seed)
    own = found.pop("models", {role: {} for role in models})
    return {
        "schema": 1,
        "task": task.name,
        "split": TEST,
        "seed": seed,
        "data": {
            "source": str(source.absolute() if source.exists() else source),
            "columns": run["arguments"]["columns"],
        },
        "n_of_split": len(task.inputs(TEST)),
        **found,
        "models": {role: {**_facts(one), **own[role]} for role, one in models.items()},
    }


def _kept(target: Path, task: Any, candidate: Mapping[str, Any], splits: tuple[str, ...]) -> dict[str, np.ndarray]:
    """A target's answers by split; nothing unless they are those whose quality stands in `run.json`."""
    found = {}
    for split in splits:
        try:
            found[split] = np.load(target / "predictions" / f"{split}.npy", allow_pickle=False)
            if len(found[split]) != len(task.inputs(split)):
                return {}
            value = task.score(found[split], split).value
        except (OSError, EOFError, ValueError, IndexError):  # not there, half of it, or other labels
            return {}
        if not isclose(value, candidate[split]["quality"]["value"], rel_tol=1e-6):
            return {}
    return found


def _facts(candidate: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **{key: candidate.get(key) for key in ("name", "target", "runtime", "precision", "fingerprint")},
        "bytes": candidate["test"]["size"]["bytes_on_disk"],
    }


def _of_classes(task: Any, kept: Mapping[str, Mapping[str, np.ndarray]], margin: float, seed: int) -> dict[str, Any]:
    look = Look(task, LOOK, TEST, seed, margin)
    asked = look.asked()
    answers = {
        role: classes.Answers(test=found[TEST][look.rows[TEST]], validation=found[VALIDATION][look.rows[VALIDATION]])
        for role, found in kept.items()
    }
    compared = classes.compared(answers["before"], answers["after"], asked)
    compared["flips"]["examples"] = {kind: rows[:LISTED] for kind, rows in compared["flips"]["examples"].items()}
    return {
        "n": len(look.texts),
        "labels": list(task.labels),
        "margin": margin,
        "draws": LOOK.draws,
        "models": {role: classes.own_figures(found, asked) for role, found in answers.items()},
        "comparisons": {"after": compared},
    }


def _of_outputs(task: Any, view: View, kept: Mapping[str, Mapping[str, np.ndarray]], margin: float, seed: int) -> dict[str, Any]:
    """The same for another task. Texts that are written are compared by chrF, and the drop allowed is in another unit."""
    count = len(task.inputs(TEST))
    rows = sorted(random.Random(seed).sample(range(count), min(count, FEWER)))
    predictions = {role: found[TEST][rows] for role, found in kept.items()}
    asked = margin if view.share and view is not WRITTEN else None
    compared = outputs.compared(Seen(task, TEST, rows), view, predictions, margin=asked, draws=LOOK.draws, seed=seed)
    for one in compared.values():
        one["examples"] = one["examples"][:LISTED]
        one["closeness"] = [row for row in one["closeness"] if row["n"]]  # else nothing can be said
    return {
        "kind": "outputs",
        "metric": outputs.metric_of(view),
        "n": count if count < FEWER else FEWER,
        "margin": asked,
        "draws": LOOK.draws,
        "comparisons": compared,
    }
