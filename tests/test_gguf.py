"""GGUF files: tensors, fields and tokenizers, read back; by transformers, and by a second way to compute what llama.cpp does."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiny
import tiny_families
import torch
from gguf_reference import Reference
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from multum.core.families import blocks_of, family_of
from multum.core.model import Model
from multum.core.step import make
from multum.core.surgery import head_size, keep_heads, keep_neurons
from multum.errors import InputError
from multum.runtimes._gguf import FILE_TYPES, write_gguf
from multum.runtimes._gguf_grid import on_grid, quantized
from multum.runtimes._gguf_tokenizer import UNKNOWN, tokenizer_fields
from multum.runtimes._own_codes import kept

FAMILIES = ("llama", "mistral", "phi3", "qwen2", "qwen3", "gemma", "gpt2")
WIDE = {"use_sliding_window": False, "sliding_window": None}


def decoder(family: str, *, hidden: int = 32, **more: Any) -> Model:
    """A causal model of a family, two blocks; heads as wide as the model where llama.cpp wants that."""
    made = tiny.language_model("gpt2" if family == "gpt2" else "llama")
    sizes = {"layers": 2, "heads": 2, "hidden": hidden, "vocabulary": len(made.tokenizer), **more}
    if family in ("qwen2", "mistral", "phi3"):
        sizes = {**WIDE, **sizes}
        sizes = {name: value for name, value in sizes.items() if family == "qwen2" or name != "use_sliding_window"}
    if family == "gemma":
        sizes = {"hidden_act": "gelu_pytorch_tanh", **sizes}
    module = tiny_families.language_model(family, **sizes)
    for parameter in module.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)  # norms of ones and biases of zeros would hide mistakes
    return Model(module=module, tokenizer=made.tokenizer, source=f"tiny-{family}")


def cut(model: Model, *, first: bool = False) -> Model:
    """Fewer heads and neurons in the first block, and nothing else of the second's attention; of the first's if `first`."""
    family, size, blocks = family_of(model.module), head_size(model.module), blocks_of(model.module)
    keep_heads(blocks[1 - int(first)], family, [], size)
    keep_heads(blocks[int(first)], family, [1], size)
    keep_neurons(blocks[0], family, [0, 3, 4, 9, 20])
    return model


def logits(model: Model, ids: list[int]) -> np.ndarray:
    with torch.no_grad():
        return model.module(torch.tensor([ids]), use_cache=False).logits[0].double().numpy()


IDS = [0, 5, 17, 33, 60, 9, 250, 5, 120]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_computes_what_the_model_does(family: str, tmp_path: Path) -> None:
    model = decoder(family)
    facts = write_gguf(model, tmp_path / "m.gguf", "f32")
    file = Reference(tmp_path / "m.gguf")
    assert facts["architecture"] == file.arch == {"mistral": "llama", "phi3": "llama"}.get(family, family)
    assert set(file.types.values()) == {"F32"}
    np.testing.assert_allclose(file.logits(IDS), logits(model, IDS), rtol=1e-4, atol=1e-4)


ASSUMED = {"qwen3": {"head_dim": 128}, "gpt2": {"neurons": 128, "positions": 1024}}
"""Sizes that transformers does not read off a file."""


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gemma"])  # which transformers reads no file of
def test_transformers_reads_it_as_the_same_model(family: str, tmp_path: Path) -> None:
    model = decoder(family, **ASSUMED.get(family, {}))
    write_gguf(model, tmp_path / "m.gguf", "f32")
    again = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32).eval()
    np.testing.assert_allclose(logits(Model(module=again, tokenizer=None, source=""), IDS), logits(model, IDS), atol=1e-5)


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("family", ["llama", "mistral", "phi3", "qwen2"])
def test_pruned_blocks_have_sizes_of_their_own(family: str, first: bool, tmp_path: Path) -> None:
    model = cut(decoder(family), first=first)
    assert write_gguf(model, tmp_path / "m.gguf", "f32")["architecture"] == "deci"
    file = Reference(tmp_path / "m.gguf")
    # The first block's attention, from which sizes are read, is a head of zeros where it is gone.
    assert file.field("attention.head_count_kv") == ([1, 1] if first else [1, 0])
    assert file.field("attention.head_count") == ([2, 2] if first else [2, 0])
    assert file.field("feed_forward_length") == [5, 32]
    np.testing.assert_allclose(file.logits(IDS), logits(model, IDS), rtol=1e-4, atol=1e-4)


def test_what_is_gone_costs_nothing_and_changes_nothing(tmp_path: Path) -> None:
    """A block without both sublayers is left out; one without a feed-forward has a neuron of zeros; biases stay."""
    model = decoder("llama", layers=4, attention_bias=True, mlp_bias=True)
    family, size, blocks = family_of(model.module), head_size(model.module), blocks_of(model.module)
    keep_heads(blocks[1], family, [], size)
    keep_neurons(blocks[2], family, [])
    np.testing.assert_allclose(_written(model, tmp_path).logits(IDS), logits(model, IDS), rtol=1e-4, atol=1e-4)
    bare = decoder("llama", layers=4)
    family, blocks = family_of(bare.module), blocks_of(bare.module)
    for number in (0, 3):
        keep_heads(blocks[number], family, [], size)
        keep_neurons(blocks[number], family, [])
    file = _written(bare, tmp_path)
    assert file.field("block_count") == 2
    np.testing.assert_allclose(file.logits(IDS), logits(bare, IDS), rtol=1e-4, atol=1e-4)


def _written(model: Model, folder: Path, precision: str = "f32") -> Reference:
    write_gguf(model, folder / "m.gguf", precision)
    return Reference(folder / "m.gguf")


def test_heads_that_are_not_as_wide_as_a_qwen2(tmp_path: Path) -> None:
    model = decoder("qwen2", hidden=48)
    assert _written(model, tmp_path).arch == "deci"
    np.testing.assert_allclose(Reference(tmp_path / "m.gguf").logits(IDS), logits(model, IDS), rtol=1e-4, atol=1e-4)


LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 2.0}


@pytest.mark.parametrize("settings", [{**LLAMA3, "original_max_position_embeddings": 16}, {"rope_type": "linear", "factor": 2.0}])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_scaled_positions(family: str, settings: dict[str, Any], tmp_path: Path) -> None:
    model = decoder(family, rope_parameters={**settings, "rope_theta": 10000.0})
    file = _written(model, tmp_path)
    assert not np.allclose(file.tensors["rope_freqs.weight"], 1)
    np.testing.assert_allclose(file.logits(IDS), logits(model, IDS), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("precision", "levels"), [("q8_0", 127), ("q4_0", 8)])
def test_quantized_matrices_are_within_half_a_step(precision: str, levels: int, tied: bool, tmp_path: Path) -> None:
    """One scale for 32 weights of a row. Half a step, a whole one at the end that 4 bits lack, and the scale's own rounding."""
    model = decoder("llama", neurons=40, tie_word_embeddings=tied)
    exact, file = _written(model, tmp_path), _written(model, tmp_path, precision)
    assert file.field("feed_forward_length") == 64  # filled up with neurons of zeros
    output = "token_embd.weight" if tied else "output.weight"
    for name, values in file.tensors.items():
        missing = [(0, more - has) for more, has in zip(values.shape, exact.tensors[name].shape, strict=True)]
        before = np.pad(exact.tensors[name], missing, mode="edge" if "ffn_down" in name else "constant")  # read from zeros
        if values.ndim == 1:
            assert file.types[name] == "F32"
            np.testing.assert_array_equal(values, before)
            continue
        kind = "Q8_0" if name == output else precision.upper()
        assert file.types[name] == kind
        steps = np.abs(before).reshape(*before.shape[:-1], -1, 32).max(-1) / (127 if kind == "Q8_0" else levels)
        allowed = steps.repeat(32, axis=-1) * (0.5 if kind == "Q8_0" else 1.0) * 1.01 + 1e-3 * np.abs(before)
        assert (np.abs(values - before) <= allowed).all()
    # Rounding in both is all that is between the file and the model: what is computed from the rounded tensors is close to it.
    shares = [_softmax(values) for values in (exact.logits(IDS), file.logits(IDS))]
    if precision == "q8_0":
        assert np.abs(shares[0] - shares[1]).max() < 0.05


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1"])
def test_blocks_on_a_grid_keep_their_numbers(kind: str) -> None:
    rng, of = np.random.default_rng(0), gguf.GGMLQuantizationType[kind]
    scales = torch.tensor(rng.uniform(1e-3, 0.3, (64, 1))).bfloat16().float().numpy()
    middle = 8 if kind == "Q4_0" else rng.integers(0, 16, (64, 1))
    codes = rng.integers(0, 16, (64, 32))
    codes[:8] = rng.integers(6, 10, (8, 32))  # a part of the grid: llama.cpp's own rounding takes it for a finer one
    weights = (scales * (codes - middle)).astype(np.float32)
    weights[8], weights[9] = 0.0, weights[9, 0]
    made, held = quantized(weights, of, own=True)
    assert held
    back, step = gguf.quants.dequantize(made, of), scales
    assert (np.abs(back - weights) <= (0.0 if kind == "Q4_0" else step / 100)).all()
    assert np.abs(gguf.quants.dequantize(gguf.quants.quantize(weights, of), of) - weights).max() > step.max() / 20
    # Others are rounded as llama.cpp does, also where they stand between such as are on a grid.
    weights[5] += rng.normal(size=32).astype(np.float32) * 1e-3
    mixed, held = quantized(weights, of, own=True)
    assert not held
    np.testing.assert_array_equal(np.delete(mixed, 5, 0), np.delete(made, 5, 0))
    np.testing.assert_array_equal(mixed[5], gguf.quants.quantize(weights, of)[5])
    np.testing.assert_array_equal(quantized(weights, of, own=False)[0], gguf.quants.quantize(weights, of))


