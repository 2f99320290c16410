"""What differs between the ladders of encoders, causal language models and encoder-decoders: how a rung is cut and taught.

An encoder's rungs lose heads, neurons and layers together under a measured latency table, and are executed by exports. What writes
text is timed while it writes, in torch. A causal model loses whole layers first, those that turn their inputs least, as long as
`DEPTH` of them stay; then heads, neurons and layers under a table of prefill and decode. An encoder-decoder loses decoder layers
first, which run once for every token that is written, then encoder layers. At the end the weights of what holds are packed into
integers, which saves bytes and no time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from . import bench, tasks
from .budget import LANGUAGE, LANGUAGE_QUICK, TRANSLATORS, TRANSLATORS_QUICK, Effort
from .core.depth import Depth, shallower
from .core.families import stacks_of
from .core.model import Model
from .core.surgery import heads_and_neurons
from .errors import InputError
from .plan import PRUNING, TRAINING

DEPTH = 0.75
"""Share of a causal model's layers below which single heads and neurons go."""
WRITING = 4 * TRAINING
"""Forward passes that a teacher takes to write a text, token by token with some hypotheses."""
DID = {"prune_structured": "structure pruned", "drop_layers": "layers dropped"}
"""Step -> what it did, as a report says it."""
Steps = list[tuple[str, dict[str, Any]]]
"""Names of steps with their fields."""


@dataclass(kw_only=True)
class Descent:
    """The encoder's, and what the others have of it.

    Args:
        folder: of the run.
        effort: how much is trained and measured.
        seed: of the run.
    """

    exports: ClassVar[bool] = True
    """Rungs are measured as exports; else the model itself in torch."""
    first: ClassVar[str] = "rung-01"
    """What is cut first, and what teaches."""
    number: ClassVar[int] = 2
    """Of the first rung that is cut."""
    step: ClassVar[float] = 1.5
    """How much faster the next rung is meant to be."""
    teaches: ClassVar[str] = "distill"
    """The step that teaches a rung."""
    cutting: ClassVar[tuple[str, float]] = ("prune and repair", PRUNING)
    """What cutting is called, and the forward passes of every calibration text that it takes."""
    teacher_passes: ClassVar[float] = 1.0
    """Forward passes that the teacher's answer to a text costs."""
    paced: ClassVar[int] = 64
    """Examples that the pace of a forward pass is told by."""

    folder: Path
    effort: Effort
    seed: int
    table: Any = None
    full: float = 1.0
    """Predicted cost of the original."""

    def begin(self, test_bench: bench.Bench, model: Model) -> None:
        """Measure what the parts of the original cost, or read it from the run."""
        self.table = self.measured(test_bench, model)
        self.full = self.cost(model)

    def measured(self, test_bench: bench.Bench, model: Model) -> Any:
        """The table."""
        return test_bench.latency_table(model)

    def cost(self, model: Model) -> float:
        """Predicted time of a model, in the table's unit."""
        return float(self.table.total(heads_and_neurons(model.module)))

    def room(self, model: Model, step: float) -> bool:
        """Whether a rung faster than this one by a step still has room for a head."""
        return self.cost(model) / step > float(self.table.total([(1, 0)]))

    def cut(self, model: Model, step: float) -> Steps:
        """What makes a model faster by a step."""
        fields = {"speedup": step, "latency_table": str(self.folder / "latency.json"), "seed": self.seed}
        return [("prune_structured", {**fields, **self.effort.prune})]

    def teaching(self) -> dict[str, Any]:
        """Fields of the step that teaches."""
        fields = {"teacher": str(self.folder / self.first), "cache": str(self.folder / "teacher"), "seed": self.seed}
        return {**fields, **self.effort.distill}

    def rows(self, task: Any, model: Model) -> int:
        """Training examples of a pass, those that the teacher alone labels included."""
        return len(task.inputs("train")) + len(task.unlabelled)

    def packing(self, bits: int) -> Steps:
        """What packs weights into so many bits; nothing where exports do."""
        return []

    def did(self, steps: Sequence[Mapping[str, Any]]) -> str:
        """What made a rung, of the steps in its recipe."""
        cuts = [DID[name] for step in steps if (name := str(step["step"])) in DID]
        return cuts[-1] if cuts else ""


