"""Downloads from a faulty server: each has the right result, and no wrong content is used."""

import hashlib
import json
import multiprocessing
import os
import struct
import time

import pytest

from pipeline.core.errors import Reject, RunError, Transient
from pipeline.core.hashing import sha256_of
from pipeline.download import http
from pipeline.download.config import FetchConfig
from pipeline.download.fetch import DownloadRequest, LfsPointer, download
from pipeline.download.http import post_json
from tests.pipeline.faulty_http_server import run_server

GLB = struct.pack("<4sII", b"glTF", 2, 100_000) + bytes(range(256)) * 400
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"ab" * 32 + b"\nsize 123\n"
SHA = hashlib.sha256(GLB).hexdigest()


@pytest.fixture
def server():
    with run_server() as server:
        server.files |= {"/a.glb": GLB}
        yield server


@pytest.fixture
def get(server, tmp_path):
    """Download a path of the server with short waits. Keywords are options of the download."""

    def run(path="/a.glb", *, sha256=None, format="glb", max_bytes=1 << 20, **options):
        quick = {
            "read_timeout_s": 0.5,
            "connect_timeout_s": 2.0,
            "backoff_s": 0.01,
            "max_wait_s": 3.0,
            "retries": 3,
        }
        cfg = FetchConfig(cache=tmp_path / "cache", **{**quick, **options})
        url = path if "://" in path else server.url + path
        wanted = DownloadRequest(url=url, format=format, sha256=sha256, max_bytes=max_bytes)
        return download(wanted, tmp_path / "a.glb", cfg)

    return run


def rejects(reason, get, *args, kind=Reject, **options):
    with pytest.raises(Reject) as caught:
        get(*args, **options)
    assert (type(caught.value), caught.value.reason) == (kind, reason)
    return caught.value.numbers


def files_below(folder):
    """Return the files that a download left behind, without the locks of hosts."""
    found = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    return sorted(name for name in found if "/hosts/" not in name)


def test_a_download_leaves_only_the_complete_file(get, tmp_path):
    assert get(sha256=SHA).read_bytes() == GLB
    assert files_below(tmp_path) == ["a.glb"]


@pytest.mark.parametrize(
    ("script", "visits"),
    [
        (["reset"], 2),  # before any header
        (["reset 5000", "reset"], 3),
        (["truncate 7000", "truncate 100"], 3),
        (["status 500", "status 503", "status 502"], 4),
        (["stall 5"], 2),
        (["truncate 7000", "ignore_range"], 2),  # 200 means the whole file
        (["truncate 7000", "wrong_range"], 3),
        (["truncate 7000", "status 416"], 3),
    ],
    ids=lambda value: "-".join(value).replace(" ", "") if isinstance(value, list) else "",
)
def test_temporary_errors_are_retried(script, visits, server, get, tmp_path):
    server.scripts["/a.glb"] = script
    assert get(sha256=SHA).read_bytes() == GLB
    assert server.visit_counts["/a.glb"] == visits
    assert files_below(tmp_path) == ["a.glb"]


def test_an_interrupted_download_is_resumed_by_the_next_call(server, get):
    server.scripts["/a.glb"] = ["reset 5000", "reset", "reset", "reset"]
    assert rejects("connection_lost", get, kind=Transient)
    assert get().read_bytes() == GLB
    ranges = [headers.get("Range") for _, headers in server.requests]
    begun = int(ranges[-1].removeprefix("bytes=").rstrip("-"))
    assert ranges[0] is None
    assert 0 < begun <= 5000
    assert all("If-Range" in headers for _, headers in server.requests[1:])


def test_the_rest_of_a_changed_file_is_not_appended(server, get):
    """Without a sha256 only If-Range shows that the file has changed."""
    server.scripts["/a.glb"] = ["reset 5000", "reset", "reset", "reset"]
    rejects("connection_lost", get, kind=Transient)
    server.files["/a.glb"] = GLB[:12] + GLB[:11:-1]
    assert get().read_bytes() == server.files["/a.glb"]


def test_a_damaged_partial_file_is_downloaded_again(server, get, tmp_path):
    server.scripts["/a.glb"] = ["reset 5000", "reset", "reset", "reset"]
    rejects("connection_lost", get, kind=Transient, sha256=SHA)
    (partial,) = [
        path
        for path in (tmp_path / "cache/partial").rglob("*")
        if path.is_file() and not path.suffix
    ]
    # Zeros, as a file system may leave them after a power cut.
    partial.write_bytes(bytes(partial.stat().st_size))
    assert get(sha256=SHA).read_bytes() == GLB


