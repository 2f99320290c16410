"""onnxruntime on the CPU: fp32 and int8, word embeddings included; ranges of activations as they come, or calibrated. Of models
that write the weights alone are integers, of 8 or 4 bits (`_weights`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state

from ..errors import InputError
from ._folder import export_folder, prove, read_manifest
from ._predictor import Run, choose_threads, cores
from ._rows import open_graph
from ._written import open_writer

if TYPE_CHECKING:
    import onnx

    from ..core.latency import Blocks, Timer
    from ..core.model import Model

PRECISIONS = ("fp32", "int8")
CALIBRATED = ("int8-minmax", "int8-percentile", "int8-mse")
"""Precisions that are made when asked for: 8 bits with fixed ranges (`_static`), named by how these are found."""
WRITING = ("int4",)
"""Precisions that only models that write are exported to."""
EXTRA: str | None = None
SUFFIX = ".onnx"
GRAPH = "model.onnx"
ERRORS: tuple[type[Exception], ...] = (
    RuntimeError,
    OSError,
    *(value for value in vars(onnxruntime_pybind11_state).values() if isinstance(value, type) and issubclass(value, Exception)),
)
"""onnxruntime has a class of error for every status code, and no common base for them."""


def unavailable() -> str | None:
    """onnxruntime comes with multum."""
    return None


def obstacle(module: Any) -> str | None:
    """Why a model cannot be exported, as far as its class tells; None if it can. What tracing finds out is not known here."""
    from . import _encoder, _traced

    if reason := _traced.wrong_head(module):
        return reason
    if (_traced.writes(module) or _encoder.obstacle(module)) and not _traced.installed():
        return f"{_traced.needed(module)} is not installed; pip install 'multum[{_traced.EXTRA}]'"
    return None


def export(
    model: Model,
    folder: Path,
    *,
    precision: str,
    inputs: Sequence[Any],
    max_length: int,
    pairs: bool,
    calibration: Sequence[Mapping[str, Any]] = (),
    task: str = "text-classification",
) -> dict[str, Any]:
    """Write an export folder.

    Args:
        model: of any task. The graph of an encoder is written directly where the families table says how, else traced.
        folder: replaced if it exists; whole or not at all.
        precision: one of `PRECISIONS`, `CALIBRATED` or `WRITING`.
        inputs: real inputs on which the export must answer as torch does.
        max_length: tokens after which a text is cut.
        pairs: inputs are pairs of texts.
        calibration: padded batches; what is traced is traced with two rows of them, fixed ranges are those of all of them.
        task: by name, for `measure`.

    Returns:
        How far the answers agree.

    Raises:
        MissingExtra: onnxscript is not installed, and the model has to be traced.
        InputError: unknown precision, or a model that cannot be exported.
        ParityError: the answers differ.
    """
    known = (*PRECISIONS, *CALIBRATED, *WRITING)
    if precision not in known:
        raise InputError(f"onnxruntime has no precision {precision!r}; it has: {', '.join(known)}")
    from ._traced import writes

    manifest: dict[str, Any] = {"runtime": "onnxruntime", "precision": precision, "task": task}
    if writes(model.module):
        return _export_writer(model, folder, manifest, inputs, max_length)
    if precision in WRITING:
        raise InputError(f"{precision} is for models that write; those that read take {', '.join(PRECISIONS)}")
    graph = _graph(model, precision, max_length, pairs=pairs, calibration=calibration)
    manifest |= {
        "max_length": max_length,
        "pairs": pairs,
        "inputs": [value.name for value in graph.graph.input],
        "outputs": [value.name for value in graph.graph.output],
    }
    with export_folder(model, folder, manifest) as work:
        (work / GRAPH).write_bytes(_serialized(graph))
        proof = prove(model, work, open(work), inputs)
        choose_threads(work, open, inputs)
        return proof


def _export_writer(model: Model, folder: Path, manifest: dict[str, Any], inputs: Sequence[Any], max_length: int) -> dict[str, Any]:
    from ._cached import export_writer
    from ._own_codes import BITS, OwnCodes
    from ._traced import onnx_of
    from ._weights import integer_weights

    precision = manifest["precision"]
    if precision in CALIBRATED:
        raise InputError(f"{precision} is for models that read; those that write take {', '.join((*PRECISIONS, *WRITING))}")
    bits = BITS.get(precision, 0)
    own = OwnCodes.of(model.module, bits)

    def save(part: Any, path: Path) -> None:
        graph = onnx_of(part, fuse=False)
        path.with_suffix(SUFFIX).write_bytes(_serialized(integer_weights(graph, bits, own) if bits else graph))

    return export_writer(model, folder, manifest, save, open, inputs=inputs, max_length=max_length, noted=own.facts)


def proof(model: Model, folder: Path, inputs: Sequence[Any]) -> dict[str, Any]:
    """How far an export of a model that writes agrees with it (`_writing_proof`).

    Raises:
        ParityError: it answers differently, or was made from another model.
    """
    from . import _cached

    return _cached.proof(model, folder, open, inputs)


def _graph(
    model: Model, precision: str, max_length: int, *, pairs: bool, calibration: Sequence[Mapping[str, Any]]
) -> onnx.ModelProto:
    from . import _encoder, _encoder_graph, _static, _traced

    if precision in CALIBRATED:
        dynamic = _graph(model, "int8", max_length, pairs=pairs, calibration=calibration)
        return _static.static(dynamic, calibration, precision.removeprefix("int8-"))
    if _encoder.obstacle(model.module):
        traced: onnx.ModelProto = _traced.to_onnx(model, _traced.two_rows(calibration), max_length, int8=precision == "int8")
        return traced
    encoder = _encoder.fold_betas(_encoder.read(model.module, max_length=max_length, pairs=pairs))
    return _encoder_graph.write(encoder, precision=precision, pairs=pairs)


def open(folder: str | Path, *, threads: int | None = None) -> Any:
    """A predictor of an export folder.

    Args:
        folder: the export folder.
        threads: at most so many. A single text is answered on as many of them as were fastest at export; batches use all.

    Raises:
        InputError: damaged.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    if "graphs" in manifest:
        return open_writer(folder, manifest, lambda name, threads: _Graph(folder / f"{name}{SUFFIX}", threads), [SUFFIX], threads)
    names = list(manifest.get("outputs") or ["logits"])

    def load(threads: int) -> Run:
        session = _session(folder / GRAPH, threads)
        if len(names) == 1:
            return lambda columns: np.asarray(_run(session.run, names, columns)[0])
        return lambda columns: np.stack(_run(session.run, names, columns), axis=-1)

    files = [folder / name for name in (GRAPH, "tokenizer.json", "runtime.json")]
    return open_graph(folder, manifest, load, files, threads or cores())


