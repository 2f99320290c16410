"""score against transformers' own losses, slow loops and the recipe for long texts."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from typer.testing import CliRunner

import multum
from multum.cli import app
from multum.core.likelihood import Window, context_of, specials, token_log_probs, windows
from multum.core.model import Model
from multum.errors import InputError

TEXTS = ["the film was wonderful", "a really dreadful plot and boring music", "cast", "1984! Grüße"]


def ids_of(model: Model, text: str) -> list[int]:
    return list(model.tokenizer(text, add_special_tokens=False)["input_ids"])


@torch.no_grad()
def own_loss(model: Model, ids: list[int]) -> float:
    """What transformers says: a mean over all tokens but the first."""
    tokens = torch.tensor([ids])
    return float(model.module(input_ids=tokens, labels=tokens).loss)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_causal_score_is_transformers_own_loss(family: str) -> None:
    model = tiny.language_model(family)
    result = multum.score(model, TEXTS[:2])
    for text, one in zip(TEXTS, result.texts, strict=False):
        ids = [*([0] if family == "llama" else []), *ids_of(model, text)]
        assert one.log_likelihood == pytest.approx(-own_loss(model, ids) * (len(ids) - 1), abs=1e-5 * len(ids))
        assert one.perplexity == pytest.approx(math.exp(own_loss(model, ids)), rel=1e-5)
        assert len(one.tokens) == len(ids) - 1
    assert result.first_token == ("conditioned on <s>" if family == "llama" else "left out: nothing stands before it")


def test_the_chain_rule_token_by_token() -> None:
    """Each factor from a forward pass of its own, on nothing but what comes before."""
    model = tiny.language_model("gpt2")
    ids = ids_of(model, TEXTS[1])
    (one,) = multum.score(model, TEXTS[1:2]).texts
    with torch.no_grad():
        slow = [float(model.module(torch.tensor([ids[:i]])).logits[0, -1].log_softmax(-1)[ids[i]]) for i in range(1, len(ids))]
    assert [token.log_prob for token in one.tokens] == pytest.approx(slow, abs=1e-5)
    assert [token.id for token in one.tokens] == ids[1:]


def test_probabilities_of_all_continuations_sum_to_one() -> None:
    model = tiny.language_model("llama")
    size = model.module.config.vocab_size
    logits = torch.randn(size, size, generator=torch.Generator().manual_seed(0))
    total = sum(token_log_probs(logits, torch.full((size,), token)).exp() for token in range(size))
    assert torch.allclose(total, torch.ones(size), atol=1e-5)


def test_a_masked_score_hides_one_token_at_a_time() -> None:
    model = tiny.language_model("bert")
    tokenizer = model.tokenizer
    for text, one in zip(TEXTS, multum.score(model, TEXTS).texts, strict=True):
        ids, slow = tokenizer(text)["input_ids"], []
        for place in range(1, len(ids) - 1):
            hidden = torch.tensor([ids])
            hidden[0, place] = tokenizer.mask_token_id
            labels = torch.full((1, len(ids)), -100)
            labels[0, place] = ids[place]
            with torch.no_grad():
                slow.append(-float(model.module(input_ids=hidden, labels=labels).loss))
        assert [token.log_prob for token in one.tokens] == pytest.approx(slow, abs=1e-5)
        assert one.log_likelihood == pytest.approx(sum(slow), abs=1e-4)


def test_windows_cover_every_token_once() -> None:
    for tokens, size, stride in [(1, 4, 2), (4, 4, 2), (5, 4, 2), (23, 8, 3), (23, 8, 8), (24, 8, 1)]:
        found = windows(tokens, size, stride)
        assert [token for window in found for token in range(window.first, window.end)] == list(range(tokens))
        assert all(window.start <= window.first < window.end <= window.start + size for window in found)
    assert windows(10, 6, 3) == [Window(0, 6, 0), Window(3, 9, 6), Window(6, 10, 9)]


@torch.no_grad()
def recipe(model: Model, ids: list[int], size: int, stride: int) -> float:
    """The loop of transformers' page on perplexity: labels of what was scored before are -100."""
    total, count, last = 0.0, 0, 0
    for start in range(0, len(ids), stride):
        end = min(start + size, len(ids))
        tokens = torch.tensor([ids[start:end]])
        labels = tokens.clone()
        labels[:, : -(end - last)] = -100
        valid = int((labels[:, 1:] != -100).sum())
        total += float(model.module(input_ids=tokens, labels=labels).loss) * valid
        count, last = count + valid, end
        if end == len(ids):
            break
    return total / count


@pytest.mark.parametrize("stride", [4, 15])
def test_a_long_text_is_scored_as_transformers_recipe_does(stride: int) -> None:
    model = tiny.language_model("gpt2", positions=32)
    text = " ".join(TEXTS[:2] * 8)
    assert len(ids_of(model, text)) > 90
    result = multum.score(model, [text, TEXTS[0]], window=16, stride=stride)
    assert (result.window, result.stride) == (16, stride)
    expected = recipe(model, ids_of(model, text), 16, stride)
    assert result.texts[0].perplexity == pytest.approx(math.exp(expected), rel=1e-5)
    assert context_of(model.module, model.tokenizer) == 32
    assert multum.score(model, [text]).stride == 16


def test_a_long_text_of_a_masked_model_takes_the_window_around_each_token() -> None:
    model = tiny.language_model("bert")
    text = " ".join(TEXTS[:2] * 4)
    ids = ids_of(model, text)
    (one,) = multum.score(model, [text], window=18, stride=8).texts
    slow = []
    starts = [window.start for window in windows(len(ids), 16, 8)]
    for place, token in enumerate(ids):
        start = min(starts, key=lambda s: abs(place + 0.5 - (s + min(s + 16, len(ids))) / 2))
        row = [2, *ids[start : start + 16], 3]
        row[place - start + 1] = model.tokenizer.mask_token_id
        with torch.no_grad():
            slow.append(float(model.module(torch.tensor([row])).logits[0, place - start + 1].log_softmax(-1)[token]))
    assert [token.log_prob for token in one.tokens] == pytest.approx(slow, abs=1e-5)


