"""Words in the place of masks: against the pipeline of transformers, from the command line and from files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from transformers import pipeline
from typer.testing import CliRunner

from multum import runtimes
from multum._fill import BEST, filled
from multum.cli import app
from multum.errors import InputError

TEXTS = ["the film was [MASK] and moving", "[MASK] plot, [MASK] music", "a tedious [MASK]"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place: Path = tmp_path_factory.mktemp("fill") / "m"
    tiny.language_model("bert").save(place, {"task": "fill-mask"})
    return place


def test_words_and_scores_are_those_of_the_pipeline(folder: Path) -> None:
    told = list(filled(runtimes.open(folder, threads=1), TEXTS))
    expected = pipeline("fill-mask", model=str(folder), top_k=BEST, device="cpu")(TEXTS)
    assert [one["text"] for one in told] == TEXTS
    assert [len(one["masks"]) for one in told] == [1, 2, 1]
    for one, places in zip(told, expected, strict=True):
        for ours, theirs in zip(one["masks"], places if len(one["masks"]) > 1 else [places], strict=True):
            assert [word["word"] for word in ours] == [word["token_str"].strip() for word in theirs]
            assert [word["score"] for word in ours] == pytest.approx([word["score"] for word in theirs], abs=2e-6)


def test_a_long_text_is_read_around_each_mask(folder: Path) -> None:
    predictor = runtimes.open(folder, threads=1)
    text = " ".join(["the film was moving"] * 40)
    text = f"{text} [MASK] {text} [MASK]"
    ids = predictor.tokenizer(text, add_special_tokens=False)["input_ids"]
    size, mask = predictor.max_length - 2, predictor.tokenizer.mask_token_id
    (told,) = filled(predictor, [text])
    assert len(ids) > 4 * size
    for number, words in zip([place for place, token in enumerate(ids) if token == mask], told["masks"], strict=True):
        starts = [start for start in range(0, len(ids), size // 2) if start == 0 or start + size // 2 < len(ids)]
        start = min(starts, key=lambda start: abs(2 * number + 1 - start - min(start + size, len(ids))))
        row = torch.tensor([[predictor.tokenizer.cls_token_id, *ids[start : start + size], predictor.tokenizer.sep_token_id]])
        with torch.no_grad():
            shares = predictor.module(row).logits[0, 1 + number - start].softmax(-1)
        assert [word["score"] for word in words] == pytest.approx(shares.topk(BEST).values.tolist(), abs=2e-6)


def call(*arguments: Any) -> Any:
    return CliRunner().invoke(app, ["predict", *map(str, arguments)])


def test_the_command_line(folder: Path, tmp_path: Path) -> None:
    told = list(filled(runtimes.open(folder, threads=1), TEXTS))
    (tmp_path / "in.txt").write_text("\n".join(TEXTS))
    assert json.loads(call(folder, "--input", tmp_path / "in.txt", "--json", "--threads", "1").stdout) == told
    lines = call(folder, *TEXTS, "--threads", "1").stdout.splitlines()
    first = told[1]["masks"][1][0]
    assert [line.split("\t")[1] for line in lines] == TEXTS
    assert lines[1].split("\t")[0].split("; ")[1].startswith(f"{first['word']} {first['score']:.3f}, ")


def test_what_has_no_place_to_fill_is_refused(folder: Path) -> None:
    predictor = runtimes.open(folder, threads=1)
    with pytest.raises(InputError, match=r"texts 1, 3: no \[MASK\]; write it where a word is asked for.*multum score"):
        next(filled(predictor, ["a film", TEXTS[0], "<mask>"]))
    with pytest.raises(InputError, match="no pairs"):
        next(filled(predictor, [("a", "b")]))
    predictor.tokenizer.mask_token = None
    with pytest.raises(InputError, match="no mask token"):
        next(filled(predictor, TEXTS))


def test_shares_are_a_distribution(folder: Path) -> None:
    (told,) = filled(runtimes.open(folder, threads=1), TEXTS[:1])
    scores = np.array([word["score"] for word in told["masks"][0]])
    assert (np.diff(scores) <= 0).all()
    assert 0 < scores.sum() <= 1
