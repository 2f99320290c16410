"""Marian's pair of SentencePiece models as one fast tokenizer: the same ids for sources, the same texts for tokens."""

from __future__ import annotations

import dataclasses
import json
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
import translators
from transformers import AutoTokenizer, MarianConfig, MarianMTModel

from multum import runtimes
from multum._model_checkup import _of_the_model
from multum._runtime_inputs import check, lengths_of
from multum.core.generation import write
from multum.core.model import Model
from multum.errors import InputError
from multum.runtimes._sentencepiece import MARK, check_alike, converted, convertible
from multum.targets import export_model
from multum.tasks.translation import Translation

sentencepiece = pytest.importorskip("sentencepiece")
pytestmark = pytest.mark.filterwarnings("ignore:Recommended. pip install sacremoses")  # which nothing there calls
SYLLABLES = ["per", "ché", "la", "cit", "tà", "è", "bel", "lo", "più", "so", "le"]
CODES = [">>it<<", ">>fr<<"]


def sources() -> list[str]:
    return [text for text, _ in translators.sentences(200)] + [f"{text}, 3.5 %!" for text in tiny.passages(40)]


def targets(count: int = 240) -> list[str]:
    """Words of a language that the source's model has seen nothing of."""
    rng = random.Random(0)
    words = ["".join(rng.choices(SYLLABLES, k=rng.randint(1, 3))) for _ in range(60)]
    return [" ".join(rng.choices(words, k=rng.randint(2, 7))) + "." for _ in range(count)]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """source.spm, target.spm and vocab.json, as opus-mt models have them: the padding token last."""
    folder = tmp_path_factory.mktemp("marian")
    pieces: dict[str, None] = {"</s>": None, "<unk>": None}
    for name, texts in (("source", sources()), ("target", targets())):
        (folder / f"{name}.txt").write_text("\n".join(texts))
        options = {"model_type": "unigram", "vocab_size": 120, "hard_vocab_limit": False, "minloglevel": 2}
        sentencepiece.SentencePieceTrainer.train(input=str(folder / f"{name}.txt"), model_prefix=str(folder / name), **options)
        (folder / f"{name}.model").rename(folder / f"{name}.spm")
        loaded = sentencepiece.SentencePieceProcessor(model_file=str(folder / f"{name}.spm"))
        pieces |= dict.fromkeys(loaded.id_to_piece(list(range(3, loaded.get_piece_size()))))
    rest = [*sorted(pieces.keys() - {"</s>", "<unk>"}), *CODES, "<pad>"]  # in no order of either model
    ids = {token: number for number, token in enumerate(["</s>", "<unk>", *rest])}
    (folder / "vocab.json").write_text(json.dumps(ids, ensure_ascii=False))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "MarianTokenizer", "model_max_length": 32}))
    (folder / "config.json").write_text(json.dumps({"model_type": "marian", "max_position_embeddings": 32}))
    return folder


@pytest.fixture(scope="module")
def slow(files: Path) -> Any:
    found = AutoTokenizer.from_pretrained(files)
    assert not found.is_fast
    return found


ODD = ["", " ", "  two   spaces ", "tab\tand\nline", "old tree" * 9, "città", "un film è più", "ð", "a ð b", "ﬁne ½ Å", "日本"]


def test_ids_and_texts_are_the_same(slow: Any) -> None:
    fast = converted(slow, sources(), targets())
    assert fast.is_fast
    texts = [*sources(), *targets(), *ODD, *(f"{code} the old {code} tree" for code in CODES[:1])]
    for text in texts[:-1]:
        assert fast(text)["input_ids"] == slow(text)["input_ids"], text
        assert fast(text, truncation=True, max_length=6)["input_ids"] == slow(text, truncation=True, max_length=6)["input_ids"]
    code = f"{CODES[0]} the old tree"
    assert fast(code)["input_ids"] == slow(code)["input_ids"]
    assert fast(code)["input_ids"][0] == slow.encoder[CODES[0]]
    # Whatever a model may write is written out alike, pieces of either language or none.
    rng = random.Random(1)
    rows = [slow(text_target=text)["input_ids"] for text in targets()]
    rows += [[rng.randrange(len(slow.encoder)) for _ in range(9)] for _ in range(300)]
    for ids in rows:
        assert fast.decode(ids, skip_special_tokens=True).strip() == slow.decode(ids, skip_special_tokens=True).strip()
    assert (fast.pad_token_id, fast.eos_token_id, fast.unk_token_id) == (slow.pad_token_id, slow.eos_token_id, slow.unk_token_id)
    # The test can fail: pieces of the target that could be read would be.
    assert any(MARK in token for token in fast.get_vocab())
    assert slow.unk_token_id in [one for text in targets() for one in slow(text)["input_ids"]]


