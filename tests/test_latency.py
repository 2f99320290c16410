"""The latency table against a machine whose costs are known."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

from multum.core.latency import Blocks, LatencyTable, Timer, grid, interleave
from multum.errors import InputError

HEADS, NEURONS = 4, 384
BASE, EMPTY = 5.0, 0.25


def attention(heads: int) -> float:
    return EMPTY + (0.5 + 1.5 * heads if heads else 0.0)


def attention_last(heads: int) -> float:
    return 0.125 + 0.75 * heads


def feed_forward(neurons: int) -> float:
    return EMPTY + (1.0 + neurons / 64 if neurons else 0.0)


def feed_forward_last(neurons: int) -> float:
    return neurons / 512


def cost(blocks: Blocks) -> float:
    """What the made-up machine takes: additive, with a fixed cost of any width and cheap blocks at the end."""
    attending = [i for i, (heads, _) in enumerate(blocks) if heads]
    total = BASE
    for i, (heads, neurons) in enumerate(blocks):
        if attending and i < attending[-1]:
            total += attention(heads) + feed_forward(neurons)
        elif attending and i == attending[-1]:
            total += attention_last(heads) + feed_forward_last(neurons)
        else:
            total += feed_forward_last(neurons)
    return total


def made(rounds: int = 3) -> LatencyTable:
    return LatencyTable.measure(lambda blocks: lambda: cost(blocks), heads=HEADS, neurons=NEURONS, rounds=rounds)


def test_measure_finds_every_part() -> None:
    table = made()
    assert table.base == BASE
    assert dict(table.attention) == pytest.approx({h: attention(h) for h in grid(HEADS)})
    assert {n: table.feed_forward[n] for n in grid(NEURONS)} == pytest.approx({n: feed_forward(n) for n in grid(NEURONS)})
    assert {h: c for h, c in table.attention_last.items() if h} == pytest.approx({h: attention_last(h) for h in grid(HEADS) if h})
    assert {n: table.feed_forward_last[n] for n in grid(NEURONS)} == pytest.approx({n: feed_forward_last(n) for n in grid(NEURONS)})


def test_totals_are_those_of_the_machine() -> None:
    table = made()
    parts = [(4, 384), (2, 96), (3, 0), (0, 192), (1, 4)]
    for blocks in product(parts, repeat=3):
        assert table.total(blocks) == pytest.approx(cost(blocks)), blocks


def test_between_measured_counts_it_is_a_straight_line() -> None:
    table = made()
    for neurons in (30, 72, 100, 383):
        assert table.block(2, neurons) == pytest.approx(attention(2) + feed_forward(neurons))
    # What any width costs is not known below the least one: no neuron is cheaper than those.
    assert table.block(2, 2) == table.block(2, 1) == pytest.approx(attention(2) + feed_forward(4))
    assert table.block(2, 0) == pytest.approx(attention(2) + feed_forward(0))


def test_beyond_the_last_count_the_line_goes_on() -> None:
    assert made().block(6, 500) == pytest.approx(attention(6) + feed_forward(500))


def test_the_last_attending_block_has_its_own_columns() -> None:
    table = made()
    assert table.block(2, 96, last=True) == pytest.approx(attention_last(2) + feed_forward_last(96))
    assert table.block(0, 96, after_last=True) == pytest.approx(feed_forward_last(96))
    assert table.total([(2, 96), (2, 96), (0, 96)]) == pytest.approx(
        BASE + table.block(2, 96) + table.block(2, 96, last=True) + table.block(0, 96, after_last=True)
    )


def test_where_every_token_is_worked_on_the_last_block_is_like_the_others(tmp_path: Path) -> None:
    timed: list[Blocks] = []

    def whole(blocks: Blocks) -> float:
        return BASE + sum(attention(heads) + feed_forward(neurons) for heads, neurons in blocks)

    def timer(blocks: Blocks) -> Timer:
        timed.append(blocks)
        return lambda: whole(blocks)

    table = LatencyTable.measure(timer, heads=HEADS, neurons=NEURONS, rounds=1, every_token=True)
    for blocks in product([(4, 384), (2, 96), (3, 0), (0, 192), (1, 4)], repeat=3):
        assert table.total(blocks) == pytest.approx(whole(blocks)), blocks
    assert table.block(0, 96, after_last=True) == table.block(0, 96)
    assert len(timed) == 2 + len(grid(HEADS)) + len(grid(NEURONS))
    table.save(tmp_path / "table.json")
    assert LatencyTable.load(tmp_path / "table.json") == table


def test_without_heads_anywhere_every_block_works_on_one_token() -> None:
    assert made().total([(0, 96), (0, 192)]) == pytest.approx(BASE + feed_forward_last(96) + feed_forward_last(192))


def test_the_largest_speedup_that_is_named_is_one_that_can_be_had() -> None:
    table = LatencyTable.by_macs(hidden=32, head_size=8, heads=4, neurons=32, tokens=10, base=1000)
    blocks = [(4, 32), (3, 20)]
    with pytest.raises(InputError, match="step: no cut of this model is 99 times cheaper") as caught:
        table.room(blocks, 99, "step")
    most = float(str(caught.value).rpartition("ask for at most ")[2])
    assert table.total([(0, 0), (1, 0)]) <= table.room(blocks, most, "step") == table.total(blocks) / most
    with pytest.raises(InputError):
        table.room(blocks, most + 0.1, "step")


def test_an_empty_block_is_free() -> None:
    table = made()
    assert table.block(0, 0) == table.block(0, 0, last=True) == table.block(0, 0, after_last=True) == 0
    assert table.total([(0, 0), (2, 96), (0, 0)]) == table.total([(2, 96)])
    assert table.total([]) == BASE


def test_noise_never_makes_more_units_cheaper() -> None:
    def noisy(blocks: Blocks) -> Timer:
        return lambda: cost(blocks) - (20.0 if any(h == 3 or n == 192 for h, n in blocks) else 0.0)

    table = LatencyTable.measure(noisy, heads=HEADS, neurons=NEURONS, rounds=1)
    for costs in (table.attention, table.attention_last, table.feed_forward, table.feed_forward_last):
        values = [costs[count] for count in sorted(costs)]
        assert values == sorted(values)
        assert min(values) >= 0
    assert table.attention[3] == table.attention[2]
    assert table.feed_forward[192] == table.feed_forward[144]


DEPTH, HELD = 6, 40.0


def from_memory(blocks: Blocks) -> float:
    """A machine whose cache holds weights of so much time, and that takes half as long again for what is beyond."""
    return cost(blocks) + max(0.0, cost(blocks) - HELD) / 2


def test_deep_stacks_tell_what_the_sum_of_the_parts_leaves_out() -> None:
    table = LatencyTable.measure(lambda blocks: lambda: from_memory(blocks), heads=HEADS, neurons=NEURONS, rounds=1, depth=DEPTH)
    for heads, neurons in ((4, 384), (3, 288), (2, 192), (1, 96)):
        blocks = [(heads, neurons)] * DEPTH
        assert table.parts(blocks) == pytest.approx(cost(blocks))
        assert table.total(blocks) == pytest.approx(from_memory(blocks))
    assert from_memory([(4, 384)] * DEPTH) > 1.2 * cost([(4, 384)] * DEPTH)
    # Neither so even nor so wide: on the line between two deep stacks, of which one is held and one is not.
    for blocks in ([(4, 192)] * DEPTH, [(1, 384), (4, 96)] * 3, [(4, 384)] * 4):
        assert table.total(blocks) == pytest.approx(from_memory(blocks), rel=0.05)
    assert table.total([]) == BASE


def test_the_room_of_parts_is_that_of_the_time_asked_for() -> None:
    table = LatencyTable.measure(lambda blocks: lambda: from_memory(blocks), heads=HEADS, neurons=NEURONS, rounds=1, depth=DEPTH)
    whole = [(4, 384)] * DEPTH
    assert table.room(whole, 1, "step") == pytest.approx(table.parts(whole))
    # A third fits the cache: its parts may take more than a third of what they took.
    assert table.room(whole, 3, "step") == pytest.approx(from_memory(whole) / 3, rel=0.05)
    assert table.room(whole, 3, "step") > 1.1 * table.parts(whole) / 3
    for speedup in (1.2, 1.7, 3.0):
        room = table.room(whole, speedup, "step")
        blocks = next([(1, n)] * DEPTH for n in range(2 * NEURONS, 0, -1) if table.parts([(1, n)] * DEPTH) <= room)
        assert table.total(blocks) == pytest.approx(from_memory(whole) / speedup, rel=0.03)


def test_what_comes_before_a_model_is_added_once() -> None:
    table = LatencyTable.measure(lambda blocks: lambda: from_memory(blocks), heads=HEADS, neurons=NEURONS, rounds=1, depth=DEPTH)
    for blocks in ([(4, 384)] * DEPTH, [(2, 96)] * 3, []):
        assert table.behind(7).total(blocks) == pytest.approx(table.total(blocks) + 7)
    assert made().behind(7).total([(2, 96)]) == pytest.approx(made().total([(2, 96)]) + 7)


@pytest.mark.parametrize("odd", [(3, 288), (4, 384)])
def test_a_wider_deep_stack_that_was_no_slower_is_noise(odd: tuple[int, int]) -> None:
    def noisy(blocks: Blocks) -> Timer:
        return lambda: from_memory(blocks) - (50.0 if len(blocks) == DEPTH and blocks[0] == odd else 0.0)

    table, whole = LatencyTable.measure(noisy, heads=HEADS, neurons=NEURONS, rounds=1, depth=DEPTH), [(4, 384)] * DEPTH
    assert len(table.deep) == 4  # no block at all, and three of the four
    for speedup in (1.0, 1.05, 1.3, 2.0, 3.0):
        parts = table.room(whole, speedup, "step")
        assert _at(table, parts) == pytest.approx(table.total(whole) / speedup)


def _at(table: LatencyTable, parts: float) -> float:
    """The time of a model whose parts sum up to this much: a block of it."""
    free = {0: 0.0, 1: 0.0}
    return replace(table, base=0.0, attention_last=free, feed_forward_last={0: 0.0, 1: parts}).total([(1, 1)])


def test_at_a_speed_up_of_one_there_is_room_for_the_model_itself() -> None:
    table = LatencyTable.measure(lambda blocks: lambda: from_memory(blocks), heads=HEADS, neurons=NEURONS, rounds=1, depth=DEPTH)
    for heads, neurons in product((1, 2, 3, 4), (4, 30, 99, 201, 384)):
        blocks = [(heads, neurons), (4, 17), (2, 333)]
        assert table.room(blocks, 1, "step") == table.parts(blocks)


def test_save_and_load_round_trip(tmp_path: Path) -> None:
    about = {"runtime": "onnxruntime", "threads": 1, "lengths": [8, 16]}
    table = LatencyTable.measure(lambda blocks: lambda: cost(blocks), heads=HEADS, neurons=NEURONS, rounds=1, about=about, depth=2)
    table.save(tmp_path / "table.json")
    loaded = LatencyTable.load(tmp_path / "table.json")
    assert loaded == table
    assert loaded.about == about
    assert loaded.total([(3, 100), (2, 7)]) == table.total([(3, 100), (2, 7)])


def test_by_macs_counts_the_products() -> None:
    hidden, size, tokens, heads, neurons = 12, 3, 7, 4, 40
    table = LatencyTable.by_macs(hidden=hidden, head_size=size, heads=heads, neurons=neurons, tokens=tokens)

    def products(h: int, n: int) -> int:
        projections = [(tokens, hidden, h * size)] * 3 + [(tokens, h * size, hidden)]
        scores_and_mixing = [(tokens, size, tokens), (tokens, tokens, size)] * h
        feed_forward = [(tokens, hidden, n), (tokens, n, hidden)]
        return sum(a * b * c for a, b, c in projections + scores_and_mixing + feed_forward)

    blocks = [(4, 40), (1, 17), (3, 0), (0, 1)]
    for h, n in blocks:
        assert table.block(h, n) == pytest.approx(products(h, n))
    assert table.total(blocks) == pytest.approx(sum(products(h, n) for h, n in blocks))
    assert table.unit == "MACs"


@pytest.mark.parametrize("full", [1, 2, 3, 8, 12, 96, 384, 3072])
def test_the_grid_reaches_from_none_to_all(full: int) -> None:
    counts = grid(full)
    assert counts[0] == 0
    assert counts[-1] == full
    assert counts == sorted(set(counts))
    assert 1 <= counts[1] <= max(1, full // 12)


@pytest.mark.parametrize("full", [1, 2, 3, 12])
def test_any_model_can_be_measured(full: int) -> None:
    table = LatencyTable.measure(lambda blocks: lambda: cost(blocks), heads=full, neurons=full, rounds=1)
    for blocks in ([(full, full)] * 3, [(1, full), (full, 1)]):
        assert table.total(blocks) == pytest.approx(cost(blocks))


def test_interleave_takes_medians_in_turns() -> None:
    calls: list[str] = []
    # The first value is the warm-up's and does not count.
    seen = {"a": [100.0, 1.0, 9.0, 2.0], "b": [0.0, 5.0, 4.0, 300.0]}
    left = {name: iter(values) for name, values in seen.items()}

    def timer(name: str) -> Timer:
        def once() -> float:
            calls.append(name)
            return next(left[name])

        return once

    assert interleave({name: timer(name) for name in seen}, 3) == {"a": 2.0, "b": 5.0}
    assert calls == ["a", "b"] * 4


def test_measure_is_not_disturbed_by_a_spike() -> None:
    passes = iter(range(10**6))

    def disturbed(blocks: Blocks) -> Timer:
        return lambda: cost(blocks) + (50.0 if next(passes) % 97 == 0 else 0.0)

    spiky = LatencyTable.measure(disturbed, heads=HEADS, neurons=NEURONS, rounds=5)
    assert spiky == made()


@pytest.mark.parametrize("content", ["[1]", "{}", '{"attention": 3}', '{"base": 1, "attention": {"a": 1}}'])
def test_a_file_that_is_no_table_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "table.json").write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match="is no latency table"):
        LatencyTable.load(tmp_path / "table.json")
