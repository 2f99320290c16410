"""Hard concrete masks against their closed forms and draws; the Lagrangian reaches its target; cutting equals gating."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import tiny
import tiny_families
import torch
import translators

from multum.core.families import blocks_of, family_of
from multum.core.gates import gated
from multum.core.linears import is_linear, shape_of
from multum.core.surgery import head_size, heads_and_neurons, keep_heads, keep_neurons
from multum.errors import InputError
from multum.steps._hard_concrete import BETA, HIGH, LOW, Masks, mask_of, mean_of, open_probability
from multum.steps.l0 import L0, Lagrangian, Trained, cut, unit_weights

pytestmark = pytest.mark.usefixtures("one_thread")
ALPHAS = torch.tensor([-4.0, -1.0, 0.0, 0.7, 3.0], dtype=torch.double)


def some_masks(seed: int = 0, spread: float = 2.0) -> Masks:
    made = Masks([(4, 10), (3, 8), (0, 6)], [(40, 5), (40, 5), (40, 6)], seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(spread * torch.randn(parameter.shape, generator=generator))
    return made


def test_the_mask_is_zero_up_to_the_quantile_and_one_from_the_other():
    """z rises in u, so that P(z > 0) is 1 - u at the place where s (ζ - γ) + γ = 0, and P(z < 1) where it is 1."""
    for log_alpha, probability in zip(ALPHAS, open_probability(ALPHAS), strict=True):
        edge = 1 - probability
        below, above = (mask_of(log_alpha, edge + step) for step in (-1e-6, 1e-6))
        assert below == 0 < above < 1e-3
        last = torch.sigmoid(BETA * torch.tensor((1 - LOW) / (HIGH - 1), dtype=torch.double).log() - log_alpha)
        assert mask_of(log_alpha, last - 1e-6) < 1 == mask_of(log_alpha, last + 1e-6)
        u = torch.rand(1000, generator=torch.Generator().manual_seed(0), dtype=torch.double).sort().values
        assert bool((mask_of(log_alpha, u).diff() >= 0).all())


def test_probability_and_mean_are_those_of_draws():
    u = torch.rand(200_000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    z = mask_of(ALPHAS, u)
    assert torch.allclose((z > 0).double().mean(0), open_probability(ALPHAS), atol=4e-3)
    assert torch.allclose(z.mean(0), mean_of(ALPHAS), atol=4e-3)


@torch.no_grad()
def test_the_expected_size_is_that_of_draws():
    """The closed form against the mean of how many weights are not gated out."""
    masks, sizes = some_masks(), []
    for _ in range(3000):
        heads, neurons = masks.drawn()
        open_units = [[int((gate > 0).sum()) for gate in gates] for gates in (heads, neurons)]
        sizes.append(sum(h * cost[0] + n * cost[1] for h, n, cost in zip(*open_units, masks.costs, strict=True)))
    found = torch.tensor(sizes, dtype=torch.double)
    error = float(found.std()) / math.sqrt(len(found))
    expected = masks.full * (1 - masks.sparsity().item())
    assert abs(float(found.mean()) - expected) < 4 * error
    assert 0.3 < expected / masks.full < 0.8


def test_the_gradient_of_the_sparsity_is_that_of_differences():
    masks = some_masks().double()
    masks.sparsity().backward()
    for parameter in (masks.sublayers, masks.units[0], masks.units[5]):
        before, step = parameter.data.clone(), 1e-5
        values = []
        for sign in (1, -1):
            parameter.data = before.clone()
            parameter.data.view(-1)[1] += sign * step
            values.append(masks.sparsity().item())
        parameter.data = before
        assert float(parameter.grad.view(-1)[1]) == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-4)


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.6, 0.8])
@torch.no_grad()
def test_what_is_kept_is_the_most_probable_that_fits(sparsity):
    masks = some_masks()
    kept, room = masks.kept(sparsity), (1 - sparsity) * masks.full
    assert masks.size(kept) <= room + 1e-6
    chances = masks.probabilities()
    assert kept[2][0] == []
    best = max((float(p), b, h) for b, (heads, _) in enumerate(chances) for h, p in enumerate(heads))
    assert best[2] in kept[best[1]][0]
    for block, (pair, units) in enumerate(zip(chances, kept, strict=True)):
        for kind in (0, 1):
            inside = [float(pair[kind][unit]) for unit in units[kind]]
            outside = [float(p) for unit, p in enumerate(pair[kind]) if unit not in units[kind]]
            assert not inside or not outside or min(inside) >= max(outside)
            if outside:
                assert masks.size(kept) + masks.costs[block][kind] > room
    assert sparsity or masks.size(kept) == masks.full


def test_the_lagrangian_and_its_ascent():
    lagrangian = Lagrangian()
    with torch.no_grad():
        lagrangian.multipliers.copy_(torch.tensor([2.0, 3.0]))
    sparsity = torch.tensor(0.25, requires_grad=True)
    value = lagrangian(sparsity, 0.75)
    value.backward()
    assert value.item() == pytest.approx(2 * -0.5 + 3 * 0.25)
    assert float(sparsity.grad) == pytest.approx(2 + 2 * 3 * -0.5)
    assert torch.allclose(lagrangian.multipliers.grad, torch.tensor([-0.5, 0.25]))
    trained = Trained(some_masks(), 0.1, 0.9, 0)  # all open: ŝ is too low, so λ₁ falls and λ₂ rises
    for parameter in trained.masks.parameters():
        parameter.data.fill_(5.0)
    trained.penalty().backward()
    trained.step()
    first, second = trained.lagrangian.multipliers.tolist()
    assert first == pytest.approx(-0.1, rel=1e-3)
    assert second == pytest.approx(0.1, rel=1e-3)


@pytest.mark.parametrize(("sparsity", "rise"), [(0.3, 50), (0.6, 0), (0.9, 100)])
def test_without_a_loss_the_expected_sparsity_settles_at_its_target(sparsity, rise):
    trained = Trained(some_masks(spread=0.5), 0.1, sparsity, rise)
    targets = []
    for _ in range(400):
        targets.append(trained.target)
        trained.penalty().backward()
        trained.step()
    assert trained.masks.sparsity().item() == pytest.approx(sparsity, abs=0.03)
    assert targets[-1] == sparsity
    assert targets[0] == (0.0 if rise else sparsity)
    assert all(a <= b for a, b in pairwise(targets))


@pytest.mark.parametrize("family", ["bert", "distilbert", *tiny_families.FAMILIES])
def test_the_weights_of_a_unit_are_what_surgery_takes_out(family):
    model = tiny.model(family)
    costs, row, size = unit_weights(model.module), family_of(model.module), head_size(model.module)

    def weights(block: Any) -> int:
        return sum(math.prod(shape_of(part)) for part in block.modules() if is_linear(part))

    for block, (head, neuron), (heads, neurons) in zip(
        blocks_of(model.module), costs, heads_and_neurons(model.module), strict=True
    ):
        before = weights(block)
        keep_heads(block, row, list(range(heads))[1:], size)
        after = weights(block)
        keep_neurons(block, row, list(range(neurons))[2:])
        assert (before - after, after - weights(block)) == (head, 2 * neuron)


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
@torch.no_grad()
def test_cutting_is_gating_with_the_means(family):
    task, model = tiny.task(n_train=8), tiny.model(family, layers=3)
    counts = heads_and_neurons(model.module)
    masks = Masks(counts, unit_weights(model.module), 0)
    generator = torch.Generator().manual_seed(3)
    for parameter in masks.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator))
    kept, means = masks.kept(0.5), masks.means()
    gates: list[list[torch.Tensor]] = [[], []]
    for units, scale in zip(kept, means, strict=True):
        for kind in (0, 1):
            gate = torch.zeros(len(scale[kind]))
            gate[units[kind]] = scale[kind][units[kind]]
            gates[kind].append(gate)
    batches = task.calibration(model, 8)
    with gated(model.module, *gates):
        expected = [model.module(**batch).logits for batch in batches]
    made = model.copy()
    cut(made.module, kept, means)
    assert sum(h for h, _ in heads_and_neurons(made.module)) < sum(h for h, _ in counts)
    for batch, logits in zip(batches, expected, strict=True):
        assert torch.allclose(made.module(**batch).logits, logits, atol=2e-5, rtol=1e-4)


def test_training_reaches_the_sparsity_and_spares_what_is_of_use():
    """Every second neuron has no way out: closing it costs the loss nothing."""
    task, model = tiny.task(n_train=64, n_validation=16), tiny.model("bert", neurons=64)
    with torch.no_grad():
        for block in blocks_of(model.module):
            block.output.dense.weight[:, ::2] = 0.0
            block.output.dense.weight[:, 1::2] *= 3.0
    step = L0(sparsity=0.5, epochs=60, batch_size=16, learning_rate=1e-4, precision="fp32")
    made = step(model, task)
    notes = made.history[-1]
    assert notes["expected_sparsity"] == pytest.approx(0.5, abs=0.05)
    smallest = min(min(pair) for pair in unit_weights(model.module)) / sum(
        h * a + n * b for (h, n), (a, b) in zip(heads_and_neurons(model.module), unit_weights(model.module), strict=True)
    )
    assert 0.5 - 1e-6 <= notes["sparsity"] < 0.5 + smallest
    family = family_of(made.module)
    left = [block.get_submodule(family.down) for block in blocks_of(made.module)]
    dead = sum(int((linear.weight == 0).all(0).sum()) for linear in left if is_linear(linear))
    assert dead < 0.35 * sum(shape_of(linear)[1] for linear in left)


def test_a_teacher_is_learned_from(tmp_path):
    task, model = tiny.task(n_train=32, n_validation=8), tiny.model("bert")
    tiny.model("bert", seed=1).save(tmp_path / "teacher")
    fields = {"sparsity": 0.3, "epochs": 1, "batch_size": 16, "cache": str(tmp_path / "cache")}
    made = L0(**fields, teacher=str(tmp_path / "teacher"))(model, task)
    assert made.history[-1]["teacher_outputs"] == 32
    assert made.fingerprint() != L0(**fields)(model, task).fingerprint()


def test_what_cannot_be_is_refused_before_any_work():
    class Untouched:
        def encode(self, *_: Any) -> Any:
            raise AssertionError("the step worked before it refused")

    with pytest.raises(InputError, match="one stack"):
        L0()(translators.translator("t5"), Untouched())
    with pytest.raises(InputError, match="a single head has"):
        L0(sparsity=0.99)(tiny.model("bert"), Untouched())
