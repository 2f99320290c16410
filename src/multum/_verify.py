"""Measure a finished run again from its provenance, and say line by line what agrees.

    data          fingerprints of the splits, exact
    weights       a fingerprint of every target's files, exact
    size          bytes, exact
    quality       exact: to the last digit on the same machine and versions
    speed         the ratio to the original, within a tolerance around the interval that was kept
    what it cost  the figures of `cost.json`, exact, from the answers that were kept

What was read on the test split is timed and scored again there, every other candidate is scored on validation. A comparison is
made again as a whole. Nothing in the folder is changed: targets are executed in a folder of links to their files.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from .core.folders import read_json
from .core.model import machine, versions
from .core.reporting import report as report_progress
from .errors import InputError
from .progress import Progress
from .targets import data_of, fingerprint, measured_files, open_known

RUN, COMPARISON = "run.json", "comparison.json"
OWN = ("accuracy", "calibration", "ranking", "attribution", "inside", "privacy", "canaries")
"""Figures that a comparison has of each model alone."""
EXACT = 1e-9
"""Relative difference that writing a number as text explains."""
ROUNDS, FEWEST_ROUNDS = 20, 3
"""Of timing what was timed; of scoring what is only scored."""
UNTOLD = "not kept"


@dataclass(frozen=True)
class Line:
    """One thing that was measured then and is measured now."""

    what: str
    then: str
    now: str
    agrees: bool | None
    """None: it cannot be compared, and `note` says why."""
    note: str = ""


def verify(
    folder: str | Path,
    *,
    data: str = "",
    tolerance: float = 0.2,
    rounds: int = ROUNDS,
    threads: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure a run, or make a comparison, again.

    Args:
        folder: of `shrink` or `run` (it has run.json), or of `compare` (comparison.json).
        data: the data, where it is no longer in the place that was written down.
        tolerance: share by which a ratio of speeds may lie outside of its interval.
        rounds: of timing.
        threads: as many as then by default.
        progress: shows how far it is; silent by default.

    Returns:
        `agrees`, and `lines`, one a thing compared: `what`, `then`, `now`, `agrees` (None where it cannot be said), `note`.

    Raises:
        InputError: no finished run, or its data is not there.
    """
    folder, progress = Path(folder), progress or Progress.silent()
    if not 0 <= tolerance < 10:
        raise InputError(f"--tolerance: {tolerance:g} is no share from 0 on; write for example 0.2")
    if (folder / COMPARISON).is_file():
        lines = list(_comparison(folder, data, threads, progress))
    elif (folder / RUN).is_file():
        lines = list(_run(folder, data, tolerance, rounds, threads, progress))
    else:
        raise InputError(f"{folder} holds no run ({RUN}) and no comparison ({COMPARISON})")
    return {"agrees": all(line.agrees is not False for line in lines), "lines": [asdict(line) for line in lines]}


# -- a run -------------------------------------------------------------------------------------------------------------------


def _run(folder: Path, data: str, tolerance: float, rounds: int, threads: int | None, progress: Progress) -> Iterator[Line]:
    run = read_json(folder / RUN)
    candidates = run.get("candidates") or []
    if not candidates or run.get("chosen") is None:
        raise InputError(f"{folder} holds a run that is not finished; start its command again, it goes on where it stopped")
    from ._measure import DISTURBED, unsteady

    known = data_of(folder / candidates[0]["folder"], data="", columns={}, seed=None)
    task = open_known(run["task"], replace(known, source=data or known.source))  # the same data in another place: all else stays
    same_machine = run["machine"] == machine()
    yield from _circumstances(run, same_machine)
    yield from _data(run["data"]["fingerprints"], task)
    targets = {one["name"]: _target_of(folder, run, one) for one in candidates}
    there = {name: target for name, target in targets.items() if target.is_dir()}
    for one in candidates:
        yield _whole(one, targets[one["name"]])
    tested = [one for one in candidates if one.get("test") and one["name"] in there]
    rest = [one for one in candidates if one not in tested and one["name"] in there]
    threads = threads or run.get("threads")
    if tested:
        with progress.stage("measure on the test split"):
            found = _measured([there[one["name"]] for one in tested], task, "test", threads, rounds)
        busy = any(unsteady(one["speed"]) for one in (*found, *(one["test"] for one in tested)))
        for one, metrics in zip(tested, found, strict=True):
            yield from _compared(one["name"], one["test"], metrics)
            yield _speed(
                one["name"], one["test"], metrics, tolerance, DISTURBED if busy else "" if same_machine else "another machine"
            )
    if rest:
        with progress.stage("score on the validation split"):
            for number, one in enumerate(rest):
                metrics = _measured([there[one["name"]]], task, "validation", threads, FEWEST_ROUNDS)[0]
                yield from _compared(one["name"], one["validation"], metrics)
                report_progress((number + 1) / len(rest))
    yield from _cost(folder, run, task)


