"""pretrain: the stream, the objectives against loops written out, resuming, and tokenizers out of text."""

from __future__ import annotations

import math
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch.nn import functional as F

from multum import errors
from multum.core import new_tokenizer
from multum.core.corpus import Blocks, Corpus, Objective
from multum.core.model import Model
from multum.core.new_tokenizer import train_tokenizer
from multum.core.packing import separator_of
from multum.core.reporting import listening
from multum.core.task import IGNORED
from multum.core.training import fit
from multum.errors import InputError
from multum.steps import pretrain
from multum.steps.pretrain import Pretrain

TEXTS = tiny.passages(60)
TASK: Any = None
"""The step reads no data of a task."""
CAUSAL, MASKED = Objective(False), Objective(True)


@pytest.fixture
def books(tmp_path: Path) -> Path:
    """Three files, one in a folder of its own, in a folder whose name could be taken for a pattern."""
    folder = tmp_path / "books [1]"
    (folder / "more").mkdir(parents=True)
    for name, part in (("a.txt", TEXTS[:20]), ("b.TXT", TEXTS[20:40]), ("more/c.txt", TEXTS[40:])):
        (folder / name).write_text("\n\n".join(part) + "\n", encoding="utf-8")
    return folder


def stream(blocks: Blocks, count: int) -> list[dict[str, Any]]:
    return list(islice(iter(blocks), count))


def tokens_of(model: Model, texts: list[str]) -> list[int]:
    end = separator_of(model.tokenizer)
    return [token for text in texts for token in [*model.tokenizer(text, add_special_tokens=False)["input_ids"], end]]


@pytest.mark.parametrize("unit", ["paragraph", "line", "file"])
def test_a_folder_is_read_in_documents(unit: Any, books: Path) -> None:
    texts = list(Corpus.of(str(books), unit).texts())
    if unit == "file":
        assert texts == ["\n\n".join(TEXTS[start : start + 20]) + "\n" for start in (0, 20, 40)]
    else:
        assert [text.strip() for text in texts if text.strip()] == TEXTS
    shuffled = Corpus.of(str(books), unit, shuffle=100, seed=3)
    first, again, second = (list(shuffled.texts(epoch)) for epoch in (0, 0, 1))
    assert first == again != second
    assert sorted(first) == sorted(second) == sorted(texts)


def test_no_token_is_lost_or_changed_pass_after_pass(books: Path) -> None:
    model = tiny.language_model("gpt2")
    rows = stream(Blocks(Corpus.of(str(books)), model.tokenizer, 32, CAUSAL), 200)
    assert all(len(row["input_ids"]) == 32 and row["labels"] == row["input_ids"] for row in rows)
    once = tokens_of(model, [*TEXTS[:19], TEXTS[19] + "\n", *TEXTS[20:39], TEXTS[39] + "\n", *TEXTS[40:59], TEXTS[59] + "\n"])
    found = [token for row in rows for token in row["input_ids"]]
    assert len(found) > 2 * len(once)
    assert found == (once * 4)[: len(found)]


def test_masks_are_drawn_anew_in_every_pass_and_the_same_for_a_seed(books: Path) -> None:
    model = tiny.language_model("bert")
    made = [stream(Blocks(Corpus.of(str(books), seed=seed), model.tokenizer, 32, MASKED), 200) for seed in (0, 0, 1)]
    assert made[0] == made[1] != made[2]
    content = []
    for row in made[0]:
        ids = [token if label == IGNORED else label for token, label in zip(row["input_ids"], row["labels"], strict=True)]
        assert (len(ids), ids[0], ids[-1]) == (32, model.tokenizer.cls_token_id, model.tokenizer.sep_token_id)
        content += ids[1:-1]
    once = tokens_of(model, TEXTS)
    assert content == (once * 4)[: len(content)]
    asked = sum(label != IGNORED for row in made[0] for label in row["labels"])
    assert asked / len(content) == pytest.approx(0.15, abs=0.02)


