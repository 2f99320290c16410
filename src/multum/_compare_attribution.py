"""Why two models answer as they do: attributions of some texts by their torch forms, and whether those can be trusted."""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ._compare_work import Arrays, ByText, Work, portions
from .core.folders import read_json
from .errors import MissingExtra
from .evidence._words import FEWEST, kept_words, words_of
from .evidence.attribution import deletions, order
from .targets import MADE_FROM, fingerprint

ORDERS = 3
"""Random orders that every attribution is set against."""
LONGEST = 400
"""Characters of a text that is attributed, of pairs both: what is longer costs much and is read by nobody."""


@dataclass(frozen=True, kw_only=True)
class Attributed:
    """One model's attributions of the chosen texts, and its answers when words are taken out."""

    words: list[np.ndarray]
    answers: np.ndarray
    errors: np.ndarray
    whole: np.ndarray
    guided: np.ndarray
    random: np.ndarray


def torch_form(target: Path) -> Path | None:
    """The model folder that gradients are taken of: the target itself, or the one that its export was made from."""
    for folder in (target, target.parent):
        if (folder / "config.json").is_file() and any(folder.glob("*.safetensors")) and not (folder / "runtime.json").is_file():
            return folder
    manifest = target / "runtime.json"
    made_from = read_json(manifest).get(MADE_FROM) if manifest.is_file() else None
    if made_from and (folder := (target / made_from["folder"]).resolve()).is_dir():
        return folder if fingerprint(folder) == made_from["fingerprint"] else None
    return None


def why_not(forms: dict[str, Path | None]) -> str:
    """Why nothing can be attributed; empty if it can."""
    if lacking := [role for role, form in forms.items() if form is None]:
        which = " and ".join(lacking)
        return f"no attributions: the model {which} is an export without the model folder it was made from, and has no gradients"
    if importlib.util.find_spec("captum") is None:
        return f"no attributions: {MissingExtra('captum', 'evidence')}"
    return ""


def chosen(texts: Sequence[Any], count: int, seed: int) -> list[int]:
    """Which texts are attributed: some of those with enough words and not too many characters, in order."""
    sizes = [len(text) if isinstance(text, str) else sum(map(len, text)) for text in texts]
    fit = [at for at, text in enumerate(texts) if sizes[at] <= LONGEST and len(words_of(text)) > FEWEST]
    return sorted(random.Random(seed).sample(fit, min(count, len(fit))))


class Attributor(ByText):
    """Attributes the answers of one model, some texts at a time."""

    def __init__(self, form: Path, task: Any, texts: Sequence[Any], points: int, seed: int) -> None:
        super().__init__(texts)
        self._task, self._points, self._seed = task, points, seed
        self._form = form

    def run(self, work: Work, name: str) -> Attributed:
        """All texts; what an earlier call has done is taken from `work`."""
        parts = self.parts(work, name)
        words = [part["words"][begin:end] for part in parts for begin, end in portions(part["lengths"])]
        joined = {key: np.concatenate([part[key] for part in parts]) for key in ("answers", "errors", "whole", "guided", "random")}
        return Attributed(words=words, **joined)

    @cached_property
    def model(self) -> Any:
        """The torch form, loaded when it is first asked for."""
        return self._task.load(str(self._form))

    def _compute(self, start: int, end: int) -> Arrays:
        from .evidence._gradients import word_attributions

        texts = self.texts[start:end]
        limit = self._task.length_limit(self.model)
        words, answers, errors = word_attributions(self.model, texts, max_length=limit, steps=self._points)
        tested = [
            self._test(start + at, text, values, int(answer))
            for at, (text, values, answer) in enumerate(zip(texts, words, answers, strict=True))
        ]
        whole, guided, by_chance = (np.stack(column) for column in zip(*tested, strict=True))
        return {
            "words": np.concatenate(words),
            "lengths": np.array([len(values) for values in words]),
            "answers": answers,
            "errors": errors,
            "whole": whole,
            "guided": guided,
            "random": by_chance,
        }

    def _test(self, at: int, text: Any, attribution: np.ndarray, answer: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The answer's probability for the text, without some words, and with some alone. Words unread are left out of all."""
        spans, seen = words_of(text), np.flatnonzero(np.isfinite(attribution))
        rng = np.random.default_rng([self._seed, at])
        orders = [order(attribution[seen]), *(rng.permutation(len(seen)) for _ in range(ORDERS))]
        masks = [np.ones(len(seen), dtype=bool), *(mask for each in orders for mask in deletions(each))]
        made = []
        for mask in masks:
            keep = np.zeros(len(spans), dtype=bool)
            keep[seen] = mask
            made.append(kept_words(text, spans, keep))
        p = self._probabilities(made)[:, answer]
        asked = p[1:].reshape(1 + ORDERS, -1)
        return p[0], asked[0], asked[1:]

    def _probabilities(self, texts: Sequence[Any]) -> np.ndarray:
        import torch

        from .core.training import pad

        rows = self._task.encode_texts(self.model, texts).remove_columns("labels")
        with torch.inference_mode():
            logits = self.model.module(**pad(list(rows), self.model.tokenizer.pad_token_id)).logits.float()
        return np.asarray(logits.softmax(dim=1).double().numpy())
