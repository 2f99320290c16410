r"""How fast a causal model writes: prefill and decode apart, the first token's time, each as a ratio of rounds taken in turns.

    prefill = tokens read / time to the first token          decode = tokens written behind the first / time from it to the last

The time to the first token is what one waits for: it includes the tokenizer. As many tokens as asked for are written, end or not.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

PROMPT, NEW = 128, 32
"""Tokens of a prompt at most, and tokens that are written behind it."""
SHORT = 1e-6
"""Seconds that writing takes at least, where the clock says otherwise."""


def _note(times: list[float], _: Any) -> None:
    times.append(time.perf_counter())


def pace(predictor: Any, ids: Sequence[int], new: int) -> tuple[float, float]:
    """Seconds from these tokens to the first one behind them, and for each behind that. They are an encoder-decoder's source.

    Args:
        predictor: of a model that writes.
        ids: tokens that leave room.
        new: tokens that are written, two or more, end or not.
    """
    if hasattr(predictor.reader, "scored"):  # an encoder-decoder, whose search knows no token before the last one
        first, whole = (predictor.generated_s(ids, count) for count in (1, new))
        return first, max(whole - first, SHORT) / (new - 1)
    from ._continue import writer_of
    from .core.writing import Decoding

    times: list[float] = []
    started = time.perf_counter()
    writer_of(predictor).continued([list(ids)], Decoding(max_new_tokens=new), partial(_note, times), forced=True)
    return times[0] - started, (times[-1] - times[0]) / (len(times) - 1)


def paces(predictor: Any, texts: Sequence[Any]) -> list[dict[str, float]]:
    """Time the model on prompts that are the beginnings of these texts.

    Returns:
        For each `prompt` and `new` tokens, `first_s` and `rest_s`, seconds to the first token and from it to the last. Texts with
        no token have none.
    """
    from ._continue import writer_of
    from .core.sentences import written
    from .core.writing import Decoding, prompt_of

    writer, found = writer_of(predictor), []
    for text in texts:
        plain = text if isinstance(text, str) else written(text, writer.tokenizer)
        times: list[float] = []
        started = time.perf_counter()
        ids = prompt_of(writer.tokenizer, plain)[: longest_prompt(writer.context)]
        if not ids:
            continue
        decoding = Decoding(max_new_tokens=NEW)
        writer.continued([ids], decoding, partial(_note, times), forced=True)
        seconds = {"first_s": times[0] - started, "rest_s": times[-1] - times[0]}
        found.append({"prompt": len(ids), "new": len(times), **seconds})
    return found


def longest_prompt(context: int) -> int:
    """Tokens of a prompt at most, for a model that reads so many: it writes behind it."""
    return min(PROMPT, max(context - NEW, context // 2))


def whole_times(found: Sequence[dict[str, float]]) -> list[float]:
    """Milliseconds from a text to the last token behind it, of what `paces` tells."""
    return [1e3 * (one["first_s"] + one["rest_s"]) for one in found]


def figures(
    rounds: Sequence[Sequence[dict[str, float]]], first: Sequence[Sequence[dict[str, float]]], ratio: Any
) -> dict[str, Any]:
    """What `metrics.json` has of it.

    Args:
        rounds: `paces` of every round, of this target.
        first: of the first target.
        ratio: (milliseconds of the first, of this) by rounds -> how many times faster, with an interval.
    """
    mine, others = _by_round(rounds), _by_round(first)
    if not len(mine):
        return {}
    return {
        "first_token_p50_ms": round(1e3 * float(np.median([one["first_s"] for some in rounds for one in some])), 3),
        "prefill_tokens_per_s": round(float(np.median(1 / mine[:, 0])), 1),
        "decode_tokens_per_s": round(float(np.median(1 / mine[:, 1])), 1),
        "prefill_ratio_to_first": ratio(others[:, 0], mine[:, 0]),
        "decode_ratio_to_first": ratio(others[:, 1], mine[:, 1]),
        "prompt_tokens": int(np.median([one["prompt"] for some in rounds for one in some])),
        "new_tokens": NEW,
    }


def _by_round(rounds: Sequence[Sequence[dict[str, float]]]) -> np.ndarray:
    """Seconds for a token read and for one written, (rounds, 2)."""
    rows = []
    for some in rounds:
        read, written = sum(one["prompt"] for one in some), sum(one["new"] - 1 for one in some)
        if read and written:
            rows.append((sum(one["first_s"] for one in some) / read, sum(one["rest_s"] for one in some) / written))
    return np.array(rows).reshape(-1, 2)
