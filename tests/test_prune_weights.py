"""Magnitude pruning against sorting by hand."""

from __future__ import annotations

import gzip

import pytest
import tiny
import torch

from multum.core.families import blocks_of
from multum.errors import InputError
from multum.steps._sparsity import compressed_bytes
from multum.steps.prune_weights import (
    PruneWeights,
    lowest,
    lowest_of_all,
    lowest_of_groups,
    parse_pattern,
)


def block_weights(model) -> dict[str, torch.Tensor]:
    inside = {id(part) for part in blocks_of(model.module).modules()}
    return {name: linear.weight.detach() for name, linear in model.linears().items() if id(linear) in inside}


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.999, 1.0])
def test_lowest_marks_exactly_the_smallest(sparsity):
    scores = torch.rand(7, 11, generator=torch.Generator().manual_seed(0))
    mask = lowest(scores, sparsity)
    count = round(sparsity * 77)
    expected = sorted(scores.flatten().tolist())[:count]
    assert sorted(scores[mask].tolist()) == expected


def test_lowest_counts_exactly_where_all_are_equal():
    mask = lowest(torch.ones(4, 5), 0.25)
    assert mask.flatten().tolist() == [True] * 5 + [False] * 15


def test_global_scope_equals_one_long_matrix():
    generator = torch.Generator().manual_seed(0)
    scores = [torch.rand(3, 4, generator=generator), torch.rand(6, 2, generator=generator) / 4]
    masks = lowest_of_all(scores, 0.5)
    bound = sorted([*scores[0].flatten().tolist(), *scores[1].flatten().tolist()])[12]
    for mask, score in zip(masks, scores, strict=True):
        assert torch.equal(mask, score < bound)
    assert masks[1].sum() > masks[0].sum()


@pytest.mark.parametrize(("keep", "of"), [(2, 4), (1, 4), (1, 2), (3, 8)])
def test_a_pattern_keeps_the_largest_of_every_group(keep, of):
    scores = torch.rand(5, 16, generator=torch.Generator().manual_seed(0))
    mask = lowest_of_groups(scores, keep, of)
    for row in range(5):
        for start in range(0, 16, of):
            group = scores[row, start : start + of].tolist()
            highest = sorted(group, reverse=True)[:keep]
            assert [not gone for gone in mask[row, start : start + of].tolist()] == [value in highest for value in group]


def test_a_pattern_leaves_exactly_n_where_all_are_equal():
    assert lowest_of_groups(torch.zeros(2, 8), 2, 4).view(2, 2, 4).sum(-1).tolist() == [[2, 2], [2, 2]]


@pytest.mark.parametrize("pattern", ["", "2", "4:2", "0:4", "4:4", "a:b", "2:4:8", "-1:4", "2.0:4"])
def test_patterns_that_say_nothing(pattern):
    assert parse_pattern(pattern) is None
    with pytest.raises(InputError, match=r"prune_weights: pattern must be N:M"):
        PruneWeights(pattern=pattern)


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_as_many_zeros_as_asked_for_and_the_rest_untouched(scope):
    model, task = tiny.model(), tiny.task()
    pruned = PruneWeights(sparsity=0.7, scope=scope)(model, task)
    before, after = block_weights(model), block_weights(pruned)
    entries = sum(weight.numel() for weight in before.values())
    zeros = sum(int((weight == 0).sum()) for weight in after.values())
    expected = round(0.7 * entries) if scope == "global" else sum(round(0.7 * weight.numel()) for weight in before.values())
    assert zeros == expected == pruned.history[-1]["zeros"]
    for name, weight in after.items():
        assert torch.equal(weight[weight != 0], before[name][weight != 0])
    others = {k: v for k, v in pruned.module.state_dict().items() if k.removesuffix(".weight") not in after}
    assert all(torch.equal(value, model.module.state_dict()[key]) for key, value in others.items())
    assert set(pruned.history[-1]["skipped"].values()) == {"only the blocks are pruned"}


