"""What a run is asked for, and how much work it may put into it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from .errors import InputError


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What the chosen model must keep to, on the validation split. Limits that are None do not count."""

    max_drop: float = 1.0
    """In the task's unit: points for accuracy, BLEU and ROUGE, per cent of perplexity."""
    max_latency_ms: float | None = None
    max_size_bytes: int | None = None
    min_speedup: float | None = None
    """Against the original in torch, fp32."""

    def __post_init__(self) -> None:
        problems = [f"max_drop cannot be negative (got {self.max_drop:g})"] if not self.max_drop >= 0 else []
        for name in ("max_latency_ms", "max_size_bytes", "min_speedup"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                problems.append(f"{name} must be above 0 (got {value:g})")
        if problems:
            raise InputError(*problems)

    def excess(self, candidate: Mapping[str, Any]) -> float:
        """The worst factor by which a candidate misses a limit on its speed or size; at most 1 where it keeps all of them."""
        metrics, factors = candidate["validation"], [0.0]
        if self.max_latency_ms is not None:
            factors.append(metrics["speed"]["p50_ms"] / self.max_latency_ms)
        if self.max_size_bytes is not None:
            factors.append(metrics["size"]["bytes_on_disk"] / self.max_size_bytes)
        if self.min_speedup is not None:
            factors.append(self.min_speedup / candidate["speedup"])
        return float(max(factors))

    def broken(self, candidate: Mapping[str, Any]) -> list[str]:
        """The limits that a candidate of `run.json` misses, each in words."""
        metrics = candidate["validation"]
        latency, size = metrics["speed"]["p50_ms"], metrics["size"]["bytes_on_disk"]
        problems = []
        if candidate["drop"] > self.max_drop:
            problems.append(f"drop {candidate['drop']:.2f} is above {self.max_drop:g}")
        if self.max_latency_ms is not None and latency > self.max_latency_ms:
            problems.append(f"latency {latency:.3g} ms is above {self.max_latency_ms:g} ms")
        if self.max_size_bytes is not None and size > self.max_size_bytes:
            problems.append(f"size {size / 1e6:.3g} MB is above {self.max_size_bytes / 1e6:g} MB")
        if self.min_speedup is not None and candidate["speedup"] < self.min_speedup:
            problems.append(f"speed-up {candidate['speedup']:.3g}x is below {self.min_speedup:g}x")
        return problems


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How much training and measuring a run does."""

    finetune: Mapping[str, Any]
    distill: Mapping[str, Any]
    prune: Mapping[str, Any]
    rounds: int
    """Of every measurement."""
    teach_below: float
    """Rungs above this share of the original's predicted latency are repaired in closed form only: teaching them is dear, and
    what they lack is taught further down. If the first taught rung fails, the walk goes back up and teaches those above."""
    retry: int
    """How many more times a rung that dropped too much is taught, as long as each lessens the drop; 0 for not at all."""
    brief: bool = False
    """The walk ends with its first half step, and with the first rung that misses the drop, by however little: what the rungs below
    would take is spent on those above."""
    texts_per_round: int = 50
    """Of every measurement: texts that are timed one by one. Few where an answer is a text, which takes long to write."""


FULL = Effort(
    finetune={"epochs": 4, "learning_rate": 1e-4},
    distill={"epochs": 1, "augment": 8},
    prune={"samples": 1024},
    rounds=30,
    teach_below=0.5,
    retry=4,
)
QUICK = Effort(
    finetune={"epochs": 2, "learning_rate": 1e-4},
    distill={"epochs": 1, "augment": 2},
    prune={"samples": 256},
    rounds=12,
    teach_below=0.6,
    retry=0,
    brief=True,
)
LANGUAGE = Effort(
    finetune={"epochs": 1, "learning_rate": 1e-4, "batch_size": 8},
    distill={"epochs": 2, "learning_rate": 1e-4, "batch_size": 4, "alpha": 0.9},
    prune={"samples": 16},
    rounds=20,
    teach_below=1.0,
    retry=2,
    texts_per_round=3,
)
"""For causal language models, whose training texts are blocks of hundreds of tokens."""
LANGUAGE_QUICK = replace(LANGUAGE, distill={**LANGUAGE.distill, "epochs": 0.5}, prune={"samples": 4}, rounds=8, retry=0, brief=True)
TRANSLATORS = Effort(
    finetune={"epochs": 10, "learning_rate": 7e-4, "batch_size": 64},
    distill={"beams": 4, "epochs": 3, "learning_rate": 5e-4, "batch_size": 64},
    prune={"samples": 256},
    rounds=20,
    teach_below=1.0,
    retry=2,
    texts_per_round=10,
)
"""For encoder-decoders: the teacher writes every training text once, whatever the rungs."""
TRANSLATORS_QUICK = replace(
    TRANSLATORS,
    finetune={**TRANSLATORS.finetune, "epochs": 3},
    distill={**TRANSLATORS.distill, "beams": 2, "epochs": 1},
    rounds=8,
    retry=0,
    brief=True,
)
