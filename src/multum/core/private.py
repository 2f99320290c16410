r"""Training under differential privacy: DP-SGD (Abadi et al. 2016, arXiv:1607.00133, algorithm 1), by the library Opacus.

    g = 1/B ( Σ_{i ∈ batch} clip(∇ℓ_i, C) + N(0, σ² C² I) )        clip(v, C) = v min(1, C / ‖v‖)

Every example is in a batch with probability q = B/n, whatever the others are (Poisson sampling). AdamW takes g for the gradient.
What comes out is (ε, δ)-differentially private: with one example more or less among the n, no result becomes more probable than
e^ε times what it was, but for a probability of δ. σ is the smallest that keeps ε within the budget; ε is the upper bound of Opacus'
PRV accountant (Gopi et al. 2021, arXiv:2106.02848).

That holds of the weights if nothing else tells of single examples. So every loss is computed of one example alone, noise and
batches come from the system's own randomness and not from a seed that is written down, and no mean loss is reported.
"""

from __future__ import annotations

import contextlib
import functools
import os
import secrets
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import get_linear_schedule_with_warmup

from ..errors import InputError, MissingExtra, MultumError
from .memory import trim
from .per_example import PerExample, batch_of
from .reporting import remark, report

MOST_BYTES = 2**30
"""Of the gradients of single examples that are held at once."""
TRIM_EVERY = 50


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a training may tell of one example.

    `epsilon` and `delta` as above; without `delta`, a tenth of 1/n. `clip` is C, the norm that every example's gradient is cut to.
    """

    epsilon: float
    delta: float | None = None
    clip: float = 0.1


def budget_problems(epsilon: float | None, delta: float | None, clip: float, *, precision: str, checkpointing: bool) -> list[str]:
    """What is wrong with the fields of a private training, and with others beside them."""
    if epsilon is None:
        return [] if delta is None else ["dp_delta goes with dp_epsilon, which is not given"]
    problems = []
    if not 0 < epsilon < float("inf"):
        problems.append(f"dp_epsilon must be above 0 (got {epsilon}); 1 to 10 is usual")
    if delta is not None and not 0 < delta < 1:
        problems.append(f"dp_delta is a probability, above 0 and far below one by the number of examples (got {delta})")
    if not 0 < clip < float("inf"):
        problems.append(f"dp_clip must be above 0 (got {clip}); 0.1 to 1 is usual")
    if precision == "bf16":
        problems.append("precision: private training computes in fp32; leave it out")
    if checkpointing:
        problems.append(
            "checkpointing: Opacus cannot compute blocks again; give accumulate: a number that divides batch_size, instead"
        )
    return problems


def train_privately(
    module: nn.Module,
    rows: Sequence[Mapping[str, Any]],
    loss: Callable[..., torch.Tensor],
    budget: Budget,
    *,
    pad_token_id: int | None,
    epochs: float,
    steps: int | None,
    batch_size: int,
    at_once: int,
    warmup: float,
    after_step: Callable[[nn.Module], None],
    **adam: float,
) -> dict[str, Any]:
    """Train a module in place, so that what it becomes tells little of any one row.

    Args:
        module: whose parameters that take gradients are trained.
        rows: encoded examples, each the only one of its person or whatever else is protected.
        loss: (module, padded batch) -> scalar; it is asked of one example at a time.
        budget: what may be told.
        pad_token_id: of the tokenizer.
        epochs, steps: passes over `rows`, or optimizer steps in their place.
        batch_size: B, examples per step on average.
        at_once: of them computed at once, at most.
        warmup: share of all steps over which the learning rate rises.
        after_step: called with the module after every step.
        adam: `learning_rate` and `weight_decay`.

    Returns:
        `seconds`, and `privacy`: the ε that was spent, δ, σ, q, C, the steps.

    Raises:
        MissingExtra: Opacus is not installed.
        InputError: the budget is too small or δ too large for so few rows, or Opacus cannot handle a layer.
        MultumError: weights that are no longer numbers.
    """
    started, n = time.monotonic(), len(rows)
    q = min(1.0, batch_size / n)
    count = steps or max(1, round(epochs * n / batch_size))
    delta, sigma = _noise(budget, n, q, count)
    batches = _poisson(n, q, count)
    with PerExample(module, loss, lambda some: batch_of(some, pad_token_id, module)) as examples:
        examples.prove(_probe(rows))
        most = max(1, min(at_once, MOST_BYTES // (4 * sum(p.numel() for p in examples.trained))))
        optimizer = _optimizer(examples.trained, sigma=sigma, clip=budget.clip, expected=q * n, **adam)
        schedule = get_linear_schedule_with_warmup(optimizer.original_optimizer, round(warmup * count), count)
        for number, batch in enumerate(batches, 1):
            private_step(optimizer, examples, [rows[at] for at in batch], most)
            schedule.step()
            after_step(module)
            report(number / count)
            if number % TRIM_EVERY == 0:
                trim()
    if not all(bool(parameter.isfinite().all()) for parameter in module.parameters()):
        raise MultumError("training diverged: weights are no longer numbers; try a lower learning rate")
    module.eval()
    epsilon = round(epsilon_of(sigma, q, count, delta), 4)
    remark(
        f"differential privacy: ε = {epsilon:g} spent at δ = {delta:.2g}, by {count:,} steps of {100 * q:.3g} % of {n:,} examples"
    )
    spent = {"epsilon": epsilon, "delta": delta, "clip": budget.clip, "noise_multiplier": sigma}
    return {
        "seconds": round(time.monotonic() - started, 1),
        "privacy": spent | {"sample_rate": q, "steps": count, "accountant": "prv", "by": f"opacus {_opacus().__version__}"},
    }


def private_step(optimizer: Any, examples: PerExample, rows: Sequence[Mapping[str, Any]], at_once: int) -> None:
    """One step on one batch, in parts; on an empty batch it is noise alone.

    Args:
        optimizer: Opacus' `DPOptimizer`.
        examples: gives gradients of single examples.
        rows: the batch.
        at_once: rows in a part.
    """
    parts = [rows[start : start + at_once] for start in range(0, len(rows), at_once)] or [[]]
    for number, part in enumerate(parts, 1):
        optimizer.signal_skip_step(number < len(parts))
        examples.backward(part)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def epsilon_of(sigma: float, q: float, steps: int, delta: float) -> float:
    """ε of so many steps: an upper bound, by Opacus' PRV accountant."""
    accountant = _opacus().accountants.create_accountant("prv")
    accountant.history = [(sigma, q, steps)]
    with _accounting():
        return float(accountant.get_epsilon(delta))


