"""SmoothQuant: no answer changes, inputs and weights end up equally large, and eight bits hurt less."""

from __future__ import annotations

import pytest
import tiny
import tiny_families
import torch
import translators

from multum.core.blocks import walk_blocks
from multum.core.families import blocks_of, family_of
from multum.core.linears import matrix
from multum.core.model import Model
from multum.errors import InputError
from multum.steps.drop_layers import DropLayers
from multum.steps.smoothquant import Smoothquant, peaks, smoothing

pytestmark = pytest.mark.usefixtures("one_thread")


def with_outliers(family: str) -> Model:
    """Two inputs of every block are a hundred times larger than the others, their weights as much smaller."""
    model = tiny.model(family, hidden=64, neurons=64)
    row = family_of(model.module)
    with torch.no_grad():
        for block in blocks_of(model.module):
            for norm, readers in (
                (row.attention_norm, {row.query, row.key, row.value}),
                (row.feed_forward_norm, {row.gate, row.up}),
            ):
                part = block.get_submodule(norm)
                if isinstance(part, torch.nn.Identity):  # ModernBERT's first
                    continue
                one = 1.0 if family == "gemma" else 0.0  # its gain is 1 + the weight
                part.weight[[5, 40]] = 100.0 * (part.weight[[5, 40]] + one) - one
                if getattr(part, "bias", None) is not None:
                    part.bias[[5, 40]] *= 100.0
                for path in readers - {None}:
                    matrix(block.get_submodule(path))[:, [5, 40]] /= 100.0
    return model


def eight_bits(x: torch.Tensor) -> torch.Tensor:
    """One scale for all of it."""
    step = x.abs().max() / 127
    return (x / step).round() * step


def per_row(weight: torch.Tensor) -> torch.Tensor:
    step = weight.abs().amax(1, keepdim=True) / 127
    return (weight / step).round() * step


def lost(model: Model, task, path: str) -> float:
    """‖Q(x) Q(W)ᵀ - x Wᵀ‖ / ‖x Wᵀ‖ at a matrix of the first block."""
    with torch.no_grad():
        block = next(iter(walk_blocks(model.module, task.calibration(model, 16))))
        x, weight = block.flows(0, [path])[path].input.float(), matrix(block.module.get_submodule(path))
        exact = x @ weight.T
        return float((eight_bits(x) @ per_row(weight).T - exact).norm() / exact.norm())


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_the_factors_are_those_of_the_formula(alpha):
    largest, weights = (
        torch.tensor([4.0, 1.0, 0.0, 2.0]),
        [torch.tensor([[1.0, 9.0, 1.0, 0.0]]), torch.tensor([[-16.0, 1.0, 2.0, 0.0]])],
    )
    wanted = [4.0**alpha / 16.0 ** (1 - alpha), 1.0 / 9.0 ** (1 - alpha), 1.0, 1.0]
    assert smoothing(largest, weights, alpha).tolist() == pytest.approx(wanted)


def test_queries_that_share_a_value_share_their_factor():
    made = torch.Generator().manual_seed(0)
    largest, weight = torch.rand(12, generator=made) + 0.1, torch.randn(5, 12, generator=made)
    s = smoothing(largest, [weight], 0.5, (2, 2, 3)).view(2, 2, 3)
    assert torch.equal(s[:, 0], s[:, 1])
    first = largest.view(2, 2, 3).amax(1)[1, 2] / weight.abs().amax(0).view(2, 2, 3).amax(1)[1, 2]
    assert s[1, 0, 2].item() == pytest.approx(first.item() ** 0.5)


@pytest.mark.parametrize("family", [*tiny.FAMILIES, *tiny_families.FAMILIES])
@pytest.mark.parametrize("cut", [False, True])
def test_no_answer_changes(family, cut):
    model, task = tiny.model(family, layers=3), tiny.task(32, 8, 4)
    model = tiny.uneven(model) if cut else model
    made = Smoothquant(samples=16)(model, task)
    for batch in task.calibration(model, 8):
        with torch.no_grad():
            before, after = (each.module(**batch).logits for each in (model, made))
        assert (before - after).abs().max() < 1e-5 * max(1.0, float(before.abs().max()))


@pytest.mark.parametrize("family", translators.FAMILIES)
def test_no_answer_of_an_encoder_decoder_changes(family):
    model, task = translators.translator(family), translators.translating(16, 4)
    made, batch = Smoothquant(samples=8)(model, task), task.calibration(model, 4)[0]
    with torch.no_grad():
        before, after = (each.module(**batch).logits for each in (model, made))
    assert (before - after).abs().max() < 1e-5 * max(1.0, float(before.abs().max()))
    assert any("decoder" in name for name in made.history[-1]["factors"])
    assert len(made.history[-1]["changed"]) > len(made.history[-1]["factors"]) / 2


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma", "modernbert", "phi3"])
def test_eight_bits_hurt_less(family):
    model, task = with_outliers(family), tiny.task(32, 4, 4)
    row, made = family_of(model.module), Smoothquant(samples=32)(model, task)
    for path in (row.query, row.up):
        if family != "modernbert" or path != row.query:  # its first block has no norm before its attention
            assert lost(made, task, path) < 0.5 * lost(model, task, path), path


def test_inputs_and_weights_end_up_equally_large():
    model, task = with_outliers("llama"), tiny.task(32, 4, 4)
    row, made = family_of(model.module), Smoothquant(samples=32)(model, task)
    with torch.no_grad():
        block = next(iter(walk_blocks(made.module, task.calibration(model, 32))))
        largest = block.sums([row.up], peaks, torch.maximum)[row.up]
    weights = torch.stack([matrix(block.module.get_submodule(path)).abs().amax(0) for path in (row.gate, row.up)])
    # The rows of `up` are divided once more, for what `down` reads; those of the gate are not.
    ratio = largest / weights[0]
    assert ratio.max() < 10
    assert (largest.max() / largest.median()) < 0.3 * 100


def test_what_has_no_place_is_named_and_nothing_at_all_is_refused():
    model, task = tiny.model("bert"), tiny.task(16, 4, 4)
    entry = Smoothquant(samples=8)(model, task).history[-1]
    assert set(entry["factors"]) == {f"bert.encoder.layer.{i}.attention.output.dense" for i in range(2)}
    assert entry["skipped"]["bert.encoder.layer.0.intermediate.dense"] == "its norm also feeds the residual stream"
    assert entry["skipped"]["classifier"] == "only what is read inside the blocks is smoothed"
    with pytest.raises(InputError, match="smoothquant: the model has no blocks"):
        Smoothquant()(Model(module=tiny.model(layers=0).module, tokenizer=model.tokenizer, source="tiny"), task)
    with pytest.raises(InputError, match="there are no calibration texts"):
        Smoothquant()(DropLayers(keep=1, which="alternate")(model, task), _no_texts())


def _no_texts():
    class Nothing:
        def calibration(self, *_, **__):
            return []

    return Nothing()
