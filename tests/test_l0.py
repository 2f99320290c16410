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
from transformers import AutoModelForSeq2SeqLM

from multum.core.families import blocks_of, every_block, family_of
from multum.core.gates import places_gated
from multum.core.linears import is_linear, shape_of
from multum.core.sublayers import places_of, units_of
from multum.core.surgery import head_size
from multum.errors import InputError
from multum.steps._hard_concrete import BETA, HIGH, LOW, Masks, mask_of, mean_of, open_probability
from multum.steps.l0 import L0, Lagrangian, Trained, cut, unit_weights

pytestmark = pytest.mark.usefixtures("one_thread")
TWO = ("t5", "bart", "marian")
ALPHAS = torch.tensor([-4.0, -1.0, 0.0, 0.7, 3.0], dtype=torch.double)


def some_masks(seed: int = 0, spread: float = 2.0) -> Masks:
    made = Masks([4, 10, 3, 8, 0, 6], [40, 5, 40, 5, 40, 6], seed)
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
        sizes.append(sum(int((gate > 0).sum()) * cost for gate, cost in zip(masks.drawn(), masks.costs, strict=True)))
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
    kept, room = masks.kept(sparsity, [{0, 2, 4}]), (1 - sparsity) * masks.full
    assert masks.size(kept) <= room + 1e-6
    chances = masks.probabilities()
    assert kept[4] == []
    best = max((float(p), s, head) for s in (0, 2, 4) for head, p in enumerate(chances[s]))
    assert best[2] in kept[best[1]]
    for sublayer, (each, units) in enumerate(zip(chances, kept, strict=True)):
        inside = [float(each[unit]) for unit in units]
        outside = [float(p) for unit, p in enumerate(each) if unit not in units]
        assert not inside or not outside or min(inside) >= max(outside)
        if outside:
            assert masks.size(kept) + masks.costs[sublayer] > room
    assert sparsity or masks.size(kept) == masks.full


@torch.no_grad()
def test_one_unit_of_every_set_comes_first():
    masks = Masks([2, 2, 2], [10, 10, 10])
    for parameter, value in zip(masks.units, (-8.0, 3.0, 2.0), strict=True):
        parameter.fill_(value)
    assert masks.kept(0.5, [{0}, {2}]) == [[0], [0], [0]]
    assert masks.kept(0.5, [set()]) == [[], [0, 1], [0]]


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


def model_of(family: str, layers: int = 2) -> Any:
    return translators.translator(family, layers=layers) if family in TWO else tiny.model(family, layers=layers)


@pytest.mark.parametrize("family", ["bert", "distilbert", *tiny_families.FAMILIES, *TWO])
def test_the_weights_of_a_unit_are_what_surgery_takes_out(family):
    model = model_of(family)
    for place, cost in zip(places_of(model.module), unit_weights(model.module), strict=True):
        before = weights(place.block)
        place.sublayer.keep(place.block, range(1, place.size), head_size(model.module, place.stack.family))
        assert before - weights(place.block) == cost


def weights(block: Any) -> int:
    return sum(math.prod(shape_of(part)) for part in block.modules() if is_linear(part))


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "t5", "bart"])
@torch.no_grad()
def test_cutting_is_gating_with_the_means(family):
    model = model_of(family, layers=3)
    task = translators.translating() if family in TWO else tiny.task(n_train=8)
    places = places_of(model.module)
    masks = Masks([place.size for place in places], unit_weights(model.module), 0)
    generator = torch.Generator().manual_seed(3)
    for parameter in masks.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator))
    kept, means = masks.kept(0.5, [{0}]), masks.means()
    gates = [torch.zeros(len(scale)) for scale in means]
    for gate, units, scale in zip(gates, kept, means, strict=True):
        gate[units] = scale[units]
    batches = task.calibration(model, 8)
    with places_gated(places, gates):
        expected = [model.module(**batch).logits for batch in batches]
    made = model.copy()
    cut(made.module, kept, means)
    assert sum(place.size for place in places_of(made.module)) < sum(place.size for place in places)
    for batch, logits in zip(batches, expected, strict=True):
        assert torch.allclose(made.module(**batch).logits, logits, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", TWO)
def test_both_stacks_are_cut_to_the_weights_asked_for_reload_and_write(family, tmp_path):
    model, task = model_of(family), translators.translating(32, 8)
    made = L0(sparsity=0.6, epochs=1, batch_size=16)(model, task)
    after = units_of(made.module)
    whole, left = (sum(weights(block) for block in every_block(each.module)) for each in (model, made))
    assert left == pytest.approx(0.4 * whole, rel=0.03)
    assert left <= 0.4 * whole + 1
    assert any(block[0] for block in after)
    assert any(block[1] for block in after if len(block) == 3)
    made.save(tmp_path / "model")
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "model")
    ids = task.calibration(made, 4)[0]["input_ids"]
    assert torch.equal(*(m.generate(ids, max_new_tokens=6, do_sample=False) for m in (again, made.module)))


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
    costs = unit_weights(model.module)
    whole = sum(place.size * cost for place, cost in zip(places_of(model.module), costs, strict=True))
    smallest = min(costs) / whole
    assert 0.5 - 1e-6 <= notes["sparsity"] < 0.5 + smallest
    family = family_of(made.module)
    left = [block.get_submodule(family.down) for block in blocks_of(made.module)]
    dead = sum(int((linear.weight == 0).all(0).sum()) for linear in left if is_linear(linear))
    assert dead < 0.35 * sum(shape_of(linear)[1] for linear in left)


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_a_teacher_is_learned_from(family, tmp_path):
    model = model_of(family)
    task = translators.translating(32, 8) if family in TWO else tiny.task(n_train=32, n_validation=8)
    (translators.translator(family, seed=1) if family in TWO else tiny.model(family, seed=1)).save(tmp_path / "teacher")
    fields = {"sparsity": 0.3, "epochs": 1, "batch_size": 16, "cache": str(tmp_path / "cache")}
    made = L0(**fields, teacher=str(tmp_path / "teacher"))(model, task)
    assert made.history[-1]["teacher_outputs"] == 32
    assert made.fingerprint() != L0(**fields)(model, task).fingerprint()


def test_what_cannot_be_is_refused_before_any_work():
    class Untouched:
        def encode(self, *_: Any) -> Any:
            raise AssertionError("the step worked before it refused")

    with pytest.raises(InputError, match="one head of each kind of attention together have"):
        L0(sparsity=0.99)(translators.translator("t5"), Untouched())
    with pytest.raises(InputError, match="a single head has"):
        L0(sparsity=0.99)(tiny.model("bert"), Untouched())
