# make setup | run | demo | test | faults | check | sanitize | bench     Variables: PYTHON=python3.12 PORT=5001 WORKERS=4 PIP_FLAGS="--index-url ..."
PYTHON ?= python3
PORT ?= 5000
PIP_FLAGS ?=
WORKERS ?= 2
BENCH_FLAGS ?=
BENCH_HTTP_FLAGS ?= $(BENCH_FLAGS)
BIN := .venv/bin
PY := $(BIN)/python

.DEFAULT_GOAL := help
.PHONY: help setup dev run demo test compat faults check lint sanitize bench clean

help:
	@echo "make run     set up, then start the server on port $(PORT) with the bundled model"
	@echo "make demo    train a small model, serve it and generate, in under three minutes"
	@echo "make test    set up with development packages, then run the tests"
	@echo "make faults  break servers, trainers and disks in every known way, and print a table of what was found"
	@echo "make compat  the tests with other people's clients, among them OpenAI's, LangChain and lm-eval"
	@echo "make check   ruff, mypy, tests, lines per file"
	@echo "make sanitize  the native step's tests under AddressSanitizer and UBSan"
	@echo "make bench   measure ours and the peers side by side"
	@echo "make clean   remove .venv and caches (never out/ or data/)"

$(PY):
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"Python 3.11 or newer is needed; $(PYTHON) is {v.major}.{v.minor}. Try: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv

# A stamp per requirements file: a second call installs nothing, a changed file installs again.
.venv/.setup: requirements.txt | $(PY)
	$(BIN)/pip install --disable-pip-version-check $(PIP_FLAGS) -r requirements.txt
	@touch $@

.venv/.dev: requirements-dev.txt .venv/.setup
	$(BIN)/pip install --disable-pip-version-check $(PIP_FLAGS) -r requirements-dev.txt
	@touch $@

# The native step is compiled here so that the first start need not; without a compiler torch serves.
setup: .venv/.setup
	@$(PY) -m inference.native.build

dev: .venv/.dev

run: setup
	$(PY) api_server.py --port $(PORT)

demo: setup
	$(PY) demo.py

# File by file, in their order: what a file shares is made once, and the files that take longest come first.
test: dev
	$(BIN)/pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

faults: dev
	$(BIN)/pytest -m fault tests

compat: dev
	$(BIN)/pytest -v -m "slow or not slow" tests/compat

lint: dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

check: lint test
	@echo "Lines per file (350 is the limit for code):"
	@git ls-files '*.py' '*.cpp' | grep -v '^tests/' | xargs wc -l | sort -n | awk '$$2 != "total" && $$1 > 350 {print "too long: " $$2 " " $$1; bad = 1} END {exit bad}'
	@git ls-files '*.py' '*.cpp' | xargs wc -l | sort -n | tail -8

sanitize: dev
	$(PY) -m inference.native.build --sanitize

bench: dev
	$(PY) -m bench.bench_generate --dtype bf16 $(BENCH_FLAGS)
	$(PY) -m bench.bench_generate --dtype int8 $(BENCH_FLAGS)
	$(PY) -m bench.bench_generate --dtype torch $(BENCH_FLAGS)
	$(PY) -m bench.bench_http --dtype bf16 $(BENCH_HTTP_FLAGS)
	$(PY) -m bench.bench_http --dtype int8 $(BENCH_HTTP_FLAGS)
	$(PY) -m bench.bench_train

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
