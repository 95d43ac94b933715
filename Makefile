# Each target makes what it needs, .venv included; see .ci/venv.
.DEFAULT_GOAL := help
.PHONY: help demo test check soak bench docs clean
python := .venv/bin/python
ARGS ?=
# Tests mostly wait for their servers: some processes at once, each with servers of its own.
JOBS ?= 3

help: ## print these targets
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' Makefile | expand -t 10

demo: ## start a private PostgreSQL, fill it, look into it, remove it
	@.ci/venv
	@$(python) examples/demo.py

test: ## run the tests with branch coverage; ARGS="-k name" goes to pytest
	@.ci/venv test
	@$(python) -m coverage erase
	@status=0; $(python) -m coverage run -m pytest -n $(JOBS) $(ARGS) || status=$$?; \
	$(python) -m coverage combine -q && $(python) -m coverage report || true; exit $$status

check: ## check format, style and types
	@.ci/venv lint
	$(python) -m ruff format --check
	$(python) -m ruff check
	$(python) -m mypy

soak: ## run the long tests
	@.ci/venv test
	$(python) -m pytest -m soak -n $(JOBS) --dist worksteal $(ARGS)

bench: ## measure both stores beside their servers' limits, the original's schema and others
	@.ci/venv test bench
	$(python) -m tests.bench $(ARGS)

docs: ## build the API reference: site/index.html
	@.ci/venv docs
	@rm -rf site
	$(python) -W error -m pdoc -o site --no-show-source --no-search contextuate_persist

clean: ## remove .venv and everything else that was made here
	rm -rf .venv .coverage .coverage.* .hypothesis .mypy_cache .pytest_cache .ruff_cache dist site
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
