# The two commands that matter are `make audit` (the main job on the shipped model) and `make test`.
# Both create .venv and install what they need; nothing else has to be there but Python >= 3.11.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
CONSTRAINTS := $(if $(filter Linux,$(shell uname -s)),-c constraints-linux.txt)
# One thread a process: the tests run in parallel processes instead.
TEST_ENV := OMP_NUM_THREADS=1

.PHONY: audit test check lint types format model clean

audit: $(INSTALLED)
	$(BIN)/assay doctor
	$(BIN)/assay run --dtype float32 --dtype float16 --dtype bfloat16
	$(BIN)/assay run --experts q4_k --kernels host --prompt '^A00482+99915='
	$(BIN)/assay golden verify

test: $(INSTALLED)
	$(TEST_ENV) $(BIN)/python -m pytest -n auto --dist loadgroup

check: lint types test

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(INSTALLED)
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Trains the shipped model anew (minutes on one GPU, days on a CPU); goldens/model/README.md has the figures.
model: $(INSTALLED)
	$(BIN)/python -m goldens.fixture.train --out goldens/model

$(INSTALLED): pyproject.toml constraints-linux.txt
	$(PYTHON) -c "import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v <= (3, 13) else f'assay needs Python 3.11 to 3.13, this is {v[0]}.{v[1]}: run make PYTHON=python3.12')"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(CONSTRAINTS) --editable . --group dev
	touch $(INSTALLED)

clean:
	rm -rf .venv
