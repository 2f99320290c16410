"""The templates of all pages and cards, and how they write values. Everything put into them is treated as untrusted text."""

from __future__ import annotations

import json
import re
from functools import cache
from typing import Any

from ._report_words import duration, lost, megabytes, milliseconds, points, runtime, short, times


@cache
def template(name: str) -> Any:
    """A template of the package by its file's name."""
    from jinja2 import ChainableUndefined, Environment, PackageLoader

    env = Environment(
        loader=PackageLoader("multum", "."), autoescape=True, undefined=ChainableUndefined, trim_blocks=True, lstrip_blocks=True
    )
    env.filters |= {"ms": milliseconds, "mb": megabytes, "times": times, "short": short, "duration": duration, "points": points}
    env.filters |= {"runtime": runtime, "drop": lost, "md": _markdown, "yaml": _yaml, "count": _count, "value": _value}
    return env.get_template(name)


def _markdown(value: Any) -> Any:
    """Text that Markdown shows as it is."""
    from markupsafe import Markup, escape

    return Markup(re.sub(r"([\\`*_\[\]|~#!])", r"\\\1", str(escape(value)).replace("&#39;", "'").replace("&#34;", '"')))  # noqa: S704


def _yaml(value: Any) -> Any:
    """A scalar of YAML: JSON is a part of it."""
    from markupsafe import Markup

    return Markup(json.dumps(value, ensure_ascii=False))  # noqa: S704


def _count(value: Any) -> str:
    return f"{value:,}" if isinstance(value, (int, float)) else str(value)


def _value(value: Any) -> str:
    """A value of a provenance table."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (dict, list)) else "–" if value is None else str(value)
