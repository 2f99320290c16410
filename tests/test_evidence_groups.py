"""For whom: planted damage is named, nothing is named without cause, and the corrections are Holm's and a permutation's."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from multum.evidence.groups import ENOUGH, excess, groups, holm, length_groups


def test_holm_by_hand():
    """0.01 x 4, 0.02 x 3, 0.03 x 2, then never below the one before."""
    assert holm([0.03, 0.01, 0.5, 0.02]) == pytest.approx([0.06, 0.04, 0.5, 0.06])
    assert holm([0.9, 0.8]) == pytest.approx([1.0, 1.0])
    assert holm([]).tolist() == []


def test_excess_is_the_permutation_of_every_choice_of_members():
    """All 70 ways to choose 4 of 8."""
    steps = np.array([-1, -1, -1, 0, 0, 0, 0, 1])

    def gap(chosen):
        rest = np.setdiff1d(np.arange(8), chosen)
        return steps[list(chosen)].mean() - steps[rest].mean()

    every = np.array([abs(gap(chosen)) for chosen in combinations(range(8), 4)])
    found, p = excess((3, 0, 4), (3, 1, 8), draws=40_000, seed=0)
    assert found == pytest.approx(gap((0, 1, 2, 3))) == pytest.approx(-1.0)
    assert p == pytest.approx((every >= 1.0 - 1e-9).mean(), abs=0.005)
    assert excess((3, 1, 8), (3, 1, 8), draws=10, seed=0) == (0.0, 1.0)


def test_quarters_by_length():
    lengths = np.array([3, 1, 2, 8, 7, 5, 4, 6])
    assert length_groups(lengths).tolist() == ["3 to 4", "1 to 2", "1 to 2", "7 to 8", "7 to 8", "5 to 6", "3 to 4", "5 to 6"]
    assert set(length_groups(np.full(9, 4))) == {"4 to 4"}


def data(n: int = 1200, seed: int = 0):
    rng = np.random.default_rng(seed)
    before = rng.random(n) < 0.9
    after = before ^ (rng.random(n) < np.where(before, 0.02, 0.18))  # what training again would change: as much lost as gained
    return (
        rng,
        before,
        after,
        {"class": rng.choice(["bad", "good", "mixed"], n), "source": rng.choice(["phone", "web"], n, p=[0.2, 0.8])},
    )


@pytest.mark.parametrize(("by", "name"), [("class", "mixed"), ("source", "phone")])
def test_damage_to_one_group_is_named_while_the_average_holds(by, name):
    rng, before, after, groupings = data()
    inside = np.flatnonzero((groupings[by] == name) & before & after)
    outside = np.flatnonzero((groupings[by] != name) & ~before & ~after)
    hurt = rng.choice(inside, 35, replace=False)
    after[hurt] = False
    after[outside[:35]] = True
    assert abs(after.mean() - before.mean()) < 0.025
    found = groups(before, after, groupings, seed=0)
    assert [(row["by"], row["name"]) for row in found["damaged"]] == [(by, name)]
    worst = found["worst"]
    assert (worst["by"], worst["name"]) == (by, name)
    assert worst["p_excess_holm"] < 0.01
    assert worst["ci95"][1] < 0


def test_an_untouched_copy_hurts_nobody():
    _, before, _, groupings = data()
    found = groups(before, before, groupings, seed=0)
    assert found["damaged"] == found["improved"] == []
    assert found["worst"] is None
    assert all(row["p_holm"] == 1 and row["value"] == 0 and row["ci95"][0] < 0 < row["ci95"][1] for row in found["rows"])


def test_no_group_is_named_without_cause_more_often_than_it_says():
    """400 data sets without any damage, 20 groups each: a name is named in at most 5 % (+ 3.3, three standard errors)."""
    wrong = 0
    for seed in range(400):
        rng = np.random.default_rng(seed)
        before = rng.random(800) < 0.85
        after = before ^ (rng.random(800) < np.where(before, 0.05, 0.05 * 0.85 / 0.15))  # as many lost as gained
        lost_or_gained = {"column": rng.integers(0, 20, 800).astype(str)}
        wrong += bool(found["damaged"] + found["improved"]) if (found := _quick(before, after, lost_or_gained)) else 0
    assert wrong / 400 <= 0.083


def _quick(before, after, groupings):
    """Without the permutations, which this does not look at."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("multum.evidence.groups.PERMUTATIONS", 10)
        return groups(before, after, groupings, seed=0)


def test_too_few_examples_are_shown_and_not_judged():
    before, after = np.ones(100, dtype=bool), np.ones(100, dtype=bool)
    after[: ENOUGH - 1] = False
    found = groups(before, after, {"source": ["rare"] * (ENOUGH - 1) + ["web"] * (101 - ENOUGH)}, seed=0)
    rare = next(row for row in found["rows"] if row["name"] == "rare")
    assert not rare["enough"]
    assert "p" not in rare
    assert rare["value"] == -1
    assert found["tested"] == 1
    assert not found["damaged"]


def test_groups_stand_in_the_order_of_their_numbers():
    members = np.array(["10 to 20", "9 to 9", "100 to 200"] * 20)
    right = np.ones(60, dtype=bool)
    found = groups(right, right, {"length": members}, seed=0)
    assert [row["name"] for row in found["rows"]] == ["9 to 9", "10 to 20", "100 to 200"]
