"""The commands: what they take, what they print where, and that wrong input gets one message, exit code 2 and no files."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import on_disk
import pytest
import tiny
from typer.main import get_command
from typer.testing import CliRunner

import multum
from multum import terminal
from multum.catalogue import describe
from multum.catalogue import names as step_names
from multum.cli import app
from multum.commands import remark
from multum.core.step import find, names
from multum.errors import BudgetNotMet, InputError, MultumError, of_the_system
from multum.predicting import WRITTEN_AT_ONCE, answers
from multum.steps.drop_layers import DropLayers

TASK = ("--task", "text-classification")
COMMANDS = (
    "quickstart",
    "shrink",
    "run",
    "apply",
    "measure",
    "export",
    "predict",
    "report",
    "steps",
    "example",
    "doctor",
    "advise",
    "score",
    "compare",
    "verify",
    "sensitivity",
    "load-legacy",
)


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MULTUM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    model = on_disk.model_folder(folder / "model", layers=3)
    return model, on_disk.review_folder(folder / "data", n_train=32, n_validation=16, n_test=16)


@pytest.fixture
def work(tmp_path, places, monkeypatch):
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def write_recipe(places, *steps):
    entries = [
        f"model: {places[0]}",
        "task: text-classification",
        f"data: {places[1]}",
        "steps:",
        *(f"  - {step}" for step in steps),
    ]
    Path("recipe.yaml").write_text("\n".join(entries) + "\n")


def python(code, *arguments, **options):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False, **options)


# -- help ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["shrink", "--help"], ["steps"], ["steps", "distill"]])
def test_help_does_not_import_torch(arguments):
    code = """
import sys
from multum.cli import app
try:
    app(sys.argv[1:])
finally:
    assert not {"torch", "transformers", "pandas", "numpy", "onnxruntime"} & set(sys.modules)
