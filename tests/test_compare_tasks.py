"""`compare` of tasks that are no classification into one class: figures are the task's own, damage is found, copies are equal."""

from __future__ import annotations

import html
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import on_disk
import pytest
import taggers
import tiny
import torch
import translators
from typer.testing import CliRunner

from multum import _compare_outputs, _compare_outputs_page, runtimes
from multum._compare import compare
from multum._compare_look import LEVELS
from multum._compare_outputs import compare_outputs
from multum._compare_tasks import view_of
from multum._compare_tokens import exposures, log_probabilities, next_tokens, written
from multum._verify import verify
from multum.cli import app
from multum.core.model import Model
from multum.core.training import fit
from multum.core.writing import TorchWriter, behind, prompt_of
from multum.errors import InputError
from multum.evidence.privacy import exposure
from multum.progress import Progress

pytestmark = pytest.mark.usefixtures("one_thread")
HOW: dict[str, Any] = {"margin": 0.01, "level": "full", "split": "test", "seed": 0, "threads": 1, "asked_for": {}}


@pytest.fixture(autouse=True)
def _fewer_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, level in LEVELS.items():
        monkeypatch.setitem(LEVELS, name, replace(level, draws=200))


def number_task() -> Any:
    from multum.tasks._regression import Regression

    return Regression.from_splits(scored())


def scored() -> Any:
    from datasets import Dataset

    found = tiny.splits(40, 24, 40)
    for name in ("train", "validation", "test"):
        rows = getattr(found, name).to_list()
        setattr(found, name, Dataset.from_list([{"text": row["text"], "score": float(len(row["text"]))} for row in rows]))
    return found


def label_task() -> Any:
    from datasets import Dataset

    from multum.tasks._multi_label import MultiLabelClassification

    found = tiny.splits(40, 24, 40)
    for name in ("train", "validation", "test"):
        rows = getattr(found, name).to_list()
        lists = [[row["label"], *(["long"] if len(row["text"]) > 40 else [])] for row in rows]
        setattr(
            found, name, Dataset.from_list([{"text": row["text"], "label": some} for row, some in zip(rows, lists, strict=True)])
        )
    return MultiLabelClassification.from_splits(found)


def with_problem(task: Any) -> Any:
    found = tiny.model(labels=task.labels, seed=1)
    found.module.config.problem_type = task.problem
    return found


CASES = {
    "token-classification": (lambda: taggers.tagging(test=40), lambda _: taggers.tagger()),
    "question-answering": (lambda: taggers.answering(test=40), lambda _: taggers.answerer()),
    "multi-label": (label_task, with_problem),
    "regression": (number_task, with_problem),
    "translation": (lambda: translators.translating(n_test=24), lambda _: translators.translator()),
}


def damaged(model: Any) -> Any:
    found = model.copy()
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in found.module.parameters():
            parameter += torch.randn(parameter.shape, generator=draw) * 0.5
    return found


@pytest.mark.parametrize("case", CASES)
def test_the_metric_is_the_tasks_own_a_copy_is_the_same_and_another_model_is_not(case: str, tmp_path: Path) -> None:
    task, model = CASES[case][0](), CASES[case][1](CASES[case][0]())
    model.save(tmp_path / "before", {"task": task.name})
    model.save(tmp_path / "copy", {"task": task.name})
    damaged(model).save(tmp_path / "other", {"task": task.name})
    folders = {"before": tmp_path / "before", "after": tmp_path / "copy", "floor": tmp_path / "other"}
    view = view_of(task)
    assert view is not None
    found = compare_outputs(task, view, folders, folders, output=tmp_path / "out", progress=Progress.silent(), **HOW)
    same, other = found["comparisons"]["after"], found["comparisons"]["floor"]
    assert same["difference"]["value"] == 0
    assert same["difference"]["p"] == 1
    predictions = _compare_outputs.Executed(folders["before"], 1, task).predict(list(task.inputs("test")))
    theirs = task.score(predictions, "test")
    if case == "translation":
        import sacrebleu

        from multum.core.generation import texts_of

        pairs = zip(texts_of(predictions), task.references["test"], strict=True)
        assert same["difference"]["before"] == pytest.approx(
            np.mean([sacrebleu.sentence_chrf(a, [b]).score / 100 for a, b in pairs])
        )
    else:
        assert same["difference"]["before"] == pytest.approx(theirs.value, abs=1e-5)
    if view.discrete:
        assert same["same"]["value"] == 1 > other["same"]["value"]
        assert other["examples"]
        assert all(one["before"] != one["after"] for one in other["examples"])
        assert same["examples"] == []
    for one, another in zip(same["closeness"], other["closeness"], strict=True):
        assert one["value"] == pytest.approx(1 if one["share"] else 0, abs=1e-6)
        assert another["value"] < 1 if one["share"] else another["value"] > 1e-3
    full = {"task": task.name, "level": "full", "split": "test", "seed": 0, "elapsed_s": 1.0, "versions": {}, "when": "", **found}
    full |= {"data": {"source": "<x>", "notes": [], "fingerprints": {}}, "machine": {"processor": "", "cores": 1, "system": ""}}
    page = _compare_outputs_page.render(full)
    assert "<x>" not in page
    assert "No difference shown" in page or "Equal" in page
    assert view.metric.replace("'", "&#39;") in page
    assert len(_compare_outputs_page.summary(full)[0]) == 5


