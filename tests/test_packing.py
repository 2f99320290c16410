"""Packing loses and changes no token and no loss; masking asks for what it says."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import tiny
import torch
from torch.nn import functional as F

from multum.core.masking import Masks, choose
from multum.core.packing import documents, pack, positions, separator_of
from multum.core.task import IGNORED
from multum.errors import InputError

TEXTS = tiny.passages(9)


def tokens(blocks: object) -> list[list[int]]:
    return [[token for token, _ in block] for block in blocks]  # type: ignore[attr-defined]


@pytest.mark.parametrize("family", tiny.LANGUAGE_MODELS)
@pytest.mark.parametrize("size", [1, 7, 32, 10_000])
def test_the_blocks_put_together_are_the_documents_put_together(family: str, size: int) -> None:
    tokenizer = tiny.language_model(family).tokenizer
    before = {"gpt2": [], "llama": [tokenizer.bos_token_id], "bert": [tokenizer.cls_token_id]}[family]
    end = tokenizer.sep_token_id if family == "bert" else tokenizer.eos_token_id
    expected = [token for text in TEXTS for token in [*before, *tokenizer(text, add_special_tokens=False)["input_ids"], end]]
    blocks = tokens(pack(documents(TEXTS, tokenizer), size))
    assert [token for block in blocks for token in block] == expected
    assert all(len(block) == size for block in blocks[:-1])
    assert 1 <= len(blocks[-1]) <= size


def test_an_empty_text_makes_no_document() -> None:
    tokenizer = tiny.language_model("gpt2").tokenizer
    assert tokens(documents(["", TEXTS[0]], tokenizer)) == tokens(documents([TEXTS[0]], tokenizer))
    assert list(pack([], 4)) == []


@torch.no_grad()
def losses(model: object, ids: list[int], **more: torch.Tensor) -> torch.Tensor:
    """Of every token but the first."""
    row = torch.tensor([ids])
    return F.cross_entropy(model.module(input_ids=row, use_cache=False, **more).logits[0, :-1], row[0, 1:], reduction="none")  # type: ignore[attr-defined]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_with_positions_of_its_own_every_document_has_the_loss_it_has_alone(family: str, attention: str) -> None:
    model = tiny.language_model(family, positions=512)
    model.module.set_attn_implementation(attention)
    made = tokens(documents(TEXTS[:4], model.tokenizer))
    (block,) = tokens(pack(documents(TEXTS[:4], model.tokenizer), 512))
    places = positions(block, separator_of(model.tokenizer))
    assert places == [place for document in made for place in range(len(document))]
    packed, start = losses(model, block, position_ids=torch.tensor([places])), 0
    for document in made:
        assert torch.allclose(packed[start : start + len(document) - 1], losses(model, document), atol=1e-5)
        start += len(document)
    # Without them the first document alone has the context that it has alone; the second sees the first.
    joined, first = losses(model, block), len(made[0]) - 1
    assert torch.allclose(joined[:first], losses(model, made[0]), atol=1e-5)
    assert not torch.allclose(joined[first + 1 : first + len(made[1])], losses(model, made[1]), atol=1e-3)


def test_words_begin_where_the_tokenizer_says() -> None:
    tokenizer = tiny.language_model("bert").tokenizer
    (document,) = documents(["unrelated zebrafilm, quicksand"], tokenizer)
    words, pieces = [], tokenizer.convert_ids_to_tokens([token for token, _ in document])
    for piece, (_, begins) in zip(pieces, document, strict=True):
        assert begins != piece.startswith("##")
        words += [piece] if begins else []
    assert len(words) == 6  # [CLS], three words, a comma, [SEP]
    assert len(pieces) > 6


def test_a_tokenizer_without_an_end_is_refused() -> None:
    tokenizer = tiny.language_model("gpt2").tokenizer
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="no EOS or SEP token"):
        separator_of(tokenizer)


def test_a_share_of_the_tokens_is_asked_for() -> None:
    rng = random.Random(0)
    for count, expected in [(1, 1), (3, 1), (100, 15), (500, 75)]:
        chosen = choose([True] * count, rng)
        assert len(chosen) == expected
        assert chosen == sorted(set(chosen))
        assert set(chosen) <= set(range(count))
    hits = Counter(place for _ in range(2000) for place in choose([True] * 20, rng))
    assert len(hits) == 20
    assert all(abs(hit / 2000 - 3 / 20) < 0.04 for hit in hits.values())


def test_whole_words_stay_whole() -> None:
    rng = random.Random(0)
    begins = [rng.random() < 0.5 for _ in range(200)]
    words, number = [], -1
    for place, begin in enumerate(begins):
        number += begin or place == 0
        words.append(number)
    for _ in range(20):
        chosen = choose(begins, rng, whole_words=True)
        assert {place for place, word in enumerate(words) if word in {words[c] for c in chosen}} == set(chosen)
        assert 15 <= len(chosen) <= 30
    assert any(words.count(words[c]) > 1 and len([x for x in choose(begins, rng) if words[x] == words[c]]) == 1 for c in chosen)


def test_80_10_10() -> None:
    tokenizer = tiny.language_model("bert").tokenizer
    masks, rng = Masks.of(tokenizer), random.Random(0)
    ids = [20 + place % 100 for place in range(6000)]
    seen, labels = masks.hide(ids, range(5000), rng)
    kinds = Counter(
        "mask" if new == masks.mask else "same" if new == old else "other" for new, old in zip(seen[:5000], ids, strict=False)
    )
    assert kinds["mask"] / 5000 == pytest.approx(0.8, abs=0.02)
    assert kinds["other"] / 5000 == pytest.approx(0.1, abs=0.02)
    assert kinds["same"] / 5000 == pytest.approx(0.1, abs=0.02)
    assert labels == [*ids[:5000], *[IGNORED] * 1000]
    assert seen[5000:] == ids[5000:]
    assert not set(seen[:5000]) - {masks.mask} & set(tokenizer.all_special_ids)
    hidden, _ = masks.hide(ids, [3, 5], None)
    assert [place for place, token in enumerate(hidden) if token == masks.mask] == [3, 5]
    tokenizer.mask_token = None
    with pytest.raises(InputError, match="no mask token"):
        Masks.of(tokenizer)
