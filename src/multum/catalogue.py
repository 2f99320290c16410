"""What the steps are, read from their files without importing them: summary, formula, fields with defaults and meaning."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from typing import Any

from .errors import InputError

FOLDER = Path(__file__).parent / "steps"


def names() -> list[str]:
    """All steps: one file, one step."""
    return sorted(path.stem for path in FOLDER.glob("*.py") if not path.stem.startswith("_"))


def describe(name: str) -> dict[str, Any]:
    """One step.

    Returns:
        `name`; `summary`, the first sentence of its formula; `formula`, the whole of it; `about`, the step's own docstring;
        `fields`, each with `name`, `type`, `default` (None where one must be given) and `about`; `example`, options to begin with:
        what the file calls `EXAMPLE`, or the fields that must be given.

    Raises:
        InputError: no step of that name.
    """
    if name not in names():
        having = [other for other in names() if name in (field["name"] for field in _fields(_read(other)[1]))]
        instead = f"{name} is a field of {', '.join(having)}" if having else f"there are: {', '.join(names())}"
        raise InputError(f"no step named {name!r}; {instead}")
    module, step = _read(name)
    formula = ast.get_docstring(module) or ""
    fields, example = _fields(step), _constant(module, "EXAMPLE")
    return {
        "name": name,
        "summary": formula.splitlines()[0] if formula else "",
        "formula": formula,
        "about": ast.get_docstring(step) or "",
        "fields": fields,
        "example": example or " ".join(f"--{field['name']} ..." for field in fields if field["default"] is None),
    }


def _read(name: str) -> tuple[ast.Module, ast.ClassDef]:
    """A step's file, and the step in it."""
    module = ast.parse((FOLDER / f"{name}.py").read_text(encoding="utf-8"))
    return module, next(node for node in module.body if isinstance(node, ast.ClassDef) and _is_step(node))


def _constant(module: ast.Module, name: str) -> str | None:
    """The text that a file gives this name."""
    for node in module.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name and isinstance(node.value, ast.Constant):
            return str(node.value.value)
    return None


def _is_step(node: ast.ClassDef) -> bool:
    return any(isinstance(base, ast.Name) and base.id == "Step" for base in node.bases)


def _fields(step: ast.ClassDef) -> list[dict[str, Any]]:
    """A field's docstring is the string that stands right after it."""
    fields = []
    for node, after in zip(step.body, [*step.body[1:], None], strict=True):
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        if ast.unparse(node.annotation).startswith("ClassVar"):
            continue
        documented = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) and isinstance(after.value.value, str)
        fields.append(
            {
                "name": node.target.id,
                "type": ast.unparse(node.annotation),
                "default": ast.unparse(node.value) if node.value else None,
                "about": inspect.cleandoc(after.value.value) if documented else "",  # type: ignore[union-attr]
            }
        )
    return fields
