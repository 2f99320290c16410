"""The turns of the walk: which rung is made from which, how fast, and where it ends. Rungs are made up."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny

from multum import landing
from multum._runtime_table import EAGER, Form
from multum.bench import Bench
from multum.budget import FULL
from multum.ladder import MAX_RUNGS, STEP, Ladder
from multum.landing import TOGETHER, Landing
from multum.plan import LAST, MEASURE, teaching
from multum.progress import Progress

HALF = STEP**0.5


class MadeUp(Ladder):
    """Every rung costs what `drops` says (rungs that are not named drop 9 points); a run's own parts are left out."""

    def __init__(
        self,
        drops: dict[str, float],
        *,
        retry: int = 0,
        taught_from: int = 2,
        room: int = MAX_RUNGS,
        error: float = 0.0,
        goes_on: bool = True,
        brief: bool = False,
        untaught: Sequence[str] = (),
    ) -> None:
        self.error, self.descent = error, SimpleNamespace(goes_on=goes_on, exports=True)
        self.progress = Progress.silent()
        self.run = SimpleNamespace(budget=SimpleNamespace(max_drop=1.0))
        self.drops, self.taught_from, self.room, self.untaught = drops, taught_from, room, untaught
        self.effort = SimpleNamespace(retry=retry, brief=brief)
        self.made: list[tuple[str, str, float]] = []
        self.there: dict[str, list[Any]] = {}

    def _expect(self, rungs_done: int) -> None:
        pass

    def _origin(self, name: str) -> list[Any] | None:
        return self.there.get(name)

    def _rung(self, name: str, above: str, step: float) -> bool:
        if len(self.made) == self.room:
            return False
        self.made.append((name, above, step))
        return True

    def _teach_again(self, name: str, source: str) -> bool:
        self.made.append((name, source, 1.0))
        return self._holds(name)

    def _taught(self, name: str) -> bool:
        return name not in self.untaught and ("-" in name[5:] or int(name[5:7]) >= self.taught_from)

    def _holds(self, name: str) -> bool:
        return self._drop(name) <= 1.0

    def _error(self, name: str) -> float:
        return self.error

    def _drop(self, name: str) -> float:
        return self.drops.get(name, 9.0)


def walk(drops: dict[str, float], **options: Any) -> list[tuple[str, str, float]]:
    ladder = MadeUp(drops, **options)
    ladder.rungs()
    return ladder.made


def test_rungs_are_made_one_from_the_other_until_one_fails_and_half_a_step_fails_too() -> None:
    assert walk({"rung-01": 0, "rung-02": 0.3, "rung-03": 0.9}) == [
        ("rung-02", "rung-01", STEP),
        ("rung-03", "rung-02", STEP),
        ("rung-04", "rung-03", STEP),
        ("rung-05", "rung-03", HALF),
    ]


def test_after_half_a_step_that_holds_the_walk_goes_on_in_half_steps() -> None:
    assert walk({"rung-01": 0, "rung-03": 0.5, "rung-04": 1.0}) == [
        ("rung-02", "rung-01", STEP),
        ("rung-03", "rung-01", HALF),
        ("rung-04", "rung-03", HALF),
        ("rung-05", "rung-04", HALF),
    ]


def test_a_rung_that_holds_after_longer_teaching_is_what_the_next_is_made_from() -> None:
    assert walk({"rung-01": 0, "rung-02-longer": 0.8}, retry=4)[:4] == [
        ("rung-02", "rung-01", STEP),
        ("rung-02-longer", "rung-02", 1.0),
        ("rung-03", "rung-02-longer", STEP),
        ("rung-03-longer", "rung-03", 1.0),
    ]


def test_a_rung_is_taught_for_longer_as_long_as_that_helps_and_may_go_on() -> None:
    drops = {"rung-01": 0, "rung-02": 3.0, "rung-02-longer": 2.0, "rung-02-longer-2": 1.5, "rung-02-longer-3": 0.9}
    taught = [name for name, _, _ in walk(drops, retry=4) if name.startswith("rung-02-")]
    assert taught == ["rung-02-longer", "rung-02-longer-2", "rung-02-longer-3"]
    assert [name for name, _, _ in walk(drops, retry=2)][:4] == ["rung-02", "rung-02-longer", "rung-02-longer-2", "rung-03"]
    no_help = {**drops, "rung-02-longer-2": 2.0}
    assert [name for name, _, _ in walk(no_help, retry=4)][:4] == ["rung-02", "rung-02-longer", "rung-02-longer-2", "rung-03"]


