r"""Whether an export that writes answers as torch does: on real texts, for every next token, and for what it writes.

    KL(torch ‖ export) = Σ_v p(v) (log p(v) - log q(v))

for every token of every text, of which the mean and the worst case are kept, and in how many the most probable next token is the
same. The tokens of an encoder-decoder are those of the texts that torch writes for the sources.

What a causal model writes greedily goes through its cache of keys and values; torch reads it in one pass and says of every token
whether it would have been its own choice. By induction on the tokens, if all of them are, torch writes the same text. What an
encoder-decoder writes must be the text that torch writes, or as probable by torch's account where rounding decides between two.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ..core.reading import log_softmax
from ..core.sentences import written
from ..core.writing import Decoding, chosen, prompt_of, up_to_end
from ..errors import InputError, ParityError
from ._continuing import Session
from ._parity import EXACT

if TYPE_CHECKING:
    from ..core.model import Model

TEXTS, TOKENS = 12, 256
"""Texts that are read, and tokens of each, at most."""
PROMPTS, PROMPT, NEW = 4, 32, 24
"""Prompts that are continued, the tokens of one, and those that are written, at most."""
DIVERGENCE = {"f32": 1e-5, "fp32": 1e-5, "f16": 1e-3, "bf16": 0.05, "int8": 0.05, "q8_0": 0.05}
DIVERGENCE |= dict.fromkeys(("int4", "q4_k", "q4_0", "q4_1"), 0.5)
"""Mean KL in nats above which an export is refused: rounding gives a small part of it, a wrong graph several nats."""
FREE = ("f32", "fp32", "f16")
"""Precisions whose texts must be torch's, but where two tokens are as probable as rounding can tell."""


class Translator(Protocol):
    """An encoder-decoder's export, as far as it is proved."""

    tokenizer: Any

    def logits(self, source: str, ids: Sequence[int]) -> np.ndarray:
        """Logits behind every token that the decoder reads, its start first: (tokens, vocabulary)."""
        ...

    def write(self, sources: Sequence[str]) -> list[list[int]]:
        """What it writes for each."""
        ...


@dataclass
class Tally:
    """What both say of the next token, token by token.

    Args:
        runtime, precision: of the export.
    """

    runtime: str
    precision: str
    kl: list[np.ndarray] = field(default_factory=list)
    same: list[np.ndarray] = field(default_factory=list)
    largest: float = 0.0
    scale: float = 1.0
    nll: float = 0.0
    torch_nll: float = 0.0
    tokens: int = 0
    worst: float = -1.0
    where: dict[str, Any] | None = None

    @property
    def what(self) -> str:
        """How an error begins."""
        return f"the {self.runtime} {self.precision} export answers differently"

    def add(self, expected: np.ndarray, found: np.ndarray, ids: Sequence[int], following: Sequence[int], tokenizer: Any) -> None:
        """Logits behind every token of a text, (tokens, vocabulary) both; the tokens, and those that come next."""
        ours, theirs = (values[:, : min(expected.shape[1], found.shape[1])].astype(np.float64) for values in (expected, found))
        log_p, log_q = log_softmax(ours), log_softmax(theirs)
        kl = (np.exp(log_p) * (log_p - log_q)).sum(1)
        self.kl.append(kl)
        self.same.append(ours.argmax(1) == theirs.argmax(1))
        self.largest = max(self.largest, float(np.abs(ours - theirs).max()))
        self.scale = max(self.scale, float(np.abs(ours).max()))
        places, tokens = np.arange(len(following)), np.asarray(following, dtype=np.int64)
        self.torch_nll -= float(log_p[places, tokens].sum())
        self.nll -= float(log_q[places, tokens].sum())
        self.tokens += len(following)
        if kl.max() > self.worst:
            at = int(kl.argmax())
            says = [tokenizer.decode([int(values[at].argmax())]) for values in (ours, theirs)]
            read = tokenizer.decode(list(ids[max(at - 12, 0) : at + 1]))
            self.worst, self.where = float(kl[at]), {"behind": read, "torch": says[0], self.runtime: says[1]}

    def facts(self, texts: int, *, exactly: bool = False) -> dict[str, Any]:
        """How far they are apart.

        Args:
            texts: how many were read.
            exactly: fp32 logits may differ by no more than another order of the same sums explains.

        Raises:
            ParityError: by more than the precision explains.
        """
        kl, same = np.concatenate(self.kl), np.concatenate(self.same)
        if not kl.mean() <= DIVERGENCE[self.precision]:
            agreed = f"{100 * same.mean():.0f} % of the next tokens agree"
            raise ParityError(f"{self.what}: KL {kl.mean():.3g} nats (allowed {DIVERGENCE[self.precision]:g}), {agreed}")
        if exactly and self.precision == "fp32" and not self.largest <= EXACT * self.scale:
            raise ParityError(f"{self.what}: logits differ by {self.largest:.2g} (allowed {EXACT * self.scale:.2g})")
        return {
            "texts": texts,
            "tokens": len(kl),
            "agreement": float(same.mean()),
            "kl_nats": float(kl.mean()),
            "worst_kl_nats": self.worst,
            "worst": self.where,
            "max_difference": self.largest,
            "perplexity": float(np.exp(self.nll / self.tokens)),
            "torch_perplexity": float(np.exp(self.torch_nll / self.tokens)),
        }


