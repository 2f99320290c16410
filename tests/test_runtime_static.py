"""Static 8 bits: ranges against slow searches, a product against integers by hand, exports against torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import taggers
import tiny
import torch
from onnx import TensorProto, helper, numpy_helper

from multum import runtimes, targets
from multum.errors import InputError
from multum.runtimes import onnxruntime
from multum.runtimes._static import METHODS, SHARES, bounds, grid, histograms, squared_error, static

CASES = [
    *((family, "int8-mse") for family in tiny.FAMILIES),
    ("bert", "int8-minmax"),
    ("bert", "int8-percentile"),
    ("mpnet", "int8-mse"),
]


def product(rng: np.random.Generator) -> tuple[onnx.ModelProto, np.ndarray, np.ndarray, np.ndarray]:
    """A graph that looks numbers up and multiplies them with 8-bit weights, twice: (1, tokens) -> (1, tokens, 3)."""
    table = rng.normal(size=(50, 8)).astype(np.float32)
    weight, bias = rng.integers(-127, 128, size=(8, 3), dtype=np.int8), rng.normal(size=3).astype(np.float32)
    scale = rng.uniform(0.01, 0.02, size=3).astype(np.float32)
    arrays = {"table": table, "w": weight, "w.scale": scale, "w.zero": np.zeros(3, np.int8), "bias": bias}
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["x"]),
        helper.make_node("DynamicQuantizeMatMul", ["x", "w", "w.scale", "w.zero", "bias"], ["one"], domain="com.microsoft"),
        helper.make_node("DynamicQuantizeMatMul", ["x", "w", "w.scale"], ["two"], domain="com.microsoft"),
        helper.make_node("Add", ["one", "two"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "product",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "tokens"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "tokens", 3])],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10), table, weight * scale, bias


def batches(rng: np.random.Generator, count: int = 20) -> list[dict[str, Any]]:
    """The second text of each is shorter; its padding is token 49."""
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    return [
        {"input_ids": torch.from_numpy(rng.integers(0, 49, (2, 6))).masked_fill(mask == 0, 49), "attention_mask": mask}
        for _ in range(count)
    ]


def test_a_product_is_that_of_the_integers() -> None:
    rng = np.random.default_rng(0)
    graph, table, weight, bias = product(rng)
    table[49] = 1000.0  # padding, whose size must not count
    graph.graph.initializer[0].CopyFrom(numpy_helper.from_array(table, "table"))
    calibration = batches(rng)
    fixed = static(graph, calibration, "minmax")
    used = table[np.unique([batch["input_ids"][batch["attention_mask"] > 0] for batch in calibration])]
    scale, zero = grid(used.min(), used.max())
    assert float(scale) == pytest.approx((used.max() - used.min()) / 255)
    ids = np.array([[3, 7, 11, 20]])
    found = ort.InferenceSession(fixed.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {"input_ids": ids})[0]
    codes = np.clip(np.round(table[ids] / scale) + zero, 0, 255)
    np.testing.assert_allclose(found, 2 * (scale * (codes - zero)) @ weight + bias, rtol=1e-4, atol=1e-4)
    kinds = [node.op_type for node in fixed.graph.node]
    assert kinds == ["Gather", "QuantizeLinear", "MatMulIntegerToFloat", "MatMulIntegerToFloat", "Add"]


def histogram(x: np.ndarray) -> Any:
    counts, edges = np.histogram(x, 4096, range=(-np.abs(x).max(), np.abs(x).max()))
    return counts, edges, x.min(), x.max()


def test_ranges_of_known_distributions() -> None:
    x = np.linspace(-1.0, 3.0, 100001)
    assert bounds(histogram(x), "minmax") == (-1.0, 3.0)
    low, high = bounds(histogram(x), "percentile")
    assert low == pytest.approx(-1.0 + 4 * 5e-5, abs=2e-3)
    assert high == pytest.approx(3.0 - 4 * 5e-5, abs=2e-3)
    for method in METHODS:
        assert bounds(histogram(np.linspace(1.0, 2.0, 99)), method)[0] == 0.0
        assert bounds(histogram(np.zeros(5)), method) == (0.0, 0.0)
    scale, zero = grid(0.0, 0.0)
    assert (scale, zero) == (1.0, 0)


@pytest.mark.parametrize("seed", range(3))
def test_mse_has_the_least_error_and_cuts_outliers(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=400000)
    x = np.concatenate([np.where(x < 0, 0.1 * x, x), [12.0]]) * 1.7
    counts, edges, least, largest = made = histogram(x)
    low, high = bounds(made, "mse")

    def error(low: float, high: float) -> float:
        scale, zero = grid(low, high)
        return float(((x - scale * (np.clip(np.round(x / scale) + zero, 0, 255) - zero)) ** 2).sum())

    slow = min(error(low, share * largest) for share in SHARES)
    assert error(low, high) <= 1.03 * slow
    assert squared_error(counts, edges, low, high) == pytest.approx(error(low, high), rel=0.1)
    assert high < 0.7 * largest
    assert error(low, high) < 0.9 * error(least, largest)


def test_without_texts_or_with_nonsense_there_are_no_ranges() -> None:
    graph, *_ = product(np.random.default_rng(0))
    with pytest.raises(InputError, match="no calibration texts"):
        static(graph, [], "mse")
    few = {"input_ids": np.ones((2, 16), int), "attention_mask": np.ones((2, 16), int)}
    few["attention_mask"][1, 15] = 0
    with pytest.raises(InputError, match="int8-mse: the calibration texts are too few, 2 with 31 tokens in all"):
        static(graph, [few], "mse")
    graph.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.full((50, 8), np.nan, np.float32), "table"))
    with pytest.raises(InputError, match="flows through x has numbers that are not finite"):
        histograms(graph, ["x"], [{"input_ids": np.array([[1]])}])


def export(model: Any, task: Any, folder: Path, precision: str) -> Any:
    targets.export_model(onnxruntime, model, folder, precision, task, 0)
    return runtimes.open(folder, threads=1)


@pytest.mark.parametrize(("family", "precision"), CASES)
def test_exports_answer_as_torch_does(family: str, precision: str, tmp_path: Path) -> None:
    model, task = tiny.uneven(tiny.model(family, layers=3)), tiny.task()
    predictor = export(model, task, tmp_path / "out", precision)
    model.save(tmp_path / "model")
    inputs = task.inputs("test")
    found, expected = predictor.predict(inputs), runtimes.find("pytorch").open(tmp_path / "model", threads=1).predict(inputs)
    assert np.abs(found - expected).max() < 0.5
    assert np.abs(found - expected).mean() < 0.06
    kinds = {node.op_type for node in onnx.load(tmp_path / "out" / "model.onnx").graph.node}
    assert "QuantizeLinear" in kinds
    assert not any(kind.startswith("Dynamic") for kind in kinds)
    manifest = runtimes.read_manifest(tmp_path / "out")
    assert (manifest["precision"], predictor.precision) == (precision, precision)
    assert manifest["parity"]["agreement"] > 0.9
    # No range depends on what else is in the batch.
    singly = np.concatenate([predictor.predict([text]) for text in inputs])
    assert np.abs(found - singly).mean() < 0.01


def test_heads_that_read_every_token(tmp_path: Path) -> None:
    model, task = taggers.answerer("bert"), taggers.answering()
    export(model, task, tmp_path / "out", "int8-mse")
    assert runtimes.read_manifest(tmp_path / "out")["parity"]["agreement"] > 0.8


def test_what_can_be_asked_for() -> None:
    for precision in onnxruntime.CALIBRATED:
        assert targets.exporter("onnxruntime", precision) is onnxruntime
    with pytest.raises(InputError, match=r"no 'int8-entropy'; it has: .*int8-mse"):
        targets.exporter("onnxruntime", "int8-entropy")
