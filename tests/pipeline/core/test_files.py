"""Local files: atomic replacement, durable writes and locks."""

import os
import signal
from pathlib import Path

import pytest

from pipeline.core.files import lock_one_of, replacing, try_lock, write_atomically
from tests.child_python import run_python


def write_a_part_and_fail(path, options):
    with replacing(path, **options) as partial:
        assert partial.parent == path.parent
        assert not partial.exists()
        partial.write_text("a part", encoding="utf-8")
        raise RuntimeError


@pytest.mark.parametrize("options", [{}, {"several_writers": True}, {"durable": True}])
def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, options):
    path = tmp_path / "folder" / "file"
    write_atomically(path, "first", **options)
    assert path.read_text(encoding="utf-8") == "first"
    with pytest.raises(RuntimeError):
        write_a_part_and_fail(path, options)
    assert path.read_text(encoding="utf-8") == "first"
    write_atomically(path, b"second", **options)
    assert path.read_bytes() == b"second"
    assert list(path.parent.iterdir()) == [path]


def test_a_leftover_of_a_killed_writer_is_replaced(tmp_path):
    path = tmp_path / "shard"
    with replacing(path, durable=True) as partial:
        partial.mkdir()
        (partial / "a").write_text("new", encoding="utf-8")
    leftover = path.with_name(".other.partial")
    leftover.mkdir()
    (leftover / "old").touch()
    with replacing(tmp_path / "other") as partial:
        partial.mkdir()
        (partial / "new").touch()
    assert [file.name for file in (tmp_path / "other").iterdir()] == ["new"]
    assert (path / "a").read_text(encoding="utf-8") == "new"


def test_a_lock_is_held_until_its_descriptor_is_closed(tmp_path):
    descriptors = [os.open(tmp_path, os.O_RDONLY) for _ in range(2)]
    assert try_lock(descriptors[0])
    assert not try_lock(descriptors[1])
    os.close(descriptors[0])
    assert try_lock(descriptors[1])
    os.close(descriptors[1])


def test_one_of_several_locks_is_taken(tmp_path):
    paths = [tmp_path / name for name in "ab"]
    with lock_one_of(paths, timeout_s=1) as first, lock_one_of(paths, timeout_s=1) as second:
        assert {first, second} == set(paths)
        with pytest.raises(TimeoutError, match="no free lock"), lock_one_of(paths, timeout_s=0.1):
            pass
    with lock_one_of(paths[:1], timeout_s=1, delete=True):
        assert paths[0].exists()
    assert not paths[0].exists()


def test_a_process_that_is_killed_releases_its_lock(tmp_path):
    path = tmp_path / "lock"
    code = f"""
import os, signal
from pathlib import Path
from pipeline.core.files import lock_one_of
with lock_one_of([Path({str(path)!r})], timeout_s=1):
    os.kill(os.getpid(), signal.SIGKILL)
"""
    run_python("-c", code, exit_code=-signal.SIGKILL)
    with lock_one_of([path], timeout_s=1):
        pass


def test_a_link_to_a_directory_is_replaced_without_a_moment_in_which_it_is_missing(
    tmp_path, monkeypatch
):
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
    link = tmp_path / "latest"
    link.symlink_to("old")

    def no_move(self, target):
        raise AssertionError(f"{self} was moved away to {target}")

    monkeypatch.setattr(Path, "rename", no_move)
    with replacing(link) as partial:
        partial.symlink_to("new")
    assert link.is_symlink()
    assert link.resolve() == tmp_path / "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "new", "old"]
