"""A model that was cut unevenly, saved and loaded by plain transformers is traced to ONNX as any other, and answers there as it does in
memory: every architecture beside the four that graphs are written for by hand (`test_every_runtime`)."""

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
import transformers.exporters  # noqa: F401
from transformers.exporters import exporter_onnx

from multum.core import shapes
from multum.core.sublayers import places_of
from multum.core.surgery import head_size
from multum.runtimes import _traced

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
    kind = "AutoModelForCausalLM" if name in tiny_families.DECODERS else "AutoModelForMaskedLM"
    return tiny_families.language_model(name), {"input_ids": ids, "attention_mask": mask}, kind


def cut(module: Any) -> None:
    for number, place in enumerate(places_of(module)):
        kept = [] if number == GONE else range(place.size - 1 - number % 2)
        place.sublayer.keep(place.block, kept, head_size(module, place.stack.family))


@pytest.mark.parametrize("name", [*tiny_families.FAMILIES, *tiny_encoder_decoders.MADE])
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
