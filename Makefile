# `make demo` and `make test` set up everything they need: a .venv in the checkout, which later calls reuse.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-fast test-all lint docs release-check clean

demo: .venv/ready
	$(BIN)/odcft demo --out demo --overwrite

# Two test processes with one thread each: small networks gain nothing from more threads.
test: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -q -m "not slow"

# The tests of one room, in seconds: make test-fast ROOM=clustering. Without ROOM, what all rooms stand on.
ROOM ?=
FAST := $(if $(ROOM),$(wildcard tests/$(ROOM)/ tests/$(ROOM)_tests/),tests/test_import_rules.py tests/test_plan.py tests/test_recipe.py tests/clustering)
test-fast: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -q -m "not slow" $(or $(filter %_tests/,$(FAST)),$(FAST))

# The tests above and the slow ones: many networks, many ranks, whole demos.
test-all: test docs
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -q -m slow

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site, in build/site. A link that leads nowhere, or any other warning, is an error.
docs: .venv/ready
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs build/site

# What is shipped: built, installed into an environment of its own, tried and tested there. TESTS=… runs only some.
release-check: .venv/ready
	tools/release_check.sh $(BIN)/python $(TESTS)

.venv/ready: pyproject.toml constraints.txt
	@echo "Setting up .venv: torch and the other packages of constraints.txt (once; a minute or two, 2 GB) …"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev,docs,faiss,onnx]"
	@$(BIN)/python tools/torchvision_on_cpu.py
	touch $@

clean:
	rm -rf .venv .lowest .release demo build dist *.egg-info
