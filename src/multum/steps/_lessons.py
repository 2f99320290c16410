"""What a student learns to write: sources, and for each a text that its teacher writes or that the data has.

Two kinds of tasks have them: those of encoder-decoders, whose data are sources and references, and text generation, whose texts
are cut into prompts and what follows them (`core/continuations`).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ..core.continuations import Continuation, pieces, rows_of
from ..core.generated import cached_continuations, cached_texts
from ..core.generation import NEW_TOKENS, settings_of
from ..core.likelihood import context_of, specials
from ..core.model import Model
from ..core.task import Task
from ..core.training import Precision
from ..errors import InputError


@dataclass(frozen=True)
class Writing:
    """How a teacher writes, and where that is kept."""

    folder: Path
    precision: Precision
    beams: int
    length_penalty: float | None
    most: int | None
    """Tokens of a text."""
    drawn: int | None
    """A seed, if texts are drawn from the teacher; None: the beam search decides."""


class Lessons(Protocol):
    """Sources and what may be written for them."""

    sources: Sequence[Any]
    references: Sequence[Continuation]
    """Of the first sources; the others are unlabelled."""
    notes: dict[str, Any]

    def written(self, numbers: Sequence[int]) -> list[Continuation]:
        """What the teacher writes for these sources."""
        ...

    def rows(self, model: Model, numbers: Sequence[int], texts: Sequence[Continuation]) -> list[dict[str, Any]]:
        """Sources and what is to be written for them, as a model reads them."""
        ...


class Pairs:
    """Those of an encoder-decoder."""

    def __init__(self, task: Any, teacher: Model, how: Writing) -> None:
        config = teacher.module.generation_config
        config.num_beams = how.beams
        config.length_penalty = how.length_penalty if how.beams > 1 and how.length_penalty is not None else config.length_penalty
        config.max_new_tokens = how.most or config.max_new_tokens
        self.task, self.teacher, self.how = task, teacher, how
        self.sources: Sequence[Any] = [*task.inputs("train"), *task.unlabelled]
        self.references: Sequence[Continuation] = [Continuation(text, ended=True) for text in task.references["train"]]
        self.notes = settings_of(teacher.module) | ({} if how.drawn is None else {"drawn": how.drawn})

    def written(self, numbers: Sequence[int]) -> list[Continuation]:
        sources, how = [self.sources[number] for number in numbers], self.how
        texts = cached_texts(self.teacher, sources, how.folder, precision=how.precision, drawn=how.drawn)
        return [Continuation(text, ended=True) for text in texts]

    def rows(self, model: Model, numbers: Sequence[int], texts: Sequence[Continuation]) -> list[dict[str, Any]]:
        return list(self.task.encode_pairs(model, [self.sources[number] for number in numbers], [text.text for text in texts]))


class Prompts:
    """Those of a causal language model."""

    def __init__(self, task: Task, teacher: Model, how: Writing, *, tokens: int, most: int | None, seed: int) -> None:
        """Args:
        tokens: of a prompt, as the teacher counts them.
        most: prompts out of the training texts, drawn by the seed; None: all.
        """
        room = context_of(teacher.module, teacher.tokenizer) - len(specials(teacher.tokenizer)[0]) - tokens
        if room < 1:
            raise InputError(
                f"distill_generation: prompt_tokens is {tokens}, but the teacher reads {tokens + room} tokens at most, all in all"
            )
        self.teacher, self.how, self.longest = teacher, how, min(how.most or NEW_TOKENS, room)
        own, more = (pieces(texts, teacher.tokenizer, tokens, self.longest) for texts in (task.inputs("train"), task.unlabelled))
        if most is not None and most < len(own):
            own = [own[number] for number in sorted(random.Random(seed).sample(range(len(own)), most))]
        if not own:
            raise InputError("distill_generation: no training text has a prompt and what follows it, two tokens or more")
        self.sources: Sequence[Any] = [piece.prompt for piece in (*own, *more)]
        self.references: Sequence[Continuation] = [piece.reference for piece in own]
        searched = {"num_beams": how.beams} if how.drawn is None else {"drawn": how.drawn}
        self.notes = {**searched, "max_new_tokens": self.longest, "prompt_tokens": tokens}

    def written(self, numbers: Sequence[int]) -> list[Continuation]:
        how, penalty = self.how, 1.0 if self.how.length_penalty is None else self.how.length_penalty
        options = {"precision": how.precision, "drawn": how.drawn, "beams": how.beams, "length_penalty": penalty}
        prompts = [self.sources[number] for number in numbers]
        return cached_continuations(self.teacher, prompts, self.longest, how.folder, **options)  # type: ignore[arg-type]

    def rows(self, model: Model, numbers: Sequence[int], texts: Sequence[Continuation]) -> list[dict[str, Any]]:
        return rows_of(model.module, model.tokenizer, [self.sources[number] for number in numbers], texts)


def mixed(lessons: Lessons, mix: float, seed: int) -> tuple[list[int], list[Continuation], int]:
    """The sources that are learnt, what is to be written for each, and of how many that is the data's own reference.

    Each of the training sources keeps its reference with probability `mix`, and the teacher writes for the others; sources for
    which nothing is written are left out.
    """
    own, rng = len(lessons.references), random.Random(seed)
    kept = [rng.random() < mix for _ in range(own)]
    asked = [i for i in range(len(lessons.sources)) if i >= own or not kept[i]]
    written = dict(zip(asked, lessons.written(asked), strict=True)) if asked else {}
    texts = [written[i] if i in written else lessons.references[i] for i in range(len(lessons.sources))]
    chosen = [i for i, text in enumerate(texts) if text.text]
    return chosen, [texts[i] for i in chosen], sum(kept)
