"""GPTQ against rounding, explicit inverses column by column, and rounding on correlated inputs."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import tiny
import torch
import translators

from multum.core.blocks import walk_blocks
from multum.core.codes import Packing
from multum.core.families import blocks_of, family_of
from multum.core.linears import matrix
from multum.core.packed import packed_parts
from multum.core.second_order import damped, gram, inverse_factor
from multum.core.surgery import swap
from multum.errors import InputError
from multum.steps._quantization import grid, output_error, rounded
from multum.steps.gptq import Gptq, gptq
from multum.steps.quantize import Quantize

pytestmark = pytest.mark.usefixtures("one_thread")
SEEDS = pytest.mark.parametrize("seed", range(4))
PACKINGS = pytest.mark.parametrize(
    "packing", [Packing(4, 0), Packing(4, 8, True), Packing(3, 5, True), Packing(3, 24), Packing(8)], ids=repr
)


def problem(rows: int = 6, inputs: int = 24, tokens: int = 80, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """W (rows, inputs) float32 and H of correlated inputs, double."""
    made = torch.Generator().manual_seed(seed)
    mixing = torch.randn(inputs, inputs, generator=made, dtype=torch.double)
    x = torch.randn(tokens, inputs, generator=made, dtype=torch.double) @ mixing
    return torch.randn(rows, inputs, generator=made) * 0.1, x.T @ x


def slow(weight: torch.Tensor, h: torch.Tensor, packing: Packing, order: list[int] | None = None) -> torch.Tensor:
    """One column at a time, every update at once, with the explicit inverse of what is left of H."""
    w, width = weight.double().clone(), packing.width(weight.shape[1])
    result, left = torch.zeros_like(weight), list(order or range(weight.shape[1]))
    scales, zeros = grid(weight, packing)
    while left:
        j = left[0]
        if order is None and j % width == 0:
            s, z = grid(w[:, j : j + width], packing)
            scales[:, j // width] = s[:, 0]
            if z is not None:
                zeros[:, j // width] = z[:, 0]
        s = scales[:, j // width]
        z = 2.0 ** (packing.bits - 1) if zeros is None else zeros[:, j // width]
        code = (w[:, j].float() / s + z).round().clamp(0, 2**packing.bits - 1)
        result[:, j] = (code - z) * s
        inverse = torch.linalg.inv(h[left][:, left])
        error = w[:, j] - result[:, j].double()
        w[:, left] -= error[:, None] * inverse[0] / inverse[0, 0]
        left = left[1:]
    return result


@PACKINGS
@SEEDS
def test_with_an_identity_it_is_rounding(packing, seed):
    weight, _ = problem(seed=seed)
    wanted = rounded(weight, packing)
    for scale in (1.0, 1e-6, 1e6):
        u = inverse_factor(torch.eye(24, dtype=torch.double) * scale)
        for order in (None, torch.randperm(24, generator=torch.Generator().manual_seed(seed))):
            made = gptq(weight, u, packing, order)
            assert torch.equal(made.codes, wanted.codes)
            assert torch.equal(made.weight(), wanted.weight())


@PACKINGS
@SEEDS
def test_it_is_the_slow_one(packing, seed):
    weight, h = problem(seed=seed)
    made = gptq(weight, inverse_factor(h), packing)
    assert torch.equal(made.weight(), slow(weight, damped(h), packing))
    order = h.diagonal().argsort(descending=True)
    made = gptq(weight, inverse_factor(h[order][:, order]), packing, order)
    assert torch.equal(made.weight(), slow(weight, damped(h), packing, order.tolist()))


@pytest.mark.parametrize("packing", [Packing(4, 40, True), Packing(3, 0), Packing(4, 150)], ids=repr)
def test_updates_that_are_put_off_change_nothing(packing):
    weight, h = problem(rows=4, inputs=300, tokens=900)
    made = gptq(weight, inverse_factor(h), packing)
    wanted = slow(weight, damped(h), packing)
    assert ((made.weight() - wanted).abs() > 1e-6).float().mean() < 0.01  # a tie may fall the other way


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("packing", [Packing(4, 0), Packing(4, 8, True), Packing(3, 8, True)], ids=repr)
@SEEDS
def test_its_error_is_below_that_of_rounding(packing, act_order, seed):
    weight, h = problem(rows=32, seed=seed)
    order = h.diagonal().argsort(descending=True) if act_order else None
    u = inverse_factor(h if order is None else h[order][:, order])
    assert output_error(weight, gptq(weight, u, packing, order), h) < 0.9 * output_error(weight, rounded(weight, packing), h)


@pytest.mark.parametrize("kind", ["few tokens", "twins", "dead", "all dead"])
def test_a_singular_h_gives_finite_weights(kind):
    weight, h = problem(tokens=3 if kind == "few tokens" else 80)
    if kind == "twins":
        h[12:] = h[:12].clone()
        h[:, 12:] = h[:, :12].clone()
    if kind == "dead":
        h[[2, 7]] = h[:, [2, 7]] = 0
    if kind == "all dead":
        h.zero_()
    made = gptq(weight, inverse_factor(h), Packing(4, 8, True))
    assert torch.isfinite(made.weight()).all()
    if kind == "all dead":
        assert torch.equal(made.weight(), rounded(weight, Packing(4, 8, True)).weight())


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("family", ["bert", "gpt2"])
@torch.no_grad()
def test_the_step_rounds_with_what_flows_through_blocks_already_rounded(family, act_order):
    model, task = tiny.model(family), tiny.task()
    result = Gptq(bits=4, group=8, act_order=act_order, samples=40, damping=0.02, seed=1)(model, task)
    other, batches = model.copy(), task.calibration(model, 40, seed=1)
    for block in walk_blocks(other.module, batches):
        paths = [path for path, part in block.module.named_modules() if part in set(other.linears().values())]
        for path, total in block.sums(paths, gram).items():
            linear = block.module.get_submodule(path)
            order = total.diagonal().argsort(descending=True, stable=True) if act_order else None
            u = inverse_factor(total if order is None else total[order][:, order], 0.02)
            weight = matrix(linear)
            weight.copy_(gptq(weight, u, Packing(4, 8, True), order).weight())
            name = next(name for name, part in other.module.named_modules() if part is linear)
            found = result.module.get_submodule(name).weight
            assert ((found - matrix(linear)).abs() > 1e-6).float().mean() < 0.01
    for batch in batches[:2]:
        assert torch.allclose(other.module(**batch).logits, result.module(**batch).logits, atol=0.05)


def test_the_layers_of_the_first_block_err_less_than_rounded_ones():
    model, task = tiny.model("llama", hidden=64, neurons=64), tiny.task()
    with torch.no_grad():
        result = Gptq(group=16, samples=64)(model, task)
        path = family_of(model.module).down
        total = next(walk_blocks(model.module, task.calibration(model, 64))).sums([path], gram)[path]
    weight = blocks_of(model.module)[0].get_submodule(path).weight.detach()
    name = f"model.layers.0.{path}"
    recorded = result.history[-1]["relative_errors"][name]
    assert recorded < output_error(weight, rounded(weight, Packing(4, 16, True)), total)
    part = result.module.get_submodule(name)
    lost = (weight - part.weight).double()
    wanted = float((((lost @ total) * lost).sum() / ((weight.double() @ total) * weight.double()).sum()).sqrt())
    assert recorded == pytest.approx(wanted, rel=1e-6)


def test_what_no_text_reaches_and_what_is_named_stays_in_float():
    model, task = tiny.model("bert", layers=1), tiny.task(16, 4, 4)
    swap(model.module, "bert.encoder.layer.0.spare", torch.nn.Linear(4, 4))
    result = Gptq(samples=8, keep=("*.attention.self.query",))(model, task)
    skipped = result.history[-1]["skipped"]
    assert skipped["bert.encoder.layer.0.spare"] == "no text reaches it"
    assert skipped["bert.encoder.layer.0.attention.self.query"] == "kept in float"
    assert set(result.linears()) == {name for name in skipped if name in model.linears()}


@torch.no_grad()
def test_activations_that_are_no_numbers_and_no_texts():
    model, task = tiny.model("bert", layers=1), tiny.task(16, 4, 4)

    class Nothing:
        def calibration(self, model, samples, *, seed=0):
            return []

    with pytest.raises(InputError, match="gptq: there are no calibration texts"):
        Gptq()(model, Nothing())
    ids = torch.ones(1, 31, dtype=torch.long)
    few = SimpleNamespace(calibration=lambda *_, **__: [{"input_ids": ids, "attention_mask": ids}])
    with pytest.raises(InputError, match="gptq: the calibration texts are too few, 1 with 31 tokens"):
        Gptq()(model, few)
    model.module.bert.embeddings.LayerNorm.weight.fill_(float("nan"))
    with pytest.raises(InputError, match=r"gptq: what flows into .* has numbers that are not finite"):
        Gptq(samples=8)(model, task)


def test_rounding_and_gptq_take_the_same_bytes():
    model, task = tiny.model("gpt2"), tiny.task(16, 4, 4)
    made = [Gptq(samples=8)(model, task), Quantize(bits=4, group=64, symmetric=False)(model, task)]
    assert made[0].history[-1]["weight_bytes"] == made[1].history[-1]["weight_bytes"]


@pytest.mark.parametrize("family", translators.FAMILIES)
def test_both_stacks_of_an_encoder_decoder_are_rounded_with_less_error(family, tmp_path):
    model, task = translators.translator(family), translators.translating(48, 4)
    made, plain = Gptq(bits=3, group=16, samples=48)(model, task), Quantize(bits=3, group=16, symmetric=False)(model, task)
    errors = made.history[-1]["relative_errors"]
    crossing = "EncDecAttention" if family == "t5" else "encoder_attn"
    for part in ("encoder.", "decoder.", crossing):
        assert any(part in name for name in errors), part
    assert packed_parts(made.module).keys() == packed_parts(plain.module).keys() == errors.keys()
    batches = task.calibration(model, 48)
    with torch.no_grad():
        off = [0.0, 0.0]
        for batch in batches:
            whole = model.module(**batch).logits
            for place, each in enumerate((made, plain)):
                off[place] += float((each.module(**batch).logits - whole).square().sum())
    assert off[0] < off[1]
    made.save(tmp_path / "packed")
    again = task.load(str(tmp_path / "packed"))
    with torch.no_grad():
        assert torch.equal(again.module(**batches[0]).logits, made.module(**batches[0]).logits)
