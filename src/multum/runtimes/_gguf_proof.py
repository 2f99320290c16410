r"""Whether a GGUF file answers as torch does: on real texts, for every next token, and for what it writes.

    KL(torch ‖ llama.cpp) = Σ_v p(v) (log p(v) - log q(v))

for every token of every text, of which the mean and the worst case are kept, and in how many the most probable next token is the
same. What llama.cpp writes greedily goes through its cache of keys and values; torch reads it in one pass and says of every token
whether it would have been its own choice. By induction on the tokens, if all of them are, torch writes the same text.

Its tokenizer must make the same tokens of the texts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core.sentences import written
from ..core.windows import specials
from ..core.writing import Decoding, chosen, prompt_of
from ..errors import InputError, ParityError
from ._llama import Session

if TYPE_CHECKING:
    from ..core.model import Model

TEXTS, TOKENS = 12, 256
"""Texts that are read, and tokens of each, at most."""
PROMPTS, PROMPT, NEW = 4, 32, 24
"""Prompts that are continued, the tokens of one, and those that are written, at most."""
DIVERGENCE = {"f32": 1e-5, "f16": 1e-3, "q8_0": 0.05, "q4_k": 0.5, "q4_0": 0.5}
"""Mean KL in nats above which an export is refused: rounding gives a small part of it, a wrong graph several nats."""
FREE = ("f32", "f16")
"""Precisions whose greedy texts must be torch's, but where two tokens are as probable as rounding can tell."""


@dataclass
class _Sums:
    kl: list[np.ndarray]
    same: list[np.ndarray]
    largest: float = 0.0
    nll: float = 0.0
    torch_nll: float = 0.0
    tokens: int = 0
    worst: float = -1.0
    where: dict[str, Any] | None = None


def prove(
    model: Model, file: Path, precision: str, texts: Sequence[Any], context: int, threads: int, *, extra: bool = True
) -> dict[str, Any]:
    """Compare a GGUF file with the model that it was made from.

    Args:
        model: in torch.
        file: what was written.
        precision: of it.
        texts: real ones, or chats.
        context: tokens that are read at most.
        threads: for llama.cpp.
        extra: with all its kernels.

    Returns:
        `texts`, `tokens`, `agreement` of the most probable next tokens, `kl_nats` and `worst_kl_nats` with `worst` (what was read
        there and what both say), `max_difference` of a logit, `perplexity` and that in torch, `written` tokens and how many of them
        are torch's choice, as `written_agreement`.

    Raises:
        InputError: no text to compare on.
        ParityError: it reads texts in other tokens, or its answers differ by more than the precision explains.
    """
    rows = [(text, prompt_of(model.tokenizer, text)[: min(TOKENS, context)]) for text in texts[:TEXTS] if isinstance(text, str)]
    rows += [(text, _chat(model.tokenizer, text)[: min(TOKENS, context)]) for text in texts[:TEXTS] if not isinstance(text, str)]
    rows = [(text, ids) for text, ids in rows if len(ids) > 1]
    if not rows:
        raise InputError("no text of the validation split has two tokens; there is nothing to prove the export on")
    session, torch_logits = Session(file, threads, exact=precision == "f32", extra=extra), _torch(model)
    _same_tokens(model.tokenizer, session, [text for text, _ in rows])
    sums = _Sums([], [])
    for _, ids in rows:
        _compare(sums, model.tokenizer, ids, torch_logits(ids), session)
    kl, same = np.concatenate(sums.kl), np.concatenate(sums.same)
    facts: dict[str, Any] = {
        "texts": len(rows),
        "tokens": len(kl),
        "agreement": float(same.mean()),
        "kl_nats": float(kl.mean()),
        "worst_kl_nats": sums.worst,
        "worst": sums.where,
        "max_difference": sums.largest,
        "perplexity": float(np.exp(sums.nll / sums.tokens)),
        "torch_perplexity": float(np.exp(sums.torch_nll / sums.tokens)),
    }
    what = f"the llamacpp {precision} export answers differently"
    if not facts["kl_nats"] <= DIVERGENCE[precision]:
        allowed, agreed = DIVERGENCE[precision], 100 * facts["agreement"]
        raise ParityError(f"{what}: KL {facts['kl_nats']:.3g} nats (allowed {allowed:g}), {agreed:.0f} % of the next tokens agree")
    count, agreed, gap = _write(session, torch_logits, [ids for _, ids in rows[:PROMPTS]], context)
    if precision in FREE and gap > 2 * sums.largest + 1e-4:
        raise ParityError(f"{what}: it writes a token {gap:.2g} below torch's choice, and logits differ by {sums.largest:.2g}")
    return facts | {"written": count, "written_agreement": agreed / count}


