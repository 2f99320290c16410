"""Models that write as graphs that are traced: what they keep of the tokens before, the cache, is an input and an output.

    encoder    source -> keys and values of every cross-attention
    decoder    tokens, cache, those keys and values -> logits of the next tokens, cache with the tokens added

An encoder-decoder is both graphs, a causal model a decoder alone. A decoder takes one token or many, behind an empty cache or a
full one. Of an encoder-decoder its rows may go on from any rows of the step before, as a beam search does: `parents` says which.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import DynamicCache, DynamicLayer, EncoderDecoderCache

from ..core.folders import read_json, write_json
from ..core.model import Model
from ..errors import InputError
from . import _continuing, _written
from ._decoder import DECODER, ENCODER
from ._folder import MANIFEST, export_folder
from ._traced import Part, following
from ._writing_proof import prove, prove_translator

EXAMPLE = 5
"""Tokens of a row that is traced; any number that no other dimension has."""


class Sources(nn.Module):
    """The encoder, and of the decoder the keys and values that it makes of the encoder's outputs."""

    def __init__(self, model: Any, start: int) -> None:
        super().__init__()
        self.model, self.start = model, start

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        """(rows, tokens) both -> `cross_*`, (rows, heads, tokens, head size) each."""
        first = torch.full_like(input_ids[:, :1], self.start)
        known = {"input_ids": input_ids, "attention_mask": attention_mask, "decoder_input_ids": first}
        return _named("cross", self.model(**known, use_cache=True).past_key_values.cross_attention_cache)


class NextOfSource(nn.Module):
    """The decoder of an encoder-decoder; `model` is the whole of it."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.hidden = model, int(model.config.hidden_size)

    def forward(
        self,
        tokens: torch.Tensor,
        attention_mask: torch.Tensor,
        parents: torch.Tensor,
        past: list[torch.Tensor],
        cross: list[torch.Tensor],
    ) -> dict[str, torch.Tensor]:
        """Tokens (rows, new), mask of the source (rows, source), `parents` (rows,) -> logits (rows, new, vocabulary), cache."""
        before = _cache([part.index_select(0, parents) for part in past])
        read = attention_mask.new_zeros((*attention_mask.shape, self.hidden), dtype=torch.float32)  # its keys are there already
        outputs = self.model(
            decoder_input_ids=tokens,
            attention_mask=attention_mask,
            encoder_outputs=(read,),
            past_key_values=EncoderDecoderCache(before, _cache(cross)),
            use_cache=True,
        )
        return {"logits": outputs.logits, **_named("past", outputs.past_key_values.self_attention_cache)}


class NextOfText(nn.Module):
    """A causal model; `model` has its head."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor, kept: torch.Tensor, past: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Tokens (rows, new), the places among them whose logits are wanted (kept,) -> logits (rows, kept, vocabulary), cache."""
        outputs = self.model(input_ids=tokens, past_key_values=_cache(past), use_cache=True, logits_to_keep=kept)
        return {"logits": outputs.logits, **_named("past", outputs.past_key_values)}


def export_writer(
    model: Model,
    folder: Path,
    manifest: Mapping[str, Any],
    save: Callable[[Part, Path], None],
    open: Callable[[Path], Any],
    *,
    inputs: Sequence[Any],
    max_length: int,
    raised: tuple[type[Exception], ...] = (),
    noted: Callable[[], dict[str, Any]] = dict,
) -> dict[str, Any]:
    """Write the export folder of a model that writes.

    Args:
        model: an encoder-decoder or a causal model; left as it is.
        folder: replaced if it exists; whole or not at all.
        manifest: `runtime`, `precision`, `task`.
        save: writes a graph to a path that has no suffix yet.
        open: the finished folder.
        inputs: real ones on which the export must answer as torch does.
        max_length: tokens of a source, or of a whole text.
        raised: as `following` takes it.
        noted: what is to be said of the weights beside it, once all graphs are there.

    Returns:
        How far the answers agree (`_writing_proof`), and what was noted.

    Raises:
        InputError: what cannot be traced, or settings that only torch knows.
        ParityError: the answers differ.
    """
    both = bool(getattr(model.module.config, "is_encoder_decoder", False))
    facts = (_written if both else _continuing).facts_of(model, max_length)
    with export_folder(model, folder, {**manifest, **facts}) as work:
        with following(model, str(manifest["runtime"]), raised) as traced:
            parts = parts_of(traced, facts["search"]["start"] if both else None)
            for name, part in parts.items():
                save(part, work / name)
        graphs = {"graphs": list(parts), "cache": cache_shapes(parts[DECODER])}
        del parts, part, traced  # a copy of the model, which the proof needs no more
        write_json(work / MANIFEST, {**read_json(work / MANIFEST), **graphs})
        parity = proof(model, work, open, inputs) | noted()
        write_json(work / MANIFEST, {**read_json(work / MANIFEST), "parity": parity})
        return parity


