"""The main job for models that write: a causal language model and a translator, from the original to a report."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import translators
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

import multum
from multum._measure import Worker
from multum._measure_worker import about, answer, open_target
from multum.bench import Bench, measured_depths, measured_writing
from multum.budget import LANGUAGE_QUICK, TRANSLATORS_QUICK
from multum.core.depth import DepthTable, shallower
from multum.core.families import blocks_of, family_of
from multum.core.latency import LatencyTable
from multum.core.model import Model
from multum.core.packed import packed_parts
from multum.core.step import make
from multum.core.surgery import heads_and_neurons, keep_neurons
from multum.descent import CausalDescent, TranslatorDescent, kind_of
from multum.errors import BudgetNotMet, InputError
from multum.progress import Progress
from multum.runtimes import find
from multum.tasks.fill_mask import FillMask
from multum.tasks.text_generation import TextGeneration

SIZES = {"n_train": 32, "n_validation": 12, "n_test": 12}
LANGUAGE = replace(
    LANGUAGE_QUICK,
    distill={"epochs": 1, "learning_rate": 1e-3, "batch_size": 4},
    prune={"samples": 4, "neuron_group": 4},
    rounds=2,
    texts_per_round=1,
)
TRANSLATORS = replace(
    TRANSLATORS_QUICK,
    distill={"beams": 1, "epochs": 1, "learning_rate": 1e-3, "batch_size": 8},
    prune={"samples": 8, "neuron_group": 4},
    rounds=2,
    texts_per_round=2,
)


class Inside(Worker):
    """The same process, because starting one takes longer than all that a tiny model does."""

    def __enter__(self) -> Worker:
        self.predictor = open_target(self.target, self.threads, self._how)
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def receive(self) -> Any:
        return about(self.predictor)

    def ask(self, do: str, **order: Any) -> Any:
        return answer(self.predictor, {"do": do, **order})


AUTO = {"text-generation": "AutoModelForCausalLM", "translation": "AutoModelForSeq2SeqLM"}


def _learned(model: Model) -> Model:
    """One that translates some of it."""
    return make("finetune", {"epochs": 25, "learning_rate": 4e-3, "batch_size": 16})(model, translators.translating(64, 12, 12))


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """By task: an original, and a folder of splits."""
    folder, found = tmp_path_factory.mktemp("sources"), {}
    made = {
        "text-generation": (tiny.language_model("llama", layers=4), tiny.text_splits(**SIZES)),
        "translation": (_learned(translators.translator("marian", layers=3)), translators.splits(64, 12, 12)),
    }
    for task, (model, splits) in made.items():
        model.save(folder / task / "model")
        (folder / task / "data").mkdir()
        for name in ("train", "validation", "test"):
            getattr(splits, name).to_json(folder / task / "data" / f"{name}.jsonl", force_ascii=False)
        found[task] = {"task": task, "model": str(folder / task / "model"), "data": str(folder / task / "data")}
    return found


@pytest.fixture(autouse=True, scope="module")
def small() -> Iterator[None]:
    """Little training, two rungs, and counted instead of timed costs, so that two walks take the same turns."""

    def counted(self: Bench, model: Model) -> Any:
        table: Any = replace(LatencyTable.by_macs(hidden=32, head_size=8, heads=2, neurons=48, tokens=12), every_token=True)
        if model.module.config.is_encoder_decoder:
            table = DepthTable(base=1.0, encoder=0.5, decoder=4.0)
        table.save(self.folder / "latency.json")
        return table

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("multum.descent.LANGUAGE_QUICK", LANGUAGE)
        patch.setattr("multum.descent.TRANSLATORS_QUICK", TRANSLATORS)
        patch.setattr("multum.ladder.MAX_RUNGS", 2)
        patch.setattr(Bench, "writing_table", counted)
        patch.setattr("multum._measure.Worker", Inside)
        for runtime in ("llamacpp", "onnxruntime", "openvino"):
            patch.setattr(f"multum.runtimes.{runtime}.unavailable", lambda: "not for these")
        patch.setattr("multum.landing.TEST_ROUNDS", 2)
        yield


def run(sources: dict[str, str], output: Path, **options: Any) -> dict[str, Any]:
    return multum.shrink(**sources, output=output, quick=True, **{"max_drop": 1e6, "threads": 1, **options})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def whole(sources: dict[str, dict[str, str]], small: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Task -> a run that nobody killed."""
    folder = tmp_path_factory.mktemp("whole")
    for task, given in sources.items():
        run(given, folder / task)
    return {task: folder / task for task in sources}


