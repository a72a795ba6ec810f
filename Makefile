# From a fresh clone, needing only Python >= 3.11 and make:
#   make demo   set up .venv, run SPECS end to end on the embedded lab, write runs/lab-specs/report.html
#   make test   set up .venv, lint, types, tests
#   make gate   compile every Triton configuration for sm_80, sm_90, sm_100 and gfx942; needs no GPU
# Where PyTorch sees a GPU the same commands use it.

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export PYTHONSAFEPATH := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test lint gate bench report setup clean
setup: $(STAMP)

$(STAMP): pyproject.toml setup.py constraints.txt $(wildcard csrc/*.* csrc/*/*.*)
	@test -n "$(PYTHON)" || { echo "error: no Python >= 3.11 found; set PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt "setuptools>=77" wheel ninja torch
	$(BIN)/pip install -q --no-build-isolation -c constraints.txt -e ".[dev,trl]"
	@touch $@

demo: $(STAMP)
	$(BIN)/specs-fast run recipes/lab-specs.yaml

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest

gate: $(STAMP)
	$(BIN)/python -m specs_kernels.gate --cache build/gate

bench: $(STAMP)
	for op in linear_logprob selective_logprob packed_attention update; do $(BIN)/specs-fast bench $$op || exit 1; done

clean:
	rm -rf $(VENV) build *.egg-info kernels/specs_kernels/_C*.so .pytest_cache .mypy_cache .ruff_cache
