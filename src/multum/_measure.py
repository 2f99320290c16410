"""Measuring what ships: folders in, `metrics.json` out. Weights are never touched.

Every target runs in a process of its own, so that memory is its own and no library disturbs another. All processes are alive
together and are timed in turns on the same texts, a few at a time: what disturbs the machine then falls on all of them, and the
ratio of two of them is taken round by round. Times are end to end, from text to logits; of what writes from text to text, of a
causal model so many tokens behind the beginning of a text (`_pace`).
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from ._pace import figures as pace_figures
from ._pace import whole_times
from .core.folders import read_json, write_json
from .errors import MultumError
from .targets import Way

WARM_UP = 5
"""Texts that a target answers untimed at the start of every turn, after it has waited for the others."""
CONTINUED = 3
"""Texts that a causal model continues in a turn, at most."""
BUSY = 0.6
"""Spread of the rounds' medians, against their median, that texts of different lengths do not explain."""
DISTURBED = "something else ran on this machine while it was measured: latencies and speed-ups are not to be trusted"
RESAMPLES = 2000
"""Of the rounds, for the interval of a ratio."""


def measure(
    targets: Sequence[Path | Way],
    task: Any,
    *,
    split: str = "test",
    threads: int | None = None,
    rounds: int = 30,
    texts_per_round: int = 50,
    batch_size: int = 32,
    progress: Callable[[float], None] | None = None,
) -> list[dict[str, Any]]:
    """Quality, size, speed and memory of every target, written into it and returned.

    Args:
        targets: model folders (run by torch) or export folders, or how such a one is to be run. Speed-ups are against the first.
        task: the task on its data.
        split: `test` is written to `metrics.json`, another one to `metrics-<split>.json`.
        threads: for every target; all cores by default.
        rounds: turns, each target timed in each.
        texts_per_round: texts answered one by one in a turn.
        batch_size: for throughput.
        progress: called with the share done, 0 to 1.

    Returns:
        One dictionary per target, in order, as `metrics.json` has it.

    Raises:
        MultumError: a target cannot be opened or its process died.
    """
    inputs, threads = list(task.inputs(split)), threads or _cores()
    turns = [_sample(inputs, texts_per_round, seed) for seed in range(rounds)]
    with ExitStack() as stack, tempfile.TemporaryDirectory() as scratch:
        workers = [stack.enter_context(Worker(target, threads)) for target in targets]
        for worker in workers:
            worker.facts = worker.receive()
            worker.columns = task.columns_for(worker.facts["labels"])
        for number, texts in enumerate(turns):
            for worker in workers:
                if worker.facts.get("continues"):  # who asks a causal model waits for what it writes
                    worker.ask("time", texts=texts[:1])
                    worker.paces.append(worker.ask("pace", texts=texts[:CONTINUED]))
                    worker.times.append(whole_times(worker.paces[-1]))
                else:
                    worker.ask("time", texts=texts[:WARM_UP])
                    worker.times.append(worker.ask("time", texts=texts))
                worker.tokenizing += worker.ask("tokenize", texts=texts)
            if progress:
                progress((number + 1) / (rounds + 1))
        for worker in workers:
            saved = Path(scratch) / "logits.npy"
            worker.throughput = len(inputs) / worker.ask("predict", texts=inputs, batch=batch_size, save=str(saved))
            if worker.facts["precision"] == "int8":
                # One scale serves a whole batch, so that answers depend on it: those counted are of texts alone, as they are timed.
                worker.ask("predict", texts=inputs, batch=1, save=str(saved))
            found = np.load(saved)
            worker.predictions = found if worker.columns is None else found[..., worker.columns]
            worker.lengths = worker.ask("count", texts=inputs)
            worker.memory = worker.ask("memory")
            if "generation" in worker.facts:
                worker.writing = _tokens_per_s(worker, inputs, turns)
        return [_write(worker, workers[0], task, split, rounds, batch_size) for worker in workers]


def unsteady(metrics: Mapping[str, Any]) -> bool:
    """Whether the machine was too busy for these times to be trusted."""
    return bool(metrics["speed"]["spread"] > BUSY)