def test_layer_scope_is_the_same_share_everywhere_and_global_is_not():
    model, task = tiny.model(), tiny.task()
    with torch.no_grad():
        first = next(iter(block_weights(model)))
        model.linears()[first].weight.mul_(0.01)
    shares = {
        scope: {k: (v == 0).float().mean().item() for k, v in block_weights(PruneWeights(scope=scope)(model, task)).items()}
        for scope in ("layer", "global")
    }
    assert set(shares["layer"].values()) == {0.5}
    assert shares["global"][first] > 0.95


def test_no_sparsity_changes_nothing_and_full_sparsity_leaves_nothing():
    model, task = tiny.model(), tiny.task()
    same = PruneWeights(sparsity=0.0)(model, task)
    assert same.fingerprint() == model.fingerprint()
    assert same.history[-1]["changed"] == {}
    empty = PruneWeights(sparsity=1.0)(model, task)
    assert all((weight == 0).all() for weight in block_weights(empty).values())
    entry = empty.history[-1]
    assert entry["emptied"] == sorted(block_weights(empty))
    assert "; 12 of 12 matrices have no weight left" in entry["summary"]


def test_a_layer_of_small_weights_that_a_global_share_empties_is_named():
    model = tiny.model()
    name = next(iter(block_weights(model)))
    with torch.no_grad():
        model.linears()[name].weight.mul_(1e-6)
    entry = PruneWeights(sparsity=0.2, scope="global")(model, tiny.task()).history[-1]
    assert entry["emptied"] == [name]
    assert f"1 of 12 matrices have no weight left and give nothing but their biases: {name}" in entry["summary"]


def test_a_pattern_holds_in_the_model_and_skips_what_it_does_not_fit():
    model, task = tiny.model(neurons=30), tiny.task()
    pruned = PruneWeights(pattern="2:4")(model, task)
    skipped = pruned.history[-1]["skipped"]
    seen = set()
    for name, weight in block_weights(pruned).items():
        fits = weight.shape[1] % 4 == 0
        seen.add(fits)
        if fits:
            assert ((weight.view(weight.shape[0], -1, 4) == 0).sum(-1) == 2).all()
            assert name not in skipped
        else:
            assert torch.equal(weight, block_weights(model)[name])
            assert skipped[name] == "its 30 inputs are no multiple of 4"
    assert seen == {True, False}


def test_zeros_of_an_earlier_pruning_count():
    model, task = tiny.model(), tiny.task()
    once = PruneWeights(sparsity=0.6)(model, task)
    twice = PruneWeights(sparsity=0.6)(once, task)
    assert twice.fingerprint() == once.fingerprint()


def test_the_notes_measure_compressed_bytes_and_promise_no_speed():
    model, task = tiny.model(neurons=256), tiny.task()
    pruned = PruneWeights(sparsity=0.9)(model, task)
    before, after = pruned.history[-1]["compressed_bytes"]
    raw = b"".join(p.detach().numpy().tobytes() for p in model.module.parameters())
    assert before == pytest.approx(len(gzip.compress(raw)), rel=0.02)
    raw = b"".join(p.detach().numpy().tobytes() for p in pruned.module.parameters())
    assert after == pytest.approx(len(gzip.compress(raw)), rel=0.05)
    assert after < before
    assert "speed: unchanged" in pruned.history[-1]["summary"]


def test_compressed_bytes_of_other_types():
    assert compressed_bytes([torch.zeros(1000, dtype=torch.bfloat16)]) < 100 < compressed_bytes([torch.randn(1000).half()])


def test_every_bad_field_is_named():
    with pytest.raises(InputError) as caught:
        PruneWeights(sparsity=1.5, scope="rows", pattern="4:2")
    assert len(caught.value.problems) == 3
    assert all(problem.startswith("prune_weights: ") for problem in caught.value.problems)
    with pytest.raises(InputError, match="sparsity"):
        PruneWeights(sparsity=float("nan"))
