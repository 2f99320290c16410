"""A model that was cut unevenly, saved and loaded by plain transformers is traced to ONNX and answers there as in memory.

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
from multum.core.sublayers import places_of
from multum.core.surgery import head_size
from multum.runtimes import _traced

FAMILIES = ("qwen2", "gemma", "phi3", "opt", "bart", "mbart", "marian", "t5", "t5-gated")
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