def test_whole_words_are_hidden_whole(books: Path) -> None:
    tokenizer = tiny.language_model("bert").tokenizer
    (books / "a.txt").write_text(" ".join(f"{a}{b}" for a in tiny.GOOD for b in tiny.NOUNS), encoding="utf-8")

    def broken(whole_words: bool) -> int:
        """How often a word is hidden in part."""
        rows = stream(Blocks(Corpus.of(str(books / "a.txt")), tokenizer, 32, Objective(True, whole_words=whole_words)), 50)
        found = 0
        for row in rows:
            asked = [label != IGNORED for label in row["labels"]]
            ids = [token if label == IGNORED else label for token, label in zip(row["input_ids"], row["labels"], strict=True)]
            pieces = tokenizer.convert_ids_to_tokens(ids)
            found += sum(pieces[i].startswith("##") and i > 1 and asked[i] != asked[i - 1] for i in range(len(ids)))
        return found

    assert broken(whole_words=True) == 0 < broken(whole_words=False)


@torch.no_grad()
def test_documents_that_do_not_see_each_other_have_the_losses_they_have_alone(books: Path) -> None:
    model = tiny.language_model("llama", positions=2048)
    (row,) = stream(Blocks(Corpus.of(str(books)), model.tokenizer, 512, Objective(False, apart=True)), 1)
    batch = {name: torch.tensor([values]) for name, values in row.items()}
    total, count, rest = 0.0, 0, row["input_ids"]
    while rest:
        size = rest.index(2) + 1 if 2 in rest else len(rest)
        document, rest = torch.tensor([rest[:size]]), rest[size:]
        if size > 1:
            total += float(F.cross_entropy(model.module(document).logits[0, :-1], document[0, 1:], reduction="sum"))
            count += size - 1
    assert float(pretrain.causal_loss(model.module, batch)) == pytest.approx(total / count, abs=1e-5)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_the_loss_of_a_step_is_transformers_own(family: str, books: Path) -> None:
    model = tiny.language_model(family)
    rows = stream(Blocks(Corpus.of(str(books)), model.tokenizer, 64, MASKED if family == "bert" else CAUSAL), 8)
    with torch.no_grad():
        own = model.module(**{name: torch.tensor([row[name] for row in rows]) for name in rows[0]}).loss
    step = Pretrain(text=str(books), steps=1, batch_size=8, shuffle=0, learning_rate=1e-9, precision="fp32")
    for part in model.module.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    entry = step(model, TASK).history[-1]
    assert entry["training"]["loss"] == pytest.approx(float(own), abs=1e-4)
    assert (entry["tokens"], entry["block"], entry["files"]) == (8 * 64, 64, 3)
    assert entry["bytes"] == sum(file.stat().st_size for file in books.rglob("*.*"))


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_resumed_it_comes_to_the_same_weights(family: str, books: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"text": str(books), "steps": 6, "batch_size": 4, "block": 32, "precision": "fp32", "save_every": 3}
    model = tiny.language_model(family)
    whole = Pretrain(**options)(model, TASK)
    kept = Pretrain(checkpoints=str(tmp_path / "kept"), **options)
    said: list[str] = []
    calls = 0

    def until_interrupted(_: torch.nn.Module) -> None:
        nonlocal calls
        calls += 1
        if calls == 5:  # two steps after a checkpoint
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "fit", lambda *args, **kwargs: fit(*args, after_step=until_interrupted, **kwargs))
        with pytest.raises(KeyboardInterrupt), listening(lambda share: None, said.append):
            kept(model, TASK)
    with listening(lambda share: None, said.append):
        resumed = kept(model, TASK)
    for name, value in whole.module.state_dict().items():
        assert torch.allclose(value, resumed.module.state_dict()[name], rtol=0, atol=1e-6), name
    assert calls == 5
    place = str(tmp_path / "kept" / "checkpoint-3")
    assert said == [f"{place} is kept: the same command goes on from there", f"goes on from {place}"]


