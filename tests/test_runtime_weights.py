"""Graphs whose weights alone are integers: how far they are from the floats, and that a model's own codes stay what they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
import tiny
import torch
from openvino import opset13 as ops
from test_runtime_writers import cut
from torch import nn

from multum import runtimes
from multum.core.codes import Packing
from multum.core.model import Model
from multum.core.packed import Packed, PackedEmbedding, PackedLinear, packed_parts
from multum.core.sentences import causal_sums
from multum.core.step import make
from multum.errors import InputError
from multum.runtimes import _openvino_weights, _weights
from multum.runtimes._own_codes import OwnCodes
from multum.steps._quantization import rounded
from multum.steps.quantize import hqq
from multum.targets import export_model, exporter
from multum.tasks.text_generation import TextGeneration

TOKENS, HIDDEN = 96, 64
IDS = np.arange(TOKENS)
GRIDS = {
    "4 bits": (Packing(4, 32), HIDDEN),
    "4 bits, zero points": (Packing(4, 64, zeros=True), 96),  # the last group is half
    "zero points between codes": (Packing(4, 16, zeros=True), HIDDEN),
    "3 bits, zero points": (Packing(3, 16, zeros=True), 48),
    "3 bits, rows": (Packing(3), HIDDEN),
    "4 bits, odd rows": (Packing(4), 39),
    "8 bits": (Packing(8, 48), 96),
    "8 bits, rows, zero points": (Packing(8, zeros=True), HIDDEN),
}
"""Name -> grid, and inputs of a matrix on it."""
EXACT = 2e-5
"""What another order of the same sums explains."""


@pytest.fixture
def floats(monkeypatch: pytest.MonkeyPatch) -> None:
    """Activations are not rounded, so that products are those of the weights as they are stored."""
    monkeypatch.setattr(_weights, "ROUNDS_ACTIVATIONS", 1)


def packed(name: str, rows: int = 24) -> PackedLinear:
    packing, inputs = GRIDS[name]
    torch.manual_seed(0)
    linear = nn.Linear(inputs, rows).requires_grad_(False)
    quantized = hqq(linear.weight, packing) if "between" in name else rounded(linear.weight, packing)
    return PackedLinear.of(linear, quantized)


def numbers(part: Packed) -> np.ndarray:
    return part.read().numpy()


def onnx_graph(nodes: list[Any], held: dict[str, np.ndarray], inputs: dict[str, int], outputs: list[str]) -> onnx.ModelProto:
    ends = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in outputs]
    starts = [onnx.helper.make_tensor_value_info(name, kind, None) for name, kind in inputs.items()]
    tensors = [onnx.numpy_helper.from_array(value, name) for name, value in held.items()]
    graph = onnx.helper.make_graph(nodes, "made", starts, ends, tensors)
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)


def tied_graph(table: np.ndarray, matrix: np.ndarray, bias: np.ndarray) -> onnx.ModelProto:
    """A table that is looked up and multiplied with, and a matrix with a bias."""
    nodes = [
        onnx.helper.make_node("Gather", ["t", "ids"], ["x"]),
        onnx.helper.make_node("Gemm", ["x", "m", "b"], ["y"]),
        onnx.helper.make_node("Transpose", ["t"], ["u"], perm=[1, 0]),
        onnx.helper.make_node("MatMul", ["x", "u"], ["logits"]),
    ]
    return onnx_graph(nodes, {"t": table, "m": matrix, "b": bias}, {"ids": onnx.TensorProto.INT64}, ["x", "y", "logits"])


def run(graph: onnx.ModelProto, **inputs: np.ndarray) -> list[np.ndarray]:
    return list(onnxruntime.InferenceSession(graph.SerializeToString()).run(None, inputs))


def product(weight: np.ndarray) -> onnx.ModelProto:
    """y = x Wᵀ."""
    nodes = [onnx.helper.make_node("MatMul", ["x", "m"], ["y"])]
    return onnx_graph(nodes, {"m": weight.T.copy()}, {"x": onnx.TensorProto.FLOAT}, ["y"])


def sizes(graph: onnx.ModelProto, kind: int) -> int:
    return sum(int(np.prod(one.dims)) for one in graph.graph.initializer if one.data_type == kind)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("hidden", [HIDDEN, 47])
def test_weights_alone_are_integers(bits: int, hidden: int, floats: None) -> None:
    """Each entry is within half a step of its own, and what is computed is computed with the rows that are looked up."""
    rng = np.random.default_rng(0)
    table, matrix, bias = (rng.normal(size=size).astype(np.float32) for size in ((TOKENS, hidden), (hidden, 32), (32,)))
    table[7] *= 50  # a scale for the whole table would leave nothing of the others
    made = _weights.integer_weights(tied_graph(table, matrix, bias), bits)
    blocks = -(-hidden // 32)
    # The table once, a byte a weight, and the matrix.
    assert sizes(made, onnx.TensorProto.UINT8) == TOKENS * blocks * 32 + 32 * blocks * 32 * bits // 8
    assert sizes(made, onnx.TensorProto.FLOAT) == (TOKENS + 32) * blocks + 32 + 1
    rows, y, z = run(made, ids=IDS)
    step = np.abs(table).max(1, keepdims=True) / 127
    assert (np.abs(rows - table) <= step).all()
    assert np.abs(rows - table).mean() < 0.25 * step.mean()
    np.testing.assert_allclose(z, rows @ rows.T, rtol=1e-4, atol=1e-2)
    assert np.abs(y - table @ matrix - bias).max() < (0.02 if bits == 8 else 0.2) * np.abs(y).max()
    assert np.corrcoef(y[:7].ravel(), (table @ matrix + bias)[:7].ravel())[0, 1] > (0.999 if bits == 8 else 0.98)


def test_activations_are_rounded_by_blocks_too() -> None:
    rng = np.random.default_rng(0)
    table, matrix, bias = (rng.normal(size=size).astype(np.float32) for size in ((TOKENS, HIDDEN), (HIDDEN, 32), (32,)))
    table[7] *= 50
    _, y, z = run(_weights.integer_weights(tied_graph(table, matrix, bias), 8), ids=IDS)
    for found, exact in ((y, table @ matrix + bias), (z, table @ table.T)):
        assert 1e-4 < np.abs(found - exact).max() / np.abs(exact).max() < 0.02
        assert np.corrcoef(found[:7].ravel(), exact[:7].ravel())[0, 1] > 0.999


def test_a_table_of_its_own_has_a_scale_for_every_row(floats: None) -> None:
    table = np.random.default_rng(0).normal(size=(TOKENS, 47)).astype(np.float32)
    table[3] = 0
    graph = onnx_graph([onnx.helper.make_node("Gather", ["t", "ids"], ["x"])], {"t": table}, {"ids": onnx.TensorProto.INT64}, ["x"])
    made = _weights.integer_weights(graph, 4)
    assert sizes(made, onnx.TensorProto.UINT8) == table.size
    assert sizes(made, onnx.TensorProto.FLOAT) == TOKENS + 1
    (rows,) = run(made, ids=IDS.reshape(2, 3, -1))
    assert rows.shape == (2, 3, TOKENS // 6, 47)
    assert (np.abs(rows.reshape(table.shape) - table) <= 0.5 * np.abs(table).max(1, keepdims=True) / 127 * (1 + 1e-4)).all()


@pytest.mark.parametrize("name", GRIDS)
def test_onnxruntime_multiplies_with_the_models_own_codes(name: str, floats: None) -> None:
    layer = packed(name)
    own, weight = OwnCodes.of(nn.Sequential(layer), 8), numbers(layer)
    x = np.random.default_rng(0).normal(size=(5, layer.inputs)).astype(np.float32)
    made = _weights.integer_weights(product(weight), 4, own)
    assert own.facts() == {"own_codes": 1}
    assert [node.op_type for node in made.graph.node] == ["MatMulNBits"]
    np.testing.assert_allclose(run(made, x=x)[0], x @ weight.T, atol=EXACT)


@pytest.mark.parametrize("name", GRIDS)
def test_openvino_multiplies_with_the_models_own_codes(name: str) -> None:
    layer = packed(name)
    weight, x = numbers(layer), np.random.default_rng(0).normal(size=(5, layer.inputs)).astype(np.float32)
    for turned in (False, True):
        own, read = OwnCodes.of(nn.Sequential(layer), 8), ops.parameter([-1, layer.inputs], np.float32)
        constant = ops.constant(weight.T.copy() if turned else weight)
        table = ops.gather(ops.constant(np.ones((4, 8), np.float32)), ops.constant([0]), ops.constant(0))  # which NNCF rounds
        graph = openvino.Model([ops.matmul(read, constant, False, not turned), table], [read])
        made = _openvino_weights.integer_weights(graph, 4, own)
        assert own.facts() == {"own_codes": 1}
        kinds = {op.get_element_type().get_type_name() for op in made.get_ops() if op.get_type_name() == "Constant"}
        assert kinds & {"i4", "u4", "i8", "u8"}
        options = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
        found = openvino.Core().compile_model(made, "CPU", options)([x])[0]
        np.testing.assert_allclose(found, x @ weight.T, atol=EXACT)


def test_groups_that_no_block_is_made_of_are_rounded_anew_and_named() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(48, 24).requires_grad_(False)
    layer = PackedLinear.of(linear, rounded(linear.weight, Packing(4, 24)))
    own, weight = OwnCodes.of(nn.Sequential(layer), 4), numbers(layer)
    made = _weights.integer_weights(product(weight), 4, own)
    assert own.facts()["own_codes"] == 0
    assert own.facts()["note"] == "1 of 1 packed matrices cannot be held as they are, and were rounded anew"
    x = np.random.default_rng(0).normal(size=(5, 48)).astype(np.float32)
    assert 1e-3 < np.abs(run(made, x=x)[0] - x @ weight.T).max() < 0.5
    assert OwnCodes.of(nn.Sequential(linear), 4).facts() == {}
    assert OwnCodes.of(nn.Sequential(packed("8 bits")), 4).facts() == {}, "8 bits are rounded to 4, as was asked for"


@pytest.mark.parametrize("packing", [Packing(4, 16, zeros=True), Packing(8), Packing(4, 24)])
def test_a_packed_table_is_looked_up_and_multiplied_with_as_it_is(packing: Packing, floats: None) -> None:
    torch.manual_seed(0)
    table = nn.Embedding(TOKENS, 48).requires_grad_(False)
    part = PackedEmbedding(table, packing)
    part.fill(rounded(table.weight, packing))
    weight, own = numbers(part), OwnCodes.of(nn.Sequential(part), 8)
    looked, both = (["Gather"], ["Gather", "MatMul"])
    for kinds in (looked, both):
        nodes = [onnx.helper.make_node("Gather", ["t", "ids"], ["x"])]
        if kinds == both:
            nodes += [onnx.helper.make_node("Transpose", ["t"], ["u"]), onnx.helper.make_node("MatMul", ["x", "u"], ["z"])]
        outputs = ["x", "z"] if kinds == both else ["x"]
        made = _weights.integer_weights(onnx_graph(nodes, {"t": weight}, {"ids": onnx.TensorProto.INT64}, outputs), 4, own)
        found = run(made, ids=IDS)
        if kinds == looked or packing.group != 24:
            np.testing.assert_allclose(found[0], weight, atol=1e-6)
        if kinds == both and packing.group != 24:
            np.testing.assert_allclose(found[1], weight @ weight.T, atol=1e-4)


# -- whole models --------------------------------------------------------------------------------------------------------------


def writer(family: str, **sizes: int) -> tuple[Model, TextGeneration]:
    return tiny.language_model(family, **sizes), TextGeneration.from_splits(tiny.text_splits(8, 6, 4))


@pytest.mark.parametrize(("runtime", "family"), [("onnxruntime", "llama"), ("openvino", "gpt2")])
def test_packed_models_are_exported_with_their_own_codes(runtime: str, family: str, floats: None, tmp_path: Path) -> None:
    model, task = writer(family, layers=1)
    model = make("gptq", {"bits": 4, "group": 16, "samples": 8})(make("quantize_embeddings", {"bits": 8})(model, task), task)
    facts = export_model(runtimes.find(runtime), model, tmp_path / "out", "int4", task, 0)
    assert facts["own_codes"] == len(packed_parts(model.module))
    assert "note" not in facts
    assert json.loads((tmp_path / "out" / "runtime.json").read_text())["parity"] == facts
    # OpenVINO computes in bf16 where the processor can.
    assert facts["kl_nats"] < (1e-6 if runtime == "onnxruntime" else 0.02)
    if runtime == "onnxruntime":
        assert facts["max_difference"] < 1e-3
    texts = tiny.passages(3)
    sums = runtimes.open(tmp_path / "out", threads=1).predict(texts)
    for found, reference in zip(sums, causal_sums(model.module, model.tokenizer, texts), strict=True):
        np.testing.assert_allclose(found[: len(reference)], reference, rtol=1e-3 if runtime == "onnxruntime" else 0.2)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_models_of_any_sizes_are_rounded_to_4_bits(runtime: str, tmp_path: Path) -> None:
    """Heads and neurons are gone here and there: rows are made up of no whole blocks."""
    model, task = writer("llama", layers=2, hidden=64, neurons=150)
    cut(model)
    facts = export_model(runtimes.find(runtime), model, tmp_path / "out", "int4", task, 0)
    assert 1e-4 < facts["kl_nats"] < 0.5
    assert facts["agreement"] > 0.5
    assert "own_codes" not in facts
    file = tmp_path / "out" / ("decoder.onnx" if runtime == "onnxruntime" else "decoder.bin")
    held = file.stat().st_size
    if runtime == "onnxruntime":
        held = sum(len(one.raw_data) for one in onnx.load(file).graph.initializer)
    assert held < 0.35 * 4 * model.parameters()
    predictor, texts = runtimes.open(tmp_path / "out", threads=1), tiny.passages(3)
    assert predictor.precision == "int4"
    for found, reference in zip(predictor.predict(texts), causal_sums(model.module, model.tokenizer, texts), strict=True):
        assert found[: len(reference), 1:].tolist() == reference[:, 1:].tolist()
        assert np.abs(found[: len(reference), 0] / reference[:, 0] - 1).max() < 0.3


def test_what_reads_has_no_4_bits(tmp_path: Path) -> None:
    for runtime in ("onnxruntime", "openvino"):
        with pytest.raises(InputError, match="int4 is for models that write; those that read take fp32, "):
            export_model(runtimes.find(runtime), tiny.model(), tmp_path / "out", "int4", tiny.task(), 0)
        assert exporter(runtime, "int4").__name__.endswith(runtime)
    assert not (tmp_path / "out").exists()
