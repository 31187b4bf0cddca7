"""Fixtures that several test files use: a finished build and a local Ray."""

import os
import shutil

import pytest

# Triton is imported before anything is rendered: some of its builds export an LLVM, and Mesa loads
# another version.
import triton  # noqa: F401

from pipeline.core.files import lock_one_of
from tests.pipeline.builds import TINY, environment, finish, start


@pytest.fixture(scope="session")
def tiny_build(tmp_path_factory):
    """An uninterrupted build of 12 procedural assets in 4 shards at R = 64 and 96.

    Tests that change it work on a copy. The processes of pytest-xdist share one build.
    """
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # the directory of this run, with one directory for each process
    with lock_one_of([folder / "tiny.lock"], timeout_s=500):
        out = folder / "tiny" / "build"
        if not (folder / "tiny" / "finished").exists():
            shutil.rmtree(folder / "tiny", ignore_errors=True)
            (folder / "tiny").mkdir()
            args = [*TINY, "--limit", 12, "--resolutions", 64, 96, "--val-percent", 30]
            env = environment(folder / "tiny")
            finish(start("pipeline.build", *args, "--out", out, env=env))
            (folder / "tiny" / "finished").touch()
    return out


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """A home directory for this process and those of the local Ray."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(folder))
        yield folder


@pytest.fixture(scope="session")
def object_store(home):
    """An S3 server. Processes with the home directory of the tests find it."""
    from tests.pipeline import s3_server  # moto takes a second to import

    with s3_server.running() as server:
        server.write_settings(home)
        yield server


@pytest.fixture
def store(object_store, monkeypatch):
    """The S3 server, which answers every request unless a test changes that."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    object_store.proxy.cuts, object_store.proxy.down = [], False
    yield object_store
    object_store.proxy.cuts, object_store.proxy.down = [], False


@pytest.fixture(scope="session")
def shared_ray(home):
    """A local Ray for all tests that build in the process of the tests."""
    import ray

    patch = pytest.MonkeyPatch()
    patch.setenv("RAY_AUTH_MODE", "disabled")
    patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
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
    patch.undo()
