"""Models that no graph is written for by hand: traced by transformers' own exporters, which run them once and note every operator.

Two rows are traced, with the number of rows and of tokens left open. For onnxruntime attention has its plain form (`eager`); fp32
graphs get fused operators where these are found, int8 is made of the plain graph, whose matrices `quantize_dynamic` knows: a scale
per output column, activations quantized as they come.
"""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError, MissingExtra

if TYPE_CHECKING:
    from ..core.model import Model

EXTRA = "export"
HEADS = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "ForMaskedLM")
"""How the classes of models are called at the end whose outputs a predictor can read in one look at a row."""
WRITERS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "MTModel")
"""The same of models that write."""
MOST = 4096
"""Rows of a batch at most."""
RAISED = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError)
"""What tracing raises where it cannot follow; a full disk or an interruption is none of these."""


@dataclass(frozen=True)
class Part:
    """A graph to be: a module, what to trace it with, and which dimensions stay open."""

    module: Any
    inputs: Mapping[str, Any]
    shapes: Mapping[str, Any]


def to_onnx(model: Model, example: Mapping[str, Any], max_length: int, *, int8: bool) -> Any:
    """The model as an `onnx.ModelProto`.

    Args:
        model: left as it is.
        example: as `two_rows` makes it.
        max_length: tokens of a row at most.
        int8: 8-bit weights.

    Raises:
        MissingExtra: onnxscript is not installed.
        InputError: the exporter cannot follow; names the operator and the module.
    """
    with following(model, "onnxruntime") as traced:
        return onnx_of(Part(traced, example, open_shapes(example, max_length)), int8=int8)


def onnx_of(part: Part, *, int8: bool = False, fuse: bool = True) -> Any:
    """A graph as an `onnx.ModelProto`; to be called inside `following`.

    Args:
        part: the graph to be.
        int8: 8-bit weights.
        fuse: put operators together. Behind a cache fused ones may not take the shapes that come: SmolLM2's do not.

    Raises:
        MissingExtra: onnxscript is not installed.
    """
    if not installed():
        raise MissingExtra(needed(getattr(part.module, "model", part.module)), EXTRA)
    import onnx_ir
    import transformers.exporters
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass
    from onnxruntime.quantization import QuantType
    from transformers.exporters import exporter_onnx
    from transformers.pytorch_utils import Conv1D

    library: Any = transformers.exporters
    exporter: Any = exporter_onnx
    flat = any(isinstance(one, Conv1D) for one in part.module.modules())  # GPT-2's (tokens, in) products are fused wrongly
    options: dict[str, Any] = {"ort_fusions": "cpu"} if fuse and not flat else {}
    with quiet():
        if int8:
            dynamic = library.OnnxRuntimeDynamicConfig(per_channel=True, weight_type=QuantType.QInt8)
            options = {"quantizer": library.OnnxRuntimeQuantizer(dynamic)}
        for one in part.module.modules():
            with contextlib.suppress(ValueError):  # an architecture that has one form of attention only
                if hasattr(one, "set_attn_implementation"):
                    one.set_attn_implementation("eager")
        config = exporter.OnnxConfig(dynamic_shapes=part.shapes, **options)
        program = exporter.OnnxExporter().export(part.module, dict(part.inputs), config=config).program
        ClearMetadataAndDocStringPass()(program)  # which line of whose code every operator comes from
        return onnx_ir.to_proto(program)


def installed() -> bool:
    """Whether onnxscript is, which `to_onnx` takes."""
    return find_spec("onnxscript") is not None


def needed(module: Any) -> str:
    """What it takes, in words."""
    kind = getattr(getattr(module, "config", None), "model_type", type(module).__name__)
    return f"onnxscript, by which models of type {kind!r} are exported,"


def wrong_head(module: Any) -> str | None:
    """Why a model's outputs cannot be read by a predictor; None if they can."""
    kind, taken = type(module).__name__, (*HEADS, *WRITERS)
    return None if kind.endswith(taken) else f"{kind} has a head that cannot be exported; those of models {', '.join(taken)} can"


def writes(module: Any) -> bool:
    """Whether a model writes texts, token by token."""
    return type(module).__name__.endswith(WRITERS)


def two_rows(calibration: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What to trace with: two rows, because a dimension of size 1 would be taken for a constant."""
    if not calibration:
        raise ValueError("a model is traced with rows that it reads; give calibration batches")
    return {name: value[:2].repeat(2, 1)[:2] for name, value in calibration[-1].items()}


def open_shapes(example: Mapping[str, Any], max_length: int) -> dict[str, Any]:
    """The dimensions that are left open, for `torch.export`."""
    import torch

    dims = {0: torch.export.Dim("batch", min=1, max=MOST), 1: torch.export.Dim("tokens", min=2, max=max_length)}
    return dict.fromkeys(example, dims)


@contextlib.contextmanager
def following(model: Model, runtime: str, raised: tuple[type[Exception], ...] = ()) -> Iterator[Any]:
    """Yields a copy to trace, because exporters patch what they are given; what they stumble over becomes one error.

    Weights that are packed are unpacked in it: an export has a format of its own for them.

    Args:
        model: left as it is.
        runtime: for the error.
        raised: what its converter raises beside `RAISED`.

    Raises:
        InputError: names the operator, and the module that it stands in.
    """
    kind = type(model.module).__name__
    if reason := wrong_head(model.module):
        raise InputError(reason)
    from ..core.packed import unpack_

    traced: Any = model.copy().module
    unpack_(traced)
    traced.config.use_cache = False  # or what a decoder keeps for its next token comes out too
    everything: tuple[type[Exception], ...] = (*RAISED, *raised)
    try:
        yield traced
    except InputError:
        raise
    except everything as error:
        raise InputError(f"{kind} cannot be exported to {runtime}: {_what_failed(error, traced)}") from error


def _what_failed(error: BaseException, module: Any) -> str:
    """The operator that an exporter was at and the module that it stands in.

    Read off the frames of what was raised: the node at hand, or that of the graph at hand whose operator the message names.
    """
    import torch

    names = {part: name for name, part in module.named_modules()}
    operator, place, last = "", "", error
    seen: BaseException | None = error
    while seen is not None:
        frame = seen.__traceback__
        while frame is not None:
            values = frame.tb_frame.f_locals
            node, graph, owner = (values.get(name) for name in ("node", "graph_module", "self"))
            if isinstance(graph, torch.fx.GraphModule):
                named = (one for one in graph.graph.nodes if isinstance(one.target, torch._ops.OpOverload))
                node = next((one for one in named if str(one.target) in str(error)), node)
            if isinstance(node, torch.fx.Node) and node.op == "call_function":
                operator = str(node.target)
                stack = [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
                place = str(stack[-1]) if stack else place
            elif isinstance(owner, torch.nn.Module) and owner in names and not operator:
                place = names[owner]
            frame = frame.tb_next
        last, seen = seen, seen.__cause__ or seen.__context__
    lines = (str(last).strip() or type(last).__name__).splitlines()
    reason = next((line.strip(" -") for line in lines if operator and operator in line), lines[0])
    return f"the exporter does not know {operator or 'what is computed'} in {place or 'the model'} ({reason})"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Tracing and quantizing talk a lot: about their own deprecations, and to the terminal."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
