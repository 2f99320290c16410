"""Every kind of file, every kind of mistake: rows are used, dropped with a note, or refused with what would be right."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pytest
import tiny

from multum.data import Splits, cut, open_task, read, sizes
from multum.errors import InputError

COLUMNS, OPTIONAL, KEYS = ("text", "label"), ("text_pair",), ("text", "text_pair")


def rows(count: int = 40, start: int = 0) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "text": [f"text number {i}" for i in range(start, start + count)],
            "label": ["good" if i % 2 else "bad" for i in range(count)],
        }
    )


def load(path: Path | str, **options: object) -> Splits:
    return read(str(path), COLUMNS, optional=OPTIONAL, keys=KEYS, stratify="label", **options)


def refused(path: Path | str, **options: object) -> str:
    with pytest.raises(InputError) as caught:
        load(path, **options)
    return str(caught.value)


def texts(splits: Splits) -> dict[str, set[str]]:
    return {name: set(getattr(splits, name)["text"]) for name in ("train", "validation", "test")}


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet"])
def test_formats_give_the_same_rows(tmp_path: Path, suffix: str) -> None:
    table, path = rows(), tmp_path / f"reviews.{suffix}"
    table.loc[0, "text"] = 'commas, "quotes"\nand a line break, ünïcode 文'
    if suffix == "jsonl":
        path.write_text("\n".join(json.dumps(row) for row in table.to_dict("records")), encoding="utf-8")
    elif suffix == "parquet":
        table.to_parquet(path)
    else:
        table.to_csv(path, index=False, sep="\t" if suffix == "tsv" else ",")
    assert set.union(*texts(load(path)).values()) == set(table["text"])


def test_made_splits_are_disjoint_stratified_and_seeded(tmp_path: Path) -> None:
    path = tmp_path / "all.csv"
    table = rows(200)
    table["label"] = ["rare" if i % 10 == 0 else "common" for i in range(200)]
    table.to_csv(path, index=False)
    first, again, other = load(path), load(path), load(path, seed=1)
    found = texts(first)
    assert sum(len(part) for part in found.values()) == len(set.union(*found.values())) == 200
    for name in found:
        labels = getattr(first, name)["label"]
        assert list(labels).count("rare") == pytest.approx(len(labels) / 10, abs=1)
    assert first.fingerprints == again.fingerprints != other.fingerprints
    assert any("made from the training rows" in note for note in first.notes)


def test_given_splits_are_kept_and_missing_ones_made(tmp_path: Path) -> None:
    rows(60).to_csv(tmp_path / "train.csv", index=False)
    rows(10, 100).to_csv(tmp_path / "dev.csv", index=False)
    splits = load(tmp_path)
    assert texts(splits)["validation"] == set(rows(10, 100)["text"])
    assert len(splits.train) + len(splits.test) == 60


def test_leaks_leave_the_earlier_split(tmp_path: Path) -> None:
    rows(60).to_csv(tmp_path / "train.csv", index=False)
    rows(10, 50).to_csv(tmp_path / "validation.csv", index=False)
    test = rows(8, 55)
    test["text"] = test["text"].str.upper() + "  "  # the same to a reader
    test.to_csv(tmp_path / "test.csv", index=False)
    splits = load(tmp_path)
    assert [len(splits.train), len(splits.validation), len(splits.test)] == [50, 5, 8]
    assert "train: 5 rows dropped: also in the test split" in splits.notes
    assert "validation: 5 rows dropped: also in the test split" in splits.notes


def test_unusable_rows_are_dropped_and_counted(tmp_path: Path) -> None:
    table = rows(40)
    table.loc[0, "text"] = None
    table.loc[1, "text"] = "   "
    table.loc[2, "label"] = None
    table.loc[4, "text"] = table.loc[6, "text"]
    table.loc[[4, 6], "label"] = "bad"
    table.loc[[8, 9], "text"] = "contested"
    table.to_csv(tmp_path / "a.csv", index=False)
    splits = load(tmp_path / "a.csv")
    assert sum(len(part) for part in texts(splits).values()) == 40 - 2 - 1 - 1 - 2
    notes = "\n".join(splits.notes)
    for part in (
        "2 rows dropped: empty text",
        "1 row dropped: no label",
        "1 row dropped: repeats",
        "2 rows dropped: the same text",
    ):
        assert part in notes


def test_words_that_mean_missing_elsewhere_are_words_here(tmp_path: Path) -> None:
    table = rows(40)
    table.loc[0, "text"], table.loc[1, "text"] = "NA", "null"
    table.to_csv(tmp_path / "a.csv", index=False)
    assert {"NA", "null"} <= set.union(*texts(load(tmp_path / "a.csv")).values())


def test_columns_are_mapped_and_pairs_kept(tmp_path: Path) -> None:
    table = rows().rename(columns={"text": "premise", "label": "stars"}).assign(hypothesis="so it is")
    table.to_csv(tmp_path / "a.csv", index=False)
    mapping = {"text": "premise", "text_pair": "hypothesis", "label": "stars"}
    assert set(load(tmp_path / "a.csv", mapping=mapping).train.column_names) == {"text", "text_pair", "label"}


def test_hub_sets_go_the_same_way(monkeypatch: pytest.MonkeyPatch) -> None:
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])})
    table = {"text": list(rows()["text"]), "label": [i % 2 for i in range(39)] + [-1]}
    found = datasets.DatasetDict({"train": datasets.Dataset.from_dict(table, features=features)})
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *names: asked.append(names) or found)
    splits = load("hf:someone/reviews:small")
    assert asked == [("someone/reviews", "small")]
    assert set(splits.train["label"]) == {"bad", "good"}
    assert "1 row dropped: no label" in "\n".join(splits.notes)


def test_hub_sets_that_are_no_use_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    found = datasets.DatasetDict({"test": datasets.Dataset.from_dict({"text": ["a"], "label": ["good"]})})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: found)
    with pytest.raises(InputError, match="no train split; it has: test"):
        load("hf:someone/reviews")

    def damaged(*_: object) -> None:
        raise datasets.exceptions.DatasetGenerationError("a file is damaged")

    monkeypatch.setattr(datasets, "load_dataset", damaged)
    with pytest.raises(InputError, match="cannot load this data set: a file is damaged"):
        load("hf:someone/reviews")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("none.csv", None, "no such file"),
        ("empty.csv", b"", "is empty"),
        ("header.csv", b"text,label\n", "has no rows"),
        ("latin.csv", "text,label\ncaf\xe9,good\n".encode("latin-1"), "not UTF-8"),
        ("quotes.tsv", b'text\tlabel\n"A fine\tgood\nnext\tbad\n"Bad" film\tbad\n', "quotes.tsv, line 2: a quote opens a text"),
        ("broken.csv", b'text,label\na,good\nb,c,d,e\n"x', "a quote opens a text"),
        ("broken.jsonl", b'{"text": "a", "label": 1}\n{"text": ', "line 2"),
        ("list.jsonl", b"[1, 2]\n", "line 1"),
        ("broken.parquet", b"PAR1 not really", "cannot be read"),
        ("reviews.xlsx", b"PK", ".csv"),
        ("columns.csv", b"review,stars\na,1\n", "it has: review, stars"),
        ("blank.csv", b"text,label\n ,good\n,bad\n", "no usable row"),
    ],
)
def test_bad_files_are_refused_with_what_would_be_right(tmp_path: Path, name: str, content: bytes | None, said: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    message = refused(path)
    assert said in message
    assert name in message


def test_all_problems_are_listed_at_once(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("review,stars\na,1\n")
    message = refused(tmp_path / "a.csv", mapping={"text": "body", "score": "stars"})
    assert all(part in message for part in ("'score'", "'body'", "'label'", "3 problems"))


def test_a_folder_without_train_is_refused(tmp_path: Path) -> None:
    rows().to_csv(tmp_path / "test.csv", index=False)
    assert "no train file" in refused(tmp_path)
    rows().to_csv(tmp_path / "train.csv", index=False)
    rows().to_json(tmp_path / "train.jsonl", orient="records", lines=True)
    assert "several files for train" in refused(tmp_path)


def test_too_rare_labels_are_named(tmp_path: Path) -> None:
    table = rows()
    table.loc[0, "label"] = "once"
    table.to_csv(tmp_path / "a.csv", index=False)
    assert "'once' (1)" in refused(tmp_path / "a.csv")


def test_labels_that_a_task_cannot_use(tmp_path: Path) -> None:
    table = rows()
    table["label"] = "good"
    table.to_csv(tmp_path / "one.csv", index=False)
    with pytest.raises(InputError, match="one label"):
        open_task("text-classification", str(tmp_path / "one.csv"))
    folder = tmp_path / "splits"
    folder.mkdir()
    rows().to_csv(folder / "train.csv", index=False)
    unseen = rows(6, 100)
    unseen.loc[0, "label"] = "surprise"
    unseen.to_csv(folder / "test.csv", index=False)
    with pytest.raises(InputError, match="'surprise' appears in the test split only"):
        open_task("text-classification", str(folder))


# -- texts without labels --------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Splits of 40, 10 and 10 rows that are texts number 0 to 59."""
    path = tmp_path / "splits"
    path.mkdir()
    for name, count, start in (("train", 40, 0), ("validation", 10, 40), ("test", 10, 50)):
        rows(count, start).to_csv(path / f"{name}.csv", index=False)
    return path