def _noise(budget: Budget, n: int, q: float, steps: int) -> tuple[float, float]:
    """δ and σ.

    Raises:
        InputError: no σ is large enough, or δ is not below 1/n, so that it would allow to publish one whole example.
    """
    delta = 0.1 / n if budget.delta is None else budget.delta
    if delta >= 1 / n:
        raise InputError(f"dp_delta: {delta:g} would allow to publish one of {n:,} examples; it must be below {1 / n:.1g}")
    with _accounting():
        try:
            sigma = _least_noise(budget.epsilon, delta, q, steps)
        except (ValueError, RuntimeError) as error:
            raise InputError(
                f"dp_epsilon: no noise keeps ε within {budget.epsilon:g} for {steps:,} steps of {100 * q:.3g} % of {n:,} examples "
                f"({error}); give a larger one, fewer epochs or more examples"
            ) from error
    return delta, sigma


@functools.cache
def _least_noise(epsilon: float, delta: float, q: float, steps: int) -> float:
    """The smallest σ to within a hundredth of ε; takes seconds."""
    return float(
        _opacus().accountants.utils.get_noise_multiplier(
            target_epsilon=epsilon,
            target_delta=delta,
            sample_rate=q,
            steps=steps,
            accountant="prv",
            epsilon_tolerance=epsilon / 100,
        )
    )


@contextlib.contextmanager
def _accounting() -> Iterator[None]:
    """Without the warnings of a search that begins at extremes; its bounds hold there, too."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Optimal order")
        warnings.filterwarnings("ignore", "divide by zero", RuntimeWarning)
        yield


def _poisson(n: int, q: float, steps: int) -> Any:
    """Batches of row numbers."""
    from opacus.utils.uniform_sampler import UniformWithReplacementSampler

    return UniformWithReplacementSampler(num_samples=n, sample_rate=q, steps=steps, generator=_secret("cpu"))


def _optimizer(
    trained: Sequence[nn.Parameter], *, sigma: float, clip: float, expected: float, learning_rate: float, weight_decay: float
) -> Any:
    """AdamW on clipped and noised gradients; biases and the weights of norms do not decay."""
    from opacus.optimizers import DPOptimizer

    groups = [
        {"params": [p for p in trained if (p.dim() > 1) is decays], "weight_decay": weight_decay if decays else 0.0}
        for decays in (True, False)
    ]
    return DPOptimizer(
        torch.optim.AdamW([group for group in groups if group["params"]], lr=learning_rate),
        noise_multiplier=sigma,
        max_grad_norm=clip,
        expected_batch_size=expected,  # q n, which need not be whole
        generator=_secret(trained[0].device),
    )


def _secret(device: Any) -> torch.Generator:
    """Randomness that nobody can repeat: noise that can be made again can be taken off again."""
    return torch.Generator(device).manual_seed(secrets.randbits(63))


def _probe(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Three rows of unlike lengths, on which gradients are checked."""
    ordered = sorted(rows[:64], key=lambda row: len(row["input_ids"]))
    return [ordered[0], ordered[len(ordered) // 2], ordered[-1]]


def _opacus() -> Any:
    try:
        import opacus
        import opacus.accountants.utils
    except ImportError as error:
        raise MissingExtra("opacus", "dp") from error
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("dp_epsilon: private training runs in one process; start it without torchrun")
    return opacus
