"""Rounding: the grid by loops, errors within half a step, zero points that fit better, layers that stay in float."""

from __future__ import annotations

import re

import pytest
import tiny
import torch
import translators
from torch.nn import functional as F

from multum.core.codes import Packing
from multum.core.linears import matrix
from multum.core.packed import PackedEmbedding, PackedLinear, packed_parts
from multum.core.surgery import swap
from multum.errors import InputError
from multum.steps._quantization import grid, output_error, rounded
from multum.steps.quantize import Quantize, dearest, hqq, lp_error
from multum.steps.quantize_embeddings import QuantizeEmbeddings

pytestmark = pytest.mark.usefixtures("one_thread")
PACKINGS = pytest.mark.parametrize(
    "packing", [Packing(bits, group, zeros) for bits in (8, 4, 3) for group in (0, 5, 8) for zeros in (False, True)], ids=repr
)


def weights(rows: int = 6, inputs: int = 24, seed: int = 0, shift: float = 0.0) -> torch.Tensor:
    """Weights with outliers, about 0.02 wide."""
    made = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, inputs, generator=made) * 0.02 + shift
    return w * (1 + 4 * (torch.rand(rows, inputs, generator=made) > 0.9))


@PACKINGS
@pytest.mark.parametrize("inputs", [24, 23, 3])
def test_the_grid_is_the_formula_by_loops(packing, inputs):
    w = weights(inputs=inputs, shift=0.01)
    scales, zeros = grid(w, packing)
    width = packing.group or inputs
    for i in range(len(w)):
        for g in range(packing.groups(inputs)):
            part = w[i, g * width : (g + 1) * width]
            if packing.zeros:
                low, high = min(float(part.min()), 0.0), max(float(part.max()), 0.0)
                s = torch.tensor((high - low) / (2**packing.bits - 1)).bfloat16().float()
                assert zeros[i, g] == round(-low / float(s))
            else:
                s = torch.tensor(float(part.abs().max()) / (2 ** (packing.bits - 1) - 1)).bfloat16().float()
            assert scales[i, g] == s


@PACKINGS
@pytest.mark.parametrize("inputs", [24, 23, 3])
def test_no_weight_moves_by_more_than_half_a_step_and_zero_stays_zero(packing, inputs):
    w = weights(inputs=inputs)
    w[:, 1] = 0.0
    w[2] = 0.0
    made = rounded(w, packing)
    steps = made.scales.repeat_interleave(packing.width(inputs), 1)[:, :inputs]
    # A scale that was rounded down cuts the largest weights by up to 2^-8 of the range, a rounded zero point by half a step more
    slack = 0.5 + 2**-8 * 2**packing.bits + (0.5 if packing.zeros else 0.0)
    assert ((made.weight() - w).abs() <= slack * steps).all()
    inner = (made.codes > 0) & (made.codes < 2**packing.bits - 1)
    assert ((made.weight() - w).abs() <= 0.5001 * steps)[inner].all()
    assert (made.weight()[:, 1] == 0).all()
    assert (made.weight()[2] == 0).all()


@pytest.mark.parametrize("packing", [Packing(), Packing(4, 8), Packing(3, 5)])
def test_what_lies_on_a_grid_stays_where_it_is(packing):
    once = rounded(weights(), packing)
    again = rounded(once.weight(), packing)
    assert torch.equal(again.weight(), once.weight())
    assert torch.equal(again.codes, once.codes)


def test_more_bits_and_smaller_groups_are_nearer():
    w, x = weights(32, 64), torch.randn(200, 64, generator=torch.Generator().manual_seed(1)).double()
    h = x.T @ x
    found = [output_error(w, rounded(w, packing), h) for packing in (Packing(3), Packing(4), Packing(4, 16), Packing(8))]
    assert found == sorted(found, reverse=True)
    wanted = (x @ (w - rounded(w, Packing(3)).weight()).double().T).norm() / (x @ w.double().T).norm()
    assert found[0] == pytest.approx(float(wanted), rel=1e-6)


def by_turns(w: list[float], s: float, z: float, bits: int) -> float:
    """The best zero point of one group in the course of 20 turns, number by number."""
    best = (float("inf"), z)
    for _ in range(21):
        u = [min(max(round(x / s + z), 0), 2**bits - 1) for x in w]
        e = [x / s - (v - z) for x, v in zip(w, u, strict=True)]
        best = min(best, (sum(abs(x) ** 0.7 for x in e), z))
        left = [(1 if x > 0 else -1) * max(abs(x) - max(abs(x), 1e-8) ** (0.7 - 1) / 10, 0.0) for x in e]
        z = float(torch.tensor(sum(v - x / s + d for x, v, d in zip(w, u, left, strict=True)) / len(w)).half())
    return best[1]


