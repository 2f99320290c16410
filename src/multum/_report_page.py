"""What the report says: a run -> the values and the sentences that the templates show."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import _report_charts as charts
from ._report_cost import cost
from ._report_curve import curve
from ._report_run import Candidate, Metrics, Run
from ._report_words import amount, megabytes, milliseconds, runtime, sample_input, short, threads, times

AUTO_CLASSES = {
    "text-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "text-generation": "AutoModelForCausalLM",
    "translation": "AutoModelForSeq2SeqLM",
    "summarization": "AutoModelForSeq2SeqLM",
}
"""What Transformers calls the class that loads a model for the task."""
WRITING = ("text-generation", "translation", "summarization")
"""Tasks whose answers are texts."""
KEY = (("original", "■", "original"), ("export", "◆", "original, exported"), ("rung", "●", "shrunk"), ("chosen", "●", "chosen"))
"""What the signs in the curve mean."""


def page(run: Run, recipe: Mapping[str, Any], name: str, evidence: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that the templates show."""
    raw, found = run.raw, cost(run, evidence, name)
    task = str(raw["task"])
    return {
        "run": run,
        "raw": raw,
        "name": name,
        "title": _title(str(raw["model"])),
        "data_name": _title(str(data.get("source") or "unknown") if isinstance(data := raw.get("data"), dict) else "unknown"),
        "warnings": [text for text in _listing(raw.get("warnings")) if isinstance(text, str)],
        "verdict": verdict(run, found["headline"] if found else ""),
        "cost": found,
        "limits": _limits(run),
        "charts": _charts(run),
        "blocks": _blocks(run, recipe),
        "recipe": recipe,
        "tests": [c for c in run.candidates if c.test],
        "auto_class": AUTO_CLASSES.get(task, "AutoModel"),
        "writes": task in WRITING,
        "timed": timed(run),
        "tokens": tokens,
        "threads": threads,
        "asked": sample_input(task),
        "base_model": _hub_id(str(recipe.get("base") or raw["model"])),
        "served": run.chosen and runtime(run.chosen),
        "python_path": json.dumps(run.ships, ensure_ascii=False),
        "shell_path": shlex.quote(run.ships),
        "dictionary": lambda value: value if isinstance(value, dict) else {},
        "listing": _listing,
        "color": lambda c: charts.kind(run, c),
        "interval": lambda m: interval(run, m),
        "ratio": lambda c: ratio(run, c),
        "test_drop": lambda c: test_drop(run, c),
        "colors": charts.COLORS,
    }


def verdict(run: Run, paired: str = "") -> dict[str, str]:
    """The result in plain words: state (`met`, `missed` or `unfinished`), headline, what it rests on, why.

    Whether the difference is more than chance is said by `paired` where there is that, for want of it by two intervals.
    """
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
    on_test = bool(first.test and best.test)
    before, after = (first.test, best.test) if first.test and best.test else (first.validation, best.validation)
    drop = test_drop(run, best) if on_test else best.drop
    speed, size = ratio(run, best)[0], before.size / after.size
    where = "on held-out test" if on_test else "on validation"
    faster = "of unknown speed" if _disturbed(run) else _compared(speed, "faster", "slower")
    headline = (
        "The original stays: nothing else was chosen"
        if best is first
        else f"{faster[:1].upper()}{faster[1:]}, {_compared(size, 'smaller', 'larger')}, {_moved(run, drop)} {where}"
    )
    apart = not (before.low <= after.high and after.low <= before.high)
    intervals = "do not overlap, so chance is an unlikely cause" if apart else "overlap; by them alone no difference is shown"
    real = paired or f"The two intervals {intervals}."
    evidence = (
        f"{after.metric[:1].upper()}{after.metric[1:]} {interval(run, after, '95 % interval ', run.percent)} against "
        f"{interval(run, before, unit=run.percent)} for the original, on the same {after.n:,} texts. {real}"
    )
    met = bool(run.raw.get("met"))
    why = str(run.raw.get("why") or "; ".join(best.broken))
    return {
        "state": "met" if met else "missed",
        "headline": headline,
        "evidence": evidence if best is not first else "",
        "why": why,
    }


def _disturbed(run: Run) -> bool:
    """Whether a warning says that latencies are not to be trusted (`DISTURBED` of `_measure`)."""
    return any("latencies and speed-ups are not to be trusted" in str(text) for text in _listing(run.raw.get("warnings")))


def _compared(ratio: float, more: str, less: str) -> str:
    return f"{times(ratio)} {more}" if ratio >= 1 else f"{times(1 / ratio)} {less}"


def _moved(run: Run, drop: float) -> str:
    if f"{abs(drop):.2f}" == "0.00":
        return "no change in score"
    much = amount(abs(drop), per_cent=run.grows)
    if run.grows:
        return f"{run.original.validation.metric} {much} {'higher' if drop > 0 else 'lower'}"
    return f"{much} {'lower' if drop > 0 else 'higher'}"


