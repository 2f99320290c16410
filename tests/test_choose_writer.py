"""`--runtime auto` for models that write: reading and writing are timed apart and put together by how much is written."""

from __future__ import annotations

import json
import random
import shutil
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import translators
from test_choose_runtime import EAGER, steady, table
from test_shrink_writing import Inside
from typer.testing import CliRunner

from multum import _pace, _runtime_trials, choose_runtime
from multum._measure_worker import open_target
from multum._runtime_inputs import Given
from multum._runtime_kinds import candidates, precisions
from multum._runtime_table import TABLE, Form, kept, pick, rows
from multum.choose_runtime import choose, open_way, ready
from multum.cli import app
from multum.core.folders import read_json
from multum.core.writing import TorchWriter
from multum.errors import InputError
from multum.runtimes import llamacpp
from multum.tasks.text_generation import TextGeneration

HALF, BYTE, NIBBLE = (Form("llamacpp", precision) for precision in ("f16", "q8_0", "q4_0"))
PROMPT = "a wonderful moving film"


def writing(times: dict[Any, tuple[list[float], list[float]]], kl: dict[Form, float] | None = None, **more: Any) -> dict[str, Any]:
    """A table of (form, threads, length) -> milliseconds to read and for a token, round by round."""
    made = table({(*way, 1): read for way, (read, _) in times.items()}, **more)
    for one in made["forms"]:
        one["parity"] = one["parity"] | {"kl_nats": (kl or {}).get(Form(one["runtime"], one["precision"]), 0.0)}
    for row, (_, token) in zip(list(made["times"]), times.values(), strict=True):
        row["what"] = "read"
        made["times"].append(row | {"what": "write", "ms": statistics.median(token), "rounds_ms": token})
    return made | {"timed": ["read", "write"]}


def task(**sizes: int) -> TextGeneration:
    return TextGeneration.from_splits(tiny.text_splits(**{"n_train": 8, "n_validation": 16, "n_test": 4, **sizes}))


# -- the choice ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("new", [1, 16, 300])
@pytest.mark.parametrize("seed", range(3))
def test_the_choice_is_that_of_a_slow_search(seed: int, new: int) -> None:
    rng = random.Random(seed)
    ways = [(form, threads) for form in (EAGER, HALF, BYTE) for threads in (1, 2)]
    times = {
        (*way, length): ([rng.uniform(1, 9) * length for _ in range(9)], [rng.uniform(1, 9) for _ in range(9)])
        for way in ways
        for length in (16, 64)
    }
    costs = {
        way: statistics.median(sum(times[*way, n][0][r] + new * times[*way, n][1][r] for n in (16, 64)) / 2 for r in range(9))
        for way in ways
    }
    best = min(ways, key=lambda way: costs[way])
    found = pick(writing(times), lengths=[16, 64], batches=[1], threads=2, new=new)
    assert found.fastest == f"{best[0].name} on {best[1]} thread{'s' * (best[1] > 1)}"
    assert found.ms == pytest.approx(costs[(found.form, found.threads)], abs=1e-3)


def test_what_ships_may_answer_otherwise_because_its_loss_is_measured() -> None:
    times = {(form, 1, 32): (steady(ms), steady(ms)) for form, ms in ((EAGER, 9.0), (BYTE, 4.0), (NIBBLE, 2.0))}
    known, asked = writing(times, {NIBBLE: 0.2}), {"lengths": [32], "batches": [1], "threads": 1, "new": 16}
    assert pick(known, **asked).form == BYTE
    assert pick(known, ships=[BYTE.name, NIBBLE.name], **asked).form == NIBBLE


def test_how_much_is_written_decides_between_a_fast_reader_and_a_fast_writer() -> None:
    times = {
        (EAGER, 1, 32): (steady(90.0), steady(9.0)),
        (HALF, 1, 32): (steady(10.0), steady(3.0)),
        (BYTE, 1, 32): (steady(40.0), steady(1.0)),
    }
    asked: dict[str, Any] = {"lengths": [32], "batches": [1], "threads": 1}
    assert pick(writing(times), new=4, **asked).form == HALF
    found = pick(writing(times), new=100, **asked)
    assert (found.form, found.ms) == (BYTE, pytest.approx(140, rel=0.02))
    head, *lines = rows(writing(times))
    assert head[-2:] == ["read 32 tokens, ms", "a token behind 32, ms"]
    assert {line[0] for line in lines} == {f"{form.name} on 1 thread" for form in (EAGER, HALF, BYTE)}


