# A fresh machine with git, make and Python >= 3.11 needs nothing else: `make demo`, `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# The environment is ours alone: neither an active virtual environment nor PYTHONPATH may leak into it.
unexport PYTHONPATH PYTHONHOME VIRTUAL_ENV
export PYTHONNOUSERSITE := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help venv demo test lint clean
.DEFAULT_GOAL := help

help:
	@echo "make demo   train, distil, evaluate and report on embedded data"
	@echo "make test   run every test"
	@echo "make lint   ruff, pyright and the import contracts"
	@echo "make venv   only create $(VENV)"
	@echo "make clean  remove $(VENV), caches and build outputs"

venv: $(INSTALLED)

# torch goes first and alone: on some machines only the exact pin, asked for by itself, resolves to the CPU build.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and "varkd needs Python 3.11 or newer, but $(PYTHON) is %d.%d: run make PYTHON=/path/to/python3.11" % v[:2])'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
		echo "cannot create $(VENV): on Debian and Ubuntu install python3-venv" >&2; exit 1; }
	@pin="$$(grep -E '^torch==' constraints.txt)" && echo "installing $$pin (the largest download, minutes)" \
		&& $(BIN)/python -m pip install --quiet "$$pin"
	@echo "installing varkd and its tools"
	@$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(INSTALLED)
	$(BIN)/varkd demo

test: $(INSTALLED)
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
