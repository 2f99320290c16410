"""Accuracy kept without any training: `prune_structured`, Fisher masks, `drop_layers`, torch-pruning, random units, equally fast.

    python benchmarks/one_shot.py [--seeds 0 1 2] [-o runs/one_shot]

All cut the same fine-tuned MiniLM to about 1.5x and 2x, all but `drop_layers` under the same latency table. `prune_structured` sees
1,024 training texts without labels; `drop_layers` the same ones for `importance`, and none for `top` and `alternate` layers; Fisher
masks 2,048 training examples, their paper's number, with labels for the gradients and without for the tuning. The control
keeps the same share of every block's heads and neurons, drawn at random, and nothing is tuned or repaired. torch-pruning is asked
for these shares too, by its two usual measures: the magnitude of weights, and their product with the gradient of 1,024 labelled
texts. It says which heads and neurons are to go, and they are removed as all others are. Without it its rows are left out.

Each result is exported to onnxruntime int8 and measured on one thread, in turns with the whole model, on the test split.
The model is fine-tuned anew for every seed. Differences are text by text; their intervals are over texts, averaged over seeds. A
table adds up what was timed apart, which is some per cent more than it costs together, so that a little more is asked for than is
wanted (`ASKED`). Seconds are the processor's, on one thread, of the cut alone. A run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import difference, median_with_range, publish

from multum._measure import measure
from multum.bench import measured_table
from multum.core.families import blocks_of, family_of
from multum.core.folders import read_json, write_json
from multum.core.latency import LatencyTable
from multum.core.model import Model
from multum.core.padding import pad
from multum.core.step import make
from multum.core.surgery import head_size, heads_and_neurons
from multum.data import open_task
from multum.example import fetch
from multum.runtimes import find
from multum.steps.fisher_masks import cut
from multum.targets import export_model

ASKED = {1.5: 1.57, 2.0: 2.15}
"""Speed-up that is wanted -> the one that the table is asked for."""
SAMPLES = 1024
THREADS = 1
LAYERS = {1.5: 4, 2.0: 3}
OURS, RANDOM, ELSEWHERE = "prune_structured", "random", "torch-pruning"
FIGURES = ("speedup", "accuracy", "seconds")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("-o", "--output", type=Path, default=Path("runs/one_shot"))
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    found = {seed: of_seed(seed, options.output / str(seed)) for seed in options.seeds}
    report(found)


def of_seed(seed: int, folder: Path) -> dict[str, Any]:
    """What every way keeps of the model of one seed; ways that are not in the folder yet are taken, beside the whole model."""
    path = folder / "found.json"
    found: dict[str, Any] = dict(read_json(path)) if path.exists() else {}
    left = {name: way for wanted in ASKED for name, way in ways(wanted, folder / "latency.json", seed).items() if name not in found}
    if not left:
        return found
    folder.mkdir(parents=True, exist_ok=True)
    task = open_task("text-classification", str(fetch("reviews-en")), seed=seed)
    if not (folder / "whole").exists():
        make("finetune", {"epochs": 2, "learning_rate": 1e-4, "seed": seed})(task.load(str(fetch("minilm"))), task).save(
            folder / "whole"
        )
    model, exports = task.load(str(folder / "whole")), folder / "exports"
    shutil.rmtree(exports, ignore_errors=True)
    export_model(find("onnxruntime"), model, exports / "whole", "int8", task, 0)
    if not found:
        table = measured_table(model, task, precision="int8", threads=THREADS, rounds=12)
        (whole,) = measure([exports / "whole"], task, split="validation", threads=THREADS, rounds=5)
        table.behind(whole["speed"]["tokenize_p50_ms"]).save(folder / "latency.json")
    targets, seconds = {"whole": exports / "whole"}, {"whole": 0.0}
    for name, (step, fields) in left.items():
        started = time.process_time()
        made = cut_otherwise(step, model, task, **fields) if step in (RANDOM, ELSEWHERE) else make(step, fields)(model, task)
        seconds[name] = time.process_time() - started
        targets[name] = exports / f"{len(targets):02d}"
        export_model(find("onnxruntime"), made, targets[name], "int8", task, 0)
    figures = dict(zip(targets, measure(list(targets.values()), task, split="test", threads=THREADS), strict=True))
    truth = np.asarray(task.targets["test"])
    for name, one in figures.items():
        correct = [int(x) for x in np.load(targets[name] / "predictions" / "test.npy").argmax(1) == truth]
        speedup = one["speed"]["ratio_to_first"]["value"]
        row = {"speedup": speedup, "accuracy": one["quality"]["value"], "seconds": seconds[name], "correct": correct}
        found.setdefault(name, row)
    result = {name: found[name] for name in ("whole", *(name for wanted in ASKED for name in ways(wanted, path, seed)))}
    write_json(path, result)
    print(seed, {name: (round(one["speedup"], 2), one["accuracy"]) for name, one in result.items()}, flush=True)
    return result


def ways(wanted: float, table: Path, seed: int) -> dict[str, tuple[str, dict[str, Any]]]:
    """What is compared at a speed-up: step and fields."""
    shared = {"speedup": ASKED[wanted], "latency_table": str(table), "seed": seed}
    ours, layers = {**shared, "samples": SAMPLES}, {"keep": LAYERS[wanted]}
    found: dict[str, tuple[str, dict[str, Any]]] = {
        OURS: ("prune_structured", ours),
        f"{OURS}, no repair": ("prune_structured", {**ours, "repair": False}),
        "Fisher masks": ("fisher_masks", shared),
        "Fisher masks, no tuning": ("fisher_masks", {**shared, "tune": False}),
        "torch-pruning, magnitude": (ELSEWHERE, {**shared, "measure": "magnitude"}),
        "torch-pruning, Taylor": (ELSEWHERE, {**shared, "measure": "Taylor"}),
        "random heads and neurons": (RANDOM, shared),
        "drop_layers importance": ("drop_layers", {**layers, "which": "importance", "samples": SAMPLES, "seed": seed}),
        "drop_layers top": ("drop_layers", {**layers, "which": "top"}),
        "drop_layers alternate": ("drop_layers", {**layers, "which": "alternate"}),
    }
    here = bool(find_spec("torch_pruning"))
    return {f"{name} {wanted:g}x": way for name, way in found.items() if here or way[0] != ELSEWHERE}


def cut_otherwise(step: str, model: Model, task: Any, *, speedup: float, latency_table: str, seed: int, measure: str = "") -> Model:
    """The same share of every block's heads and neurons, as large as fits; which is drawn, or told by torch-pruning."""
    table, counts = LatencyTable.load(Path(latency_table)), heads_and_neurons(model.module)
    room = table.room(counts, speedup, step)
    shares = (
        [(max(1, int(share * heads)), max(1, int(share * neurons))) for heads, neurons in counts]
        for share in np.linspace(1, 0, 1001)
    )
    sizes = next(each for each in shares if table.parts(each) <= room)
    return cut(model, drawn(counts, sizes, seed) if step == RANDOM else told(model, task, counts, sizes, measure, seed))[0]