@pytest.mark.parametrize("bits", [4, 3])
@pytest.mark.parametrize("inputs", [64, 61])
def test_hqq_lowers_its_objective_in_every_group(bits, inputs):
    packing = Packing(bits, 16, True)
    for seed in range(3):
        w = weights(20, inputs, seed)
        start, end = rounded(w, packing), hqq(w, packing)
        before, after = lp_error(w, start), lp_error(w, end)
        assert (after <= before).all()
        assert after.sum() < 0.99 * before.sum()
        assert torch.equal(start.scales, end.scales)
        for g in range(packing.groups(inputs)):
            z = by_turns(w[0, g * 16 : (g + 1) * 16].tolist(), float(start.scales[0, g]), float(start.zeros[0, g]), bits)
            assert float(end.zeros[0, g]) == pytest.approx(z, abs=0.01)


def test_a_zero_point_for_weights_of_one_value_is_found_exactly():
    w = torch.full((2, 16), 0.3)
    w[:, 0] = 0.0
    made = hqq(w, Packing(4, 0, True))
    assert (made.weight() - w).abs().max() < 0.01 * 0.3


# -- the step ------------------------------------------------------------------------------------------------------------


def test_every_matrix_of_the_blocks_is_rounded_and_bytes_are_counted():
    model, task = tiny.model("bert"), tiny.task(8, 4, 4)
    for values, way in (({"bits": 8}, rounded), ({"bits": 4, "group": 16, "symmetric": False, "hqq": True}, hqq)):
        step = Quantize(**values)
        result = step(model, task)
        entry = result.history[-1]
        for name, linear in model.linears().items():
            if "encoder.layer" in name:
                part = result.module.get_submodule(name)
                assert torch.equal(part.weight, way(matrix(linear).detach(), step.packing).weight())
                assert part.bias is not linear.bias
                assert torch.equal(part.bias, linear.bias)
                assert entry["changed"][name] == str(step.packing)
            else:
                assert entry["skipped"][name] == "only the blocks are quantized"
        stored = [
            t for part in packed_parts(result.module).values() for t in (part.codes, part.scales, part.zeros) if t is not None
        ]
        assert entry["weight_bytes"][1] == sum(t.numel() * t.element_size() for t in stored)
        assert entry["weight_bytes"][0] == 4 * sum(part.rows * part.inputs for part in packed_parts(result.module).values())
        assert "no better" in entry["summary"]
    assert entry["bits_per_weight"] == 4 + 32 / 16


def test_layers_named_stay_in_float():
    model, task = tiny.model("llama"), tiny.task(8, 4, 4)
    result = Quantize(keep=("*.down_proj", "model.layers.0.self_attn.q_proj"))(model, task)
    floats = {name for name in result.linears() if "layers" in name}
    assert floats == {"model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"}
    assert {result.history[-1]["skipped"][name] for name in floats} == {"kept in float"}


def test_names_that_are_none_and_weights_that_are_no_numbers_are_all_listed():
    model, task = tiny.model("bert", layers=1), tiny.task(8, 4, 4)
    with torch.no_grad():
        model.module.bert.encoder.layer[0].output.dense.weight[0, 0] = float("nan")
    with pytest.raises(InputError) as caught:
        Quantize(keep=("*.nothing", "x"))(model, task)
    assert len(caught.value.problems) == 3
    assert "bert.encoder.layer.0.output.dense has weights that are not finite" in str(caught.value)
    with torch.no_grad():
        model.module.bert.embeddings.word_embeddings.weight[0, 0] = float("inf")
    with pytest.raises(InputError, match="word_embeddings has weights that are not finite"):
        QuantizeEmbeddings()(model, task)


@torch.no_grad()
def test_what_a_layer_costs_is_the_divergence_with_that_one_rounded():
    model, task = tiny.model("bert"), tiny.task()
    step = Quantize(bits=3, keep_share=0.3, samples=24)
    result = step(model, task)
    entry, batches = result.history[-1], task.calibration(model, 24)[::2]
    whole = torch.cat([model.module(**batch).logits for batch in batches]).double().log_softmax(-1)
    sizes = {}
    for name, linear in model.linears().items():
        if "encoder.layer" not in name:
            continue
        sizes[name], other = linear.weight.numel(), model.copy().module
        swap(other, name, PackedLinear.of(linear, rounded(linear.weight, Packing(3))))
        log_q = torch.cat([other(**batch).logits for batch in batches]).double().log_softmax(-1)
        cost = float(F.kl_div(log_q, whole, log_target=True, reduction="batchmean"))
        assert entry["costs"][name] == pytest.approx(cost, rel=1e-3, abs=1e-7)
    kept = {name for name, reason in entry["skipped"].items() if reason.startswith("kept in float")}
    assert kept == set(dearest(entry["costs"], sizes, 0.3))
    assert 0 < sum(sizes[name] for name in kept) <= 0.3 * sum(sizes.values())


