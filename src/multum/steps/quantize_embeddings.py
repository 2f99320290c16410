r"""Tables of embeddings as integers, by default of 8 bits with a scale for every row, without data.

    u = round(w / s)          s = max|w| / (2^(b-1) - 1)          w̃ = s u

for every row w, or every group of it. Words make up a fifth of BERT-base, half of a multilingual model and most of a small one
that was pruned, and what quantizes linear layers leaves them in float. Looking a word up unpacks its row alone. A head over the
vocabulary that is tied to the table stays tied: it is stored once, and computed from the same integers; one of its own is
quantized in the same way. A head unpacks the whole table for every forward pass, so that bytes fall and time does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from ..core.codes import Packing, Quantized
from ..core.linears import Linear, is_linear, matrix
from ..core.model import Model
from ..core.packed import PackedEmbedding, PackedLinear, TiedEmbedding, TiedLinear, forget_ties, packed_parts
from ..core.step import Step
from ..core.surgery import swap
from ..core.task import Task
from ..errors import InputError
from ._quantization import grid_problems, rounded


@dataclass(frozen=True, kw_only=True)
class QuantizeEmbeddings(Step):
    """Store the tables of embeddings, and a head over the vocabulary, as integers; takes no data."""

    bits: int = 8
    """Bits of a number: 8, 4 or 3."""
    group: int = 0
    """Consecutive numbers of a row that share a scale; 0: the whole row."""
    positions: bool = True
    """Also the other tables as wide as that of the words, such as positions. Off: words alone."""
    head: bool = True
    """Also a language model's head that has a matrix of its own. A tied one always goes with the words."""
    takes_packed: ClassVar[bool] = True
    """Linear layers may be packed already; tables may not."""

    def check(self) -> list[str]:
        return grid_problems(self.bits, self.group)

    @property
    def needs_data(self) -> bool:
        return False

    @torch.no_grad()
    def apply(self, model: Model, task: Task) -> Mapping[str, Any]:
        module = model.module
        if getattr(module, "is_quantized", False) or isinstance(module.get_input_embeddings(), PackedEmbedding):
            raise InputError(
                f"{self.name}: the model's embeddings are already quantized; use it on the model that it was made from"
            )
        tables, left = _tables(module, words_only=not self.positions)
        before = sum(table[0][1].weight.numel() * table[0][1].weight.element_size() for table in tables)
        head_name, head = _head(module)
        for table in tables:
            owner = PackedEmbedding(table[0][1], Packing(self.bits, self.group)).train(module.training)
            weight = table[0][1].weight
            owner.fill(self._rounded(weight, table[0][0]))
            for number, (name, part) in enumerate(table):
                swap(module, name, owner if number == 0 else TiedEmbedding(part, owner).train(module.training))
            if head is not None and head.weight is weight:
                swap(module, head_name, TiedLinear(head, owner).train(module.training))
                head = None
        skipped = {}
        if head is not None and is_linear(head) and self.head:
            before += head.weight.numel() * head.weight.element_size()
            swap(module, head_name, PackedLinear.of(head, self._rounded(matrix(head), head_name)))
        elif head is not None:
            skipped[head_name] = "head is off"
        forget_ties(module)
        after = [part for name, part in packed_parts(module).items() if isinstance(part, PackedEmbedding) or name == head_name]
        held = sum(part.codes.numel() + 2 * part.scales.numel() for part in after)
        return {
            "tables": [name for table in tables for name, _ in table],
            "tables_left_alone": left,
            "weight_bytes": [before, held],
            "summary": f"{before / 1e6:.3g} MB of embeddings -> {held / 1e6:.3g} MB; speed in torch: no better",
            "skipped": skipped,
        }

    def _rounded(self, weight: torch.Tensor, name: str) -> Quantized:
        if not bool(weight.isfinite().all()):
            raise InputError(f"{self.name}: {name} has weights that are not finite")
        return rounded(weight, Packing(self.bits, self.group))


def _tables(module: Any, *, words_only: bool) -> tuple[list[list[tuple[str, nn.Embedding]]], dict[str, str]]:
    """Tables to quantize, those with one matrix together, the words' first; and why others are left alone."""
    words = module.get_input_embeddings()
    found: dict[int, list[tuple[str, nn.Embedding]]] = {id(words.weight): []}
    left: dict[str, str] = {}
    for name, part in module.named_modules():
        if not isinstance(part, nn.Embedding):
            continue
        if type(part).forward is not nn.Embedding.forward and not hasattr(part, "embed_scale"):
            left[name] = "its look-up is of a kind of its own"
        elif part.embedding_dim != words.embedding_dim:
            left[name] = "it is not as wide as the words"
        elif words_only and part.weight is not words.weight:
            left[name] = "positions is off"
        else:
            found.setdefault(id(part.weight), []).append((name, part))
    return [table for table in found.values() if table], left


def _head(module: Any) -> tuple[str, Linear | None]:
    """The layer that gives logits over the vocabulary, and its name."""
    head = module.get_output_embeddings()
    name = next((name for name, part in module.named_modules() if part is head), "")
    return name, head if name and is_linear(head) else None
