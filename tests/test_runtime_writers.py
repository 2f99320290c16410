"""Models that write, exported as graphs with a cache: they say and write what torch does, whole and pruned, and without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import translators
from typer.testing import CliRunner

from multum import runtimes
from multum._fill import filled
from multum._measure import measure
from multum.cli import app
from multum.core.families import stacks_of
from multum.core.generation import texts_of, write
from multum.core.model import Model
from multum.core.sentences import causal_sums, masked_sums
from multum.core.step import make
from multum.core.sublayers import CROSS, HEADS, NEURONS, places_of
from multum.core.surgery import head_size
from multum.core.writing import Decoding, TorchWriter
from multum.core.writing import write as continue_
from multum.errors import InputError, ParityError
from multum.targets import export_model
from multum.tasks.fill_mask import FillMask
from multum.tasks.text_generation import TextGeneration

TRANSLATORS = [("onnxruntime", "fp32", "t5", 3), ("onnxruntime", "int8", "marian", 1), ("openvino", "fp32", "bart", 2)]
CAUSAL = [("onnxruntime", "fp32", "llama"), ("onnxruntime", "int8", "gpt2"), ("openvino", "int8", "gpt2")]
PROMPTS = ["a wonderful moving film", "the"]
TEXTS = tiny.passages(6)


def cut(model: Model) -> Model:
    """Every sublayer has lost units, other numbers in each. The first block of a stack lost its attention to what comes before, the
    second of a decoder that to what was read, the second of an encoder its neurons."""
    blocks = [block for stack in stacks_of(model.module) for block in stack.blocks]
    for number, place in enumerate(places_of(model.module)):
        of_stack = list(place.stack.blocks).index(blocks[place.number])
        gone = (of_stack, place.sublayer.kind) in [(0, HEADS), (1, CROSS)]
        gone |= (place.stack.name, of_stack, place.sublayer.kind) == ("encoder", 1, NEURONS)
        kept = [] if gone else range(1, place.size - number % 2)
        place.sublayer.keep(place.block, kept, head_size(model.module, place.stack.family))
    return model


def smaller(family: str, task: TextGeneration) -> Model:
    """A causal model after all that changes its shape: its width too, which Llama's config can state and GPT-2's cannot, and
    Llama's matrices as factors."""
    model = tiny.language_model(family, layers=3)
    model = make("drop_layers", {"which": (1,)})(model, task)
    model = make("slice_hidden" if family == "llama" else "prune_hidden", {"keep": 0.75, "samples": 8})(model, task)
    model = cut(model)
    return make("low_rank", {"rank": 6, "samples": 8})(model, task) if family == "llama" else model


def translator(family: str, beams: int) -> Model:
    model = translators.translator(family, layers=2, spread=3.0)
    torch.manual_seed(0)
    model.module.lm_head.weight = torch.nn.Parameter(0.3 * torch.randn(model.module.lm_head.weight.shape))
    model.module.config.tie_word_embeddings = False
    config = model.module.generation_config
    config.num_beams, config.max_new_tokens, config.max_length = beams, 12, None
    return cut(model)


def export(runtime: str, model: Model, task: Any, folder: Path, precision: str) -> dict[str, Any]:
    return export_model(runtimes.find(runtime), model, folder, precision, task, 0)


