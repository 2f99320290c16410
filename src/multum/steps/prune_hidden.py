r"""Prune channels of the residual stream, the same everywhere: the hidden width of a post-norm encoder.

    S_c = Σ_W Var(X_c) ‖W_c‖² / Σ_c' Var(X_c') ‖W_c'‖²        (fluctuation: FLAP, An et al. 2024, arXiv:2312.11983)
    b <- b + Σ_c W_c mean(X_c)  over the removed c            (its bias compensation)
    γ_c <- cov(n_c, y_c) / var(n_c)     β_c <- mean(y_c) - γ_c mean(n_c)      (norms over fewer channels, see below)

One mask over the channels for embeddings, norms, all matrices and the head is CoFi's z_hidden (Xia et al. 2022, arXiv:2204.00408)
and Minitron's embedding channels (Muralidharan et al. 2024, arXiv:2407.14679). W is every matrix that reads the stream, X (tokens,
hidden) its inputs, W_c its column: S_c sums over the matrices what share of the fluctuation of their outputs goes with the channel.
Minitron ranks by the mean magnitude of what the norms give; behind the sublayers (BERT) much of that is β, alike for every token,
which a bias replaces without loss. So only what varies counts here, as far as a matrix listens to it, and the mean goes into the
bias: all readers of these architectures have one. No gradient and no label.

A norm over fewer channels divides by another deviation. n is the stream before it, normed over the kept channels, y what the whole
norm gave: the least-squares line through both, channel by channel, is its new gain and shift. Where the removed channels are zero
and the mean of the others too, that is γ sqrt(d / d'), and the model answers as before. With keep 1 nothing changes.

The hidden layer of a classification head has features of its own, chosen and made good in the same way.

A cut of the width hurts more than one of heads or neurons. What is left is meant to be repaired: by `reconstruct`, which compares
with the teacher on the kept channels, and by distilling (`distill`, `distill_layers`). Heads keep their size, so that the result
loads after `import multum` and stock transformers refuses it. It takes BERT, DistilBERT, ELECTRA, MPNet, RoBERTa and XLM-R; for
Llama-like models there is `slice_hidden`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional as F

from ..core.blocks import beside
from ..core.channels import Channels, channels_of, keep_channels, nearest_width, obstacle
from ..core.factored import refuse_factored
from ..core.linears import Linear, matrix
from ..core.model import Model
from ..core.second_order import double
from ..core.step import Step
from ..core.task import Batch, Task, calibration
from ..core.training import on_accelerator
from ..errors import InputError

FLAT = 1e-12
"""A channel whose variance behind a norm is less has no line through it; its gain stays what it was."""


class Moments:
    """Mean and variance of rows, summed in double precision."""

    def __init__(self) -> None:
        self.count, self.first, self.second = 0, torch.zeros(()), torch.zeros(())

    def add(self, x: torch.Tensor) -> None:
        """x (rows, channels)."""
        x = double(x)
        self.count += len(x)
        self.first = self.first.to(x.device) + x.sum(0)
        self.second = self.second.to(x.device) + x.square().sum(0)

    @property
    def mean(self) -> torch.Tensor:
        """(channels,)."""
        return self.first / self.count

    @property
    def variance(self) -> torch.Tensor:
        """(channels,)."""
        return (self.second / self.count - self.mean.square()).clamp_min(0.0)


@contextmanager
def _watched(module: nn.Module, paths: Sequence[str]) -> Iterator[dict[str, torch.Tensor]]:
    """What flowed into these parts last."""
    seen: dict[str, torch.Tensor] = {}

    def watch(name: str) -> Any:
        return lambda _, args: seen.__setitem__(name, args[0])

    handles = [module.get_submodule(name).register_forward_pre_hook(watch(name)) for name in paths]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _flows(module: nn.Module, paths: Sequence[str], batches: Sequence[Batch]) -> Iterator[dict[str, torch.Tensor]]:
    """Per batch what flows into these parts, (rows, channels): of every token that is none of padding, or of every text."""
    with _watched(module, paths) as seen:
        for batch in batches:
            batch = beside(module, batch)
            module(**batch)
            mask = batch["attention_mask"].bool()
            yield {name: x[mask] if x.dim() == 3 else x for name, x in seen.items()}
            seen.clear()


@torch.no_grad()
def input_moments(module: nn.Module, readers: Sequence[str], batches: Sequence[Batch]) -> dict[str, Moments]:
    """Mean and variance of what these matrices read."""
    moments = {name: Moments() for name in readers}
    for flows in _flows(module, readers, batches):
        for name, x in flows.items():
            moments[name].add(x)
    return moments


def fluctuation(weight: torch.Tensor, variance: torch.Tensor) -> torch.Tensor:
    """Var(X_c) ‖W_c‖² as shares of their sum, (channels,); zeros where a matrix reads what never varies."""
    lost = variance * double(weight).square().sum(0).to(variance.device)
    return lost / lost.sum().clamp_min(torch.finfo(lost.dtype).tiny)


@torch.no_grad()
def scores(module: nn.Module, moments: Mapping[str, Moments]) -> torch.Tensor:
    """S, (channels,): the sum over matrices of the shares."""
    parts = {name: cast(Linear, module.get_submodule(name)) for name in moments}
    shares = [fluctuation(matrix(parts[name]), each.variance) for name, each in moments.items()]
    return torch.stack(shares).sum(0)


def best(score: torch.Tensor, count: int) -> list[int]:
    """The channels with the highest scores, ascending; of equal ones the first."""
    return sorted(torch.argsort(score, descending=True, stable=True)[:count].tolist())


@torch.no_grad()
def compensate(linear: Any, mean: torch.Tensor, kept: Sequence[int]) -> None:
    """Put into the bias what the channels that are not kept give on the mean, in place."""
    gone = mean.clone()
    gone[list(kept)] = 0.0
    if linear.bias is not None:
        linear.bias += (double(matrix(linear)).to(gone.device) @ gone).to(linear.bias)


@torch.no_grad()
def fitted_norms(
    module: nn.Module, norms: Sequence[str], kept: Sequence[int], batches: Sequence[Batch]
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """γ and β, (kept,), of norms over these channels alone that come nearest to what the whole ones give."""
    index = list(kept)
    of_n, of_y = ({name: Moments() for name in norms} for _ in range(2))
    both: dict[str, torch.Tensor] = {}
    for flows in _flows(module, norms, batches):
        for name, x in flows.items():
            norm: Any = module.get_submodule(name)
            n, y = double(F.layer_norm(x[:, index].float(), (len(index),), eps=norm.eps)), double(norm.forward(x)[:, index])
            of_n[name].add(n)
            of_y[name].add(y)
            both[name] = both.get(name, 0.0) + (n * y).sum(0)
    found = {}
    for name in norms:
        of, to = of_n[name], of_y[name]
        covariance, old = both[name] / of.count - of.mean * to.mean, cast(Any, module.get_submodule(name)).weight[index]
        gamma = torch.where(of.variance < FLAT, old.to(covariance), covariance / of.variance.clamp_min(FLAT))
        found[name] = (gamma, to.mean - gamma * of.mean)
    return found


@torch.no_grad()
def prune(module: Any, where: Channels, width: int, batches: Sequence[Batch]) -> tuple[list[int], float]:
    """Keep `width` channels of the stream, in place: which, and what share of the fluctuation they have."""
    moments = input_moments(module, where.readers, batches)
    score = scores(module, moments)
    kept, features = best(score, width), []
    if where.head:
        output = where.head[1]
        own = input_moments(module, [output], batches)
        features = best(scores(module, own), width)
        compensate(module.get_submodule(output), own[output].mean, features)
    fits = fitted_norms(module, where.norms, kept, batches)
    for name, each in moments.items():
        compensate(module.get_submodule(name), each.mean, kept)
    keep_channels(module, where, kept, features)
    for name, (gamma, beta) in fits.items():
        norm = module.get_submodule(name)
        norm.weight.copy_(gamma)
        norm.bias.copy_(beta)
    return kept, float(score[kept].sum() / score.sum())


@dataclass(frozen=True, kw_only=True)
class PruneHidden(Step):
    """Remove channels of the residual stream, the same ones everywhere: a smaller hidden width."""

    keep: float = 0.75
    """Share of the hidden width that stays, above 0 to 1, rounded to a multiple of 8 and of the number of heads."""
    samples: int = 128
    """Training texts (their labels are not used) that the channels are ranked by."""
    seed: int = 0
    """Seeds the choice of the texts."""

    def check(self) -> list[str]:
        problems = []
        if not 0 < self.keep <= 1:
            problems.append(f"keep is a share of the hidden width, above 0, at most 1 (got {self.keep})")
        if self.samples < 1:
            problems.append(f"samples must be at least 1 (got {self.samples})")
        return problems

    def apply(self, model: Model, task: Task) -> Mapping[str, Any]:
        module = model.module.eval()
        if reason := obstacle(module):
            raise InputError(f"{self.name}: {reason}; for models of the Llama kind there is slice_hidden")
        refuse_factored(module, self.name)
        old = int(module.config.hidden_size)
        try:
            new = nearest_width(module, self.keep)
        except InputError as error:
            raise InputError(*(f"{self.name}: {problem}" for problem in error.problems)) from None
        if new == old:
            return {"hidden": [old, old], "kept_hidden": list(range(old)), "carried": 1.0, "calibration_tokens": 0}
        batches = calibration(task, model, self.samples, seed=self.seed, step=self.name)
        with on_accelerator(module):
            kept, carried = prune(module, channels_of(module, new), new, batches)
        return {
            "hidden": [old, new],
            "kept_hidden": kept,
            "carried": carried,
            "calibration_tokens": sum(int(batch["attention_mask"].sum()) for batch in batches),
        }
