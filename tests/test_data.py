"""Every kind of file, every kind of mistake: rows are used, dropped with a note, or refused with what would be right."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pandas as pd
import pytest

from multum.data import Splits, open_task, read
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


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("none.csv", None, "no such file"),
        ("empty.csv", b"", "is empty"),
        ("header.csv", b"text,label\n", "has no rows"),
        ("latin.csv", "text,label\ncaf\xe9,good\n".encode("latin-1"), "not UTF-8"),
        ("broken.csv", b'text,label\na,good\nb,c,d,e\n"x', "well-formed"),
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
