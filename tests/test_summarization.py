"""Summarization: ROUGE as rouge-score has it, also of languages that it does not know."""

from __future__ import annotations

import numpy as np
import pytest
import translators
from rouge_score.rouge_scorer import RougeScorer

from multum.data import open_task
from multum.errors import InputError
from multum.tasks.summarization import Summarization


def test_rouge_is_that_of_rouge_score_and_the_interval_that_of_other_documents() -> None:
    task, rng = translators.summarizing(), np.random.default_rng(0)
    truth = list(task.references["validation"])
    texts = [" ".join(word for word in text.split() if rng.random() < 0.8) for text in truth]
    quality = task.score(translators.predictions(texts), "validation")
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    found = [scorer.score(reference, text) for reference, text in zip(truth, texts, strict=True)]
    each = np.array([one["rouge2"].fmeasure for one in found])
    assert (quality.metric, quality.n) == ("rouge2", len(truth))
    assert quality.value == pytest.approx(each.mean())
    assert quality.others["rouge1"] == pytest.approx(np.mean([one["rouge1"].fmeasure for one in found]))
    assert quality.others["rougeL"] == pytest.approx(np.mean([one["rougeL"].fmeasure for one in found]))
    drawn = [each[rng.integers(0, len(each), len(each))].mean() for _ in range(2000)]
    assert quality.ci95 == pytest.approx(np.percentile(drawn, [2.5, 97.5]), abs=0.03)
    assert task.score(translators.predictions(truth), "validation").value == pytest.approx(1.0)


def test_words_of_other_scripts_count() -> None:
    made = translators.splits(8, 4, 4, columns=Summarization.columns)
    for summary, written, same in (("старый дом", "старый дом", 1.0), ("这是旧书", "这是新书", 1 / 3)):
        made.test = made.test.map(lambda row, summary=summary: {"summary": summary})
        quality = Summarization.from_splits(made).score(translators.predictions([written] * 4), "test")
        assert quality.value == pytest.approx(same)
        assert quality.others["words"] == "unicode"


def test_a_document_without_summary_is_dropped_and_counted(tmp_path) -> None:
    rows = [f"{document},{summary}" for document, summary in translators.sentences(40)]
    (tmp_path / "d.csv").write_text("\n".join(["document,summary", *rows, "a film,"]) + "\n", encoding="utf-8")
    task = open_task("summarization", str(tmp_path / "d.csv"))
    assert "1 row dropped: empty summary" in task.notes
    (tmp_path / "e.csv").write_text("document\na\n", encoding="utf-8")
    with pytest.raises(InputError, match="no column 'summary'"):
        open_task("summarization", str(tmp_path / "e.csv"))
