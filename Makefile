PYTHON ?= python3
VENV ?= .venv
INSTALLED = $(VENV)/.installed
LOWEST ?= .venv-lowest

.PHONY: demo test test-slow test-lowest test-processors lint docs cost bench

demo: $(INSTALLED)
	$(VENV)/bin/python demo.py

test: $(INSTALLED)
	$(VENV)/bin/python -m pytest -n 2 --dist worksteal

test-slow: $(INSTALLED)
	$(VENV)/bin/python -m pytest -n 2 --dist worksteal -m slow

# With the oldest dependencies that pyproject.toml allows.
test-lowest: $(LOWEST)/.installed
	$(LOWEST)/bin/python -m pytest -n 2 --dist worksteal

# One thread and two, on this processor as it is, and as on others: without and with AVX2, as far as it has that.
test-processors: $(INSTALLED)
	for threads in 1 2; do for processor in "" ATEN_CPU_CAPABILITY=default ATEN_CPU_CAPABILITY=avx2; do \
	    env BRICS_TEST_THREADS=$$threads $$processor $${processor:+ONEDNN_MAX_CPU_ISA=AVX2} \
	        $(VENV)/bin/python -m pytest -n 2 --dist worksteal || exit 1; \
	done; done

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

$(LOWEST)/.installed: pyproject.toml
	$(PYTHON) -m venv --clear $(LOWEST)
	$(LOWEST)/bin/pip install --quiet --upgrade uv
	$(LOWEST)/bin/uv pip install --quiet --python $(LOWEST) --resolution lowest-direct --editable ".[test]"
	touch $@