"""
    done = python(code, *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_importing_multum_does_not_import_torch():
    done = python("import sys, multum.cli, multum.recipe, multum.doctor, multum._report; assert 'torch' not in sys.modules")
    assert done.returncode == 0, done.stderr


def test_the_commands_are_those_of_the_design():
    assert set(get_command(app).commands) == set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command_ends_with_an_example(command):
    result = call(command, "--help")
    assert result.exit_code == 0
    last = [line for line in result.stdout.splitlines() if line.strip(" │╰─╯")][-3:]
    assert "Example: multum" in " ".join(last)
    assert get_command(app).commands[command].epilog.startswith(f"Example: multum {command}")


def test_version():
    assert call("--version").stdout.startswith("multum ")


# -- wrong input -----------------------------------------------------------------------------------------------------------


def review_rows(*labels):
    return [{"text": f"a film number {number}", "label": label} for number, label in enumerate(labels)]


def empty_file(places):
    Path("data.csv").touch()
    return ["shrink", places[0], *TASK, "--data", "data.csv", "-o", "out"], ["data.csv is empty"]


def missing_file(places):
    return ["shrink", places[0], *TASK, "--data", "none.csv", "-o", "out"], ["none.csv", "no such file"]


def absent_column(places):
    on_disk.write_csv(Path("data.csv"), [{"review": "good", "label": "positive"}])
    return ["shrink", places[0], *TASK, "--data", "data.csv", "-o", "out"], ["'text'", "review", "--columns text="]


def one_class_only(places):
    on_disk.write_csv(Path("data.csv"), review_rows(*["positive"] * 40))
    return ["shrink", places[0], *TASK, "--data", "data.csv", "-o", "out"], ["two classes", "'positive'"]


def label_only_in_test(places):
    rows = tiny.splits(n_train=16, n_validation=8, n_test=8)
    for name in ("train", "validation", "test"):
        extra = [{"text": "neither here nor there", "label": "unheard"}] if name == "test" else []
        on_disk.write_csv(Path(f"data/{name}.csv"), getattr(rows, name).to_list() + extra)
    return ["shrink", places[0], *TASK, "--data", "data", "-o", "out"], ["'unheard'", "test split only"]


def no_model(places):
    Path("notes").mkdir()
    return ["shrink", "notes", *TASK, "--data", places[1], "-o", "out"], ["notes", "config.json"]


def damaged_weights(places):
    broken = on_disk.model_folder(Path("broken"))
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    return ["shrink", "broken", *TASK, "--data", places[1], "-o", "out"], ["broken", "damaged"]


def wrong_encoding(places):
    Path("data.csv").write_bytes("text,label\ncafé,positive\n".encode("latin-1"))
    return ["shrink", places[0], *TASK, "--data", "data.csv", "-o", "out"], ["data.csv", "UTF-8"]


def other_labels(places):
    on_disk.review_folder(Path("data"), classes=3)
    return ["shrink", places[0], *TASK, "--data", "data", "-o", "out"], [
        "mixed",
        "negative, positive",
        "id2label",
        "or in the data",
    ]


def full_output_folder(places):
    Path("out").mkdir()
    Path("out/thesis.txt").write_text("years of work")
    return ["shrink", places[0], *TASK, "--data", places[1], "-o", "out"], ["out holds something else", "-o"]


def all_limits_wrong(places):
    limits = ["--max-latency", "5", "--max-size", "20", "--min-speedup", "fast", "--time-limit", "30", "--max-drop", "1%"]
    arguments = ["shrink", places[0], "--task", "sorting", "--data", "none.csv", "-o", "out", *limits, "--columns", "text"]
    return arguments, [
        "5ms",
        "20MB",
        "'fast'",
        "30m",
        "1%",
        "sorting",
        "text-classification",
        "none.csv",
        "8 problems",
        "text=review",
    ]


def recipe_with_three_mistakes(places):
    write_recipe(places, "finetune: {epochs: 0}", "shrivel", "prune_weights: {sparsity: 2}")
    return ["run", "recipe.yaml", "-o", "out"], ["3 problems", "epochs", "'shrivel'", "sparsity"]


def fields_that_do_not_fit(places):
    fields = ["--keep", "many", "--colour=red", "--samples", "x", "stray"]
    return ["apply", "drop_layers", places[0], *TASK, "--data", places[1], "-o", "out", *fields], ["stray"]


def unfit_fields(places):
    fields = ["--keep", "many", "--colour=red"]
    return ["apply", "drop_layers", places[0], *TASK, "--data", places[1], "-o", "out", *fields], ["keep", "'colour'", "'many'"]


def unlabelled_file_and_data_missing(places):
    arguments = ["shrink", places[0], *TASK, "--data", "none.csv", "--unlabelled", "no.txt", "-o", "out"]
    return arguments, ["2 problems", "none.csv", "unlabelled: no such file: no.txt"]


def unlabelled_file_of_a_recipe_missing(places):
    write_recipe(places, "distill: {student: {layers: 1}}")
    return ["run", "recipe.yaml", "-o", "out", "--unlabelled", "no.txt"], ["unlabelled: no such file: no.txt"]


def unlabelled_texts_that_are_known(places):
    arguments = ["apply", "trim_vocabulary", places[0], *TASK, "--data", places[1], "--unlabelled", places[1] / "test.csv"]
    return [*arguments, "-o", "out"], ["no text is left that is not in the data", "16 rows dropped: also in the test split"]


def neither_teacher_nor_student(places):
    return ["apply", "distill", places[0], *TASK, "--data", places[1], "-o", "out"], ["takes a teacher", "or a student"]


def student_that_makes_no_sense(places):
    fields = ["--student", "{layers: many, depth: 3}", "--augment_model", "filler"]
    said = ["3 problems", "'many'", "'depth'", "augment: 4"]
    return ["apply", "distill", places[0], *TASK, "--data", places[1], "-o", "out", *fields], said


def student_that_does_not_fit(places):
    fields = ["--student", "{layers: 9}"]
    return ["apply", "distill", places[0], *TASK, "--data", places[1], "-o", "out", *fields], ["has only 3 blocks"]


def student_that_is_no_yaml(places):
    fields = ["--student", "{layers: [}"]
    return ["apply", "distill", places[0], *TASK, "--data", places[1], "-o", "out", *fields], ["{layers: [}", "column"]


def unknown_step(places):
    return ["apply", "shrivel", places[0], *TASK, "--data", places[1], "-o", "out"], ["'shrivel'", "drop_layers"]


def measuring_nothing(places):
    return ["measure", "none", "more", "--data", places[1], *TASK], ["none is not there", "more is not there"]


def measuring_without_data(places):
    return ["measure", places[0]], ["--task", "--data"]


def unknown_split(places):
    return ["measure", places[0], *TASK, "--data", places[1], "--split", "exam"], ["'exam'", "validation"]


def no_such_export(places):
    return ["measure", places[0], *TASK, "--data", places[1], "--runtime", "onnxruntime"], [
        "no export for onnxruntime",
        "multum export",
    ]


def unknown_runtime(places):
    return ["export", places[0], "--to", "abacus", *TASK, "--data", places[1], "-o", "out"], ["'abacus'", "onnxruntime"]


def unknown_precision(places):
    arguments = ["export", places[0], "--to", "onnxruntime", "--precision", "int3", *TASK, "--data", places[1], "-o", "out"]
    return arguments, ["'int3'", "int8"]


def predicting_nothing(places):
    return ["predict", places[0]], ["--input"]


def predicting_both(places):
    return ["predict", places[0], "a text", "--input", "file.txt"], ["not both"]


def predicting_an_empty_text(places):
    return ["predict", places[0], "a text", " "], ["text 2: empty"]


def predicting_a_whole_run(places):
    Path("runs/one/chosen").mkdir(parents=True)
    Path("runs/one/run.json").write_text("{}")
    return ["predict", "runs/one", "a text"], ["what it ships is runs/one/chosen"]


def comparing_a_whole_run_and_advising_on_it(places):
    Path("runs/one").mkdir(parents=True)
    Path("runs/one/run.json").write_text("{}")
    shutil.copytree(places[0], "runs/one/chosen")
    with pytest.raises(InputError, match=r"model: runs/one is no model folder.* which ships runs/one/chosen"):
        multum.advise("runs/one", task="text-classification")
    return ["compare", "runs/one", "runs/one/chosen", "--data", places[1], "-o", "out"], [
        "it is a run, which ships runs/one/chosen"
    ]


def applying_to_what_says_no_task(places):
    return ["apply", "prune_weights", places[0], "--data", places[1], "-o", "out"], ["--task is missing", "text-classification"]


def report_of_nothing(places):
    return ["report", "none"], ["none"]


def unknown_name_of_a_step(places):
    return ["steps", "shrivel"], ["drop_layers"]


def unknown_example(places):
    return ["example", "nothing"], ["minilm"]


CASES = (
    empty_file, missing_file, absent_column, one_class_only, label_only_in_test, no_model, damaged_weights, wrong_encoding,
    other_labels, full_output_folder, all_limits_wrong, recipe_with_three_mistakes, fields_that_do_not_fit, unfit_fields,
    unlabelled_file_and_data_missing, unlabelled_file_of_a_recipe_missing, unlabelled_texts_that_are_known,
    neither_teacher_nor_student, student_that_makes_no_sense, student_that_does_not_fit, student_that_is_no_yaml, unknown_step,
    measuring_nothing, measuring_without_data, unknown_split, no_such_export, unknown_runtime, unknown_precision,
    predicting_nothing, predicting_both, predicting_an_empty_text, predicting_a_whole_run, comparing_a_whole_run_and_advising_on_it,
    applying_to_what_says_no_task,
    report_of_nothing, unknown_name_of_a_step, unknown_example,
)  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_wrong_input(case, places, work):
    arguments, said = case(places)
    before = on_disk.listing(work)
    result = call(*arguments)
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    assert result.stderr.count("Error: ") == 1
    message = " ".join(result.stderr.partition("Error: ")[2].split())
    for part in said:
        assert part in message, part
    assert on_disk.listing(work) == before


@pytest.mark.parametrize("arguments", [["shrink"], ["shrnk"], ["doctor", "--loud"], ["measure", "a", "--threads", "none"]])
def test_wrong_usage_is_exit_code_2(arguments):
    result = call(*arguments)
    assert result.exit_code == 2
    assert "Traceback" not in result.output


def test_a_full_disk_is_one_message(monkeypatch):
    def full():
        raise OSError(errno.ENOSPC, "No space left on device", "somewhere/model.safetensors")

    monkeypatch.setattr("multum.doctor.examine", full)
    result = call("doctor")
    assert result.exit_code == 2
    assert "No space left on device (somewhere/model.safetensors)" in result.stderr


def test_a_disk_that_fills_up_while_a_model_is_saved(places, work):
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))\n"
    fields = ["--sparsity", "0.5", "--output", "out"]
    code = limit + "from multum.cli import main; main()"
    done = python(code, "apply", "prune_weights", places[0], *TASK, "--data", places[1], *fields, cwd=work)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "cannot write out: File too large" in done.stderr
    assert on_disk.listing(work) == []


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (PermissionError(errno.EACCES, "no", "here"), "Permission denied (here)"),
        (Exception("Error while serializing: I/O error: No space left on device (os error 28)"), "No space left on device"),
        (OSError("no such model on the Hub"), None),
        (BrokenPipeError(errno.EPIPE, "closed"), None),
        (ValueError("a mistake"), None),
    ],
)
def test_what_the_operating_system_refused(error, reason):
    assert of_the_system(error) == reason


def test_a_mistake_in_multum_itself_is_not_hidden(monkeypatch):
    def mistake():
        raise ZeroDivisionError

    monkeypatch.setattr("multum.doctor.examine", mistake)
    assert isinstance(call("doctor").exception, ZeroDivisionError)


# -- Ctrl-C ------------------------------------------------------------------------------------------------------------------


def test_ctrl_c_says_how_to_resume_and_resuming_works(places, work, monkeypatch):
    write_recipe(places, "trim_vocabulary", "drop_layers: {keep: 1}")

    def stop(self, model, task):
        raise KeyboardInterrupt

    with monkeypatch.context() as stopping:
        stopping.setattr(DropLayers, "apply", stop)
        result = call("run", "recipe.yaml", "-o", "out", "--threads", "1", "--rounds", "3")
    assert result.exit_code == 130
    assert "the same command goes on where it stopped" in result.stderr
    assert "Traceback" not in result.output
    assert sorted(path.name for path in (work / "out").iterdir()) == ["00-original", "01-trim_vocabulary", "run.json"]


def test_ctrl_c_elsewhere_promises_no_resuming(monkeypatch):
    def stop():
        raise KeyboardInterrupt

    monkeypatch.setattr("multum.doctor.examine", stop)
    result = call("doctor")
    assert result.exit_code == 130
    assert "goes on" not in result.stderr


def test_a_real_interrupt_ends_the_process_with_130(tmp_path):
    code = """
