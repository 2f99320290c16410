"""AWQ: factors that are folded in change nothing, with α = 0 it is rounding, and the search does what it says."""

from __future__ import annotations

import pytest
import tiny
import tiny_encoder_decoders
import tiny_families
import torch
import translators

from multum.core.codes import Packing
from multum.core.families import stacks_of
from multum.core.linears import is_linear, shape_of
from multum.core.model import Model
from multum.core.packed import packed_parts
from multum.errors import InputError
from multum.steps._quantization import grouped, rounded
from multum.steps._scaling import every_place, fold
from multum.steps.awq import CLIPS, Awq, clipped, scales_for, search
from multum.steps.quantize import Quantize

pytestmark = pytest.mark.usefixtures("one_thread")
FULL = ("llama", "qwen2", "qwen3", "mistral", "gemma", "phi3")


def texts(ids: torch.Tensor):
    class Texts:
        def calibration(self, model, samples, *, seed=0):
            return [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in ids[:samples]]

    return Texts()


def all_places(module):
    for stack in stacks_of(module):
        for block in stack.blocks:
            yield from ((block, place) for place in every_place(module, block, stack.family))


def drawn(inputs: int, shared: tuple[int, int, int] | None, made: torch.Generator) -> torch.Tensor:
    s = torch.rand(shared[0], 1, shared[2], generator=made) if shared else torch.rand(inputs, generator=made)
    return ((s.expand(shared).flatten() if shared else s) + 0.3).double()


@torch.no_grad()
def folded(module) -> int:
    made, count = torch.Generator().manual_seed(0), 0
    for block, place in all_places(module):
        parts = [block.get_submodule(path) for path in place.readers]
        norm = not place.norm or hasattr(block.get_submodule(place.norm), "weight")
        if not place.obstacle and norm and all(is_linear(part) for part in parts):
            before = [part.weight.clone() for part in parts]
            fold(block, place, drawn(shape_of(parts[0])[1], place.shared, made))
            assert all(not torch.equal(a, part.weight) for a, part in zip(before, parts, strict=True))
            count += 1
    return count


@pytest.mark.parametrize("family", [*tiny.FAMILIES, *tiny_families.FAMILIES])
@pytest.mark.parametrize("cut", [False, True])
@torch.no_grad()
def test_folding_changes_no_answer(family, cut):
    model, task = tiny.model(family, layers=3), tiny.task(16, 4, 4)
    module = (tiny.uneven(model) if cut else model).module.double()
    batch = task.calibration(model, 8)[0]
    before = module(**batch).logits
    count = folded(module)
    assert torch.allclose(module(**batch).logits, before, rtol=1e-4, atol=1e-5)  # norms compute in float32
    per_block = 4 if family in FULL else 3 if family in ("gpt2", "opt") else 1
    wanted = 11 if family == "modernbert" else 3 * per_block
    assert count == wanted if not cut else 0 < count < wanted


@pytest.mark.parametrize("family", ["t5", "t5-gated", "bart", "mbart", "marian", "t5-wide-heads"])
@torch.no_grad()
def test_folding_changes_no_answer_of_an_encoder_decoder(family):
    module, batch = tiny_encoder_decoders.model(family).double(), tiny_encoder_decoders.batch()
    before = module(**batch).logits
    assert folded(module) >= 9
    assert torch.allclose(module(**batch).logits, before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "gemma"])
def test_with_one_alpha_it_is_rounding(family):
    model, task = tiny.model(family), tiny.task(16, 4, 4)
    result = Awq(alphas=1, clip=False, group=16, samples=8)(model, task)
    assert result.fingerprint() == Quantize(bits=4, group=16, symmetric=False)(model, task).fingerprint()
    assert set(result.history[-1]["alphas"].values()) == {0.0}


