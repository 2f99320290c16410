r"""What layers can be made to agree on: embeddings, hidden states, attention scores, relations; and which layer with which.

    embeddings  MSE(E_s W_e, E_t)                                                 (TinyBERT, arXiv:1909.10351, eq. 9)
    hidden      MSE(H_s W_h, H_t)                                                 (TinyBERT, eq. 8)
    attention   1/h Σ_i MSE(A_s,i, A_t,i),  A = Q Kᵀ/√d not normalised            (TinyBERT, eq. 7)
    relations   1/3 Σ_{X in Q,K,V} 1/(A_r n) Σ_{a,t} KL(R_t,a,t ‖ R_s,a,t),  R = softmax(X_a X_aᵀ/√d_r)
                                                                                  (MiniLMv2, arXiv:2012.15828, eqs. 5 to 7)
    pkd         ‖h_s/‖h_s‖ - h_t/‖h_t‖‖² of the first token                       (PKD, arXiv:1908.09355, eq. 7)

E, H are (batch, tokens, width); W_e, W_h are learned beside the student where the widths differ, and W_h is one matrix for all
layers. Relations look at one layer of each model: all its heads side by side, cut anew into A_r relation heads of width d_r, so
that neither widths nor heads need be the same. n are the tokens that are no padding.

Every loss is a mean over the real tokens (or pairs of them) of each text, then over the texts, and over the pairs of layers:
padding changes nothing, and neither does how texts are put into batches.

How to use it, in a training loop of any kind:

    losses = LayerLosses(hidden=1.0, relations=1.0)                # problems() says what is wrong with the values
    matcher = LayerMatcher(losses, shape_of(student), shape_of(teacher))  # InputError: what does not fit these two models
    ...                                                            # its parameters go to the optimizer, beside the student's
    with capture(student, attention=matcher.attention) as ours:
        outputs = student(**batch)
    with torch.no_grad(), capture(teacher, attention=matcher.attention) as theirs:
        teacher(**batch)                                           # or the same from `core.teacher_states`
    loss = matcher(ours, theirs, batch["attention_mask"])          # a scalar
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

from ..core.capture import Attention, Captured, Shape, Wanted
from ..errors import InputError
from ._layer_maps import Pairs, attending, attention_problems, layer_pairs, monotone_match, related
from ._numbers import are_layers, is_number
from ._text_by_text import Tensors, text_by_text

Map = Literal["uniform", "last", "dynamic"] | tuple[int, ...]
"""Which layers are compared; see `_layer_maps`."""


def per_text(values: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """The mean over a text's real entries, then over the texts. Both (batch, ...), of one shape once broadcast."""
    real = real.expand_as(values)
    over = tuple(range(1, values.dim()))
    return (values.masked_fill(~real, 0.0).sum(over) / real.sum(over).clamp(min=1)).mean()


def attended(mask: torch.Tensor, *, causal: bool) -> torch.Tensor:
    """Which token looks at which, padding left out: (batch, tokens) -> (batch, 1, tokens, tokens), boolean."""
    pairs = mask[:, None, :, None] & mask[:, None, None, :]
    return pairs.tril() if causal else pairs


