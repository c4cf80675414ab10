# make setup, then any of: test, test-slow, lint, docs, release. VENV= and PYTHON= choose the environment; CONSTRAINTS= (empty)
# takes the newest version of every dependency.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
BIN := $(VENV)/bin

.PHONY: setup test test-slow lint docs release

setup:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q $(addprefix -c ,$(CONSTRAINTS)) -e '.[app,train,test,lint,docs]'

test:
	$(BIN)/pytest

test-slow:
	$(BIN)/pytest -n 1 -m slow

lint:
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --config setup.cfg
	$(BIN)/python scripts/check_types.py

docs:
	$(BIN)/mkdocs build --strict --site-dir out/site

# Builds dist/; with TAG=v1.2.3 it first checks that this is the version in setup.cfg.
release:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q build
	@version=$$(sed -n 's/^version = //p' setup.cfg); test -z "$(TAG)" -o "$(TAG)" = "v$$version" \
		|| { echo "tag $(TAG) is not version $$version"; exit 1; }
	rm -rf dist
	$(BIN)/python -m build
