"""The main job for what is no plain text: a tagger and a model for questions, from a base encoder to a report."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import taggers
import translators

import multum
from multum import runtimes
from multum._runtime_table import Form
from multum.bench import Bench, measured_table
from multum.budget import QUICK
from multum.core.latency import LatencyTable
from multum.core.model import Model
from multum.core.surgery import heads_and_neurons
from multum.errors import InputError

EFFORT = replace(
    QUICK,
    finetune={"epochs": 14, "learning_rate": 4e-3, "batch_size": 16},
    distill={"epochs": 1, "augment": 1, "batch_size": 16},
    prune={"samples": 16, "neuron_group": 4},
    rounds=2,
    teach_below=1.0,
)
TASKS: dict[str, tuple[Any, Any, str]] = {
    "token-classification": (taggers.tagger, taggers.tagged, "AutoModelForTokenClassification"),
    "question-answering": (taggers.answerer, taggers.asked, "AutoModelForQuestionAnswering"),
}
"""Name -> a model, data, and what Transformers calls the class that loads the model."""


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Little training, one export, and counted instead of timed costs."""

    def counted(self: Bench, model: Model) -> LatencyTable:
        table = replace(LatencyTable.by_macs(hidden=32, head_size=8, heads=4, neurons=32, tokens=12), every_token=True)
        table.save(self.folder / "latency.json")
        return table

    monkeypatch.setattr("multum._shrink.QUICK", EFFORT)
    monkeypatch.setattr("multum.ladder.MAX_RUNGS", 2)
    monkeypatch.setattr("multum.bench.offers", lambda: [("onnxruntime", "int8")])
    monkeypatch.setattr("multum.landing.candidates", lambda task: [Form("onnxruntime", "int8")])
    monkeypatch.setattr(Bench, "latency_table", counted)


@pytest.mark.parametrize("name", TASKS)
def test_a_run_from_base_encoder_to_report(name: str, tmp_path: Path) -> None:
    make, rows, auto_class = TASKS[name]
    model, data = make("bert", layers=2), rows(260)
    model.module.bert.save_pretrained(tmp_path / "base")
    model.tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "data").mkdir()
    for split, part in (("train", data[:196]), ("validation", data[196:228]), ("test", data[228:])):
        (tmp_path / "data" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, part)))
    output = tmp_path / "run"
    run = multum.shrink(
        str(tmp_path / "base"), task=name, data=str(tmp_path / "data"), output=output, quick=True, max_drop=60.0, threads=1
    )
    names = [candidate["name"] for candidate in run["candidates"]]
    assert names[0] == "original"
    assert "rung-02" in names
    assert run["met"]
    best = next(candidate for candidate in run["candidates"] if candidate["name"] == run["chosen"])
    assert run["candidates"][0]["validation"]["quality"]["value"] > 0.5
    for candidate in run["candidates"]:
        quality = candidate["validation"]["quality"]
        assert quality["metric"] == "f1"
        assert candidate["drop"] == pytest.approx(
            100 * (run["candidates"][0]["validation"]["quality"]["value"] - quality["value"]), abs=1e-3
        )
    assert best["test"]["quality"]["metric"] == "f1"
    assert best["drop"] <= 60.0
    for page in ("report.html", "README.md"):
        assert auto_class in (output / page).read_text()
    predictor = runtimes.open(output / "chosen", threads=1)
    inputs = [tuple(row["tokens"]) if name.startswith("token") else (row["question"], row["context"]) for row in data[:3]]
    assert len(predictor.reader.answers(predictor.predict(inputs), inputs, predictor.labels)) == 3


def test_an_encoder_decoder_is_refused_before_it_is_trained(tmp_path: Path) -> None:
    """transformers has heads of these tasks for some of them; their decoders are no blocks of an encoder."""
    translators.translator("bart").save(tmp_path / "bart")
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, taggers.asked(40))))
    with pytest.raises(InputError, match=r"shrink for question-answering takes models of one stack of blocks.*'bart'"):
        multum.shrink(str(tmp_path / "bart"), task="question-answering", data=str(tmp_path / "data.jsonl"), output=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_table_of_a_tagger_has_no_cheap_last_block() -> None:
    model, task = taggers.tagger("bert"), taggers.tagging()
    table = measured_table(model, task, precision="fp32", threads=1, rounds=1)
    assert table.every_token
    assert table.base > 0
    assert table.attention_last == table.attention
    assert set(table.about["lengths"]) <= {len(row["input_ids"]) for row in task.encode(model, "validation")}


def test_stacks_as_deep_as_the_model_are_timed_unless_any_would_fill_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    model, task, depths = taggers.tagger("bert"), taggers.tagging(), []

    def noted(timer: Any, **options: Any) -> LatencyTable:
        depths.append(options["depth"])
        return measured(timer, **options)

    measured = LatencyTable.measure
    monkeypatch.setattr(LatencyTable, "measure", noted)
    table = measured_table(model, task, precision="fp32", threads=1, rounds=1)
    assert len(table.deep) > 1
    monkeypatch.setattr("multum.bench.DEEP", 0)
    assert not measured_table(model, task, precision="fp32", threads=1, rounds=1).deep
    assert depths == [len(heads_and_neurons(model.module)), 0]
