# make demo: install, let a trained model turn away and come back.   make test: install, run the tests.
# Uses the active virtual environment, or makes .venv.

PYTHON ?= python3
# Installed only where no torch is. The release that the suite was last run with.
TORCH ?= torch==2.13.0

VENV := $(or $(VIRTUAL_ENV),.venv)
BIN := $(VENV)/bin

.PHONY: demo test install-demo install-test

demo: install-demo
	$(BIN)/worldkv world

test: install-test
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

install-demo install-test: install-%: $(BIN)/python
	@$(BIN)/python -c "import torch" 2>/dev/null || (echo "installing $(TORCH), a download of 0.5 GB and, with its CUDA libraries, more" && $(BIN)/pip install --quiet $(TORCH))
	@echo "installing worldkv_kernels and what [$*] needs"
	@$(BIN)/pip install --quiet --editable ".[$*]"

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