def test_the_page_says_how_many_examples_would_do() -> None:
    found: dict[str, Any] = {
        "value": 0.001,
        "before": 0.8,
        "after": 0.801,
        "ci95": [-0.02, 0.02],
        "p": 0.5,
        "n": 100,
        "needed": 4321,
    }
    found |= {"verdict": "not shown", "within_margin": False, "margin": 0.01, "shown_within": 0.03}
    metric = {"name": "F1 of entities", "share": True, "lower_is_better": False}
    result = {"metric": metric, "comparisons": {"after": {"difference": found, "groups": [], "same": None}}}
    assert "within 1 point: if they are, about 4,300 would show it" in _compare_outputs_page.said(result)["status"]
    found["needed"] = None
    assert "about" not in _compare_outputs_page.said(result)["status"]


@pytest.fixture
def language(tmp_path: Path) -> Path:
    """A language model, itself with noise, and texts."""
    model = tiny.language_model("llama")
    model.save(tmp_path / "model", {"task": "text-generation"})
    damaged(model).save(tmp_path / "other", {"task": "text-generation"})
    found = tiny.text_splits(20, 12, 30)
    for name in ("train", "validation", "test"):
        on_disk.write_csv(tmp_path / "data" / f"{name}.csv", getattr(found, name).to_list())
    return tmp_path


def test_a_damaged_language_model_is_found_by_the_command_and_the_comparison_is_verified(language: Path) -> None:
    call = ["compare", language / "model", language / "other", "--data", language / "data", "-o", language / "out", "--threads", 1]
    said = CliRunner().invoke(app, list(map(str, call)))
    assert said.exit_code == 0, said.output
    result = json.loads((language / "out" / "comparison.json").read_text())
    assert result["comparisons"]["after"]["difference"]["verdict"] == "worse"
    assert result["comparisons"]["after"]["difference"]["value"] > 0
    assert "Perplexity" in said.output
    assert "About " in said.output
    assert "Stopped, the same command goes on where it was" in said.output
    assert "higher, more than chance explains" in said.output
    assert on_disk.listing(language / "out") == ["comparison.json", "report.html"]
    assert verify(language / "out", threads=1)["agrees"]


def test_groups_of_the_users_own_in_another_task(language: Path, tmp_path: Path) -> None:
    """What the other model does worse everywhere it does worse in both, by the groups of the rows."""
    rows = tiny.text_splits(20, 12, 60).test.to_list()
    kinds = ["web" if at % 3 else "phone" for at in range(len(rows))]
    for name in ("train", "validation"):
        on_disk.write_csv(
            tmp_path / "data" / f"{name}.csv", [{"text": f"{name} film", "place": "web"}, {"text": "a plot", "place": "web"}]
        )
    on_disk.write_csv(tmp_path / "data" / "test.csv", [{**row, "place": kind} for row, kind in zip(rows, kinds, strict=True)])
    how: dict[str, Any] = {"data": str(tmp_path / "data"), "threads": 1, "group_by": ["place"]}
    result = compare(language / "model", language / "other", output=tmp_path / "out", **how)
    groups = {row["name"]: row for row in result["comparisons"]["after"]["groups"] if row["by"] == "place"}
    assert {name: row["n"] for name, row in groups.items()} == {"web": kinds.count("web"), "phone": kinds.count("phone")}
    assert all(row["damaged"] for row in groups.values())
    assert "place = phone" in (tmp_path / "out" / "report.html").read_text()
    assert result["data"]["group_by"] == ["place"]
    with pytest.raises(InputError, match="no column 'where'"):
        compare(language / "model", language / "other", output=tmp_path / "no", **how | {"group_by": ["where"]})


