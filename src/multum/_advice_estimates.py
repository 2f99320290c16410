"""What advice expects of each technique: formulas of a model's profile, and figures from elsewhere with their source."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from . import _advice_sources as source
from ._advice_profile import Profile, int8_bytes
from ._advice_sources import BOTH, PRIVATE, UNTRAINED
from .core.families import every_block
from .core.linears import shape_of
from .core.packed import is_matrix
from .core.parts import ATTENTION, FEED_FORWARD
from .core.students import alternate
from .plan import TRAINING
from .steps.low_rank import LowRank, rank_for

ARITHMETIC, MEASURED, PUBLISHED = "arithmetic on this model", "measured here", "published"
SPARSITY, AUGMENT, EPOCHS = 0.5, 4, 3
STRICT = (PRIVATE, UNTRAINED)


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """One gain to expect, and how that is known."""

    what: str
    """`bytes`, `macs`, `ms`, `speed`, `bytes compressed` or `quality`."""
    basis: str
    source: str
    """The formula, what was measured, or the publication."""
    before: float | None = None
    after: float | None = None
    factor: tuple[float, float] | None = None
    """Times smaller or faster, from the least to the most."""
    text: str = ""
    """Where it is no number."""

    @property
    def times(self) -> float:
        """How many times smaller or faster; the middle of a range."""
        if self.factor:
            return float((self.factor[0] * self.factor[1]) ** 0.5)
        return self.before / self.after if self.before and self.after else 1.0


def speedup(p: Profile, goal: str) -> float:
    return 1.5 if goal in STRICT else 2.0


def left_of_blocks(p: Profile, goal: str) -> float:
    """Share of the blocks' multiply-accumulates that `prune_structured` leaves: its budget counts a head over the vocabulary."""
    base = p.vocabulary_macs
    return ((p.block_macs + base) / speedup(p, goal) - base) / p.block_macs


def blocks_known(p: Profile) -> str | None:
    if not p.known:
        return f"it looks into the blocks, and models of type {p.module.config.model_type} are not known well enough for that"
    return None if p.blocks else "the model has no blocks left"


def one_stack(p: Profile) -> str | None:
    return blocks_known(p) or ("it takes models with one stack of blocks, not an encoder and a decoder" if p.paired else None)


def not_factored(p: Profile) -> str | None:
    return blocks_known(p) or ("its matrices are factored already (low_rank)" if p.factored else None)


def with_channels(p: Profile) -> str | None:
    from .core.channels import obstacle

    return not_factored(p) or obstacle(p.module)


def sliceable(p: Profile) -> str | None:
    from .steps.slice_hidden import obstacle

    return not_factored(p) or obstacle(p.module)


def prunable(p: Profile) -> str | None:
    if reason := not_factored(p):
        return reason
    if p.paired:
        return "it takes encoder-decoders too, but what it would bring there is not reckoned yet"
    share = left_of_blocks(p, BOTH)
    return None if share > 0.1 else "the head over the vocabulary alone takes more than half of the multiply-accumulates"


def droppable(p: Profile) -> str | None:
    if reason := blocks_known(p):
        return reason
    return None if len(p.last_stack.blocks) > 1 else "there are no two blocks of which one could go"


def times_of(p: Profile, share: float, what: str) -> list[Estimate]:
    """The time left when the blocks take this share of theirs."""
    if not p.text_ms:
        return []
    formula = f"milliseconds of attention and feed-forward in torch, times {what}; the rest stays"
    return [Estimate(what="ms", basis=MEASURED, source=formula, before=p.text_ms, after=p.text_ms - (1 - share) * p.block_ms)]


def trim(p: Profile, goal: str) -> list[Estimate]:
    v = p.vocabulary
    if v.needed is None:
        return []
    gone = v.rows - v.needed
    formula = f"{v.rows} tokens -> {v.needed} that the training texts and single characters need, {v.row_bytes} bytes each"
    found = [Estimate(what="bytes", basis=ARITHMETIC, source=formula, before=p.bytes, after=p.bytes - gone * v.row_bytes)]
    if v.row_macs and p.macs:
        share = sum(p.lengths) / len(p.lengths) * gone * v.row_macs
        found.append(Estimate(what="macs", basis=ARITHMETIC, source="the head's rows go too", before=p.macs, after=p.macs - share))
    same = "the training texts are read as before"
    return [*found, Estimate(what="quality", basis=ARITHMETIC, source="how the step chooses tokens", text=f"unchanged: {same}")]


def int8(p: Profile, goal: str) -> list[Estimate]:
    longest = max(p.lengths) if p.texts is None else getattr(p.module.config, "max_position_embeddings", 512)
    formula = "a byte for every weight of a matrix or an embedding of a word, a scale for each of its rows"
    found = [Estimate(what="bytes", basis=ARITHMETIC, source=formula, before=p.bytes, after=int8_bytes(p, longest))]
    if p.measured and "int8" in p.measured:
        ratio = p.measured["int8"]["ratio"]
        found.append(Estimate(what="speed", basis=MEASURED, source="multum measure, against torch", factor=(ratio, ratio)))
    else:
        factor = (1.86, 2.23) if narrow(p) else (2.92, 3.46)
        found.append(Estimate(what="speed", basis=PUBLISHED, source=source.INT8, factor=factor))
        own = "7.42 ms in torch -> 1.15 ms, where another runtime counts too"
        found.append(Estimate(what="speed", basis=PUBLISHED, source=source.OWN, text=own))
    text = "0.41 % lost to 0.10 % gained" if narrow(p) else "0.94 % lost to 1.16 % gained"
    return [*found, told(text, source.INT8)]


