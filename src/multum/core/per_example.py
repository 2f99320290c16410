"""Gradients of single examples: Opacus' hooks on a module, a loss that is asked of one example at a time, and a proof of both.

A mean over a batch may mix examples (a mean over all tokens, whose number the others decide). So the module runs on a batch, and
the loss is asked of every example's own outputs. Whether Opacus' rules for all layers fit the module is not taken on trust: on
three examples the gradients are compared with those that autograd gives of each alone.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import nn
from transformers.utils.generic import ModelOutput

from ..errors import InputError
from .padding import FEW_SHAPES, pad
from .while_training import dropout_as

Batch = dict[str, torch.Tensor]
TOLERANCE = 1e-3
"""Of a parameter's gradient, by norm; fp32 differs by some 1e-6 between orders of summation."""
LEFT_BEHIND = ("activations", "max_batch_len")
"""What hooks leave on layers."""
INSTEAD = "train with lora, which leaves all but linear layers as it is, or take another model"


def batch_of(rows: Sequence[Mapping[str, Any]], pad_token_id: int | None, module: nn.Module) -> Batch:
    """Rows as a padded batch where the module is."""
    device = next(module.parameters()).device
    return {name: value.to(device) for name, value in pad(rows, pad_token_id, multiple=FEW_SHAPES).items()}


