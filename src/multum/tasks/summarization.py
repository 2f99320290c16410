"""Summarization: documents and their summaries.

Quality is the F1 of ROUGE-2, the pairs of neighbouring words that a summary shares with its reference (Lin 2004, ROUGE: A package
for automatic evaluation of summaries), 0 to 1, as `rouge-score` computes it, words stemmed; beside it ROUGE-1 and ROUGE-L. The
interval is a bootstrap over documents.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ..core.generation import texts_of
from ..core.task import Quality, SplitName
from ..core.words import UNSPACED
from ._generation import GenerationTask, needed
from ._interval import bootstrap, mean_of

KINDS = ("rouge2", "rouge1", "rougeL")


@dataclass(frozen=True, kw_only=True)
class Summarization(GenerationTask):
    """Documents and summaries of the three splits."""

    name: ClassVar[str] = "summarization"
    columns: ClassVar[tuple[str, ...]] = ("document", "summary")
    keys: ClassVar[tuple[str, ...]] = ("document",)

    def score(self, predictions: np.ndarray, split: SplitName) -> Quality:
        """ROUGE of texts as numbers (`core/generation`), (documents, 2 + characters)."""
        written, truth = texts_of(predictions), self.references[split]
        own = _Words() if _is_foreign(truth) else None
        scorer: Any = needed("rouge_score.rouge_scorer").RougeScorer(list(KINDS), use_stemmer=own is None, tokenizer=own)
        found = [scorer.score(reference, text) for reference, text in zip(truth, written, strict=True)]
        values = np.array([[one[kind].fmeasure for kind in KINDS] for one in found])
        sums = np.stack([values[:, 0], np.ones(len(values))], axis=1)
        means = dict(zip(KINDS, values.mean(0).tolist(), strict=True))
        return Quality(
            metric="rouge2",
            value=means["rouge2"],
            ci95=bootstrap(sums, mean_of),
            n=len(values),
            others={"rouge1": means["rouge1"], "rougeL": means["rougeL"], "words": "unicode" if own else "stemmed English"},
        )


class _Words:
    """Words of any language in small letters, where rouge-score knows but those of English; characters where none are spaced."""

    def tokenize(self, text: str) -> list[str]:
        """The words of a text."""
        return re.findall(rf"[{UNSPACED}]|[^\W_{UNSPACED}]+", text.lower())


def _is_foreign(texts: Any) -> bool:
    """Whether most letters are none of those that rouge-score reads."""
    text = "".join(texts[:1000]).lower()
    return len(re.findall("[a-z0-9]", text)) < 0.5 * len(re.findall(r"[^\W_]", text))
