"""What differs between the ladders of encoders, causal language models and encoder-decoders: how a rung is cut and taught.

An encoder's rungs lose heads, neurons and layers together under a measured latency table, and are executed by exports. What writes
text is timed while it writes. A causal model loses whole layers first, those that turn their inputs least, as long as
`DEPTH` of them stay; then heads, neurons and layers under a table of prefill and decode. An encoder-decoder loses decoder layers
first, which run once for every token that is written, then heads and neurons of both stacks.

Both are executed as graphs with a cache where there is a runtime for these that takes the model, causal models by llama.cpp where
that does. Else torch executes them, and their weights are packed into integers at the end, which saves bytes and no time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from . import bench, runtimes, tasks
from .budget import LANGUAGE, LANGUAGE_QUICK, TRANSLATORS, TRANSLATORS_QUICK, Effort
from .core.depth import Depth, shallower
from .core.families import stacks_of
from .core.model import Model
from .core.surgery import heads_and_neurons
from .errors import InputError
from .plan import EXPORT, PRUNING, TRAINING

DEPTH = 0.75
"""Share of a causal model's layers below which single heads and neurons go."""
WRITERS = ("f16", "q8_0", "q4_0")
"""What llama.cpp runs causal models in."""
GRAPHS = ("int8", "fp32")
"""What graphs of models that write are tried in, one after the other: a token reads every weight, and fewer bytes are faster."""
TRACING = 5 * EXPORT
"""Seconds that the export of a model that writes takes, before any is made: it is traced, and writes in torch too."""
LEAST = 0.1
"""Layers of each stack of an encoder-decoder that must be left."""
WRITING = 4 * TRAINING
"""Forward passes that a teacher takes to write a text, token by token with some hypotheses."""
DID = {"prune_structured": "structure pruned", "drop_layers": "layers dropped"}
"""Step -> what it did, as a report says it."""
Steps = list[tuple[str, dict[str, Any]]]
"""Names of steps with their fields."""
Forms = list[tuple[str, str]]
"""Runtimes with a precision each."""


@dataclass(kw_only=True)
class Descent:
    """The encoder's, and what the others have of it.

    Args:
        folder: of the run.
        effort: how much is trained and measured.
        seed: of the run.
    """

    first: ClassVar[str] = "rung-01"
    """What is cut first, and what teaches."""
    number: ClassVar[int] = 2
    """Of the first rung that is cut."""
    step: ClassVar[float] = 1.5
    """How much faster the next rung is meant to be."""
    goes_on: ClassVar[bool] = True
    """Below a rung that misses the drop by less than its own error; not where a rung takes hours."""
    teaches: ClassVar[str] = "distill"
    """The step that teaches a rung."""
    cutting: ClassVar[tuple[str, float]] = ("prune and repair", PRUNING)
    """What cutting is called, and the forward passes of every calibration text that it takes."""
    teacher_passes: ClassVar[float] = 1.0
    """Forward passes that the teacher's answer to a text costs."""
    paced: ClassVar[int] = 64
    """Examples that the pace of a forward pass is told by."""
    stacks: ClassVar[int] = 1
    """Of blocks, that a model has."""
    exporting: ClassVar[float] = 0.0
    """Seconds that exporting a rung takes beside measuring it, before any was exported."""

    folder: Path
    effort: Effort
    seed: int
    exports: bool = True
    """Rungs are measured as exports; else the model itself in torch."""
    runtime: str = ""
    """That they are measured in, once the original was."""
    table: Any = None
    full: float = 1.0
    """Predicted cost of the original."""

    def begin(self, test_bench: bench.Bench, model: Model) -> None:
        """Measure what the parts of the original cost, or read it from the run."""
        self.table = self.measured(test_bench, model)
        self.full = self.cost(model)

    def offers(self) -> list[Forms]:
        """What the original is exported to on this machine: groups, each for where nothing of those before it keeps the drop."""
        return [bench.offers()]

    def check(self, model: Model) -> None:
        """Raise `InputError` where no export can say what was left of a model, before it is taught."""

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
class WritingDescent(Descent):
    """What the two kinds of models that write have in common: graphs where these can be had, else torch and packed weights."""

    goes_on: ClassVar[bool] = False
    first: ClassVar[str] = "original"
    number: ClassVar[int] = 1
    cutting: ClassVar[tuple[str, float]] = ("cut", PRUNING)
    exporting: ClassVar[float] = TRACING
    exports: bool = False

    def offers(self) -> list[Forms]:
        graphs = bench.offers()
        return [[form for form in graphs if form[1] == precision] for precision in GRAPHS]

    def measured(self, test_bench: bench.Bench, model: Model) -> Any:
        return test_bench.writing_table(model)

    def packing(self, bits: int) -> Steps:
        return [] if self.exports else packed(bits, self.effort, self.seed)