@pytest.fixture(params=AUTO)
def finished(request: pytest.FixtureRequest, whole: dict[str, Path]) -> tuple[str, Path]:
    """A task and its run, for the tests that only look."""
    return request.param, whole[request.param]


def read(output: Path) -> dict[str, Any]:
    return dict(json.loads((output / "run.json").read_text()))


def test_a_run_goes_from_the_original_to_packed_weights(finished: tuple[str, Path]) -> None:
    task, output = finished
    values = read(output)
    by_name = {candidate["name"]: candidate for candidate in values["candidates"]}
    assert list(by_name)[:3] == ["original", "rung-01", "rung-02"]
    ends = [name for name in by_name if name.endswith(("-int8", "-int4"))]
    assert [name[-5:] for name in ends] == ["-int8", "-int4"]
    for name in ends:
        source = by_name[by_name[name]["made_from"]]
        assert by_name[name]["validation"]["size"]["bytes_on_disk"] < source["validation"]["size"]["bytes_on_disk"]
        assert packed_parts(Model.load(output / name, auto_class=AUTO[task]).module)
    first = by_name["original"]["validation"]["quality"]["value"]
    assert first > 3
    for candidate in by_name.values():
        value = candidate["validation"]["quality"]["value"]
        lost = 100 * (value / first - 1) if task == "text-generation" else first - value
        assert candidate["drop"] == pytest.approx(lost, abs=1e-3)
        assert (output / candidate["target"] / "metrics-validation.json").is_file()
    assert by_name[values["chosen"]]["test"]
    assert values["met"]


def test_layers_go_first_and_the_original_teaches(finished: tuple[str, Path]) -> None:
    task, output = finished
    models = [Model.load(output / name, auto_class=AUTO[task]) for name in ("original", "rung-01", "rung-02")]
    counts = [heads_and_neurons(model.module) for model in models]
    before = len(models[0].history)
    steps = [[step["step"] for step in model.history[before:]] for model in models]
    teaches = "distill" if task == "text-generation" else "distill_generation"
    assert steps[1] == ["drop_layers", teaches]
    teachers = {step["fields"]["teacher"] for model in models for step in model.history if step["step"] == teaches}
    assert teachers == {str(output / "original")}
    if task == "text-generation":
        assert counts[1] == counts[0][:3]  # three of four are three quarters, and no fewer go by influence
        assert steps[2] == [*steps[1], "prune_structured", teaches]
        assert sum(map(sum, counts[2])) < sum(map(sum, counts[1]))
    else:
        assert [len(blocks) for blocks in counts] == [6, 4, 4]  # 3 + 3, 3 + 1, and no fewer
        assert models[1].history[before]["stack"] == "decoder"
        assert steps[2] == [*steps[1], "prune_structured", teaches]
        assert sum(map(sum, counts[2])) < sum(map(sum, counts[1]))


def test_what_is_timed_is_writing(finished: tuple[str, Path]) -> None:
    task, output = finished
    for candidate in read(output)["candidates"]:
        speed = candidate["validation"]["speed"]
        if task == "text-generation":
            assert speed["decode_tokens_per_s"] > 0
            assert speed["p50_ms"] > speed["first_token_p50_ms"]
        else:
            assert speed["tokens_per_s"] > 0
        assert speed["runtime"] == "pytorch"


