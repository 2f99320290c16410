"""`compare` from end to end on tiny models: what it finds, what it refuses, and that nothing in it can break the page."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import on_disk
import pytest
import tiny
import torch
from typer.testing import CliRunner

import multum
from multum._compare import LEVELS, compare
from multum._compare_data import elsewhere, group_columns, unusual_lengths
from multum._compare_figures import SECTIONS, Answers, Asked, compared
from multum._compare_page import render, summary
from multum._compare_words import flipped, headline, p_value, said, signed, whom
from multum.cli import app
from multum.errors import InputError
from multum.evidence.flips import flips
from multum.evidence.groups import groups
from multum.steps.finetune import Finetune

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A learned model, its copy, a model of other weights, and data with a column beside the task's."""
    folder = tmp_path_factory.mktemp("compare")
    learn = Finetune(epochs=3, learning_rate=2e-3, batch_size=16)
    learn(tiny.model(seed=1), tiny.task(200, 40, 120)).save(folder / "model")
    shutil.copytree(folder / "model", folder / "copy")
    tiny.model(seed=11).save(folder / "other")
    splits = tiny.splits(200, 40, 120)
    for name in ("train", "validation", "test"):
        rows = [
            {**row, "source": "web" if at % 3 else "phone", "id": str(at)} for at, row in enumerate(getattr(splits, name).to_list())
        ]
        on_disk.write_csv(folder / "data" / f"{name}.csv", rows)
    return folder


KEYS = ("text", "text_pair")


