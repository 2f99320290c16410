"""The choice against brute force, the cut against zeroed columns, the repair against plain regression."""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification

from multum.core.blocks import Block, walk_blocks
from multum.core.families import base_of, blocks_of, family_of
from multum.core.latency import Blocks, LatencyTable
from multum.core.linears import matrix
from multum.core.model import Model
from multum.core.second_order import adapted, removal_order
from multum.core.surgery import head_features, head_size, head_width, heads_and_neurons, keep_blocks
from multum.core.task import Batch
from multum.errors import InputError
from multum.steps import prune_structured
from multum.steps._price import kl
from multum.steps._repair import _repair_sublayer
from multum.steps._units import gone_whole
from multum.steps.prune_structured import PruneStructured, Sublayer, choose, cut, price_sublayers, repair

pytestmark = pytest.mark.usefixtures("one_thread")
FAMILIES = pytest.mark.parametrize("name", [*tiny.FAMILIES, "llama", "gpt2", "mpnet"])
Sublayers = list[tuple[dict[int, float], dict[int, float]]]


@pytest.fixture(scope="module")
def tuned() -> Model:
    """A model that has learnt its task."""
    model, task = tiny.model(layers=3), tiny.task()
    optimizer = torch.optim.Adam(model.module.parameters(), lr=2e-3)
    for _ in range(15):
        for batch in task.batches(model, "train", 32):
            optimizer.zero_grad()
            task.loss(model.module(**batch), batch).backward()
            optimizer.step()
    optimizer.zero_grad()
    right = [(model.module(**batch).logits.argmax(1) == batch["labels"]).float() for batch in task.batches(model, "train", 32)]
    assert torch.cat(right).mean() > 0.9
    return model


@torch.no_grad()
def logits(module: Any, batches: Sequence[Batch]) -> torch.Tensor:
    return torch.cat([module(**{key: value for key, value in batch.items() if key != "labels"}).logits for batch in batches])


@torch.no_grad()
def seen_by(module: nn.Module, path: str, batches: Sequence[Batch]) -> torch.Tensor:
    """What flows into one part (named from the base model) in plain forward passes, padding left out."""
    seen: list[torch.Tensor] = []
    handle = base_of(module).get_submodule(path).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    logits(module, batches)
    handle.remove()
    return torch.cat([x[batch["attention_mask"].bool()] for x, batch in zip(seen, batches, strict=True)])


def fake(hidden: int = 1) -> LatencyTable:
    """A table such as a machine gives: steps, fixed costs, a cheap last block."""

    def cost(blocks: Blocks) -> float:
        last = max((i for i, (heads, _) in enumerate(blocks) if heads), default=-1)
        whole = [0.2 * (i <= last) + (1 + heads) * (heads > 0) + (0.5 + n / 8) * (n > 0) for i, (heads, n) in enumerate(blocks)]
        return 2.0 + sum(one * (1.0 if i < last else 0.3) for i, one in enumerate(whole)) * hidden

    return LatencyTable.measure(lambda blocks: lambda: cost(blocks), heads=4, neurons=32, rounds=1)


# --- choice


def instance(seed: int, *, whole_numbers: bool) -> tuple[Sublayers, LatencyTable, float]:
    """Random prices and costs; with whole numbers every cost is a whole number of bins."""
    rng = random.Random(seed)
    blocks = rng.choice((2, 3))
    heads, neurons = (0, 1, 2), (0, 4, 8)
    sublayers = [
        tuple({c: rng.random() * (c < counts[-1]) for c in counts[::-1]} for counts in (heads, neurons)) for _ in range(blocks)
    ]

    def costs(counts: Sequence[int], most: int) -> dict[int, float]:
        drawn = sorted(float(rng.randint(1, most)) if whole_numbers else rng.uniform(1, most) for _ in counts)
        return dict(zip(counts, drawn, strict=True))

    table = LatencyTable(
        base=3.0,
        attention=costs(heads, 12),
        attention_last=costs(heads, 5),
        feed_forward=costs(neurons, 12),
        feed_forward_last=costs(neurons, 5),
    )
    return sublayers, table, table.base + rng.choice((10, 16, 20, 25, 40))