def test_what_only_the_other_comparison_knows_and_models_of_other_tasks_are_refused(language: Path, tmp_path: Path) -> None:
    how: dict[str, Any] = {"data": str(language / "data"), "threads": 1}
    lexicon = language / "words.txt"
    lexicon.write_text("film, movie\n")
    with pytest.raises(InputError, match="--lexicon") as refused:
        compare(language / "model", language / "other", output=tmp_path / "out", lexicon=lexicon, shadows=8, **how)
    assert any("--shadows is known only of text classification" in one for one in refused.value.problems)
    tiny.model().save(tmp_path / "classifier")
    with pytest.raises(InputError, match="it is a model for text-classification, and the comparison is of text-generation"):
        compare(language / "model", tmp_path / "classifier", output=tmp_path / "out", **how)


def test_models_that_do_not_say_their_task_are_asked_for_it(language: Path, tmp_path: Path) -> None:
    for name in ("model", "other"):
        (language / name / "recipe.json").unlink()
    how: dict[str, Any] = {"data": str(language / "data"), "threads": 1}
    with pytest.raises(InputError, match=r"--task is missing, .* is a LlamaForCausalLM"):
        compare(language / "model", language / "other", output=tmp_path / "out", **how)
    found = compare(language / "model", language / "other", output=tmp_path / "out", task="text-generation", **how)
    assert found["task"] == "text-generation"


def test_language_models_are_compared_token_by_token(language: Path) -> None:
    """Against a loop over places."""
    first, second = (Model.load(language / name, auto_class="AutoModelForCausalLM") for name in ("model", "other"))
    texts = tiny.passages(3)
    found = next_tokens(first, second, texts)
    assert found is not None
    for text, share, kl in zip(texts, *found, strict=True):
        ids = first.tokenizer(text)["input_ids"]
        alike, apart = [], []
        for place in range(1, len(ids)):
            with torch.no_grad():
                p, q = (
                    one.module(input_ids=torch.tensor([ids[:place]])).logits[0, -1].double().softmax(0) for one in (first, second)
                )
            alike.append(int(p.argmax() == q.argmax()))
            apart.append(float((p * (p / q).log()).sum()))
        assert share == pytest.approx(np.mean(alike))
        assert kl == pytest.approx(np.mean(apart), rel=1e-3)


