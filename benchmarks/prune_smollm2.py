"""Perplexity of SmolLM2-135M on held-out newspaper text after half of its blocks' weights became zero, and what that took.

    python benchmarks/prune_smollm2.py [--samples 32] [--length 256] [--held-out 8192] [--only wanda ...] [--python OTHER]

Random weights (the control), the smallest, Wanda and SparseGPT at 50 %, and the last three at 2:4; Wanda and SparseGPT are given
the same blocks of other articles. Every way runs in a process of its own, on all cores or `OMP_NUM_THREADS`: seconds are those of
the step on a model that is loaded, memory is the highest resident set meanwhile, and what of it came on top of the loaded model.
Wanda and SparseGPT also prune the first 10 of the 30 blocks alone: memory that is streamed does not grow with the number of blocks.
They work on the model that is loaded, as `multum apply` does, and not on a copy. Ratios of perplexities are taken on the same
windows; intervals come from a bootstrap over windows.

Then structure, at equal multiply-accumulates: a quarter of every block's neurons, the smallest by torch-pruning or random ones, and
`prune_structured`, which chooses where; and an eighth of the hidden width by `slice_hidden`, which saves about as many.

llm-compressor and torch-pruning run if the interpreter `--python` (this one, by default) can import them; llm-compressor 0.14 needs
another release of transformers than multum, so that it wants an environment of its own.

A run that was stopped goes on where it was. Settings other than the default ones are printed only, not kept in results/.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import publish
from peak import Peak
from quantize_smollm2 import ratio, tokens

from multum.core.families import blocks_of, family_of, stacks_of
from multum.core.folders import digest, read_json, write_json
from multum.core.likelihood import causal_log_probs
from multum.core.linears import matrix
from multum.core.model import Model
from multum.core.profile import profile
from multum.core.step import make
from multum.core.surgery import counts_of, keep_blocks, keep_neurons
from multum.example import fetch

HERE = Path(__file__).parent
OTHERS = {"llmcompressor": "llm-compressor", "torch_pruning": "torch-pruning"}
NEURONS = 0.25
"""Share of every block's neurons that goes where structure is cut."""
FEW = 10
"""Blocks of the smaller model."""
WAYS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "random": {"random": "weights"},
    "magnitude": {"step": "prune_weights"},
    "Wanda": {"step": "wanda", "calibrated": True},
    "SparseGPT": {"step": "sparsegpt", "calibrated": True},
    "llm-compressor, Wanda": {"other": "llmcompressor", "method": "wanda"},
    "llm-compressor, SparseGPT": {"other": "llmcompressor", "method": "sparsegpt"},
    "magnitude, 2:4": {"step": "prune_weights", "pattern": "2:4"},
    "Wanda, 2:4": {"step": "wanda", "pattern": "2:4", "calibrated": True},
    "SparseGPT, 2:4": {"step": "sparsegpt", "pattern": "2:4", "calibrated": True},
    f"Wanda, {FEW} blocks": {"step": "wanda", "calibrated": True, "blocks": FEW},
    f"SparseGPT, {FEW} blocks": {"step": "sparsegpt", "calibrated": True, "blocks": FEW},
    "random neurons": {"random": "neurons"},
    "torch-pruning, neurons": {"other": "torch_pruning", "method": "neurons"},
    "prune_structured": {"step": "prune_structured", "structured": True},
    "slice_hidden": {"step": "slice_hidden", "keep": 0.875, "calibrated": True},
}


