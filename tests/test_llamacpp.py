"""The runtime llamacpp: proved against torch, for what it reads and what it writes; pruned models; wrong input. Runs llama.cpp."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from on_disk import listing, write_csv
from test_gguf import FAMILIES, cut, decoder, sentencepiece
from test_writing import PROMPTS, TEMPLATE
from typer.testing import CliRunner

from multum import runtimes
from multum._measure import measure
from multum.cli import app
from multum.core.model import Model
from multum.core.sentences import causal_sums
from multum.core.writing import Decoding, TorchWriter, write
from multum.errors import InputError, MissingExtra, ParityError
from multum.runtimes import _llama, llamacpp
from multum.targets import exporter, named, targets_of
from multum.tasks.text_generation import TextGeneration

needs_llama = pytest.mark.llamacpp
TEXTS = tiny.passages(6)


def export(model: Model, folder: Path, precision: str = "f32", texts: Any = TEXTS) -> dict[str, Any]:
    return llamacpp.export(model, folder, precision=precision, inputs=texts)


@needs_llama
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_answers_as_torch_does(family: str, tmp_path: Path) -> None:
    """llama.cpp's gelu is a table of 16-bit numbers, so that gemma and gpt2 are further from torch."""
    model = decoder(family)
    facts = export(model, tmp_path / "out")
    allowed = 2e-2 if family in ("gemma", "gpt2") else 1e-3
    assert facts["max_difference"] < allowed
    assert facts["written_agreement"] > 0.95
    predictor = runtimes.open(tmp_path / "out", threads=1)
    whole = predictor.predict(TEXTS)
    expected = causal_sums(model.module, model.tokenizer, TEXTS)
    for found, sums in zip(whole, expected, strict=True):
        np.testing.assert_allclose(found[: len(sums)], sums, rtol=1e-3)
        assert np.isnan(found[len(sums) :]).all()
    # A long text is read in windows, each a row.
    assert sum(predictor.lengths(TEXTS)) == sum(len(ids) for ids in model.tokenizer(TEXTS)["input_ids"])
    assert predictor.predict([]).shape == (0, 0, 3)


@needs_llama
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("family", ["llama", "phi3", "qwen2"])
def test_pruned_models(family: str, first: bool, tmp_path: Path) -> None:
    model = cut(decoder(family), first=first)
    facts = export(model, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "runtime.json").read_text())["architecture"] == "deci"
    assert facts["max_difference"] < 1e-3
    writer = TorchWriter(model.module, model.tokenizer)
    decoding = Decoding(max_new_tokens=16)
    ours = list(write(runtimes.open(tmp_path / "out", threads=1), PROMPTS, decoding))
    for found, expected in zip(ours, write(writer, PROMPTS, decoding), strict=True):
        assert (found.text, found.tokens) == (expected.text, expected.tokens)
        assert found.score == pytest.approx(expected.score, abs=1e-3)


@needs_llama
@pytest.mark.parametrize(("precision", "kl"), [("f16", 1e-4), ("q8_0", 0.02), ("q4_0", 0.5), ("q4_1", 0.5), ("q4_k", 0.5)])
def test_precisions(precision: str, kl: float, tmp_path: Path) -> None:
    """Weights that spread the answers of a tiny model less than those of the other tests, as a trained one's are."""
    model = decoder("llama", hidden=64, neurons=64)
    for parameter in model.module.parameters():
        parameter.data *= 0.5 if parameter.dim() > 1 else 1.0
    facts = export(model, tmp_path / "out", precision)
    assert 0 < facts["kl_nats"] < kl
    assert facts["worst_kl_nats"] >= facts["kl_nats"]
    assert set(facts["worst"]) == {"behind", "torch", "llamacpp"}
    manifest = json.loads((tmp_path / "out" / "runtime.json").read_text())
    assert manifest["parity"]["kl_nats"] == facts["kl_nats"]
    assert listing(tmp_path / "out") == ["model.gguf", "runtime.json", "tokenizer.json"]
    sums = runtimes.open(tmp_path / "out", threads=1).predict(TEXTS)
    perplexity = np.exp(np.nansum(sums[..., 0]) / np.nansum(sums[..., 1]))
    expected = causal_sums(model.module, model.tokenizer, TEXTS)
    assert perplexity == pytest.approx(np.exp(sum(s[:, 0].sum() for s in expected) / sum(s[:, 1].sum() for s in expected)), rel=0.1)