def test_the_walk_goes_on_below_a_rung_that_misses_by_less_than_its_error() -> None:
    drops = {"rung-01": 0, "rung-02": 0.8, "rung-03": 1.4, "rung-04": 0.9, "rung-05": 3.0}
    steps = [("rung-02", "rung-01", STEP), ("rung-03", "rung-02", STEP)]
    below = [("rung-04", "rung-03", STEP), ("rung-05", "rung-04", STEP), ("rung-06", "rung-04", HALF)]
    assert walk(drops, error=0.5) == [*steps, *below]
    assert walk(drops, error=0.3)[:3] == [*steps, ("rung-04", "rung-02", HALF)]
    assert walk(drops, error=0.5, goes_on=False)[:3] == [*steps, ("rung-04", "rung-02", HALF)]


def test_where_nothing_holds_below_such_a_rung_half_a_step_is_taken_from_the_last_that_held() -> None:
    made = walk({"rung-01": 0, "rung-02": 0.8, "rung-03": 1.4, "rung-04": 1.3, "rung-06": 1.4}, error=0.5)
    assert made[2:] == [("rung-04", "rung-03", STEP), ("rung-05", "rung-04", STEP), ("rung-06", "rung-02", HALF)]


def test_after_longer_teaching_the_best_of_them_is_the_one_to_go_on_from() -> None:
    drops = {"rung-01": 0, "rung-02": 2.0, "rung-02-longer": 1.2, "rung-02-longer-2": 1.3}
    assert walk(drops, retry=4, error=0.5)[3] == ("rung-03", "rung-02-longer", STEP)


def test_going_back_passes_rungs_that_missed_by_less_than_their_error() -> None:
    made = walk({"rung-01": 1.5, "rung-02": 1.5, "rung-03": 1.4, "rung-02-taught": 0.5}, taught_from=3, error=0.5)
    assert [name for name, _, _ in made] == ["rung-02", "rung-03", "rung-04", "rung-02-taught", "rung-05"]
    assert made[-1] == ("rung-05", "rung-02-taught", HALF)


def test_untaught_rungs_are_passed_whatever_they_drop() -> None:
    made = walk({"rung-01": 0, "rung-04": 0.5}, taught_from=4)
    assert made[:4] == [
        ("rung-02", "rung-01", STEP),
        ("rung-03", "rung-02", STEP),
        ("rung-04", "rung-03", STEP),
        ("rung-05", "rung-04", STEP),
    ]


@pytest.mark.parametrize(("holds", "taught"), [("rung-03-taught", ["rung-03-taught"]), ("", ["rung-03-taught", "rung-02-taught"])])
def test_when_the_first_taught_rung_fails_those_above_are_taught_from_the_lowest_up(holds: str, taught: list[str]) -> None:
    made = walk({"rung-01": 0, holds: 0.5}, taught_from=4, brief=True)
    assert [name for name, _, _ in made] == ["rung-02", "rung-03", "rung-04", *taught]


def test_half_a_step_is_taken_from_a_rung_that_holds_once_it_is_taught() -> None:
    drops = {"rung-01": 0, "rung-02-taught": 0.5}
    made = walk(drops, taught_from=3, retry=1)
    assert [name for name, _, _ in made[:3]] == ["rung-02", "rung-03", "rung-03-longer"]
    assert made[3:5] == [("rung-02-taught", "rung-02", 1.0), ("rung-04", "rung-02-taught", HALF)]
    assert [name for name, _, _ in walk(drops, taught_from=3, brief=True)] == ["rung-02", "rung-03", "rung-02-taught"]


def test_a_brief_walk_takes_half_a_step_once_and_nothing_below_a_rung_that_misses() -> None:
    drops = {"rung-01": 0, "rung-02": 0.8, "rung-03": 1.4, "rung-04": 0.9}
    steps = [("rung-02", "rung-01", STEP), ("rung-03", "rung-02", STEP), ("rung-04", "rung-02", HALF)]
    assert walk(drops, error=0.5, brief=True) == steps
    assert walk({**drops, "rung-04": 1.5}, error=0.5, brief=True) == steps
    above = walk({"rung-01": 0, "rung-02": 0.8, "rung-03": 3.0, "rung-04-taught": 0.5}, brief=True, untaught=["rung-02", "rung-04"])
    assert above == [*steps, ("rung-04-taught", "rung-04", 1.0)]
    on = [("rung-04", "rung-03", STEP), ("rung-05", "rung-04", STEP)]
    assert walk({**drops, "rung-03": 0.9}, brief=True)[:4] == [*steps[:2], *on]