def test_what_language_models_write_behind_the_openings_of_texts_is_compared(language: Path) -> None:
    """Against a loop that takes the most probable token; a model against itself writes the same."""
    predictors = {name: runtimes.find("pytorch").open(language / name, threads=1) for name in ("model", "other")}
    texts = ["the film", *tiny.passages(3), "word", ({"role": "user", "content": "the plot"},)]
    places, openings, found = written({"before": predictors["model"], "after": predictors["other"]}, texts[:-1])
    assert [texts[place].startswith(opening) for place, opening in zip(places, openings, strict=True)] == [True] * 4
    assert openings[0] == "the"
    assert all(1 <= len(opening) <= len(texts[place]) // 2 for place, opening in zip(places, openings, strict=True))
    for role, name in (("before", "model"), ("after", "other")):
        model = Model.load(language / name, auto_class="AutoModelForCausalLM")
        for opening, text in zip(openings, found[role], strict=True):
            ids = prompt_of(model.tokenizer, opening)
            new: list[int] = []
            ends = TorchWriter(model.module, model.tokenizer).ends()
            while len(new) < 32 and not (new and new[-1] in ends):
                with torch.no_grad():
                    new.append(int(model.module(input_ids=torch.tensor([ids + new])).logits[0, -1].argmax()))
            assert text == behind(model.tokenizer, ids, new)
    how: dict[str, Any] = {"data": str(language / "data"), "threads": 1}
    same = compare(language / "model", language / "model", output=language / "same", **how)["comparisons"]["after"]
    assert same["same"]["value"] == 1
    assert same["examples"] == []
    apart = compare(language / "model", language / "other", output=language / "apart", **how)["comparisons"]["after"]
    assert apart["same"]["value"] == 1 - len(apart["examples"]) / apart["same"]["n"]
    assert apart["same"]["value"] < 1
    assert {one["name"]: one["value"] for one in apart["closeness"]}["Words kept"] < 1
    page = (language / "apart" / "report.html").read_text()
    assert f"Same output behind {apart['same']['n']} openings" in page
    assert "what each model writes behind it" in page
    assert apart["examples"][0]["after"] in html.unescape(page)


def test_probabilities_of_canaries_are_those_of_the_model_and_exposure_ranks_them(language: Path) -> None:
    model = Model.load(language / "model", auto_class="AutoModelForCausalLM")
    texts = ["film story 12", "the plot"]
    for text, found in zip(texts, log_probabilities(model, texts), strict=True):
        ids = torch.tensor([model.tokenizer(text)["input_ids"]])
        with torch.no_grad():
            mean = float(model.module(input_ids=ids, labels=ids).loss)
        assert found == pytest.approx(-mean * (ids.shape[1] - 1), rel=1e-4)
    assert exposure(0.0, np.full(7, -1.0)) == 3
    assert exposure(-2.0, np.full(7, -1.0)) == 0
    rng = np.random.default_rng(0)
    assert np.mean([exposure(one[0], one[1:]) for one in rng.normal(size=(3000, 1000))]) == pytest.approx(1 / np.log(2), abs=0.1)


def test_a_canary_that_was_learnt_by_heart_is_found_and_one_that_was_not_is_not(language: Path) -> None:
    """Digits are no tokens of the small vocabulary of reviews, so that the model gets them."""
    model = Model.load(language / "model", auto_class="AutoModelForCausalLM")
    planted = "the story 4 7 1 9"
    if len(set(model.tokenizer("1 2 3 4 5 6 7 8 9 0", add_special_tokens=False)["input_ids"])) < 10:
        model.tokenizer.add_tokens(list("0123456789"))
        model.module.resize_token_embeddings(len(model.tokenizer), mean_resizing=False)
    rows = [{"input_ids": ids, "attention_mask": [1] * len(ids), "labels": ids} for ids in [model.tokenizer(planted)["input_ids"]]]
    heart = model.copy()
    fit(heart, rows * 8, lambda module, batch: module(**batch).loss, epochs=5, learning_rate=5e-3, batch_size=4, precision="fp32")
    assert exposures(heart, [planted], 0)[0]["exposure"] == pytest.approx(np.log2(1000))
    assert exposures(heart, ["the story 8 2 6 3"], 0)[0]["exposure"] < 9
    heart.save(language / "heart", {"task": "text-generation"})
    model.save(language / "plain", {"task": "text-generation"})
    (language / "canaries.txt").write_text(f"{planted}\n")
    how: dict[str, Any] = {"data": str(language / "data"), "threads": 1, "canaries": language / "canaries.txt"}
    result = compare(language / "plain", language / "heart", output=language / "told", **how)
    before, after = (result["models"][role]["canaries"][0]["exposure"] for role in ("before", "after"))
    assert after == pytest.approx(np.log2(1000))
    assert before < after
    assert f"Exposure of {planted}" in (language / "told" / "report.html").read_text()
    (language / "canaries.txt").write_text("no digits\n")
    with pytest.raises(InputError, match="has 0 digits"):
        compare(language / "plain", language / "heart", output=language / "again", **how)


def test_one_model_that_writes_is_for_both_tasks_of_writing(tmp_path: Path) -> None:
    translators.translator().save(tmp_path / "m")
    for task in (translators.translating(), translators.summarizing()):
        assert len(_compare_outputs.Executed(tmp_path / "m", 1, task).predictor.predict(["film"])) == 1
    with pytest.raises(InputError, match="it is a model for translation, and the comparison is of token-classification"):
        _compare_outputs.Executed(tmp_path / "m", 1, taggers.tagging())
