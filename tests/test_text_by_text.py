"""Losses taken a few texts at a time are the losses of the whole batch, and so are their gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_layers import mask_of, passed, shape, some

from multum.steps import _text_by_text
from multum.steps._layers import LayerLosses, LayerMatcher, attended, relation_loss
from multum.steps._text_by_text import text_by_text

MASKS = {
    "padded": mask_of((5, 3, 6, 1)),
    "from the left": mask_of((5, 3, 6, 1)).flip(1),
    "a gap": mask_of((5, 3, 6, 1)) & torch.tensor([True, False, True, True, True, True]),
    "nothing in the third": mask_of((5, 3, 0, 1)),
}


def loss(ours: Any, theirs: Any, pairs: torch.Tensor) -> torch.Tensor:
    return relation_loss(ours[0], theirs[0], 2, pairs) + relation_loss(ours[1], theirs[0], 4, pairs)


@pytest.fixture(params=[1, 2, 3])
def at_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """So many texts of 6 tokens and 3 heads together."""
    monkeypatch.setattr(_text_by_text, "AT_ONCE", 0)
    monkeypatch.setattr(_text_by_text, "ROOM", request.param * 3 * 6**2 + 1)
    return int(request.param)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mask", MASKS)
def test_the_value_and_the_gradients_are_those_of_the_batch(at_once: int, mask: str, causal: bool) -> None:
    pairs, found = attended(MASKS[mask], causal=causal), []
    for way in (loss, lambda *given: text_by_text(loss, *given)):
        ours = [some(4, 2, 6, 4, seed=seed).requires_grad_() for seed in (1, 2)]
        value = way(ours, [some(4, 3, 6, 4, seed=3)], pairs)
        (3 * value).backward()
        found.append((value.detach(), *(one.grad for one in ours)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_parts_are_seen_by_the_loss_without_their_padding(at_once: int) -> None:
    sizes = []

    def noted(ours: Any, theirs: Any, pairs: torch.Tensor) -> torch.Tensor:
        sizes.append(tuple(pairs.shape))
        return loss(ours, theirs, pairs)

    states = [some(4, 2, 6, 4, seed=seed) for seed in (1, 2)]
    value = text_by_text(noted, states, [some(4, 3, 6, 4)], attended(MASKS["padded"], causal=False))
    assert not value.requires_grad
    longest = {1: [5, 3, 6, 1], 2: [5, 6], 3: [6, 1]}[at_once]
    assert [size[-1] for size in sizes] == longest
    assert all(size[-2] == size[-1] for size in sizes)


def test_what_fits_is_taken_as_it_is() -> None:
    seen = []

    def noted(ours: Any, theirs: Any, pairs: torch.Tensor) -> torch.Tensor:
        seen.append(len(pairs))
        return loss(ours, theirs, pairs)

    states = [some(4, 2, 6, 4, seed=seed) for seed in (1, 2)]
    text_by_text(noted, states, [some(4, 3, 6, 4)], attended(MASKS["padded"], causal=False))
    assert seen == [4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_are_matched_the_same_way_however_many_texts_fit(at_once: int, dtype: torch.dtype) -> None:
    found = []
    for room in (0, 10**9):
        _text_by_text.AT_ONCE = room
        matcher = LayerMatcher(LayerLosses(attention=1.0, relations=1.0, relation_heads=2), shape(2), shape(4, 16))
        ours, theirs = passed(2), passed(4, 16, seed=100)
        leaves = [
            getattr(attention, kind).to(dtype).requires_grad_()
            for attention in ours.attention.values()
            for kind in ("query", "key", "value")
        ]
        for number, attention in enumerate(ours.attention.values()):
            for place, kind in enumerate(("query", "key", "value")):
                object.__setattr__(attention, kind, leaves[3 * number + place])
        value = matcher(ours, theirs, mask_of())
        value.backward()
        found.append([value.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)])
    assert len(found[0]) == len(found[1]) > 4
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
