"""Encoder-decoders to train from the beginning, since no packaged one can be had: random weights, a tokenizer out of the training
texts. They are of the Marian kind (Junczys-Dowmunt et al. 2018, arXiv:1804.00344): one embedding for what is read and written.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ._example_debian import Archive
from ._example_descriptions import Row, documents, pairs, split

VOCABULARY = 8000
LAYERS, WIDTH, NEURONS, HEADS = 4, 256, 1024, 4
POSITIONS = 512


def translator(archive: Archive, folder: Path, language: str) -> str:
    """A model for the data set of `_example_descriptions.translations`; what it is."""
    return untrained(split(pairs(archive, language))["train"], folder)


def summarizer(archive: Archive, folder: Path) -> str:
    """A model for the data set of `_example_descriptions.summaries`; what it is."""
    return untrained(split(documents(archive))["train"], folder)


def untrained(rows: Sequence[Row], folder: Path, seed: int = 0) -> str:
    """A model folder for texts like these."""
    import torch
    from transformers import MarianConfig, MarianMTModel

    from .core.model import Model
    from .core.new_tokenizer import train_tokenizer

    tokenizer = train_tokenizer(
        lambda: (text for row in rows for text in row.cells), "bpe", VOCABULARY, longest=POSITIONS, around=False
    )
    sizes = {"layers": LAYERS, "attention_heads": HEADS, "ffn_dim": NEURONS}
    both: dict[str, Any] = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in sizes.items()}
    ids: dict[str, Any] = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    config = MarianConfig(
        vocab_size=len(tokenizer),
        d_model=WIDTH,
        max_position_embeddings=POSITIONS,
        decoder_start_token_id=tokenizer.pad_token_id,
        forced_eos_token_id=None,
        scale_embedding=True,
        **both,
        **ids,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = MarianMTModel(config)
    names = tuple(name for name, _ in module.named_parameters())
    Model(module=module.train(False), tokenizer=tokenizer, source="untrained", new_weights=names).save(folder)
    millions = sum(parameter.numel() for parameter in module.parameters()) / 1e6
    return (
        f"{millions:.1f} million random weights (seed {seed}), {len(tokenizer):,} tokens learnt from {len(rows):,} training rows."
    )
