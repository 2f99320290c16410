"""Changed texts and texts from elsewhere: the changes do what they say, and a fragile model is found."""

from __future__ import annotations

import random

import numpy as np
import pytest

from multum.evidence._paired import counts, score_interval
from multum.evidence.perturbations import PERTURBATIONS, case, first_half, join, perturb, punctuation, typos, word_order
from multum.evidence.robustness import other_texts, same_texts

TEXTS = ["A moving, well-made film; don't miss it!", "Dull.", "日本語の映画です。", "wonderful acting and a clever script " * 5]


@pytest.mark.parametrize("name", PERTURBATIONS)
def test_changes_are_seeded_and_leave_no_text_empty(name):
    first, again, other = (perturb(TEXTS, name, seed) for seed in (0, 0, 1))
    assert first == again
    assert all(first)
    assert len(first) == len(TEXTS)
    assert perturb(TEXTS[3:], name, 0) == perturb(TEXTS[3:], name, 0)
    if name in ("typos", "word order"):
        assert first != other
    pair = perturb([(TEXTS[3], TEXTS[3])], name, 0)[0]
    assert (isinstance(pair, tuple) and pair != (TEXTS[3], TEXTS[3])) or name == "punctuation"


def test_a_typo_is_one_slip_in_a_longer_word():
    before = ("wonderful acting and a tiny plot " * 200).split()
    after = typos(" ".join(before), random.Random(0)).split()
    changed = [(a, b) for a, b in zip(before, after, strict=True) if a != b]
    assert {a for a, _ in changed} == {"wonderful", "acting", "tiny", "plot"}
    assert all(abs(len(a) - len(b)) <= 1 and set(b) <= set(a) for a, b in changed)
    assert len(changed) / 800 == pytest.approx(0.15, abs=0.04)


def test_case_punctuation_and_order():
    rng = random.Random(0)
    assert case("abc", rng) == "ABC"
    assert case("ABC", rng) == "abc"
    assert case("Abc", rng) in ("ABC", "abc")
    assert punctuation("A moving, well-made film; don't miss it!", rng) == "A moving well made film dont miss it"
    assert punctuation("?!", rng) == "?!"
    words = [str(number) for number in range(300)]
    moved = word_order(" ".join(words), rng).split()
    assert sorted(moved, key=int) == words
    distances = [abs(at - int(word)) for at, word in enumerate(moved)]
    assert max(distances) == 1
    assert 0.3 < np.mean(distances) < 0.6


def test_the_first_half():
    rng = random.Random(0)
    assert first_half("one two three four five six", rng) == "one two three"
    assert first_half("a wonderful", rng) == "a wond"  # no word ends near the middle
    assert first_half("日本語の映画です。", rng) == "日本語の映"
    assert first_half("x", rng) == "x"
    words = " ".join(str(number) for number in range(100, 300))
    assert first_half(words, rng) == words[: 100 * 4 - 1]


def test_joined_texts_are_two_of_a_class():
    texts, classes = [f"{at}." for at in range(50)], [at % 3 for at in range(49)] + [7]
    joined = join(texts, classes, 0)
    pairs = [[int(part[:-1]) for part in text.split(" ")] for text in joined]
    assert [first for first, _ in pairs] == list(range(50))
    assert sorted(second for _, second in pairs) == list(range(50))
    assert all(classes[first] == classes[second] for first, second in pairs)
    assert [first for first, second in pairs if first == second] == [49]  # alone in its class
    assert join(texts, classes, 0) == joined != join(texts, classes, 1)
    assert join([("a", "b"), ("c", "d")], [0, 0], 0) == [("a c", "b d"), ("c a", "d b")]


def answers(n: int, share: float, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).random(n) < share


def test_excess_by_hand():
    clean = np.array([True, True, True, False]), np.array([True, True, False, True])
    changed = np.array([True, True, False, False]), np.array([False, False, False, True])
    found = same_texts(clean, changed, draws=100, seed=0)
    assert (found["drop_before"], found["drop_after"], found["excess"]) == pytest.approx((0.25, 0.5, 0.25))
    shifted = other_texts(clean, changed)
    assert shifted["excess"] == pytest.approx(0.25)
    assert other_texts(clean, clean)["excess"] == 0


@pytest.mark.parametrize("together", [1, 4])
def test_where_one_side_is_certain_the_interval_is_that_of_the_other(together):
    before, after = answers(300, 0.9, 0), answers(300, 0.8, 1)
    low, high = score_interval(*counts(before, after), 1 - 0.05 / together)
    same = np.ones(10**7, dtype=bool)
    assert other_texts((before, after), (same, same), together=together)["interval"] == pytest.approx([low, high], abs=1e-5)
    assert other_texts((same, same), (before, after), together=together)["interval"] == pytest.approx([-high, -low], abs=1e-5)


def test_a_fragile_model_is_found_and_a_copy_is_not():
    before = answers(1000, 0.9, 0)
    clean = before, before
    changed = before & answers(1000, 0.97, 1), before & answers(1000, 0.85, 2)
    assert same_texts(clean, changed, draws=300, seed=0, together=4)["verdict"] == "more fragile"
    assert same_texts(clean, changed[::-1], draws=300, seed=0)["verdict"] == "less fragile"
    assert same_texts(clean, (changed[0], changed[0]), draws=300, seed=0)["verdict"] == "not shown"
    elsewhere = answers(600, 0.8, 3), answers(600, 0.8, 3) & answers(600, 0.85, 4)
    assert other_texts(clean, elsewhere)["verdict"] == "more fragile"
    assert other_texts(clean, (elsewhere[0], elsewhere[0]))["verdict"] == "not shown"


@pytest.mark.parametrize(("m", "lost", "gained"), [(200, 0.1, 0.1), (25, 0.04, 0.01)])
def test_intervals_of_the_excess_of_other_texts_hold_zero_as_often_as_they_say(m, lost, gained):
    """1,000 data sets without any excess: 95 % within three standard errors of the simulation (2.1 points). Of few texts with rare
    changes, of which often none is seen, it may be more often."""
    rng, held = np.random.default_rng(5), []
    for _ in range(1000):
        sets = []
        for n in (300, m):
            before, chance = rng.random(n) < 0.5, rng.random(n)
            sets.append((before, before ^ (chance < np.where(before, lost, gained))))
        held.append(other_texts(*sets)["verdict"] == "not shown")
    assert 0.925 <= np.mean(held) <= (0.975 if m > 100 else 1)


def test_intervals_of_the_excess_of_changed_texts_hold_zero_as_often_as_they_say():
    """As above, with 300 data sets."""
    rng, held = np.random.default_rng(5), []
    for seed in range(300):
        clean = rng.random((2, 150)) < 0.7
        changed = clean ^ (rng.random((2, 150)) < 0.1)
        same = (clean[0], clean[1]), (changed[0], changed[1])
        # Equal chances of a change on both sides, but of another accuracy: compare a model with itself drawn again.
        twin = (clean[0], clean[0]), (changed[0], clean[0] ^ (rng.random(150) < 0.1))
        assert same_texts(*same, draws=20, seed=seed)["n"] == 150
        held.append(same_texts(*twin, draws=300, seed=seed)["verdict"] == "not shown")
    assert 0.91 <= np.mean(held) <= 0.985
