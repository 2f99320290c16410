"""Channels of models with norms before their sublayers, without shifts, biases or a table of their own: what the formula becomes
there, tables of positions, models that write, what stock transformers makes of the folders."""

from __future__ import annotations

import json
import subprocess
import sys
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import tiny
import tiny_families
import torch
import transformers
from planted import GONE, KEPT, planted
from torch import nn

from multum.core.channels import channels_of
from multum.core.families import blocks_of, family_of
from multum.core.model import Model
from multum.core.step import make
from multum.core.surgery import head_size, keep_heads
from multum.errors import InputError
from multum.steps.prune_hidden import Moments, PruneHidden, fitted_norms, input_moments, scores, shift_for

pytestmark = pytest.mark.usefixtures("one_thread")
NEW = ("gpt2", "opt", "modernbert", "deberta-v2")


@pytest.fixture(scope="module")
def task() -> Any:
    return tiny.task(n_train=24, n_validation=8)


class Ids:
    """A task with nothing but calibration texts of token ids."""

    def __init__(self, vocabulary: int = 50) -> None:
        self.vocabulary = vocabulary

    def calibration(self, _: Any, samples: int, *, seed: int = 0) -> list[dict[str, torch.Tensor]]:
        ids = torch.randint(3, self.vocabulary, (samples, 12), generator=torch.Generator().manual_seed(seed))
        mask = torch.ones_like(ids)
        mask[::3, 8:] = 0
        return [{"input_ids": ids[:5], "attention_mask": mask[:5]}, {"input_ids": ids[5:], "attention_mask": mask[5:]}]


@torch.no_grad()
def answers(module: Any) -> torch.Tensor:
    (batch, *_) = Ids().calibration(None, 8, seed=1)
    return module(**batch).logits[batch["attention_mask"].bool()]


def writer(family: str, **more: Any) -> Model:
    """A language model with random weights and the tokenizer of its family."""
    module = tiny_families.language_model(family, vocabulary=250 if family in tiny_families.WORDPIECE else 400, **more)
    return Model(module=module, tokenizer=tiny.model(family).tokenizer, source=f"tiny-{family}")


def classifier(family: str, **more: Any) -> Model:
    """`tiny.model` with these values in its config."""
    made = tiny.model(family)
    config = deepcopy(made.module.config)
    for name, value in more.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    module = transformers.AutoModelForSequenceClassification.from_config(config)
    return Model(module=tiny_families.spread(module).eval(), tokenizer=made.tokenizer, source=made.source)


VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True, "n_inner": None}),
    ("gpt2", {"scale_attn_weights": False, "tie_word_embeddings": False}),
    ("opt", {}),
    ("opt", {"word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    ("opt", {"word_embed_proj_dim": 16, "enable_bias": False}),
]


@pytest.mark.parametrize(("family", "more"), VARIANTS)
def test_a_planted_model_writes_the_same_cut_saved_and_loaded(family: str, more: dict[str, Any], tmp_path: Any) -> None:
    model = writer(family, **more)
    planted(model.module, channels_of(model.module, 24))
    made = PruneHidden(keep=0.75, samples=16)(model, Ids())
    assert made.history[-1]["kept_hidden"] == KEPT
    expected = answers(model.module)
    assert torch.allclose(answers(made.module), expected, atol=2e-4 * float(expected.abs().max()))
    assert made.save(tmp_path / "model") is False
    again = Model.load(tmp_path / "model", auto_class="AutoModelForCausalLM")
    assert again.new_weights == ()
    assert torch.equal(answers(again.module), answers(made.module))
    assert head_size(again.module) == 8
    assert again.fingerprint() == made.fingerprint()
    ids = torch.arange(5, 17).reshape(2, 6)
    written = [each.generate(ids, max_new_tokens=12, do_sample=False) for each in (model.module, made.module, again.module)]
    assert torch.equal(written[0], written[1])
    assert torch.equal(written[1], written[2])
    table, head = made.module.get_input_embeddings(), made.module.get_output_embeddings()
    assert (head.weight is table.weight) == more.get("tie_word_embeddings", True)


DEBERTA: list[dict[str, Any]] = [
    {"share_att_key": True},
    {"share_att_key": True, "position_biased_input": True, "norm_rel_ebd": "none", "type_vocab_size": 2},
    {"pos_att_type": ["p2c"], "embedding_size": 16, "attention_head_size": 8},
    {"relative_attention": False, "pos_att_type": []},
]


@pytest.mark.parametrize("more", DEBERTA)
def test_tables_of_relative_positions_are_cut_with_the_stream(more: dict[str, Any], task: Any, tmp_path: Any) -> None:
    model = classifier("deberta-v2", **more)
    where = channels_of(model.module, 24)
    assert ("deberta.encoder.rel_embeddings" in where.tables) == more.get("relative_attention", True)
    own = [name for name in where.readers if "pos_" in name]
    assert len(own) == 2 * (0 if "share_att_key" in more else len(more.get("pos_att_type", "ab")))
    planted(model.module, where)
    made = PruneHidden(keep=0.75, samples=16)(model, task)
    assert made.history[-1]["kept_hidden"] == KEPT
    batch = task.calibration(model, 8)[0]
    with torch.no_grad():
        before, after = (each.module(**batch).logits for each in (model, made))
    assert torch.allclose(after, before, atol=2e-4, rtol=1e-4)
    made.save(tmp_path / "model")
    with torch.no_grad():
        assert torch.equal(Model.load(tmp_path / "model", auto_class=task.auto_class).module(**batch).logits, after)
    assert make("prune_structured", {"speedup": 1.5, "samples": 16, "neuron_group": 4})(made, task).parameters() < made.parameters()


def test_a_head_that_multiplies_with_the_table_itself(tmp_path: Any) -> None:
    """DeBERTa-v3's over the vocabulary (`legacy: false`)."""
    whole = tiny.model("deberta-v2")
    config = deepcopy(whole.module.config)
    config.legacy, config.hidden_act = False, "linear"  # so that the mean is zero behind the activation
    torch.manual_seed(0)
    module = tiny_families.spread(transformers.AutoModelForMaskedLM.from_config(config)).eval()
    planted(module, channels_of(module, 24))
    made = PruneHidden(keep=0.75, samples=16)(Model(module=module, tokenizer=whole.tokenizer, source="tiny"), Ids())
    assert made.history[-1]["kept_hidden"] == KEPT
    expected = answers(module)
    assert torch.allclose(answers(made.module), expected, atol=2e-4 * float(expected.abs().max()))
    made.save(tmp_path / "model")
    assert torch.equal(answers(Model.load(tmp_path / "model", auto_class="AutoModelForMaskedLM").module), answers(made.module))


def test_the_norm_that_the_first_block_lost_is_as_wide_as_the_rest(task: Any, tmp_path: Any) -> None:
    made = PruneHidden(keep=0.75, samples=16)(tiny.model("modernbert", layers=3), task)
    made = make("drop_layers", {"which": (0,)})(made, task)
    made.save(tmp_path / "model")
    assert made.module.config.quantization_config.norms == ["model.layers.0.attn_norm"]
    again, batch = Model.load(tmp_path / "model", auto_class=task.auto_class), task.calibration(made, 8)[0]
    with torch.no_grad():
        assert torch.equal(again.module(**batch).logits, made.module(**batch).logits)
    assert PruneHidden(keep=0.67, samples=16)(again, task).history[-1]["hidden"] == [24, 16]


def test_a_matrix_that_reads_tokens_and_positions_counts_both() -> None:
    model = classifier("deberta-v2", share_att_key=True)
    name, batches, seen = "deberta.encoder.layer.1.attention.self.query_proj", Ids().calibration(model, 8), []
    hook = model.module.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    moments = input_moments(model.module, [name], batches)[name]
    hook.remove()
    masks = [batch["attention_mask"].bool() for batch in batches]
    rows = torch.cat([seen[0][masks[0]], seen[1][0], seen[2][masks[1]], seen[3][0]]).double()
    assert moments.count == len(rows) == int(sum(mask.sum() for mask in masks)) + 2 * 16
    assert torch.allclose(moments.mean, rows.mean(0))
    assert torch.allclose(moments.variance, rows.var(0, unbiased=False))


def test_as_many_positions_as_tokens_are_all_counted() -> None:
    model = classifier("deberta-v2")
    names = ["deberta.encoder.LayerNorm", "deberta.encoder.layer.0.attention.self.pos_key_proj"]
    ids = torch.randint(5, 50, (2, 8), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 3:] = 0
    tokens = "deberta.encoder.layer.0.attention.self.key_proj"
    moments = input_moments(model.module, [*names, tokens], [{"input_ids": ids, "attention_mask": mask}])
    assert {name: each.count for name, each in moments.items()} == {**dict.fromkeys(names, 16), tokens: 11}


def test_choices_are_texts() -> None:
    config = tiny.model("bert").module.config
    module = transformers.AutoModelForMultipleChoice.from_config(config).eval()
    ids = torch.randint(5, 50, (2, 3, 8), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 2, 3:] = 0
    name = "bert.encoder.layer.0.intermediate.dense"
    assert input_moments(module, [name], [{"input_ids": ids, "attention_mask": mask}])[name].count == 2 * 3 * 8 - 5


def test_numbers_that_are_not_finite_are_refused(task: Any) -> None:
    model = tiny.model("gpt2")
    with torch.no_grad():
        model.module.transformer.h[0].mlp.c_proj.weight.mul_(1e38)
    with pytest.raises(InputError, match=r"^prune_hidden: transformer\.h\.1\.attn\.c_attn, or .* not finite"):
        PruneHidden(keep=0.75, samples=16)(model, task)


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_what_was_frozen_is_frozen(family: str, task: Any) -> None:
    model = tiny.model(family)
    for number, parameter in enumerate(model.module.parameters()):
        parameter.requires_grad_(number % 2 == 0)
    cut = PruneHidden(keep=0.75, samples=16)(model, task)
    flags = [{name: each.requires_grad for name, each in one.module.named_parameters()} for one in (model, cut)]
    assert flags[0] == flags[1]


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_the_last_shift_takes_the_mean_of_a_head_without_a_bias(family: str, task: Any) -> None:
    model = tiny.model(family)
    where = channels_of(model.module, 24)
    (last,) = where.shifts.values()
    planted(model.module, where)
    with torch.no_grad():  # what the head reads has the same values for every token
        model.module.get_submodule(last).bias[GONE] = torch.linspace(-0.2, 0.2, 8)
    made = PruneHidden(keep=0.75, samples=16)(model, task)
    assert made.history[-1]["kept_hidden"] == KEPT
    batch = task.calibration(model, 8)[0]
    with torch.no_grad():
        assert torch.allclose(made.module(**batch).logits, model.module(**batch).logits, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("rows", [3, 40])
def test_the_shift_is_the_smallest_of_least_squares(rows: int) -> None:
    torch.manual_seed(0)
    linear, mean, kept = nn.Linear(8, rows, bias=False), torch.randn(8).double(), [0, 2, 3, 5, 7]
    weight, gone = linear.weight.detach().double().numpy(), [1, 4, 6]
    expected = np.linalg.lstsq(weight[:, kept], weight[:, gone] @ mean[gone].numpy(), rcond=None)[0]
    assert np.allclose(shift_for(linear, mean, kept).numpy(), expected, atol=1e-8)


def test_a_matrix_without_a_bias_counts_second_moments() -> None:
    torch.manual_seed(0)
    parts, moments, x = nn.ModuleList([nn.Linear(6, 4), nn.Linear(6, 4, bias=False)]), {}, torch.randn(50, 6).double() + 2.0
    for name in ("0", "1"):
        moments[name] = Moments()
        moments[name].add(x)
    expected = np.zeros(6)
    for part, of in zip(parts, (np.var, lambda y: np.mean(y**2)), strict=True):
        weight = part.weight.detach().double()
        lost = np.asarray([sum(of((x[:, c] * weight[o, c]).numpy()) for o in range(4)) for c in range(6)])
        expected += lost / lost.sum()
    assert np.allclose(scores(parts, moments).numpy(), expected)


def test_a_norm_without_a_shift_is_the_line_through_the_origin() -> None:
    model, batches, seen = tiny.model("modernbert"), Ids().calibration(None, 8), []
    name = channels_of(model.module, 24).norms[-1]
    norm = model.module.get_submodule(name)
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 1.5, 32))
    hook = norm.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    gain, shift = fitted_norms(model.module, [name], KEPT, batches)[name]
    hook.remove()
    assert shift is None
    x = torch.cat([each[batch["attention_mask"].bool()] for each, batch in zip(seen[:2], batches, strict=True)])
    n, y = nn.functional.layer_norm(x[:, KEPT], (24,)).double().numpy(), norm(x)[:, KEPT].detach().double().numpy()
    for channel in range(24):
        assert np.allclose(gain[channel], np.linalg.lstsq(n[:, [channel]], y[:, channel], rcond=None)[0], atol=1e-4)


