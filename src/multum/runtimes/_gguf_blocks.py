"""The blocks of a causal model as tensors with llama.cpp's names and shapes (`_gguf_model` says which)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

GROUP = 32
"""Numbers of a block of Q8_0, Q4_0 and Q4_1: rows of a matrix must be made up of whole ones."""

Array = Callable[[], np.ndarray]


@dataclass
class Written:
    """What is written into a GGUF file, apart from the tokenizer."""

    architecture: str
    fields: dict[str, Any]
    """Keys below the architecture's name -> numbers, or one of every block."""
    tensors: dict[str, tuple[tuple[int, ...], Array]] = field(default_factory=dict)
    """Name -> shape and what makes it, float32; made one at a time, so that no second copy of a model is in memory."""
    own: set[str] = field(default_factory=set)
    """Matrices that the model has in 4 bits or fewer."""
    context: int = 0
    """Tokens for which it is the same model."""

    def add(self, name: str, array: Array, shape: Sequence[int], of: Any = None) -> None:
        """Write a tensor.

        Args:
            name: llama.cpp's.
            array: what makes it.
            shape: its own.
            of: the part of the model whose matrix it is, or a piece of.
        """
        self.tensors[name] = (tuple(int(n) for n in shape), array)
        if has_few_bits(of):
            self.own.add(name)


@dataclass(frozen=True)
class Parts:
    """One block, fused matrices split: paths of multum's table to rows of the matrices there."""

    block: Any
    family: Any
    heads: int
    queries: int
    size: int
    neurons: int

    def weight(self, name: str) -> Array:
        """Of `query`, `key`, `value`, `attention_output`, `gate`, `up` or `down`, (out, in)."""
        return lambda: numbers(self._matrix(name)[self._rows(name)])

    def bias(self, name: str) -> Array | None:
        """The same, (out,); None where there is none, or nothing but zeros in the place of a sublayer that is gone."""
        part = self.part(name)
        bias = getattr(part, "bias", None)
        if bias is None or (part.weight is None and not bias.any()):
            return None
        return lambda: numbers(bias[self._rows(name)])

    def part(self, name: str) -> Any:
        return self.block.get_submodule(getattr(self.family, name))

    def _matrix(self, name: str) -> torch.Tensor:
        return _weight(self.part(name))

    def _rows(self, name: str) -> slice:
        """Where the rows of a part begin and end in the matrix that it lives in."""
        heads = self.heads * self.size
        orders = [
            [("query", heads * self.queries), ("key", heads), ("value", heads)],
            [("gate", self.neurons), ("up", self.neurons)],
        ]
        path, start = getattr(self.family, name), 0
        for order in orders:
            for other, rows in order:
                if other == name:
                    return slice(start, start + rows)
                start += rows if getattr(self.family, other) == path else 0
            start = 0
        return slice(None)


def has_few_bits(part: Any) -> bool:
    """Whether a part's matrix is packed in 4 bits or fewer."""
    from ..core.packed import Packed

    source = getattr(part, "source", part)  # of what shares a table
    return isinstance(source, Packed) and source.packing.bits <= 4


def _weight(part: Any) -> torch.Tensor:
    """(out, in); a packed one as it is, which half precision would round."""
    import torch

    from ..core.linears import matrix
    from ..core.packed import Packed

    return part.read(dtype=torch.float32) if isinstance(part, Packed) else matrix(part)  # factored ones have a weight too


def add_norm(made: Written, name: str, norm: Any) -> None:
    """Gemma's weights are kept as their difference from one."""
    shift = 1.0 if made.architecture == "gemma" else 0.0
    made.add(f"{name}.weight", lambda: numbers(norm.weight) + np.float32(shift), norm.weight.shape)
    if getattr(norm, "bias", None) is not None:
        made.add(f"{name}.bias", lambda: numbers(norm.bias), norm.bias.shape)


