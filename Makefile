# make demo   the main job: quantize the bundled model, measure it, generate a sample
# make test   the test suite
# Both create .venv and install the package first if needed.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# mamba_ssm without its CUDA kernels, for the tests that capture its models, and Triton, which interprets and compiles
# the GPU's kernels without one; tests skip where this fails.
WITHOUT_CUDA := MAMBA_FORCE_BUILD=TRUE MAMBA_SKIP_CUDA_BUILD=TRUE
MAMBA_SSM := mamba-ssm einops triton==3.9.0

.PHONY: setup demo test lint format bench clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	-$(WITHOUT_CUDA) $(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --constraint constraints.txt $(MAMBA_SSM)
	touch $(READY)

demo: $(READY)
	$(BIN)/mq-ao demo

test: $(READY)
	$(BIN)/python -m pytest

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy mq_ao quantizer lowering

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)
	$(BIN)/mq-ao bench --model mamba-130m

clean:
	rm -rf $(VENV) build dist *.egg-info
