# Everything a newcomer types. `make test` and `make demo` set the machine up themselves.
PYTHON ?= python3.11
# Where torch comes from. A CUDA machine: make TORCH_INDEX=https://download.pytorch.org/whl/cu130 ...
TORCH ?= torch==2.13.0
TORCH_INDEX ?= $(shell command -v nvidia-smi >/dev/null 2>&1 || echo https://download.pytorch.org/whl/cpu)
