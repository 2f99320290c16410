"""What surgery promises, on every architecture beside the first four: equal to zeroed weights, and the same model once reloaded."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import tiny
import tiny_families
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from multum.core import shapes
from multum.core.blocks import walk_blocks
from multum.core.families import base_of, blocks_of, family_of
from multum.core.gates import gated, open_gates
from multum.core.latency import LatencyTable
from multum.core.linears import is_linear, matrix
from multum.core.model import Model
from multum.core.profile import profile
from multum.core.surgery import (
    head_size,
    head_width,
    heads_and_neurons,
    keep_blocks,
    keep_heads,
    keep_neurons,
    queries_per_head,
)
from multum.errors import InputError
from multum.runtimes import _encoder
from multum.steps._price import Price
from multum.steps._repair import repair
from multum.steps._units import mac_table
from multum.steps.fisher_masks import FisherMasks
from multum.steps.prune_structured import PruneStructured

pytestmark = pytest.mark.usefixtures("one_thread")
every_family = pytest.mark.parametrize("name", tiny_families.FAMILIES)
every_decoder = pytest.mark.parametrize("name", tiny_families.DECODERS)
IDS = torch.tensor([[0, 7, 21, 9, 30, 12, 44, 8, 5], [0, 19, 4, 33, 2, 1, 1, 1, 1]])
BATCH = {"input_ids": IDS, "attention_mask": (IDS != 1).long()}


def whole(name: str, **sizes: Any) -> Any:
    return tiny_families.language_model(name, **sizes)


@torch.no_grad()
def logits(module: Any) -> torch.Tensor:
    """Of every real token."""
    return module(**BATCH).logits[BATCH["attention_mask"].bool()]


def cut(module: Any, block: int, heads: Sequence[int] | None = None, neurons: Sequence[int] | None = None) -> None:
    part, family = blocks_of(module)[block], family_of(module)
    if heads is not None:
        keep_heads(part, family, heads, head_size(module))
    if neurons is not None:
        keep_neurons(part, family, neurons)


def uneven(name: str, **sizes: Any) -> Any:
    """Other heads and neurons in every block, an attention and a feed-forward gone."""
    module = whole(name, **sizes)
    cut(module, 0, [3, 1], range(3, 23))
    cut(module, 1, [])
    cut(module, 2, [0, 2, 3], [])
    return module


@torch.no_grad()
def zeroed(module: Any, block: int, path: str, kept: Sequence[int], width: int) -> Any:
    """The slow way: what is not kept has zeros in the matrix that reads it."""
    result = copy.deepcopy(module)
    weight = matrix(blocks_of(result)[block].get_submodule(path))
    features = {unit * width + i for unit in kept for i in range(width)}
    weight[:, [i for i in range(weight.shape[1]) if i not in features]] = 0
    return result


def saved_and_loaded(module: Any, folder: Path) -> Any:
    shapes.record(module)
    module.save_pretrained(folder)
    return type(module).from_pretrained(folder).eval()


@every_family
@pytest.mark.parametrize("kept", [[0, 3], [2], []])
def test_removed_heads_equal_zeroed_heads(name: str, kept: list[int]) -> None:
    module = whole(name)
    slow = zeroed(module, 1, family_of(module).attention_output, kept, head_width(module))
    before = logits(module)
    cut(module, 1, heads=kept)
    assert heads_and_neurons(module) == [(4, 32), (len(kept), 32), (4, 32)]
    torch.testing.assert_close(logits(module), logits(slow), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits(module), before, atol=1e-2)


@every_family
@pytest.mark.parametrize("kept", [[1, 5, 30], []])
def test_removed_neurons_equal_zeroed_neurons(name: str, kept: list[int]) -> None:
    module = whole(name)
    slow = zeroed(module, 1, family_of(module).down, kept, 1)
    cut(module, 1, neurons=kept)
    assert heads_and_neurons(module) == [(4, 32), (4, len(kept)), (4, 32)]
    torch.testing.assert_close(logits(module), logits(slow), rtol=1e-5, atol=1e-5)


@every_family
def test_a_gate_at_zero_is_a_unit_removed_and_one_at_one_changes_no_bit(name: str) -> None:
    module, removed = whole(name), whole(name)
    heads, neurons = ([gate.detach() for gate in gates] for gates in open_gates(module))
    with torch.no_grad(), gated(module, heads, neurons):
        found = logits(module)
    assert torch.equal(found, logits(module))
    heads[0][[1, 3]], neurons[0][:5], heads[2][:] = 0.0, 0.0, 0.0
    cut(removed, 0, [0, 2], range(5, 32))
    cut(removed, 2, [])
    with torch.no_grad(), gated(module, heads, neurons):
        torch.testing.assert_close(logits(module), logits(removed), rtol=1e-5, atol=1e-5)


@every_family
def test_heads_removed_one_after_the_other_are_those_removed_at_once(name: str) -> None:
    slowly, at_once = whole(name), whole(name)
    cut(slowly, 0, [0, 2, 3])
    slowly = copy.deepcopy(slowly)
    cut(slowly, 0, [2, 1])  # numbered among those left: 3 and 2
    cut(at_once, 0, [3, 2])
    assert torch.equal(logits(slowly), logits(at_once))


@every_family
def test_the_row_names_every_linear_layer_of_a_block(name: str) -> None:
    module = whole(name)
    family = family_of(module)
    paths = [family.query, family.key, family.value, family.attention_output, family.gate, family.up, family.down]
    paths += family.head_matrices
    for block in blocks_of(module):
        assert {part for part in block.modules() if is_linear(part)} == {block.get_submodule(path) for path in paths if path}
        for path in (family.attention_norm, family.feed_forward_norm):
            assert "norm" in type(block.get_submodule(path)).__name__.lower() or path == "attn_norm"


@every_family
def test_an_uneven_model_is_the_same_once_it_is_loaded(name: str, tmp_path: Path) -> None:
    module = uneven(name)
    again = saved_and_loaded(module, tmp_path)
    assert heads_and_neurons(again) == heads_and_neurons(module) == [(2, 20), (0, 32), (3, 0)]
    assert torch.equal(logits(again), logits(module))
    assert module.config.tie_word_embeddings == (again.get_output_embeddings().weight is again.get_input_embeddings().weight)
    again.save_pretrained(tmp_path / "again")
    configs = [json.loads((folder / "config.json").read_text()) for folder in (tmp_path, tmp_path / "again")]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]
    cut(again, 0, [1], range(5))  # and it can be cut further
    cut(module, 0, [1], range(5))
    assert torch.equal(logits(again), logits(module))


@every_decoder
def test_a_cache_of_keys_and_values_changes_nothing(name: str, tmp_path: Path) -> None:
    module = uneven(name)
    again = saved_and_loaded(module, tmp_path)
    asked: dict[str, Any] = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "output_logits": True}
    asked |= {"input_ids": IDS[:, :4], "attention_mask": torch.ones(2, 4).long(), "return_dict_in_generate": True}
    cached, plain, loaded = (each.generate(**asked, use_cache=on) for each, on in ((module, True), (module, False), (again, True)))
    assert cached.sequences.tolist() == plain.sequences.tolist() == loaded.sequences.tolist()
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(plain.logits), rtol=1e-4, atol=1e-4)


@every_family
@pytest.mark.parametrize("kept", [[0, 3], [1, 2]])
def test_dropped_blocks(name: str, kept: list[int], tmp_path: Path) -> None:
    module, slow = whole(name, layers=4), whole(name, layers=4)
    for index in set(range(4)) - set(kept):  # the slow way: a block that returns what it is given
        tuples = family_of(slow).tuples
        blocks_of(slow)[index].forward = lambda hidden, *_, tuples=tuples, **__: (hidden, None) if tuples else hidden
    types = getattr(module.config, "layer_types", None)
    keep_blocks(module, kept)
    assert torch.equal(logits(module), logits(slow))
    assert module.config.num_hidden_layers == 2
    assert types is None or module.config.layer_types == [types[i] for i in kept]
    again = saved_and_loaded(module, tmp_path)
    assert torch.equal(logits(again), logits(module))
    # ModernBERT's stock first block has no norm before its attention.
    assert hasattr(module.config, "quantization_config") == (name == "modernbert" and 0 not in kept)
    if name in tiny_families.DECODERS:
        out = [module.generate(IDS[:1, :4], max_new_tokens=4, do_sample=False, use_cache=on) for on in (True, False)]
        assert torch.equal(*out)


def test_emptied_blocks_stay_where_the_others_depend_on_their_place(tmp_path: Path) -> None:
    module = whole("gpt2", scale_attn_by_inverse_layer_idx=True)
    family, middle = family_of(module), blocks_of(module)[1]
    with torch.no_grad():  # nothing is lost without it
        for path in (family.attention_output, family.down):
            matrix(middle.get_submodule(path)).zero_()
    task: Any = SimpleNamespace(calibration=lambda *_, **__: batches())
    table = mac_table(module, batches())
    speedup = 1.02 * table.total([(4, 32)] * 3) / table.total([(4, 32), (0, 0), (4, 32)])  # all of it, and a little of the others
    step = PruneStructured(speedup=speedup, samples=24, neuron_group=4)
    result = step(Model(module=module, tokenizer=None, source="gpt2"), task)
    assert heads_and_neurons(result.module)[1] == (0, 0)
    assert result.history[-1]["kept_blocks"] == [0, 1, 2]
    assert torch.equal(logits(saved_and_loaded(result.module, tmp_path)), logits(result.module))


def test_blocks_that_depend_on_their_place_are_not_moved() -> None:
    module = whole("modernbert")
    with pytest.raises(InputError, match="can only stand first"):
        keep_blocks(module, [1, 0])
    module = whole("gpt2", scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(InputError, match="only its last blocks can go"):
        keep_blocks(module, [0, 2])
    keep_blocks(module, [0, 1])
    assert len(blocks_of(module)) == 2


def fewer_neurons(module: Any) -> None:
    for block in range(3):
        cut(module, block, neurons=range(4, 16))


def fewer_of_both(module: Any) -> None:
    for block in range(3):
        cut(module, block, [block, 3], range(4, 16))


@every_family
@pytest.mark.parametrize("change", [fewer_neurons, fewer_of_both])
def test_even_models_are_stock_where_a_config_can_say_so(name: str, change: Callable[[Any], None], tmp_path: Path) -> None:
    module = whole(name)
    change(module)
    again = saved_and_loaded(module, tmp_path)
    stock = change is fewer_neurons or name in tiny_families.GROUPED
    assert shapes.record(module) is stock
    assert ("quantization_config" in json.loads((tmp_path / "config.json").read_text())) is not stock
    assert torch.equal(logits(again), logits(module))
    assert heads_and_neurons(again) == heads_and_neurons(module)
    cut(again, 0, [1])  # what the config says now is where the next cut begins
    cut(module, 0, [1])
    assert torch.equal(logits(again), logits(module))
    assert torch.equal(logits(saved_and_loaded(again, tmp_path / "again")), logits(again))


def test_heads_that_do_not_divide_llamas_width_stay_with_multum() -> None:
    module = whole("llama")
    for block in range(3):
        cut(module, block, [0, 1, 3])
    assert shapes.record(module) is False
    assert module.config.num_attention_heads == 8
    other = whole("qwen3")
    for block in range(3):
        cut(other, block, [0, 1, 3])
    assert shapes.record(other) is True
    assert (other.config.num_attention_heads, other.config.num_key_value_heads, other.config.head_dim) == (6, 3, 8)


@pytest.mark.parametrize(("name", "change"), [("phi3", fewer_of_both), ("gpt2", fewer_neurons)])
def test_an_even_model_loads_without_multum(name: str, change: Callable[[Any], None], tmp_path: Path) -> None:
    module = whole(name)
    change(module)
    saved_and_loaded(module, tmp_path)
    torch.save(logits(module), tmp_path / "expected.pt")
    code = f"""
