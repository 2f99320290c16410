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
from transformers import AutoModelForSequenceClassification

from multum.core import shapes
from multum.core.families import blocks_of, family_of
from multum.core.model import Model
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
