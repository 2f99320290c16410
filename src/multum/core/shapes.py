"""The Hugging Face hook that lets plain `from_pretrained` load a model whose layers have other shapes.

transformers asks a *quantizer* to prepare the empty model before the weights are read. multum registers one under the name
`multum` that puts a linear layer of the stored shape wherever `config.json` names one:

    "quantization_config": {"quant_method": "multum", "shapes": {module name: [out_features, in_features]}}

A shape with 0 rows is a `Removed`, one with 0 columns a `BiasOnly` (see `surgery`), one of three numbers, [out, rank, in], a
`Factored`. Once the weights are in, the model is an ordinary one again, free to move, to save and, unless it is packed, to train.
Shapes that stock transformers can express by itself (fewer layers, the same number of neurons everywhere, of heads where a config
can say so) are written into its own fields instead, so that such a model loads without multum.

`packed` names the linear layers and tables that are integers, with their grids, or `{"of": NAME}` for one tied to another.

More entries, where an architecture takes them: `heads`, attention name -> the heads of the unpruned block that it still has,
where all blocks share a table with one column for each (MPNet, T5); `norms`, names of norms that the stock model lacks because the
first block has none before its attention (ModernBERT), and the first is another one now; `positions`, names of tables that stock
transformers computes from the hidden width (Marian), which was another one then.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeGuard, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .factored import Factored
from .families import FAMILIES, blocks_of, every_block, family_of, stacks_of
from .family import Family
from .head_state import TABLE, keep_own_heads, own_heads, settle
from .linears import is_linear, shape_of
from .packed import PackedLinear, TiedLinear, apply_packings, packings
from .surgery import (
    BiasOnly,
    counts_of,
    cross_heads,
    has,
    head_size,
    heads_and_neurons,
    queries_per_head,
    rows_of_one,
    swap,
    width,
    with_shape,
)
from .width import keep_own_positions, own_positions

METHOD = "multum"
Shapes = dict[str, tuple[int, ...]]


@register_quantization_config(METHOD)
class ShapesConfig(QuantizationConfigMixin):
    """What `config.json` says about shapes: module name -> (out, in), or (out, rank, in) of a `Factored` one."""

    def __init__(
        self,
        shapes: Mapping[str, Any] | None = None,
        heads: Mapping[str, Sequence[int]] | None = None,
        norms: Sequence[str] = (),
        packed: Mapping[str, Mapping[str, Any]] | None = None,
        positions: Sequence[str] = (),
        **_: Any,
    ) -> None:
        self.quant_method: Any = METHOD
        self.shapes: Shapes = {name: tuple(int(n) for n in shape) for name, shape in (shapes or {}).items()}
        self.heads = {name: [int(head) for head in kept] for name, kept in (heads or {}).items()}
        self.norms = list(norms)
        self.positions = list(positions)
        self.packed = {name: dict(entry) for name, entry in (packed or {}).items()}

    def to_dict(self) -> dict[str, Any]:
        more = {name: value for name in ("heads", "norms", "packed", "positions") if (value := getattr(self, name))}
        return {"quant_method": METHOD, "shapes": {name: list(shape) for name, shape in self.shapes.items()}, **more}


@register_quantizer(METHOD)
class ShapesLoader(HfQuantizer):
    """Gives the empty model the stored shapes, then takes itself out of the way."""

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> nn.Module:
        self.quantization_config = model.config.quantization_config = entry = entry_for(model, cast(Any, self.quantization_config))
        guards = {rf"{re.escape(name)}\.weight$" for name in (*entry.shapes, *entry.packed)}
        model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), *guards}
        apply_shapes(model, entry.shapes)
        for name, kept in entry.heads.items():
            keep_own_heads(model.get_submodule(name), kept)
        for name in entry.norms:
            swap(model, name, copy.deepcopy(blocks_of(model)[0].get_submodule(family_of(model).feed_forward_norm)))
        apply_packings(model, entry.packed)
        keep_own_positions(model, entry.positions)
        return model

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        # An ordinary model from here on: the Trainer, `.half()` and `.to()` refuse or restrict quantized ones.
        model.is_quantized = False
        model.config._is_quantized = False
        for name in ("hf_quantizer", "quantization_method"):
            if hasattr(model, name):
                delattr(model, name)
        return model


def entry_for(module: nn.Module, entry: ShapesConfig) -> ShapesConfig:
    """The entry with the names that parts have in this class of the architecture. A model without a head calls them otherwise than
    one with a head does, whichever of the two was saved; what a class has no place for, like the other's head, is left out."""
    base, parts = getattr(module, "base_model_prefix", ""), dict(module.named_modules())

    def here(name: str) -> str | None:
        names = [name, name.removeprefix(f"{base}."), f"{base}.{name}"]
        # What is not there yet (a factor), or nowhere, stays with the list of blocks or the part that it should stand in.
        found = [each for each in names if each in parts] or [each for each in names if _home(each) in parts]
        return found[0] if found else None

    def renamed(values: Mapping[str, Any]) -> dict[str, Any]:
        return {new: value for name, value in values.items() if (new := here(name)) is not None}

    packed = {name: {**each, **({"of": here(each["of"])} if "of" in each else {})} for name, each in entry.packed.items()}
    norms, positions = (list(renamed(dict.fromkeys(names))) for names in (entry.norms, entry.positions))
    return ShapesConfig(renamed(entry.shapes), renamed(entry.heads), norms, renamed(packed), positions)


