"""Every recipe that comes with multum runs. A recipe joins by existing in `recipes/`."""

from __future__ import annotations

from pathlib import Path

import on_disk
import pytest

from multum._run import run
from multum.core.model import Model
from multum.recipe import Entry, read

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))
SHORT = {"epochs": 1, "augment": 1, "samples": 16, "keep": 1, "student": {"layers": 1}}
"""Fields cut down to what a tiny model and few texts take."""


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MULTUM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipes")
    return on_disk.model_folder(folder / "model"), on_disk.review_folder(folder / "data", n_train=32, n_validation=16, n_test=16)


def test_there_are_recipes():
    assert RECIPES


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_runs(path, places, tmp_path):
    recipe = read(path, model=str(places[0]), data=str(places[1]))
    steps = tuple(
        Entry(name=step.name, fields=step.fields | {key: value for key, value in SHORT.items() if key in step.fields})
        for step in recipe.steps
    )
    summary = run(recipe.model_copy(update={"steps": steps}), tmp_path / "out", rounds=3, threads=1)
    model = Model.load(tmp_path / "out" / "model", auto_class="AutoModelForSequenceClassification")
    assert [entry["step"] for entry in model.history] == [step.name for step in recipe.steps]
    assert summary["candidates"][-1]["test"]["n"] == 16


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_says_how_to_run_it(path):
    assert f"multum run recipes/{path.name}" in path.read_text(encoding="utf-8")
