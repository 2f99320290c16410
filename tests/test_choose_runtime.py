"""`--runtime auto`: the choice from a table against a slow reference, real processes on a tiny model, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import on_disk
import pytest
import tiny
import torch
from test_shrink_writing import Inside
from typer.testing import CliRunner

from multum import _auto, _runtime_trials, bench, choose_runtime, runtimes
from multum._runtime_inputs import Given, check, lengths_of, limit_of, short
from multum._runtime_table import EAGER, FEW, TABLE, Form, fits, grown, kept, pick, rows
from multum.choose_runtime import candidates, choose, open_way, ready
from multum.cli import app
from multum.core.folders import read_json
from multum.errors import InputError
from multum.runtimes import openvino, pytorch
from multum.runtimes._predictor import thread_counts
from multum.targets import Way, fingerprint

GRAPH, SMALL = Form("onnxruntime", "fp32"), Form("onnxruntime", "int8")
FORMS = (EAGER, GRAPH, SMALL)
ABOUT = {"machine": {"name": "one"}, "versions": {"torch": "2"}, "model": "abc", "pairs": False}


def table(times: dict[Any, list[float]], ready: dict[Form, float] | None = None, **more: Any) -> dict[str, Any]:
    """A table as `runtimes.json` has it, of (form, threads, length, batch) -> milliseconds round by round."""
    forms = list(dict.fromkeys(form for form, *_ in times))
    parity = {"n": 32, "max_difference": 0.0, "agreement": 1.0, "kl_nats": 0.0}
    about = [
        {
            **dataclasses.asdict(form),
            "name": form.name,
            "bytes": 2_000_000,
            "threads": 1,
            "parity": parity,
            "ready_s": (ready or {}).get(form, 1.0),
        }
        for form in forms
    ]
    return {
        **ABOUT,
        "few": False,
        "threads": max(threads for _, threads, *_ in times),
        "lengths": sorted({length for *_, length, _ in times}),
        "batches": sorted({batch for *_, batch in times}),
        "timed": ["pass"],
        "rounds": max(map(len, times.values())),
        "present": {"form": EAGER.name, "threads": max(threads for form, threads, *_ in times if form == EAGER)},
        "forms": about,
        "left_out": {},
        "times": [
            {
                "form": form.name,
                "threads": threads,
                "length": length,
                "batch": batch,
                "what": "pass",
                "ms": statistics.median(ms),
                "rounds_ms": ms,
            }
            for (form, threads, length, batch), ms in times.items()
        ],
        **more,
    }


def steady(ms: float) -> list[float]:
    return [ms * (1 + 0.01 * (number % 3)) for number in range(9)]


@pytest.mark.parametrize("seed", range(5))
def test_the_choice_is_that_of_a_slow_search(seed: int) -> None:
    rng = random.Random(seed)
    cells = [(length, batch) for length in (16, 64) for batch in (1, 8)]
    ways = [(form, threads) for form in FORMS for threads in (1, 2)]
    times = {(*way, *cell): [rng.uniform(1, 9) * cell[0] * cell[1] for _ in range(9)] for way in ways for cell in cells}
    best, least = None, float("inf")
    for way in ways:
        per_text = [sum(times[(*way, *cell)][r] / cell[1] for cell in cells) / len(cells) for r in range(9)]
        if statistics.median(per_text) < least:
            best, least = way, statistics.median(per_text)
    found = pick(table(times), lengths=[16, 64], batches=[1, 8], threads=2)
    assert best is not None
    assert found.fastest == f"{best[0].name} on {best[1]} thread{'s' * (best[1] > 1)}"
    if found.gain:
        assert (found.form, found.threads) == best
        assert found.ms == pytest.approx(least, abs=1e-3)
    else:
        assert (found.form, found.threads) == (EAGER, 2)


def test_what_is_faster_in_every_round_is_chosen_and_noise_is_not() -> None:
    times = {(EAGER, 2, 32, 1): steady(10.0), (GRAPH, 2, 32, 1): steady(4.0), (GRAPH, 1, 32, 1): steady(5.0)}
    found = pick(table(times), lengths=[32], batches=[1], threads=2)
    assert (found.form, found.threads, found.gain) == (GRAPH, 2, True)
    assert found.ratio["value"] == pytest.approx(2.5)
    assert found.line().startswith("Chosen: onnxruntime fp32 on 2 threads, 2.50 (")
    # In the median it is faster, but every other round says the opposite.
    noisy = {(EAGER, 2, 32, 1): [10.0] * 9, (GRAPH, 2, 32, 1): [9.0, 11.0] * 4 + [9.0]}
    found = pick(table(noisy), lengths=[32], batches=[1], threads=2)
    assert (found.form, found.gain) == (EAGER, False)
    assert found.line().startswith("No gain beyond noise over pytorch fp32 on 2 threads, which stays: onnxruntime fp32")
    # Always faster, by less than is worth a change.
    alike = {(EAGER, 2, 32, 1): [10.0] * 9, (GRAPH, 2, 32, 1): [9.9] * 9}
    assert not pick(table(alike), lengths=[32], batches=[1], threads=2).gain
    alone = pick(table({(EAGER, 1, 32, 1): [10.0] * 9}), lengths=[32], batches=[1], threads=1)
    assert alone.line() == "No gain: pytorch fp32 on 1 thread is the fastest"


def test_an_export_that_ships_already_is_what_others_have_to_beat() -> None:
    times = {(EAGER, 2, 32, 1): steady(10.0), (GRAPH, 2, 32, 1): steady(4.0), (SMALL, 2, 32, 1): [4.0] * 9}
    found = pick(table(times, present={"form": GRAPH.name, "threads": 2}), lengths=[32], batches=[1], threads=2)
    assert (found.form, found.gain, found.present) == (GRAPH, False, "onnxruntime fp32 on 2 threads")


def test_getting_ready_counts_where_the_texts_are_few() -> None:
    times = {(EAGER, 1, 32, 1): steady(10.0), (GRAPH, 1, 32, 1): steady(1.0)}
    slow = table(times, {EAGER: 1.0, GRAPH: 30.0})
    asked: dict[str, Any] = {"lengths": [32], "batches": [1], "threads": 1}
    assert pick(slow, texts=10, **asked).form == EAGER
    assert pick(slow, texts=10_000, **asked).form == GRAPH  # 9 s are saved a thousand texts
    assert pick(slow, **asked).form == GRAPH


def test_the_choice_keeps_to_threads_precision_and_exports() -> None:
    times = {(EAGER, threads, 32, 1): steady(9.0) for threads in (1, 2)}
    times |= {(GRAPH, 1, 32, 1): steady(6.0), (GRAPH, 2, 32, 1): steady(3.0), (SMALL, 2, 32, 1): steady(2.0)}
    asked: dict[str, Any] = {"lengths": [32], "batches": [1]}
    found = pick(table(times), threads=1, **asked)
    assert (found.form, found.threads, found.present) == (GRAPH, 1, "pytorch fp32 on 1 thread")
    assert pick(table(times), threads=2, precision="fp32", **asked).form == GRAPH
    with pytest.raises(InputError, match="no bf16 form"):
        pick(table(times), threads=2, precision="bf16", **asked)
    slower = {(EAGER, 1, 32, 1): steady(2.0), (GRAPH, 1, 32, 1): steady(6.0)}
    found = pick(table(slower), threads=1, exported=True, **asked)
    assert (found.form, found.gain) == (GRAPH, False)


def test_what_ships_runs_on_the_threads_of_its_export() -> None:
    times = {(GRAPH, threads, 32, 1): steady(4.0 / threads) for threads in (1, 2)} | {(EAGER, 1, 32, 1): steady(1.0)}
    times |= {(SMALL, 1, 32, 1): steady(3.0), (SMALL, 2, 32, 1): steady(1.5)}
    known, asked = table(times, present={"form": GRAPH.name, "threads": 1}), {"lengths": [32], "batches": [1], "threads": 2}
    found = pick(known, ships=[GRAPH.name, SMALL.name], **asked)
    assert (found.form, found.threads, found.gain) == (SMALL, 1, True)
    assert found.ratio["value"] == pytest.approx(4 / 3, abs=1e-3)
    assert pick(known, ships=[GRAPH.name], **asked).line() == "No gain: onnxruntime fp32 on 1 thread is the fastest"
    # Where the present one may not ship the fastest of the others does, gain or not.
    slow = table(times | {(SMALL, 1, 32, 1): steady(9.0)}, present={"form": GRAPH.name, "threads": 1})
    found = pick(slow, ships=[SMALL.name], **asked)
    assert (found.form, found.gain, found.ratio["value"]) == (SMALL, False, pytest.approx(4 / 9, abs=1e-3))


def test_forms_that_were_not_timed_to_the_end_are_not_chosen() -> None:
    times = {(EAGER, 1, 32, 1): steady(10.0), (GRAPH, 1, 32, 1): [1.0] * 3}
    assert pick(table(times), lengths=[32], batches=[1], threads=1).form == EAGER
    shown = rows(table(times))
    assert [row[0] for row in shown[1:]] == ["pytorch fp32 on 1 thread", "onnxruntime fp32 on 1 thread*"]
    assert shown[0][-1] == "32 tokens x 1, ms"
    assert shown[2][-1] == "1"


def test_a_table_that_is_measured_anew_keeps_its_lengths() -> None:
    known = table({(EAGER, 1, length, 1): steady(1.0) for length in (32, 128)})
    asked: dict[str, Any] = {"lengths": [8], "batches": [4], "threads": 1}
    assert grown(known, ABOUT, asked) == {"lengths": [8, 32, 128], "batches": [1, 4]}
    assert grown(known, ABOUT | {"model": "another"}, asked) == {"lengths": [8], "batches": [4]}
    assert grown(None, ABOUT, asked) == {"lengths": [8], "batches": [4]}


@pytest.mark.parametrize(
    ("changes", "fit"),
    [
        ({}, True),
        ({"lengths": [48]}, True),  # 1.5 times as long
        ({"lengths": [49]}, False),
        ({"lengths": [22, 100]}, True),
        ({"lengths": [20]}, False),
        ({"batches": [2]}, True),
        ({"batches": [33]}, False),
        ({"threads": 1}, True),
        ({"threads": 3}, False),
        ({"forms": [EAGER, SMALL]}, False),
        ({"few": True}, True),
    ],
)
def test_a_table_serves_for_what_is_near(changes: dict[str, Any], fit: bool) -> None:
    times = {(form, 2, length, batch): steady(1.0) for form in (EAGER, GRAPH) for length in (32, 128) for batch in (1, 8)}
    asked = {"few": False, "lengths": [32], "batches": [1], "threads": 2, "forms": [EAGER, GRAPH]} | changes
    assert fits(table(times), ABOUT, **asked) is fit


def test_a_table_does_not_serve_for_another_machine_model_or_after_few_texts() -> None:
    known = table({(EAGER, 1, 32, 1): steady(1.0)})
    asked: dict[str, Any] = {"lengths": [32], "batches": [1], "threads": 1, "forms": [EAGER]}
    assert fits(known, ABOUT, few=False, **asked)
    for key in ABOUT:
        assert not fits(known, ABOUT | {key: "other"}, few=False, **asked)
    assert not fits(known | {"few": True}, ABOUT, few=False, **asked)
    assert fits(known | {"few": True}, ABOUT, few=True, **asked)
    # A form that was left out for a reason needs no second trial.
    known["left_out"][SMALL.name] = "not possible"
    assert fits(known, ABOUT, few=False, **asked | {"forms": [EAGER, SMALL]})


def test_candidates_are_all_forms_for_encoders() -> None:
    names = {form.name for form in candidates()}
    wanted = {"pytorch fp32", "pytorch fp32 compiled", "onnxruntime fp32", "onnxruntime int8"}
    assert wanted | {"openvino fp32", "openvino bf16", "openvino int8"} <= names
    assert not any(name.startswith("llamacpp") for name in names)
    assert {"fp32", "int8"} <= {form.precision for form in candidates("int8")} <= {"fp32", "int8", "int8-mse"}
    assert [form for form in candidates("int8") if form.precision == "fp32"] == [EAGER]
    assert [thread_counts(n) for n in (1, 2, 6, 8)] == [[1], [1, 2], [1, 2, 4, 6], [1, 2, 4, 8]]


def test_lengths_are_those_of_the_tokenizer(tmp_path: Path) -> None:
    model, texts = tiny.model(), tiny.task().inputs("test")
    model.save(tmp_path / "model")
    assert lengths_of(tmp_path / "model", texts) == [len(ids) for ids in model.tokenizer(list(texts))["input_ids"]]
    assert limit_of(tmp_path / "model") == tiny.POSITIONS
    assert short([5] * 10) == [5]
    assert short([61, 4, 5, 6, 7, 8, 9, 20, 21, 22, 60]) == [5, 9, 60]


# -- real processes ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any, dict[str, Any]]:
    """A model beside which two forms were tried, one of them an export of other weights that stood there before."""
    folder = tmp_path_factory.mktemp("auto") / "model"
    model, task = tiny.model(), tiny.task()
    model.save(folder)
    before = fingerprint(folder)
    choose_runtime.export_model(runtimes.find("onnxruntime"), tiny.model(seed=1), folder / GRAPH.folder, "fp32", task, 0)
    choice, found = choose(folder, task, lengths=[8, 24], batches=[1, 4], threads=1, forms=FORMS, rounds=5, seconds=1.0)
    assert fingerprint(folder) == before, "the table is no part of the model"
    return folder, task, choice, found


def test_the_table_is_kept_and_complete(measured: Any) -> None:
    folder, _, _, found = measured
    assert read_json(folder / TABLE) == kept(folder) == found
    timed = {(row["form"], row["length"], row["batch"]): row for row in found["times"]}
    assert set(timed) >= {(EAGER.name, length, batch) for length in (8, 24) for batch in (1, 4)}
    assert all(row["ms"] == pytest.approx(statistics.median(row["rounds_ms"]), abs=1e-3) for row in timed.values())
    assert all(min(row["rounds_ms"]) > 0 for row in timed.values())
    assert len(timed[EAGER.name, 8, 1]["rounds_ms"]) == found["rounds"] == 5
    forms = {one["name"]: one for one in found["forms"]}
    assert forms[EAGER.name]["parity"]["max_difference"] == 0
    assert forms[SMALL.name]["bytes"] < forms[EAGER.name]["bytes"]
    assert {one["threads"] for one in forms.values()} == {1}
    assert [(one["lengths"], one["batch"]) for one in found["choices"]] == [
        (lengths, batch) for batch in (1, 4) for lengths in ([8, 24], [8], [24])
    ]
    assert len(rows(found)) == 1 + len({(row["form"], row["threads"]) for row in found["times"]})


def test_an_export_that_answers_differently_is_left_out(measured: Any) -> None:
    _, _, _, found = measured
    assert "it answers differently: logits differ by" in found["left_out"][GRAPH.name]
    assert GRAPH.name not in {one["name"] for one in found["forms"]}


def test_what_was_chosen_is_there_and_answers_as_torch_does(measured: Any) -> None:
    folder, task, choice, _ = measured
    way = ready(folder, choice, task)
    assert way == Way(folder / choice.form.folder, 1)
    texts = task.inputs("test")
    found, expected = open_way(way).predict(texts), pytorch.open(folder, threads=1).predict(texts)
    assert (found.argmax(1) == expected.argmax(1)).mean() > 0.9


def test_a_kept_table_is_used_again_until_the_model_is_another(measured: Any, tmp_path: Path, monkeypatch: Any) -> None:
    folder, task, choice, found = measured
    monkeypatch.setattr(choose_runtime, "_measured", lambda *_: pytest.fail("measured again"))
    _, same = choose(folder, task, lengths=[9], threads=1, forms=FORMS)
    assert same == found
    assert choose(folder, task, lengths=[8, 24], batches=[1, 4], threads=1, forms=FORMS) == (choice, found)
    other, _ = choose(folder, task, lengths=[8, 24], batches=[1, 4], threads=1, forms=FORMS, present=(choice.form, 1))
    assert (other.form, other.gain) == (choice.form, False)
    shutil.copytree(folder, tmp_path / "other")
    tiny.model(seed=2).module.save_pretrained(tmp_path / "other")
    with pytest.raises(pytest.fail.Exception, match="measured again"):
        choose(tmp_path / "other", task, lengths=[9], threads=1, forms=FORMS)
    (tmp_path / "other" / TABLE).write_text("{")
    assert kept(tmp_path / "other") is None


def test_an_export_that_is_gone_is_made_again(measured: Any, tmp_path: Path) -> None:
    folder, task, choice, _ = measured
    chosen = choice if choice.form == SMALL else pytest.skip("torch was faster here")
    way = ready(folder, chosen, task, output=tmp_path / "served")
    shutil.copytree(folder, tmp_path / "model", ignore=shutil.ignore_patterns("onnxruntime*"))
    made = ready(tmp_path / "model", chosen, task)
    texts = task.inputs("test")[:4]
    np.testing.assert_array_equal(open_way(made).predict(texts), open_way(way).predict(texts))


def test_the_commands_take_auto(measured: Any, monkeypatch: Any, tmp_path: Path) -> None:
    folder, _, choice, _ = measured
    monkeypatch.setattr(choose_runtime, "candidates", lambda precision="", task=None: list(FORMS))
    runner = CliRunner()
    plain = runner.invoke(app, ["predict", str(folder), "a wonderful moving film", "--json", "--threads", "1"])
    auto = runner.invoke(app, ["predict", str(folder), "a wonderful moving film", "--json", "--threads", "1", "--runtime", "auto"])
    assert auto.exit_code == 0, auto.output
    assert json.loads(auto.stdout)[0]["label"] == json.loads(plain.stdout)[0]["label"]
    assert TABLE in auto.stderr
    data = on_disk.review_folder(tmp_path / "data", n_train=32, n_validation=16, n_test=16)
    more = ["--data", str(data), "--task", "text-classification", "--threads", "1"]
    shown = runner.invoke(app, ["export", str(folder), "--to", "auto", "--lengths", "8", "-o", str(tmp_path / "served"), *more])
    assert shown.exit_code == 0, shown.output
    assert "8 tokens x 1, ms" in shown.stdout
    assert "onnxruntime fp32 was left out: it answers differently" in shown.stderr
    assert read_json(tmp_path / "served" / "runtime.json")["precision"] == "int8"
    asked = ["measure", str(folder), "--runtime", "auto", "--lengths", "8", "--rounds", "3", "--json", *more]
    found = runner.invoke(app, asked)
    assert found.exit_code == 0, found.output
    (metrics,) = json.loads(found.stdout)
    assert (metrics["speed"]["runtime"], metrics["speed"]["threads"]) == (choice.form.runtime, 1)


def test_a_kept_choice_runs_without_torch(measured: Any) -> None:
    folder, *_ = measured
    code = """