@pytest.mark.parametrize(("runtime", "precision", "family", "beams"), TRANSLATORS)
def test_translators_write_what_torch_writes(runtime: str, precision: str, family: str, beams: int, tmp_path: Path) -> None:
    model, task = translator(family, beams), translators.translating(8, 8, 24)
    weights = model.fingerprint()
    facts = export(runtime, model, task, tmp_path / "out", precision)
    assert model.fingerprint() == weights
    predictor, sources = runtimes.open(tmp_path / "out", threads=1), list(task.inputs("test"))
    found, expected = predictor.predict(sources), write(model.module, model.tokenizer, sources, scored=True)
    assert json.loads((tmp_path / "out" / "runtime.json").read_text())["parity"] == facts
    assert predictor.generation["num_beams"] == beams
    if precision == "fp32":
        assert facts["max_difference"] < 1e-4
        assert facts["written_agreement"] == 1
        assert texts_of(found) == [one.text for one in expected]
        np.testing.assert_allclose(found[:, 0], [one.score for one in expected], atol=1e-4)
        assert found[:, 1].tolist() == [one.tokens for one in expected]
        assert len(set(texts_of(found))) > 1
        alone = predictor.predict(sources[:1])[0]
        np.testing.assert_allclose(alone, found[0][: len(alone)], atol=1e-4)
    else:
        assert 0 < facts["kl_nats"] < 0.05
        same = np.mean([ours == one.text for ours, one in zip(texts_of(found), expected, strict=True)])
        assert same > 0.5
    assert predictor.lengths(sources) == [len(ids) for ids in model.tokenizer(sources)["input_ids"]]
    assert predictor.generated_s([5, 6, 1], 4) > 0
    assert predictor.predict([]).shape == (0, 2)
    predictor.use(2)
    assert texts_of(predictor.predict(sources)) == texts_of(found)
    predictor.reader.scored = False
    assert np.isnan(predictor.predict(sources[:2])[:, 0]).all()
    if family == "bart":
        model.module.lm_head.weight.data = model.module.lm_head.weight.data.roll(1, 0)
        with pytest.raises(ParityError, match="answers differently"):
            runtimes.find(runtime).proof(model, tmp_path / "out", sources)


@pytest.mark.parametrize(("runtime", "precision", "family"), CAUSAL)
def test_causal_models_continue_as_torch_does(runtime: str, precision: str, family: str, tmp_path: Path) -> None:
    task = TextGeneration.from_splits(tiny.text_splits(8, 6, 4))
    model = smaller(family, task)
    facts = export(runtime, model, task, tmp_path / "out", precision)
    predictor, decoding = runtimes.open(tmp_path / "out", threads=1), Decoding(max_new_tokens=16)
    sums, expected = predictor.predict(TEXTS), causal_sums(model.module, model.tokenizer, TEXTS)
    theirs = list(continue_(TorchWriter(model.module, model.tokenizer), PROMPTS, decoding))
    ours = list(continue_(predictor, PROMPTS, decoding))
    assert facts["tokens"] > 100
    for found, reference in zip(sums, expected, strict=True):
        np.testing.assert_allclose(found[: len(reference)], reference, rtol=1e-3 if precision == "fp32" else 0.2)
        assert np.isnan(found[len(reference) :]).all()
    if precision == "fp32":
        assert facts["max_difference"] < 1e-4
        assert facts["written_agreement"] == 1
        assert [(one.text, one.tokens) for one in ours] == [(one.text, one.tokens) for one in theirs]
        assert [one.score for one in ours] == pytest.approx([one.score for one in theirs], abs=1e-4)
        whole = " ".join(TEXTS * 3)
        assert len(model.tokenizer(whole)["input_ids"]) > 2 * predictor.context
        (reference,) = causal_sums(model.module, model.tokenizer, [whole])
        np.testing.assert_allclose(predictor.predict([whole])[0], reference, rtol=1e-3)
        with pytest.raises(ParityError, match="answers differently"):
            runtimes.find(runtime).proof(cut(tiny.language_model(family, layers=2, hidden=64)), tmp_path / "out", TEXTS)
        no_torch(tmp_path / "out")
        model.save(tmp_path / "model", {"task": task.name})
        _, metrics = measure([tmp_path / "model", tmp_path / "out"], task, rounds=3, texts_per_round=2, threads=1)
        assert metrics["speed"]["runtime"] == runtime
        assert metrics["speed"]["decode_tokens_per_s"] > 0
    else:
        assert 0 < facts["kl_nats"] < 0.05


