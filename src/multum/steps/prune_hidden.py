r"""Prune channels of the residual stream, the same everywhere: a smaller hidden width.

    S_c = Σ_W Var(X_c) ‖W_c‖² / Σ_c' Var(X_c') ‖W_c'‖²        (fluctuation: FLAP, An et al. 2024, arXiv:2312.11983)
    b <- b + Σ_c W_c mean(X_c)  over the removed c            (its bias compensation)
    γ_c <- cov(n_c, y_c) / var(n_c)     β_c <- mean(y_c) - γ_c mean(n_c)      (norms over fewer channels, see below)

One mask over the channels for embeddings, norms, all matrices and the head is CoFi's z_hidden (Xia et al. 2022, arXiv:2204.00408)
and Minitron's embedding channels (Muralidharan et al. 2024, arXiv:2407.14679). W is every matrix that reads the stream, X (tokens,
hidden) its inputs, W_c its column: S_c sums over the matrices what share of the fluctuation of their outputs goes with the channel.
Minitron ranks by the mean magnitude of what the norms give; much of that is their shift (BERT), alike for every token, which a bias
replaces without loss. So only what varies counts here, as far as a matrix listens to it, and the mean goes into the bias. No
gradient and no label.

A matrix without a bias (ModernBERT's, the head of a causal model) loses the mean as well: there E X_c² takes the place of Var(X_c).
If such a matrix is the only one that reads a last norm with a shift (GPT-2, OPT), that shift takes of the mean what it can: on the
kept channels the smallest δ with the least ‖W_kept δ - Σ_c W_c mean(X_c)‖. With fewer classes than channels that is all of it, with
a vocabulary less. The rest is not made good.

A norm over fewer channels divides by another deviation. n is the stream before it, normed over the kept channels, y what the whole
norm gave: the least-squares line through both, channel by channel, is its new gain and shift; without a shift the line through the
origin, γ_c = E n_c y_c / E n_c². Where the removed channels are zero and the mean of the others too, that is γ sqrt(d / d'), and
the model answers as before. With keep 1 nothing changes. What the removed channels gave to the deviation of one token and not of
another is not made good.

Norms may stand behind the sublayers or before them, with one more behind the last block. Turning the stream to its principal
directions before (`slice_hidden`) would lose less at the same width, but ModernBERT's cannot be turned, because the norm behind its
embeddings has a gain that scales the stream itself, and with GPT-2 and OPT head and embeddings would no longer share a table.

The hidden layer of a classification head has features of its own, chosen and made good in the same way. What DeBERTa reads of
relative positions has the channels of the stream, and its rows are read like tokens.

An encoder-decoder (T5, mT5, BART, mBART, Marian) keeps the same channels in both stacks, which share a table of embeddings. What
reads the encoder counts with the encoder's tokens. The mean that the head loses goes into the bias of the logits, where a model has
one. What transformers computes from the width (`core/width`) is made up for by the table and by the norm that the head reads.

A cut of the width hurts more than one of heads or neurons. What is left is meant to be repaired: by `reconstruct`, which compares
with the teacher on the kept channels, and by distilling (`distill`, `distill_layers`). Heads keep their size, so that the result
loads after `import multum` and stock transformers refuses it, unless heads are pruned until they fill the new width; T5's config
states that size, and it loads anywhere. It takes also BERT, DeBERTa-v2, DistilBERT, ELECTRA, GPT-2, ModernBERT, MPNet, OPT, RoBERTa
and XLM-R; for Llama-like models there is `slice_hidden`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from ..core.blocks import beside, real_tokens
from ..core.channels import Channels, bias_of, channels_of, keep_channels, keep_last, nearest_width, obstacle
from ..core.factored import refuse_factored
from ..core.families import every_block, family_of
from ..core.linears import Linear, matrix
from ..core.model import Model
from ..core.second_order import double
from ..core.step import Step
from ..core.task import Batch, Task, calibration
from ..core.training import on_accelerator
from ..core.width import settle_factors
from ..errors import InputError

FLAT = 1e-12
"""A channel whose variance behind a norm is less has no line through it; its gain stays what it was."""
SMALL = 1e-10
"""Eigenvalues of WᵀW that are a smaller share of the largest count as zero."""


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
    def power(self) -> torch.Tensor:
        """E x², (channels,)."""
        return self.second / self.count

    @property
    def mean(self) -> torch.Tensor:
        """(channels,)."""
        return self.first / self.count

    @property
    def variance(self) -> torch.Tensor:
        """(channels,)."""
        return (self.power - self.mean.square()).clamp_min(0.0)


@contextmanager
def _watched(module: nn.Module, paths: Sequence[str]) -> Iterator[dict[str, list[torch.Tensor]]]:
    """What flowed into these parts, call by call."""
    seen: dict[str, list[torch.Tensor]] = {}

    def watch(name: str) -> Any:
        return lambda _, args: seen.setdefault(name, []).append(args[0])

    handles = [module.get_submodule(name).register_forward_pre_hook(watch(name)) for name in paths]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _flows(module: nn.Module, paths: Sequence[str], batches: Sequence[Batch]) -> Iterator[dict[str, torch.Tensor]]:
    """Per batch what flows into these parts, (rows, channels): of every token that is none of padding; where rows are no tokens
    but texts or positions, of all."""
    inside = {part for block in every_block(module) for part in block.modules()}
    flat = {name for name in paths if module.get_submodule(name) in inside}
    with _watched(module, paths) as seen:
        for batch in batches:
            batch = beside(module, batch)
            module(**batch)
            masks = real_tokens(module, batch, paths)
            yield {name: torch.cat([_rows(x, masks[name], name in flat) for x in calls]) for name, calls in seen.items()}
            seen.clear()


def _rows(x: torch.Tensor, mask: torch.Tensor, flat: bool) -> torch.Tensor:
    """Of x (..., channels) the real tokens' rows, or all where it has none. Told by its shape, not by how many rows there are: so
    many positions may be tabled as a batch has tokens. Inside blocks tokens may stand in one axis (OPT)."""
    mask = mask.flatten(0, -2)  # choices are texts
    if x.shape[:-1] == mask.shape or (flat and x.shape[:-1] == (mask.numel(),)):
        return x.flatten(0, -2)[mask.flatten()]
    return x.flatten(0, -2)


@torch.no_grad()
def input_moments(module: nn.Module, readers: Sequence[str], batches: Sequence[Batch]) -> dict[str, Moments]:
    """Moments of what these matrices read, those that were not run left out."""
    moments: dict[str, Moments] = {}
    for flows in _flows(module, readers, batches):
        for name, x in flows.items():
            moments.setdefault(name, Moments()).add(x)
    return moments


def fluctuation(weight: torch.Tensor, moment: torch.Tensor) -> torch.Tensor:
    """Var(X_c) ‖W_c‖² (or E X_c² ‖W_c‖²) as shares of their sum, (channels,); zeros where that is zero."""
    lost = moment * double(weight).square().sum(0).to(moment.device)
    return lost / lost.sum().clamp_min(torch.finfo(lost.dtype).tiny)


@torch.no_grad()
def scores(module: nn.Module, moments: Mapping[str, Moments]) -> torch.Tensor:
    """S, (channels,): the sum over matrices of the shares, refused where one is no number."""
    shares = []
    for name, each in moments.items():
        linear = cast(Linear, module.get_submodule(name))
        shares.append(fluctuation(matrix(linear), each.power if bias_of(module, name) is None else each.variance))
        if not bool(shares[-1].isfinite().all()):
            raise InputError(f"prune_hidden: {name}, or what flows into it, has numbers that are not finite")
    return torch.stack(shares).sum(0)


def best(score: torch.Tensor, count: int) -> list[int]:
    """The channels with the highest scores, ascending; of equal ones the first."""
    return sorted(torch.argsort(score, descending=True, stable=True)[:count].tolist())


@torch.no_grad()
def compensate(linear: Any, mean: torch.Tensor, kept: Sequence[int], bias: torch.Tensor | None = None) -> None:
    """Put into the bias, which may stand beside the layer, what the channels that are not kept give on the mean, in place."""
    gone, bias = mean.clone(), linear.bias if bias is None else bias
    gone[list(kept)] = 0.0
    if bias is not None:
        bias += (double(matrix(linear)).to(gone.device) @ gone).to(bias)


@torch.no_grad()
def shift_for(linear: Linear, mean: torch.Tensor, kept: Sequence[int]) -> torch.Tensor:
    """δ, (kept,), the smallest shift of the kept channels with the least ‖W_kept δ - Σ_c W_c mean_c‖ over the removed c."""
    weight, index = double(matrix(linear)).to(mean.device), list(kept)
    gram, gone = weight.T @ weight, mean.clone()
    gone[index] = 0.0
    return torch.linalg.pinv(gram[index][:, index], rtol=SMALL, hermitian=True) @ (gram @ gone)[index]


def _bare(norm: nn.Module, kept: Sequence[int]) -> nn.Module:
    """The same norm over these channels, without gain and shift."""
    made: Any = copy.deepcopy(norm).float()
    keep_last(made, kept)
    made.weight.fill_(1.0)
    if getattr(made, "bias", None) is not None:
        made.bias.zero_()
    return cast(nn.Module, made)


@torch.no_grad()
def fitted_norms(
    module: nn.Module, norms: Sequence[str], kept: Sequence[int], batches: Sequence[Batch]
) -> dict[str, tuple[torch.Tensor, torch.Tensor | None]]:
    """γ and β, (kept,), of norms over these channels alone that come nearest to what the whole ones give; β is None where a norm
    has no shift. Norms that were not run are left out."""
    index, bare = list(kept), {name: _bare(module.get_submodule(name), kept) for name in norms}
    of_n, of_y = ({name: Moments() for name in norms} for _ in range(2))
    both: dict[str, torch.Tensor] = {}
    for flows in _flows(module, norms, batches):
        for name, x in flows.items():
            norm: Any = module.get_submodule(name)
            n, y = double(bare[name].forward(x[:, index].float())), double(norm.forward(x)[:, index])
            of_n[name].add(n)
            of_y[name].add(y)
            both[name] = both.get(name, 0.0) + (n * y).sum(0)
    found = {}
    for name in both:
        of, to, norm = of_n[name], of_y[name], module.get_submodule(name)
        shifted = getattr(norm, "bias", None) is not None
        product, spread = both[name] / of.count, of.variance if shifted else of.power
        product = product - of.mean * to.mean if shifted else product
        gamma = torch.where(spread < FLAT, norm.weight[index].to(product), product / spread.clamp_min(FLAT))
        found[name] = (gamma, to.mean - gamma * of.mean if shifted else None)
    return found


@torch.no_grad()
def prune(module: Any, where: Channels, width: int, batches: Sequence[Batch]) -> tuple[list[int], float]:
    """Keep `width` channels of the stream, in place: which, and what share of the fluctuation they have."""
    moments = input_moments(module, where.readers, batches)
    score = scores(module, moments)
    kept, features = best(score, width), []
    fits = fitted_norms(module, where.norms, kept, batches)
    if where.head:
        own = input_moments(module, [where.head.output], batches)[where.head.output]
        features = best(scores(module, {where.head.output: own}), width)
        compensate(module.get_submodule(where.head.output), own.mean, features)
        if where.head.norm:
            fits |= fitted_norms(module, [where.head.norm], features, batches)
    for name, norm in where.shifts.items():
        gamma, beta = fits[norm]
        fits[norm] = gamma, cast(torch.Tensor, beta) + shift_for(module.get_submodule(name), moments[name].mean, kept)
    for name, each in moments.items():
        compensate(module.get_submodule(name), each.mean, kept, bias_of(module, name))
    old = int(module.config.hidden_size)
    keep_channels(module, where, kept, features)
    for name, (gamma, beta) in fits.items():
        part = module.get_submodule(name)
        part.weight.copy_(gamma)
        if beta is not None:
            part.bias.copy_(beta)
    settle_factors(module, old)
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
            instead = "; for this one there is slice_hidden" if family_of(module).free_heads else ""
            raise InputError(f"{self.name}: {reason}{instead}")
        refuse_factored(module, self.name)
        old = int(module.config.hidden_size)
        try:
            new = nearest_width(module, self.keep)
        except InputError as error:
            raise InputError(*(f"{self.name}: {problem}" for problem in error.problems)) from None
        if new == old:
            said = f"nothing was removed: the width nearest to {self.keep:g} of {old} is {old}"
            return {"hidden": [old, old], "kept_hidden": list(range(old)), "carried": 1.0, "calibration_tokens": 0, "summary": said}
        batches = calibration(task, model, self.samples, seed=self.seed, step=self.name)
        with on_accelerator(module):
            kept, carried = prune(module, channels_of(module, new), new, batches)
        return {
            "hidden": [old, new],
            "kept_hidden": kept,
            "summary": f"{new} of {old} channels of the hidden width are left",
            "carried": carried,
            "calibration_tokens": sum(int(batch["attention_mask"].sum()) for batch in batches),
        }
