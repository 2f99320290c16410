"""Model: the one thing passed from step to step inside Python. On disk it is a folder."""

from __future__ import annotations

import copy
import json
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer

from ..errors import InputError
from . import processes, shapes
from .folders import digest, read_json, whole_folder
from .hub import loading
from .linears import Linear, is_linear
from .packed import parameters_of

RECIPE = "recipe.json"
NOTHING_TO_NUMBERS = {
    *("_name_or_path", "architectures", "transformers_version", "dtype", "torch_dtype", "problem_type", "return_dict", "use_cache"),
    *("id2label", "label2id", "finetuning_task", "task_specific_params", "output_attentions", "output_hidden_states"),
}
"""Fields of a config that what a model answers does not depend on. The type of its numbers is looked at in the weights."""


@dataclass(kw_only=True)
class Model:
    """A transformers model, its tokenizer and what has been done to it.

    `history` has one entry per step: its name, every field, what it changed and what it skipped and why.
    """

    module: Any
    tokenizer: Any
    source: str
    """The folder or Hub id it was loaded from at the very beginning."""
    revision: str | None = None
    """The Hub commit, where there is one."""
    history: list[dict[str, Any]] = field(default_factory=list)
    new_weights: tuple[str, ...] = ()
    """Names of weights that the source lacked, so that they are random: a head that was never trained."""

    @classmethod
    def load(
        cls,
        source: str | Path,
        *,
        auto_class: str = "AutoModel",
        trust_remote_code: bool = False,
        **config_changes: Any,
    ) -> Model:
        """Load a folder or Hub id; safetensors only.

        Args:
            source: a model folder or the id of a model on the Hugging Face Hub.
            auto_class: name of the transformers Auto class, which decides the head.
            trust_remote_code: run code that comes with the model. Off unless asked for.
            config_changes: passed on to the config (`num_labels`, `id2label`, ...).

        Raises:
            InputError: no model there, a damaged or pickled one, or one of the wrong kind.
        """
        source = str(source)
        _check_source(source)
        where, part = loading(source), f"it as {auto_class}"
        try:
            config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code, **where, **config_changes)
            module, info = getattr(transformers, auto_class).from_pretrained(
                source,
                config=config,
                use_safetensors=True,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
                **where,
            )
            part = "its tokenizer"
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code, **where)
        except SafetensorError as error:
            raise InputError(f"{source}: the weights are damaged ({error}); fetch or save the model again") from error
        except (OSError, ValueError, RuntimeError, KeyError, ImportError, StrictDataclassError) as error:
            if where and isinstance(error, OSError):
                raise InputError(f"{source}: no such folder, and the Hugging Face Hub cannot be reached from here") from error
            raise InputError(f"{source}: cannot load {part}: {_first_line(error)}") from error
        if len(tokenizer) <= len(tokenizer.all_special_tokens):  # transformers makes one of nothing, to which all words are unknown
            raise InputError(
                f"{source} has no tokenizer that knows a word; save it with the model (tokenizer.save_pretrained), or copy "
                "tokenizer.json or the vocabulary file there"
            )
        past = read_json(Path(source) / RECIPE) if (Path(source) / RECIPE).is_file() else {}
        return cls(
            module=module.eval(),
            tokenizer=tokenizer,
            source=past.get("base", source),
            revision=past.get("revision", getattr(config, "_commit_hash", None)),
            history=list(past.get("steps", [])),
            new_weights=tuple(sorted({*info["missing_keys"], *past.get("new_weights", ())})),
        )

    def save(self, folder: str | Path, extra: Mapping[str, Any] | None = None) -> bool:
        """Write the model folder: weights, config, tokenizer and `recipe.json`. Whole or not at all. Of several processes the main
        one writes.

        Args:
            folder: replaced if it exists.
            extra: more entries for `recipe.json` (task, data fingerprints, seed).

        Returns:
            True when stock transformers can load it, False when that takes `import multum`.
        """
        stock = shapes.record(self.module)
        if processes.number() > 0:
            return stock
        with whole_folder(Path(folder)) as work:
            guards = shapes.guards(self.module)
            self.module.save_pretrained(work, state_dict={**self.module.state_dict(), **guards} if guards else None)
            self.tokenizer.save_pretrained(work)
            recipe = {
                "schema": 1,
                "base": self.source,
                "revision": self.revision,
                "steps": self.history,
                "loads_without_multum": stock,
                **({"new_weights": list(self.new_weights)} if self.new_weights else {}),
                **(extra or {}),
                "versions": versions(),
                "machine": machine(),
                "when": datetime.now(UTC).isoformat(timespec="seconds"),
            }
            (work / RECIPE).write_text(json.dumps(recipe, indent=2) + "\n", encoding="utf-8")
        return stock

    def copy(self) -> Model:
        """A deep copy: changing it leaves this one as it is."""
        return Model(
            module=copy.deepcopy(self.module),
            tokenizer=copy.deepcopy(self.tokenizer),
            source=self.source,
            revision=self.revision,
            history=copy.deepcopy(self.history),
            new_weights=self.new_weights,
        )

    def linears(self) -> dict[str, Linear]:
        """Every linear layer by name, packed ones left out."""
        return {name: part for name, part in self.module.named_modules() if is_linear(part)}

    def parameters(self) -> int:
        """Number of parameters, tied ones once and packed ones like others."""
        return parameters_of(self.module)

    def settings(self) -> str:
        """What the config says of how the weights are used (heads, activations, positions) as JSON; names, labels and versions,
        which change no number, left out."""
        values = self.module.config.to_dict()
        return json.dumps({name: values[name] for name in sorted(values.keys() - NOTHING_TO_NUMBERS)}, default=str)

    def fingerprint(self) -> str:
        """A digest of the weights and the tokenizer, the same in every process."""
        weights = (
            part
            for name, tensor in sorted(self.module.state_dict().items())
            for part in (name, str(tuple(tensor.shape)), tensor.detach().cpu().contiguous().float().numpy().tobytes())
        )
        if getattr(self.tokenizer, "is_fast", True):
            # Truncation and padding are those of the latest call, not the tokenizer's own.
            tokenizer = json.loads(self.tokenizer.backend_tokenizer.to_str()) | {"truncation": None, "padding": None}
        else:  # one written in Python (Marian's, ByT5's) is told by its class and its tokens
            tokenizer = {type(self.tokenizer).__name__: self.tokenizer.get_vocab()}
        return digest(*weights, json.dumps(tokenizer, sort_keys=True))


