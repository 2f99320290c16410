"""The main job: walk down a ladder of speeds, keep every rung, ship the fastest that keeps the quality asked for.

One run gives the whole quality-versus-speed curve; the budget picks a point on it. Every rung starts from the one above,
is cut to be about 1.5 times faster by the measured latency table, repaired, taught by the original, exported and measured on
the validation split. The test split is read once, at the end, for the original and the chosen model.

What is on disk is the state: a folder that exists is whole, a candidate in `run.json` is measured. The same call again goes
on where the last one stopped and comes to the same result.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .ladder import FULL, QUICK, Budget, Ladder
from .progress import Progress


def shrink(
    model: str,
    *,
    task: str,
    data: str,
    output: Path,
    columns: Mapping[str, str] | None = None,
    max_drop: float = 1.0,
    max_latency_ms: float | None = None,
    max_size_bytes: int | None = None,
    min_speedup: float | None = None,
    time_limit_s: float | None = None,
    seed: int = 0,
    threads: int | None = None,
    quick: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Find the smallest, fastest form of a model that keeps the quality asked for.

    Args:
        model: folder or Hub id, a base encoder or one already fine-tuned.
        task: as Hugging Face pipelines name it.
        data: csv, jsonl or parquet file, folder of splits, or `hf:owner/name`.
        output: the run folder; the same call again resumes in it.
        columns: task column -> column of the data.
        max_drop: points of the task's metric that may be lost, on validation.
        max_latency_ms, max_size_bytes, min_speedup: further limits on the chosen model.
        time_limit_s: no new rung is begun that would end after this many seconds.
        seed: of splits, training and sampling.
        threads: for measuring; all cores by default.
        quick: train and measure less, as the quickstart does.
        trust_remote_code: run code that comes with the model.
        progress: shows how far it is; silent by default.

    Returns:
        The content of `run.json`.

    Raises:
        BudgetNotMet: no candidate keeps to all limits; the best is saved in `chosen/` and named.
        InputError: wrong model, data, output folder or limits.
    """
    arguments = {
        "model": model,
        "task": task,
        "data": data,
        "columns": dict(columns or {}),
        "seed": seed,
        "threads": threads,
        "quick": quick,
    }
    budget = Budget(max_drop=max_drop, max_latency_ms=max_latency_ms, max_size_bytes=max_size_bytes, min_speedup=min_speedup)
    ladder = Ladder(
        Path(output),
        arguments,
        budget=budget,
        effort=QUICK if quick else FULL,
        time_limit_s=time_limit_s,
        progress=progress or Progress.silent(),
        trust_remote_code=trust_remote_code,
    )
    ladder.original()
    ladder.vocabulary()
    ladder.rungs()
    return ladder.finish()
