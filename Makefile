# Two commands set everything up on a machine with python3.11 and pip: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
UV = $(PYTHON) -m uv

# Bytecode is kept whatever the shell says: each worker, and each command in a process of its own, would compile it anew.
export PYTHONDONTWRITEBYTECODE =

# Workers take tests from each other, so that none is left with the long ones: tests must not need an order.
PYTEST = $(BIN)/python -m pytest -n 2 --dist worksteal --max-worker-restart 0

.PHONY: demo test test-unit test-all fuzz lint docs setup clean

demo: setup  ## run the digits study end to end; prints the front and where the report is
	$(BIN)/mpsearch run digits --out runs/digits-$$(date +%Y%m%d-%H%M%S)

test: setup  ## all tests but the slow ones: at most 4 minutes on 2 idle cores
	$(PYTEST)

test-unit: setup  ## those that train and compile nothing and need neither Ray nor a browser: at most 90 s
	$(PYTEST) -m unit

test-all: $(VENV)/.targets  ## the slow tests too, and those with the export targets' libraries and other people's networks, which it installs
	$(PYTEST) -m "slow or not slow"

fuzz: $(VENV)/.targets  ## 1,000 random networks through every stage, and 200 through each runtime of another library
	MPSEARCH_FUZZ_EXAMPLES=1000 $(PYTEST) tests/fuzz -m "slow or not slow" -o faulthandler_timeout=7200

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell

docs: $(VENV)/.docs  ## the site, under build/docs: warnings are errors, links are checked offline
	$(BIN)/python -m sphinx -W --keep-going -q -b html -d build/doctrees docs build/docs
	$(BIN)/python docs/check_links.py build/docs

setup: $(VENV)/.installed

# uv, because the pip that comes with Python 3.11 cannot resolve torch's extras.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m uv --version >/dev/null 2>&1 || $(PYTHON) -m pip install --quiet uv
	test -x $(BIN)/python || $(UV) venv --quiet --python $(PYTHON) $(VENV)
	$(UV) pip install --quiet --compile-bytecode --python $(BIN)/python --constraint constraints.txt --editable '.[dev]'
	touch $@

$(VENV)/.targets: $(VENV)/.installed
	$(UV) pip install --quiet --compile-bytecode --python $(BIN)/python --constraint constraints.txt --editable '.[dev,targets,zoo,metrics,text,trainer,audio,pitch]'
	touch $@

$(VENV)/.docs: $(VENV)/.installed
	$(UV) pip install --quiet --compile-bytecode --python $(BIN)/python --constraint constraints.txt --editable '.[dev,docs]'
	touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
