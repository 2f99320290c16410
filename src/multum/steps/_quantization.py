r"""Weights to integers: the grid of a matrix, rounding to it, which layers are meant, what it brings.

    with zero points       s = (max(w, 0) - min(w, 0)) / (2^b - 1)        z = round(-min(w, 0) / s)
    symmetric              s = max|w| / (2^(b-1) - 1)                     z = 2^(b-1)
    u = clamp(round(w / s + z), 0, 2^b - 1)

for every group of consecutive inputs w of a row; scales and zero points are the ones that can be stored (`core/codes`), so that
what is chosen here is what is computed with later.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch.nn import functional as F

from ..core.blocks import Block, walk_blocks
from ..core.codes import CHUNKS, Packing, Quantized, as_scales, as_zeros
from ..core.families import every_block
from ..core.linears import Linear, matrix
from ..core.model import Model
from ..core.packed import Packed, packed_parts
from ..core.reporting import report
from ..core.second_order import double
from ..core.task import Batch
from ..core.training import on_accelerator
from ..errors import InputError

SPEED = "speed in torch: no better, the weights are unpacked for every forward pass"


def grouped(weight: torch.Tensor, packing: Packing) -> torch.Tensor:
    """W (rows, inputs) -> (rows, groups, inputs of a group), float32; a shorter last group is filled up with zeros."""
    inputs = weight.shape[1]
    width, groups = packing.width(inputs), packing.groups(inputs)
    return F.pad(weight.float(), (0, groups * width - inputs)).unflatten(1, (groups, width))


def grid(weight: torch.Tensor, packing: Packing) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scales and zero points (None if symmetric), (rows, groups) each, that span the weights of every group.

    Args:
        weight: W, (rows, inputs), finite.
        packing: bits, group, zero points or not.
    """
    w = grouped(weight, packing)
    if not packing.zeros:
        return as_scales(w.abs().amax(-1) / (2 ** (packing.bits - 1) - 1)), None
    low, top = w.amin(-1).clamp(max=0), 2**packing.bits - 1
    scales = as_scales((w.amax(-1).clamp(min=0) - low) / top)
    return scales, as_zeros((-low / scales).round().clamp(0, top))


def encode(weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, packing: Packing) -> Quantized:
    """Every weight at the nearest place of its grid.

    Args:
        weight: W, (rows, inputs).
        scales, zeros: (rows, groups).
        packing: as they were made for.
    """
    middle = 2 ** (packing.bits - 1) if zeros is None else zeros[..., None]
    u = (grouped(weight, packing) / scales[..., None] + middle).round().clamp(0, 2**packing.bits - 1)
    return Quantized(packing, u.to(torch.uint8).flatten(1)[:, : weight.shape[1]], scales, zeros)


def rounded(weight: torch.Tensor, packing: Packing) -> Quantized:
    """Round-to-nearest on the grid that spans the weights."""
    return encode(weight, *grid(weight, packing), packing)


def output_error(weight: torch.Tensor, quantized: Quantized, gram: torch.Tensor) -> float:
    """‖(W - Q) X‖ / ‖W X‖, told by H = X Xᵀ; 0 where nothing flows."""
    w, h = double(weight), double(gram)
    lost, whole = (float(((part @ h) * part).sum()) for part in (w - double(quantized.weight()), w))
    return (max(lost, 0.0) / whole) ** 0.5 if whole > 0 else 0.0


def grid_problems(bits: int, group: int, keep: Sequence[str] = (), samples: int = 1) -> list[str]:
    """What is wrong with these fields, each in one sentence."""
    problems = []
    if bits not in CHUNKS:
        problems.append(f"bits must be 8, 4 or 3 (got {bits})")
    if group < 0 or group == 1:
        problems.append(f"group is a number of inputs that share a scale, 2 or more, or 0 for the whole row (got {group})")
    if isinstance(keep, str):
        problems.append(f"keep is a list of names or patterns, not one text (got {keep!r})")
    if samples < 1:
        problems.append(f"samples must be at least 1 (got {samples})")
    return problems