def test_a_scale_must_be_one_that_float16_has() -> None:
    codes = np.tile(np.arange(-8, 8, dtype=np.float32), (3, 2))
    for scale, has in ((2.0**-23 * 1.5, True), (2.0**-24 * 1.5, False), (2.0**13, True), (2.0**16, False)):
        assert len(on_grid(np.float32(scale) * codes, "Q4_0")[0]) == 3 * has


def test_an_offset_may_not_move_weights_far() -> None:
    """Zero points of HQQ's may be anything."""
    codes = np.tile(np.arange(16, dtype=np.float32), (3, 2))
    for scale, zero, held in (
        (0.25, 7.5, True),
        (0.1015625, 15, True),
        (0.1015625, 300.25, False),
        (2.0**-24, 7.5, False),
        (4096, 20, False),
    ):
        assert len(on_grid(np.float32(scale) * (codes - np.float32(zero)), "Q4_1")[0]) == 3 * held, (scale, zero)
    for value in (1e30, np.inf, np.nan):
        assert len(on_grid(np.full((2, 32), value, dtype=np.float32), "Q4_1")[0]) == 0
    assert len(on_grid(np.full((2, 32), -0.3, dtype=np.float32), "Q4_1")[0]) == 2


@pytest.mark.parametrize(
    ("precision", "packing"),
    [
        ("q4_0", {"bits": 4, "group": 32, "symmetric": True}),
        ("q4_1", {"bits": 4, "group": 32, "symmetric": False}),
        ("q4_1", {"bits": 4, "group": 64, "symmetric": False}),
        ("q4_1", {"bits": 3, "group": 32, "symmetric": False}),
        ("q4_1", {"bits": 4, "group": 32, "symmetric": False, "hqq": True}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
def test_a_packed_model_keeps_its_numbers(
    family: str, dtype: torch.dtype, precision: str, packing: dict[str, Any], tmp_path: Path
) -> None:
    """Queries and keys are turned, fused matrices split, neurons filled up; what comes out are the same weights."""
    model = decoder(family, hidden=64, neurons=64 if family == "gpt2" else 40)
    model.module.to(dtype)
    model = make("quantize", packing)(model, None)
    exact = _written(model, tmp_path)
    facts = write_gguf(model, tmp_path / "packed.gguf", precision)
    file = Reference(tmp_path / "packed.gguf")
    packed = [name for name, kind in file.types.items() if kind == precision.upper() and name != "token_embd.weight"]
    assert len(packed) == facts["own_codes"][0] >= 8
    assert facts["own_codes"][1] == 0
    for name in packed:
        before = exact.tensors[name]
        kept = file.tensors[name][tuple(slice(n) for n in before.shape)]
        np.testing.assert_allclose(kept, before, atol=0 if precision == "q4_0" else np.abs(before).max() / 1000)
    assert "own_codes" not in write_gguf(decoder(family, hidden=64, neurons=64), tmp_path / "plain.gguf", precision)


def test_matrices_that_are_not_packed_are_not_counted(tmp_path: Path) -> None:
    """A table in 4 bits serves as the head of a tied model, which has 8 in the file; of others it keeps its numbers."""
    for tied in (True, False):
        model = decoder("llama", hidden=64, neurons=64, tie_word_embeddings=tied)
        model = make("quantize_embeddings", {"bits": 4, "group": 32, "head": False})(model, None)
        facts = write_gguf(model, tmp_path / "m.gguf", "q4_0")
        assert facts.get("own_codes") == (None if tied else [1, 0])


def test_groups_across_blocks_are_rounded_anew_and_counted(tmp_path: Path) -> None:
    model = make("quantize", {"bits": 4, "group": 48, "symmetric": True})(decoder("llama", hidden=64, neurons=64), None)
    held, lost = write_gguf(model, tmp_path / "m.gguf", "q4_0")["own_codes"]
    assert held < lost  # a row of 32 has one group
    assert kept(held, lost)["note"].startswith(f"{lost} of {held + lost} packed matrices cannot be held")
    assert kept(3, 0) == {"own_codes": 3}
    assert kept(0, 0) == {}


def _softmax(values: np.ndarray) -> np.ndarray:
    odds = np.exp(values - values.max(-1, keepdims=True))
    return odds / odds.sum(-1, keepdims=True)


def test_rows_that_are_no_whole_groups_stay_in_16_bits(tmp_path: Path) -> None:
    model = decoder("llama", hidden=48)
    file = _written(model, tmp_path, "q4_0")
    assert file.types["blk.0.attn_q.weight"] == "F16"
    assert file.types["blk.0.ffn_down.weight"] == "Q4_0"
    np.testing.assert_allclose(
        file.tensors["blk.0.attn_v.weight"], _written(model, tmp_path).tensors["blk.0.attn_v.weight"], rtol=1e-3
    )


def test_up_to_its_window_a_model_is_one_without(tmp_path: Path) -> None:
    facts = write_gguf(decoder("mistral", sliding_window=6), tmp_path / "m.gguf", "f16")
    assert facts["context"] == Reference(tmp_path / "m.gguf").field("context_length") == 6
    assert write_gguf(decoder("mistral"), tmp_path / "m.gguf", "f16")["context"] == 64


def test_fields_and_tokens_of_a_bytewise_tokenizer(tmp_path: Path) -> None:
    model = decoder("llama")
    model.tokenizer.chat_template = "{{ messages[0]['content'] }}"
    fields = _written(model, tmp_path, "f16").fields
    assert fields["general.file_type"] == FILE_TYPES["f16"]
    assert (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
    assert fields["tokenizer.ggml.tokens"] == model.tokenizer.convert_ids_to_tokens(range(len(model.tokenizer)))
    assert fields["tokenizer.ggml.token_type"][:5] == [3, 3, 3, 3, 1]
    assert fields["tokenizer.ggml.add_bos_token"] is True
    assert fields["tokenizer.ggml.add_eos_token"] is False
    assert fields["tokenizer.ggml.bos_token_id"] == model.tokenizer.bos_token_id
    assert fields["tokenizer.chat_template"] == model.tokenizer.chat_template
    assert tokenizer_fields(tiny.language_model("gpt2").tokenizer, 400)["ggml.add_bos_token"] is False


def sentencepiece() -> PreTrainedTokenizerFast:
    """As transformers makes one of a SentencePiece model: every pair that makes a token is a merge, in the order of the tokens."""
    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))  # noqa: S106
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    made.train_from_iterator(tiny.passages(40), trainers.BpeTrainer(vocab_size=420, special_tokens=special, show_progress=False))
    vocabulary = made.get_vocab()
    pieces = sorted(vocabulary, key=vocabulary.get)[len(special) :]
    merges = [(one[:i], one[i:]) for one in pieces for i in range(1, len(one)) if one[:i] in vocabulary and one[i:] in vocabulary]
    again = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))  # noqa: S106
    again.normalizer = made.normalizer
    again.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    again.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)])
    special_tokens = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=again, model_max_length=64, **special_tokens)