@pytest.mark.parametrize("folder", ["", "partial", "hosts", "gone", "files", "quarantine"])
def test_an_unusable_cache_is_a_run_error(folder, get, tmp_path):
    blocked = tmp_path / "cache" / folder
    blocked.parent.mkdir(exist_ok=True)
    blocked.touch()
    path = "/none.glb" if folder == "gone" else "/a.glb"
    with pytest.raises(
        RunError, match=f"^cannot use --fetch.cache {tmp_path}/cache: .*; choose another$"
    ):
        get(path, keep=True, sha256="0" * 64 if folder == "quarantine" else None)


def test_retry_after_is_honoured(server, get):
    server.scripts["/a.glb"] = ["status 429 1", "status 503"]
    started = time.monotonic()
    assert get().read_bytes() == GLB
    assert 1.0 <= time.monotonic() - started < 3.0


def test_no_wait_is_longer_than_the_limit(server, get):
    server.scripts["/a.glb"] = ["status 429 86400"]
    started = time.monotonic()
    get(max_wait_s=1.0)
    assert time.monotonic() - started < 3.0


def test_waits_grow_exponentially_with_jitter(server, get, monkeypatch):
    waits = []
    monkeypatch.setattr(time, "sleep", lambda seconds: waits.append(seconds))
    server.scripts["/a.glb"] = ["status 500", "always"]
    rejects("http_500", get, kind=Transient, retries=5, backoff_s=1.0, max_wait_s=100.0)
    waits = [wait for wait in waits if wait != 0.05]
    assert len(waits) == 5
    for number, wait in enumerate(waits):
        assert 2**number <= wait <= 2**number + 1
    assert len({wait % 1 for wait in waits}) == 5


@pytest.mark.parametrize(
    ("script", "reason", "kind"),
    [
        (["status 500", "always"], "http_500", Transient),
        (["status 429", "always"], "http_429", Transient),
        (["status 403 0", "always"], "http_403", Transient),  # GitHub's answer to too many requests
        (["truncate 0", "always"], "truncated", Transient),
        (["reset", "always"], "connection_lost", Transient),
        (["stall 9", "always"], "no_answer", Transient),
        (["status 404"], "http_404", Reject),
        (["status 403"], "http_403", Reject),
        (["status 410"], "http_410", Reject),
        (["html"], "wrong_magic", Reject),
        (["redirect /a.glb", "always"], "too_many_redirects", Reject),
        (["redirect ftp://127.0.0.1/a.glb"], "bad_url", Reject),
        (["redirect file:///etc/passwd"], "bad_url", Reject),
        (["endless"], "file_too_large", Reject),
    ],
)
def test_permanent_and_repeated_errors_have_their_reason(
    script, reason, kind, server, get, tmp_path
):
    server.scripts["/a.glb"] = script
    rejects(reason, get, kind=kind, max_bytes=1 << 20, retries=2)
    assert server.visit_counts["/a.glb"] == (
        6 if reason == "too_many_redirects" else 3 if kind is Transient else 1
    )
    assert not (tmp_path / "a.glb").exists()


def test_an_endless_slow_response_times_out(server, get):
    server.scripts["/a.glb"] = ["drip", "always"]
    started = time.monotonic()
    rejects("no_answer", get, kind=Transient, retries=0, attempt_timeout_s=0.5)
    assert time.monotonic() - started < 5


def test_a_file_larger_than_the_limit_is_not_downloaded(server, get):
    assert rejects("file_too_large", get, max_bytes=1000) == {"bytes": len(GLB), "max_bytes": 1000}


def test_content_with_a_wrong_hash_is_moved_to_the_quarantine(server, get, tmp_path):
    expected = "0" * 64
    assert rejects("wrong_sha256", get, sha256=expected) == {"expected": expected, "sha256": SHA}
    entry, kept = sorted(
        (tmp_path / "cache/quarantine").iterdir(), key=lambda path: path.suffix, reverse=True
    )
    assert json.loads(entry.read_text(encoding="utf-8"))["expected"] == expected
    assert sha256_of(kept) == SHA
    assert not (tmp_path / "a.glb").exists()


def test_empty_files_and_lfs_pointers_are_rejected(server, get):
    server.files |= {"/empty.glb": b"", "/lfs.glb": POINTER, "/bad.glb": POINTER[:60]}
    rejects("empty_file", get, "/empty.glb")
    assert rejects("lfs_pointer", get, "/lfs.glb", kind=LfsPointer) == {
        "oid": "ab" * 32,
        "bytes": 123,
    }
    rejects("lfs_pointer", get, "/bad.glb")


