"""Chains: every stage is kept, a run that was stopped goes on to the same result, and nothing is done twice."""

from __future__ import annotations

import io
import json
import os
import shutil
from types import SimpleNamespace

import on_disk
import pytest
from rich.console import Console
from safetensors.numpy import load_file
from transformers import AutoModel, AutoTokenizer

from multum import _measure_ahead, _run
from multum._measure_ahead import START, Pace, tried
from multum._report import report
from multum._report_words import duration
from multum._run import ENDS, EVERY, run
from multum.core.model import Model
from multum.errors import InputError
from multum.progress import Progress
from multum.recipe import parse
from multum.steps.drop_layers import DropLayers
from multum.steps.finetune import Finetune


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MULTUM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    model = on_disk.model_folder(folder / "model", layers=3)
    return model, on_disk.review_folder(folder / "data", n_train=32, n_validation=16, n_test=16)


@pytest.fixture(scope="module")
def chain(places):
    return recipe_of(places)


def recipe_of(places, **changes):
    steps = [{"finetune": {"epochs": 1}}, {"drop_layers": {"keep": 1}}, {"distill": {"teacher": "stage:finetune", "epochs": 1}}]
    entries = {"model": str(places[0]), "task": "text-classification", "data": str(places[1]), "seed": 5, "steps": steps}
    return parse(entries | changes)


