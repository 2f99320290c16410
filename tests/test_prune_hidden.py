"""Channels of the residual stream: those that carry nothing go first, what is cut answers as before where it can."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import numpy as np
import onnxruntime
import pytest
import tiny
import torch
import transformers
from planted import GAIN, GONE, KEPT, is_tied, planted, told
from torch.nn import functional as F

from multum.core.blocks import walk_blocks
from multum.core.channels import TAKEN, channels_of, nearest_width
from multum.core.families import blocks_of, family_of
from multum.core.model import Model
from multum.core.step import make
from multum.core.students import make_student
from multum.core.surgery import head_size, keep_heads
from multum.errors import InputError
from multum.runtimes._encoder import read
from multum.runtimes._encoder_graph import write
from multum.steps.prune_hidden import PruneHidden, compensate, fitted_norms, fluctuation, input_moments

pytestmark = pytest.mark.usefixtures("one_thread")
FAMILIES = ("bert", "distilbert", "roberta", "xlm-roberta", "electra", "mpnet", "gpt2", "opt", "modernbert", "deberta-v2")


@pytest.fixture(scope="module")
def task() -> Any:
    return tiny.task(n_train=24, n_validation=8)


@torch.no_grad()
def answers(module: Any) -> torch.Tensor:
    ids = torch.randint(5, module.config.vocab_size, (3, 11), generator=torch.Generator().manual_seed(0))
    return module(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_channels_that_are_zero_everywhere_go_and_the_answers_stay(family, task):
    model = tiny.model(family)
    where = channels_of(model.module, 24)
    assert (where.head is None) == (family in ("gpt2", "opt"))
    planted(model.module, where)
    made = PruneHidden(keep=0.75, samples=16)(model, task)
    told(made.history[-1])
    assert torch.allclose(answers(made.module), answers(model.module), atol=2e-4, rtol=1e-4)
    gains = [made.module.get_submodule(name).weight for name in where.norms]
    assert all(torch.allclose(gain, torch.full((24,), GAIN * (32 / 24) ** 0.5), rtol=1e-3) for gain in gains)


def test_what_is_constant_goes_into_the_biases(task):
    model = tiny.model("bert")
    where = channels_of(model.module, 24)
    planted(model.module, where)
    with torch.no_grad():  # what the head reads has the same values for every token, large ones
        model.module.get_submodule(where.norms[-1]).bias[GONE] = torch.linspace(-5.0, 5.0, 8)
    made = PruneHidden(keep=0.75, samples=16)(model, task)
    assert made.history[-1]["kept_hidden"] == KEPT
    assert torch.allclose(answers(made.module), answers(model.module), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_to_keep_all_changes_nothing(family, task):
    model = tiny.model(family)
    made = PruneHidden(keep=1.0, samples=8)(model, task)
    assert made.fingerprint() == model.fingerprint()
    assert made.settings() == model.settings()
    assert made.history[-1]["kept_hidden"] == list(range(32))
    nearly = PruneHidden(keep=0.97, samples=8)(model, task).history[-1]
    assert nearly["summary"] == "nothing was removed: the width nearest to 0.97 of 32 is 32"


class Ids:
    """A task with nothing but calibration texts."""

    def calibration(self, model: Model, samples: int, *, seed: int = 0) -> list[dict[str, torch.Tensor]]:
        ids = torch.randint(5, model.module.config.vocab_size, (samples, 12), generator=torch.Generator().manual_seed(seed))
        return [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]


HEADS = {family: ["MaskedLM", "TokenClassification", "QuestionAnswering", ""] for family in FAMILIES if family != "xlm-roberta"}
HEADS |= {"gpt2": ["CausalLM", "TokenClassification", ""], "opt": ["CausalLM", "QuestionAnswering", ""]}


@pytest.mark.parametrize(("family", "kind"), [(family, kind) for family, kinds in HEADS.items() for kind in kinds])
def test_every_head_is_cut_with_the_stream(family, kind, tmp_path):
    whole = tiny.model(family)
    torch.manual_seed(0)
    name = f"AutoModelFor{kind}" if kind else "AutoModel"
    module = getattr(transformers, name).from_config(whole.module.config).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(10.0 if parameter.dim() > 1 else 1.0)
    where = channels_of(module, 24)
    model = Model(module=planted(module, where), tokenizer=whole.tokenizer, source="tiny")
    made = PruneHidden(keep=0.75, samples=16)(model, Ids())
    assert made.history[-1]["kept_hidden"] == KEPT
    assert is_tied(made.module) == is_tied(module) == (kind in ("MaskedLM", "CausalLM"))
    ids = torch.arange(5, 25).reshape(2, 10)
    made.save(tmp_path / "model")
    again = getattr(transformers, name).from_pretrained(tmp_path / "model").eval()
    with torch.no_grad():
        before, after, loaded = (each(input_ids=ids)[0] for each in (module, made.module, again))
    if not kind:
        before = before[..., KEPT]
    # Behind an activation no mean is zero, so that the norm of a head over the vocabulary is met on the average alone.
    assert float((after - before).norm() / before.norm()) < (0.03 if kind == "MaskedLM" else 2e-4)
    assert torch.equal(after, loaded)


def test_the_moments_are_those_of_all_tokens_but_padding(task):
    model = tiny.model("bert")
    reader, (batch,) = channels_of(model.module, 24).readers[1], Ids().calibration(model, 3)
    batch["attention_mask"][1, 7:] = 0
    seen = []
    hook = model.module.get_submodule(reader).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    moments = input_moments(model.module, [reader], [batch, batch])[reader]
    hook.remove()
    rows = seen[0][batch["attention_mask"].bool()].double()
    assert moments.count == 2 * (3 * 12 - 5)
    assert torch.allclose(moments.mean, rows.mean(0))
    assert torch.allclose(moments.variance, rows.var(0, unbiased=False))


def test_the_fluctuation_is_what_the_outputs_lose_with_a_channel():
    made = torch.Generator().manual_seed(0)
    x, weight = torch.randn(50, 6, generator=made).double() + 3.0, torch.randn(4, 6, generator=made).double()
    lost = np.asarray([sum(np.var((x[:, c] * weight[o, c]).numpy()) for o in range(4)) for c in range(6)])
    assert np.allclose(fluctuation(weight, x.var(0, unbiased=False)).numpy(), lost / lost.sum())
    assert fluctuation(weight, torch.zeros(6).double()).tolist() == [0.0] * 6


def test_compensation_keeps_the_mean_of_the_outputs():
    torch.manual_seed(0)
    x, linear = torch.randn(50, 6) + 2.0, torch.nn.Linear(6, 4)
    before, kept = linear(x).mean(0), [0, 2, 5]
    compensate(linear, x.mean(0).double(), kept)
    assert torch.allclose(F.linear(x[:, kept], linear.weight[:, kept], linear.bias).mean(0), before, atol=1e-5)


def test_a_norm_over_fewer_channels_is_the_line_of_least_squares():
    torch.manual_seed(0)
    model = tiny.model("bert")
    name, (batch,), seen = channels_of(model.module, 24).norms[-1], Ids().calibration(model, 4), []
    norm = model.module.get_submodule(name)
    hook = norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    gain, shift = fitted_norms(model.module, [name], KEPT, [batch])[name]
    hook.remove()
    x = seen[0].detach().flatten(0, 1)
    n, y = F.layer_norm(x[:, KEPT], (24,)).double().numpy(), norm(x)[:, KEPT].detach().double().numpy()
    for channel in range(24):
        line = np.polyfit(n[:, channel], y[:, channel], 1)
        assert np.allclose([gain[channel], shift[channel]], line, atol=1e-4)


@pytest.mark.parametrize("family", ["distilbert", "electra", "mpnet"])
def test_what_is_cut_is_cut_further_saved_and_loaded(family, task, tmp_path):
    made = PruneHidden(keep=0.75, samples=16)(tiny.model(family, layers=3), task)
    assert head_size(made.module) == 8
    made = make("prune_structured", {"speedup": 1.5, "samples": 16, "neuron_group": 4})(made, task)
    made = make("drop_layers", {"which": (1,)})(made, task)
    made = PruneHidden(keep=0.33 if family == "electra" else 0.67, samples=16)(made, task)  # 16 is the width of ELECTRA's table
    assert made.history[-1]["hidden"] == [24, 8 if family == "electra" else 16]
    assert head_size(made.module) == 8
    assert made.save(tmp_path / "model") is False
    again = Model.load(tmp_path / "model", auto_class=task.auto_class)
    assert again.new_weights == ()
    assert head_size(again.module) == 8
    assert torch.equal(answers(again.module), answers(made.module))


def test_heads_that_fill_the_width_are_a_stock_model(task, tmp_path):
    made = PruneHidden(keep=0.75, samples=16)(tiny.model("bert"), task)
    for block in blocks_of(made.module):
        keep_heads(block, family_of(made.module), [0, 1, 3], head_size(made.module))
    before = answers(made.module)
    assert made.save(tmp_path / "model") is True
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["num_attention_heads"] == 3
    assert not {"head_dim", "quantization_config"} & set(config)
    again = Model.load(tmp_path / "model", auto_class=task.auto_class)
    assert head_size(again.module) == 8
    assert torch.equal(answers(again.module), before)


def test_without_multum_it_is_refused(task, tmp_path):
    made = PruneHidden(keep=0.75, samples=16)(tiny.model("bert"), task)
    for block in list(blocks_of(made.module))[1:]:  # the shapes of these are those of a stock model of this width
        keep_heads(block, family_of(made.module), [0, 1, 3], head_size(made.module))
    assert made.save(tmp_path / "model") is False
    code = f"from transformers import AutoModel; AutoModel.from_pretrained({str(tmp_path / 'model')!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "mismatched" in done.stderr


def test_a_graph_is_written_of_it_and_answers_the_same(task):
    made = PruneHidden(keep=0.75, samples=16)(tiny.model("electra"), task)
    encoder = read(made.module, max_length=64, pairs=False)
    assert [block.heads for block in encoder.blocks] == [4, 4]
    assert encoder.blocks[0].query.weight.shape == (24, 32)
    graph = write(encoder, precision="fp32")
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    ids = np.random.default_rng(0).integers(5, 100, (2, 9))
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    with torch.no_grad():
        expected = made.module(**{name: torch.tensor(value) for name, value in feeds.items()}).logits.numpy()
    assert np.allclose(session.run(None, feeds)[0], expected, atol=1e-4)


def test_reconstruct_compares_on_the_kept_channels(task, tmp_path):
    whole = tiny.model("bert", layers=3)
    whole.save(tmp_path / "whole")
    whole = Model.load(tmp_path / "whole", auto_class=task.auto_class)
    made = PruneHidden(keep=0.75, samples=24)(whole, task)
    repaired = make("reconstruct", {"teacher": str(tmp_path / "whole"), "samples": 24})(made, task)
    batches, kept = task.calibration(made, 24, seed=0), made.history[-1]["kept_hidden"]

    @torch.no_grad()
    def apart(model: Model) -> float:
        """How far the input of the first block's second norm is from the whole model's on these channels."""
        path = family_of(model.module).feed_forward_norm
        walks = [next(iter(walk_blocks(each.module, batches))) for each in (whole, model)]
        pairs = [[walk.flows(i, (path,))[path].input for walk in walks] for i in range(len(batches))]
        return sum(float((theirs[:, kept] - ours).square().sum()) for theirs, ours in pairs)

    assert apart(repaired) < 0.9 * apart(made)
    other = tiny.model("bert", layers=3, seed=1)
    other.source = "another"
    other.save(tmp_path / "other")
    stranger = make("reconstruct", {"teacher": str(tmp_path / "other"), "samples": 16})
    with pytest.raises(InputError, match="the model that prune_hidden cut"):
        stranger(made, task)


@pytest.mark.parametrize("family", ["bert", "gpt2", "deberta-v2"])
def test_a_student_of_other_sizes_has_heads_of_its_own(family, task):
    made = PruneHidden(keep=0.75, samples=16)(tiny.model(family), task)
    assert made.module.config.head_dim == 8
    student, _ = make_student(made, {"num_hidden_layers": 1}, task)
    assert head_size(student.module) == 6
    assert torch.isfinite(answers(student.module)).all()


class Untouched:
    def calibration(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("the step worked before it refused")


def test_other_families_are_named_before_any_work():
    known = ", ".join(TAKEN)
    with pytest.raises(InputError, match=rf"^prune_hidden: models of type 'llama' cannot be .* it takes {known}") as caught:
        PruneHidden()(tiny.model("llama"), Untouched())
    assert "slice_hidden" in str(caught.value)
    assert len(caught.value.problems) == 1


def test_widths_that_a_config_cannot_state():
    assert nearest_width(tiny.model("bert").module, 0.7) == 24
    assert nearest_width(tiny.model("bert", heads=6, hidden=48).module, 0.6) == 24
    with pytest.raises(InputError, match="multiple of 24"):
        PruneHidden(keep=0.5)(tiny.model("bert", heads=3, hidden=18), Untouched())
    with pytest.raises(InputError, match=r"^prune_hidden: 16 is the width of this model's embeddings"):
        PruneHidden(keep=0.5)(tiny.model("electra"), Untouched())