def price(sublayers: Sublayers, blocks: Blocks) -> float:
    return sum(heads[h] + neurons[n] for (heads, neurons), (h, n) in zip(sublayers, blocks, strict=True))


def brute_force(sublayers: Sublayers, table: LatencyTable, budget: float) -> list[tuple[int, int]]:
    """Every combination that has a head left and fits, the cheapest of them."""
    every = product(*(product(heads, neurons) for heads, neurons in sublayers))
    fit = [blocks for blocks in every if any(h for h, _ in blocks) and table.total(blocks) <= budget]
    return list(min(fit, key=lambda blocks: price(sublayers, blocks)))


@pytest.mark.parametrize("seed", range(40))
def test_the_choice_is_the_best_there_is(seed: int) -> None:
    sublayers, table, budget = instance(seed, whole_numbers=True)
    chosen = choose(sublayers, table, budget)
    assert price(sublayers, chosen) == pytest.approx(price(sublayers, brute_force(sublayers, table, budget)))
    assert table.total(chosen) <= budget + 1e-9


@pytest.mark.parametrize("seed", range(40))
def test_the_budget_holds_and_rounding_loses_little(seed: int) -> None:
    sublayers, table, budget = instance(seed, whole_numbers=False)
    chosen = choose(sublayers, table, budget)
    assert table.total(chosen) <= budget + 1e-6
    # Each block is rounded up by less than a bin.
    tighter = table.base + (budget - table.base) * (1 - len(sublayers) / prune_structured.BINS)
    best = price(sublayers, brute_force(sublayers, table, budget))
    assert best - 1e-9 <= price(sublayers, chosen) <= price(sublayers, brute_force(sublayers, table, tighter)) + 1e-9


def test_a_little_over_the_budget_is_over() -> None:
    half = {0: 0.0, 1: 0.5 + 0.2 / prune_structured.BINS}
    table = LatencyTable(
        base=0.0, attention=half, attention_last=half, feed_forward={0: 0.0, 1: 0.0}, feed_forward_last={0: 0.0, 1: 0.0}
    )
    assert choose([({1: 0.0, 0: 2.0}, {0: 0.0}), ({1: 0.0, 0: 1.0}, {0: 0.0})], table, 1.0) == [(1, 0), (0, 0)]


def test_the_instances_end_in_different_blocks() -> None:
    ends = set()
    for seed in range(40):
        sublayers, table, budget = instance(seed, whole_numbers=True)
        chosen = choose(sublayers, table, budget)
        ends.add(len(chosen) - max(i for i, (heads, _) in enumerate(chosen) if heads))
    assert {1, 2} <= ends


def test_a_cheap_last_block_decides_who_attends() -> None:
    # Heads are dear unless they are the last ones: whichever block is alone in having some has them cheaply.
    free = {0: 0.0}
    table = LatencyTable(
        base=0.0,
        attention={0: 0.0, 1: 10.0},
        attention_last={0: 0.0, 1: 1.0},
        feed_forward={0: 0.0, 1: 0.0},
        feed_forward_last={0: 0.0, 1: 0.0},
    )
    heads = [{1: 0.0, 0: 5.0}, {1: 0.0, 0: 1.0}]
    assert choose([(h, free) for h in heads], table, 2.0) == [(1, 0), (0, 0)]
    assert choose([(h, free) for h in heads], table, 11.1) == [(1, 0), (1, 0)]


def test_with_room_for_all_nothing_goes() -> None:
    sublayers, table, _ = instance(0, whole_numbers=True)
    assert choose(sublayers, table, 1000.0) == [(2, 8)] * len(sublayers)


def test_too_small_a_budget_is_refused() -> None:
    sublayers, table, _ = instance(0, whole_numbers=True)
    for budget in (0.0, table.base, table.base + 0.1):
        with pytest.raises(InputError, match="no cut of this model"):
            choose(sublayers, table, budget)


# --- price