@pytest.fixture(scope="module")
def whole(chain, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "out"
    return folder, run(chain, folder, rounds=3, threads=1)


def weights(folder):
    return {name: tensor.tobytes() for name, tensor in load_file(folder / "model.safetensors").items()}


def test_every_stage_is_a_model_folder(whole):
    folder, _ = whole
    stages = ("00-original", "01-finetune", "02-drop_layers", "03-distill", "model")
    histories = [[entry["step"] for entry in json.loads((folder / name / "recipe.json").read_text())["steps"]] for name in stages]
    assert histories == [[], ["finetune"], ["finetune", "drop_layers"]] + 2 * [["finetune", "drop_layers", "distill"]]
    assert weights(folder / "model") == weights(folder / "03-distill")
    assert Model.load(folder / "model", auto_class="AutoModelForSequenceClassification").module.config.num_hidden_layers == 1


def test_the_summary_tells_what_was_done_and_measured(whole, places):
    folder, summary = whole
    assert json.loads((folder / "run.json").read_text()) == summary
    names = [candidate["name"] for candidate in summary["candidates"]]
    assert names == ["00-original", "01-finetune", "02-drop_layers", "03-distill"]
    assert summary["chosen"] == names[-1]
    first, *middle, last = summary["candidates"]
    assert first["drop"] == 0
    assert [entry["test"] is None for entry in (first, *middle, last)] == [False, True, True, False]
    for entry in summary["candidates"]:
        lost = 100 * (first["validation"]["quality"]["value"] - entry["validation"]["quality"]["value"])
        assert entry["drop"] == pytest.approx(lost, abs=1e-3)
    assert [len(entry["blocks"]) for entry in summary["candidates"]] == [3, 3, 1, 1]
    assert summary["data"]["source"] == str(places[1])
    assert {"01-finetune", "02-drop_layers", "03-distill"} <= {stage["name"] for stage in summary["stages"]}


def test_what_is_measured_is_said_before_it_is(whole, chain, tmp_path, monkeypatch):
    """With the time that it may take; what it took is beside what was planned."""
    folder, summary = whole
    assert [stage["name"] for stage in summary["stages"] if stage["planned"] > 0] == [EVERY, ENDS]
    shutil.copytree(folder, tmp_path / "out")
    values = json.loads((folder / "run.json").read_text())
    kept = [stage for stage in values["stages"] if stage["name"] not in (EVERY, ENDS)]
    (tmp_path / "out" / "run.json").write_text(json.dumps(values | {"candidates": [], "stages": kept}))
    said, planned = io.StringIO(), []
    progress = Progress(Console(file=said, width=200))

    def stop(targets, task, *, split, progress, **how):
        planned.append((len(targets), split, how["rounds"], said.getvalue()))
        progress(0.5)
        raise KeyboardInterrupt

    monkeypatch.setattr(_run, "measure", stop)
    monkeypatch.setattr(_run, "pace_of", lambda target, *_: Pace(0.5, 1.0, 10) if target.name == "00-original" else None)
    with pytest.raises(KeyboardInterrupt):
        run(chain, tmp_path / "out", rounds=3, threads=1, progress=progress)
    ((models, split, rounds, line),) = planned
    assert (models, split, rounds) == (4, "validation", 3)
    assert line.startswith("Measured now, in 3 rounds each: 4 models on the 16 validation examples, the first and the last of")
    # 6 models: a start, 3 turns of 10 inputs at 1 s and 16 inputs at 0.5 s for each
    assert f"about {duration(6 * (START + 3 * 10 + 16 * 0.5))}" in line


def test_what_is_left_out_of_the_data_is_said_at_once(places, tmp_path, monkeypatch):
    rows = on_disk.tiny.splits(n_train=32, n_validation=16, n_test=16)
    for name in ("train", "validation", "test"):
        on_disk.write_csv(tmp_path / f"data/{name}.csv", [*getattr(rows, name).to_list(), {"text": " ", "label": "positive"}])
    seen = Console(file=io.StringIO(), width=200)
    monkeypatch.setattr(_run._Chain, "step", lambda *_: None)
    monkeypatch.setattr(_run._Chain, "finish", lambda *_: {})
    run(recipe_of(places, data=str(tmp_path / "data")), tmp_path / "out", progress=Progress(seen))
    assert "train: 1 row dropped: empty text" in seen.file.getvalue()


def test_a_pace_is_that_of_what_measuring_asks_for(monkeypatch):
    """A classifier answers; a causal model also writes; what nobody waits for is not scored."""
    clock, asked = [0.0], []

    def answer(texts):
        clock[0] += 100 if len(asked) == 0 else 2  # what warms up is not counted
        asked.append(texts)

    monkeypatch.setattr(_measure_ahead.time, "perf_counter", lambda: clock[0])
    reader = SimpleNamespace(task="text-classification")
    assert tried(SimpleNamespace(predict=answer, reader=reader), ["a", "b", "c"]) == Pace(2.0, 2.0, 55)
    assert asked == [["a"], ["a"], ["b"], ["c"]]
    reader = SimpleNamespace(task="text-generation")
    monkeypatch.setattr(_measure_ahead, "paces", lambda _, texts: clock.__setitem__(0, clock[0] + 7))
    assert tried(SimpleNamespace(predict=answer, reader=reader), ["a"]) == Pace(2.0, 7.0, 3)
    reader, alone = SimpleNamespace(task="fill-mask"), lambda _: clock.__setitem__(0, clock[0] + 5)
    assert tried(SimpleNamespace(predict=answer, reader=reader, alone=alone), ["a"]) == Pace(7.0, 2.0, 55)
    reader = SimpleNamespace(task="translation", scored=True)
    tried(SimpleNamespace(predict=answer, reader=reader), ["a"])
    assert reader.scored is False


def test_the_seed_of_the_recipe_is_that_of_its_steps_unless_they_have_one(whole, places, tmp_path):
    folder, _ = whole
    fields = [entry["fields"] for entry in json.loads((folder / "model" / "recipe.json").read_text())["steps"]]
    assert fields[0]["seed"] == fields[2]["seed"] == 5
    assert fields[2]["teacher"] == str(folder / "01-finetune")


def test_a_second_call_does_nothing_again(whole, chain, monkeypatch):
    folder, summary = whole
    monkeypatch.setattr(Finetune, "apply", None)
    monkeypatch.setattr(DropLayers, "apply", None)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    assert run(chain, folder, rounds=3, threads=1) == summary
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()} == before


def test_a_stopped_run_goes_on_to_the_same_result(whole, chain, tmp_path, monkeypatch):
    applied = []
    finetune = Finetune.apply

    def counted(self, model, task):
        applied.append("finetune")
        return finetune(self, model, task)

    def stop(self, model, task):
        raise KeyboardInterrupt

    monkeypatch.setattr(Finetune, "apply", counted)
    with monkeypatch.context() as stopping:
        stopping.setattr(DropLayers, "apply", stop)
        with pytest.raises(KeyboardInterrupt):
            run(chain, tmp_path / "out", rounds=3, threads=1)
    made = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert made == ["00-original", "01-finetune", "run.json"]
    resumed = run(chain, tmp_path / "out", rounds=3, threads=1)
    assert applied == ["finetune"]
    assert weights(tmp_path / "out" / "model") == weights(whole[0] / "model")
    assert [entry["drop"] for entry in resumed["candidates"]] == [entry["drop"] for entry in whole[1]["candidates"]]


