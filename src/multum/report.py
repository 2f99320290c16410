"""The report of a run: one HTML page that opens anywhere without a network, and a model card.

Everything shown comes from `run.json` and, for the steps, from `chosen/recipe.json`. Both are treated as untrusted text.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import report_charts as charts
from .errors import InputError, MultumError
from .report_run import (
    RUNTIMES,
    Candidate,
    Metrics,
    Run,
    duration,
    lost,
    megabytes,
    milliseconds,
    parse,
    points,
    read_run,
    runtime,
    short,
    times,
)

AUTO_CLASSES = {"text-classification": "AutoModelForSequenceClassification"}
LIMITS = ("max_drop", "max_latency_ms", "max_size_bytes", "min_speedup")


def report(folder: Path, output: Path | None = None) -> Path:
    """Write the page and the model cards of a run.

    Args:
        folder: a run folder, finished or not.
        output: the page; `report.html` in the run folder by default. The cards always go into the run folder.

    Returns:
        The page's path.

    Raises:
        InputError: `run.json` (or the chosen model's `recipe.json`) is missing or damaged.
    """
    folder = Path(folder)
    run = parse(read_run(folder / "run.json"))
    recipe_file = folder / ("chosen" if run.chosen else Path(run.shown.folder).name if run.shown else ".") / "recipe.json"
    recipe = read_run(recipe_file) if recipe_file.is_file() else {}
    name = folder.resolve().name
    context = page(run, recipe, name)
    output = Path(output) if output else folder / "report.html"
    if output.is_dir():
        raise InputError(f"{output} is a folder; -o takes the name of the page, for example {output / 'report.html'}")
    _write(output, _template("report.html.j2").render(context))
    card = _template("card.md.j2")
    _write(folder / "README.md", card.render(context, at_chosen=False))
    if (folder / "chosen").is_dir() and run.chosen:
        _write(folder / "chosen" / "README.md", card.render(context, at_chosen=True))
    return output


def summary(run: Mapping[str, Any]) -> list[list[str]]:
    """The run as a table for the terminal: a header row, then a row for every candidate. On validation."""
    seen = parse(run)
    metric = seen.original.validation.metric if seen.candidates else "quality"
    rows = [["name", f"{metric}{',' if seen.percent else ''}{seen.percent} (95 %)", "drop", "p50 ms", "speed-up", "size MB", ""]]
    for c in seen.candidates:
        m = c.validation
        rows.append([c.name, _interval(seen, m), lost(c.drop), short(m.p50), times(c.speedup), short(m.size / 1e6), _mark(seen, c)])
    return rows


def test_summary(run: Mapping[str, Any]) -> list[list[str]]:
    """The same for what was read on the test split: the original, its strongest export, the chosen one. Empty if nothing was."""
    seen = parse(run)
    rows = [
        [c.name, _interval(seen, c.test), lost(_test_drop(seen, c)), short(c.test.p50), times(speedup), short(c.test.size / 1e6)]
        + [_mark(seen, c)]
        for c in seen.candidates
        if c.test and (speedup := _ratio(seen, c)[0])
    ]
    if not rows:
        return []
    metric = seen.original.validation.metric
    header = ["on test", f"{metric}{',' if seen.percent else ''}{seen.percent} (95 %)", "drop", "p50 ms", "speed-up", "size MB", ""]
    return [header, *rows]


test_summary.__test__ = False  # type: ignore[attr-defined]  # its name is no test's for pytest


# -- what the page says ------------------------------------------------------------------------------------------------------


def page(run: Run, recipe: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Everything that the templates show."""
    raw = run.raw
    task = str(raw["task"])
    return {
        "run": run,
        "raw": raw,
        "name": name,
        "title": str(raw["model"]),
        "verdict": verdict(run),
        "limits": _limits(run),
        "charts": _charts(run),
        "blocks": _blocks(run, recipe),
        "recipe": recipe,
        "tests": [c for c in run.candidates if c.test],
        "auto_class": AUTO_CLASSES.get(task, "AutoModel"),
        "base_model": _hub_id(str(recipe.get("base") or raw["model"])),
        "served": run.chosen and runtime(run.chosen),
        "python_path": json.dumps(f"{name}/chosen", ensure_ascii=False),
        "shell_path": shlex.quote(f"{name}/chosen"),
        "dictionary": lambda value: value if isinstance(value, dict) else {},
        "listing": lambda value: value if isinstance(value, list) else [],
        "color": lambda c: charts.kind(run, c),
        "interval": lambda m: _interval(run, m),
        "ratio": lambda c: _ratio(run, c),
        "test_drop": lambda c: _test_drop(run, c),
        "colors": charts.COLORS,
        "runtimes": RUNTIMES,
    }


def verdict(run: Run) -> dict[str, str]:
    """The result in plain words: state (`met`, `missed` or `unfinished`), headline, what it rests on, why."""
    if run.chosen is None:
        done = len(run.candidates)
        text = f"{done} candidate{'s' * (done != 1)} measured so far." if done else "Nothing has been measured yet."
        return {
            "state": "unfinished",
            "headline": "This run is not finished",
            "evidence": f"{text} No model has been chosen, and the test split has not been read.",
            "why": "Start the same command again: it goes on where it stopped.",
        }
    first, best = run.original, run.chosen
    on_test = first.test is not None and best.test is not None
    before, after = (first.test, best.test) if on_test else (first.validation, best.validation)
    assert before is not None and after is not None  # noqa: S101
    drop = _test_drop(run, best) if on_test else best.drop
    speed, size = _ratio(run, best)[0], before.size / after.size
    where = "on held-out test" if on_test else "on validation"
    headline = (
        "The original stays: nothing else was chosen"
        if best is first
        else f"{_compared(speed, 'faster', 'slower')}, {_compared(size, 'smaller', 'larger')}, {_moved(drop)} {where}"
    )
    overlap = "overlap" if before.low <= after.high and after.low <= before.high else "do not overlap"
    evidence = (
        f"{after.metric[:1].upper()}{after.metric[1:]} {_interval(run, after, '95 % interval ', run.percent)} against "
        f"{_interval(run, before, unit=run.percent)} for the original, on the same {after.n:,} texts. The two intervals {overlap}"
        + ("; by them alone no difference is shown." if overlap == "overlap" else ", so chance is an unlikely cause.")
    )
    met = bool(run.raw.get("met"))
    why = str(run.raw.get("why") or "; ".join(best.broken))
    return {
        "state": "met" if met else "missed",
        "headline": headline,
        "evidence": evidence if best is not first else "",
        "why": why,
    }


def _compared(ratio: float, more: str, less: str) -> str:
    return f"{times(ratio)} {more}" if ratio >= 1 else f"{times(1 / ratio)} {less}"


def _moved(drop: float) -> str:
    if f"{abs(drop):.2f}" == "0.00":
        return "no change in score"
    return f"{points(abs(drop))} {'lower' if drop > 0 else 'higher'}"


def _limits(run: Run) -> list[dict[str, Any]]:
    """Every limit asked for, with what the chosen model reached on validation."""
    best = run.chosen
    shown = {
        "max_drop": ("Drop", lambda v: f"at most {points(v)}", lambda c: points(c.drop), lambda c: c.drop, 1),
        "max_latency_ms": ("Latency", lambda v: f"at most {v:g} ms", lambda c: milliseconds(c.validation.p50), _p50, 1),
        "max_size_bytes": ("Size", lambda v: f"at most {megabytes(v)}", lambda c: megabytes(c.validation.size), _size, 1),
        "min_speedup": ("Speed-up", lambda v: f"at least {v:g}×", lambda c: times(c.speedup), lambda c: -c.speedup, -1),
    }
    rows = []
    for key in LIMITS:
        if (asked := run.budget[key]) is None:
            continue
        label, wording, reached, value, sign = shown[key]
        row = {"label": label, "asked": wording(asked), "reached": "", "held": None}
        if best:
            row |= {"reached": reached(best), "held": value(best) <= sign * asked}
        rows.append(row)
    return rows


def _p50(c: Candidate) -> float:
    return c.validation.p50


def _size(c: Candidate) -> float:
    return c.validation.size


def _charts(run: Run) -> dict[str, str]:
    """Inline SVG by name, wide and narrow."""
    from markupsafe import Markup

    if not run.candidates:
        return {}
    metric = run.original.validation.metric
    words = {
        "curve": f"{metric} against latency for {len(run.candidates)} candidates. The figures are in the table of all candidates.",
        "p50": _spoken(run, "p50", milliseconds),
        "size": _spoken(run, "size", megabytes),
    }
    drawn: dict[str, str] = {}
    for variant, curve, fall in (("wide", (1040, 420), 500), ("narrow", (346, 400), 342)):
        pictures = {
            "curve": charts.curve(run, width=curve[0], height=curve[1]),
            "p50": charts.waterfall(run, "p50", width=fall),
            "size": charts.waterfall(run, "size", width=fall),
        }
        for name, svg in pictures.items():
            drawn[name] = drawn.get(name, Markup("")) + Markup(charts.inline(svg, name=variant, label=words[name]))  # noqa: S704
    return drawn


def _spoken(run: Run, measure: str, written: Any) -> str:
    return "; ".join(f"{part.title}: {written(part.after)}" for part in charts.parts(run, measure))


def _blocks(run: Run, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """What is left of every block, next to what the original had."""
    if (shown := run.shown) is None:
        return {}
    before = run.original.blocks
    places = _places(run, recipe)
    left = dict(zip(places or range(len(shown.blocks)), shown.blocks, strict=True))
    rows = [
        {
            "number": at + 1,
            "heads": left.get(at, (0, 0))[0],
            "neurons": left.get(at, (0, 0))[1],
            "all_heads": heads,
            "all_neurons": neurons,
            "removed": left.get(at, (0, 0)) == (0, 0),
        }
        for at, (heads, neurons) in enumerate(before)
    ]
    return {
        "of": shown,
        "rows": rows,
        "unplaced": places is None,
        "removed": sum(row["removed"] for row in rows),
        "heads": (sum(h for h, _ in shown.blocks), sum(h for h, _ in before)),
        "neurons": (sum(n for _, n in shown.blocks), sum(n for _, n in before)),
    }


def _places(run: Run, recipe: Mapping[str, Any]) -> list[int] | None:
    """For every block that is left its place in the original, None if the recipe does not tell."""
    assert run.shown is not None  # noqa: S101
    before, places = len(run.original.blocks), list(range(len(run.shown.blocks)))
    if len(places) == before:
        return places
    done = len(run.raw["candidates"][0].get("steps") or [])
    steps = [step for step in recipe.get("steps") or [] if isinstance(step, dict)][done:]
    for kept in reversed([step["kept_blocks"] for step in steps if isinstance(step.get("kept_blocks"), list)]):
        if any(place >= len(kept) or not isinstance(kept[place], int) for place in places):
            return None
        places = [kept[place] for place in places]
    inside = all(0 <= place < before for place in places) and len(set(places)) == len(places)
    return places if inside and places != list(range(len(places))) or not places else None


def _interval(run: Run, metrics: Metrics, words: str = "", unit: str = "") -> str:
    digits = 1 if run.scale == 100 else 3
    value, low, high = (f"{number * run.scale:.{digits}f}" for number in (metrics.value, metrics.low, metrics.high))
    return f"{value}{unit} ({words}{low}–{high})"


def _mark(run: Run, candidate: Candidate) -> str:
    return "chosen" if candidate is run.chosen else ""


def _test_drop(run: Run, candidate: Candidate) -> float:
    """Points lost on test."""
    first = run.original.test
    return (first.value - candidate.test.value) * run.scale if first and candidate.test else candidate.drop


def _ratio(run: Run, candidate: Candidate) -> tuple[float, str]:
    """How many times faster than the original, on test if it was measured there, with its interval in words."""
    paired = (candidate.test.raw.get("speed") or {}).get("ratio_to_first") if candidate.test else None
    if not isinstance(paired, dict) or not isinstance(paired.get("value"), (int, float)) or paired["value"] <= 0:
        return candidate.speedup, ""
    bounds = paired.get("ci95")
    good = isinstance(bounds, list) and len(bounds) == 2 and all(isinstance(bound, (int, float)) for bound in bounds)
    return paired["value"], f"{short(bounds[0])}–{short(bounds[1])}" if good else ""


def _hub_id(source: str) -> str | None:
    """The model's name on the Hub, or None for a folder."""
    looks = re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", source, flags=re.ASCII)
    return source if looks and not Path(source).exists() else None


# -- writing -----------------------------------------------------------------------------------------------------------------


def _template(name: str) -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    env = Environment(
        loader=PackageLoader("multum", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
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


def _write(path: Path, text: str) -> None:
    """The old file or the new one, never half of either."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(text.rstrip() + "\n", encoding="utf-8")
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise MultumError(f"cannot write {path}: {error.strerror}") from error
