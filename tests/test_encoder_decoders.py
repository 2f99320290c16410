"""Encoder-decoders: what is removed equals what is zeroed, what is left is saved, loaded by plain transformers, and writes."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import translators
from tiny_encoder_decoders import MADE, ODD, SIZES, T5_SIZES, batch, model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForSeq2SeqLM, BartConfig, BartForCausalLM, T5Config, T5EncoderModel

from multum.core.blocks import walk_blocks
from multum.core.families import blocks_of, every_block, stacks_of
from multum.core.linears import is_linear, matrix
from multum.core.model import Model
from multum.core.profile import profile
from multum.core.shapes import record
from multum.core.students import make_student
from multum.core.surgery import counts_of, cross_heads, head_size, keep_blocks, keep_heads, keep_neurons
from multum.errors import InputError
from multum.steps.distill_layers import DistillLayers
from multum.steps.drop_layers import DropLayers
from multum.steps.low_rank import LowRank
from multum.steps.movement import MovementPruning
from multum.steps.prune_weights import PruneWeights
from multum.steps.slice_hidden import SliceHidden
from multum.steps.sparsegpt import Sparsegpt
from multum.steps.wanda import Wanda

every_model = pytest.mark.parametrize("name", MADE)


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
@pytest.mark.parametrize("name", [*MADE, *ODD])
def test_what_is_removed_equals_what_is_zeroed(name: str, tmp_path: Path) -> None:
    zeroed, cut = model(name), model(name)
    whole = logits(cut)
    for left, right in zip(stacks_of(zeroed), stacks_of(cut), strict=True):
        size, ((heads, neurons), *_) = head_size(cut, left.family), counts_of(cut, right)
        for number in range(3):
            for family in filter(None, (left.family, left.family.cross)):
                gone = {number % heads, heads - 1}
                for head in gone:
                    output = left.blocks[number].get_submodule(family.attention_output)
                    matrix(output)[:, head * size : (head + 1) * size] = 0
                keep_heads(right.blocks[number], family, [head for head in range(heads) if head not in gone], size)
            matrix(left.blocks[number].get_submodule(left.family.down))[:, :7] = 0
            keep_neurons(right.blocks[number], left.family, list(range(7, neurons)))
    assert torch.allclose(logits(cut), logits(zeroed), atol=1e-5)
    assert not torch.allclose(logits(cut), whole, atol=1e-2)
    again = reloaded(cut, tmp_path / "m")
    assert torch.equal(logits(again), logits(cut))
    assert again.get_input_embeddings().weight is again.get_output_embeddings().weight


@every_model
def test_an_uneven_model_is_saved_loaded_by_transformers_and_writes(name: str, tmp_path: Path) -> None:
    module = uneven(model(name))
    again = reloaded(module, tmp_path / "m")
    assert torch.equal(logits(again), logits(module))
    assert torch.equal(written(again), written(module))
    assert torch.equal(written(module, cached=False), written(module))
    asked = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "attention_mask": batch()["attention_mask"]}
    asked |= {"output_logits": True, "return_dict_in_generate": True}
    ways: list[dict[str, Any]] = [{}, {"cache_implementation": "static"}, {"use_cache": False}]
    first, *others = (module.generate(batch()["input_ids"], **asked, **way) for way in ways)
    for other in others:
        assert torch.equal(other.sequences, first.sequences)
        torch.testing.assert_close(torch.stack(other.logits), torch.stack(first.logits), rtol=1e-4, atol=5e-5)
    assert [counts_of(again, stack) for stack in stacks_of(again)] == [[(2, 15), (0, 0), (3, 24)]] * 2
    assert cross_heads(again) == [1, 3, 0]
    assert again.get_input_embeddings().weight is again.get_output_embeddings().weight


@every_model
@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_blocks_are_dropped_and_stock_transformers_loads_the_rest(name: str, stack: str, tmp_path: Path) -> None:
    module, shorter = model(name), model(name)
    t5 = "t5" in name
    if t5 and stack == "encoder":  # transformers sizes the decoder's cache by the encoder
        with pytest.raises(InputError, match="drop the decoder's first"):
            keep_blocks(shorter, [1, 2], "encoder")
        for each in (module, shorter):
            keep_blocks(each, [0, 1], "decoder")
    keep_blocks(shorter, [1, 2], stack)
    assert [len(each.blocks) for each in stacks_of(shorter)] == ([2, 2 if t5 else 3] if stack == "encoder" else [3, 2])
    again = reloaded(shorter, tmp_path / "m")
    assert not hasattr(again.config, "quantization_config")
    for each in (shorter, again) if t5 else ():  # whose stacks have configs of their own
        assert all(getattr(each, part.name).config.num_hidden_layers == len(part.blocks) for part in stacks_of(each))
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


@every_model
@pytest.mark.parametrize("stack", ["encoder", "decoder", "both"])
def test_as_many_neurons_everywhere_are_stock_where_a_config_can_say_so(name: str, stack: str, tmp_path: Path) -> None:
    module = model(name)
    for each in stacks_of(module):
        for number, block in enumerate(each.blocks if stack in (each.name, "both") else ()):
            keep_neurons(block, each.family, list(range(number, number + 16)))
    again = reloaded(module, tmp_path / "m")
    assert hasattr(again.config, "quantization_config") is ("t5" in name and stack != "both")  # T5 has one number for both
    assert torch.equal(logits(again), logits(module))
    keep_heads(again.model.encoder.layers[0] if "t5" not in name else again.encoder.block[0], stacks_of(again)[0].family, [1], 8)
    assert torch.equal(logits(reloaded(again, tmp_path / "again")), logits(again))


@every_model
def test_blocks_that_lost_heads_are_dropped_as_others_are(name: str, tmp_path: Path) -> None:
    """Heads of T5's first block, which keeps the table of all, may be gone; so may that block."""
    cut_first, dropped_first = model(name), model(name)
    _, decoder = stacks_of(cut_first)
    size = head_size(cut_first, decoder.family)
    for block, heads in ((0, []), (1, [1, 3])):
        keep_heads(decoder.blocks[block], decoder.family, heads, size)
    keep_blocks(cut_first, [1, 2], "decoder")
    keep_blocks(dropped_first, [1, 2], "decoder")
    keep_heads(stacks_of(dropped_first)[1].blocks[0], decoder.family, [1, 3], size)
    again = reloaded(cut_first, tmp_path / "m")
    for each in (dropped_first, again):
        assert torch.equal(logits(each), logits(cut_first))
        assert torch.equal(written(each), written(cut_first))


