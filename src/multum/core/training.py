"""fit(): the one training loop, a Hugging Face Trainer that is given a loss.

Techniques own the loss, never the loop, so Accelerate (several processes, FSDP, DeepSpeed), mixed precision, checkpoints and
resume come with it for all of them.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import get_last_checkpoint

from ..errors import MultumError
from .linears import is_linear
from .memory import give_back, trim
from .model import Model
from .padding import FEW_SHAPES as FEW_SHAPES
from .padding import pad as pad
from .reporting import report

Rows = Sequence[Mapping[str, Any]]
Loss = Callable[[nn.Module, dict[str, torch.Tensor]], torch.Tensor]
Precision = Literal["auto", "fp32", "bf16"]
TRIM_EVERY = 50
"""Optimizer steps after which freed memory goes back to the system: batches of many shapes leave holes in it."""


def fit(
    model: Model,
    rows: Rows | torch.utils.data.IterableDataset,
    loss: Loss,
    *,
    epochs: float = 1,
    steps: int | None = None,
    learning_rate: float,
    batch_size: int = 32,
    weight_decay: float = 0.01,
    warmup: float = 0.1,
    dropout: bool = True,
    precision: Precision = "auto",
    seed: int = 0,
    after_step: Callable[[nn.Module], None] | None = None,
    checkpoints: Path | None = None,
    save_every: int | None = None,
    extra: nn.Module | None = None,
) -> dict[str, float]:
    """Train `model.module` in place with AdamW, linear warm-up and decay, gradients clipped to norm 1.

    Weights that are exactly zero stay so, which is all the mask registry that prune-then-train needs.

    Args:
        model: changed in place.
        rows: encoded examples (`input_ids`, `attention_mask`, ...), unpadded; or a stream of them, which takes `steps`.
        loss: (module, padded batch) -> scalar, a mean over the batch.
        epochs: passes over `rows`.
        steps: optimizer steps, in the place of `epochs`. A stream is read until they are done, and must be long enough.
        learning_rate: the highest, reached after the share `warmup` of all steps.
        dropout: False switches the model's dropout off while training.
        precision: `bf16` is autocast; `auto` takes it where the processor has instructions for it.
        after_step: called with the module after every optimizer step.
        checkpoints: keep one here after each epoch, and go on from the last one found. A stream is then read again up to there.
        save_every: keep one after so many optimizer steps instead.
        extra: what else the loss trains (a projection), on the same terms; it is no part of the model afterwards.

    Returns:
        `loss` (mean over the run) and `seconds`.

    Raises:
        MultumError: the loss became infinite or not a number.
    """
    give_back()  # what an earlier fit has left
    module, data = model.module, rows if isinstance(rows, torch.utils.data.IterableDataset) else _ListDataset(rows)
    with (
        tempfile.TemporaryDirectory() as scratch,
        on_accelerator(module),
        _attention_for_training(module),
        _dropout(module, on=dropout),
        _zeros_kept(module) as zero_again,
        _joined(module, extra),
    ):
        trainer = _LossTrainer(
            loss=loss,
            model=module,
            args=_arguments(
                output_dir=str(checkpoints or scratch),
                save_strategy=("steps" if save_every else "epoch") if checkpoints else "no",
                save_steps=save_every or 500,
                num_train_epochs=epochs,
                max_steps=steps or -1,
                train_sampling_strategy="group_by_length" if isinstance(data, _ListDataset) else "random",
                learning_rate=learning_rate,
                per_device_train_batch_size=batch_size,
                weight_decay=weight_decay,
                warmup_steps=warmup,
                bf16=resolve_precision(precision) == "bf16",
                seed=seed,
                # What is used outside of the model's own forward pass would be taken for unused.
                ddp_find_unused_parameters=False if extra is not None else None,
            ),
            train_dataset=data,
            data_collator=lambda features: pad(features, model.tokenizer.pad_token_id, multiple=FEW_SHAPES),
            callbacks=[_AfterStep([zero_again, *([after_step] if after_step else [])])],
        )
        result = trainer.train(
            resume_from_checkpoint=get_last_checkpoint(str(checkpoints)) if checkpoints and checkpoints.is_dir() else None
        )
        _without_autocast(module)
    if not torch.isfinite(torch.tensor(result.training_loss)):
        raise MultumError("training diverged: the loss is no longer a number; try a lower learning rate")
    module.eval()
    return {"loss": round(result.training_loss, 4), "seconds": round(result.metrics["train_runtime"], 1)}


def _arguments(**hyper: Any) -> TrainingArguments:
    """These hyper-parameters and what is the same in every training."""
    return TrainingArguments(
        lr_scheduler_type="linear",
        use_cpu=accelerator() == "cpu",
        dataloader_pin_memory=torch.cuda.is_available(),
        save_total_limit=1,
        logging_strategy="no",
        logging_nan_inf_filter=False,  # it would hide a divergence in the mean
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        **hyper,
    )


def _without_autocast(module: nn.Module) -> None:
    """Take off what accelerate leaves around `forward`, which a saved and loaded copy would not have."""
    for name in ("forward", "_original_forward"):
        module.__dict__.pop(name, None)


def accelerator() -> str:
    """The type of this machine's accelerator (`cuda`, `mps`, ...), or `cpu`."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found.type if found else "cpu"


