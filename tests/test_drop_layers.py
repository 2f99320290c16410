"""Which blocks stay, and Block Influence against loops over hidden states."""

from __future__ import annotations

import math
from contextlib import nullcontext
from functools import partial

import pytest
import tiny
import torch
import translators

from multum.core.block import state_of
from multum.core.blocks import walk_blocks
from multum.core.families import blocks_of, family_of
from multum.core.step import make
from multum.errors import InputError
from multum.steps import drop_layers
from multum.steps.drop_layers import DropLayers, alternate, block_influence, most_influential


def kept(model, **fields) -> list[int]:
    return DropLayers(**fields)(model, tiny.task()).history[-1]["kept_blocks"]


def slow_influence(module, batches) -> list[float]:
    """One text at a time and without padding; every token by itself."""
    cosines: list[list[float]] = [[] for _ in blocks_of(module)]
    for batch in batches:
        for row in range(len(batch["input_ids"])):
            length = int(batch["attention_mask"][row].sum())
            states: list[tuple[torch.Tensor, torch.Tensor]] = []

            def keep(_, inputs, output, states=states):
                states.append((inputs[0][0], output.reshape(inputs[0].shape)[0]))

            handles = [block.register_forward_hook(keep) for block in blocks_of(module)]
            with torch.no_grad():
                module(**{key: value[row : row + 1, :length] for key, value in batch.items()})
            for handle in handles:
                handle.remove()
            for number, (read, written) in enumerate(states):
                for a, b in zip(read.tolist(), written.tolist(), strict=True):
                    dot = sum(x * y for x, y in zip(a, b, strict=True))
                    cosines[number].append(dot / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b)))
    return [1 - sum(values) / len(values) for values in cosines]


@pytest.mark.parametrize("name", ["bert", "distilbert", "roberta", "electra"])
def test_influence_equals_slow_loops_and_knows_no_padding(name):
    model = tiny.model(name, layers=3)
    batches = tiny.task().calibration(model, 12)
    assert any((batch["attention_mask"] == 0).any() for batch in batches)
    assert block_influence(model.module, batches) == pytest.approx(slow_influence(model.module, batches), abs=1e-5)


def test_a_block_that_changes_nothing_has_no_influence_and_goes_first():
    model = tiny.model(layers=4)
    family, block = family_of(model.module), blocks_of(model.module)[2]
    with torch.no_grad():
        # Its sublayers add nothing, and what its norms read has been normalized the same way by block 1.
        for path in (family.attention_output, family.down):
            block.get_submodule(path).weight.zero_()
            block.get_submodule(path).bias.zero_()
        for other in blocks_of(model.module)[1:3]:
            for path in (family.attention_norm, family.feed_forward_norm):
                other.get_submodule(path).weight.fill_(1.0)
                other.get_submodule(path).bias.zero_()
    influence = block_influence(model.module, tiny.task().calibration(model, 16))
    assert influence[2] == pytest.approx(0, abs=1e-6)
    assert all(value > 1e-3 for index, value in enumerate(influence) if index != 2)
    assert kept(model, keep=3, which="importance") == [0, 1, 3]


def _keep_input(seen, _, inputs) -> None:
    seen.append(inputs[0])


def slow_states(module, batches, *, last: bool) -> list[list[list[float]]]:
    """Per depth and text the hidden state of its last or first token: one text at a time, without padding."""
    found: list[list[list[float]]] = [[] for _ in range(len(blocks_of(module)) + 1)]
    for batch in batches:
        for row in range(len(batch["input_ids"])):
            length = int(batch["attention_mask"][row].sum())
            seen: list[torch.Tensor] = []
            blocks, keep = blocks_of(module), partial(_keep_input, seen)
            hooks = [block.register_forward_pre_hook(keep) for block in blocks]
            hooks.append(blocks[-1].register_forward_hook(lambda _, __, output, seen=seen: seen.append(state_of(output))))
            with torch.no_grad():
                module(**{key: value[row : row + 1, :length] for key, value in batch.items()})
            for hook in hooks:
                hook.remove()
            for depth, state in enumerate(seen):
                found[depth].append(state.reshape(length, -1)[-1 if last else 0].tolist())
    return found


def slow_distance(a: list[list[float]], b: list[list[float]]) -> float:
    angles = []
    for x, y in zip(a, b, strict=True):
        dot = sum(i * j for i, j in zip(x, y, strict=True))
        angles.append(math.acos(max(-1.0, min(1.0, dot / math.sqrt(sum(i * i for i in x) * sum(i * i for i in y))))))
    return sum(angles) / len(angles) / math.pi


@pytest.mark.parametrize(("name", "last"), [("bert", False), ("llama", True), ("gpt2", True), ("opt", True)])
def test_angular_distances_equal_slow_loops_at_one_token_of_every_text(name, last):
    model, task = tiny.model(name, layers=4), tiny.task()
    batches = task.calibration(model, 12)
    assert any((batch["attention_mask"] == 0).any() for batch in batches)
    entry = DropLayers(keep=2, which="angular", samples=12)(model, task).history[-1]
    states = slow_states(model.module, batches, last=last)
    expected = [slow_distance(states[at], states[at + 2]) for at in range(3)]
    assert entry["angular_distances"] == pytest.approx(expected, abs=1e-4)
    first = expected.index(min(expected))
    assert entry["dropped_blocks"] == [first, first + 1]