def padded() -> dict[str, torch.Tensor]:
    """Like `batch`, the decoder's inputs padded as well and as long as the encoder's, so that one mask could pass for the other."""
    mask = torch.ones(4, 9, dtype=torch.long)
    mask[0, 4:] = mask[2, 7:] = 0
    ids = torch.randint(3, 60, (4, 9), generator=torch.Generator().manual_seed(1)).where(mask == 1, 0)
    return {**batch(), "decoder_input_ids": ids, "decoder_attention_mask": mask}


@torch.no_grad()
@every_model
def test_a_walk_sees_what_the_whole_model_sees(name: str) -> None:
    module, data = uneven(model(name)), padded()
    expected: dict[nn.Module, torch.Tensor] = {}
    cross = {block.get_submodule(path) for block in stacks_of(module)[1].blocks for path in ("", *CROSS[name[:2]]) if path}

    def keep(part: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        decodes = part not in cross and any(part in set(block.modules()) for block in stacks_of(module)[1].blocks)
        expected[part] = inputs[0][data["decoder_attention_mask" if decodes else "attention_mask"].bool()]

    linears = [part for block in every_block(module) for part in block.modules() if is_linear(part)]
    handles = [part.register_forward_pre_hook(keep) for part in linears]
    module(**data)
    for handle in handles:
        handle.remove()
    seen: dict[nn.Module, torch.Tensor] = {}
    for index, block in enumerate(walk_blocks(module, [data])):
        assert (block.index, block.module) == (index, every_block(module)[index])
        parts = {path: part for path, part in block.module.named_modules() if is_linear(part)}
        sums = block.sums(list(parts), lambda x: x.T @ x)
        for path, flow in block.flows(0, list(parts)).items():
            seen[parts[path]] = flow.input
            torch.testing.assert_close(sums[path], flow.input.T @ flow.input)
    assert seen.keys() == expected.keys() == set(linears)
    for part, rows in expected.items():
        torch.testing.assert_close(seen[part], rows, rtol=1e-5, atol=1e-6)


CROSS = {
    **dict.fromkeys(("ba", "mb", "ma"), ("encoder_attn.k_proj", "encoder_attn.v_proj")),
    **dict.fromkeys(("t5", "mt"), ("layer.1.EncDecAttention.k", "layer.1.EncDecAttention.v")),
}
"""What reads the encoder, by the first letters of the model's name."""


@torch.no_grad()
@every_model
def test_a_decoder_is_fed_by_the_encoder_as_it_is_by_then(name: str) -> None:
    module, other, data = model(name), model(name), batch()
    for stack in stacks_of(other)[:1]:
        matrix(stack.blocks[1].get_submodule(stack.family.down)).mul_(0.5)
    expected = [block.run(0) for block in walk_blocks(other, [data])]
    for block, wanted in zip(walk_blocks(module, [data]), expected, strict=True):
        if block.index == 1:
            matrix(block.module.get_submodule(stacks_of(module)[0].family.down)).mul_(0.5)
        assert torch.equal(block.run(0), wanted)


def test_a_walk_needs_what_the_decoder_reads() -> None:
    alone = {key: value for key, value in batch().items() if not key.startswith("decoder")}
    with pytest.raises(InputError, match="need decoder_input_ids"):
        list(walk_blocks(model("t5"), [alone]))
    labels = torch.tensor([[5, 6, 7, -100], [8, 9, -100, -100], [3, 4, 5, 6], [7, -100, -100, -100]])
    block = list(walk_blocks(model("t5"), [{**alone, "labels": labels}]))[-1]
    assert torch.equal(block.masks[0], labels != -100)
    with pytest.raises(InputError, match="this takes models of one stack"):
        blocks_of(model("bart"))


def test_one_stack_alone_is_cut_and_reloads(tmp_path: Path) -> None:
    for kind, config, name in (
        (T5EncoderModel, T5Config(**T5_SIZES), "encoder"),
        (BartForCausalLM, BartConfig(**SIZES), "decoder"),
    ):
        module, ids = kind(config).eval(), torch.tensor([[5, 6, 7]])
        stack = stacks_of(module)[0]
        assert [each.name for each in stacks_of(module)] == [name]
        keep_heads(stack.blocks[0], stack.family, [1, 3], 8)
        keep_blocks(module, [0, 2], name)
        record(module)
        module.save_pretrained(tmp_path / name)
        again = kind.from_pretrained(tmp_path / name)
        with torch.no_grad():
            assert torch.equal(again(ids)[0], module(ids)[0])
        assert counts_of(again, stacks_of(again)[0]) == [(2, 24), (4, 24)]


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


@every_model
@pytest.mark.parametrize("step", [PruneWeights(sparsity=0.5), Wanda(sparsity=0.5), Sparsegpt(sparsity=0.5)])
def test_weights_of_both_stacks_are_pruned(name: str, step: Any) -> None:
    whole = model(name)
    result = step_on(step, whole)
    for block in every_block(result.module):
        for part in filter(is_linear, block.modules()):
            assert float((part.weight == 0).float().mean()) == pytest.approx(0.5, abs=0.05)
    assert torch.equal(result.module.lm_head.weight, whole.lm_head.weight)
    assert set(result.history[-1]["skipped"]) == {"lm_head"}


@every_model
def test_matrices_of_both_stacks_are_factored_and_reload(name: str, tmp_path: Path) -> None:
    result = step_on(LowRank(rank=6), model(name)).module
    assert not any(is_linear(block.get_submodule(stack.family.down)) for stack in stacks_of(result) for block in stack.blocks)
    again = reloaded(result, tmp_path / "m")
    assert torch.equal(logits(again), logits(result))
    assert torch.equal(written(again), written(result))


@pytest.mark.parametrize("family", ["marian", "t5"])
def test_movement_prunes_both_stacks(family: str) -> None:
    step = MovementPruning(sparsity=0.5, epochs=1, batch_size=16, precision="fp32")
    module = step(translators.translator(family), translators.translating()).module
    for part in (part for block in every_block(module) for part in block.modules() if is_linear(part)):
        assert float((part.weight == 0).float().mean()) == pytest.approx(0.5, abs=0.01)


class Untouched:
    """A task that nothing is asked for."""

    name = "translation"

    def is_trained(self, _: Model) -> bool:
        return True

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"work began: {name}")


REFUSED: list[Any] = [
    SliceHidden(),
    DistillLayers(student={"num_hidden_layers": 1}, logits=0),
    DistillLayers(teacher="none", hidden=1.0),
    *(partial(make_student, spec=spec) for spec in ({"layers": 1}, {"num_hidden_layers": 1}, {"num_attention_heads": 2})),
]


@pytest.mark.parametrize("call", REFUSED)
@pytest.mark.parametrize("name", ["bart", "t5"])
def test_what_is_for_one_stack_says_so_before_any_work(call: Any, name: str) -> None:
    model_of_two = Model(module=model(name), tokenizer=None, source="tiny")
    with pytest.raises(InputError, match=r"(have|has) an encoder and a decoder") as caught:
        call(model_of_two, task=Untouched())
    assert len(caught.value.problems) == 1


@pytest.mark.parametrize(
    ("name", "cut"), [*((name, cut) for name in MADE for cut in (False, True)), *((name, False) for name in ODD)]
)
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
