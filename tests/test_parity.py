"""Whether an export answers as torch does: divergences against closed forms and SciPy, and what is let through."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import expit, softmax
from scipy.stats import entropy

from multum.runtimes._parity import DIVERGENCE, EXACT, as_items, compare, problem


def rows(*shapes: tuple[int, int], seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [3 * rng.normal(size=shape).astype(np.float32) for shape in shapes]


def test_kl_is_a_mean_over_items_of_any_width() -> None:
    shapes = ((1, 4), (2, 7), (5, 3))
    expected, found = rows(*shapes), rows(*shapes, seed=1)
    values, same = [], []
    for one, other in zip(expected, found, strict=True):
        for p, q in zip(one.astype(np.float64), other.astype(np.float64), strict=True):
            values.append(entropy(softmax(p), softmax(q)))
            same.append(p.argmax() == q.argmax())
    parity = compare("single_label", expected, found)
    assert parity["kl_nats"] == pytest.approx(np.mean(values))
    assert parity["worst_kl_nats"] == pytest.approx(max(values))
    assert parity["agreement"] == pytest.approx(np.mean(same))
    assert parity["max_difference"] == pytest.approx(max(np.abs(a - b).max() for a, b in zip(expected, found, strict=True)))


def test_several_labels_are_a_yes_or_no_each() -> None:
    (expected,), (found,) = rows((20, 3)), rows((20, 3), seed=1)
    parity = compare("multi_label", [row[None] for row in expected], [row[None] for row in found])
    yes, there = expit(expected.astype(np.float64)), expit(found.astype(np.float64))
    kl = [entropy([p, 1 - p], [q, 1 - q]) for p, q in zip(yes.ravel(), there.ravel(), strict=True)]
    assert parity["kl_nats"] == pytest.approx(np.mean(kl))
    assert parity["agreement"] == pytest.approx(((yes > 0.5) == (there > 0.5)).mean())
    assert compare("multi_label", [1e3 * expected], [1e3 * expected])["kl_nats"] == 0


def test_numbers_are_compared_with_their_variance() -> None:
    y = np.array([[1.0], [3.0], [5.0]], np.float32)
    parity = compare("regression", list(y[:, None]), list(y[:, None] + np.float32(0.5)))
    assert parity == {"max_difference": 0.5, "unexplained_variance": pytest.approx(0.25 / (8 / 3))}
    same = compare("regression", [y[:1]], [y[:1]])
    assert same["unexplained_variance"] == 0


def test_what_is_let_through() -> None:
    fine = {"max_difference": 5 * EXACT, "agreement": 1.0, "kl_nats": 0.0}
    assert problem("fp32", fine, 5.0) is None
    assert "logits differ by 0.0005 (allowed 0.0001)" in str(problem("fp32", fine, 0.1))
    assert problem("int8", fine, 0.1) is None
    far = {"max_difference": 9.0, "agreement": 0.25, "kl_nats": 2 * DIVERGENCE}
    assert "25 % of the answers agree" in str(problem("int8", far, 5.0))
    assert problem("int8", {"max_difference": 9.0, "agreement": 1.0, "kl_nats": float("nan")}, 5.0)
    assert problem("fp32", {"max_difference": float("nan"), "agreement": 1.0, "kl_nats": 0.0}, 5.0)
    assert problem("int8", {"max_difference": 1.0, "unexplained_variance": DIVERGENCE}, 5.0) is None
    assert "is not explained" in str(problem("int8", {"max_difference": 1.0, "unexplained_variance": 2 * DIVERGENCE}, 5.0))


def test_items_of_every_kind_of_output() -> None:
    values = np.arange(24.0).reshape(1, 6, 4)
    np.testing.assert_array_equal(as_items([values]), values[0])
    np.testing.assert_array_equal(as_items([values[0, :1]]), values[0, :1])
    np.testing.assert_array_equal(as_items([values[..., 0], values[..., 1]]), values[0].T[:2])