Counts = Sequence[tuple[int, int]]


def drawn(counts: Counts, sizes: Counts, seed: int) -> list[list[list[int]]]:
    """Per block the heads and the neurons that stay, at random."""
    rng = np.random.default_rng(seed)
    pairs = [list(zip(block, left, strict=True)) for block, left in zip(counts, sizes, strict=True)]
    return [[sorted(rng.choice(have, keep, replace=False).tolist()) for have, keep in block] for block in pairs]


def told(model: Model, task: Any, counts: Counts, sizes: Counts, measure: str, seed: int) -> list[list[list[int]]]:
    """Those that torch-pruning keeps, all of its choices made before any is carried out."""
    import torch_pruning as tp

    module, size = model.copy().module.eval(), head_size(model.module)
    module.set_attn_implementation("eager")  # it cannot follow channels through a fused attention
    family, blocks = family_of(module), blocks_of(module)
    rows = task.encode(model, "train")
    chosen = np.random.default_rng(seed).choice(len(rows), SAMPLES, replace=False).tolist()
    batches = [pad([rows[i] for i in chosen[start : start + 32]], model.tokenizer.pad_token_id) for start in range(0, SAMPLES, 32)]
    if measure == "Taylor":
        for batch in batches:
            task.loss(module(**{name: value for name, value in batch.items() if name != "labels"}), batch).backward()
    of = {path: [block.get_submodule(getattr(family, path)) for block in blocks] for path in ("query", "key", "value", "up")}
    attentions = [part for path in ("query", "key", "value") for part in of[path]]
    (have, width), (heads, neurons) = counts[0], sizes[0]
    gone_heads, gone_neurons = 1 - (heads + 0.5) / have, 1 - (neurons + 0.5) / width  # it rounds towards fewer of both
    pruner = tp.pruner.BasePruner(
        module,
        {name: value for name, value in batches[0].items() if name != "labels"},
        importance=(tp.importance.GroupTaylorImportance if measure == "Taylor" else tp.importance.GroupMagnitudeImportance)(),
        pruning_ratio=0.0,
        pruning_ratio_dict=dict.fromkeys(of["up"], gone_neurons) | dict.fromkeys(attentions, gone_heads),
        num_heads=dict.fromkeys(attentions, have),
        prune_num_heads=True,
        prune_head_dims=False,
        head_pruning_ratio=gone_heads,
        ignored_layers=[module.get_submodule(family.head_output)],
        output_transform=lambda output: output.logits,
    )
    places = [[block.get_submodule(path) for path in (family.attention_output, family.down)] for block in blocks]
    gone: dict[Any, set[int]] = {part: set() for pair in places for part in pair}
    for group in pruner.step(interactive=True):
        for dependency, numbers in group:
            if dependency.target.module in gone and pruner.DG.is_in_channel_pruning_fn(dependency.handler):
                gone[dependency.target.module] |= set(numbers)
    kept = [
        [[i for i in range(have) if i * wide not in gone[part]] for part, have, wide in zip(pair, block, (size, 1), strict=True)]
        for pair, block in zip(places, counts, strict=True)
    ]
    assert [tuple(map(len, block)) for block in kept] == [tuple(block) for block in sizes], "torch-pruning kept another number"
    return kept