def float_matrices(model: Model, step: str, keep: Sequence[str]) -> tuple[dict[str, Linear], dict[str, str]]:
    """The linear layers inside the blocks that are to be quantized, by name, and for every other one why it is left alone.

    Args:
        model: with a row in `families`.
        step: its name, for errors.
        keep: names of layers that stay in float, with `*` for anything.

    Raises:
        InputError: blocks that are quantized already or have no linear layers, numbers that are not finite, or a name in `keep`
            that no layer has.
    """
    module, every = model.module, model.linears()
    inside = {part for block in every_block(module) for part in block.modules()}
    if getattr(module, "is_quantized", False) or any(part in inside for part in packed_parts(module).values()):
        raise InputError(f"{step}: the model is already quantized; use this step on the model that it was made from")
    linears = {name: linear for name, linear in every.items() if linear in inside}
    if not linears:
        raise InputError(f"{step}: the model has no blocks with linear layers left, so that there is nothing to quantize")
    problems = [
        f"{step}: keep names {pattern!r}, which no linear layer of the blocks matches; one is called {next(iter(linears))}"
        for pattern in keep
        if not any(fnmatchcase(name, pattern) for name in linears)
    ]
    problems += [
        f"{step}: {name} has weights that are not finite" for name, one in linears.items() if not bool(one.weight.isfinite().all())
    ]
    if problems:
        raise InputError(*problems)
    kept = {name for name in linears if any(fnmatchcase(name, pattern) for pattern in keep)}
    skipped = dict.fromkeys(every.keys() - linears.keys(), "only the blocks are quantized") | dict.fromkeys(kept, "kept in float")
    return {name: linear for name, linear in linears.items() if name not in kept}, skipped


def walk(
    model: Model,
    batches: Sequence[Batch],
    step: str,
    linears: Mapping[str, Linear],
    measure: Callable[[torch.Tensor], torch.Tensor],
    join: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = torch.Tensor.add_,
) -> Iterator[tuple[Block, dict[str, str], dict[str, torch.Tensor]]]:
    """Block by block, each fed by those before as they are by then, what flows into its layers.

    Put `torch.no_grad()` around the loop.

    Yields:
        The block; path in it -> name of the layer; path -> Σ over the batches (or what `join` makes of them) of `measure(x)`,
        x (tokens, inputs), for every layer that a text reaches.

    Raises:
        InputError: a sum is not finite.
    """
    chosen = {id(linear): name for name, linear in linears.items()}
    with on_accelerator(model.module.eval()):
        for block in walk_blocks(model.module, batches):
            names = {path: chosen[id(part)] for path, part in block.module.named_modules() if id(part) in chosen}
            sums = block.sums(list(names), measure, join)
            for path, total in sums.items():
                if not bool(torch.isfinite(total).all()):
                    raise InputError(f"{step}: what flows into {names[path]} has numbers that are not finite")
            yield block, names, sums
            report((block.index + 1) / len(every_block(model.module)))


def summary(before: Mapping[str, Linear], after: Mapping[str, Packed]) -> dict[str, Any]:
    """For the history: bytes of these weights before and after, bits that one takes, and what that means.

    Args:
        before: the layers in float.
        after: those of them that are packed now.
    """
    weights = [matrix(before[name]) for name in after]
    entries, floats = sum(w.numel() for w in weights), sum(w.numel() * w.element_size() for w in weights)
    held = sum(tensor.numel() * tensor.element_size() for part in after.values() for tensor in _stored(part))
    return {
        "weight_bytes": [floats, held],
        "bits_per_weight": round(8 * held / entries, 3) if entries else 0.0,
        "summary": f"{floats / 1e6:.3g} MB in {len(after)} matrices -> {held / 1e6:.3g} MB; {SPEED}",
    }


def _stored(part: Packed) -> list[torch.Tensor]:
    return [tensor for tensor in (part.codes, part.scales, part.zeros) if tensor is not None]