def test_the_chosen_folder_loads_plainly(finished: tuple[str, Path]) -> None:
    task, output = finished
    kind = AutoModelForCausalLM if task == "text-generation" else AutoModelForSeq2SeqLM
    module = kind.from_pretrained(output / "chosen")
    assert module.config.vocab_size == read(output)["candidates"][0]["vocabulary"]
    assert not (output / "chosen" / "ship.json").exists()


def test_the_report_says_what_is_lost_and_what_is_timed(finished: tuple[str, Path]) -> None:
    task, output = finished
    page, card = ((output / name).read_text() for name in ("report.html", "README.md"))
    assert AUTO[task] in page
    assert AUTO[task] in card
    assert "tokens/s" in page
    assert "from text to label scores" not in page + card
    assert "predictor.predict" not in page
    if task == "text-generation":
        assert "tokens, to the last of 32 written" in page
        assert "lower is better" in page
        assert "Drop, %" in page
        assert "1000000 % above the original" in page
        assert "perplexity" in json.dumps(read(output)["candidates"][0])
    else:
        assert "to the whole text that is written" in page
        assert "lower is better" not in page
        assert "Which of the original" not in page


@pytest.mark.parametrize(
    ("task", "stage"),
    [("text-generation", "rung-02: cut"), ("text-generation", "measure on the test"), ("translation", "rung-01: measure")],
)
def test_a_run_killed_anywhere_comes_to_the_same_models(
    task: str, stage: str, sources: dict[str, dict[str, str]], whole: dict[str, Path], tmp_path: Path
) -> None:
    class Killed(BaseException):
        pass

    class Deadly(Progress):
        def stage(self, name: str) -> Any:
            if name.startswith(stage):
                raise Killed
            return super().stage(name)

    with pytest.raises(Killed):
        run(sources[task], tmp_path / "run", progress=Deadly())
    run(sources[task], tmp_path / "run")
    made = sorted(path.name for path in whole[task].iterdir() if (path / "config.json").is_file())
    assert sorted(path.name for path in (tmp_path / "run").iterdir() if (path / "config.json").is_file()) == made
    for name in set(made) - {"chosen"}:  # the fastest, which is told by a clock
        one, other = (Model.load(folder / name, auto_class=AUTO[task]) for folder in (whole[task], tmp_path / "run"))
        assert one.fingerprint() == other.fingerprint()


