"""Measuring what ships: folders in, `metrics.json` out. Weights are never touched.

Every target runs in a process of its own, so that memory is its own and no library disturbs another. All processes are alive
together and are timed in turns on the same texts, a few at a time: what disturbs the machine then falls on all of them, and the
ratio of two of them is taken round by round. Times are end to end, from text to logits; of what writes from text to text, of a
causal model so many tokens behind the beginning of a text (`_pace`).
"""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from ._measure_process import Worker
from ._pace import figures as pace_figures
from ._pace import whole_times
from .core.folders import read_json, write_json
from .core.reading import answers_for, reader_of
from .errors import InputError, MultumError
from .runtimes._predictor import cores
from .targets import Way

TEXTS = 50
"""Texts that a target answers in a turn."""
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
    texts_per_round: int = TEXTS,
    batch_size: int = 32,
    progress: Callable[[float], None] | None = None,
) -> list[dict[str, Any]]:
    """Quality, size, speed and memory of every target, written into it and returned.

    Args:
        targets: model folders (run by torch) or export folders, or how such a one is to be run. Speed-ups are against the first.
        task: the task on its data.
        split: `test` is written to `metrics.json`, another one to `metrics-<split>.json`.
        threads: for every target; by default all cores, or `OMP_NUM_THREADS`.
        rounds: turns, each target timed in each.
        texts_per_round: texts answered one by one in a turn.
        batch_size: for throughput.
        progress: called with the share done, 0 to 1.

    Returns:
        One dictionary per target, in order, as `metrics.json` has it.

    Raises:
        InputError: lists targets that are models for another task.
        MultumError: a target cannot be opened or its process died.
    """
    _check_tasks(targets, task.name)
    inputs = list(task.inputs(split))
    with ExitStack() as stack, tempfile.TemporaryDirectory() as scratch:
        workers, turns = _started(stack, targets, task, threads), _turns(inputs, texts_per_round, rounds)
        _time(workers, turns, progress)
        for worker in workers:
            saved = Path(scratch) / "logits.npy"
            worker.throughput = len(inputs) / worker.ask("predict", texts=inputs, batch=batch_size, save=str(saved))
            if worker.facts["precision"] == "int8" and not (worker.facts.get("continues") or "generation" in worker.facts):
                # One scale serves a whole batch, so that answers depend on it: those counted are of texts alone, as they are timed.
                # Models that write have no such scale.
                worker.ask("predict", texts=inputs, batch=1, save=str(saved))
            found = np.load(saved)
            if worker.facts["hides"]:  # a token at a time, which nobody waits for who asks for a prediction
                worker.ask("alone", texts=inputs, save=str(saved))
                found = np.concatenate([found, np.load(saved)], axis=-1)
            worker.predictions = found if worker.columns is None else found[..., worker.columns]
            worker.lengths = worker.ask("count", texts=inputs)
            worker.memory = worker.ask("memory")
            if "generation" in worker.facts:
                worker.writing = _tokens_per_s(worker, inputs, turns)
        return [_write(worker, workers[0], task, split, batch_size) for worker in workers]


def time_again(
    targets: Sequence[Path],
    task: Any,
    *,
    split: str,
    threads: int | None = None,
    rounds: int = 30,
    texts_per_round: int = TEXTS,
    progress: Callable[[float], None] | None = None,
) -> list[dict[str, Any]]:
    """Targets that were measured minutes apart, timed once more in turns, so that their times compare.

    Args:
        targets, task, split, threads, rounds, texts_per_round, progress: as of `measure`.

    Returns:
        What takes the place of the same figures in the `speed` of each target's metrics.

    Raises:
        MultumError: a target cannot be opened or its process died.
    """
    with ExitStack() as stack:
        workers = _started(stack, targets, task, threads)
        _time(workers, _turns(list(task.inputs(split)), texts_per_round, rounds), progress)
        return [_times(worker, workers[0]) for worker in workers]


def _started(stack: ExitStack, targets: Sequence[Path | Way], task: Any, threads: int | None) -> list[Worker]:
    """A process for each target, ready to answer."""
    workers = [stack.enter_context(Worker(target, threads or cores())) for target in targets]
    for worker in workers:
        worker.facts = worker.receive()
        worker.columns = task.columns_for(worker.facts["labels"])
    return workers


def _check_tasks(targets: Sequence[Path | Way], name: str) -> None:
    """What a model for another task answers would be counted as answers to this one."""
    folders = [target.target if isinstance(target, Way) else Path(target) for target in targets]
    theirs = {folder: reader_of(folder).task for folder in folders if folder.is_dir()}
    problems = [
        f"{folder} is a model for {other}, and it is measured on {name}; give --task and --data of its own"
        for folder, other in theirs.items()
        if not answers_for(other, name)
    ]
    if problems:
        raise InputError(*problems)


def _turns(inputs: Sequence[Any], texts_per_round: int, rounds: int) -> list[list[Any]]:
    """The texts of every round."""
    return [sample(inputs, texts_per_round, seed) for seed in range(rounds)]


def _time(workers: Sequence[Worker], turns: Sequence[Sequence[Any]], progress: Callable[[float], None] | None) -> None:
    """Let each answer the texts of each round, one text at a time."""
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
            progress((number + 1) / (len(turns) + 1))


def unsteady(speed: Mapping[str, Any]) -> bool:
    """Whether the machine was too busy for these times to be trusted."""
    return bool(speed["spread"] > BUSY)


def _write(worker: Worker, first: Worker, task: Any, split: str, batch_size: int) -> dict[str, Any]:
    """Put one target's figures together and into its folder."""
    from .core.model import machine, versions

    facts, lengths = worker.facts, np.array([sum(rows) for rows in worker.lengths])
    model = facts.get("model") or read_json(worker.target / "runtime.json")["model"]
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
            **_times(worker, first),
            "examples_per_s": round(worker.throughput, 1),
            "throughput_batch_size": batch_size,
            **worker.writing,
            "texts": "the split's own lengths",
            "lengths": {"p50": int(np.percentile(lengths, 50)), "p90": int(np.percentile(lengths, 90))},
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


def _times(worker: Worker, first: Worker) -> dict[str, Any]:
    """What the rounds say of one target, and of it beside the first."""
    every = np.concatenate(worker.times)
    turns = [pair for pair in zip(worker.times, first.times, strict=True) if all(pair)]
    if not turns:
        raise MultumError(f"measuring {worker.target} failed: no text of the split has a token to begin with")
    medians, others = ([float(np.median(turn)) for turn in side] for side in zip(*turns, strict=True))
    return {
        "p50_ms": round(float(np.percentile(every, 50)), 4),
        "p90_ms": round(float(np.percentile(every, 90)), 4),
        "tokenize_p50_ms": round(float(np.median(worker.tokenizing)), 4),
        **pace_figures(worker.paces, first.paces, ratio),
        "rounds": len(worker.times),
        "spread": round(float(np.subtract(*np.percentile(medians, [90, 10])) / np.median(medians)), 3),
        "ratio_to_first": ratio(others, medians),
    }


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


def sample(inputs: Sequence[Any], count: int, seed: int) -> list[Any]:
    """So many inputs, drawn with replacement, the same ones for a seed."""
    return random.Random(seed).choices(inputs, k=count)
