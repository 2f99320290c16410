"""What shrinking cost, in every figure, rung by rung, beside what training twice changes anyway.

    python benchmarks/evidence.py [--run RUN] [--texts N] [--rounds 3] [-o runs/evidence]

The rungs are those of a quick run of `shrink` on the film reviews; `--run` takes a finished run instead of making one. Each is
asked in the form that the run measured, and held against the original in torch on the whole test split, as `multum compare --level
full` does: by the same functions, but the original is asked only once. The floor is the original's own fine-tuning with the next
seed. Then `multum compare --level quick` is timed on the dearest pair there is, the original and the floor, two whole models in
torch. `--texts` looks at so many texts of every split, to try it out. A run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import median_with_range, publish

import multum
from multum._compare_answers import gather
from multum._compare_figures import compared, own_figures
from multum._compare_look import LEVELS, Look
from multum._compare_targets import Predictor
from multum._compare_words import change, named, p_said, signed
from multum._compare_work import Work
from multum.core.folders import read_json, write_json
from multum.core.model import machine
from multum.core.step import make
from multum.data import open_task
from multum.errors import BudgetNotMet
from multum.example import fetch
from multum.progress import Progress

ORIGINAL, FLOOR, MARGIN = "original", "trained again", 0.01
SIGNS = {"more fragile": "▼ ", "less fragile": "▲ ", "lower": "▼ ", "higher": "▲ ", "not shown": ""}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--run", type=Path)
    parser.add_argument("--texts", type=int)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("-o", "--output", type=Path, default=Path("runs/evidence"))
    options = parser.parse_args()
    folder = options.run or shrunk(options.output / "run")
    run = read_json(folder / "run.json")
    task = open_task(run["task"], run["data"]["source"], columns=run["arguments"]["columns"], seed=run["seed"])
    floor = trained_again(folder / "original", task, options.output)
    targets = {ORIGINAL: folder / "original", FLOOR: floor} | forms(run, folder)
    found = figures(targets, task, options.texts, options.output)
    seconds = quick_seconds(folder / "original", floor, run["data"]["source"], options.rounds, options.output / "seconds.json")
    report(run, found, seconds, given=options.run is not None)


def shrunk(folder: Path) -> Path:
    """A quick run, finished."""
    try:
        job: dict[str, Any] = {"task": "text-classification", "data": str(fetch("reviews-en")), "output": folder, "quick": True}
        multum.shrink(str(fetch("minilm")), **job, progress=Progress())
    except BudgetNotMet as error:
        print(error)
    return folder


def trained_again(original: Path, task: Any, output: Path) -> Path:
    """The original's own fine-tuning with the next seed, and nothing else changed."""
    recipe = read_json(original / "recipe.json")
    (step,) = recipe["steps"]
    fields = {**step["fields"], "seed": step["fields"]["seed"] + 1}
    folder = output / f"trained-again-{fields['seed']}"
    if not folder.exists():
        data = {"task": task.name, "data": dict(task.fingerprints)}
        make(step["step"], fields)(task.load(recipe["base"]), task).save(folder, data)
    return folder


def forms(run: Mapping[str, Any], folder: Path) -> dict[str, Path]:
    """Every rung in the form that was measured; the first has lost words that no text uses, and shows what that form changes."""
    rungs = [c for c in run["candidates"] if c["name"].startswith("rung-") and "," not in c["name"]]  # else in another runtime
    return {c["name"]: folder / c["target"] for c in rungs}


def figures(targets: Mapping[str, Path], task: Any, texts: int | None, output: Path) -> dict[str, Any]:
    """By model what it is alone (`own`), and against the original (`found`)."""
    progress, look = Progress(), Look(task, replace(LEVELS["full"], texts=texts), "test", 0, MARGIN)
    predictors = {name.replace(" ", "-"): Predictor(path, None, task) for name, path in targets.items()}
    work = Work(output, {"texts": texts, **{role: predictor.facts["fingerprint"] for role, predictor in predictors.items()}})
    answers = dict(zip(targets, gather(look, predictors, task, work, progress, None, 0).values(), strict=True))
    asked = look.asked()
    with progress.stage("figures"):
        models = {
            name: {"own": own_figures(one, asked), "found": None if name == ORIGINAL else compared(answers[ORIGINAL], one, asked)}
            for name, one in answers.items()
        }
    for model in models.values():  # the texts stay in the data
        for section in ("flips", "attribution"):
            ((model["found"] or {}).get(section) or {}).pop("examples", None)
    return {"n": len(look.texts), "notes": look.notes, "models": models}


def quick_seconds(before: Path, after: Path, data: str, rounds: int, path: Path) -> list[float]:
    """What the command takes, from the start of Python to the page, on all cores."""
    if not path.exists():
        taken = []
        for _ in range(rounds):
            with tempfile.TemporaryDirectory() as scratch:
                started = time.monotonic()
                command = [sys.executable, "-m", "multum", "compare", str(before), str(after), "--data", data, "--level", "quick"]
                subprocess.run([*command, "-o", f"{scratch}/out"], check=True, capture_output=True)
                taken.append(time.monotonic() - started)
        write_json(path, taken)
    found: list[float] = read_json(path)
    return found


