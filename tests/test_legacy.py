"""Checkpoints as transformers 4 and old pruning tools wrote them, built by hand, come back with equal answers."""

from __future__ import annotations

import json
import os

import on_disk
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification
from typer.testing import CliRunner

from multum._legacy import load_legacy, unpickle
from multum.cli import app
from multum.core.families import blocks_of, family_of
from multum.core.surgery import head_size, keep_heads, keep_neurons
from multum.errors import InputError

FAMILIES = (*tiny.FAMILIES, "gpt2")
"""Of those that transformers 4 could prune heads of: a matrix for each of query, key and value, or one for all (GPT-2)."""
PRUNED = {0: [1, 3], 1: [0]}


def pruned(family="bert"):
    model = tiny.model(family)
    for number, heads in PRUNED.items():
        kept = [h for h in range(4) if h not in heads]
        keep_heads(blocks_of(model.module)[number], family_of(model.module), kept, head_size(model.module))
    return model


def version_4(folder, model, heads=PRUNED, *, pickled=False):
    """The folder that transformers 4 would have written: cut weights, and a config that says which heads went."""
    folder.mkdir()
    config = {k: v for k, v in model.module.config.to_dict().items() if k != "quantization_config"}
    config |= {"pruned_heads": {str(n): h for n, h in heads.items()}, "transformers_version": "4.30.2"}
    (folder / "config.json").write_text(json.dumps(config | {"architectures": [type(model.module).__name__]}))
    model.tokenizer.save_pretrained(folder)
    weights = {name: tensor.clone() for name, tensor in model.module.state_dict().items()}
    if "bert" in model.source:  # buffers that transformers 4 kept
        prefix = model.module.base_model_prefix
        weights[f"{prefix}.embeddings.position_ids"] = torch.arange(tiny.POSITIONS)[None]
    if "gpt2" in model.source:
        weights["transformer.h.0.attn.bias"] = torch.ones(1, 1, tiny.POSITIONS, tiny.POSITIONS, dtype=torch.uint8)
        weights["transformer.h.0.attn.masked_bias"] = torch.tensor(-1e4)
    if pickled:
        torch.save(weights, folder / "pytorch_model.bin")
    else:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@torch.no_grad()
def logits(module, model):
    batch = tiny.task(n_validation=8).calibration(model, 8)[0]
    return module(**batch).logits


@pytest.mark.parametrize("family", [*FAMILIES, "mpnet"])  # MPNet's heads have a bias each
@pytest.mark.parametrize("pickled", [False, True])
def test_a_folder_with_pruned_heads_loads_and_answers_the_same(family, pickled, tmp_path):
    old = pruned(family)
    source = version_4(tmp_path / "old", old, pickled=pickled)
    with pytest.raises((RuntimeError, OSError, ValueError)):
        AutoModelForSequenceClassification.from_pretrained(source)
    model, found = load_legacy(source, allow_pickle=pickled)
    assert len(found["cut"]) == (4 if family == "gpt2" else 8)  # query, key, value and output of two blocks
    model.save(tmp_path / "new")
    module = AutoModelForSequenceClassification.from_pretrained(tmp_path / "new")
    assert torch.equal(logits(module, old), logits(old.module, old))
    assert not hasattr(module.config, "pruned_heads")
    written = load_file(tmp_path / "new" / "model.safetensors")
    assert all(torch.equal(written[name], tensor) for name, tensor in old.module.state_dict().items())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_whole_module_comes_back_from_its_pickle(family, tmp_path):
    old = pruned(family)
    keep_neurons(blocks_of(old.module)[1], family_of(old.module), list(range(20)))
    torch.save(old.module, tmp_path / "pruned.pt")
    old.tokenizer.save_pretrained(tmp_path / "tokenizer")
    model, found = load_legacy(tmp_path / "pruned.pt", tokenizer=str(tmp_path / "tokenizer"), allow_pickle=True)
    assert len(found["cut"]) == (6 if family == "gpt2" else 10)
    model.save(tmp_path / "new")
    module = AutoModelForSequenceClassification.from_pretrained(tmp_path / "new")
    assert torch.equal(logits(module, old), logits(old.module, old))
    assert module.config.id2label == old.module.config.id2label


def test_pickles_are_opened_only_on_request(tmp_path):
    source = version_4(tmp_path / "old", pruned(), pickled=True)
    for place in (source, source / "pytorch_model.bin"):
        with pytest.raises(InputError, match=r"is a pickle, which can hold code.*--allow-pickle"):
            load_legacy(place)


class _Evil:
    def __reduce__(self):
        return os.mkdir, (os.environ["MULTUM_EVIL"],)


class _Evaluated:
    def __reduce__(self):
        return eval, ("__import__('os').mkdir(__import__('os').environ['MULTUM_EVIL'])",)


@pytest.mark.parametrize("wrap", [lambda evil: evil, lambda evil: {"weight": torch.ones(2), "more": [evil]}])
@pytest.mark.parametrize(("kind", "name"), [(_Evil, "posix.mkdir"), (_Evaluated, "eval")])
def test_anything_but_a_model_is_refused_by_name_and_not_run(wrap, kind, name, tmp_path, monkeypatch):
    monkeypatch.setenv("MULTUM_EVIL", str(tmp_path / "was-here"))
    torch.save(wrap(kind()), tmp_path / "model.pt")
    with pytest.raises(InputError, match=rf"asks for what no model is made of, and is not opened: .*{name}"):
        load_legacy(tmp_path / "model.pt", allow_pickle=True)
    assert not (tmp_path / "was-here").exists()


