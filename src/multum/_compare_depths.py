"""What the page says of the inside of two models: which depth is like which, and where attention leads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ._compare_words import percent

EVEN = 1e-9
"""Shares that differ by less are the same."""


def depths(result: Mapping[str, Any]) -> dict[str, Any] | None:
    """The part on layers; None where there is nothing of them."""
    found = result["comparisons"]["after"].get("depths")
    if not found or not found["nearest"]:
        return None
    floor = (result["comparisons"].get("floor") or {}).get("depths")
    own = {role: result["models"][role]["inside"]["depths"] for role in ("before", "after")}
    return {
        "said": said(found, floor),
        "rows": [
            {
                "after": place(row["after"]),
                "before": place(row["before"]),
                "rho": interval(row),
                "words": percent(own["after"]["words"][row["after"]]),
            }
            for row in found["nearest"]
        ],
        "silent": silent(found, len(own["after"]["words"])),
        "n": found["n"],
        "error": max(max(one["error"]) for one in own.values()),
        "steps": result["attributed"]["steps"],
    }


def said(found: Mapping[str, Any], floor: Mapping[str, Any] | None) -> str:
    """How alike the likest depths are in the mean, and which depth of the model before the last one after is like."""
    nearest = found["nearest"]
    last, mean = nearest[-1], _mean(nearest)
    text = (
        f"Every depth of the model after is set beside the depth of the model before that it is most like; the mean of those ρ "
        f"is {mean:.2f}. For {place(last['after'])}, the last of the model after where words still count, that is "
        f"{place(last['before'])} of the model before (ρ = {interval(last)})."
    )
    if floor and floor["nearest"]:
        text += f" Between two trainings of the original that differ in their seed only that mean is {_mean(floor['nearest']):.2f}."
    return text.replace("-", "−")


def _mean(nearest: Sequence[Mapping[str, Any]]) -> float:
    return float(sum(row["value"] for row in nearest)) / len(nearest)


def silent(found: Mapping[str, Any], depths_after: int) -> str:
    """Depths of the model after whose words have no order; empty where all have one."""
    known = {row["after"] for row in found["nearest"]}
    gone = [depth for depth in range(depths_after) if depth not in known]
    if not gone:
        return ""
    which = "block" if len(gone) == 1 else "blocks"
    return (
        f"Behind {which} {', '.join(map(str, gone))} of the model after nothing stands on words any more, all of it on the token "
        "that the head reads: there is no order to compare."
    )


def place(depth: int) -> str:
    """A depth in words: `the embeddings`, `block 3`."""
    return f"block {depth}" if depth else "the embeddings"


def interval(one: Mapping[str, Any]) -> str:
    """`0.71 (0.65 to 0.76)`."""
    low, high = one["ci95"]
    return f"{one['value']:.2f} ({low:.2f} to {high:.2f})".replace("-", "−")


def rollout(result: Mapping[str, Any], roles: Mapping[str, str]) -> dict[str, str] | None:
    """What is said of attention rollout; None where nobody looked."""
    insides = {role: model.get("inside") for role, model in result["models"].items()}
    if not all(insides.values()):
        return None
    blind = " and ".join(roles[role] for role, inside in insides.items() if inside and not inside["rollout"])
    found = result["comparisons"]["after"].get("rollout")
    floor = (result["comparisons"].get("floor") or {}).get("rollout")
    if not found:
        return {"said": "", "blind": blind}
    twice = f" (two trainings of the original: {interval(floor['rank'])})" if floor else ""
    own = [
        f"{interval(inside['rollout']['with_gradients']['rank'])} {roles[role]}"
        for role, inside in insides.items()
        if inside and inside["rollout"] and inside["rollout"]["with_gradients"]
    ]
    text = f"Attention leads to words in both models alike to ρ = {interval(found['rank'])}{twice}."
    return {"said": f"{text} With the sizes of the attributions it agrees to ρ = {', '.join(own)}.", "blind": blind}


def led(weights: Sequence[float | None]) -> list[float | None]:
    """Shares of words as weights from 0 to 1: what a word gets beyond an even share, by the most that one gets."""
    known = [value for value in weights if value is not None]
    even = sum(known) / len(known) if known else 0.0
    most = max(known, default=0.0) - even
    return [None if value is None or most < EVEN or value <= even else (value - even) / most for value in weights]


def rows_of(result: Mapping[str, Any]) -> list[list[str]]:
    """The same for the terminal's table: name, before, after, change, training twice."""
    after, floor = result["comparisons"]["after"], result["comparisons"].get("floor") or {}
    rows = []
    if depths(result):
        rows.append(["Likest depths, mean", *_cells(after["depths"], floor.get("depths"), lambda one: _mean(one["nearest"]))])
    if after.get("rollout"):
        cells = _cells(after["rollout"], floor.get("rollout"), lambda one: one["rank"]["value"])
        rows.append(["Rank agreement of attention rollout", *cells])
    return rows


def _cells(after: Any, twice: Any, figure: Callable[[Any], float]) -> list[str]:
    return ["", f"{figure(after):.2f}", "", f"{figure(twice):.2f}" if twice else ""]