class _Graph:
    """A graph of a model that writes; its outputs stay in onnxruntime's own memory."""

    def __init__(self, path: Path, threads: int) -> None:
        self._session = _session(path, threads)
        self._outputs = [one.name for one in self._session.get_outputs()]

    def __call__(self, inputs: Mapping[str, Any]) -> list[Any]:
        kept = {
            name: onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value)) if isinstance(value, np.ndarray) else value
            for name, value in inputs.items()
        }
        return list(_run(self._session.run_with_ort_values, self._outputs, kept))

    def array(self, value: Any) -> np.ndarray:
        found: np.ndarray = value.numpy()
        return found


def probe(
    hidden: int,
    head_size: int,
    blocks: Sequence[tuple[int, int]],
    *,
    precision: str,
    lengths: Sequence[int],
    threads: int | None = None,
    every_token: bool = False,
) -> Callable[[], float]:
    """A timer of a random model with these blocks: milliseconds of one pass at batch 1, averaged over the text lengths.

    Every pass that counts comes right after one that does not: the weights are then where those of a model that serves are, and
    not where the others that are timed in turns have pushed them. Cold caches make large models look a fifth slower than they are.
    """
    from . import _encoder, _encoder_graph

    encoder = _encoder.draw(hidden, head_size, blocks, tokens=max(lengths), every_token=every_token)
    # Many of these are timed in turns: threads that go on spinning after a pass would slow down the next one's.
    session = _session(_serialized(_encoder_graph.write(encoder, precision=precision)), threads or cores(), quiet=True)
    ids = [np.ones((1, length), dtype=np.int64) for length in lengths]

    def once() -> float:
        for _ in range(2):
            started = time.perf_counter()
            for row in ids:
                session.run(None, {"input_ids": row, "attention_mask": row})
        return 1e3 * (time.perf_counter() - started) / len(ids)

    return once


def stacks(
    model: Model, *, precision: str, lengths: Sequence[int], threads: int | None = None
) -> tuple[Callable[[Blocks], Timer], bool]:
    """What a latency table for this model is measured with: a maker of timers of blocks, and whether all work on every token.

    Traced graphs compute every token whatever the head reads. Their blocks are stood in for by written ones, with half as many
    neurons again where a gate adds a third matrix to the two of the feed-forward.
    """
    from ..core.families import family_of
    from ..core.profile import reads_every_token
    from ..core.surgery import head_width
    from . import _encoder

    module: Any = model.module
    traced = _encoder.obstacle(module) is not None
    every_token = traced or reads_every_token(module)
    matrices = 3 if family_of(module).gate else 2
    hidden, width = module.config.hidden_size, head_width(module)

    def timer(blocks: Blocks) -> Timer:
        wide = [(heads, neurons * matrices // 2) for heads, neurons in blocks]
        return probe(hidden, width, wide, precision=precision, lengths=lengths, threads=threads, every_token=every_token)

    return timer, every_token


def _run(run: Callable[..., Any], names: Sequence[str], inputs: Mapping[str, Any]) -> Any:
    """What a session answers. A graph that was traced may stumble over shapes that come later.

    Raises:
        InputError: it does.
    """
    try:
        return run(names, inputs)
    except ERRORS as error:
        raise InputError(f"the graph cannot be executed: {str(error).splitlines()[0]}") from error


def _serialized(graph: Any) -> bytes:
    from google.protobuf.message import EncodeError

    try:
        return bytes(graph.SerializeToString())
    except (EncodeError, ValueError) as error:
        raise InputError("the graph is larger than the 2 GiB that an ONNX file can hold") from error


def _session(graph: Path | bytes, threads: int, *, quiet: bool = False) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    if quiet:
        options.add_session_config_entry("session.force_spinning_stop", "1")
    try:
        return onnxruntime.InferenceSession(
            str(graph) if isinstance(graph, Path) else graph, options, providers=["CPUExecutionProvider"]
        )
    except ERRORS as error:
        raise InputError(
            f"{graph if isinstance(graph, Path) else 'graph'} cannot be opened: {str(error).splitlines()[0]}"
        ) from error
