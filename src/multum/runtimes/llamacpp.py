"""llama.cpp on the CPU: causal language models as GGUF files, which also run in any other program that is built on llama.cpp.

    f32, f16     as they are        q8_0, q4_0     8 and 4 bits, a scale for 32 weights        q4_k     llama.cpp's own mix, Q4_K_M

Decoding reads every weight once for a token, so that it is as fast as memory gives them: fewer bytes are faster.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import Tokenizer

from ..core.folders import read_json, write_json
from ..core.reading import reader_for, together
from ..core.sentences import Text, sums
from ..core.windows import windows
from ..core.writing import Decoding, chosen
from ..errors import InputError, MissingExtra
from ._chat import ChatTokenizer
from ._folder import MANIFEST, TOKENIZER, export_folder, read_manifest
from ._gguf import write_gguf
from ._predictor import cores

if TYPE_CHECKING:
    from ..core.model import Model

PRECISIONS = ("f16", "q8_0", "q4_0", "q4_k", "f32")
ALSO_CALLED = {"fp32": "f32", "int8": "q8_0", "int4": "q4_k"}
"""What others call a precision -> its name here."""
EXTRA: str | None = "llamacpp"
TASKS: tuple[str, ...] = ("text-generation",)
"""Whose models it takes; runtimes that do not say it take encoders."""
FILE = "model.gguf"
WITHOUT_AMX = (
    "this build of llama.cpp dies with AMX, and is run without its fastest kernels; build it again: CXXFLAGS=-fno-tree-dse "
    "pip install --force-reinstall --no-cache-dir --no-deps llama-cpp-python"
)
CONTEXT = 4096
"""Tokens that are read at most, unless the model reads fewer: the cache of keys and values has room for all of them."""


def unavailable() -> str | None:
    """Why it cannot be used here, or None."""
    missing = [name for name, module in (("gguf", "gguf"), ("llama-cpp-python", "llama_cpp")) if find_spec(module) is None]
    return f"{' and '.join(missing)} not installed; pip install 'multum[llamacpp]'" if missing else None


def export(model: Model, folder: Path, *, precision: str, inputs: Sequence[Any], task: str = TASKS[0], **_: Any) -> dict[str, Any]:
    """Write an export folder with `model.gguf`.

    Args:
        model: a causal language model, pruned or not.
        folder: replaced if it exists; whole or not at all.
        precision: one of `PRECISIONS`.
        inputs: real texts on which the export must answer as torch does.
        task: by name, for `measure`.

    Returns:
        How far the answers agree (`_gguf_proof.prove`).

    Raises:
        MissingExtra: gguf or llama-cpp-python is not installed.
        InputError: unknown precision, or a model that llama.cpp has no words for.
        ParityError: the answers differ, or the tokens.
    """
    if unavailable():
        raise MissingExtra("gguf with llama-cpp-python", "llamacpp")
    if precision not in PRECISIONS:
        raise InputError(f"llamacpp has no precision {precision!r}; it has: {', '.join(PRECISIONS)}")
    from ._llama import extra_kernels

    special = {name: text for name, text in model.tokenizer.special_tokens_map.items() if isinstance(text, str)}
    manifest = {"runtime": "llamacpp", "precision": precision, "task": task, "pairs": False, "special_tokens": special}
    with export_folder(model, folder, manifest) as work:
        facts = _write(model, work, precision)
        write_json(work / MANIFEST, {**read_json(work / MANIFEST), **facts})
        parity = proof(model, work, inputs)
        write_json(work / MANIFEST, {**read_json(work / MANIFEST), "parity": parity})
        return parity | ({} if extra_kernels(work / FILE, precision) else {"slow": WITHOUT_AMX})


def proof(model: Model, folder: Path, inputs: Sequence[Any]) -> dict[str, Any]:
    """How far an export folder agrees with the model (`_gguf_proof.prove`).

    Raises:
        ParityError: it answers differently, or was made from another model.
    """
    from ._gguf_proof import prove
    from ._llama import extra_kernels

    manifest = read_manifest(folder)
    file, precision = folder / FILE, str(manifest["precision"])
    return prove(model, file, precision, inputs, int(manifest["context"]), cores(), extra=extra_kernels(file, precision))


def check(model: Model) -> None:
    """Raise `InputError` where llama.cpp has no words for a model: what `export` would say of it, before anything is computed."""
    from ._gguf_model import read

    read(model.module)


def _write(model: Model, work: Path, precision: str) -> dict[str, Any]:
    """Write the file; what of the manifest is known with it."""
    from ..core.likelihood import context_of
    from ..core.writing import TorchWriter
    from ._gguf_tokenizer import template_of
    from ._llama import quantized

    if precision == "q4_k":
        facts = write_gguf(model, work / "f16.gguf", "f16")
        quantized(work / "f16.gguf", work / FILE, "Q4_K_M", cores())
        (work / "f16.gguf").unlink()
        facts.pop("tensors")
    else:
        facts = write_gguf(model, work / FILE, precision)
    context = min(facts["context"], context_of(model.module, model.tokenizer))
    ends = TorchWriter(model.module, model.tokenizer).ends()
    facts |= {"context": context, "max_length": min(context, CONTEXT), "end_token_ids": ends}
    return facts | {"chat_template": template_of(model.tokenizer)}


class LlamaPredictor:
    """Answers of a GGUF file, and what it writes. Texts are read one at a time.

    Args:
        folder: the export folder.
        threads: to run on.
    """

    at_once = 1

    def __init__(self, folder: Path, threads: int) -> None:
        from ._llama import Session, extra_kernels

        manifest = read_manifest(folder)
        self.reader: Any = reader_for(manifest.get("config") or {}, str(folder))
        self.labels: list[str] = list(manifest["labels"])
        self.runtime, self.precision = "llamacpp", str(manifest["precision"])
        self.threads, self.files = threads, [folder / name for name in (FILE, TOKENIZER, MANIFEST)]
        self.max_length = self.context = int(manifest["max_length"])
        self._ends = [int(token) for token in manifest["end_token_ids"]]
        read_json(folder / TOKENIZER)  # tokenizers itself has no word for a damaged file but a bare Exception
        tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
        pad = manifest.get("pad_token_id")
        template, special = manifest.get("chat_template"), manifest.get("special_tokens") or {}
        self.tokenizer = ChatTokenizer(tokenizer, 0 if pad is None else int(pad), template, special)
        extra = extra_kernels(folder / FILE, self.precision)
        self._session = Session(folder / FILE, threads, exact=self.precision == "f32", extra=extra)

    def use(self, threads: int) -> None:
        """Run on so many threads from now on."""
        self.threads = threads
        self._session.use(threads)

    def tokenize(self, inputs: Sequence[Text]) -> int:
        """Tokenize and count the tokens; there to be timed apart."""
        return sum(self.lengths(inputs))

    def lengths(self, inputs: Sequence[Text]) -> list[int]:
        """The tokens of every window that the inputs are read in."""
        return [len(ids) for ids in self.reader.encode(self.tokenizer, inputs, self.max_length, None)["input_ids"]]

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
            logits, new, total = self._session.first(ids, room), list[int](), 0.0
            while True:
                token, log = chosen(logits, decoding, rng)
                new.append(token)
                total += log
                if on_token:
                    on_token(token)
                if len(new) == room or (token in self._ends and not forced):
                    break
                logits = self._session.next(token)
            found.append((new, float("nan") if forced else total))
        return found

    def _log_probs(self, rows: Sequence[Sequence[int]], size: int, stride: int) -> list[np.ndarray]:
        """log p of every token of a row but its first, as `core.likelihood.causal_log_probs` tells it."""
        return [self._of_row(list(ids), size, stride) for ids in rows]

    def _of_row(self, ids: list[int], size: int, stride: int) -> np.ndarray:
        values = np.zeros(len(ids) - 1)
        for window in windows(len(ids), size, stride) if len(ids) > 1 else []:
            place, end = window.start, window.end
            for logits in self._session.rows(ids[place:end]):
                first, last = max(place, window.first - 1), min(place + len(logits), end - 1)
                if first < last:
                    some = logits[first - place : last - place].astype(np.float64)
                    some -= some.max(1, keepdims=True)
                    picked = some[np.arange(last - first), ids[first + 1 : last + 1]]
                    values[first:last] = picked - np.log(np.exp(some).sum(1))
                place += len(logits)
        return values


def open(folder: str | Path, *, threads: int | None = None) -> LlamaPredictor:
    """A predictor of an export folder.

    Args:
        folder: the export folder.
        threads: to run on; by default all cores, or `OMP_NUM_THREADS`.

    Raises:
        MissingExtra: llama-cpp-python is not installed.
        InputError: damaged.
    """
    if find_spec("llama_cpp") is None:
        raise MissingExtra("llama-cpp-python", "llamacpp")
    return LlamaPredictor(Path(folder), threads or cores())
