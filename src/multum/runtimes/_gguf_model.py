r"""A causal model as the tensors and fields of llama.cpp's architectures.

    llama    Llama, Mistral, Phi-3 (its fused matrices split)        deci    these and Qwen2 with blocks of different sizes
    qwen2, qwen3, gemma, gpt2                                                the models of these names, with blocks of one size

llama.cpp's `deci` is Llama with head and neuron counts of every block's own, so that pruned models are what it was made for; biases
are allowed in it. What it does not take is written so that nothing changes: a block whose sublayers are both gone is left out; an
attention that is gone has one head of zeros where it stands first, because sizes are read off there, or has a bias; a feed-forward
that is gone has neurons of zeros.

llama.cpp turns pairs of neighbouring features by the position where transformers pairs the halves of a head, so the rows of queries
and keys are put in the order in which both mean the same; `qwen2`, `qwen3` and `gemma` have the order of transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import InputError
from ._gguf_blocks import Parts, Written, add_gpt2, add_llama, add_norm, numbers

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "phi3": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma": "gemma"}
ARCHITECTURES |= {"gpt2": "gpt2"}
"""`model_type` -> what llama.cpp calls it where all blocks are alike."""
UNEVEN = ("llama", "mistral", "phi3", "qwen2")
"""Models that `deci` can say where they are not."""
ACTIVATIONS = {"gemma": ("gelu_pytorch_tanh", "gelu"), "gpt2": ("gelu_new", "gelu_pytorch_tanh")}
"""What llama.cpp computes in these architectures, by the names of transformers; `silu` in all others. Gemma's `gelu` means tanh."""


