"""The main job: walk down a ladder of speeds, keep every rung, ship the fastest that keeps the quality asked for.

One run gives the whole quality-versus-speed curve; the budget picks a point on it. Every rung starts from the one above,
is cut to be about 1.5 times faster by the measured latency table, repaired, taught by the original, exported and measured on
the validation split. Models that write text are cut and taught in ways of their own (`descent`). The test split is read once, at
the end, for the original and the chosen model.

What is on disk is the state: a folder that exists is whole, a candidate in `run.json` is measured. The same call again goes
on where the last one stopped and comes to the same result.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ._cost import write_cost
from ._report import report
from ._report_words import amount
from .budget import FULL, QUICK, Budget
from .core.folders import write_json
from .core.processes import alone
from .data import open_task
from .descent import effort_of, kind_of
from .errors import BudgetNotMet
from .ladder import Ladder
from .progress import Progress
from .run_folder import RunFolder, check_folder
from .tasks import PER_CENT

ON_TEST = "on the test split, which the search never saw"


def shrink(
    model: str,
    *,
    task: str,
    data: str,
    output: Path,
    columns: Mapping[str, str] | None = None,
    unlabelled: str | None = None,
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
        model: folder or Hub id: a base encoder or one already fine-tuned, a causal language model, an encoder-decoder.
        task: as Hugging Face pipelines name it.
        data: csv, jsonl or parquet file, folder of splits, or `hf:owner/name`.
        output: the run folder; the same call again resumes in it.
        columns: task column -> column of the data.
        unlabelled: file of further texts, for the original to label when it teaches: as the data, or .txt with one text a line.
        max_drop: points of the task's metric that may be lost, on validation; of perplexity per cent that it may grow.
        max_latency_ms, max_size_bytes, min_speedup: further limits on the chosen model.
        time_limit_s: no new rung is begun that would end after this many seconds.
        seed: of splits, training and sampling.
        threads: for measuring; by default all cores, or `OMP_NUM_THREADS`.
        quick: train and measure less, as the quickstart does.
        trust_remote_code: run code that comes with the model.
        progress: shows how far it is; silent by default.

    Returns:
        The content of `run.json`.

    Raises:
        BudgetNotMet: no candidate keeps to all limits; the best is saved in `chosen/` and named.
        InputError: wrong model, data, output folder or limits.
    """
    alone("shrink")
    arguments = {
        "model": model,
        "task": task,
        "data": data,
        "columns": dict(columns or {}),
        "unlabelled": unlabelled or None,
        "seed": seed,
        "threads": threads,
        "quick": quick,
    }
    output, progress = Path(output), progress or Progress.silent()
    budget = Budget(max_drop=max_drop, max_latency_ms=max_latency_ms, max_size_bytes=max_size_bytes, min_speedup=min_speedup)
    check_folder(output, arguments)
    opened = open_task(task, data, columns=columns, unlabelled=unlabelled, seed=seed)
    kind = kind_of(opened)
    run = RunFolder(output, arguments, task=opened, budget=budget, time_limit_s=time_limit_s, say=progress.say)
    effort = effort_of(kind, QUICK if quick else FULL, quick=quick)
    ladder = Ladder(run, opened, effort, progress, kind=kind, trust_remote_code=trust_remote_code)
    try:
        ladder.original()
        ladder.vocabulary()
        ladder.rungs()
        ladder.packed()
        best = ladder.ship()
        ladder.test(best)
        _say_test(run, opened, best)
        write_cost(run, opened, best)
    finally:
        run.keep_time()
    return _conclude(run, best)


def _say_test(run: RunFolder, task: Any, best: Mapping[str, Any]) -> None:
    """Warn where what ships keeps to the drop on validation and not on the test split; what an earlier choice said of it goes."""
    run.values["warnings"] = [text for text in run.values.get("warnings", []) if ON_TEST not in text]
    drop, allowed = task.drop_of(run.candidates[0]["test"], best["test"]), run.budget.max_drop
    if drop > allowed >= best["drop"]:
        lost, here = (amount(value, per_cent=task.name in PER_CENT) for value in (drop, best["drop"]))
        run.warn(f"{best['name']} lost {lost} {ON_TEST}, more than the {allowed:g} allowed; on validation it lost {here}")


def _conclude(run: RunFolder, best: Mapping[str, Any]) -> dict[str, Any]:
    """Write down what was chosen and why, and the report."""
    why = "; ".join(best["broken"]) or "the fastest that keeps to every limit on the validation split"
    run.values |= {"chosen": best["name"], "met": not best["broken"], "why": why}
    run.write()
    evidence = {"budget": run.values["budget"], "original": run.candidates[0], "strongest": run.strongest(), "chosen": best}
    write_json(run.path / "chosen" / "evidence.json", evidence)
    page = report(run.path)
    if best["broken"]:
        raise BudgetNotMet(
            f"no model within the budget; the best found is {best['name']} ({why}). "
            f"It is saved in {run.path / 'chosen'}; the whole walk is in {page}"
        )
    return run.values
