"""Is what `--runtime auto` picks ever slower than the best of the other ways to int8, each at its recommended settings?

    python benchmarks/runtime_auto.py [--small]

The packaged MiniLM and the shape of BERT-base with random weights, 32, 128 and 384 tokens, batches of 1, 8 and 32. First multum
chooses, as `multum export --to auto` does; then what it chose for every cell and all others (`runtime_peers.py`) run in processes
of their own, on all cores (multum on the threads it chose), and are timed in turns: whole passes over rows without padding. Figures
are medians; ratios are of the same round. CTranslate2 computes the encoder alone, without the head. One that is not installed is
named and not timed.

The share of the peak is that of 8-bit products of 2048 x 2048 matrices by oneDNN (`torch._int_mm`), measured between the rounds.
`--small` tries the script on a tiny model and keeps nothing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import publish
from runtime_peers import EAGER, PEERS

from multum._measure import macs_per_example, ratio
from multum._runtime_table import pick
from multum._runtime_table import rows as shown
from multum.choose_runtime import choose, open_way, ready
from multum.core.model import Model
from multum.core.profile import profile
from multum.data import open_task
from multum.example import fetch
from multum.targets import Way

LENGTHS, BATCHES, ROUNDS, FEW = (32, 128, 384), (1, 8, 32), 15, 3
"""FEW rounds are enough for what takes so much longer than the fastest that nothing more is to be learned."""
FAR_SLOWER = 2.0
THREADS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
SIDE = 2048
Cell = tuple[int, int]


class Process:
    """A form that answers in a process of its own, or the measure of the peak."""

    def __init__(self, *words: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--work", *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.ms: dict[Cell, list[float]] = {}
        self.dead = self.process.stdout is None or not self.process.stdout.readline()

    def time(self, ids: Sequence[int], batch: int, cell: Cell) -> None:
        """Note the milliseconds of a pass, behind one that is not timed."""
        if self.dead:
            return
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps({"ids": list(ids), "batch": batch}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if line:
            self.ms.setdefault(cell, []).append(float(line))
        self.dead = not line


def work(kind: str, path: str, threads: int, compiled: bool) -> None:
    """What a process does: orders on stdin, milliseconds on stdout."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    if kind == "peak":
        import torch

        torch.set_num_threads(threads)
        a, b = (torch.randint(-128, 128, (SIDE, SIDE), dtype=torch.int8) for _ in range(2))
        run: Any = lambda ids: torch._int_mm(a, b)  # noqa: E731
    elif kind == "multum":
        found = open_way(Way(Path(path), threads, compiled)).passes(threads)
        run = lambda ids: found(  # noqa: E731
            {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
        )
    else:
        run = PEERS[kind].load(Path(path), threads)
    answers.write("ready\n")
    answers.flush()
    for line in sys.stdin:
        order = json.loads(line)
        ids = np.tile(np.array(order["ids"], dtype=np.int64), (order["batch"], 1))
        run(ids)
        started = time.perf_counter()
        run(ids)
        answers.write(f"{1e3 * (time.perf_counter() - started)}\n")
        answers.flush()


def make(kind: str, folder: Path, rows: Path, out: Path) -> None:
    """A peer's form, in a process of its own."""
    PEERS[kind].make(folder, json.loads(rows.read_text()), out)


def models(task: Any, scratch: Path, small: bool) -> dict[str, Path]:
    """The models as folders, with heads that were not trained: speed does not depend on that."""
    from transformers import BertConfig, BertForSequenceClassification

    minilm = task.load(str(fetch("minilm")))
    labels = {"id2label": minilm.module.config.id2label, "label2id": minilm.module.config.label2id}
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64} if small else {}
    shape = BertForSequenceClassification(BertConfig(**sizes, **labels)).eval()
    found = {"BERT-base shape": Model(module=shape, tokenizer=minilm.tokenizer, source="a shape, random weights")}
    found = found if small else {"MiniLM": minilm} | found
    for name, model in found.items():
        model.save(scratch / name)
    return {name: scratch / name for name in found}


