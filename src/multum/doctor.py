"""What this machine can do, what is installed, and what to install for more."""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

FLAGS = {
    "AVX2": ("avx2", "8 fp32 numbers an instruction"),
    "AVX-512": ("avx512f", "16 fp32 numbers an instruction"),
    "VNNI": ("avx512_vnni", "int8 matrix products at several times the speed of fp32"),
    "AVX-VNNI": ("avx_vnni", "the same, 256 bits wide"),
    "bf16": ("avx512_bf16", "bf16 matrix products"),
    "AMX int8": ("amx_int8", "int8 matrix tiles"),
    "AMX bf16": ("amx_bf16", "bf16 matrix tiles: training at about twice the speed of fp32"),
    "dot product": ("asimddp", "int8 matrix products (Arm)"),
    "i8mm": ("i8mm", "int8 matrix tiles (Arm)"),
}
"""What multum calls it: the processor's flag and what it is good for."""
PACKAGES = ("torch", "transformers", "tokenizers", "datasets", "onnx", "onnxruntime", "onnxscript", "openvino", "nncf")
INT8 = ("VNNI", "AVX-VNNI", "AMX int8", "dot product", "i8mm")
"""Any of these makes 8-bit matrix products faster than those in fp32."""
EXTRAS = {
    "export": ("onnxscript", "exports to onnxruntime of architectures that no graph is written for by hand"),
    "lora": ("peft", "training by low-rank adapters, in a quarter of the memory"),
    "generation": ("sacrebleu", "scores of translations and summaries"),
    "evidence": ("captum", "which words an answer rests on, before and after"),
}
"""Extra -> the package that tells whether it is there, and what it is for; those of runtimes are told by the runtimes."""
NEEDED_MB = 3000
"""Peak memory of the quickstart."""


def examine() -> dict[str, Any]:
    """Everything that `multum doctor` shows, as JSON values.

    Returns:
        `system`, `processor` (with `features`, name -> bool), `memory`, `accelerators`, `versions`, `runtimes` (name -> what
        it exports to and with which kernels, or why it cannot and what to install), `extras` (name -> bool), `torchvision` (what is
        wrong with it, or None), `cache`, `disk`, and `advice`, what could be better, each hint once.
    """
    from . import __version__

    facts: dict[str, Any] = {
        "multum": __version__,
        "system": {
            "system": f"{platform.system()} {platform.release()} {platform.machine()}",
            "python": platform.python_version(),
            "environment": sys.prefix,
        },
        "processor": processor(),
        "memory": _memory(),
        "accelerators": _accelerators(),
        "versions": {name: version_of(name) for name in PACKAGES},
        "runtimes": _runtimes(),
        "extras": {extra: importlib.util.find_spec(package) is not None for extra, (package, _) in EXTRAS.items()},
        "torchvision": _torchvision(),
        "cache": _cache(),
        "disk": {"folder": str(Path.cwd()), "free_gb": round(shutil.disk_usage(Path.cwd()).free / 1e9, 1)},
    }
    return facts | {"advice": _advice(facts)}


def processor() -> dict[str, Any]:
    """Its name, the cores that may be used, and which of `FLAGS` it has. No torch is imported."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").is_file() else []
    entries = [(key.strip(), value.strip()) for key, _, value in (line.partition(":") for line in lines)]
    models = [value for key, value in entries if key == "model name"]
    flags = {flag for key, value in entries if key in ("flags", "Features") for flag in value.split()}
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "name": models[0] if models else platform.processor() or platform.machine(),
        "cores": usable,
        "cores_of_machine": os.cpu_count(),
        "features": {name: flag in flags for name, (flag, _) in FLAGS.items()},
    }


def _memory() -> dict[str, Any]:
    import psutil

    memory = psutil.virtual_memory()
    return {"total_mb": memory.total // 10**6, "available_mb": memory.available // 10**6}


def _accelerators() -> list[str]:
    if importlib.util.find_spec("torch") is None:
        return []
    import torch

    if torch.cuda.is_available():
        return [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return ["Apple GPU (MPS)"] if torch.backends.mps.is_available() else []


def _torchvision() -> str | None:
    """Why it cannot be imported, where it is installed: its build has to fit torch's, and transformers imports it."""
    if importlib.util.find_spec("torchvision") is None:
        return None
    try:
        importlib.import_module("torchvision")
    except (RuntimeError, ImportError, OSError) as error:
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    return None


def version_of(name: str) -> str | None:
    """Of an installed package; None where it is not."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _runtimes() -> dict[str, Any]:
    from . import runtimes

    found = {}
    for name in runtimes.names():
        module = runtimes.find(name)
        reason = module.unavailable()
        install = f"pip install 'multum[{module.EXTRA}]'" if module.EXTRA else f"pip install {name}"
        found[name] = {
            "precisions": list(module.PRECISIONS),
            "available": reason is None,
            "reason": reason and reason.partition("; pip install")[0],
            "install": None if reason is None else install,
            "kernels": module.kernels() if reason is None and hasattr(module, "kernels") else None,
        }
    return found


def _cache() -> dict[str, Any]:
    from .core.folders import cache_home

    folder = cache_home()
    used = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) if folder.is_dir() else 0
    return {"folder": str(folder), "used_mb": round(used / 1e6, 1)}


def _advice(facts: dict[str, Any]) -> list[str]:
    """What could be better, each with what to do about it."""
    missing = {name: runtime for name, runtime in facts["runtimes"].items() if not runtime["available"]}
    advice = [f"{name} cannot be used: {runtime['reason']}; {runtime['install']}" for name, runtime in missing.items()]
    advice += [
        f"for {EXTRAS[extra][1]}: pip install 'multum[{extra}]'" for extra, there in facts.get("extras", {}).items() if not there
    ]
    if facts.get("torchvision"):
        advice.append(
            f"torchvision breaks every model that transformers imports ({facts['torchvision']}): pip uninstall torchvision"
        )
    features = facts["processor"]["features"]
    if not any(features[name] for name in INT8):
        advice.append("this processor has no int8 instructions: int8 models get smaller here, but hardly faster")
    if facts["memory"]["available_mb"] < NEEDED_MB:
        advice.append(
            f"{facts['memory']['available_mb']} MB of memory are free; shrinking a small model takes about {NEEDED_MB} MB"
        )
    if facts["disk"]["free_gb"] < 2:
        advice.append(f"{facts['disk']['free_gb']} GB are free in {facts['disk']['folder']}; a run keeps every rung, about 1 GB")
    return advice
