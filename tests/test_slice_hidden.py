"""SliceGPT: the rotation changes nothing, the directions are principal ones, what is cut is the model with them at zero."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import tiny_families
import torch
import transformers
import translators

from multum.core.families import blocks_of, family_of
from multum.core.model import Model
from multum.core.surgery import head_size
from multum.errors import InputError
from multum.steps.slice_hidden import SliceHidden, directions, places, rotate
from multum.tasks.text_generation import TextGeneration

pytestmark = pytest.mark.usefixtures("one_thread")
FAMILIES = pytest.mark.parametrize("family", tiny_families.GROUPED)


@pytest.fixture(scope="module")
def task() -> Any:
    return tiny.task(n_train=24, n_validation=8)


def with_gains(model: Model) -> Model:
    """Norms whose gains are not all alike."""
    made = torch.Generator().manual_seed(1)
    for name, parameter in model.module.named_parameters():
        if name.endswith("norm.weight") and parameter.shape[0] == model.module.config.hidden_size:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=made)
    return model


def batch(model: Model, tokens: int = 11) -> dict[str, torch.Tensor]:
    made = torch.Generator().manual_seed(0)
    ids = torch.randint(5, model.module.config.vocab_size, (3, tokens), generator=made)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@torch.no_grad()
def answers(module: Any, model: Model) -> torch.Tensor:
    return module(**batch(model)).logits


@FAMILIES
def test_rotating_alone_leaves_the_answers(family, task):
    model = with_gains(tiny.model(family))
    made = SliceHidden(keep=1.0, samples=8)(model, task)
    before, after = answers(model.module, model), answers(made.module, made)
    assert torch.allclose(after, before, atol=1e-4, rtol=1e-4)
    weights = [each.module.get_input_embeddings().weight for each in (model, made)]
    assert not torch.allclose(*weights, atol=0.01)
    assert made.history[-1]["hidden"] == [32, 32]
    assert made.history[-1]["carried"] == pytest.approx(1.0)


@FAMILIES
def test_a_stream_of_few_directions_is_cut_without_loss(family, task):
    """Embeddings and output matrices that leave a quarter of the (rotated) directions empty: nothing is lost by deleting them."""
    model = with_gains(tiny.model(family))
    basis = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(3), dtype=torch.double)).Q[:, :24]
    project, names = basis @ basis.T, places(model.module).writers
    with torch.no_grad():
        table = model.module.get_input_embeddings().weight
        table.copy_(table.double() @ project)
        for name in names:
            linear = model.module.get_submodule(name)
            linear.weight.copy_(project @ linear.weight.double())
            if linear.bias is not None:
                linear.bias.copy_(project @ linear.bias.double())
    made = SliceHidden(keep=0.75, samples=16)(model, task)
    assert made.module.config.hidden_size == 24
    assert made.history[-1]["carried"] == pytest.approx(1.0, abs=1e-6)
    assert torch.allclose(answers(made.module, made), answers(model.module, model), atol=2e-4, rtol=1e-4)


@FAMILIES
def test_the_result_is_a_stock_model(family, task, tmp_path):
    made = SliceHidden(keep=0.5, samples=8)(with_gains(tiny.model(family)), task)
    made.save(tmp_path / "model")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "model")
    assert (config.hidden_size, config.head_dim) == (16, head_size(tiny.model(family).module))
    assert not hasattr(config, "quantization_config")
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "model").eval()
    assert torch.equal(answers(again, made), answers(made.module, made))


def test_the_directions_are_those_of_the_normed_stream(task):
    model = with_gains(tiny.model("llama"))
    module, rows = model.module, task.calibration(model, 8)
    found, share = directions(module, list(places(module).readers), rows)
    total = torch.zeros(32, 32, dtype=torch.double)
    family = family_of(module)
    norms = [b.get_submodule(p) for b in blocks_of(module) for p in (family.attention_norm, family.feed_forward_norm)]
    for norm in [*norms, module.model.norm]:
        seen: list[torch.Tensor] = []
        handle = norm.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        with torch.no_grad():
            for row in rows:
                module(**row)
        handle.remove()
        for x, row in zip(seen, rows, strict=True):
            for vector in x.double()[row["attention_mask"].bool()]:
                unit = vector / vector.square().mean().sqrt()
                total += torch.outer(unit, unit)
    assert torch.allclose(found.T @ found, torch.eye(32, dtype=torch.double), atol=1e-10)
    rotated = found.T @ total @ found
    assert torch.allclose(rotated, rotated.diagonal().diag(), atol=1e-3 * float(total.trace()) / 32)
    assert torch.allclose(rotated.diagonal() / total.trace(), share, atol=1e-6)
    assert bool((share.diff() <= 1e-12).all())


def test_the_principal_directions_lose_less_than_random_ones(task):
    """At the same width: the answers of the whole model are kept better."""
    model = with_gains(tiny.model("llama", layers=3, hidden=64, neurons=64))
    with torch.no_grad():  # a stream that has large and small directions, as those of trained models
        scale = torch.logspace(0, -4, 64)
        model.module.get_input_embeddings().weight.mul_(scale)
        for name in places(model.module).writers:
            model.module.get_submodule(name).weight.mul_(scale[:, None])
    whole = answers(model.module, model)
    made = SliceHidden(keep=0.5, samples=16)(model, task)
    ours = float((answers(made.module, made) - whole).square().mean())
    theirs = []
    for seed in range(3):
        other = model.copy()
        q = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(seed), dtype=torch.double)).Q
        rotate(other.module, places(other.module), q[:, :32])
        theirs.append(float((answers(other.module, other) - whole).square().mean()))
    assert ours < 0.2 * min(theirs)


def test_tied_language_models_are_untied_and_still_write(tmp_path):
    model, task = tiny.language_model("llama"), TextGeneration.from_splits(tiny.text_splits(8, 4, 4))
    model.module.config.tie_word_embeddings = True
    model.module.tie_weights()
    assert model.module.lm_head.weight is model.module.get_input_embeddings().weight
    whole = SliceHidden(keep=1.0, samples=8)(model, task)
    assert torch.allclose(answers(whole.module, whole), answers(model.module, model), atol=1e-4, rtol=1e-4)
    made = SliceHidden(keep=0.75, samples=8)(model, task)
    made.save(tmp_path / "model")
    again = Model.load(tmp_path / "model", auto_class="AutoModelForCausalLM")
    assert torch.equal(answers(again.module, again), answers(made.module, made))
    written = [each.generate(**batch(made), max_new_tokens=5, do_sample=False) for each in (again.module, made.module)]
    assert torch.equal(*written)


def test_models_that_are_cut_already_are_sliced(task, tmp_path):
    model = tiny.uneven(tiny.model("llama", layers=3))
    made = SliceHidden(keep=1.0, samples=8)(model, task)
    assert torch.allclose(answers(made.module, made), answers(model.module, model), atol=1e-4, rtol=1e-4)
    small = SliceHidden(keep=0.75, samples=8)(model, task)
    small.save(tmp_path / "model")
    again = Model.load(tmp_path / "model", auto_class=task.auto_class)
    assert torch.equal(answers(again.module, again), answers(small.module, small))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: tiny.model("bert"), "behind its sublayers"),
        (lambda: tiny.model("gpt2"), "ties the width of this model's heads"),
        (lambda: tiny.model("opt"), "ties the width of this model's heads"),
        (lambda: tiny.model("modernbert"), "ties the width of this model's heads"),
        (lambda: translators.translator("t5"), "an encoder and a decoder"),
    ],
)
def test_what_stock_transformers_cannot_express_is_refused_before_any_work(make, says):
    class Untouched:
        def calibration(self, *_: Any, **__: Any) -> Any:
            raise AssertionError("the step worked before it refused")

    with pytest.raises(InputError, match=says) as caught:
        SliceHidden()(make(), Untouched())
    assert str(caught.value).startswith("slice_hidden: ")


def test_a_width_below_one_unit_and_no_texts_are_refused(task):
    with pytest.raises(InputError, match="multiple of 24"):
        SliceHidden(keep=0.5)(tiny.model("llama", heads=3, hidden=18, neurons=16), task)

    class Empty:
        def calibration(self, *_: Any, **__: Any) -> list[Any]:
            return []

    with pytest.raises(InputError, match="no calibration texts"):
        SliceHidden()(tiny.model("llama"), Empty())


def test_fewer_tokens_than_directions_are_refused(task):
    with pytest.raises(InputError, match=r"^slice_hidden: the calibration texts have \d+ tokens, and 24 inputs .* \(now 1\)"):
        SliceHidden(samples=1)(tiny.model("llama"), task)
