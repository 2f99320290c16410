"""Encoder-decoders with a head for texts or spans: what their decoder reads, and cuts of their vocabulary and their channels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import tiny
import tiny_encoder_decoders
import torch
import transformers
from planted import KEPT, planted

from multum.core.blocks import walk_blocks
from multum.core.channels import Head, channels_of
from multum.core.families import stacks_of
from multum.core.model import Model
from multum.core.step import make
from multum.steps.prune_hidden import PruneHidden
from multum.tasks.text_classification import TextClassification

pytestmark = pytest.mark.usefixtures("one_thread")
FAMILIES = ("t5", "bart", "mbart")
AUTO = "AutoModelForSequenceClassification"


@pytest.fixture(scope="module")
def task() -> TextClassification:
    return tiny.task(n_train=24, n_validation=8)


def made(family: str, kind: str = "SequenceClassification") -> Model:
    """A model with this head, random weights and BERT's tokenizer."""
    tokenizer = tiny.model("bert").tokenizer
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    config = tiny_encoder_decoders.model(family).config
    more = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.sep_token_id}
    names = dict(enumerate(tiny.CLASSES[2]))
    more |= {"decoder_start_token_id": tokenizer.cls_token_id, "id2label": names}
    more |= {"label2id": {name: number for number, name in names.items()}}
    config = type(config).from_dict(config.to_dict() | more)
    torch.manual_seed(0)
    module = getattr(transformers, f"AutoModelFor{kind}").from_config(config).eval()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
            elif parameter.dim() > 1:
                parameter.mul_(4.0 if family != "t5" else 1.5)
    return Model(module=module, tokenizer=tokenizer, source=f"tiny-{family}")


@torch.no_grad()
def answers(model: Model, task: TextClassification, texts: Sequence[int] = range(8)) -> torch.Tensor:
    (batch, *_) = task.calibration(model, 24)
    return model.module(**{name: value[list(texts)] for name, value in batch.items()}).logits


@torch.no_grad()
@pytest.mark.parametrize("kind", ["SequenceClassification", "QuestionAnswering"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_decoder_reads_the_text_behind_a_token_to_begin_with(family: str, kind: str, task: Any) -> None:
    """The last token that a mask of the decoder's leaves out is padding, and changes nothing before it."""
    model = made(family, kind)
    (batch, *_) = task.calibration(model, 24)
    assert (batch["attention_mask"] == 0).any()
    lengths = batch["attention_mask"].sum(1)
    seen = []
    begin = len(stacks_of(model.module)[0].blocks)
    for block in walk_blocks(model.module, [batch]):
        if block.index >= begin:
            seen.append(block.masks[0])
    start, pad = model.module.config.decoder_start_token_id, model.module.config.pad_token_id
    read = torch.cat([torch.full_like(lengths[:, None], start), batch["input_ids"][:, :-1]], dim=1)
    for mask in seen:
        assert torch.equal(mask[:, 1:], read[:, 1:] != pad)
        assert mask[:, 0].all()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_head_keeps_features_of_its_own(family: str, task: Any, tmp_path: Any) -> None:
    model = made(family)
    where = channels_of(model.module, 24)
    assert where.head == Head("classification_head.dense", "classification_head.out_proj")
    assert not {*where.head[:2]} & {*where.writers}
    planted(model.module, where)
    cut = PruneHidden(keep=0.75, samples=16)(model, task)
    assert cut.history[-1]["kept_hidden"] == KEPT
    assert torch.allclose(answers(cut, task), answers(model, task), atol=2e-4, rtol=1e-3)
    cut.save(tmp_path / "model")
    again = Model.load(tmp_path / "model", auto_class=AUTO)
    assert again.new_weights == ()
    assert torch.equal(answers(again, task), answers(cut, task))


@pytest.mark.parametrize("family", FAMILIES)
def test_its_vocabulary_is_trimmed_and_then_its_channels(family: str, task: Any, tmp_path: Any) -> None:
    """A trimmed table is one part that both stacks hold."""
    model = made(family)
    trimmed = make("trim_vocabulary", {})(model, task)
    before, after = trimmed.history[-1]["vocabulary"]
    assert after < before
    assert torch.equal(answers(trimmed, task), answers(model, task))
    cut = PruneHidden(keep=0.75, samples=16)(trimmed, task)
    assert cut.history[-1]["hidden"] == [32, 24]
    assert torch.equal(answers(cut, task), answers(PruneHidden(keep=0.75, samples=16)(model, task), task))
    cut.save(tmp_path / "model")
    assert torch.equal(answers(Model.load(tmp_path / "model", auto_class=AUTO), task), answers(cut, task))


@pytest.mark.parametrize("step", ["prune_structured", "fisher_masks", "wanda", "drop_layers"])
def test_other_steps_walk_it(step: str, task: Any, tmp_path: Any) -> None:
    fields = {
        "prune_structured": {"speedup": 1.3, "samples": 16, "neuron_group": 4},
        "fisher_masks": {"speedup": 1.5, "samples": 24, "batch_size": 8},
        "wanda": {"sparsity": 0.5, "samples": 16},
        "drop_layers": {"keep": 1, "which": "importance", "samples": 8},
    }
    cut = make(step, fields[step])(made("bart"), task)
    cut.save(tmp_path / "model")
    assert torch.equal(answers(Model.load(tmp_path / "model", auto_class=AUTO), task), answers(cut, task))
