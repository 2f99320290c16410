"""The divergences against slow loops, autograd, their limits and their bounds."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from scipy.stats import wasserstein_distance
from torch.nn import functional as F

from multum.errors import InputError
from multum.steps._divergences import (
    Divergence,
    divergence_of,
    forward_kl,
    jsd,
    reverse_kl,
    skew_kl,
    skew_reverse_kl,
    uld,
)
from multum.steps._outputs import binary_kl, softened_kl

GIVEN = ["forward_kl", "reverse_kl", {"jsd": 0.5}, {"jsd": 0.1}, {"skew_kl": 0.1}, {"skew_reverse_kl": 0.3}]
CURVATURE = [1.0, 1.0, 0.25, 0.09, 0.81, 0.49]
"""c of the module's docstring: β(1 - β) and (1 - α)²."""


def logits(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*(shape or (7, 5)), generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3


def log_probabilities(seed: int) -> torch.Tensor:
    return logits(seed).log_softmax(-1)


def kl(a: list[float], b: list[float]) -> float:
    return sum(x * math.log(x / y) for x, y in zip(a, b, strict=True))


def mixed(share: float, a: list[float], b: list[float]) -> list[float]:
    return [share * x + (1 - share) * y for x, y in zip(a, b, strict=True)]


def by_loops(given: object, p: list[float], q: list[float]) -> float:
    if isinstance(given, str):
        return kl(p, q) if given == "forward_kl" else kl(q, p)
    assert isinstance(given, dict)
    ((name, share),) = given.items()
    if name == "jsd":
        m = mixed(share, p, q)
        return share * kl(p, m) + (1 - share) * kl(q, m)
    return kl(p, mixed(share, p, q)) if name == "skew_kl" else kl(q, mixed(share, q, p))


@pytest.mark.parametrize("given", GIVEN, ids=str)
def test_it_is_the_formula(given: object) -> None:
    log_p, log_q = log_probabilities(0), log_probabilities(1)
    values = divergence_of(given)(log_p, log_q)
    assert values.shape == (7,)
    for value, a, b in zip(values.tolist(), log_p.exp().tolist(), log_q.exp().tolist(), strict=True):
        assert value == pytest.approx(by_loops(given, a, b), rel=1e-9)


@pytest.mark.parametrize("given", GIVEN, ids=str)
def test_it_is_above_zero_unless_both_are_the_same(given: object) -> None:
    divergence, log_p = divergence_of(given), log_probabilities(0)
    assert divergence(log_p, log_p).abs().max() < 1e-14
    for seed in range(1, 20):
        assert divergence(log_p, log_probabilities(seed)).min() > 1e-4
    near = (log_p + 1e-3 * logits(3)).log_softmax(-1)
    assert 0 < divergence(log_p, near).min() < 1e-4


@pytest.mark.parametrize("given", GIVEN, ids=str)
def test_the_gradient_is_autograds(given: object) -> None:
    divergence, log_p = divergence_of(given), log_probabilities(0)[:2]
    student = logits(1)[:2].requires_grad_()
    assert torch.autograd.gradcheck(lambda z: divergence(log_p, z.log_softmax(-1)), [student])


def gradient(divergence: Divergence, student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    student = student.clone().requires_grad_()
    softened_kl(student, teacher, temperature, divergence).sum().backward()
    assert student.grad is not None
    return student.grad


def test_the_gradients_of_both_kl_by_hand() -> None:
    z_t, z_s = logits(0), logits(1)
    p, q = z_t.softmax(-1), z_s.softmax(-1)
    assert torch.allclose(gradient(forward_kl, z_s, z_t, 1.0), q - p)
    ratio = q.log() - p.log()
    assert torch.allclose(gradient(reverse_kl, z_s, z_t, 1.0), q * (ratio - (q * ratio).sum(-1, keepdim=True)))


@pytest.mark.parametrize(("given", "curvature"), [*zip(GIVEN, CURVATURE, strict=True)], ids=str)
def test_at_a_high_temperature_all_are_squared_differences_and_t2_keeps_their_size(given: object, curvature: float) -> None:
    z_t, z_s, classes = logits(0), logits(1), 5
    apart = (z_s - z_s.mean(-1, keepdim=True)) - (z_t - z_t.mean(-1, keepdim=True))
    for temperature in (1e3, 1e4):
        found = gradient(divergence_of(given), z_s, z_t, temperature)
        assert torch.allclose(found, curvature * apart / classes, rtol=0.05, atol=0.02)
        value = softened_kl(z_s, z_t, temperature, divergence_of(given))
        assert torch.allclose(value, curvature / 2 * (apart**2).mean(-1), rtol=0.05)


def test_the_limits_of_the_generalized_jsd() -> None:
    log_p, log_q = log_probabilities(0), log_probabilities(1)
    assert torch.equal(jsd(log_p, log_q, 0), forward_kl(log_p, log_q))
    assert torch.equal(jsd(log_p, log_q, 1), reverse_kl(log_p, log_q))
    for small in (1e-5, 1e-6):
        assert torch.allclose(jsd(log_p, log_q, small) / small, forward_kl(log_p, log_q), rtol=2e-2)
        assert torch.allclose(jsd(log_p, log_q, 1 - small) / small, reverse_kl(log_p, log_q), rtol=2e-2)
    assert torch.allclose(jsd(log_p, log_q, 0.3), jsd(log_q, log_p, 0.7))
    assert jsd(log_p, log_q, 0.5).max() <= math.log(2)


def test_skewing_by_nothing_is_plain_and_by_something_bounded() -> None:
    log_p, log_q = log_probabilities(0), log_probabilities(1)
    assert torch.equal(skew_kl(log_p, log_q, 0.0), forward_kl(log_p, log_q))
    assert torch.equal(skew_reverse_kl(log_p, log_q, 0.0), reverse_kl(log_p, log_q))
    far = torch.tensor([[0.0, -800.0], [-800.0, 0.0]], dtype=torch.float64)
    for divergence in (skew_kl, skew_reverse_kl):
        assert torch.allclose(divergence(far, far.flip(0), 0.1), torch.full((2,), math.log(10), dtype=torch.float64))


@pytest.mark.parametrize("given", GIVEN, ids=str)
def test_classes_that_both_rule_out_do_no_harm(given: object) -> None:
    masked = torch.zeros(7, 2).fill_(-1e30)
    student = logits(1).float().requires_grad_()
    few = softened_kl(student, logits(0).float(), 2.0, divergence_of(given))
    many = softened_kl(torch.cat([student, masked], -1), torch.cat([logits(0).float(), masked], -1), 2.0, divergence_of(given))
    assert torch.allclose(few, many, atol=1e-6)
    many.sum().backward()
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize("given", GIVEN, ids=str)
def test_several_labels_are_coins(given: object) -> None:
    z_t, z_s = logits(0), logits(1)
    coins = [torch.stack([z, torch.zeros_like(z)], -1) for z in (z_s, z_t)]
    expected = softened_kl(*coins, 2.0, divergence_of(given)).sum(-1)
    assert torch.allclose(binary_kl(z_s, z_t, 2.0, divergence_of(given)), expected)


def test_names_are_read() -> None:
    assert divergence_of("forward_kl") is divergence_of({"jsd": 0}) is divergence_of({"skew_kl": 0.0}) is forward_kl
    assert divergence_of("reverse_kl") is divergence_of({"jsd": 1.0}) is divergence_of({"skew_reverse_kl": 0}) is reverse_kl
    assert divergence_of("uld") is uld
    made = divergence_of({"jsd": 0.25})
    assert isinstance(made, partial)
    assert made.keywords == {"beta": 0.25}


@pytest.mark.parametrize(
    "given",
    [
        *("kl", "jsd", ["jsd"], {}, 0.5, None, {"forward_kl": 0.5}, {"forward_kl": None}, {"jsd": 0.5, "skew_kl": 0.1}),
        *({"jsd": 1.5}, {"jsd": True}, {"jsd": "0.5"}, {"jsd": math.nan}, {"skew_kl": 1.0}, {"skew_kl": -0.1}),
    ],
    ids=str,
)
def test_other_names_are_refused(given: object) -> None:
    with pytest.raises(InputError, match=r"divergence is 'forward_kl', 'reverse_kl', \{'jsd': beta\} with beta from 0 to 1"):
        divergence_of(given)  # type: ignore[arg-type]


@pytest.mark.parametrize("classes", [5, 8])
def test_uld_is_a_wasserstein_distance_of_sorted_probabilities(classes: int) -> None:
    log_p, log_q = logits(0, 7, classes).log_softmax(-1), log_probabilities(1)
    found = uld(log_p, log_q)
    for value, a, b in zip(found.tolist(), log_p.exp().tolist(), log_q.exp().tolist(), strict=True):
        b = [*b, *[0.0] * (classes - len(b))]
        slow = 0.0
        while a:  # the largest of each, one pair after another
            slow += abs(max(a) - max(b))
            a.remove(max(a))
            b.remove(max(b))
        assert value == pytest.approx(slow, rel=1e-9)
    rows = [[*b, *[0.0] * (classes - 5)] for b in log_q.exp().tolist()]
    expected = [classes * wasserstein_distance(a, b) for a, b in zip(log_p.exp().tolist(), rows, strict=True)]
    assert found.tolist() == pytest.approx(expected, rel=1e-9)
    assert torch.allclose(uld(log_q, log_p), found)


def test_uld_knows_no_order_has_a_bound_and_a_gradient() -> None:
    log_p = log_probabilities(0)
    assert uld(log_p, log_p[:, [3, 1, 4, 0, 2]]).abs().max() < 1e-14
    sure, even = torch.tensor([[0.0, -800.0]]), torch.full((1, 4000), -math.log(4000))
    assert 1.99 < uld(sure, even).item() < 2
    z = logits(1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: uld(log_p, x.log_softmax(-1)), (z,))


def test_the_default_is_torchs_kl() -> None:
    log_p, log_q = log_probabilities(0), log_probabilities(1)
    assert forward_kl(log_p, log_q).sum() == pytest.approx(F.kl_div(log_q, log_p.exp(), reduction="sum").item())
