r"""Questions answered by a span of a text: long texts read in overlapping windows, the best spans over all of them.

The score of a span is the sum of the logits of its first and last token, s_i + e_j with i <= j < i + 30; the score of *no answer*
is that of the first token, s_0 + e_0, the least over the windows, as a question is unanswerable only if every window says so
(Devlin et al. 2019, arXiv:1810.04805, section 4.3). A question has no answer where that exceeds the best span's score by more
than a threshold; a model trained without such questions always answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from ..errors import InputError
from .reading import check_places, padded, softmax

BEST = 20
"""Spans that are kept of a question, and firsts and lasts that are combined in a window."""
LONGEST = 30
"""Tokens of an answer at most."""
STRIDE = 128
"""Tokens that a window shares with the next, but not more than a quarter of it."""
THRESHOLD = "null_threshold"
"""The entry of a model's config that says from which margin on a question has no answer; without it every question has one."""


class Passages:
    """(question, context); for each the best spans, (1 + spans, 3): first character, the one behind the last, score.

    The first row is *no answer*, from 0 to 0; the others are in falling order.
    """

    task: ClassVar[str] = "question-answering"
    auto_class: ClassVar[str] = "AutoModelForQuestionAnswering"
    outputs: ClassVar[tuple[str, ...]] = ("start_logits", "end_logits")
    columns: ClassVar[tuple[str, str | None]] = ("question", "context")
    cuts: ClassVar[bool] = False

    def __init__(self, threshold: float | None = None) -> None:
        self.threshold = threshold

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Passages:
        return cls(config.get(THRESHOLD))

    def encode(self, tokenizer: Any, inputs: Sequence[Any], max_length: int, tensors: str | None) -> Any:
        """Windows over the contexts; `overflow_to_sample_mapping` says whose each row is. Questions longer than half are cut."""
        if any(isinstance(pair, str) or len(pair) != 2 for pair in inputs):
            raise InputError("question-answering takes a question and a context for each; give every text its --pair")
        check_places(tokenizer, self.task)
        encoded = tokenizer(
            _short([question for question, _ in inputs], tokenizer, max_length // 2),
            [context for _, context in inputs],
            truncation="only_second",
            max_length=max_length,
            stride=min(STRIDE, max_length // 4),
            return_overflowing_tokens=True,
            **padded(tokenizer, tensors),
        )
        encoded["overflow_to_sample_mapping"] = [int(owner) for owner in encoded["overflow_to_sample_mapping"]]
        return encoded

    def predictions(self, encoded: Any, outputs: Mapping[str, np.ndarray], inputs: Sequence[Any]) -> list[np.ndarray]:
        nothing = np.full(len(inputs), np.inf)
        spans: list[dict[tuple[int, int], float]] = [{} for _ in inputs]
        rows = zip(outputs["start_logits"], outputs["end_logits"], encoded.encodings, strict=True)
        for owner, (starts, ends, row) in zip(encoded["overflow_to_sample_mapping"], rows, strict=True):
            first = first_token(row)
            nothing[owner] = min(nothing[owner], starts[first] + ends[first])
            for (start, end), score in _best(starts, ends, row):
                start += _spaces(inputs[owner][1][start:end])  # some tokens begin with one
                spans[owner][start, end] = max(score, spans[owner].get((start, end), -np.inf))
        result = []
        for none, found in zip(nothing, spans, strict=True):
            best = sorted(found.items(), key=lambda item: -item[1])[:BEST]
            result.append(np.array([(0, 0, none), *((*span, score) for span, score in best)], dtype=np.float32))
        return result

    def answers(self, predictions: np.ndarray, inputs: Sequence[Any], labels: Sequence[str]) -> list[dict[str, Any]]:
        """The answer, from and to which character of the context it goes, and its share of the probability of all kept spans."""
        result = []
        for (question, context), rows in zip(inputs, predictions, strict=True):
            chosen = choose(rows, self.threshold)
            first = int(self.threshold is None and chosen > 0)  # no answer counts where it may be one, or is all there is
            share = softmax(rows[first:, 2].astype(np.float64))[chosen - first]
            start, end = int(rows[chosen, 0]), int(rows[chosen, 1])
            answer = {"answer": context[start:end], "score": round(float(share), 6), "start": start, "end": end}
            result.append({"text": question, "context": context, **answer})
        return result

    def line(self, answer: Mapping[str, Any]) -> str:
        return f"{' '.join(answer['answer'].split()) or '-'}\t{answer['score']:.3f}"


def choose(rows: np.ndarray, threshold: float | None) -> int:
    """Which row of a question's predictions is its answer: 0, none, or 1, the best span.

    Args:
        rows: as `Passages` has them, perhaps padded with nan.
        threshold: no answer from this margin on; None: never, if there is any span.
    """
    if len(rows) < 2 or np.isnan(rows[1, 2]):
        return 0
    return int(threshold is None or margin(rows) <= threshold)


def margin(rows: np.ndarray) -> float:
    """By how much the score of no answer exceeds that of the best span; inf if there is none."""
    return float(rows[0, 2] - rows[1, 2]) if len(rows) > 1 and not np.isnan(rows[1, 2]) else float("inf")


def first_token(row: Any) -> int:
    """The place that stands for *no answer*: the first that is no padding."""
    return int(row.attention_mask.index(1))


def context_tokens(row: Any) -> list[int]:
    """The places of a row's tokens that are of the context and have characters in it."""
    return [place for place, part in enumerate(row.sequence_ids) if part == 1 and row.offsets[place][0] < row.offsets[place][1]]


def _best(starts: np.ndarray, ends: np.ndarray, row: Any) -> list[tuple[tuple[int, int], float]]:
    """The spans of a window with the highest scores, in characters."""
    places = np.array(context_tokens(row), dtype=np.int64)
    if not len(places):
        return []
    firsts = places[np.argsort(-starts[places], kind="stable")[:BEST]]
    lasts = places[np.argsort(-ends[places], kind="stable")[:BEST]]
    length = lasts[None, :] - firsts[:, None]
    scores = np.where((length >= 0) & (length < LONGEST), starts[firsts][:, None] + ends[lasts][None, :], -np.inf)
    order = np.argsort(-scores, axis=None, kind="stable")[:BEST]
    found = [(*divmod(int(place), len(lasts)), float(scores.flat[place])) for place in order]
    return [((row.offsets[firsts[i]][0], row.offsets[lasts[j]][1]), score) for i, j, score in found if np.isfinite(score)]


def _spaces(text: str) -> int:
    return len(text) - len(text.lstrip())


def _short(questions: Sequence[str], tokenizer: Any, limit: int) -> list[str]:
    """Questions cut after so many tokens. A token has at least one character, so that short texts need no look."""
    result = []
    for question in questions:
        if len(question) > limit:
            offsets = tokenizer(question, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
            question = question if len(offsets) <= limit else question[: offsets[limit - 1][1]]
        result.append(question)
    return result