@pytest.mark.parametrize("family", tiny.LANGUAGE_MODELS)
def test_texts_do_not_disturb_each_other(family: str) -> None:
    model = tiny.language_model(family)
    alone = [multum.score(model, [text], bos=True if family == "gpt2" else None).texts[0] for text in TEXTS]
    together = multum.score(model, TEXTS, bos=True if family == "gpt2" else None).texts
    for one, other in zip(alone, together, strict=True):
        assert [t.log_prob for t in one.tokens] == pytest.approx([t.log_prob for t in other.tokens], abs=1e-5)


def test_bytes_perplexity_and_totals() -> None:
    model = tiny.language_model("gpt2")
    left_out, whole = (multum.score(model, [TEXTS[3], TEXTS[0]], bos=bos) for bos in (None, True))
    assert whole.texts[0].bytes == len("1984! Grüße".encode())
    assert left_out.texts[0].bytes == whole.texts[0].bytes - len(left_out.texts[0].text[: first_end(model, TEXTS[3])])
    assert "".join(token.text for token in whole.texts[1].tokens) == TEXTS[0]
    one = whole.texts[1]
    assert one.bits_per_byte * one.bytes == pytest.approx(-one.log_likelihood / math.log(2))
    total = whole.total
    assert total.log_likelihood == pytest.approx(sum(each.log_likelihood for each in whole.texts))
    assert math.log(total.perplexity) == pytest.approx(
        np.average([math.log(each.perplexity) for each in whole.texts], weights=[len(each.tokens) for each in whole.texts])
    )
    with_bos, without = (multum.score(tiny.language_model("llama"), TEXTS[:1], bos=bos) for bos in (True, False))
    assert len(with_bos.texts[0].tokens) == len(without.texts[0].tokens) + 1


def first_end(model: Model, text: str) -> int:
    return int(model.tokenizer(text, return_offsets_mapping=True)["offset_mapping"][0][1])


def test_special_tokens_that_a_tokenizer_adds_by_itself() -> None:
    assert specials(tiny.language_model("gpt2").tokenizer) == ([], [])
    assert specials(tiny.language_model("llama").tokenizer) == ([0], [])
    assert specials(tiny.language_model("bert").tokenizer) == ([2], [3])


@pytest.mark.parametrize(
    ("family", "texts", "options", "said"),
    [
        ("gpt2", ["fine", " ", ""], {}, ["text 2 is empty", "text 3 is empty"]),
        ("gpt2", [], {}, ["no text to score"]),
        ("gpt2", ["a"], {}, ["no token that can be scored: 'a'; give it a BOS"]),
        ("gpt2", ["the film"], {"window": 100, "stride": 101}, ["reads 64 at most", "the stride must be at least 1 and"]),
        ("bert", ["the film"], {"window": 8, "stride": 7}, ["6 at most"]),
    ],
)
def test_wrong_input_is_named(family: str, texts: list[str], options: dict[str, Any], said: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        multum.score(tiny.language_model(family), texts, **options)
    assert len(caught.value.problems) == len(said)
    assert all(part in problem for part, problem in zip(said, caught.value.problems, strict=True))


def test_only_language_models_are_scored(tmp_path: Path) -> None:
    classifier = tiny.model()
    with pytest.raises(InputError, match="has no language model's head"):
        multum.score(classifier, ["the film"])
    classifier.save(tmp_path / "classifier")
    with pytest.raises(InputError, match=r"no language model \(BertForSequenceClassification\)"):
        multum.score(tmp_path / "classifier", ["the film"])
    no_mask = tiny.language_model("bert")
    no_mask.tokenizer.mask_token = None
    with pytest.raises(InputError, match="no mask token"):
        multum.score(no_mask, ["the film"])
    no_bos = tiny.language_model("gpt2")
    no_bos.tokenizer.bos_token = None
    with pytest.raises(InputError, match="no BOS token"):
        multum.score(no_bos, ["the film"], bos=True)


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_the_command(family: str, tmp_path: Path) -> None:
    model = tiny.language_model(family)
    model.save(tmp_path / "m")
    expected = multum.score(tmp_path / "m", TEXTS[:2])
    run = CliRunner()
    shown = run.invoke(app, ["score", str(tmp_path / "m"), *TEXTS[:2], "--tokens"])
    assert shown.exit_code == 0, shown.stderr
    assert ("log P" if family == "gpt2" else "PLL") in shown.stdout
    assert f"{expected.texts[0].log_likelihood:.4f}" in shown.stdout
    assert f"{expected.texts[1].tokens[-1].log_prob:.4f}" in shown.stdout
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS[:2]), encoding="utf-8")
    found = json.loads(run.invoke(app, ["score", str(tmp_path / "m"), "--input", str(tmp_path / "texts.txt"), "--json"]).stdout)
    assert found["kind"] == expected.kind
    assert [row["log_likelihood"] for row in found["texts"]] == pytest.approx([one.log_likelihood for one in expected.texts])
    assert found["total"]["scored_tokens"] == sum(len(one.tokens) for one in expected.texts)
    (tmp_path / "pairs.csv").write_text("text,text_pair\na,b\n", encoding="utf-8")
    refused = run.invoke(app, ["score", str(tmp_path / "m"), "--input", str(tmp_path / "pairs.csv")])
    assert refused.exit_code == 2
