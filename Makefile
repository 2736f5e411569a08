# make demo   replicas train a convnet on real digits; ends with a table and a report (under a minute)
# make demo-distributed   the same training in one process, over a tree and with a parameter server, in 4 and 5 processes
# make test   the whole test suite
# make test-trackers   installs wandb, mlflow and trackio too (600 MB), and tests what they keep
# make lint   style, docstrings and types
# Each creates .venv and installs on its first call; later calls start at once.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.DELETE_ON_ERROR:
.PHONY: demo demo-distributed test test-trackers lint benchmark clean

demo: $(READY)
	$(BIN)/replica-newton compare --dataset digits --methods sgd,paper --replicas 1,2,4,8 \
		--learning-rates 0.2,0.3 --epochs 10 --seeds 0,1,2 --out runs/demo

demo-distributed: $(READY)
	$(BIN)/python examples/distributed.py

test: $(READY)
	$(BIN)/pytest -n 2

test-trackers: $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch==2.13.0 \
		--editable ".[dev,wandb,mlflow,trackio]"
	$(BIN)/pytest tests/test_trackers.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

benchmark: $(READY)
	$(BIN)/python benchmarks/algebra_cost.py

clean:
	rm -rf .venv runs

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python >= 3.11 is needed; $(PYTHON) is older (try: make PYTHON=python3.11)" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch==2.13.0 --editable ".[dev]"
	@touch $@
