"""What is done, what is planned, and the time left."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from multum import progress as module
from multum.core.reporting import report
from multum.progress import Progress


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module.time, "monotonic", clock)
    return clock


def test_time_left_is_the_rest_of_the_stage_and_the_plan(clock: Clock) -> None:
    progress = Progress.silent()
    progress.plan([("a", 10.0), ("b", 20.0)])
    assert progress.seconds_left() == 30.0
    with progress.stage("a"):
        clock.now += 4
        assert progress.seconds_left() == 26.0  # as planned, as long as nothing better is known
        report(0.5)
        assert progress.seconds_left() == 24.0  # 4 s for the first half, so 4 for the second
    pace = (module.TRUST + 4) / (module.TRUST + 10)  # what is still to come takes as much longer or less as what is over
    with progress.stage("unplanned"):
        assert progress.seconds_left() == pytest.approx(20.0 * pace)
    assert progress.stages() == [
        {"name": "a", "seconds": 4.0, "planned": 10.0},
        {"name": "unplanned", "seconds": 0.0, "planned": 0.0},
    ]


def test_a_stage_that_takes_longer_than_planned_has_no_negative_rest(clock: Clock) -> None:
    progress = Progress.silent()
    progress.plan([("a", 1.0)])
    with progress.stage("a"):
        clock.now += 60
        assert progress.seconds_left() == 0.0


def test_a_stage_that_fails_is_not_done(clock: Clock) -> None:
    progress = Progress.silent()
    with pytest.raises(ValueError, match="stop"), progress.stage("a"):
        raise ValueError("stop")
    assert progress.stages() == []
    report(0.5)  # nobody listens any more


def test_stages_of_an_earlier_call_come_first(clock: Clock) -> None:
    progress = Progress.silent()
    with progress.stage("b"):
        pass
    progress.recall([{"name": "a", "seconds": 3.0}])
    assert [stage["name"] for stage in progress.stages()] == ["a", "b"]


def test_without_a_terminal_there_is_one_line_for_every_stage(clock: Clock) -> None:
    out = io.StringIO()
    progress = Progress(Console(file=out, width=100))
    progress.plan([("first", 5.0), ("second", 75.0)])
    with progress.stage("first"):
        clock.now += 5
        report(0.3)
    with progress.stage("second"):
        pass
    lines = out.getvalue().splitlines()
    assert re.fullmatch(r"\s*first\s+5\.0 s\s+about 1:15 left\s*", lines[0])
    assert re.fullmatch(r"\s*second\s+0\.0 s\s*", lines[1])
    assert len(lines) == 2


def test_on_a_terminal_the_running_stage_is_shown(clock: Clock) -> None:
    out = io.StringIO()
    progress = Progress(Console(file=out, width=120, force_terminal=True))
    progress.plan([("first", 60.0)])
    with progress.stage("first"):
        report(0.25)
    assert "first" in out.getvalue()
    assert "about 1:00 left" in out.getvalue()
