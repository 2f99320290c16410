"""The main job on the film reviews, from a fair original: accuracy, latency and bytes of what ships, over several seeds.

    python benchmarks/reviews.py [--seeds 0 1 2] [--quick] [--recipe 1e-4 2] [-o runs/benchmark]

The original is fine-tuned with every learning rate and number of epochs of a small grid (seed 0) and the best on validation is
taken for all seeds; `--recipe` takes one that such a grid has found before. `shrink --max-drop 1` then walks down from it. The
test split is read at the end, by `shrink` itself, for the original in torch fp32, the original's fastest int8 or fp32 export, and
what ships, all three timed in turns: batch 1, the texts' own lengths, tokenizing included. A run that was stopped goes on where it
was.

Once a run has chosen, every rung is scored on the test split too, for the last table alone: what a rung of some speed loses, over
all seeds, without the luck of being chosen.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from pathlib import Path
from typing import Any

from common import median_with_range, publish

import multum
from multum.core.folders import read_json, write_json
from multum.core.step import make
from multum.core.teacher import logits
from multum.data import open_task
from multum.errors import BudgetNotMet
from multum.example import fetch
from multum.progress import Progress
from multum.runtimes import open as open_target

GRID = [{"learning_rate": rate, "epochs": epochs} for rate in (5e-5, 1e-4, 2e-4) for epochs in (2, 4)]

EDGES = (4, 5.5, 7.5, 10, 14, 19, 24, 32, 45, 60)
"""Speed-ups between which rungs are put together."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--recipe", type=float, nargs=2, metavar=("LEARNING_RATE", "EPOCHS"))
    parser.add_argument("-o", "--output", type=Path, default=Path("runs/benchmark"))
    options = parser.parse_args()
    data, runs = str(fetch("reviews-en")), []
    recipe = (
        dict(zip(("learning_rate", "epochs"), options.recipe, strict=True)) if options.recipe else best_recipe(data, options.output)
    )
    for seed in options.seeds:
        original = fine_tuned(data, recipe, seed, options.output / f"original-{seed}")
        folder = options.output / f"{'quick' if options.quick else 'full'}-{seed}"
        try:
            job = {"task": "text-classification", "data": data, "output": folder, "seed": seed, "quick": options.quick}
            multum.shrink(str(original), **job, max_drop=1.0, progress=Progress())
        except BudgetNotMet as error:
            print(error)
        run = read_json(folder / "run.json")
        runs.append({**figures(run), "rungs_on_test": rungs_on_test(run, folder, data)})
        report(runs, recipe, options.quick, known=options.recipe)


