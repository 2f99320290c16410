"""`multum doctor MODEL`: for every kind of obstacle, what cannot work, why, and the nearest thing that does."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import taggers
import tiny
import torch
import translators
from transformers import BertConfig, BertModel, ConvBertConfig, ConvBertForSequenceClassification
from typer.testing import CliRunner

from multum import doctor, runtimes, terminal
from multum._model_checkup import BYTES_TO_TRAIN, _of_the_model, check_up
from multum.cli import app
from multum.core.model import Model
from multum.core.step import make
from multum.runtimes import _traced

FEATURES = dict.fromkeys(doctor.FLAGS, True)


def facts(free_mb: int = 8000, features: dict[str, bool] = FEATURES, missing: tuple[str, ...] = ()) -> dict[str, Any]:
    """What `examine` says of a machine."""
    there = {
        name: {"available": name not in missing, "reason": f"{name} not installed", "install": f"pip install 'multum[{name}]'"}
        for name in runtimes.names()
    }
    return {"memory": {"available_mb": free_mb}, "processor": {"features": features}, "runtimes": there}


def look(model: Any, folder: Path, **options: Any) -> dict[str, Any]:
    model.save(folder)
    found = check_up(str(folder), facts(**options))
    assert json.loads(json.dumps(found)) == found
    return found


def told(found: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """What -> why, instead; each is said once and whole."""
    limits = {limit["what"]: (limit["why"], limit["instead"]) for limit in found["limits"]}
    assert len(limits) == len(found["limits"])
    assert all(all(limit.values()) for limit in found["limits"])
    return limits


def test_nothing_stands_in_the_way_of_a_plain_classifier(tmp_path: Path, capsys: Any) -> None:
    found = look(tiny.model(), tmp_path / "model")
    assert told(found) == {}
    assert set(found["works"]) >= {"onnxruntime fp32", "onnxruntime int8", "openvino fp32", "openvino int8"}
    assert not any(one.startswith(("llamacpp", "pytorch")) for one in found["works"])
    terminal.print_model(found)
    shown = capsys.readouterr().out
    assert "Nothing stands in its way" in shown
    assert "BertForSequenceClassification" in shown


def test_the_command_shows_and_prints_it(tmp_path: Path) -> None:
    tiny.language_model("bert").save(tmp_path / "model")
    shown = CliRunner().invoke(app, ["doctor", str(tmp_path / "model")])
    assert shown.exit_code == 0, shown.output
    assert "What cannot work" in shown.stdout
    assert "    instead: " in shown.stdout
    printed = CliRunner().invoke(app, ["doctor", str(tmp_path / "model"), "--json"])
    assert json.loads(printed.stdout)["model"]["limits"]
    wrong = CliRunner().invoke(app, ["doctor", str(tmp_path / "nothing" / "here")])
    assert wrong.exit_code == 2
    assert "no such folder" in wrong.stderr


def test_a_model_without_a_head_is_told_how_it_gets_one(tmp_path: Path) -> None:
    model = tiny.model()
    torch.manual_seed(0)
    bare = BertModel(BertConfig(**{**model.module.config.to_dict(), "architectures": None}))
    found = look(Model(module=bare, tokenizer=model.tokenizer, source="bare"), tmp_path / "model")
    why, instead = told(found)["predict, measure and export as it is"]
    assert "BertModel, whose answers no task can tell" in why
    assert "finetune" in instead
    assert found["works"] == []


def test_packed_weights(tmp_path: Path) -> None:
    packed = make("quantize", {"bits": 8})(tiny.model(), tiny.task())
    why, instead = told(look(packed, tmp_path / "model"))["cutting or training it"]
    assert "already quantized" in why
    assert "tiny-bert" in instead


def test_an_unknown_architecture(tmp_path: Path) -> None:
    model = tiny.model()
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    config = ConvBertConfig(**{name: getattr(model.module.config, name) for name in names}, embedding_size=16)
    torch.manual_seed(0)
    module = ConvBertForSequenceClassification(config).eval()
    found = look(Model(module=module, tokenizer=model.tokenizer, source="conv"), tmp_path / "model")
    limits = told(found)
    why, instead = limits["steps that change its structure (prune_structured, drop_layers, ...)"]
    assert "'convbert' cannot be changed in structure" in why
    assert "--student" in instead
    assert "traced instead" in limits["export to onnxruntime as a graph of fused operators"][1]
    assert "onnxruntime int8" in found["works"]


def test_without_a_fast_tokenizer_what_writes_can_be_shrunk_in_torch() -> None:
    reads, both = "exports, shrink and trim_vocabulary", "exports and trim_vocabulary"
    for model, what in ((tiny.model(), reads), (translators.translator("marian"), both)):
        slow = dataclasses.replace(model, tokenizer=SimpleNamespace(is_fast=False))
        assert what in [limit.what for limit in _of_the_model(slow)]


def test_traced_models_without_the_exporter(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(_traced, "find_spec", lambda name: None)
    found = look(tiny.model("mpnet"), tmp_path / "model")
    assert "pip install 'multum[export]'" in told(found)["export to onnxruntime"][1]
    assert not any(one.startswith("onnxruntime") for one in found["works"])


def test_runtimes_that_are_not_installed(tmp_path: Path) -> None:
    found = look(taggers.tagger("bert"), tmp_path / "model", missing=("openvino", "llamacpp"))
    assert told(found)["export to openvino"] == ("openvino not installed", "pip install 'multum[openvino]'")
    assert "export to llamacpp" not in told(found), "no export of a tagger, whatever is installed"


@pytest.mark.parametrize(("family", "kind"), [("bert", "BertForMaskedLM"), ("llama", None)])
def test_language_models(family: str, kind: str | None, tmp_path: Path) -> None:
    found = look(tiny.language_model(family), tmp_path / "model")
    if kind:
        assert kind in told(found)["shrink"][0]
        assert "openvino fp32" in found["works"]
        assert "traced" in told(found)["export to onnxruntime as a graph of fused operators"][1]
    else:
        assert any(one.startswith("llamacpp") for one in found["works"]) or "export to llamacpp" in told(found)


def test_an_encoder_decoder_is_exported_unless_only_torch_knows_how_it_searches(tmp_path: Path) -> None:
    model = translators.translator()
    found = look(model, tmp_path / "model")
    assert {"onnxruntime int8", "openvino bf16"} <= set(found["works"])
    assert not any(name.startswith("export") for name in told(found))
    model.module.generation_config.suppress_tokens = [4]
    why, instead = told(look(model, tmp_path / "other"))["export to onnxruntime"]
    assert "suppress_tokens, which only torch knows" in why
    assert "torch" in instead


def test_an_activation_that_llama_cpp_does_not_compute(tmp_path: Path) -> None:
    model = tiny.language_model("llama")
    model.module.config.hidden_act = "relu"
    why, instead = told(look(model, tmp_path / "model"))["export to llamacpp"]
    assert "relu" in why
    assert "torch" in instead


def test_memory_that_is_too_small(tmp_path: Path) -> None:
    model = tiny.model(hidden=128, neurons=512)
    need = BYTES_TO_TRAIN * model.parameters() / 1e6
    assert "finetune and distill" not in told(look(model, tmp_path / "model", free_mb=int(need) + 1))
    short = told(look(model, tmp_path / "model", free_mb=int(need) - 1))
    assert "low-rank adapters" in short["finetune and distill"][1]
    none = told(look(model, tmp_path / "model", free_mb=0))
    assert "of memory" in none["loading it"][0]
    assert "more memory" in none["loading it"][1]


def test_a_processor_without_the_instructions(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("multum.runtimes.openvino.computes_in_bf16", lambda: False)
    found = look(tiny.model(), tmp_path / "model", features=dict.fromkeys(doctor.FLAGS, False))
    assert told(found)["openvino bf16"] == ("this processor has no bf16 instructions", "openvino int8, or fp32")
    assert "int8 for speed" in told(found)
    assert "openvino bf16" not in found["works"]


def test_weights_that_cannot_be_loaded(tmp_path: Path) -> None:
    tiny.model().save(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "model" / "pytorch_model.bin")
    (limit,) = check_up(str(tmp_path / "model"), facts())["limits"]
    assert limit["what"] == "loading it"
    assert "load-legacy" in limit["instead"]
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "code.Model"}}))
    (limit,) = check_up(str(tmp_path / "model"), facts())["limits"]
    assert "--trust-remote-code" in limit["instead"]


def test_a_head_that_was_never_trained(tmp_path: Path) -> None:
    model = tiny.model()
    model.new_weights = ("classifier.bias", "classifier.weight", "pooler.weight")
    why, instead = told(look(model, tmp_path / "model"))["answers that mean something"]
    assert "classifier.bias, classifier.weight, ..." in why
    assert "finetune" in instead