def resolve_precision(precision: Precision, device: str | None = None) -> Literal["fp32", "bf16"]:
    """What `auto` means on a type of device; on this machine's accelerator if none is named."""
    if precision != "auto":
        return precision
    device = device or accelerator()
    if device == "cpu":
        return "bf16" if torch.cpu._is_avx512_bf16_supported() else "fp32"
    supported = getattr(torch.get_device_module(device), "is_bf16_supported", None)
    return "bf16" if supported and supported() else "fp32"


@contextlib.contextmanager
def autocast(precision: Precision) -> Iterator[None]:
    """bf16 autocast where `precision` asks for it, for whatever device a module is on."""
    with contextlib.ExitStack() as stack:
        for device in sorted({"cpu", accelerator()}):
            stack.enter_context(torch.autocast(device, torch.bfloat16, enabled=resolve_precision(precision, device) == "bf16"))
        yield


@contextlib.contextmanager
def on_accelerator(module: nn.Module) -> Iterator[None]:
    """Have a module on the machine's accelerator, if there is one, and then again where it was."""
    before = next(module.parameters()).device
    module.to(accelerator())
    try:
        yield
    finally:
        module.to(before)


class _LossTrainer(Trainer):
    def __init__(self, *, loss: Loss, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.loss = loss
        self.remove_callback(PrinterCallback)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        return self.loss(model, inputs)


class _ListDataset(torch.utils.data.Dataset):
    def __init__(self, rows: Rows) -> None:
        self.rows = list(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return dict(self.rows[index])


class _AfterStep(TrainerCallback):
    def __init__(self, actions: Sequence[Callable[[nn.Module], None]]) -> None:
        self.actions = actions

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for action in self.actions:
            action(kwargs["model"])
        if state.global_step % TRIM_EVERY == 0:
            trim()
        report(state.global_step / state.max_steps)


@contextlib.contextmanager
def _attention_for_training(module: Any) -> Iterator[None]:
    """Eager attention on a CPU: the backward pass of its fused kernel takes longer than the rest of a small model."""
    before = getattr(module.config, "_attn_implementation", None)
    change = before == "sdpa" and accelerator() == "cpu"
    if change:
        module.set_attn_implementation("eager")
    try:
        yield
    finally:
        if change:
            module.set_attn_implementation(before)


@contextlib.contextmanager
def _dropout(module: nn.Module, *, on: bool) -> Iterator[None]:
    # Attention keeps its rate as a plain number beside the nn.Dropout modules (`dropout_prob` in some families).
    before = [
        (part, name, value)
        for part in module.modules()
        for name in ("p", "dropout", "dropout_prob", "attention_dropout")
        if isinstance(value := getattr(part, name, None), float)
    ]
    try:
        if not on:
            for part, name, _ in before:
                setattr(part, name, 0.0)
        yield
    finally:
        for part, name, value in before:
            setattr(part, name, value)


@contextlib.contextmanager
def _joined(module: nn.Module, extra: nn.Module | None) -> Iterator[None]:
    """Have another module inside this one for a while, so that the Trainer trains, clips, synchronises and saves both as one.

    Enter it after `_zeros_kept`: the zeros of a new projection are not there to stay.
    """
    if extra is None:
        yield
        return
    module.add_module("beside_the_model", extra.to(next(module.parameters()).device))
    try:
        yield
    finally:
        del module.beside_the_model


@contextlib.contextmanager
def _zeros_kept(module: nn.Module) -> Iterator[Callable[[nn.Module], None]]:
    """Yields a function that sets to zero again what was exactly zero at the start."""
    zeros = [
        (part.weight, part.weight == 0)
        for part in module.modules()
        if is_linear(part) and part.weight.numel() and bool((part.weight == 0).any())
    ]

    @torch.no_grad()
    def zero_again(_: nn.Module) -> None:
        for weight, mask in zeros:
            weight.masked_fill_(mask, 0.0)

    yield zero_again


def training_problems(epochs: float, learning_rate: float, batch_size: int, warmup: float) -> list[str]:
    """What is wrong with the hyper-parameters that every training step has."""
    problems = []
    if not epochs > 0:
        problems.append(f"epochs must be above 0 (got {epochs})")
    if not 0 < learning_rate < 1:
        problems.append(f"learning_rate must be between 0 and 1 (got {learning_rate}); 1e-5 to 5e-4 is usual")
    if batch_size < 1:
        problems.append(f"batch_size must be at least 1 (got {batch_size})")
    if not 0 <= warmup < 1:
        problems.append(f"warmup is a share of all steps, 0 to 1 (got {warmup})")
    return problems