def open_with(folder: Path, unlabelled: Path, **options: object) -> Any:
    return open_task("text-classification", str(folder), unlabelled=str(unlabelled), **options)


@pytest.mark.parametrize("suffix", ["txt", "csv", "tsv", "jsonl", "parquet"])
def test_unlabelled_texts_are_new_ones_and_what_is_left_out_is_counted(folder: Path, suffix: str) -> None:
    path, new = folder / f"more.{suffix}", ["something new", "ünïcode 文", "and more"]
    texts = [*new, "", "  ", "AND  more", "text number 3", "Text   number 41", "text number 55", "text number 56"]
    if suffix == "txt":
        path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    elif suffix == "jsonl":
        path.write_text("\n".join(json.dumps({"text": text, "id": 1}) for text in texts), encoding="utf-8")
    elif suffix == "parquet":
        pd.DataFrame({"text": texts}).to_parquet(path)
    else:
        pd.DataFrame({"id": 1, "text": texts}).to_csv(path, index=False, sep="\t" if suffix == "tsv" else ",")
    task, plain = open_with(folder, path), open_task("text-classification", str(folder))
    assert task.unlabelled == new
    assert plain.unlabelled == ()
    assert [note for note in task.notes if note not in plain.notes] == [
        "unlabelled: 2 rows dropped: empty text",
        "unlabelled: 1 row dropped: repeats an earlier row",
        "unlabelled: 2 rows dropped: also in the test split",
        "unlabelled: 1 row dropped: also in the validation split",
        "unlabelled: 1 row dropped: also in the train split",
    ]
    assert task.inputs("train") == plain.inputs("train")
    assert sizes(task) == {"train": 40, "validation": 10, "test": 10, "unlabelled": 3}
    assert "unlabelled" not in sizes(plain)


