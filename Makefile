# Everything a newcomer types. `make test` and `make demo` set the machine up themselves.
.PHONY: help setup setup-all docs demo data test test-slow lint type bench clean
.DEFAULT_GOAL := help

# The newest supported interpreter that runs here. Choose another one with: make setup PYTHON=python3.12
PYTHON ?= $(shell for name in python3.13 python3.12 python3.11; do $$name -c '' 2>/dev/null && echo $$name && break; done)
OUT ?= data/smoke
DEMO ?= runs/demo
# Where torch comes from. Without a GPU driver it is the index of CPU builds, whose download is fifty
# times smaller than that of the CUDA builds. Choose another source:
#   make setup TORCH_INDEX=https://download.pytorch.org/whl/cu130        another index
#   make setup TORCH_INDEX=                                             only what pip is configured to use
TORCH ?= torch==2.13.0
TORCH_INDEX ?= $(shell command -v nvidia-smi >/dev/null 2>&1 || echo https://download.pytorch.org/whl/cpu)
TORCH_INDEX_TIMEOUT_S ?= 10
# What headless rendering needs on Debian and Ubuntu, and the compiler of libraries without wheels.
APT_PACKAGES = g++ libegl1 libgl1 libgl1-mesa-dri
# The headers of the interpreter, where it has none: the Python of Debian has them in a package.
PYTHON_HEADERS = $(shell $(PYTHON) -c 'import os, sys, sysconfig as s; \
  os.path.exists(s.get_path("include") + "/Python.h") or print("python%d.%d-dev" % sys.version_info[:2])')

BIN := .venv/bin
READY := .venv/ready
READY_ALL := .venv/ready-all

help:
	@echo "make demo       run everything in small: data, training, generated meshes, a report ($(DEMO)/index.html)"
	@echo "make data       build a small dataset alone, verify it and write its report ($(OUT))"
	@echo "make test       run every test that is not slow, after setting the machine up"
	@echo "make test-slow  run the slow tests"
	@echo "make lint type  run ruff and pyright"
	@echo "make docs       build the documentation site (site/index.html)"
	@echo "make bench      run the benchmarks"
	@echo "make setup      create the virtual environment .venv with what demo and tests need"
	@echo "make setup-all  also install what is optional: docs, TensorBoard, mesh2sdf, background removal"

setup: $(READY)

setup-all: $(READY_ALL)

$(READY): pyproject.toml
	@test -n "$(PYTHON)" || { echo "no Python 3.11, 3.12 or 3.13 was found; install one, or get one with uv (https://docs.astral.sh/uv):" >&2; \
	  echo "    uv python install 3.12 && make $(MAKECMDGOALS) PYTHON=\$$(uv python find 3.12)" >&2; exit 1; }
	@sh .ci/system_packages.sh "$(APT_PACKAGES) $(PYTHON_HEADERS)"
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	PYTHON="$(BIN)/python" TORCH="$(TORCH)" INDEX="$(TORCH_INDEX)" TIMEOUT_S="$(TORCH_INDEX_TIMEOUT_S)" sh .ci/install_torch.sh
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	@echo "compiling the geometry of builds and of generation (once per machine)"
	$(BIN)/python -c "from pipeline.orchestration.asset_stages import warm_up; warm_up()"
	$(BIN)/python -c "from model.inference.warm_up import warm_up; warm_up()"
	@touch $(READY)

$(READY_ALL): $(READY)
	$(BIN)/python -m pip install --quiet -e ".[dev,docs,generate,tensorboard,usd]"
	@$(BIN)/python -m pip install --quiet -e ".[mesh2sdf]" || echo "mesh2sdf did not build; it is optional" >&2
	@touch $(READY_ALL)

demo: setup
	$(BIN)/python -m train.demo --out $(DEMO)
	@echo "open $(DEMO)/index.html"

data: setup
	$(BIN)/python -m pipeline.build --preset smoke --out $(OUT)
	$(BIN)/python -m pipeline.verify $(OUT)
	@echo "open $(OUT)/report/index.html"

# The tests of a file share builds and servers: they stay in one process.
test: setup
	$(BIN)/python -m pytest -m "not slow" --numprocesses logical --maxprocesses 8 --dist loadfile

test-slow: setup
	$(BIN)/python -m pytest -m slow

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type: setup
	$(BIN)/pyright

docs: setup
	$(BIN)/python -m pip install --quiet -e ".[docs]"
	$(BIN)/mkdocs build --strict

bench: setup
	$(BIN)/python -m benchmarks.sdf
	$(BIN)/python -c "import sys, torch; sys.exit(not torch.cuda.is_available())" && $(BIN)/python -m benchmarks.ssa ssa && $(BIN)/python -m benchmarks.conv || echo "no CUDA device: kernels not measured"

clean:
	rm -rf .venv data/smoke data/demo runs/demo
