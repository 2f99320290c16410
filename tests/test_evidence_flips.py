"""Which answers changed, and how far probabilities are apart: against loops, closed forms and scipy's distance."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial.distance import jensenshannon
from scipy.special import softmax

from multum.evidence.flips import agreement, by_confidence, closeness, divergence, flips, loyalty


def logits(seed: int, n: int = 40, classes: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).normal(scale=2, size=(n, classes))


def test_divergence_is_the_sum_over_classes():
    first, second = logits(0), logits(1)
    p, q = softmax(first, axis=1), softmax(second, axis=1)
    slow = [sum(p[i, k] * np.log(p[i, k] / q[i, k]) for k in range(3)) for i in range(40)]
    assert divergence(first, second) == pytest.approx(slow)
    assert divergence(first, first + 5.0) == pytest.approx(0, abs=1e-12)  # a shift of all logits is the same answer


def test_divergence_of_two_classes_in_closed_form():
    """p = 3/4 against q = 1/2."""
    first, second = np.array([[np.log(3), 0.0]]), np.zeros((1, 2))
    assert divergence(first, second)[0] == pytest.approx(0.75 * np.log(1.5) + 0.25 * np.log(0.5))


def test_loyalty_is_one_minus_scipys_distance_and_runs_from_none_to_all():
    p, q = softmax(logits(0), axis=1), softmax(logits(1), axis=1)
    assert loyalty(p, q) == pytest.approx([1 - jensenshannon(a, b, base=2) for a, b in zip(p, q, strict=True)])
    assert loyalty(np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]]))[0] == pytest.approx(0)
    assert loyalty(p, p) == pytest.approx(1)


def test_the_most_confident_come_first():
    assert by_confidence(np.array([True, False, True, True]), np.array([0.5, 0.99, 0.9, 0.7])).tolist() == [2, 3, 0]


def test_every_example_is_counted_once():
    truth = np.array([0, 0, 1, 1, 2, 2])
    before, after = np.eye(3)[[0, 0, 1, 0, 0, 2]], 3 * np.eye(3)[[0, 1, 2, 1, 1, 2]]
    after[2] *= 5
    found = flips(before, after, truth, draws=50, seed=0, examples=5)
    assert {name: found[name] for name in ("both_right", "lost", "gained", "both_wrong", "exchanged")} == {
        "both_right": 2,
        "lost": 2,
        "gained": 1,
        "both_wrong": 1,
        "exchanged": 1,
    }
    assert found["flips"]["value"] == pytest.approx(0.5)
    assert found["examples"] == {"lost": [2, 1], "gained": [3]}
    assert flips(before, after, truth, draws=5, seed=0, examples=1)["examples"]["lost"] == [2]


def test_the_same_answers_are_at_no_distance():
    same = logits(3)
    found = closeness(same, same, draws=50, seed=0)
    assert found["agreement"]["value"] == 1
    assert found["agreement"]["ci95"][0] > 0.9
    assert found["kl_nats"] == {"value": 0.0, "ci95": [0.0, 0.0]}
    assert found["loyalty"]["value"] == pytest.approx(1)


def test_intervals_lie_around_the_figures_and_narrow_with_examples():
    widths = []
    for n in (100, 1600):
        found = closeness(logits(4, n), logits(5, n), draws=400, seed=0)
        for one in found.values():
            assert one["ci95"][0] < one["value"] < one["ci95"][1]
        widths.append(found["kl_nats"]["ci95"][1] - found["kl_nats"]["ci95"][0])
    assert widths[1] == pytest.approx(widths[0] / 4, rel=0.35)
    assert agreement(np.array([0, 1, 1]), np.array([0, 1, 0]))["value"] == pytest.approx(2 / 3)
