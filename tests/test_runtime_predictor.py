"""Single texts run on the threads that were fastest at export, batches on all that are given."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
from onnx import TensorProto, helper

from multum.core.folders import read_json
from multum.errors import InputError
from multum.runtimes import _predictor, onnxruntime, openvino
from multum.runtimes._predictor import GraphPredictor, choose_threads


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model, task = tiny.model(), tiny.task()
    onnxruntime.export(model, tmp_path / "out", precision="fp32", inputs=task.inputs("validation")[:4], max_length=64, pairs=False)
    return tmp_path / "out"


@pytest.mark.parametrize(("chosen", "given", "single"), [(1, 3, 1), (3, 2, 2), (None, 2, 2)])
def test_threads_of_texts_and_batches(chosen: int | None, given: int, single: int, folder: Path) -> None:
    used: list[int] = []
    loaded: list[int] = []

    def load(threads: int) -> _predictor.Run:
        loaded.append(threads)

        def run(columns: dict[str, np.ndarray]) -> np.ndarray:
            used.append(threads)
            return np.zeros((len(columns["input_ids"]), 2), np.float32)

        return run

    manifest = {name: value for name, value in read_json(folder / "runtime.json").items() if name != "threads"}
    if chosen:
        manifest["threads"] = chosen
    predictor = GraphPredictor(folder, manifest, load, [], given)
    predictor.predict(["a film"])
    assert (predictor.threads, loaded, used) == (single, [single], [single])
    for _ in range(2):
        assert predictor.predict(["a film", "a story", "a plot"], batch_size=2).shape == (3, 2)
    assert used == [single] + [given] * 4
    assert loaded == sorted({single, given})


@pytest.mark.parametrize(
    ("seconds_of_two", "seconds_of_all", "chosen"),
    [(0.7, 0.5, 4), (0.95, 0.9, 1), (1.5, 1.5, 1), (0.6, 0.55, 2), (0.9, 0.8, 4)],
)
def test_several_threads_must_be_faster_by_more_than_noise(
    seconds_of_two: float, seconds_of_all: float, chosen: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, asked = read_json(folder / "runtime.json"), []

    def interleave(timers: dict[str, Any], rounds: int) -> dict[str, float]:
        assert all(timer() > 0 for timer in timers.values())
        asked.extend(timers)
        return {"1": 1.0, "2": seconds_of_two, "4": seconds_of_all}

    monkeypatch.setattr(_predictor, "processors", lambda: 4)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # where it is exported is not where it is used
    monkeypatch.setattr(_predictor, "interleave", interleave)
    choose_threads(folder, onnxruntime.open, ["a film", "a story"])
    assert asked == ["1", "2", "4"]
    assert read_json(folder / "runtime.json") == before | {"threads": chosen}


@pytest.mark.parametrize(("said", "taken"), [(None, 6), ("1", 1), ("4,2", 4), ("9", 6), ("0", 6), ("many", 6)])
def test_no_more_threads_than_openmp_is_given(said: str | None, taken: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(6)), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if said:
        monkeypatch.setenv("OMP_NUM_THREADS", said)
    assert _predictor.cores() == taken


def test_what_a_graph_stumbles_over_when_it_runs_is_one_clear_error(tmp_path: Path) -> None:
    """onnxruntime's own errors have no base but Exception, so that a walk, which leaves out what cannot be exported, would end."""
    x, y, z = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [f"{name}0", f"{name}1"]) for name in "xyz")
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "y"], ["z"])], "product", [x, y], [z])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    (tmp_path / "product.onnx").write_bytes(model.SerializeToString())
    product, row = onnxruntime._Graph(tmp_path / "product.onnx", 1), np.ones((1, 3), np.float32)
    assert product.array(product({"x": row, "y": row.T})[0]).tolist() == [[3.0]]
    with pytest.raises(InputError, match="the graph cannot be executed"):
        product({"x": row, "y": row})


def test_nor_is_what_openvino_says_put_down_to_multum() -> None:
    def infer(*_: Any, **__: Any) -> None:
        raise RuntimeError("Exception from src/cpu:\nshapes do not fit")

    compiled = SimpleNamespace(create_infer_request=lambda: SimpleNamespace(infer=infer), outputs=[])
    with pytest.raises(InputError, match="the graph cannot be executed: shapes do not fit"):
        openvino._Graph(compiled)({})
