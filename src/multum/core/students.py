"""Students: the smaller models that a teacher teaches, made of a model at hand or loaded.

Three ways to ask for one:

- `{layers: 3}`: so many blocks of the model, evenly spaced from the first to the last (DistilBERT's start, arXiv:1910.01108);
  `{layers: [0, 2, 5]}`: these blocks; `{layers: 0}`: none, so that embeddings and head are all that is left. A head that reads
  the first token only then gives every text the same answer: the end of the curve, and no more than that.
- `{hidden_size: 128, num_hidden_layers: 2, num_attention_heads: 2, intermediate_size: 512}`: the same architecture in this size,
  with random weights; what is not named is as in the model. Tokenizer and labels are the model's.
- a folder or Hub id: that model, with the task's head.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch

from ..errors import InputError
from .channels import TAKEN
from .families import blocks_of
from .model import Model
from .packed import refuse_packed
from .shapes import without_shapes
from .surgery import PER_BLOCK, keep_blocks
from .task import Task

Spec = str | Mapping[str, Any]
"""What a student is asked for by."""
LAYERS = "layers"
"""The entry that names blocks of the model at hand."""
SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
"""The entries of a new model: width, blocks, heads of a block, feed-forward neurons of a block."""

logger = logging.getLogger(__name__)


def alternate(blocks: int, keep: int) -> list[int]:
    """`keep` numbers evenly spaced over 0 ... blocks - 1; both ends stay, of one only the first."""
    return [round(i * (blocks - 1) / (keep - 1)) for i in range(keep)] if keep > 1 else [0][:keep]


def student_problems(spec: Spec) -> list[str]:
    """What is wrong with a student whatever model it is to be made of, each in one sentence."""
    if isinstance(spec, str):
        if spec.isdigit() or spec.startswith("{"):  # what is meant, but not what YAML reads in it
            return [f"student: a number of layers is {{layers: 3}}, anything else a folder or Hub id (got {spec!r})"]
        return [] if spec else ["student names no folder or Hub id"]
    known = (LAYERS, *SIZES)
    problems = [f"student: no entry named {key!r}; there are: {', '.join(known)}" for key in spec if key not in known]
    sizes = [key for key in SIZES if key in spec]
    if not spec:
        problems.append(f"student is empty; give layers, or sizes: {', '.join(SIZES)}")
    if LAYERS in spec and sizes:
        problems.append(
            f"student: layers are blocks of the model at hand, {', '.join(sizes)} sizes of a new one; give one or the other"
        )
    if LAYERS in spec and not _is_layers(spec[LAYERS]):
        problems.append(f"student: layers is how many blocks stay, or different block numbers from 0 on (got {spec[LAYERS]!r})")
    problems += [
        f"student: {key} must be a whole number, at least {_least(key)} (got {spec[key]!r})"
        for key in sizes
        if not _is_count(spec[key], _least(key))
    ]
    return problems


def make_student(model: Model, spec: Spec, task: Task, *, seed: int = 0) -> tuple[Model, dict[str, Any]]:
    """A student, and notes for the history; `model` is left as it was.

    Args:
        model: what it is made of: its blocks, or its architecture, tokenizer and labels.
        spec: see the head of this file.
        task: loads a student from elsewhere with its head.
        seed: of random weights.

    Raises:
        InputError: lists everything that does not fit the model; or the student is quantized already.
    """
    if problems := student_problems(spec):
        raise InputError(*problems)
    if isinstance(spec, str):
        student = task.load(spec)
        refuse_packed(student.module, f"student {spec}")
        return student, {"student": student.source}
    ambiguous = [key for key in (LAYERS, *SIZES[1:]) if key in spec]
    if ambiguous and getattr(model.module.config, "is_encoder_decoder", False):
        raise InputError(
            f"student: {', '.join(ambiguous)} would not say of which stack, and models of type {model.module.config.model_type!r} "
            "have an encoder and a decoder; shorten one with drop_layers, or name a folder or Hub id"
        )
    kept = _blocks(len(blocks_of(model.module)), spec[LAYERS]) if LAYERS in spec else []
    if not kept and (LAYERS in spec or spec.get("num_hidden_layers") == 0):
        logger.warning("a student without layers mixes no tokens: a head that reads the first one gives all texts the same answer")
    if LAYERS not in spec:
        return _fresh(model, spec, seed), {"student": dict(spec)}
    student = model.copy()
    keep_blocks(student.module, kept)
    return student, {"kept_blocks": kept}


def turn_into(model: Model, student: Model) -> None:
    """Make a model the student, in place, as steps change what they are given."""
    for each in fields(Model):
        setattr(model, each.name, getattr(student, each.name))


def _blocks(there: int, layers: Any) -> list[int]:
    """The numbers of the blocks that stay."""
    if isinstance(layers, int):
        if layers > there:
            raise InputError(f"student: layers is {layers}, but the model has only {there} blocks")
        return alternate(there, layers)
    if missing := [block for block in layers if block >= there]:
        has = f"the blocks 0 to {there - 1}" if there else "no blocks"
        raise InputError(f"student: the model has {has}, no {', '.join(map(str, missing))}")
    return list(layers)


def _fresh(model: Model, sizes: Mapping[str, Any], seed: int) -> Model:
    """A model of the same class with random weights."""
    old = model.module.config
    names = {name: _own_name(old, name) for name in SIZES}
    if missing := [name for name in sizes if names[name] is None]:
        kind = old.model_type
        raise InputError(*(f"student: models of type {kind!r} have no {name}; name a folder or Hub id instead" for name in missing))
    width, heads = (
        sizes.get(name, getattr(old, name, default)) for name, default in (("hidden_size", 0), ("num_attention_heads", 1))
    )
    if width % heads:
        raise InputError(f"student: {heads} heads do not divide the width: num_attention_heads {heads}, hidden_size {width}")
    values = without_shapes(old.to_dict()) | _that_follow(old, width, heads)
    if old.model_type in TAKEN:  # what the config says there is for matrices that were cut
        values.pop("head_dim", None)
    if "num_hidden_layers" in sizes:
        values = {name: value for name, value in values.items() if name not in PER_BLOCK}
    config = type(old).from_dict(values | {old.attribute_map.get(names[name], names[name]): value for name, value in sizes.items()})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = type(model.module)(config)
    if getattr(model.module, "generation_config", None) is not None:  # how texts end and how long they become
        module.generation_config = copy.deepcopy(model.module.generation_config)
    return Model(
        module=module.eval(),
        tokenizer=copy.deepcopy(model.tokenizer),
        source=model.source,
        revision=model.revision,
        history=copy.deepcopy(model.history),
        new_weights=tuple(sorted(module.state_dict())),
    )


def _own_name(config: Any, name: str) -> str | None:
    """What a config calls a size. Some have a name of their own for the neurons, unlike for the others, and no common one."""
    names = ("intermediate_size", "hidden_dim", "n_inner", "ffn_dim") if name == "intermediate_size" else (name,)
    return next((name for name in names if hasattr(config, name)), None)


def _that_follow(old: Any, width: int, heads: int) -> dict[str, Any]:
    """Sizes that nobody names, where a config has them: in the same proportion to width and heads as before."""
    follow: dict[str, Any] = {}
    if not hasattr(old, "num_attention_heads"):
        return follow
    for name in ("head_dim", "attention_head_size"):
        if getattr(old, name, None) == old.hidden_size // old.num_attention_heads:
            follow[name] = width // heads
    if keys := getattr(old, "num_key_value_heads", None):
        queries = old.num_attention_heads // keys
        follow["num_key_value_heads"] = heads // queries if heads % queries == 0 else heads
    for name in ("word_embed_proj_dim", "pooler_hidden_size"):
        if getattr(old, name, None) == old.hidden_size:
            follow[name] = width
    return follow


def _is_layers(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return bool(value) and all(_is_count(block, 0) for block in value) and len(set(value)) == len(value)
    return _is_count(value, 0)


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _least(key: str) -> int:
    return 0 if key == "num_hidden_layers" else 1
