"""Perplexity of SmolLM2-135M on held-out newspaper text after its blocks are quantized in different ways.

    python benchmarks/quantize_smollm2.py

Round-to-nearest with 8 bits a row and with 4 bits in groups of 64; with 4 bits also HQQ, GPTQ and AWQ, the last two on 32 blocks of
256 tokens of other articles. All 4-bit ways have the same grid and the same bytes. Embeddings, which the head shares, stay in float
but for one row of the table. Ratios of perplexities are taken on the same windows; intervals come from a bootstrap over windows.

The weights that the package carries had 4 bits already (GGUF, Q4_1, groups of 32): the fp32 model is a dequantised one, and int4
here is a second quantisation on another grid.
"""

from __future__ import annotations

import csv
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import publish

from multum.core.likelihood import causal_log_probs
from multum.core.model import Model
from multum.core.parts import parts_of
from multum.core.step import make
from multum.example import fetch

BLOCKS, BLOCK, WINDOW = 32, 256, 256
HELD_OUT = 8192
"""Tokens that are scored."""
INT4: dict[str, Any] = {"bits": 4, "group": 64, "symmetric": False}
WAYS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "fp32": [],
    "int8, rounded": [("quantize", {"bits": 8})],
    "int8, rounded, embeddings too": [("quantize", {"bits": 8}), ("quantize_embeddings", {})],
    "int4, rounded": [("quantize", INT4)],
    "int4, HQQ": [("quantize", {**INT4, "hqq": True})],
    "int4, AWQ": [("awq", {**INT4, "samples": BLOCKS})],
    "int4, GPTQ": [("gptq", {**INT4, "samples": BLOCKS})],
}


class Texts:
    """Blocks of running text, as much of a task as these steps ask for."""

    def __init__(self, ids: list[int]) -> None:
        self.ids = torch.tensor(ids)

    def calibration(self, model: Model, samples: int, *, seed: int = 0) -> list[dict[str, torch.Tensor]]:
        whole = self.ids[: samples * BLOCK].view(-1, BLOCK)
        return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in whole.split(8)]


def tokens(model: Model, file: Path, most: int) -> list[int]:
    with file.open(encoding="utf-8", newline="") as lines:
        texts = [row["text"] for row in csv.DictReader(lines)]
    return list(model.tokenizer("\n\n".join(texts))["input_ids"][:most])


def main() -> None:
    text, model = fetch("plain-en"), Model.load(str(fetch("smollm2")), auto_class="AutoModelForCausalLM")
    model.module.config.use_cache = False
    task, held_out = Texts(tokens(model, text / "train.csv", BLOCKS * BLOCK)), tokens(model, text / "test.csv", HELD_OUT)
    windows = [held_out[start : start + WINDOW] for start in range(0, len(held_out) - WINDOW + 1, WINDOW)]
    losses: dict[str, np.ndarray] = {}
    values: dict[str, Any] = {}
    for name, steps in WAYS.items():
        made = model
        for step, fields in steps:
            made = make(step, fields)(made, task)  # type: ignore[arg-type]
        scored = causal_log_probs(made.module, windows, WINDOW, WINDOW, batch_size=8)
        losses[name] = np.array([-each.sum() for each in scored])
        count = sum(map(len, scored))
        history = [{key: one[key] for key in ("step", "fields", "weight_bytes", "seconds")} for one in made.history]
        values[name] = {
            "perplexity": math.exp(losses[name].sum() / count),
            "ratio_to_fp32": ratio(losses[name], losses["fp32"], count),
            "bytes": sum(part.bytes for part in parts_of(made.module).values()),
            "steps": history,
        }
        print(name, values[name]["perplexity"], file=sys.stderr, flush=True)
    rows = [["weights", "perplexity", "ratio to fp32", "95 %", "MB"]]
    for name, one in values.items():
        middle, low, high = one["ratio_to_fp32"]
        rows.append([name, f"{one['perplexity']:.2f}", f"{middle:.4f}", f"{low:.4f} to {high:.4f}", f"{one['bytes'] / 1e6:.1f}"])
    summary = (
        f"SmolLM2-135M-Instruct, {count} scored tokens of newspaper text in windows of {WINDOW}. Its fp32 weights had 4 bits "
        "before (Q4_1), so that int4 is a second quantisation. Torch unpacks packed weights for every forward pass: they make the "
        "model smaller, not faster."
    )
    publish("quantize_smollm2", rows, {"ways": values, "tokens": count, "windows": len(windows)}, summary=summary)


def ratio(losses: np.ndarray, first: np.ndarray, tokens: int) -> list[float]:
    """Perplexity over that of the first, and its 95 % interval."""
    draws = np.random.default_rng(0).integers(0, len(first), (2000, len(first)))
    difference = (losses - first) * len(first) / tokens
    drawn = np.exp(difference[draws].mean(1))
    return [float(np.exp(difference.mean())), *(float(value) for value in np.percentile(drawn, [2.5, 97.5]))]


if __name__ == "__main__":
    main()
