"""Whether a teacher and a student can be distilled into one another, and loading the one that goes with the other."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import transformers
from torch import nn
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES

from .core.hub import loading
from .core.packed import packed_parts, refuse_packed
from .errors import InputError
from .steps._classes import teacher_columns
from .steps._layers import LayerLosses
from .steps._outputs import LANGUAGE_MODELS, PER_EXAMPLE, Kind, kind_of, untrained

_MULTIPLE_CHOICE = frozenset(MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES.values())
PADDING = 128
"""Vocabularies are padded to a multiple of at most so many tokens, or by less than a hundredth of their size."""
PROBES = ["The quick brown fox isn't 3.5 km from Zürich!", "多 lines\n and  spaces, e.g. JAVASCRIPT_code = 12345;"]
"""Tokenizers that agree on their vocabulary and on these are taken to be the same."""
TEXT_COLUMNS = (("text", "text_pair"), ("sentence1", "sentence2"), ("text",), ("sentence",))
"""Where texts are looked for, in this order."""
LANGUAGE_COLUMNS: dict[Kind, tuple[tuple[str, ...], ...]] = {
    "causal_lm": (("prompt", "completion"), ("text",)),
    "seq2seq": (("source", "target"), ("text", "target"), ("document", "summary")),
}
"""Where those of models that write are."""
AUTO_CLASS: dict[Kind, str] = {
    "single_label": "AutoModelForSequenceClassification",
    "multi_label": "AutoModelForSequenceClassification",
    "regression": "AutoModelForSequenceClassification",
    "token_labels": "AutoModelForTokenClassification",
    "question_answering": "AutoModelForQuestionAnswering",
    "masked_lm": "AutoModelForMaskedLM",
    "causal_lm": "AutoModelForCausalLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
}


def loaded(source: str, other: nn.Module, *, trained: bool) -> Any:
    """A model from a folder or the Hub with the same kind of head as another one.

    Args:
        source: folder or Hub id.
        other: what it is to be distilled with; a new head gets its classes.
        trained: whether it must have a trained head.

    Raises:
        InputError: no such model, or its head is new and must not be.
    """
    kind, config = kind_of(inner(other)), inner(other).config
    auto_class = AUTO_CLASS[kind]
    try:
        architectures = AutoConfig.from_pretrained(source, **loading(source)).architectures or []
        has_head = any(name.endswith(auto_class.removeprefix("AutoModel")) for name in architectures)
        classes: dict[str, Any] = {}
        if not has_head and kind in (*PER_EXAMPLE, "token_labels"):
            classes = {name: getattr(config, name) for name in ("num_labels", "id2label", "label2id", "problem_type")}
        model, info = getattr(transformers, auto_class).from_pretrained(source, output_loading_info=True, **classes)
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{source}: cannot load it as {auto_class}: {reason}") from error
    if trained and info["missing_keys"]:
        raise InputError(f"the teacher {source} {untrained(model)} (no {sorted(info['missing_keys'])[0]})")
    return model


def both_loaded(teacher: Any, student: Any, maker: Any) -> tuple[Any, Any]:
    """Student and teacher, a string loaded to go with the other one. Without a student there must be a maker of one."""
    if student is None and maker is None:
        raise InputError("student_model is missing; pass a model, or model_init to make one")
    for name, given in (("teacher_model", teacher), ("student_model", student)):
        if not isinstance(given, (str, nn.Module)) and (given is not None or name == "teacher_model"):
            raise InputError(f"{name} must be a model, or the name of a folder or on the Hub (got {given!r})")
    if isinstance(teacher, str) and not isinstance(student, nn.Module):
        raise InputError("one of teacher_model and student_model must be a model; it says how to load the other one")
    if isinstance(student, str):
        student = loaded(student, teacher, trained=False)
    return student, loaded(teacher, student, trained=True) if isinstance(teacher, str) else teacher


def inner(model: Any) -> Any:
    """The transformers model under adapters of peft, if there are any."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def columns_of(model: Any) -> list[str]:
    """What a model's forward pass takes by name."""
    return [name for name, p in inspect.signature(inner(model).forward).parameters.items() if p.kind is not p.VAR_KEYWORD]


