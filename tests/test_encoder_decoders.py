"""Encoder-decoders: what is removed equals what is zeroed, what is left is saved, loaded by plain transformers, and writes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForSeq2SeqLM,
    BartConfig,
    BartForConditionalGeneration,
    MarianConfig,
    MarianMTModel,
    T5Config,
    T5ForConditionalGeneration,
)

from multum.core.families import stacks_of
from multum.core.linears import matrix
from multum.core.model import Model
from multum.core.profile import profile
from multum.core.shapes import record
from multum.core.surgery import counts_of, cross_heads, head_size, keep_blocks, keep_heads, keep_neurons
from multum.errors import InputError
from multum.steps.drop_layers import DropLayers
from multum.steps.fisher_masks import FisherMasks
from multum.steps.prune_structured import PruneStructured

TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
SIZES = {
    **{f"{stack}_{name}": value for stack in ("encoder", "decoder") for name, value in (("layers", 3), ("ffn_dim", 24))},
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "d_model": 32,
    "vocab_size": 60,
    "max_position_embeddings": 40,
}
T5_SIZES = {"d_model": 32, "d_kv": 8, "d_ff": 24, "num_layers": 3, "num_heads": 4, "vocab_size": 60}
MADE: dict[str, Any] = {
    "bart": lambda: BartForConditionalGeneration(BartConfig(**SIZES, **TOKENS, forced_eos_token_id=None)),
    "marian": lambda: MarianMTModel(MarianConfig(**SIZES, **TOKENS, forced_eos_token_id=None)),
    "t5": lambda: T5ForConditionalGeneration(T5Config(**T5_SIZES, **TOKENS, feed_forward_proj="relu")),
    "t5-gated": lambda: T5ForConditionalGeneration(T5Config(**T5_SIZES, **TOKENS, feed_forward_proj="gated-gelu")),
}
every_model = pytest.mark.parametrize("name", MADE)


def model(name: str) -> Any:
    torch.manual_seed(0)
    module = MADE[name]().eval()
    with torch.no_grad():
        for key, parameter in module.named_parameters():
            if parameter.dim() > 1 and not any(part in key for part in ("shared", "lm_head", "embed_positions")):
                parameter.mul_(4.0 if "t5" not in name else 1.5)
            elif key.endswith("bias"):
                parameter.normal_(std=0.1)
    return module


def batch() -> dict[str, torch.Tensor]:
    made = torch.Generator().manual_seed(0)
    mask = torch.ones(4, 9, dtype=torch.long)
    mask[1, 5:] = 0
    ids = torch.randint(3, 60, (4, 9), generator=made).where(mask == 1, 0)
    return {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": torch.randint(3, 60, (4, 6), generator=made)}


@torch.no_grad()
def logits(module: Any) -> torch.Tensor:
    return module(**batch()).logits


def written(module: Any, *, cached: bool = True) -> torch.Tensor:
    inputs = {key: value for key, value in batch().items() if not key.startswith("decoder")}
    return module.generate(**inputs, max_new_tokens=8, do_sample=False, num_beams=2, use_cache=cached)


def uneven(module: Any) -> Any:
    """Other heads and neurons in every block of both stacks, an attention of each kind and a feed-forward gone."""
    for stack in stacks_of(module):
        size = head_size(module, stack.family)
        for number, heads in enumerate(([0, 2], [], [1, 2, 3])):
            keep_heads(stack.blocks[number], stack.family, heads, size)
            if stack.family.cross:
                keep_heads(stack.blocks[number], stack.family.cross, [[3], [0, 1, 2], []][number], size)
        keep_neurons(stack.blocks[0], stack.family, list(range(5, 20)))
        keep_neurons(stack.blocks[1], stack.family, [])
    return module


def reloaded(module: Any, folder: Path) -> Any:
    record(module)
    module.save_pretrained(folder)
    return AutoModelForSeq2SeqLM.from_pretrained(folder)


@torch.no_grad()
@every_model
def test_what_is_removed_equals_what_is_zeroed(name: str) -> None:
    zeroed, cut = model(name), model(name)
    whole = logits(cut)
    for left, right in zip(stacks_of(zeroed), stacks_of(cut), strict=True):
        size = head_size(cut, left.family)
        for number in range(3):
            for family in filter(None, (left.family, left.family.cross)):
                gone = [number, 3]
                for head in gone:
                    output = left.blocks[number].get_submodule(family.attention_output)
                    matrix(output)[:, head * size : (head + 1) * size] = 0
                keep_heads(right.blocks[number], family, [head for head in range(4) if head not in gone], size)
            matrix(left.blocks[number].get_submodule(left.family.down))[:, :7] = 0
            keep_neurons(right.blocks[number], left.family, list(range(7, 24)))
    assert torch.allclose(logits(cut), logits(zeroed), atol=1e-5)
    assert not torch.allclose(logits(cut), whole, atol=1e-2)


@every_model
def test_an_uneven_model_is_saved_loaded_by_transformers_and_writes(name: str, tmp_path: Path) -> None:
    module = uneven(model(name))
    again = reloaded(module, tmp_path / "m")
    assert torch.equal(logits(again), logits(module))
    assert torch.equal(written(again), written(module))
    assert torch.equal(written(module, cached=False), written(module))
    assert [counts_of(again, stack) for stack in stacks_of(again)] == [[(2, 15), (0, 0), (3, 24)]] * 2
    assert cross_heads(again) == [1, 3, 0]
    assert again.get_input_embeddings().weight is again.get_output_embeddings().weight


@every_model
@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_blocks_are_dropped_and_stock_transformers_loads_the_rest(name: str, stack: str, tmp_path: Path) -> None:
    module, shorter = model(name), model(name)
    t5 = name.startswith("t5")
    if t5 and stack == "encoder":  # transformers sizes the decoder's cache by the encoder
        with pytest.raises(InputError, match="drop the decoder's first"):
            keep_blocks(shorter, [1, 2], "encoder")
        for each in (module, shorter):
            keep_blocks(each, [0, 1], "decoder")
    keep_blocks(shorter, [1, 2], stack)
    assert [len(each.blocks) for each in stacks_of(shorter)] == ([2, 2 if t5 else 3] if stack == "encoder" else [3, 2])
    again = reloaded(shorter, tmp_path / "m")
    assert not hasattr(again.config, "quantization_config")
    assert torch.equal(logits(again), logits(shorter))
    assert torch.equal(written(shorter, cached=False), written(again))

    # The same by hand: the first block adds nothing to the stream, but where the table of positions is, it stays.
    first = next(each for each in stacks_of(module) if each.name == stack)
    if not first.family.pre_norm:
        return
    with torch.no_grad():
        for path in (first.family.attention_output, first.family.down, first.family.cross and first.family.cross.attention_output):
            if path:
                part = first.blocks[0].get_submodule(path)
                matrix(part).zero_()
                if part.bias is not None:
                    part.bias.zero_()
    assert torch.allclose(logits(shorter), logits(module), atol=1e-5)


def step_on(step: Any, module: Any) -> Model:
    task: Any = SimpleNamespace(calibration=lambda *_, **__: [batch()], name="translation")
    return step(Model(module=module, tokenizer=None, source="tiny"), task)


@every_model
def test_drop_layers_shortens_the_decoder_unless_told_otherwise(name: str) -> None:
    result = step_on(DropLayers(keep=1, which="importance"), model(name))
    assert [len(stack.blocks) for stack in stacks_of(result.module)] == [3, 1]
    assert len(result.history[-1]["influence"]) == 3
    result = step_on(DropLayers(which=(0,), stack="encoder"), result.module)
    assert [len(stack.blocks) for stack in stacks_of(result.module)] == [2, 1]
    assert torch.isfinite(logits(result.module)).all()


@pytest.mark.parametrize("step", [PruneStructured(speedup=1.5), FisherMasks(speedup=1.5)])
def test_steps_for_one_stack_say_so_before_any_work(step: Any) -> None:
    with pytest.raises(InputError, match="have an encoder and a decoder"):
        step_on(step, model("bart"))


@every_model
@pytest.mark.parametrize("cut", [False, True])
def test_multiply_accumulates_are_those_that_torch_counts(name: str, cut: bool) -> None:
    module = model(name)
    for stack in stacks_of(module) if cut else ():
        for family in filter(None, (stack.family, stack.family.cross)):
            keep_heads(stack.blocks[1], family, [0, 2, 3] if family is stack.family else [1], head_size(module, family))
        keep_neurons(stack.blocks[2], stack.family, list(range(10)))
    module.set_attn_implementation("eager")
    inputs = batch()
    inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(**inputs)
    macs, texts, n, m = profile(module)["macs"], 4, 9, 6
    counted = macs["per_token"] * n + macs["per_token_squared"] * n**2 + macs["per_example"]
    counted += macs["per_target_token"] * m + macs["per_target_token_squared"] * m**2 + macs["per_token_pair"] * n * m
    assert counter.get_total_flops() == 2 * texts * counted
