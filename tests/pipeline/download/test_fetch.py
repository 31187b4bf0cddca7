"""Downloads from a server that misbehaves: each ends as intended, and nothing that is not the file is ever returned."""

import hashlib
import json
import multiprocessing
import os
import struct
import time

import pytest

from pipeline.core.errors import Reject, RunError, Transient
from pipeline.core.hashing import sha256_of
from pipeline.download import http as web
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
    """Fetches a path of the server with short waits; options of the file and of the client by name."""

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
        want = DownloadRequest(url=url, format=format, sha256=sha256, max_bytes=max_bytes)
        return download(want, tmp_path / "a.glb", cfg)

    return run


def rejects(reason, get, *args, kind=Reject, **options):
    with pytest.raises(Reject) as caught:
        get(*args, **options)
    assert (type(caught.value), caught.value.reason) == (kind, reason)
    return caught.value.numbers


def files_below(folder):
    """What a download may leave behind, without the hosts' locks."""
    found = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    return sorted(name for name in found if "/hosts/" not in name)


def test_a_file_arrives_whole_and_nothing_else_stays(get, tmp_path):
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
        (["truncate 7000", "ignore_range"], 2),  # a 200 to a Range is the whole file, not the rest
        (["truncate 7000", "wrong_range"], 3),
        (["truncate 7000", "status 416"], 3),
    ],
    ids=lambda value: "-".join(value).replace(" ", "") if isinstance(value, list) else "",
)
def test_what_passes_is_tried_again(script, visits, server, get, tmp_path):
    server.scripts["/a.glb"] = script
    assert get(sha256=SHA).read_bytes() == GLB
    assert server.visit_counts["/a.glb"] == visits
    assert files_below(tmp_path) == ["a.glb"]


def test_a_download_goes_on_where_it_was_cut_off_also_in_another_process(server, get):
    server.scripts["/a.glb"] = ["reset 5000", "reset", "reset", "reset"]
    assert rejects("connection_lost", get, kind=Transient)
    assert get().read_bytes() == GLB
    ranges = [headers.get("Range") for _, headers in server.requests]
    begun = int(ranges[-1].removeprefix("bytes=").rstrip("-"))
    assert ranges[0] is None
    assert 0 < begun <= 5000
    assert all("If-Range" in headers for _, headers in server.requests[1:])


def test_the_rest_of_another_file_is_not_appended(server, get):
    """Without a sha256 only If-Range tells that the file has changed."""
    server.scripts["/a.glb"] = ["reset 5000", "reset", "reset", "reset"]
    rejects("connection_lost", get, kind=Transient)
    server.files["/a.glb"] = GLB[:12] + GLB[:11:-1]
    assert get().read_bytes() == server.files["/a.glb"]


def test_a_beginning_that_was_damaged_is_thrown_away(server, get, tmp_path):
    server.scripts["/a.glb"] = ["reset 5000", "reset", "reset", "reset"]
    rejects("connection_lost", get, kind=Transient, sha256=SHA)
    (partial,) = [
        path
        for path in (tmp_path / "cache/partial").rglob("*")
        if path.is_file() and not path.suffix
    ]
    partial.write_bytes(bytes(partial.stat().st_size))  # a file system that came back with zeros
    assert get(sha256=SHA).read_bytes() == GLB


@pytest.mark.parametrize("folder", ["", "partial", "hosts", "gone", "files", "quarantine"])
def test_a_cache_that_cannot_be_used_ends_the_run_and_is_no_verdict(folder, get, tmp_path):
    blocked = tmp_path / "cache" / folder
    blocked.parent.mkdir(exist_ok=True)
    blocked.touch()
    path = "/none.glb" if folder == "gone" else "/a.glb"
    with pytest.raises(
        RunError, match=f"^cannot use --fetch.cache {tmp_path}/cache: .*; choose another$"
    ):
        get(path, keep=True, sha256="0" * 64 if folder == "quarantine" else None)


def test_the_server_says_when_to_come_back(server, get):
    server.scripts["/a.glb"] = ["status 429 1", "status 503"]
    started = time.monotonic()
    assert get().read_bytes() == GLB
    assert 1.0 <= time.monotonic() - started < 3.0


def test_nobody_waits_longer_than_the_limit(server, get):
    server.scripts["/a.glb"] = ["status 429 86400"]
    started = time.monotonic()
    get(max_wait_s=1.0)
    assert time.monotonic() - started < 3.0


def test_waits_grow_and_differ(server, get, monkeypatch):
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
        (["status 403 0", "always"], "http_403", Transient),  # GitHub's way to say "too often"
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
def test_how_what_does_not_pass_ends(script, reason, kind, server, get, tmp_path):
    server.scripts["/a.glb"] = script
    rejects(reason, get, kind=kind, max_bytes=1 << 20, retries=2)
    assert server.visit_counts["/a.glb"] == (
        6 if reason == "too_many_redirects" else 3 if kind is Transient else 1
    )
    assert not (tmp_path / "a.glb").exists()


def test_an_answer_that_trickles_for_ever_ends(server, get):
    server.scripts["/a.glb"] = ["drip", "always"]
    started = time.monotonic()
    rejects("no_answer", get, kind=Transient, retries=0, attempt_timeout_s=0.5)
    assert time.monotonic() - started < 5


def test_a_file_that_is_too_large_is_not_downloaded(server, get):
    assert rejects("file_too_large", get, max_bytes=1000) == {"bytes": len(GLB), "max_bytes": 1000}