def test_factors_are_powers_of_the_means_around_one():
    mean = torch.tensor([4.0, 1.0, 0.25, 0.0], dtype=torch.double)
    assert torch.equal(scales_for(mean, 0.0), torch.ones(4, dtype=torch.double))
    s = scales_for(mean, 0.5)
    assert (s.max() * s.min()).item() == pytest.approx(1.0)
    assert (s[0] / s[1]).item() == pytest.approx(2.0)
    assert (s[0] / s[3]).item() == pytest.approx(100.0)  # never 0
    assert torch.equal(scales_for(mean * 0, 0.7), torch.ones(4, dtype=torch.double))


@pytest.mark.parametrize("seed", range(3))
def test_the_search_finds_the_least_error_of_all_that_it_tries(seed):
    made = torch.Generator().manual_seed(seed)
    sizes = torch.ones(32, dtype=torch.double)
    sizes[[3, 17]] = 40.0  # inputs that are far larger than others
    x = torch.randn(200, 32, generator=made, dtype=torch.double) * sizes
    weights, packing = [torch.randn(16, 32, generator=made) * 0.1 for _ in range(2)], Packing(3, 16, True)
    mean = x.abs().sum(0)
    alpha, s = search(weights, x.T @ x, mean, packing, 10)

    def error(alpha: float) -> float:
        factor = scales_for(mean, alpha).float()
        lost = [x @ ((rounded(w * factor, packing).weight() / factor) - w).double().T for w in weights]
        return sum(float(part.square().sum()) for part in lost)

    errors = [error(number / 10) for number in range(10)]
    assert error(alpha) == pytest.approx(min(errors), rel=1e-4)
    assert error(alpha) < 0.5 * errors[0]
    assert torch.equal(s, scales_for(mean, alpha))


@pytest.mark.parametrize("packing", [Packing(4, 16, True), Packing(3, 10), Packing(4, 0, True), Packing(3, 40)], ids=repr)
def test_groups_are_clipped_where_their_own_outputs_miss_it_least(packing):
    made = torch.Generator().manual_seed(0)
    x = torch.randn(100, 32, generator=made, dtype=torch.double) @ torch.randn(32, 32, generator=made, dtype=torch.double)
    weight = torch.randn(6, 32, generator=made) ** 3
    found, width = clipped(weight, packing, x.T @ x), packing.width(32)
    for row in range(6):
        for start in range(0, 32, width):
            w, inputs = weight[row : row + 1, start : start + width], x[:, start : start + width]
            alone = Packing(packing.bits, 0, packing.zeros)
            tried = [rounded(w.clamp(-share * w.abs().max(), share * w.abs().max()), alone).weight() for share in CLIPS]
            errors = [float((inputs @ (each - w).double().T).square().sum()) for each in tried]
            ours = found.weight()[row : row + 1, start : start + width]
            error = float((inputs @ (ours - w).double().T).square().sum())
            assert error == pytest.approx(min(errors), rel=1e-4)
    assert (grouped(found.weight(), packing) != grouped(rounded(weight, packing).weight(), packing)).any()


@pytest.mark.parametrize("shape", [(0, 8), (5, 0), (3, 1)])
def test_layers_without_weights_are_clipped_like_rounded(shape):
    weight, packing = torch.ones(shape), Packing(4, 8, True)
    assert torch.equal(clipped(weight, packing, torch.eye(shape[1]).double()).weight(), rounded(weight, packing).weight())


def test_clipping_lessens_the_error_and_leaves_queries_and_keys():
    model, task = tiny.model("llama", hidden=64, neurons=64), tiny.task(32, 4, 4)
    with torch.no_grad():
        for linear in model.linears().values():
            linear.weight.copy_(linear.weight.sign() * linear.weight.abs() ** 2)  # heavier tails
    first = [f"model.layers.0.{name}" for name in ("self_attn.v_proj", "self_attn.q_proj", "self_attn.k_proj")]
    fields = {"bits": 3, "group": 32, "samples": 16, "alphas": 1}
    ours, plain = (Awq(clip=clip, **fields)(model, task) for clip in (True, False))
    found, before = (made.history[-1]["relative_errors"] for made in (ours, plain))
    assert found[first[0]] < 0.95 * before[first[0]]
    for name in first[1:]:
        assert torch.equal(ours.module.get_submodule(name).weight, plain.module.get_submodule(name).weight)


