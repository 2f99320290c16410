"""Movement pruning by reduction: its slopes, their sum, the schedule, and magnitude order where nothing moves."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch.nn.utils import parametrize

from multum.steps._sparsity import lowest
from multum.steps.movement import FIRST, Movement, MovementPruning, cubic


def layer(block=1, sparsity=0.0, shape=(4, 6)):
    torch.manual_seed(0)
    linear = torch.nn.Linear(shape[1], shape[0], bias=False)
    part = Movement(linear.weight, block)
    part.sparsity = sparsity
    parametrize.register_parametrization(linear, "weight", part)
    return linear, part


@pytest.mark.parametrize("sparsity", [0.0, 0.5])
@pytest.mark.parametrize("block", [1, 2])
def test_a_score_has_the_slope_of_its_effective_weights_times_the_weights(block, sparsity):
    """Also where the mask is closed: that is the straight-through estimate."""
    linear, part = layer(block, sparsity)
    x, y = torch.randn(9, 6), torch.randn(9, 4)
    (linear(x) - y).square().sum().backward()
    weight = linear.parametrizations.weight.original
    effective = (weight * part.kept().repeat_interleave(block, 0).repeat_interleave(block, 1)).detach().requires_grad_()
    (torch.nn.functional.linear(x, effective) - y).square().sum().backward()
    slopes = effective.grad * weight.detach()
    wanted = torch.zeros_like(part.scores)
    for i in range(4):
        for j in range(6):
            wanted[i // block, j // block] += slopes[i, j]
    assert torch.allclose(part.scores.grad, wanted, atol=1e-4)
    mask = part.kept().repeat_interleave(block, 0).repeat_interleave(block, 1)
    assert torch.allclose(weight.grad, effective.grad * mask, atol=1e-4)


def test_under_gradient_descent_scores_are_the_sum_of_all_slopes():
    linear, part = layer(sparsity=0.3)
    weight, first = linear.parametrizations.weight.original, part.scores.detach().clone()
    optimizer, total = torch.optim.SGD(linear.parameters(), lr=0.05), torch.zeros(4, 6)
    x, y = torch.randn(20, 6), torch.randn(20, 4)
    for _ in range(5):
        before = weight.detach().clone()
        effective = linear.weight.detach().requires_grad_()
        (slope,) = torch.autograd.grad((torch.nn.functional.linear(x, effective) - y).square().mean(), effective)
        total += slope * before
        optimizer.zero_grad()
        (linear(x) - y).square().mean().backward()
        optimizer.step()
    assert torch.allclose(part.scores.detach(), first - 0.05 * total, atol=1e-6)


def test_a_small_weight_that_grows_stays_and_a_large_one_that_shrinks_goes():
    linear = torch.nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[1.0, 0.1]]))
    part = Movement(linear.weight)
    parametrize.register_parametrization(linear, "weight", part)
    optimizer = torch.optim.SGD(linear.parameters(), lr=0.05)
    x = torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
    for _ in range(10):
        optimizer.zero_grad()
        (linear(x)[:, 0] - x @ torch.tensor([0.3, 2.0])).square().mean().backward()
        optimizer.step()
    part.sparsity = 0.5
    weight = linear.parametrizations.weight.original[0]
    assert part.kept().tolist() == [[False, True]]
    assert linear.weight[0].tolist() == [0.0, weight[1].item()]


def test_the_schedule_is_cubic_between_begin_and_end():
    assert cubic(0.0, 0.9, 0.1, 0.6) == cubic(0.1, 0.9, 0.1, 0.6) == 0.0
    assert cubic(0.6, 0.9, 0.1, 0.6) == cubic(1.0, 0.9, 0.1, 0.6) == 0.9
    assert 1 - cubic(0.35, 0.9, 0.1, 0.6) == pytest.approx(0.1 + 0.9 * 0.5**3)  # v = v_f + (1 - v_f)(1 - 1/2)³
    values = [cubic(i / 50, 0.9, 0.1, 0.6) for i in range(51)]
    assert values == sorted(values)


def test_zeros_stay_zero_and_get_no_slope():
    linear = torch.nn.Linear(6, 4, bias=False)
    with torch.no_grad():
        linear.weight[:, 2] = 0.0
    parametrize.register_parametrization(linear, "weight", Movement(linear.weight))
    linear(torch.randn(5, 6)).square().sum().backward()
    assert not linear.weight[:, 2].any()
    assert not linear.parametrizations.weight.original.grad[:, 2].any()


# -- the step --------------------------------------------------------------------------------------------------------------


def matrices(model):
    return {name: linear.weight.detach() for name, linear in model.linears().items() if "encoder.layer" in name}


def test_with_next_to_no_learning_the_smallest_weights_go():
    model, task = tiny.model(), tiny.task(n_train=32)
    result = MovementPruning(sparsity=0.6, epochs=1, learning_rate=1e-14, weight_decay=0.0)(model, task)
    after = matrices(result)
    for name, weight in matrices(model).items():
        assert torch.equal(after[name] == 0, lowest(weight.abs(), 0.6)), name
        assert torch.allclose(after[name][after[name] != 0], weight[after[name] != 0], atol=1e-6)


def test_learning_changes_what_goes_and_the_sparsity_is_exact():
    model, task = tiny.model(), tiny.task(n_train=64)
    result = MovementPruning(sparsity=0.5, epochs=3, batch_size=16, learning_rate=1e-3)(model, task)
    differs = 0
    for name, weight in matrices(model).items():
        zeros = matrices(result)[name] == 0
        assert int(zeros.sum()) == weight.numel() // 2
        differs += int((zeros != lowest(weight.abs(), 0.5)).sum())
    assert differs > 100
    assert result.history[-1]["sparsity"] == 0.5
    assert "speed: unchanged" in result.history[-1]["summary"]
    assert not any(parametrize.is_parametrized(part) for part in result.module.modules())
    assert not any("scores" in name for name in result.module.state_dict())


def test_blocks_go_whole_and_layers_that_they_do_not_fit_are_only_trained():
    model, task = tiny.model(neurons=28), tiny.task(n_train=32)
    result = MovementPruning(sparsity=0.5, block=8, epochs=1, batch_size=8)(model, task)
    after = matrices(result)
    for name, weight in after.items():
        if 28 in weight.shape:
            assert (weight != 0).all()
            assert name in result.history[-1]["changed"]  # it is trained all the same
        else:
            blocks = (weight == 0).reshape(4, 8, 4, 8)
            assert torch.equal(blocks.all(3).all(1), blocks.any(3).any(1))
            assert int(blocks.all(3).all(1).sum()) == 8


def test_zeros_of_the_model_are_still_zero_afterwards():
    model, task = tiny.model(), tiny.task(n_train=32)
    query = next(iter(matrices(model)))
    with torch.no_grad():
        model.linears()[query].weight[:3] = 0.0
    result = MovementPruning(sparsity=0.2, epochs=1, learning_rate=1e-3)(model, task)
    assert not matrices(result)[query][:3].any()


def test_first_scores_stand_in_the_order_of_magnitudes_and_below_an_update():
    weight = torch.tensor([[3.0, -1.0], [0.5, -2.0]])
    scores = Movement(weight).scores
    assert torch.equal(scores.flatten().argsort(), weight.abs().flatten().argsort())
    assert scores.max().item() == pytest.approx(FIRST)
