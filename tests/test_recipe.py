"""Recipes: what they mean, and that every mistake is found at once and before any work."""

from __future__ import annotations

import textwrap

import on_disk
import pytest

from multum import recipe as recipes
from multum.errors import InputError

GOOD = """
    model: MODEL
    task: text-classification
    data: DATA
    columns: {text: text}
    unlabelled: DATA/train.csv
    seed: 3
    steps:
      - finetune: {epochs: 1, learning_rate: 2e-5}
      - prune_weights:
          pattern: 2:4
      - trim_vocabulary
      - distill: {teacher: "stage:finetune"}
"""


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipes")
    return on_disk.model_folder(folder / "model"), on_disk.review_folder(folder / "data")


@pytest.fixture
def write(tmp_path, places):
    def write(text):
        path = tmp_path / "recipe.yaml"
        text = textwrap.dedent(text).replace("MODEL", str(places[0])).replace("DATA", str(places[1]))
        path.write_text(text, encoding="utf-8")
        return path

    return write


def problems_of(path):
    with pytest.raises(InputError) as error:
        recipes.read(path)
    return error.value.problems


def test_a_right_recipe(write, places):
    recipe = recipes.read(write(GOOD))
    assert recipe.model == str(places[0])
    assert recipe.seed == 3
    assert recipe.unlabelled == f"{places[1]}/train.csv"
    assert recipe.stages == ["01-finetune", "02-prune_weights", "03-trim_vocabulary", "04-distill"]
    assert recipe.steps[0].fields == {"epochs": 1, "learning_rate": 2e-5}
    assert recipe.steps[1].fields == {"pattern": "2:4"}
    assert recipe.steps[2].fields == {}


def test_changes_take_the_place_of_entries(write, tmp_path):
    other = on_disk.review_folder(tmp_path / "other")
    changed = recipes.read(write(GOOD), data=str(other), unlabelled=str(other / "test.csv"))
    assert (changed.data, changed.unlabelled) == (str(other), str(other / "test.csv"))


def test_three_mistakes_are_all_reported(write):
    found = problems_of(
        write(
            """
            model: MODEL
            task: text-classification
            data: DATA
            steps:
              - finetune: {epochs: 0}
              - shrink_a_lot
              - prune_weights: {sparsity: much, colour: red}
            """
        )
    )
    text = "\n".join(found)
    assert "step 1: finetune" in text
    assert "epochs" in text
    assert "no step named 'shrink_a_lot'" in text
    assert "trim_vocabulary" in text  # says which there are
    assert "no field named 'colour'" in text
    assert "sparsity" in text
    assert len(found) == 4


def test_mistakes_of_every_part_are_reported_together(write):
    found = problems_of(
        write(
            """
            model: nowhere/at/all
            task: text-clasification
            dta: DATA
            data: missing.csv
            unlabelled: nothing.txt
            seed: soon
            steps:
              - finetune: {epochs: 1}
              - [finetune]
            """
        )
    )
    text = "\n".join(found)
    for part in (
        "no such folder",
        "text-clasification",
        "unknown entry 'dta'",
        "missing.csv",
        "unlabelled: no such file: nothing.txt",
        "seed",
        "steps: number 2",
    ):
        assert part in text, part


def test_missing_entries_are_named(write):
    text = "\n".join(problems_of(write("seed: 1\n")))
    for name in ("model", "task", "data", "steps"):
        assert f"'{name}' is missing" in text


@pytest.mark.parametrize("steps", ["[]", "finetune", "{finetune: {epochs: 1}}", "[{finetune: 3}]", "[{finetune: {}, distill: {}}]"])
def test_steps_of_the_wrong_form(write, steps):
    text = "\n".join(problems_of(write(f"model: MODEL\ntask: text-classification\ndata: DATA\nsteps: {steps}\n")))
    assert "steps" in text


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("model: a\n  task: b\n", "line 2"),
        ("model: [a\ntask: b\n", "line 2"),
        ("model: a\nmodel: b\n", "line 2, column 1: 'model' is written twice"),
        ("model: !!python/object/apply:os.system ['true']\n", "line 1"),
        ("model: 'a\n", "line 2"),
        ("a: 1\n---\nb: 2\n", "line 2"),
    ],
)
def test_yaml_that_cannot_be_read_is_named_by_line(tmp_path, text, place):
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    (problem,) = problems_of(path)
    assert str(path) in problem
    assert place in problem


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "just words\n", "7\n"])
def test_a_file_that_is_no_recipe(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    (problem,) = problems_of(path)
    assert "model" in problem


def test_files_that_cannot_be_read(tmp_path):
    assert "no such recipe" in problems_of(tmp_path / "none.yaml")[0]
    assert "cannot read" in problems_of(tmp_path)[0]
    (tmp_path / "latin.yaml").write_bytes("model: é".encode("latin-1"))
    assert "not UTF-8" in problems_of(tmp_path / "latin.yaml")[0]


@pytest.mark.parametrize(
    ("value", "meaning"),
    [
        ("2:4", "2:4"),
        ("2e-5", 2e-5),
        ("1e3", 1000.0),
        ("-0.5", -0.5),
        (".5", 0.5),
        ("12", 12),
        ("1_000", "1_000"),
        ("012", "012"),
        ("no", "no"),
        ("true", True),
        ("~", None),
        ("", None),
        ("2026-01-01", "2026-01-01"),
        ("[0, 2]", [0, 2]),
    ],
)
def test_plain_values_are_those_of_yaml_1_2(value, meaning):
    found = recipes.load_yaml(f"key: {value}\n", "here")["key"]
    assert found == meaning
    assert type(found) is type(meaning)


@pytest.mark.parametrize(
    ("reference", "before", "stage"),
    [
        ("stage:model", 0, "model"),
        ("stage:finetune", 3, "01-finetune"),
        ("stage:1", 1, "01-finetune"),
        ("stage:02-prune_weights", 3, "02-prune_weights"),
    ],
)
def test_references_to_stages(write, reference, before, stage):
    assert recipes.read(write(GOOD)).stage(reference, before) == stage


@pytest.mark.parametrize("reference", ["stage:distill", "stage:prune_structured", "stage:4", "stage:9", "stage:"])
def test_references_that_mean_nothing_are_reported(write, reference):
    (problem,) = problems_of(write(GOOD.replace("stage:finetune", reference)))
    assert reference in problem
    assert "stage:01-finetune" in problem


def test_a_reference_that_means_two_stages_is_reported(write):
    text = GOOD.replace("- trim_vocabulary", "- finetune: {epochs: 1}")
    (problem,) = problems_of(write(text))
    assert "more than one step" in problem


def test_unknown_examples_are_reported(write):
    text = GOOD.replace("MODEL", "example:nothing").replace("DATA", "example:none")
    *found, unlabelled = problems_of(write(text))
    assert len(found) == 2
    assert all("minilm" in problem for problem in found)
    assert "name a file" in unlabelled
