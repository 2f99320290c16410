"""torch as transformers users run it: the model folder itself, eager, fp32. What the original's latency is measured with.

Where asked for the model is compiled (`torch.compile`, with rows and lengths left open), which takes a C++ compiler and up to a
minute before the first answer.

It executes models of every task: the head decides how inputs are read and what is made of the outputs (`core/reading`).
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core.reading import reader_of, together, token_limit
from ..core.sentences import alone_sums, torch_told
from ..errors import InputError
from ._parity import COLUMNS, takes, torch_items
from ._predictor import Rows, Run, cores

if TYPE_CHECKING:
    from ..core.latency import Blocks, Timer
    from ..core.model import Model

PRECISIONS = ("fp32",)
EXTRA: str | None = None
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt", "vocab.json", "merges.txt")
GENERATION_FILES = ("generation_config.json", "source.spm", "target.spm", "spiece.model", "sentencepiece.bpe.model")


def unavailable() -> str | None:
    """torch is always there."""
    return None


def kernels() -> str:
    """What it computes with here."""
    import torch

    found = [name for name, there in (("MKL", torch.backends.mkl), ("oneDNN", torch.backends.mkldnn)) if there.is_available()]
    return f"{', '.join(found) or 'its own'} ({torch.backends.cpu.get_cpu_capability()})"


def export(model: Model, folder: Path, **_: Any) -> dict[str, Any]:
    """Refused: a model folder is what torch runs."""
    raise InputError(f"torch runs the model folder itself; there is nothing to export to {folder}")


class TorchPredictor(Rows):
    """Answers of a model folder by stock transformers."""

    def __init__(self, folder: Path, threads: int | None, compiled: bool = False) -> None:
        import torch

        from ..core.model import Model

        self.threads = threads or cores()
        torch.set_num_threads(self.threads)
        self.reader = reader_of(folder)
        model = Model.load(folder, auto_class=self.reader.auto_class)
        self.module, self.tokenizer = model.module, model.tokenizer
        self._forward: Any = torch.compile(model.module, dynamic=True) if compiled else model.module
        config = self.module.config
        self.labels = [str(config.id2label[i]) for i in range(config.num_labels)]
        self.runtime, self.precision = "pytorch", "fp32"
        self.max_length = token_limit(config, self.tokenizer)
        wanted = ("config.json", "model.safetensors", *TOKENIZER_FILES, *GENERATION_FILES)
        self.files = [path for path in sorted(folder.iterdir()) if path.name in wanted or path.suffix == ".safetensors"]
        self._torch = torch

    @property
    def generation(self) -> dict[str, Any]:
        """What decides the texts of an encoder-decoder, as it is recorded."""
        from ..core.generation import settings_of

        return settings_of(self.module)

    def use(self, threads: int) -> None:
        """Run on so many threads from now on."""
        self.threads = threads
        self._torch.set_num_threads(threads)

    def passes(self, threads: int) -> Run:
        """The model alone on so many threads; there to be timed. Columns that it does not read are passed over."""

        def run(columns: dict[str, np.ndarray]) -> np.ndarray:
            self.use(threads)
            with self._torch.inference_mode():
                batch = takes(self.module, {name: self._torch.from_numpy(column) for name, column in columns.items()})
                found: np.ndarray = self._forward(**batch)[self.reader.outputs[0]].numpy()
                return found

        return run

    def generated_s(self, ids: Sequence[int], new: int) -> float:
        """Seconds in which an encoder-decoder writes so many tokens for a source of these, searching as its settings say."""
        return 1e-3 * _timed(generating(self.module, self._torch.tensor([list(ids)]), new), self.threads)()

    def items(self, inputs: Sequence[Any]) -> list[np.ndarray]:
        """The outputs for every row that the inputs are read in, as `_parity.as_items` has them."""
        with self._torch.inference_mode():
            return torch_items(
                SimpleNamespace(module=self._forward, tokenizer=self.tokenizer), self.reader, inputs, self.max_length
            )

    def predict(self, inputs: Sequence[Any], batch_size: int = 32) -> np.ndarray:
        """What the task's reader makes of the outputs (a classifier's logits), float32, (inputs, ...), in the inputs' order."""
        if not inputs:
            return np.empty((0, len(self.labels)), dtype=np.float32)
        parts: list[Any] = [None] * len(inputs)
        # Without knowing the tokens yet, characters tell which texts are of about one length.
        order = sorted(range(len(inputs)), key=lambda i: _size(inputs[i]))
        with self._torch.inference_mode():
            for start in range(0, len(order), batch_size):
                chosen = order[start : start + batch_size]
                for place, part in zip(chosen, self._answer([inputs[i] for i in chosen], batch_size), strict=True):
                    parts[place] = part
        return together(parts)

    def alone(self, inputs: Sequence[Any]) -> np.ndarray:
        """Of a masked language model for each text what `core.sentences.alone_sums` tells, (texts, windows, 2), padded with nan."""
        from ..core.likelihood import context_of

        return together(alone_sums(self.tokenizer, inputs, context_of(self.module, self.tokenizer), torch_told(self.module)))

    def _answer(self, inputs: Sequence[Any], batch_size: int) -> list[np.ndarray]:
        if hasattr(self.reader, "run"):  # it takes more than one look at a row
            found: list[np.ndarray] = self.reader.run(self.module, self.tokenizer, inputs, batch_size=batch_size)
            return found
        encoded = self.reader.encode(self.tokenizer, inputs, self.max_length, "pt")
        batch = takes(self.module, {name: encoded[name] for name in COLUMNS if name in encoded})
        rows = len(batch["input_ids"])
        parts = []
        for start in range(0, rows, batch_size):  # an input may have several rows
            part = {name: value[start : start + batch_size] for name, value in batch.items()} if rows > batch_size else batch
            outputs = self._forward(**part)
            parts.append([outputs[name].numpy() for name in self.reader.outputs])
        joined = [np.concatenate(values) if len(parts) > 1 else values[0] for values in zip(*parts, strict=True)]
        return list(self.reader.predictions(encoded, dict(zip(self.reader.outputs, joined, strict=True)), inputs))


