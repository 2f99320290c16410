"""OpenVINO on the CPU: fp32, bf16 and int8 (NNCF's post-training quantization), converted by transformers' own exporter. Of models
that write the weights alone are integers, of 8 or 4 bits (`_openvino_weights`).

bf16 is what the processor computes in: on disk the weights are fp16, half the bytes, which round less than bf16 does. A processor
without bf16 instructions would silently compute in fp32, so that such an export is refused there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import InputError, MissingExtra
from ._folder import export_folder, prove, read_manifest
from ._predictor import Run, choose_threads, cores
from ._rows import open_graph
from ._traced import Part, following, open_shapes, quiet, two_rows, writes
from ._written import open_writer

if TYPE_CHECKING:
    from ..core.model import Model

PRECISIONS = ("fp32", "bf16", "int8")
WRITING = ("int4",)
"""Precisions that only models that write are exported to."""
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
        model: of any task.
        folder: replaced if it exists; whole or not at all.
        precision: one of `PRECISIONS` or `WRITING`.
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
    if precision not in (*PRECISIONS, *WRITING):
        raise InputError(f"openvino has no precision {precision!r}; it has: {', '.join((*PRECISIONS, *WRITING))}")
    import openvino

    if precision == "bf16" and not computes_in_bf16():
        raise InputError("this processor has no bf16 instructions; take int8, which is faster, or fp32, which is exact")
    _core()
    manifest: dict[str, Any] = {"runtime": "openvino", "precision": precision, "task": task}
    if writes(model.module):
        return _export_writer(model, folder, manifest, inputs, max_length)
    if precision in WRITING:
        raise InputError(f"{precision} is for models that write; those that read take {', '.join(PRECISIONS)}")
    graph = _of_rows(model, calibration, quantize=precision == "int8", max_length=max_length)
    manifest |= {
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


def _export_writer(model: Model, folder: Path, manifest: dict[str, Any], inputs: Sequence[Any], max_length: int) -> dict[str, Any]:
    """Of models that write the weights alone are integers: a token reads all of them, and computes little with each."""
    from ._cached import export_writer
    from ._openvino_weights import integer_weights
    from ._own_codes import BITS, OwnCodes

    precision = manifest["precision"]
    bits = BITS.get(precision, 0)
    own = OwnCodes.of(model.module, bits)

    def save(part: Part, path: Path) -> None:
        import openvino

        graph = _convert(part)
        graph = integer_weights(graph, bits, own) if bits else graph
        openvino.save_model(graph, path.with_suffix(".xml"), compress_to_fp16=precision == "bf16")

    more: dict[str, Any] = {"inputs": inputs, "max_length": max_length, "raised": _failures(), "noted": own.facts}
    return export_writer(model, folder, manifest, save, open, **more)


def proof(model: Model, folder: Path, inputs: Sequence[Any]) -> dict[str, Any]:
    """How far an export of a model that writes agrees with it (`_writing_proof`).

    Raises:
        ParityError: it answers differently, or was made from another model.
    """
    from . import _cached

    return _cached.proof(model, folder, open, inputs)


def open(folder: str | Path, *, threads: int | None = None) -> Any:
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

    def compiled(path: Path, threads: int) -> Any:
        try:
            return _core().compile_model(str(path), "CPU", options | {"INFERENCE_NUM_THREADS": threads})
        except RuntimeError as error:
            raise InputError(f"{path} cannot be opened: {str(error).strip().splitlines()[-1]}") from error

    if "graphs" in manifest:
        return open_writer(
            folder, manifest, lambda name, threads: _Graph(compiled(folder / f"{name}.xml", threads)), [".xml", ".bin"], threads
        )

    def load(threads: int) -> Run:
        request = compiled(folder / GRAPH, threads).create_infer_request()

        def run(columns: dict[str, np.ndarray]) -> np.ndarray:
            request.infer(columns, share_inputs=True)
            return np.array(request.get_output_tensor(0).data, dtype=np.float32)

        def run_several(columns: dict[str, np.ndarray]) -> np.ndarray:
            request.infer(columns, share_inputs=True)
            return np.stack([np.array(request.get_output_tensor(i).data, dtype=np.float32) for i in outputs], axis=-1)

        return run if len(outputs) == 1 else run_several

    files = [folder / name for name in (GRAPH, WEIGHTS, "tokenizer.json", "runtime.json")]
    return open_graph(folder, manifest, load, files, threads or cores())


class _Graph:
    """A graph of a model that writes. Two requests take turns, so that the outputs of one can be the inputs of the other."""

    def __init__(self, compiled: Any) -> None:
        self._requests = cycle([compiled.create_infer_request() for _ in range(2)])
        self._outputs = range(len(compiled.outputs))

    def __call__(self, inputs: Mapping[str, Any]) -> list[Any]:
        request = next(self._requests)
        try:
            request.infer(dict(inputs), share_inputs=True)
        except RuntimeError as error:  # it was traced, and may stumble over shapes that come later
            raise InputError(f"the graph cannot be executed: {str(error).strip().splitlines()[-1]}") from error
        return [request.get_output_tensor(number) for number in self._outputs]

    def array(self, value: Any) -> np.ndarray:
        return np.array(value.data, dtype=np.float32)


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


def _of_rows(model: Model, calibration: Sequence[Mapping[str, Any]], *, quantize: bool, max_length: int) -> Any:
    """A model that reads as one graph."""
    import transformers.exporters

    from ..core.task import check_calibration

    library: Any = transformers.exporters
    example, options = two_rows(calibration), dict[str, Any]()
    if quantize:
        check_calibration(calibration, "openvino int8")
        texts = [
            {name: value[row : row + 1] for name, value in batch.items()}
            for batch in calibration
            for row in range(len(batch["input_ids"]))
        ]
        options["quantizer"] = library.NNCFOpenVINOQuantizer(calibration_dataset=texts)
    with following(model, "openvino", _failures()) as traced:
        return _convert(Part(traced, example, open_shapes(example, max_length)), **options)


def _convert(part: Part, **options: Any) -> Any:
    """A graph; to be called inside `following`."""
    from transformers.exporters import exporter_openvino

    exporter: Any = exporter_openvino
    config = exporter.OpenVINOConfig(dynamic_shapes=dict(part.shapes), **options)
    with quiet():
        return exporter.OpenVINOExporter().export(part.module, dict(part.inputs), config=config).program


def _failures() -> tuple[type[Exception], ...]:
    """What the converter raises."""
    import openvino.frontend

    found = vars(openvino.frontend).values()
    return tuple(value for value in found if isinstance(value, type) and issubclass(value, Exception))