@needs_llama
def test_long_texts_have_windows_and_pieces(tmp_path: Path) -> None:
    model = decoder("llama", positions=640)
    model.tokenizer.model_max_length = 640
    text = " ".join(tiny.passages(60))
    assert len(model.tokenizer(text)["input_ids"]) > 1300
    export(model, tmp_path / "out")
    predictor = runtimes.open(tmp_path / "out", threads=1)
    (expected,) = causal_sums(model.module, model.tokenizer, [text])
    np.testing.assert_allclose(predictor.predict([text])[0], expected, rtol=1e-3)
    assert len(expected) > 3


@needs_llama
def test_a_sentencepiece_tokenizer(tmp_path: Path) -> None:
    tokenizer = sentencepiece()
    model = Model(module=decoder("llama", vocabulary=430).module, tokenizer=tokenizer, source="")
    facts = export(model, tmp_path / "out", texts=[*TEXTS, "a zebra's naïve façade 東 with  two spaces"])
    assert facts["texts"] == 7


@needs_llama
def test_another_file_or_tokenizer_is_a_failed_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, other = decoder("llama"), decoder("llama")
    for parameter in other.module.parameters():
        parameter.data = parameter.data.roll(1, 0)
    written = llamacpp.write_gguf
    monkeypatch.setattr(llamacpp, "write_gguf", lambda _, path, precision: written(other, path, precision))
    for precision in ("f32", "q8_0", "q4_0"):
        with pytest.raises(ParityError, match=r"KL .* nats \(allowed"):
            export(model, tmp_path / "out", precision)
        assert listing(tmp_path) == []
    monkeypatch.undo()
    fields = _llama.Session.tokens
    monkeypatch.setattr(_llama.Session, "tokens", lambda self, text: [*fields(self, text)[:-1], 7])
    with pytest.raises(ParityError, match="cuts texts into other tokens"):
        export(model, tmp_path / "out")
    assert listing(tmp_path) == []


