"""Tagging: entities and their F1 against seqeval, alignment of words and tokens, training, teaching, measuring, predicting."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import taggers
import tiny
import torch
from datasets import ClassLabel, Dataset, Features, List, Value
from transformers import AutoModelForTokenClassification
from typer.testing import CliRunner

from multum import cli, runtimes
from multum._measure import measure
from multum.core.reading import together
from multum.core.teacher_tokens import cached_token_outputs
from multum.core.words import Words, best_tags, entities, first_tokens, words_of
from multum.data import open_task
from multum.errors import InputError
from multum.steps._outputs import softened_kl
from multum.steps.distill import Distill
from multum.steps.finetune import Finetune
from multum.steps.trim_vocabulary import TrimVocabulary
from multum.tasks.token_classification import TokenClassification

STEP = Finetune(epochs=12, learning_rate=5e-3, batch_size=16, precision="fp32")
EARLY = ("train", "validation", "test")


def drawn(prefixes: str, seed: int) -> list[list[str]]:
    rng = random.Random(seed)
    tags = ["O"] * 2 + [f"{prefix}-{kind}" for prefix in prefixes for kind in ("PER", "LOC", "MISC-X")]
    return [[rng.choice(tags) for _ in range(rng.randint(1, 12))] for _ in range(60)]


def task_of(truth: list[list[str]]) -> TokenClassification:
    rows = Dataset.from_list([{"tokens": [f"w{i}-{j}" for j in range(len(tags))], "tags": tags} for i, tags in enumerate(truth)])
    return TokenClassification.from_splits(type("S", (), {**dict.fromkeys(EARLY, rows), "notes": [], "fingerprints": {}}))


@pytest.mark.parametrize(
    ("prefixes", "precision", "recall", "f1"),
    [  # seqeval 1.2.2, default mode, on the same tags
        ("BI", 0.6788617886178862, 0.6816326530612244, 0.680244399185336),
        ("I", 0.6288659793814433, 0.6009852216748769, 0.6146095717884131),
        ("BIES", 0.7307692307692307, 0.7058823529411765, 0.7181102362204725),
    ],
)
def test_f1_is_that_of_seqeval(prefixes: str, precision: float, recall: float, f1: float) -> None:
    truth, rng = drawn(prefixes, 1), random.Random(2)
    guess = [[tag if rng.random() < 0.7 else rng.choice(tags) for tag in tags] for tags in truth]
    task = task_of(truth)
    place = {label: index for index, label in enumerate(task.labels)}
    logits = together([np.eye(len(place), dtype=np.float32)[[place[tag] for tag in tags]] for tags in guess])
    quality = task.score(logits, "test")
    assert (quality.metric, quality.n) == ("f1", 60)
    assert quality.value == pytest.approx(f1, abs=1e-12)
    assert quality.others["precision"] == pytest.approx(precision, abs=1e-12)
    assert quality.others["recall"] == pytest.approx(recall, abs=1e-12)
    pairs = [(a, b) for one, other in zip(truth, guess, strict=True) for a, b in zip(one, other, strict=True)]
    assert quality.others["accuracy"] == pytest.approx(np.mean([a == b for a, b in pairs]))
    assert quality.ci95[0] < f1 < quality.ci95[1]


@pytest.mark.parametrize(
    ("tags", "found"),
    [
        ("B-A I-A O B-A", [("A", 0, 2), ("A", 3, 4)]),
        ("I-A I-B B-B", [("A", 0, 1), ("B", 1, 2), ("B", 2, 3)]),
        ("B-A L-A U-B O", [("A", 0, 2), ("B", 2, 3)]),
        ("E-A E-A", [("A", 0, 1), ("A", 1, 2)]),
        ("A A C O A", [("A", 0, 2), ("C", 2, 3), ("A", 4, 5)]),
        ("B I I O B B I O I", [("_", 0, 3), ("_", 4, 5), ("_", 5, 7), ("_", 8, 9)]),
        ("S B E I-A B- S-", [("_", 0, 1), ("_", 1, 3), ("A", 3, 4), ("_", 4, 5), ("_", 5, 6)]),
        ("O", []),
        ("", []),
    ],
)
def test_entities(tags: str, found: list[Any]) -> None:
    assert entities(tags.split()) == found


def test_a_text_is_taken_apart_where_it_stands() -> None:
    text = "Zoë's U.S. 東京 हिन्दी, ok_1"
    words = words_of(text)
    assert [word for word, _ in words] == ["Zoë", "'", "s", "U", ".", "S", ".", "東", "京", "हिन्दी", ",", "ok", "_", "1"]
    assert all(text[start:end] == word for word, (start, end) in words)
    assert words_of(["U.S.", "", "wins"]) == [("U.S.", (0, 4)), ("", (5, 5)), ("wins", (6, 10))]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_first_token_of_a_word_carries_its_label(family: str) -> None:
    task, model = taggers.tagging(8, 2, 2), taggers.tagger(family)
    sentences = [*task.inputs("train"), ["zebra-crossings", "quicksand", "1984!"]]
    encoded = Words().encode(model.tokenizer, sentences, 64, None)
    for row, (words, places) in enumerate(zip(sentences, Words().places(encoded, sentences), strict=True)):
        assert [word for _, word in first_tokens(places)] == list(range(len(words)))
        # Every word is exactly the characters of its tokens.
        for number, word in enumerate(words):
            spans = [span for span, place in zip(encoded.encodings[row].offsets, places, strict=True) if place == number]
            assert " ".join(words)[spans[0][0] : spans[-1][1]].strip() == word
    rows = task.encode(model, "train")
    for row, tags in zip(rows, task.tags["train"], strict=True):
        assert [task.labels[label] for label in row["labels"] if label >= 0] == tags
        assert set(row["labels"]) <= {-100, *range(4)}
        assert len(row["labels"]) == len(row["input_ids"])
    blank = task.encode_texts(model, [*task.inputs("train")[:2], " ".join(task.inputs("train")[2])])
    for row, like in zip(blank, rows, strict=False):
        assert [label == -101 for label in row["labels"]] == [label >= 0 for label in like["labels"]]


def test_all_subwords_may_be_trained() -> None:
    model, words = taggers.tagger(), ["zebracrossings", "film"]
    data = Dataset.from_list([{"tokens": words, "tags": tags} for tags in (["B-X", "I-X"], ["O", "B-Y"])])
    fields = dict.fromkeys(EARLY, data)
    task = TokenClassification.from_splits(type("S", (), {**fields, "notes": [], "fingerprints": {}}))
    every = TokenClassification(**{**vars(task), "subwords": "all"})
    labels = [task.labels[i] if i >= 0 else None for i in every.encode(model, "train")["labels"][0]]
    count = len(labels) - 3
    assert count > 1
    assert labels == [None, "B-X", *["I-X"] * (count - 1), "I-X", None]
    last = every.encode(model, "train")["labels"][1]
    assert [task.labels[i] for i in last[-2:-1]] == ["B-Y"]  # no I-Y is known
    bare = TokenClassification(**{**vars(every), "labels": ("O", "B", "I"), "tags": {"train": [["B", "I"], ["O", "B"]]}})
    assert bare.encode(model, "train")["labels"][0] == [-100, 1, *[2] * count, -100]


def test_words_that_were_cut_off_count_as_outside() -> None:
    long = {"tokens": ["wonderful"] * 100, "tags": ["B-GOOD"] * 100}
    task = TokenClassification.from_splits(taggers.splits([*taggers.tagged(8), long], 4, 2))
    model = taggers.tagger()
    assert (task.truncated(model, "test"), task.truncated(model, "train")) == (1, 0)
    encoded = Words().encode(model.tokenizer, [long["tokens"]], 64, "np")
    found = Words().predictions(encoded, {"logits": np.ones((1, 64, 4), dtype=np.float32)}, [long["tokens"]])[0]
    assert found.shape == (100, 4)
    assert (~np.isnan(found[:62])).all()
    assert np.isnan(found[62:]).all()
    assert best_tags(found[60:], task.labels)[0][2:] == ["O"] * 38


def test_parts_of_speech_are_scored_word_by_word() -> None:
    task = task_of([["DET", "NOUN"], ["NOUN"], ["DET", "ADJ", "NOUN"]])
    logits = together(
        [np.eye(3, dtype=np.float32)[[1, 2]], np.eye(3, dtype=np.float32)[[1]], np.eye(3, dtype=np.float32)[[1, 0, 2]]]
    )
    quality = task.score(logits, "test")
    assert task.labels == ("ADJ", "DET", "NOUN")
    assert (quality.metric, quality.value) == ("accuracy", pytest.approx(5 / 6))
    assert "accuracy of words" in task.notes[-1]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    """A folder with a tagger before and after fine-tuning, the task, and the trained model."""
    folder, task, start = tmp_path_factory.mktemp("tagger"), taggers.tagging(240, 32, 40), taggers.tagger(layers=1)
    start.save(folder / "before")
    model = STEP(task.load(str(folder / "before")), task)
    model.save(folder / "after", {"task": task.name})
    return folder, task, model


def test_training_teaching_and_measuring(trained: Any, tmp_path: Path) -> None:
    folder, task, teacher = trained
    found = measure([folder / "before", folder / "after"], task, threads=1, rounds=2, texts_per_round=2)
    assert found[1]["quality"]["value"] > 0.8 > found[0]["quality"]["value"] + 0.3
    saved = np.load(folder / "after" / "predictions" / "test.npy")
    assert saved.shape == (40, max(map(len, task.inputs("test"))), 4)
    assert found[1]["quality"] == json.loads(json.dumps(task.score(saved, "test").to_json()))
    assert found[1]["size"]["macs_per_example"] > 0

    student = taggers.tagger(layers=1, seed=3)
    step = Distill(
        teacher=str(folder / "after"),
        alpha=1.0,
        augment=1,
        epochs=3,
        learning_rate=4e-3,
        batch_size=16,
        cache=str(tmp_path),
        precision="fp32",
    )
    assert divergence(step(student, task), teacher, task) < 0.3 * divergence(student, teacher, task)


def divergence(student: Any, teacher: Any, task: Any) -> float:
    """The mean KL over the words of the validation split."""
    total, count = 0.0, 0
    with torch.no_grad():
        for batch in task.batches(teacher, "validation", 16):
            inputs, known = {name: value for name, value in batch.items() if name != "labels"}, batch["labels"] >= 0
            values = softened_kl(student.module(**inputs).logits[known], teacher.module(**inputs).logits[known], 1.0)
            total, count = total + values.sum().item(), count + len(values)
    return total / count


def test_kept_outputs_are_those_of_one_sentence_alone(tmp_path: Path) -> None:
    task, model = taggers.tagging(10, 2, 2), taggers.tagger()
    rows = list(task.encode(model, "train"))
    cached = cached_token_outputs(model, rows, tmp_path, ["logits"], precision="fp32")
    batch = cached.batch(torch.tensor([7, 0]), 40).logits
    assert batch.shape == (2, 40, 4)
    for place, number in enumerate((7, 0)):
        ids = torch.tensor([rows[number]["input_ids"]])
        with torch.no_grad():
            alone = model.module(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
        torch.testing.assert_close(batch[place, : len(alone)], alone, rtol=1e-4, atol=1e-4)
        assert (batch[place, len(alone) :] == 0).all()
    files = set(tmp_path.iterdir())
    cached_token_outputs(model, rows, tmp_path, ["logits"], precision="fp32")
    assert set(tmp_path.iterdir()) == files


def test_predict_tells_entities_and_where_they_are(trained: Any, tmp_path: Path) -> None:
    folder, task, _ = trained
    predictor = runtimes.open(folder / "after", threads=1)
    words = task.inputs("test")[0]
    (told,) = predictor.reader.answers(predictor.predict([words]), [words], predictor.labels)
    expected = [(kind, " ".join(words[first:last])) for kind, first, last in entities(task.tags["test"][0])]
    assert [(one["entity"], one["word"]) for one in told["entities"]] == expected
    assert all(told["text"][one["start"] : one["end"]] == one["word"] for one in told["entities"])
    assert all(0.25 < one["score"] <= 1 for one in told["entities"])
    (tmp_path / "in.jsonl").write_text(json.dumps({"tokens": words}) + "\n" + json.dumps({"tokens": [*words, "film"]}) + "\n")
    (tmp_path / "in.txt").write_text(" ".join(words) + "\n")
    run = CliRunner().invoke(cli.app, ["predict", str(folder / "after"), "--input", str(tmp_path / "in.jsonl"), "--json"])
    assert json.loads(run.stdout)[0]["entities"] == told["entities"]
    run = CliRunner().invoke(cli.app, ["predict", str(folder / "after"), "--input", str(tmp_path / "in.txt")])
    assert run.stdout.startswith(f"{expected[0][1]} ({expected[0][0]} ")
    assert predictor.predict([]).shape[0] == 0


def test_labels_in_another_order_are_put_in_ours(tmp_path: Path) -> None:
    task, model = taggers.tagging(4, 2, 2), taggers.tagger()
    config = model.module.config
    config.id2label = {i: taggers.TAGS[3 - i] for i in range(4)}
    config.label2id = {label: i for i, label in config.id2label.items()}
    model.save(tmp_path / "m")
    loaded = task.load(str(tmp_path / "m"))
    batch = {key: value for key, value in next(task.batches(model, "test", 2)).items() if key != "labels"}
    with torch.no_grad():
        torch.testing.assert_close(model.module(**batch).logits.flip(-1), loaded.module(**batch).logits)
    new = AutoModelForTokenClassification.from_config(config)
    new.config.id2label = {i: str(i) for i in range(4)}
    with pytest.raises(InputError, match="the model's labels are 0, 1"):
        task.columns_for([new.config.id2label[i] for i in range(4)])


def write(path: Path, suffix: str) -> Path:
    rows = taggers.tagged(40)
    file = path / f"train.{suffix}"
    if suffix == "jsonl":
        file.write_text("\n".join(json.dumps({"words": row["tokens"], "ner_tags": row["tags"]}) for row in rows))
    elif suffix == "conll":
        lines = ["\n".join(f"{word} X {tag}" for word, tag in zip(row["tokens"], row["tags"], strict=True)) for row in rows]
        file.write_text("-DOCSTART- -X- O\n\n" + "\n\n".join(lines) + "\n")
    elif suffix == "csv":
        pd.DataFrame({key: [" ".join(row[key]) for row in rows] for key in ("tokens", "tags")}).to_csv(file, index=False)
    else:
        names = ClassLabel(names=["O", "B-GOOD", "I-GOOD", "B-BAD"])
        numbered = [{"tokens": row["tokens"], "ner_tags": [names.str2int(tag) for tag in row["tags"]]} for row in rows]
        Dataset.from_list(numbered, features=Features(tokens=List(Value("string")), ner_tags=List(names))).to_parquet(file)
    return file


@pytest.mark.parametrize("suffix", ["jsonl", "conll", "csv", "parquet"])
def test_files_of_every_kind(tmp_path: Path, suffix: str) -> None:
    task = open_task("token-classification", str(write(tmp_path, suffix)))
    assert task.labels == taggers.TAGS
    found = {tuple(words): tags for name in EARLY for words, tags in zip(task.sentences[name], task.tags[name], strict=True)}
    assert found == {tuple(row["tokens"]): row["tags"] for row in taggers.tagged(40)}


def test_a_trimmed_vocabulary_reads_the_sentences_as_before() -> None:
    task, model = taggers.tagging(12, 4, 4), taggers.tagger()
    smaller = TrimVocabulary()(model, task)
    assert smaller.module.config.vocab_size < model.module.config.vocab_size
    tokens = [[m.tokenizer.convert_ids_to_tokens(row["input_ids"]) for row in task.encode(m, "train")] for m in (model, smaller)]
    assert tokens[0] == tokens[1]


def test_leaks_and_unlabelled_sentences(tmp_path: Path) -> None:
    rows = taggers.tagged(30)
    for name, some in (("train", rows[:20]), ("test", [rows[3], *rows[20:]])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, some)))
    more = " ".join(taggers.tagged(31)[30]["tokens"])
    (tmp_path / "more.txt").write_text(f"{more}.\n{' '.join(rows[0]['tokens'])}\n")
    task = open_task("token-classification", str(tmp_path), unlabelled=str(tmp_path / "more.txt"))
    assert "train: 1 row dropped: also in the test split" in task.notes
    assert task.unlabelled == [[*more.split(), "."]]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"tokens": ["a", "b"], "tags": ["O"]}], "1 sentences have more or fewer tags than words"),
        ([{"tokens": ["a"], "tags": [1]}, {"tokens": ["b"], "tags": [0]}], "the tags are numbers"),
        ([{"tokens": [f"a{i}"], "tags": ["O"]} for i in range(20)], "have one tag"),
        ([{"sentence": "a"}], "no column 'tokens'"),
    ],
)
def test_sentences_that_cannot_be_used(tmp_path: Path, rows: list[Any], said: str) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(InputError, match=said):
        open_task("token-classification", str(tmp_path / "a.jsonl"))


def test_a_conll_file_with_a_broken_line(tmp_path: Path) -> None:
    (tmp_path / "a.conll").write_text("a O\nb\n")
    with pytest.raises(InputError, match="line 2: 1 columns"):
        open_task("token-classification", str(tmp_path / "a.conll"))
