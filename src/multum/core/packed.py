r"""Linear layers and embeddings that keep their weights as integers (`codes`), unpacked each time they are read.

In memory and in `model.safetensors` there are integers only: the codes, packed; the scales as the bits of bfloat16 numbers, which
have any magnitude; the zero points as those of float16 numbers, which are exact up to 2048. So no cast of the model to another
type can change a weight.

This saves bytes, not time: torch multiplies with floats, which are made anew for every forward pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from ..errors import InputError
from .codes import CHUNKS, Packing, Quantized, pack, unpack, values
from .linears import Linear, is_linear, shape_of
from .surgery import swap


class Packed(nn.Module):
    """A matrix in integers; what packed layers and tables have in common. Nothing in it can be trained.

    Args:
        rows, inputs: its shape.
        packing: its grid.
        like: whose device and dtype it takes; it computes in that dtype.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    like: torch.Tensor

    def __init__(self, rows: int, inputs: int, packing: Packing, like: torch.Tensor) -> None:
        super().__init__()
        self.rows, self.inputs, self.packing = rows, inputs, packing
        where, groups = like.device, packing.groups(inputs)
        self.register_buffer("codes", torch.zeros(rows, packing.row_bytes(inputs), dtype=torch.uint8, device=where))
        self.register_buffer("scales", torch.zeros(rows, groups, dtype=torch.int16, device=where))
        self.register_buffer("zeros", torch.zeros(rows, groups, dtype=torch.int16, device=where) if packing.zeros else None)
        self.register_buffer("like", torch.empty(0, dtype=like.dtype, device=where), persistent=False)

    def fill(self, quantized: Quantized) -> None:
        """Take these numbers."""
        self.codes.copy_(pack(quantized.codes, self.packing.bits))
        self.scales.copy_(quantized.scales.bfloat16().view(torch.int16))
        if self.zeros is not None:
            self.zeros.copy_(cast(torch.Tensor, quantized.zeros).half().view(torch.int16))

    def read(self, rows: torch.Tensor | None = None, dtype: torch.dtype | None = None) -> torch.Tensor:
        """These rows of W, (..., inputs), or all of it, in this dtype or the layer's; float32 has every number of the grid."""
        parts = (self.codes, self.scales, self.zeros)
        codes, scales, zeros = (part if part is None or rows is None else part[rows] for part in parts)
        assert codes is not None and scales is not None  # noqa: S101, PT018 - only zeros may be missing
        whole = unpack(codes, self.packing.bits, self.inputs)
        z = None if zeros is None else zeros.view(torch.float16).float()
        return values(whole, scales.view(torch.bfloat16).float(), z, self.packing).to(dtype or self.like.dtype)

    @property
    def weight(self) -> torch.Tensor:
        """W, (rows, inputs): computed anew each time, so that writing into it changes nothing."""
        return self.read()


class PackedLinear(Packed):
    """y = x Wᵀ + b, in the place of an `nn.Linear` or a `Conv1D`; `weight` is (out, in) in both cases."""

    def __init__(self, linear: Linear, packing: Packing) -> None:
        super().__init__(*shape_of(linear), packing, linear.weight)
        self.out_features, self.in_features = self.rows, self.inputs
        self.transposed = isinstance(linear, Conv1D)
        self.bias = linear.bias

    @classmethod
    def of(cls, linear: Linear, quantized: Quantized) -> PackedLinear:
        """The layer with these weights and its own bias."""
        new = cls(linear, quantized.packing)
        new.fill(quantized)
        return new.train(linear.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) -> (..., out)."""
        return F.linear(x, self.weight, self.bias)


class PackedEmbedding(Packed):
    """A table of embeddings, of which only the rows that are read are unpacked."""

    num_embeddings: int
    embedding_dim: int
    padding_idx: int | None
    multiplier: float

    def __init__(self, table: nn.Embedding, packing: Packing) -> None:
        super().__init__(table.num_embeddings, table.embedding_dim, packing, table.weight)
        _like_table(self, table)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """(...) -> (..., width)."""
        return self.read(ids) if self.multiplier == 1.0 else self.read(ids) * self.multiplier


class TiedEmbedding(nn.Module):
    """A second way into a packed table, which is stored once: `source` is not a part of this one."""

    source: Packed
    num_embeddings: int
    embedding_dim: int
    padding_idx: int | None
    multiplier: float

    def __init__(self, table: nn.Embedding, source: Packed) -> None:
        super().__init__()
        self.__dict__["source"] = source
        _like_table(self, table)

    @property
    def weight(self) -> torch.Tensor:
        """That of the source."""
        return self.source.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """(...) -> (..., width)."""
        return self.source.read(ids) if self.multiplier == 1.0 else self.source.read(ids) * self.multiplier


class TiedLinear(nn.Module):
    """A linear layer whose matrix is a packed table: the head of a language model with tied embeddings."""

    source: Packed

    def __init__(self, linear: Linear, source: Packed) -> None:
        super().__init__()
        self.__dict__["source"] = source
        self.out_features, self.in_features = shape_of(linear)
        self.bias = linear.bias

    @property
    def weight(self) -> torch.Tensor:
        """That of the source."""
        return self.source.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) -> (..., out)."""
        return F.linear(x, self.weight, self.bias)


class _Scaled(nn.Embedding):
    multiplier = 1.0

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids) * self.multiplier


