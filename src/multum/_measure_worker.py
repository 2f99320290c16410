"""One target in a process of its own, told over a pipe what to time. `measure` starts it; it is no command for people.

    python -m multum._measure_worker TARGET THREADS [exact] [compiled]

One JSON object a line, in and out. Whatever libraries print goes to stderr.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from . import runtimes
from ._pace import pace, paces
from .errors import MultumError


def open_target(target: Path, threads: int, how: Sequence[str] = ()) -> Any:
    """A model folder is run by torch even where it ships an export, because it is the folder that was asked for.

    Args:
        target: model or export folder.
        threads: at most so many.
        how: `exact`, on that number of threads whatever was fastest at export; `compiled` by torch.
    """
    if (target / "runtime.json").is_file():
        predictor = runtimes.open(target, threads=threads)
    else:
        predictor = runtimes.find("pytorch").open(target, threads=threads, compiled="compiled" in how)
    if "exact" in how:
        predictor.use(threads)
    return predictor


def about(predictor: Any) -> dict[str, Any]:
    """What the parent needs to know before it asks for times."""
    facts = {name: getattr(predictor, name) for name in ("labels", "runtime", "precision", "threads", "max_length")}
    facts["cuts"], facts["kind"] = predictor.reader.cuts, getattr(predictor.reader, "kind", "")
    facts["bytes"] = sum(path.stat().st_size for path in predictor.files)
    if hasattr(predictor.reader, "scored"):  # it writes texts
        predictor.reader.scored = False  # what nobody who reads a text waits for
        facts["generation"] = predictor.generation
    facts["hides"] = predictor.reader.task == "fill-mask"
    facts["continues"] = predictor.reader.task == "text-generation"
    if hasattr(predictor, "module"):
        from .core.profile import profile

        facts["model"] = profile(predictor.module)
    return facts


def answer(predictor: Any, order: dict[str, Any]) -> Any:
    """Carry out one order."""
    texts: list[Any] = [_as_given(text) for text in order.get("texts", [])]
    match order["do"]:
        case "predict":
            started = time.perf_counter()
            logits = predictor.predict(texts, order["batch"])
            seconds = time.perf_counter() - started
            np.save(order["save"], logits)
            return seconds
        case "alone":
            np.save(order["save"], predictor.alone(texts))
            return None
        case "count":
            return [predictor.lengths([text]) for text in texts]
        case "time":
            return _milliseconds(predictor.predict, texts)
        case "tokenize":
            return _milliseconds(predictor.tokenize, texts)
        case "pace":
            return paces(predictor, texts)
        case "items":
            return [rows.tolist() for rows in predictor.items(texts)]
        case "ids":
            return predictor.tokenizer(order["text"], truncation=True, max_length=order["length"])["input_ids"]
        case "pass":
            return _pass(predictor, order["ids"], order["batch"], order["threads"], order["warm_up"])
        case "write":
            return _write(predictor, order["ids"], order["new"], order["threads"], order["warm_up"])
        case "memory":
            return peak_memory()
    raise ValueError(order["do"])


def peak_memory() -> float:
    """Highest resident memory of this process, in MB."""
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage would count what the parent had when it started this process
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 / 1e6
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def main(target: str, threads: str, *how: str) -> None:
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def reply(**values: Any) -> None:
        replies.write(json.dumps(values) + "\n")
        replies.flush()

    try:
        predictor = open_target(Path(target), int(threads), how)
        reply(result=about(predictor))
        for line in sys.stdin:
            reply(result=answer(predictor, json.loads(line)))
    except MultumError as error:
        reply(error=str(error))


def _pass(predictor: Any, ids: Sequence[int], batch: int, threads: int, warm_up: int) -> float:
    """Milliseconds of the model alone on a batch of equal rows, after some passes untimed."""
    ready = vars(predictor).setdefault("ready", {})
    if threads not in ready:
        ready[threads] = predictor.passes(threads)
    run = ready[threads]
    rows = np.tile(np.array(ids, dtype=np.int64), (batch, 1))
    columns = {"input_ids": rows, "attention_mask": np.ones_like(rows), "token_type_ids": np.zeros_like(rows)}
    for _ in range(warm_up):
        run(columns)
    started = time.perf_counter()
    run(columns)
    return 1e3 * (time.perf_counter() - started)


def _write(predictor: Any, ids: Sequence[int], new: int, threads: int, warm_up: int) -> tuple[float, float]:
    """Milliseconds in which a model that writes reads a text, and for a token behind it, after some texts read untimed."""
    predictor.use(threads)
    for _ in range(warm_up):
        pace(predictor, ids, 2)
    read, token = pace(predictor, ids, new)
    return 1e3 * read, 1e3 * token


def _as_given(value: Any) -> Any:
    """JSON knows no tuples; a pair of texts, or a sentence of words, is one."""
    return tuple(value) if isinstance(value, list) and all(isinstance(part, str) for part in value) else value


def _milliseconds(call: Any, texts: Sequence[Any]) -> list[float]:
    times = []
    for text in texts:
        started = time.perf_counter()
        call([text])
        times.append(1e3 * (time.perf_counter() - started))
    return times


if __name__ == "__main__":
    main(*sys.argv[1:])
