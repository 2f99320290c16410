"""What training is said to take: bytes against sums by hand, and nothing changed by asking."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import test_training
import tiny
import torch
from torch import nn

from multum.core import estimate as estimate_module
from multum.core.estimate import Estimate, estimate, is_long
from multum.core.reporting import anyone_reads, listening, remark
from multum.core.training import fit, pad
from multum.steps.finetune import Finetune

WIDTH, TOKENS = 8, 5


class Toy(nn.Module):
    """exp(V x) of inputs repeated `WIDTH` times, V the weights W in double precision and back; a softmax takes what comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, 3, bias=False)
        self.other = nn.Linear(7, 1, bias=False).requires_grad_(False)

    def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        weights = self.inner.weight.double().float()
        return {"logits": (input_ids.float()[..., None].repeat(1, 1, WIDTH) @ weights.T).exp()}


def rows(*lengths: int) -> list[dict[str, Any]]:
    return [{"input_ids": [1] * length, "index": 0, "labels": 0} for length in lengths]


def test_bytes_are_weights_gradients_moments_and_what_is_alive_at_a_time() -> None:
    """Of one row of the longest: x, V x and exp(V x), or in the end x, exp(V x) and its softmax. V comes once."""
    toy = Toy()
    found = estimate(toy, rows(2, TOKENS, 3), lambda some: pad(some, 0), examples=300, at_once=16)
    row, cast = TOKENS * (WIDTH + 3 + 3) * 4, WIDTH * 3 * 4
    scalars = 4 + 4  # the mean, and the sum of the means of all outputs
    assert found.bytes == pytest.approx(4 * (24 + 7) + 3 * 4 * 24 + cast + 16 * row * (1 + estimate_module.HELD), abs=scalars)
    assert toy.inner.weight.grad is None
    assert 0 < found.free <= psutil.virtual_memory().total + 1000


def test_time_grows_with_the_tokens() -> None:
    few, many = (estimate(Toy(), rows(2, 6), lambda some: pad(some, 0), examples=n, at_once=1) for n in (1e3, 1e9))
    assert many.seconds > 1000 * few.seconds > 0


def test_it_is_said_in_words() -> None:
    assert Estimate(20, 2_000_000_000, 3_000_000_000).line() == "about 20 seconds and 2.0 GB of memory"
    assert Estimate(600, 1_000_000_000, 3_000_000_000).line() == "about 10 minutes and 1.0 GB of memory"
    less = "; accumulate, checkpointing or a smaller batch takes less"
    said = Estimate(9000, 4_000_000_000, 3_000_000_000).line()
    assert said == f"about 2.5 hours and 4.0 GB of memory, more than the 3.0 GB that are free{less}"
    said = Estimate(20, 2_500_000_000, 3_000_000_000).line()
    assert said == f"about 20 seconds and 2.5 GB of memory, nearly all of the 3.0 GB that are free{less}"


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells the peak of a piece of work")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_real_training_takes_what_was_said(precision: str) -> None:
    """Texts of 300 to 500 tokens in a process of their own, whose highest resident set is compared."""
    command = [sys.executable, str(Path(__file__).parent / "estimated_process.py"), precision]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600)
    said, took = map(float, done.stdout.split()[-2:])
    assert took > 3e8
    assert 0.75 * took < said < 1.5 * took


def test_short_training_is_not_worth_it() -> None:
    assert not is_long(tiny.model().module, 1000)
    assert is_long(tiny.model().module, 1e9)


def test_asking_changes_no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate_module, "WORTH", 0)
    said: list[str] = []
    start, options = tiny.model(), {**test_training.QUICK, "dropout": True, "epochs": 2, "batch_size": 8}
    plain, asked = start.copy(), start.copy()
    fit(plain, test_training.rows_of(plain), test_training.label_loss, **options)
    with listening(lambda share: None, said.append):
        assert anyone_reads()
        fit(asked, test_training.rows_of(asked), test_training.label_loss, **options)
    assert not anyone_reads()
    remark("to nobody")
    assert test_training.same(plain.module, asked.module)
    (line,) = said
    assert line.startswith("32 examples in 2 epochs: about ")
    assert "GB of memory" in line


def test_adapters_take_less_and_checkpointing_keeps_less(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate_module, "WORTH", 0)
    found: list[Estimate] = []
    monkeypatch.setattr(Estimate, "line", lambda self: found.append(self) or "")
    task, model = tiny.task(n_train=16), tiny.model(layers=4)
    with listening(lambda share: None, lambda text: None):
        for options in ({}, {"lora": {"rank": 1}}, {"checkpointing": True}, {"accumulate": 4}):
            Finetune(epochs=1, batch_size=16, precision="fp32", **options)(model, task)
    whole, *less = (each.bytes for each in found)
    assert max(less) < whole


def test_the_time_is_that_of_a_whole_batch_once_its_kernels_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that moves 1 s a pass, and 0.5 s more in the first one of every shape."""
    seen: set[tuple[int, ...]] = set()
    clock = [0.0]

    class Slow(Toy):
        def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
            clock[0] += 1.0 if input_ids.shape in seen else 1.5
            seen.add(tuple(input_ids.shape))
            return super().forward(input_ids)

    monkeypatch.setattr(estimate_module.time, "perf_counter", lambda: clock[0])
    found = estimate(Slow(), rows(*[4] * 32), lambda some: pad(some, 0), examples=80, at_once=8)
    assert found.seconds == pytest.approx(10)
