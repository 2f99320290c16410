"""What `shrink` exports to, measures on and writes down: the run's own test bench."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import runtimes
from ._measure import DISTURBED, measure, time_again, unsteady
from ._pace import NEW, longest_prompt
from .core.depth import DepthTable
from .core.families import blocks_of, stacks_of
from .core.folders import read_json
from .core.latency import LatencyTable
from .core.likelihood import context_of
from .core.model import Model
from .core.reporting import report
from .core.sentences import written
from .core.surgery import heads_and_neurons
from .core.writing import prompt_of
from .errors import InputError, MissingExtra, ParityError
from .progress import Progress
from .run_folder import RunFolder
from .targets import export_model, fingerprint

WORTH = {"bleu": 1.0, "rouge2": 0.01}
"""Metric -> below what an original that writes is worth nothing."""
DEEP = 2**27
"""Weights in all blocks up to which stacks as deep as the model are timed. Of larger models even short ones fill any cache."""
WRITING_ROUNDS = 8
"""Of the table of a causal model, in which every pass writes a text."""


class Bench:
    """Exports and measures the models of one run.

    Args:
        run: where candidates are written down.
        task: the task on its data.
        rounds: of every measurement.
        progress: is told every stage.
        texts_per_round: timed in each of them.
    """

    def __init__(self, run: RunFolder, task: Any, rounds: int, progress: Progress, texts_per_round: int = 50) -> None:
        self.run, self.task, self.rounds, self.progress = run, task, rounds, progress
        self.texts_per_round = texts_per_round
        self.folder, self.seed, self.threads = run.path, run.values["seed"], run.values["threads"]

    def export(self, model: Model, folder: Path, wanted: Sequence[tuple[str, str]]) -> list[Path]:
        """Export a saved model to each (runtime, precision) that is not there yet.

        Returns:
            The export folders. A form that fails, or does not answer as the model does, is left out and noted.
        """
        targets = []
        for runtime, precision in wanted:
            target = folder / f"{runtime}-{precision}"
            try:
                if not target.exists():
                    with self.progress.stage(f"{folder.name}: export to {runtime} {precision}"):
                        self._export(model, target, runtime, precision)
            except (ParityError, InputError, MissingExtra, RuntimeError, ValueError, TypeError) as error:  # no full disk is one
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                self.run.note(f"{folder.name} has no {runtime} {precision} form: {reason}")
                continue
            targets.append(target)
        return targets

    def _export(self, model: Model, target: Path, runtime: str, precision: str) -> None:
        export_model(runtimes.find(runtime), model, target, precision, self.task, self.seed)

    def measure(self, targets: Sequence[Path], split: str = "validation", rounds: int | None = None) -> list[dict[str, Any]]:
        """Measure targets, and say so where the machine was too busy for the figures to be trusted."""
        found = measure(targets, self.task, split=split, **self._how(rounds))
        self._trust(metrics["speed"] for metrics in found)
        return found

    def time_again(self, targets: Sequence[Path]) -> list[dict[str, Any]]:
        """Time targets that are measured already in turns, on validation. What their `speed` says is to change."""
        found = time_again(targets, self.task, split="validation", **self._how())
        self._trust(found)
        return found

    def _how(self, rounds: int | None = None) -> dict[str, Any]:
        return {
            "threads": self.threads,
            "rounds": rounds or self.rounds,
            "texts_per_round": self.texts_per_round,
            "progress": report,
        }

    def _trust(self, speeds: Iterable[Mapping[str, Any]]) -> None:
        if any(map(unsteady, speeds)):
            self.run.warn(DISTURBED)

    def doubt(self, metrics: dict[str, Any]) -> None:
        """Say it where the original knows nothing: all else is measured against it."""
        guess = self.task.guessing("validation") if hasattr(self.task, "guessing") else None
        if guess is not None and metrics["quality"]["ci95"][0] <= guess:
            self.run.warn(
                f"the original is no better than guessing ({100 * metrics['quality']['value']:.1f} %, and the most frequent answer "
                f"alone is right in {100 * guess:.1f} %): it learned nothing, so what was kept of it is worth nothing. Check that "
                "texts and labels belong together, or give more data"
            )
        worth = WORTH.get(metrics["quality"].get("metric", ""))
        if worth is not None and metrics["quality"]["value"] < worth:
            self.run.warn(
                f"the original hardly writes anything right ({metrics['quality']['metric']} {metrics['quality']['value']:.3g}), so "
                "what was kept of it is worth nothing. A model with random weights has to be trained first: multum apply finetune"
            )

    def add(
        self,
        name: str,
        folder: Path,
        target: Path,
        technique: str,
        model: Model,
        metrics: dict[str, Any],
        made_from: str | None = None,
        beside: float = 1.0,
    ) -> None:
        """Put a measured candidate into the run. `keep` writes it down.

        Args:
            made_from: names the folder it came from.
            beside: speed-up over the original in torch of what it was timed beside.
        """
        original = self.run.candidates[0] if self.run.candidates else None
        blocks = heads_and_neurons(model.module)
        self.run.add(
            {
                "name": name,
                "folder": folder.name,
                "target": str(target.relative_to(self.folder)),
                "fingerprint": fingerprint(target),
                "technique": technique,
                "made_from": made_from,
                "runtime": metrics["speed"]["runtime"],
                "precision": metrics["speed"]["precision"],
                "blocks": blocks,
                "full": original["full"] if original else [max(column) for column in zip(*blocks, strict=True)],
                "vocabulary": model.module.config.vocab_size,
                "validation": metrics,
                "test": None,
                "drop": round(self.task.drop_of(original["validation"] if original else metrics, metrics), 4),
                "speedup": round(metrics["speed"]["ratio_to_first"]["value"] * beside, 3),
                "steps": [step["step"] for step in model.history],
            }
        )

    def latency_table(self, model: Model) -> LatencyTable:
        path = self.folder / "latency.json"
        if not path.exists():
            strongest = self.run.strongest()
            threads = strongest["validation"]["speed"]["threads"]
            with self.progress.stage("measure the latency table"):
                table = measured_table(model, self.task, precision=strongest["precision"], threads=threads, rounds=self.rounds)
            # Rungs are timed from text to scores, and cutting texts into tokens gets no faster.
            table.behind(strongest["validation"]["speed"]["tokenize_p50_ms"]).save(path)
        self.run.values["latency_table"] = read_json(path)
        return LatencyTable.load(path)

    def writing_table(self, model: Model) -> LatencyTable | DepthTable:
        """What the parts of a model that writes cost in torch; of an encoder-decoder its blocks."""
        path, kind = self.folder / "latency.json", DepthTable if model.module.config.is_encoder_decoder else LatencyTable
        if not path.exists():
            threads = self.run.strongest()["validation"]["speed"]["threads"]
            measured = measured_depths if kind is DepthTable else measured_writing
            with self.progress.stage("measure the latency table"):
                measured(model, self.task, threads=threads, rounds=self.rounds).save(path)
        self.run.values["latency_table"] = read_json(path)
        return kind.load(path)

    def keep(self) -> None:
        """Write the run down: its candidates, and how long every stage took."""
        self.run.values["stages"] = self.progress.stages()
        self.run.write()


def measured_table(model: Model, task: Any, *, precision: str, threads: int, rounds: int) -> LatencyTable:
    """What heads, neurons and blocks cost on this machine, at the lengths of the rows that the task's own inputs are read in.

    In onnxruntime, whatever runtime ships: relative costs are what the search needs.
    """
    lengths = sorted(len(row["input_ids"]) for row in task.encode(model, "validation"))
    lengths = [lengths[round(share * (len(lengths) - 1))] for share in (0.1, 0.3, 0.5, 0.7, 0.9)]
    blocks = heads_and_neurons(model.module)
    heads, neurons = (max(column) for column in zip(*blocks, strict=True))
    weights = sum(parameter.numel() for block in blocks_of(model.module) for parameter in block.parameters())
    onnxruntime = runtimes.find("onnxruntime")
    timer, every_token = onnxruntime.stacks(model, precision=precision, lengths=lengths, threads=threads)
    return LatencyTable.measure(
        timer,
        heads=heads,
        neurons=neurons,
        rounds=rounds,
        about={"runtime": "onnxruntime", "precision": precision, "lengths": lengths, "threads": threads},
        every_token=every_token,
        depth=len(blocks) if weights <= DEEP else 0,
    )


def measured_writing(model: Model, task: Any, *, threads: int, rounds: int) -> LatencyTable:
    """What heads, neurons and blocks of a causal model cost while it reads the beginning of a text and writes on, in torch."""
    texts = [text if isinstance(text, str) else written(text, model.tokenizer) for text in task.inputs("validation")[:200]]
    most = longest_prompt(context_of(model.module, model.tokenizer))
    prompt = min(most, max(1, int(statistics.median(len(prompt_of(model.tokenizer, text)) for text in texts))))
    heads, neurons = (max(column) for column in zip(*heads_and_neurons(model.module), strict=True))
    return LatencyTable.measure(
        runtimes.find("pytorch").stacks(model, prompt=prompt, new=NEW, threads=threads),
        heads=heads,
        neurons=neurons,
        rounds=min(rounds, WRITING_ROUNDS),
        about={"runtime": "pytorch", "precision": "fp32", "prompt": prompt, "new": NEW, "threads": threads},
        every_token=True,
    )


def measured_depths(model: Model, task: Any, *, threads: int, rounds: int) -> DepthTable:
    """What the blocks of an encoder-decoder cost in torch, at the median lengths of the task's own texts."""
    rows = task.encode(model, "validation")
    read, write = (int(statistics.median(map(len, rows[name]))) for name in ("input_ids", "labels"))
    encoder, decoder = (len(stack.blocks) for stack in stacks_of(model.module))
    return DepthTable.measure(
        runtimes.find("pytorch").depths(model, read=read, new=write, threads=threads),
        (encoder, decoder),
        rounds=rounds,
        about={"runtime": "pytorch", "precision": "fp32", "read": read, "written": write, "threads": threads},
    )


def offers() -> list[tuple[str, str]]:
    """Every (runtime, precision) that models can be exported to on this machine, and that the latency table can be measured in."""
    return [
        (name, precision)
        for name in runtimes.names()
        if name != "pytorch" and not hasattr(runtimes.find(name), "TASKS") and runtimes.find(name).unavailable() is None
        for precision in runtimes.find(name).PRECISIONS
        if precision in runtimes.find("onnxruntime").PRECISIONS
    ]
