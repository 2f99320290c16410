"""What `--runtime auto` measured, kept beside the model as `runtimes.json`; reading it and choosing from it takes no torch.

A *form* is a runtime with a precision, a *way* a form on a number of threads. The cost of a way for texts of lengths l_1 ... l_k in
batches of b is, round by round,

    c_r = Σ_i ms_r(l_i, b) / b   [+ what it takes to get ready / number of texts, where that is asked for]

where ms_r is of a whole pass; of a model that writes it is the time to read l_i tokens, and n times that for one token behind them.
The way with the least median is taken if it is faster than the present one, what a plain `open` would run, by more than noise:
if the interval of the ratio of the two, over the rounds that they were timed in by turns, lies above `WORTH_IT`.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ._measure import ratio
from .core.folders import read_json
from .errors import InputError

TABLE, SCHEMA = "runtimes.json", 3
AUTO = "auto"
PASS, READ, WRITE = "pass", "read", "write"
"""What is timed: a whole pass over a batch; of a model that writes to the first token, and for each token behind it."""
NEAR, BATCH_NEAR = 1.5, 4.0
"""A length, and a number of texts above one, stand for those up to so many times smaller or larger."""
WORTH_IT = 1.02
"""Times faster than the present way at least; less is noise, whatever the interval says."""
FEW = 16
"""Texts that forms of 8 bits and less are calibrated and checked on at least."""
FAITHFUL = 0.05
"""Mean KL in nats up to which a form of a model that writes is chosen without being asked for: 8 bits are far below."""
FLOATS = ("fp32", "f32", "f16", "bf16")
KNOWN_AS = {"f32": "fp32", "q8_0": "int8", "q4_0": "int4", "q4_1": "int4", "q4_k": "int4"}
"""What llama.cpp calls a precision -> what others do."""


@dataclass(frozen=True)
class Form:
    """A runtime, the precision of its export, and whether torch compiles the model."""

    runtime: str
    precision: str
    compiled: bool = False

    @property
    def name(self) -> str:
        """As tables show it."""
        return f"{self.runtime} {self.precision}" + (" compiled" if self.compiled else "")

    @property
    def folder(self) -> str:
        """Where in the model folder its export stands; torch runs the model folder itself."""
        return "" if self.runtime == "pytorch" else f"{self.runtime}-{self.precision}"

    def has(self, precision: str) -> bool:
        """Whether it is of this precision, any if empty; `int8-mse` and `q8_0` are of `int8` too."""
        return precision in ("", self.precision, self.precision.partition("-")[0], KNOWN_AS.get(self.precision))

    @property
    def rounds(self) -> bool:
        """Whether its weights are integers."""
        return self.precision not in FLOATS


EAGER = Form("pytorch", "fp32")


@dataclass(frozen=True)
class Choice:
    """A form and its threads, and how much faster it is than the present way."""

    form: Form
    threads: int
    gain: bool
    """Whether it is faster than the present way by more than noise; if not it is the present way."""
    ratio: Mapping[str, Any]
    """Of the fastest way against the present one, gain or not: `value` and `ci95`."""
    fastest: str
    present: str
    ms: float
    """Of one text, a mean over the lengths asked for."""
    beyond: str = ""
    """A form that is faster yet, but answers so differently that it is taken only by name."""

    def line(self) -> str:
        """In words."""
        beyond = f"; {self.beyond} is faster yet, but further from the model: ask for it by name" if self.beyond else ""
        return self._line() + beyond

    def _line(self) -> str:
        low, high = self.ratio["ci95"]
        if self.gain:
            faster = f"{self.ratio['value']:.2f} ({low:.2f} to {high:.2f}) times as fast as {self.present}"
            return f"Chosen: {_way(self.form.name, self.threads)}, {faster}"
        if self.fastest == self.present:
            return f"No gain: {self.present} is the fastest"
        beside = f"{self.fastest} takes {1 / self.ratio['value']:.2f} of its time ({1 / high:.2f} to {1 / low:.2f})"
        return f"No gain beyond noise over {self.present}, which stays: {beside}"


def kept(folder: Path) -> dict[str, Any] | None:
    """The table of a model folder, if it has one that can be read."""
    if not (folder / TABLE).is_file():
        return None
    try:
        table = read_json(folder / TABLE)
    except InputError:  # it is measured again and written anew
        return None
    return table if isinstance(table, dict) and table.get("schema") == SCHEMA else None


def fits(
    table: Mapping[str, Any],
    about: Mapping[str, Any],
    *,
    few: bool,
    lengths: Sequence[int],
    batches: Sequence[int],
    threads: int,
    forms: Sequence[Form],
) -> bool:
    """Whether a table answers this question.

    Args:
        table: as `runtimes.json` has it.
        about: what has to be the same: machine, versions, model, pairs.
        few: there are fewer than `FEW` texts now; a table that lacks forms because there were is measured anew once there are more.
        lengths, batches: to be chosen for.
        threads: that may be used.
        forms: to be chosen from; each must have been measured, or left out for a reason.
    """
    known = {one["name"] for one in table["forms"]} | set(table["left_out"])
    return (
        all(table[key] == value for key, value in about.items())
        and few >= table["few"]
        and threads <= table["threads"]
        and all(form.name in known for form in forms)
        and all(_near(table["lengths"], length, NEAR) is not None for length in lengths)
        and all(_near(table["batches"], batch, BATCH_NEAR if batch > 1 else 1.0) is not None for batch in batches)
    )


def grown(table: Mapping[str, Any] | None, about: Mapping[str, Any], asked: Mapping[str, Any]) -> dict[str, list[int]]:
    """Lengths and batches to measure: those asked for, and those of a table of the same model and machine, so that none is lost."""
    same = table is not None and all(table[key] == value for key, value in about.items())
    return {key: sorted({*asked[key], *(table[key] if table and same else ())}) for key in ("lengths", "batches")}


def pick(
    table: Mapping[str, Any],
    *,
    lengths: Sequence[int],
    batches: Sequence[int],
    threads: int,
    precision: str = "",
    texts: int | None = None,
    exported: bool = False,
    ships: Collection[str] | None = None,
    new: int = 0,
) -> Choice:
    """The fastest way, or the present one where none is faster by more than noise.

    Args:
        table: one that fits.
        lengths: of texts, all as frequent as each other.
        batches: of how many texts; the cost is summed over them.
        threads: that may be used.
        precision: of the form; any if empty.
        texts: after so many it is over, and getting ready counts; without it only the pace does.
        exported: whether it has to be an export, whatever torch would take.
        ships: names of forms to choose among, each on the threads that its export runs on by itself, and however far from the
            model: what they lose is measured before one of them ships.
        new: tokens that a model which writes is to write behind each text.

    Raises:
        InputError: no form of this precision was measured.
    """
    cells = [
        (_near(table["lengths"], length, math.inf), _near(table["batches"], batch, math.inf), what)
        for length in lengths
        for batch in batches
        for what in table["timed"]
    ]
    often = {WRITE: new}
    times = {(row["form"], row["threads"], *cell_of(row)): row["rounds_ms"] for row in table["times"]}
    ready = {one["name"]: one["ready_s"] * 1e3 / texts if texts else 0.0 for one in table["forms"]}
    forms = {one["name"]: Form(one["runtime"], one["precision"], one["compiled"]) for one in table["forms"]}
    present = (table["present"]["form"], table["present"]["threads"])
    costs: dict[tuple[str, int], list[float]] = {}
    for way in {(form, count) for form, count, *_ in times}:
        rounds = [[ms * often.get(cell[2], 1) / cell[1] for ms in times.get((*way, *cell), [])] for cell in cells]
        if all(len(found) == table["rounds"] for found in rounds):
            mean = len(cells) / len(table["timed"])
            costs[way] = [sum(one) / mean + ready[way[0]] for one in zip(*rounds, strict=True)]
    median = {way: statistics.median(found) for way, found in costs.items()}
    allowed = [way for way in costs if way[1] <= threads and forms[way[0]].has(precision)]
    if exported:
        allowed = [way for way in allowed if forms[way[0]].folder]
    if ships is not None:
        own = {(one["name"], one["threads"]) for one in table["forms"] if one["name"] in ships}
        allowed, exported = [way for way in allowed if way in own], present not in own
    if not allowed:
        raise InputError(f"no {precision or 'exported'} form of this model could be measured", *_reasons(table))
    near, beyond = allowed, ""
    if WRITE in table["timed"] and not precision and ships is None:
        far = {one["name"] for one in table["forms"] if one["parity"]["kl_nats"] > FAITHFUL} - {present[0]}
        near = [way for way in allowed if way[0] not in far] or allowed
        first = min(allowed, key=lambda way: (median[way], way))
        beyond = "" if first in near else _way(*first)
    allowed, best = near, min(near, key=lambda way: (median[way], way))
    if present not in allowed and not exported:  # fewer threads, or another precision, than it has: torch is what is left
        present = min((way for way in allowed if way[0] == EAGER.name), key=lambda way: -way[1], default=best)
    compared = ratio(costs[present], costs[best])
    gain = best != present and compared["ci95"][0] > 1.0 and compared["value"] >= WORTH_IT
    form, count = best if gain or exported else present
    return Choice(forms[form], count, gain, compared, _way(*best), _way(*present), round(median[form, count], 4), beyond)


def rows(table: Mapping[str, Any]) -> list[list[str]]:
    """A table for the terminal: a line for every way, the fastest first; with a star behind all those that were far slower in the
    first rounds and not timed to the end.
    """
    cells = sorted({cell_of(row) for row in table["times"]}, key=lambda cell: (cell[2], cell[1], cell[0]))
    times = {(row["form"], row["threads"], *cell_of(row)): row["ms"] for row in table["times"]}
    about = {one["name"]: one for one in table["forms"]}
    to_end = to_the_end(table)
    ways = sorted(
        {way[:2] for way in times},
        key=lambda way: (way not in to_end, sum(math.log(times.get((*way, *cell), math.inf)) for cell in cells), way),
    )
    head = ["", "MB", "agreement", "ready s", *(_column(*cell) for cell in cells)]
    found = [head]
    for name, count in ways:
        one = about[name]
        figures = [f"{times[name, count, *cell]:.3g}" if (name, count, *cell) in times else "-" for cell in cells]
        found.append(
            [
                _way(name, count) + "*" * ((name, count) not in to_end),
                f"{one['bytes'] / 1e6:.1f}",
                _agreement(one["parity"]),
                f"{one['ready_s']:.1f}",
                *figures,
            ]
        )
    return found


def to_the_end(table: Mapping[str, Any]) -> set[tuple[str, int]]:
    """(form, threads) of the ways that were not far slower in the first rounds."""
    return {(row["form"], row["threads"]) for row in table["times"] if len(row["rounds_ms"]) == table["rounds"]}


def cell_of(row: Mapping[str, Any]) -> tuple[int, int, str]:
    """What a row of the table is the time of: (length, batch, what)."""
    return row["length"], row["batch"], row["what"]


def _column(length: int, batch: int, what: str) -> str:
    reads = {PASS: f"{length} tokens x {batch}", READ: f"read {length} tokens", WRITE: f"a token behind {length}"}
    return f"{reads[what]}, ms"


def _reasons(table: Mapping[str, Any]) -> list[str]:
    return [f"{name}: {reason}" for name, reason in table["left_out"].items()]


def _agreement(parity: Mapping[str, Any]) -> str:
    if "unexplained_variance" in parity:
        return f"{100 * (1 - parity['unexplained_variance']):.2f} % of variance"
    return f"{100 * parity['agreement']:.1f} %, KL {max(parity['kl_nats'], 0.0):.1g}"


def _threads(count: int) -> str:
    return f"{count} thread" + ("s" if count > 1 else "")


def _way(form: str, count: int) -> str:
    return f"{form} on {_threads(count)}"


def _near(known: Sequence[int], asked: int, times: float) -> Any:
    """The one of these that stands for what is asked; None if none is near enough."""
    best = min(known, key=lambda one: abs(math.log(one / asked)))
    return best if abs(math.log(best / asked)) <= math.log(times) + 1e-9 else None
