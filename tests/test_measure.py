"""Measuring: figures against slow references, real processes on tiny models, and targets that fail."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import translators
from sklearn.metrics import accuracy_score
from torch.utils.flop_counter import FlopCounterMode

from multum import runtimes
from multum._measure import macs_per_example, measure, ratio
from multum._measure_worker import peak_memory
from multum.core.model import Model
from multum.core.profile import profile
from multum.core.surgery import head_size, heads_and_neurons
from multum.errors import InputError, MultumError
from multum.tasks.text_generation import TextGeneration
from multum.terminal import metric_rows


def logits(model: Model, task: Any, split: str) -> np.ndarray:
    with torch.no_grad():
        batches = task.batches(model, split, 8)
        parts = [model.module(**{k: v for k, v in batch.items() if k != "labels"}).logits for batch in batches]
    return torch.cat(parts).numpy()


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Model, Any, list[dict[str, Any]]]:
    """One model, its export, and an export of a model whose labels stand the other way round."""
    folder = tmp_path_factory.mktemp("measured")
    model, task = tiny.model(layers=2), tiny.task(n_test=40)
    turned = tiny.model(layers=2, labels=("positive", "negative"))
    model.save(folder / "model")
    for source, name in ((model, "export"), (turned, "turned")):
        runtimes.find("onnxruntime").export(
            source, folder / name, precision="fp32", inputs=task.inputs("validation"), max_length=64, pairs=False
        )
    targets = [folder / name for name in ("model", "export", "turned")]
    return folder, model, task, measure(targets, task, threads=1, rounds=3, texts_per_round=4)


def test_quality_is_that_of_torch(measured: Any) -> None:
    _, model, task, found = measured
    truth, answers = task.targets["test"], logits(model, task, "test").argmax(1)
    assert found[0]["quality"]["value"] == found[1]["quality"]["value"] == accuracy_score(truth, answers)
    # The same weights under exchanged names answer the opposite.
    assert found[2]["quality"]["value"] == accuracy_score(truth, 1 - answers)


def test_figures_are_written_into_the_targets(measured: Any) -> None:
    folder, model, task, found = measured
    for name, metrics in zip(("model", "export", "turned"), found, strict=True):
        assert json.loads((folder / name / "metrics.json").read_text()) == metrics
        assert metrics["n"] == 40
        assert metrics["speed"]["threads"] == 1
    saved = np.load(folder / "export" / "predictions" / "test.npy")
    np.testing.assert_allclose(saved, logits(model, task, "test"), atol=1e-4)
    turned = np.load(folder / "turned" / "predictions" / "test.npy")
    np.testing.assert_allclose(turned[:, ::-1], saved, atol=1e-6)


def test_int8_answers_are_those_of_texts_alone(tmp_path: Path) -> None:
    model, task = tiny.model(layers=2), tiny.task(n_test=40)
    runtimes.find("onnxruntime").export(
        model, tmp_path / "int8", precision="int8", inputs=task.inputs("validation"), max_length=64, pairs=False
    )
    measure([tmp_path / "int8"], task, threads=1, rounds=3, texts_per_round=4)
    predictor = runtimes.open(tmp_path / "int8", threads=1)
    alone = np.concatenate([predictor.predict([text]) for text in task.inputs("test")])
    together = predictor.predict(task.inputs("test"))
    assert not np.allclose(alone, together, atol=1e-6)  # or the test would show nothing
    np.testing.assert_allclose(np.load(tmp_path / "int8" / "predictions" / "test.npy"), alone, atol=1e-6)


def test_sizes_are_those_of_the_files_needed(measured: Any) -> None:
    folder, model, _, found = measured
    names = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    assert found[0]["size"]["bytes_on_disk"] == sum((folder / "model" / name).stat().st_size for name in names)
    names = ("model.onnx", "tokenizer.json", "runtime.json")
    assert found[1]["size"]["bytes_on_disk"] == sum((folder / "export" / name).stat().st_size for name in names)
    assert found[0]["size"]["parameters"] == sum(p.numel() for p in model.module.parameters())
    assert found[0]["size"]["macs_per_example"] == found[1]["size"]["macs_per_example"]


def test_the_first_target_is_the_yardstick(measured: Any) -> None:
    found = measured[3]
    assert found[0]["speed"]["ratio_to_first"] == {"value": 1.0, "ci95": [1.0, 1.0]}
    assert found[1]["speed"]["ratio_to_first"]["value"] > 0
    # An export needs no torch, which takes hundreds of megabytes by itself.
    assert 0 < found[1]["memory"]["peak_rss_mb"] < found[0]["memory"]["peak_rss_mb"]


def test_weights_are_left_alone_and_validation_has_its_own_file(tmp_path: Path) -> None:
    model, task = tiny.model(layers=1), tiny.task()
    model.save(tmp_path / "m")
    before = (tmp_path / "m" / "model.safetensors").read_bytes()
    shares: list[float] = []
    measure([tmp_path / "m"], task, split="validation", threads=1, rounds=2, texts_per_round=2, progress=shares.append)
    assert (tmp_path / "m" / "model.safetensors").read_bytes() == before
    assert (tmp_path / "m" / "metrics-validation.json").is_file()
    assert not (tmp_path / "m" / "metrics.json").exists()
    assert shares == sorted(shares)
    assert shares


def test_ratio_is_the_median_of_paired_rounds() -> None:
    first, this = [4.0, 8.0, 6.0], [2.0, 2.0, 2.0]
    found = ratio(first, this)
    assert found["value"] == 3.0
    assert 2.0 <= found["ci95"][0] <= 3.0 <= found["ci95"][1] <= 4.0
    # A disturbance that slows both in one round leaves the ratio as it was.
    assert ratio([4.0, 400.0, 4.0], [2.0, 200.0, 2.0]) == {"value": 2.0, "ci95": [2.0, 2.0]}


def test_ratio_interval_covers_at_its_rate() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        noise = rng.lognormal(0, 0.2, size=(2, 31))
        low, high = ratio(3 * noise[0], noise[1])["ci95"]
        covered += low <= 3 <= high
    # 95 % of 200 within four standard deviations of a binomial count.
    assert 190 - 4 * np.sqrt(200 * 0.95 * 0.05) <= covered <= 200


def test_macs_are_averaged_over_the_lengths() -> None:
    macs = {"per_token": 10, "per_token_squared": 3, "per_example": 7}
    lengths = np.array([1, 2, 5])
    assert macs_per_example(macs, lengths) == round(np.mean([10 * n + 3 * n * n + 7 for n in lengths]))
    assert macs_per_example(None, lengths) is None


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("cut", [False, True])
def test_macs_agree_with_torchs_own_counter(family: str, cut: bool) -> None:
    model = tiny.model(family, layers=3)
    model = tiny.uneven(model) if cut else model
    model.module.set_attn_implementation("eager")
    model.module.requires_grad_(False)  # the counter follows gradients through modules, and a BiasOnly has none from its input
    macs = profile(model.module)["macs"]
    gone = sum(heads == 0 for heads, _ in heads_and_neurons(model.module))
    for tokens in (5, 17):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model.module(input_ids=torch.ones(1, tokens, dtype=torch.long))
        # torch, unlike an exported graph, runs one head's scores and products through an attention that has none left.
        idle = gone * 2 * head_size(model.module) * tokens**2
        assert 2 * (macs_per_example(macs, np.array([tokens])) + idle) == counter.get_total_flops()


def test_parameters_are_counted_once_and_zeros_apart() -> None:
    model = tiny.model()
    with torch.no_grad():
        for parameter in model.module.parameters():
            parameter.fill_(1.0)
        model.module.classifier.weight[0] = 0
    facts = profile(model.module)
    assert facts["parameters"] - facts["nonzero_parameters"] == 32
    assert facts["parameters"] == model.parameters()


def test_targets_that_cannot_be_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = tiny.task()
    tiny.model().save(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").write_bytes(b"junk")
    with pytest.raises(MultumError, match="damaged"):
        measure([tmp_path / "m"], task, rounds=1)
    tiny.model(labels=("good", "bad")).save(tmp_path / "other")
    with pytest.raises(InputError, match="good, bad"):
        measure([tmp_path / "other"], task, rounds=1)
    # A process that dies without a word must not leave its parent waiting.
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\nkill -9 $$\n")
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))
    with pytest.raises(MultumError, match="was killed"):
        measure([tmp_path / "other"], task, rounds=1)
    fake.write_text("#!/bin/sh\necho out of cheese >&2\nexit 3\n")
    with pytest.raises(MultumError, match="out of cheese"):
        measure([tmp_path / "other"], task, rounds=1)


def test_a_model_for_another_task_is_refused_before_it_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An encoder-decoder on a decoder's task, the reverse, and all at once; one that writes is for both tasks of writing."""
    tiny.language_model("gpt2").save(tmp_path / "causal")
    translators.translator().save(tmp_path / "writer")
    monkeypatch.setattr("multum._measure._started", lambda *_: pytest.fail("begun"))
    with pytest.raises(InputError, match="causal is a model for text-generation, and it is measured on translation"):
        measure([tmp_path / "writer", tmp_path / "causal"], translators.translating())
    with pytest.raises(InputError, match="writer is a model for translation, and it is measured on text-generation"):
        measure([tmp_path / "writer"], TextGeneration.from_splits(tiny.text_splits(4, 4, 4)))
    with pytest.raises(InputError) as caught:
        measure([tmp_path / "writer", tmp_path / "causal"], tiny.task())
    assert len(caught.value.problems) == 2
    with pytest.raises(pytest.fail.Exception, match="begun"):
        measure([tmp_path / "writer"], translators.summarizing())


def test_peak_memory_grows_with_use() -> None:
    before = peak_memory()
    block = np.ones(int(before) * 200_000)  # bigger than what is free inside the process
    assert peak_memory() >= before
    assert block.nbytes > 0


@pytest.mark.parametrize(("metric", "cell"), [("accuracy", "40.0 (20.0–60.0)"), ("bleu", "0.400 (0.200–0.600)")])
def test_what_is_a_share_is_shown_in_per_cent(metric: str, cell: str) -> None:
    speed = {"runtime": "pytorch", "precision": "fp32", "p50_ms": 1, "threads": 1, "examples_per_s": 1}
    found = {
        "quality": {"metric": metric, "value": 0.4, "ci95": [0.2, 0.6]},
        "size": {"bytes_on_disk": 1, "parameters": 1},
        "speed": {**speed, "ratio_to_first": {"value": 1.0}},
    }
    rows = metric_rows(["a"], [found])
    assert rows[1][1] == cell
    assert (", %" in rows[0][1]) is (metric == "accuracy")
