"""fit(): the one training loop, a Hugging Face Trainer that is given a loss.

Techniques own the loss, never the loop, so Accelerate (several processes, FSDP, DeepSpeed), mixed precision, checkpoints and
resume come with it for all of them.
"""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from ..errors import InputError, MultumError
from .estimate import estimate, is_long
from .lora import Spec, adapted, lora_problems
from .loss_trainer import AfterStep, ListDataset, LossTrainer
from .loss_trainer import Loss as Loss
from .loss_trainer import Rows as Rows
from .memory import give_back
from .model import Model
from .packed import refuse_packed
from .padding import FEW_SHAPES as FEW_SHAPES
from .padding import in_parts
from .padding import pad as pad
from .private import Budget, train_privately
from .processes import count
from .reporting import anyone_reads, remark
from .while_training import attention_for_training, dropout_as, joined, recomputed, zeros_kept

Precision = Literal["auto", "fp32", "bf16"]


def fit(
    model: Model,
    rows: Rows | torch.utils.data.IterableDataset[Any],
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
    accumulate: int = 1,
    checkpointing: bool = False,
    lora: Spec | None = None,
    seed: int = 0,
    after_step: Callable[[nn.Module], None] | None = None,
    checkpoints: Path | None = None,
    save_every: int | None = None,
    extra: nn.Module | None = None,
    private: Budget | None = None,
) -> dict[str, Any]:
    """Train `model.module` in place with AdamW, linear warm-up and decay, gradients clipped to norm 1. Of several processes each
    takes its share of every batch, and all end with the same weights.

    Weights that are exactly zero stay so, which is all the mask registry that prune-then-train needs.

    Args:
        model: changed in place.
        rows: encoded examples (`input_ids`, `attention_mask`, ...), unpadded; or a stream of them, which takes `steps`.
        loss: (module, padded batch) -> scalar, a mean over its items (`item_count`); or that and a mean over its examples.
        epochs: passes over `rows`.
        steps: optimizer steps, in the place of `epochs`. A stream is read until they are done, and must be long enough.
        learning_rate: the highest, reached after the share `warmup` of all steps.
        dropout: False switches the model's dropout off while training.
        precision: `bf16` is autocast; `auto` takes it where the processor has instructions for it.
        accumulate: parts that a batch is computed in, one after the other, which takes less memory; it divides `batch_size`.
        checkpointing: compute every block again on the way back, which takes less memory and a third more time.
        lora: train low-rank adapters in the place of the blocks' matrices (`core/lora`); they are merged in the end.
        after_step: called with the module after every optimizer step.
        checkpoints: keep one here after each epoch, and go on from the last one found. A stream is then read again up to there.
        save_every: keep one after so many optimizer steps instead.
        extra: what else the loss trains (a projection), on the same terms; it is no part of the model afterwards.
        private: train under differential privacy (`core/private`) in a loop of its own: in fp32, `loss` asked of single examples.

    Returns:
        `loss` (mean over the run) and `seconds`; of a private training `seconds` and `privacy`.

    Raises:
        InputError: the model is quantized already, cannot take `checkpointing` or `lora`, or a batch cannot be shared out.
        MissingExtra: `lora` or `private` takes a package that is not installed.
        MultumError: the loss became infinite or not a number.
    """
    refuse_packed(model.module, "training")
    if problems := _parts_problems(batch_size, accumulate):
        raise InputError(*problems)
    give_back()  # what an earlier fit has left
    _as_before_accelerate(model.module)  # another Trainer may have left it
    module, data = model.module, rows if isinstance(rows, torch.utils.data.IterableDataset) else ListDataset(rows)
    with (
        tempfile.TemporaryDirectory() as scratch,
        on_accelerator(module),
        attention_for_training(module, on_cpu=accelerator() == "cpu"),
        dropout_as(module, on=dropout),
        recomputed(module, on=checkpointing),
        zeros_kept(module) as zero_again,
        adapted(model, lora, seed),
        joined(module, extra),
    ):
        if private is not None and isinstance(data, ListDataset):
            return train_privately(
                module,
                data.rows,
                loss,
                private,
                pad_token_id=model.tokenizer.pad_token_id,
                epochs=epochs,
                steps=steps,
                batch_size=batch_size,
                at_once=batch_size // accumulate,
                warmup=warmup,
                after_step=zero_again,
                learning_rate=learning_rate,
                weight_decay=weight_decay,
            )
        if anyone_reads():
            _tell_what_it_takes(model, data, epochs, steps, batch_size, batch_size // accumulate, precision)
        trainer = LossTrainer(
            loss=loss,
            model=module,
            args=_arguments(
                output_dir=str(checkpoints or scratch),
                save_strategy=("steps" if save_every else "epoch") if checkpoints else "no",
                save_steps=save_every or 500,
                num_train_epochs=epochs,
                max_steps=steps or -1,
                train_sampling_strategy="group_by_length" if isinstance(data, ListDataset) else "random",
                learning_rate=learning_rate,
                per_device_train_batch_size=batch_size // accumulate // count(),
                gradient_accumulation_steps=accumulate,
                weight_decay=weight_decay,
                warmup_steps=warmup,
                bf16=resolve_precision(precision) == "bf16",
                seed=seed,
                # What is used outside of the model's own forward pass would be taken for unused.
                ddp_find_unused_parameters=False if extra is not None else None,
            ),
            train_dataset=data,
            data_collator=lambda features: [
                pad(part, model.tokenizer.pad_token_id, multiple=FEW_SHAPES)
                for part in (in_parts(features) if accelerator() == "cpu" and count() == 1 else [features])
            ],
            callbacks=[AfterStep([zero_again, *([after_step] if after_step else [])])],
        )
        try:
            result = _trained(trainer, checkpoints)
        finally:
            _as_before_accelerate(module)
    training_loss = trainer.over_processes(result.training_loss)
    if not math.isfinite(training_loss):
        raise MultumError("training diverged: the loss is no longer a number; try a lower learning rate")
    module.eval()
    return {"loss": round(training_loss, 4), "seconds": round(result.metrics["train_runtime"], 1)}


def _trained(trainer: LossTrainer, checkpoints: Path | None) -> Any:
    """What Trainer says after training, from the last checkpoint if there is one."""
    if begun := last_checkpoint(checkpoints):
        remark(f"goes on from {begun}")
    try:
        return trainer.train(resume_from_checkpoint=begun)
    except KeyboardInterrupt:
        if kept := last_checkpoint(checkpoints):
            remark(f"{kept} is kept: the same command goes on from there")
        raise


def last_checkpoint(checkpoints: Path | None) -> str | None:
    """Where a training that keeps its state in this folder goes on; None where it begins."""
    return get_last_checkpoint(str(checkpoints)) if checkpoints and checkpoints.is_dir() else None


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


def _tell_what_it_takes(
    model: Model, data: Any, epochs: float, steps: int | None, batch_size: int, at_once: int, precision: Precision
) -> None:
    """One line with the time and the memory, if it will take a while."""
    rows = data.rows if isinstance(data, ListDataset) else [next(iter(data))]
    if not rows or "input_ids" not in rows[0]:
        return
    mean = sum(len(row["input_ids"]) for row in rows) / len(rows)
    examples = steps * batch_size if steps else epochs * len(rows)
    if is_long(model.module, examples * mean):
        device = next(model.module.parameters()).device

        def batch(some: Rows) -> dict[str, torch.Tensor]:
            return {name: value.to(device) for name, value in pad(some, model.tokenizer.pad_token_id, multiple=FEW_SHAPES).items()}

        with autocast(precision):
            found = estimate(model.module, rows, batch, examples=examples, at_once=at_once)
        passes = f" in {epochs:g} epochs" if steps is None and epochs != 1 else ""
        remark(f"{examples:,.0f} examples{passes}: {found.line()}")


def _as_before_accelerate(module: nn.Module) -> None:
    """Take off what accelerate leaves: around `forward`, which a saved and loaded copy would not have, and its mark, because of
    which the next training would not be under autocast."""
    if module.__dict__.pop("_original_forward", None):
        module.__dict__.pop("forward", None)
    module.__dict__.pop("_is_accelerate_prepared", None)


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


def memory_problems(batch_size: int, accumulate: int, lora: Spec | None) -> list[str]:
    """What is wrong with how memory is to be saved."""
    return [*lora_problems(lora), *_parts_problems(batch_size, accumulate)]


def _parts_problems(batch_size: int, accumulate: int) -> list[str]:
    """What is wrong with how a batch is cut."""
    if accumulate < 1 or batch_size % accumulate:
        return [f"accumulate must divide batch_size, {batch_size} (got {accumulate})"]
    if batch_size // accumulate % count():
        parts = f"{count()} processes" + (f" with {accumulate} parts each (accumulate)" if accumulate > 1 else "")
        return [f"batch_size is that of all processes together, and {batch_size} examples cannot be shared by {parts}"]
    return []


def training_problems(epochs: float, learning_rate: float, batch_size: int, warmup: float) -> list[str]:
    """What is wrong with the hyper-parameters that every training step has."""
    problems = []
    if not epochs > 0:
        problems.append(f"epochs must be above 0 (got {epochs})")
    if not 0 < learning_rate < 1:
        problems.append(f"learning_rate must be between 0 and 1 (got {learning_rate}); 1e-5 to 5e-4 is usual")
    if batch_size < 1:
        problems.append(f"batch_size must be at least 1 (got {batch_size})")
    else:
        problems += _parts_problems(batch_size, 1)
    if not 0 <= warmup < 1:
        problems.append(f"warmup is a share of all steps, 0 to 1 (got {warmup})")
    return problems