def test_an_untaught_rung_that_holds_needs_no_teaching() -> None:
    made = walk({"rung-01": 0, "rung-03": 0.2}, taught_from=4)
    assert [name for name, _, _ in made] == ["rung-02", "rung-03", "rung-04", "rung-05"]
    assert made[-1] == ("rung-05", "rung-03", HALF)


def test_the_walk_ends_where_there_is_no_room_or_no_time_and_at_the_last_rung() -> None:
    everything = {f"rung-{n:02d}": 0.0 for n in range(1, MAX_RUNGS + 5)}
    assert len(walk(everything, room=3)) == 3
    assert walk(everything)[-1][0] == f"rung-{MAX_RUNGS:02d}"


def test_where_there_is_no_room_below_untaught_rungs_are_taught() -> None:
    made = walk({"rung-01": 0, "rung-02-taught": 0.5}, taught_from=9, room=1)
    assert [name for name, _, _ in made] == ["rung-02", "rung-02-taught"]


def test_a_rung_that_another_walk_made_from_another_one_keeps_its_name() -> None:
    ladder = MadeUp({"rung-01": 0, "rung-02": 0.3, "rung-03b": 0.4})
    ladder.there = {"rung-02": ["rung-01", STEP], "rung-03": ["rung-02-longer", STEP], "rung-04": ["rung-03b", HALF]}
    ladder.rungs()
    assert ladder.made[:3] == [("rung-02", "rung-01", STEP), ("rung-03b", "rung-02", STEP), ("rung-04b", "rung-03b", STEP)]


@pytest.mark.parametrize(("lag", "fits"), [(1.0, True), (2.0, False)])
def test_the_time_limit_counts_what_comes_after_the_walk_and_the_pace_so_far(lag: float, fits: bool) -> None:
    ladder, notes = MadeUp({}), list[str]()
    ladder.run = SimpleNamespace(values={"time_limit_s": 100.0}, elapsed=lambda: 20.0, note=notes.append)
    ladder.progress = SimpleNamespace(lag=lambda: lag)
    last = sum(seconds for _, seconds in LAST)
    assert ladder._time_for("rung-04", [("rung-04: distil", 70.0 - last)]) is fits
    assert bool(notes) is not fits


def test_the_first_teaching_waits_for_the_teacher() -> None:
    def seconds(**options: Any) -> float:
        return sum(s for _, s in teaching("rung", FULL, 1000, 0.01, 0.25, **options)) - MEASURE

    assert seconds(taught=False) - seconds(taught=True) == pytest.approx(1000 * 9 * 0.01)  # a forward pass of 8 variants of each


@pytest.mark.parametrize(("low", "warned"), [(0.55, True), (0.61, False)])
def test_an_original_that_learned_nothing_is_said(low: float, warned: bool) -> None:
    """Three of five texts have one label: an interval that reaches down there shows nothing learned."""
    said: list[str] = []
    task = tiny.task(n_train=10)
    task = replace(task, targets={**task.targets, "validation": np.array([0, 1, 1, 0, 1])})
    bench = SimpleNamespace(task=task, run=SimpleNamespace(warn=said.append))
    Bench.doubt(bench, {"quality": {"value": 0.65, "ci95": [low, 0.75]}})  # type: ignore[arg-type]
    assert bool(said) is warned
    assert all("no better than guessing (65.0 %" in text and "right in 60.0 %" in text for text in said)


def landing_of(folder: Path, candidates: list[dict[str, Any]], values: dict[str, Any], max_drop: float = 1.0) -> Any:
    """What comes behind a walk, on made-up candidates, the first of which is the original; a measurement is counted in `timed`."""
    found: Any = Landing()
    found.folder, found.descent = folder, SimpleNamespace(exports=True, offers=list)
    found.progress = SimpleNamespace(stage=lambda _: nullcontext(), plan=lambda _: None)
    found.run = SimpleNamespace(
        candidates=candidates,
        budget=SimpleNamespace(max_drop=max_drop),
        values=values,
        strongest=lambda: candidates[0],
        time_again=lambda one, _: one.update(timed=one.get("timed", 0) + 1, first_p50_ms=1.0),
    )
    found.bench = SimpleNamespace(time_again=lambda targets: [{}] * len(targets), keep=lambda: None)
    return found


