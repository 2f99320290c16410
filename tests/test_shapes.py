"""Uneven models through plain `from_pretrained`, and what stock transformers can express by itself."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import tiny_families
import torch
import translators
from transformers import (
    AutoModel,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BartForCausalLM,
    T5EncoderModel,
)

from multum.core import shapes
from multum.core.families import base_of, blocks_of, family_of, stacks_of
from multum.core.model import Model
from multum.core.step import make
from multum.core.surgery import head_size, heads_and_neurons, keep_blocks, keep_heads, keep_neurons

TEXT = ["the wonderful story was gripping", "dull"]


def outputs(module: torch.nn.Module, model: Model) -> torch.Tensor:
    with torch.no_grad():
        return module(**model.tokenizer(TEXT, padding=True, return_tensors="pt")).logits


def config(folder: Path) -> dict[str, object]:
    return dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))


def fewer_neurons(model: Model) -> Model:
    for block in blocks_of(model.module):
        keep_neurons(block, family_of(model.module), range(12))
    return model


def fewer_blocks(model: Model) -> Model:
    keep_blocks(model.module, [0, 2])
    return model


@pytest.mark.parametrize("family", [*tiny.FAMILIES, *tiny_families.FAMILIES])
def test_uneven_models_load_by_plain_from_pretrained(family: str, tmp_path: Path) -> None:
    model = tiny.uneven(tiny.model(family, layers=3))
    model.save(tmp_path / "model")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    assert heads_and_neurons(again) == heads_and_neurons(model.module)
    assert torch.equal(outputs(again, model), outputs(model.module, model))
    again.save_pretrained(tmp_path / "again")
    assert config(tmp_path / "again")["quantization_config"] == config(tmp_path / "model")["quantization_config"]


@torch.no_grad()
@pytest.mark.parametrize("family", [*tiny.FAMILIES, "xlm-roberta", *tiny_families.FAMILIES])
def test_a_cut_model_loads_with_any_head_or_none(family: str, tmp_path: Path) -> None:
    """The parts of a base model are called otherwise where a head stands before them."""
    model = tiny.uneven(tiny.model(family, layers=3))
    inputs = model.tokenizer(TEXT, padding=True, return_tensors="pt")
    expected = base_of(model.module)(**inputs).last_hidden_state
    model.save(tmp_path / "with")
    base = AutoModel.from_pretrained(tmp_path / "with")
    assert torch.equal(base(**inputs).last_hidden_state, expected)
    Model(module=base, tokenizer=model.tokenizer, source="tiny").save(tmp_path / "without")
    for kind in (AutoModel, AutoModelForSequenceClassification):
        again = kind.from_pretrained(tmp_path / "without")
        assert torch.equal(base_of(again)(**inputs).last_hidden_state, expected)


@torch.no_grad()
def test_one_stack_of_a_cut_encoder_decoder_loads_alone(tmp_path: Path) -> None:
    for family, number, kind in (("t5", 0, T5EncoderModel), ("bart", 1, BartForCausalLM)):
        model = translators.translator(family)
        for stack in stacks_of(model.module):
            keep_heads(stack.blocks[0], stack.family, [0, 2], head_size(model.module))
            keep_neurons(stack.blocks[1], stack.family, [])
        model.save(tmp_path / family)
        alone, whole = kind.from_pretrained(tmp_path / family), AutoModelForSeq2SeqLM.from_pretrained(tmp_path / family)
        blocks = [next(s.blocks for s in stacks_of(one) if s.name == stacks_of(whole)[number].name) for one in (alone, whole)]
        left, right = (dict(each.named_parameters()) for each in blocks)
        assert left.keys() == right.keys()
        assert all(torch.equal(left[name], right[name]) for name in left)


def test_without_multum_what_stock_transformers_cannot_build_is_an_error(tmp_path: Path) -> None:
    """It would pass over the entry and give random weights to whole sublayers, factors and integers."""
    whole, task = tiny.model(), tiny.task()
    removed = whole.copy()
    keep_heads(blocks_of(removed.module)[1], family_of(removed.module), [], head_size(removed.module))
    keep_neurons(blocks_of(removed.module)[0], family_of(removed.module), [])
    kinds = {"removed": removed, "factored": make("low_rank", {"samples": 16})(whole, task)}
    kinds |= {step: make(step, {})(whole, task) for step in ("quantize", "quantize_embeddings")}
    for name, model in kinds.items():
        assert model.save(tmp_path / name) is False
        again = Model.load(tmp_path / name, auto_class=task.auto_class)
        assert again.new_weights == ()
        assert again.fingerprint() == model.fingerprint()
    code = f"""
import sys
from transformers import AutoModelForSequenceClassification
for name in {list(kinds)!r}:
    try:
        AutoModelForSequenceClassification.from_pretrained({str(tmp_path)!r} + "/" + name)
    except RuntimeError as error:
        assert "mismatched" in str(error)
    else:
        sys.exit(name)
