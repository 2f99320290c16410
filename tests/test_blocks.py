"""Walking a model block by block against its own forward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import tiny
import tiny_families
import torch
from torch import nn

from multum.core.blocks import Block, block_calls, each_output, outputs_from, walk_blocks
from multum.core.families import blocks_of, family_of, is_pre_norm
from multum.core.linears import is_linear
from multum.core.surgery import keep_heads
from multum.core.task import Batch

pytestmark = pytest.mark.usefixtures("one_thread")
FAMILIES = pytest.mark.parametrize("name", [*tiny.FAMILIES, *tiny_families.FAMILIES])


def made(name: str = "bert", samples: int = 40) -> tuple[nn.Module, list[Batch]]:
    """A model and batches, two or more of them and some with padding."""
    model = tiny.model(name, layers=3)
    batches = tiny.task().calibration(model, samples)
    assert len(batches) > 1
    assert any((batch["attention_mask"] == 0).any() for batch in batches)
    return model.module, batches


@torch.no_grad()
def states(module: nn.Module, batch: Batch) -> list[torch.Tensor]:
    """The hidden state before every block and after the last one, in one plain forward pass."""
    seen: list[torch.Tensor] = []

    def before(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        seen.append(inputs[0])

    def after(_: nn.Module, __: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    handles: list[Any] = [block.register_forward_pre_hook(before) for block in blocks_of(module)]
    handles.append(blocks_of(module)[-1].register_forward_hook(after))
    module(**batch)
    for handle in handles:
        handle.remove()
    return seen


@torch.no_grad()
def logits(module: Any, batches: Sequence[Batch]) -> torch.Tensor:
    return torch.cat([module(**batch).logits for batch in batches])


@torch.no_grad()
def walked(
    module: nn.Module, batches: Sequence[Batch], visit: Callable[[Block], None] = lambda _: None
) -> list[list[torch.Tensor]]:
    """Per block and batch, what the block receives; at the end what the last one puts out."""
    received: list[list[torch.Tensor]] = []
    for block in walk_blocks(module, batches):
        received.append([args[0] for args, _ in block.calls])
        visit(block)
        out = [block.run(i) for i in range(len(batches))]
    return [*received, out]


@FAMILIES
def test_a_walk_is_the_forward_pass(name: str) -> None:
    module, batches = made(name)
    steps = walked(module, batches)
    assert len(steps) == 4
    for number, batch in enumerate(batches):
        for mine, forward in zip([step[number] for step in steps], states(module, batch), strict=True):
            assert torch.equal(mine, forward)


def test_blocks_come_in_order_with_their_modules() -> None:
    module, batches = made()
    with torch.no_grad():
        seen = [(block.index, block.module) for block in walk_blocks(module, batches)]
    assert [index for index, _ in seen] == [0, 1, 2]
    assert all(part is own for (_, part), own in zip(seen, blocks_of(module), strict=True))


@FAMILIES
def test_a_changed_block_changes_what_the_next_receives(name: str) -> None:
    module, batches = made(name)
    path = family_of(module).down
    before = walked(module, batches)

    def halve(block: Block) -> None:
        if block.index == 1:
            block.module.get_submodule(path).weight.mul_(0.5)

    after = walked(module, batches, halve)
    for number, batch in enumerate(batches):
        assert torch.equal(after[0][number], before[0][number])
        assert torch.equal(after[1][number], before[1][number])
        assert not torch.allclose(after[2][number], before[2][number])
        for mine, forward in zip([step[number] for step in after], states(module, batch), strict=True):
            assert torch.equal(mine, forward)


def test_a_block_may_be_changed_in_shape() -> None:
    module, batches = made()

    def two_heads(block: Block) -> None:
        if block.index == 0:
            keep_heads(block.module, family_of(module), [1, 2], 8)

    after = walked(module, batches, two_heads)
    for number, batch in enumerate(batches):
        assert torch.equal(after[-1][number], states(module, batch)[-1])


@torch.no_grad()
def test_two_walks_stay_apart() -> None:
    module, batches = made()
    other, _ = made()
    path = family_of(module).attention_output
    alone = walked(module, batches)
    for mine, theirs in zip(walk_blocks(module, batches), walk_blocks(other, batches), strict=True):
        assert mine.index == theirs.index
        assert all(torch.equal(args[0], alone[mine.index][i]) for i, (args, _) in enumerate(mine.calls))
        same = [torch.equal(args[0], alone[mine.index][i]) for i, (args, _) in enumerate(theirs.calls)]
        assert all(same) == (mine.index == 0)
        theirs.module.get_submodule(path).weight.neg_()


@FAMILIES
@torch.no_grad()
def test_flows_are_those_of_texts_without_padding(name: str) -> None:
    module, batches = made(name)
    family = family_of(module)
    paths = (family.attention_output, family.down, family.feed_forward_norm)
    batch = next(batch for batch in batches if (batch["attention_mask"] == 0).any())
    lengths = batch["attention_mask"].sum(1).tolist()
    single = [{key: value[i : i + 1, :length] for key, value in batch.items()} for i, length in enumerate(lengths)]
    for together, apart in zip(walk_blocks(module, [batch]), walk_blocks(module, single), strict=True):
        padded = together.flows(0, paths)
        plain = [apart.flows(i, paths) for i in range(len(single))]
        for path in paths:
            assert len(padded[path].input) == sum(lengths)
            torch.testing.assert_close(padded[path].input, torch.cat([one[path].input for one in plain]), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(padded[path].output, torch.cat([one[path].output for one in plain]), rtol=1e-4, atol=1e-5)


@FAMILIES
@torch.no_grad()
def test_flows_go_into_and_out_of_the_part(name: str) -> None:
    module, batches = made(name)
    family = family_of(module)
    for block in walk_blocks(module, batches):
        for path in (family.attention_output, family.down, family.feed_forward_norm):
            flow = block.flows(1, (path,))[path]
            torch.testing.assert_close(block.module.get_submodule(path)(flow.input), flow.output)
        whole = block.flows(1, ("",))[""]
        assert torch.equal(whole.input, block.calls[1][0][0][block.masks[1]])
        assert torch.equal(whole.output, block.run(1)[block.masks[1]])
        # The last norm is the end of the block, unless norms stand before their sublayers.
        assert torch.equal(flow.output, whole.output) != is_pre_norm(module)


@torch.no_grad()
@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "opt", "deberta-v2"])
@pytest.mark.parametrize("shared", [False, True])
def test_sums_are_taken_over_what_flows(name: str, shared: bool) -> None:
    """DeBERTa runs its table of positions through matrices of its own or, where they are shared, again through query and key."""
    if shared and name != "deberta-v2":
        return
    module = tiny_families.language_model(name, vocabulary=400, share_att_key=True) if shared else made(name)[0]
    batches = made("bert")[1]
    block = list(walk_blocks(module, batches))[1]
    paths = [path for path, part in block.module.named_modules() if is_linear(part)]
    found = block.sums(paths, lambda x: x.double().sum(0))
    for path in paths:
        seen: list[torch.Tensor] = []
        handle = block.module.get_submodule(path).register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0]))
        total = torch.zeros(())
        for number, mask in enumerate(block.masks):
            seen.clear()
            block.run(number)
            assert len(seen) == (2 if shared and path.endswith(("query_proj", "key_proj")) else 1)
            for x in seen:
                rows = x.reshape(-1, x.shape[-1])
                total = total + (rows if len(rows) != mask.numel() else rows[mask.flatten()]).double().sum(0)
        handle.remove()
        torch.testing.assert_close(found[path], total)
    first, second = paths[:2] if name != "gpt2" else (paths[0], paths[0])
    assert found[first] is found[second]  # query and key read one tensor


@torch.no_grad()
def test_flows_leave_no_hook_behind() -> None:
    module, batches = made()
    path = family_of(module).down
    block = next(iter(walk_blocks(module, batches)))
    block.flows(0, (path,))
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())


@FAMILIES
@torch.no_grad()
def test_outputs_from_a_block_are_the_whole_forward(name: str) -> None:
    module, batches = made(name)
    whole = logits(module, batches)
    every, last = range(len(batches)), len(batches[-1]["input_ids"])
    assert torch.equal(outputs_from(module, None, batches, every), whole)
    for block in walk_blocks(module, batches):
        assert torch.equal(outputs_from(module, block, batches, every), whole)
        assert torch.equal(outputs_from(module, block, batches, every[-1:]), whole[-last:])


@FAMILIES
@torch.no_grad()
def test_outputs_from_see_a_changed_block_and_leave_the_model_whole(name: str) -> None:
    module, batches = made(name)
    path, blocks, whole = family_of(module).down, list(blocks_of(module)), logits(module, batches)
    for block in walk_blocks(module, batches):
        linear = block.module.get_submodule(path)
        kept = linear.weight.clone()
        linear.weight.zero_()
        changed = outputs_from(module, block, batches, range(len(batches)))
        assert torch.equal(changed, logits(module, batches))
        assert not torch.allclose(changed, whole)
        linear.weight.copy_(kept)
    assert list(blocks_of(module)) == blocks
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())
    assert torch.equal(logits(module, batches), whole)


@torch.no_grad()
def test_outputs_from_leave_out_the_blocks_before() -> None:
    module, batches = made()
    whole = logits(module, batches)
    for block in walk_blocks(module, batches):
        if block.index == 2:
            for part in blocks_of(module)[:2]:
                part.register_forward_hook(lambda *_: pytest.fail("a block before was run"))
            assert torch.equal(outputs_from(module, block, batches, range(len(batches))), whole)


@FAMILIES
def test_calls_are_found_without_running_a_block(name: str) -> None:
    module, batches = made(name)
    before = list(blocks_of(module))
    runs: list[int] = []
    for part in blocks_of(module):
        part.register_forward_hook(lambda *_: runs.append(1))
    calls = block_calls(module, batches)
    assert runs == []
    assert len(calls) == 3
    for each in calls:
        assert [args[0].shape[:2] for args, _ in each] == [batch["input_ids"].shape for batch in batches]
    assert all(part is own for part, own in zip(blocks_of(module), before, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("name", tiny_families.DECODERS)
def test_language_models_answer_for_every_real_token(name: str) -> None:
    module, (_, batches) = tiny_families.language_model(name), made("bert")
    batches = [{**batch, "input_ids": batch["input_ids"] % 50} for batch in batches]
    whole = [module(**batch).logits[batch["attention_mask"].bool()] for batch in batches]
    head, every = module.get_output_embeddings(), range(len(batches))
    for block in (None, *walk_blocks(module, batches)):
        answers = list(each_output(module, block, batches, every))
        states = list(each_output(module, block, batches, every, before=head))
        for mine, state, expected in zip(answers, states, whole, strict=True):
            assert torch.equal(mine, expected)
            torch.testing.assert_close(head(state), expected, rtol=1e-5, atol=1e-5)


class Elsewhere:
    """A tensor that is of no use before it is sent to a device."""

    def __init__(self, value: torch.Tensor, sent: list[torch.device]) -> None:
        self.value, self.sent = value, sent

    def to(self, device: torch.device) -> torch.Tensor:
        self.sent.append(device)
        return self.value.to(device)


@torch.no_grad()
def test_batches_are_sent_to_where_the_model_is() -> None:
    module, batches = made()
    sent: list[torch.device] = []
    elsewhere: Any = [{name: Elsewhere(value, sent) for name, value in batch.items()} for batch in batches]
    for block in walk_blocks(module, elsewhere):
        assert torch.equal(outputs_from(module, block, elsewhere, [0]), outputs_from(module, None, batches, [0]))
    assert set(sent) == {next(module.parameters()).device}