@torch.no_grad()
def test_prices_are_measured_on_the_cut_sublayer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prune_structured, "autocast", lambda _: nullcontext())
    model = tiny.model()
    module, family, size = model.module, family_of(model.module), head_size(model.module)
    batches = tiny.task().calibration(model, 24)
    whole = logits(module, batches)
    for number, pair in enumerate(price_sublayers(module, batches, 4)):
        for sublayer, path, width, group in zip(pair, (family.attention_output, family.down), (size, 1), (1, 4), strict=True):
            name = f"{family.blocks}.{number}.{path}"
            linear = base_of(module).get_submodule(name)
            x, weight = seen_by(module, name, batches), linear.weight.clone()
            gram = (x.T @ x).double()
            assert sublayer.order == removal_order(weight, gram, width, group)
            for count in (0, sublayer.order.units // 2):
                linear.weight.copy_(adapted(weight, gram, head_features(sublayer.order.kept(count), width)))
                measured = kl(whole, logits(module, batches))
                linear.weight.copy_(weight)
                # Where fewer units happened to cost less, the price is that of more.
                assert sublayer.prices[count] >= measured * 0.999 - 1e-9
                assert sublayer.prices[count] == pytest.approx(measured, rel=1e-3) or measured < max(
                    p for c, p in sublayer.prices.items() if c > count
                )


@FAMILIES
@torch.no_grad()
def test_whole_is_free_and_fewer_units_never_cost_less(name: str) -> None:
    model = tiny.model(name)
    before = model.fingerprint()
    for pair in price_sublayers(model.module, tiny.task().calibration(model, 24), 4):
        for sublayer, units in zip(pair, (4, 32), strict=True):
            assert sublayer.prices[units] == 0
            assert sublayer.order.units == units
            assert list(sublayer.prices) == sublayer.order.counts()
            values = [sublayer.prices[count] for count in sorted(sublayer.prices)]
            assert values == sorted(values, reverse=True)
            assert values[0] > 0
    assert model.fingerprint() == before


@torch.no_grad()
def test_prices_are_taken_from_texts_short_and_long() -> None:
    model = tiny.model()
    batches = tiny.task(n_train=160).calibration(model, 160)
    lengths = [batch["input_ids"].shape[1] for batch in batches]
    assert lengths == sorted(lengths)
    assert lengths[0] < lengths[-1]
    seen: list[int] = []
    model.module.register_forward_hook(lambda _, __, batch, ___: seen.append(batch["input_ids"].shape[1]), with_kwargs=True)
    price_sublayers(model.module, batches, 16)
    assert {lengths[0], lengths[-1]} <= set(seen)


def test_kl_is_that_of_loops() -> None:
    made = torch.Generator().manual_seed(0)
    a, b = torch.randn(5, 3, generator=made), torch.randn(5, 3, generator=made)
    p, q = np.exp(a.double().numpy()), np.exp(b.double().numpy())
    p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
    assert kl(a, b) == pytest.approx(sum(p[i, j] * np.log(p[i, j] / q[i, j]) for i in range(5) for j in range(3)) / 5)
    assert kl(a, a + 2.0) == pytest.approx(0.0, abs=1e-9)


# --- cut


@torch.no_grad()
def zeroed(model: Model, sublayers: Sequence[tuple[Sublayer, Sublayer]], blocks: Blocks) -> Model:
    """The slow way: the columns of what is cut are zero, everything else stays."""
    result = model.copy()
    family, size = family_of(result.module), head_width(result.module)
    for block, pair, counts in zip(blocks_of(result.module), sublayers, blocks, strict=True):
        for path, width, sublayer, count in zip((family.attention_output, family.down), (size, 1), pair, counts, strict=True):
            weight = matrix(block.get_submodule(path))
            kept = head_features(sublayer.order.kept(count), width)
            weight[:, [i for i in range(weight.shape[1]) if i not in kept]] = 0
    return result


@FAMILIES
@torch.no_grad()
def test_cut_equals_zeroed_columns(name: str) -> None:
    model = tiny.model(name, layers=3)
    batches = tiny.task().calibration(model, 24)
    sublayers = price_sublayers(model.module, batches, 4)
    counts = [(3, 20), (0, 8), (1, 0)]
    slow = zeroed(model, sublayers, counts)
    assert cut(model.module, sublayers, counts) == [0, 1, 2]
    assert heads_and_neurons(model.module) == counts
    torch.testing.assert_close(logits(model.module, batches), logits(slow.module, batches), rtol=1e-5, atol=1e-6)


@FAMILIES
@torch.no_grad()
def test_the_step_without_repair_equals_zeroed_columns(name: str) -> None:
    model, task = tiny.model(name, layers=3), tiny.task()
    result = PruneStructured(speedup=1.7, samples=24, neuron_group=4, repair=False)(model, task)
    batches = task.calibration(model, 24)
    kept, counts = result.history[-1]["kept_blocks"], [(0, 0)] * 3
    for number, left in zip(kept, heads_and_neurons(result.module), strict=True):
        counts[number] = left
    assert counts != [(4, 32)] * 3
    slow = zeroed(model, price_sublayers(model.copy().module, batches, 4), counts)
    keep_blocks(slow.module, kept)
    torch.testing.assert_close(logits(result.module, batches), logits(slow.module, batches), rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_a_block_with_nothing_left_is_dropped() -> None:
    model = tiny.model(layers=3)
    sublayers = price_sublayers(model.module, tiny.task().calibration(model, 8), 8)
    assert cut(model.module, sublayers, [(4, 32), (0, 0), (2, 8)]) == [0, 2]
    assert heads_and_neurons(model.module) == [(4, 32), (2, 8)]
    assert model.module.config.num_hidden_layers == 2


def test_a_block_that_adds_nothing_goes_first() -> None:
    model = tiny.model(layers=3)
    family = family_of(model.module)
    with torch.no_grad():
        for path in (family.attention_output, family.down):
            blocks_of(model.module)[1].get_submodule(path).weight.zero_()
    entry = PruneStructured(speedup=1.5, samples=16)(model, tiny.task()).history[-1]
    assert entry["kept_blocks"] == [0, 2]
    assert entry["blocks"][1] == [(4, 32), (4, 32)]


# --- repair


def lack(reference: Block, block: Block, norm: str) -> float:
    """The squared error of what one norm reads, over all batches."""
    return sum(
        float((reference.flows(i, (norm,))[norm].input - block.flows(i, (norm,))[norm].input).double().square().sum())
        for i in range(len(block.calls))
    )


@torch.no_grad()
def cut_copy(model: Model, batches: Sequence[Batch], counts: Blocks) -> Model:
    result = model.copy()
    cut(result.module, price_sublayers(result.module, batches, 4), counts)
    return result


@torch.no_grad()
def test_every_repair_lessens_the_error_of_its_sublayer(tuned: Model) -> None:
    batches = tiny.task().calibration(tuned, 48)
    smaller = cut_copy(tuned, batches, [(2, 12), (0, 16), (3, 0)])
    family = family_of(tuned.module)
    for reference, block in zip(walk_blocks(tuned.module, batches), walk_blocks(smaller.module, batches), strict=True):
        for path, norm in ((family.attention_output, family.attention_norm), (family.down, family.feed_forward_norm)):
            before = lack(reference, block, norm)
            _repair_sublayer(reference, block, path, norm)
            assert lack(reference, block, norm) < before


@torch.no_grad()
def test_repaired_outputs_are_nearer_in_every_block_and_at_the_end(tuned: Model) -> None:
    batches = tiny.task().calibration(tuned, 48)
    whole = logits(tuned.module, batches)
    for counts in ([(3, 24)] * 3, [(2, 16)] * 3, [(3, 8), (1, 16), (2, 0)]):
        plain = cut_copy(tuned, batches, counts)
        mended = plain.copy()
        repair(tuned.module, mended.module, batches, [0, 1, 2])
        assert heads_and_neurons(mended.module) == counts
        family = family_of(tuned.module)
        for number, norm in product(range(3), (family.attention_norm, family.feed_forward_norm)):
            path = f"{family.blocks}.{number}.{norm}"
            wanted = seen_by(tuned.module, path, batches)
            errors = [float((seen_by(m.module, path, batches) - wanted).square().sum()) for m in (mended, plain)]
            assert errors[0] < errors[1]
        assert kl(whole, logits(mended.module, batches)) < kl(whole, logits(plain.module, batches))


def test_the_step_is_better_with_repair(tuned: Model) -> None:
    task = tiny.task()
    batches = task.calibration(tuned, 64)
    whole = logits(tuned.module, batches)
    for speedup in (1.4, 2.0, 3.0):
        step = {"speedup": speedup, "samples": 64, "neuron_group": 4}
        mended, plain = (PruneStructured(**step, repair=on)(tuned, task) for on in (True, False))
        assert heads_and_neurons(mended.module) == heads_and_neurons(plain.module)
        assert kl(whole, logits(mended.module, batches)) < kl(whole, logits(plain.module, batches))


@torch.no_grad()
def test_the_first_repair_is_a_ridge_regression(tuned: Model) -> None:
    batches = tiny.task().calibration(tuned, 48)
    smaller = cut_copy(tuned, batches, [(2, 32), (4, 32), (4, 32)])
    family = family_of(tuned.module)
    path, norm = (f"{family.blocks}.0.{part}" for part in (family.attention_output, family.attention_norm))
    c = seen_by(smaller.module, path, batches).double().numpy()
    r = (seen_by(tuned.module, norm, batches) - seen_by(smaller.module, norm, batches)).double().numpy()
    centred = c - c.mean(0)
    s = centred.T @ centred
    slope = np.linalg.solve(s + 0.01 * np.diag(s).mean() * np.eye(len(s)), centred.T @ (r - r.mean(0))).T
    before = base_of(smaller.module).get_submodule(path)
    weight, bias = before.weight.double().numpy() + slope, before.bias.double().numpy() + r.mean(0) - slope @ c.mean(0)
    repair(tuned.module, smaller.module, batches, [0, 1, 2])
    after = base_of(smaller.module).get_submodule(path)
    np.testing.assert_allclose(after.weight.numpy(), weight, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(after.bias.numpy(), bias, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_sublayer_with_nothing_left_is_repaired_by_its_bias(tuned: Model) -> None:
    batches = tiny.task().calibration(tuned, 48)
    smaller = cut_copy(tuned, batches, [(0, 32), (4, 32), (4, 32)])
    norm = f"{family_of(tuned.module).blocks}.0.{family_of(tuned.module).attention_norm}"
    wanted = seen_by(tuned.module, norm, batches).mean(0)
    assert not torch.allclose(seen_by(smaller.module, norm, batches).mean(0), wanted, atol=1e-3)
    repair(tuned.module, smaller.module, batches, [0, 1, 2])
    torch.testing.assert_close(seen_by(smaller.module, norm, batches).mean(0), wanted, rtol=1e-4, atol=1e-4)


@FAMILIES
@torch.no_grad()
def test_repair_of_a_whole_model_changes_nothing(name: str) -> None:
    model = tiny.model(name)
    other = model.copy()
    repair(model.module, other.module, tiny.task().calibration(model, 40), [0, 1])
    assert other.fingerprint() == model.fingerprint()


@torch.no_grad()
def test_repair_after_a_dropped_block_looks_at_the_right_ones(tuned: Model) -> None:
    batches = tiny.task().calibration(tuned, 48)
    plain = cut_copy(tuned, batches, [(4, 32), (0, 0), (4, 32)])
    mended = plain.copy()
    repair(tuned.module, mended.module, batches, [0, 2])
    first, last = ([blocks_of(m.module)[i].state_dict() for m in (plain, mended)] for i in (0, 1))
    assert all(torch.equal(first[0][key], first[1][key]) for key in first[0])  # nothing was lost before the drop
    assert any(not torch.equal(last[0][key], last[1][key]) for key in last[0])
    family = family_of(tuned.module)
    wanted = seen_by(tuned.module, f"{family.blocks}.2.{family.feed_forward_norm}", batches)
    ours = [seen_by(m.module, f"{family.blocks}.1.{family.feed_forward_norm}", batches) for m in (plain, mended)]
    assert float((ours[1] - wanted).square().sum()) < float((ours[0] - wanted).square().sum())


# --- the step


@FAMILIES
def test_no_speedup_changes_nothing(name: str) -> None:
    model, task = tiny.model(name), tiny.task()
    result = PruneStructured(speedup=1.0, samples=40)(model, task)
    batches = list(task.batches(model, "validation", 16))
    assert torch.equal(logits(result.module, batches), logits(model.module, batches))
    assert result.history[-1]["changed"] == {}
    assert result.history[-1]["kept_blocks"] == [0, 1]


@pytest.mark.parametrize("speedup", [1.2, 2.0, 4.0])
def test_the_prediction_keeps_the_budget(speedup: float, tmp_path: Path) -> None:
    fake().save(tmp_path / "table.json")
    model = tiny.model(layers=3)
    for file in (None, str(tmp_path / "table.json")):
        step = PruneStructured(speedup=speedup, samples=16, neuron_group=4, latency_table=file)
        before, after = step(model, tiny.task()).history[-1]["predicted"]
        assert 0 < after <= before / speedup * (1 + 1e-9)


def test_a_budget_of_time_is_not_taken_for_one_of_parts(tmp_path: Path) -> None:
    """Where large models take twice the sum of their parts, half of the time leaves more than half of the parts."""
    table, model = fake(), tiny.model(layers=3)
    parts = table.parts([(4, 32)] * 3)
    replace(table, deep={table.base: table.base, parts / 2: parts / 2, parts: 2 * parts}).save(tmp_path / "table.json")
    for speedup in (1.5, 3.0):
        step = PruneStructured(speedup=speedup, samples=16, neuron_group=4, latency_table=str(tmp_path / "table.json"))
        before, after = step(model, tiny.task()).history[-1]["predicted"]
        assert before == pytest.approx(2 * parts)
        assert 0.8 * before / speedup <= after <= before / speedup * (1 + 1e-9)


def test_the_history_says_what_was_done(tmp_path: Path) -> None:
    table = fake()
    table.save(tmp_path / "table.json")
    model = tiny.model(layers=3)
    step = PruneStructured(speedup=2.0, samples=16, neuron_group=4, latency_table=str(tmp_path / "table.json"))
    result = step(model, tiny.task())
    entry = result.history[-1]
    counts = heads_and_neurons(result.module)
    assert entry["blocks"] == [[(4, 32)] * 3, counts]
    assert entry["predicted"] == [table.total([(4, 32)] * 3), table.total(counts)]
    assert entry["unit"] == "ms"
    assert len(entry["kept_blocks"]) == len(counts) == result.module.config.num_hidden_layers
    assert entry["kept_blocks"] == sorted(set(entry["kept_blocks"]))
    assert entry["parameters"] == [model.parameters(), result.parameters()]
    assert entry["skipped"]["classifier"] == entry["skipped"]["bert.pooler.dense"]
    assert "head" in entry["skipped"]["classifier"]
    assert set(entry["changed"]) | set(entry["skipped"]) == set(model.linears())


def test_it_works_where_an_accelerator_would_be(monkeypatch: pytest.MonkeyPatch) -> None:
    been: list[nn.Module] = []
    monkeypatch.setattr(prune_structured, "on_accelerator", lambda module: been.append(module) or nullcontext())
    result = PruneStructured(speedup=1.5, samples=8)(tiny.model(), tiny.task())
    assert been == [result.module]


def test_a_layer_in_a_block_is_not_called_embeddings_or_head() -> None:
    entry = PruneStructured(speedup=1.0, samples=8)(tiny.model(), tiny.task()).history[-1]
    inside = {name: reason for name, reason in entry["skipped"].items() if ".layer." in name}
    assert len(inside) == 12
    assert set(inside.values()).isdisjoint({entry["skipped"]["classifier"]})


def test_without_a_table_multiply_accumulates_are_counted() -> None:
    model, task = tiny.model(layers=3), tiny.task()
    entry = PruneStructured(speedup=1.5, samples=16)(model, task).history[-1]
    lengths = [int(n) for batch in task.calibration(model, 16) for n in batch["attention_mask"].sum(1)]
    t = round(sum(lengths) / len(lengths))
    assert entry["unit"] == "MACs"
    assert entry["predicted"][0] == 3 * (4 * t * 32 * 32 + 2 * t * t * 32 + 2 * t * 32 * 32)


def test_the_table_decides_what_goes(tmp_path: Path) -> None:
    free, dear = {0: 0.0, 4: 0.0}, {0: 0.0, 4: 4.0}
    neurons_free, neurons_dear = {0: 0.0, 32: 0.0}, {0: 0.0, 32: 4.0}
    model, left = tiny.model(), []
    for attention, feed_forward in ((dear, neurons_free), (free, neurons_dear)):
        table = LatencyTable(
            base=0.1, attention=attention, attention_last=attention, feed_forward=feed_forward, feed_forward_last=feed_forward
        )
        table.save(tmp_path / "table.json")
        step = PruneStructured(speedup=1.8, samples=16, neuron_group=4, latency_table=str(tmp_path / "table.json"))
        left.append(heads_and_neurons(step(model, tiny.task()).module))
    heads_dear, all_neurons_dear = left
    assert [n for _, n in heads_dear] == [32, 32]
    assert sum(h for h, _ in heads_dear) < 8
    assert [h for h, _ in all_neurons_dear] == [4, 4]
    assert sum(n for _, n in all_neurons_dear) < 64


def test_a_model_already_cut_is_cut_further() -> None:
    model = tiny.uneven(tiny.model(layers=3))
    before = heads_and_neurons(model.module)
    result = PruneStructured(speedup=1.5, samples=24, neuron_group=4)(model, tiny.task())
    entry = result.history[-1]
    assert entry["blocks"][0] == before
    for number, (heads, neurons) in zip(entry["kept_blocks"], heads_and_neurons(result.module), strict=True):
        assert heads <= before[number][0]
        assert neurons <= before[number][1]
    assert entry["predicted"][1] <= entry["predicted"][0] / 1.5
    assert result.parameters() < model.parameters()
    assert torch.isfinite(logits(result.module, tiny.task().calibration(model, 8))).all()


def test_what_is_removed_whole_is_named() -> None:
    assert gone_whole([(4, 8), (0, 8), (4, 8)], [(3, 8), (0, 1), (1, 1)], [0, 1, 2]) == "no sublayer is removed whole"
    said = gone_whole([(4, 8), (4, 8), (4, 8), (4, 8)], [(0, 8), (2, 2), (1, 0)], [0, 2, 3])
    assert said == "removed whole: block 1, attention of block 0, feed-forward of block 3"
    assert gone_whole([(4, 8), (4, 4, 8)], [(4, 8), (4, 0, 8)], [0, 1]) == "removed whole: cross-attention of block 1"


def test_what_is_impossible_is_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prune_structured, "price_sublayers", None)
    for family in ("bert", "llama"):
        model = tiny.model(family)
        with pytest.raises(InputError, match=r"^prune_structured: no cut of this model is 1e\+09 times cheaper"):
            PruneStructured(speedup=1e9, samples=8)(model, tiny.task())
    table = tmp_path / "table.json"
    LatencyTable.by_macs(hidden=32, head_size=8, heads=4, neurons=32, tokens=10, base=10**9).save(table)
    with pytest.raises(InputError, match=r"prune_structured: no cut of this model is 1\.5 times cheaper.*ask for at most 1$"):
        PruneStructured(latency_table=str(table), samples=8)(tiny.model(), tiny.task())
    with pytest.raises(InputError):
        PruneStructured(latency_table=str(tmp_path / "none.json"), samples=8)(tiny.model(), tiny.task())


@FAMILIES
def test_the_result_loads_plainly_with_equal_logits(name: str, tmp_path: Path) -> None:
    model, task = tiny.model(name, layers=3), tiny.task()
    result = PruneStructured(speedup=1.8, samples=24, neuron_group=4)(model, task)
    assert heads_and_neurons(result.module) != heads_and_neurons(model.module)
    result.save(tmp_path / "model")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model").eval()
    batches = list(task.batches(model, "validation", 16))
    assert heads_and_neurons(loaded) == heads_and_neurons(result.module)
    assert torch.equal(logits(loaded, batches), logits(result.module, batches))
