"""The search without torch: the same tokens as transformers' `generate`, whatever the settings; refused settings."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import translators

from multum.core.generation import settle
from multum.core.model import Model
from multum.errors import InputError
from multum.runtimes._search import Search, search, search_of

SETTINGS: list[dict[str, Any]] = [
    {},
    {"num_beams": 3},
    {"num_beams": 4, "length_penalty": 0.0},
    {"num_beams": 3, "length_penalty": 3.0, "early_stopping": True},
    {"num_beams": 3, "length_penalty": 0.5, "early_stopping": "never"},
    {"num_beams": 2, "min_length": 5, "no_repeat_ngram_size": 2},
    {"num_beams": 2, "forced_bos_token_id": 5, "forced_eos_token_id": 1, "bad_words_ids": [[0], [7]]},
    {"min_new_tokens": 6, "repetition_penalty": 1.7, "no_repeat_ngram_size": 3},
    {"forced_bos_token_id": 5, "forced_eos_token_id": [1, 2], "eos_token_id": [1, 2, 9], "bad_words_ids": [[1], [8]]},
    {"num_beams": 3, "eos_token_id": [1, 4, 9], "repetition_penalty": 1.3},
    {"num_beams": 3, "bad_words_ids": [[4], [7], [11], [12]], "renormalize_logits": True},
    {"num_beams": 5, "max_new_tokens": 1},
    {"do_sample": True, "temperature": 0.7, "top_k": 5, "typical_p": 0.9},
]


@pytest.fixture(scope="module")
def model() -> Model:
    """One that ends its texts at different places: what it foretells is not what it reads."""
    made = translators.translator("t5", spread=3.0)
    torch.manual_seed(0)
    made.module.lm_head.weight = torch.nn.Parameter(0.3 * torch.randn(made.module.lm_head.weight.shape))
    return made


def reading(module: Any, batch: dict[str, torch.Tensor], beams: int) -> Any:
    """The slow reference of a decoder with a cache: everything is read again."""
    encoder = module.get_encoder()(**batch).last_hidden_state.repeat_interleave(beams, 0)
    mask, seen = batch["attention_mask"].repeat_interleave(beams, 0), np.empty((len(encoder), 0), dtype=np.int64)

    def read(tokens: np.ndarray, parents: np.ndarray) -> np.ndarray:
        nonlocal seen
        seen = np.concatenate([seen[parents], tokens], 1)
        ids = torch.from_numpy(seen)
        with torch.no_grad():
            logits = module(encoder_outputs=(encoder,), attention_mask=mask, decoder_input_ids=ids, use_cache=False).logits
        found: np.ndarray = logits[:, -1].numpy()
        return found

    return read


@pytest.mark.parametrize("settings", SETTINGS, ids=[" ".join(map(str, one)) or "greedy" for one in SETTINGS])
def test_the_tokens_are_those_of_generate(model: Model, settings: dict[str, Any]) -> None:
    module = model.copy().module
    config = module.generation_config
    config.max_new_tokens, config.max_length = 14, None
    for name, value in settings.items():
        setattr(config, name, value)
    settle(module)
    sources = [source for source, _ in translators.sentences(12)]
    encoded = model.tokenizer(sources, padding=True, return_tensors="pt")
    batch = {name: encoded[name] for name in ("input_ids", "attention_mask")}
    how = search_of(module)
    with torch.no_grad():
        expected = module.generate(**batch, use_cache=True)[:, 1:].tolist()
    found = search(reading(module, batch, how.beams), len(sources), how)
    lengths = set()
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == theirs[: len(ours)]
        assert all(token in (config.pad_token_id, *how.ends) for token in theirs[len(ours) :])
        lengths.add(len(ours))
    assert config.max_new_tokens == 1 or len(lengths) > 1  # texts end at different places


def test_texts_of_exactly_so_many_tokens(model: Model) -> None:
    batch = dict(model.tokenizer(["film and tree"], return_tensors="pt"))
    for beams in (1, 3):
        how = Search(start=0, ends=(1,), most=20, beams=beams).of(7)
        assert [len(ids) for ids in search(reading(model.module, batch, beams), 1, how)] == [7]


def test_settings_that_only_torch_knows_are_named(model: Model) -> None:
    module = model.copy().module
    module.generation_config.suppress_tokens = [4]
    module.generation_config.bad_words_ids = [[3, 4]]
    with pytest.raises(InputError, match=r"suppress_tokens, bad_words_ids of several tokens, which only torch knows"):
        search_of(module)


def test_a_search_that_transformers_has_not_is_refused(model: Model) -> None:
    module = model.copy().module
    module.generation_config.num_beams, module.generation_config.num_beam_groups = 4, 2
    with pytest.raises(InputError, match=r"group beam search.*take them out of its generation_config\.json"):
        settle(module)