def _cost(folder: Path, run: Mapping[str, Any], task: Any) -> Iterator[Line]:
    """What was said that shrinking cost, once more from the answers of both models, whose score was compared above."""
    from ._cost import COST, cost

    if not (folder / COST).is_file():
        return
    then, chosen = read_json(folder / COST), next(one for one in run["candidates"] if one["name"] == run["chosen"])
    now = cost(folder, run, task, chosen)
    if now is None:
        yield Line("what it cost", "figures", "none", None, "the answers that were kept are not those of run.json, or not there")
        return
    now = json.loads(json.dumps(now))  # what a file makes of it: lists, and names that are text
    for role, model in then["models"].items():
        yield from _sections(f"what it cost: {role}", model, now["models"][role], OWN)
    was, is_now = (found["comparisons"]["after"] for found in (then, now))
    yield from _sections("what it cost", was, is_now, tuple(was))


def _target_of(folder: Path, run: Mapping[str, Any], one: Mapping[str, Any]) -> Path:
    """Where a candidate is executed: what was read on test as the chosen one is in the folder that ships."""
    target = folder / str(one["target"])
    if one["name"] == run["chosen"] and run.get("kind") != "recipe" and (folder / "chosen").is_dir():
        return folder / "chosen" / target.relative_to(folder / str(one["folder"]))
    return target


def _circumstances(then: Mapping[str, Any], same_machine: bool) -> Iterator[Line]:
    now = versions()
    other = [name for name, version in then["versions"].items() if now.get(name) != version]
    note = "figures may differ in the last digits" if other else ""
    yield Line("versions", _listed(then["versions"], other), _listed(now, other), None if other else True, note)
    before, here = (f"{one['processor']}, {one['cores']} cores" for one in (then["machine"], machine()))
    yield Line("machine", before, here, True if same_machine else None, "" if same_machine else "speeds cannot be compared")


def _listed(found: Mapping[str, str], names: Sequence[str]) -> str:
    return ", ".join(f"{name} {found.get(name, UNTOLD)}" for name in names) or f"multum {found['multum']} and all others"


def _data(then: Mapping[str, str], task: Any) -> Iterator[Line]:
    now = dict(task.fingerprints)
    for split in ("train", "validation", "test"):
        yield Line(f"data: {split}", then[split], now[split], then[split] == now[split])


def _whole(one: Mapping[str, Any], target: Path) -> Line:
    """Its files are as they were measured."""
    what, then = f"{one['name']}: files", one.get("fingerprint")
    if not target.is_dir():
        return Line(what, then or UNTOLD, "not there", False, str(target))
    now = fingerprint(target)
    return Line(what, then or UNTOLD, now, then == now if then else None, "" if then else "an earlier version made this run")


def _measured(targets: Sequence[Path], task: Any, split: str, threads: int | None, rounds: int) -> list[dict[str, Any]]:
    """Metrics of targets, which are left as they are."""
    from ._measure import measure

    with tempfile.TemporaryDirectory() as scratch:
        linked = []
        for number, target in enumerate(targets):
            place = Path(scratch) / f"{number}"
            place.mkdir()
            for path in measured_files(target):
                (place / path.name).symlink_to(path.resolve())
            linked.append(place)
        return measure(linked, task, split=split, threads=threads, rounds=rounds)


