"""Second-order removal and repair of a matrix's input features: pure numerics, tensors in, tensors out.

For W (hidden, features) fed by x, H = Σ x xᵀ over calibration tokens is the Hessian of ½‖ΔW X‖², the squared error of the output.
What the least-squares view gives for one removal is exact (Optimal Brain Surgeon, Hassibi & Stork 1993); ZipLM (arXiv:2302.04089)
writes it for structures of several columns, K-prune (arXiv:2308.03449) for repairing what is left towards another target.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

SIDE = 384
"""Features in a strip of H: wide enough that a product of matrices is as fast as one of whole ones."""


@dataclass(frozen=True)
class Order:
    """The order in which one sublayer loses its structures: `removed[k]` is the k-th group to go."""

    removed: list[list[int]]
    units: int

    def kept(self, count: int) -> list[int]:
        """The units left when at most `count` stay, ascending."""
        gone: set[int] = set()
        for group in self.removed:
            if self.units - len(gone) <= count:
                break
            gone.update(group)
        return [unit for unit in range(self.units) if unit not in gone]

    def counts(self) -> list[int]:
        """Every number of units that can be left, from all to none."""
        sizes = np.cumsum([0, *(len(group) for group in self.removed)])
        return [int(self.units - size) for size in sizes]


def double(x: torch.Tensor) -> torch.Tensor:
    """In double precision where x is, or on the processor if the device has no such numbers (Apple's has not)."""
    return (x.cpu() if x.device.type == "mps" else x).double()


def gram(x: torch.Tensor) -> torch.Tensor:
    """H = Σ x xᵀ of inputs x (tokens, features), in double precision; what mirrors the upper triangle is not computed."""
    x = x.float()
    h = torch.empty(x.shape[1], x.shape[1], device=x.device)
    for start in range(0, len(h), SIDE):
        span, rest = slice(start, start + SIDE), slice(start + SIDE, None)
        h[span, start:] = x[:, span].T @ x[:, start:]
        h[rest, span] = h[span, rest].T
    return double(h)


def damped(gram: torch.Tensor, share: float = 0.01) -> torch.Tensor:
    """H + share · mean(diag H) · I, in double precision, invertible. Dead features count as one damping step."""
    gram = double(gram)
    return gram + torch.eye(len(gram), dtype=gram.dtype, device=gram.device) * (gram.diagonal().mean() * share).clamp_min(1e-8)


def inverse_factor(gram: torch.Tensor, damping: float = 0.01) -> torch.Tensor:
    """U, upper triangular, with UᵀU = (H + damping)⁻¹, in double precision.

    [U_jj]² is the diagonal entry of the inverse of H over the features from j on: what one column costs the columns to its right.
    By R Rᵀ = H with R upper triangular, U = R⁻¹, so that H⁻¹ is never formed. Where H is too near singular for the damping asked
    for, it is taken tenfold until the factor exists.

    Args:
        gram: H, (features, features), finite.
        damping: share of the mean diagonal, above 0.
    """
    while True:
        lower, failed = torch.linalg.cholesky_ex(damped(gram, damping).flip(0, 1))
        if not failed:
            eye = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
            return torch.linalg.solve_triangular(lower.flip(0, 1), eye, upper=True)
        damping *= 10


def removal_order(weight: torch.Tensor, gram: torch.Tensor, size: int, group: int = 1) -> Order:
    """Greedy removal by ρ, structure by structure (or `group` of them at a time), updating W and H⁻¹ in between.

    Args:
        weight: W, (hidden, features).
        gram: H, (features, features).
        size: features per structure: the head size, or 1 for neurons.
        group: structures removed between two updates.
    """
    w, inverse = double(weight).clone(), torch.linalg.inv(damped(gram))
    units = weight.shape[1] // size
    alive = torch.ones(units, dtype=torch.bool, device=w.device)
    removed: list[list[int]] = []
    while alive.any():
        scores = errors_of_removal(w, inverse, size).masked_fill(~alive, torch.inf)
        chosen = torch.topk(scores, min(group, int(alive.sum())), largest=False).indices.sort().values
        features = (chosen[:, None] * size + torch.arange(size, device=w.device)).flatten()
        remove_(w, inverse, features)
        alive[chosen] = False
        removed.append(chosen.tolist())
    return Order(removed, units)


def errors_of_removal(w: torch.Tensor, inverse: torch.Tensor, size: int) -> torch.Tensor:
    """ρ for every structure, (units,). A structure already removed has zero weights and scores 0."""
    units = w.shape[1] // size
    if size == 1:
        return w.square().sum(0) / inverse.diagonal().clamp_min(1e-30)
    blocks = torch.stack([inverse[i * size : (i + 1) * size, i * size : (i + 1) * size] for i in range(units)])
    columns = w.T.reshape(units, size, -1)
    eye = torch.eye(size, dtype=w.dtype, device=w.device) * 1e-12
    return (columns * torch.linalg.solve(blocks + eye, columns)).sum((1, 2))


def remove_(w: torch.Tensor, inverse: torch.Tensor, features: torch.Tensor) -> None:
    """Make W into W + δW and H⁻¹ into that of the rest, in place, after removing `features` (their columns become zero)."""
    across = torch.linalg.solve(inverse[features][:, features], inverse[features])
    w.addmm_(w[:, features], across, alpha=-1)
    inverse.addmm_(inverse[:, features], across, alpha=-1)
    w[:, features] = 0.0
    inverse[features] = 0.0
    inverse[:, features] = 0.0


def adapted(weight: torch.Tensor, gram: torch.Tensor, kept: Sequence[int]) -> torch.Tensor:
    """W (hidden, features) when only the kept features are left and adapt; zeros elsewhere.

    Least squares: argmin ‖W X - W' X_kept‖², damped.
    """
    w, h = double(weight), damped(gram)
    result = torch.zeros_like(w)
    if len(kept):
        index = torch.as_tensor(kept, device=w.device)
        result[:, index] = torch.linalg.solve(h[index][:, index], (w @ h)[:, index].T).T
    return result.to(weight)


@dataclass
class Repair:
    """Streams what a least-squares repair needs: features that are left, and what the output still lacks.

    The lack R is fitted by an affine map of the features C: W <- W + B (S + εI)⁻¹ and b <- b + mean(R) - ΔW mean(C), with S and
    B the centred Σ C Cᵀ and Σ R Cᵀ. With nothing lacking, nothing changes.
    """

    tokens: int = 0
    sums: list[torch.Tensor] = field(default_factory=list)

    def add(self, features: torch.Tensor, lack: torch.Tensor) -> None:
        """Features (tokens, features) and R (tokens, hidden) of one batch."""
        c, r = double(features), double(lack)
        parts = [c.sum(0), r.sum(0), c.T @ c, r.T @ c]
        self.tokens += len(c)
        self.sums = [a + b for a, b in zip(self.sums, parts, strict=True)] if self.sums else parts

    def solve(
        self, damping: float = 0.01, support: torch.Tensor | None = None, *, centred: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """ΔW (hidden, features) and Δb (hidden,).

        Args:
            damping: ε as a share of the mean diagonal of S, above 0.
            support: where ΔW may differ from zero, (hidden, features); None: everywhere.
            centred: False for a layer without a bias: W <- W + B (S + εI)⁻¹ with nothing centred, and Δb is 0.
        """
        c, r, cc, rc = self.sums
        mean_c, mean_r = (c / self.tokens, r / self.tokens) if centred else (torch.zeros_like(c), torch.zeros_like(r))
        if len(c) == 0:
            return rc, mean_r
        s = cc - self.tokens * torch.outer(mean_c, mean_c)
        b = rc - self.tokens * torch.outer(mean_r, mean_c)
        s = damped(s, damping)
        delta = torch.linalg.solve(s, b.T).T if support is None else solve_on_support(s, b, support.to(s.device))
        return delta, mean_r - delta @ mean_c


def solve_on_support(s: torch.Tensor, b: torch.Tensor, support: torch.Tensor) -> torch.Tensor:
    """X, zero outside the support, with (X S)_ij = B_ij on it: for each row the least squares over the features it still has.

    Every row has a system of its own. With K what it has and G what it lacks, the smaller of the two is solved:

        x_K = (S_KK)⁻¹ b_K        or        x = f - (S⁻¹)_:,G ((S⁻¹)_GG)⁻¹ f_G  with  f = S⁻¹ b

    so that half of the features is the dearest case: n³/24 multiply-adds a row or so, against n³/6 for all dense rows together.

    Args:
        s: positive definite, (features, features), double.
        b: (rows, features), double.
        support: True where X may differ from zero, (rows, features).
    """
    x, few = torch.zeros_like(b), support.sum(1) * 2 <= len(s)
    inverse = s if bool(few.all()) else torch.cholesky_inverse(torch.linalg.cholesky(s))
    free = x if bool(few.all()) else b @ inverse
    for i in range(len(b)):
        if few[i]:
            has = support[i].nonzero().flatten()
            x[i, has] = _solve(s, has, b[i, has])
        else:
            gone = (~support[i]).nonzero().flatten()
            x[i] = free[i] - _solve(inverse, gone, free[i, gone]) @ inverse[gone]
            x[i, gone] = 0.0
    return x


def _solve(s: torch.Tensor, features: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """x with S x = b for these features alone."""
    return torch.cholesky_solve(b[:, None], torch.linalg.cholesky(s[features[:, None], features]))[:, 0]