def stacks(model: Model, *, prompt: int, new: int, threads: int) -> Callable[[Blocks], Timer]:
    """What the latency table of a causal model is measured with: a maker of timers of blocks.

    Args:
        model: its embeddings, its head and blocks of its own, cut, make up what is timed: different ones where it has some that are
            wide enough, because the weights of one taken again and again would stay in the cache, as those of a whole model do not.
        prompt: tokens that are read.
        new: tokens that are written behind them.
        threads: to run on.

    Returns:
        Blocks, (heads, neurons) each -> a function that writes one text and returns the milliseconds. Blocks with attention stand
        first, because caches count their tokens in the first block.
    """
    from ..core.families import blocks_of, family_of
    from ..core.surgery import head_size, heads_and_neurons, keep_heads, keep_neurons
    from ..core.writing import Decoding, TorchWriter

    whole, family, size = heads_and_neurons(model.module), family_of(model.module), head_size(model.module)

    def timer(blocks: Blocks) -> Timer:
        wanted, numbers = sorted(blocks, key=lambda counts: counts[0] == 0), []
        for place, (h, n) in enumerate(wanted):
            fit = [i for i, (heads, neurons) in enumerate(whole) if heads >= h and neurons >= n]
            numbers.append(fit[place % len(fit)] if fit else max(range(len(whole)), key=lambda i: whole[i]))
        module = _shallow(model.module, [("", numbers)])
        for block, number, (h, n) in zip(blocks_of(module), numbers, wanted, strict=True):
            heads, neurons = whole[number]
            if h < heads:
                keep_heads(block, family, list(range(h)), size)
            if n < neurons:
                keep_neurons(block, family, list(range(n)))
        writer, ids = TorchWriter(module, model.tokenizer), [1] * prompt
        return _timed(lambda: writer.continued([ids], Decoding(max_new_tokens=new), forced=True), threads)

    return timer


def depths(model: Model, *, read: int, new: int, threads: int) -> Callable[[tuple[int, int]], Timer]:
    """The same for an encoder-decoder: of so many blocks in its encoder and its decoder, the first ones of each.

    Args:
        model: searches as its settings say.
        read: tokens of a source.
        new: tokens that are written for it.
        threads: to run on.
    """
    import torch

    ids = torch.ones(1, read, dtype=torch.long)

    def timer(depth: tuple[int, int]) -> Timer:
        # The decoder's first, because T5 wants no fewer blocks in its encoder.
        module = _shallow(model.module, [("decoder", list(range(depth[1]))), ("encoder", list(range(depth[0])))])
        return _timed(generating(module, ids, new), threads)

    return timer


def generating(module: Any, ids: Any, new: int) -> Callable[[], Any]:
    """An encoder-decoder that writes so many tokens for sources of these tokens, (sources, tokens), end or not."""
    import torch

    how = {"min_new_tokens": new, "max_new_tokens": new, "use_cache": True}
    return lambda: module.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **how)


def _shallow(module: Any, kept: Sequence[tuple[str, Sequence[int]]]) -> Any:
    """A copy with these blocks, which may be given more than once, that shares all parameters with the model."""
    from ..core.families import stacks_of
    from ..core.surgery import keep_blocks

    same = {id(parameter): parameter for parameter in module.parameters()}
    made = copy.deepcopy(module, dict(same)).eval()
    for name, numbers in kept:
        stack = next(stack for stack in stacks_of(made) if stack.name == name)
        for number in numbers:
            stack.blocks.append(copy.deepcopy(stack.blocks[number], dict(same)))
        keep_blocks(made, range(len(stack.blocks) - len(numbers), len(stack.blocks)), name)
    return made


def _timed(call: Callable[[], Any], threads: int) -> Timer:
    import torch

    def once() -> float:
        torch.set_num_threads(threads)
        started = time.perf_counter()
        with torch.inference_mode():
            call()
        return 1e3 * (time.perf_counter() - started)

    return once


def _size(value: Any) -> int:
    """Characters of a text, or of all that an input consists of."""
    if isinstance(value, str):
        return len(value)
    return sum(map(_size, value.values() if isinstance(value, dict) else value))


def open(folder: str | Path, *, threads: int | None = None, compiled: bool = False) -> TorchPredictor:
    """Open a model folder.

    Args:
        folder: the model folder.
        threads: to run on; by default all cores, or `OMP_NUM_THREADS`.
        compiled: by torch, when the first input comes.
    """
    return TorchPredictor(Path(folder), threads, compiled)