HEAD = (
    "model",
    "x torch",
    "accuracy",
    "difference, points (95 %)",
    "lost / gained",
    "agreement",
    "KL, nats",
    "group that lost most",
    "ECE",
    "Brier",
    "AUC",
    "words ranked alike, ρ",
    "members told, AUC",
)


def row(name: str, speedup: str, own: Mapping[str, Any], found: Mapping[str, Any] | None) -> list[str]:
    """One model's figures, in the order of `HEAD`."""
    alone = [f"{100 * own['accuracy']['value']:.1f}"]
    scores = [f"{own['calibration'][key]:.3f}" for key in ("ece", "brier")]
    scores.append("–" if own["ranking"]["auc"] is None else f"{own['ranking']['auc']:.3f}")
    told = f"{own['privacy']['loss']['auc']['value']:.3f}"
    if found is None:
        return [name, speedup, *alone, "", "", "", "", "", *scores, "", told]
    apart, flips, worst, reasons = (found[key] for key in ("difference", "flips", "groups", "attribution"))
    ends = " to ".join(signed(end) for end in apart["ci95"])
    return [
        name,
        speedup,
        *alone,
        f"{SIGNS[apart['verdict']]}{signed(apart['value'])} ({ends})",
        f"{flips['lost']} / {flips['gained']}",
        f"{100 * flips['agreement']['value']:.1f} %",
        f"{flips['kl_nats']['value']:.3f}",
        group(worst),
        *scores,
        f"{reasons['rank']['value']:.2f}" if reasons else "–",
        f"{told} ({change(found['privacy']['loss']['auc']['value'])})",
    ]


def group(groups: Mapping[str, Any]) -> str:
    """The group that lost most; ▼ if more than chance explains."""
    if (worst := groups["worst"]) is None:
        return "none lost"
    return f"{'▼ ' if groups['damaged'] else ''}{named(worst)} {signed(worst['value'])} ({p_said(worst['p_holm'])})"


def excesses(models: Mapping[str, Any]) -> list[str]:
    """A second table: what each model loses on changed texts, and on short and long ones, beyond what the original loses."""
    found = {name: {**one["found"]["perturbations"], **one["found"]["lengths"]} for name, one in models.items() if one["found"]}
    changes = list(found[FLOOR])
    lines = ["| model | " + " | ".join(changes) + " |", "|" + " --- |" * (1 + len(changes))]
    lines.append("| original: its drop | " + " | ".join(signed(found[FLOOR][name]["drop_before"]) for name in changes) + " |")
    for name, one in found.items():
        cells = [
            f"{SIGNS[one[at]['verdict']]}{signed(one[at]['excess'])} ({' to '.join(signed(end) for end in one[at]['interval'])})"
            for at in changes
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def report(run: Mapping[str, Any], found: Mapping[str, Any], seconds: list[float], *, given: bool) -> None:
    speed = {c["name"]: f"{c['speedup']:.1f}" for c in run["candidates"]}
    rows = [row(name, speed.get(name, ""), **one) for name, one in found["models"].items()]
    took = median_with_range(seconds)
    lengths = found["models"][FLOOR]["found"]["lengths"]
    than = " or ".join(f"{name} than {one['than']} characters" for name, one in lengths.items())
    summary = [
        f"On {found['n']:,} test texts, against the original in torch. {FLOOR.capitalize()}: the same fine-tuning with another "
        "seed, what training twice changes. ▼ and ▲: worse or better by more than chance explains, groups corrected for their "
        "number. Members told: the AUC of a threshold on the loss that tells training texts from others, 0.5 if nothing leaks, and "
        "its change. Speed-ups are the run's own, on validation. Rungs are asked in the form that the run measured; rung-01 has "
        "lost nothing but words that no training text uses.",
        "",
        "Points of accuracy lost beyond what the original loses, with intervals that hold together at 95 % in each row: the same "
        f"texts changed{f', and the texts that are {than} against the others' if than else ''}:",
        "",
        *excesses(found["models"]),
        "",
        f"`multum compare --level quick` on 1,000 texts, two whole models in torch, {machine()['cores']} threads: "
        f"{took['median']:.0f} s ({took['low']:.0f} to {took['high']:.0f}, {len(seconds)} runs), from starting Python to the page.",
        *(f"\nNote: {note}." for note in found["notes"]),
    ]
    values = {**found, "chosen": run["chosen"], "quick_s": {**took, "runs": seconds}}
    publish("evidence", [list(HEAD), *rows], values, summary="\n".join(summary), command=f"evidence.py{' --run RUN' * given}")


if __name__ == "__main__":
    main()
