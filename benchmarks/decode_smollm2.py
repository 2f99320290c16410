"""SmolLM2-135M as torch, llama.cpp, OpenVINO and onnxruntime run it: perplexity, prefill, decoding, first token, bytes and memory.

    python benchmarks/decode_smollm2.py [--small]

Every form runs in a process of its own on all cores, and they are timed in turns: 128 tokens of a held-out text are read and 64
written greedily behind them. What is given are medians, and ratios of the same round against torch in fp32. llama.cpp is also run
without multum: llama-cpp-python's own `Llama`, on the file in f16 and on what llama.cpp's own quantization makes of it.

The packaged weights are a 4-bit model already, so that "fp32" is a dequantized one and 4 bits are a second rounding.
`--small` tries the script on little data and keeps nothing.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import publish

from multum._measure import ratio
from multum._measure_worker import peak_memory
from multum.core.model import Model
from multum.core.writing import Decoding
from multum.data import open_task
from multum.example import fetch
from multum.targets import export_model

ROUNDS, PROMPT, NEW = 11, 128, 64
PRECISIONS = ("f16", "q8_0", "q4_0")
GRAPHS = (("openvino", "bf16"), ("openvino", "int8"), ("openvino", "int4"), ("onnxruntime", "int8"), ("onnxruntime", "int4"))
THREADS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Torch:
    """transformers, eager."""

    def __init__(self, path: Path, kind: str) -> None:
        import torch

        from multum.core.writing import TorchWriter

        torch.set_num_threads(THREADS)
        self.model = Model.load(path, auto_class="AutoModelForCausalLM")
        if kind == "torch bf16":
            self.model.module.to(torch.bfloat16)
        self.writer = TorchWriter(self.model.module, self.model.tokenizer)

    def sums(self, texts: Sequence[str]) -> Any:
        from multum.core.sentences import causal_sums

        return np.concatenate(causal_sums(self.model.module, self.model.tokenizer, texts, batch_size=4))

    def write(self, ids: list[int], times: list[float]) -> None:
        how = Decoding(max_new_tokens=NEW)
        self.writer.continued([ids], how, lambda _: times.append(time.perf_counter()), forced=True)


class Export:
    """multum's export."""

    def __init__(self, path: Path) -> None:
        from multum import runtimes

        self.predictor = runtimes.open(path, threads=THREADS)

    def sums(self, texts: Sequence[str]) -> Any:
        found = self.predictor.predict(texts)
        return found[~np.isnan(found).any(-1)]

    def write(self, ids: list[int], times: list[float]) -> None:
        how = Decoding(max_new_tokens=NEW)
        self.predictor.continued([ids], how, lambda _: times.append(time.perf_counter()), forced=True)


class Alone:
    """llama-cpp-python by itself."""

    def __init__(self, path: Path) -> None:
        from llama_cpp import Llama

        self.model = Llama(str(path), n_ctx=PROMPT + NEW, n_threads=THREADS, n_threads_batch=THREADS, verbose=False)

    def write(self, ids: list[int], times: list[float]) -> None:
        self.model.reset()
        self.model.eval(ids)
        for number in range(NEW):
            token = self.model.sample(temp=0.0)
            times.append(time.perf_counter())
            if number + 1 < NEW:
                self.model.eval([token])