@dataclass(frozen=True)
class Agreement:
    """How student and teacher are compared."""

    order: list[int] | None
    """Which of the teacher's classes is each of the student's; None: the same."""
    texts: tuple[str, ...] | None
    """The columns with the texts, if each model has to read them with its own tokenizer."""


def agreement(
    student: nn.Module,
    teacher: nn.Module,
    *,
    tokenizers: tuple[Any, Any],
    data: Sequence[Any],
    columns: Sequence[str] | None,
    layer_losses: bool,
    cache: bool,
    across: bool = False,
) -> Agreement:
    """Whether two models can be distilled into one another, and how.

    Args:
        student: a model with a head.
        teacher: another one.
        tokenizers: the student's and the teacher's; None for those that are not known.
        data: the data sets at hand.
        columns: where the texts are; None: in the usual places.
        layer_losses: whether layers are compared too.
        cache: whether the teacher's outputs are to be kept.
        across: whether distributions over different vocabularies can be compared.

    Raises:
        InputError: lists what does not fit.
    """
    if inner(student) is student and packed_parts(student):  # adapters can be trained beside packed weights
        refuse_packed(student, "student_model")
    problems = _same_task(student, teacher)
    if problems:
        raise InputError(*problems)
    kind, configs = kind_of(inner(student)), [inner(model).config for model in (student, teacher)]
    problems += _no_prompts({"student": student, "teacher": teacher}, kind, layer_losses)
    order, texts = None, None
    if kind in ("single_label", "multi_label", "token_labels"):
        try:
            order = teacher_columns(*configs)
        except InputError as error:
            problems += error.problems
    if kind == "regression" and configs[0].num_labels != configs[1].num_labels:
        problems.append(f"the student has {configs[0].num_labels} numbers as output and the teacher {configs[1].num_labels}")
    if cache and kind not in PER_EXAMPLE:
        problems.append(
            "cache: it keeps one row an example (classes, several labels, numbers; of language models sparse logits), "
            f"and these outputs are {kind}"
        )
    if (cache or layer_losses) and any(type(inner(model)).__name__ in _MULTIPLE_CHOICE for model in (student, teacher)):
        what = "cache" if cache else "layer_losses"
        problems.append(
            f"{what}: in multiple choice an example is several texts, one for each choice, which it does not know; leave it out, "
            "so that the teacher runs beside the student"
        )
    if tokenizers[1] is None:
        problems += _same_vocabulary(*configs)
    elif tokenizers[0] is None:
        problems.append("teacher_processing_class needs the student's tokenizer too (processing_class), to be compared with it")
    elif tokenizers_differ(*tokenizers):
        texts = text_columns(data, columns, LANGUAGE_COLUMNS.get(kind, TEXT_COLUMNS))
        problems += _each_for_itself(kind, texts, columns, layer_losses, across)
    if problems:
        raise InputError(*problems)
    return Agreement(order, texts)


def _same_task(student: nn.Module, teacher: nn.Module) -> list[str]:
    if not any(p.requires_grad for p in student.parameters()):
        return ["no weight of the student can be trained: all are frozen (requires_grad_)"]
    if ids := {id(p) for p in teacher.parameters()} & {id(p) for p in student.parameters()}:
        return [f"teacher and student share {len(ids)} weights, so that the teacher would change in training; copy it (deepcopy)"]
    kinds = kind_of(inner(student)), kind_of(inner(teacher))
    said = [getattr(inner(model).config, "problem_type", None) for model in (student, teacher)]
    if kinds[0] != kinds[1] and (AUTO_CLASS[kinds[0]] != AUTO_CLASS[kinds[1]] or None not in said):
        return [f"the student's outputs are {kinds[0]} and the teacher's {kinds[1]}; both must have the same task"]
    return []


def _no_prompts(models: Mapping[str, Any], kind: Kind, layer_losses: bool) -> Iterator[str]:
    """What stands in the way of models to whose texts peft adds tokens of its own (prompt tuning) or keys (prefix tuning)."""
    for name, model in models.items():
        config: Any = getattr(model, "active_peft_config", None)
        if not getattr(config, "is_prompt_learning", False):
            continue
        added = f"{config.peft_type.value.lower()} adds {config.num_virtual_tokens} virtual tokens to every text of the {name}"
        if layer_losses:
            yield f"layer_losses: layers are compared token by token, but {added}; train LoRA adapters, or leave layer_losses out"
        elif kind not in PER_EXAMPLE and config.peft_type.value != "PREFIX_TUNING":  # which adds no outputs
            yield f"answers are compared token by token, but {added}; train LoRA adapters"