def by_scores(text: str, fields: dict[str, Any]) -> list[int]:
    """How llama.cpp cuts: of all neighbours that make a token the best one first, the leftmost of equals; bytes for the rest."""
    ids = {token: number for number, token in enumerate(fields["ggml.tokens"])}
    parts = list(("▁" if fields["ggml.add_space_prefix"] else "") + text.replace(" ", "▁"))
    while True:
        pairs = [(fields["ggml.scores"][ids[a + b]], -i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in ids]
        if not pairs:
            break
        at = -max(pairs)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return [
        number for part in parts for number in ([ids[part]] if part in ids else [ids[f"<0x{byte:02X}>"] for byte in part.encode()])
    ]


def test_a_sentencepiece_tokenizer_s_scores_make_its_merges() -> None:
    tokenizer = sentencepiece()
    fields = tokenizer_fields(tokenizer, 430)
    assert (fields["ggml.model"], fields["ggml.pre"], fields["ggml.add_space_prefix"]) == ("llama", "default", True)
    assert fields["ggml.add_bos_token"] is True
    assert fields["ggml.token_type"][:4] == [UNKNOWN, 3, 3, 6]
    assert fields["ggml.tokens"][-1].startswith("[PAD")
    for text in [*tiny.passages(20, seed=5), "a zebra's naïve façade 東"]:
        assert by_scores(text, fields) == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_names_of_patterns() -> None:
    digits = tiny.language_model("gpt2").tokenizer
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), level])
    assert tokenizer_fields(digits, 400)["ggml.pre"] == "smollm"
    digits.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=False), level])
    with pytest.raises(InputError, match="Digits and ByteLevel"):
        tokenizer_fields(digits, 400)
    qwen = tiny_families.tokenizer("qwen2", digits.backend_tokenizer, eos_token="</s>")  # noqa: S106
    assert tokenizer_fields(qwen, 401)["ggml.pre"] == "qwen2"


