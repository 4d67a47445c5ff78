PYTHON ?= python3
VENV ?= .venv
INSTALLED = $(VENV)/.installed

.PHONY: demo test test-slow lint docs cost bench

demo: $(INSTALLED)
	$(VENV)/bin/python demo.py

test: $(INSTALLED)
	$(VENV)/bin/python -m pytest -n 2 --dist worksteal

test-slow: $(INSTALLED)
	$(VENV)/bin/python -m pytest -n 2 --dist worksteal -m slow

lint: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

docs: $(INSTALLED)
	$(VENV)/bin/mkdocs build --strict --quiet

cost: $(INSTALLED)
	$(VENV)/bin/brics-diffusers cost

bench: $(INSTALLED)
	$(VENV)/bin/python benchmarks/bench.py

# One environment for everything, made again when the dependencies change.
$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --upgrade pip
	$(VENV)/bin/pip install --quiet --editable ".[demo,docs,test]"
	touch $@
