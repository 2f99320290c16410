"""Small models and data for tests: real classes, real fast tokenizers, seeded random weights, made in milliseconds."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from functools import cache
from types import SimpleNamespace

import tiny_families
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    ElectraConfig,
    ElectraForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from multum.core.families import blocks_of, family_of
from multum.core.model import Model
from multum.core.surgery import head_size, keep_heads, keep_neurons
from multum.tasks.text_classification import TextClassification

FAMILIES = ("bert", "distilbert", "roberta", "electra")
POSITIONS = 64

GOOD = ["wonderful", "moving", "brilliant", "funny", "charming", "superb", "gripping", "tender"]
BAD = ["dreadful", "boring", "clumsy", "dull", "lifeless", "awful", "tedious", "shallow"]
MIXED = ["average", "uneven", "ordinary", "passable", "modest", "plain", "middling", "routine"]
NOUNS = ["film", "story", "acting", "plot", "script", "music", "ending", "cast", "scene", "dialogue"]
FILLERS = ["the", "a", "this", "and", "with", "its", "really", "quite", "of", "in", "was", "is"]
CLASSES = {2: ("negative", "positive"), 3: ("mixed", "negative", "positive")}
WORDS_OF = {"positive": GOOD, "negative": BAD, "mixed": MIXED}


def sentence(rng: random.Random, label: str) -> str:
    """A made-up review; its adjectives tell the label."""
    words = [rng.choice(FILLERS + NOUNS) for _ in range(rng.randint(2, 14))]
    for _ in range(rng.randint(1, 3)):
        words.insert(rng.randint(0, len(words)), rng.choice(WORDS_OF[label]))
    return " ".join(words)


def splits(
    n_train: int = 64, n_validation: int = 32, n_test: int = 32, *, seed: int = 0, classes: int = 2, pairs: bool = False
) -> SimpleNamespace:
    """Three data sets with `text`, `label` and, for pairs, `text_pair`; no text occurs twice."""
    rng, seen = random.Random(seed), set()
    made = {}
    for name, count in (("train", n_train), ("validation", n_validation), ("test", n_test)):
        rows = []
        while len(rows) < count:
            label = CLASSES[classes][len(rows) % classes]
            text = sentence(rng, label)
            if text not in seen:
                seen.add(text)
                rows.append({"text": text, **({"text_pair": sentence(rng, label)} if pairs else {}), "label": label})
        made[name] = Dataset.from_list(rows)
    return SimpleNamespace(**made, notes=[], fingerprints={name: name for name in made})


def task(
    n_train: int = 64, n_validation: int = 32, n_test: int = 32, *, seed: int = 0, classes: int = 2, pairs: bool = False
) -> TextClassification:
    """A task that a tiny model can learn."""
    return TextClassification.from_splits(splits(n_train, n_validation, n_test, seed=seed, classes=classes, pairs=pairs))


def model(
    family: str = "bert",
    *,
    layers: int = 2,
    heads: int = 4,
    neurons: int = 32,
    hidden: int = 32,
    seed: int = 0,
    labels: tuple[str, ...] = ("negative", "positive"),
) -> Model:
    """A classifier with random weights, spread wide enough that its answers differ from text to text."""
    tokenizer = tiny_families.tokenizer(family, _tokenizer(family), model_max_length=POSITIONS, **_special(family))
    names = {
        "id2label": dict(enumerate(labels)),
        "label2id": {label: i for i, label in enumerate(labels)},
        "pad_token_id": tokenizer.pad_token_id,
        "vocab_size": len(tokenizer),
    }
    stock = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": neurons,
        "max_position_embeddings": POSITIONS,
    }
    torch.manual_seed(seed)
    if family == "distilbert":
        config = DistilBertConfig(
            dim=hidden, n_layers=layers, n_heads=heads, hidden_dim=neurons, max_position_embeddings=POSITIONS, **names
        )
        module = DistilBertForSequenceClassification(config)
    elif family in ("roberta", "xlm-roberta"):
        stock["max_position_embeddings"] += tokenizer.pad_token_id + 1
        config = AutoConfig.for_model(family, type_vocab_size=1, **stock, **names)
        module = AutoModelForSequenceClassification.from_config(config)
    elif family == "electra":
        module = ElectraForSequenceClassification(ElectraConfig(embedding_size=hidden // 2, **stock, **names))
    elif family == "bert":
        module = BertForSequenceClassification(BertConfig(**stock, **names))
    elif family in tiny_families.FAMILIES:
        ids = {"bos_token_id": tokenizer.cls_token_id, "eos_token_id": tokenizer.sep_token_id}
        sizes = {"layers": layers, "heads": heads, "neurons": neurons, "hidden": hidden, "positions": POSITIONS}
        module = tiny_families.classifier(family, **sizes, **ids, **names)
    else:
        raise ValueError(family)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(10.0)  # 0.02 is made for wide layers; here it would leave nothing but biases
            elif name.endswith("bias"):
                parameter.normal_(std=0.1)
    return Model(module=module.eval(), tokenizer=tokenizer, source=f"tiny-{family}")


def uneven(model: Model) -> Model:
    """The same model after surgery: uneven heads and neurons, an attention and a feed-forward gone. Takes 3 layers or more."""
    result = model.copy()
    family, size = family_of(result.module), head_size(result.module)
    blocks = blocks_of(result.module)
    keep_heads(blocks[0], family, [0, 2], size)
    keep_neurons(blocks[0], family, list(range(20)))
    keep_heads(blocks[1], family, [], size)
    keep_neurons(blocks[2], family, [])
    keep_heads(blocks[2], family, [1, 2, 3], size)
    return result


def _special(family: str) -> dict[str, object]:
    if _is_bpe(family):
        names = {"bos_token": "<s>", "eos_token": "</s>", "cls_token": "<s>", "sep_token": "</s>"}
        return {**names, "pad_token": "<pad>", "unk_token": "<unk>", "model_input_names": ["input_ids", "attention_mask"]}
    names = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "unk_token": "[UNK]", "mask_token": "[MASK]"}
    typed = family not in ("distilbert", *tiny_families.FAMILIES)
    inputs = ["input_ids", "attention_mask"] + (["token_type_ids"] if typed else [])
    return {**names, "model_input_names": inputs}


@cache
def _corpus() -> list[str]:
    rng = random.Random(99)
    return [sentence(rng, label) for label in WORDS_OF for _ in range(200)] + ["Unrelated words: zebra, quicksand & 1984!"]


def _tokenizer(family: str) -> Tokenizer:
    return Tokenizer.from_str(_trained("unigram" if family == "xlm-roberta" else "bpe" if _is_bpe(family) else "wordpiece"))


def _is_bpe(family: str) -> bool:
    """XLM-R's vocabulary is none, but its special tokens are called the same."""
    return family in ("roberta", "xlm-roberta") or (family in tiny_families.FAMILIES and family not in tiny_families.WORDPIECE)