import sys
from pathlib import Path
from multum._runtime_inputs import Given
from multum._runtime_table import EAGER, FEW, TABLE, Form, fits, grown, kept, pick, rows
from multum.choose_runtime import choose, open_way, ready
folder = Path(sys.argv[1])
task = Given(folder, ["a wonderful moving film"])
choice, _ = choose(folder, task, threads=1, forms=[EAGER, Form("onnxruntime", "fp32"), Form("onnxruntime", "int8")])
assert choice.form != EAGER
assert open_way(ready(folder, choice, task)).predict(["a film"]).shape == (1, 2)
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_shrink_walks_in_precisions_that_its_table_can_be_measured_in() -> None:
    offers = bench.offers()
    assert ("onnxruntime", "int8") in offers
    assert not [offer for offer in offers if offer[1] == "bf16"]


# -- what is given without a task ----------------------------------------------------------------------------------------------


def test_given_inputs_calibrate_like_the_task(tmp_path: Path) -> None:
    model, task = tiny.model(), tiny.task()
    model.save(tmp_path / "model")
    given = Given(tmp_path / "model", task.inputs("train")[:4])
    assert (given.name, given.shrinks, given.has_pairs) == ("text-classification", True, False)
    assert given.length_limit(model) == task.length_limit(model)
    (batch,) = given.calibration(model, 8)
    with torch.no_grad():
        together = model.module(**batch).logits
        alone = [model.module(**model.tokenizer(text, return_tensors="pt")).logits for text in given.inputs("any")]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-5)
    assert Given(tmp_path / "model", [("a film", "a plot")]).has_pairs


