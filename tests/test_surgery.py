"""Surgery against models in which the same parts are zeroed, or against blocks run by hand."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch import nn

from multum.core import surgery
from multum.core.families import FAMILIES, blocks_of, family_of
from multum.errors import InputError

FAMILY_NAMES = ["bert", "distilbert", "roberta", "electra"]


@torch.no_grad()
def logits(model, seed: int = 0) -> torch.Tensor:
    batch = {key: value for key, value in next(tiny.task(seed=seed).batches(model, "validation", 16)).items() if key != "labels"}
    return model.module(**batch).logits


@torch.no_grad()
def zero_columns(module: nn.Module, path: str, kept: list[int]) -> None:
    """The slow way to remove input features: their weights in the matrix that reads them are zero."""
    weight = module.get_submodule(path).weight
    weight[:, [i for i in range(weight.shape[1]) if i not in kept]] = 0


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_removed_heads_equal_zeroed_heads(name):
    model = tiny.model(name)
    zeroed, family, size = model.copy(), family_of(model.module), surgery.head_size(model.module)
    surgery.keep_heads(blocks_of(model.module)[0], family, [0, 3], size)
    kept = [*range(size), *range(3 * size, 4 * size)]
    zero_columns(blocks_of(zeroed.module)[0], family.attention_output, kept)
    torch.testing.assert_close(logits(model), logits(zeroed), rtol=1e-5, atol=1e-6)
    assert surgery.heads_and_neurons(model.module) == [(2, 32), (4, 32)]


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_removed_neurons_equal_zeroed_neurons(name):
    model = tiny.model(name)
    zeroed, family, kept = model.copy(), family_of(model.module), [1, 5, 30]
    surgery.keep_neurons(blocks_of(model.module)[1], family, kept)
    zero_columns(blocks_of(zeroed.module)[1], family.down, kept)
    torch.testing.assert_close(logits(model), logits(zeroed), rtol=1e-5, atol=1e-6)
    assert surgery.heads_and_neurons(model.module) == [(4, 32), (4, 3)]


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_a_sublayer_without_heads_or_neurons_adds_its_bias(name):
    model = tiny.model(name)
    zeroed, family = model.copy(), family_of(model.module)
    surgery.keep_heads(blocks_of(model.module)[0], family, [], surgery.head_size(model.module))
    surgery.keep_neurons(blocks_of(model.module)[1], family, [])
    zero_columns(blocks_of(zeroed.module)[0], family.attention_output, [])
    zero_columns(blocks_of(zeroed.module)[1], family.down, [])
    torch.testing.assert_close(logits(model), logits(zeroed), rtol=1e-5, atol=1e-6)
    assert surgery.heads_and_neurons(model.module) == [(0, 32), (4, 0)]
    logits_with_gradient = model.module(
        **{k: v for k, v in next(tiny.task().batches(model, "train", 4)).items() if k != "labels"}
    ).logits
    logits_with_gradient.square().sum().backward()
    assert blocks_of(model.module)[1].get_submodule(family.down).bias.grad.abs().sum() > 0


def test_all_heads_removed_one_by_one_or_at_once_is_the_same():
    model = tiny.model()
    at_once, family, size = model.copy(), family_of(model.module), surgery.head_size(model.module)
    surgery.keep_heads(blocks_of(at_once.module)[0], family, [2], size)
    surgery.keep_heads(blocks_of(model.module)[0], family, [0, 2, 3], size)
    surgery.keep_heads(blocks_of(model.module)[0], family, [1], size)  # numbered among those left: the old head 2
    assert torch.equal(logits(model), logits(at_once))


def test_the_order_of_heads_and_neurons_does_not_matter():
    model = tiny.model()
    turned, family, size = model.copy(), family_of(model.module), surgery.head_size(model.module)
    surgery.keep_heads(blocks_of(turned.module)[0], family, [3, 1, 0, 2], size)
    surgery.keep_neurons(blocks_of(turned.module)[0], family, list(reversed(range(32))))
    first = blocks_of(model.module)[0].get_submodule(family.query).weight
    assert not torch.equal(blocks_of(turned.module)[0].get_submodule(family.query).weight, first)
    torch.testing.assert_close(logits(model), logits(turned), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_kept_blocks_are_those_of_the_model_in_order(name):
    model = tiny.model(name, layers=4)
    skipping = model.copy()
    surgery.keep_blocks(model.module, [0, 3])
    for index in (1, 2):  # the slow way: a block that returns what it is given
        blocks_of(skipping.module)[index].forward = lambda hidden, *_, **__: hidden
    assert torch.equal(logits(model), logits(skipping))
    assert model.module.config.num_hidden_layers == 2
    numbers = [{p.layer_idx for p in block.modules() if hasattr(p, "layer_idx")} for block in blocks_of(model.module)]
    assert all(found <= {index} for index, found in enumerate(numbers))


def test_rows_and_columns_by_hand():
    root = nn.ModuleDict({"a": nn.Linear(5, 4), "b": nn.Linear(5, 4, bias=False)}).double().eval()
    weight, bias, plain = root["a"].weight.clone(), root["a"].bias.clone(), root["b"].weight.clone()
    surgery.keep_rows(root, "a", [3, 0])
    surgery.keep_columns(root, "a", [4, 1, 2])
    surgery.keep_rows(root, "b", [1])
    assert torch.equal(root["a"].weight, torch.stack([weight[3, [4, 1, 2]], weight[0, [4, 1, 2]]]))
    assert torch.equal(root["a"].bias, bias[[3, 0]])
    assert torch.equal(root["b"].weight, plain[[1]])
    assert root["b"].bias is None
    assert root["a"].weight.dtype == torch.float64
    assert not root["a"].training


def test_a_layer_that_is_gone_has_no_rows_to_keep():
    root = nn.ModuleDict({"a": nn.Linear(5, 4)})
    surgery.keep_rows(root, "a", [])
    assert isinstance(root["a"], surgery.Removed)
    with pytest.raises(TypeError, match="a is no linear layer"):
        surgery.keep_rows(root, "a", [0])
    with pytest.raises(TypeError, match="a is no linear layer"):
        surgery.keep_columns(root, "a", [0])


def test_bias_only_answers_its_bias_for_every_token():
    layer = surgery.BiasOnly(3)
    nn.init.normal_(layer.bias)
    answer = layer(torch.randn(2, 5, 7))
    assert answer.shape == (2, 5, 3)
    assert torch.equal(answer, layer.bias.repeat(2, 5, 1))


def test_head_features():
    assert surgery.head_features([1, 3], 2) == [2, 3, 6, 7]
    assert surgery.head_features([], 2) == []


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_every_path_of_the_family_table_exists(name):
    model = tiny.model(name)
    family = FAMILIES[name]
    base = getattr(model.module, model.module.base_model_prefix)
    for path in (family.word_embeddings, family.position_embeddings, family.token_type_embeddings, family.embeddings_projection):
        if path and not (name == "electra" and path == family.embeddings_projection and not hasattr(base, path)):
            base.get_submodule(path)
    for path in (family.query, family.key, family.value, family.attention_output, family.up, family.down):
        assert isinstance(blocks_of(model.module)[0].get_submodule(path), nn.Linear)
    for path in (family.attention_norm, family.feed_forward_norm):
        assert isinstance(blocks_of(model.module)[0].get_submodule(path), nn.LayerNorm)
    assert isinstance(model.module.get_submodule(family.head_dense), nn.Linear)
    assert model.module.get_submodule(family.head_output).out_features == 2


def test_an_unknown_architecture_is_an_input_error():
    with pytest.raises(InputError, match="'Linear' cannot be changed in structure yet; known: bart, bert"):
        family_of(nn.Linear(2, 2))
