"""Packed layers: bytes are what they should be, weights stay the same to the bit, and nothing cuts or trains them."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import tiny_encoder_decoders
import tiny_families
import torch
from safetensors import safe_open
from test_every_step import QUICK
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    TrainingArguments,
)
from transformers.pytorch_utils import Conv1D

import multum
from multum import runtimes
from multum._sensitivity import sensitivity
from multum.core.codes import Packing, as_scales, as_zeros, pack, unpack, values
from multum.core.factored import Factored
from multum.core.families import base_of
from multum.core.model import Model
from multum.core.packed import PackedEmbedding, PackedLinear, TiedEmbedding, TiedLinear, apply_packings, packed_parts, unpack_
from multum.core.parts import parts_of
from multum.core.profile import profile
from multum.core.step import find, make, names
from multum.core.training import fit
from multum.errors import InputError
from multum.steps._quantization import rounded
from multum.steps.distill import Distill
from multum.steps.low_rank import LowRank
from multum.steps.quantize import Quantize
from multum.steps.quantize_embeddings import QuantizeEmbeddings

pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = (0, 1, 2, 7, 8, 9, 16, 65)
INT4 = {"bits": 4, "group": 24, "symmetric": False}


def some_codes(rows: int, inputs: int, bits: int) -> torch.Tensor:
    return torch.randint(0, 2**bits, (rows, inputs), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


@pytest.mark.parametrize("bits", [8, 4, 3])
@pytest.mark.parametrize("inputs", SIZES)
def test_the_bytes_of_a_row_are_its_codes_one_after_the_other(bits: int, inputs: int) -> None:
    codes = some_codes(3, inputs, bits)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (3, Packing(bits=bits).row_bytes(inputs))
    for row, line in zip(codes.tolist(), packed.tolist(), strict=True):
        assert int.from_bytes(bytes(line), "little") == sum(code << bits * place for place, code in enumerate(row))
    assert torch.equal(unpack(packed, bits, inputs), codes)
    assert torch.equal(unpack(packed[[2, 0]], bits, inputs), codes[[2, 0]])


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("group", [0, 2, 8, 24, 100])
@pytest.mark.parametrize("inputs", SIZES)
def test_values_are_scale_times_code_less_zero_point(inputs: int, group: int, zeros: bool) -> None:
    packing = Packing(4, group, zeros)
    made, groups = torch.Generator().manual_seed(1), packing.groups(inputs)
    codes, s = some_codes(3, inputs, 4), as_scales(torch.rand(3, groups, generator=made) + 0.01)
    z = as_zeros(torch.rand(3, groups, generator=made) * 15) if zeros else None
    found = values(codes, s, z, packing)
    for i in range(3):
        for j in range(inputs):
            g = j // group if group else 0
            assert found[i, j] == s[i, g] * (codes[i, j] - (8.0 if z is None else z[i, g]))


def test_scales_and_zero_points_are_what_can_be_stored() -> None:
    x = torch.tensor([0.0, 1e-30, 3e-5, 0.1234567, 7e20])
    s = as_scales(x)
    assert torch.equal(s.bfloat16().float(), s)
    assert (s > 0).all()
    assert torch.allclose(s[1:], x[1:], rtol=2**-8)
    whole = torch.arange(256.0)
    assert torch.equal(as_zeros(whole), whole)


@pytest.mark.parametrize("packing", [Packing(), Packing(4, 8, True), Packing(3, 24, True), Packing(4, 7), Packing(3, 0)])
def test_a_packed_layer_answers_like_an_unpacked_one_to_the_bit(packing: Packing) -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(20, 6), torch.randn(2, 5, 20)
    layer = PackedLinear.of(linear, rounded(linear.weight.detach(), packing))
    assert torch.equal(layer(x), F.linear(x, layer.weight, linear.bias))
    assert torch.equal(layer.weight, rounded(linear.weight.detach(), packing).weight())
    assert sorted(layer.state_dict()) == sorted(["bias", "codes", "scales", *(["zeros"] if packing.zeros else [])])
    for other in (layer.half().float(), layer.bfloat16().float()):  # integers all: no cast can change a weight
        assert torch.equal(other.weight, rounded(linear.weight.detach(), packing).weight())
    assert layer.half()(x.half()).dtype == torch.float16
    assert not [p for p in layer.parameters() if p is not layer.bias]


def test_a_conv1d_answers_like_itself() -> None:
    torch.manual_seed(0)
    conv, x = Conv1D(6, 20), torch.randn(2, 5, 20)
    layer = PackedLinear.of(conv, rounded(conv.weight.T.detach(), Packing()))
    root = nn.ModuleDict({"one": layer})
    unpack_(root)
    plain = root["one"]
    assert isinstance(plain, Conv1D)
    assert torch.equal(plain.weight.T, layer.weight)
    assert torch.allclose(plain(x), layer(x), atol=1e-5)
    assert torch.allclose(conv(x), layer(x), atol=0.01)


@pytest.mark.parametrize("shape", [(5, 0), (0, 5), (0, 0)])
@pytest.mark.parametrize("packing", [Packing(), Packing(4, 8, True), Packing(3, 8)])
def test_layers_without_inputs_or_outputs(shape: tuple[int, int], packing: Packing) -> None:
    linear = nn.Linear(3, max(shape[0], 1), bias=False)
    linear.weight, linear.out_features, linear.in_features = nn.Parameter(torch.zeros(shape)), *shape
    layer = PackedLinear.of(linear, rounded(linear.weight.detach(), packing))
    assert torch.equal(layer(torch.ones(2, shape[1])), torch.zeros(2, shape[0]))


def test_a_table_unpacks_the_rows_that_are_read_and_multiplies_like_the_stock_one() -> None:
    torch.manual_seed(0)
    table, ids = nn.Embedding(9, 12), torch.tensor([[1, 8, 0], [3, 3, 2]])
    packed = PackedEmbedding(table, Packing())
    packed.fill(rounded(table.weight.detach(), Packing()))
    assert torch.equal(packed(ids), packed.weight[ids])
    table.embed_scale = 3.0
    tied = TiedEmbedding(table, packed)
    assert torch.equal(tied(ids), packed(ids) * 3.0)
    assert not tied.state_dict()


# -- models --------------------------------------------------------------------------------------------------------------


def tensors_of(folder) -> dict[str, torch.Tensor]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_the_file_holds_integers_and_nothing_twice(family, tmp_path):
    model, task = tiny.model(family), tiny.task(8, 4, 4)
    result = QuantizeEmbeddings()(Quantize(**INT4)(model, task), task)
    result.save(tmp_path)
    stored = tensors_of(tmp_path)
    packed = packed_parts(result.module)
    inside = {name for name in model.linears() if name in packed}
    assert len(inside) >= 8
    for name, part in packed.items():
        assert stored[f"{name}.codes"].dtype == torch.uint8
        assert stored[f"{name}.scales"].dtype == torch.int16
        assert stored[f"{name}.weight"].numel() == 0  # for transformers without multum, which would put random numbers there
        if name in inside:
            assert stored[f"{name}.codes"].shape == (part.rows, part.inputs // 2)
            groups = -(-part.inputs // 24)
            assert stored[f"{name}.zeros"].numel() == stored[f"{name}.scales"].numel() == part.rows * groups
    assert sum(t.numel() * t.element_size() for t in stored.values()) == sum(p.bytes for p in parts_of(result.module).values())


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "deberta-v2"])
def test_parameters_and_multiplications_are_those_of_the_model_it_was_made_from(family):
    model, task = tiny.model(family), tiny.task(8, 4, 4)
    result = QuantizeEmbeddings()(Quantize()(model, task), task)
    before, after = profile(model.module), profile(result.module)
    assert after["macs"] == before["macs"]
    assert after["parameters"] == before["parameters"] == result.parameters()
    assert after["nonzero_parameters"] < before["nonzero_parameters"]
    old, new = parts_of(model.module), parts_of(result.module)
    assert {name: (part.parameters, part.macs) for name, part in new.items()} == {n: (p.parameters, p.macs) for n, p in old.items()}
    assert sum(part.nonzero_parameters for part in new.values()) == after["nonzero_parameters"]
    assert new["attention"].bytes < 0.5 * old["attention"].bytes


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_pruned_factored_and_packed_layers_load_together(family, tmp_path):
    task = tiny.task(16, 4, 4)
    model = LowRank(keep=0.6, samples=8)(tiny.uneven(tiny.model(family, layers=3)), task)
    result = QuantizeEmbeddings()(Quantize(**INT4)(model, task), task)
    factors = [part for part in result.module.modules() if isinstance(part, Factored)]
    assert factors
    assert all(isinstance(part, PackedLinear) for each in factors for part in each)
    result.save(tmp_path / "one")
    module = AutoModelForSequenceClassification.from_pretrained(tmp_path / "one")
    module.save_pretrained(tmp_path / "two")  # by transformers' own hand
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "two")
    batch = task.calibration(model, 8)[0]
    with torch.no_grad():
        answers = [m(**batch).logits for m in (result.module, module, again)]
    assert all(torch.equal(a, b) for a, b in pairwise(answers))
    base = AutoModel.from_pretrained(tmp_path / "one").state_dict()
    assert all(torch.equal(base[name], tensor) for name, tensor in base_of(module).state_dict().items())
    configs = [json.loads((tmp_path / name / "config.json").read_text())["quantization_config"] for name in ("one", "two")]
    assert configs[0] == configs[1]
    assert not getattr(module, "is_quantized", False)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma", "qwen2", "opt"])
def test_a_tied_head_is_stored_once_and_writes_the_same_after_reloading(family, tmp_path):
    module = tiny_families.language_model(family, tie_word_embeddings=True)
    model = Model(module=module, tokenizer=tiny.language_model("llama").tokenizer, source="tiny")
    result = QuantizeEmbeddings()(model, tiny.task(8, 4, 4))
    head, words = result.module.get_output_embeddings(), result.module.get_input_embeddings()
    assert isinstance(head, TiedLinear)
    assert head.source is words  # also in a copy
    assert result.copy().module.get_output_embeddings().source is not words
    assert profile(result.module)["macs"] == profile(module)["macs"]
    ids = torch.arange(3, 43).reshape(2, 20)
    with torch.no_grad():
        whole, found = module(ids).logits, result.module(ids).logits
    assert (whole - found).abs().max() < 0.1 * whole.abs().max()  # 8 bits are close, so that Gemma's scale is not forgotten
    result.save(tmp_path)
    assert len([name for name in tensors_of(tmp_path) if "codes" in name]) == len(packed_parts(result.module))
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    written = [m.generate(ids[:1, :4], max_new_tokens=6, do_sample=False) for m in (result.module, again)]
    assert torch.equal(*written)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, found)
        unpack_(again)
        assert again.lm_head.weight is again.get_input_embeddings().weight
        assert torch.allclose(again(ids).logits, found, atol=1e-5)


@pytest.mark.parametrize(("head", "kind"), [(True, PackedLinear), (False, nn.Linear)])
def test_a_head_of_its_own_is_packed_by_itself(head, kind, tmp_path):
    module = tiny_families.language_model("llama", tie_word_embeddings=False)
    model = Model(module=module, tokenizer=tiny.language_model("llama").tokenizer, source="tiny")
    result = QuantizeEmbeddings(head=head)(model, tiny.task(8, 4, 4))
    assert type(result.module.get_output_embeddings()) is kind
    entry = result.history[-1]
    assert ("lm_head" in entry["changed"]) == head
    assert entry["skipped"].get("lm_head") == (None if head else "head is off")
    result.save(tmp_path)
    again, ids = AutoModelForCausalLM.from_pretrained(tmp_path), torch.arange(3, 23)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, result.module(ids).logits)


@pytest.mark.parametrize("family", ["t5", "t5-unscaled", "bart", "marian", "mbart"])
def test_encoder_decoders_load_to_the_bit(family, tmp_path):
    module, batch = tiny_encoder_decoders.model(family), tiny_encoder_decoders.batch()
    model = Model(module=module, tokenizer=tiny.language_model("bert").tokenizer, source="tiny")
    result = QuantizeEmbeddings()(Quantize()(model, tiny.task(8, 4, 4)), tiny.task(8, 4, 4))
    tied = [part for part in result.module.modules() if isinstance(part, TiedEmbedding)]
    assert len(tied) == 2  # the encoder's and the decoder's
    assert isinstance(result.module.get_output_embeddings(), TiedLinear)
    result.save(tmp_path)
    again, info = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    with torch.no_grad():
        found, whole = result.module(**batch).logits, module(**batch).logits
        assert torch.equal(again(**batch).logits, found)
        assert (whole - found).abs().max() < 0.1 * whole.abs().max()
        unpack_(again)
        assert not packed_parts(again)
        assert torch.equal(again(**batch).logits, found)
    assert profile(result.module) | {"nonzero_parameters": 0} == profile(module) | {"nonzero_parameters": 0}


def test_an_export_answers_like_the_packed_model(tmp_path):
    model, task = tiny.model("bert"), tiny.task(8, 8, 4)
    result = QuantizeEmbeddings()(Quantize(**INT4)(model, task), task)
    inputs = list(task.inputs("validation"))
    options = {"max_length": task.length_limit(model), "pairs": False, "calibration": task.calibration(model, 8)}
    runtimes.find("onnxruntime").export(result, tmp_path / "out", precision="fp32", inputs=inputs, **options)
    found = torch.from_numpy(np.asarray(runtimes.open(tmp_path / "out").predict(inputs)))
    with torch.no_grad():
        rows = task.encode_texts(result, inputs)
        wanted = torch.cat([result.module(input_ids=torch.tensor([row["input_ids"]])).logits for row in rows])
    assert torch.allclose(found.float(), wanted, atol=1e-3)


@pytest.mark.parametrize(("runtime", "family"), [("onnxruntime", "mpnet"), ("openvino", "bert")])
def test_a_packed_folder_is_traced_with_its_weights_unpacked(runtime, family, tmp_path):
    task = tiny.task(8, 8, 4)
    made = QuantizeEmbeddings()(Quantize(**INT4)(tiny.model(family), task), task)
    made.save(tmp_path / "packed")
    packed = task.load(str(tmp_path / "packed"))
    inputs = list(task.inputs("validation"))
    options = {"max_length": task.length_limit(packed), "pairs": False, "calibration": task.calibration(packed, 8)}
    found = runtimes.find(runtime).export(packed, tmp_path / "out", precision="fp32", inputs=inputs, **options)
    assert found["max_difference"] < 1e-4
    assert packed_parts(packed.module).keys() == packed_parts(made.module).keys()
    assert packed.fingerprint() == made.fingerprint()
    with torch.no_grad():
        rows = task.encode_texts(made, inputs)
        wanted = torch.cat([made.module(input_ids=torch.tensor([row["input_ids"]])).logits for row in rows])
    assert np.abs(runtimes.open(tmp_path / "out").predict(inputs) - wanted.numpy()).max() < 1e-4


# -- what is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in names() if not find(name).takes_packed])
def test_steps_that_cut_or_train_refuse_packed_models(name):
    task = tiny.task(8, 4, 4)
    packed = Quantize()(tiny.model(layers=1), task)
    with pytest.raises(InputError, match=f"^{name}: the model is already quantized") as caught:
        make(name, QUICK[name])(packed, task)
    assert len(caught.value.problems) == 1


def _shrink(packed: Model, task: Any, folder: Path) -> None:
    for name in ("train", "validation", "test"):
        getattr(tiny.splits(), name).to_csv(folder / f"{name}.csv", index=False)
    packed.save(folder / "model")
    multum.shrink(str(folder / "model"), task=task.name, data=str(folder), output=folder / "run")


def _student(packed: Model, task: Any, folder: Path) -> None:
    packed.save(folder / "student")
    tiny.model(seed=1).save(folder / "teacher")
    Distill(teacher=str(folder / "teacher"), student=str(folder / "student"))(tiny.model(), task)


def _trainer(packed: Model, task: Any, folder: Path) -> None:
    multum.DistillationTrainer(tiny.model(seed=1).module, packed.module, TrainingArguments(str(folder), report_to=[]))


FLOATS: dict[str, Callable[[Model, Any, Path], object]] = {
    "sensitivity": lambda packed, task, folder: sensitivity(packed, task, samples=4),
    "training": lambda packed, task, folder: fit(packed, task.encode(packed, "train"), task.loss, learning_rate=1e-3),
    "shrink": _shrink,
    "student .*": _student,
    "student_model": _trainer,
}
"""What else needs floats: how its error begins -> a call of it."""


@pytest.mark.parametrize("quantized", [Quantize(), QuantizeEmbeddings()], ids=lambda step: step.name)
@pytest.mark.parametrize("name", FLOATS)
def test_whatever_else_cuts_or_trains_refuses_packed_models(name, quantized, tmp_path):
    task = tiny.task(8, 4, 4)
    packed = quantized(tiny.model(layers=1), task)
    with pytest.raises(InputError, match=f"^{name}: the model is already quantized") as caught:
        FLOATS[name](packed, task, tmp_path)
    assert len(caught.value.problems) == 1
    assert not (tmp_path / "run" / "original").exists()


def test_a_packed_model_teaches(tmp_path):
    task = tiny.task(16, 4, 4)
    Quantize()(tiny.model(seed=1), task).save(tmp_path / "teacher")
    taught = Distill(teacher=str(tmp_path / "teacher"), epochs=1, batch_size=8)(tiny.model(), task)
    assert taught.fingerprint() != tiny.model().fingerprint()


def test_what_is_packed_is_not_packed_again():
    task = tiny.task(8, 4, 4)
    blocks, tables = Quantize()(tiny.model(layers=1), task), QuantizeEmbeddings()(tiny.model(layers=1), task)
    for name in ("quantize", "gptq", "awq"):
        with pytest.raises(InputError, match=f"{name}: the model is already quantized"):
            make(name, {"samples": 8} if name != "quantize" else {})(blocks, task)
    with pytest.raises(InputError, match="quantize_embeddings: the model's embeddings are already quantized"):
        QuantizeEmbeddings()(tables, task)
    assert Quantize()(tables, task).fingerprint() == QuantizeEmbeddings()(blocks, task).fingerprint()


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"bert.nothing": {"bits": 8}}, "does not have: bert.nothing"),
        ({"bert.pooler.dense": {"bits": 5}}, "with 5 bits; there are 8, 4, 3"),
        ({"bert.pooler.dense": {"of": "classifier"}}, "ties bert.pooler.dense to classifier, which is not packed"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(entries, message):
    with pytest.raises(ValueError, match=message):
        apply_packings(tiny.model(layers=1).module, entries)
