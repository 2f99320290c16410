"""The code on the pages in docs/ runs as printed, in a folder where files and models of the names on the page are small ones."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

import pytest
import tiny
from transformers import AutoModelForSequenceClassification, DistilBertForSequenceClassification, GPT2Config, GPT2LMHeadModel

BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PAGES = [page for page in sorted((Path(__file__).parent.parent / "docs").glob("*.md")) if BLOCK.search(page.read_text("utf-8"))]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: Any) -> Path:
    """Names on the page are relative paths here."""
    for family, name in (("bert", "bert-base-uncased"), ("distilbert", "distilbert-base-uncased")):
        model = tiny.model(family)
        getattr(model.module, family).save_pretrained(tmp_path / name)
        model.tokenizer.save_pretrained(tmp_path / name)
    tiny.model("roberta").save(tmp_path / "roberta-reviews")
    tokenizer = tiny.model("roberta").tokenizer
    for name, layers in (("gpt2", 2), ("distilgpt2", 1)):
        config = GPT2Config(vocab_size=len(tokenizer), n_positions=tiny.POSITIONS, n_embd=16, n_layer=layers, n_head=2)
        config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
        GPT2LMHeadModel(config).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    tiny.language_model("llama").save(tmp_path / "HuggingFaceTB" / "SmolLM2-135M")
    for name in ("train", "validation"):
        rows = getattr(tiny.splits(48, 16), name)
        with (tmp_path / f"{name}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label"])
            writer.writerows((text, tiny.CLASSES[2].index(label)) for text, label in zip(rows["text"], rows["label"], strict=True))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_pages_are_found() -> None:
    assert "distillation" in [page.stem for page in PAGES]


# What torch says of the mistake that the page explains, and of a machine without an accelerator.
@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides")
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true")
@pytest.mark.usefixtures("folder", "one_thread")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_code_on_a_page_runs(page: Path) -> None:
    text, namespace = page.read_text(encoding="utf-8"), {"__name__": page.stem}
    blocks = list(BLOCK.finditer(text))
    assert len(blocks) == text.count("```python") > 0
    for block in blocks:
        line = text[: block.start(1)].count("\n")
        exec(compile("\n" * line + block[1], str(page), "exec"), namespace)  # noqa: S102
    # What the page says of the folder that it saves: a plain model, without the teacher.
    assert type(AutoModelForSequenceClassification.from_pretrained("student")) is DistilBertForSequenceClassification
