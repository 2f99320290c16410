"""The rules of ARCHITECTURE.md that a program can check: who may import whom, and what nobody may do."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import multum

ROOT = Path(multum.__file__).parent
FILES = sorted(path for path in ROOT.rglob("*.py"))
LAYERS = ("core", "steps", "tasks", "runtimes", "evidence")
ALLOWED = {
    "core": {"core", "errors", "steps"},  # `steps` to list what is there; see the next test
    "steps": {"core", "errors", "steps"},
    "tasks": {"core", "errors", "data", "tasks"},
    "runtimes": {"core", "errors", "runtimes"},
    "evidence": {"core", "errors", "evidence"},
}
"""Layer -> what of multum it may import."""


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path: Path) -> Iterator[str]:
    """Every module of multum that a file imports, relative to the package."""
    package = list(path.relative_to(ROOT).parts[:-1])
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - (node.level - 1)]
            if node.module:
                yield ".".join([*base, node.module])
            else:
                yield from (".".join([*base, alias.name]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "multum":
            yield (node.module or "").removeprefix("multum").lstrip(".")
        elif isinstance(node, ast.Import):
            yield from (a.name.removeprefix("multum").lstrip(".") for a in node.names if a.name.split(".")[0] == "multum")


@pytest.mark.parametrize("path", [path for path in FILES if path.parent.name in LAYERS], ids=name_of)
def test_layers_import_only_what_lies_below(path: Path) -> None:
    layer = path.parent.name
    for module in imports(path):
        assert module.split(".")[0] in ALLOWED[layer], f"{name_of(path)} imports multum.{module}"


@pytest.mark.parametrize("layer", ["runtimes", "steps", "tasks", "evidence"])
def test_siblings_import_only_what_they_share(layer: str) -> None:
    for path in (ROOT / layer).glob("*.py"):
        for module in imports(path):
            parts = module.split(".")
            assert parts[0] != layer or len(parts) == 1 or parts[1].startswith("_"), f"{name_of(path)} imports {module}"


def test_core_knows_no_technique() -> None:
    """It finds steps by looking at the folder; no file of it imports one."""
    for path in (ROOT / "core").glob("*.py"):
        assert not [module for module in imports(path) if module.startswith("steps.")], name_of(path)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_nothing_unsafe_and_nothing_caught_blindly(path: Path) -> None:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ExceptHandler):
            caught = ast.unparse(node.type) if node.type else ""
            assert caught not in ("", "Exception", "BaseException"), f"{name_of(path)}:{node.lineno} catches everything"
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called == "torch.load":  # the restricted unpickler of load-legacy, nothing else
                assert path.name == "_legacy.py", name_of(path)
                assert ("weights_only", "True") in [(word.arg, ast.unparse(word.value)) for word in node.keywords], name_of(path)
            assert called not in ("eval", "exec", "pickle.load", "pickle.loads", "os.system"), f"{name_of(path)}: {called}"
            assert not any(word.arg == "shell" for word in node.keywords), f"{name_of(path)}:{node.lineno} uses a shell"
        if isinstance(node, ast.Import):
            assert not {"pickle", "dill", "joblib"} & {alias.name for alias in node.names}, name_of(path)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_files_can_be_read_in_one_sitting_and_say_what_they_are(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 300
    assert ast.get_docstring(tree(path)), "no module docstring"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_public_names_have_docstrings(path: Path) -> None:
    for node in tree(path).body if not path.name.startswith("_") else []:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{name_of(path)}: {node.name}"


def test_the_map_names_every_file() -> None:
    text = (ROOT.parent.parent / "ARCHITECTURE.md").read_text(encoding="utf-8")
    missing = [name_of(path) for path in FILES if path.name != "__init__.py" and path.name not in text and path.stem not in text]
    assert not missing, f"ARCHITECTURE.md does not name {missing}"


@pytest.mark.parametrize("code", ["import multum", "import multum.cli"])
def test_importing_is_cheap(code: str) -> None:
    heavy = "('torch', 'transformers', 'datasets', 'pandas', 'onnxruntime', 'sklearn', 'altair')"
    check = f"{code}; import sys; found = [name for name in {heavy} if name in sys.modules]; assert not found, found"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
