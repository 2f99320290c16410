"""What the page says of two models' reasons and of their training data: sentences, rows, and texts with their words weighed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from . import _compare_depths as inside
from ._compare_words import change, percent
from .evidence._words import words_of

ATTACKS = {"loss": "Loss threshold", "lira": "LiRA, {shadows} shadow models"}
FOUND = {
    "auc": "AUC",
    "tpr_at_1_percent": "Members found at 1 % false positives",
    "tpr_at_0.1_percent": "Members found at 0.1 % false positives",
}
ROLES = {"before": "before", "after": "after", "floor": "trained again"}
STRONG, WEAK = 0.35, 0.1
"""Weights from which a word is also underlined, twice as thick and at all, so that colour is not needed to see it."""


def reasons(result: Mapping[str, Any]) -> dict[str, Any] | None:
    """The section on attributions; None where there are none."""
    found = result["comparisons"]["after"].get("attribution")
    if not found:
        return None
    floor = (result["comparisons"].get("floor") or {}).get("attribution")
    tests = [(ROLES[role], model["attribution"]) for role, model in result["models"].items() if model.get("attribution")]
    return {
        "agree": agree(found, floor),
        "trust": trust(result["models"]),
        "tests": [(role, test, [_tested(test, name) for name in ("comprehensiveness", "sufficiency")]) for role, test in tests],
        "examples": [_shown(example) for example in found["examples"]],
        "forms": [
            (ROLES[role], model["torch_form"])
            for role, model in result["models"].items()
            if model.get("torch_form") and model["torch_form"] != model["target"]
        ],
        "points": result["attributed"]["points"],
        "error": max(test["error"] for _, test in tests),
        "depths": inside.depths(result),
        "rollout": inside.rollout(result, ROLES),
        "led": any(example.get("rollout", {}).get(role) for example in found["examples"] for role in ("before", "after")),
    }


def agree(found: Mapping[str, Any], floor: Mapping[str, Any] | None) -> str:
    """How far two models weigh words alike, beside what training twice changes."""
    rank, shared = found["rank"], found["overlap"]
    text = (
        f"On the {found['n']:,} of {found['texts']:,} texts that both answer alike and that can tell, the two rank the words "
        f"alike to ρ = {_interval(rank)}. Of the words that count most they share {_interval(shared, percent)}, where two random "
        f"orders would share {percent(found['overlap_by_chance'])}."
    )
    if not floor:
        return text
    low, high = floor["rank"]["ci95"]
    less = rank["value"] < low
    than = "less alike than" if less else "more alike than" if rank["value"] > high else "about as alike as"
    return f"{text} That is {than} two trainings of the original that differ in their seed only: {_interval(floor['rank'])}."


def trust(models: Mapping[str, Any]) -> str:
    """What the deletion test says of every model's attributions."""
    doubtful = [ROLES[role] for role, model in models.items() if model.get("attribution") and not model["attribution"]["faithful"]]
    if not doubtful:
        return "The words ranked first matter to the answers: all models pass the deletion test."
    which = " and ".join(doubtful)
    return (
        f"The attributions of the model {which} do not pass the deletion test: words ranked first are not shown to matter more "
        "than random ones. What they say is no evidence."
    )


def _tested(test: Mapping[str, Any], name: str) -> dict[str, str]:
    one = test[name]
    return {
        "name": name,
        "value": _minus(f"{one['value']:.3f}"),
        "random": _minus(f"{one['random']:.3f}"),
        "excess": f"{change(one['excess']['value'])} ({change(one['excess']['ci95'][0])} to {change(one['excess']['ci95'][1])})",
    }


def _shown(example: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **{key: example[key] for key in ("answer", "label")},
        "rank": _minus(f"{example['rank']:.2f}"),
        "sides": [(role, weighed(example["text"], example[role])) for role in ("before", "after")],
        "led": [
            (role, weighed(example["text"], inside.led(shares), kind="led"))
            for role, shares in example.get("rollout", {}).items()
            if shares
        ],
    }


def weighed(text: str | Sequence[str], weights: Sequence[float | None], kind: str = "") -> list[dict[str, Any]]:
    """The text in pieces: words with their weight in percent, sign (or `kind`) and strength, and what stands between them."""
    sides = [text] if isinstance(text, str) else list(text)
    spans = words_of(text if isinstance(text, str) else (sides[0], sides[1]))
    pieces: list[dict[str, Any]] = []
    side, last = 0, 0
    for (at, start, end), weight in zip(spans, weights, strict=False):
        if at != side:
            pieces.append({"text": f"{sides[side][last:]} | "})
            side, last = at, 0
        if start > last:
            pieces.append({"text": sides[at][last:start]})
        word: dict[str, Any] = {"text": sides[at][start:end]}
        if weight is not None:
            word["kind"] = (kind or ("for" if weight > 0 else "against")) + _line(abs(weight))
            word["weight"] = round(60 * abs(weight))
        pieces.append(word)
        last = end
    pieces.append({"text": sides[side][last:]})
    return [piece for piece in pieces if piece["text"]]