def candidate(name: str, drop: float = 0.0, speedup: float = 1.0) -> dict[str, Any]:
    about = {"folder": name, "target": name, "technique": "", "runtime": "onnxruntime", "precision": "int8", "validation": {}}
    return {"name": name, "drop": drop, "speedup": speedup, **about}


def test_what_another_budget_may_choose_of_is_timed_together_too(tmp_path: Path) -> None:
    """Fourteen rungs, more than are timed at a time; the faster, the worse."""
    rungs = [candidate(f"rung-{number:02d}", number / 10, number) for number in range(1, 15)]
    there, values = [candidate("original"), *rungs], {}
    for one in there:
        (tmp_path / one["target"]).mkdir()
    landing_of(tmp_path, there, values, max_drop=2.0).time_together()
    assert [one["name"] for one in rungs if "timed" in one] == [one["name"] for one in rungs[-TOGETHER:]]
    landing_of(tmp_path, there, values, max_drop=2.0).time_together()
    assert {one.get("timed", 0) for one in rungs} == {0, 1}
    landing_of(tmp_path, there, values, max_drop=0.4).time_together()
    assert all(one["timed"] for one in rungs if one["drop"] <= 0.4)
    there.insert(1, candidate("original") | {"name": "original, onnxruntime fp32"})  # that was never timed again
    landing_of(tmp_path, there, values, max_drop=0.4).time_together()
    assert there[1]["timed"] == 1


def test_what_ships_is_what_was_chosen_whenever_a_call_was_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another budget's call dies after its model is in place and before that is written down; then the first budget again."""
    rungs, disk = [candidate("rung-05"), candidate("rung-03")], {}
    for one in rungs:
        (tmp_path / one["name"]).mkdir()
        (tmp_path / one["name"] / "model.safetensors").write_text(one["name"])

    def call(best: dict[str, Any]) -> None:
        found = landing_of(tmp_path, rungs, dict(disk))
        found.run.best = lambda: best
        found.run.write = lambda: disk.update(found.run.values)
        found.time_together, found._last, found._choose_form = lambda: None, list, lambda _: None
        found.ship()

    def shipped() -> str:
        return (tmp_path / "chosen" / "model.safetensors").read_text()

    call(rungs[0])
    assert (shipped(), disk["shipped"]) == ("rung-05", "rung-05")
    whole = landing.whole_folder

    @contextmanager
    def killed(target: Path) -> Any:
        with whole(target) as work:
            yield work
        raise KeyboardInterrupt

    monkeypatch.setattr(landing, "whole_folder", killed)
    with pytest.raises(KeyboardInterrupt):
        call(rungs[1])
    assert shipped() == "rung-03"
    monkeypatch.setattr(landing, "whole_folder", whole)
    call(rungs[0])
    assert shipped() == "rung-05"


INT8, STATIC, BF16 = Form("onnxruntime", "int8"), Form("onnxruntime", "int8-mse"), Form("openvino", "bf16")


def chosen_of(ms: dict[Form, float], drops: dict[Form, float], monkeypatch: pytest.MonkeyPatch, limit: float | None = None) -> Any:
    """A landing whose rung was walked in int8, on forms that take so long; what it measures drops so much. Torch takes 9 ms."""
    times, cell = {EAGER: 9.0, **ms}, {"length": 8, "batch": 1, "what": "pass"}
    table = {
        "lengths": [8],
        "batches": [1],
        "timed": ["pass"],
        "rounds": 5,
        "present": {"form": INT8.name, "threads": 1},
        "left_out": {"onnxruntime fp32": "unknown operator"},
        "forms": [
            {**asdict(form), "name": form.name, "threads": 1, "ready_s": 1.0, "parity": {"agreement": 1.0, "kl_nats": 0.0}}
            | {"bytes": 4_000_000 if form == BF16 else 2_000_000}
            for form in times
        ],
        "times": [{"form": form.name, "threads": 1, **cell, "ms": t, "rounds_ms": [t] * 5} for form, t in times.items()],
    }
    walked = candidate("rung-04", speedup=8.0) | {"validation": {"speed": {"threads": 1}}}
    found = landing_of(Path(), [candidate("original"), walked], {"threads": 1})
    found.effort, found.seed, found.task, found.measured = SimpleNamespace(rounds=5), 0, None, []
    found.run.budget.max_size_bytes, found._forms = limit, list
    found.run.find = lambda name: next(one for one in found.run.candidates if one["name"] == name)
    found.run.best = lambda: max((one for one in found.run.candidates if one["drop"] <= 1.0), key=lambda one: one["speedup"])

    def in_form(choice: Any, _: Any) -> dict[str, Any]:
        drop = drops.get(choice.form, 0.5)
        made = candidate(f"rung-04, {choice.form.name}", drop, 8.0 * ms[INT8] / ms[choice.form])
        found.run.candidates.append(made | {"reason": f"drop {drop:g} is above 1", "technique": landing.ANOTHER})
        found.measured.append(choice.form)
        return found.run.candidates[-1]

    found._in_form = in_form
    monkeypatch.setattr(landing, "choose", lambda *_, **__: (None, table))
    found._choose_form("rung-04")
    return found


