"""Question answering: the official scores on worked cases, windows against a slow search, training, teaching, measuring, files."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import taggers
import tiny
import torch
from torch.nn import functional as F
from typer.testing import CliRunner

from multum import cli, runtimes
from multum._measure import measure
from multum.core.passages import Passages, choose, context_tokens, margin
from multum.data import open_task
from multum.errors import InputError
from multum.steps.distill import Distill
from multum.steps.finetune import Finetune
from multum.tasks._squad import exact_match, f1
from multum.tasks.question_answering import QuestionAnswering

NAN = float("nan")


@pytest.mark.parametrize(
    ("answer", "references", "exact", "share"),
    [
        ("The Eiffel Tower!", ["eiffel tower"], 1, 1),
        ("a cat", ["An  the   cat."], 1, 1),
        ("theatre", ["atre"], 0, 0),  # "the" is an article only as a word
        ("in the city of Paris", ["Paris"], 0, 2 * (1 / 4) * 1 / (1 / 4 + 1)),
        ("new york", ["york city", "New-York", "new york city"], 0, 2 * 1 * (2 / 3) / (1 + 2 / 3)),
        ("dog dog cat", ["dog cat cat"], 0, 2 / 3),  # each word counts as often as it is in both
        ("1,000", ["1000"], 1, 1),
        ("", [], 1, 1),
        ("something", [], 0, 0),
        ("", ["something"], 0, 0),
        ("the", ["a"], 1, 1),  # nothing is left of either, which is no answer
        ("x", ["!", "x"], 1, 1),
    ],
)
def test_scores_are_those_of_the_official_script(answer: str, references: list[str], exact: float, share: float) -> None:
    assert exact_match(answer, references) == exact
    assert f1(answer, references) == pytest.approx(share)


def long_pair(words: int) -> tuple[str, str]:
    vocabulary = tiny.NOUNS + tiny.FILLERS
    return "wonderful film", " ".join(vocabulary[(7 * i + i // 5) % len(vocabulary)] for i in range(words))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_best_spans_over_all_windows(family: str) -> None:
    """Against the definition: every window, every pair of its context tokens."""
    model, pairs = taggers.answerer(family), [long_pair(150), ("dull plot", "a moving story"), long_pair(60)]
    tokenizer = model.tokenizer
    encoded = Passages().encode(tokenizer, pairs, 64, "pt")
    owners = encoded["overflow_to_sample_mapping"]
    assert [len(set(owners)), owners.count(1)] == [3, 1]
    assert owners.count(0) > owners.count(2) > 1
    batch = {name: encoded[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        outputs = model.module(**batch)
    starts, ends = outputs.start_logits.numpy(), outputs.end_logits.numpy()
    found = Passages().predictions(encoded, {"start_logits": starts, "end_logits": ends}, pairs)
    for number, (_, context) in enumerate(pairs):
        spans: dict[tuple[int, int], float] = {}
        nothing = min(starts[row][0] + ends[row][0] for row, owner in enumerate(owners) if owner == number)
        covered = set()
        for row in (row for row, owner in enumerate(owners) if owner == number):
            parts, offsets = encoded.sequence_ids(row), encoded.encodings[row].offsets
            places = [place for place, part in enumerate(parts) if part == 1]
            covered |= {char for place in places for char in range(*offsets[place])}
            for i, j in itertools.product(places, places):
                if i <= j < i + 30:
                    start, end = offsets[i][0], offsets[j][1]
                    start += len(context[start:end]) - len(context[start:end].lstrip())
                    spans[start, end] = max(spans.get((start, end), -np.inf), float(starts[row][i] + ends[row][j]))
        assert {i for i, char in enumerate(context) if char != " "} <= covered
        best = max(spans.items(), key=lambda item: item[1])
        rows = found[number]
        assert rows[0].tolist() == pytest.approx([0, 0, nothing], abs=1e-5)
        assert tuple(rows[1, :2].astype(int)) == best[0]
        assert rows[1, 2] == pytest.approx(best[1], abs=1e-4)
        assert len({tuple(row[:2]) for row in rows}) == len(rows) <= 21
        assert all(spans[int(a), int(b)] == pytest.approx(score, abs=1e-4) for a, b, score in rows[1:])
        assert (np.diff(rows[1:, 2]) <= 0).all()


def test_when_a_question_has_no_answer() -> None:
    rows = np.array([[0, 0, 5.0], [3, 6, 4.0], [1, 2, 1.0]], dtype=np.float32)
    assert [choose(rows, threshold) for threshold in (None, 0.0, 0.9, 1.0, 2.0)] == [1, 0, 0, 1, 1]
    assert margin(rows) == 1
    alone = np.array([[0, 0, 5.0], [NAN, NAN, NAN]], dtype=np.float32)
    assert choose(alone, None) == choose(alone[:1], 0.0) == 0
    odds = np.exp([5.0, 4.0, 1.0])
    asked = [("who", "ab cdef")]
    (none,) = Passages(0.0).answers(rows[None], asked, [])
    assert (none["answer"], none["start"], none["end"], none["score"]) == ("", 0, 0, pytest.approx(odds[0] / odds.sum(), abs=1e-6))
    (empty,) = Passages(None).answers(alone[None], [("who", "")], [])
    assert (empty["answer"], empty["score"]) == ("", 1.0)
    (some,) = Passages(None).answers(rows[None], asked, [])
    assert (some["answer"], some["start"], some["end"]) == ("cde", 3, 6)
    assert some["score"] == pytest.approx(odds[1] / odds[1:].sum(), abs=1e-6)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_labels_are_the_tokens_of_the_answer(family: str) -> None:
    model = taggers.answerer(family)
    question, context = long_pair(120)
    answer, start = "zebra!", len(context) + 1
    context = f"{context} zebra! {long_pair(90)[1]}"
    row = {"question": question, "context": context, "answers": {"text": [answer, "zebra"], "answer_start": [start, start]}}
    open_one = {"question": question, "context": f"{context} film", "answers": {"text": [], "answer_start": []}}
    rows = [row, open_one, *taggers.asked(4)]
    task = QuestionAnswering.from_splits(taggers.splits(rows, 4, 1))
    assert (task.null_threshold, task.truncated(model, "train")) == (0.0, 0)
    encoded = Passages().encode(model.tokenizer, task.inputs("train"), 64, None)
    made = task.encode(model, "train")
    hits = 0
    for window, owner, labels in zip(encoded.encodings, encoded["overflow_to_sample_mapping"], made["labels"], strict=True):
        first, last = labels
        if (first, last) == (0, 0):
            held = [span for part, span in zip(window.sequence_ids, window.offsets, strict=True) if part == 1]
            assert owner == 1 or not (held[0][0] <= start and start + len(answer) <= held[-1][1])
        else:
            where = task.inputs("train")[owner][1][window.offsets[first][0] : window.offsets[last][1]].strip()
            assert where == (answer if owner == 0 else task.answers["train"][owner][0][0])
            hits += owner == 0
    assert 1 <= hits < len(made)
    assert max(map(len, made["input_ids"])) == 64
    assert set(map(tuple, task.encode_texts(model, task.inputs("train"))["labels"])) == {(-100, -100)}


def test_long_questions_are_cut_to_leave_room() -> None:
    model = taggers.answerer()
    pair = ("wonderful film " * 60, "a moving story")
    encoded = Passages().encode(model.tokenizer, [pair, ("short", "plot " * 100)], 64, None)
    assert encoded["overflow_to_sample_mapping"].count(0) == 1
    assert encoded.sequence_ids(0).count(0) == 32
    assert encoded.sequence_ids(0).count(1) == len(model.tokenizer(pair[1], add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_shortest_windows_have_room_for_a_context_and_what_they_share(family: str) -> None:
    tokenizer, context = taggers.answerer(family).tokenizer, "a moving story " * 40
    encoded = Passages().encode(tokenizer, [("wonderful film " * 60, context)], QuestionAnswering.least, None)
    assert len(encoded["input_ids"]) > 5
    assert {i for row in encoded.encodings for place in context_tokens(row) for i in range(*row.offsets[place])} >= {
        i for i, sign in enumerate(context) if sign != " "
    }


def test_the_loss_is_that_of_transformers_whatever_else_is_in_the_batch() -> None:
    task, model, alone = taggers.answering(8, 2, 2), taggers.answerer(), []
    for size in (1, 8):
        for batch in task.batches(model, "train", size):
            inputs = {name: value for name, value in batch.items() if name != "labels"}
            with torch.no_grad():
                outputs = model.module(**inputs, start_positions=batch["labels"][:, 0], end_positions=batch["labels"][:, 1])
            loss = task.loss(outputs, batch).item()
            if size == 1 and batch["attention_mask"].all():
                assert loss == pytest.approx(outputs.loss.item(), rel=1e-6)
            alone += [loss] if size == 1 else []
    assert not batch["attention_mask"].all()
    assert loss == pytest.approx(sum(alone) / len(alone), rel=1e-5)


def test_every_reference_counts_wherever_it_stands() -> None:
    """As in the official script: a part of one that the context has in other words is worth what they share."""
    rows = [{**row, "answers": {"text": ["moving", "zebra moving"], "answer_start": [2, -1]}} for row in taggers.asked(3)]
    task = QuestionAnswering.from_splits(
        taggers.splits([{**row, "context": f"a moving zebra {number}"} for number, row in enumerate(rows)], 1, 1)
    )
    whole = task.score(np.array([[[0, 0, 0.0], [2, 14, 1.0]]], dtype=np.float32), "test")
    assert (whole.value, whole.others["exact_match"]) == (1.0, 0.0)
    assert task.encode(taggers.answerer(), "train")["labels"][0][0] > 0


def test_quality_of_both_kinds_of_questions() -> None:
    task = taggers.answering(30, 6, 20, unanswerable=True)
    rows = []
    for (_, context), known in zip(task.inputs("test"), task.answers["test"], strict=True):
        start = context.index(known[0][0]) if known else 0
        end = start + (len(known[0][0]) if known else 4)
        rows.append([[0, 0, 1.0 if known else 2.0], [start, end, 1.5], [0, 1, 1.0]])
    perfect = task.score(np.array(rows, dtype=np.float32), "test")
    assert (perfect.metric, perfect.value, perfect.n, perfect.ci95) == ("f1", 1.0, 20, (1.0, 1.0))
    assert perfect.others == {"exact_match": 1.0, "f1_answerable": 1.0, "f1_unanswerable": 1.0}
    silent = task.score(np.array([[[0, 0, 9.0], *row[1:]] for row in rows], dtype=np.float32), "test")
    share = np.mean([not known for known in task.answers["test"]])
    assert silent.value == silent.others["exact_match"] == pytest.approx(share)
    assert (silent.others["f1_answerable"], silent.others["f1_unanswerable"]) == (0.0, 1.0)
    assert silent.ci95[0] < share < silent.ci95[1]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    """A folder with a model before and after fine-tuning, the task, and the trained model."""
    folder, task, start = tmp_path_factory.mktemp("answerer"), taggers.answering(300, 32, 40), taggers.answerer(layers=2)
    start.save(folder / "before")
    step = Finetune(epochs=14, learning_rate=3e-3, batch_size=16, precision="fp32")
    model = step(task.load(str(folder / "before")), task)
    model.save(folder / "after", {"task": task.name})
    return folder, task, model


def test_training_teaching_and_measuring(trained: Any, tmp_path: Path) -> None:
    folder, task, teacher = trained
    found = measure([folder / "before", folder / "after"], task, threads=1, rounds=2, texts_per_round=2)
    assert found[1]["quality"]["value"] > 0.8 > found[0]["quality"]["value"] + 0.3
    assert found[1]["truncated"] == 0
    saved = np.load(folder / "after" / "predictions" / "test.npy")
    assert found[1]["quality"] == json.loads(json.dumps(task.score(saved, "test").to_json()))

    student = taggers.answerer(layers=2, seed=3)
    step = Distill(teacher=str(folder / "after"), alpha=0.5, epochs=4, learning_rate=3e-3, cache=str(tmp_path), precision="fp32")
    assert divergence(step(student, task), teacher, task) < 0.6 * divergence(student, teacher, task)


def divergence(student: Any, teacher: Any, task: Any) -> float:
    """The mean KL of the starts on the validation split."""
    total = []
    with torch.no_grad():
        for batch in task.batches(teacher, "validation", 16):
            inputs = {name: value for name, value in batch.items() if name != "labels"}
            hidden = ~batch["attention_mask"].bool()
            p, q = (m.module(**inputs).start_logits.masked_fill(hidden, -1e9).log_softmax(-1) for m in (teacher, student))
            total.append(F.kl_div(q, p, log_target=True, reduction="batchmean").item())
    return float(np.mean(total))


def test_predict_from_the_command_line_and_a_file(trained: Any, tmp_path: Path) -> None:
    folder, task, _ = trained
    pairs = list(task.inputs("test")[:3])
    predictor = runtimes.open(folder / "after", threads=1)
    told = predictor.reader.answers(predictor.predict(pairs), pairs, predictor.labels)
    assert all(one["context"][one["start"] : one["end"]] == one["answer"] != "" for one in told)
    assert all(0 < one["score"] <= 1 for one in told)
    (tmp_path / "in.jsonl").write_text("\n".join(json.dumps({"question": q, "passage": c}) for q, c in pairs))
    asked = ["predict", str(folder / "after"), "--input", str(tmp_path / "in.jsonl"), "--columns", "context=passage"]
    run = CliRunner().invoke(cli.app, [*asked, "--json"])
    assert [one["answer"] for one in json.loads(run.stdout)] == [one["answer"] for one in told]
    nested = [{"context": c, "qas": [{"id": f"q{n}", "question": q, "answers": []}]} for n, (q, c) in enumerate(pairs)]
    (tmp_path / "in.json").write_text(json.dumps({"data": [{"paragraphs": nested}]}))
    again = CliRunner().invoke(cli.app, ["predict", str(folder / "after"), "--input", str(tmp_path / "in.json"), "--json"])
    assert json.loads(again.stdout) == [{"id": f"q{n}", **one} for n, one in enumerate(json.loads(run.stdout))]
    run = CliRunner().invoke(cli.app, ["predict", str(folder / "after"), pairs[0][0], "--pair", pairs[0][1]])
    assert run.stdout == f"{told[0]['answer']}\t{told[0]['score']:.3f}\t{pairs[0][0]}\n"
    with pytest.raises(InputError, match="--pair"):
        predictor.predict(["no context"])


NESTED = {
    "version": "v2.0",
    "data": [
        {
            "title": f"article {n}",
            "paragraphs": [
                {
                    "context": f"  Number {n} is red. It was made in {1900 + n}.",
                    "qas": [
                        {
                            "id": f"{n}a",
                            "question": "When?",
                            "answers": [{"text": str(1900 + n), "answer_start": 37 + len(str(n))}],
                        },
                        {"id": f"{n}b", "question": "Why?", "answers": [], "is_impossible": True, "plausible_answers": []},
                    ],
                }
            ],
        }
        for n in range(12)
    ],
}


def test_the_nested_form_and_splits_that_share_no_context(tmp_path: Path) -> None:
    (tmp_path / "squad.json").write_text(json.dumps(NESTED))
    task = open_task("question-answering", str(tmp_path / "squad.json"))
    contexts = {name: {context for _, context in task.inputs(name)} for name in ("train", "validation", "test")}
    assert sum(map(len, contexts.values())) == len(set.union(*contexts.values())) == 12
    assert all(contexts.values())
    assert sum(len(task.inputs(name)) for name in contexts) == 24
    assert any("each context in one split" in note for note in task.notes)
    for name in contexts:
        for (question, context), known in zip(task.inputs(name), task.answers[name], strict=True):
            assert context == context.strip()
            assert bool(known) == (question == "When?")
            assert all(context[start : start + len(text)] == text for text, start in known)


def flat(count: int) -> list[dict[str, Any]]:
    return taggers.asked(count)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet", "csv"])
def test_flat_files(tmp_path: Path, suffix: str) -> None:
    rows, file = flat(30), tmp_path / f"train.{suffix}"
    if suffix == "jsonl":
        file.write_text("\n".join(map(json.dumps, rows)))
    elif suffix == "parquet":
        pd.DataFrame(rows).to_parquet(file)
    else:
        pd.DataFrame([{**row, "answers": json.dumps(row["answers"])} for row in rows]).to_csv(file, index=False)
    task = open_task("question-answering", str(file))
    found = {
        pair: known
        for name in ("train", "validation", "test")
        for pair, known in zip(task.pairs[name], task.answers[name], strict=True)
    }
    assert found == {
        (row["question"], row["context"]): [(row["answers"]["text"][0], row["answers"]["answer_start"][0])] for row in rows
    }
    assert task.null_threshold is None


def test_answers_that_are_not_in_the_context_are_counted_shown_and_left_out(tmp_path: Path) -> None:
    rows = flat(30)
    for number in range(4):
        rows[number]["answers"] = {"text": [f"missing {number}"], "answer_start": [0]}
    rows[4]["answers"] = {
        "text": ["missing 4", *rows[4]["answers"]["text"]],
        "answer_start": [0, 0],
    }  # one of two, in the wrong place
    rows[5]["answers"] = rows[5]["answers"]["text"][0]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = open_task("question-answering", str(tmp_path))
    note = next(note for note in task.notes if "left out" in note)
    assert note == "train: 4 questions left out: no answer occurs in the context: 'missing 0', 'missing 1', 'missing 2'"
    found = {
        pair: known
        for name in ("train", "validation", "test")
        for pair, known in zip(task.pairs[name], task.answers[name], strict=True)
    }
    assert len(found) == 26
    for row, beside in zip(rows[4:6], ([("missing 4", -1)], []), strict=True):
        (text, start), *others = found[row["question"], row["context"]]
        assert others == beside
        assert row["context"][start : start + len(text)] == text


def test_answers_may_be_numbers_and_places_missing(tmp_path: Path) -> None:
    """As csv files have them: pandas makes numbers of a column of years, and of a place that is not known no number."""
    (tmp_path / "a.csv").write_text(
        "question,context,answers\n" + "".join(f"When?,It was {1900 + n}.,{1900 + n}\n" for n in range(9))
    )
    task = open_task("question-answering", str(tmp_path / "a.csv"))
    assert all(
        known == [(context[7:11], 7)] for (_, context), known in zip(task.pairs["train"], task.answers["train"], strict=True)
    )
    rows = [
        {"question": "When?", "context": f"In {n}", "answers": {"text": str(n), "answer_start": float("nan")}} for n in range(9)
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = open_task("question-answering", str(tmp_path / "a.jsonl"))
    assert {known[0][1] for known in task.answers["train"]} == {3}


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"question": "a", "context": "b", "answers": True}], "row 1: answers must be like"),
        ([{"question": "a", "context": "b", "answers": {"text": ["b"], "answer_start": ["x"]}}], "row 1: answers must be like"),
        ([{"question": "a", "context": "b", "answers": {"text": ["b"], "answer_start": [0, 1]}}], "row 1: answers must be like"),
        ([{"question": "a", "context": "b"}], "no column 'answers'"),
        ([{"question": f"a{i}", "context": "b", "answers": []} for i in range(9)], "all rows have the same context"),
        (
            [{"question": "a", "context": f"b{i}", "answers": []} for i in range(9)],
            "no question of the training split has an answer",
        ),
    ],
)
def test_questions_that_cannot_be_used(tmp_path: Path, rows: list[Any], said: str) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(InputError, match=said):
        open_task("question-answering", str(tmp_path / "a.jsonl"))


@pytest.mark.parametrize(
    ("content", "said"),
    [('{"data": 3}', "list of objects"), ('{"data": [{"paragraphs": [{}]}]}', "form of SQuAD"), ('{"data"', "line 1")],
)
def test_nested_files_that_are_none(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(InputError, match=said):
        open_task("question-answering", str(tmp_path / "a.json"))


def test_open_questions_that_no_model_learns_about_are_noted() -> None:
    rows = [*taggers.asked(8), {"question": "a", "context": "b", "answers": {"text": [], "answer_start": []}}]
    task = QuestionAnswering.from_splits(taggers.splits(rows, 4, 2))
    assert task.null_threshold is None
    assert task.notes == ("test: 1 questions have no answer, but every training question has one: no model learns to say so",)
