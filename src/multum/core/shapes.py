"""The Hugging Face hook that lets plain `from_pretrained` load a model whose layers have other shapes.

transformers asks a *quantizer* to prepare the empty model before the weights are read. multum registers one under the name
`multum` that puts a linear layer of the stored shape wherever `config.json` names one:

    "quantization_config": {"quant_method": "multum", "shapes": {module name: [out_features, in_features]}}

A shape with 0 rows is a `Removed`, one with 0 columns a `BiasOnly` (see `surgery`). Nothing here is quantized: once
the weights are in, the model is an ordinary one again, free to train, move and save. Shapes that stock transformers can
express by itself (fewer layers, the same number of neurons everywhere) are written into its own fields instead, so
that such a model loads without multum.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .families import FAMILIES, blocks_of
from .surgery import BiasOnly, head_size, swap, with_shape

METHOD = "multum"
Shapes = dict[str, tuple[int, int]]


@register_quantization_config(METHOD)
class ShapesConfig(QuantizationConfigMixin):
    """What `config.json` says about shapes: module name -> (out_features, in_features)."""

    def __init__(self, shapes: dict[str, Any] | None = None, **_: Any) -> None:
        self.quant_method: Any = METHOD
        self.shapes: Shapes = {name: (int(out), int(in_)) for name, (out, in_) in (shapes or {}).items()}

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": METHOD, "shapes": {name: list(shape) for name, shape in self.shapes.items()}}


@register_quantizer(METHOD)
class ShapesLoader(HfQuantizer):
    """Gives the empty model the stored shapes, then takes itself out of the way."""

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    def _process_model_before_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        apply_shapes(model, cast(ShapesConfig, self.quantization_config).shapes)
        return model

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        # An ordinary model from here on: the Trainer, `.half()` and `.to()` refuse or restrict quantized ones.
        model.is_quantized = False
        model.config._is_quantized = False
        for name in ("hf_quantizer", "quantization_method"):
            if hasattr(model, name):
                delattr(model, name)
        return model


def apply_shapes(module: nn.Module, shapes: Shapes) -> None:
    """Replace the named linear layers by new ones of these shapes.

    Raises:
        ValueError: a name is no linear layer of this model.
    """
    linears = {name: part for name, part in module.named_modules() if isinstance(part, nn.Linear)}
    unknown = sorted(set(shapes) - set(linears))
    if unknown:
        raise ValueError(f"config.json gives shapes for layers that this model does not have: {', '.join(unknown)}")
    size = head_size(module)
    for name, (out_features, in_features) in shapes.items():
        swap(module, name, with_shape(linears[name], out_features, in_features, head=size))


def current_shapes(module: nn.Module) -> Shapes:
    """(out, in) of every linear layer, removed ones included when compared with `stock_shapes`."""
    return {
        name: (part.out_features, part.in_features)
        for name, part in module.named_modules()
        if isinstance(part, nn.Linear | BiasOnly)
    }


def stock_shapes(module: Any) -> Shapes:
    """(out, in) of every linear layer that stock transformers builds from this model's config."""
    config = type(module.config).from_dict(without_shapes(module.config.to_dict()))
    with torch.device("meta"):
        return current_shapes(type(module)(config))


def without_shapes(config: dict[str, Any]) -> dict[str, Any]:
    """A config's dictionary without multum's entry."""
    return {key: value for key, value in config.items() if key != "quantization_config"}


def record(module: Any) -> bool:
    """Write the model's shapes into its config, so that `save_pretrained` keeps them.

    Returns:
        True when stock transformers can load the result, False when it takes `import multum`.
    """
    if module.config.model_type in FAMILIES:
        _use_uniform_neurons(module)
    current = current_shapes(module)
    changed: Shapes = {}
    for name, shape in stock_shapes(module).items():
        now = current.get(name, (0, shape[1]))
        if now != shape:
            changed[name] = now
    if changed:
        module.config.quantization_config = ShapesConfig(changed)
    elif hasattr(module.config, "quantization_config"):
        del module.config.quantization_config
    return not changed


def _use_uniform_neurons(module: Any) -> None:
    down = FAMILIES[module.config.model_type].down
    counts = {cast(int, block.get_submodule(down).in_features) for block in blocks_of(module)}
    if len(counts) == 1 and (count := counts.pop()) > 0:
        # DistilBERT calls it hidden_dim and, unlike num_hidden_layers, gives it no common name.
        name = "hidden_dim" if hasattr(module.config, "hidden_dim") else "intermediate_size"
        setattr(module.config, name, count)
