"""Removal, adaptation and repair equal what a plain least-squares solver says."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from multum.core.second_order import Order, Repair, adapted, damped, errors_of_removal, removal_order, remove_

UNITS, HIDDEN, TOKENS = 6, 5, 80
WIDTHS = pytest.mark.parametrize("size", [1, 3], ids=["neurons", "heads"])


def problem(size: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """W (hidden, features) and correlated inputs X (tokens, features)."""
    made = torch.Generator().manual_seed(seed)
    features = UNITS * size
    mixing = torch.randn(features, features, generator=made, dtype=torch.double)
    x = torch.randn(TOKENS, features, generator=made, dtype=torch.double) @ mixing
    return torch.randn(HIDDEN, features, generator=made, dtype=torch.double), x


def features_of(units: list[int], size: int) -> list[int]:
    return [unit * size + i for unit in units for i in range(size)]


def rows_of(h: torch.Tensor) -> np.ndarray:
    """Inputs whose Gram matrix is H."""
    return np.linalg.cholesky(h.numpy()).T


def least_squares(weight: torch.Tensor, h: torch.Tensor, kept: list[int]) -> tuple[np.ndarray, float]:
    """The best W on these features alone, zeros elsewhere, and its squared output error."""
    x, w = rows_of(h), weight.numpy()
    best = np.zeros_like(w)
    if kept:
        best[:, kept] = np.linalg.lstsq(x[:, kept], x @ w.T, rcond=None)[0].T
    return best, float(np.square(x @ (w - best).T).sum())


@WIDTHS
def test_rho_is_the_least_squares_error_of_removing_one(size: int) -> None:
    weight, x = problem(size)
    h = damped(x.T @ x)
    scores = errors_of_removal(weight, torch.linalg.inv(h), size)
    exact = [least_squares(weight, h, features_of([u for u in range(UNITS) if u != gone], size))[1] for gone in range(UNITS)]
    np.testing.assert_allclose(scores.numpy(), exact, rtol=1e-6)


@WIDTHS
def test_rho_after_removals_is_the_error_added(size: int) -> None:
    weight, x = problem(size, seed=1)
    h = damped(x.T @ x)
    w, inverse = weight.clone(), torch.linalg.inv(h)
    left = list(range(UNITS))
    for gone in (4, 0, 3):
        before = least_squares(weight, h, features_of(left, size))[1]
        scores = errors_of_removal(w, inverse, size)
        for unit in left:
            after = least_squares(weight, h, features_of([u for u in left if u != unit], size))[1]
            assert float(scores[unit]) == pytest.approx(after - before, rel=1e-6)
        remove_(w, inverse, torch.tensor(features_of([gone], size)))
        left.remove(gone)


@WIDTHS
def test_weights_after_several_removals_are_the_least_squares_weights(size: int) -> None:
    weight, x = problem(size, seed=2)
    h = damped(x.T @ x)
    w, inverse = weight.clone(), torch.linalg.inv(h)
    for gone in ([1], [5, 2]):
        remove_(w, inverse, torch.tensor(features_of(gone, size)))
    assert not w[:, features_of([1, 2, 5], size)].any()  # to the bit
    kept = features_of([0, 3, 4], size)
    exact = least_squares(weight, h, kept)[0]
    np.testing.assert_allclose(w.numpy(), exact, atol=1e-8)
    np.testing.assert_allclose(adapted(weight, x.T @ x, kept).numpy(), exact, atol=1e-8)


@WIDTHS
def test_the_inverse_after_removals_is_that_of_the_rest(size: int) -> None:
    weight, x = problem(size, seed=3)
    h = damped(x.T @ x)
    w, inverse = weight.clone(), torch.linalg.inv(h)
    remove_(w, inverse, torch.tensor(features_of([2, 4], size)))
    kept = features_of([0, 1, 3, 5], size)
    torch.testing.assert_close(inverse[kept][:, kept] @ h[kept][:, kept], torch.eye(len(kept), dtype=torch.double))
    assert not inverse[features_of([2, 4], size)].any()


@WIDTHS
def test_every_removal_takes_the_cheapest(size: int) -> None:
    weight, x = problem(size, seed=4)
    h = damped(x.T @ x)
    order = removal_order(weight, x.T @ x, size)
    left = list(range(UNITS))
    for [gone] in order.removed:
        error = {u: least_squares(weight, h, features_of([v for v in left if v != u], size))[1] for u in left}
        assert error[gone] == pytest.approx(min(error.values()), rel=1e-9)
        left.remove(gone)
    assert left == []


def test_correlated_inputs_change_the_order() -> None:
    # Feature 1 has the greatest weight, but 0 carries the same signal and can stand in for it.
    made = torch.Generator().manual_seed(0)
    x = torch.randn(200, 3, generator=made, dtype=torch.double)
    x[:, 1] = x[:, 0] + 0.01 * x[:, 1]
    weight = torch.tensor([[2.0, 3.0, 1.5]], dtype=torch.double)
    order = removal_order(weight, x.T @ x, 1)
    assert order.removed[0] != [2]
    both = adapted(weight, x.T @ x, [order.removed[1][0], order.removed[2][0]])
    assert float(both[0, 2]) == pytest.approx(1.5, rel=0.05)
    assert float(both.sum()) == pytest.approx(6.5, rel=0.05)


@WIDTHS
def test_with_an_identity_hessian_it_is_magnitude(size: int) -> None:
    weight, _ = problem(size, seed=5)
    gram = torch.eye(weight.shape[1], dtype=torch.double)
    magnitude = weight.square().reshape(HIDDEN, UNITS, size).sum((0, 2))
    order = removal_order(weight, gram, size)
    assert [group[0] for group in order.removed] == magnitude.argsort().tolist()
    scores = errors_of_removal(weight, torch.linalg.inv(gram), size)
    torch.testing.assert_close(scores, magnitude)
    kept = features_of([0, 2], size)
    torch.testing.assert_close(adapted(weight, gram, kept)[:, kept], weight[:, kept])


def test_dead_features_go_first_and_free() -> None:
    weight, x = problem(1, seed=6)
    x[:, [2, 5]] = 0.0
    order = removal_order(weight, x.T @ x, 1)
    assert {group[0] for group in order.removed[:2]} == {2, 5}
    live = [0, 1, 3, 4]
    torch.testing.assert_close(adapted(weight, x.T @ x, live)[:, live], weight[:, live])


@pytest.mark.parametrize("group", [2, 4, 16])
def test_groups_remove_every_unit_once(group: int) -> None:
    weight, x = problem(1, seed=7)
    order = removal_order(weight, x.T @ x, 1, group)
    assert sorted(unit for units in order.removed for unit in units) == list(range(UNITS))
    assert [len(units) for units in order.removed[:-1]] == [group] * (len(order.removed) - 1)
    assert order.counts() == [max(0, UNITS - group * i) for i in range(len(order.removed) + 1)]


def test_kept_never_leaves_more_than_asked() -> None:
    order = Order([[3, 1], [0, 5], [4]], 6)
    assert order.counts() == [6, 4, 2, 1]
    assert [order.kept(count) for count in (6, 5, 4, 3, 2, 1)] == [
        [0, 1, 2, 3, 4, 5],
        [0, 2, 4, 5],
        [0, 2, 4, 5],
        [2, 4],
        [2, 4],
        [2],
    ]


def test_zero_removals_change_nothing() -> None:
    weight, x = problem(1, seed=8)
    order = removal_order(weight, x.T @ x, 1)
    assert order.kept(UNITS) == list(range(UNITS))
    torch.testing.assert_close(adapted(weight, x.T @ x, order.kept(UNITS)), weight)


def test_with_nothing_kept_the_weights_are_zero() -> None:
    weight, x = problem(1, seed=9)
    assert not adapted(weight, x.T @ x, []).any()


def test_the_callers_tensors_and_dtype_stay() -> None:
    weight, x = (t.float() for t in problem(1, seed=10))
    gram = x.T @ x
    before = weight.clone(), gram.clone()
    removal_order(weight, gram, 1)
    assert adapted(weight, gram, [0, 1]).dtype == torch.float32
    assert torch.equal(weight, before[0])
    assert torch.equal(gram, before[1])


def test_everything_stays_on_the_device_it_came_from() -> None:
    weight, gram = torch.empty(HIDDEN, 6, device="meta"), torch.empty(6, 6, device="meta")
    assert adapted(weight, gram, [1, 4]).device == weight.device
    for size in (1, 3):
        assert errors_of_removal(weight.double(), damped(gram), size).device == weight.device
    sums = Repair()
    sums.add(torch.empty(TOKENS, 6, device="meta"), torch.empty(TOKENS, HIDDEN, device="meta"))
    assert all(part.device == weight.device for part in sums.solve())


def ridge(c: np.ndarray, r: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The affine map from C to R with a damped slope and a free intercept."""
    centred = c - c.mean(0)
    penalty = 0.01 * np.square(centred).sum(0).mean()
    design = np.block([[c, np.ones((len(c), 1))], [np.sqrt(penalty) * np.eye(c.shape[1]), np.zeros((c.shape[1], 1))]])
    both = np.linalg.lstsq(design, np.vstack([r, np.zeros((c.shape[1], r.shape[1]))]), rcond=None)[0]
    return both[:-1].T, both[-1]