def test_resumed_it_takes_the_tokenizer_that_its_weights_know(books: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kept with the checkpoint, and trained anew where there is no checkpoint yet."""
    options: dict[str, Any] = {"text": str(books), "steps": 6, "batch_size": 4, "block": 32, "precision": "fp32", "save_every": 3}
    options |= {"start": "scratch", "tokenizer": "wordpiece", "vocabulary": 120, "shuffle": 0}
    model, kept = tiny.language_model("bert", layers=1), tmp_path / "kept"
    step, trained, calls = Pretrain(checkpoints=str(kept), **options), [], 0

    def counted(read: Any, *args: Any, **kwargs: Any) -> Any:
        trained.append(len(list(read())))
        return train_tokenizer(read, *args, **kwargs)

    def interrupted(after: int) -> Any:
        def stop(_: torch.nn.Module) -> None:
            nonlocal calls
            calls += 1
            if calls == after:
                raise KeyboardInterrupt

        return lambda *args, **kwargs: fit(*args, after_step=stop, **kwargs)

    monkeypatch.setattr(pretrain, "train_tokenizer", counted)
    for after in (2, 5):  # before the first checkpoint, and behind it
        calls = 0
        with monkeypatch.context() as patch:
            patch.setattr(pretrain, "fit", interrupted(after))
            with pytest.raises(KeyboardInterrupt):
                step(model, TASK)
    assert len(trained) == 2
    whole = Pretrain(**options)(model, TASK)
    monkeypatch.setattr(pretrain, "train_tokenizer", lambda *_, **__: pytest.fail("trained again"))
    resumed = step(model, TASK)
    assert resumed.tokenizer("a really wonderful film") == whole.tokenizer("a really wonderful film")
    assert resumed.tokenizer.backend_tokenizer.to_str() == whole.tokenizer.backend_tokenizer.to_str()
    assert resumed.tokenizer.model_max_length == whole.tokenizer.model_max_length
    assert resumed.tokenizer.special_tokens_map == whole.tokenizer.special_tokens_map
    for name, value in whole.module.state_dict().items():
        assert torch.allclose(value, resumed.module.state_dict()[name], rtol=0, atol=1e-6), name


def loss_on(model: Model, texts: list[str]) -> float:
    from multum.core.sentences import causal_sums, masked_sums

    sums = causal_sums if model.module.config.model_type != "bert" else masked_sums
    tables = sum(table.sum(0) for table in sums(model.module, model.tokenizer, texts))
    return float(tables[0] / tables[1 if sums is causal_sums else 2])


@pytest.mark.parametrize(("family", "kind"), [("llama", "bpe"), ("bert", "wordpiece")])
def test_from_nothing_but_text_it_learns(family: str, kind: Any, books: Path, tmp_path: Path) -> None:
    """A new tokenizer and random weights; afterwards new texts are likelier than if all tokens were equally so."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    step = Pretrain(
        text=str(books),
        steps=60,
        batch_size=8,
        block=32,
        start=sizes,
        tokenizer=kind,
        vocabulary=320,
        learning_rate=2e-2,
        precision="fp32",
    )
    model = step(tiny.language_model(family), TASK)
    assert len(model.tokenizer) == model.module.config.vocab_size <= 320
    assert model.module.config.hidden_size == 16
    assert model.new_weights == ()
    assert loss_on(model, tiny.passages(10, seed=9)) < 0.75 * math.log(len(model.tokenizer))
    model.save(tmp_path / "m")
    auto = "AutoModelForCausalLM" if family == "llama" else "AutoModelForMaskedLM"
    again = Model.load(tmp_path / "m", auto_class=auto)
    assert again.fingerprint() == model.fingerprint()
    assert loss_on(again, TEXTS[:3]) == pytest.approx(loss_on(model, TEXTS[:3]), abs=1e-6)


@pytest.mark.parametrize("around", [False, True])
@pytest.mark.parametrize("kind", ["bpe", "wordpiece"])
def test_a_tokenizer_from_text(kind: Any, around: bool) -> None:
    made, *same = (train_tokenizer(lambda: iter(TEXTS), kind, 300, longest=64, around=around) for _ in range(5))
    assert {made.backend_tokenizer.to_str()} == {each.backend_tokenizer.to_str() for each in same}
    assert len(made) <= 300
    assert made.model_max_length == 64
    text = "a really wonderful film, Zürich 1984!"
    ids = made(text)["input_ids"]
    assert made.mask_token_id is not None
    if kind == "bpe":
        assert made.decode(ids, skip_special_tokens=True) == text  # any bytes
    else:
        assert made.decode(made("wonderful film").input_ids, skip_special_tokens=True) == "wonderful film"
    assert (ids[0] == made.cls_token_id and ids[-1] == made.sep_token_id) == around
    separator_of(made)
    with pytest.raises(InputError, match="the characters of the text alone take"):
        train_tokenizer(lambda: iter(TEXTS), "wordpiece", 20, longest=64, around=around)


