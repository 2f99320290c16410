"""What anybody would write to time a classifier with transformers alone: median milliseconds for one text.

python benchmarks/ten_lines.py MODEL TEXTS.json
"""

import json
import statistics
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

model, tokenizer = AutoModelForSequenceClassification.from_pretrained(sys.argv[1]), AutoTokenizer.from_pretrained(sys.argv[1])
times = []
with torch.no_grad():
    for text in json.loads(Path(sys.argv[2]).read_text(encoding="utf-8")):
        started = time.perf_counter()
        model(**tokenizer(text, return_tensors="pt"))
        times.append(1e3 * (time.perf_counter() - started))
print(statistics.median(times))