def test_repair_is_a_ridge_regression_with_a_free_bias() -> None:
    _, x = problem(1, seed=11)
    c = x + 3.0
    r = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(11), dtype=torch.double) + c[:, :HIDDEN] - 2.0
    sums = Repair()
    for part in (slice(0, 7), slice(7, 50), slice(50, TOKENS)):
        sums.add(c[part], r[part])
    weight, bias = sums.solve()
    slope, intercept = ridge(c.numpy(), r.numpy())
    np.testing.assert_allclose(weight.numpy(), slope, atol=1e-8)
    np.testing.assert_allclose(bias.numpy(), intercept, atol=1e-8)


def test_repair_finds_an_affine_lack() -> None:
    made = torch.Generator().manual_seed(12)
    c = torch.randn(5000, 4, generator=made, dtype=torch.double) + 1.0
    slope, intercept = torch.randn(3, 4, generator=made, dtype=torch.double), torch.tensor([0.5, -1.0, 2.0], dtype=torch.double)
    sums = Repair()
    sums.add(c, c @ slope.T + intercept)
    weight, bias = sums.solve()
    torch.testing.assert_close(weight, slope, rtol=0.05, atol=0.05)
    torch.testing.assert_close(bias, intercept, rtol=0.1, atol=0.1)
    assert float((c @ weight.T + bias - c @ slope.T - intercept).mean().abs()) < 1e-9


def test_repair_of_a_whole_layer_changes_nothing() -> None:
    _, x = problem(1, seed=13)
    sums = Repair()
    sums.add(x, torch.zeros(TOKENS, HIDDEN))
    weight, bias = sums.solve()
    assert not weight.any()
    assert not bias.any()


def test_repair_without_features_is_the_mean() -> None:
    lack = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(14), dtype=torch.double)
    sums = Repair()
    sums.add(torch.zeros(30, 0), lack[:30])
    sums.add(torch.zeros(TOKENS - 30, 0), lack[30:])
    weight, bias = sums.solve()
    assert weight.shape == (HIDDEN, 0)
    torch.testing.assert_close(bias, lack.mean(0))