def narrow(p: Profile) -> bool:
    return bool(p.module.config.hidden_size <= 512)


def prune(p: Profile, goal: str) -> list[Estimate]:
    share, factor = left_of_blocks(p, goal), speedup(p, goal)
    blocks = sum(p.parts[name].bytes for name in (ATTENTION, FEED_FORWARD))
    left = f"{share:.2f} of the blocks' multiply-accumulates"
    macs = (p.macs or 0) - (1 - share) * p.block_macs
    found = [
        Estimate(what="macs", basis=ARITHMETIC, source=f"the step's own budget, {left}", before=p.macs, after=macs),
        Estimate(what="bytes", basis=ARITHMETIC, source=f"about as {left}", before=p.bytes, after=p.bytes - (1 - share) * blocks),
        *times_of(p, share, left),
    ]
    if not p.text_ms and factor == 2.0:  # which the figure is of
        found.append(Estimate(what="speed", basis=PUBLISHED, source=source.KWON, factor=(1.56, 1.56)))
    after = "86.6 % at 1.73x" if factor == 1.5 else "85.9 % at 2.41x"
    return [*found, told(f"accuracy 87.1 % -> {after}, before anything is taught", source.ONE_SHOT)]


def half(p: Profile) -> list[int]:
    blocks = len(p.last_stack.blocks)
    return alternate(blocks, max(1, blocks // 2))


def drop(p: Profile, goal: str) -> list[Estimate]:
    kept = half(p)
    parts = p.with_blocks(kept)
    what = f"the {p.last_stack.name} blocks {', '.join(map(str, kept))} of {len(p.last_stack.blocks)} stay".replace("  ", " ")
    size = Estimate(what="bytes", basis=ARITHMETIC, source=what, before=p.bytes, after=sum(part.bytes for part in parts.values()))
    if p.paired:
        faster = Estimate(what="speed", basis=PUBLISHED, source=source.DISTILBART, factor=(1.24, 1.68))
        return [size, faster, told("ROUGE-2 22.12 against 21.85 on XSum with 6 of 12 decoder blocks, taught", source.DISTILBART)]
    share = (p.macs_of({n: parts[n] for n in (ATTENTION, FEED_FORWARD) if n in parts}) or 0) / p.block_macs
    return [
        size,
        Estimate(what="macs", basis=ARITHMETIC, source=what, before=p.macs, after=p.macs_of(parts)),
        *times_of(p, share, "the share of their work that is left"),
        told("accuracy 87.1 % -> 71.4 % with half of 6 layers, before anything is taught", source.ONE_SHOT),
        told("up to 98 % kept with up to 40 % of the model gone from the top, fine-tuned", source.SAJJAD),
    ]


def low_rank(p: Profile, goal: str) -> list[Estimate]:
    saved = size = 0
    for part in in_blocks(p):
        out_features, in_features = shape_of(part)
        fewer = out_features * in_features - rank_for(out_features, in_features, LowRank().keep) * (out_features + in_features)
        saved += max(0, fewer)
        size += max(0, fewer) * part.weight.element_size()
    tokens = sum(p.lengths) / len(p.lengths)
    formula = f"factors with {LowRank().keep:g} of every matrix's weights"
    found = [Estimate(what="bytes", basis=ARITHMETIC, source=formula, before=p.bytes, after=p.bytes - size)]
    if p.macs:
        found.append(Estimate(what="macs", basis=ARITHMETIC, source=formula, before=p.macs, after=p.macs - saved * tokens))
    return found


def in_blocks(p: Profile) -> list[Any]:
    return [part for block in every_block(p.module) for part in block.modules() if is_matrix(part)]


def zeros(published: str, text: str) -> Callable[[Profile, str], list[Estimate]]:
    def estimates(p: Profile, goal: str) -> list[Estimate]:
        inside = [part.weight for part in in_blocks(p)]
        gone = sum(w.numel() * w.element_size() * SPARSITY - w.numel() / 8 for w in inside)
        formula = f"{SPARSITY:g} of the blocks' matrices stored as one bit a weight and the weights that are left"
        return [
            Estimate(what="bytes", basis=ARITHMETIC, source="zeros are stored like other numbers", before=p.bytes, after=p.bytes),
            Estimate(what="bytes compressed", basis=ARITHMETIC, source=formula, before=p.bytes, after=p.bytes - gone),
            Estimate(what="speed", basis=PUBLISHED, source=source.SPARSE, factor=(0.86, 1.0)),
            told(text, published),
        ]

    return estimates


def told(text: str, published: str) -> Estimate:
    return Estimate(what="quality", basis=PUBLISHED, source=published, text=text)


def teach(p: Profile, goal: str) -> float:
    texts = (p.texts or 0) * (1 + augment(p))
    return texts + TRAINING * EPOCHS * texts / 2


def augment(p: Profile) -> int:
    return AUGMENT if p.task == "text-classification" else 0
