"""What a teacher writes for many sources: once, kept on disk, by as many sources at a time as one file holds.

A folder of JSON files, each whole or not there, so that an interrupted run goes on where it stopped and a damaged file is found and
written again. Its name is a digest of the teacher's weights and tokenizer, the generation settings, the sources and the precision.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError
from .continuations import AS_IT_IS, Continuation, continued, seeded, written_behind
from .folders import digest, read_json, write_json
from .generation import prefix_of, settings_of, write
from .model import Model
from .processes import main_first
from .reading import token_limit
from .reporting import report
from .sentences import Text
from .training import Precision, autocast, on_accelerator, resolve_precision

CHUNK = 256
"""Sources in one file."""

logger = logging.getLogger(__name__)


def cached_texts(
    teacher: Model,
    sources: Sequence[str],
    folder: Path,
    *,
    batch_size: int = 32,
    precision: Precision = "auto",
    drawn: int | None = None,
) -> list[str]:
    """What a model writes for these sources, in their order, from `folder` or written now and kept there.

    Args:
        teacher: an encoder-decoder in eval mode; its generation settings decide.
        sources: texts without the model's prefix.
        folder: made if missing; several caches may share it.
        batch_size: sources at a time.
        precision: that it computes with.
        drawn: a seed: texts are drawn from the model as it is, at temperature 1, and not searched for.
    """
    settings = (settings_of(teacher.module), batch_size, resolve_precision(precision), *([] if drawn is None else [drawn]))

    def written(part: Sequence[str], start: int) -> list[str]:
        if drawn is None:
            return [one.text for one in write(teacher.module, teacher.tokenizer, part, batch_size=batch_size)]
        with seeded(drawn, start):
            return _drawn(teacher, part, batch_size)

    return _kept(teacher, sources, folder, settings, precision, written)


def cached_continuations(
    teacher: Model,
    prompts: Sequence[Text],
    most: int,
    folder: Path,
    *,
    batch_size: int = 32,
    precision: Precision = "auto",
    drawn: int | None = None,
    beams: int = 1,
    length_penalty: float = 1.0,
) -> list[Continuation]:
    """What a causal model writes behind these prompts, as `cached_texts` has it of an encoder-decoder.

    Args:
        prompts: texts or chats.
        most: tokens that are written at most.
        beams: hypotheses of the beam search; 1 is greedy.
        length_penalty: above 1 for longer texts.
    """
    # What a model prefers for drawing says nothing of a search, and transformers warns of it.
    searched = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None, "num_beams": beams}
    how = dict(AS_IT_IS) if drawn is not None else searched | ({"length_penalty": length_penalty} if beams > 1 else {})
    own = teacher.module.generation_config.to_diff_dict() if drawn is None else {}
    ends = teacher.module.generation_config.eos_token_id
    settings = (how, own, ends, most, batch_size, resolve_precision(precision), drawn)

    def written(part: Sequence[Text], start: int) -> list[Any]:
        with seeded(drawn or 0, start):
            made = continued(teacher.module, teacher.tokenizer, part, most, batch_size=batch_size, **how)
        return [[one.text, one.ended] for one in made]

    found = _kept(teacher, prompts, folder, settings, precision, written)
    return [Continuation(str(text), bool(ended)) for text, ended in found]


def _kept(
    teacher: Model,
    sources: Sequence[Any],
    folder: Path,
    settings: tuple[Any, ...],
    precision: Precision,
    written: Callable[[Sequence[Any], int], list[Any]],
) -> list[Any]:
    """What is written for sources, from the files of one folder, or by `written` (sources, number of the first one)."""
    place = folder / f"{digest(teacher.fingerprint(), json.dumps(settings, sort_keys=True), json.dumps(list(sources)))}.texts"
    found: list[Any] = []
    with main_first():
        place.mkdir(parents=True, exist_ok=True)
        for start in range(0, len(sources), CHUNK):
            part, path = sources[start : start + CHUNK], place / f"{start // CHUNK:06d}.json"
            texts = _read(path, len(part)) if path.is_file() else None
            if texts is None:
                with on_accelerator(teacher.module), autocast(precision):
                    texts = written(part, start)
                write_json(path, {"texts": texts, "digest": digest(json.dumps(texts))})
            found += texts
            report(len(found) / len(sources))
    return found


def _drawn(teacher: Model, sources: Sequence[str], batch_size: int) -> list[str]:
    """Texts drawn from an encoder-decoder."""
    module, tokenizer, found = teacher.module, teacher.tokenizer, []
    prefix, limit, most = prefix_of(module.config), token_limit(module.config, tokenizer), settings_of(module)["max_new_tokens"]
    for start in range(0, len(sources), batch_size):
        texts = [prefix + source for source in sources[start : start + batch_size]]
        encoded = tokenizer(texts, truncation=True, max_length=limit, padding=True, return_tensors="pt")
        ids = written_behind(module, encoded["input_ids"], encoded["attention_mask"], most, skip=1, **AS_IT_IS)
        found += [str(text).strip() for text in tokenizer.batch_decode([one.tolist() for one in ids], skip_special_tokens=True)]
    return found


def _read(path: Path, count: int) -> list[Any] | None:
    """The texts of a file, if they are what was written."""
    try:
        kept: Any = read_json(path)
        if len(kept["texts"]) == count and kept["digest"] == digest(json.dumps(kept["texts"])):
            return list(kept["texts"])
    except (InputError, KeyError, TypeError):
        pass
    logger.warning("the teacher's texts in %s were damaged and are written again", path)
    return None