def _limits(run: Run) -> list[dict[str, Any]]:
    """Every limit asked for, with what the chosen model reached on validation."""
    best, rows = run.chosen, []
    for key, asked in run.budget.items():
        if asked is None:
            continue
        label, wanted = {
            "max_drop": ("Drop", f"at most {amount(asked, per_cent=run.grows)}"),
            "max_latency_ms": ("Latency", f"at most {asked:g} ms"),
            "max_size_bytes": ("Size", f"at most {megabytes(asked)}"),
            "min_speedup": ("Speed-up", f"at least {asked:g}×"),
        }[key]
        row: dict[str, Any] = {"label": label, "asked": wanted}
        if best:
            reached, held = {
                "max_drop": (amount(best.drop, per_cent=run.grows), best.drop <= asked),
                "max_latency_ms": (milliseconds(best.validation.p50), best.validation.p50 <= asked),
                "max_size_bytes": (megabytes(best.validation.size), best.validation.size <= asked),
                "min_speedup": (times(best.speedup), best.speedup >= asked),
            }[key]
            row |= {"reached": reached, "held": held}
        rows.append(row)
    return rows


def _charts(run: Run) -> dict[str, str]:
    """Inline SVG by name, wide and narrow."""
    return charts.inlined({variant: drawings(run, variant) for variant in ("wide", "narrow")})


def drawings(run: Run, variant: str = "wide") -> dict[str, charts.Drawing]:
    """Every picture of the page by name."""
    if not run.candidates:
        return {}
    metric = run.original.validation.metric
    (width, height), fall = ((1040, 420), 500) if variant == "wide" else ((346, 400), 342)
    about = f"{metric} against latency for {len(run.candidates)} candidates. The figures are in the table of all candidates."
    return {
        "curve": charts.Drawing(curve(run, width=width, height=height), about, KEY if run.chosen else KEY[:-1]),
        "p50": charts.Drawing(charts.waterfall(run, "p50", width=fall), _spoken(run, "p50", milliseconds), ()),
        "size": charts.Drawing(charts.waterfall(run, "size", width=fall), _spoken(run, "size", megabytes), ()),
    }


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
    before, places = len(run.original.blocks), list(range(len(run.shown.blocks) if run.shown else 0))
    if len(places) == before:
        return places
    done, steps = (
        value if isinstance(value, list) else [] for value in (run.raw["candidates"][0].get("steps"), recipe.get("steps"))
    )
    steps = [step for step in steps[len(done) :] if isinstance(step, dict)]
    records = [step for step in steps if isinstance(step.get("kept_blocks"), list)]
    after = len(places)
    for step in reversed(records):
        kept, dropped = step["kept_blocks"], step.get("dropped_blocks")
        if step.get("stack") and isinstance(dropped, list):
            kept, after = _of_both(kept, len(dropped), after, step["stack"]), after + len(dropped)
        if any(place >= len(kept) or not isinstance(kept[place], int) for place in places):
            return None
        places = [kept[place] for place in places]
    inside = all(0 <= place < before for place in places) and len(set(places)) == len(places)
    return places if inside and (records or not places) else None


def _of_both(kept: list[Any], dropped: int, after: int, stack: str) -> list[Any]:
    """Places before one stack of two was shortened, of all `after` blocks left: the encoder's, then the decoder's."""
    others = after - len(kept)
    if stack == "encoder":
        return [*kept, *range(len(kept) + dropped, len(kept) + dropped + others)]
    return [*range(others), *(place + others if isinstance(place, int) else place for place in kept)]


def timed(run: Run) -> str:
    """From what to what latency is taken."""
    speed = run.original.validation.raw.get("speed") if run.candidates else None
    if str(run.raw["task"]) not in WRITING or not isinstance(speed, dict):
        return "from text to label scores"
    if "new_tokens" in speed:
        return (
            f"from the beginning of a text, {speed.get('prompt_tokens', '?')} tokens, to the last of {speed['new_tokens']} written"
        )
    return "from a text to the whole text that is written"


def tokens(metrics: Metrics) -> str:
    """How fast a model writes one text, where it writes."""
    speed = metrics.raw["speed"]
    found = next((speed[name] for name in ("tokens_per_s", "decode_tokens_per_s") if name in speed), None)
    return f"{short(found)} tokens/s" if isinstance(found, (int, float)) else ""


def interval(run: Run, metrics: Metrics, words: str = "", unit: str = "") -> str:
    digits = 1 if run.scale == 100 else 3
    value, low, high = (f"{number * run.scale:.{digits}f}" for number in (metrics.value, metrics.low, metrics.high))
    return f"{value}{unit} ({words}{low}–{high})"


def test_drop(run: Run, candidate: Candidate) -> float:
    """What was lost on test, in the unit of the budget."""
    first = run.original.test
    return run.lost(first, candidate.test) if first and candidate.test else candidate.drop


def ratio(run: Run, candidate: Candidate) -> tuple[float, str]:
    """How many times faster than the original, on test if it was measured there, with its interval in words."""
    paired = candidate.test.raw["speed"].get("ratio_to_first") if candidate.test else None
    if not isinstance(paired, dict) or not isinstance(paired.get("value"), (int, float)) or paired["value"] <= 0:
        return candidate.speedup, ""
    bounds: Any = paired.get("ci95")
    good = isinstance(bounds, list) and len(bounds) == 2 and all(isinstance(bound, (int, float)) for bound in bounds)
    return paired["value"], f"{short(bounds[0])}–{short(bounds[1])}" if good else ""


def _listing(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _title(source: str) -> str:
    """The model's name: of a folder the last part of its path, where that says something."""
    return Path(source).name or source if Path(source).is_absolute() else source


def _hub_id(source: str) -> str | None:
    """The model's name on the Hub, or None for a folder."""
    looks = re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", source, flags=re.ASCII)
    return source if looks and not Path(source).exists() else None
