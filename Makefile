# make install | train | test | lint | format | bench | sanitize | soak | gpu | clean
# Each target installs first if needed. Needs Python >= 3.10 with headers and a C++ compiler; no root.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
JOBS := $(shell nproc)

SPILL := build/spill
NATIVE := $(wildcard csrc/core/* csrc/bindings/* csrc/cuda/*)
CXX_FILES := $(wildcard csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu tests/csrc/*.h tests/csrc/*.cpp)
BENCHMARKS := io hooks activations bandwidth rok planning adam states interleaved published_sweeps \
	predicted_memory predicted_time regret published_iterations planner_speed deepspeed \
	deepspeed_subgroups cpu_adam trainer megatron pipelines megatron_ranks long_context

.PHONY: install train test lint format bench sanitize soak gpu clean

install: .venv/.installed

# torch comes first, at its exact version, so that nothing after it can ask for another one.
.venv/.tools: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and \
		f"{sys.executable} is Python {sys.version.split()[0]}; name a 3.10 or newer: make PYTHON=...")'
	@echo "installing into .venv: torch and the tools, a few minutes and some hundred MB"
	$(PYTHON) -m venv .venv
	$(PIP) torch==2.13.0 setuptools pybind11
	@touch $@

.venv/.installed: .venv/.tools setup.py pyproject.toml $(NATIVE)
	$(PIP) --no-build-isolation --editable '.[dev]'
	@touch $@

.venv/.bench: .venv/.installed
	$(PIP) --no-build-isolation --editable '.[bench]'
	@touch $@

train: install
	mkdir -p $(SPILL)
	$(BIN)/torchrun --nproc_per_node 1 examples/train_gpt.py --offload ssd --offload-path $(SPILL)

test: install
	$(BIN)/python -m pytest -n $(JOBS) --maxprocesses 8 --dist worksteal

lint: install
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy offload perfmodel benchmarks
	$(BIN)/mypy examples
	$(BIN)/stubtest offload._C --mypy-config-file pyproject.toml \
		--allowlist tests/stubtest_allowlist.txt --ignore-unused-allowlist
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)
	$(CXX) -std=c++20 -fsyntax-only -Wall -Wextra -Werror -Icsrc/core $(filter csrc/core/%.cpp tests/%.cpp,$(CXX_FILES))

format: install
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CXX_FILES)

bench: .venv/.bench
	mkdir -p benchmarks/records $(SPILL)
	for name in $(BENCHMARKS); do \
		$(BIN)/python -m benchmarks.$$name --json benchmarks/records/$$name.json || exit 1; done

# The C++ tests again, under the address and undefined-behaviour sanitizers, then the thread one.
sanitize:
	$(MAKE) -f tests/csrc/Makefile -j$(JOBS) asan tsan
	$(MAKE) -f tests/csrc/Makefile run-asan
	$(MAKE) -f tests/csrc/Makefile run-tsan

soak: install
	$(BIN)/python -m pytest -m soak --timeout 0

# With a GPU and PYTHON's own torch, pybind11, pytest and the like: nothing is installed.
gpu:
	mkdir -p benchmarks/records $(SPILL)
	$(PYTHON) setup.py -q build_ext --inplace
	$(PYTHON) -m pytest tests/offload tests/examples
	$(PYTHON) -m benchmarks.nine_cases --json benchmarks/records/nine_cases.json
	$(PYTHON) -m benchmarks.iterations --pairs 6 --json benchmarks/records/iterations.json

clean:
	rm -rf build .venv/.installed .venv/.bench *.egg-info offload/_C*.so offload/_cuda_kernels.so
	rm -rf .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find offload perfmodel examples benchmarks tests -name __pycache__ -prune -exec rm -rf {} +
