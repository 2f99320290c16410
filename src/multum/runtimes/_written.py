"""Encoder-decoders as exported graphs: sources in, texts out, searched for as the model's generation settings say. No torch."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import Tokenizer

from ..core.folders import read_json
from ..core.generation import Written, as_numbers, settings_of
from ..core.reading import log_softmax, reader_for, together
from ._chat import ChatTokenizer
from ._continuing import ContinuingPredictor
from ._decoder import DECODER, ENCODER, Decoder, Graph, GraphSession
from ._folder import MANIFEST, TOKENIZER
from ._predictor import Rows, cores
from ._search import Search, search, search_of

if TYPE_CHECKING:
    from ..core.model import Model

AT_ONCE = 8
"""Sources that are read side by side: on a processor more are no faster, and the longest text keeps all waiting."""


def facts_of(model: Model, max_length: int) -> dict[str, Any]:
    """What the manifest of an encoder-decoder says of it: how it searches, and what of its settings is recorded.

    Raises:
        InputError: settings that only torch knows.
    """
    return {
        "search": asdict(search_of(model.module)),
        "generation": settings_of(model.module),
        "max_length": max_length,
        "pairs": False,
    }


def open_writer(
    folder: Path, manifest: Mapping[str, Any], load: Callable[[str, int], Graph], suffixes: Sequence[str], threads: int | None
) -> Any:
    """The predictor for the export folder of a model that writes.

    Args:
        folder: the export folder.
        manifest: its `runtime.json`.
        load: makes a graph ready to be executed on so many threads, by its name.
        suffixes: of the files of a graph.
        threads: to run on; by default all cores, or `OMP_NUM_THREADS`.
    """
    threads = threads or cores()
    files = [folder / f"{name}{suffix}" for name in manifest["graphs"] for suffix in suffixes]
    files += [folder / TOKENIZER, folder / MANIFEST]
    if ENCODER in manifest["graphs"]:
        return WritingPredictor(folder, manifest, load, files, threads)
    session = GraphSession(partial(load, DECODER), manifest["cache"], threads)
    return ContinuingPredictor(folder, manifest, session, files, threads)


class WritingPredictor(Rows):
    """What an encoder-decoder's export writes.

    Args:
        folder: the export folder.
        manifest: its `runtime.json`.
        load: makes a graph ready to be executed on so many threads, by its name.
        files: what is needed to run it.
        threads: to run on.
    """

    def __init__(
        self, folder: Path, manifest: Mapping[str, Any], load: Callable[[str, int], Graph], files: Sequence[Path], threads: int
    ) -> None:
        self.reader: Any = reader_for(manifest.get("config") or {}, str(folder))
        self.labels: list[str] = list(manifest["labels"])
        self.runtime, self.precision = str(manifest["runtime"]), str(manifest["precision"])
        self.generation: dict[str, Any] = dict(manifest["generation"])
        self.max_length, self.files = int(manifest["max_length"]), list(files)
        told: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in manifest["search"].items()
        }
        self.how = Search(**told)
        read_json(folder / TOKENIZER)  # tokenizers itself has no word for a damaged file but a bare Exception
        self.tokenizer = ChatTokenizer(Tokenizer.from_file(str(folder / TOKENIZER)), int(manifest["pad_token_id"]), None, {})
        self._load, self._shapes, self.threads = load, manifest["cache"], 0
        self.use(threads)

    def use(self, threads: int) -> None:
        """Run on so many threads from now on."""
        if threads != self.threads:
            self.threads, self._encoder = threads, self._load(ENCODER, threads)
            self._decoder = Decoder(self._load(DECODER, threads), self._shapes)

    def predict(self, inputs: Sequence[str], batch_size: int = AT_ONCE) -> np.ndarray:
        """Score, tokens and code points of each text, (inputs, 2 + characters) float32, padded with nan."""
        if not inputs:
            return np.empty((0, 2), dtype=np.float32)
        parts: list[Any] = [None] * len(inputs)
        order = sorted(range(len(inputs)), key=lambda i: len(inputs[i]))
        size = min(batch_size, AT_ONCE)
        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            found = self.write([inputs[i] for i in chosen])
            scores = self._scores(found) if self.reader.scored else [float("nan")] * len(found)
            for place, ids, score in zip(chosen, found, scores, strict=True):
                text = self.tokenizer.decode(ids, skip_special_tokens=True).strip()
                parts[place] = as_numbers(Written(text, len(ids), score))
        return together(parts)

    def write(self, sources: Sequence[str]) -> list[list[int]]:
        """The tokens of the texts for one batch of sources."""
        return self._search(self._rows(sources), self.how)

    def logits(self, source: str, ids: Sequence[int]) -> np.ndarray:
        """Logits behind every token that the decoder reads, its start first: (tokens, vocabulary)."""
        self._read(self._rows([source]))
        found: np.ndarray = self._behind(np.array([ids], dtype=np.int64))[0]
        return found

    def generated_s(self, ids: Sequence[int], new: int) -> float:
        """Seconds in which it writes so many tokens for a source of these, end or not."""
        row, started = np.array([list(ids)], dtype=np.int64), time.perf_counter()
        self._search({"input_ids": row, "attention_mask": np.ones_like(row)}, self.how.of(new))
        return time.perf_counter() - started

    def _rows(self, sources: Sequence[str]) -> dict[str, np.ndarray]:
        encoded = self.reader.encode(self.tokenizer, sources, self.max_length, "np")
        return {name: encoded[name] for name in ("input_ids", "attention_mask")}

    def _read(self, rows: dict[str, np.ndarray]) -> None:
        """The sources; what the decoder sees of them stays."""
        self._source, self._mask = self._encoder(rows), rows["attention_mask"]

    def _search(self, rows: dict[str, np.ndarray], how: Search) -> list[list[int]]:
        self._read(rows)
        self._start(how.beams)

        def read(tokens: np.ndarray, parents: np.ndarray) -> np.ndarray:
            found: np.ndarray = self._decoder.read(tokens, parents=parents)[:, -1]
            return found

        return search(read, len(rows["input_ids"]), how)

    def _start(self, beams: int) -> None:
        """Nothing is written yet for the sources, each with so many rows."""
        mask, source = self._mask, self._source
        if beams > 1:
            mask, source = mask.repeat(beams, 0), [self._encoder.array(value).repeat(beams, 0) for value in source]
        fixed = {f"cross.{number}": value for number, value in enumerate(source)}
        self._decoder.start(len(mask), attention_mask=mask, **fixed)

    def _behind(self, ids: np.ndarray) -> np.ndarray:
        """Logits behind every token, (rows, tokens) -> (rows, tokens, vocabulary)."""
        self._start(1)
        return self._decoder.read(ids, parents=np.arange(len(ids)))

    def _scores(self, found: Sequence[Sequence[int]]) -> list[float]:
        """Mean log-probability of the tokens of every text, by one more pass."""
        longest = max(map(len, found))
        ids = np.array([[self.how.start, *row[:-1], *[0] * (longest - len(row))] for row in found], dtype=np.int64)
        scores = []
        for row, tokens in zip(self._behind(ids), found, strict=True):
            logs = log_softmax(row[: len(tokens)].astype(np.float64))
            scores.append(float(logs[np.arange(len(tokens)), list(tokens)].mean()))
        return scores
