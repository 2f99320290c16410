"""The main job for the other applications: the original, its fastest form, every rung and what ships; quality, latency, bytes.

    python benchmarks/applications.py NAME [--texts N] [--full] [--time-limit MINUTES] [--seed 0]

NAME is one of reviews-zh, cloze-qa, translation, black-box, summarization, text-generation; `reviews.py` is that of English
reviews. The original of black-box learns from what the Bergamot engine wrote, and is measured by what people wrote.
The application's recipe (`recipes.py`) says which model and data. Where no package carries a trained model it is run to its end
first, encoder-decoders on all training texts, and its fine-tuned stage is the original. `shrink` walks down from it with `--quick`,
or with all its effort (`--full`), to the drop of the goal; the first `--texts` teach. With a time limit no rung is begun that would
end behind it. Rungs are scored on validation, by which they are chosen; the original, its fastest form and what ships also on test,
timed together in turns. Once a run has chosen, what every other rung loses on test is told too, for the table alone. A run that was
stopped goes on where it was.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common import fewer, publish

import multum
from multum._measure_worker import open_target
from multum.core.folders import read_json, write_json
from multum.data import open_task
from multum.errors import BudgetNotMet
from multum.example import fetch
from multum.progress import Progress
from multum.recipe import EXAMPLE, Recipe
from recipes import recipe, whole


@dataclass(frozen=True)
class Application:
    """What is shrunk, and to which goal.

    Args:
        recipe: names task, model and data.
        max_drop: in the task's own unit.
        texts: that teach the rungs, by default; None for all.
        stage: of the recipe, which makes the original; None where the recipe's model is one.
        all_first: the recipe takes all training texts.
    """

    recipe: str
    max_drop: float
    texts: int | None = None
    stage: str | None = None
    all_first: bool = False


APPLICATIONS = {
    "reviews-zh": Application("chinese-reviews", 1.0, texts=2000, stage="finetune"),
    "cloze-qa": Application("cloze-qa", 1.5, texts=6000),
    # An encoder-decoder with random weights learns more from one epoch of many texts than from many of few.
    "translation": Application("translation", 1.0, texts=20000, stage="finetune", all_first=True),
    "black-box": Application("translation-black-box", 1.0, texts=20000, stage="finetune", all_first=True),
    "summarization": Application("summarization", 0.7, texts=20000, stage="finetune", all_first=True),
    "text-generation": Application("text-generation", 10.0),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=list(APPLICATIONS))
    parser.add_argument("--texts", type=int, help="training texts; 0 for all")
    parser.add_argument("--full", action="store_true", help="with all the effort of shrink")
    parser.add_argument("--time-limit", type=float, help="minutes of the walk; those that the original takes are not among them")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, default=Path("runs/applications"))
    options = parser.parse_args()
    one = APPLICATIONS[options.name]
    made = recipe(one.recipe)
    source = fetch(made.data.removeprefix(EXAMPLE))
    texts = one.texts if options.texts is None else options.texts or None
    folder = options.output / f"{options.name}-{texts or 'all'}-{options.seed}"
    folder.mkdir(parents=True, exist_ok=True)
    data = fewer(source, texts, folder / "data") if texts else source
    if one.stage:
        stage = next(name for name in made.stages if name.endswith(one.stage))
        limits = (None, options.seed) if one.all_first else (texts, options.seed, stage)
        original = whole(one.recipe, options.output / "recipes", *limits) / stage
    else:
        original = fetch(made.model.removeprefix(EXAMPLE))
    output = folder / ("full" if options.full else "quick")
    job: dict[str, Any] = {"task": made.task, "data": str(data), "output": output, "seed": options.seed, "quick": not options.full}
    limit = options.time_limit and 60 * options.time_limit
    try:
        multum.shrink(str(original), **job, time_limit_s=limit, max_drop=one.max_drop, progress=Progress())
    except BudgetNotMet as error:
        print(error)
    run = read_json(output / "run.json")
    asked = {" --texts": options.texts, " --time-limit": options.time_limit, " --seed": options.seed}
    command = f"applications.py {options.name}{''.join(f'{name} {value:g}' for name, value in asked.items() if value)}"
    command += " --full" if options.full else ""
    values = {"run": {key: run[key] for key in ("chosen", "met", "why", "candidates", "elapsed_s", "data", "budget")}}
    task = open_task(made.task, str(data), seed=options.seed)
    rows = table(run, task, rungs_on_test(run, task, output))
    publish(f"application_{options.name.replace('-', '_')}", rows, values, summary=words(one, made, run), command=command)


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


def words(one: Application, made: Recipe, run: dict[str, Any]) -> str:
    metric = run["candidates"][0]["validation"]["quality"].get("metric", "quality")
    per_cent = made.task == "text-generation"
    unit = "per cent of perplexity" if per_cent else "points"
    met = f"what ships keeps within {one.max_drop:g} {unit}" if run["met"] else f"nothing keeps within the limits: {run['why']}"
    sizes = ", ".join(f"{count} {name}" for name, count in run["data"]["sizes"].items())
    threads = run["candidates"][0]["validation"]["speed"]["threads"]
    model, data = (name.removeprefix(EXAMPLE) for name in (made.model, made.data))
    return (
        f"{made.task}, {model} on {data} ({sizes}); quality is {metric}, and what was lost of it is in {unit}. "
        f"On validation {met}. Batch 1 at the texts' own lengths, {threads} thread{'s' if threads > 1 else ''}; "
        f"the walk took {run['elapsed_s'] / 60:.0f} minutes."
    )


if __name__ == "__main__":
    main()