def test_a_form_that_is_far_from_the_model_has_to_be_named() -> None:
    times = {
        (EAGER, 1, 32): (steady(90.0), steady(9.0)),
        (BYTE, 1, 32): (steady(20.0), steady(2.0)),
        (NIBBLE, 1, 32): (steady(10.0), steady(1.0)),
    }
    asked: dict[str, Any] = {"lengths": [32], "batches": [1], "threads": 1, "new": 32}
    far = {BYTE: 0.001, NIBBLE: 0.2}
    found = pick(writing(times, far), **asked)
    assert (found.form, found.beyond) == (BYTE, "llamacpp q4_0 on 1 thread")
    assert found.line().endswith("llamacpp q4_0 on 1 thread is faster yet, but further from the model: ask for it by name")
    assert pick(writing(times, far), precision="q4_0", **asked).form == NIBBLE
    assert pick(writing(times, far), precision="int4", **asked).form == NIBBLE
    near = pick(writing(times, {NIBBLE: 0.01}), **asked)
    assert (near.form, near.beyond) == (NIBBLE, "")
    # What ships already was chosen by somebody.
    shipped = writing(times, far, present={"form": NIBBLE.name, "threads": 1})
    assert pick(shipped, **asked).form == NIBBLE


def test_candidates_are_what_such_models_can_be_had_in() -> None:
    causal, translator = task(), translators.translating()
    graphs = [
        Form("onnxruntime", "fp32"),
        Form("onnxruntime", "int8"),
        Form("onnxruntime", "int4"),
        *(Form("openvino", one) for one in ("fp32", "bf16", "int8", "int4")),
    ]
    assert candidates("", causal) == [EAGER, *(Form("llamacpp", precision) for precision in llamacpp.PRECISIONS), *graphs]
    assert candidates("", translator) == [EAGER, *graphs]
    assert candidates("fp32", causal) == [EAGER, Form("llamacpp", "f32"), Form("onnxruntime", "fp32"), Form("openvino", "fp32")]
    nibbles = [Form("onnxruntime", "int4"), Form("openvino", "int4")]
    assert candidates("int4", causal) == [EAGER, NIBBLE, *(Form("llamacpp", each) for each in ("q4_1", "q4_k")), *nibbles]
    assert candidates("int4", translator) == [EAGER, *nibbles]
    assert candidates("int4", tiny.task()) == [EAGER], "what reads is not had in 4 bits"
    assert {"fp32", "int8", "bf16", "int4", "q8_0"} <= set(precisions())


# -- what is timed -------------------------------------------------------------------------------------------------------------


def test_as_many_tokens_are_written_as_are_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.language_model().save(tmp_path / "model")
    predictor, told = open_target(tmp_path / "model", 1), []
    continued = TorchWriter.continued

    def noted(self: Any, given: Any, decoding: Any, on_token: Any, *, forced: bool) -> Any:
        return continued(self, given, decoding, lambda token: (told.append(token), on_token(token))[0], forced=forced)

    monkeypatch.setattr(TorchWriter, "continued", noted)
    read, token = _pace.pace(predictor, [5, 6, 7], 6)
    assert len(told) == 6
    assert min(read, token) > 0


def test_an_encoder_decoder_is_timed_while_it_searches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    translators.translator("marian").save(tmp_path / "model")
    predictor, asked = open_target(tmp_path / "model", 1), []
    monkeypatch.setattr(predictor, "generated_s", lambda ids, new: asked.append((ids, new)) or 1.0 + 0.5 * (new - 1))
    assert _pace.pace(predictor, [5, 6], 9) == (1.0, 0.5)
    assert asked == [([5, 6], 1), ([5, 6], 9)]
    monkeypatch.undo()
    made = []
    generate = predictor.module.generate
    monkeypatch.setattr(predictor.module, "generate", lambda **how: made.append(generate(**how)) or made[-1])
    assert predictor.generated_s([5, 6], 7) > 0
    assert made[0].shape[1] == 1 + 7


# -- the whole trial -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def inside(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(_runtime_trials, "Worker", Inside)
    monkeypatch.setattr(_runtime_trials, "LEAST", 2)
    return


def trial(folder: Path, given: Any, **more: Any) -> Any:
    return choose(folder, given, **{"threads": 1, "forms": [EAGER], "rounds": 2, "seconds": 1.0, **more})