def prove(
    model: Model, session: Session, runtime: str, precision: str, texts: Sequence[Any], context: int, *, exactly: bool = False
) -> dict[str, Any]:
    """Compare an export of a causal model with the model that it was made from.

    Args:
        model: in torch.
        session: the export, opened.
        runtime, precision: of it.
        texts: real ones, or chats.
        context: tokens that are read at most.
        exactly: as `Tally.facts` takes it.

    Returns:
        `texts`, `tokens`, `agreement` of the most probable next tokens, `kl_nats` and `worst_kl_nats` with `worst` (what was read
        there and what both say), `max_difference` of a logit, `perplexity` and that in torch, `written` tokens and how many of them
        are torch's choice, as `written_agreement`.

    Raises:
        InputError: no text to compare on.
        ParityError: its answers differ by more than the precision explains.
    """
    rows = [ids for text in texts[:TEXTS] if len(ids := _tokens(model.tokenizer, text)[: min(TOKENS, context)]) > 1]
    if not rows:
        raise InputError("no text of the validation split has two tokens; there is nothing to prove the export on")
    tally, torch_logits = Tally(runtime, precision), _torch(model)
    for ids in rows:
        expected, start = torch_logits(ids), 0
        for found in session.rows(ids):
            part = slice(start, start + len(found))
            tally.add(expected[part], found, ids[: part.stop], ids[start + 1 : part.stop + 1], model.tokenizer)
            start += len(found)
    facts = tally.facts(len(rows), exactly=exactly)
    count, agreed, gap = _write(session, torch_logits, rows[:PROMPTS], context)
    if precision in FREE and gap > 2 * tally.largest + 1e-4:
        raise ParityError(
            f"{tally.what}: it writes a token {gap:.2g} below torch's choice, and logits differ by {tally.largest:.2g}"
        )
    return facts | {"written": count, "written_agreement": agreed / count}


def prove_translator(model: Model, translator: Translator, runtime: str, precision: str, sources: Sequence[str]) -> dict[str, Any]:
    """The same for an encoder-decoder.

    Args:
        model: in torch.
        translator: the export, opened.
        runtime, precision: of it.
        sources: real ones.

    Returns:
        As `prove` has it; `written` are texts, and `written_agreement` is how many are torch's to the token.

    Raises:
        InputError: no source.
        ParityError: it answers differently.
    """
    import torch

    from ..core.generation import Writing, prefix_of
    from ..core.reading import token_limit
    from ._search import search_of

    sources, module = list(sources[:TEXTS]), model.module.eval()
    if not sources:
        raise InputError("the validation split has no source; there is nothing to prove the export on")
    tally, how = Tally(runtime, precision), search_of(module)
    reader, limit = Writing(prefix_of(module.config)), token_limit(module.config, model.tokenizer)

    def logits(batch: Any, ids: Sequence[int]) -> np.ndarray:
        found: np.ndarray = module(**batch, decoder_input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0].numpy()
        return found

    equal, theirs = 0, translator.write(sources)
    with torch.no_grad():
        for source, text in zip(sources, theirs, strict=True):
            encoded = reader.encode(model.tokenizer, [source], limit, "pt")
            batch = {name: encoded[name] for name in ("input_ids", "attention_mask")}
            ours = up_to_end(module.generate(**batch, use_cache=True, return_dict_in_generate=False)[0, 1:].tolist(), how.ends)
            ids = [how.start, *ours[:-1]]
            expected = logits(batch, ids)
            tally.add(expected, translator.logits(source, ids), ids, ours, translator.tokenizer)
            equal += text == ours
            if text != ours and precision in FREE:
                _as_probable(tally, ours, text, partial(logits, batch), how)
    return tally.facts(len(sources), exactly=True) | {"written": len(sources), "written_agreement": equal / len(sources)}


def _as_probable(
    tally: Tally, ours: Sequence[int], theirs: Sequence[int], logits: Callable[[Sequence[int]], np.ndarray], how: Any
) -> None:
    """Two texts may differ where one search step had two next to equal: of greedy ones a token, of beams the whole text's score."""

    def rows(text: Sequence[int]) -> list[np.ndarray]:
        """What the search makes of the logits behind every token."""
        ids, found = np.array([[how.start, *text]]), logits([how.start, *text[:-1]]).astype(np.float64)
        found = found if how.beams == 1 else log_softmax(found)
        return [how.adjusted(found[at : at + 1], ids[:, : at + 1])[0] for at in range(len(text))]

    if how.beams == 1:
        at = next(place for place, (one, other) in enumerate(zip(ours, theirs, strict=False)) if one != other)
        row = rows(ours)[at]
        gap = abs(float(row[ours[at]] - row[theirs[at]]))
    else:
        one, other = (
            sum(float(row[token]) for row, token in zip(rows(text), text, strict=True)) / len(text) ** how.length_penalty
            for text in (ours, theirs)
        )
        gap = abs(one - other)
    if gap > 2 * tally.largest + EXACT:
        raise ParityError(f"{tally.what}: it writes another text than torch, and {gap:.2g} is more than rounding")


def _tokens(tokenizer: Any, text: Any) -> list[int]:
    if isinstance(text, str):
        return prompt_of(tokenizer, text)
    return list(tokenizer(written(text, tokenizer), add_special_tokens=False, verbose=False)["input_ids"])


def _torch(model: Model) -> Callable[[Sequence[int]], np.ndarray]:
    """Tokens -> logits behind each, (tokens, vocabulary) float32."""
    import torch

    def logits(ids: Sequence[int]) -> np.ndarray:
        with torch.no_grad():
            row = torch.tensor([list(ids)], device=next(model.module.parameters()).device)
            found: np.ndarray = model.module.eval()(input_ids=row, use_cache=False).logits[0].float().cpu().numpy()
            return found

    return logits


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