def test_another_recipe_in_the_same_folder_is_refused(whole, places):
    with pytest.raises(InputError, match=r"another recipe \(seed differ\)"):
        run(recipe_of(places, seed=6), whole[0])


def test_the_same_data_by_another_name_is_the_same_run(whole, places, tmp_path, monkeypatch):
    folder, summary = whole
    monkeypatch.setattr(Finetune, "apply", None)
    monkeypatch.chdir(tmp_path)
    again = recipe_of((os.path.relpath(places[0]), os.path.relpath(places[1])))
    assert again.data != str(places[1])
    assert run(again, folder, rounds=3, threads=1) == summary
    on_disk.review_folder(tmp_path / "other", n_train=32, n_validation=16, n_test=16, seed=9)
    with pytest.raises(InputError, match="made from other data than other holds now"):
        run(recipe_of(places, data="other"), folder, rounds=3, threads=1)


def test_other_data_under_the_same_name_is_refused(places, tmp_path):
    data = on_disk.review_folder(tmp_path / "data", n_train=16, n_validation=8, n_test=8)
    recipe = recipe_of(places, data=str(data), steps=[{"drop_layers": {"keep": 1}}])
    run(recipe, tmp_path / "out", rounds=3, threads=1)
    on_disk.review_folder(data, n_train=16, n_validation=8, n_test=8, seed=9)
    with pytest.raises(InputError, match="other data"):
        run(recipe, tmp_path / "out", rounds=3, threads=1)


def test_a_folder_that_holds_something_else_is_left_alone(chain, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="holds something else"):
        run(chain, tmp_path)
    assert on_disk.listing(tmp_path) == ["thesis.txt"]


def test_a_model_that_cannot_be_loaded_leaves_nothing_behind(places, tmp_path):
    broken = on_disk.model_folder(tmp_path / "broken")
    (broken / "model.safetensors").write_bytes((broken / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(InputError, match="damaged"):
        run(recipe_of(places, model=str(broken)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_a_model_without_a_head_is_compared_with_is_its_first_training(places, tmp_path):
    encoder = AutoModel.from_pretrained(places[0])
    encoder.save_pretrained(tmp_path / "encoder")
    AutoTokenizer.from_pretrained(places[0]).save_pretrained(tmp_path / "encoder")
    steps = [{"drop_layers": {"keep": 2}}, {"finetune": {"epochs": 1}}, {"drop_layers": {"keep": 1}}]
    summary = run(recipe_of(places, model=str(tmp_path / "encoder"), steps=steps), tmp_path / "out", rounds=3, threads=1)
    assert [one["name"] for one in summary["candidates"]] == ["02-finetune", "03-drop_layers"]
    assert all(one["test"] for one in summary["candidates"])


def test_unlabelled_texts_and_a_student_without_layers_go_through_to_the_end(places, tmp_path):
    more = tmp_path / "more.txt"
    more.write_text("a tender film\na dull plot and a tedious ending\na tender film\n")
    steps = [{"distill": {"student": {"layers": 0}, "epochs": 1, "augment": 1}}]
    recipe = recipe_of(places, steps=steps, unlabelled=str(more))
    summary = run(recipe, tmp_path / "out", rounds=3, threads=1)
    assert summary["data"]["sizes"] == {"train": 32, "validation": 16, "test": 16, "unlabelled": 2}
    assert "unlabelled: 1 row dropped: repeats an earlier row" in summary["data"]["notes"]
    assert summary["recipe"]["unlabelled"] == str(more)
    (entry,) = json.loads((tmp_path / "out" / "model" / "recipe.json").read_text())["steps"]
    assert entry["teacher_outputs"] == (32 + 2) * 2
    assert entry["fields"]["student"] == {"layers": 0}
    assert [len(candidate["blocks"]) for candidate in summary["candidates"]] == [3, 0]
    assert (
        Model.load(tmp_path / "out" / "model", auto_class="AutoModelForSequenceClassification").module.config.num_hidden_layers == 0
    )
    assert report(tmp_path / "out").is_file()
    with pytest.raises(InputError, match=r"another recipe \(unlabelled differ\)"):
        run(recipe_of(places, steps=steps), tmp_path / "out")
    more.write_text("something else\n")
    with pytest.raises(InputError, match=r"other data than .* and .*more\.txt holds now"):
        run(recipe, tmp_path / "out")