def _same_vocabulary(student: Any, teacher: Any) -> list[str]:
    """Why two configs cannot read the same ids, by the sizes of their vocabularies; padding to a rounder size does not matter."""
    ours, theirs = getattr(student, "vocab_size", None), getattr(teacher, "vocab_size", None)
    if ours is None or theirs is None or abs(ours - theirs) < max(PADDING, max(ours, theirs) / 100):
        return []
    return [
        f"the student's vocabulary has {ours} tokens and the teacher's {theirs}, so they cannot read the same ids; pass both "
        "tokenizers (processing_class, teacher_processing_class) and keep the texts in the data set"
    ]


def tokenizers_differ(student: Any, teacher: Any) -> bool:
    """Whether the same text becomes other ids."""
    if student is teacher or not all(hasattr(each, "get_vocab") for each in (student, teacher)):
        return False
    if student.get_vocab() != teacher.get_vocab():
        return True
    return bool(student(PROBES)["input_ids"] != teacher(PROBES)["input_ids"])


def _each_for_itself(
    kind: Kind, texts: tuple[str, ...] | None, columns: Sequence[str] | None, layer_losses: bool, across: bool
) -> Iterator[str]:
    """What stands in the way of models that read each text in tokens of their own."""
    differ = "student and teacher have different tokenizers"
    if kind not in PER_EXAMPLE and not (across and kind in LANGUAGE_COLUMNS):
        what = "over other vocabularies" if kind in LANGUAGE_MODELS else "for other tokens"
        or_else = ", or divergence='uld'" if kind in LANGUAGE_COLUMNS else ""
        yield f"{differ}, so their {kind} outputs are {what}; take a teacher with the student's tokenizer{or_else}"
    if layer_losses:
        yield f"layer_losses: layers are compared token by token, but {differ}"
    if texts is None:
        usual = LANGUAGE_COLUMNS.get(kind, TEXT_COLUMNS)
        named = (
            " and ".join([columns] if isinstance(columns, str) else columns)
            if columns
            else ", or ".join(" and ".join(each) for each in usual)
        )
        yield (
            f"{differ}, so each must read the texts itself, but the data has no column {named}; keep the texts, or name their "
            "columns (text_columns)"
        )


def text_columns(
    data: Sequence[Any], named: Sequence[str] | None, usual: Sequence[tuple[str, ...]] = TEXT_COLUMNS
) -> tuple[str, ...] | None:
    """The columns with the texts, one or two, that all the data sets have."""
    found = [set(_column_names(each)) for each in data]
    candidates = [(named,) if isinstance(named, str) else tuple(named)] if named else usual
    return next((columns for columns in candidates if found and all(set(columns) <= names for names in found)), None)


def _column_names(data: Any) -> list[str]:
    names = getattr(data, "column_names", None)
    return list(names) if names is not None else list(data[0]) if len(data) else []


def data_sets(trainer: Mapping[str, Any]) -> list[Any]:
    """All data sets that Trainer is given."""
    evaluation = trainer.get("eval_dataset")
    found = [trainer.get("train_dataset"), *(evaluation.values() if isinstance(evaluation, dict) else [evaluation])]
    return [data for data in found if data is not None]


def layer_losses_of(given: LayerLosses | Mapping[str, Any] | None) -> LayerLosses | None:
    """Layer losses from a dict of their fields."""
    if given is None or isinstance(given, LayerLosses):
        return given
    known = [field.name for field in fields(LayerLosses)]
    if not isinstance(given, Mapping):
        raise InputError(f"layer_losses is a dict of {', '.join(known)} (got {given!r})")
    if unknown := sorted(set(given) - set(known), key=str):
        raise InputError(f"layer_losses has no {', '.join(map(str, unknown))}; it takes {', '.join(known)}")
    return LayerLosses(**given)
