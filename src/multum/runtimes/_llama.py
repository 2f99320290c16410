"""llama.cpp through llama-cpp-python's plain functions: tokens in, logits out. No torch."""

from __future__ import annotations

import ctypes
import logging
import subprocess
import sys
import weakref
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from ..core.folders import cache_home, digest, read_json, write_json
from ..errors import InputError

CHUNK = 256
"""Tokens read at a time, each with a row of logits."""
GRAIN = 256
"""A context has a multiple of so many tokens."""
F32 = 0
"""llama.cpp's number of the type."""


class Session:
    """A GGUF file that is executed.

    Args:
        path: the file.
        threads: to run on.
        exact: keep keys and values in fp32, and take no shortcuts with attention.
        extra: use the kernels that keep matrices in an order of their own (AMX, repacked 4 bits); see `extra_kernels`.

    Raises:
        InputError: llama.cpp does not take it.
    """

    def __init__(self, path: Path | str, threads: int, *, exact: bool = False, extra: bool = True) -> None:
        self._llama = _library()
        self.threads, self._exact = threads, exact
        settings = self._llama.llama_model_default_params()
        settings.n_gpu_layers, settings.use_extra_bufts = 0, extra
        _said.clear()
        self._model = self._llama.llama_model_load_from_file(str(path).encode(), settings)
        if not self._model:
            raise InputError(f"{path} cannot be opened by llama.cpp: {' '.join(_said) or 'it does not say why'}")
        weakref.finalize(self, self._llama.llama_model_free, self._model)
        self._vocabulary = self._llama.llama_model_get_vocab(self._model)
        self.size = int(self._llama.llama_vocab_n_tokens(self._vocabulary))
        self._context: Any = None
        self._close: Any = None
        self._room = self._used = 0

    def use(self, threads: int) -> None:
        """Run on so many threads from now on."""
        self.threads = threads
        if self._context is not None:
            self._llama.llama_set_n_threads(self._context, threads, threads)

    def tokens(self, text: str) -> list[int]:
        """What llama.cpp's own tokenizer makes of a text, special tokens around it included."""
        raw = text.encode()
        room = len(raw) + 8
        found = (self._llama.llama_token * room)()
        count = self._llama.llama_tokenize(self._vocabulary, raw, len(raw), found, room, True, True)
        return list(found[: max(count, 0)])

    def rows(self, ids: Sequence[int]) -> Iterator[np.ndarray]:
        """Logits behind every token of a text, in pieces of at most `CHUNK` rows, (rows, vocabulary) float32: copy what is kept."""
        self._start(len(ids))
        for start in range(0, len(ids), CHUNK):
            yield self._read(ids[start : start + CHUNK], every=True)

    def first(self, ids: Sequence[int], room: int) -> np.ndarray:
        """Logits behind a text's last token, (vocabulary,), and room for so many more tokens."""
        self._start(len(ids) + room)
        for start in range(0, len(ids), CHUNK):
            last = self._read(ids[start : start + CHUNK], every=False)
        row: np.ndarray = last[0]
        return row

    def next(self, token: int) -> np.ndarray:
        """Logits behind one more token, (vocabulary,)."""
        row: np.ndarray = self._read([token], every=False)[0]
        return row

    def _start(self, tokens: int) -> None:
        """An empty context with room for so many tokens."""
        if tokens > self._room:
            self._open(-(-tokens // GRAIN) * GRAIN)
        self._llama.llama_memory_clear(self._llama.llama_get_memory(self._context), True)
        self._used = 0

    def _open(self, room: int) -> None:
        if self._context is not None:
            self._close()
        settings = self._llama.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch = room, CHUNK, CHUNK
        settings.n_threads = settings.n_threads_batch = self.threads
        settings.no_perf = True
        if self._exact:
            settings.type_k = settings.type_v = F32
            settings.flash_attn_type = self._llama.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._context = self._llama.llama_init_from_model(self._model, settings)
        if not self._context:
            raise InputError(f"llama.cpp makes no context of {room} tokens: {' '.join(_said) or 'it does not say why'}")
        self._close = weakref.finalize(self, self._llama.llama_free, self._context)
        self._room = room

    def _read(self, ids: Sequence[int], *, every: bool) -> np.ndarray:
        """Read more tokens; logits behind each of them, or the last one, (rows, vocabulary)."""
        llama, count = self._llama, len(ids)
        tokens = (llama.llama_token * count)(*ids)
        places = (llama.llama_pos * count)(*range(self._used, self._used + count))
        wanted = (ctypes.c_int8 * count)(*([1] * count if every else [0] * (count - 1) + [1]))
        batch = llama.llama_batch(n_tokens=count, token=tokens, pos=places, logits=wanted)
        if code := llama.llama_decode(self._context, batch):
            raise InputError(f"llama.cpp could not read {count} tokens (code {code}): {' '.join(_said)}")
        self._used += count
        pointer = llama.llama_get_logits(self._context)
        rows: np.ndarray = np.ctypeslib.as_array(pointer, shape=(count if every else 1, self.size)).copy()
        return rows


def quantized(source: Path, target: Path, kind: str, threads: int) -> None:
    """A GGUF file of F32 or F16 in one of llama.cpp's mixed precisions.

    Args:
        source: the file.
        target: what is written.
        kind: as llama.cpp calls it, for example `Q4_K_M`.
        threads: to compute on.
    """
    llama = _library()
    settings = llama.llama_model_quantize_default_params()
    settings.ftype, settings.nthread = getattr(llama, f"LLAMA_FTYPE_MOSTLY_{kind}"), threads
    if code := llama.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(settings)):
        raise InputError(f"llama.cpp could not make {kind} of {source} (code {code}): {' '.join(_said)}")


def extra_kernels(path: Path, precision: str) -> bool:
    """Whether this build of llama.cpp survives its own AMX kernels here; tried once in a process of its own, and remembered.

    Up to version 12 the header of GCC does not say that loading a tile configuration reads all of it, so that what was
    compiled by it may die with a segmentation fault on processors with AMX; compiled with -fno-tree-dse it does not.

    Args:
        path: a file to try it on.
        precision: of the file.
    """
    processor = Path("/proc/cpuinfo")
    if precision == "f32" or not processor.is_file() or "amx_int8" not in processor.read_text(encoding="utf-8"):
        return True
    libraries = sorted(path for path in Path(_library().__file__).parent.rglob("*ggml-cpu*") if path.is_file())
    key = digest(precision, *(f"{path} {path.stat().st_mtime_ns}" for path in libraries))
    place = cache_home() / "llamacpp.json"
    known = read_json(place) if place.is_file() else {}
    if key not in known:
        code = "import sys; from multum.runtimes import _llama; _llama.Session(sys.argv[1], 1).first([0] * 40, 1)"
        tried = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, check=False)
        known[key] = tried.returncode >= 0
        place.parent.mkdir(parents=True, exist_ok=True)
        write_json(place, known)
    return bool(known[key])


_said: list[str] = []
"""What llama.cpp complained of since the last model was opened."""


@cache
def _library() -> Any:
    """llama_cpp, which says nothing but what `_said` keeps."""
    import llama_cpp

    logging.getLogger("llama-cpp-python").setLevel(logging.CRITICAL)

    def note(level: int, text: bytes, _: Any) -> None:
        if level == 4:  # errors
            _said.append(text.decode(errors="replace").strip())

    kept = llama_cpp.llama_log_callback(note)
    llama_cpp.llama_log_set(kept, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    vars(llama_cpp)["_multum_note"] = kept  # it is called as long as the library is loaded
    return llama_cpp
