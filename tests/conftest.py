"""Settings for every test."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

# The same examples run every time, so a red test is the change's own doing.
# --hypothesis-profile=explore draws new ones.
settings.register_profile("repeatable", derandomize=True)
settings.register_profile("explore", derandomize=False)
settings.load_profile("repeatable")
# The processes share the cores: each library uses one thread, as in the children of a build.
for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ.setdefault(name, "1")
# No test asks the model hub. Without network each request would wait and be repeated.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Before anything imports triton: without a GPU its kernels run in the interpreter.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu_tests = [item for item in items if item.get_closest_marker("gpu")]
    if gpu_tests:
        import torch

        if not torch.cuda.is_available():
            for item in gpu_tests:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
