# make demo    from nothing to a report with pictures
# make test    all checks and all tests
# make check   format, lint, types, layers
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Modules are compiled as they are used first, and not by each of many processes anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test check setup clean

demo: setup
	$(BIN)/clipmill demo

test: check
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-compile -c constraints.txt -e '.[test]'
	touch $@

clean:
	rm -rf $(VENV) demo-output