def call(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(autouse=True)
def _fewer_draws(monkeypatch):
    """What is looked at stays; intervals are a little rougher."""
    for name, level in LEVELS.items():
        monkeypatch.setitem(LEVELS, name, replace(level, draws=200, attributed=min(level.attributed, 8), points=4))


# -- what it finds -----------------------------------------------------------------------------------------------------------


def test_a_copy_shows_no_difference(places, tmp_path):
    result = compare(places / "model", places / "copy", data=str(places / "data"), output=tmp_path / "out", group_by=["source"])
    found = result["comparisons"]["after"]
    assert found["difference"]["verdict"] == "not shown"
    assert found["flips"]["agreement"]["value"] == 1
    assert found["groups"]["damaged"] == []
    assert found["groups"]["worst"] is None
    words = said(result)
    assert words["headline"].startswith("No difference shown (±2.2 points): all 120 answers are the same")
    assert "about 270 would show it" in words["status"]
    assert {row["by"] for row in found["groups"]["rows"]} == {"class", "length", "source"}
    assert result["models"]["before"]["fingerprint"] == result["models"]["after"]["fingerprint"]
    assert on_disk.listing(tmp_path / "out") == ["comparison.json", "report.html"]


def test_a_folder_may_be_compared_with_itself_and_with_a_floor(places, tmp_path):
    other = tmp_path / "other.csv"
    on_disk.write_csv(
        other, [{"text": f"{row['text']} zebra", "label": row["label"]} for row in tiny.splits(seed=5).train.to_list()]
    )
    result = multum.compare(
        places / "model",
        places / "model",
        floor=places / "other",
        data=str(places / "data"),
        output=tmp_path / "out",
        level="full",
        shift=other,
    )
    same, floor = result["comparisons"]["after"], result["comparisons"]["floor"]
    assert set(same) == set(floor) == set(SECTIONS)
    assert same["flips"]["flips"]["value"] == 0 < floor["flips"]["flips"]["value"]
    assert floor["difference"]["verdict"] == "lower"
    assert same["shift"]["accuracy"]["excess"] == 0
    assert set(same["perturbations"]) == {"typos", "case", "punctuation", "word order", "first half", "two joined"}
    assert all(one["excess"] == 0 for one in same["perturbations"].values())
    assert same["perturbations"]["case"]["drop_before"] == 0  # the tokenizer knows no capitals
    assert same["perturbations"]["typos"]["drop_before"] > 0.02
    assert same["attribution"]["rank"]["value"] == pytest.approx(1)
    assert floor["attribution"]["rank"]["value"] < 0.9
    assert same["attribution"]["overlap"]["value"] == 1
    assert same["privacy"]["loss"]["auc"] == {"value": 0.0, "ci95": [0.0, 0.0]}
    assert all(model["attribution"]["n"] == 8 for model in result["models"].values())
    page = (tmp_path / "out" / "report.html").read_text()
    _as_on_the_page(result, page)
    assert page.count("training twice") > 10
    assert "word order" in page
    assert "For the same reasons?" in page
    assert "tell who was in its training data" in page
    assert "Not recorded: what was trained on by the model trained again" in page
    assert {role: model["trained_here"] for role, model in result["models"].items()} == {
        "before": False,
        "after": False,
        "floor": None,
    }


def _as_on_the_page(result, page):
    """The terminal's table says of other texts what the page says: both accuracies there, both drops, and what is beyond."""
    other, floor = (result["comparisons"][role]["shift"] for role in ("after", "floor"))
    counted = f"other.csv, n = {other['n']}"
    rows = {row[0]: row[1:] for row in summary(result)}
    there, fell = rows[f"Accuracy on {counted}"], rows["Drop in accuracy there, points"]
    assert there[2] == "0.00"
    assert there[3] == signed(floor["accuracy"]["after"] - other["accuracy"]["before"]) != "0.00"
    assert f"Training twice: {fell[3]} points" in page
    agree = rows[f"Agreement on {counted}"]
    assert f"the same answer to {agree[1]} of these texts {agree[2]}, two trainings to {agree[3]}" in page
    # of two models that differ, without a floor
    models = {"before": result["models"]["before"], "after": result["models"]["floor"]}
    alone = {**result, "models": models, "comparisons": {"after": result["comparisons"]["floor"]}}
    page, rows = render(alone), {row[0]: row[1:] for row in summary(alone)}
    there, fell = rows[f"Accuracy on {counted}"], rows["Drop in accuracy there, points"]
    assert len(there) == len(fell) == 3
    assert there[0] != there[1]
    assert f"Accuracy there is {there[0]} before and {there[1]} after" in page
    assert there[2].startswith("−")
    assert fell[0] != fell[1]
    assert f"of {fell[0]} and {fell[1]} points" in page
    assert f"is {fell[2].split(' ')[0]} points, 95 % interval {fell[2].split('(')[1][:-1]}:" in page


def test_predictions_and_labels_are_those_of_the_model(places, tmp_path):
    """Against transformers itself, on a folder whose labels stand in the other order."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    turned = AutoModelForSequenceClassification.from_pretrained(places / "model")
    with torch.no_grad():
        turned.classifier.weight.copy_(turned.classifier.weight.flip(0))
        turned.classifier.bias.copy_(turned.classifier.bias.flip(0))
    turned.config.id2label, turned.config.label2id = {0: "positive", 1: "negative"}, {"positive": 0, "negative": 1}
    turned.save_pretrained(tmp_path / "turned")
    tokenizer = AutoTokenizer.from_pretrained(places / "model")
    tokenizer.save_pretrained(tmp_path / "turned")
    result = compare(places / "model", tmp_path / "turned", data=str(places / "data"), output=tmp_path / "out")
    assert result["comparisons"]["after"]["flips"]["agreement"]["value"] == 1
    rows = tiny.splits(200, 40, 120).test.to_list()
    with torch.no_grad():
        logits = turned.eval()(**tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt")).logits
    right = np.mean([("positive", "negative")[int(at)] == row["label"] for at, row in zip(logits.argmax(1), rows, strict=True)])
    assert result["models"]["after"]["accuracy"]["value"] == pytest.approx(right)


def damaged(by: str, name: str) -> dict:
    """A result in which one group lost and the average held."""
    rng = np.random.default_rng(0)
    n = 900
    truth = rng.integers(0, 2, n)
    source = rng.choice(["phone", "web"], n, p=[0.2, 0.8])
    groupings = {"class": np.array(["bad", "good"])[truth], "source": source}
    before = np.where(rng.random(n) < 0.88, truth, 1 - truth)
    after = before.copy()
    inside = groupings[by] == name
    after[rng.choice(np.flatnonzero(inside & (before == truth)), 30, replace=False)] ^= 1
    after[rng.choice(np.flatnonzero(~inside & (before != truth)), 30, replace=False)] ^= 1
    scale = 1 + rng.random((n, 1))
    answers = [Answers(test=np.eye(2)[guess] * scale, validation=np.eye(2)[guess] * scale) for guess in (before, after)]
    asked = Asked(
        texts=[f"text {at}" for at in range(n)], truth=truth, validation_truth=truth, labels=("bad", "good"),
        groupings=groupings, shift_truth=None, margin=0.02, draws=200, seed=0,
    )  # fmt: skip
    return compared(*answers, asked)


@pytest.mark.parametrize(("by", "name", "words_for"), [("class", "good", "class good"), ("source", "phone", "source = phone")])
def test_damage_to_a_class_or_a_users_group_is_named(by, name, words_for):
    found = damaged(by, name)
    assert found["difference"]["value"] == 0
    assert headline(found["difference"], found["flips"]).startswith("No difference shown")
    assert [(row["by"], row["name"]) for row in found["groups"]["damaged"]] == [(by, name)]
    assert whom(found["groups"]).startswith(f"Damaged by more than chance, worst first: {words_for} −")
    assert "more than the rest" in whom(found["groups"])
    words = said({"comparisons": {"after": found}})
    assert re.fullmatch(
        rf"No difference shown \(±[\d.]+ points\) on average, but {words_for} lost [\d.]+ points", words["headline"]
    )
    lost = found["flips"]["examples"]["lost"]
    assert len(lost) == 30
    assert [one["after"]["probability"] for one in lost] == sorted((one["after"]["probability"] for one in lost), reverse=True)


def test_a_model_that_was_damaged_for_one_class_is_found_from_its_folder(places, tmp_path):
    """The head answers positive too often: what positive texts gain, negative ones lose."""
    from transformers import AutoModelForSequenceClassification

    whole = places / "model"
    leaning = AutoModelForSequenceClassification.from_pretrained(whole)
    shutil.copytree(whole, tmp_path / "leaning")
    found = {}
    for step in range(1, 40):
        with torch.no_grad():
            leaning.classifier.bias[leaning.config.label2id["positive"]] += 0.1
        leaning.save_pretrained(tmp_path / "leaning")
        found = compare(whole, tmp_path / "leaning", data=str(places / "data"), output=tmp_path / f"out-{step}")["comparisons"][
            "after"
        ]
        if found["groups"]["damaged"]:
            break
    assert [(row["by"], row["name"]) for row in found["groups"]["damaged"]] == [("class", "negative")]
    assert found["groups"]["worst"]["name"] == "negative"
    assert "class negative" in whom(found["groups"])


def test_a_model_that_fails_where_texts_are_longer_than_those_trained_on_is_named():
    rng, n = np.random.default_rng(1), 600
    lengths, truth = np.arange(n) + 1, rng.integers(0, 2, n)
    texts, trained = ["x" * at for at in lengths], ["x" * at for at in range(1, 501)]
    unusual = unusual_lengths(texts, trained)
    assert {name: (than, int(rows.sum())) for name, (than, rows) in unusual.items()} == {"shorter": (50, 49), "longer": (450, 150)}
    before = np.where(rng.random(n) < 0.9, truth, 1 - truth)
    after = np.where((lengths > 450) & (rng.random(n) < 0.3), 1 - before, before)
    asked = Asked(
        texts=texts, truth=truth, validation_truth=truth, labels=("bad", "good"), groupings={}, unusual=unusual,
        shift_truth=None, margin=0.02, draws=50, seed=0,
    )  # fmt: skip
    first, second = (Answers(test=np.eye(2)[guess], validation=np.eye(2)[guess]) for guess in (before, after))
    found = SECTIONS["lengths"](first, second, asked)
    usual = (lengths >= 50) & (lengths <= 450)
    right = [(guess == truth).astype(float) for guess in (before, after)]
    drops = [one[usual].mean() - one[lengths > 450].mean() for one in right]
    assert found["longer"]["excess"] == pytest.approx(drops[1] - drops[0])
    assert (found["longer"]["n"], found["longer"]["verdict"]) == (150, "more fragile")
    assert (found["shorter"]["than"], found["shorter"]["excess"], found["shorter"]["verdict"]) == (50, 0, "not shown")
    few = replace(asked, unusual={"longer": (590, lengths > 590), "shorter": (590, lengths < 590)})
    assert SECTIONS["lengths"](first, second, few) == {}  # ten texts, and one text that is neither: nothing is claimed


# -- bad input ---------------------------------------------------------------------------------------------------------------


def refused(places, tmp_path, *parts, after="copy", **options) -> str:
    options = {"data": str(places / "data"), "output": tmp_path / "out"} | options
    with pytest.raises(InputError) as caught:
        compare(places / "model", places / after if isinstance(after, str) else after, **options)
    assert not (tmp_path / "out").exists()
    for part in parts:
        assert part in str(caught.value)
    return str(caught.value)


def test_other_labels_are_shown_beside_the_datas(places, tmp_path):
    tiny.model(labels=("good", "bad")).save(tmp_path / "labels")
    said = refused(places, tmp_path, after=tmp_path / "labels")
    assert "good, bad" in said
    assert "negative, positive" in said


def test_all_that_is_wrong_is_said_at_once(places, tmp_path):
    text = refused(
        places,
        tmp_path,
        "nowhere",
        "margin: 0",
        "level: 'some'",
        "split: 'dev'",
        after="nowhere",
        margin=0,
        level="some",
        split="dev",
    )
    assert text.startswith("4 problems")
    bare = tmp_path / "unlabelled.csv"
    on_disk.write_csv(bare, [{"words": "a film"}] * 3)
    refused(places, tmp_path, "no column 'place'", "no column 'text'", group_by=["place"], shift=bare)


def test_columns_that_tell_no_groups_apart(places, tmp_path):
    refused(places, tmp_path, "--group-by", "'id' is another one for every example", group_by=["id"])
    refused(
        places, tmp_path, "no column 'place'", "text, label, source, id", "'id' is another", group_by=["place", "id"], after="copy"
    )
    text = refused(
        places, tmp_path, "no column 'place'", "nothing.csv", "nowhere", after="nowhere", group_by=["place"], shift="nothing.csv"
    )
    assert text.startswith("3 problems")
    texts = [str(at) for at in range(60)]
    rows = [{"text": text, "label": "a", "same": "x", "many": str(at // 4)} for at, text in enumerate(texts)]
    source = str(on_disk.write_csv(tmp_path / "data.csv", rows))
    with pytest.raises(InputError, match="'x' for every example"):
        group_columns(source, "test", texts, ["same"], {}, KEYS)
    with pytest.raises(InputError, match="has 15 values, the most frequent for 4 examples"):
        group_columns(source, "test", texts, ["many"], {}, KEYS)
    refused(places, tmp_path, "does not say which data it is for; give --data", data="", group_by=["source"])


def test_groups_are_found_in_the_data_of_a_run(places, tmp_path):
    for name in ("model", "copy"):
        shutil.copytree(places / name, tmp_path / "run" / name)
    (tmp_path / "run" / "run.json").write_text(
        json.dumps({"task": "text-classification", "data": {"source": str(places / "data")}})
    )
    result = compare(tmp_path / "run" / "model", tmp_path / "run" / "copy", output=tmp_path / "out", group_by=["source"])
    assert {row["name"] for row in result["comparisons"]["after"]["groups"]["rows"] if row["by"] == "source"} == {"web", "phone"}


def test_group_columns_find_their_rows(tmp_path):
    rows = [{"review": f" text {at} ", "label": "a", "stars": "" if at == 3 else str(at % 2)} for at in range(60)]
    source = str(on_disk.write_csv(tmp_path / "data.csv", rows))
    texts = [f"text {at}" for at in reversed(range(60))]
    found = group_columns(source, "test", texts, ["stars"], {"text": "review"}, KEYS)["stars"]
    assert found[-5:].tolist() == ["0", "(none)", "0", "1", "0"]
    assert found[0] == "1"
    pairs = [{"question": f"which {at}?", "context": f"text {at // 2}", "kind": "ab"[at % 2]} for at in range(60)]
    source = str(on_disk.write_csv(tmp_path / "pairs.csv", pairs))
    asked = [(row["question"], row["context"]) for row in pairs]
    assert group_columns(source, "test", asked, ["kind"], {}, ("question", "context"))["kind"].tolist() == ["a", "b"] * 30
    words = [{"words": [f"word{at}", "and", "more"], "kind": "ab"[at % 2]} for at in range(60)]
    (tmp_path / "words.jsonl").write_text("\n".join(map(json.dumps, words)))
    source, aliases = str(tmp_path / "words.jsonl"), {"tokens": ("words",)}
    tagged = [row["words"] for row in words[1:]]
    assert group_columns(source, "test", tagged, ["kind"], {}, ["tokens"], aliases)["kind"].tolist()[:3] == ["b", "a", "b"]
    with pytest.raises(InputError, match="examples that are not its rows as they are"):
        group_columns(source, "test", [["word0", "and"]], ["kind"], {}, ["tokens"], aliases)


def test_too_few_rows_say_how_many_would_do(places, tmp_path):
    on_disk.review_folder(tmp_path / "few", n_train=40, n_validation=8, n_test=8)
    said = refused(places, tmp_path, data=str(tmp_path / "few"))
    assert all(part in said for part in ("8 examples", "fewer than 20", "takes about 5,"))


def test_shift_data(places, tmp_path):
    task, few = tiny.task(), tmp_path / "few.txt"
    few.write_text("a film\n")
    refused(places, tmp_path, "1 usable texts", shift=few)
    rows = [{"text": f"film {at}", "label": "positive" if at else "great"} for at in range(30)]
    with pytest.raises(InputError, match="'great'"):
        elsewhere(on_disk.write_csv(tmp_path / "labels.csv", rows), task, {})
    bare = tmp_path / "bare.txt"
    bare.write_text("\n".join(tiny.splits(seed=6).train["text"]))
    found = elsewhere(bare, task, {})
    assert found.truth is None
    assert "agreement" in found.notes[0]
    rows = [{"review": row["text"], "label": row["label"]} for row in rows[1:]] + [{"review": "", "label": "positive"}]
    found = elsewhere(on_disk.write_csv(tmp_path / "good.csv", rows), task, {"text": "review"})
    assert len(found.texts) == 29
    assert set(found.truth) == {1}
    result = compare(places / "model", places / "other", data=str(places / "data"), output=tmp_path / "out", shift=bare)
    shifted = result["comparisons"]["after"]["shift"]
    assert "accuracy" not in shifted
    assert 0 < shifted["agreement"]["value"] < 1
    assert "no labels" in (tmp_path / "out" / "report.html").read_text()


def test_models_that_cannot_be_compared(places, tmp_path):
    text = refused(places, tmp_path, after=places / "data")
    assert "neither a model nor an export" in text
    with pytest.raises(InputError, match="nobody/nothing is no folder and cannot be fetched from the Hub"):
        compare(places / "model", "nobody/nothing", data=str(places / "data"), output=tmp_path / "out")
    refused(places, tmp_path, "no export for onnxruntime-int8", runtime="onnxruntime-int8")
    assert refused(places, tmp_path, "in forms that are named", runtime="auto-int8").startswith("--runtime"), "said once"
    shutil.copytree(places / "model", tmp_path / "headless")
    config = json.loads((tmp_path / "headless" / "config.json").read_text())
    (tmp_path / "headless" / "config.json").write_text(json.dumps(config | {"architectures": ["BertModel"]}))
    refused(places, tmp_path, "no classification head", after=tmp_path / "headless")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("kept")
    with pytest.raises(InputError, match="exists already"):
        compare(places / "model", places / "copy", data=str(places / "data"), output=tmp_path / "full")


# -- the command and the page ------------------------------------------------------------------------------------------------


def test_the_command(places, tmp_path):
    bare = tmp_path / "bare.txt"
    bare.write_text("\n".join(tiny.splits(seed=6).train["text"]))
    models = (places / "model", places / "other")
    done = call("compare", *models, "--data", places / "data", "-o", tmp_path / "out", "--group-by", "source", "--shift", bare)
    assert done.exit_code == 0, done.output
    assert "Note: bare.txt has no labels: agreement of the two models only" in done.stdout
    assert "less accurate, more than chance explains" in done.stdout
    assert re.search(r"Accuracy .*−\d", done.stdout)
    assert re.search(r"Agreement on bare.txt, n = \d+ ", done.stdout)
    assert "Drop in accuracy there" not in done.stdout  # it has no labels
    assert str(tmp_path / "out" / "report.html") in done.stdout
    shown = call("compare", places / "model", places / "copy", "--data", places / "data", "-o", tmp_path / "json", "--json")
    assert json.loads(shown.stdout) == json.loads((tmp_path / "json" / "comparison.json").read_text())
    wrong = call("compare", places / "model", places / "copy", "--data", places / "data", "-o", tmp_path / "no", "--margin", "2%")
    assert wrong.exit_code == 2
    assert not (tmp_path / "no").exists()


class Page(HTMLParser):
    """Tags that are open, and all that would need a network."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.links += [value for name, value in attrs if name in ("src", "href") or (name == "style" and "url" in value)]
        if tag not in ("meta", "br", "path", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag != "path":
            assert self.open.pop() == tag


def test_the_page_is_whole_offline_and_small(places, tmp_path):
    compare(places / "model", places / "other", data=str(places / "data"), output=tmp_path / "out", group_by=["source"])
    text = (tmp_path / "out" / "report.html").read_text()
    page = Page(text)
    assert page.open == page.links == []
    assert len(text) < 3e6
    assert "url(" not in text
    assert text.count("<details>") == text.count("<summary>") > 2  # opened by keys, by the browser itself
    assert ":focus-visible" in text
    assert not re.search(r'<pre(?! tabindex="0")', text)  # what scrolls can be scrolled by keys
    assert "onclick" not in text
    for part in (
        "▼ Right before, wrong after",
        "source = phone",
        "After temperature scaling",
        "SHA-256",
        "prefers-color-scheme: dark",
    ):
        assert part in text


def test_nothing_in_a_text_or_a_name_can_abuse_the_page(places, tmp_path):
    compare(places / "model", places / "other", data=str(places / "data"), output=tmp_path / "out", group_by=["source"])
    text = (tmp_path / "out" / "comparison.json").read_text()
    attack = "<script>alert(1)</script>"
    assert '"phone"' in text
    hostile = json.loads(text.replace('"phone"', json.dumps(attack)))
    hostile["models"]["after"]["source"] = hostile["data"]["notes"] = [attack]
    hostile["comparisons"]["after"]["flips"]["examples"]["lost"][0]["text"] = attack
    page = render(hostile)
    assert attack not in page
    assert page.count("&lt;script&gt;alert(1)") > 4


def test_words():
    assert signed(-0.0149) == "−1.49"
    assert signed(-0.00001) == "0.00"
    assert (p_value(1e-9), p_value(0.0123), p_value(0.61)) == ("< 0.0001", "0.01", "0.61")
    z, truth = np.eye(2)[np.arange(100) % 2], np.arange(100) % 2
    same = flips(z, z, truth, draws=5, seed=0, examples=1)
    worse = flips(z, np.concatenate([1 - z[:30], z[30:]]), truth, draws=5, seed=0, examples=1)
    assert flipped(same, None) == "No answer changed between right and wrong."
    assert "more than between two trainings" in flipped(worse, same)
    assert "about as many as between" in flipped(worse, worse)
    nobody = groups(np.ones(5, dtype=bool), np.ones(5, dtype=bool), {"class": ["a"] * 5}, seed=0)
    assert "No group has enough examples" in whom(nobody)
    assert Path(multum.__file__).with_name("comparison.html.j2").is_file()
