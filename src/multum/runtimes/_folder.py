"""What all export folders have in common: `runtime.json`, `tokenizer.json`, and the proof that the export answers as torch does."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core.folders import read_json, whole_folder, write_json
from ..errors import InputError, ParityError

if TYPE_CHECKING:
    from ..core.model import Model

MANIFEST, TOKENIZER = "runtime.json", "tokenizer.json"
EXACT = 1e-4
"""Largest difference of a logit that fp32 arithmetic in another order explains, relative to the largest logit."""
DIVERGENCE = 0.05
"""Mean KL in nats above which an 8-bit export is refused: rounding gives a hundredth of it, a wrong graph far more."""

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


@contextmanager
def export_folder(model: Model, folder: Path, manifest: Mapping[str, Any]) -> Iterator[Path]:
    """Yields a folder with `runtime.json` and `tokenizer.json`; renamed to `folder` when the block ends well."""
    from ..core.profile import profile

    config = model.module.config
    with whole_folder(folder) as work:
        values = {
            "schema": 1,
            **manifest,
            "labels": [str(config.id2label[i]) for i in range(config.num_labels)],
            "pad_token_id": model.tokenizer.pad_token_id,
            "model": profile(model.module),
        }
        write_json(work / MANIFEST, values)
        # Truncation and padding are the predictor's own.
        tokenizer = json.loads(model.tokenizer.backend_tokenizer.to_str()) | {"truncation": None, "padding": None}
        (work / TOKENIZER).write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
        yield work


def prove(model: Model, work: Path, predict: Callable[[Sequence[Text]], np.ndarray], inputs: Sequence[Text]) -> dict[str, Any]:
    """Compare the export's answers on real inputs with torch's, and write the comparison into `runtime.json`.

    Raises:
        ParityError: they differ by more than the precision explains.
    """
    manifest = read_json(work / MANIFEST)
    expected, found = torch_logits(model, inputs, manifest["max_length"]), predict(inputs)
    difference = float(np.abs(expected - found).max())
    log_p, log_q = _log_softmax(expected), _log_softmax(found)
    parity = {
        "n": len(inputs),
        "max_difference": difference,
        "agreement": float((expected.argmax(1) == found.argmax(1)).mean()),
        "kl_nats": float((np.exp(log_p) * (log_p - log_q)).sum(1).mean()),
    }
    allowed = EXACT * max(1.0, float(np.abs(expected).max()))
    if manifest["precision"] == "fp32" and not difference <= allowed:
        raise ParityError(
            f"the {manifest['runtime']} export answers differently: logits differ by {difference:.2g} (allowed {allowed:.2g})"
        )
    if not parity["kl_nats"] <= DIVERGENCE:
        raise ParityError(
            f"the {manifest['runtime']} {manifest['precision']} export answers differently: KL {parity['kl_nats']:.3g} nats "
            f"(allowed {DIVERGENCE:g}), {100 * parity['agreement']:.0f} % of the answers agree"
        )
    write_json(work / MANIFEST, {**manifest, "parity": parity})
    return parity


def torch_logits(model: Model, inputs: Sequence[Text], max_length: int) -> np.ndarray:
    """The model's own answers, float32, (inputs, classes), one input at a time."""
    import torch

    rows = []
    with torch.no_grad():
        for text in inputs:
            sides = text if isinstance(text, tuple) else (text,)
            batch = model.tokenizer(*sides, truncation=True, max_length=max_length, return_tensors="pt")
            rows.append(model.module.eval()(**takes(model.module, batch)).logits[0].float().numpy())
    return np.stack(rows)


def takes(module: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
    """What of a tokenizer's output a model takes: token types only where it tells them apart."""
    types = getattr(module.config, "type_vocab_size", 1) > 1 and module.config.model_type != "distilbert"
    return {name: value for name, value in batch.items() if name != "token_type_ids" or types}


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(1, keepdims=True)))