@cache
def _trained(kind: str) -> str:
    if kind == "bpe":
        made = Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        made.train_from_iterator(_corpus(), trainer)
        made.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    elif kind == "unigram":
        made = unigram(_corpus(), 200)
    else:
        made = Tokenizer(models.WordPiece(unk_token="[UNK]"))  # noqa: S106
        made.normalizer = normalizers.BertNormalizer(lowercase=True)
        made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        made.decoder = decoders.WordPiece()
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        # Letters that go on would be numbered in an order of chance, which decides between merges that are equally frequent.
        letters = sorted({f"##{letter}" for letter in "".join(_corpus()).lower() if not letter.isspace()})
        trainer = trainers.WordPieceTrainer(vocab_size=250, special_tokens=[*special, *letters], show_progress=False)
        made.train_from_iterator(_corpus(), trainer)
        made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
        spec = json.loads(made.to_str())
        spec["added_tokens"] = spec["added_tokens"][: len(special)]
        return json.dumps(spec)
    return str(made.to_str())


def unigram(texts: list[str], size: int) -> Tokenizer:
    """A Unigram tokenizer that is the same in every process: the pieces of BPE, log p by how often they are used.

    The library's own training sums floats in an order of chance, so that scores differ, and by them which pieces there are.
    """
    special, space = ["<s>", "<pad>", "</s>", "<unk>"], pre_tokenizers.Metaspace()
    merged = Tokenizer(models.BPE(unk_token=special[-1]))
    merged.pre_tokenizer = space
    merged.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=size, special_tokens=special, show_progress=False))
    uses = Counter(token for text in texts for token in merged.encode(text).tokens)
    pieces = sorted(set(merged.get_vocab()) - set(special), key=lambda piece: (-uses[piece], piece))
    scores = [(piece, math.log((uses[piece] + 1) / (uses.total() + len(pieces)))) for piece in pieces]
    made = Tokenizer(models.Unigram([*((token, 0.0) for token in special), *scores], unk_id=special.index("<unk>")))
    made.pre_tokenizer = space
    made.add_special_tokens(special)
    return made


