r"""Pretraining on plain text: a language model's own objective, from random weights or continued.

    causal    L = - mean_i log p(w_i | w_1 ... w_{i-1})                                (Radford et al. 2018)
    masked    L = - mean_{i in M} log p(w_i | all w_j, j not in M)                     (Devlin et al. 2019, arXiv:1810.04805, 3.1)

over the tokens of a batch of blocks; M is 15 % of them, hidden 80 / 10 / 10 (`core/masking`), drawn anew in every pass. The text is
streamed from a file or a folder of files that may be larger than memory, cut into documents, tokenized and packed into blocks
without padding (`core/packing`); pass follows pass until all steps are done. A classifier's body is trained under the new head of a
language model, which is then left away (domain-adaptive pretraining, Gururangan et al. 2020, arXiv:2004.10964); its own head stays.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import nn
from transformers.models.auto import modeling_auto as auto

from ..core import processes
from ..core.corpus import Blocks, Corpus, Objective, Unit
from ..core.families import base_of
from ..core.folders import whole_folder
from ..core.likelihood import context_of, known_cross_entropy
from ..core.model import Model
from ..core.new_tokenizer import LEAST, Kind, train_tokenizer
from ..core.shapes import without_shapes
from ..core.step import Step
from ..core.students import make_student, student_problems, turn_into
from ..core.task import Task
from ..core.training import Precision, fit, last_checkpoint, memory_problems, training_problems
from ..errors import InputError
from ._outputs import kind_of

BLOCK = 512
EXAMPLE = "--text books/ --steps 2000"


@dataclass(frozen=True, kw_only=True)
class Pretrain(Step):
    """Train a model on plain text to foretell tokens, or to fill in hidden ones."""

    text: str
    """A .txt file, or a folder with .txt files in it and below; UTF-8."""
    steps: int = 1000
    """Optimizer steps. One reads `batch_size` times `block` tokens."""
    start: Literal["continue", "scratch"] | dict[str, Any] = "continue"
    """`continue`: with the model's weights; `scratch`: with random ones; or the sizes of a new model with random weights:
    `{hidden_size: 128, num_hidden_layers: 2, num_attention_heads: 2, intermediate_size: 512}`."""
    tokenizer: Literal["keep", "bpe", "wordpiece"] = "keep"
    """`keep` the model's, or train a new one on the text first: byte-level BPE or WordPiece. It takes random weights."""
    vocabulary: int = 30000
    """Tokens of a new tokenizer, at most."""
    documents: Unit = "paragraph"
    """What a document is: a `paragraph` (empty lines stand between them), a `line`, or a `file`."""
    block: int | None = None
    """Tokens of a block; by default what the model reads, at most 512."""
    apart: bool = False
    """Documents in one block do not see each other. For causal models."""
    whole_words: bool = False
    """Hide all tokens of a word, or none. For masked models."""
    shuffle: int = 1000
    """Documents that the next one is drawn from; 0 keeps the order of the files."""
    learning_rate: float = 3e-4
    """The highest learning rate, reached after the warm-up."""
    batch_size: int = 16
    """Blocks per optimizer step."""
    weight_decay: float = 0.01
    """AdamW's decoupled weight decay."""
    warmup: float = 0.1
    """Share of all steps over which the learning rate rises from zero."""
    precision: Precision = "auto"
    """`fp32`, `bf16` (autocast), or `auto`: bf16 where the processor has instructions for it."""
    accumulate: int = 1
    """Parts that a batch is computed in, one after the other, to save memory."""
    checkpointing: bool = False
    """Compute the blocks again on the way back, which saves memory and takes a third more time."""
    seed: int = 0
    """Seeds random weights, the order of the documents, the masks and the dropout."""
    checkpoints: str | None = None
    """Folder to keep the state of training in. The same step on the same model goes on from the last one found there, with
    the new tokenizer that was kept beside it."""
    save_every: int = 500
    """Optimizer steps between two checkpoints."""

    @property
    def needs_data(self) -> bool:
        return False

    def check(self) -> list[str]:
        problems = training_problems(1, self.learning_rate, self.batch_size, self.warmup)
        problems += memory_problems(self.batch_size, self.accumulate, None)
        problems += [
            f"{name} must be at least {least} (got {value})"
            for name, value, least in (("steps", self.steps, 1), ("save_every", self.save_every, 1), ("shuffle", self.shuffle, 0))
            if value < least
        ]
        if not self.text:
            problems.append("text names no file or folder")
        if self.block is not None and (self.block < 8 or self.block % 8):
            problems.append(f"block must be a multiple of 8 (got {self.block})")
        if self.tokenizer != "keep" and self.start == "continue":
            problems.append("tokenizer: the model's weights belong to its own tokenizer; a new one takes start: scratch, or sizes")
        if self.tokenizer != "keep" and self.vocabulary < LEAST[self.tokenizer]:
            problems.append(f"vocabulary must be at least {LEAST[self.tokenizer]} (got {self.vocabulary})")
        if isinstance(self.start, dict):
            problems += [problem.replace("student", "start", 1) for problem in student_problems(self.start)]
            problems += ["start: layers are blocks of a model; give sizes, or use drop_layers"] if "layers" in self.start else []
        elif self.start not in ("continue", "scratch"):
            problems.append(f"start must be 'continue', 'scratch' or the sizes of a new model (got {self.start!r})")
        return problems

    def apply(self, model: Model, task: Task) -> Mapping[str, Any]:
        corpus = Corpus.of(self.text, self.documents, shuffle=self.shuffle, seed=self.seed)
        masked = _is_masked(model.module)
        self._check_objective(masked)
        if self.tokenizer != "keep":
            _take(model, self._new_tokenizer(corpus, self.tokenizer, context_of(model.module, model.tokenizer), masked))
        if self.start != "continue":
            sizes = self.start if isinstance(self.start, dict) else {"num_hidden_layers": model.module.config.num_hidden_layers}
            turn_into(model, make_student(model, sizes, task, seed=self.seed)[0])
        limit = context_of(model.module, model.tokenizer)
        size = self.block or min(limit, BLOCK) // 8 * 8
        if not 8 <= size <= limit:
            raise InputError(f"pretrain: block is {size} tokens, but the model reads {limit} at most")
        rows = Blocks(corpus, model.tokenizer, size, Objective(masked, self.whole_words, self.apart))
        result = fit(
            replace(model, module=_language_model(model.module, masked, self.seed)),
            rows,
            masked_loss if masked else causal_loss,
            steps=self.steps,
            learning_rate=self.learning_rate,
            batch_size=self.batch_size,
            weight_decay=self.weight_decay,
            warmup=self.warmup,
            precision=self.precision,
            accumulate=self.accumulate,
            checkpointing=self.checkpointing,
            seed=self.seed,
            checkpoints=Path(self.checkpoints) if self.checkpoints else None,
            save_every=self.save_every,
        )
        model.module.eval()
        body = f"{model.module.base_model_prefix}."
        untrained = () if _has_language_head(model.module) else model.new_weights
        model.new_weights = tuple(name for name in untrained if not name.startswith(body))
        tokens = self.steps * self.batch_size * size
        return {"training": result, "tokens": tokens, "block": size, "files": len(corpus.files), "bytes": corpus.bytes}

    def _new_tokenizer(self, corpus: Corpus, kind: Kind, longest: int, masked: bool) -> Any:
        """Trained on the text and kept beside the checkpoints: whoever goes on takes the one whose tokens those weights know,
        whatever has become of the text or the library. So do all processes but the main one."""
        folder = Path(self.checkpoints) if self.checkpoints else None
        kept = folder / f"tokenizer-{kind}-{self.vocabulary}" if folder else None
        goes_on = processes.number() > 0 or last_checkpoint(folder) is not None
        with processes.main_first():
            if kept and kept.is_dir() and goes_on:
                fast: Any = transformers.PreTrainedTokenizerFast  # untyped
                return fast.from_pretrained(kept)
            read = replace(corpus, shuffle=0).texts
            made = train_tokenizer(read, kind, self.vocabulary, longest=longest, around=masked)
            if kept and processes.number() == 0:
                with whole_folder(kept) as work:
                    made.save_pretrained(work)
            return made

    def _check_objective(self, masked: bool) -> None:
        problems = []
        if masked and self.apart:
            problems.append("pretrain: apart is for causal models; a masked one lets all tokens of a block see each other")
        if not masked and self.whole_words:
            problems.append("pretrain: whole_words is for masked models; a causal one hides no tokens")
        if problems:
            raise InputError(*problems)