import os, signal, sys
import multum.doctor
signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs the tests in the background has it ignored
multum.doctor.examine = lambda: os.kill(os.getpid(), signal.SIGINT)
sys.argv = ["multum", "doctor"]
from multum.cli import main
main()
"""
    done = python(code, timeout=60)
    assert done.returncode == 130, done.stderr
    assert "Stopped" in done.stderr
    assert "Traceback" not in done.stderr


# -- what is shown where ---------------------------------------------------------------------------------------------------


def test_other_libraries_keep_quiet(places, work):
    code = "from multum.cli import main; main()"
    fields = ["--sparsity", "0.5", "--output", "out"]
    done = python(code, "apply", "prune_weights", places[0], *TASK, "--data", places[1], *fields, cwd=work)
    assert done.returncode == 0, done.stderr
    stage, changed = done.stderr.splitlines()
    assert stage.split()[0] == "prune_weights"
    assert "linear layers changed" in changed
    line, zeros = done.stdout.splitlines()
    assert line.startswith("out: ")
    assert zeros.startswith("size when compressed: ")


def test_what_the_user_has_set_stays(monkeypatch):
    from multum import terminal

    for name in terminal.QUIET:
        monkeypatch.setenv(name, "mine")
    terminal.quiet()
    assert {os.environ[name] for name in terminal.QUIET} == {"mine"}


# -- shrink and quickstart -------------------------------------------------------------------------------------------------


@pytest.fixture
def shrunk(monkeypatch):
    """Stands in for the main job; keeps what it was called with and writes a run of one candidate."""
    calls = []

    def shrink(**arguments):
        calls.append(arguments)
        output = arguments["output"]
        output.mkdir(parents=True, exist_ok=True)
        (output / "run.json").write_text(json.dumps({"task": "text-classification", "chosen": "rung-02", "why": "the fastest"}))
        if arguments.get("max_drop") == 0:
            raise BudgetNotMet("no model within the budget; the best found is rung-02")

    monkeypatch.setattr(import_module("multum._shrink"), "shrink", shrink)
    rows = [["name", "accuracy"], ["rung-02", "91.0"]]
    monkeypatch.setattr(import_module("multum._report"), "summary", lambda run: rows)
    monkeypatch.setattr(import_module("multum._report"), "test_summary", lambda run: rows)
    return calls


def test_shrink_passes_on_what_was_asked_for(places, work, shrunk):
    limits = ["--max-drop", "0.5", "--max-latency", "5ms", "--max-size", "20MB", "--min-speedup", "4", "--time-limit", "30m"]
    others = ["--columns", "text=review,label=stars", "--seed", "7", "--threads", "1", "--quick", "--trust-remote-code"]
    others += ["--unlabelled", places[1] / "test.csv"]
    result = call("shrink", places[0], *TASK, "--data", places[1], "-o", "out", *limits, *others)
    assert result.exit_code == 0, result.output
    (arguments,) = shrunk
    assert {key: value for key, value in arguments.items() if key not in ("progress", "output")} == {
        "model": str(places[0]),
        "task": "text-classification",
        "data": str(places[1]),
        "columns": {"text": "review", "label": "stars"},
        "unlabelled": str(places[1] / "test.csv"),
        "max_drop": 0.5,
        "max_latency_ms": 5.0,
        "max_size_bytes": 20_000_000,
        "min_speedup": 4.0,
        "time_limit_s": 1800.0,
        "seed": 7,
        "threads": 1,
        "quick": True,
        "trust_remote_code": True,
    }
    for part in ("rung-02", "91.0", "the fastest", "report.html", "multum predict out/chosen"):
        assert part in result.stdout


def test_limits_that_are_not_given_do_not_count(places, work, shrunk):
    assert call("shrink", places[0], *TASK, "--data", places[1], "-o", "out").exit_code == 0
    assert shrunk[0]["max_drop"] == 1
    assert {shrunk[0][name] for name in ("max_latency_ms", "max_size_bytes", "min_speedup", "time_limit_s", "threads")} == {None}
    assert not shrunk[0]["unlabelled"]


@pytest.mark.parametrize("as_json", [False, True])
def test_a_budget_that_is_not_met_still_shows_the_best(places, work, shrunk, as_json):
    flags = ["--json"] if as_json else []
    result = call("shrink", places[0], *TASK, "--data", places[1], "-o", "out", "--max-drop", "0", *flags)
    assert result.exit_code == 1
    assert "the best found is rung-02" in result.stderr
    if as_json:
        assert json.loads(result.stdout)["chosen"] == "rung-02"
    else:
        assert "rung-02" in result.stdout


def test_quickstart_uses_the_examples_and_says_that_it_trains_less(work, shrunk, monkeypatch):
    monkeypatch.setattr("multum.example.fetch", lambda name: work / name)
    result = call("quickstart", "-o", "out")
    assert result.exit_code == 0, result.output
    assert (shrunk[0]["model"], shrunk[0]["data"]) == (str(work / "minilm"), str(work / "reviews-en"))
    assert shrunk[0]["quick"] is True
    assert "trains and measures less" in result.stderr


# -- the others ------------------------------------------------------------------------------------------------------------


def test_a_student_taught_on_more_texts_from_the_command_line(places, work):
    (work / "more.txt").write_text("a tender film\n\na dull plot\n")
    data = [*TASK, "--data", places[1], "--unlabelled", "more.txt"]
    fields = ["--student", "{layers: [0, 2]}", "--epochs", "1", "--cache", "cache"]
    result = call("apply", "distill", places[0], *data, "-o", "out", *fields)
    assert result.exit_code == 0, result.output
    assert "unlabelled: 1 row dropped: empty text" in result.stderr
    (entry,) = json.loads((work / "out" / "recipe.json").read_text())["steps"]
    assert entry["fields"]["student"] == {"layers": [0, 2]}
    assert entry["kept_blocks"] == [0, 2]
    assert entry["teacher_outputs"] == 32 + 2


def test_apply_takes_the_fields_of_a_step_as_options(places, work):
    data = ["--data", places[1], *TASK]
    result = call("apply", "drop_layers", places[0], *data, "-o", "out", "--which", "0,2", "--samples=8", "--seed", "3")
    assert result.exit_code == 0, result.output
    (entry,) = json.loads((work / "out" / "recipe.json").read_text())["steps"]
    assert entry["fields"] == {"keep": None, "which": [0, 2], "stack": None, "samples": 8, "seed": 3}
    assert "million after; loads in plain transformers" in result.stdout
    # Its recipe names the task.
    again = call("apply", "prune_weights", work / "out", "--data", places[1], "-o", "out2", "--pattern", "2:4")
    assert again.exit_code == 0, again.output
    steps = json.loads((work / "out2" / "recipe.json").read_text())["steps"]
    assert [entry["step"] for entry in steps] == ["drop_layers", "prune_weights"]
    assert "size on disk and speed: unchanged, because dense kernels multiply by zeros" in " ".join(again.stdout.split())
    cut = call("apply", "prune_structured", work / "out", *data, "-o", "out3", "--speedup", "1.5", "--samples", "8")
    assert cut.exit_code == 0, cut.output
    assert "loads in transformers after 'import multum'" in " ".join(cut.stdout.split())
    assert "removed whole" in cut.stdout


def test_predict_from_the_command_line_and_from_files(places, work):
    texts = ["a wonderful film", "a dull\tstory"]
    (work / "texts.txt").write_text("\n".join(texts) + "\n\n")
    on_disk.write_csv(work / "texts.csv", [{"review": text} for text in texts])
    (work / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    asked = [texts, ["--input", "texts.txt"], ["--input", "texts.csv", "--columns", "text=review"], ["--input", "texts.jsonl"]]
    found = [json.loads(call("predict", places[0], *arguments, "--json").stdout) for arguments in asked]
    assert found[0] == found[1] == found[2] == found[3]
    assert [one["text"] for one in found[0]] == texts
    for one in found[0]:
        assert sum(one["probabilities"].values()) == pytest.approx(1, abs=1e-5)
        assert one["probability"] == one["probabilities"][one["label"]] == max(one["probabilities"].values())
    lines = call("predict", places[0], *texts).stdout.splitlines()
    assert [line.split("\t")[0] for line in lines] == [one["label"] for one in found[0]]
    assert lines[1].endswith("\ta dull story")
    assert "no further" not in call("predict", places[0], *texts).stderr
    (work / "gaps.txt").write_text("\n" + "\n \n".join(texts) + "\n\n")
    gaps = call("predict", places[0], "--input", "gaps.txt", "--json")
    assert json.loads(gaps.stdout) == found[0]
    assert "gaps.txt: 2 lines are empty and passed over" in gaps.stderr
    assert "empty" not in call("predict", places[0], "--input", "texts.txt").stderr
    assert "1 of 2 inputs has 64 tokens or more" in call("predict", places[0], *texts[:1], "film " * 99).stderr


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("none.txt", None, "no such file"),
        ("empty.txt", b"\n\n", "no texts"),
        ("latin.txt", "café".encode("latin-1"), "not UTF-8"),
        ("other.csv", b"review\ngood\n", "no column 'text'; it has: review"),
        ("broken.jsonl", b'{"text": "a"}\n{"text"\n', "line 2"),
        ("gap.jsonl", b'{"text": "a"}\n{"txt": "b"}\n', "row 2"),
        ("number.jsonl", b'{"text": 3}\n', "row 1"),
        ("many.jsonl", b'{"text": "a"}\n' + 99 * b'{"txt": "b"}\n', "row 4: 'text' is missing\n  - and 96 more such rows\n"),
        ("number.json", b'{"text": 3}', "list of objects"),
        ("none.parquet", None, "no such file"),
    ],
)
def test_wrong_files_for_predict(places, work, name, content, said):
    if content is not None:
        (work / name).write_bytes(content)
    result = call("predict", places[0], "--input", name)
    assert result.exit_code == 2
    assert said in result.stderr


@pytest.mark.parametrize("values", [[], [{"text": "é", "labels": ["a", "b"], "none": {}}, 3, []]])
def test_a_list_shown_as_it_comes_is_the_json_of_the_whole(values, capsys):
    shown = []

    def coming():
        for value in values:
            shown.append(capsys.readouterr().out)
            yield value

    terminal.print_json_list(coming())
    assert "".join(shown) + capsys.readouterr().out == json.dumps(values, indent=2, ensure_ascii=False) + "\n"
    assert all(shown[1:])


def test_texts_that_take_a_while_to_write_are_shown_some_at_a_time():
    asked = []

    class Reader:
        scored = True

        def answers(self, predictions, inputs, labels):
            return [{"text": text} for text in inputs]

    class Predictor:
        reader, labels, generation = Reader(), [], {"num_beams": 2}

        def predict(self, inputs):
            asked.extend(inputs)

    inputs = [str(number) for number in range(1000)]
    found = answers(Predictor(), inputs)
    assert next(found) == {"text": "0", "generation": {"num_beams": 2}}
    assert len(asked) == WRITTEN_AT_ONCE < 100
    assert ["0", *(one["text"] for one in found)] == inputs == asked


def test_measure_prints_json_alone_and_looks_up_the_run_s_data(places, work):
    write_recipe(places, "drop_layers: {keep: 1}")
    ran = call("run", "recipe.yaml", "-o", "out", "--threads", "1", "--rounds", "4")
    assert ran.exit_code == 0, ran.output
    assert "01-drop_layers" in ran.stdout
    assert json.loads(Path("out/run.json").read_text())["candidates"][0]["validation"]["speed"]["rounds"] == 4
    result = call("measure", "out/00-original", "out/model", "--threads", "1", "--rounds", "3", "--json")
    assert result.exit_code == 0, result.output
    first, second = json.loads(result.stdout)
    assert first["n"] == 16
    assert second["size"]["parameters"] < first["size"]["parameters"]
    table = call("measure", "out/model", "--threads", "1", "--rounds", "3")
    assert "f1 macro" in table.stdout
    assert f"{json.loads(result.stdout)[1]['quality']['others']['f1_macro']:.4g}" in table.stdout
    assert "accuracy" in table.stdout
    assert "out/model" in table.stdout


def test_what_the_data_lost_is_said_beside_the_figures(capsys):
    remark([{"truncated": 0, "n": 16, "speed": {"spread": 0.0}}], ["test: 1 row dropped: empty text"])
    assert capsys.readouterr().err == "Note: test: 1 row dropped: empty text\n"


def test_export_then_measure_and_predict(places, work):
    data = ["--data", places[1], *TASK]
    exported = call("export", places[0], "--to", "onnxruntime", "--precision", "fp32", "-o", "out", *data)
    assert exported.exit_code == 0, exported.output
    assert (work / "out" / "runtime.json").is_file()
    plain = json.loads(call("predict", places[0], "a wonderful film", "--json").stdout)
    other = json.loads(call("predict", "out", "a wonderful film", "--json").stdout)
    assert other[0]["label"] == plain[0]["label"]
    assert other[0]["probability"] == pytest.approx(plain[0]["probability"], abs=1e-3)
    again = call("export", places[0], "--to", "onnxruntime", "-o", "out", *data)
    assert again.exit_code == 2
    assert "out exists already" in again.stderr
    again = call("export", "out", "--to", "onnxruntime", "-o", "more", *data)
    assert again.exit_code == 2
    assert "out is an export already; give the model folder" in again.stderr


def test_steps_are_all_listed_and_described():
    assert step_names() == names()
    listed = call("steps").stdout
    for name in names():
        step = find(name)
        assert name in listed
        fields = {field["name"]: field for field in describe(name)["fields"]}
        assert list(fields) == [field.name for field in dataclasses.fields(step)]
        shown = call("steps", name).stdout
        for field in fields.values():
            assert field["about"], f"{name}.{field['name']} says nothing"
            assert f"--{field['name']}" in shown


def test_json_of_steps_and_doctor_is_json():
    assert [step["name"] for step in json.loads(call("steps", "--json").stdout)] == names()
    assert json.loads(call("doctor", "--json").stdout)["multum"]


def test_examples_are_listed_and_copied(work, monkeypatch):
    assert "minilm" in call("example").stdout
    monkeypatch.setattr("multum.example.fetch", lambda name: on_disk.review_folder(work / "cached"))
    assert call("example", "reviews-en").stdout.strip() == str(work / "cached")
    assert call("example", "reviews-en", "-o", "mine").exit_code == 0
    assert (work / "mine" / "train.csv").is_file()
    assert call("example", "reviews-en", "-o", "mine").exit_code == 2


def test_every_error_has_an_exit_code():
    assert MultumError.exit_code == 2
    assert BudgetNotMet.exit_code == 1