def test_unlabelled_texts_are_part_of_what_the_data_is(folder: Path) -> None:
    path, other = folder / "more.txt", folder / "other.txt"
    path.write_text("one\ntwo\n")
    other.write_text("one\ntwo\nthree\n")
    first, again, third = open_with(folder, path), open_with(folder, path), open_with(folder, other)
    assert first.fingerprints == again.fingerprints
    assert {key for key in first.fingerprints if first.fingerprints[key] != third.fingerprints[key]} == {"unlabelled"}
    assert set(open_task("text-classification", str(folder)).fingerprints) == {"train", "validation", "test"}


def test_unlabelled_columns_have_the_datas_names_or_the_tasks(folder: Path) -> None:
    for name in ("train", "validation", "test"):
        table = pd.read_csv(folder / f"{name}.csv").rename(columns={"text": "review"})
        table.to_csv(folder / f"{name}.csv", index=False)
    for name in ("review", "text"):
        pd.DataFrame({name: ["brand new"], "stars": [3]}).to_csv(folder / "more.csv", index=False)
        assert open_with(folder, folder / "more.csv", columns={"text": "review"}).unlabelled == ["brand new"]


def test_unlabelled_pairs(tmp_path: Path) -> None:
    table = rows(60).assign(text_pair=[f"other {i}" for i in range(60)])
    table.to_csv(tmp_path / "pairs.csv", index=False)
    more = pd.DataFrame({"text": ["text number 1", "text number 1"], "text_pair": ["other 1", "other 2"]})
    more.to_csv(tmp_path / "more.csv", index=False)
    task = open_with(tmp_path / "pairs.csv", tmp_path / "more.csv")
    assert task.unlabelled == [("text number 1", "other 2")]
    (tmp_path / "more.txt").write_text("a line\n")
    with pytest.raises(InputError, match="one text a line, but the data has the columns text, text_pair"):
        open_with(tmp_path / "pairs.csv", tmp_path / "more.txt")
    more[["text"]].to_csv(tmp_path / "half.csv", index=False)
    with pytest.raises(InputError, match=r"half\.csv: no column 'text_pair'; it has: text"):
        open_with(tmp_path / "pairs.csv", tmp_path / "half.csv")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("none.txt", None, "is not there"),
        ("splits", None, "is a folder"),
        ("empty.txt", b"", "is empty"),
        ("blank.txt", b" \n\n", "is empty"),
        ("latin.txt", "caf\xe9\n".encode("latin-1"), "not UTF-8"),
        ("latin.csv", "text\ncaf\xe9\n".encode("latin-1"), "not UTF-8"),
        ("list.jsonl", b"[1, 2]\n", "line 1"),
        ("more.docx", b"PK", ".txt file with one text a line"),
        ("columns.csv", b"review,stars\na,1\n", "no column 'text'; it has: review, stars"),
        ("known.txt", b"text number 3\ntext number 55\n", "no text is left"),
    ],
)
def test_bad_unlabelled_files_are_one_error(folder: Path, name: str, content: bytes | None, said: str) -> None:
    path = folder.parent / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        open_with(folder, path)
    assert said in str(caught.value)
    assert name in str(caught.value)


