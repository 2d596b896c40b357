# make demo   the main job: quantize the bundled model, measure it, generate a sample
# make test   the test suite, but for the tests that take longest
# make check  linters, types and fast tests, while you work; make test-all: every test (tests/tiers.toml says which)
# make docs   the documentation as a site, in build/site
# The first two create .venv and install the package first if needed.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# mamba_ssm without its CUDA kernels, for the tests that capture its models, and Triton, which interprets and compiles
# the GPU's kernels without one; tests skip where this fails.
WITHOUT_CUDA := MAMBA_FORCE_BUILD=TRUE MAMBA_SKIP_CUDA_BUILD=TRUE
MAMBA_SSM := mamba-ssm einops triton==3.9.0

.PHONY: setup demo check test test-all lint linked types docs format bench wheel prebuilt clean

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

# A process a core, each of which computes with one thread: files go to whoever is free, tests of one file together.
# Tests of threads set their number themselves.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile

check: lint
	$(PYTEST) -m "not slow and not slowest"

test: $(READY)
	$(PYTEST) -m "not slowest"

test-all: $(READY)
	$(PYTEST) --durations 40

lint: types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# quantizer/ and lowering/ are imported from inside mq_ao, where mypy and mkdocstrings have to find them: a tree of links,
# with a cache of its own, stands for the installed package. Messages name the files that the links lead to.
TYPED := build/typed

linked:
	rm -rf $(TYPED)/mq_ao
	mkdir -p $(TYPED)/mq_ao
	ln -s $(CURDIR)/mq_ao/* $(CURDIR)/quantizer $(CURDIR)/lowering $(TYPED)/mq_ao

types: SHELL := bash -o pipefail
types: $(READY) linked
	$(BIN)/mypy --cache-dir $(TYPED)/cache $(TYPED)/mq_ao \
		| sed -E 's#^$(TYPED)/mq_ao/(quantizer|lowering)/#\1/#; s#^$(TYPED)/##'

# An environment of its own, without torch: pages are made of sources, which are read and not imported.
DOCS := build/docs-venv
DOCS_READY := $(DOCS)/.ready

$(DOCS_READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet --constraint constraints.txt $$($(PYTHON) -c "import tomllib; \
		print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['docs'])")
	touch $(DOCS_READY)

docs: $(DOCS_READY) linked
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict --clean --config-file docs/site/mkdocs.yml

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)
	$(BIN)/mq-ao bench --model mamba-130m

# A wheel with the kernels inside, for this kind of processor and the installed version of PyTorch: no compiler is needed
# where it is installed. It is made of a copy: kernels in the checkout would stand for its sources. One wheel serves
# several versions of PyTorch: make wheel WHEEL_TORCH="2.11.0 2.12.0" adds theirs.
STAGED := build/wheel
WHEEL_TORCH ?=

wheel: $(READY)
	rm -rf $(STAGED)
	mkdir -p $(STAGED)
	git ls-files -z | xargs -0 cp --parents --target-directory $(STAGED)
	cd $(STAGED) && $(CURDIR)/$(BIN)/python -m mq_ao.ops.native.wheel mq_ao/ops/native/prebuilt
	$(MAKE) prebuilt SOURCES=$(STAGED)
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist \
		--config-settings=--build-option=--plat-name=linux_$$(uname -m) $(STAGED)

# Kernels for each version of PyTorch in WHEEL_TORCH, put where wheels have them, by an environment of its own.
SOURCES := .

prebuilt:
	set -e; for version in $(WHEEL_TORCH); do \
		$(PYTHON) -m venv build/torch-$$version; \
		build/torch-$$version/bin/python -m pip install --quiet torch==$$version numpy setuptools; \
		(cd $(SOURCES) && $(CURDIR)/build/torch-$$version/bin/python -m mq_ao.ops.native.wheel mq_ao/ops/native/prebuilt); \
	done

clean:
	rm -rf $(VENV) build dist *.egg-info
