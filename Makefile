.DEFAULT_GOAL := help
.PHONY: help up test lint check loadtest bench-gate bench-gateway bench-encoder bench-moderation bench-semantic bench-engine clean
PYTHON ?= python3
# extras of pyproject.toml, for example: make up EXTRAS=gpu
EXTRAS ?=
# parts of bench-gateway, and options of the bench, for example: make bench-gateway PARTS="known mixed" BENCH="--seconds 30"
PARTS ?=
BENCH ?=

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-14s %s\n", $$1, $$2}' Makefile
	@echo 'Settings come from the environment; README.md lists them. For example: PORT=8001 make up'

up: ## set everything up and run it: Postgres, Valkey, worker, settlement, web
	@$(PYTHON) deploy/install.py $(EXTRAS)
	@exec .venv/bin/python manage.py up

test: ## set up what the tests need (a browser too), check the code and run all tests
	@$(PYTHON) deploy/install.py test
	@.venv/bin/python deploy/browser.py
	@$(MAKE) --no-print-directory check
	.venv/bin/python -m pytest -q -n auto

lint: ## check style, types and import contracts
	@$(PYTHON) deploy/install.py test
	@$(MAKE) --no-print-directory check

check:
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/lint-imports
	.venv/bin/mypy

bench-gate: ## measure admission: decisions a second, p50 and p99, beside a bare script and a PING
	@$(PYTHON) deploy/install.py
	@.venv/bin/python deploy/bench/gate.py

bench-engine: ## measure generation beside llama.cpp, encoders beside a plain loop, and both beside what the machine can do
	@$(PYTHON) deploy/install.py bench
	@GLIBC_TUNABLES=glibc.malloc.hugetlb=1 PYTHONPATH=. .venv/bin/python deploy/bench/engine.py $(BENCH)
	@PYTHONPATH=. .venv/bin/python deploy/bench/encoder.py

bench-gateway: ## measure the gateway: known answers, mixed load, overload, streams, memory, LiteLLM; PARTS="known mixed" for some
	@$(PYTHON) deploy/install.py bench
	@PYTHONPATH=. .venv/bin/python deploy/bench/gateway.py $(foreach part,$(PARTS),--part $(part)) $(BENCH)

loadtest: ## load everything with Locust: requests a second, latency, hits, CPU by process
	@$(PYTHON) deploy/install.py bench
	@PYTHONPATH=. .venv/bin/python deploy/bench/loadtest.py $(BENCH)

bench-encoder: ## measure embeddings: texts a second beside a plain ONNX Runtime loop
	@$(PYTHON) deploy/install.py
	@PYTHONPATH=. .venv/bin/python deploy/bench/encoder.py

bench-moderation: ## measure what the moderation model finds, on data that others published
	@$(PYTHON) deploy/install.py
	@PYTHONPATH=. .venv/bin/python deploy/bench/moderation.py

bench-semantic: ## measure the semantic cache: hits and errors beside one threshold for all
	@$(PYTHON) deploy/install.py
	@PYTHONPATH=. .venv/bin/python deploy/bench/semantic.py

clean: ## delete what was installed and cached; data in .data stays
	rm -rf .venv .cache .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
