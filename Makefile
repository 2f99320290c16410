# Everything runs in an environment of its own, .venv, made on first use and pinned by constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready
RUN ?= runs/quickstart

.PHONY: quickstart test check lint types bench bench-applications clean

quickstart: $(READY)
	$(BIN)/multum quickstart -o $(RUN)

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

check: lint types test

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

bench: $(READY)
	for script in startup.py distil_cost.py one_shot.py latency_agreement.py "distillation.py --texts 1000 --epochs 12" "distillation.py --data reviews-zh --model e5-small --texts 1000 --epochs 12" "reviews.py --quick" reviews.py; do $(BIN)/python benchmarks/$$script || exit 1; done

bench-applications: $(READY)
	$(BIN)/python benchmarks/recipes.py
	for name in reviews-zh cloze-qa translation black-box summarization text-generation; do $(BIN)/python benchmarks/applications.py $$name || exit 1; done

clean:
	rm -rf .venv build *.egg-info src/*.egg-info

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "multum needs Python 3.11 or newer: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[openvino,dev]'
	@touch $@