@pytest.mark.parametrize("family", NEW)
def test_what_is_cut_is_cut_further(family: str, task: Any, tmp_path: Any) -> None:
    made = PruneHidden(keep=0.75, samples=16)(tiny.model(family, layers=3), task)
    made = make("prune_structured", {"speedup": 1.5, "samples": 16, "neuron_group": 4})(made, task)
    made = make("drop_layers", {"which": (1,)})(made, task)
    made = PruneHidden(keep=0.67, samples=16)(made, task)
    assert made.history[-1]["hidden"] == [24, 16]
    made.save(tmp_path / "model")
    again, batch = Model.load(tmp_path / "model", auto_class=task.auto_class), task.calibration(made, 8)[0]
    assert head_size(again.module) == 8
    with torch.no_grad():
        assert torch.equal(again.module(**batch).logits, made.module(**batch).logits)


def test_stock_transformers_loads_the_same_or_refuses(task: Any, tmp_path: Any) -> None:
    """Whose heads fill the new width is a stock model, but for MPNet's table of position biases; if only some do, it is none."""
    expected, refused = {}, []
    for family in (*NEW, "mpnet"):
        made = PruneHidden(keep=0.75, samples=16)(tiny.model(family), task)
        for number, block in enumerate(blocks_of(made.module)):
            keep_heads(block, family_of(made.module), [0, 1 + number, 3], head_size(made.module))
            folder, stock = str(tmp_path / f"{family}-{number}"), number == 1 and family != "mpnet"
            assert made.save(folder) is stock
            refused += [] if stock else [folder]
        batch = task.calibration(made, 4)[0]
        again = Model.load(folder, auto_class=task.auto_class)
        with torch.no_grad():
            logits = made.module(**batch).logits
            assert torch.equal(again.module(**batch).logits, logits)
        if stock:
            expected[folder] = {"batch": {name: value.tolist() for name, value in batch.items()}, "logits": logits.tolist()}
            assert not {"head_dim", "quantization_config"} & set(json.loads((tmp_path / folder / "config.json").read_text()))
    (tmp_path / "folders.json").write_text(json.dumps([expected, refused]))
    code = f"""
import json, sys, torch
from transformers import AutoModelForSequenceClassification as Auto
assert "multum" not in sys.modules
expected, refused = json.load(open({str(tmp_path / "folders.json")!r}))
for folder, each in expected.items():
    batch = {{name: torch.tensor(value) for name, value in each["batch"].items()}}
    with torch.no_grad():
        logits = Auto.from_pretrained(folder).eval()(**batch).logits
    assert torch.allclose(logits, torch.tensor(each["logits"]), atol=1e-6), folder
for folder in refused:
    try:
        Auto.from_pretrained(folder)
    except RuntimeError as error:
        assert "mismatched" in str(error), error
    else:
        raise AssertionError(folder)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def last_stream(module: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """What comes out of the last block."""
    seen: list[Any] = []
    hook = blocks_of(module)[-1].register_forward_hook(lambda _, __, out: seen.append(out))
    module(**batch)
    hook.remove()
    return seen[0][0] if isinstance(seen[0], tuple) else seen[0]


@pytest.mark.parametrize("family", NEW)
def test_reconstruct_brings_the_stream_nearer(family: str, task: Any, tmp_path: Any) -> None:
    tiny.model(family, layers=3).save(tmp_path / "whole")
    whole = Model.load(tmp_path / "whole", auto_class=task.auto_class)
    made = PruneHidden(keep=0.75, samples=24)(whole, task)
    repaired = make("reconstruct", {"teacher": str(tmp_path / "whole"), "samples": 24})(made, task)
    kept, batches = made.history[-1]["kept_hidden"], task.calibration(made, 24, seed=0)

    @torch.no_grad()
    def apart(model: Model) -> float:
        """How far what comes out of the last block is from the whole model's on these channels."""
        found = 0.0
        for batch in batches:
            theirs, ours = (last_stream(each.module, batch)[batch["attention_mask"].bool()] for each in (whole, model))
            found += float((theirs[:, kept] - ours).square().sum())
        return found

    assert apart(repaired) < 0.9 * apart(made)


class Untouched:
    def calibration(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("the step worked before it refused")


@pytest.mark.parametrize(
    ("family", "more", "says"),
    [
        ("deberta-v2", {"conv_kernel_size": 3}, "convolution"),
        ("gpt2", {"add_cross_attention": True}, "a second attention"),
        ("opt", {"layer_norm_elementwise_affine": False}, "no gain"),
        ("opt", {"word_embed_proj_dim": 16}, "16 is the width of this model's embeddings"),
    ],
)
def test_what_it_cannot_cut_is_refused_before_any_work(family: str, more: dict[str, Any], says: str) -> None:
    model = classifier(family, **more)
    with pytest.raises(InputError, match=f"^prune_hidden: .*{says}") as caught:
        PruneHidden(keep=0.5)(model, Untouched())
    assert len(caught.value.problems) == 1