class PerExample:
    """Inside a `with`, `backward` leaves every parameter's gradients in `grad_sample`, (examples, *shape).

    Args:
        module: the parameters that take gradients are trained, but for those that the loss does not reach.
        loss: (module, batch) -> scalar.
        batch: rows -> batch.
    """

    def __init__(self, module: nn.Module, loss: Callable[..., torch.Tensor], batch: Callable[[Any], Batch]) -> None:
        self._module, self._loss, self._batch, self._n = module, loss, batch, 0
        self.trained: list[nn.Parameter] = []
        self._taken = {name: p.requires_grad for name, p in module.named_parameters()}
        self._was_training = module.training

    def __enter__(self) -> PerExample:
        """Raises: InputError, naming all layers that Opacus cannot handle."""
        from opacus.grad_sample import GradSampleHooks
        from opacus.validators import ModuleValidator

        self._module.train()
        if problems := self._foreign(GradSampleHooks.GRAD_SAMPLERS, ModuleValidator.VALIDATORS):
            raise InputError(*problems)
        self._hooks = GradSampleHooks(self._module, loss_reduction="sum")
        self._expanding = [
            part.register_forward_pre_hook(self._one_each) for part in self._module.modules() if isinstance(part, nn.Embedding)
        ]
        self.trained = [p for p in self._module.parameters() if p.requires_grad]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for handle in self._expanding:
            handle.remove()
        self._hooks.cleanup()
        for part in self._module.modules():
            for name in LEFT_BEHIND:
                part.__dict__.pop(name, None)
        for name, parameter in self._module.named_parameters():
            parameter.__dict__.pop("summed_grad", None)
            parameter.grad = None
            parameter.requires_grad_(self._taken[name])
        self._module.train(self._was_training)

    def backward(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """The gradients of these rows' losses, each of its row alone; of no rows, none."""
        if not rows:
            for parameter in self.trained:
                parameter.grad_sample = parameter.new_zeros(0, *parameter.shape)  # type: ignore[attr-defined]
            return
        losses = self._losses(self._batch(rows))
        with _first_layers():
            losses.sum().backward()

    def _losses(self, batch: Batch) -> torch.Tensor:
        """(examples,)."""
        self._n, outputs = len(batch["input_ids"]), None

        def run(**inputs: torch.Tensor) -> Any:
            nonlocal outputs
            outputs = self._module(**inputs)
            return outputs

        self._loss(run, dict(batch))
        return torch.stack(
            [
                self._loss(lambda at=at, **_: _only(outputs, at), {name: value[at : at + 1] for name, value in batch.items()})
                for at in range(self._n)
            ]
        )

    def prove(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Compare with autograd, dropout off; parameters that the loss does not reach stop being trained.

        Raises:
            InputError: names the layers whose gradients are not those of single examples.
        """
        named = {name: p for name, p in self._module.named_parameters() if p.requires_grad}
        self._module.eval()
        alone = [
            self._alone({name: value[at : at + 1] for name, value in self._batch(rows).items()}, named) for at in range(len(rows))
        ]
        self._module.train()
        for name in [name for name, gradient in alone[0].items() if gradient is None]:
            named.pop(name).requires_grad_(False)
        with dropout_as(self._module, on=False):
            try:
                self.backward(rows)
            except (NotImplementedError, RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
                said = (str(error) or type(error).__name__).splitlines()[0]
                raise InputError(f"dp_epsilon: Opacus cannot handle a layer of this model ({said}); {INSTEAD}") from error
        total = max(float(gradient.norm()) for gradients in alone for gradient in gradients.values() if gradient is not None)
        wrong = [
            name
            for name, p in named.items()
            if not _same(p.grad_sample, [gradients[name] for gradients in alone], 1e-6 * total)  # type: ignore[attr-defined]
        ]
        for parameter in named.values():
            parameter.grad = parameter.grad_sample = None  # type: ignore[attr-defined]
        if wrong:
            raise InputError(_unhandled(self._module, wrong))
        self.trained = list(named.values())

    def _alone(self, batch: Batch, named: Mapping[str, nn.Parameter]) -> dict[str, torch.Tensor | None]:
        self._hooks.disable_hooks()
        self._n = 1
        with _first_layers():
            found = torch.autograd.grad(self._loss(self._module, dict(batch)), list(named.values()), allow_unused=True)
        self._hooks.enable_hooks()
        return dict(zip(named, found, strict=True))

    def _one_each(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Positions are often looked up once for all examples; once for each, they have gradients of each."""
        ids = args[0] if args else None
        if isinstance(ids, torch.Tensor) and ids.dim() == 2 and len(ids) == 1 < self._n:
            return (ids.expand(self._n, -1), *args[1:])
        return None

    def _foreign(self, known: Mapping[type, Any], validators: Mapping[type, Any]) -> list[str]:
        """What can be said to be wrong without running anything."""
        problems = []
        for name, part in self._module.named_modules():
            if not any(p.requires_grad for p in part.parameters(recurse=False)):
                continue
            kind, reason = type(part), ""
            if kind in validators and validators[kind](part):
                reason = "mixes examples or hides its gradients"
            elif kind not in known and next(part.children(), None) is not None:
                reason = "has weights of its own beside its parts"
            elif next(part.buffers(), None) is not None:
                reason = "has buffers, which would not be private"
            if reason:
                problems.append(f"dp_epsilon: Opacus cannot handle {name or 'the model'} ({kind.__name__}): it {reason}; {INSTEAD}")
        return problems


@contextlib.contextmanager
def _first_layers() -> Iterator[None]:
    """Without torch's warning that what goes into an embedding has no gradient; hooks look at what comes out."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Full backward hook is firing")
        yield


def _only(outputs: Any, at: int) -> Any:
    """One example's part of a model's outputs, batched still."""
    pairs = outputs.items() if isinstance(outputs, ModelOutput) else vars(outputs).items()
    return type(outputs)(**{name: value[at : at + 1] for name, value in pairs if isinstance(value, torch.Tensor) and value.dim()})


def _same(found: Any, expected: Sequence[torch.Tensor | None], floor: float) -> bool:
    if not isinstance(found, torch.Tensor) or len(found) != len(expected):
        return False
    wanted = torch.stack([torch.zeros_like(found[0]) if one is None else one for one in expected])
    return float((found - wanted).norm()) <= TOLERANCE * float(wanted.norm()) + floor


def _unhandled(module: nn.Module, names: Sequence[str]) -> str:
    parts = sorted({name.rpartition(".")[0] for name in names})
    listed = ", ".join(f"{part} ({type(module.get_submodule(part)).__name__})" for part in parts[:4])
    more = f" and {len(parts) - 4} more" if len(parts) > 4 else ""
    return f"dp_epsilon: Opacus does not give the gradients of single examples of {listed}{more}; {INSTEAD}"