def test_few_texts_do_not_prove_8_bits(tmp_path: Path) -> None:
    from multum._runtime_trials import exports
    from multum.progress import Progress

    model = tiny.model()
    model.save(tmp_path / "model")
    given = Given(tmp_path / "model", tiny.task().inputs("train")[: FEW - 1])
    (tmp_path / "scratch").mkdir()
    targets, left_out = exports(tmp_path / "model", tmp_path / "scratch", given, FORMS, 0, Progress.silent())
    assert set(targets) == {EAGER, GRAPH}
    assert left_out == {SMALL.name: f"integers are calibrated and checked on {FEW} texts or more; there are {FEW - 1}"}


def test_masked_language_models_are_tried_too(tmp_path: Path, monkeypatch: Any) -> None:
    """One export is of the model, one stood there and is of another."""
    monkeypatch.setattr(_runtime_trials, "Worker", Inside)
    folder, texts = tmp_path / "model", tiny.passages(4)
    tiny.language_model("bert", layers=1).save(folder)
    given = Given(folder, texts)
    assert EAGER in candidates("", given)
    assert not [form for form in candidates("", given) if form.compiled]
    other = tiny.language_model("bert", layers=1)
    other.module.get_input_embeddings().weight.data.mul_(-1.0)
    choose_runtime.export_model(runtimes.find("onnxruntime"), other, folder / GRAPH.folder, "fp32", given, 0)
    exact = Form("openvino", "fp32")
    choice, found = choose(folder, given, lengths=[8], threads=1, forms=[EAGER, GRAPH, exact], rounds=3, seconds=1.0)
    assert "it answers differently" in found["left_out"][GRAPH.name]
    assert {one["name"] for one in found["forms"]} == {EAGER.name, exact.name}
    way = ready(folder, dataclasses.replace(choice, form=exact, threads=1), given)
    np.testing.assert_allclose(open_way(way).predict(texts), pytorch.open(folder, threads=1).predict(texts), rtol=1e-4)


