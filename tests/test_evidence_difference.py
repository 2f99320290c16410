"""Is the difference real: the tests against slow references, closed forms, and how often they are wrong in simulation."""

from __future__ import annotations

from math import comb

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.stats import binomtest, norm

from multum.evidence._bootstrap import bootstrap, mean_interval, weights
from multum.evidence._paired import counts, mcnemar, score_interval, score_statistic
from multum.evidence.difference import bootstrap_interval, difference, equivalence, examples_needed, shown_within

CASES = [(0, 0), (1, 0), (3, 9), (12, 12), (7, 6), (40, 15), (0, 11)]


def answers(lost: int, gained: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    before = np.array([True] * lost + [False] * gained + [True] * (n - lost - gained))
    after = np.array([False] * lost + [True] * gained + [True] * (n - lost - gained))
    return before, after


@pytest.mark.parametrize(("lost", "gained"), CASES)
def test_mcnemar_is_the_binomial_test(lost, gained):
    coins, least = lost + gained, min(lost, gained)
    slow = sum(comb(coins, k) for k in range(least + 1)) / 2**coins
    exact = binomtest(least, coins).pvalue if coins else 1.0
    assert mcnemar(lost, gained, exact=True) == pytest.approx(exact)
    assert mcnemar(lost, gained) == pytest.approx(min(1, 2 * slow - comb(coins, least) / 2**coins))


def test_counts_and_the_score_statistic_at_zero_is_mcnemars():
    assert counts(*answers(4, 9, 50)) == (4, 9, 50)
    assert score_statistic(4, 9, 50, 0.0) == pytest.approx((9 - 4) / np.sqrt(13))
    assert score_statistic(0, 0, 50, 0.0) == 0.0


@pytest.mark.parametrize("delta", [-0.3, -0.05, 0.01, 0.2])
@pytest.mark.parametrize(("lost", "gained"), CASES)
def test_the_score_statistic_uses_the_most_likely_share_of_lost_answers(lost, gained, delta):
    """The closed form of q against a search for the largest likelihood."""
    n = 60

    def unlikely(q: float) -> float:
        shares = ((lost, q), (gained, q + delta), (n - lost - gained, 1 - 2 * q - delta))
        return -sum(count * np.log(max(share, 1e-300)) for count, share in shares if count)

    q = minimize_scalar(unlikely, bounds=(max(0.0, -delta), (1 - delta) / 2), method="bounded", options={"xatol": 1e-10}).x
    expected = (gained - lost - n * delta) / np.sqrt(n * (2 * q + delta * (1 - delta)))
    assert score_statistic(lost, gained, n, delta) == pytest.approx(expected, rel=1e-3)


def test_the_score_interval_ends_where_the_statistic_is_the_quantile():
    z = norm.ppf(0.975)
    for lost, gained in CASES[1:]:
        low, high = score_interval(lost, gained, 80)
        assert score_statistic(lost, gained, 80, low) == pytest.approx(z, abs=1e-6)
        assert score_statistic(lost, gained, 80, high) == pytest.approx(-z, abs=1e-6)
    low, high = score_interval(0, 0, 80)  # no answer differs: a closed form
    assert (low, high) == pytest.approx((-(z**2) / (80 + z**2), z**2 / (80 + z**2)), abs=1e-6)
    low, high = score_interval(80, 0, 80)
    assert low == pytest.approx(-1)
    assert -1 < high < -0.8


def test_the_bootstrap_of_counts_is_the_bootstrap_of_examples():
    before, after = answers(30, 12, 200)
    by_counts = bootstrap_interval(30, 12, 200, draws=20_000, seed=0)
    by_examples = mean_interval(after.astype(float) - before, draws=20_000, seed=1)[:, 0]
    assert by_counts == pytest.approx(by_examples, abs=0.006)
    assert np.mean(by_counts) == pytest.approx(-0.09, abs=0.005)


def test_a_draw_has_as_many_examples_and_serves_every_figure():
    assert all(weight.sum() == 17 for weight in weights(17, 5, seed=0))
    values = np.random.default_rng(0).normal(size=100)
    ends = bootstrap(lambda weight: np.array([weight @ values / 100, weight @ (values + 1) / 100]), 100, 500, seed=3)
    assert np.allclose(ends[:, 1] - ends[:, 0], 1)
    expected = values.mean() + norm.ppf([0.025, 0.975]) * values.std() / 10
    assert np.allclose(ends[:, 0], expected, atol=0.03)


@pytest.mark.parametrize(("lost", "gained"), [(0.06, 0.06), (0.10, 0.04)])
def test_intervals_hold_the_true_difference_about_as_often_as_they_say(lost, gained):
    """2,000 data sets of 400: 95 % within three standard errors of the simulation (1.5 points)."""
    drawn = np.random.default_rng(7).multinomial(400, [lost, gained, 1 - lost - gained], size=2000)
    for interval in (
        lambda b, c: score_interval(b, c, 400),
        lambda b, c: bootstrap_interval(b, c, 400, draws=400, seed=int(b * 1000 + c)),
    ):
        ends = np.array([interval(int(b), int(c)) for b, c, _ in drawn])
        held = ((ends[:, 0] <= gained - lost) & (gained - lost <= ends[:, 1])).mean()
        assert 0.935 <= held <= 0.97


def test_equality_is_rarely_shown_where_the_difference_is_the_margin_and_a_difference_where_there_is_none():
    """True difference at the margin: at most 5 % (+ 1.5) are called equal. None: at most 5 % (+ 1.5) are called different."""
    at_margin = np.random.default_rng(8).multinomial(500, [0.08, 0.05, 0.87], size=2000)
    called = np.mean([equivalence(int(b), int(c), 500, 0.03) < 0.05 for b, c, _ in at_margin])
    assert 0.03 <= called <= 0.065
    equal = np.random.default_rng(9).multinomial(500, [0.06, 0.06, 0.88], size=2000)
    called = np.mean([mcnemar(int(b), int(c)) < 0.05 for b, c, _ in equal])
    assert 0.03 <= called <= 0.065


def test_the_least_margin_shown_is_where_the_two_tests_turn():
    reach = shown_within(14, 20, 900)
    assert equivalence(14, 20, 900, reach * 1.001) < 0.05 < equivalence(14, 20, 900, reach * 0.999)


def test_as_many_examples_as_are_said_to_be_needed_show_equality_in_four_of_five():
    n = examples_needed(0.1, 0.02)
    drawn = np.random.default_rng(10).multinomial(n, [0.05, 0.05, 0.9], size=1000)
    shown = np.mean([equivalence(int(b), int(c), n, 0.02) < 0.05 for b, c, _ in drawn])
    assert 0.76 <= shown <= 0.84
    n = examples_needed(0.0, 0.02)
    assert equivalence(0, 0, n, 0.02) < 0.05 < equivalence(0, 0, n - 2, 0.02)


@pytest.mark.parametrize(
    ("lost", "gained", "n", "verdict", "within"),
    [
        (80, 30, 2000, "lower", False),
        (30, 80, 2000, "higher", False),
        (30, 31, 2000, "equal", True),
        (100, 110, 1000, "not shown", False),
        (40, 20, 9000, "lower", True),
        (0, 0, 2000, "equal", True),
        (0, 0, 50, "not shown", False),
    ],
)
def test_the_verdict(lost, gained, n, verdict, within):
    found = difference(*answers(lost, gained, n), margin=0.01, draws=200, seed=0)
    assert (found["verdict"], found["within_margin"]) == (verdict, within)
    assert found["value"] == pytest.approx(found["after"] - found["before"]) == pytest.approx((gained - lost) / n)
    assert (found["needed"] is None) == (verdict != "not shown")
    assert found["needed"] is None or found["needed"] > n
