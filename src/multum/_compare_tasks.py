"""What a comparison asks of tasks other than classification into one class: what an example adds to the metric, what was put out.

A `View` is one task's look at predictions, as a runtime returns them. Where there are no logits of classes two models are compared
by their outputs: which are the same, and how far the others are apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .evidence import outputs as ev

Closeness = list[tuple[str, bool, np.ndarray]]
"""Name, whether it is a share, one value an example."""
Outputs = list[Any]
"""Hashable, so that they can be found equal."""


@dataclass(frozen=True)
class Seen:
    """The examples that are looked at."""

    task: Any
    split: str
    rows: Sequence[int]

    @property
    def inputs(self) -> list[Any]:
        return [self.task.inputs(self.split)[at] for at in self.rows]


@dataclass(frozen=True, kw_only=True)
class View:
    """How a task's predictions are looked at."""

    metric: str
    figure: ev.Figure
    adds: Callable[[Seen, Any, Outputs], np.ndarray]
    """What every example adds to the metric, (n, k)."""
    puts_out: Callable[[Seen, Any], Outputs]
    """What every prediction comes to: tags, a text, labels, a number."""
    apart: Callable[[Any, Any, Outputs, Outputs], Closeness]
    """Predictions and outputs, before and after -> how far they are apart."""
    discrete: bool = True
    """Whether outputs can be the same."""
    lower_is_better: bool = False
    share: bool = True
    """Whether the metric is a share, 0 to 1."""


def view_of(task: Any) -> View | None:
    """How this task is looked at; None for classification into one class, which has a comparison of its own."""
    kind = getattr(task, "problem", "")
    if task.name == "text-classification":
        return {"multi_label_classification": MULTI_LABEL, "regression": REGRESSION}.get(kind)
    if task.name == "token-classification":
        from .core.words import in_spans

        return ENTITIES if in_spans(task.labels) else WORDS
    return VIEWS[task.name]


# -- tags of words -----------------------------------------------------------------------------------------------------------


def _tags(seen: Seen, predictions: Any) -> Outputs:
    from .core.words import best_tags

    return [
        tuple(best_tags(logits[: len(words)], seen.task.labels)[0]) for logits, words in zip(predictions, seen.inputs, strict=True)
    ]


def _entities(seen: Seen, _: Any, outputs: Outputs) -> np.ndarray:
    from .core.words import entities

    found = []
    for row, tags in zip(seen.rows, outputs, strict=True):
        ours, theirs = set(entities(tags)), set(entities(seen.task.tags[seen.split][row]))
        found.append((len(ours & theirs), len(ours), len(theirs)))
    return np.array(found, dtype=np.float64)


def _words(seen: Seen, _: Any, outputs: Outputs) -> np.ndarray:
    truth = [seen.task.tags[seen.split][row] for row in seen.rows]
    pairs = zip(outputs, truth, strict=True)
    return np.array(
        [(sum(a == b for a, b in zip(tags, right, strict=True)), len(right)) for tags, right in pairs], dtype=np.float64
    )


def _tags_apart(before: Any, after: Any, first: Outputs, second: Outputs) -> Closeness:
    alike = [np.mean([a == b for a, b in zip(one, other, strict=True)]) for one, other in zip(first, second, strict=True)]
    kl = [_mean(ev.kl_of(one[: len(tags)], other[: len(tags)])) for one, other, tags in zip(before, after, first, strict=True)]
    return [
        ("Words tagged alike, mean over texts", True, np.array(alike)),
        ("KL (before‖after) of a word, nats", False, np.array(kl)),
    ]


def _mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


WORDS = View(metric="Accuracy of words", figure=ev.ratio, adds=_words, puts_out=_tags, apart=_tags_apart)
ENTITIES = View(metric="F1 of entities", figure=ev.f1, adds=_entities, puts_out=_tags, apart=_tags_apart)


# -- texts with labels, texts with a number ----------------------------------------------------------------------------------


def _label_sets(seen: Seen, predictions: Any) -> Outputs:
    return [tuple(label for label, value in zip(seen.task.labels, row, strict=True) if value > 0) for row in predictions]


def _label_counts(seen: Seen, predictions: Any, _: Outputs) -> np.ndarray:
    truth, guess = seen.task.targets[seen.split][list(seen.rows)] > 0.5, np.asarray(predictions) > 0
    return np.stack([(truth & guess).sum(1), guess.sum(1), truth.sum(1)], axis=1).astype(np.float64)


def _labels_apart(before: Any, after: Any, _: Outputs, __: Outputs) -> Closeness:
    one, other = (np.stack([np.zeros_like(z), z], axis=-1) for z in (np.asarray(before), np.asarray(after)))
    alike = ((np.asarray(before) > 0) == (np.asarray(after) > 0)).mean(1)
    return [("Labels decided alike", True, alike), ("KL (before‖after) of a label, nats", False, ev.kl_of(one, other).mean(1))]