class Worker:
    """A target's process."""

    def __init__(self, target: Path | Way, threads: int) -> None:
        way = target if isinstance(target, Way) else Way(Path(target), threads)
        self.target, self.threads = way.target, way.threads
        self._how = ["exact"] * (way is target) + ["compiled"] * way.compiled
        self.facts: dict[str, Any] = {}
        self.columns: list[int] | None = None
        self.times: list[list[float]] = []
        self.tokenizing: list[float] = []
        self.throughput = self.memory = 0.0
        self.predictions = np.empty(0)
        self.lengths: list[list[int]] = []
        self.writing: dict[str, Any] = {}
        self.paces: list[list[dict[str, float]]] = []

    def __enter__(self) -> Worker:
        environment = os.environ | {name: str(self.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "multum._measure_worker", str(self.target), str(self.threads), *self._how],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            encoding="utf-8",
            env=environment,
        )
        return self

    def __exit__(self, *_: Any) -> None:
        self._process.kill()
        self._process.communicate()
        self._log.close()

    def ask(self, do: str, **order: Any) -> Any:
        assert self._process.stdin  # noqa: S101 - opened as a pipe
        try:
            self._process.stdin.write(json.dumps({"do": do, **order}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it died; what it said is read below
        return self.receive()

    def receive(self) -> Any:
        assert self._process.stdout  # noqa: S101 - opened as a pipe
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            self._log.seek(0)
            said = (self._log.read().strip().splitlines() or ["it said nothing"])[-1]
            reason = "it was killed, perhaps for want of memory" if code < 0 else said
            raise MultumError(f"measuring {self.target} failed: {reason} (exit code {code})")
        reply = json.loads(line)
        if "error" in reply:
            raise MultumError(f"measuring {self.target} failed: {reply['error']}")
        return reply["result"]


def _write(worker: Worker, first: Worker, task: Any, split: str, rounds: int, batch_size: int) -> dict[str, Any]:
    """Put one target's figures together and into its folder."""
    from .core.model import machine, versions

    facts, lengths = worker.facts, np.array([sum(rows) for rows in worker.lengths])
    model = facts.get("model") or read_json(worker.target / "runtime.json")["model"]
    every = np.concatenate(worker.times)
    turns = [pair for pair in zip(worker.times, first.times, strict=True) if all(pair)]
    if not turns:
        raise MultumError(f"measuring {worker.target} failed: no text of the split has a token to begin with")
    medians, others = ([float(np.median(turn)) for turn in side] for side in zip(*turns, strict=True))
    metrics = {
        "schema": 1,
        "task": task.name,
        "split": split,
        "n": len(worker.predictions),
        "quality": task.score(worker.predictions, split).to_json(),
        "size": {
            "bytes_on_disk": facts["bytes"],
            "parameters": model["parameters"],
            "nonzero_parameters": model["nonzero_parameters"],
            "macs_per_example": macs_per_example(model["macs"], worker.lengths),
        },
        "speed": {
            "runtime": facts["runtime"],
            "precision": facts["precision"],
            "threads": facts["threads"],
            "batch_size": 1,
            "p50_ms": round(float(np.percentile(every, 50)), 4),
            "p90_ms": round(float(np.percentile(every, 90)), 4),
            "tokenize_p50_ms": round(float(np.median(worker.tokenizing)), 4),
            "examples_per_s": round(worker.throughput, 1),
            "throughput_batch_size": batch_size,
            **worker.writing,
            **pace_figures(worker.paces, first.paces, ratio),
            "rounds": rounds,
            "texts": "the split's own lengths",
            "lengths": {"p50": int(np.percentile(lengths, 50)), "p90": int(np.percentile(lengths, 90))},
            "spread": round(float(np.subtract(*np.percentile(medians, [90, 10])) / np.median(medians)), 3),
            "ratio_to_first": ratio(others, medians),
        },
        "truncated": int((lengths >= facts["max_length"]).sum()) if facts["cuts"] else 0,
        **({"generation": facts["generation"]} if "generation" in facts else {}),
        "memory": {"peak_rss_mb": round(worker.memory, 1)},
        "machine": machine(),
        "versions": versions(),
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    folder = worker.target / "predictions"
    try:
        folder.mkdir(exist_ok=True)
        part = folder / f".{split}.{os.getpid()}.part.npy"
        np.save(part, worker.predictions.astype(np.float32))
        part.replace(folder / f"{split}.npy")
    except OSError as error:
        raise MultumError(f"cannot write {folder}: {error.strerror}") from error
    write_json(worker.target / ("metrics.json" if split == "test" else f"metrics-{split}.json"), metrics)
    return metrics


def _tokens_per_s(worker: Worker, inputs: Sequence[Any], turns: Sequence[Sequence[Any]]) -> dict[str, Any]:
    """Tokens that a target which writes texts wrote a second, one text at a time and in batches, and how many a text took."""
    from .core.generation import tokens_of

    counts = tokens_of(worker.predictions)
    of = dict(zip(inputs, counts.tolist(), strict=True))
    seconds = sum(map(sum, worker.times)) / 1e3
    return {
        "tokens_per_s": round(sum(of[text] for texts in turns for text in texts) / seconds, 1),
        "tokens_per_s_batched": round(worker.throughput * float(counts.mean()), 1),
        "written_tokens": {"p50": int(np.percentile(counts, 50)), "p90": int(np.percentile(counts, 90))},
    }


def ratio(first: Sequence[float], this: Sequence[float]) -> dict[str, Any]:
    """How many times faster `this` is than `first`: the median over rounds of their ratio, with its bootstrap interval.

    Args:
        first, this: milliseconds, one figure per round.
    """
    ratios = np.asarray(first) / np.asarray(this)
    drawn = np.random.default_rng(0).integers(0, len(ratios), (RESAMPLES, len(ratios)))
    low, high = np.percentile(np.median(ratios[drawn], axis=1), [2.5, 97.5])
    return {"value": round(float(np.median(ratios)), 4), "ci95": [round(float(low), 4), round(float(high), 4)]}


def macs_per_example(macs: dict[str, int] | None, lengths: Sequence[Any] | np.ndarray) -> int | None:
    """The mean over texts of these lengths, each a number or those of the rows that a text is read in.

    None where the architecture is not known well enough to count, and for an encoder-decoder, which also writes.
    """
    if macs is None or "per_target_token" in macs:
        return None
    n = np.concatenate([np.atleast_1d(np.asarray(rows, dtype=float)) for rows in lengths])
    every = macs["per_token"] * n + macs["per_token_squared"] * n**2 + macs["per_example"]
    return round(float(every.sum() / len(lengths)))


def _sample(inputs: Sequence[Any], count: int, seed: int) -> list[Any]:
    return random.Random(seed).choices(inputs, k=count)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
