"""SparseGPT against explicit inverses, plain least squares, magnitude and Wanda."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch
from torch import nn

from multum.core.blocks import walk_blocks
from multum.core.families import blocks_of
from multum.core.second_order import adapted, damped, gram, inverse_factor
from multum.errors import InputError
from multum.steps._sparsity import lowest, lowest_of_groups
from multum.steps.sparsegpt import Sparsegpt, sparsegpt
from multum.steps.wanda import squares, wanda

pytestmark = pytest.mark.usefixtures("one_thread")
SEEDS = pytest.mark.parametrize("seed", range(5))


def problem(rows: int = 5, inputs: int = 16, tokens: int = 60, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """W (rows, inputs) and correlated X (tokens, inputs), double."""
    made = torch.Generator().manual_seed(seed)
    mixing = torch.randn(inputs, inputs, generator=made, dtype=torch.double)
    x = torch.randn(tokens, inputs, generator=made, dtype=torch.double) @ mixing
    return torch.randn(rows, inputs, generator=made, dtype=torch.double), x


@pytest.mark.parametrize("features", [1, 383, 384, 385, 900])
def test_a_gram_matrix_in_strips_is_the_whole_product(features: int) -> None:
    x = torch.randn(50, features, generator=torch.Generator().manual_seed(features))
    found = gram(x)
    torch.testing.assert_close(found, found.T, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found, x.T.double() @ x.double(), rtol=1e-4, atol=1e-4)


def slow(weight: torch.Tensor, h: torch.Tensor, sparsity: float, width: int, keep: int = 0, of: int = 0) -> torch.Tensor:
    """One column at a time, every update at once, with the explicit inverse of what is left of H."""
    w = weight.clone()
    costs = [torch.linalg.inv(h[j:, j:])[0, 0].item() for j in range(len(h))]
    for start in range(0, len(h), width):
        columns = list(range(start, min(start + width, len(h))))
        scores = sorted((w[i, j].item() ** 2 / costs[j], i, j) for i in range(len(w)) for j in columns)
        gone = {(i, j) for _, i, j in scores[: round(sparsity * len(scores))]}
        for j in columns:
            if of and j % of == 0:
                for i in range(len(w)):
                    order = sorted(range(j, j + of), key=lambda k, i=i: w[i, k].item() ** 2 / costs[k])
                    gone |= {(i, k) for k in order[: of - keep]}
            inverse = torch.linalg.inv(h[j:, j:])
            for i in range(len(w)):
                if (i, j) in gone:
                    w[i, j:] -= w[i, j] / inverse[0, 0] * inverse[0]
                    w[i, j] = 0.0
    return w


def error(weight: torch.Tensor, pruned: torch.Tensor, x: torch.Tensor) -> float:
    """‖ΔW X‖²"""
    return float((x.double() @ (pruned - weight).double().T).square().sum())


@SEEDS
def test_the_factor_gives_the_inverse_and_that_of_every_remainder(seed: int) -> None:
    _, x = problem(seed=seed)
    h, u = damped(x.T @ x), inverse_factor(x.T @ x)
    assert torch.equal(u, u.triu())
    assert (u.diagonal() > 0).all()
    torch.testing.assert_close(u.T @ u, torch.linalg.inv(h), rtol=1e-8, atol=1e-10)
    for j in range(len(h)):
        inverse = torch.linalg.inv(h[j:, j:])
        torch.testing.assert_close(u[j, j].square(), inverse[0, 0], rtol=1e-8, atol=0)
        torch.testing.assert_close(u[j, j:] / u[j, j], inverse[0] / inverse[0, 0], rtol=1e-6, atol=1e-8)


@SEEDS
@pytest.mark.parametrize("width", [16, 8, 5])
@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.8])
def test_it_is_the_slow_one(sparsity: float, width: int, seed: int) -> None:
    weight, x = problem(seed=seed)
    pruned = sparsegpt(weight, inverse_factor(x.T @ x), sparsity, columns=width)
    expected = slow(weight, damped(x.T @ x), sparsity, width)
    assert torch.equal(pruned == 0, expected == 0)
    torch.testing.assert_close(pruned, expected, rtol=1e-6, atol=1e-8)


@SEEDS
@pytest.mark.parametrize(("keep", "of"), [(2, 4), (1, 4), (4, 8), (1, 2)])
@pytest.mark.parametrize("columns", [16, 8, 6])
def test_patterns_are_those_of_the_slow_one(keep: int, of: int, columns: int, seed: int) -> None:
    weight, x = problem(seed=seed)
    pruned = sparsegpt(weight, inverse_factor(x.T @ x), 0.0, f"{keep}:{of}", columns=columns)
    torch.testing.assert_close(pruned, slow(weight, damped(x.T @ x), 0.0, 16, keep, of), rtol=1e-6, atol=1e-8)
    assert ((pruned.view(5, -1, of) != 0).sum(-1) == keep).all()


@SEEDS
def test_without_correlations_it_is_magnitude(seed: int) -> None:
    weight, _ = problem(inputs=12, seed=seed)
    for scale in (1.0, 1e-6, 1e6):
        u = inverse_factor(torch.eye(12, dtype=torch.double) * scale)
        assert torch.equal(sparsegpt(weight, u, 0.4), weight.masked_fill(lowest(weight.abs(), 0.4), 0.0))
        assert torch.equal(sparsegpt(weight, u, 0.0, "2:4"), weight.masked_fill(lowest_of_groups(weight.abs(), 2, 4), 0.0))
        halves = [sparsegpt(part, u[:6, :6], 0.4) for part in weight.split(6, dim=1)]
        assert torch.equal(sparsegpt(weight, u, 0.4, columns=6), torch.cat(halves, 1))


@SEEDS
def test_columns_that_all_go_leave_the_least_squares_solution_to_the_rest(seed: int) -> None:
    weight, x = problem(seed=seed)
    weight += weight.sign()
    weight[:, :6] *= 1e-3  # so low that all of these go, whatever the others
    pruned = sparsegpt(weight, inverse_factor(x.T @ x), 6 / 16)
    assert torch.equal(pruned == 0, torch.arange(16).expand(5, 16) < 6)
    assert (pruned - weight)[:, 6:].abs().max() > 1e-4
    torch.testing.assert_close(pruned, adapted(weight, x.T @ x, range(6, 16)), rtol=1e-9, atol=1e-9)
    rows = np.linalg.cholesky(damped(x.T @ x).numpy()).T
    best = np.linalg.lstsq(rows[:, 6:], rows @ weight.numpy().T, rcond=None)[0].T
    np.testing.assert_allclose(pruned[:, 6:].numpy(), best, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("pattern", [None, "2:4"])
@torch.no_grad()
def test_its_error_is_below_that_of_wanda_in_every_layer(pattern: str | None) -> None:
    for family in tiny.FAMILIES:
        model = tiny.model(family, hidden=64, neurons=64)
        batches = tiny.task().calibration(model, 64)
        for block in walk_blocks(model.module, batches):
            parts = {path: part for path, part in block.module.named_modules() if isinstance(part, nn.Linear)}
            flows = [block.flows(batch, list(parts)) for batch in range(len(batches))]
            for path, part in parts.items():
                x = torch.cat([flow[path].input for flow in flows])
                ours = sparsegpt(part.weight, inverse_factor(gram(x)), 0.5, pattern)
                theirs = wanda(part.weight, squares(x).sqrt(), 0.5, pattern)
                assert (ours == 0).sum() == (theirs == 0).sum()
                assert error(part.weight, ours, x) < error(part.weight, theirs, x)


@SEEDS
def test_its_mask_and_updates_are_both_worth_something(seed: int) -> None:
    weight, x = problem(rows=24, inputs=32, tokens=200, seed=seed)
    pruned = sparsegpt(weight, inverse_factor(x.T @ x), 0.5)
    assert error(weight, pruned, x) < error(weight, weight.masked_fill(pruned == 0, 0.0), x)
    assert error(weight, pruned, x) < error(weight, wanda(weight, squares(x).sqrt(), 0.5), x)


@pytest.mark.parametrize("sparsity", [0.0, 1.0])
def test_nothing_and_everything(sparsity: float) -> None:
    weight, x = problem()
    pruned = sparsegpt(weight.float(), inverse_factor(x.T @ x), sparsity)
    assert pruned.dtype == torch.float32
    assert torch.equal(pruned, weight.float() * (1 - sparsity))


@pytest.mark.parametrize("damping", [1e-2, 1e-300])
@pytest.mark.parametrize("kind", ["few tokens", "twins", "dead", "all dead"])
def test_a_singular_h_gives_finite_weights(kind: str, damping: float) -> None:
    weight, x = problem(tokens=3 if kind == "few tokens" else 60)
    if kind == "twins":
        x[:, 8:] = x[:, :8]
    x *= 0.0 if kind == "all dead" else 1e3
    if kind == "dead":
        x[:, [2, 7]] = 0
    pruned = sparsegpt(weight, inverse_factor(x.T @ x, damping), 0.5)
    assert torch.isfinite(pruned).all()
    assert (pruned == 0).sum() == 40
    if kind == "dead":
        assert (pruned[:, [2, 7]] == 0).all()  # they cost nothing
    if kind == "twins":
        assert error(weight, pruned, x) < error(weight, wanda(weight, squares(x).sqrt(), 0.5), x)
    if kind == "all dead":
        assert torch.equal(pruned, weight.masked_fill(lowest(weight.abs(), 0.5), 0.0))


@torch.no_grad()
def test_the_step_prunes_with_what_flows_through_blocks_already_pruned() -> None:
    model, task = tiny.model(layers=2), tiny.task()
    pruned = Sparsegpt(sparsity=0.5, samples=40, damping=0.02, seed=1, precision="fp32")(model, task)
    slow_model = model.copy()
    batches = task.calibration(model, 40, seed=1)
    for block in blocks_of(slow_model.module):
        parts = [part for part in block.modules() if isinstance(part, nn.Linear)]
        seen: dict[nn.Module, list[torch.Tensor]] = {part: [] for part in parts}
        handles = [part.register_forward_pre_hook(lambda part, args, seen=seen: seen[part].append(args[0])) for part in parts]
        for batch in batches:
            slow_model.module(**batch)
        for handle in handles:
            handle.remove()
        for part in parts:
            x = torch.cat([each[batch["attention_mask"].bool()] for each, batch in zip(seen[part], batches, strict=True)]).double()
            part.weight.copy_(slow(part.weight.double(), damped(x.T @ x, 0.02), 0.5, 128))
    for name, linear in pruned.linears().items():
        torch.testing.assert_close(linear.weight, slow_model.linears()[name].weight, rtol=1e-3, atol=1e-4)


def test_damping_must_be_above_zero() -> None:
    for damping in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match="sparsegpt: damping must be above 0"):
            Sparsegpt(damping=damping)


def test_fewer_tokens_than_inputs_are_refused() -> None:
    with pytest.raises(InputError, match=r"^sparsegpt: the calibration texts have \d+ tokens, and 32 inputs .* \(now 1\)"):
        Sparsegpt(samples=1)(tiny.model(), tiny.task())
