"""Whether what `multum advise` expects comes true: bytes, multiply-accumulates and speed, foretold and measured.

    python benchmarks/advise.py

Each cheap technique is applied to MiniLM as the advice would have it: the vocabulary trimmed, every other layer dropped, pruned to
half of the multiply-accumulates, exported to int8. All are then measured in turns on the test texts, one at a time: the steps in
torch against the original, the int8 export against the fp32 export of the same runtime, which is what its published figures are
about. Quality is not looked at, so the head is not trained. An error is measured / foretold - 1.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common import publish

import multum
from multum import recipe
from multum._measure import measure
from multum.core.parts import parts_of
from multum.core.step import make
from multum.data import open_task
from multum.runtimes.onnxruntime import GRAPH
from multum.targets import export_to, exporter

STEPS = ("trim_vocabulary", "drop_layers", "prune_structured")
TASK = "text-classification"
Figures = dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="example:minilm")
    parser.add_argument("--data", default="example:reviews-en")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--samples", type=int, help="texts that prune_structured looks at, if not as many as advised")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--print-only", action="store_true", help="keep no result")
    options = parser.parse_args()
    advice = multum.advise(options.model, task=TASK, data=options.data, goal="both")
    task = open_task(TASK, recipe.locate(options.data))
    original = task.load(recipe.locate(options.model))
    with tempfile.TemporaryDirectory() as scratch:
        folder, sizes = Path(scratch), {}
        original.save(folder / "original")
        for name in STEPS:
            made = make(name, fields(advice, name, options.samples))(original, task)
            made.save(folder / name)
            sizes[name] = float(sum(part.bytes for part in parts_of(made.module).values()))
        for precision in ("fp32", "int8"):
            export_to(exporter("onnxruntime", precision), folder / "original", folder / precision, precision, task, 0)
        sizes["int8"] = float((folder / "int8" / GRAPH).stat().st_size)
        names = ["original", *STEPS, "fp32", "int8"]
        metrics = dict(
            zip(names, measure([folder / n for n in names], task, rounds=options.rounds, threads=options.threads), strict=True)
        )
    found = {name: outcome(name, sizes[name], metrics) for name in (*STEPS, "int8")}
    foretold = {name: expected(advice, name) for name in found}
    head = [f"{what} {kind}" for what in ("MB", "M MACs", "speed-up") for kind in ("foretold", "measured", "error")]
    rows = [["technique", *head], *(row(name, foretold[name], found[name]) for name in found)]
    if options.print_only:
        print("\n".join(" | ".join(cells) for cells in rows))
        return
    values = {"foretold": foretold, "measured": found, "metrics": metrics, "advice": {key: advice[key] for key in ("use", "leave")}}
    summary = (
        "Steps in torch against the original; int8 against fp32 in onnxruntime, foretold as the middle of the published range. "
        "Multiply-accumulates are foretold on the validation texts and counted on the test texts: the export changes none, so that "
        "its error in them is that of the texts' lengths, and part of the others'. "
        f"Measured with {next(iter(metrics.values()))['speed']['threads']} thread(s)."
    )
    publish("advise", rows, values, summary=summary, command=shlex.join(["advise.py", *sys.argv[1:]]))


def fields(advice: Mapping[str, Any], name: str, samples: int | None) -> dict[str, Any]:
    """A step's fields as the advice has them."""
    if name == "drop_layers":
        return {"keep": max(1, advice["profile"]["layers"] // 2), "which": "alternate"}
    written = next((step[name] for step in advice["recipe"]["steps"] if isinstance(step, dict) and name in step), {})
    return written | ({"samples": samples} if samples and name == "prune_structured" else {})


def expected(advice: Mapping[str, Any], name: str) -> Figures:
    """Bytes, MACs and speed-up as the advice has them; what it does not speak of stays as it is."""
    entry = next(one for one in (*advice["use"], *advice["leave"]) if one["name"] == name)
    numbers = {one["what"]: one for one in reversed(entry["estimates"]) if "text" not in one}
    macs = numbers.get("macs", {"after": advice["profile"]["macs_per_example"]})["after"]
    faster = 1.0
    if "ms" in numbers:
        faster = numbers["ms"]["before"] / numbers["ms"]["after"]
    elif "speed" in numbers:
        low, high = numbers["speed"]["factor"]
        faster = (low * high) ** 0.5
    return {"bytes": numbers["bytes"]["after"], "macs": macs, "speedup": faster}


def outcome(name: str, size: float, metrics: Mapping[str, Any]) -> Figures:
    """The same as measured."""
    ratio = {each: metrics[each]["speed"]["ratio_to_first"]["value"] for each in (name, "fp32")}
    faster = ratio[name] / ratio["fp32"] if name == "int8" else ratio[name]
    return {"bytes": size, "macs": metrics[name]["size"]["macs_per_example"], "speedup": faster}


def row(name: str, foretold: Figures, found: Figures) -> list[str]:
    cells = [name]
    for what, unit, form in (("bytes", 1e6, ".2f"), ("macs", 1e6, ".1f"), ("speedup", 1, ".2f")):
        cells += [f"{one[what] / unit:{form}}" for one in (foretold, found)]
        cells.append(f"{100 * (found[what] / foretold[what] - 1):+.1f} %")
    return cells


if __name__ == "__main__":
    main()