@needs_llama
def test_what_it_writes_must_be_torch_s_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache that remembers wrongly shows in what is written alone."""
    following = _llama.Session.next
    monkeypatch.setattr(_llama.Session, "next", lambda self, token: following(self, token)[::-1].copy())
    with pytest.raises(ParityError, match="below torch's choice"):
        export(decoder("llama"), tmp_path / "out")
    assert listing(tmp_path) == []


@needs_llama
def test_damaged_files(tmp_path: Path) -> None:
    export(decoder("llama"), tmp_path / "out")
    (tmp_path / "out" / "model.gguf").write_bytes(b"GGUF and no more")
    with pytest.raises(InputError, match=r"model\.gguf cannot be opened"):
        runtimes.open(tmp_path / "out")
    with pytest.raises(InputError, match="no precision 'int8'; it has: f16"):
        export(decoder("llama"), tmp_path / "other", "int8")
    with pytest.raises(InputError, match="nothing to prove"):
        export(decoder("gpt2"), tmp_path / "other", texts=[""])


@needs_llama
def test_from_the_command_line(tmp_path: Path) -> None:
    """Exported, measured beside torch in turns, used for prompts and chats."""
    model = decoder("llama")
    model.tokenizer.chat_template = TEMPLATE
    model.save(tmp_path / "m", {"task": "text-generation"})
    for name, seed in (("train", 1), ("validation", 2), ("test", 3)):
        write_csv(tmp_path / "data" / f"{name}.csv", [{"text": text} for text in tiny.passages(8, seed=seed)])
    data = ["--data", str(tmp_path / "data"), "--task", "text-generation"]
    target = tmp_path / "m" / "llamacpp-f16"
    done = CliRunner().invoke(app, ["export", str(tmp_path / "m"), "--to", "gguf", "--precision", "f16", "-o", str(target), *data])
    assert done.exit_code == 0, done.output
    assert "kl_nats" in done.stdout
    ours, theirs = (
        json.loads(CliRunner().invoke(app, ["predict", str(folder), *PROMPTS, "--max-new-tokens", "8", "--json"]).stdout)
        for folder in (target, tmp_path / "m")
    )
    assert [(one["answer"], one["tokens"]) for one in ours] == [(one["answer"], one["tokens"]) for one in theirs]
    assert [one["score"] for one in ours] == pytest.approx([one["score"] for one in theirs], abs=5e-3)
    asked = ["predict", str(target), "a film?", "--chat", "--temperature", "1", "--max-new-tokens", "4", "--json"]
    (answer,) = json.loads(CliRunner().invoke(app, asked).stdout)
    assert answer["generation"] == {"max_new_tokens": 4, "temperature": 1.0, "top_p": 1.0, "seed": 0, "chat": True}
    task = TextGeneration.from_splits(tiny.text_splits(8, 4, 6))
    torch_metrics, metrics = measure([tmp_path / "m", target], task, rounds=3, texts_per_round=2, threads=1)
    assert metrics["quality"]["value"] == pytest.approx(torch_metrics["quality"]["value"], rel=1e-2)
    for one in (torch_metrics, metrics):
        for name in ("first_token_p50_ms", "prefill_tokens_per_s", "decode_tokens_per_s"):
            assert one["speed"][name] > 0
    assert metrics["speed"]["runtime"] == "llamacpp"
    assert metrics["speed"]["decode_ratio_to_first"]["value"] > 1
    assert torch_metrics["speed"]["decode_ratio_to_first"]["value"] == 1
    # Nothing in its process imports torch.
    assert metrics["memory"]["peak_rss_mb"] < 0.6 * torch_metrics["memory"]["peak_rss_mb"]


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llamacpp, "find_spec", lambda name: None)
    assert "multum[llamacpp]" in str(llamacpp.unavailable())
    with pytest.raises(MissingExtra, match=r"multum\[llamacpp\]"):
        export(decoder("llama"), tmp_path / "out")
    with pytest.raises(MissingExtra, match="llamacpp"):
        llamacpp.open(tmp_path)
    assert listing(tmp_path) == []


def test_people_s_names_for_it_and_its_precisions(tmp_path: Path) -> None:
    assert named("gguf", "int4") == ("llamacpp", "q4_k")
    assert named("llamacpp", "int8") == ("llamacpp", "q8_0")
    assert named("llamacpp", "q4_0") == ("llamacpp", "q4_0")
    assert named("onnxruntime", "int8") == ("onnxruntime", "int8")
    assert named("abacus", "int8") == ("abacus", "int8")
    target = tmp_path / "m" / "llamacpp-q8_0"
    target.mkdir(parents=True)
    (target / "runtime.json").write_text("{}")
    (tmp_path / "m" / "config.json").write_text("{}")
    assert targets_of([tmp_path / "m"], "gguf-int8") == targets_of([tmp_path / "m"], "gguf") == [target]
    with pytest.raises(InputError, match=r"openvino has no 'q4_0'; .*\. llamacpp has it"):
        exporter("openvino", "q4_0")
    with pytest.raises(InputError, match=r"onnxruntime has no 'bf16'; .*\. openvino has it"):
        exporter("onnxruntime", "bf16")


def test_other_tasks_are_refused(tmp_path: Path) -> None:
    tiny.model("bert").save(tmp_path / "m")
    from multum.targets import export_to

    with pytest.raises(InputError, match="llamacpp takes models for text-generation, not for text-classification"):
        export_to(llamacpp, tmp_path / "m", tmp_path / "out", "f16", tiny.task(), 0)
    with pytest.raises(InputError, match="llamacpp takes models for text-generation, not for text-classification"):
        exporter("llamacpp", "q4_0", tmp_path / "m", "text-classification")  # installed or not
    with pytest.raises(InputError) as caught:
        exporter("onnxruntime", "int4", tmp_path / "m", "text-classification")
    assert "onnxruntime has no 'int4' for text-classification; it has: fp32, int8" in str(caught.value)
    assert "llamacpp" not in str(caught.value)
