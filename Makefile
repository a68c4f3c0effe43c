# `make` says what there is. PYTHON names the interpreter that .venv is made with.

PYTHON ?= python3
BIN := .venv/bin
CORE_TESTS := tests/worker tests/properties tests/integration tests/guests \
    tests/test_journal.py tests/test_ledger.py tests/test_packaging.py
SCRIPTS := contrib/environment contrib/demo contrib/guest/fetch

.PHONY: help demo test test-compiled check fuzz soak bench dist clean format

help:
	@echo 'make demo    boot a Linux guest with its console on this terminal (Ctrl-] q leaves)'
	@echo 'make test    fetch guests and run the whole suite'
	@echo 'make test-compiled  what the core has a part in, with the compiled core'
	@echo 'make check   format, lint, types and import contracts'
	@echo 'make format  put the code in the format that check wants'
	@echo 'make fuzz    look for inputs that break it, FUZZ_SECONDS (20) for each target'
	@echo 'make soak    50 guests and all that may happen to them, for SOAK_MINUTES (30)'
	@echo 'make bench   measure, beside the Rust vhost-device-console where it can be had'
	@echo 'make dist    build the packages, install the wheel and try it'
	@echo 'make clean   remove what was built; .venv and fetched guests too'

demo:
	@$(PYTHON) contrib/environment
	@$(BIN)/python contrib/demo

test:
	@$(PYTHON) contrib/environment test
	@$(PYTHON) contrib/guest/fetch --all >&2 || true
	@$(BIN)/pytest -n auto

test-compiled:
	@$(PYTHON) contrib/environment --compiled test
	@$(PYTHON) contrib/guest/fetch --all >&2 || true
	@build/compiled/bin/pytest -n auto $(CORE_TESTS)

check:
	@$(PYTHON) contrib/environment check
	$(BIN)/ruff format --check . $(SCRIPTS)
	$(BIN)/ruff check . $(SCRIPTS)
	$(BIN)/mypy
	@for script in $(SCRIPTS); do \
	    echo "mypy $$script"; MYPYPATH=.typing:contrib $(BIN)/mypy --strict $$script || exit; done
	$(BIN)/lint-imports

format:
	@$(PYTHON) contrib/environment check
	$(BIN)/ruff check --fix . $(SCRIPTS)
	$(BIN)/ruff format . $(SCRIPTS)

fuzz:
	@$(PYTHON) contrib/environment fuzz
	@$(BIN)/python tests/fuzz/fuzz.py

soak:
	@$(PYTHON) contrib/environment --compiled bench
	@build/compiled/bin/python tests/soak/soak.py

bench:
	@$(PYTHON) contrib/environment --compiled bench
	@$(PYTHON) contrib/guest/fetch --all >&2 || true
	@build/compiled/bin/python benchmarks/run.py

dist:
	@$(PYTHON) contrib/environment dist
	rm -rf dist build/lib build/bdist.* build/wheel
	$(BIN)/python -m build
	$(BIN)/python -m venv --without-pip build/wheel
	$(BIN)/python -m pip --python build/wheel/bin/python install -q dist/*.whl
	cd build && wheel/bin/vhost-device-console --version

clean:
	rm -rf .venv build dist *.egg-info .coverage* .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -r {} +
