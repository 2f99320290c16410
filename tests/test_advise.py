"""Advice: its profile against slow counts, its estimates against what the steps then give, its recipe by running it."""

from __future__ import annotations

import json
import re
import shutil
import statistics
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import on_disk
import pytest
import tiny
import tiny_families
import torch
import translators
from transformers import AlbertConfig, AlbertForSequenceClassification
from typer.testing import CliRunner

import multum
from multum import _advice_estimates, plan, recipe
from multum._advice import TECHNIQUES
from multum._advice_sources import GOALS, OWN
from multum._advise import write_recipe
from multum.cli import app
from multum.core.model import Model
from multum.core.packed import is_matrix
from multum.core.padding import pad
from multum.core.parts import outline, part_of, parts_of, time_parts
from multum.core.profile import profile
from multum.core.step import find, names
from multum.errors import InputError
from multum.runtimes import onnxruntime
from multum.targets import task_for

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
ADVISABLE = ("bert", "distilbert", "llama", "gpt2")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder, splits = tmp_path_factory.mktemp("data"), tiny.splits()
    for name in ("train", "validation", "test"):
        getattr(splits, name).to_csv(folder / f"{name}.csv", index=False)
    return str(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model") / "bert"
    tiny.model(layers=4).save(folder)
    return str(folder)


def advice(model: str, data: str, **options: Any) -> dict[str, Any]:
    return multum.advise(model, task="text-classification", data=data, **options)


def entry(found: dict[str, Any], name: str) -> dict[str, Any]:
    return next(one for one in [*found["use"], *found["leave"]] if one["name"] == name)


def estimate(found: dict[str, Any], name: str, what: str) -> dict[str, Any]:
    return next(one for one in entry(found, name)["estimates"] if one["what"] == what)


@pytest.mark.parametrize("family", [*ADVISABLE, *(name for name in tiny_families.FAMILIES if name not in ADVISABLE)])
def test_the_parts_add_up_to_the_whole(family: str, tmp_path: Path) -> None:
    module = tiny.model(family).module
    whole, parts = profile(module), parts_of(module)
    assert sum(part.parameters for part in parts.values()) == whole["parameters"]
    assert sum(part.nonzero_parameters for part in parts.values()) == whole["nonzero_parameters"]
    for key in whole["macs"]:
        assert sum((part.macs or {})[key] for part in parts.values()) == whole["macs"][key]
    module.save_pretrained(tmp_path)
    size = (tmp_path / "model.safetensors").stat().st_size
    header = int.from_bytes((tmp_path / "model.safetensors").read_bytes()[:8], "little")
    assert sum(part.bytes for part in parts.values()) == size - header - 8


@pytest.mark.parametrize("family", translators.FAMILIES)
def test_the_parts_of_an_encoder_decoder_are_those_of_both_stacks(family: str, tmp_path: Path) -> None:
    module = translators.translator(family).module
    parts, find = parts_of(module), part_of(module)
    assert sum(part.parameters for part in parts.values()) == profile(module)["parameters"]
    module.save_pretrained(tmp_path)
    raw = (tmp_path / "model.safetensors").read_bytes()
    assert sum(part.bytes for part in parts.values()) == len(raw) - int.from_bytes(raw[:8], "little") - 8
    # Two blocks in each stack; a matrix of attention is 32 x 32, all four of one attention the same.
    bias = 0 if family == "t5" else 4 * 32
    tables = sum(p.numel() for name, p in module.named_parameters() if "relative_attention_bias" in name)
    norms = 32 if family == "t5" else 64
    assert parts["attention"].parameters == 4 * (4 * 32 * 32 + bias + norms) + tables
    assert parts["cross_attention"].parameters == 2 * (4 * 32 * 32 + bias + norms)
    assert {find(name) for name, _ in module.named_parameters()} == set(parts) - ({"head"} if family != "t5" else set())


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
def test_attention_and_feed_forward_have_the_macs_of_their_matrices(family: str) -> None:
    """Width 32, 2 layers, 4 heads of 8 (Llama: 8 queries, 4 keys), 32 neurons."""
    parts = parts_of(tiny.model(family).module)
    widths = (64, 32, 32, 64) if family == "llama" else (32,) * 4
    assert parts["attention"].macs == {"per_token": 2 * 32 * sum(widths), "per_token_squared": 2 * 2 * widths[0], "per_example": 0}
    assert (parts["feed_forward"].macs or {})["per_token"] == 2 * (3 if family == "llama" else 2) * 32 * 32


def test_the_time_of_the_parts_is_the_time_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that goes on by one at every look, a part has as many units as its layers begin and end."""
    model = tiny.model("bert")
    ticks = iter(range(10**6))
    monkeypatch.setattr("multum.core.parts.time.perf_counter", lambda: next(ticks))
    rows = [dict(pad([row], 0)) for row in tiny.task().encode(model, "validation")][:3]
    found, find = time_parts(model.module, rows, seconds=10**6), part_of(model.module)
    called: list[str] = []
    leaves = [(name, part) for name, part in model.module.named_modules() if not list(part.children())]
    hooks = [part.register_forward_hook(lambda *_, name=name: called.append(find(name))) for name, part in leaves]
    model.module(**rows[0])
    for hook in hooks:
        hook.remove()
    assert set(found) == set(called)
    for part, value in found.items():
        assert value == 1e3 * (2 * called.count(part) + (part == "head"))  # what comes after the last layer is the head's
    assert not any(part._forward_hooks for _, part in leaves)


def test_an_outline_shares_the_weights() -> None:
    module = tiny.model("bert").module
    copied = outline(module)
    assert copied is not module
    assert copied.config is not module.config
    assert all(a is b for a, b in zip(module.parameters(), copied.parameters(), strict=True))


def test_every_step_has_a_row_or_is_no_technique_for_a_trained_model() -> None:
    others = {"int8"}
    apart = {"pretrain", "reconstruct"}  # for a new model, after a cut
    # Bytes of a torch folder; an export's int8 has its own row.
    apart |= {"quantize", "quantize_embeddings", "gptq", "awq", "qat", "smoothquant"}
    assert set(TECHNIQUES) - others == set(names()) - apart
    for name in set(TECHNIQUES) - others:
        assert TECHNIQUES[name].does


def test_what_is_never_used_is_counted_and_the_step_gives_what_was_said(model: str, data: str) -> None:
    found, task = advice(model, data), tiny.task()
    loaded = task.load(model)
    ids = {token for text in task.inputs("train") for token in loaded.tokenizer(text)["input_ids"]}
    assert found["profile"]["vocabulary"]["used"] == len(ids)
    trimmed = find("trim_vocabulary")()(loaded, task)
    said = estimate(found, "trim_vocabulary", "bytes")
    assert said["before"] == sum(part.bytes for part in parts_of(loaded.module).values())
    assert said["after"] == sum(part.bytes for part in parts_of(trimmed.module).values())
    assert said["basis"] == _advice_estimates.ARITHMETIC
    shorter = find("drop_layers")(keep=2, which="alternate")(loaded, task)
    assert estimate(found, "drop_layers", "bytes")["after"] == sum(part.bytes for part in parts_of(shorter.module).values())
    factored = find("low_rank")(samples=8)(loaded, task)
    assert estimate(found, "low_rank", "bytes")["after"] == sum(part.bytes for part in parts_of(factored.module).values())


@pytest.mark.parametrize("family", ["bert", "electra", "roberta"])
def test_the_bytes_of_an_int8_export_are_those_of_its_constants(family: str, data: str, tmp_path: Path) -> None:
    import onnx

    made = tiny.uneven(tiny.model(family, layers=3, hidden=64, neurons=96))
    made.save(tmp_path / "model")
    onnxruntime.export(made, tmp_path / "int8", precision="int8", inputs=["a film"], max_length=tiny.POSITIONS, pairs=False)
    graph = onnx.load(tmp_path / "int8" / onnxruntime.GRAPH).graph
    stored = sum(len(constant.raw_data) for constant in graph.initializer)
    found = advice(str(tmp_path / "model"), data)
    assert estimate(found, "int8", "bytes")["after"] == pytest.approx(stored, rel=0.02)


@pytest.mark.parametrize("family", ["mpnet", "modernbert", "gpt2"])
def test_the_bytes_of_a_traced_int8_export(family: str, data: str, tmp_path: Path) -> None:
    made, task = tiny.model(family, layers=3, hidden=64, neurons=96), tiny.task()
    made.save(tmp_path / "model")
    options: dict[str, Any] = {"calibration": task.calibration(made, 2), "max_length": tiny.POSITIONS, "pairs": False}
    found = advice(str(tmp_path / "model"), data)
    assert entry(found, "int8") in found["use"]
    onnxruntime.export(made, tmp_path / "int8", precision="int8", inputs=task.inputs("validation"), **options)
    import onnx

    graph = onnx.load(tmp_path / "int8" / onnxruntime.GRAPH).graph
    stored = sum(len(constant.raw_data) or constant.ByteSize() for constant in graph.initializer)
    assert estimate(found, "int8", "bytes")["after"] == pytest.approx(stored, rel=0.1)


def test_goals_change_what_is_used(model: str, data: str) -> None:
    used = {goal: [one["name"] for one in advice(model, data, goal=goal)["use"]] for goal in GOALS}
    assert "trim_vocabulary" in used["smaller"]
    assert "trim_vocabulary" not in used["faster"]
    assert "distill" in used["both"]
    assert not {"distill", "finetune"} & set(used["no-training"])
    assert not {"distill", "trim_vocabulary"} & set(used["private"])
    zeros = entry(advice(model, data), "wanda")
    assert "leave its speed unchanged" in zeros["why"]
    assert estimate(advice(model, data), "wanda", "bytes")["after"] == estimate(advice(model, data), "wanda", "bytes")["before"]


@pytest.mark.parametrize("family", ADVISABLE)
@pytest.mark.parametrize("goal", ["both", "no-training"])
def test_the_recipe_is_accepted_and_its_steps_run(family: str, goal: str, data: str, tmp_path: Path) -> None:
    """As `multum run` applies them, which measures what they give; with less training."""
    tiny.model(family, layers=2).save(tmp_path / "model")
    found = advice(str(tmp_path / "model"), data, goal=goal)
    write_recipe(tmp_path / "r.yaml", found)
    read, task = recipe.read(tmp_path / "r.yaml"), tiny.task()
    assert [step.name for step in read.steps] == [next(iter(s)) if isinstance(s, dict) else s for s in found["recipe"]["steps"]]
    made = task.load(str(tmp_path / "model"))
    for place, step in enumerate(read.steps):
        fields = step.fields | {key: value for key, value in {"epochs": 1, "augment": 0}.items() if key in step.fields}
        if "teacher" in fields:
            fields["teacher"] = str(tmp_path / read.stage(fields["teacher"], place))
        made = find(step.name)(**fields)(made, task)
        made.save(tmp_path / read.stages[place])
    assert [one["step"] for one in made.history] == [step.name for step in read.steps]
    assert ("distill" in found["recipe"]["steps"][-1]) == (goal == "both")
    assert made.parameters() < task.load(str(tmp_path / "model")).parameters()
    with pytest.raises(InputError, match="exists already"):
        write_recipe(tmp_path / "r.yaml", found)


def test_a_model_that_was_shrunk(model: str, data: str, tmp_path: Path) -> None:
    tiny.uneven(tiny.model(layers=3)).save(tmp_path / "uneven")
    found = advice(str(tmp_path / "uneven"), data)
    whole = profile(tiny.uneven(tiny.model(layers=3)).module)
    assert sum(part["parameters"] for part in found["profile"]["parts"].values()) == whole["parameters"]
    task = tiny.task()
    trimmed = find("trim_vocabulary")()(task.load(model), task)
    trimmed.save(tmp_path / "trimmed")
    found = advice(str(tmp_path / "trimmed"), data, goal="smaller")
    assert entry(found, "trim_vocabulary")["why"].startswith("nearly all tokens stay")
    assert any("trim_vocabulary" in note for note in found["notes"])
    # Factored matrices cannot be pruned: layers go instead, and what is left is taught.
    find("low_rank")(samples=8)(trimmed, task).save(tmp_path / "factored")
    found = advice(str(tmp_path / "factored"), data, goal="faster")
    assert "factored" in entry(found, "prune_structured")["why"]
    assert [next(iter(step)) for step in found["recipe"]["steps"]] == ["drop_layers", "distill"]
    assert found["shrink"] is None


@pytest.mark.parametrize("family", ["bert", "mpnet", "gpt2"])
def test_a_packed_model_is_profiled_and_only_exported(family: str, data: str, tmp_path: Path) -> None:
    task, whole = tiny.task(), tiny.model(family)
    packed = find("quantize_embeddings")()(find("quantize")(bits=4, group=16)(whole, task), task)
    packed.save(tmp_path / "packed")
    whole.save(tmp_path / "whole")
    found, before = (advice(str(tmp_path / name), data, goal="faster") for name in ("packed", "whole"))
    for key in ("macs_per_example", "parameters", "layers", "heads_and_neurons", "tokens"):
        assert found["profile"][key] == before["profile"][key]
    assert found["profile"]["bytes"] < 0.4 * before["profile"]["bytes"]
    table = packed.module.get_input_embeddings()
    row = table.codes.shape[1] + 2 * table.scales.shape[1]
    assert found["profile"]["vocabulary"]["row_bytes"] == row
    weights = [part.weight for name, part in packed.module.named_modules() if is_matrix(part)]
    zeros = sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)
    assert found["profile"]["zeros"] == pytest.approx(zeros)
    assert [one["name"] for one in found["use"]] == ["int8"]
    assert estimate(found, "int8", "bytes")["after"] == estimate(before, "int8", "bytes")["after"]
    for name in set(TECHNIQUES) - {"int8"}:
        assert "quantized already" in entry(found, name)["why"]
    assert found["recipe"] is None
    assert found["shrink"] is None


def test_a_model_that_nobody_knows_and_one_without_data(model: str, data: str, tmp_path: Path) -> None:
    known = tiny.model("bert")
    names = {key: getattr(known.module.config, key) for key in ("id2label", "label2id", "vocab_size", "max_position_embeddings")}
    sizes = {"embedding_size": 16, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
    module = AlbertForSequenceClassification(AlbertConfig(**sizes, **names)).eval()
    Model(module=module, tokenizer=known.tokenizer, source="tiny-albert").save(tmp_path / "albert")
    found = advice(str(tmp_path / "albert"), data, goal="smaller")
    assert set(found["profile"]["parts"]) == {"embeddings", "body", "head"}
    assert sum(part["parameters"] for part in found["profile"]["parts"].values()) == profile(module)["parameters"]
    assert {one["name"] for one in found["use"]} == {"int8", "trim_vocabulary"}
    assert found["recipe"]["steps"] == ["trim_vocabulary"]
    assert found["shrink"] is None
    assert any("albert" in note for note in found["notes"])
    found = multum.advise(model, task="text-classification")
    assert found["recipe"] is None
    assert any("without data" in note for note in found["notes"])


def test_models_that_write(tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("\n\n".join(tiny.passages(60)), encoding="utf-8")
    tiny.language_model("gpt2", positions=128).save(tmp_path / "gpt2")
    found = multum.advise(str(tmp_path / "gpt2"), task="text-generation", data=str(tmp_path / "texts.txt"))
    assert [one["name"] for one in found["use"]] == ["prune_structured", "distill"]
    assert "not of models for text-generation" in entry(found, "int8")["why"]
    assert "--task text-generation" in found["shrink"]
    assert "--max-drop 10%" in found["shrink"]
    rows = ["source,target", *(",".join(pair) for pair in translators.sentences(60))]
    (tmp_path / "pairs.csv").write_text("\n".join(rows), encoding="utf-8")
    translator = translators.translator("t5", layers=3)
    translator.save(tmp_path / "t5")
    found = multum.advise(str(tmp_path / "t5"), task="translation", data=str(tmp_path / "pairs.csv"))
    assert [next(iter(step)) for step in found["recipe"]["steps"]] == ["drop_layers", "distill_generation"]
    assert "written" in entry(found, "trim_vocabulary")["why"]
    assert "--task translation" in found["shrink"]
    assert "--max-drop 1 " in found["shrink"]
    shorter = find("drop_layers")(keep=1, which="alternate")(translator, translators.translating())
    assert estimate(found, "drop_layers", "bytes")["after"] == sum(part.bytes for part in parts_of(shorter.module).values())
    factored = find("low_rank")(samples=16)(translator, translators.translating())
    assert estimate(found, "low_rank", "bytes")["after"] == sum(part.bytes for part in parts_of(factored.module).values())
    write_recipe(tmp_path / "r.yaml", found)
    assert len(recipe.read(tmp_path / "r.yaml").steps) == 2


def test_a_quick_measurement_takes_the_place_of_published_figures(model: str, data: str) -> None:
    found = advice(model, data, measured=True, threads=1)
    assert set(found["profile"]["measured"]) == {"torch", "int8"}
    ratio = found["profile"]["measured"]["int8"]["ratio"]
    assert estimate(found, "int8", "speed") | {"source": ""} == {
        "what": "speed",
        "basis": _advice_estimates.MEASURED,
        "source": "",
        "factor": (ratio, ratio),
    }
    assert not (Path(model) / "metrics.json").exists()


def test_the_time_of_a_step_is_reckoned_from_the_pace(model: str, data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `shrink` reckons it: the costs in `plan` are multiples of a text in a batch, not of one read alone."""
    monkeypatch.setattr("multum._advice_profile.pace", lambda *_: 0.5)
    found = advice(model, data)
    texts = found["profile"]["training_texts"]
    assert entry(found, "prune_structured")["seconds"] == plan.PRUNING * min(512, texts) * 0.5
    written = next(step["distill"] for step in found["recipe"]["steps"] if "distill" in step)
    stages = plan.teaching("", SimpleNamespace(distill=written), texts, 0.5, 0.5, taught=False)  # type: ignore[arg-type]
    assert entry(found, "distill")["seconds"] == pytest.approx(stages[0][1])


def test_a_published_speed_is_said_only_of_the_budget_it_was_published_for(model: str) -> None:
    for goal, faster in (("both", [(1.56, 1.56)]), ("no-training", []), ("private", [])):
        found = multum.advise(model, task="text-classification", goal=goal)
        speeds = [one["factor"] for one in entry(found, "prune_structured")["estimates"] if one["what"] == "speed"]
        assert speeds == faster


def test_every_estimate_says_how_it_was_made(model: str, data: str) -> None:
    bases = {_advice_estimates.ARITHMETIC, _advice_estimates.MEASURED, _advice_estimates.PUBLISHED}
    found = advice(model, data)
    for one in [*found["use"], *found["leave"]]:
        for each in one["estimates"]:
            assert each["basis"] in bases
            assert each["source"]


def test_figures_of_our_own_are_those_of_the_benchmarks() -> None:
    """What the table of advice quotes stands in the results."""
    source = "".join(
        (Path(multum.__file__).parent / name).read_text(encoding="utf-8") for name in ("_advice.py", "_advice_estimates.py")
    )
    one_shot = json.loads((RESULTS / "one_shot.json").read_text(encoding="utf-8"))["models"]
    known = {f"{100 * each['accuracy']['median']:.1f}" for each in one_shot.values()}
    quoted = set(re.findall(r"(\d\d\.\d) %", source))
    speeds = {f"{each['speedup']['median']:.2f}" for each in one_shot.values()}
    assert set(re.findall(r"(\d\.\d\d)x", source)) <= speeds
    assert quoted
    assert quoted <= known
    quick = json.loads((RESULTS / "reviews_quick.json").read_text(encoding="utf-8"))
    torch_ms, int8_ms = (statistics.median(run["p50_ms"][at] for run in quick["runs"]) for at in (0, 1))
    assert f"{torch_ms:.2f} ms in torch -> {int8_ms:.2f} ms" in source
    quick = quick["median"]
    drop, faster = quick["drop"], quick["over_strongest"]["median"]
    assert f"{drop['low']:.1f} to {drop['high']:.1f} points lost at {faster:.2f} times the speed of the original's int8" in source
    assert OWN.startswith("benchmarks/results/reviews_quick.md")


def test_figures_on_the_page_stand_where_it_says() -> None:
    page = (RESULTS.parent.parent / "docs" / "choosing.md").read_text(encoding="utf-8")
    cited = re.findall(r"([^|;]*)\[(\w+\.md)\]\(\.\./benchmarks/results/(\w+\.md)\)", page)
    assert {name for _, name, _ in cited} == {"reviews_quick.md", "one_shot.md", "advise.md", "distillation_reviews_zh_1000.md"}
    for text, name, target in cited:
        result = (RESULTS / target).read_text(encoding="utf-8")
        assert name == target
        assert (figures := re.findall(r"\d+\.\d+", text))
        assert not [figure for figure in figures if not re.search(rf"(?<![\d.]){figure}(?!\d)", result)]


def test_the_command(model: str, data: str, tmp_path: Path) -> None:
    arguments = ["advise", model, "--task", "text-classification", "--data", data]
    done = CliRunner().invoke(app, [*arguments, "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["use"]
    done = CliRunner().invoke(app, [*arguments, "-o", str(tmp_path / "r.yaml")])
    assert done.exit_code == 0, done.output
    assert "trim_vocabulary" in done.stdout
    assert (tmp_path / "r.yaml").is_file()


def test_the_data_of_a_finished_run_need_not_be_given(model: str, tmp_path: Path) -> None:
    columns = {"text": "review", "label": "stars"}
    splits = tiny.splits()
    rows = [{"review": row["text"], "stars": row["label"]} for part in (splits.train, splits.test) for row in part]
    source = str(on_disk.write_csv(tmp_path / "reviews.csv", rows))
    shutil.copytree(model, tmp_path / "run" / "chosen")
    about = {"task": "text-classification", "seed": 7, "data": {"source": source}, "arguments": {"columns": columns}}
    (tmp_path / "run" / "run.json").write_text(json.dumps(about))
    chosen = str(tmp_path / "run" / "chosen")
    done = CliRunner().invoke(app, ["advise", chosen, "--task", "text-classification", "-o", str(tmp_path / "r.yaml")])
    assert done.exit_code == 0, done.output
    read = recipe.read(tmp_path / "r.yaml")
    assert (read.data, read.columns, read.seed) == (source, columns, 7)
    assert f"multum shrink {chosen} --task text-classification --data {source} --seed 7 --columns text=review,label=stars" in (
        " ".join(done.stdout.split())
    )
    given = multum.advise(model, task="text-classification", data=source, columns=columns, seed=7)
    assert advice(chosen, "")["profile"]["vocabulary"] == given["profile"]["vocabulary"]
    assert given["profile"]["vocabulary"]["used"] is not None
    other = multum.advise(chosen, task="text-classification", data=source, columns=columns, seed=0)
    assert other["recipe"]["seed"] == 0
    Path(source).unlink()
    with pytest.raises(InputError, match=r"reviews\.csv"):
        advice(chosen, "")
    bare = CliRunner().invoke(app, ["advise", model, "--task", "text-classification", "-o", str(tmp_path / "none.yaml")])
    assert bare.exit_code == 2
    assert "give --data beside -o" in bare.stderr


def test_all_that_is_wrong_is_said_at_once() -> None:
    with pytest.raises(InputError) as caught:
        multum.advise("nowhere/at-all", task="parsing", data="missing.csv", goal="cheaper", measured=True)
    text = str(caught.value)
    assert "cheaper" in text
    assert "parsing" in text
    assert "missing.csv" in text


def test_time_is_not_measured_where_there_is_no_text(model: str) -> None:
    with pytest.raises(InputError, match="give data"):
        multum.advise(model, task="text-classification", measured=True)
    assert torch.is_grad_enabled()


def test_a_folder_that_is_not_there_is_told_from_one_that_names_no_task(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere is no folder here"):
        task_for(str(tmp_path / "nowhere"), "")
    with pytest.raises(InputError, match="does not say what it was made for"):
        task_for(str(tmp_path), "")
