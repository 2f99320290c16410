"""What a `DistillationTrainer` is told beside what every Trainer is, and what is wrong with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from transformers import TrainingArguments

from ._pair import layer_losses_of
from .core.folders import check_writable
from .core.sparse_logits import Thinning, thinning_of
from .errors import InputError
from .steps._divergences import Divergence, divergence_of, forward_kl, uld
from .steps._layers import LayerLosses
from .steps._numbers import is_number, mixing_problems, share_problems
from .steps._outputs import LANGUAGE_MODELS, Kind

T = TypeVar("T")
WRITERS = ("causal_lm", "seq2seq")
"""Kinds of models that write texts."""


@dataclass(kw_only=True)
class Settings:
    """The values that a trainer was given, read."""

    temperature: float
    alpha: float
    divergence: Divergence
    layer_losses: LayerLosses | None
    cache: Path | None
    thinning: Thinning | None
    """None: it was left open."""
    on_policy: float

    def misfits(self, kind: Kind) -> Iterator[str]:
        """What cannot be had for this kind of outputs."""
        sparse = self.cache is not None and kind in LANGUAGE_MODELS
        if kind == "regression" and self.divergence is not forward_kl:
            yield "divergence: numbers have no distributions to compare; their loss is the squared error, so leave it out"
        if self.divergence is uld and kind not in WRITERS:
            yield (
                "divergence: 'uld' does not know which class is which; it is for causal and encoder-decoder language models alone, "
                f"and these outputs are {kind}"
            )
        elif self.divergence is uld and self.temperature != 1:
            yield f"divergence: 'uld' compares probabilities as they are; set temperature=1.0 (got {self.temperature})"
        if sparse and (self.temperature != 1 or self.divergence is not forward_kl):
            yield (
                "cache: of a language model's answers it keeps a sample, from which only forward KL at temperature 1 can be "
                "estimated; set temperature=1.0 and divergence='forward_kl', or run the teacher beside the student"
            )
        if sparse and self.layer_losses:
            yield "cache: the layers of language models are not kept; leave out layer_losses, or run the teacher beside the student"
        if self.thinning and not sparse:
            yield "sparse_logits says how a cache keeps the answers of a language model; it needs cache, and such a model"
        if self.on_policy > 0 and kind not in WRITERS:
            yield f"on_policy: only causal and encoder-decoder language models can write texts, and these outputs are {kind}"


def settings_of(
    args: TrainingArguments,
    trainer: Mapping[str, Any],
    *,
    temperature: float,
    alpha: float,
    divergence: str | Mapping[str, float],
    layer_losses: LayerLosses | Mapping[str, Any] | None,
    cache: str | Path | None,
    sparse_logits: Mapping[str, int] | None,
    on_policy: float,
) -> Settings:
    """The values, read and checked.

    Args:
        args: those of Trainer.
        trainer: what else Trainer is given.

    Raises:
        InputError: lists what is wrong with them.
    """
    problems = list(_unfit(args, trainer))
    if problems:
        raise InputError(*problems)

    def read(reader: Callable[[Any], T], given: Any) -> T | None:
        try:
            return reader(given)
        except InputError as error:
            problems.extend(error.problems)
            return None

    settings = Settings(
        temperature=temperature,
        alpha=alpha,
        divergence=read(divergence_of, divergence) or forward_kl,
        layer_losses=read(layer_losses_of, layer_losses),
        cache=read(_folder, cache) if cache else None,
        thinning=read(thinning_of, sparse_logits) if sparse_logits is not None else None,
        on_policy=on_policy,
    )
    problems += _wrong(settings, args, trainer)
    if problems:
        raise InputError(*problems)
    return settings


def _unfit(args: Any, trainer: Mapping[str, Any]) -> Iterator[str]:
    """What Trainer is given and could do nothing with; its own messages are about something else."""
    if not isinstance(args, TrainingArguments):
        yield f"args must be TrainingArguments (got {type(args).__name__})"
    if "model" in trainer:
        yield "model: the model to train is student_model here"
    if getattr(args, "predict_with_generate", False):
        yield "predict_with_generate: logits are predicted here; leave it out, and let a Seq2SeqTrainer of the student write"
    data = trainer.get("train_dataset")
    if isinstance(data, Mapping):
        yield f"train_dataset holds several data sets ({', '.join(map(str, data))}); pass one of them"
    elif isinstance(data, str) or not (data is None or hasattr(data, "__getitem__") or hasattr(data, "__iter__")):
        yield f"train_dataset must be a data set (got {data!r}); datasets.load_dataset makes one of a file"
    elif isinstance(data, Sized) and not len(data):
        yield "train_dataset is empty"


def _folder(given: Any) -> Path:
    if not isinstance(given, (str, Path)):
        raise InputError(f"cache is a folder (got {given!r})")
    check_writable(Path(given))
    return Path(given)


def _wrong(settings: Settings, args: TrainingArguments, trainer: Mapping[str, Any]) -> Iterator[str]:
    layers, whole_models = settings.layer_losses, "which FSDP and DeepSpeed cut in pieces"
    yield from (f"layer_losses: {problem}" for problem in (layers.problems() if layers else []))
    yield from mixing_problems(settings.temperature, settings.alpha)
    yield from share_problems(on_policy=settings.on_policy)
    writes = is_number(settings.on_policy) and settings.on_policy > 0
    if layers and settings.cache and getattr(trainer.get("processing_class"), "padding_side", "right") != "right":
        yield "cache: layers are kept without padding and come back padded on the right; set padding_side='right'"
    if layers and any(trainer.get("optimizers", (None, None))):
        yield "layer_losses: their projections are trained with the student, so Trainer must make the optimizer itself"
    if layers and (args.fsdp or args.deepspeed):
        yield f"layer_losses: they look into the layers of whole models, {whole_models}"
    if writes and (args.fsdp or args.deepspeed):
        yield f"on_policy: texts are written by whole models, {whole_models}"
    if writes and settings.cache:
        yield "on_policy: what the student writes is new each time, so the teacher's answers to it cannot come from a cache"
    if writes and settings.alpha == 0:
        yield "on_policy: only the teacher says anything of what the student writes, and alpha=0 does not listen to it"