def compare(folder: Path, task: Any, cells: Sequence[Cell], scratch: Path, small: bool) -> dict[str, Any]:
    """Choose, make the others, time all."""
    limits: dict[str, Any] = {"rounds": 3, "seconds": 5.0} if small else {}
    lengths, batches = sorted({length for length, _ in cells}), sorted({batch for _, batch in cells})
    _, table = choose(folder, task, lengths=lengths, batches=batches, **limits)
    for row in shown(table):
        print(" | ".join(row), file=sys.stderr, flush=True)
    print(table["left_out"], file=sys.stderr, flush=True)
    chosen = {cell: pick(table, lengths=[cell[0]], batches=[cell[1]], threads=THREADS) for cell in cells}
    ways = {cell: ready(folder, choice, task) for cell, choice in chosen.items()}
    tokenizer = Model.load(folder, auto_class="AutoModelForSequenceClassification").tokenizer
    texts = list(task.inputs("train"))[: 4 if small else 300]
    (scratch / "rows.json").write_text(json.dumps([ids[:128] for ids in tokenizer(texts)["input_ids"]]))
    text = " ".join(texts * (1 + 2 * max(lengths) // len(texts)))
    ids = {length: tokenizer(text, truncation=True, max_length=length)["input_ids"] for length in lengths}
    forms, absent = peers(folder, scratch, small)
    own = {way: Process("multum", str(way.target), str(way.threads), str(int(way.compiled))) for way in set(ways.values())}
    forms |= {f"multum {way.target.name} {way.threads}": process for way, process in own.items()}
    peak = Process("peak", "-", str(THREADS), "0")
    for number in range(2 if small else ROUNDS):
        for cell in cells:
            mine = own[ways[cell]]
            peak.time([0], 1, cell)
            least = min((np.median(form.ms[cell]) for form in forms.values() if cell in form.ms), default=0.0)
            for form in [form for form in forms.values() if form is mine or form not in own.values()]:
                if number < FEW or np.median(form.ms.get(cell, [0.0])) <= FAR_SLOWER * least:
                    form.time(ids[cell[0]], cell[1], cell)
        print(f"{folder.name}: round {number + 1}", file=sys.stderr, flush=True)
    macs = profile(Model.load(folder, auto_class="AutoModelForSequenceClassification").module)["macs"]
    for process in (*forms.values(), peak):
        process.process.kill()
    absent |= {name: "its process died" for name, form in forms.items() if form.dead}
    return {
        "table": table,
        "absent": absent,
        "peak_gops": 2e-6 * SIDE**3 / float(np.median([ms for found in peak.ms.values() for ms in found])),
        "cells": [
            {
                "length": cell[0],
                "batch": cell[1],
                "chosen": f"{chosen[cell].form.name}, {chosen[cell].threads} threads",
                "gain": chosen[cell].gain,
                "gops": 2e-9 * cell[1] * (macs_per_example(macs, [cell[0]]) or 0),
                "auto_ms": own[ways[cell]].ms[cell],
                "peers_ms": {name: form.ms[cell] for name, form in forms.items() if name in PEERS and cell in form.ms},
            }
            for cell in cells
        ],
    }


def peers(folder: Path, scratch: Path, small: bool) -> tuple[dict[str, Process], dict[str, str]]:
    """The others, opened; and why some are not there."""
    forms: dict[str, Process] = {}
    absent: dict[str, str] = {}
    for name, peer in PEERS.items():
        out = scratch / name
        out.mkdir()
        if missing := peer.missing():
            absent[name] = f"not installed: pip install {' '.join(missing)}"
            continue
        script = [sys.executable, __file__, "--make", name, str(folder), str(scratch / "rows.json"), str(out)]
        made = subprocess.run(script, capture_output=True, text=True, check=False)
        if made.returncode:
            absent[name] = f"failed: {(made.stderr.strip().splitlines() or ['?'])[-1]}"
            continue
        forms[name] = Process(name, str(out), str(THREADS), "0")
    return forms, absent


def rows(name: str, found: dict[str, Any]) -> list[list[str]]:
    """A row for every cell of a model."""
    lines = []
    for cell in found["cells"]:
        auto, others = cell["auto_ms"], {peer: ms for peer, ms in cell["peers_ms"].items() if peer != EAGER}
        best = min(others, key=lambda peer: np.median(others[peer]))
        against = ratio(others[best], auto[: len(others[best])])  # fewer rounds, where it takes far longer
        share = cell["gops"] / np.median(auto) * 1e3 / found["peak_gops"]
        figures = [f"{np.median(cell['peers_ms'][peer]):.3g}" if peer in cell["peers_ms"] else "-" for peer in PEERS]
        low, high = against["ci95"]
        lines.append(
            [
                f"{name}, {cell['length']} x {cell['batch']}",
                cell["chosen"],
                f"{np.median(auto):.3g}",
                f"{100 * share:.0f} %",
                *figures,
                best,
                f"{against['value']:.2f} ({low:.2f} to {high:.2f})",
            ]
        )
    return lines


def main(small: bool) -> None:
    task = open_task("text-classification", str(fetch("reviews-en")))
    cells = [(8, 1), (16, 2)] if small else [(length, batch) for batch in BATCHES for length in LENGTHS]
    head = ["tokens x batch", "auto takes", "ms", "of the int8 peak", *PEERS, "best of the others", "its time / auto's"]
    found: dict[str, Any] = {}
    for name, folder in models(task, Path(tempfile.mkdtemp()), small).items():
        with tempfile.TemporaryDirectory() as scratch:
            found[name] = compare(folder, task, cells, Path(scratch), small)
    lines = [head, *(line for name, one in found.items() for line in rows(name, one))]
    absent = {f"{name}: {peer}": why for name, one in found.items() for peer, why in one["absent"].items()}
    slower = [line[0] for line in lines[1:] if float(line[-1].split(" to ")[1].rstrip(")")) < 1.0]
    peak = ", ".join(f"{one['peak_gops']:.0f}" for one in found.values())
    summary = f"Peak {peak} GOP/s. " + (f"Slower than the best beyond noise: {', '.join(slower)}." if slower else "Never slower.")
    summary += "".join(f" {name}: {why}." for name, why in absent.items())
    if small:
        print("\n".join(" | ".join(line) for line in lines), summary, sep="\n")
    else:
        publish("runtime_auto", lines, {"models": found, "threads": THREADS}, summary=summary)


if __name__ == "__main__":
    if "--work" in sys.argv:
        work(sys.argv[2], sys.argv[3], int(sys.argv[4]), sys.argv[5] == "1")
    elif "--make" in sys.argv:
        make(sys.argv[2], *map(Path, sys.argv[3:6]))
    else:
        main("--small" in sys.argv)
