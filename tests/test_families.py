"""Every row of the table names parts that are there."""

from __future__ import annotations

from dataclasses import fields

import pytest
import tiny
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification

from multum.core.families import FAMILIES, base_of, blocks_of, family_of
from multum.errors import InputError

WRITTEN = sorted(name for name, family in FAMILIES.items() if family.word_embeddings)
"""Those whose graphs are written from their row; the others are looked at in test_every_family."""
LINEAR = ("query", "key", "value", "attention_output", "up", "down")
NORM = ("attention_norm", "feed_forward_norm", "embeddings_norm")
TABLES = ("word_embeddings", "position_embeddings", "token_type_embeddings")


def stock(model_type: str) -> nn.Module:
    small = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40, "vocab_size": 30}
    distil = {"dim": 24, "n_layers": 2, "n_heads": 3, "hidden_dim": 40, "vocab_size": 30}
    config = AutoConfig.for_model(model_type, **(distil if model_type == "distilbert" else small))
    if model_type == "electra":
        config.embedding_size = 12
    return AutoModelForSequenceClassification.from_config(config)


@pytest.mark.parametrize("model_type", WRITTEN)
def test_the_paths_of_a_row_lead_to_parts_of_the_right_kind_and_shape(model_type: str) -> None:
    module = stock(model_type)
    family, blocks = family_of(module), blocks_of(module)
    assert len(blocks) == 2
    expected = {**dict.fromkeys(LINEAR, (24, 24)), "up": (40, 24), "down": (24, 40)}
    for block in blocks:
        for name in LINEAR:
            part = block.get_submodule(getattr(family, name))
            assert isinstance(part, nn.Linear)
            assert (part.out_features, part.in_features) == expected[name]
        for name in NORM[:2]:
            assert isinstance(block.get_submodule(getattr(family, name)), nn.LayerNorm)
    base = base_of(module)
    assert isinstance(base.get_submodule(family.embeddings_norm), nn.LayerNorm)
    for name in TABLES:
        if path := getattr(family, name):
            assert isinstance(base.get_submodule(path), nn.Embedding)
    assert base.get_submodule(family.word_embeddings) is module.get_input_embeddings()
    assert isinstance(module.get_submodule(family.head_output), nn.Linear)
    if family.head_dense:
        assert isinstance(module.get_submodule(family.head_dense), nn.Linear)
    if family.embeddings_projection:
        assert isinstance(base.get_submodule(family.embeddings_projection), nn.Linear)


@pytest.mark.parametrize("model_type", WRITTEN)
def test_the_row_names_every_linear_layer_of_the_model(model_type: str) -> None:
    """A layer that no path leads to would be missed by pruning, exports and counts."""
    module = stock(model_type)
    family = family_of(module)
    named = {part for block in blocks_of(module) for part in (block.get_submodule(getattr(family, name)) for name in LINEAR)}
    named |= {module.get_submodule(path) for path in (family.head_dense, family.head_output) if path}
    if family.embeddings_projection:
        named.add(base_of(module).get_submodule(family.embeddings_projection))
    assert {part for part in module.modules() if isinstance(part, nn.Linear)} == named


def test_every_field_of_a_row_is_looked_at_here() -> None:
    from multum.core.families import Family

    looked_at = {*LINEAR, *NORM, *TABLES, "model_type", "blocks", "embeddings_projection", "head_dense", "head_output"}
    # Positions and activation show in the exported graph (test_every_runtime), the others in what surgery does (test_every_family).
    surgery = {"gate", "pre_norm", "head_matrices", "head_bias", "query_heads", "query_features", "key_heads", "tuples"}
    surgery |= {"free_heads", "neurons_field"}
    two_stacks = {"decoder", "cross", "handed_on", "heads_field", "layers_field"}  # test_encoder_decoders
    two_stacks |= {"last_norm", "head_norm"}  # test_prune_hidden_kinds, test_prune_hidden_two_stacks
    assert {field.name for field in fields(Family)} - looked_at == {"position_offset", "head_activation", *surgery, *two_stacks}


def test_an_architecture_without_a_row_is_refused_with_those_that_have_one() -> None:
    config = AutoConfig.for_model("convbert", hidden_size=24, num_hidden_layers=1, num_attention_heads=3, vocab_size=30)
    with pytest.raises(InputError, match=r"'convbert' cannot be changed.*bert, deberta-v2, distilbert"):
        family_of(AutoModelForSequenceClassification.from_config(config))
    with pytest.raises(InputError, match="'Linear'"):
        family_of(nn.Linear(2, 2))


def test_a_model_without_a_head_is_its_own_base() -> None:
    module = tiny.model().module
    assert base_of(module) is module.bert
    assert base_of(module.bert) is module.bert
