"""What a GPU changes: the same steps on a processor and on a GPU, and a model too large for a small machine.

    python benchmarks/gpu.py [gpu] [cpu] [larger] [--samples 32] [--steps 30] [--cpu-steps 3]

SmolLM2-135M on newspaper text: Wanda, SparseGPT, GPTQ and AWQ on the same blocks of 256 tokens, with the perplexity of what each
made, which may differ in rounding alone; then training it, in fp32 and under bf16 autocast, with the estimate that `multum` gives
beforehand beside the memory that it took. The CPU takes fewer steps of training: only the pace is told. `larger` is the shape of
SmolLM2-1.7B, untrained, on the GPU alone: what it costs in time and memory does not depend on what the weights are.

Each part works in a process of its own, and is kept with the device it ran on: the table has every part that was ever run. Before
anything is timed Wanda prunes once on few texts, and a step of each training is taken, so that libraries are loaded.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, publish
from quantize_smollm2 import INT4, Texts, tokens
from torch import nn
from transformers import AutoModelForCausalLM

from multum.core import estimate
from multum.core.folders import read_json, write_json
from multum.core.likelihood import causal_log_probs
from multum.core.model import Model, machine
from multum.core.reporting import listening
from multum.core.step import make
from multum.core.training import fit, on_accelerator
from multum.example import fetch

WINDOW, LENGTH, BATCH = 256, 512, 8
"""Tokens of a scored window, of a training text; texts of a training batch."""
HELD_OUT = 8192
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "Wanda, 2:4": ("wanda", {"pattern": "2:4"}),
    "SparseGPT, 2:4": ("sparsegpt", {"pattern": "2:4"}),
    "GPTQ, int4": ("gptq", INT4),
    "AWQ, int4": ("awq", INT4),
}
PARTS = ("gpu", "cpu", "larger")
SUMMARY = (
    f"One-shot ways on blocks of {WINDOW} tokens, which Wanda and SparseGPT read in bf16 where the device has it. Training: "
    f"batches of {BATCH} texts of {LENGTH} tokens. The 1.7B model has that shape and untrained weights."
)
LARGER = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 24,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
}
"""SmolLM2-1.7B beside SmolLM2-135M."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"some of: {', '.join(PARTS)}")
    parser.add_argument("--samples", type=int, default=32, help="blocks of text for calibration")
    parser.add_argument("--steps", type=int, default=30, help="of training that are timed on the GPU")
    parser.add_argument("--cpu-steps", type=int, default=3, help="and on the CPU")
    parser.add_argument("--work", type=Path, metavar="FILE", help=argparse.SUPPRESS)
    parser.add_argument("-o", "--output", type=Path, default=Path("runs/gpu"))
    options = parser.parse_args()
    options.parts = options.parts or list(PARTS)
    if wrong := [part for part in options.parts if part not in PARTS]:
        parser.error(f"no part is named {', '.join(wrong)}")
    if options.work:
        work(options.parts[0], options.work, options)
        return
    if set(options.parts) - {"cpu"} and not torch.cuda.is_available():
        raise SystemExit("there is no GPU that torch can use; `multum doctor` says what it finds, `gpu.py cpu` needs none")
    kept = RESULTS / "gpu.json"
    found = {part: one for part, one in (read_json(kept) if kept.exists() else {}).items() if part in PARTS}
    options.output.mkdir(parents=True, exist_ok=True)
    for part in options.parts:
        file = options.output / f"{part}.json"
        file.unlink(missing_ok=True)
        hidden = {"CUDA_VISIBLE_DEVICES": ""} if part == "cpu" else {}
        given = ["--samples", options.samples, "--steps", options.steps, "--cpu-steps", options.cpu_steps]
        command = [sys.executable, __file__, part, "--work", file, *given]
        try:
            subprocess.run([str(each) for each in command], check=True, env=os.environ | hidden)
        finally:  # what was done by then is in the file
            if file.exists():
                found[part] = read_json(file)
                publish("gpu", table(found), found, summary=SUMMARY)


