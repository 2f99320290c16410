"""What runtimes are checked and timed on where no task is opened: the inputs at hand, and how long they are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from .core.folders import read_json
from .core.reading import reader_of, token_limit
from .errors import InputError
from .runtimes._traced import HEADS

SHARES = (0.1, 0.5, 0.9)
"""Which of all lengths are taken."""
ALIKE = 1.25
"""Times longer than the one before at least."""
TOKENIZER, PAIR = "tokenizer.json", "source.spm"
"""A fast tokenizer, and one of the files of a slow one that is converted for exports."""
UNLIMITED = 10**6
WRITERS = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM")
"""What loads the models that write."""


def writes(task: Any) -> bool:
    """Whether the models of a task write texts: reading and writing are then timed apart."""
    return task.auto_class in WRITERS


def fills(task: Any) -> bool:
    """Whether they are masked language models, which read one window at a time and answer with a whole vocabulary."""
    return bool(task.name == "fill-mask")


class Given:
    """Inputs without references, with what of a task an export asks for.

    Args:
        folder: the model folder.
        inputs: for its own task.

    Raises:
        InputError: the model has a head that no task knows.
    """

    def __init__(self, folder: Path, inputs: Sequence[Any]) -> None:
        self.reader = reader_of(folder)
        self.name: str = self.reader.task
        self.auto_class: str = self.reader.auto_class
        self.shrinks = self.reader.auto_class.removeprefix("AutoModel") in HEADS
        tuples = self.name == "text-classification" and any(isinstance(one, tuple) for one in inputs)
        self.has_pairs = self.name == "question-answering" or tuples
        self._inputs = list(inputs)

    def inputs(self, _: str) -> list[Any]:
        """All of them, whatever the split."""
        return self._inputs

    def load(self, source: str) -> Any:
        """The model with its own head."""
        from .core.model import Model

        return Model.load(source, auto_class=self.auto_class)

    def length_limit(self, model: Any) -> int:
        """Tokens that the model reads."""
        return token_limit(model.module.config, model.tokenizer)

    def calibration(self, model: Any, samples: int, *, seed: int = 0) -> list[Any]:
        """The first of them as one batch; none of a model that writes, whose exports take none."""
        from .runtimes._parity import COLUMNS, takes

        if writes(self):
            return []
        del seed  # none is drawn
        if fills(self):
            texts = [" ".join(words(one)) for one in self._inputs[:samples]]
            most = {"truncation": True, "max_length": self.length_limit(model)}
            encoded = model.tokenizer(texts, padding=True, return_tensors="pt", **most)
        else:
            encoded = self.reader.encode(model.tokenizer, self._inputs[:samples], self.length_limit(model), "pt")
        found = takes(model.module, {name: encoded[name] for name in COLUMNS if name in encoded})
        if not self.has_pairs:
            found.pop("token_type_ids", None)
        return [found]


def check(folder: Path, task: Any) -> None:
    """Refuse what no runtime is chosen for, before any work.

    Raises:
        InputError: lists what is wrong.
    """
    if (folder / "runtime.json").is_file():
        raise InputError(f"{folder} is an export already; a runtime is chosen for the model folder that it was made from")
    if not (folder / "config.json").is_file():
        reason = "holds no model" if folder.is_dir() else "is not there"
        raise InputError(f"{folder} {reason}; a model folder has config.json")
    if not any((folder / name).is_file() for name in (TOKENIZER, PAIR)):
        raise InputError(f"{folder} has no fast tokenizer (tokenizer.json), which exports need")
    if not task.inputs("validation"):
        raise InputError("there is no text to choose a runtime with")


def lengths_of(folder: Path, inputs: Sequence[Any]) -> list[int]:
    """The tokens of every row that inputs are read in; of chats without what their template adds. No torch is imported, but for a
    tokenizer that has to be converted.
    """
    from .runtimes._rows import FastTokenizer

    tokenizer, reader = FastTokenizer(_tokenizer_of(folder), 0), reader_of(folder)
    if reader.task in ("text-generation", "fill-mask"):
        inputs = [" ".join(words(one)) for one in inputs]
    return [len(ids) for ids in reader.encode(tokenizer, inputs, limit_of(folder), None)["input_ids"]]


def _tokenizer_of(folder: Path) -> Any:
    from tokenizers import Tokenizer

    if (folder / TOKENIZER).is_file():
        read_json(folder / TOKENIZER)  # tokenizers itself has no word for a damaged file but a bare Exception
        return Tokenizer.from_file(str(folder / TOKENIZER))
    from transformers import AutoTokenizer

    from .runtimes._sentencepiece import converted

    return converted(AutoTokenizer.from_pretrained(folder), ()).backend_tokenizer


def words(value: Any) -> list[str]:
    """The texts that inputs consist of."""
    if isinstance(value, str):
        return [value]
    parts: Sequence[Any] = list(value.values()) if isinstance(value, dict) else value
    return [text for part in parts for text in words(part)]


def limit_of(folder: Path) -> int:
    """Tokens of a row that the model of a folder reads at most."""
    config = {"model_type": "", "pad_token_id": 0, **read_json(folder / "config.json")}
    settings = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    return token_limit(SimpleNamespace(**config), SimpleNamespace(model_max_length=settings.get("model_max_length", UNLIMITED)))


def short(lengths: Sequence[int]) -> list[int]:
    """A short, a middle and a long one of these lengths, where they differ."""
    ordered = sorted(lengths)
    found: list[int] = []
    for share in SHARES:
        length = max(ordered[round(share * (len(ordered) - 1))], 2)
        if not found or length >= ALIKE * found[-1]:
            found.append(length)
    return found
