"""Fixtures that several test files use: a finished build and a local Ray."""

import os

import pytest

# Triton is imported before anything is rendered: some of its builds export an LLVM, and Mesa loads
# another version.
import triton  # noqa: F401

from tests.pipeline.builds import TINY, environment, finish, start


@pytest.fixture(scope="session")
def tiny_build(tmp_path_factory):
    """An uninterrupted build of 12 procedural assets in 4 shards at R = 64 and 96.

    Tests that change it work on a copy.
    """
    folder = tmp_path_factory.mktemp("tiny")
    out = folder / "build"
    args = [
        *TINY,
        "--limit",
        "12",
        "--resolutions",
        "64",
        "96",
        "--val-percent",
        "30",
        "--out",
        out,
    ]
    finish(start("pipeline.build", *args, env=environment(folder)))
    return out


@pytest.fixture(scope="session")
def shared_ray(tmp_path_factory):
    """A local Ray for all tests that build in the process of the tests."""
    import ray

    before = {
        name: os.environ.get(name) for name in ("HOME", "RAY_AUTH_MODE", "RAY_USAGE_STATS_ENABLED")
    }
    os.environ |= {"HOME": str(tmp_path_factory.mktemp("home"))}
    os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    ray.init(
        address="local",
        num_cpus=2,
        object_store_memory=100 << 20,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
    )
    yield
    ray.shutdown()
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})