@dataclass(kw_only=True)
class CausalDescent(WritingDescent):
    """Layers, then heads, neurons and layers together, taught by the original's kept answers."""

    step: ClassVar[float] = 1.25
    paced: ClassVar[int] = 4
    blocks: list[tuple[int, int]] = field(default_factory=list)
    """Of the original."""

    def begin(self, test_bench: bench.Bench, model: Model) -> None:
        self.blocks = heads_and_neurons(model.module)
        super().begin(test_bench, model)

    def offers(self) -> list[Forms]:
        there = runtimes.find("llamacpp").unavailable() is None
        return [[("llamacpp", precision) for precision in WRITERS if there], *super().offers()]

    def check(self, model: Model) -> None:
        if self.runtime == "llamacpp":
            runtimes.find("llamacpp").check(model)

    def cut(self, model: Model, step: float) -> Steps:
        blocks, wanted = heads_and_neurons(model.module), self.cost(model) / step
        keep = max((k for k in range(1, len(blocks)) if self.table.total(blocks[:k]) <= wanted), default=0)
        if keep >= DEPTH * len(self.blocks) and len(set(blocks)) == 1:
            return [
                ("drop_layers", {"keep": keep, "which": "importance", "samples": self.effort.prune["samples"], "seed": self.seed})
            ]
        return super().cut(model, step)

    def rows(self, task: Any, model: Model) -> int:
        return len(task.encode(model, "train")) + len(task.encode_texts(model, task.unlabelled)) * bool(task.unlabelled)


@dataclass(kw_only=True)
class TranslatorDescent(WritingDescent):
    """Decoder layers, then heads and neurons of both stacks, taught to write what the original writes."""

    teaches: ClassVar[str] = "distill_generation"
    teacher_passes: ClassVar[float] = WRITING
    paced: ClassVar[int] = 32
    stacks: ClassVar[int] = 2
    widest: tuple[int, int] = (1, 1)
    """Heads and neurons of the original's widest block."""

    def begin(self, test_bench: bench.Bench, model: Model) -> None:
        heads, neurons = (max(column) for column in zip(*heads_and_neurons(model.module), strict=True))
        self.widest = heads, neurons
        super().begin(test_bench, model)

    def cost(self, model: Model) -> float:
        """Blocks that were cut cost the share of heads and neurons that is left."""
        blocks, (encoder, _) = heads_and_neurons(model.module), _depth(model)
        shares = [sum(count / full for count, full in zip(counts, self.widest, strict=True)) / 2 for counts in blocks]
        return float(self.table.total((sum(shares[:encoder]), sum(shares[encoder:]))))

    def room(self, model: Model, step: float) -> bool:
        """Whether there is a decoder layer to drop, or something is left of the layers of a rung faster by a step."""
        least = self.table.total((LEAST, LEAST))
        return shallower(_depth(model), self.table.total, 0.0) is not None or self.cost(model) / step > least

    def cut(self, model: Model, step: float) -> Steps:
        """Multiply-accumulates stand in for time where heads and neurons go."""
        now = _depth(model)
        if keep := shallower(now, self.table.total, self.table.total(now) / step):
            return [("drop_layers", {"stack": "decoder", "keep": keep, "which": "alternate"})]
        return [("prune_structured", {"speedup": step, "seed": self.seed, **self.effort.prune})]


def packed(bits: int, effort: Effort, seed: int) -> Steps:
    """Tables in 8 bits, and the blocks' weights in so many, those of fewer than 8 with what corrects the error of each rounding."""
    more = {"group": 64, "samples": effort.prune["samples"], "seed": seed}
    return [("quantize_embeddings", {"bits": 8}), ("quantize", {"bits": 8}) if bits == 8 else ("gptq", {"bits": bits, **more})]


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
    if not can_shrink(task):
        taken = ", ".join(name for name in tasks.names() if can_shrink(tasks.find(name)))
        raise InputError(
            f"shrink takes models for {taken}, not for {task.name}; such models can be trained, distilled and pruned with "
            "'multum apply' and 'multum run', and are measured and used in torch: 'multum measure', 'multum predict'"
        )
    return KINDS.get(task.auto_class, Descent)


def can_shrink(task: Any) -> bool:
    """Whether something does it."""
    return task.auto_class in KINDS or bool(getattr(task, "shrinks", False))


def effort_of(kind: type[Descent], encoders: Effort, *, quick: bool) -> Effort:
    """How much is trained and measured; `encoders` for those."""
    efforts = {CausalDescent: (LANGUAGE, LANGUAGE_QUICK), TranslatorDescent: (TRANSLATORS, TRANSLATORS_QUICK)}
    return efforts.get(kind, (encoders, encoders))[quick]
