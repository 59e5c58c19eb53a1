# make demo, make test: each makes .venv first if it isn't there. GNU Make 3.81 is what Macs have.

SHELL = /bin/sh

# EXTRA=cpu, cuda12 or cuda13 chooses the MLX of a Linux machine, PYTHON= the Python to use.
EXTRA ?=
PYTHON ?=
# A name that mlxpage knows, a folder or a hub id.
MODEL ?= smollm2-135m
# More arguments for the demo or for pytest: make test ARGS="-m full"
ARGS ?=

PROMPTS = "What is the capital of France?" \
          "Why is the sky blue? Answer in one sentence." \
          "Write two sentences about a house by the sea." \
          "What is a cache? Answer in one sentence."

.PHONY: help demo test lint clean FORCE

help:
	@echo "make demo     generate from four prompts at once (MODEL=$(MODEL))"
	@echo "make test     the tests, two at a time (ARGS=... for pytest)"
	@echo "make lint     ruff, check and format"
	@echo "make clean    remove .venv and everything built"

demo: .venv/ready
	@.venv/bin/python -m mlxpage generate $(MODEL) $(PROMPTS) --max-tokens 48 --temp 0 $(ARGS)

test: .venv/ready
	@.venv/bin/python -m pytest -n 2 --dist worksteal $(ARGS)

lint: .venv/ready
	@.venv/bin/python -m ruff check .
	@.venv/bin/python -m ruff format --check .

# An EXTRA other than the installed one: install again.
ifneq ($(EXTRA),)
ifneq ($(EXTRA),$(shell cat .venv/ready 2>/dev/null))
.venv/ready: FORCE
endif
endif

.venv/ready: pyproject.toml
	@PYTHON="$(PYTHON)" EXTRA="$(EXTRA)" sh .ci/setup

clean:
	rm -rf .venv .uv dist build .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