def no_torch(folder: Path) -> None:
    """Writing in a process of its own."""
    code = f"""
import sys
from multum import runtimes
from multum._fill import filled
from multum.core.writing import Decoding
runtimes.open({str(folder)!r}, threads=1).continued([[3, 4]], Decoding(max_new_tokens=3))
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(("runtime", "precision"), [("onnxruntime", "int8"), ("openvino", "fp32")])
def test_masked_models_say_what_torch_does(runtime: str, precision: str, tmp_path: Path) -> None:
    model, task = tiny.language_model("bert", layers=2), FillMask.from_splits(tiny.text_splits(8, 6, 4))
    facts = export(runtime, model, task, tmp_path / "out", precision)
    predictor, long = runtimes.open(tmp_path / "out", threads=1), " ".join(TEXTS * 3)
    texts = [*TEXTS, long]
    found, expected = predictor.predict(texts), masked_sums(model.module, model.tokenizer, texts)
    assert len(expected[-1]) > 2
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours[: len(theirs), 0], theirs[:, 0], rtol=1e-4 if precision == "fp32" else 0.1)
        assert ours[: len(theirs), 2].tolist() == theirs[:, 2].tolist()
        if precision == "fp32":
            assert ours[: len(theirs), 1].tolist() == theirs[:, 1].tolist()
    assert facts["kl_nats"] < (1e-6 if precision == "fp32" else 0.05)
    answers = predictor.reader.answers(found, texts, predictor.labels)
    assert answers[0]["masked_tokens"] == expected[0][:, 2].sum()
    model.save(tmp_path / "model")
    asked = ["the film was [MASK]", f"{long} [MASK]"]
    ours, theirs = (list(filled(runtimes.open(tmp_path / name, threads=1), asked)) for name in ("out", "model"))
    for one, other in zip(ours, theirs, strict=True):
        shares = [[word["score"] for word in told["masks"][0]] for told in (one, other)]
        assert shares[0] == pytest.approx(shares[1], abs=1e-4 if precision == "fp32" else 0.1)


def test_what_cannot_be_exported(tmp_path: Path) -> None:
    model, task = translators.translator("marian"), translators.translating(8, 8, 8)
    model.module.generation_config.suppress_tokens = [4]
    with pytest.raises(InputError, match="suppress_tokens, which only torch knows"):
        export("onnxruntime", model, task, tmp_path / "out", "fp32")
    with pytest.raises(InputError, match="int8-mse is for models that read; those that write take fp32, int8, int4"):
        export("onnxruntime", model, task, tmp_path / "out", "int8-mse")
    assert not (tmp_path / "out").exists()


def test_from_the_command_line(tmp_path: Path) -> None:
    model, task = translators.translator("marian", layers=1, spread=2.0), translators.translating(8, 8, 8)
    model.module.generation_config.max_new_tokens = 8
    model.save(tmp_path / "m", {"task": "translation"})
    for name in ("train", "validation", "test"):
        rows = zip(task.sources[name], task.references[name], strict=True)
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps({"source": a, "target": b}) for a, b in rows))
    data = tmp_path / "data"
    data.mkdir()
    for name in ("train", "validation", "test"):
        (tmp_path / f"{name}.jsonl").rename(data / f"{name}.jsonl")
    out = str(tmp_path / "m" / "onnxruntime-fp32")
    done = CliRunner().invoke(
        app, ["export", str(tmp_path / "m"), "--to", "onnxruntime", "-o", out, "--precision", "fp32", "--data", str(data)]
    )
    assert done.exit_code == 0, done.output
    ours, theirs = (
        json.loads(CliRunner().invoke(app, ["predict", folder, "film and tree", "--json", "--threads", "1"]).stdout)[0]
        for folder in (out, str(tmp_path / "m"))
    )
    assert ours["answer"] == theirs["answer"]
    assert ours["tokens"] == theirs["tokens"]
    assert ours["generation"] == theirs["generation"]
