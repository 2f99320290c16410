"""Whether the latency table foresees how fast a cut model is, and whether it becomes as much faster as it computes less.

    python benchmarks/latency_prediction.py [MODEL] [--rounds 30] [--threads 1] [--speedups 1.5 2 4] [--repeats 3]

A MiniLM fine-tuned on the film reviews is cut by `prune_structured` under a table that is measured in onnxruntime, once for int8
and once for fp32. The table holds for the graph alone, as a mean over texts of five lengths; beside it stands what the parts add
up to without the stacks that are as deep as the model. Five validation texts of these
lengths, cut into tokens before, are answered one by one by the exported models, whole and cut, in turns.
The error is (predicted - measured) / measured. How much of the cache a machine's other users leave changes by the minute, so table
and models are measured one right after the other, `--repeats` times: medians, and the range of the errors. The cuts are made under
a table of their own.

Then all of them answer the test texts end to end in processes of their own and in turns, as `multum measure` does it. For the
speed-up no table is needed: that of the whole model's graph over the cut one's, against their multiply-accumulates; the goal
is a ratio of the two of at least 0.85.

A run that was stopped goes on where it was, in `-o`. Settings other than the default ones are printed only, not kept in results/.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import publish

from multum._measure import macs_per_example, measure
from multum.bench import measured_table
from multum.core.folders import digest, read_json, write_json
from multum.core.latency import LatencyTable, interleave
from multum.core.profile import profile
from multum.core.step import make
from multum.core.surgery import heads_and_neurons
from multum.data import open_task
from multum.example import fetch
from multum.runtimes import find
from multum.targets import export_model

PRECISIONS = ("int8", "fp32")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="a fine-tuned classifier of the reviews; MiniLM is fine-tuned otherwise")
    parser.add_argument("--rounds", type=int, default=30, help="turns of every measurement")
    parser.add_argument("--texts", type=int, default=50, help="texts of a turn")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--samples", type=int, default=512, help="texts that prices are measured on")
    parser.add_argument("--repeats", type=int, default=3, help="how often the table is measured")
    parser.add_argument("--speedups", type=float, nargs="+", default=[1.5, 2.0, 4.0])
    parser.add_argument("--epochs", type=float, default=2.0, help="of fine-tuning")
    parser.add_argument("-o", "--output", type=Path, default=Path("runs/latency_prediction"))
    options = parser.parse_args()
    settings = {key: value for key, value in vars(options).items() if key != "output"}
    standard = all(value == parser.get_default(key) for key, value in settings.items() if key != "model")
    bench = Bench(options, options.output / digest(json.dumps(settings, sort_keys=True))[:8])
    found = {precision: bench.taken(precision) for precision in PRECISIONS}
    rows = table(found)
    if standard:
        publish("latency_prediction", rows, {"precisions": found, **settings}, summary=words(found, options.threads))
    else:
        print("\n".join(" | ".join(row) for row in rows), words(found, options.threads), sep="\n\n")


class Bench:
    """Models, tables and measurements, kept on disk."""

    def __init__(self, options: Any, folder: Path) -> None:
        self.options, self.folder = options, folder
        self.task = open_task("text-classification", str(fetch("reviews-en")))
        folder.mkdir(parents=True, exist_ok=True)

    def whole(self) -> Path:
        """The model that is cut."""
        folder = self.folder / "whole"
        if not folder.exists():
            model = self.task.load(self.options.model or str(fetch("minilm")))
            if not self.task.is_trained(model):
                model = make("finetune", {"epochs": self.options.epochs, "learning_rate": 1e-4})(model, self.task)
            model.save(folder)
        return folder

    def table(self, precision: str, name: str) -> LatencyTable:
        """The table of this name."""
        path = self.folder / f"latency-{precision}-{name}.json"
        if not path.exists():
            print(path.name, file=sys.stderr, flush=True)
            model, options = self.task.load(str(self.whole())), self.options
            measured_table(model, self.task, precision=precision, threads=options.threads, rounds=options.rounds).save(path)
        return LatencyTable.load(path)

    def cut(self, precision: str, speedup: float) -> Path:
        folder = self.folder / f"{precision}-{speedup:g}x"
        if not folder.exists():
            self.table(precision, "cut")
            fields = {"speedup": speedup, "samples": self.options.samples}
            fields["latency_table"] = str(self.folder / f"latency-{precision}-cut.json")
            make("prune_structured", fields)(self.task.load(str(self.whole())), self.task).save(folder)
        return folder

    def export(self, folder: Path, precision: str) -> Path:
        target, model = folder / f"onnxruntime-{precision}", self.task.load(str(folder))
        if not target.exists():
            export_model(find("onnxruntime"), model, target, precision, self.task, 0)
        return target

    def taken(self, precision: str) -> list[dict[str, Any]]:
        """The whole model and every cut, predicted and measured."""
        folders = [self.whole(), *(self.cut(precision, speedup) for speedup in self.options.speedups)]
        targets = [self.export(folder, precision) for folder in folders]
        tables, times = [], []
        for number in range(self.options.repeats):
            kept, table = self.folder / f"graphs-{precision}-{number}.json", self.table(precision, str(number))
            if not kept.exists():
                write_json(kept, self.graphs(targets, table.about["lengths"]))
            tables.append(table)
            times.append(read_json(kept))
        kept = self.folder / f"measured-{precision}.json"
        if not kept.exists():
            print(f"measure {precision}", file=sys.stderr, flush=True)
            options = self.options
            write_json(
                kept, measure(targets, self.task, threads=options.threads, rounds=options.rounds, texts_per_round=options.texts)
            )
        names = ["whole", *(f"{speedup:g}x" for speedup in self.options.speedups)]
        models = [self.task.load(str(folder)) for folder in folders]
        blocks = [heads_and_neurons(model.module) for model in models]
        macs = [macs_per_example(profile(model.module)["macs"], tables[0].about["lengths"]) for model in models]
        every = zip(names, blocks, macs, zip(*times, strict=True), read_json(kept), strict=True)
        found = against_first([figures(tables, *one) for one in every])
        for one, model in zip(found[1:], models[1:], strict=True):
            one["cut_s"] = model.history[-1]["seconds"]
        return found

    def graphs(self, targets: list[Path], lengths: list[int]) -> list[float]:
        """Milliseconds of every target's graph alone, the mean over a validation text of each of these lengths."""
        rows = self.task.encode(self.task.load(str(self.whole())), "validation")["input_ids"]
        of = {len(ids): np.array([ids], dtype=np.int64) for ids in rows}
        columns = [
            {"input_ids": of[n], "attention_mask": np.ones_like(of[n]), "token_type_ids": np.zeros_like(of[n])} for n in lengths
        ]
        threads = self.options.threads
        passes = [find("onnxruntime").open(target, threads=threads).passes(threads) for target in targets]
        times = interleave({str(number): timer(run, columns) for number, run in enumerate(passes)}, 2 * self.options.rounds)
        return list(times.values())


