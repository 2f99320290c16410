"""What a cut costs, for every kind of output, against the losses of distillation, which have slow references of their own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
)

from multum.core.blocks import walk_blocks
from multum.core.families import blocks_of
from multum.core.model import Model
from multum.steps import _price
from multum.steps._outputs import output_loss
from multum.steps._price import Price
from multum.steps.prune_structured import PruneStructured

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32, "vocab_size": 60}
KINDS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "single_label": (BertForSequenceClassification, {"num_labels": 3, "problem_type": "single_label_classification"}),
    "multi_label": (BertForSequenceClassification, {"num_labels": 3, "problem_type": "multi_label_classification"}),
    "regression": (BertForSequenceClassification, {"num_labels": 1, "problem_type": "regression"}),
    "token_labels": (BertForTokenClassification, {"num_labels": 3}),
    "question_answering": (BertForQuestionAnswering, {}),
}


def model(kind: str) -> Any:
    made, options = KINDS.get(kind, (BertForMaskedLM, {}))
    torch.manual_seed(0)
    module = made(BertConfig(**SIZES, **options)).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() > 1:
                parameter.mul_(10)
    return module


def batches() -> list[dict[str, torch.Tensor]]:
    """Every other one is priced; those differ in length, and the first has padding."""
    made = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 60, (6, 6 + 2 * i), generator=made) for i in range(3)]
    masks = [torch.ones_like(each) for each in ids]
    masks[0][0, 3:] = 0
    return [{"input_ids": each.where(mask == 1, 0), "attention_mask": mask} for each, mask in zip(ids, masks, strict=True)]


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_the_price_is_the_distance_of_the_outputs(kind: str) -> None:
    module, data = model(kind), batches()
    price, block = Price(module, data), list(walk_blocks(module, data))[1]
    assert price(block) == pytest.approx(0.0, abs=1e-6)
    before = [module(**batch) for batch in data[::2]]
    blocks_of(module)[1].output.dense.weight.mul_(0.3)
    after = [module(**batch) for batch in data[::2]]
    found, weights = [], []
    for one, other, batch in zip(before, after, data[::2], strict=True):
        found.append(float(output_loss(kind, other, one, batch, 1.0)))
        weights.append(float(batch["attention_mask"].sum()) if kind == "token_labels" else len(batch["input_ids"]))
    expected = sum(loss * weight for loss, weight in zip(found, weights, strict=True)) / sum(weights)
    assert expected > 1e-3
    assert price(block) == pytest.approx(expected, rel=1e-4)


@torch.no_grad()
def test_of_many_tokens_a_language_models_price_takes_some_evenly_spaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_price, "TOKENS", 7)
    module, data = model("tokens"), batches()
    price, block = Price(module, data), list(walk_blocks(module, data))[1]

    def answers() -> torch.Tensor:  # 33 and 60 real tokens, so that every 14th counts
        logits = [module(**batch).logits.double()[batch["attention_mask"].bool()][::14] for batch in data[::2]]
        return torch.cat(logits).log_softmax(-1)

    before = answers()
    blocks_of(module)[1].output.dense.weight.mul_(0.3)
    after = answers()
    assert len(before) == 3 + 5
    expected = float((before.exp() * (before - after)).sum(-1).mean())
    assert expected > 1e-3
    assert price(block) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "single_label"])
def test_models_of_every_kind_are_pruned(kind: str) -> None:
    task: Any = SimpleNamespace(calibration=lambda *_, **__: batches())
    result = PruneStructured(speedup=1.5, samples=18, neuron_group=4)(Model(module=model(kind), tokenizer=None, source=kind), task)
    before, after = result.history[-1]["predicted"]
    assert after * 1.5 <= before + 1e-6
