"""A target's process as `measure` sees it: started, asked over a pipe, ended. `_measure_worker` is what runs in it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from .errors import MultumError
from .targets import Way


class Worker:
    """A target's process."""

    def __init__(self, target: Path | Way, threads: int) -> None:
        way = target if isinstance(target, Way) else Way(Path(target), threads)
        self.target, self.threads = way.target, way.threads
        self._how = ["exact"] * (way is target) + ["compiled"] * way.compiled
        self.facts: dict[str, Any] = {}
        self.columns: list[int] | None = None
        self.times: list[list[float]] = []
        self.tokenizing: list[float] = []
        self.throughput = self.memory = 0.0
        self.predictions = np.empty(0)
        self.lengths: list[list[int]] = []
        self.writing: dict[str, Any] = {}
        self.paces: list[list[dict[str, float]]] = []

    def __enter__(self) -> Worker:
        environment = os.environ | {name: str(self.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "multum._measure_worker", str(self.target), str(self.threads), *self._how],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            encoding="utf-8",
            env=environment,
        )
        return self

    def __exit__(self, *_: Any) -> None:
        self._process.kill()
        self._process.communicate()
        self._log.close()

    def ask(self, do: str, **order: Any) -> Any:
        assert self._process.stdin  # noqa: S101 - opened as a pipe
        try:
            self._process.stdin.write(json.dumps({"do": do, **order}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it died; what it said is read below
        return self.receive()

    def receive(self) -> Any:
        assert self._process.stdout  # noqa: S101 - opened as a pipe
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            self._log.seek(0)
            said = (self._log.read().strip().splitlines() or ["it said nothing"])[-1]
            reason = "it was killed, perhaps for want of memory" if code < 0 else said
            raise MultumError(f"measuring {self.target} failed: {reason} (exit code {code})")
        reply = json.loads(line)
        if "error" in reply:
            raise MultumError(f"measuring {self.target} failed: {reply['error']}")
        return reply["result"]
