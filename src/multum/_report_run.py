"""A run as the report sees it: `run.json` checked and typed."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import InputError

GROWING = ("perplexity",)
"""Metrics that are higher for worse models."""
UNSCALED = ("bleu", *GROWING)
"""Metrics that are shown as they are; all others are shares, shown in per cent."""


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """One measurement of one candidate on one split."""

    split: str
    n: int
    metric: str
    value: float
    low: float
    high: float
    p50: float
    """Milliseconds for one text, the median."""
    p90: float
    size: int
    """Bytes of the files needed to run it."""
    raw: Mapping[str, Any]
    """The measurement as it stands in `run.json`, for what is only shown when it is there."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One measured form of the model."""

    name: str
    folder: str
    technique: str
    made_from: str | None
    """The folder it was made from, where that is known."""
    runtime: str
    precision: str
    blocks: list[tuple[int, int]]
    """(heads, neurons) of every block."""
    vocabulary: int
    drop: float
    speedup: float
    first_p50: float
    """When it was first timed, which is what the run itself chooses the form of the original by that rungs are compared with."""
    broken: list[str]
    validation: Metrics
    test: Metrics | None
    is_original: bool
    """It has the original's weights, whatever runs them."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """A whole run, finished or not."""

    raw: Mapping[str, Any]
    candidates: list[Candidate]
    chosen: Candidate | None
    full: tuple[int, int]
    budget: dict[str, float | None]

    @property
    def original(self) -> Candidate:
        return self.candidates[0]

    @property
    def shown(self) -> Candidate | None:
        """The chosen one, in an unfinished run the last one."""
        return self.chosen or (self.candidates[-1] if self.candidates else None)

    @property
    def ships(self) -> str:
        """The folder that ships: what a search chose, or a recipe's last model."""
        return "model" if self.raw.get("kind") == "recipe" else "chosen"

    @property
    def scale(self) -> float:
        """100 where the metric is a share and is shown in per cent, else 1."""
        return 1.0 if self.candidates and self.original.validation.metric in UNSCALED else 100.0

    @property
    def grows(self) -> bool:
        """Whether the metric is higher for worse models; what is lost is then told in per cent of it."""
        return bool(self.candidates) and self.original.validation.metric in GROWING

    def lost(self, before: Metrics, after: Metrics) -> float:
        """The drop between two measurements, as a budget states it."""
        return 100 * (after.value / before.value - 1) if self.grows else (before.value - after.value) * self.scale

    @property
    def worst(self) -> float | None:
        """The value of the metric that the drop allowed leads to on validation, in the unit that is shown."""
        most = self.budget["max_drop"]
        if most is None or not self.candidates:
            return None
        value = self.original.validation.value
        return value * (1 + most / 100) if self.grows else value * self.scale - most

    @property
    def percent(self) -> str:
        return " %" if self.scale == 100 else ""

    @property
    def strongest(self) -> Candidate | None:
        """The unchanged original in the form that the rungs are compared with."""
        forms = [c for c in self.candidates[1:] if c.is_original]
        tested, most = [c for c in forms if c.test], self.budget["max_drop"]
        holding = tested or [c for c in forms if most is None or c.drop <= most]
        return min(holding, key=lambda c: c.first_p50, default=None)

    def path(self) -> list[Candidate]:
        """From the original to the chosen one (to the last one in an unfinished run), each made from the one before.

        Of the original's exports only those on the way: the runtime that the rungs run on, up to their precision.
        """
        end = self.shown
        if end is None:
            return []
        rungs = [c for c in self.candidates if not c.is_original]
        walk = rungs[0] if rungs and not end.is_original else end
        way = [self.original]
        for candidate in self.candidates[1:]:
            if candidate.is_original and candidate.runtime == walk.runtime:
                way.append(candidate)
                if candidate.precision == walk.precision:
                    break
        if end.is_original:
            return way if end in way else [*way, end]
        made = [end]
        while parent := self.parent(made[0]):
            made.insert(0, parent)
        return way + made

    def parent(self, candidate: Candidate) -> Candidate | None:
        """The rung that a rung was made from: the one it names, or else the one before it."""
        rungs = [c for c in self.candidates if not c.is_original]
        earlier = rungs[: rungs.index(candidate)] if candidate in rungs else []
        return next((c for c in reversed(earlier) if candidate.made_from in (None, c.folder)), None)


def read_run(path: Path) -> dict[str, Any]:
    """Read `run.json`, characters that do not print replaced by spaces.

    Raises:
        InputError: missing or damaged.
    """
    try:
        run = json.loads(
            path.read_text(encoding="utf-8"), parse_constant=_nothing, parse_float=_number(float), parse_int=_number(int)
        )
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; a report is made from the folder of a run") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged: {error}") from error
    if not isinstance(run, dict):
        raise InputError(f"{path} is damaged: it holds no object")
    return {_printable(key): _printable(value) for key, value in run.items()}