def table(found: dict[str, Any]) -> list[list[str]]:
    rows = [["SmolLM2", "on", "work", "seconds", "tokens/s", "perplexity", "GPU memory, GB", "said before"]]
    for part, one in found.items():
        where = ["1.7B" if part == "larger" else "135M", one["device"]]
        gigabytes = [f"{each['gpu_bytes'] / 1e9:.2f}" if part != "cpu" else "" for each in one["ways"].values()]
        if "perplexity" in one:
            rows.append([*where, "as it is", "", "", f"{one['perplexity']:.3f}", "", ""])
        for (name, each), memory in zip(one["ways"].items(), gigabytes, strict=True):
            rows.append(
                [
                    *where,
                    name,
                    f"{each['seconds']:.1f}",
                    "",
                    f"{each['perplexity']:.2f}" if "perplexity" in each else "",
                    memory,
                    "",
                ]
            )
        for precision, each in one["training"].items():
            memory = f"{each['gpu_bytes'] / 1e9:.2f}" if part != "cpu" else ""
            pace, said = f"{each['tokens_per_second']:,.0f}", f"{each['said_bytes'] / 1e9:.2f}"
            rows.append([*where, f"training, {precision}", "", pace, "", memory, said])
    return rows


def work(what: str, file: Path, options: argparse.Namespace) -> None:
    """Everything on one device; what is done by then is in the file."""
    text, small = fetch("plain-en"), Model.load(str(fetch("smollm2")), auto_class="AutoModelForCausalLM")
    small.module.config.use_cache = False
    count = max(options.samples * WINDOW, 24 * LENGTH)
    task, held_out = Texts(tokens(small, text / "train.csv", count)), tokens(small, text / "test.csv", HELD_OUT)
    windows = [held_out[start : start + WINDOW] for start in range(0, len(held_out) - WINDOW + 1, WINDOW)]
    model = larger(small) if what == "larger" else small
    steps = options.cpu_steps if what == "cpu" else options.steps
    threads = torch.get_num_threads()
    device = f"{threads} threads of {machine()['processor']}" if what == "cpu" else torch.cuda.get_device_name()
    found: dict[str, Any] = {
        "device": device,
        "threads": threads,
        "samples": options.samples,
        "steps": steps,
        "ways": {},
        "training": {},
    }
    one_shot("wanda", {"samples": 8}, model, task)
    if what != "larger":
        found["perplexity"] = perplexity(model, windows)
    for name, (step, fields) in WAYS.items():
        made, cost = one_shot(step, {**fields, "samples": options.samples}, model, task)
        found["ways"][name] = cost if what == "larger" else {**cost, "perplexity": perplexity(made, windows)}
        write_json(file, found)
    rows = [{"input_ids": part.tolist(), "attention_mask": [1] * LENGTH} for part in task.ids[: 24 * LENGTH].split(LENGTH)]
    for precision in ("fp32", "bf16"):
        found["training"][precision] = trained(model, rows, precision, steps)
        write_json(file, found)


def larger(small: Model) -> Model:
    """The larger shape with weights as training begins with, which torch draws on the GPU in no time."""
    config = type(small.module.config)(**{**small.module.config.to_dict(), **LARGER})
    torch.manual_seed(0)
    with torch.device("cuda"):
        module = AutoModelForCausalLM.from_config(config)
    return replace(small, module=module.eval().cpu())


def one_shot(step: str, fields: dict[str, Any], model: Model, task: Any) -> tuple[Model, dict[str, float]]:
    copy = model.copy()
    return _timed(lambda: make(step, fields).take(copy, task))


def _timed(job: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    made = job()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    return made, {"seconds": seconds, "gpu_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0}


def perplexity(model: Model, windows: list[list[int]]) -> float:
    with on_accelerator(model.module):
        scored = causal_log_probs(model.module, windows, WINDOW, WINDOW, batch_size=8)
    return math.exp(-sum(float(each.sum()) for each in scored) / sum(map(len, scored)))


def trained(model: Model, rows: list[dict[str, Any]], precision: Any, steps: int) -> dict[str, float]:
    """Pace and memory of training a copy, after a step of it that is not timed."""
    estimate.WORTH = 0
    said: list[estimate.Estimate] = []
    line = estimate.Estimate.line
    estimate.Estimate.line = lambda self: said.append(self) or line(self)  # type: ignore[method-assign]
    copy = model.copy()
    given = {"learning_rate": 1e-5, "batch_size": BATCH, "precision": precision}
    with listening(lambda share: None, lambda text: None):
        fit(copy, rows, loss, epochs=1, steps=1, **given)
    result, cost = _timed(lambda: fit(copy, rows, loss, epochs=steps, steps=steps, **given))
    return {
        "tokens_per_second": steps * BATCH * LENGTH / result["seconds"],
        "said_bytes": said[0].bytes,
        "gpu_bytes": cost["gpu_bytes"],
        "loss": result["loss"],
    }


def loss(module: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return module(**batch, labels=batch["input_ids"]).loss


if __name__ == "__main__":
    main()
