"""Fisher masks: the search against brute force, the rearrangement against its objective, the tuning against lstsq."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import tiny
import torch

from multum.core.blocks import walk_blocks
from multum.core.families import blocks_of, family_of
from multum.core.latency import LatencyTable
from multum.core.linears import matrix
from multum.core.surgery import head_size, heads_and_neurons
from multum.errors import InputError
from multum.steps import fisher_masks as fm
from multum.steps._masks import importance, rearrange, search
from multum.steps.fisher_masks import FisherMasks, search_under


def subsets(count):
    return [[i for i in range(count) if bits >> i & 1] for bits in range(2**count)]


def worth(scores, kept):
    return sum(pair[kind][keep].sum() for pair, both in zip(scores, kept, strict=True) for kind, keep in enumerate(both))


def counts(kept):
    return [(len(heads), len(neurons)) for heads, neurons in kept]


def everything(blocks, heads, neurons):
    return product(list(product(subsets(heads), subsets(neurons))), repeat=blocks)


def knee(count, free):
    """Costs flat up to `free` units, then linear; nothing costs nothing."""
    return {0: 0.0} | {n: 10.0 + max(0, n - free) for n in range(1, count + 1)}


# -- search ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_under_linear_costs_the_search_is_the_optimum(seed):
    rng = np.random.default_rng(seed)
    scores = [(rng.random(2), 0.3 * rng.random(3)) for _ in range(2)]
    table = LatencyTable.by_macs(hidden=8, head_size=4, heads=2, neurons=3, tokens=5)
    full = table.total([(2, 3)] * 2)
    for share in (0.3, 0.45, 0.6, 0.8, 1.0):
        kept = search(scores, table.total, share * full)
        assert table.total(counts(kept)) <= share * full
        possible = (list(k) for k in everything(2, 2, 3) if any(heads for heads, _ in k))
        best = max(worth(scores, k) for k in possible if table.total(counts(k)) <= share * full)
        assert worth(scores, kept) == pytest.approx(best, rel=1e-12)


def test_units_below_a_knee_join_because_they_cost_nothing_more():
    scores = [(np.array([5.0, 0.05]), np.array([3.0, 0.2, 0.1]))]
    table = LatencyTable(
        base=1.0, attention=knee(2, 1), attention_last=knee(2, 1), feed_forward=knee(3, 2), feed_forward_last=knee(3, 2)
    )
    # The budget pays for both sublayers up to their knees; the neuron worth 0.2 comes free with the one worth 3, as 0.1 does not.
    assert search(scores, table.total, 21.0) == [([0], [0, 1])]


def test_under_a_table_no_sublayer_goes_whole_while_each_can_keep_a_unit():
    """The last heads are worth little one by one and cost much: dropping them all is what the diagonal advises."""
    scores = [(np.array([5.0, 4.0]), np.array([3.0, 2.0, 1.0])), (np.array([0.1, 0.2]), np.array([3.0, 2.9, 2.8]))]
    table = LatencyTable(
        base=1.0, attention=knee(2, 1), attention_last=knee(2, 1), feed_forward=knee(3, 1), feed_forward_last=knee(3, 1)
    )
    budget = table.total([(2, 2), (1, 3)])
    lured, kept = search(scores, table.total, budget), search_under(table, scores, budget)
    assert lured[1][0] == []
    assert kept[1][0] == [1]
    assert all(units for block in kept for units in block)
    assert table.total(counts(kept)) <= budget
    # Four sublayers of 10 do not fit here; then one has to go.
    assert not all(units for block in search_under(table, scores, 32.0) for units in block)


def test_the_discount_of_the_last_attention_is_not_what_the_search_is_after():
    """Dropping the second attention would save both its own cost and that of all neurons behind it."""
    scores = [(np.array([5.0, 4.0]), np.array([1.4, 1.3, 1.2])), (np.array([1.5, 1.4]), np.array([3.0, 2.9, 2.8]))]
    dear, cheap = {0: 0.0, 3: 6.0}, {0: 0.0, 3: 0.3}
    table = LatencyTable(
        base=0.0, attention={0: 0.0, 2: 4.0}, attention_last={0: 0.0, 2: 2.0}, feed_forward=dear, feed_forward_last=cheap
    )
    budget = 0.55 * table.total([(2, 3)] * 2)
    lured, kept = search(scores, table.total, budget), search_under(table, scores, budget)
    assert len(lured[1][0]) == 0
    assert len(kept[1][0]) > 0
    assert table.total(counts(kept)) <= budget
    assert search_under(table, scores, table.total([(2, 3)] * 2)) == [([0, 1], [0, 1, 2])] * 2


def test_the_budget_holds_under_a_table_and_all_of_it_keeps_all():
    rng = np.random.default_rng(1)
    scores = [(rng.random(4), rng.random(8)) for _ in range(3)]
    table = LatencyTable(
        base=0.0, attention=knee(4, 1), attention_last=knee(4, 2), feed_forward=knee(8, 3), feed_forward_last=knee(8, 4)
    )
    full = table.total([(4, 8)] * 3)
    for share in np.linspace(0.2, 1.0, 9):
        for kept in (search(scores, table.total, share * full), search_under(table, scores, share * full)):
            assert table.total(counts(kept)) <= share * full
    assert counts(kept) == [(4, 8)] * 3


def test_no_budget_for_a_single_head_is_said():
    table = LatencyTable.by_macs(hidden=8, head_size=4, heads=2, neurons=3, tokens=5)
    with pytest.raises(InputError, match="not even one head fits"):
        search([(np.ones(2), np.ones(3))], table.total, 1.0)


def test_a_budget_below_one_head_is_refused_before_any_gradient(monkeypatch):
    monkeypatch.setattr(fm, "place_gradients", None)
    with pytest.raises(InputError, match=r"^fisher_masks: no cut of this model is 1000 times cheaper.*ask for at most \d"):
        FisherMasks(speedup=1000, samples=8)(tiny.model(), tiny.task())


# -- rearrangement ---------------------------------------------------------------------------------------------------------


def objective(g, keep):
    return (g[:, sorted(set(range(g.shape[1])) - set(keep))].sum(1) ** 2).sum()


@pytest.mark.parametrize("seed", range(8))
def test_rearranging_keeps_the_count_and_never_costs_more(seed):
    g = np.random.default_rng(seed).normal(size=(6, 7))
    keep = np.argsort((g**2).sum(0))[3:].tolist()
    found = rearrange(g, keep)
    assert len(found) == len(set(found)) == len(keep)
    assert objective(g, found) <= objective(g, keep) + 1e-12


def test_units_that_cancel_are_pruned_together():
    """0 is the least by itself, but 1 and 2 undo each other."""
    g = np.array([[1.0, 3.0, -3.0, 9.0], [1.0, 3.0, -3.0, 8.0]])
    assert rearrange(g, [2, 3]) == [0, 3]
    assert rearrange(g, []) == []
    assert rearrange(g, [0, 1, 2, 3]) == [0, 1, 2, 3]


# -- tuning ----------------------------------------------------------------------------------------------------------------


def test_scales_solve_the_damped_least_squares():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(50, 6)), rng.normal(size=50)
    normal, right = a.T @ a, a.T @ (b - a.sum(1))
    stacked = torch.from_numpy(np.concatenate([normal, np.eye(6)]))
    wanted = torch.linalg.lstsq(stacked, torch.from_numpy(np.concatenate([right, np.zeros(6)]))).solution
    assert fm.scales(normal, right) == pytest.approx(1 + wanted.numpy(), rel=1e-4)
    assert np.array_equal(fm.scales(normal, np.zeros(6)), np.ones(6))


@pytest.mark.parametrize(
    ("path", "norm", "width", "last"),
    [
        ("attention_output", "attention_norm", 8, False),
        ("down", "feed_forward_norm", 1, False),
        ("down", "feed_forward_norm", 1, True),
    ],
)
@torch.no_grad()
def test_the_normal_equations_are_those_of_the_units_outputs(path, norm, width, last):
    """A, B written out: a column a unit, a row a token and output feature."""
    whole, task = tiny.model(), tiny.task()
    small, _ = fm.cut(whole, [([0, 2, 3], list(range(0, 32, 4)))] * 2)
    family, batches = family_of(whole.module), task.calibration(whole, 20)
    path, norm = getattr(family, path), getattr(family, norm)
    ours, theirs = list(walk_blocks(small.module, batches))[1], list(walk_blocks(whole.module, batches))[1]
    linear = ours.module.get_submodule(path)
    units, rows, lacks = linear.in_features // width, [], []
    for batch in range(len(batches)):
        flows = ours.flows(batch, (path, norm))
        parts = torch.stack(
            [
                flows[path].input[:, u * width : (u + 1) * width] @ linear.weight[:, u * width : (u + 1) * width].T
                for u in range(units)
            ]
        )
        lack = theirs.flows(batch, (norm,))[norm].input - flows[norm].input
        if last:
            lengths = batches[batch]["attention_mask"].sum(1)
            first = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)[:-1]])
            parts, lack = parts[:, first], lack[first]
        rows.append(parts.flatten(1).T.double())
        lacks.append(lack.flatten().double())
    a, b = torch.cat(rows), torch.cat(lacks)  # b is B - A 1: what the sum of all units still lacks
    normal, right = fm.normal_equations(linear, ours, theirs, path, (norm, "input"), width, first=last)
    assert torch.allclose(torch.from_numpy(normal), a.T @ a, rtol=1e-3, atol=1e-3)
    assert torch.allclose(torch.from_numpy(right), a.T @ b, rtol=1e-3, atol=1e-3)
    undamped = torch.linalg.lstsq(a, b).solution
    assert torch.allclose(torch.linalg.lstsq(torch.from_numpy(normal), torch.from_numpy(right)).solution, undamped, atol=1e-2)


@torch.no_grad()
def test_tuning_undoes_scales_that_were_put_in():
    """Units of a copy are made smaller; scales that make the copy answer like the model exist, and are found."""
    whole, task = tiny.model(), tiny.task()
    changed, family = whole.copy(), family_of(whole.module)
    blocks_of(changed.module)[0].get_submodule(family.down).weight *= torch.linspace(0.5, 0.9, 32)
    attention = blocks_of(changed.module)[1].get_submodule(family.attention_output)
    attention.weight *= 0.7
    batches = task.calibration(whole, 64)

    def distance():
        return max(float((changed.module(**b).logits - whole.module(**b).logits).abs().max()) for b in batches)

    before = distance()
    assert fm.tune(changed.module, [0, 1], whole.module, [0, 1], batches) == 3  # all but the first block's heads
    assert distance() < 0.05 * before
    wanted = blocks_of(whole.module)[1].get_submodule(family.attention_output).weight
    assert torch.allclose(attention.weight, wanted, atol=0.02 * float(wanted.abs().max()))


# -- the step --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("pooling", "firsts"), [("cls", 1), ("mean", 0)])
def test_the_last_feed_forward_is_tuned_for_the_tokens_that_are_read(pooling, firsts, monkeypatch):
    model, seen, real = tiny.model("modernbert"), [], fm.normal_equations
    model.module.config.classifier_pooling = pooling
    monkeypatch.setattr(fm, "normal_equations", lambda *args, first: seen.append(first) or real(*args, first=first))
    FisherMasks(speedup=1.2, samples=16, batch_size=8)(model, tiny.task())
    assert sum(seen) == firsts
    assert not any(seen[:-1])


def test_what_is_left_is_what_the_search_kept_and_the_budget_holds():
    model, task = tiny.model(layers=3), tiny.task()
    step = FisherMasks(speedup=1.6, samples=48, batch_size=8, rearrange=False, tune=False)
    result = step(model, task)
    entry = result.history[-1]
    before, after = entry["predicted"]
    assert entry["unit"] == "MACs"
    assert after <= before / 1.6
    gradients = step._gradients(model, task)
    table = step._table(model.module, task.calibration(model, 48))
    assert table.total(heads_and_neurons(result.module)) == after
    # the next neuron or head would be one too many
    for kind in (0, 1):
        more = [list(pair) for pair in heads_and_neurons(result.module)]
        more[0][kind] += 1
        assert table.total(more) > before / 1.6
    kept = search(importance(gradients), table.total, before / 1.6)
    family, size = family_of(model.module), head_size(model.module)
    for number, (mine, (heads, neurons)) in enumerate(zip(blocks_of(result.module), [k for k in kept if any(k)], strict=True)):
        block = blocks_of(model.module)[entry["kept_blocks"][number]]
        if neurons:
            assert torch.equal(mine.get_submodule(family.down).weight, block.get_submodule(family.down).weight[:, neurons])
        if heads:
            columns = [h * size + i for h in heads for i in range(size)]
            old = block.get_submodule(family.attention_output).weight
            assert torch.equal(mine.get_submodule(family.attention_output).weight, old[:, columns])


def test_a_speedup_of_one_changes_nothing():
    model, task = tiny.model(), tiny.task()
    assert FisherMasks(speedup=1.0, samples=16)(model, task).fingerprint() == model.fingerprint()


def test_a_measured_table_is_used(tmp_path):
    model, task = tiny.model(), tiny.task()
    table = LatencyTable(
        base=1.0, attention=knee(4, 2), attention_last=knee(4, 2), feed_forward=knee(32, 8), feed_forward_last=knee(32, 8)
    )
    table.save(tmp_path / "latency.json")
    result = FisherMasks(speedup=1.5, samples=32, latency_table=str(tmp_path / "latency.json"))(model, task)
    entry = result.history[-1]
    assert entry["unit"] == "ms"
    assert table.total(heads_and_neurons(result.module)) == entry["predicted"][1] <= table.total([(4, 32)] * 2) / 1.5


def test_a_budget_of_time_is_not_taken_for_one_of_parts(tmp_path):
    costs = [{n: 0.0 if n == 0 else 1.0 + n / each for n in range(full + 1)} for full, each in ((4, 1), (32, 8))]
    table = LatencyTable(base=1.0, attention=costs[0], attention_last=costs[0], feed_forward=costs[1], feed_forward_last=costs[1])
    parts = table.parts([(4, 32)] * 2)
    replace(table, deep={1.0: 1.0, parts / 2: parts / 2, parts: 2 * parts}).save(tmp_path / "latency.json")
    for speedup in (1.5, 3.0):
        step = FisherMasks(speedup=speedup, samples=32, tune=False, latency_table=str(tmp_path / "latency.json"))
        before, after = step(tiny.model(), tiny.task()).history[-1]["predicted"]
        assert before == pytest.approx(2 * parts)
        assert 0.8 * before / speedup <= after <= before / speedup * (1 + 1e-9)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@torch.no_grad()
def test_where_norms_stand_first_the_residual_is_read_behind_the_sublayer(family):
    whole = tiny.language_model(family)
    changed, row = whole.copy(), family_of(whole.module)
    for block, path in ((0, row.down), (1, row.attention_output), (1, row.down)):
        matrix(blocks_of(changed.module)[block].get_submodule(path)).mul_(0.7)
    ids = torch.arange(5, 245).reshape(8, 30)
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]

    def distance():
        return float((changed.module(ids).logits - whole.module(ids).logits).abs().max())

    before = distance()
    assert fm.tune(changed.module, [0, 1], whole.module, [0, 1], batches) == 3
    assert distance() < 0.1 * before
