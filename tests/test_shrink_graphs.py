"""The main job for models that write where a runtime takes them as graphs: what the original is tried in, and what ships."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import tiny
import translators
from test_shrink_writing import Inside, read, run, small

from multum import runtimes
from multum._runtime_table import Form
from multum.budget import TRANSLATORS_QUICK, Budget
from multum.core.folders import read_json
from multum.core.generation import texts_of, write
from multum.core.model import Model
from multum.descent import WRITERS, CausalDescent, Descent, TranslatorDescent
from multum.errors import InputError
from multum.ladder import Ladder
from multum.landing import Landing
from multum.plan import NO_EXPORT, ORIGINAL, ahead
from multum.progress import Progress
from multum.run_folder import RunFolder
from multum.targets import targets_of

__all__ = ["small"]
FP32, SIZE = Form("onnxruntime", "fp32"), {"bytes_on_disk": 1}
GRAPHS = [("onnxruntime", "fp32"), ("onnxruntime", "int8"), ("openvino", "fp32"), ("openvino", "int8")]
INT8S, FP32S = ([form for form in GRAPHS if form[1] == precision] for precision in ("int8", "fp32"))


def descent(kind: type[Descent]) -> Descent:
    return kind(folder=Path(), effort=TRANSLATORS_QUICK, seed=0)


@pytest.mark.parametrize("llama", [None, "not installed"])
def test_the_fewest_bytes_are_tried_first_and_llama_cpp_before_graphs(llama: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("multum.bench.offers", lambda: GRAPHS)
    monkeypatch.setattr("multum.runtimes.llamacpp.unavailable", lambda: llama)
    assert descent(Descent).offers() == [GRAPHS]
    assert descent(TranslatorDescent).offers() == [INT8S, FP32S]
    files = [] if llama else [("llamacpp", precision) for precision in WRITERS]
    assert descent(CausalDescent).offers() == [files, INT8S, FP32S]


# -- what the original is tried in ---------------------------------------------------------------------------------------------


class Tried(Ladder):
    """The leg that measures the original, with exports and drops that are made up.

    Args:
        folder: of the run.
        drops: of every form that there is.
    """

    ms: ClassVar[dict[str, float]] = {"pytorch": 9.0, "llamacpp": 2.0, "onnxruntime": 2.0, "openvino": 2.5}

    def __init__(self, folder: Path, drops: dict[tuple[str, str], float], kind: type[Descent] = TranslatorDescent) -> None:
        arguments = {"model": "m", "data": "d", "seed": 0, "threads": 1, "quick": True}
        self.run = RunFolder(folder, arguments, task=tiny.task(), budget=Budget(max_drop=1.0), time_limit_s=None)
        self.drops, self.progress, self.folder = drops, Progress.silent(), folder
        self.descent, self.task, self.number = descent(kind), translators.translating(), kind.number
        self.exported: list[tuple[str, str]] = []
        self.measured: list[list[str]] = []
        self.bench: Any = SimpleNamespace(export=self._export, measure=self._measure, add=self._add, doubt=len, keep=self.run.write)

    def _export(self, _: Model, folder: Path, wanted: Sequence[tuple[str, str]]) -> list[Path]:
        there = [form for form in wanted if form in self.drops]
        self.exported += there
        return [folder / "-".join(form) for form in there]

    def _measure(self, targets: Sequence[Path]) -> list[dict[str, Any]]:
        self.measured.append([target.name for target in targets])
        forms = [("pytorch", "fp32"), *(tuple(target.name.split("-")) for target in targets[1:])]
        return [{"speed": {"runtime": one, "precision": other, "p50_ms": self.ms[one]}, "size": SIZE} for one, other in forms]

    def _add(self, name: str, folder: Path, target: Path, technique: str, _: Model, metrics: dict[str, Any]) -> None:
        about = {key: metrics["speed"][key] for key in ("runtime", "precision")}
        drop = self.drops.get((about["runtime"], about["precision"]), 0.0)
        target_name = folder.name if target == folder else f"{folder.name}/{target.name}"
        found = {"name": name, "folder": folder.name, "target": target_name, "technique": technique, **about}
        self.run.add({**found, "validation": metrics, "drop": drop, "speedup": 1.0})

    def try_(self) -> str:
        """The form that the walk then goes in."""
        model: Any = SimpleNamespace(source="m", tokenizer=SimpleNamespace(is_fast=True))
        (self.folder / "original").mkdir(parents=True, exist_ok=True)
        self._measure_forms(model, self.folder / "original")
        found = self.run.strongest()
        return f"{found['runtime']} {found['precision']}"


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("multum.bench.offers", lambda: GRAPHS)
    for runtime in ("llamacpp", "onnxruntime", "openvino"):
        monkeypatch.setattr(f"multum.runtimes.{runtime}.unavailable", lambda: None)


@pytest.mark.parametrize("kind", [TranslatorDescent, CausalDescent])
def test_where_8_bits_keep_the_drop_nothing_else_is_tried(kind: type[Descent], graphs: None, tmp_path: Path) -> None:
    """llama.cpp does not take the model; one of the two other runtimes loses too much in 8 bits."""
    found = Tried(tmp_path / "run", {("onnxruntime", "int8"): 3.0, ("openvino", "int8"): 0.5, **dict.fromkeys(FP32S, 0.0)}, kind)
    assert found.try_() == "openvino int8"
    assert found.exported == INT8S
    assert found.measured == [["original", "onnxruntime-int8", "openvino-int8"]]
    again = Tried(tmp_path / "run", found.drops, kind)
    assert again.try_() == "openvino int8"
    assert again.measured == []


def test_where_8_bits_lose_too_much_what_is_exact_is_tried(graphs: None, tmp_path: Path) -> None:
    found = Tried(tmp_path / "run", {**dict.fromkeys(INT8S, 3.0), ("onnxruntime", "fp32"): 0.0})
    assert found.try_() == "onnxruntime fp32"
    assert found.measured == [["original", "onnxruntime-int8", "openvino-int8"], ["original", "onnxruntime-fp32"]]
    assert [c["name"] for c in found.run.candidates].count("original") == 1
    kept = read_json(tmp_path / "run" / "original" / "metrics-validation.json")
    assert kept == found.run.candidates[0]["validation"]


def test_where_every_form_loses_too_much_torch_runs_it(graphs: None, tmp_path: Path) -> None:
    """A rung in such a form would lose more yet; in torch weights are packed at least. An fp32 graph may be too large to be had."""
    found = Tried(tmp_path / "run", dict.fromkeys(INT8S, 3.0))
    assert found.try_() == "pytorch fp32"
    again = Tried(tmp_path / "run", found.drops)
    assert again.try_() == "pytorch fp32"
    assert again.measured == []


def test_where_llama_cpp_takes_the_model_no_graph_is_tried(graphs: None, tmp_path: Path) -> None:
    files = {("llamacpp", "f16"): 0.0, ("llamacpp", "q8_0"): 0.2, ("llamacpp", "q4_0"): 9.0}
    found = Tried(tmp_path / "run", {**files, **dict.fromkeys(GRAPHS, 0.0)}, CausalDescent)
    assert found.try_().startswith("llamacpp")
    assert found.exported == list(files)


def test_where_nothing_can_be_exported_torch_runs_it_and_goes_on_to(graphs: None, tmp_path: Path) -> None:
    assert Tried(tmp_path / "run", {}).try_() == "pytorch fp32"
    later = Tried(tmp_path / "run", dict.fromkeys(GRAPHS, 0.0))  # installed between two calls
    assert later.try_() == "pytorch fp32"
    assert later.exported == []
    with pytest.raises(InputError, match="cannot be exported to any runtime here"):
        Tried(tmp_path / "other", {}, Descent).try_()


# -- how long it takes ---------------------------------------------------------------------------------------------------------


def test_the_plan_counts_exports_by_what_the_originals_took(graphs: None, tmp_path: Path) -> None:
    found = Tried(tmp_path / "run", dict.fromkeys(INT8S, 0.0))
    found.try_()
    found.effort, found.pace, found.rows = TRANSLATORS_QUICK, 0.01, 100
    seconds = {"measure the original": 60.0, "original: export to onnxruntime int8": 33.0}
    found.progress = Progress.silent()
    found.progress.recall([{"name": name, "seconds": took} for name, took in seconds.items()])
    found.descent.exports = True
    found._look_back()
    assert (found.measuring, found.export) == (60.0 / ORIGINAL[True], ("export to onnxruntime int8", 33.0))
    stages = found._ahead(1)
    assert ("rung-01: export to onnxruntime int8", 33.0) in stages
    # Behind the walk: what is near and not known to be needless, but for the form that is there.
    assert [stage for stage in stages if stage[0].startswith("export")] == [
        ("export to onnxruntime int4", 33.0),
        ("export to openvino bf16", 33.0),
        ("export to openvino int8", 33.0),
        ("export to openvino int4", 33.0),
    ]
    assert all(stage in found._last() for stage in stages[-4:])
    plain = ahead(TRANSLATORS_QUICK, 100, 0.01, INT8S, 1, step=1.5, taught=True)
    assert not [name for name, _ in plain if "export" in name]
    found.descent.exports = False
    found._look_back()
    assert (found.measuring, found.export) == (120.0, NO_EXPORT)


# -- the whole job -------------------------------------------------------------------------------------------------------------


def test_a_translator_ships_an_export_that_writes_what_torch_writes(
    small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In fp32, which has to be torch's to the token; in 8 bits there is nothing, so that the next group is taken."""
    pytest.importorskip("onnxscript")
    monkeypatch.setattr("multum.bench.offers", lambda: [("onnxruntime", "fp32")])
    monkeypatch.setattr("multum.runtimes.onnxruntime.unavailable", lambda: None)
    monkeypatch.setattr("multum.ladder.MAX_RUNGS", 1)
    monkeypatch.setattr("multum._runtime_trials.Worker", Inside)
    monkeypatch.setattr("multum._runtime_kinds.NEW", 4)
    monkeypatch.setattr(Landing, "_forms", lambda self: [FP32])
    model = translators.translator("marian", layers=2, spread=2.0)
    model.module.generation_config.max_new_tokens = 8
    model.save(tmp_path / "model")
    (tmp_path / "data").mkdir()
    for name, rows in vars(translators.splits(32, 12, 12)).items():
        if name in ("train", "validation", "test"):
            rows.to_json(tmp_path / "data" / f"{name}.jsonl", force_ascii=False)
    run({"task": "translation", "model": str(tmp_path / "model"), "data": str(tmp_path / "data")}, tmp_path / "run")

    values, chosen = read(tmp_path / "run"), tmp_path / "run" / "chosen"
    by_name = {candidate["name"]: candidate for candidate in values["candidates"]}
    assert list(by_name) == ["original", "original, onnxruntime fp32", "rung-01"]
    assert by_name["rung-01"]["target"] == "rung-01/onnxruntime-fp32"
    assert by_name["rung-01"]["runtime"] == "onnxruntime"
    assert values["chosen"] != "original"
    assert read_json(chosen / "ship.json")["target"] == FP32.folder
    assert targets_of([chosen], "") == [chosen / FP32.folder]

    sources = [source for source, _ in translators.sentences(12, seed=5)]
    torch = Model.load(chosen, auto_class="AutoModelForSeq2SeqLM")
    expected = [one.text for one in write(torch.module, torch.tokenizer, sources)]
    predictor = runtimes.open(chosen, threads=1)
    assert predictor.runtime == "onnxruntime"
    assert texts_of(predictor.predict(sources)) == expected
    assert "ONNX Runtime fp32" in (tmp_path / "run" / "report.html").read_text()
