"""Steps by name: made from what a file or a command line gives, applied without touching what they are given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import pytest
import tiny
import torch

from multum.core.model import Model
from multum.core.step import Step, find, from_history, make, names
from multum.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Shift(Step):
    """Adds to one bias, says why it left another layer alone, and leaves the model in training mode."""

    by: float = 1.0

    def apply(self, model: Model, task: Any) -> Mapping[str, Any]:
        model.module.train()
        model.module.classifier.weight.data += self.by
        return {"skipped": {"bert.pooler.dense": "it is the pooler"}, "shifted": self.by}


@dataclass(frozen=True, kw_only=True)
class Turn(Step):
    """Zeros to minus zeros."""

    def apply(self, model: Model, task: Any) -> Mapping[str, Any]:
        for part in model.linears().values():
            part.weight.data = torch.where(part.weight == 0, -0.0, part.weight)
        return {}


def test_a_step_changes_a_copy_and_accounts_for_every_layer() -> None:
    model = tiny.model()
    before = model.fingerprint()
    after = Shift(by=2.0)(model, tiny.task())
    assert model.fingerprint() == before
    assert model.history == []
    assert not after.module.training
    (entry,) = after.history
    assert entry["fields"] == {"by": 2.0}
    assert entry["shifted"] == 2.0
    assert entry["changed"] == {"classifier": "weights"}
    assert set(entry["changed"]) | set(entry["skipped"]) == set(model.linears())
    assert entry["skipped"]["bert.pooler.dense"] == "it is the pooler"
    assert entry["parameters"] == [model.parameters(), model.parameters()]


@pytest.mark.parametrize("name", ["drop_layers", "prune_structured", "prune_weights", "reconstruct"])
def test_weights_that_are_no_numbers_are_refused_before_any_work(name: str) -> None:
    fields = {"drop_layers": {"keep": 1}, "prune_weights": {"sparsity": 0.5}, "reconstruct": {"teacher": "nowhere"}}
    model = tiny.model()
    with torch.no_grad():
        model.module.bert.embeddings.LayerNorm.weight[3] = float("nan")
    with pytest.raises(InputError, match=rf"^{name}: .* damaged: bert\.embeddings\.LayerNorm\.weight has numbers") as caught:
        make(name, fields.get(name, {"speedup": 1.5}))(model, cast(Any, None))
    assert len(caught.value.problems) == 1


def test_a_step_can_use_its_model_up() -> None:
    model = tiny.model()
    weights, expected = model.linears()["classifier"].weight, Shift()(model, tiny.task())
    taken = Shift().take(model, tiny.task())
    assert taken is model
    assert taken.linears()["classifier"].weight is weights  # no copy of it
    assert taken.fingerprint() == expected.fingerprint()
    assert {**taken.history[-1], "seconds": 0} == {**expected.history[-1], "seconds": 0}


def test_numbers_may_come_as_text() -> None:
    assert make("finetune", {"learning_rate": "2e-5", "epochs": "3"}) == find("finetune")(learning_rate=2e-5, epochs=3)


def test_every_mistake_is_named_at_once() -> None:
    with pytest.raises(InputError) as caught:
        make("finetune", {"learning_rate": "fast", "epochs": [1], "size": 3, "precision": "fp8"})
    text = str(caught.value)
    assert len(caught.value.problems) == 4
    for part in ("learning_rate", "'fast'", "epochs", "no field named 'size'", "batch_size", "precision", "'fp8'"):
        assert part in text


@pytest.mark.parametrize(
    ("name", "field", "value", "right"),
    [
        ("distill", "student", 3, "a valid string, or a valid dictionary"),
        ("distill_layers", "layer_map", "middle", "'uniform', 'last' or 'dynamic', or a valid tuple"),
        ("drop_layers", "which", [0, "b"], "'importance' or 'angular', or a valid integer"),
    ],
)
def test_a_field_that_may_be_of_several_types_is_one_mistake(name: str, field: str, value: Any, right: str) -> None:
    with pytest.raises(InputError) as caught:
        make(name, {"teacher": "t", field: value} if name != "drop_layers" else {field: value})
    (problem,) = caught.value.problems
    assert problem.startswith(f"{name}: {field}: input should be ")
    assert right in problem
    assert problem.endswith(f"(got {value!r})")


def test_unknown_steps_are_refused_with_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"no step named 'melt'.*distill.*finetune"):
        make("melt", {})
    assert "finetune" in names()


def test_a_history_entry_makes_the_same_step_again() -> None:
    step = make("finetune", {"epochs": 0.5, "seed": 3})
    assert from_history({"step": "finetune", "fields": {**vars(step)}}) == step
    assert step.name == "finetune"


def test_a_weight_whose_zeros_change_sign_did_not_change() -> None:
    model = tiny.model()
    for part in model.linears().values():
        part.weight.data[0] = 0.0
    assert Turn()(model, tiny.task()).history[-1]["changed"] == {}
