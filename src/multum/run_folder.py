"""The folder of one `shrink` run and its `run.json`: what has been made and measured so far."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .budget import Budget
from .core.folders import check_writable, read_json, write_json
from .core.model import machine, versions
from .data import sizes
from .errors import InputError
from .runtimes._predictor import cores

RUN = "run.json"
OF_ONE_CALL = ("stopped before ", "the time limit ")
"""How notes begin that a later call, with more time, may make untrue; where they still hold they are made again."""


class RunFolder:
    """State on disk: a folder that exists is whole, a candidate in `run.json` is measured.

    Args:
        path: made if it does not exist.
        arguments: what decides the result; a run that was begun with others is refused.
        task: the task on its data.
        budget: may differ from that of an earlier call: the same walk then goes on, or another rung is chosen.
        say: is told every note when it is taken.

    Raises:
        InputError: the folder holds something else, or a run with other arguments or data.
    """

    def __init__(
        self,
        path: Path,
        arguments: Mapping[str, Any],
        *,
        task: Any,
        budget: Budget,
        time_limit_s: float | None,
        say: Callable[[str], Any] = str,
    ) -> None:
        self.path, self.budget, self._say = path, budget, say
        check_folder(path, arguments)
        if (path / RUN).exists():
            self.values: dict[str, Any] = read_json(path / RUN)
            if self.values["data"]["fingerprints"] != dict(task.fingerprints):
                held = " and ".join(filter(None, (arguments["data"], arguments.get("unlabelled"))))
                raise InputError(f"{path} was made from other data than {held} holds now; choose another -o")
        else:
            self.values = {
                "schema": 1,
                "task": task.name,
                "model": arguments["model"],
                "arguments": dict(arguments),
                "data": {
                    "source": arguments["data"],
                    "sizes": sizes(task),
                    "notes": [],
                    "fingerprints": dict(task.fingerprints),
                },
                "seed": arguments["seed"],
                "threads": arguments["threads"] or cores(),
                "quick": arguments["quick"],
                "candidates": [],
                "stages": [],
                "elapsed_s": 0.0,
                "versions": versions(),
                "machine": machine(),
                "when": datetime.now(UTC).isoformat(timespec="seconds"),
            }
        for text in task.notes:
            self.note(text)
        notes = self.values["data"]["notes"]
        self.values["data"]["notes"] = [note for note in notes if not note.startswith(OF_ONE_CALL)]
        self.values |= {"budget": asdict(budget), "time_limit_s": time_limit_s, "chosen": None}
        for candidate in self.candidates:
            self._judge(candidate)
        self._started = time.monotonic() - self.values["elapsed_s"]

    @property
    def candidates(self) -> list[dict[str, Any]]:
        """All measured models, in the order of the walk. The first is the original in torch."""
        return list(self.values["candidates"])

    def time_again(self, candidate: dict[str, Any], speed: Mapping[str, Any]) -> None:
        """Take in what a candidate was timed at beside the original in torch."""
        candidate.setdefault("first_p50_ms", first_p50_ms(candidate))
        candidate["validation"] = {**candidate["validation"], "speed": {**candidate["validation"]["speed"], **speed}}
        candidate["speedup"] = round(speed["ratio_to_first"]["value"], 3)
        self._judge(candidate)

    def find(self, name: str) -> dict[str, Any] | None:
        """The candidate of this name, if it is measured."""
        return next((c for c in self.values["candidates"] if c["name"] == name), None)

    def add(self, candidate: dict[str, Any]) -> dict[str, Any]:
        """Take in a measured candidate, judged by the budget. `write` puts it on disk, with others measured beside it."""
        self._judge(candidate)
        self.values["candidates"].append(candidate)
        return candidate

    def strongest(self) -> dict[str, Any]:
        """The fastest form of the unchanged original that keeps the quality: what every rung is compared with.

        The original in torch where no other form does.
        """
        originals = [c for c in self.candidates if c["folder"] == "original"]
        holding = [c for c in originals if c["target"] != "original" and c["drop"] <= self.budget.max_drop]
        return min(holding or originals[:1], key=first_p50_ms)

    def best(self) -> dict[str, Any]:
        """The fastest within all limits; if there is none, that within the allowed drop which comes nearest to the other limits.

        By its speed-up, which was taken in turns with the original: milliseconds of an hour ago are those of another machine.
        """
        if within := [c for c in self.candidates if c["holds"]]:
            return max(within, key=lambda candidate: float(candidate["speedup"]))
        keeping = [c for c in self.candidates if c["drop"] <= self.budget.max_drop]
        return min(keeping, key=lambda candidate: (self.budget.excess(candidate), -candidate["speedup"]))

    def note(self, text: str) -> None:
        """Something the reader of the report should know."""
        if text not in self.values["data"]["notes"]:
            self.values["data"]["notes"].append(text)
            self._say(text)

    def warn(self, text: str) -> None:
        """Something that nobody should miss who reads the result."""
        warnings = self.values.setdefault("warnings", [])
        if text not in warnings:
            warnings.append(text)

    def elapsed(self) -> float:
        """Seconds since the run began, pauses between calls left out."""
        return float(time.monotonic() - self._started)

    def write(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        self.values["elapsed_s"] = round(self.elapsed(), 1)
        write_json(self.path / RUN, self.values)

    def keep_time(self) -> None:
        """Put the time spent so far into `run.json`, if there is one, and nothing else: the rest may be half of something."""
        if (self.path / RUN).is_file():
            write_json(self.path / RUN, {**read_json(self.path / RUN), "elapsed_s": round(self.elapsed(), 1)})

    def _judge(self, candidate: dict[str, Any]) -> None:
        broken = self.budget.broken(candidate)
        candidate |= {"broken": broken, "holds": not broken, "reason": "; ".join(broken)}


def check_folder(folder: Path, arguments: Mapping[str, Any]) -> None:
    """Refuse an output folder that holds something else, or another run."""
    if folder.is_file():
        raise InputError(f"{folder} is a file; -o takes a folder")
    check_writable(folder)
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not (folder / RUN).is_file():
        if all(item.name.endswith(".part") for item in folder.iterdir()):  # killed while it wrote its first line
            return
        raise InputError(f"{folder} holds something else already; choose an empty or new folder for -o")
    before = read_json(folder / RUN).get("arguments", {})
    other = [f"{key}: {before.get(key)!r} then, {arguments[key]!r} now" for key in differing(before, arguments)]
    if other:
        raise InputError(f"{folder} holds a run with other arguments ({'; '.join(other)}); choose another -o to keep both")


def differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between the arguments of two calls.

    Data may be called by another name (`../d.csv`): its content is compared once it is read. A model may, if the name leads to
    the same place.
    """
    return [key for key, value in now.items() if before.get(key) != value and not _same(key, before.get(key), value)]


def _same(key: str, then: Any, now: Any) -> bool:
    if not (then and now):
        return False
    return key in ("data", "unlabelled") or (
        key == "model" and Path(then).expanduser().resolve() == Path(now).expanduser().resolve()
    )


def first_p50_ms(candidate: Mapping[str, Any]) -> float:
    """The median when a candidate was first timed: by that, forms of the original compare, whichever of them are timed again."""
    return float(candidate.get("first_p50_ms", candidate["validation"]["speed"]["p50_ms"]))