def uneven_gpt2() -> Model:
    model = decoder("gpt2")
    keep_neurons(blocks_of(model.module)[0], family_of(model.module), [0, 1, 2])
    return model


def uneven_gemma() -> Model:
    return cut(decoder("gemma"))


def other_tokenizer() -> Model:
    return Model(module=decoder("llama", vocabulary=250).module, tokenizer=tiny.language_model("bert").tokenizer, source="")


REFUSED = {
    "encoder": (lambda: tiny.model("bert"), "BertForSequenceClassification"),
    "opt": (lambda: decoder("opt"), "types gemma, gpt2, llama"),
    "uneven gpt2": (uneven_gpt2, "no gpt2 whose blocks have different numbers of heads or neurons.*cut every block alike"),
    "uneven gemma": (uneven_gemma, "no gemma whose blocks.*drop_layers"),
    "activation": (lambda: decoder("llama", hidden_act="relu"), "computes silu in models of type llama, and this one has relu"),
    "positions": (
        lambda: decoder("llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}),
        "'dynamic'",
    ),
    "scaled": (
        lambda: decoder("qwen3", rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}),
        "scaled positions",
    ),
    "tokenizer": (other_tokenizer, "BPE tokenizer.*WordPiece"),
    "vocabulary": (lambda: decoder("llama", vocabulary=300), "highest token is 399, but .* 300 rows"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_words_in_gguf_is_refused(case: str, tmp_path: Path) -> None:
    make, said = REFUSED[case]
    with pytest.raises(InputError, match=said):
        write_gguf(make(), tmp_path / "m.gguf", "f16")
    assert not (tmp_path / "m.gguf").exists()


def test_precisions_are_those_of_the_library() -> None:
    assert {name.upper() for name in FILE_TYPES} <= set(gguf.GGMLQuantizationType.__members__)