def timer(run: Callable[[Any], Any], texts: list[Any]) -> Callable[[], float]:
    """Times one pass a text: milliseconds, the mean over the texts.

    Behind a pass that does not count, as the table is measured: the others that are timed in turns have pushed the weights out.
    """

    def once() -> float:
        for _ in range(2):
            started = time.perf_counter()
            for text in texts:
                run(text)
        return 1e3 * (time.perf_counter() - started) / len(texts)

    return once


def figures(
    tables: list[LatencyTable],
    name: str,
    blocks: list[tuple[int, int]],
    macs: int | None,
    measured: Sequence[float],
    metrics: dict[str, Any],
) -> dict[str, Any]:
    """What is predicted of one model by every table, what was measured right after it, and how far they are apart."""
    predicted = [each.total(blocks) for each in tables]
    return {
        "name": name,
        "blocks": blocks,
        "parts_ms": [each.parts(blocks) for each in tables],
        "predicted_ms": predicted,
        "fixed_ms": statistics.median(each.total([(1, 1)] * len(blocks)) for each in tables),
        "measured_ms": measured,
        "error_percent": [100 * (there - here) / here for there, here in zip(predicted, measured, strict=True)],
        "macs": macs,
        "end_to_end": metrics["speed"],
        "accuracy": metrics["quality"]["value"],
    }


def against_first(every: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same with what became of multiply-accumulates and of time since the first."""
    first = every[0]
    for one in every:
        one["macs_ratio"] = first["macs"] / one["macs"]
        one["speedup"] = statistics.median(a / b for a, b in zip(first["measured_ms"], one["measured_ms"], strict=True))
    return every


def table(found: dict[str, list[dict[str, Any]]]) -> list[list[str]]:
    head = [
        "model",
        "blocks",
        "parts ms",
        "predicted ms",
        "fixed ms",
        "measured ms",
        "error %",
        "range",
        "MACs",
        "speed-up",
        "speed-up / MACs",
    ]
    rows = [[*head, "end to end", "95 %", "test accuracy"]]
    for precision, every in found.items():
        for one in every:
            errors, whole = one["error_percent"], one["end_to_end"]["ratio_to_first"]
            rows.append(
                [
                    f"{precision}, {one['name']}",
                    str(len(one["blocks"])),
                    f"{statistics.median(one['parts_ms']):.3f}",
                    f"{statistics.median(one['predicted_ms']):.3f}",
                    f"{one['fixed_ms']:.3f}",
                    f"{statistics.median(one['measured_ms']):.3f}",
                    f"{statistics.median(errors):+.1f}",
                    f"{min(errors):+.1f} to {max(errors):+.1f}",
                    f"1/{one['macs_ratio']:.2f}",
                    f"{one['speedup']:.2f}x",
                    f"{one['speedup'] / one['macs_ratio']:.2f}",
                    f"{whole['value']:.2f}x",
                    f"{whole['ci95'][0]:.2f} to {whole['ci95'][1]:.2f}",
                    f"{one['accuracy']:.4f}",
                ]
            )
    return rows


def words(found: dict[str, list[dict[str, Any]]], threads: int) -> str:
    took = [one["cut_s"] for every in found.values() for one in every[1:]]
    said = [f"Cuts took {min(took):.0f} to {max(took):.0f} s."]
    for precision, every in found.items():
        worst = max(abs(statistics.median(one["error_percent"])) for one in every[1:])
        least = min(one["speedup"] / one["macs_ratio"] for one in every[1:])
        said.append(
            f"{precision}: the largest error of a cut model is {worst:.1f} % (goal: 10), the least share of the "
            f"multiply-accumulates saved that becomes speed {least:.2f} (goal: 0.85)."
        )
    return " ".join(
        [
            f"On {threads} thread{'s' if threads > 1 else ''}, one text at a time, weights warm.",
            *said,
            "MACs are those of the same five texts; fixed is what as many blocks cost by the table, a head and a neuron in each.",
            "End to end are the test texts, cut into tokens, which no pruning makes faster. Nothing was taught after a cut.",
        ]
    )


if __name__ == "__main__":
    main()
