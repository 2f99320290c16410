"""The listings of docs/distillation.md, as printed, on a packaged model and real reviews: what the student reaches.

    python benchmarks/listings.py [--texts 2000]

The code on the page runs up to its section on the cache: a teacher is fine-tuned, a DistilBERT is taught by `DistillationTrainer`,
the loss written by hand is compared with the trainer's, and the student is taught on with layer losses. `bert-base-uncased` is
MiniLM here, `distilbert-base-uncased` a DistilBERT made of every other layer of it, as DistilBERT itself began. Teacher and student
then answer the test reviews in plain transformers.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import publish, reviews
from transformers import AutoModel, AutoTokenizer, DistilBertConfig, DistilBertModel

from multum.example import fetch

PAGE = Path(__file__).parent.parent / "docs" / "distillation.md"
END = "## A cache for the teacher"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LOOKED_AT = 500
"""Validation reviews that the trainer evaluates every epoch on."""
STUDENT_LAYERS = (0, 2, 4)
NAMES = {
    "attention.self.query": "attention.q_lin",
    "attention.self.key": "attention.k_lin",
    "attention.self.value": "attention.v_lin",
    "attention.output.dense": "attention.out_lin",
    "attention.output.LayerNorm": "sa_layer_norm",
    "intermediate.dense": "ffn.lin1",
    "output.dense": "ffn.lin2",
    "output.LayerNorm": "output_layer_norm",
}
"""A part of a BERT's layer -> what DistilBERT calls it."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=int, default=2000, help="training texts")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        AutoModel.from_pretrained(fetch("minilm")).save_pretrained(folder / "bert-base-uncased")
        distilled(folder / "bert-base-uncased").save_pretrained(folder / "distilbert-base-uncased")
        for name in ("bert-base-uncased", "distilbert-base-uncased"):
            AutoTokenizer.from_pretrained(fetch("minilm")).save_pretrained(folder / name)
        for split in ("train", "validation", "test"):
            most = LOOKED_AT if split == "validation" else None
            numbered(reviews(folder, options.texts) / f"{split}.csv", folder / f"{split}.csv", most)
        os.chdir(folder)
        space, rows = {"__name__": "page"}, [["behind", "teacher, %", "student, %", "seconds"]]
        values: dict[str, Any] = {}
        text = PAGE.read_text(encoding="utf-8").partition(END)[0]
        for section in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
            started = time.perf_counter()
            for block in BLOCK.findall(section):
                exec(compile(block, str(PAGE), "exec"), space)  # noqa: S102
            seconds, name = time.perf_counter() - started, section.partition("\n")[0]
            found = {key: accuracy(space[key], space["tokenizer"]) for key in ("teacher", "student") if key in space}
            values[name] = {**found, "seconds": seconds}
            rows.append(
                [name, *(f"{100 * found[key]:.1f}" if key in found else "" for key in ("teacher", "student")), f"{seconds:.0f}"]
            )
    summary = f"{options.texts} training reviews, three epochs a training, test accuracy, {torch.get_num_threads()} thread(s)."
    publish("listings", rows, {"sections": values, "texts": options.texts}, summary=summary)


def distilled(source: Path) -> DistilBertModel:
    """A DistilBERT of a BERT's layers."""
    bert = AutoModel.from_pretrained(source)
    size = bert.config
    config = DistilBertConfig(
        vocab_size=size.vocab_size,
        dim=size.hidden_size,
        hidden_dim=size.intermediate_size,
        n_heads=size.num_attention_heads,
        n_layers=len(STUDENT_LAYERS),
    )
    weights = {
        name: value for name, value in bert.state_dict().items() if name.startswith("embeddings") and "token_type" not in name
    }
    weights["embeddings.position_embeddings.weight"] = (
        weights["embeddings.position_embeddings.weight"] + bert.embeddings.token_type_embeddings.weight[0]
    )
    for number, layer in enumerate(STUDENT_LAYERS):
        for name, value in bert.encoder.layer[layer].state_dict().items():
            part, _, kind = name.rpartition(".")
            weights[f"transformer.layer.{number}.{NAMES[part]}.{kind}"] = value
    made = DistilBertModel(config)
    made.load_state_dict(weights)
    return made


def numbered(source: Path, target: Path, most: int | None) -> None:
    """The labels as numbers, which is what the page has."""
    with source.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))[:most]
    with target.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["text", "label"], *([row["text"], int(row["label"] == "positive")] for row in rows)])


@torch.no_grad()
def accuracy(model: Any, tokenizer: Any) -> float:
    with Path("test.csv").open(encoding="utf-8", newline="") as file:
        rows, right = list(csv.DictReader(file)), 0
    for start in range(0, len(rows), 64):
        part = rows[start : start + 64]
        batch = tokenizer([row["text"] for row in part], truncation=True, padding=True, return_tensors="pt")
        said = model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.argmax(-1)
        right += sum(int(row["label"]) == int(answer) for row, answer in zip(part, said, strict=True))
    return right / len(rows)


if __name__ == "__main__":
    main()
