"""Models that no graph is written for by hand: traced, whole and pruned, for every task; and what the tracer cannot follow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import taggers
import tiny
import torch

from multum import runtimes
from multum.core.model import Model
from multum.errors import InputError, MissingExtra
from multum.runtimes import _traced
from multum.steps.prune_hidden import PruneHidden

NARROW = ("deberta-v2", "modernbert", "gpt2")
"""Whose hidden width is cut as well."""
CASES: list[tuple[str, str, Any, Any]] = [
    ("mpnet", "fp32", taggers.answerer, taggers.answering),
    ("deberta-v2", "fp32", taggers.tagger, taggers.tagging),
    ("modernbert", "fp32", tiny.model, tiny.task),
    ("mpnet", "int8", tiny.model, tiny.task),
    ("gpt2", "fp32", tiny.model, tiny.task),
    ("llama", "int8", tiny.model, tiny.task),
]


def export(model: Model, task: Any, folder: Path, *, precision: str = "fp32", runtime: str = "onnxruntime") -> Any:
    runtimes.find(runtime).export(
        model,
        folder,
        precision=precision,
        inputs=task.inputs("validation"),
        calibration=task.calibration(model, 16),
        max_length=task.length_limit(model),
        pairs=task.has_pairs,
        task=task.name,
    )
    return runtimes.open(folder, threads=1)


@pytest.mark.parametrize(("family", "precision", "make", "task_for"), CASES)
def test_traced_models_answer_as_torch_does(family: str, precision: str, make: Any, task_for: Any, tmp_path: Path) -> None:
    model, task = make(family, layers=3), task_for()
    model = tiny.uneven(PruneHidden(keep=0.75, samples=8)(model, task) if family in NARROW else model)
    weights = model.fingerprint()
    predictor = export(model, task, tmp_path / "out", precision=precision)
    assert model.fingerprint() == weights
    model.save(tmp_path / "model")
    torch_itself = runtimes.find("pytorch").open(tmp_path / "model", threads=1)
    inputs = task.inputs("test")
    expected, found = torch_itself.predict(inputs), predictor.predict(inputs)
    alone = predictor.predict(inputs[:1])[0]
    if precision == "fp32":
        np.testing.assert_allclose(found, expected, atol=2e-4)
        np.testing.assert_allclose(found[0][tuple(map(slice, alone.shape))], alone, atol=2e-4)
    else:
        assert (found.argmax(-1) == expected.argmax(-1)).mean() > 0.8
        assert (tmp_path / "out" / "model.onnx").stat().st_size < (tmp_path / "model" / "model.safetensors").stat().st_size


def test_activations_and_low_rank_that_no_graph_is_written_for(tmp_path: Path) -> None:
    model, task = tiny.model(), tiny.task()
    config = model.module.config.to_dict() | {"hidden_act": "silu"}
    module = type(model.module)(type(model.module.config).from_dict(config)).eval()
    module.load_state_dict(model.module.state_dict())
    changed = Model(module=module, tokenizer=model.tokenizer, source="tiny")
    predictor = export(changed, task, tmp_path / "out")
    inputs = task.inputs("test")[:4]
    with torch.no_grad():
        expected = [module(**model.tokenizer(text, return_tensors="pt")).logits[0].numpy() for text in inputs]
    np.testing.assert_allclose(predictor.predict(inputs), np.stack(expected), atol=1e-4)


class Inverse(torch.nn.Module):
    """What ONNX has no operator for."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ torch.linalg.eigh(x.transpose(1, 2) @ x).eigenvectors


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_an_operator_that_cannot_be_exported_is_named_with_its_module(runtime: str, tmp_path: Path) -> None:
    model, task = tiny.model("mpnet"), tiny.task()
    model.module.mpnet.encoder.layer[1].intermediate.intermediate_act_fn = Inverse()
    with pytest.raises(InputError, match=rf"cannot be exported to {runtime}: .*eigh.* in .*layer\.1\.intermediate") as caught:
        export(model, task, tmp_path / "out", runtime=runtime)
    assert len(caught.value.problems) == 1
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_traced, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"mpnet.*multum\[export\]"):
        export(tiny.model("mpnet"), tiny.task(), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_blocks_of_a_traced_model_are_timed_on_every_token() -> None:
    from multum.runtimes import onnxruntime

    timer, every_token = onnxruntime.stacks(tiny.model("modernbert"), precision="fp32", lengths=[4, 9], threads=1)
    assert every_token
    assert timer([(2, 8), (0, 8)])() > 0
    assert not onnxruntime.stacks(tiny.model("bert"), precision="fp32", lengths=[4], threads=1)[1]
    assert onnxruntime.stacks(taggers.tagger("bert"), precision="fp32", lengths=[4], threads=1)[1]


def test_weights_are_eight_bits(tmp_path: Path) -> None:
    export(tiny.model("mpnet"), tiny.task(), tmp_path / "out", precision="int8")
    graph = onnx.load(tmp_path / "out" / "model.onnx").graph
    kinds = {node.op_type for node in graph.node}
    assert kinds & {"MatMulInteger", "DynamicQuantizeMatMul"}
    large = [tensor for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT and np.prod(tensor.dims) > 1024]
    assert not large, [tensor.name for tensor in large]
