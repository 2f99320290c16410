"""Every recipe that comes with multum runs. A recipe joins by existing in `recipes/`."""

from __future__ import annotations

from pathlib import Path

import pytest
import taggers
import tiny
import translators

from multum._run import run
from multum.core.model import Model
from multum.recipe import Entry, read
from multum.tasks import find

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))
SHORT = {"epochs": 1, "augment": 1, "samples": 16, "student": {"layers": 1}}
"""Fields cut down to what a tiny model and few texts take."""
SIZES = {"n_train": 32, "n_validation": 16, "n_test": 16}


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MULTUM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """task -> tiny model and data as files."""
    folder = tmp_path_factory.mktemp("recipes")
    made = {
        "text-classification": (tiny.model(), tiny.splits(**SIZES)),
        "question-answering": (taggers.answerer(), taggers.splits(taggers.asked(64), 32, 16)),
        "translation": (translators.translator(), translators.splits(**SIZES)),
        "summarization": (translators.translator(), translators.splits(**SIZES, columns=("document", "summary"))),
        "text-generation": (tiny.language_model("llama"), tiny.text_splits(**SIZES)),
    }
    for task, (model, splits) in made.items():
        model.save(folder / task / "model")
        (folder / task / "data").mkdir()
        for name in ("train", "validation", "test"):
            getattr(splits, name).to_json(folder / task / "data" / f"{name}.jsonl", force_ascii=False)
    return folder


def test_there_are_recipes():
    assert RECIPES


def shortened(step):
    """A step with fields for a model of two layers."""
    short = {key: value for key, value in SHORT.items() if key in step.fields}
    return Entry(name=step.name, fields=step.fields | short | ({"keep": 1} if step.name == "drop_layers" else {}))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_runs(path, places, tmp_path):
    task = read(path).task
    recipe = read(path, model=str(places / task / "model"), data=str(places / task / "data"))
    recipe = recipe.model_copy(update={"steps": tuple(shortened(step) for step in recipe.steps)})
    summary = run(recipe, tmp_path / "out", rounds=3, threads=1)
    model = Model.load(tmp_path / "out" / "model", auto_class=find(task).auto_class)
    assert [entry["step"] for entry in model.history] == [step.name for step in recipe.steps]
    assert summary["candidates"][-1]["test"]["n"] == 16


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_says_how_to_run_it(path):
    assert f"multum run recipes/{path.name}" in path.read_text(encoding="utf-8")