class Texts:
    """Blocks of running text, as much of a task as these steps ask for."""

    def __init__(self, blocks: list[list[int]]) -> None:
        self.blocks = torch.tensor(blocks)

    def calibration(self, model: Model, samples: int, *, seed: int = 0) -> list[dict[str, torch.Tensor]]:
        return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in self.blocks[:samples].split(8)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=32, help="blocks of text for calibration")
    parser.add_argument("--structured-samples", type=int, default=8, help="of these, what prune_structured measures prices on")
    parser.add_argument("--length", type=int, default=256, help="tokens of a block")
    parser.add_argument("--held-out", type=int, default=8192, help="tokens that are scored, in windows of 256")
    parser.add_argument("--only", nargs="+", choices=list(WAYS), metavar="WAY", help=f"some of: {', '.join(WAYS)}")
    parser.add_argument("--python", default=sys.executable, help="the interpreter that has llmcompressor or torch_pruning")
    parser.add_argument("-o", "--output", type=Path, default=Path("runs/prune_smollm2"))
    options = parser.parse_args()
    settings = {key: vars(options)[key] for key in ("samples", "structured_samples", "length", "held_out")}
    standard = all(value == parser.get_default(key) for key, value in settings.items())
    folder = options.output / digest(json.dumps(settings, sort_keys=True))[:8]
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "settings.json", settings)
    windows = prepared(folder, settings)
    missing = {OTHERS[name]: why for name in OTHERS if (why := absent(options.python, name))}
    found: dict[str, Any] = {}
    for way, what in WAYS.items():
        place = folder / f"{''.join(c if c.isalnum() else '-' for c in way)}.json"
        if not place.exists() and way in (options.only or WAYS) and OTHERS.get(what.get("other", "")) not in missing:
            print(way, file=sys.stderr, flush=True)
            write_json(place, taken(way, folder, windows, options.python))
        if place.exists():
            found[way] = read_json(place)
    rows, values = table(found, sum(len(window) - 1 for window in windows))
    summary = words(
        settings, missing, [way for way in WAYS if way not in found and OTHERS.get(WAYS[way].get("other", "")) not in missing]
    )
    if standard and not options.only:
        publish("prune_smollm2", rows, {"ways": values, **settings, "missing": missing}, summary=summary)
    else:
        print("\n".join(" | ".join(row) for row in rows), summary, sep="\n\n")


def prepared(folder: Path, settings: dict[str, Any]) -> list[list[int]]:
    """Calibration blocks on disk, for every process to read; the windows that are scored."""
    text, model = fetch("plain-en"), Model.load(str(fetch("smollm2")), auto_class="AutoModelForCausalLM")
    samples, length = settings["samples"], settings["length"]
    ids = tokens(model, text / "train.csv", samples * length)
    if len(ids) < samples * length:
        raise SystemExit(f"the training texts have only {len(ids)} tokens; ask for fewer or shorter blocks")
    blocks = [ids[start : start + length] for start in range(0, len(ids), length)]
    write_json(folder / "calibration.json", {"blocks": blocks})
    held_out = tokens(model, text / "test.csv", settings["held_out"])
    return [held_out[start : start + 256] for start in range(0, len(held_out) - 255, 256)]


def absent(python: str, name: str) -> str | None:
    """Why an interpreter cannot import a package; None where it can."""
    done = subprocess.run([python, "-c", f"import {name}"], capture_output=True, text=True)
    return None if done.returncode == 0 else (done.stderr.strip().splitlines() or ["it said nothing"])[-1]


def taken(way: str, folder: Path, windows: list[list[int]], python: str) -> dict[str, Any]:
    """One way in a process of its own, and the perplexity of what it made."""
    work = folder / "work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    what = WAYS[way]
    if "other" in what:
        script = [python, str(HERE / "prune_elsewhere.py"), what["other"], what["method"], str(fetch("smollm2"))]
        script += [str(folder / "calibration.json"), str(work), str(NEURONS)]
    else:
        script = [sys.executable, __file__, "--work", way, str(folder), str(work)]
    subprocess.run(script, check=True, stdout=sys.stderr)
    made = Model.load(work / "model", auto_class="AutoModelForCausalLM")
    scored = causal_log_probs(made.module, windows, 256, 256, batch_size=8)
    inside = [part.weight for part in blocks_of(made.module).modules() if isinstance(part, torch.nn.Linear)]
    macs = profile(made.module)["macs"]
    result = {
        **read_json(work / "cost.json"),
        "threads": torch.get_num_threads(),
        "losses": [float(-each.sum()) for each in scored],
        "zeros": sum(int((weight == 0).sum()) for weight in inside) / sum(weight.numel() for weight in inside),
        "macs": 256 * macs["per_token"] + 256**2 * macs["per_token_squared"],
    }
    shutil.rmtree(work)
    return result


