"""Small students taught by labels, by the teacher's answers, by more texts, by its layers: at equal training time, over seeds.

    python benchmarks/distillation.py [--data reviews-en] [--model minilm] [--texts 2000] [--seeds 0 1 2] [--layers 3 1]
        [--epochs 6] [-o runs/distillation]

`--texts` trains on the first so many texts alone; by default on all. Of the others some may be read without their labels, which
costs nothing where texts are at hand and labels are not.
The teacher is fine-tuned anew for every seed; students are its own blocks, evenly spaced. `distill` gets `--epochs` passes over
the training texts; what an epoch of every other way costs is measured first, and each way gets as many as fit the same seconds.
What the teacher's outputs take, computed once before, stands apart. Every way chooses its learning rate on validation, with the
first seed: from the first of `RATES` up, for as long as a higher one is better. A difference is taken text by text on the test
split against labels alone, and against `distill`, with the same seed; its interval is a bootstrap over texts. A run that was
stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import csv
import math
from pathlib import Path
from typing import Any

import numpy as np
from common import difference, median_with_range, publish, reviews
from scipy.special import log_softmax

from multum.core.folders import digest, read_json, write_json
from multum.core.model import Model
from multum.core.step import make
from multum.core.teacher import cached_logits, logits
from multum.data import open_task
from multum.example import fetch

PROBE = 2
"""Megabatches, within which the Trainer sorts texts by length, after which the cost of an epoch is known."""
BATCH = 64
LABELS, ANSWERS, SPARE = "labels alone", "distill", "distill, unlabelled texts"
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    LABELS: ("finetune", {"batch_size": BATCH}),
    ANSWERS: ("distill", {}),
    "distill, 4 variants": ("distill", {"augment": 4}),
    SPARE: ("distill", {}),
    "+ embeddings": ("distill_layers", {"embeddings": 1.0, "relations": 0.0}),
    "+ hidden states": ("distill_layers", {"hidden": 1.0, "relations": 0.0}),
    "+ attention scores": ("distill_layers", {"attention": 0.1, "relations": 0.0}),
    "+ relations": ("distill_layers", {"relations": 1.0}),
    "+ pkd": ("distill_layers", {"pkd": 10.0, "relations": 0.0}),
}
MORE = 4
"""Unlabelled texts for each one with a label: those behind the ones that `--texts` takes."""
RATES = (3e-4, 1e-3, 3e-3)
"""Learning rates to choose from; the first is the distilling steps' own."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", default="reviews-en")
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--texts", type=int)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--layers", type=int, nargs="+", default=[3, 1])
    parser.add_argument("--epochs", type=float, default=6, help="of distill; the others get as many as take as long")
    parser.add_argument("-o", "--output", type=Path, default=Path("runs/distillation"))
    options = parser.parse_args()
    name = options.data if options.texts is None else f"{options.data}-{options.texts}"
    bench = Bench(options.data, options.model, options.output / f"{name}-{options.epochs:g}", options.texts, options.epochs)
    for seed in options.seeds:
        for layers in options.layers:
            for way in bench.ways:
                bench.run(way, layers, seed, first=options.seeds[0])
            report(
                bench, [seed for seed in options.seeds if bench.complete(seed, options.layers, options.seeds[0])], options.layers
            )