def test_what_is_faster_is_measured_and_the_next_where_it_drops_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    ms = {INT8: 1.0, STATIC: 0.8, BF16: 0.6}
    found = chosen_of(ms, {}, monkeypatch)
    assert (found.measured, found.run.best()["name"]) == ([BF16], "rung-04, openvino bf16")
    (line,) = found.run.values["runtimes"]["said"]
    assert line.startswith("Chosen: openvino bf16 on 1 thread, 1.67 (1.67 to 1.67) times as fast as onnxruntime int8 on 1 thread")
    found = chosen_of(ms, {BF16: 1.4}, monkeypatch)
    assert (found.measured, found.run.best()["name"]) == ([BF16, STATIC], "rung-04, onnxruntime int8-mse")
    assert found.run.values["runtimes"]["said"][0] == "openvino bf16 is not taken: drop 1.4 is above 1"
    found = chosen_of(ms, {BF16: 1.4, STATIC: 1.1}, monkeypatch)
    assert (found.measured, found.run.best()["name"]) == ([BF16, STATIC], "rung-04")
    assert found.run.values["runtimes"]["said"][-1] == "No gain: onnxruntime int8 on 1 thread is the fastest"
    assert found.run.values["runtimes"]["left_out"] == {"onnxruntime fp32": "unknown operator"}
    assert [row[0] for row in found.run.values["runtimes"]["rows"][1:]] == [
        f"{form.name} on 1 thread" for form in (BF16, STATIC, INT8, EAGER)
    ]


def test_where_nothing_is_faster_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    found = chosen_of({INT8: 1.0, BF16: 0.99}, {}, monkeypatch)  # by less than is worth a change
    assert found.measured == []
    assert found.run.values["runtimes"]["said"][0].startswith("No gain beyond noise over onnxruntime int8 on 1 thread, which stays")


def test_forms_above_the_bytes_asked_for_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    found = chosen_of({INT8: 1.0, STATIC: 0.8, BF16: 0.6}, {}, monkeypatch, limit=3_000_000)
    assert found.measured == [STATIC]


@pytest.mark.parametrize(("brief", "limit", "all_of_them"), [(False, None, True), (True, None, False), (True, 1000, True)])
def test_in_a_quick_run_nothing_is_tried_that_was_far_slower_before(
    brief: bool, limit: int | None, all_of_them: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the original: onnxruntime was fast in 8 bits, OpenVINO in nothing; bf16 and int8-mse it was never measured in."""
    fp32, compiled = Form("onnxruntime", "fp32"), Form("pytorch", "fp32", compiled=True)
    everything = [EAGER, compiled, fp32, INT8, STATIC, Form("openvino", "fp32"), BF16]
    took = [(EAGER, 8.0), (INT8, 1.0), (fp32, 2.0), (Form("openvino", "fp32"), 3.0)]
    there = [
        candidate("original") | {"runtime": form.runtime, "precision": form.precision, "validation": {"speed": {"p50_ms": ms}}}
        for form, ms in took
    ]
    found = landing_of(Path(), there, {})
    found.run.strongest, found.effort, found.task = lambda: there[1], SimpleNamespace(brief=brief), None
    found.run.budget.max_size_bytes = limit
    monkeypatch.setattr(landing, "candidates", lambda task: everything)
    assert found._forms() == (everything if all_of_them else [INT8, STATIC])
