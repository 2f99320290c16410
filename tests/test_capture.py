"""What is captured against hooks on the linear layers; models untouched; nothing silently empty."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import pytest
import tiny
import tiny_families
import torch
from torch import nn
from transformers import BartConfig, BartModel, LlamaConfig, LlamaForCausalLM, MPNetConfig, MPNetModel

from multum.core.capture import Captured, Shape, capture, shape_of
from multum.core.families import blocks_of, family_of
from multum.errors import MultumError

SIZE = 8


def batch(vocabulary: int = 50, texts: int = 3, tokens: int = 7) -> dict[str, torch.Tensor]:
    ids = torch.randint(5, vocabulary, (texts, tokens), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=2,
        intermediate_size=32,
        vocab_size=50,
        pad_token_id=0,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


def hooked(module: nn.Module, inputs: dict[str, torch.Tensor]) -> tuple[Any, Captured, list[dict[str, torch.Tensor]]]:
    """Outputs, what was captured, and per block the outputs of its query, key and value layers, in one pass."""
    family, seen = family_of(module), []
    for block in blocks_of(module):
        own: dict[str, torch.Tensor] = {}
        seen.append(own)
        for name in ("query", "key", "value"):

            def keep(_: nn.Module, __: Any, output: torch.Tensor, own: dict[str, torch.Tensor] = own, name: str = name) -> None:
                own[name] = output

            block.get_submodule(getattr(family, name)).register_forward_hook(keep)
    with capture(module) as captured:
        outputs = module(**inputs)
    return outputs, captured, seen


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_it_is_what_the_linear_layers_gave(family: str, implementation: str) -> None:
    module = tiny.model(family, layers=3).module
    module.set_attn_implementation(implementation)
    _, captured, seen = hooked(module, batch())
    assert sorted(captured.attention) == [1, 2, 3]
    for layer, own in enumerate(seen, start=1):
        for name, flat in own.items():
            heads = getattr(captured.attention[layer], name)
            assert heads.shape == (3, 4, 7, SIZE)
            assert torch.equal(heads.transpose(1, 2).reshape(flat.shape), flat)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_hidden_states_are_the_embeddings_and_what_every_block_writes(family: str) -> None:
    module = tiny.model(family, layers=3).module
    read: list[torch.Tensor] = []
    written: list[torch.Tensor] = []
    for block in blocks_of(module):
        block.register_forward_pre_hook(lambda _, args: read.append(args[0]))
        block.register_forward_hook(lambda _, __, output: written.append(output[0] if isinstance(output, tuple) else output))
    with capture(module) as captured:
        module(**batch())
    assert sorted(captured.hidden) == [0, 1, 2, 3]
    assert torch.equal(captured.hidden[0], read[0])
    for layer in (1, 2, 3):
        assert torch.equal(captured.hidden[layer], written[layer - 1])


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_the_model_answers_as_ever_and_is_as_it_was_afterwards(implementation: str) -> None:
    for module in (tiny.model().module, llama()):
        module.set_attn_implementation(implementation)
        with torch.no_grad():
            before = module(**batch()).logits
            with capture(module):
                inside = module(**batch()).logits
            after = module(**batch())
        assert torch.equal(before, inside)
        assert torch.equal(before, after.logits)
        assert after.hidden_states is None
        assert module.config._attn_implementation == implementation
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_scores_are_those_of_the_softmax() -> None:
    module = tiny.model().module
    module.set_attn_implementation("eager")
    inputs = {**batch(), "attention_mask": torch.ones(3, 7, dtype=torch.long)}
    with torch.no_grad(), capture(module) as captured:
        outputs = module(**inputs, output_attentions=True)
    for layer, weights in enumerate(outputs.attentions, start=1):
        assert torch.allclose(captured.attention[layer].scores().softmax(-1), weights, atol=1e-6)


def test_shared_key_heads_serve_several_queries() -> None:
    module = llama()
    with torch.no_grad(), capture(module) as captured:
        module(**batch())
    part = captured.attention[2]
    assert part.causal
    assert part.key.shape[1] == 2
    scores = part.scores()
    for head in range(4):
        expected = part.query[:, head] @ part.key[:, head // 2].transpose(-1, -2) / math.sqrt(SIZE)
        assert torch.allclose(scores[:, head], expected, atol=1e-6)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", [*tiny.FAMILIES, "modernbert", *tiny_families.DECODERS])
def test_probabilities_are_those_of_eager_attention(family: str, implementation: str) -> None:
    """With padding, causal, behind windows; of heads that share keys."""
    module, inputs = tiny.model(family, layers=3).module, batch()
    module.set_attn_implementation(implementation)
    with torch.no_grad(), capture(module) as captured:
        module(**inputs)
    module.set_attn_implementation("eager")
    with torch.no_grad():
        theirs = module(**inputs, output_attentions=True).attentions
    real = inputs["attention_mask"].bool()
    for layer, expected in enumerate(theirs, start=1):
        ours = captured.attention[layer].probabilities()
        assert torch.allclose(ours.transpose(1, 2)[real], expected.transpose(1, 2)[real].float(), atol=1e-5)


def test_gradients_flow_through_what_was_captured() -> None:
    module = tiny.model().module
    with capture(module) as captured:
        module(**batch())
    captured.attention[1].query.square().sum().backward()
    family, blocks = family_of(module), blocks_of(module)
    assert blocks[0].get_submodule(family.query).weight.grad.abs().sum() > 0
    assert blocks[0].get_submodule(family.key).weight.grad is None
    assert blocks[1].get_submodule(family.query).weight.grad is None


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_come_through_checkpointing_or_it_is_an_error(reentrant: bool) -> None:
    module, grads = tiny.model(layers=2).module.train(), []
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    for checkpointing in (False, True):
        if checkpointing:
            kind = "activation" if hasattr(module, "activation_checkpointing_enable") else "gradient"
            getattr(module, f"{kind}_checkpointing_enable")(**{f"{kind}_checkpointing_kwargs": {"use_reentrant": reentrant}})
        with pytest.raises(MultumError, match="use_reentrant") if reentrant and checkpointing else nullcontext():
            with capture(module) as captured:
                module(**batch())
            module.zero_grad()
            captured.attention[2].query.sum().backward()
            grads.append([p.grad.clone() for p in module.parameters() if p.grad is not None])
    assert all(torch.equal(one, other) for one, other in zip(grads[0], grads[-1], strict=True))
    with capture(module, attention=False) as captured:  # these are what a block returns
        module(**batch())
    captured.hidden[1].sum().backward()
    with torch.no_grad(), capture(module.eval()) as captured:
        module(**batch())
    assert not captured.attention[2].query.requires_grad


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_pruned_model_has_what_is_left(family: str) -> None:
    module = tiny.uneven(tiny.model(family, layers=3)).module
    assert shape_of(module) == Shape(widths=(32,) * 4, heads={1: (2, 2, SIZE), 3: (3, 3, SIZE)})
    with capture(module) as captured:
        module(**batch())
    assert sorted(captured.hidden) == [0, 1, 2, 3]


@pytest.mark.parametrize("family", [*tiny.FAMILIES, *tiny_families.FAMILIES])
def test_a_model_is_causal_if_its_first_token_sees_only_itself(family: str) -> None:
    module, seen = tiny.model(family, layers=2).module, []
    for last in (5, 6):
        with capture(module, attention=False) as captured, torch.no_grad():
            module(input_ids=torch.tensor([[5, 7, last]]), attention_mask=torch.ones(1, 3, dtype=torch.long))
        seen.append(captured.hidden[2][0, 0])
    assert shape_of(module, attention=False).causal == torch.equal(*seen)


def test_the_shape_is_found_without_touching_the_model() -> None:
    module = llama().train()
    assert shape_of(module) == Shape(widths=(32, 32, 32), heads={1: (4, 2, SIZE), 2: (4, 2, SIZE)}, causal=True)
    assert shape_of(module).layers == 2
    assert module.training


def test_two_models_at_once() -> None:
    ours, theirs = tiny.model(layers=1).module, tiny.model(layers=2, heads=2).module
    with capture(ours) as a, capture(theirs) as b:
        ours(**batch())
        theirs(**batch())
    assert (sorted(a.attention), sorted(b.attention)) == ([1], [1, 2])
    assert b.attention[1].query.shape[1] == 2


def test_hidden_states_alone_leave_the_attention_alone() -> None:
    module = tiny.model().module
    with capture(module, attention=False) as captured:
        assert module.config._attn_implementation == "sdpa"
        module(**batch())
    assert sorted(captured.hidden) == [0, 1, 2]
    assert captured.attention == {}


class Wrapped(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, **inputs: Any) -> Any:
        return self.module(**inputs)


def test_a_wrapped_model_is_captured_all_the_same() -> None:
    wrapped = Wrapped(tiny.model().module)
    with capture(wrapped) as captured:
        wrapped(**batch())
    assert sorted(captured.attention) == [1, 2]


def test_what_cannot_be_captured_is_an_error_and_leaves_no_trace() -> None:
    with pytest.raises(MultumError, match="not called"), capture(tiny.model().module):
        pass
    closed = MPNetModel(
        MPNetConfig(hidden_size=32, num_attention_heads=4, num_hidden_layers=2, intermediate_size=32, vocab_size=50)
    )
    with pytest.raises(MultumError, match="2 layers, but 0 attentions were captured"):
        shape_of(closed)
    assert shape_of(closed, attention=False).widths == (32, 32, 32)
    assert not closed._forward_hooks
    bart = BartModel(
        BartConfig(d_model=32, vocab_size=50, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=32, decoder_ffn_dim=32)
    )
    with pytest.raises(MultumError, match="two stacks"), capture(bart):
        pass
    with pytest.raises(MultumError, match="Linear is none"), capture(nn.Linear(2, 2)):
        pass
    module = tiny.model().module
    module.config._attn_implementation_internal = "flex_attention"
    with pytest.raises(MultumError, match="not under flex_attention"), capture(module):
        pass