def test_wrong_bytes_go_to_quarantine_and_are_never_returned(server, get, tmp_path):
    expected = "0" * 64
    assert rejects("wrong_sha256", get, sha256=expected) == {"expected": expected, "sha256": SHA}
    note, kept = sorted(
        (tmp_path / "cache/quarantine").iterdir(), key=lambda path: path.suffix, reverse=True
    )
    assert json.loads(note.read_text())["expected"] == expected
    assert sha256_of(kept) == SHA
    assert not (tmp_path / "a.glb").exists()


def test_empty_files_and_pointers_are_told(server, get):
    server.files |= {"/empty.glb": b"", "/lfs.glb": POINTER, "/bad.glb": POINTER[:60]}
    rejects("empty_file", get, "/empty.glb")
    assert rejects("lfs_pointer", get, "/lfs.glb", kind=LfsPointer) == {
        "oid": "ab" * 32,
        "bytes": 123,
    }
    rejects("lfs_pointer", get, "/bad.glb")


def test_what_is_gone_is_not_asked_for_again_until_the_note_expires(server, get, tmp_path):
    server.scripts["/a.glb"] = ["status 404"]
    first = rejects("http_404", get)
    assert rejects("http_404", get) == first
    assert server.visit_counts["/a.glb"] == 1
    (note,) = (tmp_path / "cache/gone").rglob("*.json")
    yesterday = time.time() - 25 * 3600
    os.utime(note, (yesterday, yesterday))
    assert get().read_bytes() == GLB


def test_a_larger_limit_counts_at_once(server, get):
    rejects("file_too_large", get, max_bytes=1000)
    assert get(max_bytes=len(GLB)).read_bytes() == GLB


def test_what_may_pass_leaves_no_note(server, get):
    server.scripts["/a.glb"] = ["status 500"]
    rejects("http_500", get, kind=Transient, retries=0)
    assert get().read_bytes() == GLB


def test_kept_files_are_checked_before_they_are_given_again(server, get, tmp_path):
    get(sha256=SHA, keep=True)
    assert get(sha256=SHA, keep=True).read_bytes() == GLB
    assert server.visit_counts["/a.glb"] == 1
    (kept,) = (path for path in (tmp_path / "cache/files").rglob("*") if path.is_file())
    kept.unlink()
    kept.write_bytes(b"somebody else's")
    assert get(sha256=SHA, keep=True).read_bytes() == GLB
    assert server.visit_counts["/a.glb"] == 2


def test_redirects_are_followed_and_secrets_stay_with_their_host(server, tmp_path):
    with run_server() as other:
        other.files["/b.glb"] = GLB
        server.scripts["/a.glb"] = ["redirect /c.glb"]
        server.scripts["/c.glb"] = [f"redirect {other.url}/b.glb"]
        want = DownloadRequest(
            url=f"{server.url}/a.glb", format="glb", headers={"Authorization": "secret"}
        )
        assert download(want, tmp_path / "a.glb", FetchConfig(cache=tmp_path)).read_bytes() == GLB
        assert [headers.get("Authorization") for _, headers in server.requests] == ["secret"] * 2
        assert [headers.get("Authorization") for _, headers in other.requests] == [None]


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "http://", "http://[::1", "ftp://127.0.0.1/x", "/etc/passwd"]
)
def test_only_http(url, tmp_path):
    with pytest.raises(Reject, match="bad_url"):
        download(DownloadRequest(url=url), tmp_path / "x", FetchConfig(cache=tmp_path))


def test_a_host_that_is_not_there(get):
    rejects("connection_lost", get, "http://127.0.0.1:9/a.glb", kind=Transient, retries=1)


def _fetch_one(url, folder, number):
    cfg = FetchConfig(cache=folder, per_host=2)
    download(DownloadRequest(url=f"{url}/{number}.glb"), folder / f"{number}.out", cfg)


def test_one_host_is_asked_by_so_many_processes_at_once(server, tmp_path):
    for number in range(6):
        server.files[f"/{number}.glb"] = GLB
        server.scripts[f"/{number}.glb"] = ["slowly 0.3"]
    context = multiprocessing.get_context("fork")
    children = [
        context.Process(target=_fetch_one, args=(server.url, tmp_path, number))
        for number in range(6)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0] * 6
    assert server.max_open == 2


def test_json_is_asked_for_and_an_answer_that_is_none_is_told(server, tmp_path):
    cfg = FetchConfig(cache=tmp_path)
    server.post_handlers["/api"] = lambda body: {"got": body}
    assert post_json(f"{server.url}/api", [1], {}, cfg) == {"got": [1]}
    server.post_handlers["/api"] = lambda body: "x" * 2000
    with pytest.raises(Reject, match="file_too_large"):
        post_json(f"{server.url}/api", [1], {}, cfg, max_bytes=1000)


@pytest.mark.parametrize(
    ("option", "value"), [("per_host", 0), ("retries", -1), ("read_timeout_s", 0)]
)
def test_options_out_of_range(option, value):
    with pytest.raises(ValueError, match=option):
        FetchConfig(**{option: value})


def test_an_encrypted_connection_stays_one(monkeypatch, tmp_path):
    class Answer:
        status = 302

        def __init__(self):
            self.headers = {"Location": "http://example.org/a.glb"}

        def close(self):
            pass

    class Pool:
        def request(self, *args, **options):
            return Answer()

    monkeypatch.setattr(web, "_connection_pool", lambda cfg: Pool())
    with pytest.raises(Reject, match="insecure_redirect"):
        download(
            DownloadRequest(url="https://example.org/a.glb"),
            tmp_path / "x",
            FetchConfig(cache=tmp_path),
        )
