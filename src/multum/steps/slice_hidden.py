r"""SliceGPT: rotate the residual stream to its principal directions and delete the last (Ashkboos et al. 2024, arXiv:2401.15024).

    RMSNorm(x Q) = RMSNorm(x) Q for an orthogonal Q                              (the invariance, sec. 3.1)
    E <- E Q      W_in <- W_in diag(g) Q      W_out <- Qᵀ W_out      b_out <- b_out Q      g <- 1
    C = Σ x̂ᵀ x̂,  x̂ = x / rms(x) the stream before every norm, over calibration tokens;  Q the eigenvectors of C, largest first
    E Q D, W_in diag(g) Q D, Dᵀ Qᵀ W_out with D = the first d' columns of I      (deletion, sec. 3.4)

W_in is every matrix that reads a norm with the gain g, the head included, W_out every matrix that writes into the stream. A norm
over d' directions takes the mean over fewer: what is written is scaled by sqrt(d' / d) and the gain becomes sqrt(d / d'), so that
the norm scales, its epsilon included, as if the deleted ones were there and zero. With d' = d nothing but rounding changes.

The paper rotates every block to directions of its own, which takes a matrix Qᵀ Q' on every shortcut. transformers has no place for
one, so that here one Q serves all blocks, drawn from all of them, and the result is a stock model with a smaller `hidden_size`, for
more error at the same width. For the same reason the step takes causal models with RMSNorm before their sublayers and heads whose
width the config states by itself. Behind the sum (BERT) the gain of a norm cannot leave the shortcut; with LayerNorm (GPT-2, OPT)
the heads are as wide as `hidden_size` says. Embeddings and head, where they shared one table, no longer do: the gain of the last
norm is in the head alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from ..core.blocks import beside
from ..core.factored import refuse_factored
from ..core.families import FAMILIES, base_of, blocks_of, family_of, is_pre_norm
from ..core.linears import is_linear, matrix
from ..core.model import Model
from ..core.second_order import double
from ..core.step import Step
from ..core.surgery import BiasOnly, has, head_size, swap, with_shape
from ..core.task import Batch, Task, calibration
from ..core.training import on_accelerator
from ..errors import InputError

KERNEL = 8
"""The width is a multiple of it, which kernels like, and of the number of heads, which Llama's config asks for."""


@dataclass(frozen=True)
class Places:
    """Where the residual stream is read and written: paths in the whole model."""

    readers: Mapping[str, Sequence[str]]
    """Norm -> the matrices that read it."""
    writers: Sequence[str]
    """Matrices whose outputs are added to the stream."""


def obstacle(module: Any) -> str | None:
    """Why the hidden width of this model cannot be sliced, or None."""
    family = family_of(module)
    if family.decoder is not None:
        return "it takes causal models, and this one has an encoder and a decoder"
    if not is_pre_norm(module):
        return (
            "the norms of this model stand behind its sublayers, so that their gains scale the shortcuts as well and cannot be "
            "taken out of them; it takes causal models with RMSNorm before their sublayers"
        )
    if not family.free_heads:
        rest = ", ".join(sorted(name for name, row in FAMILIES.items() if row.free_heads))
        return f"transformers ties the width of this model's heads to its hidden width; it takes {rest}"
    if _head(module) is None:
        return "this model has no head that could take the gain of its last norm; load it with one (text-generation, say)"
    return None


def places(module: Any) -> Places:
    """Readers and writers of the residual stream of a model without an `obstacle`."""
    family, names = family_of(module), {part: name for name, part in module.named_modules()}
    readers: dict[str, Sequence[str]] = {}
    writers = []
    for block in blocks_of(module):
        of = {path: names[block.get_submodule(path)] for path in _paths(family) if has(block, path)}
        readers[of[family.attention_norm]] = list(dict.fromkeys(of[path] for path in (family.query, family.key, family.value)))
        readers[of[family.feed_forward_norm]] = list(dict.fromkeys(of[path] for path in (family.gate, family.up) if path))
        writers += [of[family.attention_output], of[family.down]]
    readers[names[cast(Any, base_of(module)).norm]] = [names[cast(nn.Module, _head(module))]]
    return Places(readers, writers)


def _paths(family: Any) -> list[str]:
    fields = ("query", "key", "value", "gate", "up", "attention_output", "down", "attention_norm", "feed_forward_norm")
    return [path for path in (getattr(family, field) for field in fields) if path]


def _head(module: Any) -> nn.Module | None:
    """What reads the last norm: the head over the vocabulary, or that of a classifier."""
    return module.get_output_embeddings() or getattr(module, family_of(module).head_output, None)


def gain(norm: Any) -> tuple[torch.Tensor, int]:
    """The gain g of an RMSNorm, and how far it is above the weight (Gemma's is 1 + weight)."""
    ones = norm(torch.ones_like(norm.weight)) - norm.weight
    offset = round(float(ones.mean()))
    return norm.weight + offset, offset


