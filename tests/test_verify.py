"""`verify`: an untouched run agrees, and whatever was changed in it, or in its data, is named."""

from __future__ import annotations

import copy
import csv
import json
import shutil
from dataclasses import replace

import on_disk
import pytest
import tiny
from typer.testing import CliRunner

import multum
from multum import _verify
from multum._compare import compare
from multum._compare_look import LEVELS
from multum._measure import DISTURBED, measure
from multum._verify import verify
from multum.cli import app
from multum.core.folders import read_json, write_json
from multum.core.model import machine, versions
from multum.data import open_task
from multum.errors import InputError
from multum.targets import fingerprint

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder of two candidates, measured: the original, and what ships."""
    folder = tmp_path_factory.mktemp("verify")
    data = on_disk.review_folder(folder / "data", n_train=20, n_validation=16, n_test=24)
    task, place = open_task("text-classification", str(data)), folder / "run"
    for name, seed in (("original", 1), ("rung-01", 2)):
        tiny.model(seed=seed).save(place / name, {"task": task.name})
    targets = [place / "original", place / "rung-01"]
    test = measure(targets, task, rounds=3, threads=1, texts_per_round=4)
    for one in test:
        one["speed"]["spread"] = 0.0  # whatever else this machine does; speeds of a busy one are not judged
    validation = [{**one, "split": "validation"} for one in test]
    shutil.copytree(place / "rung-01", place / "chosen", ignore=shutil.ignore_patterns("metrics*.json", "predictions"))
    one = {"runtime": "pytorch", "precision": "fp32"}
    candidates = [
        {
            "name": path.name,
            "folder": path.name,
            "target": path.name,
            "fingerprint": fingerprint(path),
            "validation": held,
            "test": read,
            **one,
        }
        for path, held, read in zip(targets, validation, test, strict=True)
    ]
    about = {"source": str(data), "fingerprints": dict(task.fingerprints)}
    write_json(
        place / "run.json",
        {
            "task": task.name, "data": about, "seed": 0, "threads": 1, "candidates": candidates, "chosen": "rung-01",
            "versions": versions(), "machine": machine(),
        },
    )  # fmt: skip
    return place


@pytest.fixture
def as_measured(run, monkeypatch):
    """What is measured now is what was measured then, unless a test changes it."""
    now = {
        (one["name"], split): copy.deepcopy(one[split])
        for one in read_json(run / "run.json")["candidates"]
        for split in ("test", "validation")
    }
    names = {"original": "original", "chosen": "rung-01", "rung-01": "rung-01"}
    monkeypatch.setattr(_verify, "_measured", lambda targets, task, split, *_: [now[names[path.name], split] for path in targets])
    return now


def lines(found):
    return {line["what"]: line for line in found["lines"]}


def wrong(found):
    return [line["what"] for line in found["lines"] if line["agrees"] is False]


COLUMNS = {"text": "review", "label": "stars"}


def tiny_rows(folder, name):
    with (folder / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def edit(run, tmp_path, change):
    """A copy of the run's folder of which `run.json` was changed."""
    shutil.copytree(run, tmp_path / "run")
    values = read_json(run / "run.json")
    change(values)
    write_json(tmp_path / "run" / "run.json", values)
    return tmp_path / "run"


def test_an_untouched_run_agrees_and_stays_as_it_is(run):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    found = multum.verify(run, rounds=3, tolerance=5)
    assert wrong(found) == []
    assert found["agrees"]
    said = lines(found)
    assert said["rung-01: test accuracy"]["agrees"]
    speed = said["rung-01: times faster than the first"]
    assert speed["agrees"] or speed["note"] == DISTURBED  # by what else this machine does
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_what_was_changed_is_named(run, tmp_path, as_measured):
    assert verify(run)["agrees"]
    as_measured["rung-01", "test"]["quality"]["value"] += 1 / 24
    as_measured["original", "test"]["size"]["bytes_on_disk"] += 1
    ratio = as_measured["rung-01", "test"]["speed"]["ratio_to_first"]
    ratio["value"] = 10 * ratio["ci95"][1]  # beyond what a busy machine's interval reaches
    found = verify(run)
    assert not found["agrees"]
    assert wrong(found) == ["original: bytes", "rung-01: test accuracy", "rung-01: times faster than the first"]
    shutil.copytree(run, tmp_path / "run")
    with (tmp_path / "run" / "chosen" / "model.safetensors").open("ab") as file:
        file.write(b"\0")
    assert "rung-01: files" in wrong(verify(tmp_path / "run"))
    shutil.rmtree(tmp_path / "run" / "chosen")
    shutil.rmtree(tmp_path / "run" / "rung-01")
    gone = verify(tmp_path / "run")
    assert lines(gone)["rung-01: files"]["now"] == "not there"
    assert "rung-01: files" in wrong(gone)


def test_what_was_passed_is_scored_on_validation(run, tmp_path, as_measured):
    def change(values):
        values["candidates"].append({**values["candidates"][1], "name": "passed", "test": None})

    place = edit(run, tmp_path, change)
    assert lines(verify(place))["passed: validation accuracy"]["agrees"]
    as_measured["rung-01", "validation"]["quality"]["value"] -= 1 / 24
    assert wrong(verify(place)) == ["passed: validation accuracy"]


def test_speeds_of_a_busy_machine_are_not_judged(run, as_measured):
    as_measured["rung-01", "test"]["speed"]["ratio_to_first"]["value"] *= 100
    assert wrong(verify(run)) == ["rung-01: times faster than the first"]
    as_measured["original", "test"]["speed"]["spread"] = 1.0
    found = verify(run)
    assert wrong(found) == []
    assert lines(found)["rung-01: times faster than the first"]["note"] == DISTURBED


