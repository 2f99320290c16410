r"""Repair a pruned model's output matrices towards the whole model's flow (K-prune: Park et al. 2024, arXiv:2308.03449).

    W <- W + R Cᵀ (C Cᵀ + εI)⁻¹        b <- b + mean(R - ΔW C)

W (hidden, features) is the output matrix of an attention or a feed-forward, b its bias, C are the centred features that still flow
into it, R is what its output and the residual stream together lack of what the whole model has at that place; ε is `damping`
times the mean of diag(C Cᵀ). A matrix without a bias gets none, and nothing is centred. From the bottom up, each with what really
flows below it now. No gradient and no label.

Use it after any cut: heads, neurons, whole blocks, single weights, channels (`prune_hidden`: the whole model is looked at on those
that are left). Weights that are zero stay zero: where a matrix has some, every row is solved on the features that it still has, a
system for each row instead of one for all. With nothing cut nothing changes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..core.factored import refuse_factored
from ..core.families import one_stack, stacks_of
from ..core.model import Model
from ..core.step import Step
from ..core.sublayers import places_of
from ..core.task import Batch, Task, calibration
from ..core.training import on_accelerator
from ..errors import InputError
from ._layer_maps import channel_descent, descent
from ._repair import repair
from ._sparsity import block_linears


def teacher_blocks(model: Model, teacher: Model) -> list[int]:
    """Which block of the teacher each of the model's is compared with, ascending; a decoder's go on from its encoder's.

    The one that it was, by the model's history; where that says nothing, the one of the same number if both have as many.

    Raises:
        InputError: the models do not go together; lists every reason.
    """
    ours, theirs = model.module.config, teacher.module.config
    counts = [[len(stack.blocks) for stack in stacks_of(each.module)] for each in (model, teacher)]
    known = descent(model, teacher) if len(counts[0]) == 1 else _descent_of_two(model, teacher)
    blocks = known or (list(range(sum(counts[0]))) if counts[0] == counts[1] else None)
    problems = []
    if ours.model_type != theirs.model_type:
        problems.append(
            f"the model is of type {ours.model_type!r}, the teacher of type {theirs.model_type!r}; they must be the same"
        )
    if ours.hidden_size != theirs.hidden_size and channel_descent(model, teacher) is None:
        problems.append(
            f"the model's hidden width is {ours.hidden_size}, the teacher's {theirs.hidden_size}; they must be the same, or the "
            "teacher the model that prune_hidden cut"
        )
    if blocks is None or blocks != sorted(set(blocks)):
        problems.append(
            f"the model has {_and(counts[0])} blocks and the teacher {_and(counts[1])}, and the model's history does not say which "
            "of the teacher's they were; take the model that it was cut from"
        )
    if problems or blocks is None:
        raise InputError(*(f"reconstruct: {problem}" for problem in problems))
    return blocks


def _and(counts: list[int]) -> str:
    return " and ".join(map(str, counts))


def _descent_of_two(model: Model, teacher: Model) -> list[int] | None:
    """`descent` of an encoder-decoder, whose stacks are shortened one by one."""
    past, since = model.history[: len(teacher.history)], model.history[len(teacher.history) :]
    if model.source != teacher.source or json.dumps(past) != json.dumps(teacher.history):
        return None
    kept = {stack.name: list(range(len(stack.blocks))) for stack in stacks_of(teacher.module)}
    begin = {name: sum(map(len, list(kept.values())[:place])) for place, name in enumerate(kept)}
    for entry in since:
        if "stack" in entry:
            kept[entry["stack"]] = [kept[entry["stack"]][block] for block in entry["kept_blocks"]]
    if [len(stack.blocks) for stack in stacks_of(model.module)] != [len(blocks) for blocks in kept.values()]:
        return None
    return [begin[name] + block for name, blocks in kept.items() for block in blocks]


@dataclass(frozen=True, kw_only=True)
class Reconstruct(Step):
    """Solve the output matrices of a pruned model again, so that it works inside as the whole model does."""

    teacher: str
    """Folder or Hub id of the whole model, the one that was cut."""
    samples: int = 512
    """Training texts (their labels are not used) that activations are taken from."""
    damping: float = 0.01
    """ε: what is added to the diagonal of C Cᵀ, as a share of its mean, 1e-4 or more. The more, the less changes."""
    seed: int = 0
    """Seeds the choice of the texts."""

    def check(self) -> list[str]:
        problems = []
        if not self.teacher:
            problems.append("teacher names no folder or Hub id")
        if self.samples < 1:
            problems.append(f"samples must be at least 1 (got {self.samples})")
        if not 1e-4 <= self.damping < float("inf"):
            problems.append(f"damping must be at least 1e-4, so that every system has a solution (got {self.damping})")
        return problems

    @torch.no_grad()
    def apply(self, model: Model, task: Task) -> Mapping[str, Any]:
        if len(stacks_of(model.module)) == 1:
            one_stack(model.module, self.name)
        refuse_factored(model.module, self.name)
        linears, skipped = block_linears(model, self.name)
        teacher = task.load(self.teacher)
        blocks = teacher_blocks(model, teacher)
        narrower = model.module.config.hidden_size < teacher.module.config.hidden_size
        channels = channel_descent(model, teacher) if narrower else None
        ours, theirs = (calibration(task, each, self.samples, seed=self.seed, step=self.name) for each in (model, teacher))
        _check_texts(ours, theirs)
        solved = [place.block.get_submodule(place.sublayer.path) for place in places_of(model.module)]
        outputs = {name: linear for name, linear in linears.items() if linear in solved}
        sparse = {name: linear.weight == 0 for name, linear in outputs.items() if bool((linear.weight == 0).any())}
        with on_accelerator(model.module.eval()), on_accelerator(teacher.module):
            more: dict[str, Any] = {"whole_batches": theirs, "channels": channels, "keep_zeros": True}
            repair(teacher.module, model.module, ours, blocks, damping=self.damping, **more)
        skipped = dict.fromkeys(skipped, "only output matrices of the blocks are repaired")
        skipped |= dict.fromkeys(linears, "only output matrices are repaired") | dict.fromkeys(outputs, "nothing was lacking")
        return {
            "teacher_blocks": blocks,
            "teacher_fingerprint": teacher.fingerprint(),
            "repaired": {"dense": len(outputs) - len(sparse), "on_their_zeros": len(sparse)},
            "zeros_kept": sum(int(zeros.sum()) for zeros in sparse.values()),
            "summary": f"{len(outputs)} output matrices solved again, {len(sparse)} around their zeros; size and speed: unchanged",
            "calibration_tokens": sum(int(batch["attention_mask"].sum()) for batch in ours),
            "skipped": skipped,
        }


def _check_texts(ours: list[Batch], theirs: list[Batch]) -> None:
    names = ("attention_mask", *(["decoder_input_ids"] if "decoder_input_ids" in ours[0] else []))
    masks = [[batch[name] for batch in batches for name in names] for batches in (ours, theirs)]
    if not all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(*masks, strict=True)):
        raise InputError(
            "reconstruct: what flows is compared token by token, but model and teacher read the texts in different tokens; take a "
            "teacher with the model's tokenizer"
        )
