"""Quantization-aware training: the gradient goes straight through, what is trained is what is stored, and it beats rounding."""

from __future__ import annotations

import pytest
import tiny
import torch
import translators
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from multum.core.codes import Packing
from multum.core.linears import matrix
from multum.core.packed import PackedLinear
from multum.core.surgery import swap
from multum.errors import InputError
from multum.steps._quantization import rounded
from multum.steps.qat import Qat, fake, straight_through
from multum.steps.quantize import Quantize
from multum.tasks.text_generation import TextGeneration

pytestmark = pytest.mark.usefixtures("one_thread")
PACKINGS = pytest.mark.parametrize("packing", [Packing(4, 8, True), Packing(3, 5), Packing(8)], ids=repr)
TRAINING = {"batch_size": 16, "learning_rate": 1e-3, "precision": "fp32"}


@PACKINGS
@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_the_gradient_is_that_by_the_rounded_weights(packing, kind):
    torch.manual_seed(0)
    linear, x, target = kind(20, 6) if kind is nn.Linear else kind(6, 20), torch.randn(7, 20), torch.randn(7, 6)
    layer = fake(linear, packing)
    layer(x).sub(target).square().sum().backward()
    leaf = rounded(matrix(linear).detach(), packing).weight().requires_grad_()
    bias = linear.bias.detach().clone().requires_grad_()
    F.linear(x, leaf, bias).sub(target).square().sum().backward()
    assert layer.weight is linear.weight
    assert torch.equal(linear.weight.grad if kind is nn.Linear else linear.weight.grad.T, leaf.grad)
    assert torch.equal(linear.bias.grad, bias.grad)


@PACKINGS
def test_fine_grids_leave_the_layer_as_it_is(packing):
    """Weights that lie on the grid already are those of the layer."""
    torch.manual_seed(0)
    linear, x = nn.Linear(20, 6, bias=False), torch.randn(7, 20)
    with torch.no_grad():
        linear.weight.copy_(rounded(linear.weight, packing).weight())
    again = straight_through(linear.weight, packing)
    assert torch.allclose(again, linear.weight, atol=0.02 if packing.bits < 8 else 1e-3)
    assert torch.equal(fake(linear, packing)(x), F.linear(x, again))


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
@PACKINGS
@torch.no_grad()
def test_what_is_packed_is_what_was_trained_to_the_bit(family, packing):
    model, task = tiny.model(family), tiny.task(8, 4, 4)
    batch = task.calibration(model, 8)[0]
    layers = {name: part for name, part in model.linears().items() if any(f".{number}." in name for number in (0, 1))}
    for name, linear in layers.items():
        swap(model.module, name, fake(linear, packing))
    before = model.module(**batch).logits
    for name, linear in layers.items():
        swap(model.module, name, PackedLinear.of(linear, rounded(matrix(linear), packing)))
    assert torch.equal(model.module(**batch).logits, before)


def apart(model, made, task) -> float:
    """Mean KL from the model's answers on the texts trained with."""
    found = []
    with torch.no_grad():
        for batch in task.batches(model, "train", 16):
            inputs = {name: value for name, value in batch.items() if name != "labels"}
            p, q = (F.log_softmax(each.module(**inputs).logits.double(), -1) for each in (model, made))
            found.append((p.exp() * (p - q)).sum(-1))
    return float(torch.cat(found).mean())


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_training_makes_good_what_rounding_loses(family, tmp_path):
    model, task = tiny.model(family), tiny.task(64, 4, 4)
    grid = {"bits": 3, "group": 0, "symmetric": False}
    made = Qat(**grid, **TRAINING, alpha=1.0, temperature=1.0, epochs=12, cache=str(tmp_path))(model, task)
    plain = Quantize(**grid)(model, task)
    assert apart(model, made, task) < 0.5 * apart(model, plain, task)
    packed = {name for name, part in made.module.named_modules() if isinstance(part, PackedLinear)}
    assert packed == {name for name, part in plain.module.named_modules() if isinstance(part, PackedLinear)}
    assert made.history[-1]["bits_per_weight"] == plain.history[-1]["bits_per_weight"]


def test_labels_alone_and_layers_that_stay_in_float(tmp_path):
    model, task = tiny.model(), tiny.task(32, 4, 4)
    made = Qat(alpha=0.0, keep=("*.intermediate.dense",), group=16, **TRAINING)(model, task)
    assert "teacher_fingerprint" not in made.history[-1]
    parts = dict(made.module.named_modules())
    assert type(parts["bert.encoder.layer.0.intermediate.dense"]) is nn.Linear
    assert isinstance(parts["bert.encoder.layer.0.output.dense"], PackedLinear)
    for name in model.linears():
        assert type(parts[name]) in (nn.Linear, PackedLinear)


def test_pruned_weights_stay_zero(tmp_path):
    from multum.steps.prune_weights import PruneWeights

    task = tiny.task(32, 4, 4)
    sparse = PruneWeights(sparsity=0.5)(tiny.model(), task)
    made = Qat(cache=str(tmp_path), group=16, **TRAINING)(sparse, task)
    for name, linear in sparse.linears().items():
        assert (made.module.get_submodule(name).weight[linear.weight == 0] == 0).all(), name


def test_bad_input(tmp_path):
    model, task = tiny.model(), tiny.task(16, 4, 4)
    with pytest.raises(InputError, match="qat: alpha is 0, so that the teacher would not be asked"):
        Qat(alpha=0.0, teacher="x")
    with pytest.raises(InputError, match="keep names 'nothing', which no linear layer of the blocks matches"):
        Qat(keep=("nothing",))(model, task)
    model.new_weights = ("classifier.weight",)
    with pytest.raises(InputError, match=r"qat: the teacher .* has an untrained head"):
        Qat()(model, task)


@pytest.mark.parametrize("family", ["causal", "t5", "marian"])
@pytest.mark.parametrize("alpha", [0.9, 0.0])
def test_models_that_write(family, alpha, tmp_path):
    model = tiny.language_model("llama") if family == "causal" else translators.translator(family)
    task = TextGeneration.from_splits(tiny.text_splits(8, 4, 4)) if family == "causal" else translators.translating(16, 4)
    made = Qat(alpha=alpha, group=16, cache=str(tmp_path / "cache"), **{**TRAINING, "batch_size": 8})(model, task)
    made.save(tmp_path / "model")
    again, batch = task.load(str(tmp_path / "model")), task.calibration(model, 4)[0]
    with torch.no_grad():
        assert torch.equal(again.module(**batch).logits, made.module(**batch).logits)
    assert set(made.history[-1]["changed"]) >= {name for name in model.linears() if "layers." in name or "block." in name}