def test_more_letters_than_it_knows_are_left_away_in_an_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library breaks ties between equally frequent letters by chance, anew every time."""
    monkeypatch.setattr(new_tokenizer, "LETTERS", 40)
    rare = "".join(map(chr, range(0x3B1, 0x3B1 + 17))) + "中文字"
    texts = ["aaa bbb", "ab \t\x07", " ".join(rare), *(f"{letter}{letter}" for letter in reversed(rare)), "\u0436\u0449\u0431" * 2]
    texts += ["".join(map(chr, range(0x561, 0x561 + 30)))]
    made, *same = (train_tokenizer(lambda: iter(texts), "wordpiece", 300, longest=64, around=False) for _ in range(5))
    assert [each.get_vocab() for each in same] == [made.get_vocab()] * 4
    tokens = set(made.get_vocab())
    assert tokens >= {"a", "##a", "b", "aaa", *rare, "##α"}
    assert not tokens & {" ", "\t", "\x07", "##中"}
    armenian = {chr(each) for each in range(0x561, 0x561 + 30)}
    assert tokens & armenian == set(sorted(armenian)[: 40 - 2 - len(rare) - 3])


def test_a_classifier_keeps_its_head(books: Path) -> None:
    model, task = tiny.model("bert"), tiny.task(8, 4, 4)
    after = Pretrain(text=str(books), steps=2, batch_size=4, block=16)(model, task)
    assert type(after.module) is type(model.module)
    for name, value in after.module.state_dict().items():
        same = torch.equal(value, model.module.state_dict()[name])
        assert same == (name.startswith("classifier") or "pooler" in name), name


@pytest.mark.parametrize(
    ("family", "fields", "said"),
    [
        ("bert", {"apart": True}, "apart is for causal models"),
        ("gpt2", {"whole_words": True}, "whole_words is for masked models"),
        ("gpt2", {"block": 128}, "reads 64 at most"),
        ("gpt2", {"text": "nowhere"}, "no such file or folder"),
    ],
)
def test_what_does_not_fit_is_refused(family: str, fields: dict[str, Any], said: str, books: Path) -> None:
    with pytest.raises(InputError, match=said):
        Pretrain(**{"text": str(books), "steps": 1, **fields})(tiny.language_model(family), TASK)


def test_files_are_looked_at_before_any_work(books: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errors, "_PIECE", 7)  # pieces end within characters
    (books / "a.txt").write_text("Grüße aus Zürich. " * 9, encoding="utf-8")
    assert Corpus.of(str(books / "a.txt")).bytes == (books / "a.txt").stat().st_size
    (books / "a.txt").write_bytes(b"a text with a zero \0 in it")
    assert Corpus.of(str(books / "a.txt")).bytes == 26
    (books / "a.txt").write_bytes(b"abcdefghijkl caf\xe9 noir")
    (books / "b.txt").write_bytes("caf\u00e9".encode()[:-1])
    with pytest.raises(InputError) as caught:
        Corpus.of(str(books))
    assert ["byte 16" in caught.value.problems[0], "byte 3" in caught.value.problems[1]] == [True, True]
    for file in books.rglob("*.*"):
        file.write_text("")
    with pytest.raises(InputError, match="all files are empty"):
        Corpus.of(str(books))
    (books / "a.txt").write_text(" \n\n \n")
    with pytest.raises(InputError, match="no text in the files"):
        next(iter(Blocks(Corpus.of(str(books)), tiny.language_model("gpt2").tokenizer, 8, CAUSAL)))


def test_wrong_fields_are_all_named() -> None:
    with pytest.raises(InputError) as caught:
        Pretrain(text="", steps=0, block=9, save_every=0, tokenizer="bpe", vocabulary=10, learning_rate=2.0)
    assert len(caught.value.problems) == 7
