"""What a vocabulary trimmed to its data leaves of a real model: bytes, and whether texts are read and answered as before.

    python benchmarks/vocabulary.py [--texts 200]

multilingual-e5-small (250,000 pieces, Unigram) on Chinese and on English reviews, MiniLM (30,522 pieces, WordPiece) on the English
ones. All training and test texts are read with both tokenizers; `--texts` of each are answered by both models in fp32, with a new
head that both have alike. Answers count as equal if no bit of any logit differs. Megabytes are those of the weights and the
tokenizer on disk.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from common import publish

from multum.core.model import Model
from multum.core.step import make
from multum.core.teacher import logits
from multum.data import open_task
from multum.example import fetch

CASES = [("e5-small", "reviews-zh"), ("e5-small", "reviews-en"), ("minilm", "reviews-en")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=int, default=200, help="of each split that are answered")
    options = parser.parse_args()
    rows = [["model", "data", "tokens", "MB", "read alike, training / test", "equal answers, training / test"]]
    values = []
    for name, data in CASES:
        one = of(name, data, options.texts)
        values.append({"model": name, "data": data, **one})
        before, after = one["tokens"]
        rows.append(
            [
                *(name, data, f"{before} -> {after}", " -> ".join(f"{size:.1f}" for size in one["mb"])),
                " / ".join(f"{one['alike'][split]:.1%}" for split in ("train", "test")),
                " / ".join(f"{one['equal'][split]} of {options.texts}" for split in ("train", "test")),
            ]
        )
    summary = (
        "Read alike: in the same tokens. A text that was not seen while trimming is spelled in shorter pieces where it needs some "
        "that are gone; no text gains an unknown token."
    )
    publish("vocabulary", rows, {"cases": values, "texts": options.texts}, summary=summary)


def of(name: str, data: str, texts: int) -> dict[str, Any]:
    """The figures of one model on one set of reviews."""
    task = open_task("text-classification", str(fetch(data)))
    # A copy, as the trimmed one is: weights lie otherwise in memory that is a file's, and sums are rounded otherwise.
    model = task.load(str(fetch(name))).copy()
    trimmed, alike, equal = make("trim_vocabulary", {})(model, task), {}, {}
    for split in ("train", "test"):
        pairs = zip(*(tokens(one, list(task.inputs(split))) for one in (model, trimmed)), strict=True)
        alike[split] = float(np.mean([ours == theirs for ours, theirs in pairs]))
        theirs, ours = (answers(one, task, split, texts) for one in (model, trimmed))
        equal[split] = int((ours == theirs).all(1).sum())
    entry = trimmed.history[-1]
    return {
        "tokens": entry["vocabulary"],
        "mb": [megabytes(one) for one in (model, trimmed)],
        "alike": alike,
        "equal": equal,
    }


def tokens(model: Model, texts: list[str]) -> list[list[str]]:
    return [encoding.tokens for encoding in model.tokenizer(texts).encodings]


def answers(model: Model, task: Any, split: Any, texts: int) -> np.ndarray:
    rows = list(task.encode(model, split).select(range(texts)))
    return logits(model.module, rows, model.tokenizer.pad_token_id, batch_size=1, precision="fp32")


def megabytes(model: Model) -> float:
    """Of the weights and the tokenizer on disk."""
    with tempfile.TemporaryDirectory() as folder:
        model.save(Path(folder) / "model")
        return sum((Path(folder) / "model" / name).stat().st_size for name in ("model.safetensors", "tokenizer.json")) / 1e6


if __name__ == "__main__":
    main()
