"""What llama.cpp computes of a GGUF file, once more from its graphs, slowly and in float64, to test files without it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np

Array = np.ndarray


class Reference:
    """A file with all its tensors as float64, and its fields."""

    def __init__(self, path: Path) -> None:
        reader = gguf.GGUFReader(path)
        self.fields = {name: field.contents() for name, field in reader.fields.items()}
        self.types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
        self.tensors = {
            tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float64).reshape(tensor.shape[::-1])
            for tensor in reader.tensors
        }
        self.arch = self.fields["general.architecture"]

    def field(self, name: str, block: int | None = None, default: Any = None) -> Any:
        """Of the architecture; of one block where blocks have their own."""
        value = self.fields.get(f"{self.arch}.{name}", default)
        return value[block] if isinstance(value, list) and block is not None else value

    def logits(self, ids: list[int]) -> Array:
        """(tokens,) -> (tokens, vocabulary)."""
        table = self.tensors["token_embd.weight"]
        x = table[ids]
        if self.arch == "gpt2":
            x = x + self.tensors["position_embd.weight"][: len(ids)]
        if self.arch == "gemma":
            x = x * np.sqrt(self.field("embedding_length"))
        for block in range(self.field("block_count")):
            heads, neurons = self.field("attention.head_count", block), self.field("feed_forward_length", block)
            assert neurons > 0, "llama.cpp's deci leaves out the attention of a block without a feed-forward"
            assert block > 0 or heads > 0, "llama.cpp reads the size of heads off the first block"
            if heads:
                x = x + self._attention(self._norm(x, f"blk.{block}.attn_norm"), block)
            x = x + self._feed_forward(self._norm(x, f"blk.{block}.ffn_norm"), block)
        return self._norm(x, "output_norm") @ self.tensors.get("output.weight", table).T

    def _norm(self, x: Array, name: str) -> Array:
        weight = self.tensors[f"{name}.weight"]
        if self.arch == "gpt2":
            centred = x - x.mean(-1, keepdims=True)
            scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + self.field("attention.layer_norm_epsilon"))
            return scaled * weight + self.tensors[f"{name}.bias"]
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + self.field("attention.layer_norm_rms_epsilon")) * weight

    def _linear(self, x: Array, name: str) -> Array:
        return x @ self.tensors[f"{name}.weight"].T + self.tensors.get(f"{name}.bias", 0.0)

    def _attention(self, x: Array, block: int) -> Array:
        name, queries = f"blk.{block}", self.field("attention.head_count", block)
        keys = self.field("attention.head_count_kv", block)
        size = self.field("attention.key_length") or self.field("embedding_length") // queries
        if self.arch == "gpt2":
            q, k, v = np.split(self._linear(x, f"{name}.attn_qkv"), 3, axis=1)
        else:
            q, k, v = (self._linear(x, f"{name}.attn_{part}") for part in "qkv")
        q, k, v = q.reshape(-1, queries, size), k.reshape(-1, keys, size), v.reshape(-1, keys, size)
        if self.arch == "qwen3":
            q, k = self._norm(q, f"{name}.attn_q_norm"), self._norm(k, f"{name}.attn_k_norm")
        if self.arch != "gpt2":
            q, k = self._turned(q), self._turned(k)
        mixed = np.empty_like(q)
        for head in range(queries):
            other = head // (queries // keys)
            scores = q[:, head] @ k[:, other].T / np.sqrt(size)
            scores[np.triu_indices(len(x), 1)] = -np.inf
            shares = np.exp(scores - scores.max(1, keepdims=True))
            mixed[:, head] = shares / shares.sum(1, keepdims=True) @ v[:, other]
        return self._linear(mixed.reshape(len(x), -1), f"{name}.attn_output")

    def _turned(self, x: Array) -> Array:
        """By position: neighbours in `llama` and `deci`, halves of a head in the others."""
        size = x.shape[-1]
        assert size == self.field("rope.dimension_count")
        angles = np.arange(len(x))[:, None] * self.field("rope.freq_base") ** (-np.arange(0, size, 2) / size)
        angles = (angles / self.tensors.get("rope_freqs.weight", 1.0))[:, None]
        assert "rope_freqs.weight" not in self.tensors or self.arch in ("llama", "deci")
        pairs = (
            (slice(0, None, 2), slice(1, None, 2)) if self.arch in ("llama", "deci") else (slice(size // 2), slice(size // 2, None))
        )
        first, second = x[..., pairs[0]], x[..., pairs[1]]
        result = np.empty_like(x)
        result[..., pairs[0]] = first * np.cos(angles) - second * np.sin(angles)
        result[..., pairs[1]] = first * np.sin(angles) + second * np.cos(angles)
        return result

    def _feed_forward(self, x: Array, block: int) -> Array:
        up = self._linear(x, f"blk.{block}.ffn_up")
        if self.arch == "gpt2":
            return self._linear(_gelu(up), f"blk.{block}.ffn_down")
        gate = self._linear(x, f"blk.{block}.ffn_gate")
        return self._linear((_gelu(gate) if self.arch == "gemma" else gate / (1 + np.exp(-gate))) * up, f"blk.{block}.ffn_down")


def _gelu(x: Array) -> Array:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
