"""Variants of texts: seeded, counted, made of the texts' own words or of those that a masked language model puts in."""

from __future__ import annotations

import json
import logging
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import BertConfig, BertForMaskedLM, RobertaConfig, RobertaForMaskedLM

from multum.core import infilling
from multum.core.augment import INFILLED, augment, transfer_texts
from multum.core.infilling import LIKELIEST, MASKED, NEVER, cached_infill, infill, load
from multum.core.model import Model
from multum.errors import InputError
from multum.steps.distill import Distill

TEXTS = list(tiny.task(n_train=60).inputs("train"))
PAIRS = list(zip(TEXTS[:30], TEXTS[30:], strict=True))


def test_equal_seeds_give_equal_variants() -> None:
    assert augment(TEXTS, 3, seed=1) == augment(TEXTS, 3, seed=1)
    assert augment(TEXTS, 3, seed=1) != augment(TEXTS, 3, seed=2)


@pytest.mark.parametrize("copies", [0, 1, 5])
def test_every_text_has_its_variants_in_order(copies: int) -> None:
    variants = augment(TEXTS, copies)
    assert len(variants) == copies * len(TEXTS)
    vocabulary = {word for text in TEXTS for word in text.split()}
    for text in variants:
        assert isinstance(text, str)
        assert text.strip()
        assert set(text.split()) <= vocabulary