def causal_loss(module: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Cross entropy of every token, given those before it."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    return known_cross_entropy(module(**inputs, use_cache=False).logits[:, :-1], batch["labels"][:, 1:])


def masked_loss(module: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Cross entropy of the hidden tokens."""
    asked = batch["labels"] >= 0
    return known_cross_entropy(module(input_ids=batch["input_ids"]).logits[asked], batch["labels"][asked])


def _has_language_head(module: nn.Module) -> bool:
    return kind_of(module) in ("masked_lm", "causal_lm")


def _is_masked(module: Any) -> bool:
    """Whether the model, or its body under a new head, fills in hidden tokens; else it foretells them."""
    kind = kind_of(module)
    if kind in ("masked_lm", "causal_lm"):
        return kind == "masked_lm"
    if kind == "seq2seq" or getattr(module.config, "is_encoder_decoder", False):
        raise InputError(f"pretrain: {type(module).__name__} is an encoder-decoder; it takes an encoder or a decoder alone")
    return module.config.model_type in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES


def _language_model(module: Any, masked: bool, seed: int) -> Any:
    """The model itself, or its body under a new head of random weights: the same parts, so that both are trained as one."""
    if _has_language_head(module):
        return module
    made = transformers.AutoModelForMaskedLM if masked else transformers.AutoModelForCausalLM
    config = type(module.config).from_dict(without_shapes(module.config.to_dict()))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        whole = made.from_config(config, attn_implementation=module.config._attn_implementation)
    setattr(whole, whole.base_model_prefix, base_of(module))
    whole.config = module.config  # the parts read this one
    whole.tie_weights()
    return whole


def _take(model: Model, tokenizer: Any) -> None:
    """Give a model another tokenizer and its numbers; the weights do not fit it any more."""
    model.tokenizer, config = tokenizer, model.module.config
    config.vocab_size = len(tokenizer)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"):
        if getattr(config, name, None) is not None or getattr(tokenizer, name) is not None:
            setattr(config, name, getattr(tokenizer, name))
