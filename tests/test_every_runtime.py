"""What every runtime must do. A runtime joins by existing in `multum.runtimes`; one line in the table below is all it adds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import taggers
import tiny
import torch
from marked import marked, task_of
from onnx import numpy_helper
from transformers import BertForNextSentencePrediction, CanineTokenizer

from multum import runtimes
from multum._measure import measure
from multum.core.families import blocks_of, family_of
from multum.core.model import Model
from multum.core.surgery import head_size, keep_heads
from multum.errors import InputError, MissingExtra, ParityError
from multum.runtimes import _encoder, _encoder_graph
from multum.runtimes._encoder_graph import quantize
from multum.runtimes._predictor import processors
from multum.targets import export_model
from multum.tasks._multi_label import MultiLabelClassification
from multum.tasks._regression import Regression

EXPORTED: dict[str, tuple[str, ...]] = {"onnxruntime": (*tiny.FAMILIES, "xlm-roberta"), "openvino": ("bert", "roberta")}
"""Runtimes with an export, and the families to try it on: all where it takes no time."""
CASES = [
    (runtime, precision, family) for runtime, families in EXPORTED.items() for precision in ("fp32", "int8") for family in families
]
TASKS: dict[str, tuple[Any, Any]] = {
    "token-classification": (taggers.tagger, taggers.tagging),
    "question-answering": (taggers.answerer, taggers.answering),
    "multi-label": (
        lambda family, **options: tiny.model(family, labels=("bad", "good"), **options),
        lambda: task_of(MultiLabelClassification, marked(128), 64, 32),
    ),
    "regression": (
        lambda family, **options: tiny.model(family, labels=("score",), **options),
        lambda: task_of(Regression, marked(128), 64, 32),
    ),
}
"""Kind of task -> a model and data, beside classification with one label, which the other tests are of."""
TASK_CASES = [
    *(("onnxruntime", precision, family, task) for family in tiny.FAMILIES for task in TASKS for precision in ("fp32", "int8")),
    ("openvino", "fp32", "bert", "token-classification"),
    ("openvino", "fp32", "bert", "question-answering"),
    ("openvino", "int8", "bert", "question-answering"),
]
CLOSE = {"fp32": (1e-4, 1e-4), "int8": (0.5, 0.06)}
"""Largest and mean difference of a logit; tiny models spread their answers over a few units, and round worse than big ones."""


def export(runtime: str, model: Model, folder: Path, *, precision: str = "fp32", pairs: bool = False) -> dict[str, Any]:
    task = tiny.task(pairs=pairs)
    return runtimes.find(runtime).export(
        model,
        folder,
        precision=precision,
        inputs=task.inputs("validation"),
        calibration=task.calibration(model, 64),
        max_length=task.length_limit(model),
        pairs=pairs,
    )


def expected(model: Model, inputs: Any) -> np.ndarray:
    """The slow reference: one text at a time through transformers."""
    rows = []
    for text in inputs:
        batch = model.tokenizer(
            *(text if isinstance(text, tuple) else (text,)), truncation=True, max_length=64, return_tensors="pt"
        )
        if model.module.config.model_type == "distilbert":
            batch.pop("token_type_ids", None)
        with torch.no_grad():
            rows.append(model.module(**batch).logits[0].numpy())
    return np.stack(rows)


def test_every_runtime_is_tried_here() -> None:
    of_encoders = {name for name in runtimes.names() if not hasattr(runtimes.find(name), "TASKS")}
    assert of_encoders == {*EXPORTED, "pytorch"}
    for name in runtimes.names():
        assert runtimes.find(name).PRECISIONS
    with pytest.raises(InputError, match="onnxruntime"):
        runtimes.find("abacus")


@pytest.mark.parametrize(("runtime", "precision", "family"), CASES)
def test_exports_answer_as_torch_does(runtime: str, precision: str, family: str, tmp_path: Path) -> None:
    model, inputs = tiny.uneven(tiny.model(family, layers=3)), tiny.task().inputs("test")
    facts = export(runtime, model, tmp_path / "out", precision=precision)
    predictor = runtimes.open(tmp_path / "out", threads=1)
    whole, reference = predictor.predict(inputs), expected(model, inputs)
    assert whole.dtype == np.float32
    largest, mean = CLOSE[precision]
    np.testing.assert_allclose(whole, reference, atol=largest)
    assert np.abs(whole - reference).mean() < mean
    # Padding beside longer texts changes nothing but rounding, and the order is that of the inputs.
    singly = np.concatenate([predictor.predict([text]) for text in inputs])
    np.testing.assert_allclose(whole, singly, atol=largest)
    assert facts["max_difference"] == pytest.approx(
        json.loads((tmp_path / "out" / "runtime.json").read_text())["parity"]["max_difference"]
    )
    assert predictor.labels == ["negative", "positive"]
    assert predictor.predict([]).shape == (0, 2)


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_pairs_and_depths_in_onnxruntime(family: str, layers: int, tmp_path: Path) -> None:
    model, inputs = tiny.model(family, layers=layers), tiny.task(pairs=True).inputs("test")
    export("onnxruntime", model, tmp_path / "out", pairs=True)
    found = runtimes.open(tmp_path / "out", threads=1).predict(inputs)
    np.testing.assert_allclose(found, expected(model, inputs), atol=1e-4)
    swapped = runtimes.open(tmp_path / "out", threads=1).predict([(b, a) for a, b in inputs])
    assert np.abs(swapped - found).max() > 1e-3


def test_pairs_in_openvino(tmp_path: Path) -> None:
    model, inputs = tiny.model("bert"), tiny.task(pairs=True).inputs("test")
    export("openvino", model, tmp_path / "out", pairs=True)
    np.testing.assert_allclose(runtimes.open(tmp_path / "out", threads=1).predict(inputs), expected(model, inputs), atol=1e-4)


def test_long_texts_are_cut_as_torch_cuts_them(tmp_path: Path) -> None:
    model, text = tiny.model("roberta"), "a wonderful film " * 100
    export("onnxruntime", model, tmp_path / "out")
    predictor = runtimes.open(tmp_path / "out", threads=1)
    assert predictor.tokenize([text]) == tiny.POSITIONS
    np.testing.assert_allclose(predictor.predict([text, "short"]), expected(model, [text, "short"]), atol=1e-4)


@pytest.mark.parametrize("activation", ["relu", "gelu_new"])
def test_other_activations(activation: str, tmp_path: Path) -> None:
    model = tiny.model()
    config = model.module.config.to_dict() | {"hidden_act": activation}
    module = type(model.module)(type(model.module.config).from_dict(config)).eval()
    module.load_state_dict(model.module.state_dict())
    changed = Model(module=module, tokenizer=model.tokenizer, source="tiny")
    export("onnxruntime", changed, tmp_path / "out")
    inputs = tiny.task().inputs("test")
    np.testing.assert_allclose(runtimes.open(tmp_path / "out").predict(inputs), expected(changed, inputs), atol=1e-4)


def test_no_graph_is_written_for_an_unknown_activation() -> None:
    model = tiny.model()
    model.module.config.hidden_act = "mish"
    with pytest.raises(InputError, match="mish"):
        _encoder.read(model.module, max_length=64, pairs=False)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_wrong_graph_is_refused_and_leaves_nothing(precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = _encoder_graph.write

    def tampered(*args: Any, **kwargs: Any) -> onnx.ModelProto:
        graph = write(*args, **kwargs)
        for tensor in graph.graph.initializer:
            if tensor.name == "head.weight":
                tensor.CopyFrom(numpy_helper.from_array(-20 * numpy_helper.to_array(tensor), tensor.name))
        return graph

    monkeypatch.setattr(_encoder_graph, "write", tampered)
    with pytest.raises(ParityError, match="answers differently"):
        export("onnxruntime", tiny.model(), tmp_path / "out", precision=precision)
    assert not list(tmp_path.iterdir())


def test_eight_bits_include_the_embeddings(tmp_path: Path) -> None:
    model = tiny.model()
    export("onnxruntime", model, tmp_path / "out", precision="int8")
    graph = onnx.load(tmp_path / "out" / "model.onnx")
    words = next(tensor for tensor in graph.graph.initializer if tensor.name == "words")
    assert words.data_type == onnx.TensorProto.INT8
    assert list(words.dims) == [len(model.tokenizer), 32]
    matrices = [
        tensor for tensor in graph.graph.initializer if len(tensor.dims) == 2 and tensor.data_type == onnx.TensorProto.FLOAT
    ]
    assert {tensor.name for tensor in matrices} <= {"positions", "head.weight", "words.scale"}


def test_quantize_rounds_to_the_nearest_of_255_steps() -> None:
    weight = np.random.default_rng(0).normal(size=(20, 6)).astype(np.float32)
    weight[:, 5] = 0
    values, scales = quantize(weight)
    assert np.abs(values).max() == 127
    assert (np.abs(values * scales - weight) <= scales / 2 + 1e-7).all()
    assert not values[:, 5].any()


def test_only_the_first_token_goes_on_behind_the_last_attention() -> None:
    model = tiny.uneven(tiny.model(layers=3))

    graph = _encoder_graph.write(_encoder.read(model.module, max_length=64, pairs=False), precision="fp32")
    kinds = [node.op_type for node in graph.graph.node]
    assert kinds.count("MultiHeadAttention") == 1
    assert kinds.count("Attention") == 1


@pytest.mark.parametrize("runtime", EXPORTED)
def test_an_export_knows_on_how_many_threads_a_text_is_answered(runtime: str, tmp_path: Path) -> None:
    model, inputs = tiny.model(), tiny.task().inputs("test")
    export(runtime, model, tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "runtime.json").read_text())
    assert manifest["threads"] in (1, processors())
    (tmp_path / "out" / "runtime.json").write_text(json.dumps(manifest | {"threads": 1}))
    predictor = runtimes.open(tmp_path / "out", threads=2)
    assert predictor.threads == 1
    whole = predictor.predict(inputs)
    np.testing.assert_allclose(whole, expected(model, inputs), atol=1e-4)
    np.testing.assert_allclose(predictor.predict(inputs[:1]), whole[:1], atol=1e-4)


def test_opening_an_export_imports_no_torch(tmp_path: Path) -> None:
    for runtime in EXPORTED:
        export(runtime, tiny.model(), tmp_path / runtime)
        code = (
            "import sys, multum.runtimes as r; "
            f"r.open({str(tmp_path / runtime)!r}, threads=1).predict(['a film']); "
            "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'pandas')))"
        )
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0, runtime


@pytest.mark.parametrize("runtime", EXPORTED)
def test_ctrl_c_after_an_export_is_no_crash(runtime: str, tmp_path: Path) -> None:
    """Libraries may leave a stack for signals behind that is gone when a signal comes."""
    tiny.model().save(tmp_path / "model")
    code = (
        "import signal, sys, tiny; from pathlib import Path; from multum import runtimes; from multum.targets import export_model; "
        f"task = tiny.task(); model = task.load({str(tmp_path / 'model')!r}); "
        f"export_model(runtimes.find({runtime!r}), model, Path({str(tmp_path / 'out')!r}), 'fp32', task, 0); "
        "signal.signal(signal.SIGINT, lambda *_: sys.exit(130)); signal.raise_signal(signal.SIGINT)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", code], check=False, env=environment).returncode == 130


def test_a_model_folder_is_run_by_torch_and_a_shipped_one_by_its_export(tmp_path: Path) -> None:
    model, inputs = tiny.model(), tiny.task().inputs("test")
    model.save(tmp_path / "m")
    predictor = runtimes.open(tmp_path / "m", threads=1)
    assert predictor.runtime == "pytorch"
    assert {path.name for path in predictor.files} == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    np.testing.assert_allclose(predictor.predict(inputs), expected(model, inputs), atol=1e-5)
    export("onnxruntime", model, tmp_path / "m" / "onnxruntime-int8", precision="int8")
    (tmp_path / "m" / "ship.json").write_text('{"target": "onnxruntime-int8"}')
    assert runtimes.open(tmp_path / "m", threads=1).precision == "int8"
    (tmp_path / "m" / "ship.json").write_text('{"target": "../elsewhere"}')
    with pytest.raises(InputError, match="names no export"):
        runtimes.open(tmp_path / "m")


def test_folders_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="neither a model folder"):
        runtimes.open(tmp_path)
    for runtime, graph in (("onnxruntime", "model.onnx"), ("openvino", "model.xml")):
        export(runtime, tiny.model(), tmp_path / runtime)
        (tmp_path / runtime / graph).write_bytes(b"junk")
        with pytest.raises(InputError, match="cannot be opened"):
            runtimes.open(tmp_path / runtime)
    (tmp_path / "onnxruntime" / "tokenizer.json").write_text("{")
    export("onnxruntime", tiny.model(), tmp_path / "other")
    (tmp_path / "other" / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match="damaged"):
        runtimes.open(tmp_path / "other")
    (tmp_path / "other" / "runtime.json").write_text("[]")
    with pytest.raises(InputError, match="is damaged or from another"):
        runtimes.open(tmp_path / "other")


def test_unknown_precisions_and_missing_extras(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for runtime in EXPORTED:
        with pytest.raises(InputError, match="int2"):
            export(runtime, tiny.model(), tmp_path / "out", precision="int2")
    with pytest.raises(InputError, match="nothing to export"):
        runtimes.find("pytorch").export(tiny.model(), tmp_path / "out")
    openvino = runtimes.find("openvino")
    monkeypatch.setattr(openvino, "find_spec", lambda name: None)
    assert "pip install 'multum[openvino]'" in openvino.unavailable()
    with pytest.raises(MissingExtra, match="multum\\[openvino\\]"):
        export("openvino", tiny.model(), tmp_path / "out")


def test_a_tokenizer_that_no_export_can_run_is_named(tmp_path: Path) -> None:
    slow = Model(module=tiny.model().module, tokenizer=CanineTokenizer(), source="spelled")
    options: dict[str, Any] = {"precision": "fp32", "inputs": ["a film"], "max_length": 64, "pairs": False}
    with pytest.raises(InputError, match=r"spelled has no fast tokenizer .*: CanineTokenizer is none"):
        runtimes.find("onnxruntime").export(slow, tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_probes_of_more_blocks_hold_more(monkeypatch: pytest.MonkeyPatch) -> None:
    from multum.runtimes import onnxruntime

    seen = []
    real = _encoder_graph.write
    monkeypatch.setattr(_encoder_graph, "write", lambda *args, **kwargs: seen.append(real(*args, **kwargs)) or seen[-1])
    for blocks in ([], [(2, 8)], [(2, 8), (0, 8)]):
        assert onnxruntime.probe(32, 8, blocks, precision="int8", lengths=[4, 9], threads=1)() > 0
    counts = [len(graph.graph.node) for graph in seen]
    assert counts == sorted(set(counts))
    assert _encoder.draw(32, 8, [(2, 8)]).blocks[0].heads == 2


def export_for(runtime: str, model: Model, task: Any, folder: Path, precision: str) -> Any:
    """An export, opened."""
    task.configure(model.module.config)
    export_model(runtimes.find(runtime), model, folder, precision, task, 0)
    return runtimes.open(folder, threads=1)


def without_the_last_attention(model: Model) -> Model:
    """Its last block works on what the others left, without looking at other tokens."""
    keep_heads(blocks_of(model.module)[-1], family_of(model.module), [], head_size(model.module))
    return model


@pytest.mark.parametrize(("runtime", "precision", "family", "kind"), TASK_CASES)
def test_exports_for_other_tasks_answer_as_torch_does(runtime: str, precision: str, family: str, kind: str, tmp_path: Path) -> None:
    make, task_for = TASKS[kind]
    model, task = without_the_last_attention(tiny.uneven(make(family, layers=3))), task_for()
    predictor = export_for(runtime, model, task, tmp_path / "out", precision)
    model.save(tmp_path / "model")
    torch_itself = runtimes.find("pytorch").open(tmp_path / "model", threads=1)
    inputs = task.inputs("test")
    found, expected = predictor.predict(inputs), torch_itself.predict(inputs)
    assert predictor.reader.task == task.name
    assert predictor.labels == torch_itself.labels
    assert predictor.lengths(inputs) == torch_itself.lengths(inputs)
    assert predictor.tokenize(inputs) == torch_itself.tokenize(inputs)
    singly = [predictor.predict([one])[0] for one in inputs]
    if precision == "fp32":
        np.testing.assert_allclose(found, expected, atol=1e-4)
        for one, alone in zip(found, singly, strict=True):
            whole = one[tuple(slice(size) for size in alone.shape)]
            np.testing.assert_allclose(whole[: len(alone)], alone, atol=1e-4)
    else:
        assert runtimes.read_manifest(tmp_path / "out")["parity"].get("agreement", 1) > 0.8
    ours, theirs = (one.reader.answers(expected, inputs, one.labels) for one in (predictor, torch_itself))
    assert ours == theirs


def test_long_contexts_are_read_in_windows(tmp_path: Path) -> None:
    model, task = taggers.answerer(), taggers.answering()
    predictor = export_for("onnxruntime", model, task, tmp_path / "out", "fp32")
    model.save(tmp_path / "model")
    torch_itself = runtimes.find("pytorch").open(tmp_path / "model", threads=1)
    inputs = [("what was good", "the plot of this wonderful film was quite dull " * 12), ("who", "a film"), ("a b c " * 40, "")]
    assert len(predictor.lengths(inputs)) > len(inputs)
    assert predictor.lengths(inputs) == torch_itself.lengths(inputs)
    for batch_size in (1, 2, 32):
        np.testing.assert_allclose(predictor.predict(inputs, batch_size), torch_itself.predict(inputs), atol=1e-4)
    with pytest.raises(InputError, match="a question and a context"):
        predictor.predict(["a question alone"])


def test_words_that_were_not_read_have_no_logits(tmp_path: Path) -> None:
    model, task = taggers.tagger("roberta"), taggers.tagging()
    predictor = export_for("onnxruntime", model, task, tmp_path / "out", "fp32")
    found = predictor.predict([["film"] * 100, "a film", ()])
    assert found.shape == (3, 100, len(taggers.TAGS))
    assert np.isnan(found[0, -1]).all()
    assert np.isfinite(found[0, 0]).all()
    assert np.isfinite(found[1, :2]).all()
    assert np.isnan(found[1, 2:]).all()
    assert np.isnan(found[2]).all()


@pytest.mark.parametrize("kind", ["token-classification", "question-answering"])
def test_every_block_works_on_every_token_under_a_head_that_reads_them(kind: str) -> None:
    model = tiny.uneven(TASKS[kind][0]("bert", layers=3))
    encoder = _encoder.read(model.module, max_length=64, pairs=False)
    operators = [node.op_type for node in _encoder_graph.write(encoder, precision="fp32").graph.node]
    assert operators.count("Attention") == 2
    assert not {"MultiHeadAttention", "Gemm"} & set(operators)


@pytest.mark.parametrize("kind", ["token-classification", "question-answering"])
def test_exports_for_other_tasks_are_measured_by_the_tasks_own_metric(kind: str, tmp_path: Path) -> None:
    make, task_for = TASKS[kind]
    model, task = make("bert"), task_for()
    export_for("onnxruntime", model, task, tmp_path / "out", "fp32")
    model.save(tmp_path / "model")
    plain, exported = measure([tmp_path / "model", tmp_path / "out"], task, threads=1, rounds=2, texts_per_round=3)
    assert exported["quality"] == plain["quality"]
    assert exported["quality"]["metric"] == "f1"
    assert exported["size"]["macs_per_example"] == plain["size"]["macs_per_example"]
    assert exported["speed"]["lengths"] == plain["speed"]["lengths"]


def test_an_export_without_a_config_is_a_text_classifier(tmp_path: Path) -> None:
    predictor = export_for("onnxruntime", tiny.model(), tiny.task(), tmp_path / "out", "fp32")
    found = predictor.predict(["a film"])
    path = tmp_path / "out" / "runtime.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in manifest.items() if name not in ("config", "outputs")}))
    np.testing.assert_array_equal(runtimes.open(tmp_path / "out", threads=1).predict(["a film"]), found)


def test_heads_that_no_task_reads_are_refused(tmp_path: Path) -> None:
    known, task = tiny.model("bert"), tiny.task()
    model = Model(module=BertForNextSentencePrediction(known.module.config).eval(), tokenizer=known.tokenizer, source="tiny")
    for runtime in EXPORTED:
        with pytest.raises(InputError, match=r"BertForNextSentencePrediction has a head .*; .*ForQuestionAnswering"):
            export_for(runtime, model, task, tmp_path / "out", "fp32")
    assert not list(tmp_path.iterdir())
