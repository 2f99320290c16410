"""What `multum doctor` finds out, and what it advises."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest

from multum import doctor, runtimes, terminal

INTEL = """processor\t: 0
model name\t: A Processor of Some Kind
flags\t\t: fpu avx2 avx512f avx512_vnni amx_int8
"""


def test_facts_are_json_and_complete(tmp_path, monkeypatch):
    monkeypatch.setenv("MULTUM_CACHE", str(tmp_path))
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "file").write_bytes(bytes(2_500_000))
    facts = doctor.examine()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["cache"] == {"folder": str(tmp_path), "used_mb": 2.5}
    assert facts["processor"]["cores"] >= 1
    assert 0 < facts["memory"]["available_mb"] <= facts["memory"]["total_mb"]
    assert facts["versions"]["torch"]
    assert set(facts["runtimes"]) == set(runtimes.names())
    assert facts["runtimes"]["pytorch"]["available"]


def test_a_missing_runtime_comes_with_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MULTUM_CACHE", str(tmp_path))
    there = SimpleNamespace(PRECISIONS=("fp32",), EXTRA=None, unavailable=lambda: None)
    reason = "openvino is not installed; pip install 'multum[openvino]'"  # what a runtime says where it is asked for
    missing = SimpleNamespace(PRECISIONS=("int8",), EXTRA="openvino", unavailable=lambda: reason)
    modules = {"pytorch": there, "openvino": missing}
    monkeypatch.setattr(runtimes, "names", lambda: list(modules))
    monkeypatch.setattr(runtimes, "find", modules.get)
    facts = doctor.examine()
    assert facts["runtimes"]["pytorch"]["install"] is None
    assert facts["runtimes"]["openvino"]["install"] == "pip install 'multum[openvino]'"
    assert any("openvino is not installed" in text and "pip install" in text for text in facts["advice"])
    terminal.print_checkup(facts)
    shown = capsys.readouterr().out
    assert shown.count("pip install 'multum[openvino]'") == 1, "a hint is given once"
    assert "fp32" in shown


@pytest.mark.parametrize(
    ("text", "has"), [(INTEL, {"AVX2", "AVX-512", "VNNI", "AMX int8"}), ("Features\t: fp asimddp\n", {"dot product"})]
)
def test_features_are_read_from_the_processor_s_flags(tmp_path, monkeypatch, text, has):
    file = tmp_path / "cpuinfo"
    file.write_text(text)
    monkeypatch.setattr(doctor, "Path", lambda path: file if path == "/proc/cpuinfo" else Path(path))
    found = doctor.processor()["features"]
    assert {name for name, there in found.items() if there} == has


def test_what_is_short_is_said():
    facts = {
        "runtimes": {},
        "processor": {"features": dict.fromkeys(doctor.FLAGS, False)},
        "memory": {"available_mb": 500},
        "disk": {"free_gb": 0.5, "folder": "here"},
    }
    advice = doctor._advice(facts)
    assert len(advice) == 3
    rich = {"features": dict.fromkeys(doctor.FLAGS, True)}
    assert (
        doctor._advice(facts | {"processor": rich, "memory": {"available_mb": 9000}, "disk": {"free_gb": 9, "folder": "here"}})
        == []
    )


def test_every_hint_is_given_once_and_names_an_extra_that_there_is(monkeypatch, capsys):
    extras = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    found = importlib.util.find_spec
    absent = ("openvino", "nncf", "llama_cpp", "gguf", "onnxscript", "peft", "captum", "sacrebleu", "torchvision")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name in absent else found(name, *more))
    for name in ("openvino", "llamacpp"):
        monkeypatch.setattr(runtimes.find(name), "find_spec", lambda name: None)
    facts = doctor.examine()
    terminal.print_checkup(facts)
    hints = re.findall(r"pip install \S+", capsys.readouterr().out)
    assert len(hints) == len(set(hints)) == 6
    assert {re.search(r"multum\[(\w+)\]", hint)[1] for hint in hints} <= set(extras)


def test_a_torchvision_that_does_not_fit_is_named(monkeypatch):
    def fail(name):
        raise RuntimeError("operator torchvision::nms does not exist\nmore")

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace(name=name))
    monkeypatch.setattr(importlib, "import_module", fail)
    assert doctor._torchvision() == "operator torchvision::nms does not exist"
    machine = {"features": dict.fromkeys(doctor.FLAGS, True)}
    facts = {"runtimes": {}, "processor": machine, "memory": {"available_mb": 9000}, "disk": {"free_gb": 9, "folder": "here"}}
    (advice,) = doctor._advice(facts | {"torchvision": "it does not fit"})
    assert "pip uninstall torchvision" in advice