@torch.no_grad()
def directions(module: nn.Module, norms: Sequence[str], batches: Sequence[Batch]) -> tuple[torch.Tensor, torch.Tensor]:
    """Q, (hidden, hidden), and the share of Σ x̂² in each of its columns, (hidden,), double, from all that these norms read."""
    width = int(cast(Any, module).config.hidden_size)
    total: torch.Tensor = double(torch.zeros(width, width, device=next(module.parameters()).device))
    with _seen(module, norms) as inputs:
        for batch in batches:
            batch = beside(module, batch)
            module(**batch)
            mask = batch["attention_mask"].bool()
            for x in inputs:
                x = x[mask].float()
                x = x * x.square().mean(-1, keepdim=True).clamp_min(1e-12).rsqrt()
                total += double(x.T @ x)
            inputs.clear()
    values, vectors = torch.linalg.eigh(total)
    return vectors.flip(1), (values.flip(0) / values.sum()).clamp_min(0.0)


@contextmanager
def _seen(module: nn.Module, paths: Sequence[str]) -> Iterator[list[torch.Tensor]]:
    """What flows into these parts, kept in one list."""
    seen: list[torch.Tensor] = []
    handles = [module.get_submodule(path).register_forward_pre_hook(lambda _, args: seen.append(args[0])) for path in paths]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def rotate(module: Any, where: Places, q: torch.Tensor) -> None:
    """Have the residual stream x become x Q, in place.

    Args:
        module: a model without an `obstacle`.
        where: its `places`.
        q: (hidden, new hidden), orthonormal columns, double.
    """
    config, (old, new) = module.config, q.shape
    config.head_dim = head_size(module)
    table, head = module.get_input_embeddings(), cast(Any, _head(module))
    if head.weight is table.weight:
        head.weight = nn.Parameter(head.weight.detach().clone())
    config.tie_word_embeddings = False
    module.all_tied_weights_keys = module.get_expanded_tied_weights_keys(all_submodels=False)
    # Gemma multiplies what it looks up by the root of the hidden width, so that its table needs no other factor.
    scaled, factor = hasattr(table, "scalar_embed_scale"), (new / old) ** 0.5
    table.weight = nn.Parameter((double(table.weight) @ q * (1.0 if scaled else factor)).to(table.weight))
    table.embedding_dim = new
    if scaled:
        table.scalar_embed_scale = new**0.5
        table.embed_scale.fill_(table.scalar_embed_scale)
    for name, paths in where.readers.items():
        norm = module.get_submodule(name)
        g, offset = gain(norm)
        for path in paths:
            _replace(module, path, lambda w, g=g: double(w) * double(g) @ q)
        norm.weight = nn.Parameter(torch.full((new,), 1 / factor - offset).to(norm.weight))
    for path in where.writers:
        _replace(module, path, lambda w: factor * q.T @ double(w), factor * q)
    config.hidden_size = new


def _replace(module: nn.Module, path: str, change: Any, q: torch.Tensor | None = None) -> None:
    """Put a matrix of another shape in the place of one; `q` rotates its bias as well. What was pruned away stays away."""
    old: Any = module.get_submodule(path)
    if isinstance(old, BiasOnly):
        made: Any = BiasOnly(q.shape[1] if q is not None else old.out_features, device=old.bias.device, dtype=old.bias.dtype)
    elif is_linear(old):
        weight = change(matrix(old))
        made = with_shape(old, *weight.shape)
        matrix(made).copy_(weight.to(old.weight))
    else:
        return
    if old.bias is not None:
        made.bias.copy_(old.bias if q is None else (double(old.bias) @ q).to(old.bias))
    swap(module, path, made.train(old.training))


@dataclass(frozen=True, kw_only=True)
class SliceHidden(Step):
    """Rotate the residual stream to its principal directions and delete those that carry least; what is left is a stock model."""

    keep: float = 0.75
    """Share of the hidden directions that stays, above 0 to 1, rounded to a multiple of 8 and of the number of heads."""
    samples: int = 128
    """Training texts (their labels are not used) that the directions are taken from."""
    seed: int = 0
    """Seeds the choice of the texts."""

    def check(self) -> list[str]:
        problems = []
        if not 0 < self.keep <= 1:
            problems.append(f"keep is a share of the hidden directions, above 0, at most 1 (got {self.keep})")
        if self.samples < 1:
            problems.append(f"samples must be at least 1 (got {self.samples})")
        return problems

    @torch.no_grad()
    def apply(self, model: Model, task: Task) -> Mapping[str, Any]:
        module = model.module.eval()
        if reason := obstacle(module):
            raise InputError(f"{self.name}: {reason}")
        refuse_factored(module, self.name)
        old, unit = int(module.config.hidden_size), math.lcm(KERNEL, int(module.config.num_attention_heads))
        new = old if self.keep == 1 else max(round(self.keep * old / unit), 1) * unit
        if new > old:
            raise InputError(f"{self.name}: the width must be a multiple of {unit}, and that of this model is only {old}")
        batches = calibration(task, model, self.samples, seed=self.seed, step=self.name, inputs=new)
        where = places(module)
        with on_accelerator(module):
            q, share = directions(module, list(where.readers), batches)
            rotate(module, where, q[:, :new])
        return {
            "hidden": [old, new],
            "summary": f"{new} of {old} directions of the hidden width are left",
            "carried": float(share[:new].sum()),
            "calibration_tokens": sum(int(batch["attention_mask"].sum()) for batch in batches),
        }
