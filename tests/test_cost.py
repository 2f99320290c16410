"""What a run says of what shrinking cost: figures of kept answers, the section of page and card, and runs without."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
from test_report import HOSTILE, Page, places, sample_run, write

from multum import _verify
from multum._cost import LISTED, MARGIN, cost, write_cost
from multum._report import pictures, report
from multum._report_cost import cost as section
from multum._report_run import parse, read_run
from multum.errors import InputError

N = 240
DATA = {"data": "hf:somebody/reviews", "columns": {"text": "review", "label": "stars"}}


def answers(truth: np.ndarray, wrong: int, seed: int) -> np.ndarray:
    """Logits of two classes, `wrong` of them for the other class, of different confidence."""
    rng = np.random.default_rng(seed)
    guess = truth.copy()
    guess[rng.choice(len(truth), wrong, replace=False)] ^= 1
    return (np.eye(2)[guess] * (1 + rng.random((len(truth), 1)))).astype(np.float32)


@pytest.fixture(scope="module")
def task() -> Any:
    return tiny.task(64, N, N)


@pytest.fixture
def run(tmp_path: Path, task: Any) -> Any:
    """A finished run in a folder, with answers kept of the original and of what was chosen."""
    values = sample_run() | {"seed": 3, "arguments": DATA}
    first, chosen = (next(c for c in values["candidates"] if c["name"] == name) for name in ("original", values["chosen"]))
    for at, (candidate, wrong) in enumerate(((first, 20), (chosen, 60))):
        folder = tmp_path / "run" / candidate["target"] / "predictions"
        folder.mkdir(parents=True)
        candidate["fingerprint"] = f"of {candidate['name']}"
        for split in ("validation", "test"):
            logits = answers(task.targets[split], wrong, at)
            np.save(folder / f"{split}.npy", logits)
            quality = task.score(logits, split)
            candidate[split]["quality"] |= {"value": quality.value, "ci95": list(quality.ci95)}
    path = write(tmp_path / "run", values)
    return SimpleNamespace(path=path, candidates=values["candidates"], values=values, best=chosen)


def written(run: Any, task: Any) -> dict[str, Any]:
    write_cost(run, task, run.best)
    found: dict[str, Any] = json.loads((run.path / "cost.json").read_text())
    return found


# -- the figures -------------------------------------------------------------------------------------------------------------


def test_the_figures_are_of_the_kept_answers(run, task):
    found = written(run, task)
    moved, truth = found["comparisons"]["after"], task.targets["test"]
    right = [answers(truth, wrong, at).argmax(1) == truth for at, wrong in enumerate((20, 60))]
    assert moved["difference"]["value"] == pytest.approx(-40 / N)
    assert (moved["flips"]["lost"], moved["flips"]["gained"]) == ((right[0] & ~right[1]).sum(), (~right[0] & right[1]).sum())
    assert moved["difference"]["margin"] == found["margin"] == pytest.approx(0.011)  # the drop allowed, 1.1 points
    assert {row["by"] for row in moved["groups"]["rows"]} == {"class", "length"}
    assert moved["groups"]["worst"]["value"] == min(row["value"] for row in moved["groups"]["rows"])
    assert found["models"]["before"]["accuracy"]["value"] == pytest.approx(1 - 20 / N)
    assert all(model["calibration"]["temperature"] for model in found["models"].values())
    assert len(moved["flips"]["examples"]["lost"]) == LISTED < moved["flips"]["lost"]
    assert (found["n"], found["n_of_split"]) == (N, N)
    again = (run.path / "cost.json").read_bytes()
    written(run, task)
    assert (run.path / "cost.json").read_bytes() == again


@pytest.mark.parametrize(("max_drop", "margin"), [(0.0, MARGIN), (2.5, 0.025), (100.0, MARGIN)])
def test_the_margin_is_the_drop_allowed_where_that_is_one(run, task, max_drop, margin):
    run.values["budget"]["max_drop"] = max_drop
    assert written(run, task)["margin"] == margin


def test_without_answers_that_were_scored_nothing_is_said(run, task):
    written(run, task)
    kept = run.path / run.best["target"] / "predictions" / "test.npy"
    other = np.load(kept)
    other[0] = other[0, ::-1]  # the folder was measured again, on other texts
    np.save(kept, other)
    write_cost(run, task, run.best)
    assert not (run.path / "cost.json").exists()
    for content in (b"", kept.read_bytes()[:-8]):
        kept.write_bytes(content)
        assert cost(run.path, run.values, task, run.best) is None
    kept.unlink()
    assert cost(run.path, run.values, task, run.best) is None


def test_verify_takes_the_figures_again(run, task):
    found = written(run, task)
    said = list(_verify._cost(run.path, run.values, task))
    assert {"what it cost: flips", "what it cost: before: calibration"} <= {line.what for line in said}
    assert all(line.agrees for line in said)
    found["comparisons"]["after"]["flips"]["lost"] += 1
    (run.path / "cost.json").write_text(json.dumps(found))
    assert [line.what for line in _verify._cost(run.path, run.values, task) if not line.agrees] == ["what it cost: flips"]
    (run.path / run.best["target"] / "predictions" / "test.npy").unlink()
    assert [line.agrees for line in _verify._cost(run.path, run.values, task)] == [None]
    (run.path / "cost.json").unlink()
    assert list(_verify._cost(run.path, run.values, task)) == []


def test_nothing_is_said_of_the_original_itself_and_of_a_few_texts(run, task):
    assert cost(run.path, run.values, task, run.candidates[0]) is None
    assert cost(run.path, run.values, tiny.task(64, N, 19), run.best) is None


# -- the page and the card ---------------------------------------------------------------------------------------------------


def test_the_report_shows_them(run, task):
    found = written(run, task)
    report(run.path)
    text, card = Page((run.path / "report.html").read_text()).text, (run.path / "README.md").read_text()
    lost, gained = (found["comparisons"]["after"]["flips"][kind] for kind in ("lost", "gained"))
    for words in (text, card):
        assert "What it cost" in words
        assert "16.67 points less accurate, more than chance explains" in words
        assert f"{lost} were lost, {gained} gained" in words
        assert "rung-04 in ONNX Runtime int8, which ships (after)" in words
        assert "ECE after temperature scaling" in words
        assert "McNemar" in words
    assert f"▼ Right before, wrong after: {lost}" in text
    assert "Answer by answer: 16.67 points less accurate" in text  # in the header
    assert "no difference is shown" not in text
    example = found["comparisons"]["after"]["flips"]["examples"]["lost"][0]["text"]
    assert example in text
    assert example not in card
    assert (run.path / "chosen" / "README.md").read_text().count("What it cost") == 1
    assert (
        "multum compare original chosen --data hf:somebody/reviews --columns text=review,label=stars --seed 3 --margin 1.1 "
        "--level full -o comparison"
    ) in text


def test_its_pictures_are_written_with_the_others(run, task):
    written(run, task)
    names = {path.stem for path in pictures(run.path, run.path / "pictures")}
    assert names == {"curve", "p50", "size", "flips", "groups", "reliability", "scaled"}


def test_a_run_without_evidence_and_evidence_of_another_choice(run, task, monkeypatch):
    for page in ("_report_page", "_compare_page"):
        monkeypatch.setattr(f"multum.{page}._charts", lambda result: {})
    before = report(run.path).read_text()
    assert "What it cost" not in before + (run.path / "README.md").read_text()
    found = written(run, task)
    for wrong in ("another", None):
        found["models"]["after"]["fingerprint"] = wrong
        (run.path / "cost.json").write_text(json.dumps(found))
        assert report(run.path).read_text() == before
    values = run.values | {"chosen": None}
    (run.path / "run.json").write_text(json.dumps(values))
    assert "What it cost" not in report(run.path).read_text()


def test_nothing_in_it_can_abuse_the_page_or_the_card(run, task):
    found = written(run, task)
    moved = found["comparisons"]["after"]
    moved["flips"]["examples"]["lost"][0] |= {"text": HOSTILE, "label": HOSTILE}
    for row in [*moved["groups"]["rows"], *moved["groups"]["damaged"], moved["groups"]["worst"]]:
        row |= {"by": HOSTILE, "name": HOSTILE}
    found["data"] = {"source": HOSTILE, "columns": {HOSTILE: HOSTILE}}
    (run.path / "cost.json").write_text(json.dumps(found))
    seen = Page(report(run.path).read_text())
    assert "What it cost" in seen.text
    assert seen.links == seen.handlers == []
    assert seen.tags.count("script") == 1
    assert "img" not in seen.tags
    assert "<img" not in (run.path / "README.md").read_text()


@pytest.mark.parametrize("junk", [None, "text", -1, 10**400, [], {}, [1, "a"]], ids=lambda junk: repr(junk)[:9])
def test_any_one_wrong_value_gives_a_page_or_an_input_error(run, task, monkeypatch, junk):
    monkeypatch.setattr("multum._compare_page._charts", lambda result: {})
    original, seen = written(run, task), parse(run.values)
    moved = original["comparisons"]["after"]
    moved["groups"]["rows"] = moved["groups"]["rows"][:2]
    moved["flips"]["examples"] = {kind: rows[:1] for kind, rows in moved["flips"]["examples"].items()}
    for model in original["models"].values():
        model["calibration"]["reliability"] = model["calibration"]["scaled"]["reliability"] = []
    pages = 0
    for path in places(original):
        found = copy.deepcopy(original)
        inside: Any = found
        for key in path[:-1]:
            inside = inside[key]
        inside[path[-1]] = junk
        (run.path / "cost.json").write_text(json.dumps(found))
        try:
            section(seen, read_run(run.path / "cost.json"), "reviews")
            pages += 1
        except InputError as error:
            assert "cost.json is damaged" in str(error), path  # noqa: PT017
    assert pages > 20