def proof(model: Model, folder: Path, open: Callable[[Path], Any], inputs: Sequence[Any]) -> dict[str, Any]:
    """How far an export folder agrees with the model.

    Raises:
        ParityError: it answers differently, or was made from another model.
    """
    predictor = open(folder)
    told = predictor.runtime, predictor.precision
    if hasattr(predictor, "session"):
        return prove(model, predictor.session, *told, inputs, predictor.context, exactly=True)
    return prove_translator(model, predictor, *told, inputs)


def parts_of(module: Any, start: int | None = None) -> dict[str, Part]:
    """The graphs of a model that writes.

    Args:
        module: in eval mode; it is run once.
        start: the token that the decoder of an encoder-decoder begins with; None for a causal model.

    Raises:
        InputError: a model that keeps something else than keys and values.
    """
    ids = torch.arange(2 * EXAMPLE).reshape(2, EXAMPLE) % module.config.get_text_config(decoder=True).vocab_size
    rows, new, past = torch.export.Dim("rows"), torch.export.Dim("new"), torch.export.Dim("past")
    with torch.no_grad():
        if start is None:
            cache = DynamicCache()
            module(input_ids=ids, past_key_values=cache, use_cache=True)
            inputs: dict[str, Any] = {"tokens": ids, "kept": torch.arange(1, EXAMPLE - 1), "past": _tensors(cache)}
            shapes: dict[str, Any] = {"tokens": {0: rows, 1: new}, "kept": {0: torch.export.Dim("kept")}}
            shapes["past"] = [{0: rows, 2: past} for _ in inputs["past"]]
            return {DECODER: Part(NextOfText(module), inputs, shapes)}
        known, both = (
            {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
            EncoderDecoderCache(DynamicCache(), DynamicCache()),
        )
        module(**known, decoder_input_ids=ids[:, : EXAMPLE - 2], past_key_values=both, use_cache=True)
    batch, source = torch.export.Dim("batch"), torch.export.Dim("source")
    encoder = Part(Sources(module, start), known, {name: {0: batch, 1: source} for name in known})
    # What is traced must lie in memory as what comes later does, or its strides become conditions.
    inputs = {"tokens": ids[:, :2].contiguous(), "attention_mask": known["attention_mask"], "parents": torch.tensor([0, 1])}
    inputs |= {"past": _tensors(both.self_attention_cache), "cross": _tensors(both.cross_attention_cache)}
    shapes = {"tokens": {0: rows, 1: new}, "attention_mask": {0: rows, 1: source}, "parents": {0: rows}}
    shapes["past"] = [{0: torch.export.Dim("before"), 2: past} for _ in inputs["past"]]
    shapes["cross"] = [{0: rows, 2: source} for _ in inputs["cross"]]
    return {ENCODER: encoder, DECODER: Part(NextOfSource(module), inputs, shapes)}


def cache_shapes(decoder: Part) -> list[list[int]]:
    """Heads and features of everything that a decoder keeps, [heads, head size] each."""
    return [[part.shape[1], part.shape[3]] for part in decoder.inputs["past"]]


def _tensors(cache: Any) -> list[torch.Tensor]:
    """Keys and values of every block; one without attention keeps something too."""
    if any(not hasattr(layer, "keys") for layer in cache.layers):
        raise InputError("it keeps something else than keys and values, which no graph is made of")
    return [part for layer in cache.layers for part in (layer.keys, layer.values)]


def _named(name: str, cache: Any) -> dict[str, torch.Tensor]:
    return {f"{name}_{number}": part for number, part in enumerate(_tensors(cache))}


def _cache(tensors: list[torch.Tensor]) -> DynamicCache:
    """A cache that holds these keys and values."""
    cache = DynamicCache()
    for keys, values in zip(tensors[::2], tensors[1::2], strict=True):
        layer: Any = DynamicLayer()
        layer.dtype, layer.device = keys.dtype, keys.device
        layer.keys, layer.values, layer.is_initialized = keys, values, True
        cache.layers.append(layer)
    return cache
