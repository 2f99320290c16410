"""Probabilities and rankings: constructed cases, figures by hand, slow loops, scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import log_softmax, softmax
from sklearn.metrics import average_precision_score, f1_score, matthews_corrcoef, roc_auc_score

from multum.evidence.calibration import (
    bins_of_mass,
    bins_of_width,
    brier,
    calibration,
    calibration_change,
    ece,
    mce,
    nll,
    reliability,
    temperature,
)
from multum.evidence.ranking import Ranked, ranking, ranking_change


def with_confidence(confidence, correct):
    """Logits of two classes, the first one the truth."""
    confidence, correct = np.asarray(confidence, dtype=float), np.asarray(correct, dtype=bool)
    odds = np.log(confidence / (1 - confidence))
    return np.stack([np.where(correct, odds, 0), np.where(correct, 0, odds)], axis=1), np.zeros(len(confidence), dtype=int)


def noisy(n: int, seed: int, classes: int = 3, scale: float = 1.0):
    """Truth drawn from softmax(z), so that z is calibrated; the answers are softmax(scale z)."""
    rng = np.random.default_rng(seed)
    z = rng.normal(scale=1.5, size=(n, classes))
    truth = (softmax(z, axis=1).cumsum(axis=1) > rng.random((n, 1))).argmax(axis=1)
    return scale * z, truth


def test_bins():
    assert bins_of_width(np.array([1e-9, 1 / 15, 1 / 15 + 1e-9, 0.5, 1.0])).tolist() == [0, 0, 1, 7, 14]
    assert bins_of_mass(np.array([0.9, 0.1, 0.5, 0.3]), bins=2).tolist() == [1, 0, 1, 0]
    assert np.bincount(bins_of_mass(np.random.default_rng(0).random(100))).tolist() == [7, 7, 6] * 5


def test_ece_on_constructed_cases():
    """Ten answers at 0.8 of which 8 are right: no error. Ten at 0.95 of which 6 are: 0.35 of half the examples."""
    correct = np.array([1] * 8 + [0] * 2 + [1] * 6 + [0] * 4, dtype=float)
    confidence = np.array([0.8] * 10 + [0.95] * 10)
    bins = bins_of_width(confidence)
    assert ece(confidence[:10], correct[:10], bins[:10]) == pytest.approx(0)
    assert ece(confidence, correct, bins) == pytest.approx(0.35 / 2)
    assert mce(confidence, correct, bins) == pytest.approx(0.35)
    rows = reliability(confidence, correct, bins)
    assert [(row["n"], row["confidence"], row["accuracy"]) for row in rows] == [
        (10, pytest.approx(0.8), 0.8),
        (10, pytest.approx(0.95), 0.6),
    ]
    assert all(row["ci95"][0] < row["accuracy"] < row["ci95"][1] for row in rows)


@pytest.mark.parametrize("bins", [bins_of_width, bins_of_mass])
def test_ece_is_the_loop_over_bins(bins):
    z, truth = noisy(300, seed=1)
    p = softmax(z, axis=1)
    confidence, correct = p.max(axis=1), (p.argmax(axis=1) == truth).astype(float)
    which = bins(confidence)
    slow = sum(
        (which == b).mean() * abs(correct[which == b].mean() - confidence[which == b].mean())
        for b in range(15)
        if (which == b).any()
    )
    assert ece(confidence, correct, which) == pytest.approx(slow)


def test_brier_by_hand():
    p = np.array([[0.7, 0.2, 0.1], [1.0, 0.0, 0.0]])
    assert brier(p, np.array([1, 1])).tolist() == pytest.approx([0.49 + 0.64 + 0.01, 2.0])
    assert brier(p, np.array([0, 0])).tolist() == pytest.approx([0.09 + 0.04 + 0.01, 0.0])


def test_nll_is_the_log_of_the_right_class():
    z, truth = noisy(20, seed=2)
    assert nll(z, truth) == pytest.approx(-np.mean([log_softmax(row)[k] for row, k in zip(z, truth, strict=True)]))


def test_temperature_undoes_what_made_the_answers_too_sure():
    z, truth = noisy(4000, seed=3, scale=3.0)
    t = temperature(z, truth)
    assert t == pytest.approx(3.0, rel=0.1)
    assert temperature(z / 3.0, truth) == pytest.approx(t / 3.0, rel=1e-3)
    assert nll(z / t, truth) <= min(nll(z / (t * 1.02), truth), nll(z / (t * 0.98), truth))


def test_temperature_on_two_classes_in_closed_form():
    """One answer z = 2 over, right in three of four cases: the best probability is 3/4, so T = 2 / log 3."""
    z = np.tile([2.0, 0.0], (4, 1))
    assert temperature(z, np.array([0, 0, 0, 1])) == pytest.approx(2 / np.log(3), rel=1e-3)


def test_calibration_before_and_after_scaling():
    z, truth = noisy(4000, seed=4, scale=3.0)
    found = calibration(z[:2000], truth[:2000], z[2000:], truth[2000:])
    assert found["ece"] > 0.15 > 0.05 > found["scaled"]["ece"]
    assert found["ece_mass"] == pytest.approx(found["ece"], abs=0.02)
    assert found["scaled"]["brier"] < found["brier"]
    assert found["scaled"]["nll"] < found["nll"]
    sure, right = with_confidence([0.9] * 30, [True] * 30)
    found = calibration(sure, right, sure, right)
    assert found["temperature"] is None
    assert found["scaled"]["ece"] == found["ece"]
    assert temperature(*with_confidence([0.9] * 30, [False] * 20 + [True] * 10)) is None


def test_a_change_of_calibration_has_an_interval_that_finds_it():
    z, truth = noisy(1500, seed=5)
    found = calibration_change(z, 3 * z, truth, draws=200, seed=0)
    assert found["ece"]["ci95"][0] > 0.1
    assert found["brier"]["ci95"][0] > 0
    assert found["ece"]["ci95"][0] < found["ece"]["value"] < found["ece"]["ci95"][1]
    same = calibration_change(z, z, truth, draws=20, seed=0)
    assert same["ece"] == same["brier"] == {"value": 0.0, "ci95": [0.0, 0.0]}


def test_auc_is_the_share_of_pairs_in_order():
    z, truth = noisy(80, seed=6, classes=2)
    z = np.round(z)  # with ties
    p = softmax(z, axis=1)[:, 1]
    pairs = [(a > b) + 0.5 * (a == b) for a in p[truth == 1] for b in p[truth == 0]]
    found = ranking(z, truth)
    assert found["auc"] == pytest.approx(np.mean(pairs))
    assert ranking(-z, truth)["auc"] == pytest.approx(1 - found["auc"])


def test_average_precision_mcc_and_f1_by_hand():
    """Ranked right, wrong, right: precision 1 at the first, 2/3 at the second half of recall."""
    z, truth = np.array([[0, 3.0], [0, 2.0], [0, 1.0], [0, -1.0]]), np.array([1, 0, 1, 0])
    found = ranking(z, truth)
    assert found["ap"] == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    assert found["mcc"] == pytest.approx((2 * 1 - 1 * 0) / np.sqrt(3 * 2 * 2 * 1))
    assert found["f1_macro"] == pytest.approx((2 * 2 / (2 + 3) + 2 * 1 / (2 + 1)) / 2)


@pytest.mark.parametrize("classes", [2, 4])
def test_all_of_them_are_scikit_learns_weighted_or_not(classes):
    z, truth = noisy(150, seed=7, classes=classes)
    z = np.round(z, 1)
    p, guess = softmax(z, axis=1), z.argmax(axis=1)
    known = [1] if classes == 2 else range(classes)
    for weight in (np.ones(150), np.random.default_rng(0).integers(0, 4, 150).astype(float)):
        expected = [
            np.mean([roc_auc_score(truth == k, p[:, k], sample_weight=weight) for k in known]),
            np.mean([average_precision_score(truth == k, p[:, k], sample_weight=weight) for k in known]),
            f1_score(truth, guess, average="macro", sample_weight=weight),
            matthews_corrcoef(truth, guess, sample_weight=weight),
        ]
        assert Ranked(z, truth).figures(weight) == pytest.approx(expected)


def test_a_class_that_is_not_there_has_no_ranking():
    z, truth = noisy(200, seed=7)
    some = truth != 2
    p = softmax(z[some], axis=1)
    expected = np.mean([roc_auc_score(truth[some] == k, p[:, k]) for k in (0, 1)])
    assert ranking(z[some], truth[some])["auc"] == pytest.approx(expected)
    assert ranking(z[truth == 0], truth[truth == 0])["auc"] is None


def test_a_change_of_ranking_has_an_interval():
    z, truth = noisy(600, seed=8, classes=2)
    noise = np.random.default_rng(0).normal(scale=3, size=z.shape)
    found = ranking_change(z, z + noise, truth, seed=0, draws=100)
    assert all(one["ci95"][1] < 0 for one in found.values())
    one_class = ranking_change(z[truth == 0], z[truth == 0], truth[truth == 0], seed=0, draws=5)
    assert one_class["auc"] is None
    assert one_class["f1_macro"]["value"] == 0
