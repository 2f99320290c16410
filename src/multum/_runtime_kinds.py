"""What is timed of a model, and how a form of it is known to answer as torch does.

Of a model that reads whole passes over rows are timed. Of one that writes, causal or an encoder-decoder, the time to read a text
and that for each token behind it are timed apart: runtimes that are alike in one may differ tenfold in the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from . import runtimes
from ._measure_process import Worker
from ._pace import NEW
from ._runtime_inputs import fills, words, writes
from ._runtime_table import EAGER, KNOWN_AS, PASS, READ, WRITE, Form
from .core.folders import read_json
from .errors import ParityError
from .runtimes._parity import compare, problem

CHECKED = 32
"""Inputs on which answers are compared at most."""
BRIEF = 8, 60
"""Texts of a masked model that are compared, and characters of each: every hidden token has a whole vocabulary of numbers."""
SAME = {"max_difference": 0.0, "agreement": 1.0, "kl_nats": 0.0}


class Reads:
    """Models that read: their outputs are compared, and whole passes are timed.

    Args:
        inputs: the first ones are compared.
    """

    timed: ClassVar[dict[str, int]] = {PASS: 1}
    """What is timed at once, and how often it comes in a trial."""

    def __init__(self, inputs: Sequence[Any]) -> None:
        self.inputs, self.kind = list(inputs[:CHECKED]), ""
        self._expected: list[np.ndarray] = []

    def answer(self, worker: Worker) -> None:
        """Let it answer once."""
        worker.ask("items", texts=self.inputs[:1])

    def parity(self, form: Form, target: Path, worker: Worker, kind: str) -> dict[str, Any]:
        """How far a form agrees with torch, which has to come first.

        Raises:
            ParityError: not far enough.
        """
        del target
        found = [np.array(rows, dtype=np.float32) for rows in worker.ask("items", texts=self.inputs)]
        if form == EAGER:
            self._expected, self.kind = found, kind
        if [rows.shape for rows in self._expected] != [rows.shape for rows in found]:
            raise ParityError("it reads the inputs in other tokens than torch")
        parity = {"n": len(self.inputs), **compare(self.kind, self._expected, found)}
        if reason := problem(form.precision, parity, max(float(np.abs(rows).max()) for rows in self._expected)):
            raise ParityError(f"it answers differently: {reason}")
        return parity

    def time(self, worker: Worker, ids: Sequence[int], batch: int, threads: int, warm_up: int) -> list[float]:
        """Milliseconds of what is timed, behind some untimed."""
        return [worker.ask("pass", ids=ids, batch=batch, threads=threads, warm_up=warm_up)]


class Fills(Reads):
    """Masked language models: the same on the beginnings of a few texts. More was compared when they were exported."""

    def __init__(self, inputs: Sequence[Any]) -> None:
        texts, count = BRIEF
        super().__init__([" ".join(words(one))[:count] for one in inputs[:texts]])


class Writes(Reads):
    """Models that write: what was proved at export is believed; reading a text and writing a token are timed apart."""

    timed: ClassVar[dict[str, int]] = {READ: 1, WRITE: NEW}

    def answer(self, worker: Worker) -> None:
        ids = worker.ask("ids", text=words(self.inputs)[0], length=CHECKED)
        worker.ask("write", ids=ids, new=2, threads=worker.threads, warm_up=0)

    def parity(self, form: Form, target: Path, worker: Worker, kind: str) -> dict[str, Any]:
        """As the export folder has it: what torch and the export say of every token is too much to be sent."""
        return dict(read_json(target / "runtime.json")["parity"]) if form.folder else {"n": len(self.inputs), **SAME}

    def time(self, worker: Worker, ids: Sequence[int], batch: int, threads: int, warm_up: int) -> list[float]:
        return list(worker.ask("write", ids=ids, new=NEW, threads=threads, warm_up=warm_up))


def kind_of(task: Any) -> Reads:
    """How the forms of a task's models are tried."""
    kind = Writes if writes(task) else Fills if fills(task) else Reads
    return kind(list(task.inputs("validation")))


def candidates(precision: str = "", task: Any = None) -> list[Form]:
    """Every form that there is for the models of a task, of one precision or of all; torch eager is always among them.

    Of ways to calibrate the last one stands for all: they differ in where ranges end, and take the same time. torch compiles what
    reads: what writes has another shape with every token, and a masked model is asked for a few tokens of each window.

    Args:
        precision: as `Form.has` takes it.
        task: by default one whose models are encoders.
    """
    found = [EAGER] if task and (writes(task) or fills(task)) else [EAGER, Form(EAGER.runtime, EAGER.precision, compiled=True)]
    for name in runtimes.names():
        module = runtimes.find(name)
        taken = getattr(module, "TASKS", None)
        if name != EAGER.runtime and (taken is None or (task and task.name in taken)):
            further = getattr(module, "WRITING", ()) if task and writes(task) else getattr(module, "CALIBRATED", ())[-1:]
            found += [Form(name, each) for each in (*module.PRECISIONS, *further)]
    return [form for form in found if form == EAGER or form.has(precision)]


def precisions() -> list[str]:
    """Those of all forms of all models."""
    modules = [runtimes.find(name) for name in runtimes.names()]
    return sorted({*KNOWN_AS.values()}.union(*((*one.PRECISIONS, *getattr(one, "CALIBRATED", ())[-1:]) for one in modules)))