# -- refusals --------------------------------------------------------------------------------------------------------------------


def test_what_no_runtime_is_chosen_for(tmp_path: Path) -> None:
    task = tiny.task()
    tiny.model().save(tmp_path / "model")
    with pytest.raises(InputError, match="is not there"):
        check(tmp_path / "nowhere", task)
    with pytest.raises(InputError) as refused:
        choose(tmp_path / "model", task, lengths=[1, 8, tiny.POSITIONS + 1], batches=[0], threads=0)
    assert str(refused.value).count("\n  - ") == 2  # threads=0 are all cores
    assert f"lengths: 1, {tiny.POSITIONS + 1} cannot be timed; the model reads 2 to {tiny.POSITIONS} tokens" in str(refused.value)
    (tmp_path / "model" / "tokenizer.json").unlink()
    with pytest.raises(InputError, match="no fast tokenizer"):
        check(tmp_path / "model", task)
    (tmp_path / "model" / "runtime.json").write_text("{}")
    with pytest.raises(InputError, match="is an export already"):
        check(tmp_path / "model", task)


@pytest.mark.parametrize(
    ("runtime", "options", "problems"),
    [
        ("auto-int3", {}, ["no form has the precision 'int3'"]),
        ("auto", {"lengths": "32,x", "batches": "0"}, ["--lengths: '32,x'", "--batch-sizes: '0'"]),
        ("onnxruntime", {"lengths": "32"}, ["are for the runtime auto, not for onnxruntime"]),
    ],
)
def test_options_that_are_wrong(runtime: str, options: dict[str, str], problems: list[str], tmp_path: Path) -> None:
    with pytest.raises(InputError) as refused:
        _auto.check([tmp_path], runtime, **options)
    assert len(refused.value.problems) == len(problems)
    assert all(text in str(refused.value) for text in problems)


