# make demo        train, distil and evaluate scikit-learn's digits
# make results     write RESULTS.md and its pictures from finished runs, RUNS="runs/a runs/b"
# make test        everything that has to be green: lint, types, tests
# Another Python: make PYTHON=python3.12 ...

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
DEMO_DIR ?= runs/digits

.DEFAULT_GOAL := help
.PHONY: help install demo test lint typecheck bench results

help:
	@echo "make install    make .venv and install ddgen with its tools into it"
	@echo "make demo       train, distil and evaluate on digits; output in $(DEMO_DIR)"
	@echo "make test       lint, type check and tests"
	@echo "make lint       ruff"
	@echo "make typecheck  mypy"
	@echo "make bench      measure speed"
	@echo "make results    write RESULTS.md from RUNS=\"runs/a runs/b\", with NOTES=FILE if there are any"

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

# A finished run is never overwritten: the next demo goes to runs/digits-2, and so on. One stopped in training goes on.
demo: $(STAMP)
	@set -e; dir=$(DEMO_DIR); n=2; \
	while [ -e "$$dir/generator" ]; do dir=$(DEMO_DIR)-$$n; n=$$((n + 1)); done; \
	echo "demo: writing to $$dir"; \
	set -x; \
	$(BIN)/accelerate launch train_ldm.py --config configs/digits_demo.yaml --output_dir "$$dir"; \
	$(BIN)/python sample.py --run_dir "$$dir" --ipc 10; \
	$(BIN)/python evaluate.py --run_dir "$$dir" --epochs 30 --repeats 2

test: lint typecheck
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

typecheck: $(STAMP)
	$(BIN)/mypy

bench: $(STAMP)
	@set -e; for script in $(filter-out benchmarks/recipe.py benchmarks/labels.py benchmarks/samplers.py benchmarks/results.py benchmarks/study.py,$(sort $(wildcard benchmarks/*.py))); do echo "== $$script"; $(BIN)/python "$$script"; done

results: $(STAMP)
	$(BIN)/python benchmarks/results.py $(RUNS) $(if $(NOTES),--notes $(NOTES))
