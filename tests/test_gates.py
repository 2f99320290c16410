"""Gates against surgery, against no gates at all, and their gradients against finite differences."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch.nn import functional as F

from multum.core.families import blocks_of, family_of
from multum.core.gates import gate_gradients, gated, input_gated, open_gates, skipped
from multum.core.surgery import head_size, heads_and_neurons, keep_blocks, keep_heads, keep_neurons
from multum.errors import InputError

every_family = pytest.mark.parametrize("family", tiny.FAMILIES)


@pytest.fixture(scope="module")
def batches():
    return list(tiny.task(n_validation=6).batches(tiny.model(), "validation", 3))


def batch_of(model):
    return next(tiny.task(n_validation=6).batches(model, "validation", 6))


@torch.no_grad()
def logits(module, batch):
    return module(**{name: value for name, value in batch.items() if name != "labels"}).logits


def ones(module):
    return tuple([gate.detach() for gate in gates] for gates in open_gates(module))


@every_family
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_gate_zero_is_removal(family, attention):
    model = tiny.model(family)
    model.module.set_attn_implementation(attention)
    batch, cut, row = batch_of(model), model.copy().module, family_of(model.module)
    heads, neurons = ones(model.module)
    heads[0][[1, 3]], neurons[0][:5], neurons[1][7] = 0.0, 0.0, 0.0
    blocks = blocks_of(cut)
    keep_heads(blocks[0], row, [0, 2], head_size(cut))
    keep_neurons(blocks[0], row, range(5, 32))
    keep_neurons(blocks[1], row, [i for i in range(32) if i != 7])
    with gated(model.module, torch.stack(heads), neurons):
        found = logits(model.module, batch)
    assert torch.allclose(found, logits(cut, batch), atol=1e-5)
    assert not torch.allclose(found, logits(model.module, batch), atol=1e-3)


@every_family
def test_all_gates_at_zero_are_sublayers_removed_whole(family):
    model = tiny.model(family)
    batch, cut, row = batch_of(model), model.copy().module, family_of(model.module)
    keep_heads(blocks_of(cut)[1], row, [], head_size(cut))
    keep_neurons(blocks_of(cut)[0], row, [])
    with (
        input_gated(blocks_of(model.module)[1], row.attention_output, torch.zeros(4)),
        input_gated(blocks_of(model.module)[0], row.down, torch.zeros(32)),
    ):
        assert torch.allclose(logits(model.module, batch), logits(cut, batch), atol=1e-5)


@every_family
def test_gate_one_changes_no_bit_and_nothing_stays_behind(family):
    model = tiny.model(family)
    batch = batch_of(model)
    before = logits(model.module, batch)
    with gated(model.module, *ones(model.module)):
        assert torch.equal(logits(model.module, batch), before)
    with pytest.raises(ZeroDivisionError), gated(model.module, [torch.zeros(4)] * 2):
        raise ZeroDivisionError
    assert torch.equal(logits(model.module, batch), before)


def test_a_model_after_surgery_has_gates_for_what_is_left():
    model = tiny.uneven(tiny.model(layers=4))
    batch, before = batch_of(model), logits(model.module, batch_of(model))
    heads, neurons = ones(model.module)
    assert [(len(h), len(n)) for h, n in zip(heads, neurons, strict=True)] == heads_and_neurons(model.module)
    with gated(model.module, heads, neurons):
        assert torch.equal(logits(model.module, batch), before)
    (slopes,) = gate_gradients(model.module, [batch], lambda outputs, batch: F.cross_entropy(outputs.logits, batch["labels"]))
    assert [len(part) for part in slopes[0]] == [len(gate) for gate in heads]


@every_family
def test_a_skipped_block_is_a_dropped_one(family):
    model = tiny.model(family, layers=3)
    batch, cut = batch_of(model), model.copy()
    keep_blocks(cut.module, [0, 2])
    with skipped(blocks_of(model.module)[1]):
        assert torch.equal(logits(model.module, batch), logits(cut.module, batch))


def test_gradients_are_the_slope_of_the_loss(batches):
    model = tiny.model()
    module = model.module.double()

    def loss(outputs, batch):
        return F.cross_entropy(outputs.logits, batch["labels"])

    found = gate_gradients(module, batches, loss)
    assert len(found) == len(batches) == 2
    assert all(parameter.grad is None and parameter.requires_grad for parameter in module.parameters())
    step = 1e-3
    for kind, block, unit in ((0, 0, 2), (0, 1, 0), (1, 0, 11), (1, 1, 31)):
        for number, batch in enumerate(batches):
            values = []
            for sign in (1, -1):
                gates = ones(module)
                gates[kind][block] = gates[kind][block].double()
                gates[kind][block][unit] += sign * step
                with torch.no_grad(), gated(module, *gates):
                    inputs = {name: value for name, value in batch.items() if name != "labels"}
                    values.append(float(loss(module(**inputs), batch)))
            slope = (values[0] - values[1]) / (2 * step)
            assert float(found[number][kind][block][unit]) == pytest.approx(slope, rel=1e-3, abs=1e-7)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_decoders_have_gates_for_their_heads_too(family):
    """GPT-2's matrices are stored the other way round; Llama's heads here are pairs of queries that share a key."""
    model = tiny.language_model(family)
    module, cut = model.module, model.copy().module
    ids = torch.arange(5, 25).reshape(2, 10)
    heads, neurons = ones(module)
    heads[0][1], neurons[1][:7] = 0.0, 0.0
    keep_heads(blocks_of(cut)[0], family_of(cut), [i for i in range(len(heads[0])) if i != 1], head_size(cut))
    keep_neurons(blocks_of(cut)[1], family_of(cut), range(7, len(neurons[1])))
    with torch.no_grad(), gated(module, heads, neurons):
        found = module(ids).logits
    with torch.no_grad():
        assert torch.allclose(found, cut(ids).logits, atol=1e-4)
        assert not torch.allclose(found, module(ids).logits, atol=1e-2)


def test_gates_that_do_not_fit_are_refused():
    module = tiny.model().module
    with (
        pytest.raises(ValueError, match=r"have \[4, 4\] heads, but there are gates for \[4, 3\]"),
        gated(module, [torch.ones(4), torch.ones(3)]),
    ):
        pass
    with pytest.raises(ValueError, match="neurons"), gated(module, None, torch.ones(2, 31)):
        pass
    with pytest.raises(InputError), gated(torch.nn.Linear(2, 2), torch.ones(1, 1)):
        pass