def parse(run: Mapping[str, Any]) -> Run:
    """Check a run and give it types.

    Raises:
        InputError: everything that is missing or wrong, each by its place.
    """
    check = _Check()
    entries = check.of(run, "candidates", list, "run.json")
    budget = check.of(run, "budget", dict, "run.json")
    for key in ("model", "task"):
        check.of(run, key, str, "run.json")
    candidates = [_candidate(check, entry, f"candidates[{i}]", i == 0) for i, entry in enumerate(entries)]
    limits = {
        key: None if budget.get(key) is None else check.number(budget, key, "budget")
        for key in ("max_drop", "max_latency_ms", "max_size_bytes", "min_speedup")
    }
    full = _pairs(check, [entries[0].get("full")], "candidates[0].full") if candidates and isinstance(entries[0], dict) else []
    chosen = next((c for c in candidates if c.name == run.get("chosen")), None)
    if run.get("chosen") is not None and chosen is None:
        check.problems.append(f"chosen: there is no candidate {run['chosen']!r}")
    if check.problems:
        raise InputError(*(f"run.json is damaged: {problem}" for problem in check.problems[:10]))
    return Run(raw=run, candidates=candidates, chosen=chosen, full=full[0] if full else (0, 0), budget=limits)


class _Check:
    """Reads values and collects what is wrong instead of stopping at the first."""

    def __init__(self) -> None:
        self.problems: list[str] = []

    def of(self, entry: Any, key: str, kind: type, where: str) -> Any:
        value = entry.get(key) if isinstance(entry, dict) else None
        if isinstance(value, kind):
            return value
        self.problems.append(f"{where}: {key!r} is missing or no {kind.__name__}")
        return kind()

    def number(self, entry: Any, key: str, where: str, *, positive: bool = False) -> float:
        value: Any = entry.get(key) if isinstance(entry, dict) else None
        if _finite(value) and (value > 0 or not positive):
            return float(value)
        self.problems.append(f"{where}: {key!r} is missing or no {'positive ' if positive else ''}number")
        return 1.0


def _candidate(check: _Check, entry: Any, where: str, first: bool) -> Candidate:
    test = entry.get("test") if isinstance(entry, dict) else None
    folder = check.of(entry, "folder", str, where)
    validation = _metrics(check, check.of(entry, "validation", dict, where), f"{where}.validation")
    first_p50: Any = entry.get("first_p50_ms") if isinstance(entry, dict) else None
    return Candidate(
        name=check.of(entry, "name", str, where),
        folder=folder,
        technique=check.of(entry, "technique", str, where),
        made_from=entry.get("made_from") if isinstance(entry, dict) else None,
        runtime=check.of(entry, "runtime", str, where),
        precision=check.of(entry, "precision", str, where),
        blocks=_pairs(check, check.of(entry, "blocks", list, where), f"{where}.blocks"),
        vocabulary=int(check.number(entry, "vocabulary", where)),
        drop=check.number(entry, "drop", where),
        speedup=check.number(entry, "speedup", where, positive=True),
        broken=[str(reason) for reason in check.of(entry, "broken", list, where)],
        first_p50=float(first_p50) if _finite(first_p50) else validation.p50,
        validation=validation,
        test=_metrics(check, test, f"{where}.test") if test else None,
        is_original=first or folder == "original",
    )


def _metrics(check: _Check, entry: Any, where: str) -> Metrics:
    quality, speed = check.of(entry, "quality", dict, where), check.of(entry, "speed", dict, where)
    size = check.of(entry, "size", dict, where)
    value = check.number(quality, "value", f"{where}.quality")
    interval = quality.get("ci95")
    if not (isinstance(interval, list) and len(interval) == 2 and all(_finite(bound) for bound in interval)):
        check.problems.append(f"{where}.quality: 'ci95' is missing or no pair of numbers")
        interval = [value, value]
    p50 = check.number(speed, "p50_ms", f"{where}.speed", positive=True)
    return Metrics(
        split=str(entry.get("split", "")) if isinstance(entry, dict) else "",
        n=int(check.number(entry, "n", where)),
        metric=str(quality.get("metric", "quality")).replace("_", " "),
        value=value,
        low=min(interval),
        high=max(interval),
        p50=p50,
        p90=speed["p90_ms"] if _finite(speed.get("p90_ms")) else p50,
        size=int(check.number(size, "bytes_on_disk", f"{where}.size", positive=True)),
        raw=entry if isinstance(entry, dict) else {},
    )


def _pairs(check: _Check, value: list[Any], where: str) -> list[tuple[int, int]]:
    if all(isinstance(pair, list) and len(pair) == 2 and all(isinstance(n, int) and n >= 0 for n in pair) for pair in value):
        return [(heads, neurons) for heads, neurons in value]
    check.problems.append(f"{where}: not (heads, neurons) pairs")
    return []


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300


def _nothing(_: str) -> None:
    """NaN and Infinity: numbers that are missing."""


def _number(kind: type) -> Callable[[str], float | None]:
    """Numbers beyond what can be computed with are missing too."""
    return lambda text: kind(text) if abs(float(text)) < 1e300 else None


def _printable(value: Any) -> Any:
    """Texts without control characters and lone surrogates, which neither HTML nor YAML can carry."""
    if isinstance(value, str):
        return "".join(c if c.isprintable() else " " for c in value)
    if isinstance(value, dict):
        return {_printable(key): _printable(item) for key, item in value.items()}
    return [_printable(item) for item in value] if isinstance(value, list) else value
