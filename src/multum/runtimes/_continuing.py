"""Causal models that any runtime executes: tokens in, logits out, one text at a time. Likelihoods, and texts that are continued."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from tokenizers import Tokenizer

from ..core.folders import read_json
from ..core.reading import reader_for, together
from ..core.sentences import Text, sums
from ..core.windows import windows
from ..core.writing import Decoding, chosen
from ._chat import ChatTokenizer, template_of
from ._folder import TOKENIZER
from ._predictor import Rows

if TYPE_CHECKING:
    from ..core.model import Model

CONTEXT = 4096
"""Tokens that are read at most, unless the model reads fewer: the cache of keys and values has room for all of them."""


class Session(Protocol):
    """A causal model with its cache of keys and values."""

    def use(self, threads: int) -> None:
        """Run on so many threads from now on."""
        ...

    def rows(self, ids: Sequence[int]) -> Iterator[np.ndarray]:
        """Logits behind every token of a text, in pieces, (rows, vocabulary) float32."""
        ...

    def first(self, ids: Sequence[int], room: int) -> np.ndarray:
        """Logits behind a text's last token, (vocabulary,), and room for so many more tokens."""
        ...

    def next(self, token: int) -> np.ndarray:
        """Logits behind one more token, (vocabulary,)."""
        ...


def facts_of(model: Model, context: int) -> dict[str, Any]:
    """What the manifest of a causal model says of it, beside its tokenizer: tokens that it reads at most, those that end a text."""
    from ..core.likelihood import context_of
    from ..core.writing import TorchWriter

    context = min(context, context_of(model.module, model.tokenizer))
    special = {name: text for name, text in model.tokenizer.special_tokens_map.items() if isinstance(text, str)}
    ends = TorchWriter(model.module, model.tokenizer).ends()
    facts = {"context": context, "max_length": min(context, CONTEXT), "pairs": False}
    return facts | {"end_token_ids": ends, "special_tokens": special, "chat_template": template_of(model.tokenizer)}


class ContinuingPredictor(Rows):
    """Answers of a causal model's export, and what it writes. Texts are read one at a time.

    Args:
        folder: the export folder.
        manifest: its `runtime.json`.
        session: what executes it.
        files: what is needed to run it.
        threads: that it runs on.
    """

    at_once = 1

    def __init__(self, folder: Path, manifest: Mapping[str, Any], session: Session, files: Sequence[Path], threads: int) -> None:
        self.reader: Any = reader_for(manifest.get("config") or {}, str(folder))
        self.labels: list[str] = list(manifest["labels"])
        self.runtime, self.precision = str(manifest["runtime"]), str(manifest["precision"])
        self.threads, self.files = threads, list(files)
        self.max_length = self.context = int(manifest["max_length"])
        self._ends = [int(token) for token in manifest["end_token_ids"]]
        read_json(folder / TOKENIZER)  # tokenizers itself has no word for a damaged file but a bare Exception
        pad, template = manifest.get("pad_token_id"), manifest.get("chat_template")
        tokenizer, special = Tokenizer.from_file(str(folder / TOKENIZER)), manifest.get("special_tokens") or {}
        self.tokenizer = ChatTokenizer(tokenizer, 0 if pad is None else int(pad), template, special)
        self.session = session

    def use(self, threads: int) -> None:
        """Run on so many threads from now on."""
        self.threads = threads
        self.session.use(threads)

    def predict(self, inputs: Sequence[Text], batch_size: int = 32) -> np.ndarray:
        """For each text -Σ log p, scored tokens and bytes of every window, (texts, windows, 3) float32, padded with nan."""
        if not inputs:
            return np.empty((0, 0, 3), dtype=np.float32)
        return together(sums(self.tokenizer, inputs, self.context, self._log_probs))

    def continued(
        self, rows: Sequence[list[int]], decoding: Decoding, on_token: Callable[[int], None] | None = None, *, forced: bool = False
    ) -> list[tuple[list[int], float]]:
        """As `core.writing.Writer` has it."""
        rng, found = np.random.default_rng(decoding.seed), []
        for ids in rows:
            room = min(decoding.max_new_tokens, self.context - len(ids))
            logits, new, total = self.session.first(ids, room), list[int](), 0.0
            while True:
                token, log = chosen(logits, decoding, rng)
                new.append(token)
                total += log
                if on_token:
                    on_token(token)
                if len(new) == room or (token in self._ends and not forced):
                    break
                logits = self.session.next(token)
            found.append((new, float("nan") if forced else total))
        return found

    def _log_probs(self, rows: Sequence[Sequence[int]], size: int, stride: int) -> list[np.ndarray]:
        """log p of every token of a row but its first, as `core.likelihood.causal_log_probs` tells it."""
        return [self._of_row(list(ids), size, stride) for ids in rows]

    def _of_row(self, ids: list[int], size: int, stride: int) -> np.ndarray:
        values = np.zeros(len(ids) - 1)
        for window in windows(len(ids), size, stride) if len(ids) > 1 else []:
            place, end = window.start, window.end
            for logits in self.session.rows(ids[place:end]):
                first, last = max(place, window.first - 1), min(place + len(logits), end - 1)
                if first < last:
                    some = logits[first - place : last - place].astype(np.float64)
                    some -= some.max(1, keepdims=True)
                    picked = some[np.arange(last - first), ids[first + 1 : last + 1]]
                    values[first:last] = picked - np.log(np.exp(some).sum(1))
                place += len(logits)
        return values