def read(module: Any, *, group: int = 1) -> Written:
    """What a model is in GGUF.

    Args:
        module: a causal language model of transformers.
        group: the neurons of a block are filled up with zeros to a multiple of this.

    Raises:
        InputError: lists what llama.cpp has no words for.
    """
    from ..core.families import blocks_of
    from ..core.surgery import head_size, heads_and_neurons, queries_per_head

    kind = getattr(module.config, "model_type", "")
    if kind not in ARCHITECTURES or not type(module).__name__.endswith(("ForCausalLM", "LMHeadModel")):
        known = ", ".join(sorted(ARCHITECTURES))
        raise InputError(f"llamacpp takes causal language models of types {known}; this is a {type(module).__name__}")
    blocks, counts = blocks_of(module), heads_and_neurons(module)
    size, queries = head_size(module), queries_per_head(module)
    kept = [i for i, found in enumerate(counts) if any(found) or _has_bias(module, blocks[i])] or [0]
    even = len({counts[i] for i in kept}) == 1 and all(all(counts[i]) for i in kept)
    fits = kind not in ("qwen2", "gpt2") or {counts[i][0] for i in kept} == {module.config.hidden_size // (queries * size)}
    rotation = _rotation(module, size)
    if problems := _problems(module, even and fits, rotation is not None):
        raise InputError(*problems)
    alike = even and fits and (rotation is None or ARCHITECTURES[kind] == "llama")
    made = Written(ARCHITECTURES[kind] if alike else "deci", {})
    heads, neurons = [], []
    for number, i in enumerate(kept):
        parts = _parts(module, blocks[i], *counts[i])
        if made.architecture == "gpt2":
            found = parts.heads, add_gpt2(made, f"blk.{number}", parts, group)
        else:
            found = add_llama(made, f"blk.{number}", parts, group, first=number == 0)
        heads.append(found[0])
        neurons.append(found[1])
    made.fields |= _fields(module, made, [queries * n for n in heads], heads, neurons)
    made.context = made.fields["context_length"]
    if rotation is not None:
        made.tensors["rope_freqs.weight"] = (rotation.shape, lambda: rotation)
    _around(module, made)
    return made


def _parts(module: Any, block: Any, heads: int, neurons: int) -> Parts:
    from ..core.families import family_of
    from ..core.surgery import head_size, queries_per_head

    return Parts(block, family_of(module), heads, queries_per_head(module), head_size(module), neurons)


def _problems(module: Any, alike: bool, scaled: bool) -> list[str]:
    """What llama.cpp has no words for."""
    config, kind = module.config, module.config.model_type
    found = []
    activation = next((v for n in ("hidden_act", "activation_function") if (v := getattr(config, n, None))), "")
    known = ACTIVATIONS.get(kind, ("silu", "swish"))
    if activation not in known:
        found.append(f"llama.cpp computes {known[0]} in models of type {kind}, and this one has {activation}")
    if not alike and kind not in UNEVEN:
        more = ", or whose heads together are not as wide as the model" if kind == "gpt2" else ""
        found.append(
            f"llama.cpp has no {kind} whose blocks have different numbers of heads or neurons{more} (it has for "
            f"{', '.join(UNEVEN)}); cut every block alike instead: drop whole layers (drop_layers), or the same number of neurons "
            "from each"
        )
    if scaled and kind not in UNEVEN:
        found.append(f"llama.cpp has no {kind} with scaled positions (rope_parameters: {dict(config.rope_parameters)})")
    if kind == "gpt2" and (not config.scale_attn_weights or config.scale_attn_by_inverse_layer_idx or config.add_cross_attention):
        found.append("llama.cpp has no gpt2 with unscaled or inversely scaled attention, or with cross-attention")
    if kind == "gemma" and not _tied(module):
        found.append("llama.cpp has no gemma whose output matrix is not its table of embeddings")
    return found


def _fields(module: Any, made: Written, queries: Sequence[int], heads: Sequence[int], neurons: Sequence[int]) -> dict[str, Any]:
    from ..core.surgery import head_size

    config, size = module.config, head_size(module)
    several = made.architecture == "deci"
    positions = int(config.max_position_embeddings)
    fields: dict[str, Any] = {
        "context_length": min(positions, _window(config) or positions),
        "embedding_length": int(config.hidden_size),
        "block_count": len(heads),
        "feed_forward_length": list(neurons) if several else neurons[0],
        "attention.head_count": list(queries) if several else queries[0],
        "attention.head_count_kv": list(heads) if several else heads[0],
        "vocab_size": int(module.get_input_embeddings().weight.shape[0]),
    }
    if made.architecture == "gpt2":
        return fields | {"attention.layer_norm_epsilon": float(config.layer_norm_epsilon)}
    theta = float(config.rope_parameters["rope_theta"])
    fields |= {"attention.key_length": size, "attention.value_length": size, "rope.dimension_count": size, "rope.freq_base": theta}
    return fields | {"attention.layer_norm_rms_epsilon": float(config.rms_norm_eps)}


def _window(config: Any) -> int | None:
    """Tokens that a token sees, where these are not all: up to there the model is one without a window."""
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    return int(window) if window and (types is None or "sliding_attention" in types) else None


def _rotation(module: Any, size: int) -> np.ndarray | None:
    """By what the frequencies of a model's positions are divided, (size / 2,); None where they are the plain ones.

    Raises:
        InputError: they change with the length, or not all features are turned.
    """
    from ..core.families import base_of

    settings = getattr(module.config, "rope_parameters", None)
    if settings is None:
        return None
    rotary: Any = base_of(module).rotary_emb
    kind = settings.get("rope_type", "default")
    frequencies = rotary.inv_freq.double().cpu().numpy()
    if kind in ("dynamic", "longrope") or getattr(rotary, "attention_scaling", 1.0) != 1.0 or len(frequencies) != size // 2:
        raise InputError(f"positions of the kind {kind!r} (rope_parameters: {dict(settings)}) cannot be written to GGUF yet")
    plain = float(settings["rope_theta"]) ** (-np.arange(0, size, 2) / size)
    ratio = plain / frequencies
    return None if np.allclose(ratio, 1, atol=1e-5) else ratio.astype(np.float32)


def _has_bias(module: Any, block: Any) -> bool:
    """Whether something is added to the residual stream although no head and no neuron is left."""
    parts = _parts(module, block, 0, 0)
    biases = [getattr(parts.part(name), "bias", None) for name in ("attention_output", "down")]
    return any(bias is not None and bool(bias.any()) for bias in biases)


def _around(module: Any, made: Written) -> None:
    """What stands before and behind the blocks."""
    from ..core.families import base_of

    base = base_of(module)
    table, head = module.get_input_embeddings(), module.get_output_embeddings()
    made.add("token_embd.weight", lambda: numbers(table.weight), table.weight.shape, table)
    if made.architecture == "gpt2":
        positions: Any = base.get_submodule("wpe").weight
        made.add("position_embd.weight", lambda: numbers(positions), positions.shape)
    add_norm(made, "output_norm", base.get_submodule("ln_f" if made.architecture == "gpt2" else "norm"))
    if not _tied(module):
        made.add("output.weight", lambda: numbers(head.weight), head.weight.shape, head)


def _tied(module: Any) -> bool:
    """Whether the output matrix is the table of embeddings."""
    from ..core.packed import TiedEmbedding, TiedLinear

    table, head = module.get_input_embeddings(), module.get_output_embeddings()
    return isinstance(head, TiedLinear) or isinstance(table, TiedEmbedding) or head.weight is table.weight
