r"""Do two models give the same answer for the same reasons? Their attributions, word by word, beside one another.

An attribution a_w says how much word w speaks for the answer given (`_gradients` computes it). On texts that both models answer
alike, with words that both read:

    rank agreement   Spearman's ρ of a and a' over the words of a text, ties at their mean rank; a mean over texts
    top-k overlap    |top_k(a) ∩ top_k(a')| / k, k = min(5, half of the words); two random orders would share k/n of it

Attributions are not taken on trust. The deletion test (DeYoung et al. 2020, ERASER, arXiv:1911.03429) takes the first share s of
the words down the ranking out of the text x, or leaves nothing but them, and asks for the probability p of the answer again:

    comprehensiveness   mean over s of  p(x) − p(x without them)     high if those words mattered
    sufficiency         mean over s of  p(x) − p(them alone)         low if those words are enough

Both are set against words in random orders. An attribution that does not beat chance there explains nothing, and two that agree
are then no evidence that the models do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import rankdata

from ._bootstrap import mean_interval
from ._words import FEWEST

TOP = 5
SHARES = (0.1, 0.2, 0.5)
"""Of a text's words, that the deletion test takes out or leaves alone."""


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's correlation of the ranks, ties at their mean rank, (words,) each; nan where either has one value only."""
    x, y = (rankdata(values) - (len(values) + 1) / 2 for values in (a, b))
    spread = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / spread if spread > 0 else float("nan")


def overlap(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """The share of the k words with most attribution that both have, and what two random orders would share."""
    k = max(1, min(TOP, len(a) // 2))
    first, second = (set(order(values)[:k].tolist()) for values in (a, b))
    return len(first & second) / k, k / len(a)


def order(attribution: np.ndarray) -> np.ndarray:
    """The words, those that speak most for the answer first; equal ones as they stand in the text."""
    return np.argsort(-attribution, kind="stable")


def agreement(
    before: Sequence[np.ndarray],
    after: Sequence[np.ndarray],
    answers_before: np.ndarray,
    answers_after: np.ndarray,
    *,
    draws: int,
    seed: int,
) -> dict[str, Any] | None:
    """How far the attributions of two models agree; None where no text can tell.

    Args:
        before, after: for every text the attribution of its words, (words,); nan for words that the model did not read.
        answers_before, answers_after: index of the class that was attributed, (texts,).
        draws: of the bootstrap over texts.
        seed: of the draws.

    Returns:
        `rank` and `overlap` with intervals, `overlap_by_chance`, `n` texts; `each`, the rank agreement of every text by its index.
    """
    rows, kept = [], []
    for at in np.flatnonzero(answers_before == answers_after).tolist():
        seen = np.isfinite(before[at]) & np.isfinite(after[at])
        if seen.sum() < FEWEST:
            continue
        a, b = before[at][seen], after[at][seen]
        rank = spearman(a, b)
        if np.isfinite(rank):
            kept.append(at)
            rows.append((rank, *overlap(a, b)))
    if not rows:
        return None
    values = np.array(rows)
    low, high = mean_interval(values, draws, seed)
    mean = values.mean(axis=0)
    found = {
        name: {"value": float(mean[at]), "ci95": [float(low[at]), float(high[at])]} for at, name in enumerate(("rank", "overlap"))
    }
    return {
        **found,
        "overlap_by_chance": float(mean[2]),
        "n": len(rows),
        "alike": int((answers_before == answers_after).sum()),
        "texts": len(answers_before),
        "each": dict(zip(kept, values[:, 0].tolist(), strict=True)),
    }


def cuts(words: int, shares: Sequence[float] = SHARES) -> list[int]:
    """How many words of a text are taken out, or left alone, at every share: one at least, never all."""
    return [min(max(1, int(np.ceil(share * words))), words - 1) for share in shares]


def deletions(ranking: np.ndarray) -> list[np.ndarray]:
    """Which words are left in each text that the test asks about: (words,) booleans, first all that lack some, then all of these.

    Args:
        ranking: the words in the order in which they are taken, a permutation, (words,), two words or more.
    """
    place = np.empty(len(ranking), dtype=int)
    place[ranking] = np.arange(len(ranking))
    counts = cuts(len(ranking))
    return [place >= k for k in counts] + [place < k for k in counts]


def deletion(whole: np.ndarray, guided: np.ndarray, random: np.ndarray, *, draws: int, seed: int) -> dict[str, Any]:
    """Whether the words that an attribution ranks first matter more to the model's answer than others.

    Args:
        whole: probability of the answer to the whole text, (texts,).
        guided: the same of the texts that `deletions` makes of the attribution's order, (texts, 2 shares).
        random: of those made of random orders, (texts, orders, 2 shares).
        draws: of the bootstrap over texts.
        seed: of the draws.

    Returns:
        `comprehensiveness` and `sufficiency`, each with `random` and the `excess` over it (so that above zero is better for
        both) with its interval; `faithful` if both excesses are above zero by more than chance.
    """
    n, shares = len(whole), guided.shape[1] // 2

    def fall(asked: np.ndarray, part: slice) -> np.ndarray:
        return np.asarray(whole - asked[..., part].mean(axis=-1).reshape(n, -1).mean(axis=1))

    found: dict[str, Any] = {}
    for name, part, sign in (("comprehensiveness", slice(0, shares), 1), ("sufficiency", slice(shares, None), -1)):
        own, chance = fall(guided, part), fall(random, part)
        excess = sign * (own - chance)
        low, high = mean_interval(excess, draws, seed)
        found[name] = {
            "value": float(own.mean()),
            "random": float(chance.mean()),
            "excess": {"value": float(excess.mean()), "ci95": [float(low[0]), float(high[0])]},
        }
    return {"n": n, **found, "faithful": all(one["excess"]["ci95"][0] > 0 for one in found.values())}