def test_options_that_are_right(tmp_path: Path) -> None:
    assert _auto.check([tmp_path], "") is None
    assert _auto.check([tmp_path], "openvino-int8") is None
    assert _auto.check([tmp_path], "auto-fp32", "32, 128", "8") == {"precision": "fp32", "lengths": [32, 128], "batches": [8]}
    assert _auto.check([tmp_path], "auto", precision="int8") == {"precision": "int8"}


# -- what runtimes are asked for -------------------------------------------------------------------------------------------------


def test_torch_compiles_where_it_is_asked_to(tmp_path: Path, monkeypatch: Any) -> None:
    tiny.model().save(tmp_path / "model")
    compiled: list[Any] = []

    def compile_(module: Any, *, dynamic: bool) -> Any:
        assert dynamic
        compiled.append(module)
        return lambda **batch: {"logits": 2 * module(**batch)["logits"]}

    monkeypatch.setattr(torch, "compile", compile_)
    plain = pytorch.open(tmp_path / "model", threads=1).predict(["a film", "a plot"])
    assert not compiled
    twice = pytorch.open(tmp_path / "model", threads=1, compiled=True)
    np.testing.assert_allclose(twice.predict(["a film", "a plot"]), 2 * plain, rtol=1e-6)
    ids = np.array([[5, 6, 7]])
    columns = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    once = pytorch.open(tmp_path / "model", threads=1).passes(1)(columns)
    np.testing.assert_allclose(twice.passes(1)(columns), 2 * once, rtol=1e-6)