def report(found: dict[int, dict[str, Any]]) -> None:
    runs = list(found.values())
    rows, values = [["model", "speed-up measured", "test accuracy, %", "prune_structured's more (95 %)", "seconds"]], {}
    for name in runs[0]:
        speedup, accuracy, seconds = (
            median_with_range([run[name][key] for run in runs]) for key in ("speedup", "accuracy", "seconds")
        )
        ours = f"{OURS} {name.rpartition(' ')[2]}"
        apart = None
        if name not in ("whole", ours):
            apart = difference([run[ours]["correct"] for run in runs], [run[name]["correct"] for run in runs])
        values[name] = {"speedup": speedup, "accuracy": accuracy, "seconds": seconds, "difference": apart}
        rows.append(
            [
                name,
                f"{speedup['median']:.2f}x ({speedup['low']:.2f} to {speedup['high']:.2f})",
                f"{100 * accuracy['median']:.1f} ({100 * accuracy['low']:.1f} to {100 * accuracy['high']:.1f})",
                f"{apart['value']:+.2f} ({apart['ci95'][0]:+.2f} to {apart['ci95'][1]:+.2f})" if apart else "",
                f"{seconds['median']:.0f}",
            ]
        )
    seeds = " ".join(map(str, found))
    summary = "Medians over seeds (range); points of accuracy that `prune_structured` keeps more, the mean over seeds."
    publish("one_shot", rows, {"seeds": list(found), "models": values}, summary=summary, command=f"one_shot.py --seeds {seeds}")


if __name__ == "__main__":
    main()
