# Two commands are all a newcomer needs: `make demo` and `make test`. Each sets up .venv by itself.
PYTHON ?= python3
BIN := .venv/bin
# Two ranks: over gloo without GPUs, over NCCL with two of them. A single GPU has room for one rank.
DEMO_RANKS = $$($(BIN)/python -c 'import torch; print(1 if torch.cuda.device_count() == 1 else 2)')

.PHONY: demo test lint clean

demo: .venv/installed
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/torchrun --standalone --nproc-per-node $(DEMO_RANKS) launch/demo.py

# A file of tests at a time in each process: one more of them than the cores of a small machine, as many tests wait.
test: .venv/installed
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/pytest --numprocesses 3 --dist loadfile

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache
