r"""Magnitude pruning: the smallest weights become zero (Han et al. 2015, arXiv:1506.02626).

    W_ij <- 0   for the k = round(s n) smallest |W_ij|          (scope: n weights of one matrix, or of all matrices)
    W_ig <- 0   for all but the N largest |W_ig| of every M      (pattern N:M, Mishra et al. 2021, arXiv:2104.08378)

W is (out, in), s the sparsity; a group g of an N:M pattern is M consecutive inputs of one row. Zeros make the file smaller
once it is compressed. They do not make a dense kernel faster, and the notes say so.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from ..core.families import blocks_of
from ..core.model import Model
from ..core.step import Step
from ..core.task import Task


def lowest(scores: torch.Tensor, sparsity: float) -> torch.Tensor:
    """True at the round(sparsity * n) lowest scores, exactly so many also where scores are equal (the first ones then).

    Args:
        scores: any shape, n entries.
        sparsity: s, 0 to 1.
    """
    mask = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    count = round(sparsity * scores.numel())
    mask[scores.flatten().argsort(stable=True)[:count]] = True
    return mask.view_as(scores)


def lowest_of_groups(scores: torch.Tensor, keep: int, of: int) -> torch.Tensor:
    """True at all but the `keep` highest of every `of` consecutive scores of a row; (out, in), `in` a multiple of `of`."""
    groups = scores.reshape(scores.shape[0], -1, of)
    order = groups.argsort(dim=-1, stable=True)
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, order[..., : of - keep], True).view_as(scores)


def lowest_of_all(scores: Sequence[torch.Tensor], sparsity: float) -> list[torch.Tensor]:
    """`lowest` over all matrices together: one mask each, of its shape."""
    mask = lowest(torch.cat([score.flatten() for score in scores]), sparsity)
    parts = mask.split([score.numel() for score in scores])
    return [part.view_as(score) for part, score in zip(parts, scores, strict=True)]


def parse_pattern(pattern: str) -> tuple[int, int] | None:
    """`"2:4"` -> (2, 4): two of every four weights stay. None when it says nothing sensible."""
    keep, colon, of = pattern.partition(":")
    if not (colon and keep.isdecimal() and of.isdecimal() and 0 < int(keep) < int(of)):
        return None
    return int(keep), int(of)


def compressed_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of these tensors after DEFLATE (gzip's method) at its usual level."""
    deflate = zlib.compressobj()
    flat = (tensor.detach().cpu().contiguous().flatten().view(torch.uint8) for tensor in tensors)
    return sum(len(deflate.compress(part.numpy().tobytes())) for part in flat) + len(deflate.flush())


@dataclass(frozen=True, kw_only=True)
class PruneWeights(Step):
    """Set the smallest weights of every block's linear layers to zero. Embeddings and head stay as they are."""

    sparsity: float = 0.5
    """Fraction of the weights that is zero afterwards, 0 to 1."""
    scope: Literal["global", "layer"] = "layer"
    """`layer`: this fraction of every matrix. `global`: of all together, so that matrices of small weights lose more."""
    pattern: str | None = None
    """`N:M`, for example `2:4`: N of every M consecutive weights of a row stay. Takes the place of sparsity and scope."""

    def check(self) -> list[str]:
        problems = []
        if not 0 <= self.sparsity <= 1:
            problems.append(f"sparsity is a fraction, 0 to 1 (got {self.sparsity})")
        if self.scope not in ("global", "layer"):
            problems.append(f"scope must be 'global' or 'layer' (got {self.scope!r})")
        if self.pattern is not None and parse_pattern(self.pattern) is None:
            problems.append(f"pattern must be N:M with 0 < N < M, for example 2:4 (got {self.pattern!r})")
        return problems

    @torch.no_grad()
    def apply(self, model: Model, task: Task) -> Mapping[str, Any]:
        inside = {part for part in blocks_of(model.module).modules() if isinstance(part, nn.Linear)}
        linears = {name: linear for name, linear in model.linears().items() if linear in inside}
        skipped = dict.fromkeys(model.linears().keys() - linears.keys(), "only the blocks are pruned")
        weights = {name: linear.weight for name, linear in linears.items()}
        pruned = {id(weight) for weight in weights.values()}
        rest = compressed_bytes(part for part in model.module.parameters() if id(part) not in pruned)
        before = rest + compressed_bytes(weights.values())
        for name, mask in self._masks(weights, skipped).items():
            weights[name].masked_fill_(mask, 0.0)
            skipped[name] = "nothing in it was small enough"
        after = rest + compressed_bytes(weights.values())
        entries = sum(weight.numel() for weight in weights.values())
        zeros = sum(int((weight == 0).sum()) for weight in weights.values())
        return {
            "zeros": zeros,
            "sparsity": zeros / entries if entries else 0.0,
            "compressed_bytes": [before, after],
            "summary": f"size when compressed: {_megabytes(before)} -> {_megabytes(after)}, size on disk and speed: unchanged",
            "skipped": skipped,
        }

    def _masks(self, weights: Mapping[str, torch.Tensor], skipped: dict[str, str]) -> dict[str, torch.Tensor]:
        """What becomes zero, per layer. Layers that a pattern does not fit are named in `skipped`."""
        scores = {name: weight.abs() for name, weight in weights.items()}
        if self.pattern and (numbers := parse_pattern(self.pattern)):
            keep, of = numbers
            unfit = [name for name, score in scores.items() if score.shape[1] % of]
            skipped.update({name: f"its {scores[name].shape[1]} inputs are no multiple of {of}" for name in unfit})
            return {name: lowest_of_groups(score, keep, of) for name, score in scores.items() if name not in unfit}
        if self.scope == "layer" or not scores:
            return {name: lowest(score, self.sparsity) for name, score in scores.items()}
        return dict(zip(scores, lowest_of_all(list(scores.values()), self.sparsity), strict=True))


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.3g} MB"
