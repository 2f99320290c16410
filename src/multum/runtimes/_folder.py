"""What all export folders have in common: `runtime.json`, `tokenizer.json`, and the proof that the export answers as torch does."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core.folders import read_json, whole_folder, write_json
from ..core.passages import THRESHOLD
from ..errors import InputError, ParityError
from ._parity import compare, problem, torch_items

if TYPE_CHECKING:
    from ..core.model import Model

MANIFEST, TOKENIZER = "runtime.json", "tokenizer.json"
READ = ("problem_type", THRESHOLD)
"""What of a config says how its model's answers are read, beside the kind of its head."""

Text = str | tuple[str, str]


def read_manifest(folder: Path) -> dict[str, Any]:
    """The content of `runtime.json`.

    Raises:
        InputError: missing, damaged, or made by a later version.
    """
    if not (folder / MANIFEST).is_file():
        raise InputError(f"{folder} is no export folder: it has no {MANIFEST}")
    manifest = read_json(folder / MANIFEST)
    if not isinstance(manifest, dict) or manifest.get("schema") != 1 or "runtime" not in manifest:
        raise InputError(f"{folder / MANIFEST} is damaged or from another version of multum; export the model again")
    return manifest


def config_of(module: Any) -> dict[str, Any]:
    """What of a model's config its reader is chosen by."""
    told = {name: getattr(module.config, name, None) for name in READ}
    return {"architectures": [type(module).__name__], **{name: value for name, value in told.items() if value is not None}}


@contextmanager
def export_folder(model: Model, folder: Path, manifest: Mapping[str, Any]) -> Iterator[Path]:
    """Yields a folder with `runtime.json` and `tokenizer.json`; renamed to `folder` when the block ends well.

    Raises:
        InputError: the model's tokenizer is none that `tokenizers` runs.
    """
    from ..core.profile import profile

    if not getattr(model.tokenizer, "is_fast", False):
        raise InputError(
            f"{model.source} has no fast tokenizer (tokenizer.json), which exports need: {type(model.tokenizer).__name__} is none; "
            "measure and predict in torch"
        )
    config = model.module.config
    with whole_folder(folder) as work:
        values = {
            "schema": 1,
            **manifest,
            "labels": [str(config.id2label[i]) for i in range(config.num_labels)],
            "config": config_of(model.module),
            "pad_token_id": model.tokenizer.pad_token_id,
            **({} if model.tokenizer.mask_token_id is None else {"mask_token_id": model.tokenizer.mask_token_id}),
            "model": profile(model.module),
        }
        write_json(work / MANIFEST, values)
        # Truncation and padding are the predictor's own.
        tokenizer = json.loads(model.tokenizer.backend_tokenizer.to_str()) | {"truncation": None, "padding": None}
        (work / TOKENIZER).write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
        yield work


def prove(model: Model, work: Path, predictor: Any, inputs: Sequence[Any]) -> dict[str, Any]:
    """Compare an export's answers on real inputs with torch's, and write the comparison into `runtime.json`.

    Args:
        model: what was exported.
        work: the export folder.
        predictor: it, opened.
        inputs: raw, as the task has them.

    Raises:
        ParityError: they differ by more than the precision explains.
    """
    manifest = read_json(work / MANIFEST)
    expected, found = torch_items(model, predictor.reader, inputs, manifest["max_length"]), predictor.items(inputs)
    what = f"the {manifest['runtime']} {manifest['precision']} export answers differently"
    if [rows.shape for rows in expected] != [rows.shape for rows in found]:
        raise ParityError(f"{what}: it reads the inputs in other tokens than the model")
    parity = {"n": len(inputs), **compare(getattr(predictor.reader, "kind", ""), expected, found)}
    if reason := problem(manifest["precision"], parity, max(float(np.abs(rows).max()) for rows in expected)):
        raise ParityError(f"{what}: {reason}")
    write_json(work / MANIFEST, {**manifest, "parity": parity})
    return parity
