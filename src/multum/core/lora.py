r"""Low-rank adaptation (LoRA: Hu et al. 2021, arXiv:2106.09685, equation 3), by the library peft.

    h = W x + (α / r) B A x        W' = W + (α / r) B A

W (out, in) stays as it is while B (out, r) and A (r, in) are trained; B begins at zero, so that nothing changes at first. Optimizer
and gradients take a few per cent of the memory that all weights would take. In the end W' takes the place of W, and what is left is
a plain model. New weights (a task's untrained head) are trained whole beside the adapters.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..errors import InputError, MissingExtra
from .families import stacks_of
from .linears import is_linear
from .model import Model

ROLES = ("query", "key", "value", "attention_output", "gate", "up", "down")
"""The matrices of a block, as a row of `families` names them; cross-attention's go with those of the same name."""
DEFAULTS: dict[str, Any] = {"rank": 16, "alpha": None, "targets": ROLES}
"""α is twice the rank if nobody says. All matrices, as Dettmers et al. 2023 (arXiv:2305.14314, figure 2) found to be needed."""
PRUNED = 0.01
"""Share of exact zeros above which a matrix counts as pruned."""

Spec = Mapping[str, Any]
"""`{rank: 16, alpha: 32, targets: [query, value]}`; each may be left out."""


def lora_problems(spec: Spec | None) -> list[str]:
    """What is wrong with what was asked for, each in one sentence."""
    if spec is None:
        return []
    if not isinstance(spec, Mapping):
        return [f"lora: write a map such as {{rank: 16}} (got {spec!r})"]
    problems = [f"lora: there is no {key!r}; there are: {', '.join(DEFAULTS)}" for key in spec if key not in DEFAULTS]
    rank, alpha, targets = (spec.get(name, default) for name, default in DEFAULTS.items())
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        problems.append(f"lora: rank must be a whole number, at least 1 (got {rank!r})")
    if alpha is not None and (not isinstance(alpha, int | float) or isinstance(alpha, bool) or not alpha > 0):
        problems.append(f"lora: alpha must be above 0 (got {alpha!r})")
    listed = [targets] if isinstance(targets, str) else targets
    if not isinstance(listed, Sequence) or not listed or any(role not in ROLES for role in listed):
        problems.append(f"lora: targets are some of {', '.join(ROLES)} (got {targets!r})")
    return problems


def targets_of(module: nn.Module, roles: Sequence[str] = ROLES) -> list[str]:
    """The names of these matrices of all blocks, each once; removed, factored and packed ones are left out.

    Raises:
        InputError: the architecture is not known.
    """
    wanted = {
        id(block.get_submodule(path))
        for stack in stacks_of(module)
        for block in stack.blocks
        for row in filter(None, (stack.family, stack.family.cross))
        for role in roles
        if (path := getattr(row, role)) is not None and _there(block, path)
    }
    return [name for name, part in module.named_modules() if id(part) in wanted and is_linear(part) and part.weight.numel()]


@contextlib.contextmanager
def adapted(model: Model, spec: Spec | None, seed: int = 0) -> Iterator[None]:
    """Have adapters on a model, alone to be trained beside its new weights; merged into the matrices in the end.

    Args:
        model: changed in place.
        spec: as `lora_problems` checks it; None: nothing is done.
        seed: of A's random weights.

    Raises:
        MissingExtra: peft is not installed.
        InputError: none of the matrices is there, or one has been pruned.
    """
    if spec is None:
        yield
        return
    module: Any = model.module
    names = _targets(model, spec)
    before = {name: parameter.requires_grad for name, parameter in module.named_parameters()}
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        _inject(module, names, spec)
    for name in set(model.new_weights) & before.keys():
        module.get_parameter(name).requires_grad_(before[name])
    merged = False
    try:
        yield
        merged = True
    finally:
        for name in names:
            layer = module.get_submodule(name)
            if merged:
                layer.merge()
            parent, _, own = name.rpartition(".")
            setattr(module.get_submodule(parent), own, layer.get_base_layer())
        del module.peft_config
        for name, required in before.items():
            module.get_parameter(name).requires_grad_(required)


def _inject(module: nn.Module, names: Sequence[str], spec: Spec) -> None:
    """Put adapters on these layers; all else stops being trained."""
    from peft import LoraConfig, inject_adapter_in_model

    rank = int(spec.get("rank", DEFAULTS["rank"]))
    transposed = isinstance(module.get_submodule(names[0]), Conv1D)
    config = LoraConfig(
        r=rank, lora_alpha=spec.get("alpha") or 2 * rank, target_modules=list(names), fan_in_fan_out=transposed, bias="none"
    )
    inject_adapter_in_model(config, module)


def _targets(model: Model, spec: Spec) -> list[str]:
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise MissingExtra("peft", "lora") from error
    roles = spec.get("targets", ROLES)
    roles = [roles] if isinstance(roles, str) else roles
    names = targets_of(model.module, roles)
    if not names:
        raise InputError(f"lora: the model has no {', '.join(roles)} that could be adapted")
    linears = model.linears()
    pruned = [name for name in names if float((linears[name].weight == 0).float().mean()) > PRUNED]
    if pruned:
        raise InputError(
            f"lora: {len(pruned)} matrices ({pruned[0]}, ...) have zeros that pruning made, and an adapter would fill them; "
            "train without lora, which keeps them"
        )
    return names


def _there(block: nn.Module, path: str) -> bool:
    try:
        block.get_submodule(path)
    except AttributeError:
        return False
    return True
