"""What every step must do. A step joins by existing in `multum.steps`; two lines in the tables below are all it adds."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_families
import torch
import transformers
import translators

from multum.core.model import Model
from multum.core.step import Step, find, from_history, make, names
from multum.errors import InputError
from multum.tasks.text_generation import TextGeneration

FAMILIES = ("bert", "distilbert", "roberta", "xlm-roberta", "electra")
FURTHER = {
    **dict.fromkeys(("distill", "distill_layers", "finetune", "qat"), ("llama", "gpt2")),
    "prune_hidden": ("gpt2", "opt", *tiny_families.ENCODERS),
    **dict.fromkeys(
        (
            "awq",
            "drop_layers",
            "fisher_masks",
            "gptq",
            "l0",
            "low_rank",
            "movement",
            "prune_structured",
            "prune_weights",
            "quantize",
            "quantize_embeddings",
            "reconstruct",
            "smoothquant",
            "sparsegpt",
            "trim_vocabulary",
            "wanda",
        ),
        tiny_families.FAMILIES,
    ),
}
"""Architectures that a step is tried on beside those: whatever cuts or walks, on all."""
TWO = tuple(f"two-{family}" for family in (*translators.FAMILIES, "mbart", "mt5"))
"""Encoder-decoders, as steps see them that are not for them alone."""
BOTH = (
    "drop_layers",
    "fisher_masks",
    "l0",
    "low_rank",
    "movement",
    "prune_hidden",
    "prune_structured",
    "prune_weights",
    "reconstruct",
    "sparsegpt",
    "wanda",
)
"""Steps that cut or walk both stacks."""
WRITING = ("distill_generation",)
"""Steps for models that write: encoder-decoders, and the causal ones below."""
CAUSAL = ("causal-llama", "causal-gpt2")
ONLY = {"slice_hidden": tiny_families.GROUPED}
"""Steps that refuse all other architectures."""
NEED_NONE = ("pretrain", "prune_weights", "quantize", "quantize_embeddings")
"""Steps that read no example of the task, with the fields below."""
TEACHER, FOLDER, TEXT = "<teacher>", "<folder>", "<text>"

QUICK: dict[str, dict[str, Any]] = {
    "awq": {"bits": 4, "group": 24, "alphas": 4, "samples": 16},
    "distill": {"teacher": TEACHER, "epochs": 1, "batch_size": 16, "cache": FOLDER},
    "distill_generation": {"teacher": TEACHER, "beams": 2, "max_new_tokens": 8, "epochs": 1, "batch_size": 16, "cache": FOLDER},
    "distill_layers": {"teacher": TEACHER, "hidden": 1.0, "epochs": 1, "batch_size": 16, "cache": FOLDER},
    "drop_layers": {"keep": 1, "which": "importance", "samples": 8},
    "finetune": {"epochs": 1, "batch_size": 16},
    "fisher_masks": {"speedup": 1.5, "samples": 32, "batch_size": 8},
    "gptq": {"bits": 3, "group": 24, "samples": 16},
    "l0": {"sparsity": 0.4, "epochs": 1, "batch_size": 16},
    "low_rank": {"keep": 0.5, "samples": 16},
    "pretrain": {"text": TEXT, "steps": 2, "batch_size": 4, "block": 16},
    "movement": {"sparsity": 0.5, "epochs": 1, "batch_size": 16},
    "prune_hidden": {"keep": 0.75, "samples": 16},
    "prune_structured": {"speedup": 1.5, "samples": 16, "neuron_group": 4},
    "prune_weights": {"sparsity": 0.5},
    "qat": {"bits": 4, "group": 24, "epochs": 1, "batch_size": 16, "cache": FOLDER},
    "quantize": {"bits": 4, "group": 24, "symmetric": False},
    "quantize_embeddings": {},
    "reconstruct": {"teacher": TEACHER, "samples": 16},
    "slice_hidden": {"keep": 0.75, "samples": 16},
    "smoothquant": {"samples": 16},
    "sparsegpt": {"sparsity": 0.5, "samples": 16},
    "trim_vocabulary": {},
    "wanda": {"sparsity": 0.5, "samples": 16},
}
"""Fields for a quick run."""

BAD: dict[str, list[dict[str, Any]]] = {
    "awq": [{"bits": 5}, {"group": 1}, {"alphas": 0}, {"samples": 0}],
    "distill": [
        {"temperature": 0.0},
        {"alpha": 1.5},
        {"epochs": 0},
        {"augment": -1},
        {"student": {"layers": -1}},
        {"augment_model": "x"},
        {"sparse_logits": {"sample": 0}},
    ],
    "distill_generation": [
        *({"teacher": ""}, {"beams": 0}, {"max_new_tokens": 0}, {"mix": 2.0}, {"alpha": -0.5}, {"epochs": 0}),
        *({"prompt_tokens": 0}, {"prompts": 0}, {"divergence": "kl"}, {"on_policy": 0.5}, {"sparse_logits": {"top_k": 0}}),
    ],
    "distill_layers": [
        {"hidden": -1.0},
        {"logits": -1.0},
        {"layer_map": "first"},
        {"relation_heads": 0},
        {"alpha": 1.5},
        {"epochs": 0},
    ],
    "drop_layers": [{"keep": 0}, {"which": "bottom"}, {"samples": 0}],
    "finetune": [{"epochs": 0}, {"learning_rate": -1.0}, {"batch_size": 0}, {"warmup": 2.0}],
    "fisher_masks": [{"speedup": 0.5}, {"samples": 0}, {"batch_size": 0}],
    "gptq": [{"bits": 2}, {"group": -1}, {"damping": 0.0}, {"samples": 0}],
    "l0": [{"sparsity": 1.0}, {"alpha": 2.0}, {"temperature": 0.0}, {"mask_learning_rate": 0.0}, {"rise": 2.0}, {"epochs": 0}],
    "low_rank": [{"keep": 1.0}, {"rank": 0}, {"samples": 0}],
    "pretrain": [{"steps": 0}, {"block": 7}, {"start": "anew"}, {"start": {"layers": 2}}, {"tokenizer": "bpe"}, {"shuffle": -1}],
    "movement": [{"sparsity": 1.5}, {"block": 0}, {"begin": 0.9}, {"epochs": 0}, {"learning_rate": -1.0}],
    "prune_hidden": [{"keep": 0.0}, {"keep": 1.5}, {"samples": 0}],
    "prune_structured": [{"speedup": 0.5}, {"samples": 0}, {"neuron_group": 0}],
    "prune_weights": [{"sparsity": 1.5}, {"scope": "rows"}, {"pattern": "4:2"}],
    "qat": [{"bits": 5}, {"group": 1}, {"alpha": 1.5}, {"temperature": 0.0}, {"epochs": 0}],
    "quantize": [
        {"bits": 16},
        {"group": -8},
        {"keep": "all"},
        {"keep_share": 1.5},
        {"samples": 0},
        {"hqq": True, "symmetric": True},
    ],
    "quantize_embeddings": [{"bits": 7}, {"group": 1}],
    "reconstruct": [{"teacher": ""}, {"samples": 0}, {"damping": 0.0}],
    "slice_hidden": [{"keep": 0.0}, {"samples": 0}],
    "smoothquant": [{"alpha": 1.5}, {"samples": 0}],
    "sparsegpt": [{"sparsity": 1.5}, {"pattern": "4:2"}, {"samples": 0}, {"damping": 0.0}],
    "trim_vocabulary": [{"min_count": 0}],
    "wanda": [{"sparsity": -0.5}, {"pattern": "4:2"}, {"samples": 0}],
}
"""Fields that must be refused, each on top of the quick ones."""


@dataclass(frozen=True)
class Run:
    """One step, applied twice to one model."""

    step: Step
    model: Model
    before: str
    once: Model
    twice: Model


@pytest.fixture(scope="module")
def task():
    return tiny.task(n_train=32, n_validation=16)


@pytest.fixture(scope="module")
def run(task, tmp_path_factory):
    """(step, family) -> Run, each made once for all tests."""
    folder = tmp_path_factory.mktemp("steps")

    @cache
    def made(name: str, family: str) -> Run:
        values = quick(name, folder, family)
        step, model = find(name)(**values), model_for(name, family)
        if name == "pretrain" and model.tokenizer.mask_token is None:
            model.tokenizer.mask_token = model.tokenizer.unk_token  # one of its own would change the weights of other tests
        before = model.fingerprint()
        data = data_for(name, task, family)
        return Run(step, model, before, step(model, data), step.take(model.copy(), data))

    return made


def model_for(name: str, family: str, seed: int = 0) -> Model:
    if family in CAUSAL:
        return tiny.language_model(family.removeprefix("causal-"), seed=seed)
    if family in TWO:
        return translators.translator(family.removeprefix("two-"), seed=seed)
    return translators.translator(family, seed=seed) if name in WRITING else tiny.model(family, seed=seed)


def data_for(name: str, task: Any, family: str = "") -> Any:
    if family in CAUSAL:
        return TextGeneration.from_splits(tiny.text_splits(8, 4, 4))
    return translators.translating(32, 16) if name in WRITING or family in TWO else task


def families_for(name: str) -> tuple[str, ...]:
    if name in WRITING:
        return (*translators.FAMILIES, *CAUSAL)
    return ONLY.get(name) or (*FAMILIES, *FURTHER.get(name, ()), *(TWO if name in BOTH else ()))


def quick(name: str, folder: Path, family: str = "") -> dict[str, Any]:
    family = family or families_for(name)[0]
    if name not in QUICK:
        pytest.fail(f"step {name!r} is not in the tables of this file: give it fields for a quick run in QUICK and bad ones in BAD")
    teacher = folder / f"teacher-{family}"
    if TEACHER in QUICK[name].values() and not teacher.is_dir():
        model_for(name, family, seed=1).save(teacher)
    if TEXT in QUICK[name].values():
        (folder / "text.txt").write_text("\n\n".join(tiny.passages(20)), encoding="utf-8")
    places = {TEACHER: str(teacher), FOLDER: str(folder / "cache"), TEXT: str(folder / "text.txt")}
    return {key: places.get(value, value) if isinstance(value, str) else value for key, value in QUICK[name].items()}


every_step = pytest.mark.parametrize("name", names())
on_every_family = pytest.mark.parametrize(("name", "family"), [(name, family) for name in names() for family in families_for(name)])


@torch.no_grad()
def logits(module, model: Model, task) -> torch.Tensor:
    batches = list(task.batches(model, "validation", 8))
    found = [module(**{key: value for key, value in batch.items() if key != "labels"}).logits for batch in batches]
    return torch.cat([one.flatten() for one in found])


def test_the_tables_name_every_step_and_no_other():
    assert sorted(QUICK) == sorted(BAD) == names()


@on_every_family
def test_the_input_model_is_left_as_it_was(name, family, run):
    made = run(name, family)
    assert made.model.fingerprint() == made.before
    assert made.model.history == []
    assert not made.model.module.training
    assert not made.once.module.training


@on_every_family
def test_the_same_seed_gives_the_same_bits_in_place_too(name, family, run):
    made = run(name, family)
    assert made.once.fingerprint() == made.twice.fingerprint()
    timeless = [
        {k: v for k, v in m.history[-1].items() if "seconds" not in json.dumps(v) and k != "seconds"}
        for m in (made.once, made.twice)
    ]
    assert timeless[0] == timeless[1]


@on_every_family
def test_something_changes(name, family, run):
    made = run(name, family)
    assert made.once.fingerprint() != made.before


@on_every_family
def test_the_saved_folder_loads_and_answers_the_same(name, family, run, task, tmp_path):
    made, task = run(name, family), data_for(name, task, family)
    made.once.save(tmp_path / "model")
    module = getattr(transformers, task.auto_class).from_pretrained(tmp_path / "model")
    again = Model.load(tmp_path / "model", auto_class=task.auto_class)
    expected = logits(made.once.module, made.once, task)
    assert torch.isfinite(expected).all()
    assert torch.equal(logits(module, again, task), expected)
    assert torch.equal(logits(again.module, again, task), expected)
    assert again.history == json.loads(json.dumps(made.once.history))
    assert again.fingerprint() == made.once.fingerprint()


@every_step
def test_the_history_gives_back_an_equal_step(name, run):
    made = run(name, families_for(name)[0])
    entry = json.loads(json.dumps(made.once.history[-1]))
    assert entry["step"] == made.step.name == name
    assert set(entry["fields"]) == {field.name for field in fields(made.step)}
    assert from_history(entry) == made.step
    assert type(from_history(entry)) is type(made.step)


@on_every_family
def test_every_linear_layer_is_changed_or_skipped(name, family, run):
    made = run(name, family)
    entry = made.once.history[-1]
    assert sorted([*entry["changed"], *entry["skipped"]]) == sorted(made.model.linears())
    assert all(entry["skipped"].values())
    old, new = made.model.linears(), made.once.linears()
    for layer in entry["skipped"]:
        assert torch.equal(new[layer].weight, old[layer].weight)
    for layer in entry["changed"]:
        assert (
            layer not in new
            or new[layer].weight.shape != old[layer].weight.shape
            or not torch.equal(new[layer].weight, old[layer].weight)
        )
    assert entry["parameters"] == [made.model.parameters(), made.once.parameters()]


@every_step
def test_bad_fields_fail_at_construction_and_name_the_step(name, tmp_path):
    values = quick(name, tmp_path)
    find(name)(**values)
    assert BAD[name]
    for bad in BAD[name]:
        with pytest.raises(InputError) as caught:
            find(name)(**{**values, **bad})
        assert len(caught.value.problems) == 1, caught.value
        assert str(caught.value).startswith(f"{name}: ")
        assert next(iter(bad)) in str(caught.value)
        with pytest.raises(InputError):
            make(name, {**values, **bad})


class NoExamples:
    """A task whose training split is empty."""

    def __init__(self, task: Any) -> None:
        self.task = task
        self.sources = {**getattr(task, "sources", {}), "train": []}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.task, name)

    def calibration(self, *_: Any, **__: Any) -> list[Any]:
        return []

    def encode(self, model: Model, split: Any) -> Any:
        return self.task.encode(model, split).select([])

    def inputs(self, _: Any) -> list[Any]:
        return []


@every_step
def test_without_examples_there_is_one_clear_error(name, task, tmp_path):
    family = families_for(name)[0]
    model, step = model_for(name, family), find(name)(**quick(name, tmp_path))
    before, empty = model.fingerprint(), NoExamples(data_for(name, task, family))
    if name in NEED_NONE:
        step(model, empty)
        return
    with pytest.raises(InputError, match=r"(there are no .*|the) training split is empty") as caught:
        step(model, empty)
    assert len(caught.value.problems) == 1
    assert model.fingerprint() == before


class ShortText(NoExamples):
    """A task whose calibration text has three tokens."""

    def calibration(self, *given: Any, **more: Any) -> list[Any]:
        return [{name: value[:1, :3] for name, value in self.task.calibration(*given, **more)[0].items()}]


@pytest.mark.parametrize(
    "name", [name for name in names() if name not in NEED_NONE and "samples" in {field.name for field in fields(find(name))}]
)
def test_a_short_text_is_refused_before_any_work(name, task, tmp_path):
    family = families_for(name)[0]
    model, step, passes = model_for(name, family), find(name)(**quick(name, tmp_path)), []
    model.module.register_forward_pre_hook(lambda *_: passes.append(name))
    with pytest.raises(InputError, match=rf"^{name}: the calibration texts (are too few, 1 with 3 tokens|have 3 tokens)") as caught:
        step(model, ShortText(data_for(name, task, family)))
    assert len(caught.value.problems) == 1
    assert "or raise samples (now " in str(caught.value)
    assert not passes


class Untouched:
    """A task that nothing may be asked of."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"work began: {name}")


