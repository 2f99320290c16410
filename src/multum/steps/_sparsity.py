r"""Single weights to zero: which are the lowest, which layers are meant, what it brings.

    pattern N:M   of every M consecutive inputs of a row, N stay    (Mishra et al. 2021, arXiv:2104.08378)

Scores and weights are (out, in). Zeros make a file smaller once it is compressed. They do not make a dense kernel faster, and the
notes say so.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn

from ..core.blocks import walk_blocks
from ..core.families import every_block
from ..core.linears import Linear, matrix, shape_of
from ..core.model import Model
from ..core.reporting import report
from ..core.task import Task, calibration
from ..core.training import Precision, on_accelerator
from ..errors import InputError

PIECE = 1 << 16
"""Bytes of one piece, where only a sample is compressed: twice the 32 KiB that DEFLATE looks back."""
SAMPLE = 1 << 23
"""Bytes that are compressed of a large model. All of it would take longer than Wanda itself."""


def lowest(scores: torch.Tensor, sparsity: float) -> torch.Tensor:
    """True at the round(sparsity * n) lowest scores, exactly so many also where scores are equal (the first ones then).

    Args:
        scores: any shape, n entries.
        sparsity: s, 0 to 1.
    """
    return _lowest(scores.reshape(1, -1), round(sparsity * scores.numel())).view_as(scores)


def lowest_of_rows(scores: torch.Tensor, sparsity: float) -> torch.Tensor:
    """`lowest` within each row; the highest of a row always stays."""
    return _lowest(scores, min(round(sparsity * scores.shape[1]), scores.shape[1] - 1))


def _lowest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """True at so many of every row. To find the highest of them takes a third of the time that sorting takes."""
    if count <= 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    bound = scores.kthvalue(count, dim=1, keepdim=True).values
    below, equal = scores < bound, scores == bound
    return below | (equal & (equal.cumsum(1) <= count - below.sum(1, keepdim=True)))


def lowest_of_groups(scores: torch.Tensor, keep: int, of: int) -> torch.Tensor:
    """True at all but the `keep` highest of every `of` consecutive scores of a row; (out, in), `in` a multiple of `of`."""
    groups = scores.reshape(scores.shape[0], -1, of)
    order = groups.argsort(dim=-1, stable=True)
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, order[..., : of - keep], True).view_as(scores)


def parse_pattern(pattern: str) -> tuple[int, int] | None:
    """`"2:4"` -> (2, 4): two of every four weights stay. None when it says nothing sensible."""
    keep, colon, of = pattern.partition(":")
    if not (colon and keep.isdecimal() and of.isdecimal() and 0 < int(keep) < int(of)):
        return None
    return int(keep), int(of)


def sparsity_problems(sparsity: float, pattern: str | None, samples: int = 1) -> list[str]:
    """What is wrong with these fields, each in one sentence."""
    problems = []
    if not 0 <= sparsity <= 1:
        problems.append(f"sparsity is a fraction, 0 to 1 (got {sparsity})")
    if pattern is not None and parse_pattern(pattern) is None:
        problems.append(f"pattern must be N:M with 0 < N < M, for example 2:4 (got {pattern!r})")
    if samples < 1:
        problems.append(f"samples must be at least 1 (got {samples})")
    return problems


def block_linears(model: Model, step: str) -> tuple[dict[str, Linear], dict[str, str]]:
    """The linear layers inside the blocks by name, and for every other one why it is left alone.

    Raises:
        InputError: there are none, or the model is quantized.
    """
    module, every = model.module, model.linears()
    weights = [linear.weight for linear in every.values()]
    if getattr(module, "is_quantized", False) or not all(weight.is_floating_point() for weight in weights):
        raise InputError(f"{step}: the model is already quantized; prune the model it was made from, then quantize the result")
    inside = {part for block in every_block(module) for part in block.modules()}
    linears = {name: linear for name, linear in every.items() if linear in inside}
    if not linears:
        raise InputError(f"{step}: the model has no blocks with linear layers left, so that there is nothing to prune")
    return linears, dict.fromkeys(every.keys() - linears.keys(), "only the blocks are pruned")


def fitting(linears: Mapping[str, Linear], pattern: str | None, skipped: dict[str, str]) -> dict[str, Linear]:
    """The layers that an N:M pattern fits; the others are named in `skipped`."""
    _, of = (parse_pattern(pattern) if pattern else None) or (1, 1)
    unfit = {name: shape_of(linear)[1] for name, linear in linears.items() if shape_of(linear)[1] % of}
    skipped.update({name: f"its {inputs} inputs are no multiple of {of}" for name, inputs in unfit.items()})
    return {name: linear for name, linear in linears.items() if name not in unfit}


def compressed_bytes(tensors: Iterable[torch.Tensor], share: float = 1.0) -> int:
    """Bytes of these tensors after DEFLATE (gzip's method) at its usual level.

    Args:
        share: below 1, evenly spaced pieces of every tensor are compressed, and the result is scaled up.
    """
    flat = (tensor.detach().cpu().contiguous().flatten().view(torch.uint8) for tensor in tensors)
    if share < 1:
        return round(sum(_estimate(part, share) for part in flat if len(part)))
    deflate = zlib.compressobj()
    return sum(len(deflate.compress(part.numpy().tobytes())) for part in flat) + len(deflate.flush())


def _estimate(part: torch.Tensor, share: float) -> float:
    count = math.ceil(len(part) * share / PIECE)
    if count * PIECE < len(part):
        starts = torch.linspace(0, len(part) - PIECE, count, dtype=torch.double).long() // 8 * 8  # whole numbers of weights
        pieces = torch.cat([part[start : start + PIECE] for start in starts.tolist()])
    else:
        pieces = part
    return len(zlib.compress(pieces.numpy().tobytes())) * len(part) / len(pieces)


class Account:
    """Zeros and bytes of weights, before and after they are pruned.

    Args:
        module: the whole model.
        linears: the layers whose weights may change.
        sample: about how many bytes to compress at most; None: all.
    """

    def __init__(self, module: nn.Module, linears: Mapping[str, Linear], sample: int | None = None) -> None:
        self.linears = linears
        ours = {id(linear.weight) for linear in linears.values()}
        others = [part for part in module.parameters() if id(part) not in ours]
        total = sum(part.numel() * part.element_size() for part in module.parameters())
        self.share = min(1.0, sample / total) if sample else 1.0
        self.rest = compressed_bytes(others, self.share)
        self.before = self._bytes()

    def _bytes(self) -> int:
        return self.rest + compressed_bytes((linear.weight for linear in self.linears.values()), self.share)

    def notes(self, skipped: Mapping[str, str]) -> dict[str, Any]:
        """For the history: zeros there are now, their share, bytes when compressed, layers with nothing left, what that means."""
        after, about = self._bytes(), "about " if self.share < 1 else ""
        weights = [linear.weight for linear in self.linears.values()]
        entries, zeros = sum(weight.numel() for weight in weights), sum(int((weight == 0).sum()) for weight in weights)
        sizes = f"{about}{_megabytes(self.before)} -> {_megabytes(after)}"
        emptied = sorted(name for name, linear in self.linears.items() if not bool(linear.weight.any()))
        return {
            "zeros": zeros,
            "sparsity": zeros / entries if entries else 0.0,
            "compressed_bytes": [self.before, after],
            **({"emptied": emptied} if emptied else {}),
            "summary": f"size when compressed: {sizes}, size on disk and speed: unchanged, because dense kernels multiply by zeros "
            f"as by any number{_of_emptied(emptied, len(weights))}",
            "skipped": skipped,
        }


def prune_blocks(
    model: Model,
    task: Task,
    step: str,
    *,
    pattern: str | None,
    samples: int,
    seed: int,
    precision: Precision,
    measure: Callable[[torch.Tensor], torch.Tensor],
    prepare: Callable[[torch.Tensor], torch.Tensor],
    prune: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    solved: bool = False,
) -> dict[str, Any]:
    """Prune every linear layer inside the blocks by what flows into it, block by block, each fed by those already pruned.

    Args:
        model: changed in place.
        task: gives the calibration texts.
        step: its name, for errors.
        pattern: N:M; layers that it does not fit are skipped.
        samples: texts.
        seed: of their choice.
        precision: that the blocks read them in.
        measure: inputs (tokens, features) of one batch -> what is summed over all batches.
        prepare: that sum -> what `prune` takes; called once for layers that read the same.
        prune: weight (out, in) and that -> the new weight.
        solved: whether `prepare` inverts the sum, which takes as many tokens as a matrix has inputs.

    Returns:
        Notes for the history.

    Raises:
        InputError: nothing to prune, too little calibration text, or activations that are no finite numbers.
    """
    linears, skipped = block_linears(model, step)
    account = Account(model.module, linears, SAMPLE)
    chosen = {id(linear): name for name, linear in fitting(linears, pattern, skipped).items()}
    inputs = max((shape_of(linear)[1] for linear in linears.values()), default=0) if solved else 0
    batches = calibration(task, model, samples, seed=seed, step=step, inputs=inputs)
    skipped |= dict.fromkeys(chosen.values(), "no text reaches it")
    with on_accelerator(model.module.eval()):
        for block in walk_blocks(model.module, batches, precision=precision):
            parts = {path: part for path, part in block.module.named_modules() if id(part) in chosen}
            sums = block.sums(list(parts), measure)
            prepared: tuple[torch.Tensor | None, torch.Tensor] = (None, torch.empty(0))
            for path, total in sums.items():
                if not bool(torch.isfinite(total).all()):
                    raise InputError(f"{step}: what flows into {chosen[id(parts[path])]} has numbers that are not finite")
                if total is not prepared[0]:
                    prepared = (total, prepare(total))
                weight = matrix(cast(Linear, parts[path]))
                weight.copy_(prune(weight, prepared[1]))
                skipped[chosen[id(parts[path])]] = "nothing in it was to be pruned"
            report((block.index + 1) / len(every_block(model.module)))
    return {**account.notes(skipped), "calibration_tokens": sum(int(batch["attention_mask"].sum()) for batch in batches)}


def _of_emptied(names: Sequence[str], of: int) -> str:
    return f"; {len(names)} of {of} matrices have no weight left and give nothing but their biases: {names[0]}..." if names else ""


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.3g} MB"
