"""Builds that several test files read."""

import os

import pytest
import triton  # noqa: F401  before anything draws: some of its builds export an LLVM, and Mesa loads another one

from tests.pipeline.builds import TINY, environment, finish, start


@pytest.fixture(scope="session")
def tiny_build(tmp_path_factory):
    """An undisturbed build of 12 procedural assets in 4 shards at R = 64 and 96. Copy it before you change it."""
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
    """One local Ray for every test that builds in its own process."""
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