def best_recipe(data: str, folder: Path) -> dict[str, Any]:
    """The fine-tuning of the grid with the best validation accuracy."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "grid.json"
    tried: list[dict[str, Any]] = read_json(path) if path.exists() else []
    task = open_task("text-classification", data)
    for fields in GRID[len(tried) :]:
        model = make("finetune", fields)(task.load(str(fetch("minilm"))), task)
        quality = task.score(
            logits(model.module, list(task.encode(model, "validation")), model.tokenizer.pad_token_id), "validation"
        )
        tried.append({**fields, "validation": quality.value})
        print(tried[-1], flush=True)
        write_json(path, tried)
    best = max(tried, key=lambda entry: entry["validation"])
    return {name: best[name] for name in ("learning_rate", "epochs")}


def fine_tuned(data: str, recipe: dict[str, Any], seed: int, folder: Path) -> Path:
    if not folder.exists():
        task = open_task("text-classification", data, seed=seed)
        make("finetune", {**recipe, "seed": seed})(task.load(str(fetch("minilm"))), task).save(folder)
    return folder


def figures(run: dict[str, Any]) -> dict[str, Any]:
    """What counts of one run, all on the test split."""
    tested = [c for c in run["candidates"] if c["test"]]
    original, chosen = tested[0], next(c for c in tested if c["name"] == run["chosen"])
    strongest = next(c for c in tested if c["folder"] == "original" and c["target"] != "original")
    # Ratios were taken round by round against the original in torch, the first of the three.
    ratio = {c["name"]: c["test"]["speed"]["ratio_to_first"]["value"] for c in tested}
    return {
        "seed": run["seed"],
        "chosen": chosen["name"],
        "original_accuracy": original["test"]["quality"]["value"],
        "chosen_accuracy": chosen["test"]["quality"]["value"],
        "drop": 100 * (original["test"]["quality"]["value"] - chosen["test"]["quality"]["value"]),
        "validation_drop": chosen["drop"],
        "p50_ms": [c["test"]["speed"]["p50_ms"] for c in (original, strongest, chosen)],
        "over_torch": ratio[chosen["name"]],
        "over_strongest": ratio[chosen["name"]] / ratio[strongest["name"]],
        "strongest": f"{strongest['runtime']} {strongest['precision']}",
        "tokenize_p50_ms": [c["test"]["speed"]["tokenize_p50_ms"] for c in (original, strongest, chosen)],
        "macs": [c["test"]["size"]["macs_per_example"] for c in (original, strongest, chosen)],
        "bytes": [c["test"]["size"]["bytes_on_disk"] for c in (original, strongest, chosen)],
        "smaller": original["test"]["size"]["bytes_on_disk"] / chosen["test"]["size"]["bytes_on_disk"],
        "seconds": run["elapsed_s"],
        "frontier": [(c["name"], c["speedup"], c["drop"]) for c in run["candidates"] if c["name"].startswith("rung-")],
    }


def rungs_on_test(run: dict[str, Any], folder: Path, data: str) -> dict[str, float]:
    """Points that every rung loses on the test split against the original in torch, one text at a time."""
    task = open_task("text-classification", data, seed=run["seed"])
    whole = next(c["test"]["quality"]["value"] for c in run["candidates"] if c["test"])
    drops = {}
    for candidate in run["candidates"]:
        if candidate["name"].startswith("rung-") and "," not in candidate["name"]:  # else a rung in another runtime
            answers = open_target(folder / candidate["target"]).predict(task.inputs("test"), batch_size=1)
            drops[candidate["name"]] = round(100 * (whole - task.score(answers, "test").value), 2)
    return drops


def frontier(runs: list[dict[str, Any]]) -> list[str]:
    """The rungs of all seeds by speed, as a table: what they lose on both splits."""
    rows = [
        (speedup, drop, run["rungs_on_test"][name])
        for run in runs
        for name, speedup, drop in run["frontier"]
        if name in run["rungs_on_test"]
    ]
    lines = ["| speed-up over torch | rungs | points lost on validation, mean (range) | on test |", "| --- | --- | --- | --- |"]
    for low, high in itertools.pairwise(EDGES):
        inside = [row for row in rows if low <= row[0] < high]
        if inside:
            columns = list(zip(*inside, strict=True))[1:]
            cells = [f"{statistics.mean(column):.2f} ({min(column):.2f} to {max(column):.2f})" for column in columns]
            lines.append(f"| {low}x to {high}x | {len(inside)} | {cells[0]} | {cells[1]} |")
    return lines


def report(runs: list[dict[str, Any]], recipe: dict[str, Any], quick: bool, known: list[float] | None) -> None:
    head = [
        "seed",
        "chosen",
        "original",
        "chosen",
        "drop",
        "ms torch / int8 / chosen",
        "x torch",
        "x int8",
        "MB",
        "x smaller",
        "min",
    ]
    rows = [
        [
            str(r["seed"]),
            r["chosen"],
            f"{r['original_accuracy']:.4f}",
            f"{r['chosen_accuracy']:.4f}",
            f"{r['drop']:.2f}",
            " / ".join(f"{ms:.2f}" for ms in r["p50_ms"]),
            f"{r['over_torch']:.1f}",
            f"{r['over_strongest']:.1f}",
            f"{r['bytes'][2] / 1e6:.1f}",
            f"{r['smaller']:.1f}",
            f"{r['seconds'] / 60:.0f}",
        ]
        for r in runs
    ]
    keys = ("original_accuracy", "chosen_accuracy", "drop", "over_torch", "over_strongest", "smaller")
    total = {key: median_with_range([r[key] for r in runs]) for key in keys}
    summary = "; ".join(
        f"{key.replace('_', ' ')} {t['median']:.3g} ({t['low']:.3g} to {t['high']:.3g})" for key, t in total.items()
    )
    for r in runs:
        walk = ", ".join(f"{name} {speedup:.1f}x {drop:+.2f}" for name, speedup, drop in r["frontier"])
        summary += f".\n\nThe walk of seed {r['seed']} on validation (speed-up over torch, points lost): {walk}"
    summary += ".\n\nThe rungs of all seeds together:\n\n" + "\n".join(frontier(runs)) + "\n"
    values = {"finetune": recipe, "runs": runs, "median": total}
    seeds = " ".join(str(r["seed"]) for r in runs)
    recipe_given = f" --recipe {known[0]:g} {known[1]:g}" if known else ""
    command = f"reviews.py{' --quick' if quick else ''} --seeds {seeds}{recipe_given}"
    publish(
        "reviews_quick" if quick else "reviews",
        [head, *rows],
        values,
        summary=f"Median over seeds (range): {summary}",
        command=command,
    )


if __name__ == "__main__":
    main()