def test_variants_vary() -> None:
    variants = augment(TEXTS, 4)
    changed = sum(variant != TEXTS[index // 4] for index, variant in enumerate(variants))
    assert changed > 0.7 * len(variants)
    assert len(set(variants)) > 0.7 * len(variants)


def test_in_a_pair_one_side_is_varied_and_the_other_kept() -> None:
    pairs = list(zip(TEXTS[:30], TEXTS[30:], strict=True))
    variants = augment(pairs, 4)
    varied = [0, 0]
    for index, variant in enumerate(variants):
        old = pairs[index // 4]
        assert isinstance(variant, tuple)
        assert variant[0] == old[0] or variant[1] == old[1]
        varied[0] += variant[0] != old[0]
        varied[1] += variant[1] != old[1]
    assert min(varied) > 20


def test_single_words_and_scripts_without_spaces() -> None:
    assert all(augment(["good", "bad"], 20))
    text = "这部电影的故事非常感人，演员的表演也很出色，值得一看。"
    variants = augment([text], 20)
    assert any(variant != text for variant in variants)
    assert not any(" " in variant for variant in variants)
    mixed = augment(["Netflix 上的 original series 很好看，我喜欢 very much"], 40)
    assert any("original series" in variant for variant in mixed)
    assert any("好看" in variant for variant in mixed)


def test_nothing_gives_nothing() -> None:
    assert augment([], 3) == []


# -- words put in by a masked language model -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def filler() -> Model:
    """A masked language model with random weights, spread wide enough that it has preferences."""
    tokenizer = tiny.model().tokenizer
    torch.manual_seed(3)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
    config = BertConfig(
        **sizes, max_position_embeddings=tiny.POSITIONS, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id
    )
    module = BertForMaskedLM(config)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6.0)
    return Model(module=module.eval(), tokenizer=tokenizer, source="tiny-filler")


@pytest.fixture(scope="module")
def folder(filler: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fillers") / "filler"
    filler.save(path)
    return path


def by_loops(logits: list[float], allowed: list[int], original: int, draw: float) -> int:
    """The likeliest words but the one that stood there, and the first whose cumulated odds are above the draw."""
    best = sorted((token for token in allowed if token != original), key=lambda token: -logits[token])[:LIKELIEST]
    weights = [float(torch.tensor(logits[token] - logits[best[0]], dtype=torch.float64).exp()) for token in best]
    total = 0.0
    for token, weight in zip(best, weights, strict=True):
        total += weight / sum(weights)
        if total > draw:
            return token
    return best[-1]


@pytest.mark.parametrize("texts", [TEXTS, PAIRS], ids=["texts", "pairs"])
def test_gaps_are_filled_as_one_text_at_a_time_would_be(filler: Model, texts: list[Any]) -> None:
    words, kinds = infilling._vocabulary(filler)
    rng = random.Random(5)
    expected = []
    for text in texts:
        gaps = infilling._mask(filler, text, kinds, rng)
        with torch.no_grad():
            logits = filler.module(**{name: torch.tensor([row]) for name, row in gaps.row.items()}).logits[0]
        ids = list(gaps.row["input_ids"])
        for position, original, draw in zip(gaps.positions, gaps.originals, gaps.draws, strict=True):
            assert ids[position] == filler.tokenizer.mask_token_id
            allowed = [token for token in range(len(words)) if kinds[token] == kinds[original]]
            ids[position] = by_loops(logits[position].tolist(), allowed, original, draw)
        ends = [place for place, token in enumerate(ids) if token == filler.tokenizer.sep_token_id]
        parts = [filler.tokenizer.decode(ids[a + 1 : b]) for a, b in zip([0, *ends], ends, strict=False)]
        expected.append(parts[0] if len(parts) == 1 else tuple(parts))
    assert infill(filler, texts, 5, precision="fp32") == expected


def test_infilling_is_seeded_and_changes_a_share_of_the_words(filler: Model) -> None:
    made = infill(filler, TEXTS * 5, 1)
    assert made == infill(filler, TEXTS * 5, 1)
    assert infill(filler, TEXTS[:7], 1, precision="fp32") == infill(filler, TEXTS * 5, 1, precision="fp32")[:7]
    assert made != infill(filler, TEXTS * 5, 2)
    changed = [sum(a != b for a, b in zip(old.split(), new.split(), strict=True)) for old, new in zip(TEXTS * 5, made, strict=True)]
    assert min(changed) >= 1
    words = sum(len(text.split()) for text in TEXTS * 5)
    # At least one word of every text makes it a little more than the share; 4 standard deviations to the other side.
    assert MASKED - 4 * (MASKED * (1 - MASKED) / words) ** 0.5 < sum(changed) / words < 2 * MASKED


def test_what_is_not_replaced_stays_letter_by_letter(filler: Model) -> None:
    text = "  A WONDERFUL film,\tand (really)  quite MOVING & tender! 1984; zebrastripes [MASK]\n"
    word = re.compile(r"[^\W_]+")
    for new in infill(filler, [text] * 40, 0):
        assert isinstance(new, str)
        assert word.split(new) == word.split(text)
        olds, news = word.findall(text), word.findall(new)
        assert olds[-2:] == news[-2:]  # of several tokens, and no word at all
        assert all(a == b or b in filler.tokenizer.get_vocab() for a, b in zip(olds, news, strict=True))


def test_in_a_pair_one_side_is_infilled_and_what_lies_beyond_the_model_stays(filler: Model) -> None:
    sides = [0, 0]
    for old, new in zip(PAIRS, infill(filler, PAIRS, 0), strict=True):
        assert isinstance(new, tuple)
        assert (old[0] == new[0]) != (old[1] == new[1])
        sides[old[1] != new[1]] += 1
    assert min(sides) > 5
    (long,) = infill(filler, ["a wonderful film " * 60], 0)
    assert isinstance(long, str)
    assert long.split()[tiny.POSITIONS :] == ("a wonderful film " * 60).split()[tiny.POSITIONS :]
    assert len(long.split()) == 180


def test_a_text_of_no_words_stays_as_it_is(filler: Model) -> None:
    assert infill(filler, ["!!! ...", "", "zebrastripes"], 0) == ["!!! ...", "", "zebrastripes"]
    assert infill(filler, [], 0) == []


def test_words_are_replaced_by_their_kind_only() -> None:
    """Byte-level: a word after a space by a word with one, so that the text can be read again."""
    tokenizer = tiny.model("roberta").tokenizer
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = RobertaConfig(**sizes, max_position_embeddings=tiny.POSITIONS + 2, vocab_size=len(tokenizer) + 3, pad_token_id=1)
    model = Model(module=RobertaForMaskedLM(config).eval(), tokenizer=tokenizer, source="tiny-roberta")
    kinds = infilling._vocabulary(model)[1]
    assert (kinds[len(tokenizer) :] == NEVER).all()  # rows of padding
    vocabulary = tokenizer.get_vocab()
    assert kinds[vocabulary["Ġfilm"]] == kinds[vocabulary["Ġscript"]] != kinds[vocabulary["a"]]
    assert kinds[vocabulary["<mask>"]] == kinds[vocabulary["!"]] == NEVER
    old = ["the", "film", "was", "wonderful", "and", "the", "acting", "superb"]
    seen = 0
    for text in infill(model, [" ".join(old)] * 20, 0):
        assert isinstance(text, str)
        for before, after in zip(old[1:], text.split(" ")[1:], strict=True):
            assert after == before or f"Ġ{after}" in vocabulary
            seen += after != before
    assert seen > 10


def test_infilled_texts_are_kept_and_damage_is_found(
    filler: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = cached_infill(filler, PAIRS, 0, tmp_path / "cache")
    (path,) = (tmp_path / "cache").iterdir()
    assert cached_infill(filler, PAIRS, 1, tmp_path / "cache") != made
    assert len(list((tmp_path / "cache").iterdir())) == 2
    with monkeypatch.context() as patch:
        patch.setattr(infilling, "infill", None)
        assert cached_infill(filler, PAIRS, 0, tmp_path / "cache") == made == infill(filler, PAIRS, 0)
    sound = path.read_text()
    other = json.dumps(json.loads(sound) | {"texts": [["not", "this"]] * len(PAIRS)})
    for damaged in (sound[:100], "[]", "{}", other, json.dumps({"texts": [], "digest": ""})):
        path.write_text(damaged)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert cached_infill(filler, PAIRS, 0, tmp_path / "cache") == made
        assert "damaged" in caplog.text
        assert path.read_text() == sound


def test_models_that_cannot_fill_gaps_are_refused(filler: Model, folder: Path, tmp_path: Path) -> None:
    assert load(str(folder)).fingerprint() == filler.fingerprint()
    tiny.model().save(tmp_path / "classifier")
    with pytest.raises(InputError, match="no masked language model"):
        load(str(tmp_path / "classifier"))
    with pytest.raises(InputError, match="no mask token"):
        infill(tiny.model("roberta"), TEXTS)
    with pytest.raises(InputError, match="nowhere"):
        load(str(tmp_path / "nowhere"))


# -- what a teacher labels beside the training examples --------------------------------------------------------------------


def test_transfer_texts_are_the_unlabelled_ones_and_variants_of_all(folder: Path, tmp_path: Path) -> None:
    task = tiny.task(n_train=20)
    more = replace(task, unlabelled=["an unheard film", "the plot is thin"])
    texts = [*task.inputs("train"), *more.unlabelled]
    assert transfer_texts(task, 0, 0) == []
    assert transfer_texts(task, 3, 7) == augment(task.inputs("train"), 3, 7)
    assert transfer_texts(more, 0, 0) == more.unlabelled
    assert transfer_texts(more, 3, 7) == [*more.unlabelled, *augment(texts, 3, 7)]
    both = transfer_texts(more, 20, 7, model=str(folder), cache=tmp_path)
    assert both == transfer_texts(more, 20, 7, model=str(folder), cache=tmp_path)
    plain = transfer_texts(more, 20, 7)
    assert len(both) == len(plain)
    others = [index for index, (a, b) in enumerate(zip(both, plain, strict=True)) if a != b]
    # 5 standard deviations of a fair coin, 440 times.
    assert abs(len(others) / 440 - INFILLED) < 5 * 0.5 / 440**0.5
    for index in others:
        assert len(both[index].split()) == len(texts[(index - 2) // 20].split())


def test_the_step_teaches_on_infilled_and_unlabelled_texts(folder: Path, tmp_path: Path) -> None:
    task = replace(tiny.task(n_train=20), unlabelled=["an unheard film", "the plot is thin"])
    fields: dict[str, Any] = {"student": {"layers": 1}, "augment": 3, "epochs": 1, "batch_size": 16, "cache": str(tmp_path)}
    filled = Distill(**fields, augment_model=str(folder))(tiny.model(), task)
    assert filled.history[-1]["teacher_outputs"] == 22 * 4
    assert len(list(tmp_path.glob("*.infilled.json"))) == 1
    assert filled.fingerprint() != Distill(**fields)(tiny.model(), task).fingerprint()
    with pytest.raises(InputError, match="nowhere"):
        Distill(**fields, augment_model=str(tmp_path / "nowhere"))(tiny.model(), task)
