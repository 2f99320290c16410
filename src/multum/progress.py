"""How far a long run is and how long it will still take.

Work is done in named stages. Whoever plans it says beforehand which stages are to come and how long each may take; what is
shown as time left is the rest of the running stage, from its own pace as soon as it has one, plus what is planned after it.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bars

from .core.reporting import listening

PACE_KNOWN = 0.05
"""Share of a stage after which its own pace says more than the plan."""

TRUST = 30.0
"""Seconds of planned work that are taken to be as planned before anything is known."""


class Progress:
    """Shows the running stage and the time left on a terminal; on anything else one line per finished stage."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console
        self._plan: list[tuple[str, float]] = []
        self._done: list[dict[str, Any]] = []
        self._bars: Bars | None = None
        self._started = self._expected = self._fraction = 0.0

    @classmethod
    def silent(cls) -> Progress:
        """Keeps the times and shows nothing."""
        return cls(Console(quiet=True))

    def plan(self, stages: Iterable[tuple[str, float]]) -> None:
        """Replace what is expected to come after the running stage: (name, seconds) each."""
        self._plan = list(stages)

    def plan_first(self, stages: Iterable[tuple[str, float]]) -> None:
        """Put stages before those that are expected."""
        self._plan = [*stages, *self._plan]

    def stages(self) -> list[dict[str, Any]]:
        """Name, seconds and planned seconds (0 for none) of every stage that is over, in order."""
        return list(self._done)

    def recall(self, stages: Iterable[Mapping[str, Any]]) -> None:
        """Put the stages of an earlier, interrupted run before those of this one."""
        self._done = [dict(stage) for stage in stages] + self._done

    def seconds_left(self) -> float:
        """The rest of the running stage and the plan, at the pace of the stages so far."""
        return self._rest() + self.lag() * sum(seconds for _, seconds in self._plan)

    def lag(self) -> float:
        """How many times longer than planned the planned stages took so far; near 1 until they have taken a while."""
        planned = [stage for stage in self._done if stage.get("planned")]
        return float((TRUST + sum(s["seconds"] for s in planned)) / (TRUST + sum(s["planned"] for s in planned)))

    def say(self, text: str) -> None:
        """One line beside the stages."""
        (self._console or Console(stderr=True)).print(text, highlight=False, markup=False, soft_wrap=True)

    def update(self, fraction: float) -> None:
        """The running stage is done to this share, 0 to 1."""
        self._fraction = fraction
        if self._bars:
            self._bars.update(self._bars.task_ids[0], completed=100 * fraction, left=_clock(self.seconds_left()))

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Run one stage, which may `report` how far it is. One that fails is not written down as done."""
        planned = next((item for item in self._plan if item[0] == name), None)
        if planned:
            self._plan.remove(planned)
        self._started, self._fraction = time.monotonic(), 0.0
        self._expected = planned[1] if planned else 0.0
        console = self._console or Console(stderr=True)
        self._bars = Bars(
            TextColumn("{task.description:36}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %"),
            TextColumn("{task.fields[left]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        try:
            with (
                self._bars,
                listening(self.update, None if console.quiet else lambda text: console.print(f"  {text}", style="dim")),
            ):
                self._bars.add_task(name, total=100, left=_clock(self.seconds_left()))
                yield
        finally:
            self._bars = None
        seconds = round(time.monotonic() - self._started, 1)
        self._done.append({"name": name, "seconds": seconds, "planned": round(self._expected, 1)})
        console.print(
            f"  {name:44} {seconds:6.1f} s   [dim]{_clock(self.lag() * sum(s for _, s in self._plan))}[/dim]", highlight=False
        )

    def _rest(self) -> float:
        spent = time.monotonic() - self._started
        if self._fraction > PACE_KNOWN:
            return spent * (1 - self._fraction) / self._fraction
        return max(0.0, self._expected - spent)


def _clock(seconds: float) -> str:
    if seconds < 1:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    return f"about {minutes}:{rest:02d} left" if minutes else f"about {rest} s left"
