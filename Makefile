PYTHON ?= python3
VENV   ?= .venv
RUN    := $(VENV)/bin/python
# go tool pprof compiles itself at its first use and keeps the result here.
export GOCACHE ?= $(CURDIR)/$(VENV)/gocache
export GOFLAGS := -buildvcs=false
export GOTELEMETRY := off

.DEFAULT_GOAL := help
.PHONY: help install format lint type test test-all test-fast cover bench demo build check clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

install: $(VENV)/.installed ## Make the virtual environment and install everything into it

$(VENV)/.installed: pyproject.toml setup.py $(wildcard asgi_pprof/_native/*.[ch])
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --no-compile uv
	$(VENV)/bin/uv pip install --quiet --python $(RUN) --editable . --group dev
	touch $@

format: install ## Format the code and sort imports
	$(RUN) -m ruff format .
	$(RUN) -m ruff check --fix .

lint: install ## Check style and format
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

type: install ## Check types
	$(RUN) -m mypy

# Most tests wait, so that four have room on two processors. Status 5: ARGS selects none here.
JOBS ?= 4
test: install ## Run all tests, then one by one those that measure time
	$(RUN) -m pytest -m "not timing" --dist worksteal --tx "$(JOBS)*popen//python=$(RUN)" $(ARGS) || test $$? = 5
	$(RUN) -m pytest -m timing $(ARGS) || test $$? = 5

test-all: install ## Run all tests on each CPython; ARGS=--help shows what it needs
	$(RUN) -m tests.all_pythons $(ARGS)

test-fast: install ## Run the tests that need neither a server nor Go
	$(RUN) -X dev -m pytest -m "not server and not go and not slow and not timing" $(ARGS)

cover: install ## Run all tests and show what they do not reach
	$(RUN) -m pytest --cov --cov-report=term-missing $(ARGS)

bench: install ## Measure cost and accuracy; ARGS=--help shows the parts
	$(RUN) -m tests.bench $(ARGS)

.PHONY: soak soak-asan
soak: SLICES ?= 10
soak: SOAK_SECONDS ?= 60
soak: install ## Read all threads' stacks under stress, keep 1,500 threads, then sample SLICES=10 times, SOAK_SECONDS=60 each
	for slice in looks crowd $$(seq $(SLICES) | sed s/.*/samplers/); do $(RUN) -m tests.soak --slice $$slice --seconds $(SOAK_SECONDS) $(ARGS) || exit; done

soak-asan: install ## The same for 60 s with a C core compiled with AddressSanitizer
	$(RUN) -m tests.soak.asan $(ARGS)

demo: install ## Start the demo shop with load on it; SECONDS=20 profiles it and ends
	$(RUN) docs/demo/run.py $(if $(SECONDS),--seconds $(SECONDS))

build: install ## Build the source distribution and the wheel
	$(RUN) -m build

check: lint type test ## What CI checks, on one Python

clean: ## Remove what was made
	rm -rf $(VENV) .venv-* asgi_pprof/*.so build dist *.egg-info .coverage .mypy_cache .pytest_cache .ruff_cache .hypothesis
