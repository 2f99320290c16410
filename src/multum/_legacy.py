r"""Old checkpoints that transformers 5 cannot load any more, as folders that it can.

Two kinds. A folder of transformers 4 whose `config.json` names `pruned_heads`: its weights were cut when it was saved, and
transformers 5, which has forgotten that field, raises on their shapes. And a whole module written by `torch.save(model)`, as
pruning tools of that time did. In both the shapes are read off the weights and written down for multum's loader (`core.shapes`).

A pickle can run code when it is opened. This one is not given the chance: `torch.load(weights_only=True)` calls only what it is
allowed to; classes of transformers and of torch.nn are replaced by empty shells that keep attributes and have no methods;
everything else is refused by name before anything is read. What comes out is tensors, numbers and texts.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .core.families import family_of, stacks_of
from .core.folders import read_json
from .core.linears import is_linear, shape_of
from .core.model import Model
from .core.shapes import METHOD, without_shapes
from .core.surgery import head_size, head_width, queries_per_head, rows_of_one, width
from .errors import InputError

KNOWN = re.compile(
    r"transformers(\.models\.\w+)?\.(modeling|configuration)_\w+\.\w+"
    r"|transformers\.(activations|pytorch_utils)\.\w+|transformers\.generation\.configuration_utils\.GenerationConfig"
    r"|torch\.nn\.modules\.\w+\.\w+|torch\.nn\.functional\.\w+|torch\._C\._nn\.\w+"
)
"""What a saved module is made of. None of it is ever run."""
OLD_BUFFERS = ("position_ids", "attn.bias", "attn.masked_bias")
"""How the names of buffers end that transformers 4 saved and transformers 5 computes."""
DEEPEST = 40
"""Modules inside modules. No model has more; a damaged file might go round in circles."""
MOST = 100_000
"""Modules, one that is used twice counted twice: a small file can say of each that it holds the next one two times."""
BROKEN = (RuntimeError, UnpicklingError, EOFError, KeyError, IndexError, TypeError, ValueError, AttributeError, AssertionError)
"""What torch raises on a file that is no checkpoint."""


@dataclass(frozen=True)
class Checkpoint:
    """What an old checkpoint says."""

    config: dict[str, Any]
    architecture: str
    """The name of the model's class."""
    weights: dict[str, torch.Tensor]


class Shell:
    """Stands for an object of a class that is not loaded: its attributes, none of its code."""

    origin = ""

    def __new__(cls, *_: Any, **__: Any) -> Shell:
        return object.__new__(cls)

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)


def load_legacy(source: Path, *, tokenizer: str = "", allow_pickle: bool = False) -> tuple[Model, dict[str, Any]]:
    """A model out of an old checkpoint, and what was found.

    Args:
        source: a folder with `config.json` and weights, or a file with a whole module.
        tokenizer: folder or Hub id of its tokenizer; by default it is looked for beside the weights.
        allow_pickle: open pickled weights, in the restricted way described above.

    Returns:
        The model, and for the record: `tensors` read, linear layers `cut` with their shapes.

    Raises:
        InputError: no such checkpoint, a pickle without leave, a pickle with anything but a model in it, or weights that do not fit
            their own config.
    """
    found = _read(source, allow_pickle)
    module, cut = assemble(found)
    folder = source if source.is_dir() else source.parent
    try:
        words = AutoTokenizer.from_pretrained(tokenizer or str(folder))
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise InputError(
            f"no tokenizer in {tokenizer or folder}; name the folder or Hub id of the model's own: --tokenizer"
        ) from error
    return Model(module=module, tokenizer=words, source=str(source)), {"tensors": len(found.weights), "cut": cut}


def _read(source: Path, allow_pickle: bool) -> Checkpoint:
    if source.is_file():
        _may_open(source, allow_pickle)
        return _of_module(unpickle(source), source)
    if not (source / "config.json").is_file():
        raise InputError(f"{source} is neither a file nor a folder with config.json")
    config = read_json(source / "config.json")
    weights: dict[str, torch.Tensor] = {}
    try:
        for file in sorted(source.glob("*.safetensors")):
            weights |= load_file(file)
    except SafetensorError as error:
        raise InputError(f"{source}: the weights are damaged ({error})") from error
    if not weights:
        files = sorted(source.glob("pytorch_model*.bin"))
        if not files:
            raise InputError(f"{source} has no weights: neither *.safetensors nor pytorch_model*.bin")
        for file in files:
            _may_open(file, allow_pickle)
            opened = unpickle(file)
            if isinstance(opened, Shell):
                return _of_module(opened, file)
            weights |= _tensors(opened, file)
    names = config.get("architectures") or []
    if len(names) != 1:
        raise InputError(f"{source}/config.json must name one class in 'architectures' (it has {names or 'none'})")
    return Checkpoint(config, str(names[0]), weights)


