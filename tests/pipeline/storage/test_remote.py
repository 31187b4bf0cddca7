"""Paths in object stores: uploads in parts, repeated requests, removal and atomic writing."""

import pickle
import threading
import time
from concurrent.futures import CancelledError
from pathlib import Path

import fsspec
import numpy as np
import pytest

from pipeline.core.errors import RunError
from pipeline.storage.remote import ReadStop, RemotePath, stop_reading, store_path
from tests.pipeline.s3_server import BUCKET, Cut


def test_a_file_url_is_a_path_and_no_credential_is_stored(tmp_path):
    assert store_path(f"file://{tmp_path}/x") == tmp_path / "x"
    assert store_path("data/x") == Path("data/x")
    with pytest.raises(ValueError, match="three slashes"):
        store_path("file://host/x")
    assert str(RemotePath("sftp://me:secret@host/x")) == "sftp://host/x"


def test_a_large_object_is_sent_in_parts_and_cut_parts_are_sent_again(store, tmp_path):
    data = np.random.default_rng(0).bytes(40 << 20)
    (tmp_path / "large").write_bytes(data)
    place = RemotePath(f"s3://{BUCKET}/large", retry_waits_s=(0.1,))
    cuts = [Cut(r"^PUT /bucket/large\?.*partNumber=2", "body", after_bytes=1 << 20)]
    cuts += [Cut(r"^POST /bucket/large\?uploadId", "answer")]  # finished, and nobody knows
    store.proxy.cuts = cuts
    place.upload(tmp_path / "large")
    assert [len(cut.done) for cut in cuts] == [1, 1]
    assert store.get("large") == data
    assert store.unfinished_uploads() == []
    store.proxy.cuts = [Cut(r"^GET /bucket/large", "answer")]
    place.download(tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == data
    store.proxy.cuts = [Cut(r"^PUT /bucket/large\?.*partNumber=2", "body", times=10**6)]
    with pytest.raises(
        RunError, match=r"s3://bucket/large cannot be written .*same command to resume"
    ):
        place.upload(tmp_path / "large")
    store.proxy.cuts = []
    assert store.get("large") == data  # nothing half replaced it


def test_where_the_stores_package_gives_up_we_try_again_after_a_while(store):
    cut = Cut(r"^PUT /bucket/patient", "body", times=10**6)
    store.proxy.cuts = [cut]
    with pytest.raises(RunError, match="patient cannot be written"):
        RemotePath(f"s3://{BUCKET}/patient", retry_waits_s=()).write_bytes(b"data")
    cut.times = 2 * len(cut.done) + 1  # once more than the package asks
    RemotePath(f"s3://{BUCKET}/patient", retry_waits_s=(0.1,)).write_bytes(b"data")
    assert (len(cut.done), store.get("patient")) == (cut.times, b"data")


def test_a_removal_that_the_store_refuses_is_an_error(store, monkeypatch):
    place = RemotePath(f"s3://{BUCKET}/refused", retry_waits_s=())
    store.put("refused/a", b"a")
    monkeypatch.setattr(place.filesystem()[0], "rm", lambda paths: [])
    with pytest.raises(RunError, match="refused/a cannot be deleted"):
        place.delete()


def test_where_objects_are_files_they_are_written_under_another_name_first(monkeypatch):
    place = RemotePath("memory://files/x", retry_waits_s=())
    seen = []
    memory = fsspec.get_filesystem_class("memory")
    move = memory.mv
    monkeypatch.setattr(
        memory, "mv", lambda self, a, b, **kw: seen.append((a, b)) or move(self, a, b, **kw)
    )
    place.write_bytes(b"one")
    assert (seen, place.read_bytes()) == ([("/files/x.partial", "/files/x")], b"one")
    (place.with_name("tree") / "a/b").write_bytes(b"two")
    assert place.with_name("tree").list_files() == ["a/b"]
    place.with_name("tree").delete()
    place.delete()
    assert RemotePath("memory://files").list_files() == []
    with pytest.raises(FileNotFoundError):
        place.read_bytes()


def test_a_stop_ends_a_call_that_does_not_return_and_all_later_ones():
    stop, gate, errors = ReadStop(), threading.Event(), []
    assert stop.call(lambda: 7) == 7
    with pytest.raises(OSError, match="gone"):
        stop.call(fail)

    def wait() -> None:
        try:
            stop.call(gate.wait)
        except CancelledError as error:
            errors.append(error)

    waiting = threading.Thread(target=wait)
    waiting.start()
    assert not pickle.loads(pickle.dumps(stop)).is_set
    stop.set()
    waiting.join(10)
    gate.set()
    assert len(errors) == 1
    with pytest.raises(CancelledError):
        stop.call(pytest.fail)


def fail() -> None:
    raise OSError("gone")


@pytest.mark.parametrize("where", ["stall", "down"])
def test_reads_of_an_s3_store_that_gives_no_answer_end_when_they_are_stopped(store, where):
    """A read of a range, and a listing, which the store's package cannot cancel."""
    place = RemotePath(f"s3://{BUCKET}/wanted", (60.0,) * 5, ReadStop())
    place.write_bytes(b"data")
    version = place.describe()
    store.proxy.cuts = [Cut("^GET ", "stall", times=1000)] if where == "stall" else []
    store.proxy.down = where == "down"
    ended = []

    def read(function) -> None:
        with pytest.raises(RunError, match=r"wanted cannot be .*, because the run has ended"):
            function()
        ended.append(1)

    reads = (lambda: place.read_range_of(version, 0, 4), place.list_objects)
    threads = [threading.Thread(target=read, args=(function,)) for function in reads]
    for thread in threads:
        thread.start()
    time.sleep(0.3)
    stop_reading(place, Path("local"))
    try:
        for thread in threads:
            thread.join(10)
        assert len(ended) == 2
    finally:
        store.proxy.cuts, store.proxy.down = [], False
