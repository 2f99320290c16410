"""What a teacher writes for many sources: once, kept on disk, by as many sources at a time as one file holds.

A folder of JSON files, each whole or not there, so that an interrupted run goes on where it stopped and a damaged file is found and
written again. Its name is a digest of the teacher's weights and tokenizer, the generation settings, the sources and the precision.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError
from .folders import digest, read_json, write_json
from .generation import settings_of, write
from .model import Model
from .reporting import report
from .training import Precision, autocast, on_accelerator, resolve_precision

CHUNK = 256
"""Sources in one file."""

logger = logging.getLogger(__name__)


def cached_texts(
    teacher: Model, sources: Sequence[str], folder: Path, *, batch_size: int = 32, precision: Precision = "auto"
) -> list[str]:
    """What a model writes for these sources, in their order, from `folder` or written now and kept there.

    Args:
        teacher: an encoder-decoder in eval mode; its generation settings decide.
        sources: texts without the model's prefix.
        folder: made if missing; several caches may share it.
        batch_size: sources at a time.
        precision: that it computes with.
    """
    settings = (settings_of(teacher.module), batch_size, resolve_precision(precision))
    place = folder / f"{digest(teacher.fingerprint(), json.dumps(settings, sort_keys=True), json.dumps(list(sources)))}.texts"
    place.mkdir(parents=True, exist_ok=True)
    found: list[str] = []
    for start in range(0, len(sources), CHUNK):
        part, path = sources[start : start + CHUNK], place / f"{start // CHUNK:06d}.json"
        texts = _read(path, len(part)) if path.is_file() else None
        if texts is None:
            with on_accelerator(teacher.module), autocast(precision):
                texts = [one.text for one in write(teacher.module, teacher.tokenizer, part, batch_size=batch_size)]
            write_json(path, {"texts": texts, "digest": digest(json.dumps(texts))})
        found += texts
        report(len(found) / len(sources))
    return found


def _read(path: Path, count: int) -> list[str] | None:
    """The texts of a file, if they are what was written."""
    try:
        kept: Any = read_json(path)
        if len(kept["texts"]) == count and kept["digest"] == digest(json.dumps(kept["texts"])):
            return list(kept["texts"])
    except (InputError, KeyError, TypeError):
        pass
    logger.warning("the teacher's texts in %s were damaged and are written again", path)
    return None
