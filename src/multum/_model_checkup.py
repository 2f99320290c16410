"""What cannot work for a model on this machine, and the nearest thing that does: `multum doctor MODEL`, before an hour is spent.

The model is loaded as every command loads it. What then asks whether something works is what would refuse it later: the row of its
architecture, the exporters' own checks, the kind of its tokenizer. Nothing is exported, trained or written.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from . import runtimes
from .core.folders import read_json
from .doctor import INT8
from .errors import InputError, MultumError

SMALLER_TABLE = "quantize_embeddings makes the table of tokens smaller, whatever the tokenizer"
BYTES_TO_TRAIN = 16
"""Of a weight that is trained: itself, its gradient and AdamW's two moments, 4 bytes each."""


class Limit(NamedTuple):
    """Something that cannot work."""

    what: str
    why: str
    instead: str
    """The nearest thing that does."""


def check_up(source: str, facts: Mapping[str, Any], *, trust_remote_code: bool = False) -> dict[str, Any]:
    """Look at a model.

    Args:
        source: folder or Hub id.
        facts: of the machine, as `doctor.examine` gives them.
        trust_remote_code: run code that comes with the model.

    Returns:
        `source`; `facts`, what it is in a few words; `works`, the exports that its architecture and this machine allow; `limits`,
        each with `what`, `why` and `instead`. A model that cannot be loaded has one limit.
    """
    found: dict[str, Any] = {"source": source, "facts": {}, "works": [], "limits": []}
    limits: list[Limit] = []
    try:
        model, reader = _load(source, facts, trust_remote_code, limits)
    except MultumError as error:
        limits.append(Limit("loading it", str(error), _instead_of_loading(str(error))))
    else:
        module, kind = model.module, type(model.module).__name__
        found["facts"] = {
            "model": f"{kind}, {model.parameters() / 1e6:.1f} million parameters",
            "task": reader.task if reader else "none yet: it has no head",
            "steps": ", ".join(entry["step"] for entry in model.history) or "none of multum's so far",
        }
        limits += [*_of_the_model(model), *_of_training(model, facts)]
        found["works"] = list(_exports(model, reader, facts, limits))
        limits += _of_precisions(found["works"], facts, module)
    found["limits"] = [limit._asdict() for limit in limits]
    return found


def _load(source: str, facts: Mapping[str, Any], trust_remote_code: bool, limits: list[Limit]) -> tuple[Any, Any]:
    """The model with the head that its config names, without one if no task knows that head."""
    from .core.model import Model
    from .core.reading import reader_for

    folder = Path(source)
    if folder.is_dir():
        config = read_json(folder / "config.json")
        if config.get("auto_map") and not trust_remote_code:
            raise InputError(f"{source} brings code of its own, which is run only if asked for")
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        free = facts["memory"]["available_mb"] * 10**6
        if size > free:
            raise InputError(f"its weights take {size / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free")
    else:
        config = _config_of(source, trust_remote_code)
    try:
        reader = reader_for(config, source)
    except InputError as error:
        reader = None
        limits.append(
            Limit(
                "predict, measure and export as it is",
                str(error),
                "give it a head: multum shrink, or multum apply finetune, with --task and --data, start from such a model",
            )
        )
    return Model.load(source, auto_class=reader.auto_class if reader else "AutoModel", trust_remote_code=trust_remote_code), reader


def _config_of(source: str, trust_remote_code: bool) -> dict[str, Any]:
    from transformers import AutoConfig

    try:
        found: dict[str, Any] = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code).to_dict()
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{source}: no such folder, and no such model that the Hub would give: {reason}") from error
    return found


def _instead_of_loading(reason: str) -> str:
    if "pickle" in reason:
        return "multum load-legacy reads pickled weights safely and writes a folder that loads"
    if "code of its own" in reason:
        return "read that code, then --trust-remote-code; or take a model whose architecture is part of transformers"
    if "memory" in reason:
        return "a smaller model of the same family, or a machine with more memory"
    return "see above; multum example lists models that load"