def versions() -> dict[str, str]:
    """The versions that shape a result."""
    names = ("multum", "torch", "transformers", "tokenizers", "numpy")
    return {"python": platform.python_version()} | {name: version(name) for name in names}


def machine() -> dict[str, Any]:
    """What this machine is, in the few words that matter for speed."""
    import os

    names = [
        line.split(":", 1)[1].strip()
        for line in (Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else [])
        if line.startswith("model name")
    ]
    return {
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def _check_source(source: str) -> None:
    path = Path(source)
    if path.is_file():
        raise InputError(f"{source} is a file; a model is a folder with config.json and model.safetensors, or a Hub id")
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(f"{source} is no model folder: it has no config.json")
        if not any(path.glob("*.safetensors")):
            has_pickle = any(path.glob("*.bin")) or any(path.glob("*.pt"))
            reason = "only pickled weights, which multum does not open" if has_pickle else "no weights"
            raise InputError(f"{source} has {reason}; save it with safe_serialization (model.safetensors) first")
    elif source.count("/") > 1 or source.startswith((".", "/", "~")):
        raise InputError(f"{source}: no such folder")


def _first_line(error: BaseException) -> str:
    """What an error says first, in other words than those that transformers has for its own developers."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    if "ignore_mismatched_sizes" in line:
        return "its weights have other shapes than its config.json says"
    kind = re.match(r"Unrecognized configuration class <class '[\w.]*\.(\w+)Config'>", line)
    return f"transformers has no such head for models of the kind {kind[1]}" if kind else line
