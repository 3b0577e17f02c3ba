# make compile [MODEL=directory] [OUT=directory] [ARGS="--weights int8"]: everything else is installed on the way.
PYTHON ?= python3
MODEL ?= examples/py7m
OUT ?= artifacts/$(notdir $(MODEL:%/=%))
PROMPT ?= def read_lines(path):
ARGS ?=
BIN := .venv/bin
FOLDERS := $(wildcard gristmill compiler passes quant kernels runtime report export integrations)
FILES := $(shell find $(FOLDERS) -type f -not -name '*.pyc' -not -name '*.so' | sort)
NATIVE := $(filter %.cpp %.h %.inc,$(FILES))
INSTALL := $(BIN)/pip install --quiet --constraint constraints.txt
EDITABLE := --no-build-isolation --config-settings editable_mode=strict --editable

REPORT ?= $(if $(filter command line,$(origin OUT)),$(OUT),reports/$(notdir $(MODEL:%/=%)))

.PHONY: compile run test test-gpu test-aarch64 check sanitize bench bench-gpu report wheel c-library clean install force

compile: install
	$(BIN)/gristmill compile $(MODEL) -o $(OUT) --force $(ARGS)
	$(BIN)/gristmill run $(OUT) --prompt "$(PROMPT)" --max-new-tokens 64 --temperature 0.6 --seed 1 && $(BIN)/gristmill bench $(OUT)

run: install
	$(BIN)/gristmill run $(OUT) --prompt "$(PROMPT)" $(ARGS)

test: .venv/.dev
	$(BIN)/pytest -n 2 --dist worksteal tests $(ARGS)

# On an NVIDIA GPU, where the same tests otherwise run in Triton's interpreter; torch must be built for CUDA.
# Without .venv it is tested with PYTHON (3.11 or later) and the packages it has, the extension built with them.
# Compiling the kernels takes longest, so every processor shares it; after eight minutes what is left is left out.
GPU_TESTS = -n $(shell nproc) --dist load --seconds 480 $(wildcard tests/test_cuda_*.py tests/kernels/test_triton_*.py)
ifneq ($(wildcard $(BIN)/python),)
test-gpu: .venv/.dev
	TRITON_INTERPRET=0 $(BIN)/pytest $(GPU_TESTS) $(ARGS)
else
test-gpu: build/links
	$(PYTHON) setup.py --quiet build_ext --build-lib build/links
	TRITON_INTERPRET=0 PYTHONPATH=$(CURDIR)/build/links $(PYTHON) -P -m pytest $(GPU_TESTS) $(ARGS)
endif

# What needs no Python, in an emulator where this machine is another: see tests/cpp/aarch64.
test-aarch64:
	tests/cpp/aarch64 $(ARGS)

check: .venv/.dev
	$(BIN)/ruff check . && $(BIN)/mypy build/__editable__*/gristmill setup.py tests benchmarks examples

sanitize:
	tests/cpp/sanitize $(ARGS)

bench: install
	$(BIN)/python benchmarks/speed.py $(ARGS)

# On an NVIDIA GPU, by the packages that are there: a virtual environment's, else PYTHON's. Nothing is installed or
# built; links give the folders their names. ARGS=--dry-run tries it without a GPU.
bench-gpu: build/links
	PYTHONPATH=$(CURDIR)/build/links $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) benchmarks/bench_gpu.py $(ARGS)

build/links: force
	@mkdir -p $@/gristmill && ln -sfn $(wildcard $(CURDIR)/gristmill/*.py) $(patsubst %,$(CURDIR)/%,$(filter-out gristmill,$(FOLDERS))) $@/gristmill/

# make report [MODEL=directory or artifacts] [OUT=directory] [ARGS="--peer llama.cpp:FILE.gguf"]: what each choice costs.
report: .venv/.report
	$(BIN)/gristmill report $(MODEL) -o $(REPORT) $(ARGS)

# The library, header and pkg-config file for C, in build/c: make c-library [ARGS="install PREFIX=/usr/local"].
c-library:
	$(MAKE) -f runtime/c_api/Makefile $(ARGS)

# Into dist, for this Python, with the oldest manylinux tag that its symbols allow.
wheel: .venv/.dev
	rm -rf build/wheel && $(BIN)/python -m build --wheel --no-isolation --outdir build/wheel
	PATH=$(CURDIR)/$(BIN):$$PATH $(BIN)/auditwheel repair --wheel-dir dist build/wheel/gristmill-*.whl

clean:
	rm -rf build dist artifacts *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

install: .venv/.compile

.venv/bin/python:
	$(PYTHON) -m venv .venv

# An editable install links every file, so it is repeated when the list of files changes and when C++ changes.
.venv/.compile: build/files $(NATIVE) setup.py pyproject.toml constraints.txt | .venv/bin/python
	$(INSTALL) setuptools pybind11 && $(INSTALL) $(EDITABLE) '.[compile]' && touch $@

.venv/.report: pyproject.toml constraints.txt | .venv/.compile
	$(INSTALL) $(EDITABLE) '.[compile,report]' && touch $@

.venv/.dev: pyproject.toml constraints.txt | .venv/.compile
	$(INSTALL) $(EDITABLE) '.[dev]' && touch $@

build/files: force
	@mkdir -p build && echo $(FILES) | cmp -s - $@ || echo $(FILES) > $@
