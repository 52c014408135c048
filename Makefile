# Everything a fresh clone needs, with Python 3.10 to 3.13 and nothing else.
#
# Where it installs: into the active virtual environment, or the one that PYTHON points into;
# without either, into $(VENV), which it makes with PYTHON. A torch that is already there is used
# as it is. `python tools/install.py --help` has the details.

PYTHON ?= python3
VENV ?= .venv
# auto, cpu or gpu: which packages to install. auto takes gpu where an NVIDIA driver answers.
EXTRAS ?= auto
# no: install nothing and use PYTHON as it is, for machines that were prepared in another way.
INSTALL ?= yes
# More arguments for pytest: make test ARGS="-k storage"
ARGS ?=

ifeq ($(INSTALL),no)
ENV_PYTHON := $(PYTHON)
INSTALLER := @:
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
else
# Asked for again at each use: it depends on PYTHON and on the active environment alone.
ENV_PYTHON = $(shell "$(PYTHON)" tools/install.py where --venv "$(VENV)")
INSTALLER := @"$(PYTHON)" tools/install.py --venv "$(VENV)" --extras "$(EXTRAS)"
endif

.DEFAULT_GOAL := help
.PHONY: help setup setup-test demo test lint bench test-gpu

help:
	@echo 'make setup      make the environment and install gpuopt into it'
	@echo 'make demo       train a small network, compile it to INT8, compare the accuracy'
	@echo 'make test       run the tests'
	@echo 'make lint       check format, style and types'
	@echo 'make bench      run the benchmarks in benchmarks/'
	@echo 'make test-gpu   run the tests that need an NVIDIA GPU'
	@echo ''
	@echo 'Options: PYTHON=/path/to/python3  VENV=folder  EXTRAS=cpu|gpu  INSTALL=no  ARGS="pytest arguments"'

# For users: what `gpuopt compile` and the demo need.
setup:
	$(INSTALLER) setup

# For developers: the same, the test tools, and torchvision and timm for the integration tests.
setup-test:
	$(INSTALLER) test

# For a first look: from training to a report in one command, on any machine.
demo: setup
	@"$(ENV_PYTHON)" examples/digits.py train --output demo
	@echo '$$ cd demo && gpuopt compile model.pt --precision int8' >&2
	@cd demo && "$(ENV_PYTHON)" -m gpuopt compile model.pt --precision int8
	@"$(ENV_PYTHON)" examples/digits.py evaluate --bundle demo/model.gpuopt --data demo/evaluation.npz

# For every change: those tests that need a GPU skip themselves where there is none.
test: setup-test
	"$(ENV_PYTHON)" -m pytest $(ARGS)

# For every change, before the tests: it takes seconds.
lint: setup-test
	"$(ENV_PYTHON)" -m ruff format --check .
	"$(ENV_PYTHON)" -m ruff check .
	"$(ENV_PYTHON)" -m mypy
	"$(ENV_PYTHON)" -m mypy --ignore-missing-imports --allow-subclassing-any tools/install.py examples/digits.py

# For the numbers in the documentation: each script prints its own results.
bench: setup-test
	@for script in benchmarks/*.py; do \
		if [ -e "$$script" ]; then \
			echo "$$script" >&2; "$(ENV_PYTHON)" "$$script" || exit 1; \
		else \
			echo 'gpuopt: there is no script in benchmarks/' >&2; \
		fi; \
	done

# For a machine with an NVIDIA GPU: engines are built and run; -ra names what was skipped and why.
test-gpu: setup-test
	"$(ENV_PYTHON)" -m pytest tests/gpu -ra $(ARGS)
