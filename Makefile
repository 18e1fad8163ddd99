# Two commands do everything on a fresh machine with Python 3.11, pip and make: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt
export OMP_NUM_THREADS ?= 1
# Text that is free of the words in .github/retired_words.txt.
PROSE := README.md AGENTS.md CONTRIBUTING.md SECURITY.md Makefile mkdocs.yml noxfile.py examples docs/site \
	$(wildcard docs/*.md) \
	llamafactory_sekd

.DEFAULT_GOAL := help
.PHONY: help demo test fuzz test-matrix lint bench docs package

help:
	@echo "make demo   install, then distill a tiny translator and report its scores (about a quarter of an hour on two cores)"
	@echo "make test   install with the test extras, then run the complete suite"
	@echo "make fuzz   the tests of random values with new ones, which the suite does not try (a few minutes)"
	@echo "make test-matrix  the smoke tests on every supported host version, each installed from nothing (about an hour)"
	@echo "make lint   ruff, mypy, import-linter, codespell and proselint, and the documentation built strictly"
	@echo "make docs   the documentation as a site that opens offline: site/index.html"
	@echo "make package  sdist and wheel in dist/, checked by twine"
	@echo "make bench  the benchmarks; they print and write their tables to benchmarks/results"

# torch first: with it in place the rest finds its version satisfied and nothing large is fetched twice.
$(VENV)/demo.done: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] + ": make PYTHON=python3.11 ...") if sys.version_info < (3, 11) else None'
	@echo "Installing into $(VENV) (a few minutes on the first run) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) torch torchvision torchaudio
	@$(PIP) -e ".[metrics]"
	@touch $@

$(VENV)/dev.done: $(VENV)/demo.done
	@echo "Installing the test extras ..."
	@$(PIP) -e ".[dev]"
	@touch $@

demo: $(VENV)/demo.done
	@$(BIN)/sekd demo $(DEMO_ARGS)

test: $(VENV)/dev.done
	@$(BIN)/python -m pytest -q -n 2 --dist loadfile --durations=15 $(TEST_ARGS)

# The same tests with values that were not tried before: a failure prints what reproduces it.
fuzz: $(VENV)/dev.done
	@$(BIN)/python -m pytest -q -m hypothesis --hypothesis-profile new $(TEST_ARGS)

test-matrix: $(VENV)/dev.done
	@$(PIP) nox
	@$(BIN)/nox $(NOX_ARGS)

lint: $(VENV)/dev.done
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo --no-cache
	@$(BIN)/codespell
	@$(BIN)/codespell -D .github/retired_words.txt --skip tests/helpers/sentences.py $(PROSE) tests
	@! grep -rnE --include='*.py' --include='*.md' "\bhand(s|ed)? out\b|\bis said\b|\bstands? there\b" $(PROSE)
	@$(BIN)/proselint check --config .proselintrc.json $(filter %.md,$(PROSE)) CHANGELOG.md
	@$(MAKE) --no-print-directory docs

# Strict: a broken link, a missing anchor and a page outside of the navigation are errors. (`-q` would hide and pass them.)
docs: $(VENV)/dev.done
	@NO_MKDOCS_2_WARNING=1 PYTHONWARNINGS=ignore $(BIN)/mkdocs build --strict
	@echo "site/index.html"

package: $(VENV)/dev.done
	@rm -rf dist
	@$(BIN)/python -m build --no-isolation --outdir dist
	@$(BIN)/twine check --strict dist/*

bench: $(VENV)/dev.done
	@mkdir -p benchmarks/results
	@for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python $$script || exit 1; done
