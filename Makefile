# `make` says what there is. PYTHON names the interpreter that .venv is made with.

PYTHON ?= python3
BIN := .venv/bin
CORE_TESTS := tests/worker tests/properties tests/integration tests/guests \
    tests/test_journal.py tests/test_ledger.py tests/test_packaging.py
SCRIPTS := contrib/environment contrib/demo contrib/guest/fetch contrib/web/vendor contrib/man/generate

.PHONY: help demo web test test-compiled check fuzz soak bench bench-people pictures dist clean format

help:
	@echo 'make demo    boot a Linux guest with its console on this terminal (Ctrl-] q leaves);'
	@echo '             WEB=1: two of them, on a page'
	@echo 'make web     fetch what the page is made of besides this, with npm'
	@echo 'make test    fetch guests and run the whole suite'
	@echo 'make test-compiled  what the core has a part in, with the compiled core'
	@echo 'make check   format, lint, types and import contracts'
	@echo 'make format  put the code in the format that check wants'
	@echo 'make fuzz    look for inputs that break it, FUZZ_SECONDS (20) for each target'
	@echo 'make soak    50 guests and all that may happen to them, for SOAK_MINUTES (30)'
	@echo 'make bench   measure, beside the Rust vhost-device-console where it can be had'
	@echo 'make bench-people  measure what people notice: attaching, keys, what a page costs'
	@echo 'make pictures  have the tests make the pictures of the docs'
	@echo 'make dist    build the packages, install the wheel and try it'
	@echo 'make clean   remove what was built; .venv and fetched guests too'

demo: $(if $(WEB),web)
	@$(PYTHON) contrib/environment $(if $(WEB),web)
	@$(BIN)/python contrib/demo $(if $(WEB),--web)

web:
	@$(PYTHON) contrib/web/vendor

test: web
	@$(PYTHON) contrib/environment test
	@$(PYTHON) contrib/guest/fetch --all >&2 || true
	@$(BIN)/pytest -n auto

test-compiled: web
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

bench: web
	@$(PYTHON) contrib/environment --compiled bench
	@$(PYTHON) contrib/guest/fetch --all >&2 || true
	@build/compiled/bin/python benchmarks/run.py

bench-people: web
	@$(PYTHON) contrib/environment --compiled bench
	@build/compiled/bin/python benchmarks/people.py

pictures: web
	@$(PYTHON) contrib/environment test
	@$(PYTHON) contrib/guest/fetch >&2
	@SCREENSHOTS=docs/pictures $(BIN)/pytest -q tests/web tests/guests/test_people.py \
	    -k 'pictures or phone or look_and_power_off'

dist: web
	@$(PYTHON) contrib/environment dist
	@$(BIN)/python contrib/man/generate
	rm -rf dist build/lib build/bdist.* build/wheel
	$(BIN)/python -m build
	$(BIN)/python -m venv --without-pip build/wheel
	$(BIN)/python -m pip --python build/wheel/bin/python install -q dist/*.whl
	cd build && wheel/bin/vhost-device-console --version

clean:
	rm -rf .venv build dist *.egg-info .coverage* .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -r {} +