def _chat(tokenizer: Any, chat: Any) -> list[int]:
    return list(tokenizer(written(chat, tokenizer), add_special_tokens=False, verbose=False)["input_ids"])


def _torch(model: Model) -> Callable[[Sequence[int]], np.ndarray]:
    """Tokens -> logits behind each, (tokens, vocabulary) float32."""
    import torch

    def logits(ids: Sequence[int]) -> np.ndarray:
        with torch.no_grad():
            row = torch.tensor([list(ids)], device=next(model.module.parameters()).device)
            found: np.ndarray = model.module.eval()(input_ids=row, use_cache=False).logits[0].float().cpu().numpy()
            return found

    return logits


def _same_tokens(tokenizer: Any, session: Session, texts: Sequence[Any]) -> None:
    before, behind = specials(tokenizer)
    for text in texts:
        if not isinstance(text, str):
            continue  # of chats the templates are compared where they are used
        ours = [*before, *tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], *behind]
        if ours != (theirs := session.tokens(text)):
            pairs = enumerate(zip(ours, theirs, strict=False))
            at = next((i for i, (one, other) in pairs if one != other), min(len(ours), len(theirs)))
            first, second = (tokenizer.convert_ids_to_tokens(ids[at : at + 3]) for ids in (ours, theirs))
            raise ParityError(
                f"llama.cpp cuts texts into other tokens than the model's tokenizer: {second} where that has {first}, behind "
                f"{tokenizer.decode(ours[max(at - 8, 0) : at])!r}"
            )


def _compare(sums: _Sums, tokenizer: Any, ids: Sequence[int], expected: np.ndarray, session: Session) -> None:
    """Add one text, piece by piece."""
    start = 0
    for found in session.rows(ids):
        ours = expected[start : start + len(found), : session.size].astype(np.float64)
        theirs = found[:, : ours.shape[1]].astype(np.float64)
        log_p, log_q = _log_softmax(ours), _log_softmax(theirs)
        kl = (np.exp(log_p) * (log_p - log_q)).sum(1)
        sums.kl.append(kl)
        sums.same.append(ours.argmax(1) == theirs.argmax(1))
        sums.largest = max(sums.largest, float(np.abs(ours - theirs).max()))
        following = np.asarray(ids[start + 1 : start + len(found) + 1])
        places = np.arange(len(following))
        sums.torch_nll -= float(log_p[places, following].sum())
        sums.nll -= float(log_q[places, following].sum())
        sums.tokens += len(following)
        if kl.max() > sums.worst:
            at = int(kl.argmax())
            read = tokenizer.decode(ids[max(start + at - 12, 0) : start + at + 1])
            says = [tokenizer.decode([int(values[at].argmax())]) for values in (ours, theirs)]
            sums.worst, sums.where = float(kl[at]), {"behind": read, "torch": says[0], "llamacpp": says[1]}
        start += len(found)


def _write(
    session: Session, torch_logits: Callable[[Sequence[int]], np.ndarray], rows: Sequence[Sequence[int]], context: int
) -> tuple[int, int, float]:
    """Tokens written, those that torch would choose, and the largest distance of another one's logit from torch's choice."""
    count, agreed, gap = 0, 0, 0.0
    rng = np.random.default_rng(0)  # nothing is drawn
    for row in rows:
        ids = list(row[: max(min(PROMPT, len(row) // 2), 1)])
        new = min(NEW, context - len(ids))
        logits, whole = session.first(ids, new), list(ids)
        for number in range(new):
            whole.append(chosen(logits, Decoding(), rng)[0])
            if number + 1 < new:
                logits = session.next(whole[-1])
        expected = torch_logits(whole)[len(ids) - 1 : -1]
        tokens = np.asarray(whole[len(ids) :])
        short = expected.max(1) - expected[np.arange(len(tokens)), tokens]
        count, agreed, gap = count + len(tokens), agreed + int((short == 0).sum()), max(gap, float(short.max()))
    return count, agreed, gap


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(1, keepdims=True)))
