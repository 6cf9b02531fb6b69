# PYTHON=.venv/bin/python make test
PYTHON ?= python3
export OMP_NUM_THREADS ?= 1

.PHONY: test test-1 test-2 test-3 test-4 lint bench docs

test:
	$(PYTHON) -m pytest

# The distributed tests on so many workers.
test-1 test-2 test-3 test-4: test-%:
	PARTPAR_TEST_WORLD_SIZES=$* $(PYTHON) -m pytest -k $*ranks

lint:
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy
	$(PYTHON) -c "import sys; from importlinter.cli import lint_imports_command as lint; sys.exit(lint())"

bench:
	set -e; for file in benchmarks/*.py; do $(PYTHON) $$file; done

docs:
	$(PYTHON) -m sphinx -W --keep-going -b html docs docs/_build/html