def _of_the_model(model: Any) -> Iterator[Limit]:
    """What its architecture, weights and tokenizer rule out."""
    from .core.families import family_of, one_stack
    from .core.packed import refuse_packed
    from .runtimes._sentencepiece import convertible
    from .runtimes._traced import writes

    module = model.module
    if reason := _refused(lambda: refuse_packed(module, "further steps")):
        yield Limit("cutting or training it", reason, f"take the model that it was made from ({model.source}), and quantize last")
    if reason := _refused(lambda: family_of(module)):
        yield Limit(
            "steps that change its structure (prune_structured, drop_layers, ...)",
            reason,
            "trim_vocabulary, finetune and exports; or let it teach a smaller model of a known type: distill --student FOLDER",
        )
    elif reason := _refused(lambda: one_stack(module, "distill_layers, like slice_hidden,")):
        yield Limit("teaching layer by layer and a smaller hidden width", reason, "prune_structured, then distill_generation")
    if model.new_weights:
        names = ", ".join(model.new_weights[:2]) + (", ..." if len(model.new_weights) > 2 else "")
        instead = "multum apply finetune, or multum shrink, which begins with it"
        yield Limit("answers that mean something", f"some weights were never trained ({names})", instead)
    if not getattr(model.tokenizer, "is_fast", False):
        reason = "it has no fast tokenizer (tokenizer.json)"
        if convertible(model.tokenizer):
            yield Limit("trim_vocabulary", reason, SMALLER_TABLE)
        elif writes(module):
            yield Limit("exports and trim_vocabulary", reason, "measure, predict and shrink in torch")
        else:
            yield Limit("exports, shrink and trim_vocabulary", reason, "measure and predict in torch")
        return
    from .steps.trim_vocabulary import obstacle

    if reason := obstacle(json.loads(model.tokenizer.backend_tokenizer.to_str())):
        yield Limit("trim_vocabulary", reason, SMALLER_TABLE)


def _of_training(model: Any, facts: Mapping[str, Any]) -> Iterator[Limit]:
    need, free = BYTES_TO_TRAIN * model.parameters(), facts["memory"]["available_mb"] * 10**6
    if need > free:
        yield Limit(
            "finetune and distill",
            f"training takes {need / 1e9:.1f} GB and what a batch adds, and {free / 1e9:.1f} GB are free",
            "finetune with low-rank adapters (--lora '{rank: 8}'), or what trains nothing: prune_structured, quantize, exports",
        )


def _exports(model: Any, reader: Any, facts: Mapping[str, Any], limits: list[Limit]) -> Iterator[str]:
    """The exports that should work, as `onnxruntime int8`; what rules out the others goes to `limits`."""
    from .runtimes._sentencepiece import convertible
    from .runtimes._traced import writes

    if not reader or not convertible(model.tokenizer):
        return
    for name in runtimes.names():
        module, here = runtimes.find(name), facts["runtimes"][name]
        if name == "pytorch" or reader.task not in getattr(module, "TASKS", (reader.task,)):
            continue
        if not here["available"]:
            limits.append(Limit(f"export to {name}", here["reason"], here["install"]))
            continue
        reason, instead, works = _export_obstacle(name, model)
        if reason:
            limits.append(Limit(f"export to {name}" + (" as a graph of fused operators" if works else ""), reason, instead))
        if works:
            further = getattr(module, "WRITING", ()) if writes(model.module) else ()
            yield from (f"{name} {precision}" for precision in (*module.PRECISIONS, *further))
    if reader.task == "fill-mask":
        why = f"a {type(model.module).__name__} answers with a whole vocabulary, token by token"
        limits.append(Limit("shrink", why, "its steps work in multum run; --runtime auto takes it"))


def _export_obstacle(name: str, model: Any) -> tuple[str | None, str, bool]:
    """Why an export cannot be made, or not the best one; what to do instead; and whether there is another one."""
    if name == "llamacpp":
        from .runtimes._gguf_model import read
        from .runtimes._gguf_tokenizer import tokenizer_fields

        rows = model.module.get_input_embeddings().num_embeddings
        reason = _refused(lambda: read(model.module)) or _refused(lambda: tokenizer_fields(model.tokenizer, rows))
        return reason, "predict and measure in torch; quantize makes its folder smaller", reason is None
    from .core.generation import settle
    from .runtimes import _traced, _written

    module = runtimes.find(name)
    if getattr(model.module.config, "is_encoder_decoder", False) and (reason := _refused(lambda: _written.facts_of(model, 1))):
        return reason, "other settings" if _refused(lambda: settle(model.module)) else "predict and measure in torch", False
    if hasattr(module, "obstacle") and (reason := module.obstacle(model.module)):
        why, _, install = reason.partition("; ")
        return why, install or "predict and measure in torch", False
    if name == "onnxruntime" and not _traced.writes(model.module):
        from .runtimes._encoder import obstacle

        return obstacle(model.module), "it is traced instead, which is exact and somewhat slower; openvino may be faster", True
    return None, "", True


def _of_precisions(works: list[str], facts: Mapping[str, Any], module: Any) -> Iterator[Limit]:
    """What this processor lacks for the exports that work."""
    if "openvino bf16" in works:
        from .runtimes.openvino import computes_in_bf16

        if not computes_in_bf16():
            works.remove("openvino bf16")
            yield Limit("openvino bf16", "this processor has no bf16 instructions", "openvino int8, or fp32")
    if any(one.endswith("int8") for one in works) and not any(facts["processor"]["features"][name] for name in INT8):
        yield Limit("int8 for speed", "this processor has no int8 instructions", "int8 for a quarter of the bytes; fp32 is as fast")


def _refused(call: Callable[[], Any]) -> str | None:
    """What an `InputError` of this call says; None if there is none."""
    try:
        call()
    except InputError as error:
        return "; ".join(error.problems)
    return None