class Bench:
    """Every run of the table, kept on disk.

    Args:
        data, model: names of examples.
        folder: where teachers, their outputs and finished runs are kept.
        texts: to train on; None for all.
        passes: of `distill` over them.
    """

    def __init__(self, data: str, model: str, folder: Path, texts: int | None = None, passes: float = 6) -> None:
        self.data, self.name, self.folder, self.texts, self.passes = data, model, folder, texts, passes
        self.model = fetch(model)
        self.source = str(fetch(data) if texts is None else reviews(folder, texts, data))
        self.task = open_task("text-classification", self.source)
        folder.mkdir(parents=True, exist_ok=True)
        self.more = open_task("text-classification", self.source, unlabelled=str(self._spare())) if texts else self.task
        self.ways = [way for way in WAYS if way != SPARE or texts]

    def teacher(self, seed: int) -> Path:
        """The whole model, fine-tuned with this seed. A vocabulary that the texts do not need would only cost time."""
        folder = self.folder / f"teacher-{seed}"
        if not folder.exists():
            task = open_task("text-classification", self.source, seed=seed)
            model = make("trim_vocabulary", {})(task.load(str(self.model)), task)
            make("finetune", {"epochs": 2, "learning_rate": 1e-4, "seed": seed})(model, task).save(folder)
        return folder

    def student(self, seed: int, layers: int) -> Model:
        teacher = self.task.load(str(self.teacher(seed)))
        return make("drop_layers", {"keep": layers, "which": "alternate"})(teacher, self.task)

    def run(self, way: str, layers: int, seed: int, *, first: int) -> dict[str, Any]:
        return self._run(way, layers, seed, first, self.rate(way, layers, first))

    def epochs(self, way: str, layers: int, seed: int) -> float:
        """As many as take the seconds that `distill` takes for its own."""
        return self.passes * self.pace(ANSWERS, layers, seed) / self.pace(way, layers, seed)

    def rate(self, way: str, layers: int, seed: int) -> float:
        """The learning rate that reaches most on validation."""
        tried: dict[float, float] = {}
        for rate in RATES:
            tried[rate] = self._run(way, layers, seed, seed, rate)["validation"]
            if tried[rate] < max(tried.values()):
                break
        return max(tried, key=lambda rate: tried[rate])

    def complete(self, seed: int, layers: list[int], first: int) -> bool:
        return all(self._path(way, number, seed, self.rate(way, number, first)).exists() for way in self.ways for number in layers)

    def pace(self, way: str, layers: int, seed: int) -> float:
        """Of training for one epoch."""
        path = self.folder / f"pace-{layers}-{_short(way)}.json"
        if not path.exists():
            task = self._task(way)
            rows = (len(task.inputs("train")) + len(task.unlabelled)) * (1 + WAYS[way][1].get("augment", 0))
            share = min(1.0, PROBE * max(1, min(rows // (4 * BATCH), 50)) / math.ceil(rows / BATCH))
            entry = self._train(way, layers, seed, {"epochs": share}).history[-1]
            seconds = entry["training"]["seconds"]
            write_json(path, {"seconds": seconds / share, "once_s": entry["seconds"] - seconds})
        return float(read_json(path)["seconds"])

    def once(self, way: str, layers: int) -> float:
        """Seconds before the first training of a kind: mostly the teacher's outputs, which the others then find on disk."""
        return float(read_json(self.folder / f"pace-{layers}-{_short(way)}.json")["once_s"])

    def _run(self, way: str, layers: int, seed: int, first: int, rate: float) -> dict[str, Any]:
        path = self._path(way, layers, seed, rate)
        if not path.exists():
            write_json(path, self._taught(way, layers, seed, {"epochs": self.epochs(way, layers, first), "learning_rate": rate}))
            print(path.stem, read_json(path)["validation"], flush=True)
        return read_json(path)

    def _train(self, way: str, layers: int, seed: int, fields: dict[str, Any]) -> Model:
        step, own = WAYS[way]
        if step != "finetune":
            own = {**own, "teacher": str(self.teacher(seed)), "cache": str(self.folder / "outputs")}
        return make(step, {**own, **fields, "seed": seed})(self.student(seed, layers), self._task(way))

    def _task(self, way: str) -> Any:
        return self.more if way == SPARE else self.task

    def _spare(self) -> Path:
        """Texts behind those that are trained on, without their labels."""
        path = self.folder / "spare.csv"
        with (fetch(self.data) / "train.csv").open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))[self.texts : (1 + MORE) * (self.texts or 0)]
        with path.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([["text"], *([row["text"]] for row in rows)])
        return path

    def _taught(self, way: str, layers: int, seed: int, fields: dict[str, Any]) -> dict[str, Any]:
        made, teacher = self._train(way, layers, seed, fields), self.task.load(str(self.teacher(seed)))
        ours = {split: self._answers(made, split) for split in ("validation", "test")}
        theirs = cached_logits(teacher, list(self.task.encode(teacher, "test")), self.folder / "outputs", precision="fp32")
        log_q, log_p = log_softmax(ours["test"], axis=1), log_softmax(theirs, axis=1)
        return {
            **fields,
            "validation": self.task.score(ours["validation"], "validation").value,
            "accuracy": self.task.score(ours["test"], "test").value,
            "teacher": self.task.score(theirs, "test").value,
            "kl": float((np.exp(log_p) * (log_p - log_q)).sum(1).mean()),
            "training_s": made.history[-1]["training"]["seconds"],
            "correct": [int(x) for x in ours["test"].argmax(1) == self.task.targets["test"]],
        }

    def _answers(self, model: Model, split: Any) -> np.ndarray:
        return logits(model.module, list(self.task.encode(model, split)), model.tokenizer.pad_token_id, precision="fp32")

    def _path(self, way: str, layers: int, seed: int, rate: float) -> Path:
        return self.folder / f"{layers}-{_short(way)}-{rate:g}-{seed}.json"


def _short(way: str) -> str:
    """A file name that changes with what the way does."""
    return f"{''.join(c if c.isalnum() else '-' for c in way)}-{digest(repr(WAYS[way]))[:6]}"


def _told(apart: dict[str, Any]) -> str:
    return f"{apart['value']:+.2f} ({apart['ci95'][0]:+.2f} to {apart['ci95'][1]:+.2f})"


def report(bench: Bench, seeds: list[int], layers: list[int]) -> None:
    if not seeds:
        return
    head = [
        "layers",
        "way",
        "accuracy",
        "against labels alone (95 %)",
        "against distill (95 %)",
        "KL to the teacher",
        "rate",
        "epochs",
        "an epoch, s",
        "once before, s",
    ]
    rows, values, teachers = [], {}, []
    for number in layers:
        for way in bench.ways:
            runs = [bench.run(way, number, seed, first=seeds[0]) for seed in seeds]
            apart, beyond = (
                difference(
                    [r["correct"] for r in runs], [bench.run(other, number, seed, first=seeds[0])["correct"] for seed in seeds]
                )
                for other in (LABELS, ANSWERS)
            )
            accuracy = median_with_range([100 * r["accuracy"] for r in runs])
            kl, pace = float(np.mean([r["kl"] for r in runs])), bench.pace(way, number, seeds[0])
            values[f"{number} layers, {way}"] = {
                "accuracy": accuracy,
                "difference": apart,
                "beyond_distill": beyond,
                "kl": kl,
                "rate": runs[0]["learning_rate"],
                "epoch_s": pace,
            }
            teachers = [100 * r["teacher"] for r in runs]
            rows.append(
                [
                    str(number),
                    way,
                    f"{accuracy['median']:.1f} ({accuracy['low']:.1f} to {accuracy['high']:.1f})",
                    "" if way == LABELS else _told(apart),
                    "" if way == ANSWERS else _told(beyond),
                    f"{kl:.3f}",
                    f"{runs[0]['learning_rate']:g}",
                    f"{runs[0]['epochs']:.1f}",
                    f"{pace:.0f}",
                    f"{bench.once(way, number):.0f}",
                ]
            )
    teacher = median_with_range(teachers)
    summary = (
        f"Test accuracy in %, median over seeds {', '.join(map(str, seeds))} (range), and the mean difference in points. "
        f"The teachers: {teacher['median']:.1f} ({teacher['low']:.1f} to {teacher['high']:.1f}). "
        "Intervals are over texts, not seeds. Labels alone are taught with dropout, the others without, as the steps' defaults are."
    )
    name = f"distillation_{bench.data.replace('-', '_')}" + (f"_{bench.texts}" if bench.texts else "")
    values = {"data": bench.data, "seeds": seeds, "teacher": teacher, "ways": values}
    command = f"distillation.py --data {bench.data} --model {bench.name} --epochs {bench.passes:g}"
    command += f" --texts {bench.texts}" if bench.texts else ""
    publish(name, [head, *rows], values, summary=summary, command=command)


if __name__ == "__main__":
    main()