LANGUAGE_MODELS = ("gpt2", "llama", "bert")
"""Two causal ones, of which `llama` puts a BOS token before every text, and a masked one."""


def language_model(
    family: str = "llama",
    *,
    layers: int = 2,
    heads: int = 4,
    neurons: int = 48,
    hidden: int = 32,
    positions: int = POSITIONS,
    seed: int = 0,
) -> Model:
    """A language model with random weights, spread wide enough that no two tokens are equally probable."""
    made = _tokenizer("bert" if family == "bert" else "roberta")
    if family == "llama":
        made.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)])
    elif family == "gpt2":
        made.post_processor = processors.ByteLevel(trim_offsets=False)
    special = {k: v for k, v in _special("bert" if family == "bert" else "roberta").items() if k not in ("cls_token", "sep_token")}
    special |= {"cls_token": "[CLS]", "sep_token": "[SEP]"} if family == "bert" else {}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=positions, **special)
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    stock = {"vocab_size": len(tokenizer), "max_position_embeddings": positions, "num_attention_heads": heads, **ids}
    stock |= {"hidden_size": hidden, "num_hidden_layers": layers}
    torch.manual_seed(seed)
    module: torch.nn.Module
    if family == "llama":
        module = LlamaForCausalLM(LlamaConfig(num_key_value_heads=heads // 2, intermediate_size=neurons, **stock))
    elif family == "gpt2":
        module = GPT2LMHeadModel(GPT2Config(n_inner=neurons, **stock))
    elif family == "bert":
        module = BertForMaskedLM(BertConfig(intermediate_size=neurons, **stock))
    else:
        raise ValueError(family)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(10.0)
            elif name.endswith("bias"):
                parameter.normal_(std=0.1)
    module.config.use_cache = False
    return Model(module=module.eval(), tokenizer=tokenizer, source=f"tiny-{family}-lm")


def passages(count: int, *, seed: int = 0) -> list[str]:
    """Different texts of two to five made-up sentences."""
    rng, found = random.Random(seed), []
    while len(found) < count:
        labels = [rng.choice(list(WORDS_OF)) for _ in range(rng.randint(2, 5))]
        text = ". ".join(sentence(rng, label) for label in labels) + "."
        if text not in found:
            found.append(text)
    return found


def text_splits(n_train: int = 64, n_validation: int = 32, n_test: int = 32, *, seed: int = 0) -> SimpleNamespace:
    """Three data sets with a column `text`."""
    texts, made = passages(n_train + n_validation + n_test, seed=seed), {}
    for name, count in (("train", n_train), ("validation", n_validation), ("test", n_test)):
        made[name] = Dataset.from_dict({"text": [texts.pop() for _ in range(count)]})
    return SimpleNamespace(**made, notes=[], fingerprints={name: name for name in made})
