"""The inside of two models while they answer some texts: what goes through every word at every depth, and where attention leads.

The texts are those whose answers are attributed, and so are the answers. A model whose inside cannot be seen has nothing here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ._compare_attribution import Attributed, Attributor
from ._compare_work import Arrays, ByText, Work, portions
from .errors import MultumError
from .evidence._words import words_of
from .evidence.attribution import agreement
from .evidence.depths import depth_agreement
from .evidence.rollout import rollout


@dataclass(frozen=True, kw_only=True)
class Inside:
    """One model's, of every text that is attributed. Nothing in a list of what cannot be seen."""

    depths: list[np.ndarray]
    """Conductances, (depths, words)."""
    share: np.ndarray
    """How much of them stands on words, (texts, depths)."""
    errors: np.ndarray
    """Of their sums, (texts, depths)."""
    rollout: list[np.ndarray]
    """Attention rollout from what the head reads, (words,)."""


class Insider(ByText):
    """Looks inside one model, some texts at a time.

    Args:
        attributor: the model and its texts.
        task: that it was made for.
        steps: of the sums that conductances are.
    """

    def __init__(self, attributor: Attributor, task: Any, steps: int) -> None:
        super().__init__(attributor.texts)
        self._attributor, self._task, self._steps = attributor, task, steps

    def run(self, work: Work, name: str) -> Inside:
        """All texts; what an earlier call has done is taken from `work`."""
        parts = self.parts(work, name)

        def by_text(key: str) -> list[np.ndarray]:
            return [part[key][..., begin:end] for part in parts if key in part for begin, end in portions(part["lengths"])]

        share, errors = ([part[key] for part in parts if key in part] for key in ("share", "errors"))
        return Inside(
            depths=by_text("depths"),
            share=np.concatenate(share) if share else np.empty((0, 0)),
            errors=np.concatenate(errors) if errors else np.empty((0, 0)),
            rollout=by_text("rollout"),
        )

    def _compute(self, start: int, end: int) -> Arrays:
        texts = self.texts[start:end]
        lengths = np.array([len(words_of(text)) for text in texts])
        return {"lengths": lengths, **self._depths(texts), **self._rollouts(texts)}

    def _depths(self, texts: Sequence[Any]) -> Arrays:
        from .evidence._conductance import word_conductances

        model = self._attributor.model
        try:
            found = word_conductances(model, texts, max_length=self._task.length_limit(model), steps=self._steps)
        except MultumError:  # no hidden states, or two stacks of them
            return {}
        return {
            "depths": np.concatenate([one.words for one in found], axis=1),
            "share": np.stack([one.share for one in found]),
            "errors": np.stack([one.errors for one in found]),
        }

    def _rollouts(self, texts: Sequence[Any]) -> Arrays:
        from .evidence._attentions import attentions
        from .evidence._gradients import by_word, encoded

        model, found = self._attributor.model, []
        for text in texts:
            row = encoded(model, text, self._task.length_limit(model))
            try:
                seen = attentions(model, row)
            except MultumError:  # DeBERTa and MPNet attend by code of their own
                return {}
            found.append(by_word(rollout(seen.blocks, seen.read), row.places, words_of(text)))
        return {"rollout": np.concatenate(found)}


def inside_figures(inside: Inside | None, found: Attributed | None, **drawing: int) -> dict[str, Any] | None:
    """What is said of one model alone: by depth how much stands on words and how exact it is; rollout against gradients."""
    if inside is None or found is None:
        return None
    depths = None
    if inside.depths:
        depths = {"words": inside.share.mean(axis=0).tolist(), "error": np.median(inside.errors, axis=0).tolist()}
    led = None
    if inside.rollout:
        sizes = [np.abs(words) for words in found.words]  # rollout has no sign
        led = {"with_gradients": _agreement(inside.rollout, sizes, found, found, **drawing)}
    return {"depths": depths, "rollout": led}


def depth_figures(before: Inside | None, other: Inside | None, answers: Sequence[Attributed | None], **drawing: int) -> Any:
    """How alike two models rank the words at every pair of depths; None where it cannot be seen."""
    first, second = answers
    if before is None or other is None or first is None or second is None or not (before.depths and other.depths):
        return None
    return depth_agreement(before.depths, other.depths, first.answers, second.answers, **drawing)


def rollout_figures(before: Inside | None, other: Inside | None, answers: Sequence[Attributed | None], **drawing: int) -> Any:
    """How alike attention leads to words in two models; None where it cannot be seen."""
    first, second = answers
    if before is None or other is None or first is None or second is None or not (before.rollout and other.rollout):
        return None
    return _agreement(before.rollout, other.rollout, first, second, **drawing)


def rollout_shares(inside: Inside | None, at: int) -> list[float | None] | None:
    """One text's rollout as shares of what its words get together; None for words that were not read."""
    if inside is None or not inside.rollout:
        return None
    whole = float(np.nansum(inside.rollout[at])) or 1.0
    return [None if np.isnan(value) else round(float(value) / whole, 4) for value in inside.rollout[at]]


def _agreement(a: Sequence[np.ndarray], b: Sequence[np.ndarray], first: Attributed, second: Attributed, **drawing: int) -> Any:
    found = agreement(a, b, first.answers, second.answers, **drawing)
    return found and {key: found[key] for key in ("rank", "overlap", "overlap_by_chance", "n")}