def state_loss(student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """MSE of states, (batch, tokens, width) both, over the tokens that `mask` (batch, tokens; boolean) calls real."""
    return per_text((student.float() - teacher.float()) ** 2, mask[..., None])


def attention_loss(student: torch.Tensor, teacher: torch.Tensor, pairs: torch.Tensor) -> torch.Tensor:
    """MSE of attention scores, (batch, heads, tokens, tokens) both, over the `pairs` that are attended."""
    return per_text((student.float() - teacher.float()) ** 2, pairs)


def log_relations(states: torch.Tensor, heads: int, pairs: torch.Tensor) -> torch.Tensor:
    """log R: how each token is related to every other one, log softmax(X_a X_aᵀ/√d_r).

    Args:
        states: queries, keys or values, (batch, attention heads, tokens, head size).
        heads: A_r, which divides attention heads · head size.
        pairs: which token looks at which, (batch, 1, tokens, tokens).

    Returns:
        (batch, A_r, tokens, tokens); rows of padding are of no meaning.
    """
    batch, _, tokens, _ = states.shape
    x = states.float().transpose(1, 2).reshape(batch, tokens, heads, -1).transpose(1, 2)
    scores = x @ x.transpose(-1, -2) * x.shape[-1] ** -0.5
    return F.log_softmax(scores.masked_fill(~pairs, -1e9), dim=-1)  # not -inf: a row of padding would be nan


def relation_loss(student: torch.Tensor, teacher: torch.Tensor, heads: int, pairs: torch.Tensor) -> torch.Tensor:
    """KL(R_t ‖ R_s) of one kind of vectors, averaged over relation heads and real tokens. Arguments as `log_relations`."""
    log_q, log_p = log_relations(student, heads, pairs), log_relations(teacher, heads, pairs)
    kl = (log_p.exp() * (log_p - log_q)).masked_fill(~pairs, 0.0).sum(-1)
    return per_text(kl, pairs.any(-1))


def pkd_loss(student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Squared distance of the first real token's states, (batch, tokens, width) both, each scaled to length 1."""
    texts, first = torch.arange(len(mask), device=mask.device), mask.int().argmax(dim=1)
    apart = F.normalize(student[texts, first].float(), dim=-1) - F.normalize(teacher[texts, first].float(), dim=-1)
    return (apart**2).sum(-1).mean()


@dataclass(frozen=True, kw_only=True)
class LayerLosses:
    """The weight of every loss and which layers are compared. Layers count from 1; 0 are the embeddings."""

    embeddings: float = 0.0
    hidden: float = 0.0
    attention: float = 0.0
    relations: float = 0.0
    pkd: float = 0.0
    layer_map: Map = "uniform"
    relation_heads: int | None = None
    """A_r; None: as many as the teacher has heads, or the next smaller number that divides every width."""
    teacher_layer: int | None = None
    """The teacher's layer for relations and for the map `last`; None: its last."""
    dynamic_layers: tuple[int, ...] | None = None
    """The teacher's layers that `dynamic` finds partners for; None: up to four, at most half as many as the student has."""
    project: bool = False
    """Learn W_e and W_h, from the identity, even where the widths agree (CoFi, arXiv:2204.00408)."""

    @property
    def weights(self) -> dict[str, float]:
        """Loss -> weight."""
        return {name: getattr(self, name) for name in ("embeddings", "hidden", "attention", "relations", "pkd")}

    def problems(self) -> list[str]:
        """What is wrong with the values, whatever the models."""
        unfit = {name: value for name, value in self.weights.items() if not (is_number(value) and value >= 0)}
        found = [f"{name} is a weight, 0 or more and finite (got {value!r})" for name, value in unfit.items()]
        if not found and not any(self.weights.values()):
            found.append(f"one of {', '.join(self.weights)} must be above 0, or there is nothing for the layers to agree on")
        if isinstance(self.layer_map, str):
            if self.layer_map not in ("uniform", "last", "dynamic"):
                found.append(f"layer_map must be 'uniform', 'last', 'dynamic' or teacher layers (got {self.layer_map!r})")
        elif not are_layers(self.layer_map):
            found.append(f"layer_map must name one teacher layer, counted from 1, per student layer (got {self.layer_map!r})")
        for name in ("relation_heads", "teacher_layer"):
            if (value := getattr(self, name)) is not None and not are_layers([value]):
                found.append(f"{name} must be at least 1 (got {value!r})")
        if (chosen := self.dynamic_layers) is not None and not (are_layers(chosen) and sorted(set(chosen)) == list(chosen)):
            found.append(f"dynamic_layers must be different layers in ascending order, counted from 1 (got {chosen!r})")
        if not isinstance(self.project, bool):
            found.append(f"project is true or false (got {self.project!r})")
        return found


class LayerMatcher(nn.Module):
    """The weighted sum of the losses for one student and one teacher, and the W_e and W_h that it learns.

    Args:
        losses: weights and map.
        student: `core.capture.shape_of` the student; its `heads` matter only to `attention` and `relations`.
        teacher: the same of the teacher.
        descent: the teacher's blocks (from 0) that the student's were made from, if it was; see `_layer_maps.descent`.

    Raises:
        InputError: lists everything that does not fit these two models.
    """

    def __init__(self, losses: LayerLosses, student: Shape, teacher: Shape, *, descent: Sequence[int] | None = None) -> None:
        super().__init__()
        self.losses, self.student, self.teacher = losses, student, teacher
        self.pairs: Pairs = []
        """Student layer (0: found anew for every batch) and teacher layer."""
        self.related, self.relation_heads = (0, 0), 0
        """The one pair of layers whose relations are compared, and A_r."""
        problems = losses.problems()
        if not problems:
            self.pairs, problems = layer_pairs(
                losses.layer_map, student.layers, teacher.layers, losses.teacher_layer, losses.dynamic_layers, descent
            )
        if not problems and losses.attention:
            problems += attention_problems(self.pairs, student, teacher)
        if losses.relations and not losses.problems() and student.layers and (losses.teacher_layer or 1) <= teacher.layers:
            self.related, self.relation_heads, found = related(student, teacher, losses.teacher_layer, losses.relation_heads)
            problems += found
        if losses.pkd and (student.causal or teacher.causal):
            problems.append("pkd compares the first token, which sees only itself in a causal model; take hidden or relations")
        if problems:
            raise InputError(*problems)
        self.embeddings = _projection(student.widths[0], teacher.widths[0], losses.embeddings > 0, losses.project)
        self.hidden = _projection(student.widths[-1], teacher.widths[-1], self._by_state, losses.project)

    @property
    def _by_state(self) -> bool:
        """Whether the hidden states of the pairs are looked at."""
        return self.losses.hidden > 0 or self.losses.pkd > 0 or self.losses.layer_map == "dynamic"

    @property
    def attention(self) -> bool:
        """Whether the models' attention has to be captured, not only their hidden states."""
        return self.losses.attention > 0 or self.losses.relations > 0

    @property
    def wanted(self) -> Wanted:
        """What of the teacher is looked at."""
        layers = {layer for _, layer in self.pairs}
        hidden = (layers if self._by_state else set()) | ({0} if self.losses.embeddings else set())
        both = {n for m, n in self.pairs if n in self.teacher.heads and (m == 0 or m in self.student.heads)}
        scores = both if self.losses.attention else set()
        relations = {self.related[1]} if self.losses.relations else set()
        return Wanted(hidden=tuple(sorted(hidden)), attention=tuple(sorted(scores | relations)))

    def forward(self, student: Captured, teacher: Captured, mask: torch.Tensor) -> torch.Tensor:
        """The weighted sum.

        Args:
            student: what was captured of it; gradients flow into it.
            teacher: the same of the teacher, or at least what `wanted` names.
            mask: 1 for real tokens, (batch, tokens), which must be the same tokens for both.

        Returns:
            A scalar, at least 0.
        """
        parts = self.parts(student, teacher, mask)
        return torch.stack([self.losses.weights[name] * value for name, value in parts.items()]).sum()

    def parts(self, student: Captured, teacher: Captured, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        """Every loss whose weight is above 0, not weighted, by name."""
        mask, weights, result = mask.bool(), self.losses.weights, {}
        pairs = self._match(student, teacher, mask) if self.losses.layer_map == "dynamic" else self.pairs
        if weights["embeddings"]:
            result["embeddings"] = state_loss(self.embeddings(student.hidden[0].float()), teacher.hidden[0], mask)
        if weights["hidden"]:
            result["hidden"] = _mean([state_loss(self._brought(student, m), teacher.hidden[n], mask) for m, n in pairs])
        if weights["attention"]:
            both = [(student.attention[m], teacher.attention[n]) for m, n in attending(pairs, self.student, self.teacher)]
            result["attention"] = _mean([_by_scores(ours, theirs, mask) for ours, theirs in both])
        if weights["relations"]:
            ours, theirs = student.attention[self.related[0]], teacher.attention[self.related[1]]
            result["relations"] = _mean([self._by_relations(ours, theirs, kind, mask) for kind in ("query", "key", "value")])
        if weights["pkd"]:
            # The last layer is left out, as in the paper: the output that it feeds is matched already.
            inner = [pair for pair in pairs if pair[0] < self.student.layers] or pairs
            result["pkd"] = _mean([pkd_loss(self._brought(student, m), teacher.hidden[n], mask) for m, n in inner])
        return result

    def _by_relations(self, ours: Attention, theirs: Attention, kind: str, mask: torch.Tensor) -> torch.Tensor:
        """The relation loss of one kind of vectors."""

        def loss(x: Tensors, y: Tensors, pairs: torch.Tensor) -> torch.Tensor:
            return relation_loss(x[0], y[0], self.relation_heads, pairs)

        return text_by_text(loss, [getattr(ours, kind)], [getattr(theirs, kind)], attended(mask, causal=theirs.causal))

    def _brought(self, student: Captured, layer: int) -> torch.Tensor:
        """H W_h of a student's layer: W_h is float32 whatever the student's weights are."""
        return self.hidden(student.hidden[layer].float())

    @torch.no_grad()
    def _match(self, student: Captured, teacher: Captured, mask: torch.Tensor) -> Pairs:
        """CoFi's dynamic map: the student layer whose states are nearest to each of the teacher's, in ascending order."""
        ours = [self._brought(student, m) for m in range(1, self.student.layers + 1)]
        targets = [n for _, n in self.pairs]
        costs = torch.stack([torch.stack([state_loss(state, teacher.hidden[n], mask) for state in ours]) for n in targets])
        chosen = monotone_match(costs.nan_to_num(nan=1e30, posinf=1e30).tolist())  # a run that diverges is stopped elsewhere
        return [(m + 1, n) for m, n in zip(chosen, targets, strict=True)]


def _by_scores(ours: Attention, theirs: Attention, mask: torch.Tensor) -> torch.Tensor:
    """The attention loss of one pair of layers."""

    def loss(x: Tensors, y: Tensors, pairs: torch.Tensor) -> torch.Tensor:
        mine, others = replace(ours, query=x[0], key=x[1]), replace(theirs, query=y[0], key=y[1])
        return attention_loss(mine.scores(), others.scores(), pairs)

    return text_by_text(loss, [ours.query, ours.key], [theirs.query, theirs.key], attended(mask, causal=theirs.causal))


def _projection(student: int, teacher: int, needed: bool, always: bool) -> nn.Module:
    """W from one width to another, no bias; nothing where it is not needed."""
    if not needed or (student == teacher and not always):
        return nn.Identity()
    linear = nn.Linear(student, teacher, bias=False)
    if student == teacher:
        nn.init.eye_(linear.weight)
    return linear


def _mean(values: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.stack(list(values)).mean()
