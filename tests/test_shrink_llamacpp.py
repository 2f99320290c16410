"""The main job for causal models where llama.cpp runs them: rungs are its exports, and what it has no words for ends the walk.

All but the tests marked so run with a stand-in, which says what llama.cpp would and lets torch answer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
from test_shrink_writing import Inside, read, run, small
from transformers import AutoModelForCausalLM

from multum._runtime_table import FEW, TABLE, Choice, Form, pick
from multum.core.folders import read_json
from multum.core.model import Model
from multum.descent import WRITERS
from multum.landing import Landing
from multum.progress import Progress
from multum.runtimes import llamacpp, pytorch
from multum.runtimes._folder import export_folder
from multum.targets import targets_of

__all__ = ["small"]
PARITY = {"n": 1, "agreement": 1.0, "kl_nats": 0.0}
REAL = pytest.param(True, marks=pytest.mark.llamacpp)


def stand_in(patch: pytest.MonkeyPatch) -> None:
    def export(model: Model, folder: Path, *, precision: str, **_: Any) -> dict[str, Any]:
        llamacpp.check(model)
        manifest = {"runtime": "llamacpp", "precision": precision, "task": "text-generation", "parity": PARITY}
        with export_folder(model, folder, manifest) as work:
            model.save(work / "torch")
        return {}

    def opened(folder: Path, *, threads: int | None = None) -> Any:
        predictor = pytorch.open(folder / "torch", threads=threads)
        predictor.runtime, predictor.precision = "llamacpp", read_json(folder / "runtime.json")["precision"]
        return predictor

    patch.setattr(llamacpp, "export", export)
    patch.setattr(llamacpp, "open", opened)
    patch.setattr(llamacpp, "proof", lambda *_: PARITY)


@pytest.fixture(params=[False, REAL], ids=["stand-in", "llama.cpp"], scope="module")
def here(request: pytest.FixtureRequest, small: None) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llamacpp, "unavailable", lambda: None)
        if not request.param:
            stand_in(patch)
        patch.setattr("multum._runtime_trials.Worker", Inside)
        patch.setattr("multum._runtime_kinds.NEW", 4)
        patch.setattr(Landing, "_forms", lambda self: [Form("llamacpp", precision) for precision in WRITERS])
        patch.setattr("multum.landing.pick", four_bits)
        yield


def four_bits(table: Any, *, ships: list[str], **how: Any) -> Choice:
    """Four bits are taken to be the fastest, whatever they are here."""
    return replace(pick(table, ships=ships, **how), form=Form("llamacpp", "q4_0"), gain=True)


def source(folder: Path, family: str = "llama") -> dict[str, str]:
    """A model that is sure of nothing much, as 4 bits would have it, and a folder of splits."""
    model, splits = tiny.language_model(family, layers=4, hidden=64), tiny.text_splits(n_train=32, n_validation=FEW, n_test=12)
    for parameter in model.module.parameters():
        parameter.data *= 0.5 if parameter.dim() > 1 else 1.0
    model.save(folder / "model")
    (folder / "data").mkdir()
    for name in ("train", "validation", "test"):
        getattr(splits, name).to_json(folder / "data" / f"{name}.jsonl", force_ascii=False)
    return {"task": "text-generation", "model": str(folder / "model"), "data": str(folder / "data")}


@pytest.fixture(scope="module")
def finished(here: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llamacpp")
    run(source(folder), folder / "run")
    return folder


def test_every_rung_is_what_llama_cpp_runs(finished: Path) -> None:
    values = read(finished / "run")
    by_name = {candidate["name"]: candidate for candidate in values["candidates"]}
    forms = [f"original, llamacpp {precision}" for precision in WRITERS]
    assert list(by_name)[:5] == ["original", *forms, "rung-01"]
    assert {by_name[name]["technique"] for name in forms} == {f"llamacpp {precision}" for precision in WRITERS}
    for name, candidate in by_name.items():
        assert candidate["runtime"] == ("pytorch" if name == "original" else "llamacpp")
        assert candidate["validation"]["speed"]["decode_tokens_per_s"] > 0
        assert not name.endswith(("-int8", "-int4"))  # the export has its own integers
    assert by_name["original, llamacpp q8_0"]["drop"] < 100


def test_what_ships_runs_there_and_loads_plainly(finished: Path) -> None:
    values, chosen = read(finished / "run"), finished / "run" / "chosen"
    best = next(c for c in values["candidates"] if c["name"] == values["chosen"])
    ships = read_json(chosen / "ship.json")["target"]
    assert ships == Path(best["target"]).name == f"llamacpp-{best['precision']}"
    assert best["test"]["speed"]["runtime"] == "llamacpp"
    assert targets_of([chosen], "") == [chosen / ships]
    module = AutoModelForCausalLM.from_pretrained(chosen)
    assert len(module.model.layers) == len(best["blocks"])
    page = (finished / "run" / "report.html").read_text()
    assert f"llamacpp {best['precision']}" in page


def test_the_fewest_bits_are_tried_on_what_ships(finished: Path) -> None:
    values = read(finished / "run")
    ships = next(c["folder"] for c in values["candidates"] if c["name"] == values["chosen"])
    assert any(c["precision"] == "q4_0" for c in values["candidates"] if c["folder"] == ships)
    table = read_json(finished / "run" / "chosen" / TABLE)
    assert {"llamacpp q8_0", "llamacpp q4_0"} <= {one["name"] for one in table["forms"]}


def test_the_same_call_again_measures_nothing(finished: Path) -> None:
    class Said(Progress):
        stages_begun: list[str]

        def stage(self, name: str) -> Any:
            self.stages_begun.append(name)
            return super().stage(name)

    progress = Said()
    progress.stages_begun = []
    given = {"task": "text-generation", "model": str(finished / "model"), "data": str(finished / "data")}
    before = read(finished / "run")["chosen"]
    run(given, finished / "run", progress=progress)
    assert read(finished / "run")["chosen"] == before
    assert progress.stages_begun == []


def test_where_it_has_no_words_for_a_model_torch_runs_it(here: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("multum.runtimes._gguf_model.ARCHITECTURES", {"qwen2": "qwen2"})
    monkeypatch.setattr("multum.ladder.MAX_RUNGS", 1)
    run(source(tmp_path), tmp_path / "run")
    values = read(tmp_path / "run")
    assert {candidate["runtime"] for candidate in values["candidates"]} == {"pytorch"}
    assert any(candidate["name"].endswith("-int8") for candidate in values["candidates"])
    assert any("llamacpp takes causal language models of types" in note for note in values["data"]["notes"])


def test_what_it_cannot_say_of_a_rung_ends_the_walk_before_it_is_taught(here: None, tmp_path: Path) -> None:
    run(source(tmp_path, "gpt2"), tmp_path / "run")
    values = read(tmp_path / "run")
    assert [c["name"] for c in values["candidates"] if c["folder"].startswith("rung")][:1] == ["rung-01"]
    assert not (tmp_path / "run" / "rung-02").exists()
    (note,) = [note for note in values["data"]["notes"] if note.startswith("stopped before rung-02")]
    assert "cut every block alike instead" in note
    assert "rung-02: distil" not in [stage["name"] for stage in values["stages"]]