def add_llama(made: Written, name: str, parts: Parts, group: int, *, first: bool) -> tuple[int, int]:
    """Write one block; the heads and neurons that it has there."""
    hidden = int(parts.block.get_submodule(parts.family.attention_norm).weight.shape[0])
    output, down = parts.bias("attention_output"), parts.bias("down")
    heads = parts.heads or int(first or output is not None)
    if heads:
        add_norm(made, f"{name}.attn_norm", parts.block.get_submodule(parts.family.attention_norm))
        turned = made.architecture in ("llama", "deci")
        for part, target, count in (
            ("query", "attn_q", heads * parts.queries),
            ("key", "attn_k", heads),
            ("value", "attn_v", heads),
        ):
            rows = count * parts.size
            size = parts.size if turned and part != "value" else 0
            if parts.heads:
                made.add(f"{name}.{target}.weight", _turned(parts.weight(part), size), (rows, hidden), parts.part(part))
                if (bias := parts.bias(part)) is not None:
                    made.add(f"{name}.{target}.bias", _turned(bias, size), (rows,))
            else:
                made.add(f"{name}.{target}.weight", _zeros(rows, hidden), (rows, hidden))
        shape = (hidden, heads * parts.queries * parts.size)
        weight, part = parts.weight("attention_output") if parts.heads else _zeros(*shape), parts.part("attention_output")
        made.add(f"{name}.attn_output.weight", weight, shape, part if parts.heads else None)
        if output is not None:
            made.add(f"{name}.attn_output.bias", output, (hidden,))
    if made.architecture == "qwen3":
        add_norm(made, f"{name}.attn_q_norm", parts.block.get_submodule("self_attn.q_norm"))
        add_norm(made, f"{name}.attn_k_norm", parts.block.get_submodule("self_attn.k_norm"))
    neurons = max(_whole(parts.neurons, group), group)
    add_norm(made, f"{name}.ffn_norm", parts.block.get_submodule(parts.family.feed_forward_norm))
    for part, target in (("gate", "ffn_gate"), ("up", "ffn_up")):
        weight = _filled(parts.weight(part), (neurons, hidden)) if parts.neurons else _zeros(neurons, hidden)
        made.add(f"{name}.{target}.weight", weight, (neurons, hidden), parts.part(part) if parts.neurons else None)
        if parts.neurons and (bias := parts.bias(part)) is not None:
            made.add(f"{name}.{target}.bias", _filled(bias, (neurons,)), (neurons,))
    weight = _filled(parts.weight("down"), (hidden, neurons), "edge") if parts.neurons else _zeros(hidden, neurons)
    made.add(f"{name}.ffn_down.weight", weight, (hidden, neurons), parts.part("down") if parts.neurons else None)
    if down is not None:
        made.add(f"{name}.ffn_down.bias", down, (hidden,))
    return heads, neurons


def add_gpt2(made: Written, name: str, parts: Parts, group: int) -> int:
    """Write one block; the neurons that it has there."""
    hidden, neurons = parts.block.ln_1.weight.shape[0], _whole(parts.neurons, group)
    add_norm(made, f"{name}.attn_norm", parts.block.ln_1)
    add_norm(made, f"{name}.ffn_norm", parts.block.ln_2)
    fused = parts.part("query")
    made.add(f"{name}.attn_qkv.weight", lambda: numbers(_weight(fused)), (3 * hidden, hidden), fused)
    made.add(f"{name}.attn_qkv.bias", lambda: numbers(fused.bias), (3 * hidden,))
    sizes = {"attention_output": (hidden, hidden), "up": (neurons, hidden), "down": (hidden, neurons)}
    for part, target in (("attention_output", "attn_output"), ("up", "ffn_up"), ("down", "ffn_down")):
        weight = _filled(parts.weight(part), sizes[part], "edge" if part == "down" else "constant")
        made.add(f"{name}.{target}.weight", weight, sizes[part], parts.part(part))
        bias = parts.bias(part)
        assert bias is not None  # noqa: S101 - GPT-2's matrices have one each
        made.add(f"{name}.{target}.bias", _filled(bias, sizes[part][:1]), sizes[part][:1])
    return neurons


def numbers(tensor: Any) -> np.ndarray:
    return np.ascontiguousarray(tensor.detach().float().cpu().numpy())


def _zeros(*shape: int) -> Array:
    return lambda: np.zeros(shape, dtype=np.float32)


def _whole(count: int, group: int) -> int:
    return -(-count // group) * group


def _filled(array: Array, shape: Sequence[int], mode: Any = "constant") -> Array:
    """With zeros at its ends, to this shape. What reads neurons of zeros may be anything: with "edge" it is the last weight of a
    row, which leaves a group on its grid.
    """

    def made() -> np.ndarray:
        found = array()
        missing = [(0, wanted - has) for wanted, has in zip(shape, found.shape, strict=True)]
        filled: np.ndarray = np.pad(found, missing, mode=mode)
        return filled

    return made


def _turned(array: Array, size: int) -> Array:
    """The rows of every head as pairs of neighbours: feature i and i + size/2 next to each other."""

    def made() -> np.ndarray:
        found = array()
        halves = found.reshape(-1, 2, size // 2, *found.shape[1:])
        return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(found.shape))

    return made if size else array