def test_a_budget_of_bytes_ships_packed_weights(sources: dict[str, dict[str, str]], whole: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(whole["text-generation"], tmp_path / "run")
    sizes = {c["name"]: c["validation"]["size"]["bytes_on_disk"] for c in read(tmp_path / "run")["candidates"]}
    limit = sizes["rung-02-int8"] + 1
    values = run(sources["text-generation"], tmp_path / "run", max_size_bytes=limit)
    assert values["chosen"] in ("rung-02-int8", "rung-02-int4")
    assert packed_parts(Model.load(tmp_path / "run" / "chosen", auto_class="AutoModelForCausalLM").module)
    with pytest.raises(BudgetNotMet, match="size"):
        run(sources["text-generation"], tmp_path / "run", max_size_bytes=1000)


def test_only_models_that_something_shrinks_are_taken() -> None:
    assert kind_of(TextGeneration) is CausalDescent
    assert kind_of(translators.Translation) is TranslatorDescent
    with pytest.raises(InputError, match=r"shrink takes models for .*text-generation.*translation, not for fill-mask"):
        kind_of(FillMask)


def test_the_decoder_gets_shallower_until_a_layer_is_worth_nothing() -> None:
    table = DepthTable(base=1.0, encoder=1.0, decoder=4.0)
    assert table.total((6, 6)) == 31
    assert shallower((6, 6), table.total, 31 / 1.5) == 3  # 1 + 6 + 12 = 19, and 23 with a fourth
    assert shallower((6, 2), table.total, 5.0) == 1  # none costs so little
    assert shallower((6, 1), table.total, 5.0) is None
    assert shallower((6, 6), replace(table, decoder=0.05).total, 5.0) is None


def test_depths_are_read_off_three_models_in_turns() -> None:
    costs = {(4, 3): 30.0, (4, 1): 14.0, (1, 1): 11.0}
    table = DepthTable.measure(lambda depth: lambda: costs[depth], (4, 3), rounds=1)
    assert (table.encoder, table.decoder, table.base) == (1.0, 8.0, 2.0)
    assert table.total((4, 3)) == 30.0
    shallow = DepthTable.measure(lambda _: lambda: 5.0, (1, 1), rounds=1)
    assert (shallow.encoder, shallow.decoder, shallow.base) == (0.0, 0.0, 5.0)


@pytest.mark.parametrize("family", ["marian", "t5"])
def test_the_depths_of_a_translator_are_timed_while_it_writes(family: str) -> None:
    model = translators.translator(family, layers=3)
    before = model.fingerprint()
    table = measured_depths(model, translators.translating(8, 8, 8), threads=1, rounds=3)
    assert table.total((3, 3)) > 0
    assert min(table.base, table.encoder, table.decoder) >= 0
    assert table.about["written"] > 1
    assert model.fingerprint() == before
    assert len(heads_and_neurons(model.module)) == 6


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_table_of_a_causal_model_is_timed_while_it_writes(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("multum.bench.NEW", 4)
    monkeypatch.setattr("multum.core.latency.grid", lambda full: [0, 1, full])
    model = tiny.language_model(family, layers=2)
    before, task = model.fingerprint(), TextGeneration.from_splits(tiny.text_splits(4, 8, 4))
    table = measured_writing(model, task, threads=1, rounds=2)
    assert table.every_token
    assert table.base > 0
    assert table.total([(2, 48)] * 4) > table.total([(2, 48)] * 1) > table.base
    assert np.isfinite(list(table.attention.values())).all()
    assert model.fingerprint() == before


def test_what_is_timed_are_different_blocks_of_the_model_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or else the weights of one would stay in the cache; and no second copy of a model is made."""
    seen: list[Any] = []
    monkeypatch.setattr("multum.core.writing.TorchWriter", lambda module, _: seen.append(module))
    model = tiny.language_model(layers=3)
    heads, neurons = heads_and_neurons(model.module)[0]
    keep_neurons(blocks_of(model.module)[1], family_of(model.module), [0, 1, 2])
    timer = find("pytorch").stacks(model, prompt=2, new=2, threads=1)
    timer([(heads, 3)] * 4)
    whole, timed = ([weights(block) for block in blocks_of(module)] for module in (model.module, seen[0]))
    assert heads_and_neurons(seen[0]) == [(heads, 3)] * 4
    assert timed[1] == whole[1]
    assert all(set(timed[i]) & set(whole[i % 3]) for i in range(4))
    timer([(heads, neurons)] * 3)  # which the second block has not
    assert [weights(block) for block in blocks_of(seen[1])] == [whole[0], whole[2], whole[0]]
    timer([(heads, 4), (0, 4), (heads, 0)])
    assert heads_and_neurons(seen[2]) == [(heads, 4), (heads, 0), (0, 4)]
    timer([(heads, neurons + 1)])  # heads and neurons of different blocks
    assert heads_and_neurons(seen[3]) == [(heads, neurons)]
    assert heads_and_neurons(model.module) == [(heads, neurons), (heads, 3), (heads, neurons)]


def weights(block: Any) -> list[int]:
    return [id(parameter) for parameter in block.parameters()]


def test_the_prompts_of_a_table_leave_room_for_what_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """The texts are longer than a model of 64 tokens reads."""
    monkeypatch.setattr("multum.core.latency.grid", lambda full: [0, 1, full])
    splits = tiny.text_splits(4, 8, 4)
    splits.validation = Dataset.from_list([{"text": " ".join([row["text"]] * 30)} for row in splits.validation])
    table = measured_writing(tiny.language_model(layers=1), TextGeneration.from_splits(splits), threads=1, rounds=1)
    assert (table.about["prompt"], table.about["new"]) == (32, 32)
