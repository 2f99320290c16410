"""translation end to end: data, encoding, the loss, generation, BLEU, measuring, the command line, and teaching token by token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import sacrebleu
import tiny
import torch
import translators
from typer.testing import CliRunner

from multum import runtimes
from multum._measure import measure
from multum.cli import app
from multum.core.generation import Writing, as_numbers, settings_of, texts_of, tokens_of, write
from multum.core.model import Model
from multum.core.reading import together
from multum.core.task import Quality
from multum.data import open_task
from multum.errors import InputError
from multum.steps.distill import Distill
from multum.steps.finetune import Finetune
from multum.tasks.translation import Translation

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def taught() -> tuple[Model, Translation]:
    """A tiny model that has learnt to translate."""
    task = translators.translating(n_train=600)
    step = Finetune(epochs=14, batch_size=16, learning_rate=5e-3, precision="fp32")
    return step(translators.translator(), task), task


@pytest.mark.parametrize("family", translators.FAMILIES)
def test_loss_and_rows_are_those_of_the_model_itself(family: str) -> None:
    task, model = translators.translating(), translators.translator(family)
    batch = dict(next(task.batches(model, "train", 8)))
    assert len({len(row["labels"]) for row in task.encode(model, "train")}) > 1
    with torch.no_grad():
        own = model.module(**{name: batch[name] for name in ("input_ids", "attention_mask", "labels")})
        ours = model.module(**{name: value for name, value in batch.items() if name != "labels"})
    counts = batch["labels"] >= 0
    assert torch.allclose(ours.logits[counts], own.logits[counts], atol=1e-5)
    assert torch.allclose(task.loss(ours, batch), own.loss, atol=1e-6)
    for calibration in task.calibration(model, 8):
        with torch.no_grad():
            assert model.module(**calibration).logits.isfinite().all()


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("family", translators.FAMILIES)
def test_what_is_written_is_the_most_probable_and_its_score_is_right(family: str, beams: int) -> None:
    """Greedily by a slow loop without a cache; with beams the score alone, by one text at a time."""
    model = translators.translator(family, spread=3.0)
    model.module.generation_config.max_new_tokens, model.module.generation_config.num_beams = 9, beams
    sources = [source for source, _ in translators.sentences(5, seed=3)]
    found = write(model.module, model.tokenizer, sources, batch_size=2, scored=True)
    for source, one in zip(sources, found, strict=True):
        ids, written, total = model.tokenizer(source, return_tensors="pt"), [0], 0.0
        with torch.no_grad():
            followed = model.module.generate(**ids, use_cache=False)[0].tolist() if beams > 1 else []
            while len(written) <= 9 and 1 not in written:
                logs = model.module(**ids, decoder_input_ids=torch.tensor([written])).logits[0, -1].log_softmax(-1)
                if beams > 1 and len(written) == len(followed):
                    break
                token = followed[len(written)] if beams > 1 else int(logs.argmax())
                total += float(logs[token])
                written.append(token)
        assert one.text == model.tokenizer.decode(written[1:], skip_special_tokens=True)
        if 0 not in written[1:]:  # padding that a model writes is no part of the text
            assert one.tokens == len(written) - 1
            assert one.score == pytest.approx(total / one.tokens, abs=1e-4)
    assert [one.text for one in write(model.module, model.tokenizer, sources)] == [one.text for one in found]
    assert all(np.isnan(one.score) for one in write(model.module, model.tokenizer, sources))


def test_beams_find_what_is_more_probable_than_greedy() -> None:
    model = translators.translator(spread=4.0)
    sources = [source for source, _ in translators.sentences(24, seed=5)]
    config = model.module.generation_config
    config.max_new_tokens, config.length_penalty = 6, 0.0
    sums = []
    for beams in (1, 6):
        config.num_beams = beams
        sums.append([one.score * one.tokens for one in write(model.module, model.tokenizer, sources, scored=True)])
    assert np.mean(sums[1]) > np.mean(sums[0])


def test_settings_are_made_whole_once_and_recorded() -> None:
    model = translators.translator()
    config = model.module.generation_config
    config.max_length, config.num_beams = 20, 4
    expected = {"num_beams": 4, "max_new_tokens": 19, "length_penalty": 1.0}
    assert settings_of(model.module) == settings_of(model.module) == expected
    config.max_new_tokens = 500
    assert settings_of(model.module)["max_new_tokens"] == translators.POSITIONS


def test_texts_survive_as_numbers() -> None:
    texts = ["", "a b", "名前 𝄞 ü", "x" * 50]
    array = translators.predictions(texts)
    assert array.dtype == np.float32
    assert texts_of(array) == texts
    assert tokens_of(array).tolist() == [1, 3, 4, 2]


def test_bleu_is_that_of_sacrebleu_and_the_interval_that_of_other_sentences() -> None:
    task = translators.translating(n_test=60)
    truth = list(task.references["test"])
    rng = np.random.default_rng(0)
    texts = [" ".join(w if rng.random() < 0.8 else "falsch" for w in text.split()) for text in truth]
    quality = task.score(translators.predictions(texts), "test")
    expected = sacrebleu.corpus_bleu(texts, [truth])
    assert (quality.metric, quality.n) == ("bleu", 60)
    assert quality.value == pytest.approx(expected.score)
    assert quality.others["chrf"] == pytest.approx(sacrebleu.corpus_chrf(texts, [truth]).score)
    assert quality.others["signature"].startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")
    drawn = []
    for _ in range(400):
        chosen = rng.integers(0, 60, 60)
        drawn.append(sacrebleu.corpus_bleu([texts[i] for i in chosen], [[truth[i] for i in chosen]]).score)
    assert quality.ci95 == pytest.approx(np.percentile(drawn, [2.5, 97.5]), abs=2.0)
    assert task.score(translators.predictions(truth), "test").value == pytest.approx(100)
    worse = Quality(metric="bleu", value=quality.value - 1.5, ci95=(0, 1), n=60)
    assert task.drop(quality, worse) == pytest.approx(1.5)
    assert task.drop_of({"quality": quality.to_json()}, {"quality": worse.to_json()}) == pytest.approx(1.5)


def test_languages_without_spaces_are_compared_by_characters() -> None:
    made = translators.splits(8, 4, 4)
    made.test = made.test.map(lambda row: {"target": "这 是 一 本 旧 书"})
    quality = Translation.from_splits(made).score(translators.predictions(["这是一本旧书"] * 4), "test")
    assert quality.value == pytest.approx(100)
    assert "tok:zh" in quality.others["signature"]


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sacrebleu.metrics", None)
    task = translators.translating()
    with pytest.raises(InputError, match=r"sacrebleu is needed.*multum\[generation\]"):
        task.score(translators.predictions(list(task.references["test"])), "test")


def test_training_teaches_to_translate_and_the_folder_is_measured(taught: Any, tmp_path: Path) -> None:
    model, task = taught
    model.save(tmp_path / "m")
    again = task.load(str(tmp_path / "m"))
    again.save(tmp_path / "m")
    (metrics,) = measure([tmp_path / "m"], task, threads=1, rounds=2, texts_per_round=4)
    assert metrics["quality"]["metric"] == "bleu"
    assert metrics["quality"]["value"] > 80
    untaught = write(translators.translator().module, model.tokenizer, list(task.inputs("test")))
    before = task.score(together([as_numbers(one) for one in untaught]), "test")
    assert before.value < 20
    assert metrics["generation"] == {"num_beams": 1, "max_new_tokens": 12, "length_penalty": 1.0}
    speed = metrics["speed"]
    assert 3 <= speed["written_tokens"]["p50"] <= 8
    # A text's tokens by its seconds: of the order of what medians tell.
    assert speed["tokens_per_s"] == pytest.approx(1e3 * speed["written_tokens"]["p50"] / speed["p50_ms"], rel=0.7)
    saved = np.load(tmp_path / "m" / "predictions" / "test.npy")
    assert texts_of(saved) == [one.text for one in write(model.module, model.tokenizer, list(task.inputs("test")))]
    # The parameters of the module are all that ships beside the tokenizer and the settings.
    predictor = runtimes.find("pytorch").open(tmp_path / "m", threads=1)
    assert {path.name for path in predictor.files} >= {"generation_config.json", "model.safetensors", "tokenizer.json"}


def test_predict_answers_with_text_and_score(taught: Any, tmp_path: Path) -> None:
    model, _ = taught
    model.save(tmp_path / "m")
    pairs = translators.sentences(3, seed=11)
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"source": source}) + "\n" for source, _ in pairs), encoding="utf-8")
    done = CliRunner().invoke(app, ["predict", str(tmp_path / "m"), "--input", str(tmp_path / "in.jsonl"), "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    expected = write(model.module, model.tokenizer, [source for source, _ in pairs], scored=True)
    assert [one["answer"] for one in found] == [one.text for one in expected]
    assert [one["score"] for one in found] == pytest.approx([one.score for one in expected], abs=1e-4)
    shown = CliRunner().invoke(app, ["predict", str(tmp_path / "m"), pairs[0][0]])
    assert shown.stdout.split("\t")[0] == expected[0].text
    with pytest.raises(InputError, match="no pairs"):
        Writing().encode(model.tokenizer, [("a", "b")], 8, None)


@pytest.mark.parametrize("family", ["marian", "t5"])
def test_a_student_is_taught_token_by_token(family: str, tmp_path: Path) -> None:
    """α 0 is fine-tuning without dropout; more of a teacher is something else."""
    task, model = translators.translating(), translators.translator(family)
    model.save(tmp_path / "teacher")
    common: dict[str, Any] = {"epochs": 1, "batch_size": 16, "learning_rate": 1e-3, "precision": "fp32"}
    taught = Distill(teacher=str(tmp_path / "teacher"), alpha=0.0, cache=str(tmp_path / "c"), **common)(model, task)
    for part in model.module.modules():
        for name in ("p", "dropout"):  # T5's attention keeps a number of its own
            if isinstance(getattr(part, name, None), float):
                setattr(part, name, 0.0)
    alone = Finetune(**common)(model, task)
    assert taught.fingerprint() == alone.fingerprint()
    more = Distill(teacher=str(tmp_path / "teacher"), alpha=1.0, cache=str(tmp_path / "c"), **common)(model, task)
    assert more.fingerprint() not in (alone.fingerprint(), model.fingerprint())
    with pytest.raises(InputError, match=r"this model writes.*distill_generation"):
        Distill(teacher=str(tmp_path / "teacher"), augment=1, cache=str(tmp_path / "c"), **common)(model, task)


def test_prefixes_and_settings_of_the_task_ship_with_the_model(tmp_path: Path) -> None:
    model = translators.translator("t5")
    known = {"translation_en_to_de": {"prefix": "translate: "}, "summarization": {"prefix": "x "}}
    model.module.config.task_specific_params = known
    model.save(tmp_path / "m")
    task = translators.translating(beams=2, length_penalty=0.6, max_new_tokens=7)
    task.load(str(tmp_path / "m")).save(tmp_path / "n")
    again = translators.translating().load(str(tmp_path / "n"))
    expected = {"num_beams": 2, "max_new_tokens": 7, "length_penalty": 0.6, "prefix": "translate: "}
    assert settings_of(again.module) == expected
    first = again.tokenizer("translate:")["input_ids"][0]
    assert {row["input_ids"][0] for row in task.encode(again, "test")} == {first}
    predictor = runtimes.find("pytorch").open(tmp_path / "n", threads=1)
    source = task.inputs("test")[0]
    assert predictor.lengths([source]) == [len(task.encode(again, "test")[0]["input_ids"])]


def test_data_is_cleaned_and_nested_columns_are_found(tmp_path: Path) -> None:
    pairs = translators.sentences(40)
    rows = [{"id": str(i), "translation": {"en": source, "de": target}} for i, (source, target) in enumerate(pairs)]
    rows += [{"id": "x", "translation": {"en": "no target", "de": ""}}, {"id": "y", "translation": {"en": " ", "de": "leer"}}]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    pd.DataFrame(rows).to_parquet(tmp_path / "d.parquet")
    names = {"source": "translation.de", "target": "translation.en"}
    for file in ("d.jsonl", "d.parquet"):
        task = open_task("translation", str(tmp_path / file), columns=names, options={"beams": 2})
        assert task.beams == 2
        back = {target: source for source, target in pairs}
        assert all(task.references["test"][i] == back[source] for i, source in enumerate(task.inputs("test")))
        assert {"1 row dropped: empty source", "1 row dropped: empty target"} <= set(task.notes)
    with pytest.raises(InputError, match=r"no column 'source'; it has: id, translation.en, translation.de"):
        open_task("translation", str(tmp_path / "d.jsonl"))


def test_files_side_by_side_are_read_line_by_line(tmp_path: Path) -> None:
    pairs = translators.sentences(40)
    for split, some in (("train", pairs[:20]), ("valid", pairs[20:30]), ("test", pairs[30:])):
        for number, ending in enumerate(("en", "de")):
            (tmp_path / f"{split}.{ending}").write_text("".join(pair[number] + "\n" for pair in some), encoding="utf-8")
    task = open_task("translation", str(tmp_path), columns={"source": "de", "target": "en"})
    assert list(zip(task.references["validation"], task.inputs("validation"), strict=True)) == pairs[20:30]
    with pytest.raises(InputError, match="no column 'source'; it has: de, en"):
        open_task("translation", str(tmp_path))
    with (tmp_path / "valid.de").open("a", encoding="utf-8") as file:
        file.write("gut\n")
    (tmp_path / "test.en").write_text("\n".join(english for english, _ in pairs[31:]), encoding="utf-8")
    with pytest.raises(InputError) as caught:
        open_task("translation", str(tmp_path), columns={"source": "de", "target": "en"})
    assert [problem.partition("; ")[2] for problem in caught.value.problems] == [
        "valid.de has 11, valid.en has 10",
        "test.de has 10, test.en has 9",
    ]
    (tmp_path / "train.en").write_bytes("müde".encode("latin-1"))
    with pytest.raises(InputError, match=r"train.en is not UTF-8 \(byte 1\)"):
        open_task("translation", str(tmp_path))


def test_bad_settings_and_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        translators.translating(beams=0, max_new_tokens=0)
    assert len(caught.value.problems) == 2
    with pytest.raises(InputError, match="length_penalty"):
        translators.translating(beams=1, length_penalty=2.0)
    tiny.language_model("llama").save(tmp_path / "llama")
    with pytest.raises(InputError, match=r"is no encoder-decoder \(llama\), which translation takes"):
        translators.translating().load(str(tmp_path / "llama"))
    model = translators.translator()
    model.tokenizer.eos_token = model.tokenizer.pad_token = None
    model.save(tmp_path / "m")
    with pytest.raises(InputError) as caught:
        translators.translating().load(str(tmp_path / "m"))
    assert len(caught.value.problems) == 2
