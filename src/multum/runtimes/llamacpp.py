"""llama.cpp on the CPU: causal language models as GGUF files, which also run in any other program that is built on llama.cpp.

    f32, f16     as they are        q8_0, q4_0     8 and 4 bits, a scale for 32 weights        q4_k     llama.cpp's own mix, Q4_K_M
    q4_1         4 bits, a scale and an offset for 32 weights

A model that is packed in 4 bits already, in groups of 32 or a multiple, keeps its numbers in q4_1, and in q4_0 if it is symmetric.
Decoding reads every weight once for a token, so that it is as fast as memory gives them: fewer bytes are faster.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.folders import read_json, write_json
from ..core.windows import specials
from ..errors import InputError, MissingExtra, ParityError
from ._continuing import ContinuingPredictor, facts_of
from ._folder import MANIFEST, TOKENIZER, export_folder, read_manifest
from ._gguf import write_gguf
from ._own_codes import kept
from ._predictor import cores
from ._writing_proof import TEXTS

if TYPE_CHECKING:
    from ..core.model import Model
    from ._llama import Session

PRECISIONS = ("f16", "q8_0", "q4_0", "q4_1", "q4_k", "f32")
ALSO_CALLED = {"fp32": "f32", "int8": "q8_0", "int4": "q4_k"}
"""What others call a precision -> its name here."""
EXTRA: str | None = "llamacpp"
TASKS: tuple[str, ...] = ("text-generation",)
"""Whose models it takes; runtimes that do not say it take those of every task."""
FILE = "model.gguf"
WITHOUT_AMX = (
    "this build of llama.cpp dies with AMX, and is run without its fastest kernels; build it again: CXXFLAGS=-fno-tree-dse "
    "pip install --force-reinstall --no-cache-dir --no-deps llama-cpp-python"
)


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
        How far the answers agree (`_writing_proof.prove`), and of a model packed in 4 bits how many matrices keep their numbers.

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

    manifest = {"runtime": "llamacpp", "precision": precision, "task": task}
    with export_folder(model, folder, manifest) as work:
        facts = _write(model, work, precision)
        own_codes = facts.pop("own_codes", (0, 0))
        write_json(work / MANIFEST, {**read_json(work / MANIFEST), **facts})
        parity = proof(model, work, inputs) | kept(*own_codes)
        write_json(work / MANIFEST, {**read_json(work / MANIFEST), "parity": parity})
        return parity | ({} if extra_kernels(work / FILE, precision) else {"slow": WITHOUT_AMX})


def proof(model: Model, folder: Path, inputs: Sequence[Any]) -> dict[str, Any]:
    """How far an export folder agrees with the model (`_writing_proof.prove`).

    Raises:
        ParityError: it answers differently, reads texts in other tokens, or was made from another model.
    """
    from ._writing_proof import prove

    manifest = read_manifest(folder)
    precision = str(manifest["precision"])
    session = _session(folder / FILE, precision, cores())
    same_tokens(model.tokenizer, session, [text for text in inputs[:TEXTS] if isinstance(text, str)])
    return prove(model, session, "llamacpp", precision, inputs, int(manifest["context"]))


def same_tokens(tokenizer: Any, session: Session, texts: Sequence[str]) -> None:
    """Whether llama.cpp makes the same tokens of texts; of chats the templates are compared where they are used.

    Raises:
        ParityError: it does not.
    """
    before, behind = specials(tokenizer)
    for text in texts:
        ours = [*before, *tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], *behind]
        if ours != (theirs := session.tokens(text)):
            pairs = enumerate(zip(ours, theirs, strict=False))
            at = next((i for i, (one, other) in pairs if one != other), min(len(ours), len(theirs)))
            first, second = (tokenizer.convert_ids_to_tokens(ids[at : at + 3]) for ids in (ours, theirs))
            raise ParityError(
                f"llama.cpp cuts texts into other tokens than the model's tokenizer: {second} where that has {first}, behind "
                f"{tokenizer.decode(ours[max(at - 8, 0) : at])!r}"
            )


def check(model: Model) -> None:
    """Raise `InputError` where llama.cpp has no words for a model: what `export` would say of it, before anything is computed."""
    from ._gguf_model import read

    read(model.module)


def _write(model: Model, work: Path, precision: str) -> dict[str, Any]:
    """Write the file; what of the manifest is known with it."""
    from ._llama import quantized

    if precision == "q4_k":
        facts = write_gguf(model, work / "f16.gguf", "f16")
        quantized(work / "f16.gguf", work / FILE, "Q4_K_M", cores())
        (work / "f16.gguf").unlink()
        facts.pop("tensors")
    else:
        facts = write_gguf(model, work / FILE, precision)
    return facts | facts_of(model, facts["context"])


def open(folder: str | Path, *, threads: int | None = None) -> ContinuingPredictor:
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
    folder, threads = Path(folder), threads or cores()
    manifest, files = read_manifest(folder), [folder / name for name in (FILE, TOKENIZER, MANIFEST)]
    session = _session(folder / FILE, str(manifest["precision"]), threads)
    return ContinuingPredictor(folder, manifest, session, files, threads)


def _session(file: Path, precision: str, threads: int) -> Session:
    from ._llama import Session, extra_kernels

    return Session(file, threads, exact=precision == "f32", extra=extra_kernels(file, precision))
