"""Attacks against slow loops, closed forms and simulation: a planted leak is found, and no leak is not."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import norm
from sklearn.metrics import roc_auc_score

from multum.evidence.privacy import (
    attack,
    auc,
    auc_change,
    auc_interval,
    confidence,
    lira_offline,
    log_likelihood,
    placements,
    tpr_at,
)


def test_auc_and_placements_against_all_pairs():
    rng = np.random.default_rng(0)
    members, others = rng.integers(0, 6, 40).astype(float), rng.integers(0, 5, 30).astype(float)
    wins = (members[:, None] > others) + 0.5 * (members[:, None] == others)
    below, above = placements(members, others)
    np.testing.assert_allclose(below, wins.mean(axis=1))
    np.testing.assert_allclose(above, wins.mean(axis=0))
    labels = np.r_[np.ones(40), np.zeros(30)]
    assert auc(members, others) == pytest.approx(roc_auc_score(labels, np.r_[members, others]))


def test_log_odds_stay_exact_where_a_softmax_does_not():
    logits, truth = np.array([[50.0, 0.0, -1.0], [0.0, 1.0, 2.0]]), np.array([0, 1])
    exact = [50 - np.log(1 + np.exp(-1)), 1 - np.log(1 + np.exp(2))]
    np.testing.assert_allclose(confidence(logits, truth), exact)
    p = np.exp(log_likelihood(logits[1:], truth[1:]))
    np.testing.assert_allclose(np.log(p / (1 - p)), confidence(logits[1:], truth[1:]))


@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_the_interval_of_an_auc_covers_it(shift):
    true, rng = float(norm.cdf(shift / 2**0.5)), np.random.default_rng(1)
    covered = 0
    for _ in range(400):
        value = auc(rng.normal(shift, 1, 60), rng.normal(0, 1, 80))
        low, high = auc_interval(value, 60, 80)
        assert low <= value <= high
        covered += low <= true <= high
    assert 0.92 <= covered / 400 <= 0.985


def test_the_ends_of_an_auc_are_no_proof():
    low, high = auc_interval(1.0, 20, 20)
    assert 0.7 < low < 0.95
    assert high == 1.0
    assert auc_interval(0.0, 20, 20) == pytest.approx((0.0, 1 - low))
    wide, narrow = (np.diff(auc_interval(0.6, n, n))[0] for n in (50, 5000))
    assert wide > 5 * narrow


def test_the_interval_of_a_change_covers_it():
    """Two scores of the same examples: AUC of N(1,1) and N(0.5,1) members against N(0,1)."""
    true, rng = float(norm.cdf(0.5 / 2**0.5) - norm.cdf(1 / 2**0.5)), np.random.default_rng(2)
    covered = 0
    for _ in range(300):
        base = rng.normal(size=160)
        before, after = (0.7 * base + (1 - 0.49) ** 0.5 * rng.normal(size=160) for _ in range(2))
        before[:80] += 1.0
        after[:80] += 0.5
        found = auc_change((before[:80], before[80:]), (after[:80], after[80:]))
        assert found["value"] == pytest.approx(auc(after[:80], after[80:]) - auc(before[:80], before[80:]))
        covered += found["ci95"][0] <= true <= found["ci95"][1]
    assert 0.91 <= covered / 300 <= 0.985
    same = auc_change((before[:80], before[80:]), (before[:80], before[80:]))
    assert same == {"value": 0.0, "ci95": [0.0, 0.0]}


def test_members_found_at_a_rate_against_a_slow_search():
    rng = np.random.default_rng(3)
    members, others = rng.normal(0.5, 1, 300), rng.normal(0, 1, 250)
    best = max(float((members > t).mean()) for t in others if (others > t).mean() <= 0.01)
    assert tpr_at(members, others, 0.01)["value"] == pytest.approx(best)
    assert tpr_at(members, others, 0.001) is None  # 250 others cannot show one in a thousand
    tied = tpr_at(np.ones(50), np.ones(200), 0.01)
    assert tied["value"] == 0.0  # nobody is above all of the others


def test_the_interval_of_members_found_covers_them():
    true, rng = float(norm.sf(norm.isf(0.01) - 1.5)), np.random.default_rng(4)
    found = [tpr_at(rng.normal(1.5, 1, 300), rng.normal(0, 1, 400), 0.01) for _ in range(300)]
    covered = np.mean([one["ci95"][0] <= true <= one["ci95"][1] for one in found])
    assert covered >= 0.94
    assert all(one["ci95"][0] <= one["value"] <= one["ci95"][1] for one in found)


def test_no_leak_and_a_planted_leak():
    rng = np.random.default_rng(5)
    same = attack(rng.normal(size=2000), rng.normal(size=2000))
    assert same["auc"]["ci95"][0] < 0.5 < same["auc"]["ci95"][1]
    for name, rate in (("tpr_at_1_percent", 0.01), ("tpr_at_0.1_percent", 0.001)):
        assert same[name]["ci95"][0] <= rate <= same[name]["ci95"][1]
    few = rng.normal(size=2000)
    few[:100] += 8  # one in twenty is remembered: the mean hardly shows it, the tail does
    assert attack(few, rng.normal(size=2000))["tpr_at_0.1_percent"]["ci95"][0] == 0  # two of 2,000 others are too few to be sure
    found = attack(few, rng.normal(size=10_000))
    assert found["auc"]["value"] < 0.56
    assert found["tpr_at_0.1_percent"]["ci95"][0] > 0.02


def shadows_of(rng, models: int, examples: int, leak: float):
    """φ of shadow models: of an example's own difficulty, noise, and more where it was learned from."""
    difficulty = rng.normal(0, 3, examples)
    inside = rng.random((models, examples)) < 0.5
    return difficulty, inside, difficulty + rng.normal(0, 1, (models, examples)) + leak * inside


