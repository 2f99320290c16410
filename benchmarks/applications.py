"""The main job for the other applications: the original, its fastest form, every rung and what ships; quality, latency, bytes.

    python benchmarks/applications.py NAME [--texts N] [--epochs N] [--full] [--time-limit MINUTES] [--seed 0]

NAME is one of reviews-zh, cloze-qa, translation, black-box, summarization, text-generation; `reviews.py` is that of English
reviews. The original of black-box learns from what the Bergamot engine wrote, and is measured by what people wrote.
Originals that no package carries are trained first: encoder-decoders on all training texts, others on the first `--texts`. `shrink`
then walks down from them with `--quick`, or with all its effort (`--full`), to the drop of the goal; the first `--texts` teach.
With a time limit no rung is begun that would end behind it. Rungs are scored on validation, by which they are chosen; the original,
its fastest form and what ships also on test, timed together in turns. Once a run has chosen, what every other rung loses on test is
told too, for the table alone. A run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from common import fewer, publish

import multum
from multum._measure_worker import open_target
from multum.core.folders import read_json, write_json
from multum.core.step import make
from multum.data import open_task
from multum.errors import BudgetNotMet
from multum.example import fetch
from multum.progress import Progress


@dataclass(frozen=True)
class Application:
    """What is shrunk, and to which goal.

    Args:
        task, model, data: names of the task and of two examples.
        max_drop: in the task's own unit.
        texts: that teach the rungs, by default; None for all.
        first: steps that make the original, where no package carries one.
        all_first: these take all training texts.
    """

    task: str
    model: str
    data: str
    max_drop: float
    texts: int | None = None
    first: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    all_first: bool = False


def writer(task: str, model: str, data: str, max_drop: float, *, epochs: int) -> Application:
    """An encoder-decoder with random weights. One epoch of many texts teaches it more than many of few."""
    first: list[tuple[str, dict[str, Any]]] = [("finetune", {"epochs": epochs, "learning_rate": 7e-4, "batch_size": 64})]
    return Application(task, model, data, max_drop, texts=20000, first=first, all_first=True)


APPLICATIONS = {
    "reviews-zh": Application(
        "text-classification",
        "e5-small",
        "reviews-zh",
        1.0,
        texts=2000,
        first=[("trim_vocabulary", {}), ("finetune", {"epochs": 2, "learning_rate": 1e-4})],
    ),
    "cloze-qa": Application("question-answering", "minilm", "cloze-en", 1.5, texts=6000),
    "translation": writer("translation", "untrained-en-it", "translations-en-it", 1.0, epochs=4),
    "black-box": writer("translation", "untrained-en-pt", "bergamot-en-pt", 1.0, epochs=12),
    "summarization": writer("summarization", "untrained-summaries", "summaries-en", 0.7, epochs=6),
    "text-generation": Application("text-generation", "smollm2", "plain-en", 10.0),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=list(APPLICATIONS))
    parser.add_argument("--texts", type=int, help="training texts; 0 for all")
    parser.add_argument("--epochs", type=int, help="of an encoder-decoder's first training")
    parser.add_argument("--full", action="store_true", help="with all the effort of shrink")
    parser.add_argument("--time-limit", type=float, help="minutes of the walk; those that the original takes are not among them")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, default=Path("runs/applications"))
    options = parser.parse_args()
    one = APPLICATIONS[options.name]
    if options.epochs:
        one = replace(one, first=[(step, {**fields, "epochs": options.epochs}) for step, fields in one.first])
    texts = one.texts if options.texts is None else options.texts or None
    folder = options.output / f"{options.name}-{texts or 'all'}{f'-{options.epochs}' if options.epochs else ''}-{options.seed}"
    folder.mkdir(parents=True, exist_ok=True)
    data = fewer(fetch(one.data), texts, folder / "data") if texts else fetch(one.data)
    first = fetch(one.data) if one.all_first else data
    original = trained(one, first, folder / "original", options.seed) if one.first else fetch(one.model)
    output = folder / ("full" if options.full else "quick")
    job: dict[str, Any] = {"task": one.task, "data": str(data), "output": output, "seed": options.seed, "quick": not options.full}
    limit = options.time_limit and 60 * options.time_limit
    try:
        multum.shrink(str(original), **job, time_limit_s=limit, max_drop=one.max_drop, progress=Progress())
    except BudgetNotMet as error:
        print(error)
    run = read_json(output / "run.json")
    asked = {" --texts": texts, " --epochs": options.epochs, " --time-limit": options.time_limit}
    command = f"applications.py {options.name}{''.join(f'{name} {value:g}' for name, value in asked.items() if value)}"
    command += " --full" if options.full else ""
    values = {"run": {key: run[key] for key in ("chosen", "met", "why", "candidates", "elapsed_s", "data", "budget")}}
    task = open_task(one.task, str(data), seed=options.seed)
    rows = table(run, task, rungs_on_test(run, task, output))
    publish(f"application_{options.name.replace('-', '_')}", rows, values, summary=words(one, run), command=command)


def trained(one: Application, data: Path, folder: Path, seed: int) -> Path:
    """The original."""
    if not folder.exists():
        task = open_task(one.task, str(data), seed=seed)
        model = task.load(str(fetch(one.model)))
        for step, fields in one.first:
            more = {"seed": seed} if step == "finetune" else {}
            model = make(step, {**fields, **more}).take(model, task)
        model.save(folder)
    return folder


def rungs_on_test(run: dict[str, Any], task: Any, folder: Path) -> dict[str, float]:
    """What every rung that the choice did not read the test split for loses on it, one text at a time."""
    path, whole = folder / "rungs_on_test.json", run["candidates"][0]["test"]
    found: dict[str, float] = read_json(path) if path.exists() else {}
    for candidate in run["candidates"]:
        name = candidate["name"]
        if name.startswith("rung-") and "," not in name and not candidate["test"] and name not in found:
            answers = open_target(folder / candidate["target"], run["threads"]).predict(task.inputs("test"), batch_size=1)
            found[name] = task.drop_of(whole, {"quality": asdict(task.score(answers, "test"))})
            write_json(path, found)
    return found


def table(run: dict[str, Any], task: Any, on_test: dict[str, float]) -> list[list[str]]:
    """Every candidate on validation, those that the test split was read for on it too."""
    rows = [["model", "executed by", "split", "quality", "95 %", "lost", "ms", "x torch", "x smaller", "lost on test"]]
    first = run["candidates"][0]
    for candidate in run["candidates"]:
        for split in ("validation", "test"):
            found = candidate[split]
            if not found:
                continue
            quality, speed, whole = found["quality"], found["speed"], first[split]
            faster = candidate["speedup"] if split == "validation" else speed["ratio_to_first"]["value"]
            smaller = whole["size"]["bytes_on_disk"] / found["size"]["bytes_on_disk"]
            lost = candidate["drop"] if split == "validation" else task.drop_of(first["test"], found)
            chosen = " (ships)" if candidate["name"] == run["chosen"] else ""
            rows.append(
                [
                    candidate["name"] + chosen,
                    f"{speed['runtime']} {speed['precision']}",
                    split,
                    f"{quality['value']:.4g}",
                    f"{quality['ci95'][0]:.4g} to {quality['ci95'][1]:.4g}",
                    f"{lost:+.2f}",
                    f"{speed['p50_ms']:.2f}",
                    f"{faster:.1f}",
                    f"{smaller:.1f}",
                    f"{on_test[candidate['name']]:+.2f}" if candidate["name"] in on_test else "",
                ]
            )
    return rows


def words(one: Application, run: dict[str, Any]) -> str:
    metric = run["candidates"][0]["validation"]["quality"].get("metric", "quality")
    per_cent = one.task == "text-generation"
    unit = "per cent of perplexity" if per_cent else "points"
    met = f"what ships keeps within {one.max_drop:g} {unit}" if run["met"] else f"nothing keeps within the limits: {run['why']}"
    sizes = ", ".join(f"{count} {name}" for name, count in run["data"]["sizes"].items())
    threads = run["candidates"][0]["validation"]["speed"]["threads"]
    return (
        f"{one.task}, {one.model} on {one.data} ({sizes}); quality is {metric}, and what was lost of it is in {unit}. "
        f"On validation {met}. Batch 1 at the texts' own lengths, {threads} thread{'s' if threads > 1 else ''}; "
        f"the walk took {run['elapsed_s'] / 60:.0f} minutes."
    )


if __name__ == "__main__":
    main()
