"""Builds that several test files read."""

import pytest

from tests.pipeline.builds import TINY, environment, finish, start


@pytest.fixture(scope="session")
def tiny_build(tmp_path_factory):
    """An undisturbed build of 12 procedural assets in 4 shards at R = 64 and 96. Copy it before you change it."""
    folder = tmp_path_factory.mktemp("tiny")
    out = folder / "build"
    args = [*TINY, "--limit", "12", "--resolutions", "64", "96", "--val-percent", "30", "--out", out]
    finish(start("pipeline.build", *args, env=environment(folder)))
    return out
