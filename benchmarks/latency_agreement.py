"""Whether `multum measure` times the original in torch as a ten-line script does that knows only transformers.

    python benchmarks/latency_agreement.py [MODEL]

Both answer the same number of test texts of the film reviews one by one, each in a fresh process, in turns: torch fp32, eager, all
cores. What is given is the ratio of the two medians, round by round, and beside it the same of the script against itself, started
again on the same texts: that is noise.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

from common import median_with_range, publish

from multum._measure import measure
from multum.data import open_task
from multum.example import fetch

ROUNDS, TEXTS = 7, 300


def main() -> None:
    task = open_task("text-classification", str(fetch("reviews-en")))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        task.load(sys.argv[1] if len(sys.argv) > 1 else str(fetch("minilm"))).save(folder)
        texts = Path(scratch) / "texts.json"
        rows = []
        for seed in range(ROUNDS):
            texts.write_text(json.dumps(random.Random(seed).choices(task.inputs("test"), k=TEXTS)), encoding="utf-8")
            script = [sys.executable, str(Path(__file__).with_name("ten_lines.py")), str(folder), str(texts)]
            alone, again = (float(subprocess.run(script, check=True, capture_output=True, text=True).stdout) for _ in range(2))
            (metrics,) = measure([folder], task, rounds=TEXTS // 50, texts_per_round=50)
            rows.append((alone, again, metrics["speed"]["p50_ms"]))
            print(f"script {alone:.3f} ms, again {again:.3f} ms, measure {rows[-1][2]:.3f} ms", flush=True)
    ratio = median_with_range([2 * ours / (alone + again) for alone, again, ours in rows])
    noise = median_with_range([again / alone for alone, again, _ in rows])
    alone = median_with_range([alone for alone, _, _ in rows])
    table = [
        ["", "median", "lowest", "highest"],
        ["ten-line script, ms", *(f"{alone[key]:.2f}" for key in ("median", "low", "high"))],
        ["script again / script", *(f"{noise[key]:.3f}" for key in ("median", "low", "high"))],
        ["measure / mean of the two", *(f"{ratio[key]:.3f}" for key in ("median", "low", "high"))],
    ]
    publish("latency_agreement", table, {"rounds_ms": rows, "script_ms": alone, "noise": noise, "ratio": ratio, "texts": TEXTS})


if __name__ == "__main__":
    main()