@pytest.mark.parametrize("kind", ["causal", "encoder-decoder"])
def test_torch_alone_is_timed_and_said_to_be_no_gain(inside: None, kind: str, tmp_path: Path) -> None:
    model, given = {
        "causal": lambda: (tiny.language_model(), task()),
        "encoder-decoder": lambda: (translators.translator(), translators.translating()),
    }[kind]()
    model.save(tmp_path / "model")
    choice, found = trial(tmp_path / "model", given)
    assert choice.line() == "No gain: pytorch fp32 on 1 thread is the fastest"
    assert found == kept(tmp_path / "model") == read_json(tmp_path / "model" / TABLE)
    cells = [(row["length"], row["batch"], row["what"]) for row in found["times"]]
    assert sorted(cells) == sorted((length, 1, what) for length in found["lengths"] for what in ("read", "write"))
    assert all(min(row["rounds_ms"]) > 0 and len(row["rounds_ms"]) == 2 for row in found["times"])
    # The table serves for any number of tokens that are written.
    calls = choose_runtime._measured
    choose_runtime._measured = lambda *_: pytest.fail("measured again")  # type: ignore[assignment]
    try:
        more, _ = trial(tmp_path / "model", given, new=10 * 32)
    finally:
        choose_runtime._measured = calls
    assert more.ms > choice.ms


def test_what_cannot_be_timed(tmp_path: Path) -> None:
    tiny.language_model().save(tmp_path / "model")
    with pytest.raises(InputError) as refused:
        trial(tmp_path / "model", task(), batches=[1, 8], lengths=[8, tiny.POSITIONS])
    assert "a model that writes is timed on one text at a time" in str(refused.value)
    assert f"lengths: {tiny.POSITIONS} cannot be timed; the model reads 2 to {tiny.POSITIONS // 2} tokens" in str(refused.value)


def test_no_export_is_looked_for_where_there_can_be_none(tmp_path: Path) -> None:
    translators.translator().save(tmp_path / "model")
    with pytest.raises(InputError, match="no runtime that there is an export to takes models for translation in q4_0"):
        choose(tmp_path / "model", translators.translating(), precision="q4_0", exported=True)
    assert kept(tmp_path / "model") is None


def test_predict_takes_auto(inside: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.language_model().save(tmp_path / "model")
    monkeypatch.setattr(choose_runtime, "candidates", lambda precision="", task=None: [EAGER])
    monkeypatch.setattr(choose_runtime, "ROUNDS", 2)
    asked = ["predict", str(tmp_path / "model"), PROMPT, "--max-new-tokens", "4", "--threads", "1", "--json"]
    plain, auto = (CliRunner().invoke(app, [*asked, *more]) for more in ([], ["--runtime", "auto"]))
    assert auto.exit_code == 0, auto.output
    assert json.loads(auto.stdout) == json.loads(plain.stdout)
    assert "No gain" in auto.stderr
    refused = CliRunner().invoke(app, [*asked, "--runtime", "llamacpp"])
    assert refused.exit_code != 0
    assert "has no export for llamacpp" in refused.stderr


@pytest.mark.llamacpp
def test_llama_cpp_is_tried_and_wins(tmp_path: Path) -> None:
    """Another model's export that stands there is not taken for this one's."""
    model, other = tiny.language_model(layers=2, hidden=64), tiny.language_model(layers=2, hidden=64)
    for parameter in other.module.parameters():
        parameter.data = parameter.data.roll(1, 0)
    model.save(tmp_path / "model")
    llamacpp.export(other, tmp_path / "model" / HALF.folder, precision="f16", inputs=task().inputs("validation"))
    choice, found = trial(tmp_path / "model", task(), forms=[EAGER, HALF, BYTE], rounds=3)
    assert (choice.form, choice.gain) == (BYTE, True)
    assert "llamacpp f16 export answers differently: KL" in found["left_out"][HALF.name]
    (facts,) = (one for one in found["forms"] if one["name"] == BYTE.name)
    assert facts["parity"]["kl_nats"] == read_json(tmp_path / "model" / BYTE.folder / "runtime.json")["parity"]["kl_nats"]
    shutil.rmtree(tmp_path / "model" / HALF.folder)
    predictor = open_way(ready(tmp_path / "model", choice, Given(tmp_path / "model", [PROMPT])))
    assert (predictor.runtime, predictor.precision) == ("llamacpp", "q8_0")
    predictor.use(2)
    assert predictor.session.threads == 2