def _line(weight: float) -> str:
    return " strong" if weight >= STRONG else " weak" if weight >= WEAK else ""


def privacy(result: Mapping[str, Any]) -> dict[str, Any] | None:
    """The section on membership inference; None where nobody was attacked."""
    models, found = result["models"], result["comparisons"]["after"].get("privacy")
    if not found:
        return None
    floor = (result["comparisons"].get("floor") or {}).get("privacy")
    rows = []
    for attack, moved in found.items():
        for key, name in FOUND.items():
            if models["before"]["privacy"][attack][key] is None:
                continue
            shown = percent if key != "auc" else lambda value: f"{value:.3f}"
            rows.append(
                {
                    "attack": ATTACKS[attack].format(shadows=result["shadows"]),
                    "name": name,
                    **{role: _interval(models[role]["privacy"][attack][key], shown) for role in models},
                    "change": _signed(moved["auc"]) if key == "auc" else "",
                    "twice": _twice(models, floor, attack, key),
                }
            )
    strongest = "lira" if "lira" in found else "loss"
    return {
        "rows": rows,
        "said": leaked(models, found[strongest]["auc"], strongest),
        "unknown": _roles(models, None),
        "elsewhere": _roles(models, False),
        "members": models["before"]["privacy"]["loss"]["members"],
        "others": models["before"]["privacy"]["loss"]["others"],
        "few": models["before"]["privacy"]["loss"]["tpr_at_0.1_percent"] is None,
        "lira": "lira" in found,
        "promised": promised(models),
    }


def promised(models: Mapping[str, Any]) -> str:
    """What differential privacy promises of models, by their own records; empty where it promises nothing."""
    told = [(ROLES[role], spent) for role, model in models.items() if (spent := model.get("private"))]
    return " ".join(
        f"The model {role} has differential privacy by its record: ε = {spent['epsilon']:.3g}, δ = {spent['delta']:.1g}."
        for role, spent in told
    )


def _roles(models: Mapping[str, Any], trained_here: bool | None) -> str:
    """The models of which it is known, or not, where they were trained: `before and after`."""
    return " and ".join(ROLES[role] for role, model in models.items() if model.get("trained_here") is trained_here)


def _twice(models: Mapping[str, Any], floor: Mapping[str, Any] | None, attack: str, key: str) -> str:
    if not floor:
        return ""
    return _signed(floor[attack]["auc"]) if key == "auc" else percent(models["floor"]["privacy"][attack][key]["value"])


def leaked(models: Mapping[str, Any], moved: Mapping[str, Any], attack: str) -> str:
    """Whether members can be told from others, and whether the model after tells more."""
    now = models["after"]["privacy"][attack]["auc"]
    by = "LiRA" if attack == "lira" else "by its loss"
    shown = "can" if now["ci95"][0] > 0.5 else "cannot be shown to be able to"
    text = f"{by[:1].upper()}{by[1:]}, one {shown} tell training texts of the model after from others: AUC {_interval(now)}."
    low, high = moved["ci95"]
    verdict = (
        "▼ It tells more than the model before" if low > 0 else
        "▲ It tells less than the model before" if high < 0 else
        "Against the model before no difference is shown"
    )  # fmt: skip
    return f"{text} {verdict}: {_signed(moved)}."


def _interval(one: Mapping[str, Any], shown: Any = lambda value: f"{value:.2f}") -> str:
    low, high = one["ci95"]
    return _minus(f"{shown(one['value'])} ({shown(low)} to {shown(high)})")


def _minus(text: str) -> str:
    return text.replace("-", "−")


def _signed(one: Mapping[str, Any]) -> str:
    low, high = one["ci95"]
    return f"{change(one['value'])} ({change(low)} to {change(high)})"


def rows_of(result: Mapping[str, Any]) -> list[list[str]]:
    """The same figures for the terminal's table, without its last column where there is no floor: name, before, after, change."""
    twice, rows = "floor" in result["comparisons"], []
    if found := result["comparisons"]["after"].get("attribution"):
        floor = (result["comparisons"].get("floor") or {}).get("attribution")
        rows.append(
            ["Rank agreement of words", "", f"{found['rank']['value']:.2f}", "", f"{floor['rank']['value']:.2f}" if floor else ""]
        )
        rows += inside.rows_of(result)
    for row in (privacy(result) or {"rows": []})["rows"]:
        if row["name"] == "AUC":
            rows.append(
                [
                    f"Leak: {row['attack']}, AUC",
                    *(row[role].split(" ")[0] for role in ("before", "after")),
                    row["change"],
                    row["twice"],
                ]
            )
    return [row if twice else row[:4] for row in rows]
