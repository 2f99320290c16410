r"""Whether an export answers as torch does: both models' outputs for the same rows, compared by what they are.

    KL(torch ‖ export) = E Σ_i p_i (log p_i - log q_i)

E runs over texts; over tokens where each has a tag; over the starts and ends of every window where p is where an answer begins or
ends. Where a text may have several labels each is a yes or no of its own, and E runs over labels too. Of numbers it is the share of
their variance that the export does not explain, E (y - ŷ)² / Var y.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..core.reading import Reader, log_softmax
from ..core.sentences import HiddenTokens, torch_told

EXACT = 1e-4
"""Largest difference of an output that fp32 arithmetic in another order explains, relative to the largest output."""
DIVERGENCE = 0.05
"""Mean KL in nats, or share of the variance, above which an 8-bit export is refused: rounding gives a hundredth of it, a wrong
graph far more."""
SAME = 1e-6
"""The least variance of numbers that a difference is compared with."""
COLUMNS = ("input_ids", "attention_mask", "token_type_ids")
"""What an encoder may read."""


def torch_items(model: Any, reader: Reader, inputs: Sequence[Any], max_length: int) -> list[np.ndarray]:
    """The model's own outputs, row by row, as `as_items` has them; of it `module` and `tokenizer` are looked at."""
    import torch

    if isinstance(reader, HiddenTokens):
        from ._hidden import hidden_items

        return hidden_items(model.tokenizer, inputs, max_length, torch_told(model.module.eval()))
    found = []
    with torch.no_grad():
        for one in inputs:
            encoded = reader.encode(model.tokenizer, [one], max_length, "pt")
            for row, mask in enumerate(encoded["attention_mask"]):
                tokens = int(mask.sum())
                columns = {name: encoded[name][row : row + 1, :tokens] for name in encoded if name in COLUMNS}
                outputs = model.module.eval()(**takes(model.module, columns))
                found.append(as_items([outputs[name].float().numpy() for name in reader.outputs]))
    return found


def takes(module: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
    """What of a tokenizer's output a model takes: token types only where it tells them apart."""
    types = getattr(module.config, "type_vocab_size", 1) > 1 and module.config.model_type != "distilbert"
    return {name: value for name, value in batch.items() if name != "token_type_ids" or types}


def as_items(outputs: Sequence[np.ndarray]) -> np.ndarray:
    """The outputs for one row without padding as what a distribution, or a number, is made of, (items, classes).

    One of (1, classes) is a text's; one of (1, tokens, classes) has an item for each token; several of (1, tokens) are an item
    each, over the tokens.
    """
    if len(outputs) > 1:
        return np.concatenate(outputs)
    return outputs[0] if outputs[0].ndim == 2 else outputs[0][0]


def compare(kind: str, expected: Sequence[np.ndarray], found: Sequence[np.ndarray]) -> dict[str, Any]:
    """How far two lists of items are apart.

    Args:
        kind: `multi_label`, `regression`, or anything else for one class an item.
        expected, found: (items, classes) of every row, of torch and of the export.

    Returns:
        `max_difference`; `agreement`, the share of equal answers; `kl_nats`, and `worst_kl_nats` of a single item. Of numbers
        `unexplained_variance` takes the place of the last three.
    """
    difference = max(float(np.abs(e - f).max()) for e, f in zip(expected, found, strict=True))
    if kind == "regression":
        y, z = (np.concatenate(rows).astype(np.float64) for rows in (expected, found))
        return {"max_difference": difference, "unexplained_variance": float(((y - z) ** 2).mean() / max(y.var(), SAME))}
    measured = _binary if kind == "multi_label" else _categorical
    pairs = [measured(e, f) for e, f in zip(expected, found, strict=True)]
    same, divergence = (np.concatenate([pair[part] for pair in pairs]) for part in (0, 1))
    return {
        "max_difference": difference,
        "agreement": float(same.mean()),
        "kl_nats": float(divergence.mean()),
        "worst_kl_nats": float(divergence.max()),
    }


def problem(precision: str, parity: Mapping[str, Any], largest: float) -> str | None:
    """What is too far apart for this precision; None if nothing is.

    Args:
        precision: of the export.
        parity: what `compare` found.
        largest: the largest of torch's outputs.
    """
    allowed = EXACT * max(1.0, largest)
    if precision == "fp32" and not parity["max_difference"] <= allowed:
        return f"logits differ by {parity['max_difference']:.2g} (allowed {allowed:.2g})"
    if "unexplained_variance" in parity:
        share = parity["unexplained_variance"]
        return None if share <= DIVERGENCE else f"{share:.2g} of the numbers' variance is not explained (allowed {DIVERGENCE:g})"
    if not parity["kl_nats"] <= DIVERGENCE:
        return f"KL {parity['kl_nats']:.3g} nats (allowed {DIVERGENCE:g}), {100 * parity['agreement']:.0f} % of the answers agree"
    return None


def _categorical(expected: np.ndarray, found: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    log_p, log_q = log_softmax(expected.astype(np.float64)), log_softmax(found.astype(np.float64))
    return expected.argmax(1) == found.argmax(1), (np.exp(log_p) * (log_p - log_q)).sum(1)


def _binary(expected: np.ndarray, found: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    z, y = expected.astype(np.float64), found.astype(np.float64)
    yes, no = (np.logaddexp(0, sign * y) - np.logaddexp(0, sign * z) for sign in (-1, 1))
    share = np.exp(-np.logaddexp(0, -z))
    return ((z > 0) == (y > 0)).ravel(), (share * yes + (1 - share) * no).ravel()
