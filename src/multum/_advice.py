"""The table of advice: technique -> when it applies, what it brings as a formula of the profile, what it costs and risks.

Every estimate says how it was made: arithmetic on this model, measured here, or a published figure with where it was published.
A figure of somebody else's model is a hint at what is possible and no promise for this one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from . import _advice_sources as source
from ._advice_estimates import (
    AUGMENT,
    EPOCHS,
    Estimate,
    augment,
    drop,
    droppable,
    half,
    int8,
    low_rank,
    narrow,
    not_factored,
    one_stack,
    prunable,
    prune,
    sliceable,
    speedup,
    teach,
    told,
    trim,
    with_channels,
    zeros,
)
from ._advice_profile import Profile
from ._advice_sources import BOTH, FASTER, GOALS, PRIVATE, SMALLER, UNTRAINED
from .plan import PRUNING, TRAINING

SAMPLES = 512
WORTH = 1.02
"""A gain below this is none."""


@dataclass(frozen=True, kw_only=True)
class Technique:
    """A row of the table."""

    does: str
    used_for: Collection[str]
    """The goals it is advised for, where it applies and brings something."""
    needs: str
    risk: str
    place: int = 0
    """Where it stands in a recipe; 0: not in one."""
    obstacle: Callable[[Profile], str | None] = lambda p: None
    """Why it cannot be applied to this model."""
    estimates: Callable[[Profile, str], list[Estimate]] = lambda p, goal: []
    fields: Callable[[Profile, str], dict[str, Any]] = lambda p, goal: {}
    """Of its step in a recipe."""
    passes: Callable[[Profile, str], float] = lambda p, goal: 0.0
    """Its time, as the number of texts that the model reads in it."""
    otherwise: str | Callable[[Profile, str], str] = ""
    """Why it is left for a goal that it is not used for, or where it brings nothing; empty where the figures say it."""

    def left(self, p: Profile, goal: str) -> str:
        """`otherwise`, for this model and goal."""
        return self.otherwise if isinstance(self.otherwise, str) else self.otherwise(p, goal)


def _taught_again(p: Profile, goal: str) -> str:
    if goal == UNTRAINED:
        return "it trains"
    return f"it goes over the training texts again, and a student leaks its teacher's training texts: {source.LEAK}"


SPEED_SAME = "zeros make the file smaller once it is compressed and leave its speed unchanged: dense kernels multiply with them too"
EVERYWHERE = tuple(GOALS)

TECHNIQUES: Mapping[str, Technique] = {
    "trim_vocabulary": Technique(
        does="drop the tokens that the training texts never use",
        used_for=(SMALLER, FASTER, BOTH, UNTRAINED),
        needs="the training texts, no labels",
        risk="words that only later texts have are spelled in smaller pieces",
        place=1,
        obstacle=lambda p: p.vocabulary.obstacle or (None if p.texts else "which tokens are used is told by the data: give --data"),
        estimates=trim,
        otherwise=lambda p, goal: {
            PRIVATE: "the tokens that are kept tell which words the training texts have",
            FASTER: "looking up a token takes the same time in a small table",
        }.get(goal, "nearly all tokens stay: those of the texts, and the single characters that any other word is spelled with"),
    ),
    "finetune": Technique(
        does="train the new head, and the model with it",
        used_for=EVERYWHERE,
        needs="labels",
        risk="an original that was trained badly makes every later comparison flattering",
        place=2,
        obstacle=lambda p: "the model is trained for this task already" if p.trained else None,
        fields=lambda p, goal: {"epochs": EPOCHS, "learning_rate": 1e-4 if narrow(p) else 5e-5},
        passes=lambda p, goal: TRAINING * EPOCHS * (p.texts or 0),
    ),
    "prune_structured": Technique(
        does="remove heads, neurons and whole sublayers that the answers miss least, and solve the rest again",
        used_for=EVERYWHERE,
        needs=f"{SAMPLES} training texts, no labels",
        risk="the folder loads with multum imported only; fewer multiply-accumulates are less time, but not in proportion",
        place=3,
        obstacle=prunable,
        estimates=prune,
        fields=lambda p, goal: {"speedup": speedup(p, goal), "samples": SAMPLES},
        passes=lambda p, goal: PRUNING * min(SAMPLES, p.texts or SAMPLES),
    ),
    "drop_layers": Technique(
        does="remove every other layer, of an encoder-decoder from its decoder",
        used_for=(SMALLER, FASTER, BOTH),
        needs="nothing",
        risk="has to be taught afterwards",
        place=3,
        obstacle=droppable,
        estimates=drop,
        fields=lambda p, goal: {"keep": len(half(p)), "which": "alternate"},
        otherwise=lambda p, goal: (
            "what is left would have to be taught"
            if prunable(p)
            else "prune_structured keeps far more at the same speed; take drop_layers where the result must load without multum"
        ),
    ),
    "distill": Technique(
        does="let the whole model teach what is left of it",
        used_for=(SMALLER, FASTER, BOTH),
        needs="training texts; better with unlabelled ones beside them",
        risk="takes most of the time; how far it reaches is partly the luck of the seed",
        place=4,
        obstacle=lambda p: "a model that writes is taught by what its teacher writes: distill_generation" if p.paired else None,
        estimates=lambda p, goal: [
            told("0.0 to 0.7 points lost at 2.37 times the speed of the original's int8, pruned and taught in turns", source.OWN),
            told("GLUE 77.0 against 79.5 with half of the layers", source.DISTILBERT),
        ],
        fields=lambda p, goal: {"epochs": EPOCHS} | ({"augment": AUGMENT} if augment(p) else {}),
        passes=teach,
        otherwise=_taught_again,
    ),
    "distill_generation": Technique(
        does="let the whole model write, and teach what is left of it to write that",
        used_for=(SMALLER, FASTER, BOTH),
        needs="training texts; better with unlabelled ones beside them",
        risk="takes most of the time: the teacher writes every text once, by beam search",
        place=4,
        obstacle=lambda p: None if p.paired else "it is for encoder-decoders",
        fields=lambda p, goal: {"epochs": EPOCHS},
        otherwise=_taught_again,
    ),
    "int8": Technique(
        does="export to onnxruntime with 8-bit weights and embeddings",
        used_for=EVERYWHERE,
        needs="nothing; 64 texts to check the answers with",
        risk="narrow models lose most",
        obstacle=lambda p: p.exportable,
        estimates=int8,
    ),
    "fisher_masks": Technique(
        does="remove heads and neurons by the loss",
        used_for=(),
        needs="2,048 labelled texts",
        risk="as for prune_structured",
        obstacle=prunable,
        estimates=lambda p, goal: [told("accuracy 78.3 % at 2.43x, where prune_structured has 85.9 %", source.ONE_SHOT)],
        otherwise="prune_structured keeps more at the same speed, and needs no labels",
    ),
    "l0": Technique(
        does="remove heads, neurons and whole sublayers by masks that are trained with the model",
        used_for=(),
        needs="labels; better with a teacher",
        risk="takes tens of epochs; with few steps the masks cannot tell units apart",
        obstacle=lambda p: one_stack(p) or not_factored(p),
        otherwise="prune_structured and then distill take a small part of the time; it is for long runs",
    ),
    "prune_hidden": Technique(
        does="remove channels of the residual stream, the same everywhere",
        used_for=(),
        needs="128 training texts, no labels",
        risk="costs more quality than heads and neurons do; made to be repaired (reconstruct) and distilled afterwards",
        obstacle=with_channels,
        otherwise="prune_structured costs less quality; take prune_hidden where the embeddings are to shrink as well",
    ),
    "slice_hidden": Technique(
        does="rotate the hidden width to its principal directions and delete the last",
        used_for=(),
        needs="128 training texts, no labels",
        risk="one rotation serves all blocks; a head that shared its table with the embeddings gets one of its own",
        obstacle=sliceable,
        otherwise="prune_structured chooses where it cuts; take slice_hidden where the result must load without multum",
    ),
    "low_rank": Technique(
        does="replace every matrix by two smaller ones",
        used_for=(),
        needs="128 training texts, no labels",
        risk="two small matrices need not be faster than one",
        obstacle=not_factored,
        estimates=low_rank,
        otherwise=lambda p, goal: (
            "prune_structured removes work for good, where this makes two small matrices of one"
            if p.exportable
            else "an export holds the product of the factors, so that what ships becomes neither smaller nor faster"
        ),
    ),
    "distill_layers": Technique(
        does="teach the layers too, not only the answers",
        used_for=(),
        needs="training texts",
        risk="layer losses have weights that must be chosen",
        obstacle=one_stack,
        otherwise="try distill first: it has nothing to tune; with a student of another width take distill_layers",
    ),
    "wanda": Technique(
        does="half of the weights to zero, by weights and activations",
        used_for=(),
        needs="128 training texts, no labels",
        risk="a pattern such as 2:4 costs more than free choice",
        obstacle=not_factored,
        estimates=zeros(source.WANDA, "perplexity 5.12 -> 6.42 with half of Llama-2-7B"),
        otherwise=SPEED_SAME,
    ),
    "sparsegpt": Technique(
        does="half of the weights to zero, the others make good the error",
        used_for=(),
        needs="128 training texts, no labels",
        risk="as for wanda",
        obstacle=not_factored,
        estimates=zeros(source.WANDA, "perplexity 5.12 -> 6.51 with half of Llama-2-7B"),
        otherwise=SPEED_SAME,
    ),
    "prune_weights": Technique(
        does="the smallest weights to zero",
        used_for=(),
        needs="nothing",
        risk="loses more than wanda and sparsegpt",
        obstacle=not_factored,
        estimates=zeros(source.WANDA, "perplexity 5.12 -> 14.89 with half of Llama-2-7B"),
        otherwise=SPEED_SAME,
    ),
    "movement": Technique(
        does="weights to zero while it trains",
        used_for=(),
        needs="labels",
        risk="takes several epochs",
        obstacle=not_factored,
        estimates=zeros(source.MOVEMENT, "SQuAD F1 88.1 -> 84.9 with a tenth of BERT-base's weights left"),
        otherwise=SPEED_SAME,
    ),
}