def test_other_data_is_named(run, tmp_path, as_measured):
    other = on_disk.review_folder(tmp_path / "data", n_train=20, n_validation=16, n_test=24, seed=9)
    assert wrong(verify(run, data=str(other))) == ["data: train", "data: validation", "data: test"]


def test_data_that_was_moved_is_read_as_it_was(run, tmp_path, as_measured):
    """Columns and seed are the run's, whatever the place."""
    splits = on_disk.review_folder(tmp_path / "plain", n_train=20, n_validation=16, n_test=24)
    rows = [
        {"review": row["text"], "stars": row["label"]}
        for name in ("train", "validation", "test")
        for row in tiny_rows(splits, name)
    ]
    moved = on_disk.write_csv(tmp_path / "moved.csv", rows)
    task = open_task("text-classification", str(moved), columns=COLUMNS, seed=3)

    def change(values):
        values |= {"arguments": {"columns": COLUMNS}, "seed": 3}
        values["data"] = {"source": str(tmp_path / "gone.csv"), "fingerprints": dict(task.fingerprints)}

    place = edit(run, tmp_path, change)
    found = verify(place, data=str(moved))
    assert wrong(found) == []
    with pytest.raises(InputError, match=r"gone\.csv"):
        verify(place)


def test_speeds_of_another_machine_and_what_was_not_kept_are_not_judged(run, tmp_path, as_measured):
    def change(values):
        values["machine"]["processor"] = "another"
        values["versions"]["torch"] = "1.0"
        del values["candidates"][0]["fingerprint"]

    as_measured["rung-01", "test"]["speed"]["ratio_to_first"]["value"] *= 3
    found = verify(edit(run, tmp_path, change))
    assert found["agrees"]
    untold = {line["what"]: line["note"] for line in found["lines"] if line["agrees"] is None}
    assert set(untold) >= {"machine", "versions", "original: files", "rung-01: times faster than the first"}
    assert "torch 1.0" in lines(found)["versions"]["then"]


def test_what_is_no_finished_run(run, tmp_path, as_measured):
    with pytest.raises(InputError, match="holds no run"):
        verify(tmp_path)
    with pytest.raises(InputError, match="no share"):
        verify(run, tolerance=-1)
    with pytest.raises(InputError, match="not finished"):
        verify(edit(run, tmp_path, lambda values: values.update(chosen=None)))


def test_the_command(run, as_measured):
    done = CliRunner().invoke(app, ["verify", str(run)])
    assert done.exit_code == 0, done.output
    assert "that can be compared agree" in done.stdout
    as_measured["rung-01", "test"]["quality"]["value"] = 0.0
    done = CliRunner().invoke(app, ["verify", str(run), "--json"])
    assert done.exit_code == 1
    assert json.loads(done.stdout)["agrees"] is False
    done = CliRunner().invoke(app, ["verify", str(run)])
    assert "1 of " in done.stdout
    assert "✕" in done.stdout


def test_a_comparison_is_made_again(run, tmp_path, monkeypatch):
    monkeypatch.setitem(LEVELS, "quick", replace(LEVELS["quick"], draws=50))
    data = read_json(run / "run.json")["data"]["source"]
    compare(run / "original", run / "rung-01", data=data, output=tmp_path / "out", threads=1)
    found = verify(tmp_path / "out", threads=1)
    assert found["agrees"], wrong(found)
    assert {"after against before: difference", "before: calibration", "after: files", "data: test"} <= set(lines(found))
    values = read_json(tmp_path / "out" / "comparison.json")
    empty = {name for name, section in values["comparisons"]["after"].items() if not section}
    assert {"perturbations", "shift"} <= empty
    assert not {f"after against before: {name}" for name in empty} & set(lines(found))
    assert not [line for line in found["lines"] if line["then"].startswith("0 figures")]
    values = read_json(tmp_path / "out" / "comparison.json")
    values["comparisons"]["after"]["flips"]["lost"] += 1
    write_json(tmp_path / "out" / "comparison.json", values)
    found = verify(tmp_path / "out", threads=1)
    assert wrong(found) == ["after against before: flips"]
    assert lines(found)["after against before: flips"]["note"].startswith("lost: ")


def test_a_comparison_without_data_is_on_the_runs_and_is_verified(run, tmp_path, monkeypatch):
    """Its columns, its seed and its groups, too: what is compared is what the models were measured on."""
    monkeypatch.setitem(LEVELS, "quick", replace(LEVELS["quick"], draws=50))
    rows = [
        {"review": row["text"], "stars": row["label"], "from": "ab"[at % 2]}
        for at, row in enumerate([*tiny.splits(60, 30, 110).train, *tiny.splits(60, 30, 110).test])
    ]
    data = on_disk.write_csv(tmp_path / "data.csv", rows)
    task = open_task("text-classification", str(data), columns=COLUMNS, seed=3)
    other = open_task("text-classification", str(data), columns=COLUMNS, seed=0)
    assert task.fingerprints["test"] != other.fingerprints["test"]

    def change(values):
        values |= {"arguments": {"columns": COLUMNS}, "seed": 3}
        values["data"] = {"source": str(data), "fingerprints": dict(task.fingerprints)}

    place = edit(run, tmp_path, change)
    result = compare(place / "original", place / "rung-01", output=tmp_path / "out", threads=1)
    assert result["data"]["source"] == str(data)
    assert result["data"]["columns"] == COLUMNS
    assert result["data"]["fingerprints"] == dict(task.fingerprints)
    assert verify(tmp_path / "out", threads=1)["agrees"]
    given = compare(place / "original", place / "rung-01", data=str(data), columns=COLUMNS, output=tmp_path / "given", threads=1)
    assert given["data"]["fingerprints"] == dict(task.fingerprints)
