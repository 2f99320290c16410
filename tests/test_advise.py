"""Advice: its profile against slow counts, its estimates against what the steps then give, its recipe by running it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_families
import torch
from typer.testing import CliRunner

import multum
from multum import _advice_estimates, recipe
from multum._advice import TECHNIQUES
from multum._advice_sources import GOALS, OWN
from multum._advise import write_recipe
from multum.cli import app
from multum.core.parts import parts_of
from multum.core.profile import profile
from multum.core.step import find, names
from multum.errors import InputError

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
ADVISABLE = ("bert", "distilbert", "llama", "gpt2")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder, splits = tmp_path_factory.mktemp("data"), tiny.splits()
    for name in ("train", "validation", "test"):
        getattr(splits, name).to_csv(folder / f"{name}.csv", index=False)
    return str(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model") / "bert"
    tiny.model(layers=4).save(folder)
    return str(folder)


def advice(model: str, data: str, **options: Any) -> dict[str, Any]:
    return multum.advise(model, task="text-classification", data=data, **options)


def entry(found: dict[str, Any], name: str) -> dict[str, Any]:
    return next(one for one in [*found["use"], *found["leave"]] if one["name"] == name)


def estimate(found: dict[str, Any], name: str, what: str) -> dict[str, Any]:
    return next(one for one in entry(found, name)["estimates"] if one["what"] == what)


@pytest.mark.parametrize("family", [*ADVISABLE, *(name for name in tiny_families.FAMILIES if name not in ADVISABLE)])
def test_the_parts_add_up_to_the_whole(family: str, tmp_path: Path) -> None:
    module = tiny.model(family).module
    whole, parts = profile(module), parts_of(module)
    assert sum(part.parameters for part in parts.values()) == whole["parameters"]
    assert sum(part.nonzero_parameters for part in parts.values()) == whole["nonzero_parameters"]
    for key in whole["macs"]:
        assert sum((part.macs or {})[key] for part in parts.values()) == whole["macs"][key]
    module.save_pretrained(tmp_path)
    size = (tmp_path / "model.safetensors").stat().st_size
    header = int.from_bytes((tmp_path / "model.safetensors").read_bytes()[:8], "little")
    assert sum(part.bytes for part in parts.values()) == size - header - 8


def test_every_step_has_a_row_or_is_no_technique_for_a_trained_model() -> None:
    others = {"int8"}
    apart = {"pretrain", "reconstruct", "distill_generation"}  # for a new model, after a cut, for those that write
    assert set(TECHNIQUES) - others == set(names()) - apart
    for name in set(TECHNIQUES) - others:
        assert TECHNIQUES[name].does


def test_what_is_never_used_is_counted_and_the_step_gives_what_was_said(model: str, data: str) -> None:
    found, task = advice(model, data), tiny.task()
    loaded = task.load(model)
    ids = {token for text in task.inputs("train") for token in loaded.tokenizer(text)["input_ids"]}
    assert found["profile"]["vocabulary"]["used"] == len(ids)
    trimmed = find("trim_vocabulary")()(loaded, task)
    said = estimate(found, "trim_vocabulary", "bytes")
    assert said["before"] == sum(part.bytes for part in parts_of(loaded.module).values())
    assert said["after"] == sum(part.bytes for part in parts_of(trimmed.module).values())
    assert said["basis"] == _advice_estimates.ARITHMETIC
    shorter = find("drop_layers")(keep=2, which="alternate")(loaded, task)
    assert estimate(found, "drop_layers", "bytes")["after"] == sum(part.bytes for part in parts_of(shorter.module).values())


def test_goals_change_what_is_used(model: str, data: str) -> None:
    used = {goal: [one["name"] for one in advice(model, data, goal=goal)["use"]] for goal in GOALS}
    assert "trim_vocabulary" in used["smaller"]
    assert "trim_vocabulary" not in used["faster"]
    assert "distill" in used["both"]
    assert not {"distill", "finetune"} & set(used["no-training"])
    assert not {"distill", "trim_vocabulary"} & set(used["private"])
    zeros = entry(advice(model, data), "wanda")
    assert "leave its speed unchanged" in zeros["why"]
    assert estimate(advice(model, data), "wanda", "bytes")["after"] == estimate(advice(model, data), "wanda", "bytes")["before"]


@pytest.mark.parametrize("family", ADVISABLE)
def test_the_recipe_runs(family: str, data: str, tmp_path: Path) -> None:
    tiny.model(family, layers=2).save(tmp_path / "m")
    found = advice(str(tmp_path / "m"), data, goal="no-training")
    write_recipe(tmp_path / "r.yaml", found)
    read = recipe.read(tmp_path / "r.yaml")
    assert [step.name for step in read.steps] == [next(iter(s)) if isinstance(s, dict) else s for s in found["recipe"]["steps"]]
    if family == "bert":
        made = multum.run(read, tmp_path / "run", threads=1)
        assert made["stages"]
    with pytest.raises(InputError, match="exists already"):
        write_recipe(tmp_path / "r.yaml", found)


def test_a_recipe_that_teaches_is_accepted(model: str, data: str, tmp_path: Path) -> None:
    write_recipe(tmp_path / "r.yaml", advice(model, data, goal="both"))
    assert [step.name for step in recipe.read(tmp_path / "r.yaml").steps][-1] == "distill"


def test_a_model_that_was_shrunk_and_one_that_nobody_knows(model: str, data: str, tmp_path: Path) -> None:
    tiny.uneven(tiny.model(layers=3)).save(tmp_path / "uneven")
    found = advice(str(tmp_path / "uneven"), data)
    whole = profile(tiny.uneven(tiny.model(layers=3)).module)
    assert sum(part["parameters"] for part in found["profile"]["parts"].values()) == whole["parameters"]
    found = multum.advise(model, task="text-classification")
    assert found["recipe"] is None
    assert any("without data" in note for note in found["notes"])


def test_every_estimate_says_how_it_was_made(model: str, data: str) -> None:
    bases = {_advice_estimates.ARITHMETIC, _advice_estimates.MEASURED, _advice_estimates.PUBLISHED}
    found = advice(model, data)
    for one in [*found["use"], *found["leave"]]:
        for each in one["estimates"]:
            assert each["basis"] in bases
            assert each["source"]


def test_figures_of_our_own_are_those_of_the_benchmarks() -> None:
    """What the table of advice quotes stands in the results."""
    source = "".join(
        (Path(multum.__file__).parent / name).read_text(encoding="utf-8") for name in ("_advice.py", "_advice_estimates.py")
    )
    one_shot = json.loads((RESULTS / "one_shot.json").read_text(encoding="utf-8"))["models"]
    known = {f"{each['quality']['value']:.4f}" for each in one_shot.values()}
    quoted = set(re.findall(r"0\.[78]\d{3}", source))
    assert quoted
    assert quoted <= known
    quick = json.loads((RESULTS / "reviews_quick.json").read_text(encoding="utf-8"))["median"]
    drop, faster = quick["drop"]["median"], quick["over_strongest"]["median"]
    assert f"{drop:.1f} points lost at {faster:.2f} times the speed of the original's int8" in source
    assert OWN.startswith("benchmarks/results/reviews_quick.md")


def test_the_command(model: str, data: str, tmp_path: Path) -> None:
    arguments = ["advise", model, "--task", "text-classification", "--data", data]
    done = CliRunner().invoke(app, [*arguments, "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["use"]
    done = CliRunner().invoke(app, [*arguments, "-o", str(tmp_path / "r.yaml")])
    assert done.exit_code == 0, done.output
    assert "trim_vocabulary" in done.stdout
    assert (tmp_path / "r.yaml").is_file()


def test_all_that_is_wrong_is_said_at_once() -> None:
    with pytest.raises(InputError) as caught:
        multum.advise("nowhere/at-all", task="parsing", data="missing.csv", goal="cheaper", measured=True)
    text = str(caught.value)
    assert "cheaper" in text
    assert "parsing" in text
    assert "missing.csv" in text


def test_time_is_not_measured_where_there_is_no_text(model: str) -> None:
    with pytest.raises(InputError, match="give data"):
        multum.advise(model, task="text-classification", measured=True)
    assert torch.is_grad_enabled()