def _home(name: str) -> str:
    blocks = re.match(r"(.*?)\.\d+\.", name)
    return blocks[1] if blocks else name.rpartition(".")[0] or name


def apply_shapes(module: nn.Module, shapes: Shapes) -> None:
    """Replace the named linear layers by new ones of these shapes.

    Raises:
        ValueError: a name is no linear layer of this model.
    """
    linears: dict[str, Any] = {name: part for name, part in module.named_modules() if is_linear(part) or _is_table(part, name)}
    unknown = sorted(set(shapes) - set(linears))
    if unknown:
        raise ValueError(f"config.json gives shapes for layers that this model does not have: {', '.join(unknown)}")
    ones = _rows_of_ones(module)
    for name, shape in shapes.items():
        out_features, in_features = shape[0], shape[-1]
        if len(shape) == 3:
            swap(module, name, Factored.like(linears[name], shape[1], out_features, in_features))
            continue
        if _is_table(linears[name], name):
            old = linears[name].weight
            swap(module, name, nn.Embedding(out_features, in_features, device=old.device, dtype=old.dtype))
            continue
        new = with_shape(linears[name], out_features, in_features, head=ones.get(linears[name], 1))
        swap(module, name, new)
        if not is_linear(new):  # some architectures draw an attention's matrices from outside, and this one has no weight
            cast(Any, module.get_submodule(name.rpartition(".")[0]))._is_hf_initialized = True
    queries = queries_per_head(module)
    for family, block in _attentions(module):
        size = head_size(module, family)
        settle(block, family, max(width(block, family.attention_output) // (queries * size), 1), queries, size)


def _attentions(module: nn.Module) -> Iterator[tuple[Family, nn.Module]]:
    """Every block with the row of its attention; one of a decoder that reads an encoder comes twice."""
    for stack in stacks_of(module):
        for family in (stack.family, stack.family.cross):
            yield from ((family, block) for block in stack.blocks if family)


def _rows_of_ones(module: nn.Module) -> dict[nn.Module, int]:
    """For matrices inside the blocks, how many rows belong to one head or neuron."""
    queries = queries_per_head(module)
    return {
        block.get_submodule(path): sum(parts)
        for family, block in _attentions(module)
        for path, parts in rows_of_one(family, queries, head_size(module, family)).items()
        if has(block, path)
    }


def current_shapes(module: nn.Module) -> Shapes:
    """(out, in) of every linear layer, (out, rank, in) of factored ones, (buckets, heads) of tables of position biases; removed
    ones are told by comparing with `stock_shapes`."""
    parts = list(module.named_modules())
    matrices = (BiasOnly, PackedLinear, TiedLinear)
    shapes: Shapes = {name: shape_of(part) for name, part in parts if is_linear(part) or isinstance(part, matrices)}
    shapes |= {name: (part.num_embeddings, part.embedding_dim) for name, part in parts if _is_table(part, name)}
    return shapes | {name: part.shape for name, part in parts if isinstance(part, Factored)}


def _is_table(part: Any, name: str) -> TypeGuard[nn.Embedding]:
    """Whether it has a column for each head of the unpruned block, however many the config says there are."""
    return isinstance(part, nn.Embedding) and name.rpartition(".")[2] == TABLE


def stock_model(module: Any) -> nn.Module:
    """What stock transformers builds from this model's config, without weights."""
    config = type(module.config).from_dict(without_shapes(module.config.to_dict()))
    with torch.device("meta"):
        return type(module)(config)


def stock_shapes(module: Any) -> Shapes:
    """(out, in) of every linear layer that stock transformers builds from this model's config."""
    return current_shapes(stock_model(module))


def without_shapes(config: dict[str, Any]) -> dict[str, Any]:
    """A config's dictionary without multum's entry."""
    return {key: value for key, value in config.items() if key != "quantization_config"}


def record(module: Any) -> bool:
    """Write the model's shapes into its config, so that `save_pretrained` keeps them.

    Returns:
        True when stock transformers can load the result, False when it takes `import multum`.
    """
    if module.config.model_type in FAMILIES and every_block(module):
        _use_uniform_counts(module)
    stock, current = stock_model(module), current_shapes(module)
    changed: Shapes = {}
    for name, shape in current_shapes(stock).items():
        now = current.get(name, (0, shape[1]))
        if now != shape:
            changed[name] = now
    heads = {name: kept for name, part in module.named_modules() if (kept := own_heads(part)) is not None}
    there = dict(stock.named_modules())
    norms = [name for name, part in module.named_modules() if _is_norm_for_nothing(part, there.get(name))]
    packed, positions = packings(module), own_positions(module)
    more = bool(changed or heads or norms or packed or positions)
    if more:
        module.config.quantization_config = ShapesConfig(changed, heads, norms, packed, positions)
    elif hasattr(module.config, "quantization_config"):
        del module.config.quantization_config
    return not more


def guards(module: Any) -> dict[str, torch.Tensor]:
    """Empty tensors, to be saved in the places of weights that a model lacks and that stock transformers would look for.

    Without multum transformers passes over the entry in config.json and gives random numbers to weights that it does not find, with
    no more than a warning. Of a weight that has another shape it makes an error.
    """
    entry, there = getattr(module.config, "quantization_config", None), module.state_dict()
    names = (*entry.shapes, *entry.packed) if isinstance(entry, ShapesConfig) else ()
    return {key: torch.zeros(0, dtype=module.dtype) for name in names if (key := f"{name}.weight") not in there}


def _is_norm_for_nothing(part: nn.Module, stock: nn.Module | None) -> bool:
    return isinstance(part, nn.LayerNorm) and isinstance(stock, nn.Identity)


def _use_uniform_counts(module: Any) -> None:
    """Tell the config how many heads and neurons a block has, where all have as many and stock transformers can build that."""
    family, config = family_of(module), module.config
    neurons: dict[str, set[int]] = {}
    for stack in stacks_of(module):  # T5 has one field for both, BART one for each
        neurons.setdefault(stack.family.neurons_field, set()).update(count for _, count in counts_of(module, stack))
    for field, found in neurons.items():
        if len(found) == 1 and 0 not in found:
            setattr(config, field, found.pop())
    heads = {count for count, _ in heads_and_neurons(module)}
    own = vars(config).get("head_dim")
    every = heads | set(cross_heads(module))
    if not family.free_heads and own and {count * own for count in every} == {config.hidden_size}:
        # As many as a stock model of this width has of this size. MPNet's table is then too wide for that, which refuses it.
        for stack in stacks_of(module):
            setattr(config, stack.family.heads_field, max(every))
        del config.head_dim
        return
    if family.free_heads and len(heads) == 1 and 0 not in heads:
        count, queries = heads.pop(), queries_per_head(module)
        if count * queries == config.num_attention_heads:
            return
        names = {"head_dim": head_size(module), "num_attention_heads": count * queries, "num_key_value_heads": count}
        try:
            type(config).from_dict({**without_shapes(config.to_dict()), **names})
        except (StrictDataclassError, ValueError):  # Llama's heads must divide its width
            return
        for name, value in names.items():
            setattr(config, name, value)