def test_a_graph_runs_on_the_threads_it_is_told(measured: Any) -> None:
    folder, *_ = measured
    predictor = runtimes.open(folder / GRAPH.folder, threads=1)
    loaded: list[int] = []
    load = predictor._load
    predictor._load = lambda threads: loaded.append(threads) or load(threads)
    predictor.use(2)
    predictor.predict(["a film"])
    predictor.predict(["a film", "a plot"])
    assert (loaded, predictor.threads) == ([2], 2)
    predictor.passes(1)
    assert loaded == [2, 1]


@pytest.mark.skipif(not openvino.computes_in_bf16(), reason="this processor has no bf16 instructions")
def test_bf16_halves_the_bytes_and_answers_nearly_the_same(tmp_path: Path) -> None:
    model = tiny.model(hidden=64)
    parity = choose_runtime.export_model(openvino, model, tmp_path / "out", "bf16", tiny.task(), 0)
    assert (tmp_path / "out" / openvino.WEIGHTS).stat().st_size < 0.55 * 4 * model.parameters()
    assert parity["kl_nats"] < 0.01
    assert parity["max_difference"] > 1e-4  # it computes in bf16 indeed: fp32 is exact to 1e-4


def test_bf16_is_refused_where_the_processor_lacks_it(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(openvino, "computes_in_bf16", lambda: False)
    with pytest.raises(InputError, match="no bf16 instructions; take int8"):
        choose_runtime.export_model(openvino, tiny.model(), tmp_path / "out", "bf16", tiny.task(), 0)
    assert not (tmp_path / "out").exists()
