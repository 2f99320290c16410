"""OpenVINO on the CPU: fp32 and int8 (NNCF's post-training quantization), converted by transformers' own exporter."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import InputError, MissingExtra
from ._folder import export_folder, prove, read_manifest
from ._predictor import GraphPredictor, Run, Text, choose_threads, cores

if TYPE_CHECKING:
    from ..core.model import Model

PRECISIONS = ("fp32", "int8")
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
    inputs: Sequence[Text],
    calibration: Sequence[Mapping[str, Any]],
    max_length: int,
    pairs: bool,
    task: str = "text-classification",
) -> dict[str, Any]:
    """Write an export folder.

    Args:
        model: a sequence classifier.
        folder: replaced if it exists; whole or not at all.
        precision: one of `PRECISIONS`.
        inputs: real inputs on which the export must answer as torch does.
        calibration: padded batches from which int8 takes the ranges of activations.
        max_length: tokens after which a text is cut.
        pairs: inputs are pairs of texts.

    Returns:
        How far the answers agree.

    Raises:
        MissingExtra: OpenVINO or NNCF is not installed.
        InputError: unknown precision.
        ParityError: the answers differ.
    """
    if unavailable():
        raise MissingExtra("OpenVINO with NNCF", "openvino")
    if precision not in PRECISIONS:
        raise InputError(f"openvino has no precision {precision!r}; it has: {', '.join(PRECISIONS)}")
    import openvino

    with _quiet():
        graph = _convert(model, calibration, quantize=precision == "int8", max_length=max_length)
    manifest = {
        "runtime": "openvino",
        "precision": precision,
        "task": task,
        "max_length": max_length,
        "pairs": pairs,
        "inputs": [port.get_any_name() for port in graph.inputs],
    }
    with export_folder(model, folder, manifest) as work:
        openvino.save_model(graph, work / GRAPH, compress_to_fp16=False)
        proof = prove(model, work, open(work).predict, inputs)
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
    import openvino

    folder = Path(folder)
    manifest = read_manifest(folder)
    options: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1}
    if manifest["precision"] == "fp32":
        options["INFERENCE_PRECISION_HINT"] = "f32"  # otherwise bf16 where the processor has it, which is not what fp32 says

    def load(threads: int) -> Run:
        wanted = options | {"INFERENCE_NUM_THREADS": threads}
        try:
            request = openvino.Core().compile_model(str(folder / GRAPH), "CPU", wanted).create_infer_request()
        except RuntimeError as error:
            raise InputError(f"{folder / GRAPH} cannot be opened: {str(error).strip().splitlines()[-1]}") from error

        def run(columns: dict[str, np.ndarray]) -> np.ndarray:
            request.infer(columns, share_inputs=True)
            return np.array(request.get_output_tensor(0).data, dtype=np.float32)

        return run

    files = [folder / name for name in (GRAPH, WEIGHTS, "tokenizer.json", "runtime.json")]
    return GraphPredictor(folder, manifest, load, files, threads or cores())


def _convert(model: Model, calibration: Sequence[Mapping[str, Any]], *, quantize: bool, max_length: int) -> Any:
    import torch
    import transformers.exporters
    from transformers.exporters import exporter_openvino

    library: Any = transformers.exporters

    # Two texts of different length: what a dimension of size 1 would be taken for is a constant.
    example = {name: value[:2].repeat(2, 1)[:2] for name, value in calibration[-1].items()}
    dims = {0: torch.export.Dim("batch", min=1, max=4096), 1: torch.export.Dim("tokens", min=2, max=max_length)}
    options: dict[str, Any] = {"dynamic_shapes": dict.fromkeys(example, dims)}
    if quantize:
        texts = [
            {name: value[row : row + 1] for name, value in batch.items()}
            for batch in calibration
            for row in range(len(batch["input_ids"]))
        ]
        options["quantizer"] = library.NNCFOpenVINOQuantizer(calibration_dataset=texts)
    # The exporter patches the module it is given.
    exporter: Any = exporter_openvino
    return exporter.OpenVINOExporter().export(model.copy().module, example, config=exporter.OpenVINOConfig(**options)).program


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Tracing and quantizing talk a lot: about their own deprecations, and to the terminal."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