@pytest.mark.parametrize("name", [*BOTH, "slice_hidden", "awq", "gptq", "smoothquant"])
def test_an_architecture_without_a_row_is_refused_before_any_work(name, tmp_path):
    sizes = {"vocab_size": 50, "embedding_size": 16, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 32}
    module = transformers.AlbertForSequenceClassification(transformers.AlbertConfig(**sizes)).eval()
    with pytest.raises(InputError, match="models of type 'albert' cannot be changed in structure yet; known: bart, bert") as caught:
        find(name)(**quick(name, tmp_path))(Model(module=module, tokenizer=None, source="tiny"), Untouched())
    assert len(caught.value.problems) == 1


@every_step
def test_unknown_fields_are_all_listed(name, tmp_path):
    with pytest.raises(InputError) as caught:
        make(name, {**quick(name, tmp_path), "nonsense": 1, "sparsty": 2})
    assert len(caught.value.problems) == 2
    assert all(problem.startswith(f"{name}: no field named") for problem in caught.value.problems)


@every_step
def test_every_field_has_a_docstring_and_the_file_a_formula(name):
    """Help pages, `multum steps NAME` and the documentation are made of these."""
    import ast
    import importlib

    source = Path(importlib.import_module(f"multum.steps.{name}").__file__).read_text(encoding="utf-8")
    tree = ast.parse(source)
    assert ast.get_docstring(tree)
    step = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == find(name).__name__)
    assert ast.get_docstring(step)
    for node, after in zip(step.body, [*step.body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign) and not ast.unparse(node.annotation).startswith("ClassVar"):
            documented = (
                isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) and isinstance(after.value.value, str)
            )
            assert documented, f"{name}: field {ast.unparse(node.target)} has no docstring under it"
