"""A model that was cut unevenly, saved and loaded by plain transformers is traced to ONNX and answers there as in memory.
What is traced of models that write, a step with a cache, says the same as the model in torch, in every family.

One model of each way in which attention code keeps its heads, beside those that `test_every_runtime` and `test_runtime_traced`
export: queries that share keys, fused matrices, a head count in attributes or in the config, two stacks, relative biases.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import onnxruntime
import pytest
import tiny_encoder_decoders
import tiny_families
import torch
import transformers
from transformers.exporters import exporter_onnx

from multum.core import shapes
from multum.core.channels import channels_of, keep_channels
from multum.core.sublayers import places_of
from multum.core.surgery import head_size
from multum.runtimes import _traced
from multum.runtimes._cached import parts_of
from multum.runtimes._decoder import DECODER, ENCODER

FAMILIES = ("qwen2", "gemma", "phi3", "opt", "bart", "mbart", "marian", "t5", "t5-gated")
NARROW = ("gpt2", "opt")
"""Whose residual stream loses channels too."""
GONE = 4
"""The number of the sublayer that loses all its units; the others lose one or two."""


def made(name: str) -> tuple[Any, dict[str, torch.Tensor], str]:
    """A model, its inputs and the Auto class that loads it."""
    if name in tiny_encoder_decoders.MADE:
        batch = {key: value[:2] for key, value in tiny_encoder_decoders.batch().items()}
        return tiny_encoder_decoders.model(name), batch, "AutoModelForSeq2SeqLM"
    ids = torch.randint(3, 50, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    return tiny_families.language_model(name), {"input_ids": ids, "attention_mask": mask}, "AutoModelForCausalLM"


def cut(module: Any) -> None:
    if module.config.model_type in NARROW:
        keep_channels(module, channels_of(module, 24), range(4, 28))
    for number, place in enumerate(places_of(module)):
        kept = [] if number == GONE else range(place.size - 1 - number % 2)
        place.sublayer.keep(place.block, kept, head_size(module, place.stack.family))


@pytest.mark.parametrize("name", FAMILIES)
def test_an_uneven_model_answers_in_onnx_as_in_memory(name: str, tmp_path: Path) -> None:
    module, batch, kind = made(name)
    cut(module)
    module.config.use_cache = False
    assert shapes.record(module) is False
    module.save_pretrained(tmp_path)
    loaded = getattr(transformers, kind).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        expected = module(**batch).logits.numpy()
    if hasattr(loaded, "set_attn_implementation"):
        loaded.set_attn_implementation("eager")
    with _traced.quiet():
        config = exporter_onnx.OnnxConfig(dynamic_shapes=None)
        program = exporter_onnx.OnnxExporter().export(loaded, dict(batch), config=config).program
        session = onnxruntime.InferenceSession(onnx_ir.to_proto(program).SerializeToString())
    taken = {one.name for one in session.get_inputs()}
    (found,) = session.run(["logits"], {name: value.numpy() for name, value in batch.items() if name in taken})
    read = batch["attention_mask"].bool().numpy() if expected.shape[:2] == batch["attention_mask"].shape else ...
    np.testing.assert_allclose(found[read], expected[read], atol=2e-5 * np.abs(expected).max())


@torch.no_grad()
@pytest.mark.parametrize("name", [*tiny_families.DECODERS, *tiny_encoder_decoders.MADE])
def test_two_steps_with_a_cache_are_one_without(name: str) -> None:
    """In torch, without tracing, so that every family can be tried."""
    module, batch, _ = made(name)
    cut(module)
    both = module.config.is_encoder_decoder
    parts = parts_of(module, 1 if both else None)
    step, past = parts[DECODER].module, parts[DECODER].inputs["past"]
    assert len({tuple(keys.shape) for keys in past}) > 1
    tokens = batch["decoder_input_ids" if both else "input_ids"]
    known: dict[str, Any] = {}
    if both:
        known = {"attention_mask": batch["attention_mask"], "parents": torch.arange(len(tokens))}
        known["cross"] = list(parts[ENCODER].module(batch["input_ids"], batch["attention_mask"]).values())
        assert len(known["cross"]) == len(past)
    said, past = [], [keys.new_zeros(len(tokens), keys.shape[1], 0, keys.shape[3]) for keys in past]
    for new in tokens.split([4, tokens.shape[1] - 4], dim=1):
        more = {} if both else {"kept": torch.arange(new.shape[1])}
        outputs = step(tokens=new, past=past, **known, **more)
        said.append(outputs["logits"])
        past = [outputs[f"past_{number}"] for number in range(len(past))]
    expected = module(**(batch if both else {"input_ids": tokens})).logits
    torch.testing.assert_close(torch.cat(said, 1), expected, rtol=1e-4, atol=2e-5 * float(expected.abs().max()))