def _may_open(file: Path, allow_pickle: bool) -> None:
    if not allow_pickle:
        raise InputError(f"{file} is a pickle, which can hold code; to have its tensors read, and nothing run, give --allow-pickle")


def unpickle(file: Path) -> Any:
    """Tensors, plain values and shells out of a file of `torch.save`.

    Raises:
        InputError: names everything in it that a model is not made of; or it is no such file.
    """
    try:
        strange = torch.serialization.get_unsafe_globals_in_checkpoint(file)
        if refused := sorted(name for name in strange if not KNOWN.fullmatch(name)):
            raise InputError(f"{file} asks for what no model is made of, and is not opened: {', '.join(refused)}")
        shells: list[Any] = [(type(name.rpartition(".")[2], (Shell,), {"origin": name}), name) for name in strange]
        with torch.serialization.safe_globals(shells):
            return torch.load(file, map_location="cpu", weights_only=True)
    except BROKEN as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{file} is no file that torch.save has written (with torch 1.6 or newer): {reason}") from error


def _of_module(root: Any, file: Path) -> Checkpoint:
    config = getattr(root, "config", None)
    if not isinstance(root, Shell) or not isinstance(config, Shell):
        raise InputError(f"{file} holds no transformers model; of a file with weights alone give the folder, config.json beside it")
    model_type = getattr(getattr(transformers, type(config).__name__, None), "model_type", None)
    if not isinstance(model_type, str):
        raise InputError(f"{file} has a config of class {config.origin}, which this transformers does not know")
    values = {name: value for name, value in vars(config).items() if not name.startswith("_") and _is_plain(value)}
    return Checkpoint(
        values | {"model_type": model_type}, type(root).__name__, _tensors(dict(_walk(root, iter(range(MOST)))), file)
    )


