"""What tasks can be asked for beside their data: from recipes, from the command line; and steps that need no data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
from typer.testing import CliRunner

from multum import cli, recipe
from multum._run import run
from multum.core.folders import read_json
from multum.core.model import Model
from multum.data import open_task, open_without_data
from multum.errors import InputError
from multum.targets import open_for
from multum.task_options import checked, known


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A causal and a masked language model, and texts as they need them."""
    folder = tmp_path_factory.mktemp("language")
    for family in ("llama", "bert"):
        tiny.language_model(family, layers=1).save(folder / family)
    (folder / "books").mkdir()
    (folder / "books" / "a.txt").write_text("\n\n".join(tiny.passages(40)), encoding="utf-8")
    splits = tiny.text_splits(24, 8, 8)
    (folder / "data").mkdir()
    for name in ("train", "validation", "test"):
        getattr(splits, name).to_json(folder / "data" / f"{name}.jsonl")
    return folder


def test_every_task_tells_its_options() -> None:
    assert {"packed", "whole_words", "max_length"} == set(known("fill-mask"))
    assert {"packed", "max_length"} == set(known("text-generation"))
    assert {"languages", "prefix", "beams", "max_new_tokens", "length_penalty", "max_length"} == set(known("translation"))
    assert known("text-classification") == {"max_length": int | None}


def test_values_are_read_as_their_types_say() -> None:
    assert checked("fill-mask", {"packed": "false", "whole_words": True, "max_length": "32"}) == {
        "packed": False,
        "whole_words": True,
        "max_length": 32,
    }
    assert checked("translation", {"languages": ["en", "it"]}) == {"languages": ("en", "it")}
    with pytest.raises(InputError) as raised:
        checked("text-generation", {"packed": "perhaps", "whole_words": True})
    assert len(raised.value.problems) == 2
    assert "options: packed: " in raised.value.problems[0]
    assert "text-generation has no 'whole_words'; there are: max_length, packed" in raised.value.problems[1]


def test_a_recipe_has_them_and_what_measures_its_models_later(place: Path, tmp_path: Path) -> None:
    entries = {
        "model": str(place / "bert"),
        "task": "fill-mask",
        "data": str(place / "data"),
        "steps": [{"finetune": {"epochs": 1}}],
    }
    with pytest.raises(InputError, match="fill-mask has no 'beams'"):
        recipe.parse({**entries, "options": {"beams": 2}})
    written = recipe.parse({**entries, "options": {"packed": False, "whole_words": True, "max_length": 24}})
    run(written, tmp_path / "out", threads=1, rounds=3)
    opened = open_for(tmp_path / "out" / "model", data="", task="", columns="", seed=None)
    assert (opened.packed, opened.whole_words, opened.max_length) == (False, True, 24)
    assert read_json(tmp_path / "out" / "run.json")["recipe"]["options"] == written.options
    model = Model.load(tmp_path / "out" / "model", auto_class="AutoModelForMaskedLM")
    whole = open_task("fill-mask", str(place / "data"))
    assert len(opened.encode(model, "train")) > len(whole.encode(model, "train"))


def test_a_step_that_brings_its_own_text_needs_no_data(place: Path, tmp_path: Path) -> None:
    fields = ["--text", str(place / "books"), "--steps", "2", "--batch-size", "2", "--block", "16"]
    command = ["apply", "pretrain", str(place / "llama"), "--task", "text-generation", "-o", str(tmp_path / "out"), *fields]
    result = CliRunner().invoke(cli.app, command)
    assert result.exit_code == 0, result.output
    history = json.loads((tmp_path / "out" / "recipe.json").read_text(encoding="utf-8"))["steps"]
    assert history[-1]["tokens"] == 2 * 2 * 16
    with pytest.raises(InputError, match=r"--data is missing: .* fill-mask and text-generation take none"):
        open_without_data("text-classification")


@pytest.mark.parametrize("step", ["quantize", "quantize_embeddings", "prune_weights", "drop_layers --keep 1"])
def test_nor_does_one_that_looks_at_weights_alone(place: Path, tmp_path: Path, step: str) -> None:
    name, *fields = step.split()
    command = ["apply", name, str(place / "llama"), "--task", "text-generation", "-o", str(tmp_path / "out"), *fields]
    result = CliRunner().invoke(cli.app, command)
    assert result.exit_code == 0, result.output
    history = json.loads((tmp_path / "out" / "recipe.json").read_text(encoding="utf-8"))["steps"]
    assert [entry["step"] for entry in history] == [name]


@pytest.mark.parametrize("step", ["quantize --keep-share 0.1", "drop_layers --keep 1 --which importance", "wanda"])
def test_and_with_fields_that_take_texts_it_does(place: Path, tmp_path: Path, step: str) -> None:
    name, *fields = step.split()
    command = ["apply", name, str(place / "llama"), "--task", "text-generation", "-o", str(tmp_path / "out"), *fields]
    result = CliRunner().invoke(cli.app, command)
    assert result.exit_code == 2
    assert f"--data is missing: {name} works on the task's data" in " ".join(result.output.split())


def test_any_other_step_says_that_it_needs_data(place: Path, tmp_path: Path) -> None:
    command = [
        "apply",
        "finetune",
        str(place / "bert"),
        "--task",
        "fill-mask",
        "-o",
        str(tmp_path / "out"),
        "--options",
        "packd=no",
    ]
    result = CliRunner().invoke(cli.app, command)
    assert result.exit_code == 2
    assert "--data is missing: finetune works on the task's data" in " ".join(result.output.split())


def test_the_command_line_has_them(place: Path, tmp_path: Path) -> None:
    command = ["apply", "finetune", str(place / "bert"), "--task", "fill-mask", "--data", str(place / "data"), "--epochs", "1"]
    result = CliRunner().invoke(cli.app, [*command, "--options", "whole_words=true,packed=false", "-o", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    result = CliRunner().invoke(cli.app, [*command, "--options", "beams=2", "-o", str(tmp_path / "other")])
    assert result.exit_code == 2
    assert "fill-mask has no 'beams'" in result.output
