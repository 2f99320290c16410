"""How long `multum --help` takes to answer, beside an empty Python process. Goal: under 0.5 s.

python benchmarks/startup.py
"""

from __future__ import annotations

import subprocess
import sys
import time

from common import median_with_range, publish

ROUNDS = 11


def seconds(*command: str) -> float:
    started = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - started


def main() -> None:
    commands = {"python -c pass": (sys.executable, "-c", "pass"), "multum --help": (sys.executable, "-m", "multum", "--help")}
    seen: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(ROUNDS):
        for name, command in commands.items():
            seen[name].append(seconds(*command))
    found = {name: median_with_range(times) for name, times in seen.items()}
    rows = [[name, *(f"{f[k]:.3f}" for k in ("median", "low", "high"))] for name, f in found.items()]
    publish("startup", [["command", "median s", "lowest", "highest"], *rows], {"seconds": found})


if __name__ == "__main__":
    main()
