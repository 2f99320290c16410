"""Model: what is loaded, what is refused, what a folder keeps."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import tiny
import torch
import transformers
from on_disk import listing, model_folder
from transformers import ByT5Tokenizer

from multum.core import hub
from multum.core.model import Model
from multum.errors import InputError

HEAD = "AutoModelForSequenceClassification"


def load(source: Path | str) -> Model:
    return Model.load(source, auto_class=HEAD)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_saved_and_loaded_it_is_the_same(family: str, tmp_path: Path) -> None:
    model = tiny.uneven(tiny.model(family, layers=3))
    model.history.append({"step": "made up"})
    model.save(tmp_path / "model", {"task": "text-classification"})
    again = load(tmp_path / "model")
    assert again.fingerprint() == model.fingerprint()
    assert (again.source, again.history, again.new_weights) == (model.source, model.history, ())
    recipe = json.loads((tmp_path / "model" / "recipe.json").read_text(encoding="utf-8"))
    assert recipe["task"] == "text-classification"
    assert {"base", "versions", "machine", "when"} <= set(recipe)
    assert not [name for name in listing(tmp_path) if name.endswith((".bin", ".pt", ".pkl"))]


def test_the_fingerprint_is_the_same_in_every_process(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    code = f"from multum import Model; print(Model.load({str(folder)!r}, auto_class={HEAD!r}).fingerprint())"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == load(folder).fingerprint()


def test_the_fingerprint_sees_weights_shapes_and_tokenizer() -> None:
    model = tiny.model()
    found = {model.fingerprint()}
    with torch.no_grad():
        model.module.classifier.weight[0, 0] += 1e-6
    found.add(model.fingerprint())
    model.tokenizer.add_tokens(["zebra"])
    found.add(model.fingerprint())
    assert len(found) == 3
    model.tokenizer("some text", truncation=True, max_length=4, padding="max_length")
    assert model.fingerprint() in found  # a call's own options do not make another model
    model.tokenizer = ByT5Tokenizer()  # written in Python
    found.add(model.fingerprint())
    model.tokenizer = ByT5Tokenizer(extra_ids=7)
    assert model.fingerprint() not in found


def test_a_copy_is_independent() -> None:
    model = tiny.model()
    before, copy = model.fingerprint(), model.copy()
    with torch.no_grad():
        copy.module.classifier.weight.zero_()
    copy.tokenizer.add_tokens(["zebra"])
    copy.history.append({})
    assert model.fingerprint() == before
    assert model.history == []


def test_an_untrained_head_is_known(tmp_path: Path) -> None:
    model = tiny.model()
    model.module.bert.save_pretrained(tmp_path)
    model.tokenizer.save_pretrained(tmp_path)
    model = load(tmp_path)
    assert any(name.startswith("classifier") for name in model.new_weights)
    model.save(tmp_path / "again")  # saving makes it no more trained than it was
    assert load(tmp_path / "again").new_weights == model.new_weights


def damaged(folder: Path) -> Path:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    return folder


def pickled(folder: Path) -> Path:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    return folder


def without(folder: Path, name: str) -> Path:
    (folder / name).unlink()
    return folder


def of_another_kind(folder: Path) -> Path:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "vit"}), encoding="utf-8")
    return folder


def of_no_width(folder: Path) -> Path:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"hidden_size": "abc"}), encoding="utf-8")
    return folder


def of_other_shapes(folder: Path) -> Path:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 8}), encoding="utf-8")
    return folder


def without_sense(folder: Path) -> Path:
    (folder / "tokenizer.json").write_text("{", encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("break_it", "says"),
    [
        (damaged, "weights are damaged"),
        (of_no_width, "hidden_size"),
        (of_other_shapes, "its weights have other shapes than its config.json says"),
        (without_sense, "cannot load its tokenizer"),
        (pickled, "pickled weights, which multum does not open"),
        (lambda folder: without(folder, "model.safetensors"), "no weights"),
        (lambda folder: without(folder, "config.json"), "no config.json"),
        (of_another_kind, "cannot load it as AutoModelForSequenceClassification"),
        (lambda folder: folder / "config.json", "is a file"),
        (lambda folder: folder / "nowhere", "no such folder"),
        (lambda folder: "no/such/place", "no such folder"),
    ],
)
def test_what_is_no_model_is_refused(break_it: object, says: str, tmp_path: Path) -> None:
    source = break_it(model_folder(tmp_path / "model"))  # type: ignore[operator]
    with pytest.raises(InputError, match=says):
        load(source)


def without_words(folder: Path) -> Path:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    return folder


def test_a_model_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    """transformers makes one of nothing, for which every word is unknown."""
    with pytest.raises(InputError, match=r"no tokenizer that knows a word; .* tokenizer.json"):
        load(without_words(model_folder(tmp_path / "model")))


def test_a_hub_out_of_reach_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise OSError("no route")

    monkeypatch.setattr(socket, "create_connection", refused)
    monkeypatch.setattr(urllib.request, "getproxies", dict)
    started = time.monotonic()
    with pytest.raises(InputError, match="no such folder, and the Hugging Face Hub cannot be reached"):
        load("nobody/no-such-model")
    assert time.monotonic() - started < 5


def test_a_hub_id_that_there_is_not_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> None:
        raise OSError("nobody/no-such-model is not a valid model identifier")

    monkeypatch.setattr(hub, "reachable", lambda: True)
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", missing)
    with pytest.raises(InputError, match="cannot load it as"):
        load("nobody/no-such-model")


def test_behind_a_proxy_the_hub_counts_as_reachable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(urllib.request, "getproxies", lambda: {"https": "http://proxy:3128"})
    assert hub.reachable()
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    assert not hub.reachable()


def test_saved_weights_may_be_read_by_whom_other_files_may(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    rights = {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()}
    assert rights["model.safetensors"] == rights["config.json"] == rights["recipe.json"]
