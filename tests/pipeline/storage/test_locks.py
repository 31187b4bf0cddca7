"""Workspaces are locked by their process and removed after it."""

import multiprocessing

import pytest

from pipeline.core.errors import RunError
from pipeline.storage.locks import scratch_root, workspace
from pipeline.storage.remote import RemotePath


def work(scratch, ready, end):
    with workspace(RemotePath("s3://bucket/x"), scratch) as here:
        (here / "file").write_bytes(b"x")
        ready.set()
        end.wait()


def test_workspaces_of_killed_processes_are_removed_and_those_of_others_stay(tmp_path):
    context = multiprocessing.get_context("spawn")
    tasks = []
    for _ in range(2):
        ready, end = context.Event(), context.Event()
        process = context.Process(target=work, args=(tmp_path, ready, end))
        process.start()
        tasks.append((process, ready, end))
    assert all(ready.wait(60) for _, ready, _ in tasks)
    tasks[0][0].kill()
    tasks[0][0].join()
    assert len(list(scratch_root(tmp_path).glob("*/file"))) == 2
    with workspace(RemotePath("s3://bucket/x"), tmp_path):
        assert len(list(scratch_root(tmp_path).glob("*/file"))) == 1
    tasks[1][2].set()
    tasks[1][0].join()
    assert list(scratch_root(tmp_path).rglob("*")) == []
    (tmp_path / "file").write_bytes(b"")
    with (
        pytest.raises(RunError, match="choose another --scratch"),
        workspace(RemotePath("s3://b/x"), tmp_path / "file"),
    ):
        pass