def test_blocks_in_a_row_that_change_nothing_go_together():
    model = tiny.model("llama", layers=5)
    family = family_of(model.module)
    with torch.no_grad():
        for block in blocks_of(model.module)[2:4]:
            for path in (family.attention_output, family.down):
                block.get_submodule(path).weight.zero_()
    made = DropLayers(keep=3, which="angular")(model, tiny.task())
    assert made.history[-1]["dropped_blocks"] == [2, 3]
    batch = tiny.task().calibration(model, 8)[0]
    with torch.no_grad():
        assert torch.equal(made.module(**batch).logits, model.module(**batch).logits)


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_angular_distances_of_a_stack_are_measured_inside_it(stack):
    model, task = translators.translator("marian", layers=3), translators.translating()
    entry = DropLayers(keep=2, which="angular", stack=stack)(model, task).history[-1]
    every = walk_blocks(model.module, task.calibration(model, 64))
    with torch.no_grad():
        number = {"encoder": 0, "decoder": 3}[stack]
        turned = []
        for block in every:
            if number <= block.index < number + 3:
                pairs = [(block.calls[i][0][0], block.run(i), block.masks[i]) for i in range(len(block.calls))]
                at = [(mask.sum(1) - 1 if stack == "decoder" else 0 * mask.sum(1)) for *_, mask in pairs]
                rows = [(a[range(len(t)), t], b[range(len(t)), t]) for (a, b, _), t in zip(pairs, at, strict=True)]
                turned.append(slow_distance(*(torch.cat(side).tolist() for side in zip(*rows, strict=True))))
    assert entry["angular_distances"] == pytest.approx(turned, abs=1e-4)
    assert entry["dropped_blocks"] == [turned.index(min(turned))]


def test_most_influential():
    assert most_influential([0.5, 0.1, 0.3, 0.3], 2) == [0, 2]
    assert most_influential([0.1, 0.2, 0.3], 3) == [0, 1, 2]


def test_alternate():
    assert alternate(12, 6) == [0, 2, 4, 7, 9, 11]
    assert alternate(6, 3) == [0, 2, 5]
    for blocks in range(1, 30):
        for keep in range(1, blocks + 1):
            chosen = alternate(blocks, keep)
            assert len(set(chosen)) == keep
            assert chosen == sorted(chosen)
            assert chosen[0] == 0
            assert chosen[-1] == (blocks - 1 if keep > 1 else 0)
        assert alternate(blocks, blocks) == list(range(blocks))


def test_top_alternate_and_numbers():
    model = tiny.model(layers=4)
    assert kept(model, keep=2) == [0, 1]
    assert kept(model, keep=2, which="alternate") == [0, 3]
    assert kept(model, which=(0, 2)) == [1, 3]
    assert kept(model, keep=4) == [0, 1, 2, 3]


def test_what_stays_is_what_was_there():
    model = tiny.model(layers=4)
    result = DropLayers(which=(1, 2))(model, tiny.task())
    old, new = blocks_of(model.module), blocks_of(result.module)
    assert len(new) == result.module.config.num_hidden_layers == 2
    for index, number in enumerate((0, 3)):
        for key, value in new[index].state_dict().items():
            assert torch.equal(value, old[number].state_dict()[key])
    assert result.history[-1]["dropped_blocks"] == [1, 2]


def test_all_kept_changes_nothing():
    model = tiny.model(layers=3)
    for which in ("top", "alternate", "importance", "angular"):
        same = DropLayers(keep=3, which=which)(model, tiny.task())
        assert same.fingerprint() == model.fingerprint()
        assert same.history[-1]["changed"] == {}


def test_importance_records_what_it_saw():
    model, task = tiny.model(layers=3), tiny.task()
    entry = DropLayers(keep=1, which="importance", samples=16, seed=3)(model, task).history[-1]
    assert entry["influence"] == pytest.approx(block_influence(model.module, task.calibration(model, 16, seed=3)), rel=1e-5)
    assert entry["kept_blocks"] == [entry["influence"].index(max(entry["influence"]))]


def test_importance_is_measured_where_an_accelerator_would_be(monkeypatch):
    been = []
    monkeypatch.setattr(drop_layers, "on_accelerator", lambda module: been.append(module) or nullcontext())
    result = DropLayers(keep=1, which="importance", samples=8)(tiny.model(), tiny.task())
    assert been == [result.module]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "keep must say how many"),
        ({"keep": 0}, "keep must be at least 1"),
        ({"keep": -2}, "keep must be at least 1"),
        ({"keep": 2, "which": "bottom"}, "which must be 'top'"),
        ({"keep": 2, "which": (1,)}, "not both"),
        ({"which": ()}, "different blocks"),
        ({"which": (1, 1)}, "different blocks"),
        ({"which": (-1,)}, "counted from 0"),
        ({"keep": 1, "samples": 0}, "samples must be at least 1"),
    ],
)
def test_bad_fields_fail_at_construction(fields, message):
    with pytest.raises(InputError, match=message):
        DropLayers(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"keep": 3}, "keep is 3, but the model has only 2 blocks"),
        ({"which": (1, 2, 5)}, "blocks 0 to 1, no 2, 5"),
        ({"which": (0, 1)}, "at least one has to stay"),
    ],
)
def test_what_does_not_fit_the_model_fails_and_leaves_it_alone(fields, message):
    model = tiny.model()
    before = model.fingerprint()
    with pytest.raises(InputError, match=message):
        DropLayers(**fields)(model, tiny.task())
    assert model.fingerprint() == before


def test_numbers_from_yaml_make_the_same_step():
    assert make("drop_layers", {"which": [1, 2]}) == DropLayers(which=(1, 2))
    assert make("drop_layers", {"keep": "2", "which": "alternate"}) == DropLayers(keep=2, which="alternate")