def _compared(name: str, then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Line]:
    """Quality and bytes of one measurement."""
    (was, held), (is_now, holds) = ((one["quality"], one["size"]["bytes_on_disk"]) for one in (then, now))
    same = then["n"] == now["n"] and all(math.isclose(was[key], is_now[key], rel_tol=EXACT) for key in ("value",))
    digits = f"{then['split']} {was['metric']}"
    yield Line(f"{name}: {digits}", f"{was['value']:.6g} of {then['n']}", f"{is_now['value']:.6g} of {now['n']}", same)
    yield Line(f"{name}: bytes", f"{held:,}", f"{holds:,}", held == holds)


def _speed(name: str, then: Mapping[str, Any], now: Mapping[str, Any], tolerance: float, doubt: str) -> Line:
    """The ratio of speeds; where there is a doubt it is shown and not judged."""
    was, is_now = then["speed"]["ratio_to_first"], now["speed"]["ratio_to_first"]
    low, high = was["ci95"][0] * (1 - tolerance), was["ci95"][1] * (1 + tolerance)
    agrees = low <= is_now["value"] <= high
    what = f"{name}: times faster than the first"
    note = f"within {low:.3g} to {high:.3g}" if agrees else f"outside of {low:.3g} to {high:.3g}"
    return Line(what, f"{was['value']:.3g}", f"{is_now['value']:.3g}", None if doubt else agrees, doubt or note)


# -- a comparison ------------------------------------------------------------------------------------------------------------


def _comparison(folder: Path, data: str, threads: int | None, progress: Progress) -> Iterator[Line]:
    from ._compare import compare

    then = read_json(folder / COMPARISON)
    yield from _circumstances(then, then["machine"] == machine())
    about, sources = then["data"], {role: model["source"] for role, model in then["models"].items()}
    with tempfile.TemporaryDirectory() as scratch:
        now = compare(
            sources["before"],
            sources["after"],
            output=Path(scratch) / "again",
            data=data or about["source"],
            floor=sources.get("floor"),
            task=then["task"],
            columns=about["columns"],
            options=about.get("options"),
            group_by=about.get("group_by", ()),
            shift=about.get("shift"),
            lexicon=about.get("lexicon"),
            margin=100 * then["margin"],
            level=then["level"],
            shadows=then.get("shadows", 0),
            canaries=then.get("canaries"),
            split=then["split"],
            runtime=then.get("runtime", ""),
            seed=then["seed"],
            threads=threads,
            progress=progress,
        )
    for split, digest in about["fingerprints"].items():
        here = now["data"]["fingerprints"].get(split, "not there")
        yield Line(f"data: {split}", digest, here, digest == here)
    for role, model in then["models"].items():
        again = now["models"][role]
        yield Line(f"{role}: files", model["fingerprint"], again["fingerprint"], model["fingerprint"] == again["fingerprint"])
        yield Line(f"{role}: bytes", f"{model['bytes']:,}", f"{again['bytes']:,}", model["bytes"] == again["bytes"])
        yield from _sections(role, model, again, OWN)
    for role, found in then["comparisons"].items():
        yield from _sections(f"{role} against before", found, now["comparisons"][role], tuple(found))


def _sections(who: str, then: Mapping[str, Any], now: Mapping[str, Any], names: Sequence[str]) -> Iterator[Line]:
    """A line for every section that has figures: how many, and the first that differs."""
    for name in names:
        was, is_now = (dict(_figures(one.get(name), "")) for one in (then, now))
        if not was:  # nothing could be said then: no such texts, too few of them, or not asked for
            continue
        other = [key for key, value in was.items() if not _equal(value, is_now.get(key))]
        note = f"{other[0].lstrip('.')}: {was[other[0]]} then, {is_now.get(other[0])} now" if other else ""
        yield Line(f"{who}: {name}", f"{len(was)} figures", f"{len(was) - len(other)} agree", not other, note)


def _figures(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Every leaf by its path."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _figures(item, f"{path}.{key}")
    elif isinstance(value, list):
        for at, item in enumerate(value):
            yield from _figures(item, f"{path}.{at}")
    elif path or value is not None:
        yield path, value


def _equal(then: Any, now: Any) -> bool:
    numbers = all(isinstance(one, int | float) and not isinstance(one, bool) for one in (then, now))
    return math.isclose(then, now, rel_tol=EXACT, abs_tol=EXACT) if numbers else then == now