assert "multum" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_hook_works_in_a_fresh_process_whatever_is_imported_first(tmp_path: Path) -> None:
    tiny.uneven(tiny.model(layers=3)).save(tmp_path / "model")
    use = f"AutoModelForSequenceClassification.from_pretrained({str(tmp_path / 'model')!r})"
    orders = (
        "import multum; from transformers import AutoModelForSequenceClassification",
        "from transformers import AutoModelForSequenceClassification; import multum",
        "import transformers.quantizers.auto; import multum; from transformers import AutoModelForSequenceClassification",
    )
    for order in orders:
        done = subprocess.run([sys.executable, "-c", f"{order}; {use}"], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("cut", [fewer_neurons, fewer_blocks])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_even_models_load_without_multum(family: str, cut: object, tmp_path: Path) -> None:
    model = cut(tiny.model(family, layers=3))  # type: ignore[operator]
    assert shapes.record(model.module) is True
    model.save(tmp_path / "model")
    assert "quantization_config" not in config(tmp_path / "model")
    torch.save(outputs(model.module, model), tmp_path / "expected.pt")
    inputs = {name: value.tolist() for name, value in model.tokenizer(TEXT, padding=True, return_tensors="pt").items()}
    code = f"""
import sys, torch
from transformers import AutoModelForSequenceClassification
module = AutoModelForSequenceClassification.from_pretrained({str(tmp_path / "model")!r})
assert "multum" not in sys.modules
inputs = {{name: torch.tensor(value) for name, value in {inputs!r}.items()}}
with torch.no_grad():
    assert torch.equal(module(**inputs).logits, torch.load({str(tmp_path / "expected.pt")!r}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def fewer_everywhere(model: Model) -> Model:
    for stack in stacks_of(model.module):
        for block in stack.blocks:
            keep_neurons(block, stack.family, range(4, 20))
            if stack.family.free_heads:
                keep_heads(block, stack.family, [1, 3], head_size(model.module))
    return model


def test_steps_whose_result_is_stock_load_without_multum(tmp_path: Path) -> None:
    """One process for all: depth, width and neurons, of encoder-decoders and causal models."""
    text, both = tiny.task(), translators.translating(16, 8)
    drop, slice_ = make("drop_layers", {"which": (1,)}), make("slice_hidden", {"keep": 0.5, "samples": 16})
    made = {f"drop-{family}": drop(tiny.model(family, layers=3), text) for family in ("gpt2", "opt", "qwen2", "deberta-v2")}
    made |= {f"drop-{family}": drop(translators.translator(family), both) for family in ("t5", "mbart")}
    made |= {f"slice-{family}": slice_(tiny.model(family), text) for family in ("gemma", "phi3")}
    made |= {f"fewer-{family}": fewer_everywhere(translators.translator(family)) for family in ("t5", "marian")}
    made |= {f"fewer-{family}": fewer_everywhere(tiny.model(family)) for family in ("qwen3", "mistral", "mpnet", "modernbert")}
    asked = {"input_ids": [[5, 6, 7, 8, 9]], "attention_mask": [[1, 1, 1, 1, 1]]}
    kinds = {}
    for name, model in made.items():
        task = both if model.module.config.is_encoder_decoder else text
        inputs = {key: torch.tensor(value) for key, value in asked.items()}
        more = {"decoder_input_ids": inputs["input_ids"]} if task is both else {}
        with torch.no_grad():
            torch.save(model.module(**inputs, **more).logits, tmp_path / f"{name}.pt")
        assert model.save(tmp_path / name) is True
        assert json.loads((tmp_path / name / "recipe.json").read_text())["loads_without_multum"] is True
        kinds[name] = task.auto_class
    code = f"""
import sys, torch, transformers
for name, kind in {kinds!r}.items():
    module = getattr(transformers, kind).from_pretrained({str(tmp_path)!r} + "/" + name)
    inputs = {{key: torch.tensor(value) for key, value in {asked!r}.items()}}
    more = {{"decoder_input_ids": inputs["input_ids"]}} if "Seq2Seq" in kind else {{}}
    with torch.no_grad():
        found, expected = module(**inputs, **more).logits, torch.load({str(tmp_path)!r} + f"/{{name}}.pt")
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5), name  # where weights lie in memory decides how sums are rounded
assert "multum" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_model_is_an_ordinary_one_once_it_is_loaded(tmp_path: Path) -> None:
    tiny.uneven(tiny.model(layers=3)).save(tmp_path / "model")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    assert not getattr(again, "is_quantized", False)
    assert not hasattr(again, "hf_quantizer")
    assert again.half().dtype == torch.float16
    assert again.float().to("cpu").train()(input_ids=torch.tensor([[2, 9, 3]]), labels=torch.tensor([1])).loss.requires_grad


def test_shapes_of_layers_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ValueError, match=r"does not have: encoder\.nothing"):
        shapes.apply_shapes(tiny.model().module, {"encoder.nothing": (3, 4)})


def test_a_model_that_is_even_again_loses_its_entry() -> None:
    model = tiny.model(layers=2)
    family, blocks = family_of(model.module), blocks_of(model.module)
    keep_neurons(blocks[0], family, range(12))
    assert shapes.record(model.module) is False
    keep_neurons(blocks[1], family, range(12))
    assert shapes.record(model.module) is True
    assert not hasattr(model.module.config, "quantization_config")


def test_only_layers_of_other_shapes_are_written_down() -> None:
    model = tiny.model(layers=2)
    keep_heads(blocks_of(model.module)[1], family_of(model.module), [0], head_size(model.module))
    shapes.record(model.module)
    block = "bert.encoder.layer.1.attention"
    assert model.module.config.quantization_config.to_dict()["shapes"] == {
        **{f"{block}.self.{name}": [8, 32] for name in ("query", "key", "value")},
        f"{block}.output.dense": [32, 8],
    }