@pytest.mark.parametrize("models", [16, 80])
def test_lira_against_a_slow_loop(models):
    rng = np.random.default_rng(6)
    difficulty, inside, shadows = shadows_of(rng, models, 30, 1.0)
    inside[:, 0] = True  # never left out: nothing to compare with
    inside[1:, 1] = True
    target = difficulty + rng.normal(size=30)
    found = lira_offline(target, shadows, inside)
    out = [shadows[~inside[:, at], at] for at in range(30)]
    known = [at for at in range(30) if len(out[at]) >= 2]
    within = sum(((out[at] - out[at].mean()) ** 2).sum() for at in known) / sum(len(out[at]) - 1 for at in known)
    for at in range(30):
        if len(out[at]) < 2:
            assert np.isnan(found[at])
            continue
        sd = (within if models < 64 else out[at].var(ddof=1)) ** 0.5
        assert found[at] == pytest.approx(norm.cdf((target[at] - np.median(out[at])) / sd))
    assert np.isnan(found[:2]).all() or not inside[0, 1]


def test_lira_finds_what_a_loss_threshold_does_not():
    """Examples differ far more in difficulty than in having been learned from."""
    rng = np.random.default_rng(7)
    n = 3000
    difficulty, inside, shadows = shadows_of(rng, 16, n, 2.0)
    target = difficulty + rng.normal(size=n)
    target[: n // 2] += 2.0
    naive = attack(target[: n // 2], target[n // 2 :])
    scores = lira_offline(target, shadows, inside)
    ours = attack(scores[: n // 2], scores[n // 2 :])
    assert ours["auc"]["ci95"][0] > naive["auc"]["ci95"][1]
    assert ours["tpr_at_1_percent"]["value"] > 3 * naive["tpr_at_1_percent"]["value"]
    nothing = difficulty + rng.normal(size=n)
    scores = lira_offline(nothing, shadows, inside)
    low, high = attack(scores[: n // 2], scores[n // 2 :])["auc"]["ci95"]
    assert low < 0.5 < high
