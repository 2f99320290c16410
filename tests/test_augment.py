"""Variants of texts: seeded, counted, made of the texts' own words."""

from __future__ import annotations

import pytest
import tiny

from multum.core.augment import augment

TEXTS = list(tiny.task(n_train=60).inputs("train"))


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
    assert any(variant.replace(" ", "") != text for variant in variants)


def test_nothing_gives_nothing() -> None:
    assert augment([], 3) == []