def _like_table(new: Any, table: Any) -> None:
    """The attributes by which transformers knows a table; Gemma's and BART's multiply what they look up."""
    new.num_embeddings, new.embedding_dim, new.padding_idx = table.num_embeddings, table.embedding_dim, table.padding_idx
    new.multiplier = float(getattr(table, "scalar_embed_scale", getattr(table, "embed_scale", 1.0)))


def is_matrix(part: nn.Module) -> bool:
    """Whether a part is a linear layer of any kind, packed ones included."""
    return is_linear(part) or isinstance(part, PackedLinear | TiedLinear)


def packed_parts(module: nn.Module) -> dict[str, Packed]:
    """All that is packed in a model, by name, each matrix once."""
    return {name: part for name, part in module.named_modules() if isinstance(part, Packed)}


def parameters_of(module: nn.Module) -> int:
    """Number of parameters, tied ones once; a packed weight counts as one, however few bits it has."""
    return sum(p.numel() for p in module.parameters()) + sum(part.rows * part.inputs for part in packed_parts(module).values())


def refuse_packed(module: nn.Module, step: str) -> None:
    """For whatever changes or trains weights.

    Args:
        module: the model.
        step: what was to be done, for the error.

    Raises:
        InputError: some weights are packed, or another library has quantized the model.
    """
    if packed_parts(module) or getattr(module, "is_quantized", False):
        raise InputError(
            f"{step}: the model is already quantized, and integers can be neither cut nor trained; "
            "take the model it was made from, and quantize the result"
        )


def packings(module: nn.Module) -> dict[str, dict[str, Any]]:
    """What `config.json` has to say: name -> bits, group and zeros of a packed part, or `of`, the name of the one it is tied to."""
    names = {id(part): name for name, part in packed_parts(module).items()}
    ties = {name: part for name, part in module.named_modules() if isinstance(part, TiedEmbedding | TiedLinear)}
    own = {name: asdict(part.packing) for name, part in packed_parts(module).items()}
    return own | {name: {"of": names[id(part.source)]} for name, part in ties.items()}


def apply_packings(module: nn.Module, entries: Mapping[str, Mapping[str, Any]]) -> None:
    """Put unfilled packed parts where these entries (see `packings`) say.

    Raises:
        ValueError: there is no linear layer and no table of that name, or a packing that is none.
    """
    parts = dict(module.named_modules())
    for name, entry in sorted(entries.items(), key=lambda item: "of" in item[1]):  # those that others are tied to come first
        part = parts.get(name)
        if part is None or not (is_linear(part) or isinstance(part, nn.Embedding)):
            raise ValueError(f"config.json gives a packing for a layer that this model does not have: {name}")
        if "of" in entry:
            source = module.get_submodule(entry["of"])
            if not isinstance(source, Packed):
                raise ValueError(f"config.json ties {name} to {entry['of']}, which is not packed")
            swap(module, name, TiedLinear(part, source) if is_linear(part) else TiedEmbedding(cast(nn.Embedding, part), source))
            continue
        if entry.get("bits") not in CHUNKS:
            raise ValueError(f"config.json packs {name} with {entry.get('bits')} bits; there are {', '.join(map(str, CHUNKS))}")
        packing = Packing(int(entry["bits"]), int(entry.get("group", 0)), bool(entry.get("zeros", False)))
        swap(module, name, PackedLinear(part, packing) if is_linear(part) else PackedEmbedding(cast(nn.Embedding, part), packing))
    forget_ties(module)


def forget_ties(module: nn.Module) -> None:
    """Have transformers tie no weight that is packed: there is no parameter of that name any more."""
    for part in module.modules():
        ties: dict[str, str] = getattr(part, "all_tied_weights_keys", {})
        for pair in list(ties.items()):
            owners = [part.get_submodule(path.rpartition(".")[0]) for path in pair if path.endswith("weight")]
            if any(isinstance(owner, Packed | TiedEmbedding | TiedLinear) for owner in owners):
                del ties[pair[0]]


@torch.no_grad()
def unpack_(module: nn.Module) -> None:
    """Make packed parts into ordinary ones with the same weights, in place: for exports, which have formats of their own.

    Parts that share a table share it afterwards, as one parameter.
    """
    shared: dict[int, nn.Parameter] = {}
    for name, part in list(module.named_modules()):
        if not isinstance(part, Packed | TiedEmbedding | TiedLinear):
            continue
        source = part if isinstance(part, Packed) else part.source
        if id(source) not in shared:
            weight = source.weight
            weight = weight.T.contiguous() if getattr(part, "transposed", False) else weight
            shared[id(source)] = nn.Parameter(weight)
        swap(module, name, _plain(part, shared[id(source)]).train(part.training))


def _plain(part: Any, weight: nn.Parameter) -> nn.Module:
    if isinstance(part, PackedEmbedding | TiedEmbedding):
        with torch.device("meta"):
            table = _Scaled(part.num_embeddings, part.embedding_dim, part.padding_idx)
        table.multiplier, table.weight = part.multiplier, weight
        return table
    with torch.device("meta"):
        out, in_ = part.out_features, part.in_features
        new: Linear = Conv1D(out, in_) if getattr(part, "transposed", False) else nn.Linear(in_, out, bias=False)
    new.weight, new.bias = weight, part.bias
    return new