def test_a_pair_that_cannot_be_one_is_refused(slow: Any, files: Path, tmp_path: Path) -> None:
    fast = converted(slow, sources()[:5])
    assert converted(fast, ["x"]) is fast
    other = dict(slow.encoder)
    used = slow.convert_ids_to_tokens(slow("old film")["input_ids"])[0]
    other["gone"] = other.pop(used)  # a piece of the source that the vocabulary lacks
    for name in ("source.spm", "target.spm", "tokenizer_config.json", "config.json"):
        (tmp_path / name).write_bytes((files / name).read_bytes())
    (tmp_path / "vocab.json").write_text(json.dumps(other))
    with pytest.raises(InputError, match=r"reads \['<unk>', .* where that of an export has .*, in 'old film'.*cannot be exported"):
        converted(AutoTokenizer.from_pretrained(tmp_path), ["old film"])
    (tmp_path / "vocab.json").write_text(json.dumps({token: 2 * number for token, number in slow.encoder.items()}))
    with pytest.raises(InputError, match=r"ids of vocab\.json are not 0, 1, 2"):
        converted(AutoTokenizer.from_pretrained(tmp_path), [])
    shifted = tiny.language_model("gpt2").tokenizer
    with pytest.raises(InputError, match=r"writes .* where that of an export writes"):
        check_alike(slow, shifted, [], targets()[:1])


def test_an_export_reads_and_writes_without_torch(slow: Any, files: Path, tmp_path: Path) -> None:
    pairs = list(zip(sources(), targets(), strict=True))
    splits = translators.splits(4, 4, 4)
    names = ("train", "validation", "test")
    for number, name in enumerate(names):
        rows = pairs[number * 12 : (number + 1) * 12]
        setattr(splits, name, type(splits.train).from_list([{"source": one, "target": other} for one, other in rows]))
    task = Translation.from_splits(splits)
    torch.manual_seed(0)
    block = {
        f"{side}_{name}": size
        for side in ("encoder", "decoder")
        for name, size in (("layers", 1), ("attention_heads", 4), ("ffn_dim", 32))
    }
    ids = {"pad_token_id": slow.pad_token_id, "eos_token_id": 0, "decoder_start_token_id": slow.pad_token_id, "bos_token_id": None}
    config = MarianConfig(d_model=32, vocab_size=len(slow.encoder), max_position_embeddings=32, init_std=0.5, **ids, **block)
    module = MarianMTModel(config).eval()
    module.generation_config.max_new_tokens, module.generation_config.max_length = 8, None
    module.config.use_cache = False
    model = Model(module=module, tokenizer=slow, source="opus")
    facts = export_model(runtimes.find("onnxruntime"), model, tmp_path / "out", "fp32", task, 0)
    assert facts["written_agreement"] == 1
    expected = [one.text for one in write(module, slow, task.inputs("test"), scored=True)]
    code = f"""
import sys, json
from multum import runtimes
from multum.core.generation import texts_of
found = texts_of(runtimes.open({str(tmp_path / "out")!r}, threads=1).predict({list(task.inputs("test"))!r}))
assert "torch" not in sys.modules and "transformers" not in sys.modules
print(json.dumps(found))
"""
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert json.loads(found.splitlines()[-1]) == expected
    assert lengths_of(files, task.inputs("test")) == [len(slow(text)["input_ids"]) for text in task.inputs("test")]


def test_what_can_be_converted(slow: Any, files: Path) -> None:
    assert convertible(slow)
    assert convertible(tiny.model().tokenizer)
    assert not convertible(object())
    model = dataclasses.replace(translators.translator("marian"), tokenizer=slow)
    limits = {limit.what: limit.why for limit in _of_the_model(model)}
    assert limits["trim_vocabulary"] == "it has no fast tokenizer (tokenizer.json)"
    assert not [what for what in limits if "exports" in what]
    task = SimpleNamespace(inputs=lambda _: ["old film"])
    check(files, task)
