"""Steps that train in two processes (gloo, through torchrun) end as in one, and one of the two writes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import step_processes
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from step_processes import DRAWN, LESSONS, TRAINING, made

from multum import _run, _shrink
from multum.core import training
from multum.core.model import Model
from multum.errors import InputError
from multum.steps.distill import Distill
from multum.steps.distill_layers import DistillLayers

pytestmark = pytest.mark.usefixtures("one_thread")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes left."""
    folder = tmp_path_factory.mktemp("two")
    started(str(Path(step_processes.__file__)), str(folder))
    return folder


@pytest.fixture
def plain_descent(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(training, "_arguments", training._arguments)  # to be put back
    step_processes.plain_descent()
    return None


def started(*command: str, code: int = 0) -> str:
    done = subprocess.run(
        [*TORCHRUN, *command], env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    assert bool(done.returncode) == bool(code), done.stderr
    return done.stdout + done.stderr


@pytest.mark.usefixtures("plain_descent")
@pytest.mark.parametrize("name", LESSONS)
def test_weights_and_loss_are_those_of_one_process(name: str, both: Path, tmp_path: Path) -> None:
    for each in ("teacher", "student"):
        shutil.copytree(both / name / each, tmp_path / name / each)
    model, start = made(name, tmp_path), load_file(both / name / "student" / "model.safetensors")
    one, first, second = model.module.state_dict(), *(load_file(both / f"{name}-{rank}.safetensors") for rank in (0, 1))
    assert all(torch.equal(value, second[key]) for key, value in first.items())
    assert one.keys() == first.keys()
    assert max((value - first[key]).abs().max().item() for key, value in start.items()) > 1e-3
    assert max((value - first[key]).abs().max().item() for key, value in one.items()) < 2e-5
    if model.history:
        with safe_open(both / f"{name}-1.safetensors", "pt") as file:
            assert float(file.metadata()["loss"]) == pytest.approx(model.history[-1]["training"]["loss"], abs=2e-4)


def test_processes_agree_on_what_the_student_learnt_of_its_own_texts(both: Path) -> None:
    first, second = (load_file(both / f"{DRAWN}-{rank}.safetensors") for rank in (0, 1))
    assert all(torch.equal(value, second[key]) for key, value in first.items())


def test_one_process_writes(both: Path) -> None:
    main, other = (json.loads((both / f"written-{rank}.json").read_text()) for rank in (0, 1))
    assert other == []
    for name in LESSONS:
        assert str(both / name / "taught") in main
        beside = name in ("layers alone", "pairs")  # the teacher is, and nothing of it is kept
        assert beside or any(path.startswith(str(both / name / "kept")) for path in main), name
    assert not list(both.rglob("*.part"))


def test_a_step_can_be_applied_under_torchrun(tmp_path: Path) -> None:
    tiny.model(layers=3, seed=1).save(tmp_path / "teacher")
    tiny.model(seed=2).save(tmp_path / "student")
    rows = tiny.splits(40, 8, 8).train
    text = "\n".join(["text,label", *(f"{text},{label}" for text, label in zip(rows["text"], rows["label"], strict=True))])
    (tmp_path / "data.csv").write_text(text + "\n")
    where = ["--task", "text-classification", "--data", str(tmp_path / "data.csv"), "-o", str(tmp_path / "out")]
    fields = ["--teacher", str(tmp_path / "teacher"), "--epochs", "1", "--cache", str(tmp_path / "kept")]
    apply = ["-m", "multum", "apply", "distill", str(tmp_path / "student"), *where, *fields]
    assert "cannot be shared by 2 processes" in started(*apply, "--batch-size", "7", code=1)
    assert not (tmp_path / "out").exists()
    said = started(*apply, "--batch-size", "8")
    assert said.count("million parameters before") == 1
    assert Model.load(tmp_path / "out", auto_class="AutoModelForSequenceClassification").history[-1]["step"] == "distill"


def test_what_cannot_be_shared_and_what_runs_alone_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    for fields in ({"batch_size": 7}, {"batch_size": 8, "accumulate": 8}):
        with pytest.raises(InputError, match="cannot be shared by 2 processes"):
            Distill(teacher="teacher", **{**TRAINING, **fields})
    with pytest.raises(InputError, match="7 examples cannot be shared by 2 processes"):
        DistillLayers(teacher="teacher", **{**TRAINING, "batch_size": 7})
    for call in (lambda: _run.run("recipe.yaml", tmp_path), lambda: _shrink.shrink("m", task="t", data="d", output=tmp_path)):
        with pytest.raises(InputError, match="runs in one process; start it without torchrun"):
            call()