def _numbers(_: Seen, predictions: Any) -> Outputs:
    return [float(row[0]) for row in predictions]


def _moments(seen: Seen, _: Any, outputs: Outputs) -> np.ndarray:
    x, y = np.array(outputs, dtype=np.float64), np.asarray(seen.task.targets[seen.split][list(seen.rows)], dtype=np.float64)
    x, y = x - x.mean(), y - y.mean()  # what a correlation does not see, and sums of squares do
    return np.stack([np.ones_like(x), x, y, x * x, y * y, x * y], axis=1)


def _numbers_apart(_: Any, __: Any, first: Outputs, second: Outputs) -> Closeness:
    return [("Distance of the two numbers", False, np.abs(np.array(first) - np.array(second)))]


MULTI_LABEL = View(metric="F1 of labels", figure=ev.f1, adds=_label_counts, puts_out=_label_sets, apart=_labels_apart)
REGRESSION = View(
    metric="Pearson's correlation", figure=ev.correlation, adds=_moments, puts_out=_numbers, apart=_numbers_apart, discrete=False
)


# -- answers and texts -------------------------------------------------------------------------------------------------------


def _answers(seen: Seen, predictions: Any) -> Outputs:
    from .core.passages import choose

    found: Outputs = []
    for rows, (_, context) in zip(predictions, seen.inputs, strict=True):
        chosen = rows[choose(rows, seen.task.null_threshold)]
        found.append(context[int(chosen[0]) : int(chosen[1])])
    return found


def _answer_f1(seen: Seen, _: Any, outputs: Outputs) -> np.ndarray:
    from .tasks._squad import f1

    known = [[text for text, _ in seen.task.answers[seen.split][row]] for row in seen.rows]
    return np.array([(f1(str(answer), right), 1.0) for answer, right in zip(outputs, known, strict=True)])


def _texts(_: Seen, predictions: Any) -> Outputs:
    from .core.generation import texts_of

    return list(texts_of(predictions))


def _chrf(seen: Seen, _: Any, outputs: Outputs) -> np.ndarray:
    from .tasks._generation import needed

    metric = needed("sacrebleu.metrics").CHRF()
    right = [seen.task.references[seen.split][row] for row in seen.rows]
    return np.array([(metric.sentence_score(text, [one]).score / 100, 1.0) for text, one in zip(outputs, right, strict=True)])


def texts_apart(_: Any, __: Any, first: Outputs, second: Outputs) -> Closeness:
    pairs = [(str(one).split(), str(other).split()) for one, other in zip(first, second, strict=True)]
    return [
        ("Words before the two part, share", True, np.array([ev.until_they_part(*pair) for pair in pairs])),
        ("Words kept", True, np.array([ev.kept(*pair) for pair in pairs])),
    ]


WRITTEN = View(metric="chrF, mean over texts", figure=ev.ratio, adds=_chrf, puts_out=_texts, apart=texts_apart)


# -- language models ---------------------------------------------------------------------------------------------------------


def _sums(_: Seen, predictions: Any) -> Outputs:
    return [tuple(np.nansum(np.asarray(rows, dtype=np.float64).reshape(-1, rows.shape[-1]), axis=0)) for rows in predictions]


def _likelihood(_: Seen, __: Any, outputs: Outputs) -> np.ndarray:
    return np.array(outputs, dtype=np.float64)[:, :2]


def _hits(_: Seen, __: Any, outputs: Outputs) -> np.ndarray:
    return np.array(outputs, dtype=np.float64)[:, 1:3]


def _surprise_apart(_: Any, __: Any, first: Outputs, second: Outputs) -> Closeness:
    one, other = (np.array(sums, dtype=np.float64) for sums in (first, second))
    with np.errstate(divide="ignore", invalid="ignore"):
        return [
            (
                "Distance of the mean log-probabilities of a text's tokens, nats",
                False,
                np.abs(one[:, 0] / one[:, 1] - other[:, 0] / other[:, 1]),
            )
        ]


VIEWS = {
    "question-answering": View(metric="F1 of answers", figure=ev.ratio, adds=_answer_f1, puts_out=_answers, apart=texts_apart),
    "translation": WRITTEN,
    "summarization": WRITTEN,
    "text-generation": View(
        metric="Perplexity", figure=ev.perplexity, adds=_likelihood, puts_out=_sums, apart=_surprise_apart, discrete=False,
        lower_is_better=True, share=False,
    ),
    "fill-mask": View(
        metric="Accuracy of hidden tokens", figure=ev.ratio, adds=_hits, puts_out=_sums, apart=lambda *_: [], discrete=False
    ),
}  # fmt: skip
