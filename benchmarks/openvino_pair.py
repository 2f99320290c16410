"""Is multum's int8 for OpenVINO slower than what OpenVINO and NNCF make by themselves, where `runtime_auto.py` finds 3 %?

    python benchmarks/openvino_pair.py

There every form has a process of its own, and processes of the same form differ by some per cent. Here both graphs are run in one,
in turns: the two cells in which what auto took was slower, whole passes over rows without padding, on all cores. The peer is run
twice, as a measure of noise.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import publish
from runtime_auto import THREADS, models
from runtime_peers import PEERS

from multum._measure import ratio
from multum.core.model import Model
from multum.data import open_task
from multum.example import fetch
from multum.runtimes import find
from multum.targets import export_model

ROUNDS = 31
CELLS = {"MiniLM": (384, 32), "BERT-base shape": (384, 1)}
PEER, AGAIN, OURS = "OpenVINO + NNCF", "the same again", "multum"


def requests(folder: Path, task: Any, scratch: Path) -> dict[str, Any]:
    """Both graphs opened alike."""
    import openvino

    model = Model.load(folder, auto_class="AutoModelForSequenceClassification")
    rows = [ids[:128] for ids in model.tokenizer(list(task.inputs("train"))[:300])["input_ids"]]
    theirs, ours = scratch / "theirs", scratch / "ours"
    theirs.mkdir()
    PEERS[PEER].make(folder, rows, theirs)
    export_model(find("openvino"), model, ours, "int8", task, 0)
    options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": THREADS}
    files = {PEER: theirs, AGAIN: theirs, OURS: ours}
    graphs = {name: openvino.Core().read_model(next(place.glob("*.xml"))) for name, place in files.items()}
    return {name: openvino.Core().compile_model(graph, "CPU", options).create_infer_request() for name, graph in graphs.items()}


def timed(found: dict[str, Any], ids: np.ndarray) -> dict[str, list[float]]:
    """Milliseconds of a pass behind one that is not timed, per round."""
    ms: dict[str, list[float]] = {name: [] for name in found}
    inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    for _ in range(ROUNDS):
        for name, request in found.items():
            request.infer(inputs)
            started = time.perf_counter()
            request.infer(inputs)
            ms[name].append(1e3 * (time.perf_counter() - started))
    return ms


def main() -> None:
    task = open_task("text-classification", str(fetch("reviews-en")))
    lines = [["tokens x batch", f"{PEER}, ms", "multum, ms", "its time / multum's", "its time / its own"]]
    values: dict[str, Any] = {}
    text = " ".join(list(task.inputs("train"))[:300])
    with tempfile.TemporaryDirectory() as scratch:
        for name, folder in models(task, Path(scratch), small=False).items():
            length, batch = CELLS[name]
            (place := Path(scratch) / f"{name} graphs").mkdir()
            tokenizer = Model.load(folder, auto_class="AutoModelForSequenceClassification").tokenizer
            ids = tokenizer(text, truncation=True, max_length=length)["input_ids"]
            ms = timed(requests(folder, task, place), np.tile(np.array(ids), (batch, 1)))
            values[name] = ms
            found = [ratio(ms[PEER], ms[other]) for other in (OURS, AGAIN)]
            cells = [f"{one['value']:.3f} ({one['ci95'][0]:.3f} to {one['ci95'][1]:.3f})" for one in found]
            lines.append([f"{name}, {length} x {batch}", *(f"{np.median(ms[each]):.4g}" for each in (PEER, OURS)), *cells])
    publish("openvino_pair", lines, {"ms": values, "threads": THREADS})


if __name__ == "__main__":
    main()
