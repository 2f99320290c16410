r"""Regression: a number for a text, or for a pair of texts, such as how alike they are.

    L = 1/N Σ_i (z_i - y_i)²

Quality is Pearson's correlation with a bootstrap interval over texts; beside it Spearman's rank correlation and the mean squared
error. Predictions that are all the same are correlated with nothing: 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from scipy.stats import rankdata
from torch.nn import functional as F

from ..core.task import Batch, Quality, SplitName, of_split
from ..errors import InputError
from ._encoder import SPLITS
from ._interval import bootstrap
from ._texts import TextTask, common_fields


@dataclass(frozen=True, kw_only=True)
class Regression(TextTask):
    """Texts, and a number for each: targets are (texts,) float32."""

    name: ClassVar[str] = "text-classification"
    columns: ClassVar[tuple[str, ...]] = ("text", "score")
    values: ClassVar[tuple[str, ...]] = ("score",)
    problem: ClassVar[str] = "regression"
    unlabelled_as: ClassVar[float] = float("nan")

    @classmethod
    def prepare(cls, tables: dict[str, pd.DataFrame], notes: list[str]) -> dict[str, pd.DataFrame]:
        """Scores as numbers; rows without one are dropped.

        Raises:
            InputError: something else is among them.
        """
        problems, result = [], {}
        for split, table in tables.items():
            if "score" not in table:
                result[split] = table
                continue
            score = pd.to_numeric(table["score"], errors="coerce").replace([np.inf, -np.inf], np.nan)
            given = table["score"].notna() & (table["score"].astype(str).str.strip() != "")
            if wrong := [repr(value) for value in table["score"][given & score.isna()]]:
                problems.append(
                    f"{of_split(split)}{len(wrong)} scores are no numbers: {', '.join(wrong[:3])}{', ...' * (len(wrong) > 3)}"
                )
            if missing := int((~given).sum()):
                notes.append(f"{of_split(split)}{missing} {'row' if missing == 1 else 'rows'} dropped: no score")
            result[split] = table.assign(score=score.astype(float))[given]
        if problems:
            raise InputError(*problems)
        return result

    @classmethod
    def from_splits(cls, splits: Any, *, max_length: int | None = None, seed: int = 0) -> Regression:
        """The task from data with a column `score`.

        Raises:
            InputError: all scores of a split are the same, so that nothing can be correlated with them.
        """
        targets: dict[str, np.ndarray] = {name: np.array(getattr(splits, name)["score"], dtype=np.float32) for name in SPLITS}
        if problems := [f"all scores of the {name} split are {y[0]:g}" for name, y in targets.items() if (y == y[0]).all()]:
            raise InputError(*problems)
        return cls(targets=targets, labels=("score",), **common_fields(splits, max_length, seed))

    def columns_for(self, labels: Sequence[str]) -> list[int] | None:
        """One output, whatever its name."""
        if len(labels) != 1:
            raise InputError(f"the model has {len(labels)} outputs ({', '.join(labels)}); a regression takes a model with one")
        return None

    def loss(self, outputs: Any, batch: Batch) -> torch.Tensor:
        """The squared error, a mean over the texts that have a score."""
        known = ~batch["labels"].isnan()
        return F.mse_loss(outputs.logits.float().squeeze(-1)[known], batch["labels"][known])

    def score(self, predictions: np.ndarray, split: SplitName) -> Quality:
        """Pearson's correlation of numbers, (texts, 1)."""
        truth, guess = self.targets[split].astype(np.float64), np.asarray(predictions, dtype=np.float64)[:, 0]
        return Quality(
            metric="pearson",
            value=float(pearson(_moments(guess, truth).sum(0))),
            ci95=bootstrap(_moments(guess, truth), pearson),
            n=len(truth),
            others={
                "spearman": float(pearson(_moments(rankdata(guess), rankdata(truth)).sum(0))),
                "mse": float(((guess - truth) ** 2).mean()),
            },
        )


def pearson(sums: np.ndarray) -> np.ndarray:
    """The correlation from sums of (1, x, y, x², y², x y), (..., 6) -> (...); 0 where one of the two does not vary."""
    n, x, y, xx, yy, xy = np.moveaxis(np.asarray(sums, dtype=np.float64), -1, 0)
    spread = np.maximum(n * xx - x * x, 0) * np.maximum(n * yy - y * y, 0)
    return np.asarray(np.where(spread > 1e-12 * n**4, (n * xy - x * y) / np.sqrt(np.maximum(spread, 1e-300)), 0.0))


def _moments(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """What each text adds to the sums; both are brought to mean 0 and variance 1 first, for precision."""
    x, y = ((values - values.mean()) / (values.std() or 1.0) for values in (x, y))
    return np.stack([np.ones_like(x), x, y, x * x, y * y, x * y], axis=1)
