r"""How far a student's distribution q is from its teacher's p: divergences over the last dimension, of log-probabilities.

    forward KL         KL(p ‖ q) = Σ_i p_i log(p_i / q_i): q must be everywhere that p is
    reverse KL         KL(q ‖ p): q must be nowhere that p is not
    generalized JSD    β KL(p ‖ M) + (1 - β) KL(q ‖ M),  M = β p + (1 - β) q    (GKD: Agarwal et al. 2024, arXiv:2306.13649)
    skew KL            KL(p ‖ α p + (1 - α) q)                                  (DistiLLM: Ko et al. 2024, arXiv:2402.03898)
    skew reverse KL    KL(q ‖ (1 - α) p + α q)                                  (the same)
    ULD                Σ_i |p_(i) - q_(i)|                                       (Boizard et al. 2024, arXiv:2402.12030)

The generalized JSD is 0 at β = 0 and at β = 1, where the paper's convention, followed here, is forward and reverse KL: those are
what JSD / β and JSD / (1 - β) tend to. A small β is therefore a small loss, and β = 0 is not.

In the last, p_(i) is the i-th largest of p, and the shorter of the two is filled up with zeros: the Wasserstein distance of the two
sets of probabilities (times their number), where every token may be taken for every other. It needs no common vocabulary, and
does not know which token is which: it is 0 for any p and q of the same probabilities, in whatever order.

Temperature: p and q are taken as they are. A softened loss (`_outputs.softened_kl`) is T² times the divergence of
p = softmax(z_t / T) and q = softmax(z_s / T), for each of the first five: to second order they are c/2 Σ_i (p_i - q_i)² / p_i, with
c = 1, 1, β(1 - β), (1 - α)², (1 - α)², so their gradient by z_s shrinks with 1 / T², and T² keeps its size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

from ..errors import InputError

Divergence = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(log p, log q), (..., classes) each -> (...), at least 0, and but for ULD 0 only where p = q."""


def forward_kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """KL(p ‖ q): (..., classes) twice -> (...)."""
    return F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)


def reverse_kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """KL(q ‖ p): (..., classes) twice -> (...)."""
    return forward_kl(log_q, log_p)


def jsd(log_p: torch.Tensor, log_q: torch.Tensor, beta: float) -> torch.Tensor:
    """The generalized Jensen-Shannon divergence: (..., classes) twice -> (...).

    Args:
        log_p: the teacher.
        log_q: the student.
        beta: β, the teacher's share in the mixture; 0 is forward KL, 1 reverse KL.
    """
    if beta in (0, 1):
        return reverse_kl(log_p, log_q) if beta else forward_kl(log_p, log_q)
    log_m = _mixture(log_p, log_q, beta)
    return beta * forward_kl(log_p, log_m) + (1 - beta) * forward_kl(log_q, log_m)


def skew_kl(log_p: torch.Tensor, log_q: torch.Tensor, alpha: float) -> torch.Tensor:
    """KL(p ‖ α p + (1 - α) q): (..., classes) twice -> (...); α = 0 is forward KL, and it is never above log(1 / α)."""
    return forward_kl(log_p, _mixture(log_p, log_q, alpha))


def skew_reverse_kl(log_p: torch.Tensor, log_q: torch.Tensor, alpha: float) -> torch.Tensor:
    """KL(q ‖ α q + (1 - α) p): (..., classes) twice -> (...); α = 0 is reverse KL, and it is never above log(1 / α)."""
    return skew_kl(log_q, log_p, alpha)


def uld(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """Σ_i |p_(i) - q_(i)|: (..., classes) and (..., other classes) -> (...), at most 2."""
    p, q = (log.exp().sort(dim=-1, descending=True).values for log in (log_p, log_q))
    width = max(p.shape[-1], q.shape[-1])
    p, q = (F.pad(values, (0, width - values.shape[-1])) for values in (p, q))
    return (p - q).abs().sum(-1)


def _mixture(log_a: torch.Tensor, log_b: torch.Tensor, share: float) -> torch.Tensor:
    """log(share a + (1 - share) b)."""
    return torch.logaddexp(log_a + math.log(share), log_b + math.log1p(-share)) if share else log_b


def divergence_of(given: str | Mapping[str, float]) -> Divergence:
    """A divergence by its name.

    Args:
        given: `"forward_kl"`, `"reverse_kl"`, `"uld"`, `{"jsd": β}` with β from 0 to 1, `{"skew_kl": α}` or
            `{"skew_reverse_kl": α}` with α from 0 to below 1.

    Returns:
        Of those that are forward KL or reverse KL, `forward_kl` or `reverse_kl` itself.

    Raises:
        InputError: it is none of these.
    """
    name, share = (given, None) if isinstance(given, str) else _only_entry(given)
    plain = {"forward_kl": forward_kl, "reverse_kl": reverse_kl, "uld": uld}
    shared: dict[str, tuple[Callable[..., torch.Tensor], dict[float, Divergence], str]] = {
        "jsd": (jsd, {0: forward_kl, 1: reverse_kl}, "beta"),
        "skew_kl": (skew_kl, {0: forward_kl}, "alpha"),
        "skew_reverse_kl": (skew_reverse_kl, {0: reverse_kl}, "alpha"),
    }
    if isinstance(given, str) and given in plain:
        return plain[given]
    if name in shared and isinstance(share, int | float) and not isinstance(share, bool):
        function, limits, letter = shared[name]
        if share in limits:
            return limits[share]
        if 0 < share < 1:
            return partial(function, **{letter: float(share)})
    raise InputError(
        f"divergence is 'forward_kl', 'reverse_kl', {{'jsd': beta}} with beta from 0 to 1, {{'skew_kl': alpha}} or "
        f"{{'skew_reverse_kl': alpha}} with alpha from 0 to below 1, or 'uld' (got {given!r})"
    )


def divergence_problems(given: Any) -> list[str]:
    """What is wrong with the name of a divergence, if anything is."""
    try:
        divergence_of(given)
    except InputError as error:
        return list(error.problems)
    return []


def _only_entry(given: Any) -> tuple[Any, Any]:
    return next(iter(given.items())) if isinstance(given, Mapping) and len(given) == 1 else (None, None)