def test_the_dearest_for_a_weight_come_first_and_cheap_ones_fill_the_room():
    costs, sizes = {"a": 8.0, "b": 3.0, "c": 1.0, "d": 0.0}, {"a": 8, "b": 1, "c": 2, "d": 1}
    assert dearest(costs, sizes, 1.0) == ["b", "a", "c"]
    assert dearest(costs, sizes, 0.3) == ["b", "c"]
    assert dearest(costs, sizes, 0.0) == []


@torch.no_grad()
@pytest.mark.parametrize("family", translators.FAMILIES)
@pytest.mark.parametrize("made", [translators.translating, translators.summarizing])
def test_what_a_layer_of_either_stack_costs_is_the_divergence_over_what_is_to_be_written(family, made):
    model, task = translators.translator(family, layers=1, spread=3.0), made(32)
    result = Quantize(bits=3, keep_share=0.3, samples=24)(model, task)
    entry, batches = result.history[-1], task.calibration(model, 24)[::2]

    def answers(module):
        real = [F.pad(batch["decoder_input_ids"][:, 1:] != 0, (1, 0), value=True) for batch in batches]  # it begins with padding
        found = [module(**batch).logits[mask] for batch, mask in zip(batches, real, strict=True)]
        return torch.cat(found).double().log_softmax(-1)

    whole, sizes = answers(model.module), {}
    for name, linear in model.linears().items():
        if not re.search(r"\.(layers|block)\.0\.", name):
            continue
        sizes[name], other = linear.weight.numel(), model.copy().module
        swap(other, name, PackedLinear.of(linear, rounded(linear.weight, Packing(3))))
        cost = float(F.kl_div(answers(other), whole, log_target=True, reduction="batchmean"))
        assert entry["costs"][name] == pytest.approx(cost, rel=1e-3, abs=2e-7)
    assert entry["costs"].keys() == sizes.keys()
    assert {name.split("coder")[0][-2:] for name in sizes} == {"en", "de"}
    kept = {name for name, reason in entry["skipped"].items() if reason.startswith("kept in float")}
    assert kept == set(dearest(entry["costs"], sizes, 0.3))
    assert len(packed_parts(result.module)) == len(sizes) - len(kept)


def test_keep_share_works_for_a_language_model():
    model = tiny.language_model("gpt2")
    ids = torch.arange(5, 45).reshape(2, 20)

    class Texts:
        def calibration(self, model, samples, *, seed=0):
            return [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}] * samples

    result = Quantize(bits=4, keep_share=0.5, samples=2)(model, Texts())
    assert 0 < len(packed_parts(result.module)) < 8
    with pytest.raises(InputError, match="no calibration texts"):
        Quantize(keep_share=0.5)(model, tiny_empty())


def tiny_empty():
    class Nothing:
        def calibration(self, model, samples, *, seed=0):
            return []

    return Nothing()


def test_embeddings_alone_and_with_positions():
    model, task = tiny.model("bert"), tiny.task(8, 4, 4)
    words = QuantizeEmbeddings(positions=False)(model, task)
    assert list(packed_parts(words.module)) == ["bert.embeddings.word_embeddings"]
    every = QuantizeEmbeddings()(model, task)
    assert len([part for part in every.module.modules() if isinstance(part, PackedEmbedding)]) == 3
    assert every.history[-1]["tables"][0].endswith("word_embeddings")
    table = model.module.bert.embeddings.word_embeddings.weight.detach()
    packed = every.module.bert.embeddings.word_embeddings
    assert (table == 0).all(1).sum() == 1  # the padding token's row
    rows = [row for row in table if row.any()]
    by_hand = torch.stack([(row / (row.abs().max() / 127).bfloat16().float()).round().clamp(-128, 127) for row in rows])
    assert torch.equal((packed.codes.int() - 128)[(table != 0).any(1)], by_hand.int())
    assert torch.equal(packed.weight[(table == 0).all(1)], torch.zeros(1, table.shape[1]))
    four = QuantizeEmbeddings(bits=4, group=16)(model, task)
    assert four.module.bert.embeddings.word_embeddings.codes.shape == (len(table), 16)