def test_evil_inside_a_real_module_is_refused_too(tmp_path, monkeypatch):
    monkeypatch.setenv("MULTUM_EVIL", str(tmp_path / "was-here"))
    module = tiny.model().module
    module.extra = _Evil()
    torch.save(module, tmp_path / "model.pt")
    with pytest.raises(InputError, match=r"posix\.mkdir"):
        load_legacy(tmp_path / "model.pt", allow_pickle=True)
    assert not (tmp_path / "was-here").exists()


def test_no_code_of_a_class_is_run_not_even_of_a_known_one(tmp_path, monkeypatch):
    """The module's own __setstate__ would be called by an ordinary unpickler."""
    module = tiny.model().module
    torch.save(module, tmp_path / "model.pt")

    def run(self, state):
        raise AssertionError("code of the checkpoint's class was run")

    monkeypatch.setattr(torch.nn.Module, "__setstate__", run)
    with pytest.raises(AssertionError, match="was run"):
        torch.load(tmp_path / "model.pt", weights_only=False)
    shell = unpickle(tmp_path / "model.pt")
    assert type(shell).__name__ == "BertForSequenceClassification"
    assert not isinstance(shell, torch.nn.Module)


def test_modules_inside_modules_have_an_end(tmp_path):
    module = tiny.model().module
    twice = torch.nn.Linear(1, 1)
    for _ in range(32):
        twice = torch.nn.Sequential(twice, twice)  # 2^32 by name, and no file at all
    module.extra = twice
    torch.save(module, tmp_path / "model.pt")
    with pytest.raises(InputError, match="more than 100000 modules"):
        load_legacy(tmp_path / "model.pt", allow_pickle=True)


def test_what_is_no_checkpoint_is_said(tmp_path):
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(InputError, match=r"is no file that torch\.save has written"):
        load_legacy(tmp_path / "text.pt", allow_pickle=True)
    torch.save({"weight": torch.ones(2)}, tmp_path / "weights.pt")
    with pytest.raises(InputError, match="holds no transformers model"):
        load_legacy(tmp_path / "weights.pt", allow_pickle=True)
    torch.save(torch.nn.Linear(2, 2), tmp_path / "linear.pt")
    with pytest.raises(InputError, match="holds no transformers model"):
        load_legacy(tmp_path / "linear.pt", allow_pickle=True)
    with pytest.raises(InputError, match=r"neither a file nor a folder with config\.json"):
        load_legacy(tmp_path)


def test_weights_that_do_not_fit_their_config_are_all_named(tmp_path):
    model = pruned()
    wrong = version_4(tmp_path / "wrong", model, {0: [1], 1: [0], 7: [2]})
    with pytest.raises(InputError) as caught:
        load_legacy(wrong)
    assert len(caught.value.problems) == 2
    assert "block 0: config.json names 1 pruned heads, so 24 rows; its query has 16" in str(caught.value)
    assert "block 7" in str(caught.value)
    short = version_4(tmp_path / "short", model)
    weights = load_file(short / "model.safetensors")
    del weights["classifier.bias"]
    save_file(weights | {"further.weight": torch.ones(2)}, short / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError) as caught:
        load_legacy(short)
    assert len(caught.value.problems) == 2
    assert "lack classifier.bias" in str(caught.value)
    assert "have further.weight" in str(caught.value)


def test_heads_with_a_bias_each_must_be_named(tmp_path):
    source = version_4(tmp_path / "old", pruned("mpnet"), {0: PRUNED[0]})
    with pytest.raises(InputError) as caught:
        load_legacy(source)
    assert list(caught.value.problems) == [
        "the model, block 1: heads were cut, and config.json does not say which in 'pruned_heads'; in this architecture each has a "
        "bias of its own"
    ]
    config = json.loads((source / "config.json").read_text()) | {"pruned_heads": [1, 3]}
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"must be heads by block, \{block: \[heads\]\}"):
        load_legacy(source)


def test_a_missing_tokenizer_is_asked_for(tmp_path):
    torch.save(tiny.model().module, tmp_path / "model.pt")
    with pytest.raises(InputError, match="--tokenizer"):
        load_legacy(tmp_path / "model.pt", allow_pickle=True)


def test_the_command(tmp_path):
    source = version_4(tmp_path / "old", pruned(), pickled=True)
    refused = CliRunner().invoke(app, ["load-legacy", str(source), "-o", str(tmp_path / "new")])
    assert refused.exit_code == 2
    assert "--allow-pickle" in refused.stderr
    assert not (tmp_path / "new").exists()
    done = CliRunner().invoke(app, ["load-legacy", str(source), "-o", str(tmp_path / "new"), "--allow-pickle"])
    assert done.exit_code == 0, done.output
    assert "Warning: a pickle can hold code" in done.stderr
    assert "8 layers of other shapes" in done.stdout
    assert "model.safetensors" in on_disk.listing(tmp_path / "new")
    again = CliRunner().invoke(app, ["load-legacy", str(tmp_path / "nowhere"), "-o", str(tmp_path / "new")])
    assert again.exit_code == 2
    assert "exists already" in again.stderr
    assert "no such file or folder" in again.stderr