@torch.no_grad()
def test_large_inputs_are_rounded_with_less_error_than_by_rounding_alone():
    module = tiny_families.language_model("llama", hidden=64, neurons=64)
    for block in module.model.layers:
        block.input_layernorm.weight[[5, 40]] = 30.0
        block.post_attention_layernorm.weight[[7, 50]] = 30.0
        for part in (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj):
            part.weight[:, [5, 40]] /= 30
        for part in (block.mlp.gate_proj, block.mlp.up_proj):
            part.weight[:, [7, 50]] /= 30
    model = Model(module=module, tokenizer=tiny.language_model("llama").tokenizer, source="tiny")
    ids = torch.randint(3, 50, (16, 24), generator=torch.Generator().manual_seed(0))
    ours = Awq(bits=4, group=32, samples=12)(model, texts(ids))
    theirs = Awq(bits=4, group=32, samples=12, alphas=1)(model, texts(ids))
    found, plain = (made.history[-1]["relative_errors"] for made in (ours, theirs))
    assert found["model.layers.0.self_attn.q_proj"] < 0.8 * plain["model.layers.0.self_attn.q_proj"]
    assert found["model.layers.0.mlp.up_proj"] < 0.8 * plain["model.layers.0.mlp.up_proj"]
    whole = module(ids).logits
    off = [float((made.module(ids).logits - whole).square().mean()) for made in (ours, theirs)]
    assert off[0] < off[1]


def test_layers_that_cannot_be_scaled_are_rounded_and_named():
    model, task = tiny.model("bert"), tiny.task(16, 4, 4)
    entry = Awq(samples=8, alphas=4, group=16)(model, task).history[-1]
    scaled = set(entry["alphas"])
    assert scaled == {f"bert.encoder.layer.{i}.attention.output.dense" for i in range(2)}
    reasons = {name.rpartition("layer.")[2][2:]: why for name, why in entry["not_scaled"].items()}
    assert reasons["intermediate.dense"] == reasons["attention.self.query"] == "its norm also feeds the residual stream"
    assert reasons["output.dense"] == "an activation stands before it"
    assert len(entry["changed"]) == 12


def test_what_reads_the_same_as_a_layer_kept_in_float_is_not_scaled():
    model, task = tiny.model("llama"), tiny.task(16, 4, 4)
    entry = Awq(samples=8, alphas=4, keep=("*.q_proj",))(model, task).history[-1]
    assert "not all that read the same" in entry["not_scaled"]["model.layers.0.self_attn.k_proj"]
    assert "model.layers.0.mlp.up_proj" in entry["alphas"]
    with pytest.raises(InputError, match="awq: there are no calibration texts"):
        Awq()(model, texts(torch.empty(0, 4).long()))


@pytest.mark.parametrize("family", translators.FAMILIES)
def test_both_stacks_of_an_encoder_decoder_are_scaled_and_rounded(family, tmp_path):
    model, task = translators.translator(family), translators.translating(48, 4)
    made = Awq(bits=3, group=16, samples=48, alphas=10)(model, task)
    entry, plain = made.history[-1], Quantize(bits=3, group=16, symmetric=False)(model, task)
    assert packed_parts(made.module).keys() == entry["relative_errors"].keys() == set(entry["alphas"]) | set(entry["not_scaled"])
    crossing = "EncDecAttention" if family == "t5" else "encoder_attn"
    assert any(crossing in name for name in entry["alphas"])
    assert any(crossing in name and "other blocks too" in why for name, why in entry["not_scaled"].items())
    with torch.no_grad():
        off = [0.0, 0.0]
        for batch in task.calibration(model, 48):
            whole = model.module(**batch).logits
            for place, each in enumerate((made, plain)):
                off[place] += float((each.module(**batch).logits - whole).square().sum())
    assert off[0] < off[1]
    batch = task.calibration(model, 48)[0]
    made.save(tmp_path / "packed")
    again = task.load(str(tmp_path / "packed"))
    with torch.no_grad():
        assert torch.equal(again.module(**batch).logits, made.module(**batch).logits)
