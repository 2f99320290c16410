"""Whole-split metrics of two models: figures against loops, the exchange test against all exchanges, coverage by simulation."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from scipy.stats import pearsonr
from sklearn.metrics import f1_score

from multum.evidence import outputs as ev


def test_figures_are_what_they_are_called() -> None:
    rng = np.random.default_rng(0)
    truth, guess = rng.integers(0, 2, (40, 3)), rng.integers(0, 2, (40, 3))
    counts = np.stack([(truth & guess).sum(1), guess.sum(1), truth.sum(1)], axis=1)
    assert ev.f1(counts.sum(0)) == pytest.approx(f1_score(truth, guess, average="micro"))
    x, y = rng.normal(size=(2, 50))
    moments = np.stack([np.ones(50), x, y, x * x, y * y, x * y], axis=1)
    assert ev.correlation(moments.sum(0)) == pytest.approx(pearsonr(x, y).statistic)
    assert ev.correlation(np.array([3.0, 3.0, 6.0, 3.0, 14.0, 6.0])) == 0, "a model that always says 1"
    assert ev.perplexity(np.array([2 * math.log(7), 2.0])) == pytest.approx(7)
    assert ev.ratio(np.zeros(2)) == 0


def test_the_exchange_test_is_that_of_all_exchanges() -> None:
    rng = np.random.default_rng(1)
    before, after = (np.stack([rng.integers(0, 4, 9), np.full(9, 4)], axis=1).astype(float) for _ in range(2))
    after[:, 0] = np.minimum(4, after[:, 0] + 1)
    found = ev.difference(before, after, ev.ratio, margin=None, lower_is_better=False, draws=20_000, seed=0)
    gap = abs(after[:, 0].sum() - before[:, 0].sum())
    exchanged = [
        abs(sum((b - a if swap else a - b) for swap, a, b in zip(swaps, after[:, 0], before[:, 0], strict=True)))
        for swaps in itertools.product([False, True], repeat=9)
    ]
    assert found["p"] == pytest.approx(np.mean([one >= gap - 1e-12 for one in exchanged]), abs=0.012)
    assert found["value"] == pytest.approx(float(after[:, 0].mean() - before[:, 0].mean()) / 4)


def test_intervals_hold_the_truth_and_equal_models_are_seldom_called_different() -> None:
    rng, inside, called = np.random.default_rng(2), 0, 0
    for seed in range(150):
        before, after = (np.stack([rng.binomial(1, p, 120), np.ones(120)], axis=1).astype(float) for p in (0.8, 0.7))
        found = ev.difference(before, after, ev.ratio, margin=None, lower_is_better=False, draws=200, seed=seed)
        inside += found["ci95"][0] <= -0.1 <= found["ci95"][1]
        again = np.stack([rng.binomial(1, 0.8, 120), np.ones(120)], axis=1).astype(float)
        called += (
            ev.difference(before, again, ev.ratio, margin=None, lower_is_better=False, draws=200, seed=seed)["verdict"]
            != "not shown"
        )
    assert 0.88 <= inside / 150 <= 0.99
    assert called / 150 <= 0.1


def test_verdicts_know_which_way_is_up() -> None:
    few, many = np.tile([[1.0, 2.0]], (60, 1)), np.tile([[1.5, 2.0]], (60, 1))
    how = {"margin": 0.05, "draws": 200, "seed": 0}
    assert ev.difference(few, many, ev.ratio, lower_is_better=False, **how)["verdict"] == "better"
    assert ev.difference(few, many, ev.perplexity, lower_is_better=True, **how)["verdict"] == "worse"
    assert ev.difference(few, few, ev.ratio, lower_is_better=False, **how)["verdict"] == "equal"
    assert ev.difference(few, few, ev.ratio, lower_is_better=False, **{**how, "margin": None})["verdict"] == "not shown"


def test_as_many_examples_as_are_said_to_be_needed_show_equality_in_four_of_five() -> None:
    """Of two models that are equally good, from what 100 examples tell."""
    rng = np.random.default_rng(4)

    def drawn(n: int) -> tuple[np.ndarray, np.ndarray]:
        level, ones = rng.random(n), np.ones(n)
        return tuple(np.stack([level + rng.normal(0, 0.1, n), ones], axis=1) for _ in range(2))  # type: ignore[return-value]

    how: dict[str, Any] = {"margin": 0.01, "lower_is_better": False, "draws": 400, "seed": 0}
    asked = [ev.difference(*drawn(100), ev.ratio, **how) for _ in range(20)]
    needed = int(np.median([one["needed"] for one in asked if one["needed"]]))
    assert needed > 100
    found = [ev.difference(*drawn(needed), ev.ratio, **how)["within_margin"] for _ in range(120)]
    assert 0.68 <= np.mean(found) <= 0.9
    spread = ev.examples_needed(50, 0.02, 0.04)
    assert spread == math.ceil(50 * (1.6449 + 1.2816) ** 2 / 4)
    assert ev.difference(*drawn(100), ev.ratio, **{**how, "margin": None})["needed"] is None
    assert ev.difference(*drawn(100), ev.ratio, **{**how, "margin": 0.5})["needed"] is None  # equal, and shown


def test_a_group_that_suffers_is_named_and_the_others_are_not() -> None:
    rng = np.random.default_rng(3)
    before = np.stack([rng.binomial(1, 0.9, 400), np.ones(400)], axis=1).astype(float)
    after, members = before.copy(), np.array(["a", "b", "c", "d"]).repeat(100)
    after[members == "c", 0] *= rng.binomial(1, 0.6, 100)
    rows = ev.by_group(before, after, ev.ratio, {"by": members}, margin=None, lower_is_better=False, draws=500, seed=0)
    assert [row["name"] for row in rows if row["damaged"]] == ["c"]
    small = ev.by_group(
        before[:30],
        after[:30],
        ev.ratio,
        {"by": np.array(["x"] * 19 + ["y"] * 11)},
        margin=None,
        lower_is_better=False,
        draws=9,
        seed=0,
    )
    assert small == []
    lengths = np.array(["100 to 262", "9 to 40", "41 to 99", "300 to 310"]).repeat(100)
    ordered = ev.by_group(before, after, ev.ratio, {"length": lengths}, margin=None, lower_is_better=False, draws=9, seed=0)
    assert [row["name"] for row in ordered] == ["9 to 40", "41 to 99", "100 to 262", "300 to 310"]


def test_texts_part_and_are_kept() -> None:
    one, other = ["the", "cat", "sat", "on", "the", "mat"], ["the", "cat", "lay", "on", "a", "mat"]
    assert ev.until_they_part(one, other) == pytest.approx(2 / 6)
    assert ev.kept(one, other) == pytest.approx(4 / 6)
    assert ev.kept("kitten", "sitting") == pytest.approx(1 - 3 / 7)
    assert ev.until_they_part([], []) == ev.kept([], []) == 1
    assert ev.until_they_part(one, one[:3]) == pytest.approx(0.5)
    found = ev.same([("a",), "b"], [("a",), "c"])
    assert (found["value"], found["n"]) == (0.5, 2)


def test_kl_of_known_distributions_and_means_without_what_is_unknown() -> None:
    p, q = np.log([[0.5, 0.5]]), np.log([[0.9, 0.1]])
    assert ev.kl_of(p, q)[0] == pytest.approx(0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1))
    assert ev.kl_of(p, p + 7)[0] == pytest.approx(0)
    found = ev.mean(np.array([1.0, np.nan, 3.0]), 50, 0)
    assert (found["value"], found["n"]) == (2.0, 2)