def test_a_rejection_is_cached_until_it_expires(server, get, tmp_path):
    server.scripts["/a.glb"] = ["status 404"]
    first = rejects("http_404", get)
    assert rejects("http_404", get) == first
    assert server.visit_counts["/a.glb"] == 1
    (entry,) = (tmp_path / "cache/gone").rglob("*.json")
    yesterday = time.time() - 25 * 3600
    os.utime(entry, (yesterday, yesterday))
    assert get().read_bytes() == GLB


def test_a_rejection_by_size_is_not_cached(server, get):
    rejects("file_too_large", get, max_bytes=1000)
    assert get(max_bytes=len(GLB)).read_bytes() == GLB


def test_a_temporary_error_is_not_cached(server, get):
    server.scripts["/a.glb"] = ["status 500"]
    rejects("http_500", get, kind=Transient, retries=0)
    assert get().read_bytes() == GLB


def test_kept_files_are_verified_before_they_are_reused(server, get, tmp_path):
    get(sha256=SHA, keep=True)
    assert get(sha256=SHA, keep=True).read_bytes() == GLB
    assert server.visit_counts["/a.glb"] == 1
    (kept,) = (path for path in (tmp_path / "cache/files").rglob("*") if path.is_file())
    kept.unlink()
    kept.write_bytes(b"damaged")
    assert get(sha256=SHA, keep=True).read_bytes() == GLB
    assert server.visit_counts["/a.glb"] == 2


def test_redirects_do_not_send_credentials_to_other_hosts(server, tmp_path):
    with run_server() as other:
        other.files["/b.glb"] = GLB
        server.scripts["/a.glb"] = ["redirect /c.glb"]
        server.scripts["/c.glb"] = [f"redirect {other.url}/b.glb"]
        wanted = DownloadRequest(
            url=f"{server.url}/a.glb", format="glb", headers={"Authorization": "secret"}
        )
        assert download(wanted, tmp_path / "a.glb", FetchConfig(cache=tmp_path)).read_bytes() == GLB
        assert [headers.get("Authorization") for _, headers in server.requests] == ["secret"] * 2
        assert [headers.get("Authorization") for _, headers in other.requests] == [None]


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "http://", "http://[::1", "ftp://127.0.0.1/x", "/etc/passwd"]
)
def test_only_http_urls_are_accepted(url, tmp_path):
    with pytest.raises(Reject, match="bad_url"):
        download(DownloadRequest(url=url), tmp_path / "x", FetchConfig(cache=tmp_path))


def test_an_unreachable_host_is_a_temporary_error(get):
    rejects("connection_lost", get, "http://127.0.0.1:9/a.glb", kind=Transient, retries=1)


def _download_one(url, folder, number):
    cfg = FetchConfig(cache=folder, per_host=2)
    download(DownloadRequest(url=f"{url}/{number}.glb"), folder / f"{number}.out", cfg)


def test_connections_to_a_host_are_limited_over_all_processes(server, tmp_path):
    for number in range(6):
        server.files[f"/{number}.glb"] = GLB
        server.scripts[f"/{number}.glb"] = ["slowly 0.3"]
    context = multiprocessing.get_context("fork")
    children = [
        context.Process(target=_download_one, args=(server.url, tmp_path, number))
        for number in range(6)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0] * 6
    assert server.max_open == 2


def test_post_json_returns_json_and_limits_its_size(server, tmp_path):
    cfg = FetchConfig(cache=tmp_path)
    server.post_handlers["/api"] = lambda body: {"got": body}
    assert post_json(f"{server.url}/api", [1], {}, cfg) == {"got": [1]}
    server.post_handlers["/api"] = lambda body: "x" * 2000
    with pytest.raises(Reject, match="file_too_large"):
        post_json(f"{server.url}/api", [1], {}, cfg, max_bytes=1000)


@pytest.mark.parametrize(
    ("option", "value"), [("per_host", 0), ("retries", -1), ("read_timeout_s", 0)]
)
def test_options_out_of_range_are_refused(option, value):
    with pytest.raises(ValueError, match=option):
        FetchConfig(**{option: value})


def test_a_redirect_from_https_to_http_is_refused(monkeypatch, tmp_path):
    class Answer:
        status = 302

        def __init__(self):
            self.headers = {"Location": "http://example.org/a.glb"}

        def close(self):
            pass

    class Pool:
        def request(self, *args, **options):
            return Answer()

    monkeypatch.setattr(http, "_connection_pool", lambda cfg: Pool())
    with pytest.raises(Reject, match="insecure_redirect"):
        download(
            DownloadRequest(url="https://example.org/a.glb"),
            tmp_path / "x",
            FetchConfig(cache=tmp_path),
        )
