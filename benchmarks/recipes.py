"""The recipes of the applications in full: every step, and what the first trained model and the last are worth.

    python benchmarks/recipes.py [NAME ...] [--texts N] [--seed 0]

NAME is a recipe for data that `multum example` makes; all of the applications by default. The first `--texts` train, or all. Every
stage is scored and timed on validation, in turns, the first trained one and the last on test too. A run that was stopped goes on
where it was, and `applications.py` takes the originals that it shrinks out of these runs.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from common import fewer, publish

import multum
from multum.core.folders import read_json
from multum.data import open_task
from multum.example import fetch
from multum.progress import Progress
from multum.recipe import EXAMPLE, Recipe, read

NAMES = (
    "distil-student",
    "chinese-reviews",
    "cloze-qa",
    "text-generation",
    "summarization",
    "translation",
    "translation-black-box",
)
ROUNDS = 10
"""Of timing, in turns."""
FOLDER = Path(__file__).parents[1] / "recipes"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=NAMES, metavar="NAME")
    parser.add_argument("--texts", type=int, help="training texts; all by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, default=Path("runs/applications/recipes"))
    options = parser.parse_args()
    for name in options.names:
        run = read_json(whole(name, options.output, options.texts, options.seed) / "run.json")
        values = {key: run[key] for key in ("recipe", "data", "candidates", "stages", "threads")}
        asked = {" --texts": options.texts, " --seed": options.seed}
        command = f"recipes.py {name}{''.join(f'{option} {value}' for option, value in asked.items() if value)}"
        publish(f"recipe_{name.replace('-', '_')}", table(run), {"run": values}, summary=words(name, run), command=command)


def recipe(name: str) -> Recipe:
    """The recipe of this name."""
    return read(FOLDER / f"{name}.yaml")


def whole(name: str, output: Path, texts: int | None, seed: int, until: str = "") -> Path:
    """The run folder of a recipe, run to its end or to this stage."""
    folder, found = output / f"{name}-{texts or 'all'}-{seed}{until and f'-{until}'}", recipe(name)
    changes: dict[str, Any] = {"seed": seed}
    if until:
        changes["steps"] = found.steps[: found.stages.index(until) + 1]
    if texts:
        changes["data"] = str(fewer(fetch(found.data.removeprefix(EXAMPLE)), texts, folder / "data"))
    multum.run(found.model_copy(update=changes), folder / "run", rounds=ROUNDS, progress=Progress())
    return folder / "run"


def table(run: dict[str, Any]) -> list[list[str]]:
    """Every stage on validation, the ends on test."""
    rows = [["stage", "split", "quality", "95 %", "lost", "ms", "x faster", "MB", "weights that are not zero"]]
    first = run["candidates"][0]
    task = open_task(run["task"], str(fetched(run["data"]["source"])), seed=run["seed"])
    for candidate in run["candidates"]:
        for split in ("validation", "test"):
            if not (found := candidate[split]):
                continue
            quality, size, speed = found["quality"], found["size"], found["speed"]
            rows.append(
                [
                    candidate["technique"],
                    split,
                    f"{quality['value']:.4g}",
                    f"{quality['ci95'][0]:.4g} to {quality['ci95'][1]:.4g}",
                    f"{task.drop_of(first[split], found):+.2f}",
                    f"{speed['p50_ms']:.2f}",
                    f"{speed['ratio_to_first']['value']:.2f}",
                    f"{size['bytes_on_disk'] / 1e6:.1f}",
                    f"{size['nonzero_parameters'] / 1e6:.1f} million",
                ]
            )
    return rows


def fetched(source: str) -> Path:
    return fetch(source.removeprefix(EXAMPLE)) if source.startswith(EXAMPLE) else Path(source)


def words(name: str, run: dict[str, Any]) -> str:
    metric = run["candidates"][0]["validation"]["quality"]["metric"]
    sizes = ", ".join(f"{count} {split}" for split, count in run["data"]["sizes"].items())
    took = ", ".join(f"{stage['name']} {stage['seconds'] / 60:.0f}" for stage in run["stages"])
    return (
        f"`recipes/{name}.yaml` ({sizes}); quality is {metric}. In torch, fp32, batch 1 at the texts' own lengths, "
        f"{run['threads']} thread{'s' if run['threads'] > 1 else ''}. Minutes: {took}."
    )


if __name__ == "__main__":
    main()