import sys, torch
from transformers import AutoModelForCausalLM
module = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})
assert "multum" not in sys.modules
mask = torch.tensor({BATCH["attention_mask"].tolist()})
with torch.no_grad():
    logits = module(input_ids=torch.tensor({IDS.tolist()}), attention_mask=mask).logits[mask.bool()]
assert torch.equal(logits, torch.load({str(tmp_path / "expected.pt")!r}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# --- what is counted


@every_family
@pytest.mark.parametrize("made", [whole, uneven])
def test_macs_agree_with_torchs_own_counter(name: str, made: Callable[[str], Any]) -> None:
    module = made(name).requires_grad_(False)
    if name not in ("mpnet", "deberta-v2"):  # these have one attention
        module.set_attn_implementation("eager")
    macs = profile(module)["macs"]
    gone = sum(heads == 0 for heads, _ in heads_and_neurons(module)) * head_width(module)
    for n in (5, 17):
        ids = torch.ones(1, n, dtype=torch.long)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            module(input_ids=ids, attention_mask=ids)
        # torch, unlike an exported graph, runs one head's scores and products through an attention that has none left.
        idle = gone * (2 * n**2 + (2 * 16 * n if name == "deberta-v2" else 0))
        assert counter.get_total_flops() == 2 * (
            macs["per_token"] * n + macs["per_token_squared"] * n**2 + macs["per_example"] + idle
        )


@pytest.mark.parametrize("name", ["llama", "gemma", "phi3", "gpt2", "opt"])
def test_the_table_without_measurements_counts_what_the_profile_does(name: str) -> None:
    module = uneven(name)
    task = SimpleNamespace(calibration=lambda *_, **__: [{"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}])
    table = mac_table(whole(name), task.calibration())
    macs, n = profile(module)["macs"], IDS.shape[1]
    assert table.total(heads_and_neurons(module)) == macs["per_token"] * n + macs["per_token_squared"] * n**2
    assert isinstance(table, LatencyTable)


# --- pruning and repair


def batches(count: int = 4) -> list[dict[str, torch.Tensor]]:
    """Texts of different lengths, some padded."""
    made = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 50, (6, 6 + 2 * i), generator=made) for i in range(count)]
    masks = [torch.ones_like(each) for each in ids]
    masks[1][0, 3:] = 0
    return [{"input_ids": each.where(mask == 1, 1), "attention_mask": mask} for each, mask in zip(ids, masks, strict=True)]


@torch.no_grad()
@every_decoder
def test_the_price_of_a_language_model_is_the_divergence_of_every_real_token(name: str) -> None:
    module, data = whole(name), batches()
    price, block = Price(module, data), list(walk_blocks(module, data))[1]
    assert price(block) == pytest.approx(0.0, abs=1e-6)

    def answers(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return F.log_softmax(module(**batch).logits.double(), -1)[batch["attention_mask"].bool()]

    before = torch.cat([answers(batch) for batch in data[::2]])
    matrix(block.module.get_submodule(family_of(module).down)).mul_(0.3)
    after = torch.cat([answers(batch) for batch in data[::2]])
    expected = float((before.exp() * (before - after)).sum(-1).mean())
    assert expected > 1e-3
    assert price(block) == pytest.approx(expected, rel=1e-4)


@every_decoder
def test_a_language_model_is_pruned(name: str, tmp_path: Path) -> None:
    model = Model(module=whole(name), tokenizer=None, source=name)
    task: Any = SimpleNamespace(calibration=lambda *_, **__: batches())
    step = PruneStructured(speedup=1.5, samples=24, neuron_group=4)
    result = step(model, task)
    entry = result.history[-1]
    assert entry["predicted"][1] * 1.5 <= entry["predicted"][0] + 1e-6
    assert entry["blocks"][1] == heads_and_neurons(result.module) != entry["blocks"][0]
    again = saved_and_loaded(result.module, tmp_path)
    assert torch.equal(logits(again), logits(result.module))
    mended, plain = (
        divergence(model.module, each.module)
        for each in (result, PruneStructured(speedup=1.5, samples=24, neuron_group=4, repair=False)(model, task))
    )
    assert mended < plain


@torch.no_grad()
def divergence(one: Any, other: Any) -> float:
    pairs = [[each(**batch).logits[batch["attention_mask"].bool()].double() for each in (one, other)] for batch in batches()]
    p, q = (F.log_softmax(torch.cat(side), -1) for side in zip(*pairs, strict=True))
    return float((p.exp() * (p - q)).sum(-1).mean())


@torch.no_grad()
def stream(module: nn.Module, path: str) -> tuple[torch.Tensor, torch.Tensor]:
    """What flows into a part of the base model, and the residual stream after it: what the next norm reads."""
    family, seen = family_of(module), []
    base = base_of(module)
    block = path.removesuffix(f".{family.attention_output}")
    handles = [
        base.get_submodule(name).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        for name in (path, f"{block}.{family.feed_forward_norm}")
    ]
    found = []
    for batch in batches():
        seen.clear()
        module(**batch)
        mask = batch["attention_mask"].flatten().bool()
        found.append([each.reshape(len(mask), -1)[mask] for each in seen])
    for handle in handles:
        handle.remove()
    return tuple(torch.cat(side).double() for side in zip(*found, strict=True))  # type: ignore[return-value]


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "opt", "modernbert"])
def test_the_first_repair_is_a_ridge_regression_to_the_residual_stream(name: str) -> None:
    module, reference = whole(name), whole(name)
    cut(module, 0, heads=[1, 2])
    path = f"{family_of(module).blocks}.0.{family_of(module).attention_output}"
    (c, ours), (_, wanted) = stream(module, path), stream(reference, path)
    linear = base_of(module).get_submodule(path)
    x, r = c.numpy(), (wanted - ours).numpy()
    offset, shift = (x.mean(0), r.mean(0)) if linear.bias is not None else (0.0, 0.0)
    s = (x - offset).T @ (x - offset)
    slope = np.linalg.solve(s + 0.01 * np.diag(s).mean() * np.eye(len(s)), (x - offset).T @ (r - shift)).T
    expected = matrix(linear).double().numpy() + slope
    repair(reference, module, batches(), [0, 1, 2])
    np.testing.assert_allclose(matrix(base_of(module).get_submodule(path)).numpy(), expected, rtol=1e-3, atol=1e-4)
    assert (linear.bias is None) == (name in ("llama", "qwen2", "modernbert"))


@torch.no_grad()
@every_family
def test_repair_brings_a_cut_model_nearer_and_leaves_a_whole_one(name: str) -> None:
    reference, module, same = whole(name), whole(name), whole(name)
    cut(module, 0, [0, 1, 3], range(20))
    cut(module, 1, [1, 2], range(10, 32))
    mended = copy.deepcopy(module)
    repair(reference, mended, batches(), [0, 1, 2])
    assert divergence(reference, mended) < divergence(reference, module)
    repair(reference, same, batches(), [0, 1, 2])
    assert torch.equal(logits(same), logits(reference))


# --- what is refused


@every_family
def test_graphs_are_refused_in_one_sentence(name: str) -> None:
    with pytest.raises(InputError, match=rf"'{name}' cannot be exported.*it takes bert, distilbert, electra.*pytorch") as caught:
        _encoder.read(tiny.model(name).module, max_length=16, pairs=False)
    assert len(caught.value.problems) == 1


def test_a_convolution_between_blocks_is_refused() -> None:
    module = whole("deberta-v2", conv_kernel_size=3)
    with pytest.raises(InputError, match="a convolution"):
        next(walk_blocks(module, batches()))
    for step in (PruneStructured(), FisherMasks()):
        with pytest.raises(InputError, match="a convolution"):
            step(Model(module=module, tokenizer=None, source="tiny"), cast(Any, None))  # no data is asked for


@every_family
def test_queries_per_head(name: str) -> None:
    module = whole(name)
    assert queries_per_head(module) == (2 if name in tiny_families.GROUPED else 1)
    assert head_width(module) == queries_per_head(module) * 8