@dataclass(kw_only=True)
class CausalDescent(Descent):
    """Layers, then heads, neurons and layers together, taught by the original's kept answers."""

    exports: ClassVar[bool] = False
    first: ClassVar[str] = "original"
    number: ClassVar[int] = 1
    step: ClassVar[float] = 1.25
    cutting: ClassVar[tuple[str, float]] = ("cut", PRUNING)
    paced: ClassVar[int] = 4
    blocks: list[tuple[int, int]] = field(default_factory=list)
    """Of the original."""

    def begin(self, test_bench: bench.Bench, model: Model) -> None:
        self.blocks = heads_and_neurons(model.module)
        super().begin(test_bench, model)

    def measured(self, test_bench: bench.Bench, model: Model) -> Any:
        return test_bench.writing_table(model)

    def cut(self, model: Model, step: float) -> Steps:
        blocks, wanted = heads_and_neurons(model.module), self.cost(model) / step
        keep = max((k for k in range(1, len(blocks)) if self.table.total(blocks[:k]) <= wanted), default=0)
        if keep >= DEPTH * len(self.blocks) and len(set(blocks)) == 1:
            return [("drop_layers", {"keep": keep, "which": "importance", "samples": self.effort.prune["samples"], "seed": self.seed})]
        return super().cut(model, step)

    def rows(self, task: Any, model: Model) -> int:
        return len(task.encode(model, "train")) + len(task.encode_texts(model, task.unlabelled)) * bool(task.unlabelled)

    def packing(self, bits: int) -> Steps:
        weights: tuple[str, dict[str, Any]] = ("quantize", {"bits": bits})
        if bits < 8:
            samples = self.effort.prune.get("samples", 16)
            weights = ("gptq", {"bits": bits, "group": 64, "samples": samples, "seed": self.seed})
        return [("quantize_embeddings", {"bits": 8}), weights]


@dataclass(kw_only=True)
class TranslatorDescent(Descent):
    """Decoder layers, then encoder layers, taught to write what the original writes."""

    exports: ClassVar[bool] = False
    first: ClassVar[str] = "original"
    number: ClassVar[int] = 1
    teaches: ClassVar[str] = "distill_generation"
    cutting: ClassVar[tuple[str, float]] = ("drop layers", 0.0)
    teacher_passes: ClassVar[float] = WRITING
    paced: ClassVar[int] = 32

    def measured(self, test_bench: bench.Bench, model: Model) -> Any:
        return test_bench.writing_table(model)

    def cost(self, model: Model) -> float:
        return float(self.table.total(_depth(model)))

    def room(self, model: Model, step: float) -> bool:
        return self._next(model, step) is not None

    def cut(self, model: Model, step: float) -> Steps:
        now, then = _depth(model), self._next(model, step) or _depth(model)
        stacks = (("decoder", now[1], then[1]), ("encoder", now[0], then[0]))
        return [("drop_layers", {"stack": name, "keep": b, "which": "alternate"}) for name, a, b in stacks if b < a]

    def packing(self, bits: int) -> Steps:
        fields = {"bits": bits} if bits == 8 else {"bits": bits, "group": 64, "samples": 256, "seed": self.seed}
        return [("quantize_embeddings", {"bits": 8}), ("quantize" if bits == 8 else "gptq", fields)]

    def _next(self, model: Model, step: float) -> Depth | None:
        return shallower(_depth(model), self.table.total, self.cost(model) / step)


def _depth(model: Model) -> Depth:
    encoder, decoder = (len(stack.blocks) for stack in stacks_of(model.module))
    return encoder, decoder


KINDS: dict[str, type[Descent]] = {"AutoModelForCausalLM": CausalDescent, "AutoModelForSeq2SeqLM": TranslatorDescent}
"""By the class that loads a task's models; all others are encoders."""


def kind_of(task: Any) -> type[Descent]:
    """How models of a task are shrunk.

    Raises:
        InputError: nothing does it.
    """
    if not _shrinks(task):
        taken = ", ".join(name for name in tasks.names() if _shrinks(tasks.find(name)))
        raise InputError(
            f"shrink takes models for {taken}, not for {task.name}; such models can be trained, distilled and pruned with "
            "'multum apply' and 'multum run', and are measured and used in torch: 'multum measure', 'multum predict'"
        )
    return KINDS.get(task.auto_class, Descent)


def _shrinks(task: Any) -> bool:
    return task.auto_class in KINDS or bool(getattr(task, "shrinks", False))


def effort_of(kind: type[Descent], encoders: Effort, *, quick: bool) -> Effort:
    """How much is trained and measured; `encoders` for those."""
    efforts = {CausalDescent: (LANGUAGE, LANGUAGE_QUICK), TranslatorDescent: (TRANSLATORS, TRANSLATORS_QUICK)}
    return efforts.get(kind, (encoders, encoders))[quick]