def work(way: str, folder: Path, place: Path) -> None:
    """Load, prune under a stop-watch, save."""
    what, settings = WAYS[way], read_json(folder / "settings.json")
    model = Model.load(str(fetch("smollm2")), auto_class="AutoModelForCausalLM")
    model.module.config.use_cache = False
    if "blocks" in what:
        keep_blocks(model.module, list(range(what["blocks"])))
    task: Any = Texts(read_json(folder / "calibration.json")["blocks"])
    fields: dict[str, Any] = {key: what[key] for key in ("pattern", "keep") if key in what}
    fields |= {"samples": settings["samples"]} if what.get("calibrated") else {}
    if what.get("structured"):
        fields = {"samples": settings["structured_samples"], "speedup": neurons_less(model, settings["length"])}
    for parameter in model.module.parameters():  # until then weights are pages of a file that nobody has read
        parameter.data = parameter.data.clone()
    with Peak() as peak:
        started = time.perf_counter()
        if "step" in what:
            made = make(what["step"], fields).take(model, task)
        else:
            made = randomly(model, what["random"]) if "random" in what else model
        seconds = time.perf_counter() - started
    made.save(place / "model")
    bytes_ = sum(parameter.nbytes for parameter in model.module.parameters())
    write_json(place / "cost.json", {"seconds": seconds, **peak.figures, "model_mb": bytes_ / 1e6})


def neurons_less(model: Model, length: int) -> float:
    """By how much multiply-accumulates fall when every block loses its share of neurons."""
    other = randomly(model, "neurons")
    whole, less = (profile(each.module)["macs"] for each in (model, other))
    whole, less = (length * macs["per_token"] + length**2 * macs["per_token_squared"] for macs in (whole, less))
    return whole / less


@torch.no_grad()
def randomly(model: Model, what: str) -> Model:
    """A copy with half of the blocks' weights zero, or without a share of the neurons, drawn at random."""
    made, generator = model.copy(), torch.Generator().manual_seed(0)
    if what == "weights":
        for part in blocks_of(made.module).modules():
            if isinstance(part, torch.nn.Linear):
                mask = torch.rand(part.weight.shape, generator=generator).flatten().argsort()[: part.weight.numel() // 2]
                matrix(part).view(-1)[mask] = 0.0
        return made
    for block, (_, neurons) in zip(blocks_of(made.module), counts_of(made.module, stacks_of(made.module)[0]), strict=True):
        drawn = torch.randperm(neurons, generator=generator)[: round((1 - NEURONS) * neurons)]
        keep_neurons(block, family_of(made.module), drawn.sort().values.tolist())
    return made


def table(found: dict[str, Any], count: int) -> tuple[list[list[str]], dict[str, Any]]:
    """The rows, and the figures behind them."""
    rows = [["way", "zeros", "MACs", "perplexity", "ratio", "95 %", "threads", "seconds", "peak MB", "on top of the model, MB"]]
    first, values = found.get("as it is"), {}
    for way, one in found.items():
        losses = np.array(one["losses"])
        values[way] = {**one, "perplexity": math.exp(losses.sum() / count)}
        cells = ["", ""]
        if first:
            middle, low, high = values[way]["ratio"] = ratio(losses, np.array(first["losses"]), count)
            cells = [f"{middle:.3f}", f"{low:.3f} to {high:.3f}"]
        cost = [str(one["threads"]), f"{one['seconds']:.1f}", f"{one['peak_mb']:.0f}", f"{one['peak_mb'] - one['before_mb']:.0f}"]
        smaller = "blocks" in WAYS[way]
        written = ["", "", ""] if smaller else [f"{values[way]['perplexity']:.2f}", *cells]
        macs = f"{one['macs'] / first['macs']:.3f}" if first else ""
        rows.append([way, f"{one['zeros']:.0%}", macs, *written, *([""] * len(cost) if way == "as it is" else cost)])
    return rows, values


def words(settings: dict[str, Any], missing: dict[str, str], left: list[str]) -> str:
    lines = [
        f"SmolLM2-135M-Instruct, {settings['held_out']} held-out tokens in windows of 256, calibrated on {settings['samples']} "
        f"blocks of {settings['length']} tokens. Zeros are a share of the blocks' weights; "
        "they make no dense kernel faster. "
        "Its fp32 weights had 4 bits before (Q4_1)."
    ]
    lines += [f"Without {name}, which this interpreter cannot import ({why})." for name, why in missing.items()]
    return " ".join([*lines, f"Not run: {', '.join(left)}." if left else ""]).strip()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]))
    else:
        main()