def work(kind: str, path: Path) -> None:
    """One form in a process of its own: orders on stdin, answers on stdout."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    form: Any = Alone(path) if kind == "alone" else Export(path) if kind == "export" else Torch(path, kind)
    for line in sys.stdin:
        order = json.loads(line)
        if "ids" in order:
            times: list[float] = []
            started = time.perf_counter()
            form.write(order["ids"], times)
            found: Any = [times[0] - started, times[-1] - times[0]]
        elif "texts" in order:
            nll, tokens, _ = form.sums(order["texts"]).sum(0)
            found = math.exp(nll / tokens)
        else:
            found = peak_memory()
        answers.write(json.dumps(found) + "\n")
        answers.flush()


class Form:
    """A form and its process."""

    def __init__(self, name: str, kind: str, path: Path) -> None:
        self.name, self.kind = name, kind
        self.bytes = path.stat().st_size if path.is_file() else _bytes(path)
        script = [sys.executable, __file__, "--work", kind, str(path)]
        self.process = subprocess.Popen(script, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.times: list[tuple[float, float]] = []
        self.perplexity: float | None = None
        self.memory = 0.0

    def ask(self, **order: Any) -> Any:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name}: its process died with code {self.process.wait()}")
        return json.loads(line)


def main(small: bool) -> None:
    task = open_task("text-generation", str(fetch("plain-en")))
    texts = list(task.inputs("test"))[: 3 if small else None]
    with tempfile.TemporaryDirectory() as scratch:
        model = task.load(str(fetch("smollm2")))
        forms = [Form(*one) for one in made(model, task, Path(scratch))]
        prompts = [ids[:PROMPT] for ids in model.tokenizer(texts)["input_ids"] if len(ids) >= PROMPT]
        del model
        for form in forms:
            form.ask(ids=prompts[0])
            if form.kind != "alone":
                form.perplexity = form.ask(texts=texts)
        for number in range(2 if small else ROUNDS):
            for form in forms:
                form.ask(ids=prompts[0][:16])  # it has waited for the others
                form.times.append(form.ask(ids=prompts[number % len(prompts)]))
            print(f"round {number + 1}", file=sys.stderr, flush=True)
        for form in forms:
            form.memory = form.ask()
            form.process.kill()
    rows, values = table(forms)
    if small:
        print("\n".join(" | ".join(row) for row in rows))
    else:
        publish("decode_smollm2", rows, {"forms": values, "prompt": PROMPT, "new": NEW, "threads": THREADS, "texts": len(texts)})


def made(model: Model, task: Any, folder: Path) -> list[tuple[str, str, Path]]:
    """Every form on disk: name, kind, place."""
    from multum import runtimes
    from multum.runtimes import llamacpp
    from multum.runtimes._llama import quantized

    model.save(folder / "torch")
    found = [("torch fp32", "torch fp32", folder / "torch"), ("torch bf16", "torch bf16", folder / "torch")]
    for precision in PRECISIONS:
        place = folder / f"llamacpp-{precision}"
        parity = llamacpp.export(model, place, precision=precision, inputs=task.inputs("validation")[:64])
        facts = {key: value for key, value in parity.items() if key != "worst"}
        print(precision, facts, file=sys.stderr, flush=True)
        alone = folder / f"{precision}.gguf"
        source = folder / "llamacpp-f16" / llamacpp.FILE
        if precision == "f16":
            os.link(source, alone)
        else:
            quantized(source, alone, precision.upper(), THREADS)
        found += [(f"llamacpp {precision}", "export", place), (f"llama-cpp-python alone, {precision}", "alone", alone)]
    for runtime, precision in GRAPHS:
        place = folder / f"{runtime}-{precision}"
        parity = export_model(runtimes.find(runtime), model, place, precision, task, 0)
        print(runtime, precision, {key: value for key, value in parity.items() if key != "worst"}, file=sys.stderr, flush=True)
        found.append((f"{runtime} {precision}", "export", place))
    return found


def table(forms: Sequence[Form]) -> tuple[list[list[str]], dict[str, Any]]:
    """A row for each form, and the figures behind it."""
    rows = [["", "perplexity", "prefill tokens/s", "x fp32", "decode tokens/s", "x fp32", "first token ms", "MB", "peak MB"]]
    first, values = np.array(forms[0].times), {}
    for form in forms:
        times = np.array(form.times)
        speeds = [PROMPT / times[:, 0], (NEW - 1) / times[:, 1]]
        faster = [ratio(first[:, i], times[:, i]) for i in (0, 1)]
        cells = [cell for speed, ours in zip(speeds, faster, strict=True) for cell in (f"{np.median(speed):.0f}", _with(ours))]
        waited = 1e3 * float(np.median(times[:, 0]))
        written = "" if form.perplexity is None else f"{form.perplexity:.2f}"
        rows.append([form.name, written, *cells, f"{waited:.0f}", f"{form.bytes / 1e6:.1f}", f"{form.memory:.0f}"])
        values[form.name] = {
            "seconds": times.tolist(),
            "perplexity": form.perplexity,
            "bytes": form.bytes,
            "memory_mb": form.memory,
        }
    by_name = {form.name: np.array(form.times) for form in forms}
    for precision in PRECISIONS:
        ours, alone = by_name[f"llamacpp {precision}"], by_name[f"llama-cpp-python alone, {precision}"]
        found = [_with(ratio(alone[:, i], ours[:, i])) for i in (0, 1)]
        rows.append([f"multum / alone, {precision}", "", "", found[0], "", found[1], "", "", ""])
    return rows, values


def _with(found: dict[str, Any]) -> str:
    low, high = found["ci95"]
    return f"{found['value']:.2f} ({low:.2f} to {high:.2f})"


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.name not in ("recipe.json", "generation_config.json"))


if __name__ == "__main__":
    if "--work" in sys.argv:
        work(sys.argv[2], Path(sys.argv[3]))
    else:
        main("--small" in sys.argv)