@pytest.mark.parametrize("more", [1, 2])
def test_rows_with_more_fields_than_the_header_names_are_no_index(tmp_path: Path, more: int) -> None:
    """pandas makes the first field the rows' names without a word, and the text becomes the label."""
    path = tmp_path / "reviews.csv"
    path.write_text(
        "text,label\n" + "".join(f"a film, {i}{', too' * (more - 1)},{'good' if i % 2 else 'bad'}\n" for i in range(20))
    )
    said = refused(path)
    assert f"the first row has {2 + more} fields, and the header names 2" in said
    assert "in quotes" in said
    assert "none at the end of rows" in said


def test_too_few_rows_for_three_splits(tmp_path: Path) -> None:
    path = tmp_path / "two.csv"
    pd.DataFrame({"text": ["one", "two"]}).to_csv(path, index=False)
    with pytest.raises(InputError, match="2 usable rows are too few") as caught:
        read(str(path), ["text"], keys=["text"])
    assert "3 are the least" in str(caught.value)


def test_texts_longer_than_the_model_reads_are_counted() -> None:
    task = tiny.task(n_train=8)
    model = tiny.model()
    assert cut(task, model) == []
    long = [" ".join(["film"] * 200), *task.texts["test"][1:]]
    (sentence,) = cut(replace(task, texts={**task.texts, "test": long}), model)
    assert sentence == f"test: 1 text is longer than the model's {task.length_limit(model)} tokens and cut"


def test_a_column_that_holds_no_labels_is_not_read_out(tmp_path: Path) -> None:
    """Texts where labels were expected: the message names some, cut, and says what may be wrong."""
    rows = [{"text": f"text {number}", "label": f"a long opinion, number {number}, " + "and so on " * 9} for number in range(300)]
    pd.DataFrame(rows).to_csv(tmp_path / "data.csv", index=False)
    with pytest.raises(InputError, match=r"and 292 more.*no labels.*--columns label=COLUMN") as error:
        open_task("text-classification", str(tmp_path / "data.csv"))
    assert len(str(error.value)) < 1000
