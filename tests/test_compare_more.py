"""`compare` where it takes long or looks inside: what is kept when it is stopped, shadow models, exports, synonyms, pictures."""

from __future__ import annotations

import json
import random
import re
import shutil
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import on_disk
import pytest
import tiny
from typer.testing import CliRunner

from multum._compare import _trained_here, compare
from multum._compare_answers import cost
from multum._compare_attribution import torch_form
from multum._compare_look import LEVELS
from multum._compare_more import agree, leaked, trust, weighed
from multum._compare_page import drawings
from multum._compare_shadows import Shadows
from multum._compare_targets import Predictor
from multum._compare_weighed import cells, picture, placed
from multum._compare_work import Work
from multum.cli import app
from multum.core.folders import read_json
from multum.data import open_task
from multum.errors import InputError
from multum.evidence.perturbations import lexicon_of, perturb
from multum.steps.distill import Distill
from multum.steps.drop_layers import DropLayers
from multum.steps.finetune import Finetune

pytestmark = pytest.mark.usefixtures("one_thread")
TRAIN, OTHERS = 40, 40


@pytest.fixture(autouse=True)
def _less(monkeypatch):
    for name, level in LEVELS.items():
        monkeypatch.setitem(LEVELS, name, replace(level, draws=100, attributed=min(level.attributed, 4), points=3, steps=3))


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A base without a head; a model that learned its training texts by heart, half of them with wrong labels; its student.

    In fp32: bf16 rounds differently from run to run on some processors, which learning by heart makes much of.
    """
    folder = tmp_path_factory.mktemp("more")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MULTUM_CACHE", str(folder / "cache"))
        base = tiny.model(seed=1)
        base.module.base_model.save_pretrained(folder / "base")
        base.tokenizer.save_pretrained(folder / "base")
        splits, rng = tiny.splits(TRAIN, 30, OTHERS), random.Random(0)
        for name in ("train", "validation", "test"):
            rows = getattr(splits, name).to_list()
            for row in rows:
                if rng.random() < 1 / 2:
                    row["label"] = "positive" if row["label"] == "negative" else "negative"
            on_disk.write_csv(folder / "data" / f"{name}.csv", rows)
        task = open_task("text-classification", str(folder / "data"))
        data = {"task": task.name, "data": dict(task.fingerprints)}
        by_heart = Finetune(epochs=24, learning_rate=6e-3, batch_size=20, weight_decay=0, precision="fp32", seed=3)
        teacher = by_heart(task.load(str(folder / "base")), task)
        teacher.save(folder / "model", data)
        student = Distill(teacher=str(folder / "model"), epochs=2, cache=str(folder / "teacher"), precision="fp32", seed=3)
        student(DropLayers(keep=1)(teacher, task), task).save(folder / "student", data)
    shutil.copytree(folder / "model", folder / "copy")
    return folder


def options(places, tmp_path, **more):
    return {"data": str(places / "data"), "output": tmp_path / "out", "threads": 1, **more}


# -- privacy -----------------------------------------------------------------------------------------------------------------


def test_a_model_that_learned_its_texts_by_heart_is_found_out_and_its_student_less(places, tmp_path):
    result = compare(places / "model", places / "student", **options(places, tmp_path))
    found = result["models"]["before"]["privacy"]["loss"]
    assert (found["members"], found["others"]) == (TRAIN, OTHERS)
    assert found["auc"]["ci95"][0] > 0.55
    assert found["tpr_at_1_percent"] is None  # 60 others cannot show one in a hundred
    assert result["models"]["before"]["trained_here"] is True
    page = (tmp_path / "out" / "report.html").read_text()
    assert re.search("one (can|cannot be shown to be able to) tell training texts of the model after from others", page)
    assert "Not recorded" not in page
    assert "takes 1,000 other texts" in page


@pytest.mark.parametrize(("data", "training", "here"), [("a", {}, True), ("b", {}, False), ("a", None, None), (None, {}, None)])
def test_where_a_model_was_trained_is_read_from_its_steps_where_the_record_has_no_data(tmp_path, data, training, here):
    step = {key: value for key, value in {"step": "finetune", "data": data, "training": training}.items() if value is not None}
    (tmp_path / "recipe.json").write_text(json.dumps({"steps": [step]}))
    assert _trained_here(tmp_path, SimpleNamespace(fingerprints={"train": "a"})) is here


def test_shadow_models_go_through_the_same_steps_with_teachers_of_their_own(places, tmp_path, monkeypatch):
    made: list = []
    plain = Distill.apply
    monkeypatch.setattr(Distill, "apply", lambda self, model, task: made.append((self, task)) or plain(self, model, task))
    result = compare(places / "model", places / "student", **options(places, tmp_path, shadows=8))
    assert len(made) == 8
    for number, (step, task) in enumerate(made):
        assert step.teacher.startswith(str(tmp_path / "out" / "work" / f"shadow-{number:03d}"))
        assert step.epochs == 2
        assert len(task.inputs("train")) == (TRAIN + OTHERS) // 2
        assert task.inputs("validation") == made[0][1].inputs("validation")
    assert len({tuple(task.inputs("train")) for _, task in made}) == 8
    for role in ("before", "after"):
        found = result["models"][role]["privacy"]["lira"]
        assert 0 <= found["auc"]["value"] <= 1
        assert found["members"] + found["others"] <= TRAIN + OTHERS
    assert result["models"]["before"]["privacy"]["lira"]["auc"]["ci95"][0] > 0.55
    assert on_disk.listing(tmp_path / "out") == ["comparison.json", "report.html"]
    assert "LiRA, 8 shadow models" in (tmp_path / "out" / "report.html").read_text()


def test_every_step_on_record_is_taken_again_for_every_shadow_and_an_export_is_exported(places, tmp_path, monkeypatch):
    """BEFORE by its recipe, AFTER by its own: the same steps with the same fields but for the seed, the cache and the teacher."""
    from multum.targets import export_to, exporter

    student = tmp_path / "student"
    shutil.copytree(places / "student", student)
    task = open_task("text-classification", str(places / "data"))
    export_to(exporter("onnxruntime", "fp32"), student, student / "onnxruntime-fp32", "fp32", task, 0)
    taken, asked = [], []
    for kind in (Finetune, DropLayers, Distill):
        monkeypatch.setattr(kind, "apply", recorded(kind.apply, taken))
    answer = Shadows._answers
    monkeypatch.setattr(Shadows, "_answers", lambda self, again, target: asked.append(target) or answer(self, again, target))
    opened = []
    predictor = "multum._compare_shadows.Predictor"
    monkeypatch.setattr(predictor, lambda folder, *more: opened.append(folder) or Predictor(folder, *more))
    compare(places / "model", student / "onnxruntime-fp32", **options(places, tmp_path, shadows=4))
    assert asked == [places / "model", student / "onnxruntime-fp32"] * 4
    assert [folder.name for folder in opened] == ["00", "onnxruntime-fp32"] * 4
    steps = read_json(student / "recipe.json")["steps"]
    assert steps[0] == read_json(places / "model" / "recipe.json")["steps"][0]
    assert [name for name, _ in taken] == [
        entry["step"] for entry in steps
    ] * 4  # the model's own is the beginning of the student's
    for at, (_, fields) in enumerate(taken):
        then = steps[at % len(steps)]["fields"]
        other = {name for name, value in fields.items() if then.get(name, value) != value}
        assert other <= {"seed", "cache", "teacher"}
        assert set(then) <= set(fields)
        if "seed" in fields:
            assert fields["seed"] == 1 + at // len(steps)


def recorded(apply, taken):
    def again(self, model, task):
        taken.append((self.name, dict(self.__dict__)))
        return apply(self, model, task)

    return again


def test_halves_and_cost_of_shadow_models(places, tmp_path):
    task = open_task("text-classification", str(places / "data"))
    texts = [*task.inputs("train"), *task.inputs("test")]
    truth = np.concatenate([task.targets["train"], task.targets["test"]])
    targets = {"before": places / "model", "after": places / "student"}
    shadows = Shadows(task, targets, texts=texts, truth=truth, split="test", count=6, seed=0)
    assert shadows.inside.shape == (6, TRAIN + OTHERS)
    assert (shadows.inside.sum(axis=1) == (TRAIN + OTHERS) // 2).all()
    seconds = [
        sum(entry["seconds"] for entry in read_json(places / name / "recipe.json")["steps"]) for name in ("model", "student")
    ]
    # The student's first steps are the model's, and its teacher is the model: neither is made twice.
    assert shadows.seconds(Work(tmp_path, {})) == pytest.approx(6 * seconds[1])


def test_what_cannot_be_made_again_is_said_before_any_work(places, tmp_path):
    tiny.model().save(tmp_path / "bare")
    with pytest.raises(InputError) as caught:
        compare(places / "model", tmp_path / "bare", **options(places, tmp_path, shadows=4))
    assert "was trained before its recipe.json begins" in str(caught.value)
    with pytest.raises(InputError, match="2 shadow models tell nothing"):
        compare(places / "model", places / "copy", **options(places, tmp_path, shadows=2))
    assert not (tmp_path / "out").exists()


# -- stopped and started again -----------------------------------------------------------------------------------------------


def comparable(result):
    return {key: value for key, value in result.items() if key not in ("when", "elapsed_s")}


def test_it_goes_on_where_it_was_stopped_and_comes_to_the_same(places, tmp_path, monkeypatch):
    arguments = (places / "model", places / "student")
    whole = compare(*arguments, **options(places, tmp_path / "whole", level="full"))
    plain, asked = Predictor.predict, []

    def stopped(self, texts):
        if self.folder.name == "student" and len(texts) == 30:
            raise KeyboardInterrupt
        return plain(self, texts)

    monkeypatch.setattr(Predictor, "predict", stopped)
    with pytest.raises(KeyboardInterrupt):
        compare(*arguments, **options(places, tmp_path, level="full"))
    kept = set(on_disk.listing(tmp_path / "out"))
    assert {"work/arguments.json", "work/before-test.npz", "work/before-typos.npz", "work/after-test.npz"} <= kept
    assert "work/after-validation.npz" not in kept
    with pytest.raises(InputError, match=r"unfinished comparison with other arguments .*level: 'full' then, 'quick' now"):
        compare(*arguments, **options(places, tmp_path))
    monkeypatch.setattr(
        Predictor, "predict", lambda self, texts: asked.append((self.folder.name, len(texts))) or plain(self, texts)
    )
    again = compare(*arguments, **options(places, tmp_path, level="full"))
    assert "model" not in dict(asked)
    assert ("student", 30) in asked
    assert comparable(again) == comparable(whole)
    assert on_disk.listing(tmp_path / "out") == ["comparison.json", "report.html"]


def test_the_cost_is_said_first(places, tmp_path):
    assert cost([("before", 60.0), ("shadow models", 3600.0), ("figures", 5.0)]).startswith(
        "About 1 h 1 min: shadow models 1 h 0 min."
    )
    done = CliRunner().invoke(
        app, ["compare", str(places / "model"), str(places / "copy"), "--data", str(places / "data"), "-o", str(tmp_path / "out")]
    )
    assert done.exit_code == 0, done.output
    lines = done.stderr.splitlines()
    assert lines[0].startswith("About ")
    assert "the same command goes on" in lines[0]


# -- exports, words, pictures ------------------------------------------------------------------------------------------------


def test_an_export_is_attributed_in_its_torch_form(places, tmp_path):
    from multum.targets import export_to, exporter

    shutil.copytree(places / "model", tmp_path / "model")
    task = open_task("text-classification", str(places / "data"))
    export_to(exporter("onnxruntime", "fp32"), tmp_path / "model", tmp_path / "model" / "onnxruntime-fp32", "fp32", task, 0)
    assert torch_form(tmp_path / "model" / "onnxruntime-fp32") == tmp_path / "model"
    result = compare(places / "model", tmp_path / "model" / "onnxruntime-fp32", **options(places, tmp_path, level="full"))
    assert result["comparisons"]["after"]["attribution"]["rank"]["value"] == pytest.approx(1)
    page = (tmp_path / "out" / "report.html").read_text()
    assert f"its torch form {tmp_path / 'model'} was asked" in page
    found = result["comparisons"]["after"]
    assert [row[at] for at, row in enumerate(found["depths"]["rho"])][:-1] == pytest.approx([1] * (len(found["depths"]["rho"]) - 1))
    assert [row["before"] for row in found["depths"]["nearest"]] == [row["after"] for row in found["depths"]["nearest"]]
    assert found["rollout"]["rank"]["value"] == pytest.approx(1)
    assert "Layer by layer" in page
    assert "attention rollout</span>" in page
    assert page.count('aria-label="How alike words are ranked at every pair of depths') == 2  # wide and narrow
    shutil.move(tmp_path / "model" / "onnxruntime-fp32", tmp_path / "alone")
    alone = compare(places / "model", tmp_path / "alone", **options(places, tmp_path / "two", level="full"))
    assert alone["comparisons"]["after"]["attribution"] is None
    assert any("the model after is an export without the model folder it was made from" in note for note in alone["data"]["notes"])


def test_a_lexicon_changes_words(places, tmp_path):
    lexicon = lexicon_of(["film, movie\tpicture", "alone", "good,fine", "movie,flick"])
    assert lexicon == {
        "film": ["movie", "picture"], "movie": ["film", "picture", "flick"], "picture": ["film", "movie"],
        "good": ["fine"], "fine": ["good"], "flick": ["movie"],
    }  # fmt: skip
    texts = ["Film after film, never the filming"] * 200
    changed = perturb(texts, "synonyms", 0, lexicon)
    assert changed == perturb(texts, "synonyms", 0, lexicon)
    assert all(text.endswith("never the filming") for text in changed)
    assert {text.split()[0] for text in changed} == {"Film", "Movie", "Picture"}
    share = np.mean([text.split()[2] != "film," for text in changed])
    assert 0.2 < share < 0.4
    path = tmp_path / "lexicon.txt"
    path.write_text("wonderful,superb\ndreadful,awful\nfilm,scene\n")
    result = compare(places / "model", places / "copy", **options(places, tmp_path, lexicon=path))
    assert list(result["comparisons"]["after"]["perturbations"]) == ["synonyms"]
    for content in ("film\nscene\n", b"\xff\xfe"):
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(InputError, match="--lexicon"):
            compare(places / "model", places / "copy", **options(places, tmp_path / "no", lexicon=path))


def test_pictures_are_files_that_stand_alone(places, tmp_path):
    arguments = [
        "compare",
        places / "model",
        places / "student",
        "--data",
        places / "data",
        "--level",
        "full",
        "-o",
        tmp_path / "out",
    ]
    done = CliRunner().invoke(app, [*map(str, arguments), "--pictures", str(tmp_path / "pictures")])
    assert done.exit_code == 0, done.output
    names = ("depths", "flips", "groups", "reliability", "scaled", "words")
    assert on_disk.listing(tmp_path / "pictures") == [f"{name}.{kind}" for name in names for kind in ("png", "svg")]
    for name in names:
        png = (tmp_path / "pictures" / f"{name}.png").read_bytes()
        assert png.startswith(b"\x89PNG")
        assert int.from_bytes(png[16:20]) > 900  # pixels wide
        text = (tmp_path / "pictures" / f"{name}.svg").read_text()
        assert "inherit" not in text
        root = ElementTree.fromstring(text)  # noqa: S314 - our own
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert root.find("{http://www.w3.org/2000/svg}title").text
    wrong = CliRunner().invoke(
        app, [*map(str, arguments[:-1]), str(tmp_path / "no"), "--pictures", str(places / "data" / "test.csv")]
    )
    assert wrong.exit_code == 2
    assert not (tmp_path / "no").exists()


def test_flips_of_every_class_are_drawn_and_said(places, tmp_path):
    result = compare(places / "model", places / "student", **options(places, tmp_path, floor=places / "copy"))
    rows = [row for row in result["comparisons"]["after"]["groups"]["rows"] if row["by"] == "class"]
    assert {row["name"] for row in rows} == {"negative", "positive"}
    assert sum(row["lost"] for row in rows) == result["comparisons"]["after"]["flips"]["lost"] > 0
    drawn = drawings(result)["flips"]
    assert drawn.label == "; ".join(f"class {row['name']}: {row['lost']} lost, {row['gained']} gained" for row in rows)
    assert all(f"▼ {row['lost']}   ▲ {row['gained']}" in drawn.svg.replace("\N{NO-BREAK SPACE}", " ") for row in rows)
    assert "-" not in "".join(re.findall(r"<text[^>]*>([^<]*)</text>", drawn.svg)), "lost answers are counted, not subtracted"
    assert [sign for _, sign, _ in drawn.key] == ["▼", "▲", "◇"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count(f'aria-label="{drawn.label}"') == 2  # wide and narrow
    result["comparisons"]["after"]["groups"]["rows"] = [row | {"lost": 0, "gained": 0} for row in rows]
    assert "flips" not in drawings(result)


def test_weighed_texts_as_a_picture():
    """What is read line by line is the text; lines are no longer than they may be; signs do not take colour to be told apart."""
    text = "A moving, well-made film; don't miss (it)! " + "very " * 30 + "日本語の映画です。" * 9
    pieces = weighed(text, [0.5, -0.2, None] * 60)
    lines: dict[int, list] = {}
    for row, cell, piece in placed(pieces, most=40):
        lines.setdefault(row, []).append((cell, piece))
    assert list(lines) == list(range(len(lines)))
    assert max(cell + cells(piece["text"]) for line in lines.values() for cell, piece in line) <= 40
    for line in lines.values():
        ends = [cell + cells(piece["text"]) for cell, piece in line]
        assert line[0][0] == 0
        assert all(start - end in (0, 1) for (start, _), end in zip(line[1:], ends, strict=False))
    assert "".join(piece["text"] for line in lines.values() for _, piece in line) == "".join(text.split())
    first = [(cell, piece["text"]) for cell, piece in lines[0]][:5]
    assert first == [(0, "A"), (2, "moving"), (8, ","), (10, "well-made"), (20, "film")]
    example = {
        "text": "a <bad> film",
        "answer": "x-y",
        "label": "x-y",
        "rank": -0.5,
        "before": [1, -1, -1, -0.2],
        "after": [None] * 4,
    }
    root = ElementTree.fromstring(picture([example]))  # noqa: S314 - our own
    marks = [(part.get("stroke-width"), part.get("stroke-dasharray")) for part in root if part.tag.endswith("path")]
    assert marks == [("2", None), ("2", "2 3"), ("2", "2 3"), ("1", "2 3")]
    said = [part.text for part in root if part.tag.endswith("text")]
    assert said[:2] == ["Before · both answer x-y · ρ = −0.50", "After"]
    assert said[2:] == ["a", "<", "bad", ">", "film"] * 2


def test_words():
    def part(value, low, high):
        return {"value": value, "ci95": [low, high]}

    found = {"n": 80, "texts": 100, "rank": part(0.5, 0.4, 0.6), "overlap": part(0.6, 0.5, 0.7), "overlap_by_chance": 0.3}
    assert "more alike than two trainings" in agree(found, found | {"rank": part(0.3, 0.25, 0.4)})
    assert "about as alike as two trainings" in agree(found, found)
    assert "less alike than two trainings" in agree(found, found | {"rank": part(0.8, 0.7, 0.9)})
    assert "two trainings" not in agree(found, None)
    test = {"faithful": True}
    assert "all models pass" in trust({"before": {"attribution": test}, "after": {"attribution": test}})
    assert "the model after do not pass" in trust({"before": {"attribution": test}, "after": {"attribution": {"faithful": False}}})
    models = {"after": {"privacy": {"loss": {"auc": part(0.6, 0.55, 0.65)}}}}
    assert "▼ It tells more" in leaked(models, part(0.1, 0.05, 0.15), "loss")
    assert "▲ It tells less" in leaked(models, part(-0.1, -0.15, -0.05), "loss")
    assert "no difference is shown" in leaked(models, part(0.0, -0.1, 0.1), "loss")
    pieces = weighed(("good film", "bad"), [1.0, -0.5, None])
    assert "".join(piece["text"] for piece in pieces) == "good film | bad"
    assert [piece.get("kind") for piece in pieces] == ["for strong", None, "against strong", None, None]
    assert json.loads(json.dumps(pieces)) == pieces
    kinds = [piece.get("kind") for piece in weighed("a quiet end", [0.2, 0.01, -0.2]) if "weight" in piece]
    assert kinds == ["for weak", "for", "against weak"]
