"""The tokenizer that readers are given where torch is not there: it must do what transformers' does."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import taggers
import tiny
from tokenizers import Tokenizer

from multum.core.passages import Passages, context_tokens
from multum.core.words import Words
from multum.runtimes._rows import FastTokenizer

LONG = "the plot of this wonderful film was really quite dull and its cast awful " * 9


def both(family: str) -> tuple[Any, FastTokenizer]:
    slow = tiny.model(family).tokenizer
    return slow, FastTokenizer(Tokenizer.from_str(slow.backend_tokenizer.to_str()), slow.pad_token_id)


@pytest.mark.parametrize("tensors", [None, "np"])
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_windows_over_contexts(family: str, tensors: str | None) -> None:
    slow, fast = both(family)
    pairs = [(row["question"], row["context"]) for row in taggers.asked(5)]
    pairs += [("what was good", LONG), (LONG, LONG), (LONG, "a film")]
    expected, found = (Passages().encode(tokenizer, pairs, tiny.POSITIONS, tensors) for tokenizer in (slow, fast))
    assert found["overflow_to_sample_mapping"] == expected["overflow_to_sample_mapping"]
    assert len(found["input_ids"]) > len(pairs)
    for name in ("input_ids", "attention_mask", *(["token_type_ids"] if family == "bert" else [])):
        np.testing.assert_equal(found[name], expected[name])
    for one, other in zip(found.encodings, expected.encodings, strict=True):
        assert one.offsets == other.offsets
        assert context_tokens(one) == context_tokens(other)


@pytest.mark.parametrize("tensors", [None, "np"])
@pytest.mark.parametrize("limit", [None, 8, tiny.POSITIONS])
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_sentences(family: str, limit: int | None, tensors: str | None) -> None:
    slow, fast = both(family)
    sentences = [row["tokens"] for row in taggers.tagged(5)] + ["a Film, wonderful", LONG if limit else "dull"]
    expected, found = (Words().encode(tokenizer, sentences, limit, tensors) for tokenizer in (slow, fast))
    for name in ("input_ids", "attention_mask"):
        np.testing.assert_equal(found[name], expected[name])
    assert Words().places(found, sentences) == Words().places(expected, sentences)


def test_no_call_leaves_its_settings_to_the_next() -> None:
    slow, fast = both("bert")
    fast(["a film", LONG], truncation=True, max_length=6, padding=True, return_tensors="np")
    assert fast(["a film", LONG])["input_ids"] == slow(["a film", LONG], verbose=False)["input_ids"]
    single, expected = (one("a film", add_special_tokens=False, return_offsets_mapping=True) for one in (fast, slow))
    assert single["offset_mapping"] == expected["offset_mapping"]
    assert single["input_ids"] == expected["input_ids"]
