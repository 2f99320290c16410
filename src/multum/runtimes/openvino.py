"""OpenVINO on the CPU: fp32, bf16 and int8 (NNCF's post-training quantization), converted by transformers' own exporter.

bf16 is what the processor computes in: on disk the weights are fp16, half the bytes, which round less than bf16 does. A processor
without bf16 instructions would silently compute in fp32, so that such an export is refused there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import InputError, MissingExtra
from ._folder import export_folder, prove, read_manifest
from ._predictor import GraphPredictor, Run, choose_threads, cores
from ._rows import open_graph
from ._traced import following, open_shapes, quiet, two_rows

if TYPE_CHECKING:
    from ..core.model import Model

PRECISIONS = ("fp32", "bf16", "int8")
EXTRA: str | None = "openvino"
GRAPH = "model.xml"
WEIGHTS = "model.bin"


def unavailable() -> str | None:
    """Why it cannot be used here, or None."""
    missing = [name for name in ("openvino", "nncf") if find_spec(name) is None]
    return f"{' and '.join(missing)} not installed; pip install 'multum[openvino]'" if missing else None


def export(
    model: Model,
    folder: Path,
    *,
    precision: str,
    inputs: Sequence[Any],
    calibration: Sequence[Mapping[str, Any]],
    max_length: int,
    pairs: bool,
    task: str = "text-classification",
) -> dict[str, Any]:
    """Write an export folder.

    Args:
        model: for sequence classification, token classification or question answering.
        folder: replaced if it exists; whole or not at all.
        precision: one of `PRECISIONS`.
        inputs: real inputs on which the export must answer as torch does.
        calibration: padded batches from which int8 takes the ranges of activations.
        max_length: tokens after which a text is cut.
        pairs: inputs are pairs of texts.
        task: by name, for `measure`.

    Returns:
        How far the answers agree.

    Raises:
        MissingExtra: OpenVINO or NNCF is not installed.
        InputError: unknown precision, or an operator that the exporter does not know.
        ParityError: the answers differ.
    """
    if unavailable():
        raise MissingExtra("OpenVINO with NNCF", "openvino")
    if precision not in PRECISIONS:
        raise InputError(f"openvino has no precision {precision!r}; it has: {', '.join(PRECISIONS)}")
    import openvino

    if precision == "bf16" and not computes_in_bf16():
        raise InputError("this processor has no bf16 instructions; take int8, which is faster, or fp32, which is exact")
    _core()
    with quiet():
        graph = _convert(model, calibration, quantize=precision == "int8", max_length=max_length)
    manifest = {
        "runtime": "openvino",
        "precision": precision,
        "task": task,
        "max_length": max_length,
        "pairs": pairs,
        "inputs": [port.get_any_name() for port in graph.inputs],
        "outputs": [port.get_any_name() for port in graph.outputs],
    }
    with export_folder(model, folder, manifest) as work:
        openvino.save_model(graph, work / GRAPH, compress_to_fp16=precision == "bf16")
        proof = prove(model, work, open(work), inputs)
        choose_threads(work, open, inputs)
        return proof


def open(folder: str | Path, *, threads: int | None = None) -> GraphPredictor:
    """A predictor of an export folder.

    Args:
        folder: the export folder.
        threads: at most so many. A single text is answered on as many of them as were fastest at export; batches use all.

    Raises:
        MissingExtra: OpenVINO is not installed.
        InputError: damaged.
    """
    if find_spec("openvino") is None:
        raise MissingExtra("OpenVINO", "openvino")

    folder = Path(folder)
    manifest = read_manifest(folder)
    outputs = range(len(manifest.get("outputs") or ["logits"]))
    options: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1}
    if manifest["precision"] == "fp32":
        options["INFERENCE_PRECISION_HINT"] = "f32"  # otherwise bf16 where the processor has it, which is not what fp32 says
    elif manifest["precision"] == "bf16":
        options["INFERENCE_PRECISION_HINT"] = "bf16"

    def load(threads: int) -> Run:
        wanted = options | {"INFERENCE_NUM_THREADS": threads}
        try:
            request = _core().compile_model(str(folder / GRAPH), "CPU", wanted).create_infer_request()
        except RuntimeError as error:
            raise InputError(f"{folder / GRAPH} cannot be opened: {str(error).strip().splitlines()[-1]}") from error

        def run(columns: dict[str, np.ndarray]) -> np.ndarray:
            request.infer(columns, share_inputs=True)
            return np.array(request.get_output_tensor(0).data, dtype=np.float32)

        def run_several(columns: dict[str, np.ndarray]) -> np.ndarray:
            request.infer(columns, share_inputs=True)
            return np.stack([np.array(request.get_output_tensor(i).data, dtype=np.float32) for i in outputs], axis=-1)

        return run if len(outputs) == 1 else run_several

    files = [folder / name for name in (GRAPH, WEIGHTS, "tokenizer.json", "runtime.json")]
    return open_graph(folder, manifest, load, files, threads or cores())


def kernels() -> str:
    """What it computes with here."""
    return f"oneDNN ({', '.join(sorted(_core().get_property('CPU', 'OPTIMIZATION_CAPABILITIES')))})"


def computes_in_bf16() -> bool:
    """Whether OpenVINO finds instructions for bf16 in this processor."""
    return "BF16" in _core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


@cache
def _core() -> Any:
    """The one core of this process, with its CPU plugin loaded.

    The plugin gives the thread that loads it a stack for signals, and frees it with the last core that holds it, but leaves it
    registered: the next Ctrl-C then ends in a segmentation fault. So there is one that is never let go, before anything else
    (NNCF) makes its own.
    """
    import openvino

    core = openvino.Core()
    core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return core


def _convert(model: Model, calibration: Sequence[Mapping[str, Any]], *, quantize: bool, max_length: int) -> Any:
    import openvino.frontend
    import transformers.exporters
    from transformers.exporters import exporter_openvino

    from ..core.task import check_calibration

    library: Any = transformers.exporters

    example = two_rows(calibration)
    options: dict[str, Any] = {"dynamic_shapes": open_shapes(example, max_length)}
    if quantize:
        check_calibration(calibration, "openvino int8")
        texts = [
            {name: value[row : row + 1] for name, value in batch.items()}
            for batch in calibration
            for row in range(len(batch["input_ids"]))
        ]
        options["quantizer"] = library.NNCFOpenVINOQuantizer(calibration_dataset=texts)
    exporter: Any = exporter_openvino
    failures = tuple(
        value for value in vars(openvino.frontend).values() if isinstance(value, type) and issubclass(value, Exception)
    )
    with following(model, "openvino", failures) as traced:
        return exporter.OpenVINOExporter().export(traced, example, config=exporter.OpenVINOConfig(**options)).program
