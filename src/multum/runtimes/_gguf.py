"""A causal model as a GGUF file, in the precisions that the `gguf` library writes."""

from __future__ import annotations

import math
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import MissingExtra
from ._gguf_blocks import GROUP, Written
from ._gguf_grid import MULTIPLES, quantized
from ._gguf_model import read
from ._gguf_tokenizer import tokenizer_fields

if TYPE_CHECKING:
    from ..core.model import Model

FILE_TYPES = {"f32": 0, "f16": 1, "q8_0": 7, "q4_0": 2, "q4_1": 3}
"""Precision -> `general.file_type`."""
EXACT = ("position_embd.weight", "rope_freqs.weight")
"""Never rounded, as small as they are."""


def write_gguf(model: Model, path: Path, precision: str) -> dict[str, Any]:
    """Write a model with its tokenizer.

    Matrices are of the precision asked for; but the output matrix, or the table of embeddings that serves as one, is Q8_0 where the
    others have 4 bits, and F16 is what has rows that are not made up of whole groups of 32. Norms and biases are F32. Weights that
    the model has in 4 bits already, in groups that are made up of such groups, keep their numbers (`_gguf_grid`).

    Args:
        model: a causal language model.
        path: of the file.
        precision: one of `FILE_TYPES`.

    Returns:
        `architecture`, `context` in tokens, and `tensors`: how many are of which type; of a model that is packed in 4 bits also
        `own_codes`: how many matrices keep their numbers, and how many do not.

    Raises:
        MissingExtra: `gguf` is not installed.
        InputError: llama.cpp has no words for this model or tokenizer.
    """
    if find_spec("gguf") is None:
        raise MissingExtra("gguf", "gguf")
    import gguf

    written = read(model.module, group=GROUP if precision.startswith("q") else 1)
    words = tokenizer_fields(model.tokenizer, written.fields["vocab_size"])
    writer = gguf.GGUFWriter(path, written.architecture)
    writer.add_file_type(FILE_TYPES[precision])
    if precision.startswith("q"):
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for key, value in written.fields.items():
        _add(writer, f"{written.architecture}.{key}", value)
    for key, value in words.items():
        _add(writer, f"tokenizer.{key}", value)
    types = {name: gguf.GGMLQuantizationType[_type(written, name, precision)] for name in written.tensors}
    for name, (shape, _) in written.tensors.items():
        block, size = gguf.GGML_QUANT_SIZES[types[name]]
        writer.add_tensor_info(name, shape, np.dtype(np.float32), math.prod(shape) // block * size, types[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    held = []
    for name, (_, make) in written.tensors.items():
        own = name in written.own and types[name].name in MULTIPLES
        data, on_grid = quantized(make(), types[name], own=own)
        writer.write_tensor_data(data)
        held += [on_grid] * own
    writer.close()
    counts = Counter(kind.name.lower() for kind in types.values())
    facts = {"architecture": written.architecture, "context": written.context, "tensors": dict(sorted(counts.items()))}
    return facts | ({"own_codes": [held.count(True), held.count(False)]} if held else {})


def _type(written: Written, name: str, precision: str) -> str:
    shape = written.tensors[name][0]
    if len(shape) < 2 or name in EXACT or precision == "f32":
        return "F32"
    if precision == "f16" or shape[-1] % GROUP:
        return "F16"
    output = "output.weight" if "output.weight" in written.tensors else "token_embd.weight"
    return "Q8_0" if name == output else precision.upper()


def _add(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
