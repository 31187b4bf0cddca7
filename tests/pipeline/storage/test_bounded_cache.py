"""The cache of byte ranges: its content, its limit, several processes, damage and full disks."""

import errno
import multiprocessing
import os
import random
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from pipeline.core.errors import UserError
from pipeline.storage.range_cache import (
    ABANDONED_AFTER_S,
    CHECKSUM_BYTES,
    RANGES,
    USAGE,
    RangeCache,
)


def content(key: str, size: int) -> bytes:
    """Return the bytes that belong to a key."""
    return random.Random(key).randbytes(size)


def read(cache: RangeCache, key: str, size: int = 1000) -> bool:
    """Read a range, check its bytes, and return whether the cache had it."""
    fetched = []

    def fetch() -> bytes:
        fetched.append(key)
        return content(key, size)

    assert cache.get(key, size, fetch) == content(key, size)
    return not fetched


def files(cache: RangeCache) -> list:
    return list(cache.folder.glob(RANGES))


def used(cache: RangeCache) -> int:
    return sum(path.stat().st_size for path in files(cache))


def test_bounded_cache_keeps_a_range_for_later_processes(tmp_path):
    cache = RangeCache(tmp_path / "new" / "cache", 10_000)
    assert not read(cache, "a")
    assert read(cache, "a")
    assert not read(cache, "b")
    assert read(RangeCache(tmp_path / "new" / "cache", 10_000), "a")


def test_bounded_cache_deletes_what_was_not_used_for_longest(tmp_path):
    size = 1000 - CHECKSUM_BYTES
    cache = RangeCache(tmp_path, 10_000)
    path_of = {}
    for number in range(10):
        before = set(files(cache))
        read(cache, str(number), size)
        (path_of[number],) = set(files(cache)) - before
        os.utime(path_of[number], (number, number))
    assert used(cache) == 10_000
    assert read(cache, "0", size)  # now the newest
    read(cache, "10", size)  # leaves nine tenths of the limit
    assert used(cache) == 9_000
    assert [number for number, path in path_of.items() if not path.exists()] == [1, 2]


def test_bounded_cache_does_not_keep_a_range_of_almost_its_size(tmp_path):
    cache = RangeCache(tmp_path, 1000)
    assert not read(cache, "large", 950)
    assert not read(cache, "large", 950)
    assert files(cache) == []


@pytest.mark.parametrize("damage", ["short", "empty", "flipped"])
def test_bounded_cache_downloads_a_damaged_range_again(tmp_path, damage):
    cache = RangeCache(tmp_path, 10_000)
    read(cache, "a")
    (path,) = files(cache)
    data = bytearray(path.read_bytes())
    if damage == "flipped":
        data[500] ^= 1
    path.write_bytes({"short": data[:600], "empty": b"", "flipped": data}[damage])
    assert not read(cache, "a")
    assert read(cache, "a")


def test_bounded_cache_counts_again_what_killed_processes_left(tmp_path):
    cache = RangeCache(tmp_path, 10_000)
    read(cache, "a")
    old = files(cache)[0].with_suffix(".1-1-1.partial")
    new = files(cache)[0].with_suffix(".2-2-2.partial")
    for path in (old, new):
        path.write_bytes(bytes(3_000))
    then = time.time() - 2 * ABANDONED_AFTER_S
    os.utime(old, (then, then))
    (tmp_path / USAGE).write_text("9900", encoding="utf-8")
    read(cache, "b")
    assert not old.exists()
    assert new.exists()
    assert read(cache, "a")
    assert int((tmp_path / USAGE).read_text(encoding="utf-8")) == used(cache)


def test_bounded_cache_goes_on_without_room_on_the_disk(tmp_path, monkeypatch, caplog):
    cache = RangeCache(tmp_path, 10_000)
    read(cache, "a")

    def full(descriptor: int, length: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "ftruncate", full)
        assert [read(cache, key) for key in ("a", "b", "b")] == [True, False, False]
    assert [record.message for record in caplog.records] == [
        f"The cache in {tmp_path} cannot be written (No space left on device). What it lacks is "
        "downloaded every time; free some space."
    ]
    assert len(files(cache)) == 1
    assert not read(cache, "b")
    assert read(cache, "b")


def test_bounded_cache_keeps_nothing_of_a_failed_download(tmp_path):
    cache = RangeCache(tmp_path, 10_000)

    def fail() -> bytes:
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        cache.get("a", 1000, fail)
    assert files(cache) == []


def test_bounded_cache_in_a_place_that_cannot_be_used(tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match=r"the cache cannot use .*/file/x: .*; choose another --ca"):
        RangeCache(tmp_path / "file" / "x", 1000)


def download_once(folder, number: int, downloads) -> None:
    """Read one range as several processes and threads do, and count the downloads."""
    cache = RangeCache(folder, 10_000)

    def fetch() -> bytes:
        downloads.put(number)
        time.sleep(0.1)
        return content("a", 1000)

    with ThreadPoolExecutor(3) as pool:
        results = [pool.submit(cache.get, "a", 1000, fetch) for _ in range(3)]
    assert {result.result() for result in results} == {content("a", 1000)}


def test_bounded_cache_downloads_a_range_once_for_all_who_miss_it(tmp_path):
    context = multiprocessing.get_context("fork")
    downloads = context.SimpleQueue()
    workers = [
        context.Process(target=download_once, args=(tmp_path, number, downloads))
        for number in range(3)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    downloads.get()
    assert downloads.empty()


def test_bounded_cache_hands_a_failed_download_to_the_next_who_waits(tmp_path):
    cache, attempts = RangeCache(tmp_path, 10_000), []

    def fetch() -> bytes:
        attempts.append(1)
        time.sleep(0.05)
        if len(attempts) == 1:
            raise OSError("gone")
        return content("a", 1000)

    with ThreadPoolExecutor(3) as pool:
        results = [pool.submit(cache.get, "a", 1000, fetch) for _ in range(3)]
    errors = [result.exception() for result in results]
    assert [str(error) for error in errors if error] == ["gone"]
    assert len(attempts) == 2


def work(folder, limit: int, seed: int, results) -> None:
    cache = RangeCache(folder, limit)
    rng = random.Random(seed)
    largest = 0
    for _ in range(150):
        number = rng.randrange(40)
        read(cache, f"{number}", 500 + number)
        largest = max(largest, int((folder / USAGE).read_text(encoding="utf-8") or 0))
    results.put(largest)


def test_bounded_cache_is_shared_by_eight_processes(tmp_path):
    limit = 12_000  # about half of the 40 ranges
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    workers = [
        context.Process(target=work, args=(tmp_path, limit, seed, results)) for seed in range(8)
    ]
    for worker in workers:
        worker.start()
    seen = []
    while any(worker.is_alive() for worker in workers):
        paths = [path for path in tmp_path.rglob("*") if path.name != USAGE]
        sizes = []
        for path in paths:
            try:
                sizes.append(path.stat().st_size if path.is_file() else 0)
            except FileNotFoundError:
                continue
        seen.append(sum(sizes))
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert max(results.get() for _ in workers) <= limit
    cache = RangeCache(tmp_path, limit)
    assert 0 < used(cache) <= limit
    assert not [path for path in files(cache) if path.suffix == ".partial"]
