# One environment, .venv/, for everything. It is installed once, and again when pyproject.toml changes; after that
# nothing here needs the network.
#   make quickstart    train the shipped pipeline and watch its reward rise
#   make test          all tests
#   make exact         the exact ladder with five seeds; writes what was measured to benchmarks/results/exact.md, and to
#                      docs/assets/exact for the pages: python docs/generate.py puts it into them
#   make families      the tests of model families; writes what they measured to docs/assets/families.json
#   make lint          format, types, import contracts
RECENT := -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
PYTHON ?= $(firstword $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do $$p $(RECENT) && echo $$p; done))
WORKERS ?= 2
TABLE ?= benchmarks/results/exact.md
BIN := .venv/bin
STAMP := .venv/.installed
OFFLINE := HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 HF_DATASETS_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1

.PHONY: quickstart test exact families lint format docs

quickstart: $(STAMP)
	$(OFFLINE) $(BIN)/rlalign train quickstart

test: $(STAMP)
	$(OFFLINE) $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup $(ARGS)

exact: $(STAMP)
	mkdir -p $(dir $(TABLE)) docs/assets/exact
	OMP_NUM_THREADS=1 RLALIGN_EXACT_SEEDS=5 RLALIGN_EXACT_TABLE=$(TABLE) RLALIGN_EXACT_JSON=docs/assets/exact/results.json $(OFFLINE) $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup tests/exact $(ARGS)

families: $(STAMP)
	OMP_NUM_THREADS=1 RLALIGN_FAMILY_TABLE=docs/assets/families.json $(OFFLINE) $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup tests/contracts/test_families.py tests/test_families_train.py $(ARGS)
	$(BIN)/python docs/generate.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo
	$(BIN)/basedpyright

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP)
	$(BIN)/python -m pip install --quiet -e '.[docs]'
	$(BIN)/mkdocs build --strict

# torch and torchvision come in the same call as the rest, so that pip picks a pair that belongs together.
$(STAMP): pyproject.toml setup.py
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { \
	    $(PYTHON) $(RECENT) || { \
	        echo "rlalign needs Python 3.11 or newer, and none was found$(if $(PYTHON), as $(PYTHON))." \
	             "Install one, or name it: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)" >&2; exit 2; }; \
	    $(PYTHON) -m venv --clear .venv; }
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[test,ocr]'
	@touch $@
