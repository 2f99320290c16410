"""For whom is it worse? Accuracy before and after in every group, and which drop is more than chance.

In each group with enough examples McNemar's mid-p test asks whether its own accuracy changed. With k groups tested, one in
twenty would look changed by chance alone, so the p-values are corrected (Holm 1979): sorted p₁ <= ... <= p_k,

    p̃ᵢ = max over j <= i of min(1, (k − j + 1) pⱼ)

and a group counts as damaged where p̃ < 0.05 and its accuracy fell. The chance of naming any group wrongly is then below 5 %.

Beyond the rest: a model that lost a little everywhere lost a little in every group. Whether a group lost more than the others is
asked apart, by permutation: the group's −1, 0 and 1 are redrawn from those of all examples without replacement (a multivariate
hypergeometric draw), and  p = (1 + draws at least as far from the mean) / (1 + draws),  corrected the same way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ._many import holm as holm
from ._many import natural
from ._paired import counts, mcnemar, score_interval

ENOUGH = 20
"""Examples below which nothing is claimed of a group."""
ALPHA = 0.05
PERMUTATIONS = 20_000


def excess(inside: tuple[int, int, int], overall: tuple[int, int, int], draws: int, seed: int) -> tuple[float, float]:
    """How much more (below zero: more was lost) a group changed than the rest, and the permutation's p-value.

    Args:
        inside, overall: lost, gained and n of the group and of all examples.
        draws: permutations.
        seed: of the permutations.
    """
    lost, gained, size = inside
    all_lost, all_gained, n = overall
    if size == n:
        return 0.0, 1.0

    def gap(lost: Any, gained: Any) -> Any:
        return (gained - lost) / size - (all_gained - gained - all_lost + lost) / (n - size)

    kinds = [all_lost, all_gained, n - all_lost - all_gained]
    drawn = np.random.default_rng(seed).multivariate_hypergeometric(kinds, size, size=draws)
    found = gap(lost, gained)
    farther = np.abs(gap(drawn[:, 0], drawn[:, 1])) >= abs(found) - 1e-12
    return float(found), float((1 + farther.sum()) / (1 + draws))


def length_groups(lengths: np.ndarray, parts: int = 4) -> np.ndarray:
    """For every example the name of its quarter by length in characters: `1 to 60`."""
    edges = np.unique(np.quantile(lengths, np.linspace(0, 1, parts + 1)[1:-1], method="inverted_cdf"))
    bucket = np.searchsorted(edges, lengths)  # a length equal to an edge belongs below it
    names = {at: f"{lengths[bucket == at].min()} to {lengths[bucket == at].max()}" for at in np.unique(bucket)}
    return np.array([names[at] for at in bucket])


def groups(
    correct_before: np.ndarray, correct_after: np.ndarray, groupings: Mapping[str, Sequence[str] | np.ndarray], *, seed: int
) -> dict[str, Any]:
    """Every group of every grouping.

    Args:
        correct_before, correct_after: whether each example is answered rightly, (n,).
        groupings: name of a grouping -> the group of every example.
        seed: of the permutations.

    Returns:
        `rows`, one a group, shares not points; `tested`, how many groups had enough examples; `damaged` and `improved`, the rows
        that changed by more than chance; `worst`, the tested row that lost most (of the damaged ones if there are any).
    """
    rows: list[dict[str, Any]] = []
    overall = counts(correct_before, correct_after)
    for by, members in groupings.items():
        of = np.asarray(members, dtype=str)
        for name in sorted(set(of.tolist()), key=natural):
            inside = of == name
            lost, gained, n = cell = counts(correct_before[inside], correct_after[inside])
            row = {
                "by": by,
                "name": name,
                "n": n,
                "before": float(correct_before[inside].mean()),
                "after": float(correct_after[inside].mean()),
                "value": (gained - lost) / n,
                "ci95": list(score_interval(lost, gained, n)),
                "lost": lost,
                "gained": gained,
                "enough": n >= ENOUGH,
            }
            if row["enough"]:
                row["p"] = mcnemar(lost, gained)
                row["excess"], row["p_excess"] = excess(cell, overall, PERMUTATIONS, seed)
            rows.append(row)
    return {"rows": rows, **_judged([row for row in rows if row["enough"]])}


def _judged(tested: list[dict[str, Any]]) -> dict[str, Any]:
    """The tests corrected for one another, and what they say."""
    for kind in ("p", "p_excess"):
        for row, value in zip(tested, holm([row[kind] for row in tested]), strict=True):
            row[f"{kind}_holm"] = float(value)
    changed = [row for row in tested if row["p_holm"] < ALPHA]
    damaged = sorted((row for row in changed if row["value"] < 0), key=lambda row: row["value"])
    improved = sorted((row for row in changed if row["value"] > 0), key=lambda row: -row["value"])
    worst = min(damaged or tested, key=lambda row: row["value"], default=None)
    return {
        "tested": len(tested),
        "damaged": damaged,
        "improved": improved,
        "worst": worst if worst and worst["value"] < 0 else None,
    }
