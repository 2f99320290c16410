"""Sentences with word-by-word translations, documents with summaries, and encoder-decoders of real classes that can learn them."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForSeq2SeqLM, PreTrainedTokenizerFast

from multum.core.generation import Written, as_numbers
from multum.core.model import Model
from multum.core.reading import together
from multum.tasks.summarization import Summarization
from multum.tasks.translation import Translation

WORDS = {"film": "film", "house": "haus", "tree": "baum", "water": "wasser", "bread": "brot", "night": "nacht", "hand": "hand"}
WORDS |= {"book": "buch", "green": "gruen", "old": "alt", "good": "gut", "and": "und"}
FAMILIES = ("marian", "bart", "t5")
POSITIONS = 32


def sentences(count: int, *, seed: int = 0, longest: int = 7) -> list[tuple[str, str]]:
    """Different sentences with their translations, word by word."""
    rng, found = random.Random(seed), {}
    while len(found) < count:
        words = [rng.choice(list(WORDS)) for _ in range(rng.randint(2, longest))]
        found[" ".join(words)] = " ".join(WORDS[word] for word in words)
    return list(found.items())


def splits(
    n_train: int = 48, n_validation: int = 16, n_test: int = 16, *, seed: int = 0, columns: tuple[str, str] = ("source", "target")
) -> SimpleNamespace:
    """Three data sets with these two columns."""
    pairs, made = sentences(n_train + n_validation + n_test, seed=seed), {}
    for name, count in (("train", n_train), ("validation", n_validation), ("test", n_test)):
        made[name] = Dataset.from_list([dict(zip(columns, pairs.pop(), strict=True)) for _ in range(count)])
    return SimpleNamespace(**made, notes=[], fingerprints={name: name for name in made})


def translating(n_train: int = 48, n_validation: int = 16, n_test: int = 16, **options: Any) -> Translation:
    """A task that a tiny model can learn."""
    return Translation.from_splits(splits(n_train, n_validation, n_test), **options)


def summarizing(n_train: int = 48, **options: Any) -> Summarization:
    """The same as documents and summaries."""
    return Summarization.from_splits(splits(n_train, columns=Summarization.columns), **options)


def predictions(texts: list[str]) -> np.ndarray:
    """Texts as a predictor returns them."""
    return together([as_numbers(Written(text, len(text.split()) + 1, -0.5)) for text in texts])


def translator(family: str = "marian", *, hidden: int = 32, layers: int = 2, seed: int = 0, spread: float = 1.0) -> Model:
    """An encoder-decoder with random weights that knows all words of both languages: one of `FAMILIES`, mbart or mt5."""
    words = ["<pad>", "</s>", "<unk>", *dict.fromkeys([*WORDS, *WORDS.values()]), "translate:"]
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))  # noqa: S106
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing(single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made,
        model_max_length=POSITIONS,
        pad_token="<pad>",  # noqa: S106
        eos_token="</s>",  # noqa: S106
        unk_token="<unk>",  # noqa: S106
        model_input_names=["input_ids", "attention_mask"],
    )
    ids = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0, "vocab_size": len(words)}
    torch.manual_seed(seed)
    module: torch.nn.Module
    if family in ("t5", "mt5"):
        sizes = {"d_model": hidden, "d_kv": hidden // 4, "d_ff": 2 * hidden, "num_layers": layers, "num_heads": 4}
        module = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(family, **sizes, **ids))
    elif family in ("marian", "bart", "mbart"):
        sizes = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in _block(hidden, layers).items()}
        stock = {"d_model": hidden, "max_position_embeddings": POSITIONS, "dropout": 0.0, "init_std": 0.1, **sizes, **ids}
        none = {"bos_token_id": None, "forced_eos_token_id": None}
        module = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(family, **stock, **none))
    else:
        raise ValueError(family)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.dim() > 1 and "positions" not in name:
                parameter.mul_(spread)
    module.config.use_cache = False
    return Model(module=module.eval(), tokenizer=tokenizer, source=f"tiny-{family}")


def _block(hidden: int, layers: int) -> dict[str, int]:
    return {"layers": layers, "attention_heads": 4, "ffn_dim": 2 * hidden}
