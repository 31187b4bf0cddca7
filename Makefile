# Everything a newcomer types. `make test` and `make demo` set the machine up themselves.
.PHONY: help setup demo data test test-slow lint type bench clean
.DEFAULT_GOAL := help

PYTHON ?= python3.11
OUT ?= data/smoke
DEMO ?= runs/demo
# Where torch comes from. Without a GPU driver: the index of CPU builds, a fiftieth of the CUDA download. Override:
#   make setup TORCH_INDEX=https://download.pytorch.org/whl/cu130        another index
#   make setup TORCH_INDEX=                                             only what pip is configured to use
TORCH ?= torch==2.13.0
TORCH_INDEX ?= $(shell command -v nvidia-smi >/dev/null 2>&1 || echo https://download.pytorch.org/whl/cpu)
TORCH_INDEX_TIMEOUT_S ?= 10
# What headless rendering needs on Debian and Ubuntu, and the compiler for the optional mesh2sdf.
EGL_PACKAGES = libegl1 libgl1 libgl1-mesa-dri
APT_PACKAGES = $(EGL_PACKAGES) g++

BIN := .venv/bin
READY := .venv/ready

help:
	@echo "make demo       everything in small: data, training, generated meshes, a report ($(DEMO)/index.html)"
	@echo "make data       a small dataset alone, verified, with its report ($(OUT))"
	@echo "make test       every test that is not slow, setting the machine up first"
	@echo "make test-slow  the others"
	@echo "make lint type  ruff, pyright"
	@echo "make bench      benchmarks"
	@echo "make setup      the virtual environment .venv alone"

setup: $(READY)

$(READY): pyproject.toml
	@sh .ci/system_packages.sh "$(APT_PACKAGES)"
	@command -v $(PYTHON) >/dev/null || { echo "no $(PYTHON): install Python 3.11, or name another one: make PYTHON=python3.12" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	PYTHON="$(BIN)/python" TORCH="$(TORCH)" INDEX="$(TORCH_INDEX)" TIMEOUT_S="$(TORCH_INDEX_TIMEOUT_S)" sh .ci/install_torch.sh
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	@# pyrender pins a PyOpenGL that Python 3.12 cannot run; its other dependencies are in pyproject.toml.
	@$(BIN)/python -c "import sys; sys.exit(sys.version_info >= (3, 12))" || $(BIN)/python -m pip install --quiet --no-deps pyrender==0.1.45
	@if command -v g++ >/dev/null; then $(BIN)/python -m pip install --quiet -e ".[mesh2sdf]" || echo "mesh2sdf did not build; it is optional" >&2; \
	  else echo "no g++: going on without the optional mesh2sdf" >&2; fi
	$(BIN)/python -c "from pipeline.orchestration.asset_stages import warm_up; warm_up()"  # compiles the geometry, once for all processes
	@touch $(READY)

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

bench: setup
	$(BIN)/python -m benchmarks.sdf
	$(BIN)/python -c "import sys, torch; sys.exit(not torch.cuda.is_available())" && $(BIN)/python -m benchmarks.ssa ssa && $(BIN)/python -m benchmarks.conv || echo "no CUDA device: kernels not measured"

clean:
	rm -rf .venv data/smoke data/demo runs/demo
