"""Low rank: the error is what the formula says, no other matrix of the rank does better, full rank changes nothing."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from multum import runtimes
from multum.core.blocks import walk_blocks
from multum.core.factored import Factored
from multum.core.families import blocks_of, family_of
from multum.core.profile import profile
from multum.core.second_order import gram
from multum.core.step import make
from multum.errors import InputError
from multum.steps.low_rank import LowRank, factors, rank_for, whitening


@pytest.fixture
def case():
    """W (5, 8) and X (8, 60) whose features differ in size and are correlated."""
    rng = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 8, generator=rng, dtype=torch.double)
    x = torch.randn(8, 8, generator=rng, dtype=torch.double) @ torch.randn(8, 60, generator=rng, dtype=torch.double)
    return weight, x * torch.logspace(-1, 1, 8, dtype=torch.double)[:, None]


def lost(weight, other, x):
    return float(((weight - other) @ x).square().sum())


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_the_error_is_the_sum_of_the_discarded_singular_values_squared(case, rank):
    weight, x = case
    lower = torch.linalg.cholesky(x @ x.T)
    a, b, s = factors(weight, lower, rank)
    assert a.shape == (rank, 8)
    assert b.shape == (5, rank)
    assert lost(weight, b @ a, x) == pytest.approx(float(s[rank:].square().sum()), rel=1e-8)
    # Eckart and Young: those are the singular values of W X itself, below whose sum no matrix of this rank can come
    assert s.numpy() == pytest.approx(torch.linalg.svdvals(weight @ x).numpy(), rel=1e-8)


@pytest.mark.parametrize("rank", [1, 3])
def test_plain_svd_and_gradient_descent_do_no_better(case, rank):
    weight, x = case
    a, b, _ = factors(weight, torch.linalg.cholesky(x @ x.T), rank)
    best = lost(weight, b @ a, x)
    u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    assert best < 0.9 * lost(weight, u[:, :rank] * s[:rank] @ vt[:rank], x)
    p, q = b.clone().requires_grad_(), a.clone().requires_grad_()
    slopes = torch.autograd.grad(((weight - p @ q) @ x).square().sum(), (p, q))
    assert max(float(slope.abs().max()) for slope in slopes) < 1e-6 * float((weight @ x).square().sum())


def test_with_white_inputs_it_is_the_plain_svd(case):
    weight, _ = case
    a, b, s = factors(weight, torch.eye(8, dtype=torch.double), 2)
    u, wanted, vt = torch.linalg.svd(weight, full_matrices=False)
    assert torch.allclose(b @ a, u[:, :2] * wanted[:2] @ vt[:2])
    assert torch.allclose(s, wanted)


def test_full_rank_is_the_matrix_itself(case):
    weight, x = case
    a, b, _ = factors(weight, whitening(x @ x.T), 5)
    assert torch.allclose(b @ a, weight, atol=1e-9)


def test_dead_and_dependent_inputs_still_have_factors():
    x = torch.ones(6, 20).double()
    x[0] = 0.0
    lower = whitening(x @ x.T)
    assert torch.isfinite(lower).all()
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).double()
    a, b, _ = factors(weight, lower, 1)  # all inputs are one and the same, so that rank 1 is enough
    assert torch.allclose(b @ a @ x, weight @ x, atol=1e-3)


@pytest.mark.parametrize(("shape", "keep"), [((32, 32), 0.5), ((32, 128), 0.7), ((7, 3), 0.9)])
def test_the_rank_is_the_largest_within_the_share(shape, keep):
    rank = rank_for(*shape, keep)
    assert rank * sum(shape) <= keep * shape[0] * shape[1] < (rank + 1) * sum(shape)


# -- the step --------------------------------------------------------------------------------------------------------------


def test_every_matrix_of_the_blocks_has_the_share_of_weights_asked_for():
    model, task = tiny.model(), tiny.task()
    result = LowRank(keep=0.5, samples=32)(model, task)
    entry = result.history[-1]
    inside = {name for name in model.linears() if "encoder.layer" in name}
    assert set(entry["changed"]) == set(entry["relative_errors"]) == inside
    for name in inside:
        old, (out, rank, in_) = entry["changed"][name]
        assert [out, in_] == old
        assert result.module.get_submodule(name).shape == (out, rank, in_)
        assert rank == rank_for(out, in_, 0.5)
    before, after = (profile(m.module)["macs"]["per_token"] for m in (model, result))
    assert after <= 0.5 * before


def test_the_first_blocks_factors_are_the_formula_on_what_flows_there():
    model, task = tiny.model(), tiny.task()
    result = LowRank(rank=6, samples=32)(model, task)
    path = family_of(model.module).query
    with torch.no_grad():
        total = next(walk_blocks(model.module, task.calibration(model, 32))).sums([path], gram)[path]
    weight = blocks_of(model.module)[0].get_submodule(path).weight.double().detach()
    a, b, s = factors(weight, whitening(total), 6)
    made = blocks_of(result.module)[0].get_submodule(path)
    assert torch.allclose(made.weight.double(), b @ a, atol=1e-5)
    name = next(name for name, part in model.module.named_modules() if part is blocks_of(model.module)[0].get_submodule(path))
    share = float((s[6:].square().sum() / s.square().sum()).sqrt())
    assert result.history[-1]["relative_errors"][name] == pytest.approx(share, rel=1e-6)


def test_a_rank_that_saves_nothing_leaves_the_layer_and_says_why():
    model, task = tiny.model(neurons=96), tiny.task()  # 32 x 32: rank 16 is as much; 32 x 96: rank 24 is
    result = LowRank(rank=20, samples=16)(model, task)
    entry = result.history[-1]
    assert {tuple(old) for old, _ in entry["changed"].values()} == {(96, 32), (32, 96)}
    reasons = {reason for name, reason in entry["skipped"].items() if "attention" in name}
    assert reasons == {"rank 20 saves nothing: 20 x (32 + 32) = 1280 weights, the matrix has 1024"}
    nothing = LowRank(rank=24, samples=16)(model, task)
    assert nothing.fingerprint() == model.fingerprint()


def test_a_factored_layer_answers_like_its_product_and_trains():
    layer = Factored(4, 2, 6)
    x = torch.randn(3, 6)
    assert torch.allclose(layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias), atol=1e-6)
    assert (layer.out_features, layer.in_features, layer.shape) == (4, 6, (4, 2, 6))
    layer(x).sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())
    assert sorted(layer.state_dict()) == ["0.weight", "1.bias", "1.weight"]


@pytest.mark.parametrize("again", [False, True])
def test_the_folder_loads_by_plain_from_pretrained(tmp_path, again):
    model, task = tiny.uneven(tiny.model(layers=4)), tiny.task()
    result = LowRank(keep=0.6, samples=16)(model, task)
    result.save(tmp_path / "one")
    module = AutoModelForSequenceClassification.from_pretrained(tmp_path / "one")
    if again:  # by transformers' own hand
        module.save_pretrained(tmp_path / "two")
        module = AutoModelForSequenceClassification.from_pretrained(tmp_path / "two")
    shapes = json.loads((tmp_path / "one" / "config.json").read_text())["quantization_config"]["shapes"]
    assert [32, 8, 32] in shapes.values() or any(len(shape) == 3 for shape in shapes.values())
    batch = task.calibration(model, 8)[0]
    with torch.no_grad():
        assert torch.equal(module(**batch).logits, result.module(**batch).logits)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_language_model_generates_the_same_after_reloading(family, tmp_path):
    model = tiny.language_model(family)
    ids = torch.arange(5, 65).reshape(2, 30)

    class Texts:
        def calibration(self, model, samples, *, seed=0):
            return [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]

    result = LowRank(keep=0.6)(model, Texts())
    assert any(isinstance(part, Factored) for part in result.module.modules())
    result.save(tmp_path / "model")
    module = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        assert torch.equal(module(ids).logits, result.module(ids).logits)
    written = [m.generate(ids[:1, :4], max_new_tokens=6, do_sample=False) for m in (module, result.module)]
    assert torch.equal(*written)


def test_steps_that_cut_matrices_refuse_factored_ones(tmp_path):
    model, task = tiny.model(), tiny.task()
    model.save(tmp_path / "whole")
    once = LowRank(samples=8)(model, task)
    steps = ("low_rank", {}), ("prune_structured", {}), ("fisher_masks", {}), ("reconstruct", {"teacher": str(tmp_path / "whole")})
    for name, fields in steps:
        with pytest.raises(InputError, match=f"{name}: the model's matrices are factored"):
            make(name, fields)(once, task)


def test_an_export_answers_like_the_factors(tmp_path):
    model, task = tiny.model(), tiny.task()
    result = LowRank(keep=0.6, samples=8)(model, task)
    inputs = list(task.inputs("validation"))[:8]
    options = {"max_length": task.length_limit(model), "pairs": False, "calibration": task.calibration(model, 8)}
    runtimes.find("onnxruntime").export(result, tmp_path / "out", precision="fp32", inputs=inputs, **options)
    found = torch.from_numpy(np.asarray(runtimes.open(tmp_path / "out").predict(inputs)))
    rows = task.encode_texts(result, inputs)
    with torch.no_grad():
        wanted = torch.cat([result.module(input_ids=torch.tensor([row["input_ids"]])).logits for row in rows])
    assert torch.allclose(found.float(), wanted, atol=1e-3)


def test_fewer_tokens_than_inputs_are_refused():
    with pytest.raises(InputError, match=r"^low_rank: the calibration texts have \d+ tokens, and 32 inputs .* \(now 1\)"):
        LowRank(samples=1)(tiny.model(), tiny.task())
