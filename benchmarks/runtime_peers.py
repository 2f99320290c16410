"""Other ways to an int8 encoder on the CPU, each as its own documentation recommends it for Transformers, without multum.

A peer makes its form of a model folder once (`make`) and opens it (`load`), both in a process of its own; what it opens is called
with token ids, (batch, tokens) int64, no padding.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

Run = Callable[[np.ndarray], Any]
Rows = Sequence[Sequence[int]]


class Peer(NamedTuple):
    """A library at its recommended settings."""

    packages: tuple[str, ...]
    """What it takes, as pip calls it; modules of the same name."""
    make: Callable[[Path, Rows, Path], None]
    """(model folder, token ids to calibrate with, empty folder) -> the folder filled."""
    load: Callable[[Path, int], Run]
    """(the folder, threads) -> what answers."""

    def missing(self) -> list[str]:
        """Packages that are not installed."""
        return [name for name in self.packages if find_spec(name.replace("-", "_")) is None]


def torch_model(folder: Path, **options: Any) -> Any:
    """The model as transformers loads it."""
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained(folder, **options).eval()


def _nothing(folder: Path, rows: Rows, out: Path) -> None:
    (out / "model").symlink_to(folder.resolve())


def _eager(out: Path, threads: int) -> Run:
    import torch

    torch.set_num_threads(threads)
    model = torch_model(out / "model")

    def run(ids: np.ndarray) -> Any:
        with torch.inference_mode():
            return model(input_ids=torch.from_numpy(ids), attention_mask=torch.ones(ids.shape, dtype=torch.int64)).logits

    return run


def _torchao(out: Path, threads: int) -> Run:
    import torch
    import torch._inductor.config
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    torch.set_num_threads(threads)
    torch._inductor.config.freezing = True
    model = torch_model(out / "model")
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    compiled = torch.compile(model)

    def run(ids: np.ndarray) -> Any:
        with torch.no_grad():
            return compiled(input_ids=torch.from_numpy(ids), attention_mask=torch.ones(ids.shape, dtype=torch.int64)).logits

    return run


def _plain_onnx(folder: Path, rows: Rows, path: Path) -> Any:
    import torch

    model = torch_model(folder, attn_implementation="eager")
    ids = torch.tensor([list(rows[0][:8])] * 2)
    names = {"input_ids": {0: "batch", 1: "tokens"}, "attention_mask": {0: "batch", 1: "tokens"}, "logits": {0: "batch"}}
    torch.onnx.export(
        model,
        (ids, torch.ones_like(ids)),
        str(path),
        input_names=["input_ids", "attention_mask"],
        output_names=["logits"],
        dynamic_axes=names,
        opset_version=17,
        dynamo=False,
    )
    return model.config


def _make_dynamic(folder: Path, rows: Rows, out: Path) -> None:
    """Attention, norms and biases fused by onnxruntime's own optimizer for Transformers, then dynamic int8, a scale per column."""
    from onnx import TensorProto
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.transformers.optimizer import optimize_model

    config = _plain_onnx(folder, rows, out / "plain.onnx")
    fused = optimize_model(
        str(out / "plain.onnx"), model_type="bert", num_heads=config.num_attention_heads, hidden_size=config.hidden_size
    )
    fused.save_model_to_file(str(out / "fused.onnx"))
    quantize_dynamic(
        out / "fused.onnx",
        out / "model.onnx",
        per_channel=True,
        weight_type=QuantType.QInt8,
        extra_options={"DefaultTensorType": TensorProto.FLOAT},
    )


def _make_static(folder: Path, rows: Rows, out: Path) -> None:
    """QDQ, unsigned activations, signed weights with a scale per column, ranges by minimum and maximum."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.rest = iter(rows)

        def get_next(self) -> Any:
            ids = next(self.rest, None)
            return None if ids is None else {"input_ids": np.array([ids]), "attention_mask": np.ones((1, len(ids)), np.int64)}

    _plain_onnx(folder, rows, out / "plain.onnx")
    quant_pre_process(str(out / "plain.onnx"), str(out / "inferred.onnx"), skip_symbolic_shape=True)
    quantize_static(
        out / "inferred.onnx",
        out / "model.onnx",
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        op_types_to_quantize=["MatMul", "Gemm", "Gather"],
    )


def _onnxruntime(out: Path, threads: int) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(out / "model.onnx"), options, providers=["CPUExecutionProvider"])
    return lambda ids: session.run(None, {"input_ids": ids, "attention_mask": np.ones_like(ids)})


def _make_openvino(folder: Path, rows: Rows, out: Path) -> None:
    import nncf
    import openvino
    import torch

    model = torch_model(folder)
    ids = torch.tensor([list(rows[0][:8])] * 2)
    graph = openvino.convert_model(model, example_input={"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    data = [{"input_ids": np.array([row]), "attention_mask": np.ones((1, len(row)), np.int64)} for row in rows]
    quantized = nncf.quantize(graph, nncf.Dataset(data), model_type=nncf.ModelType.TRANSFORMER, subset_size=len(data))
    openvino.save_model(quantized, out / "model.xml")


def _openvino(out: Path, threads: int) -> Run:
    import openvino

    options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
    request = openvino.Core().compile_model(out / "model.xml", "CPU", options).create_infer_request()
    return lambda ids: request.infer({"input_ids": ids, "attention_mask": np.ones_like(ids)})


def _make_ctranslate2(folder: Path, rows: Rows, out: Path) -> None:
    """Its converter knows the encoder alone, and asks for a field of the config that transformers 5 has dropped."""
    from ctranslate2.converters import TransformersConverter
    from transformers import AutoModel

    AutoModel.from_pretrained(folder).save_pretrained(out / "encoder")
    for path in (*folder.glob("tokenizer*"), *folder.glob("vocab*")):
        shutil.copy(path, out / "encoder")
    config = json.loads((out / "encoder" / "config.json").read_text())
    (out / "encoder" / "config.json").write_text(json.dumps({**config, "position_embedding_type": "absolute"}))
    TransformersConverter(str(out / "encoder")).convert(str(out / "model"), quantization="int8")


def _ctranslate2(out: Path, threads: int) -> Run:
    import ctranslate2

    encoder = ctranslate2.Encoder(str(out / "model"), device="cpu", intra_threads=threads, compute_type="int8")
    return lambda ids: np.array(encoder.forward_batch(ids.tolist()).last_hidden_state)


EAGER = "torch eager fp32"
PEERS: dict[str, Peer] = {
    EAGER: Peer(("torch",), _nothing, _eager),
    "onnxruntime dynamic": Peer(("onnxruntime",), _make_dynamic, _onnxruntime),
    "onnxruntime static": Peer(("onnxruntime",), _make_static, _onnxruntime),
    "OpenVINO + NNCF": Peer(("openvino", "nncf"), _make_openvino, _openvino),
    "torchao, compiled": Peer(("torchao",), _nothing, _torchao),
    "CTranslate2": Peer(("ctranslate2",), _make_ctranslate2, _ctranslate2),
}