def _walk(shell: Shell, left: Iterator[int], prefix: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Names and tensors of a module, as its state dict would have them. `left` is used up by one for every module."""
    parts = vars(shell)
    if depth > DEEPEST:
        raise InputError(f"the module {prefix!r} lies inside itself")
    if next(left, None) is None:
        raise InputError(f"it has more than {MOST} modules, which no model has")
    passing = parts.get("_non_persistent_buffers_set") or ()
    for kind in ("_parameters", "_buffers"):
        for name, tensor in dict(parts.get(kind) or {}).items():
            if tensor is not None and not (kind == "_buffers" and name in passing):
                yield f"{prefix}{name}", tensor
    for name, part in dict(parts.get("_modules") or {}).items():
        if isinstance(part, Shell):
            yield from _walk(part, left, f"{prefix}{name}.", depth + 1)


def _tensors(found: Any, file: Path) -> dict[str, torch.Tensor]:
    if not isinstance(found, Mapping) or not all(isinstance(v, torch.Tensor) and isinstance(k, str) for k, v in found.items()):
        raise InputError(f"{file} holds something other than the weights of a model")
    return {name: tensor.detach() for name, tensor in found.items()}


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str | int) and _is_plain(each) for key, each in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, str | int | float | bool)


def assemble(found: Checkpoint) -> tuple[Any, dict[str, list[int]]]:
    """The model with these weights, and the linear layers whose shapes are not the config's, with the shapes they have.

    Raises:
        InputError: a class or architecture that is not known here, or weights that do not fit; all of them named.
    """
    cls: Any = getattr(transformers, found.architecture, None)
    if not (isinstance(cls, type) and issubclass(cls, PreTrainedModel)):
        raise InputError(f"this transformers has no model class {found.architecture!r}")
    values = {name: value for name, value in without_shapes(found.config).items() if name not in ("pruned_heads", "model_type")}
    try:
        config = AutoConfig.for_model(found.config.get("model_type", ""), **values)
        with torch.device("meta"):
            stock = cls(config)
    except (ValueError, KeyError, TypeError, StrictDataclassError) as error:
        raise InputError(f"its config does not make a {found.architecture}: {error}") from error
    family_of(stock)
    cut = _cut(stock, found.weights)
    heads, unknown = _heads_of_biases(stock, cut, found)
    if problems := [*_heads_that_differ(stock, cut, found), *unknown]:
        raise InputError(*problems)
    config.architectures = [found.architecture]
    if cut:
        config.quantization_config = {"quant_method": METHOD, "shapes": cut, "heads": heads}
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        save_file({name: tensor.clone().contiguous() for name, tensor in found.weights.items()}, Path(folder) / "model.safetensors")
        try:
            loaded: Any = cls.from_pretrained(folder, output_loading_info=True, use_safetensors=True)
        except (RuntimeError, ValueError) as error:
            raise InputError(f"its weights do not fit its config: {str(error).strip().splitlines()[-1]}") from error
    module, info = loaded
    strange = [name for name in info["unexpected_keys"] if not name.endswith((*OLD_BUFFERS, *_removed(cut)))]
    problems = [f"its weights lack {name}" for name in sorted(info["missing_keys"])]
    problems += [f"its weights have {name}, which a {found.architecture} has no place for" for name in sorted(strange)]
    if problems:
        raise InputError(*problems)
    return module.eval(), cut


def _removed(cut: Mapping[str, list[int]]) -> list[str]:
    """Weights without an entry, of layers that are gone whole."""
    return [f"{name}.{part}" for name, shape in cut.items() if 0 in shape for part in ("weight", "bias")]


def _cut(stock: Any, weights: Mapping[str, torch.Tensor]) -> dict[str, list[int]]:
    cut = {}
    for name, part in stock.named_modules():
        tensor = weights.get(f"{name}.weight")
        if is_linear(part) and tensor is not None and tensor.dim() == 2:
            shape = tuple(reversed(tensor.shape)) if isinstance(part, Conv1D) else tuple(tensor.shape)
            if shape != shape_of(part):
                cut[name] = [int(n) for n in shape]
    return cut


def _heads_that_differ(stock: Any, cut: Mapping[str, list[int]], found: Checkpoint) -> list[str]:
    """Whether what the config says was pruned is what the weights lack."""
    family, base = family_of(stock), getattr(stock, "base_model_prefix", "")
    rows = sum(rows_of_one(family, queries_per_head(stock), head_size(stock))[family.query])  # GPT-2 keeps all three in one matrix
    prefix = f"{base}.{family.blocks}" if hasattr(stock, base) else family.blocks
    problems = []
    for number, heads in _pruned(found).items():
        name = f"{prefix}.{number}.{family.query}"
        whole = dict(stock.named_modules()).get(name)
        if whole is None:
            problems.append(f"config.json names pruned heads of block {number}, which the model does not have")
            continue
        has = cut.get(name, list(shape_of(whole)))[0]
        wanted = shape_of(whole)[0] - rows * len(heads)
        if has != wanted:
            problems.append(f"block {number}: config.json names {len(heads)} pruned heads, so {wanted} rows; its query has {has}")
    return problems


def _heads_of_biases(stock: Any, cut: Mapping[str, list[int]], found: Checkpoint) -> tuple[dict[str, list[int]], list[str]]:
    """Where every head has a bias of its own (MPNet, T5), the heads that each cut attention still has; those that nobody tells."""
    names, heads, problems = {part: name for name, part in stock.named_modules()}, {}, []
    for stack in stacks_of(stock):
        for row in (stack.family, stack.family.cross):
            for number, block in enumerate(stack.blocks):
                if row is None or row.head_bias is None or names[block.get_submodule(row.query)] not in cut:
                    continue
                gone = None if stack.name else _pruned(found).get(number)
                if gone is None:
                    problems.append(
                        f"{stack.name or 'the model'}, block {number}: heads were cut, and config.json does not say which in "
                        "'pruned_heads'; in this architecture each has a bias of its own"
                    )
                    continue
                count = width(block, row.attention_output) // head_width(stock, row)
                heads[names[block.get_submodule(row.head_bias)]] = [head for head in range(count) if head not in gone]
    return heads, problems


def _pruned(found: Checkpoint) -> dict[int, set[int]]:
    """Block -> heads that were pruned, as the config says."""
    try:
        return {int(number): {int(head) for head in heads} for number, heads in (found.config.get("pruned_heads") or {}).items()}
    except (TypeError, ValueError, AttributeError) as error:
        raise InputError(f"'pruned_heads' of its config must be heads by block, {{block: [heads]}} ({error})") from error
