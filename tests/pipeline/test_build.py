"""The build command: finished trees, interruptions, bad requests and locks."""

import errno
import logging
import signal
import socket
import sys
import time
from functools import partial
from unittest.mock import Mock

import pyarrow.parquet as pq
import pytest

from pipeline.build import build, configure, main
from pipeline.config import PRESETS, BuildConfig
from pipeline.core.cli import command
from pipeline.core.errors import RunError, UserError
from pipeline.curation.config import RankConfig
from pipeline.inspection.verification import verify
from pipeline.storage.manifest import read_manifest
from pipeline.storage.render_shard import RenderShard
from pipeline.storage.sdf_shard import SdfShard
from tests.pipeline.builds import (
    TINY,
    Listing,
    assert_same,
    contents,
    environment,
    finish,
    start,
    survivors,
    wait_until,
)


def test_a_finished_build_has_exactly_its_files(tiny_build):
    names = {path.relative_to(tiny_build).as_posix() for path in tiny_build.glob("*/*/*")}
    names |= {path.relative_to(tiny_build).as_posix() for path in tiny_build.glob("*/*.*")}
    shards = ["000000", "000001", "000002", "000003"]
    products = ["manifest", "renders-paper", "sdf-64", "sdf-96"]
    assert sorted(names) == sorted(
        [f"sdf/{r}/{s}.zarr" for r in (64, 96) for s in shards]
        + [f"renders/paper/{s}.{kind}" for s in shards for kind in ("tar", "index.parquet")]
        + [f"{folder}/{s}.parquet" for s in shards for folder in ("manifest", "stats")]
        + [f"shards/{s}/{product}.json" for s in shards for product in products]
        + ["report/index.html"]
    )
    assert verify(tiny_build) == []


def test_bricks_renders_and_manifest_hold_the_same_assets(tiny_build):
    planned = pq.read_table(tiny_build / "plan.parquet").to_pylist()
    assert [row["row"] for row in planned] == [0, 1, 2] * 4
    rows = [
        row for path in sorted((tiny_build / "manifest").iterdir()) for row in read_manifest(path)
    ]
    assert [row.uid for row in rows] == [row["uid"] for row in planned]
    assert {row.status for row in rows} == {"done"}
    for row in rows:
        assert row.scale > 0
        for resolution in (64, 96):
            shard = SdfShard(tiny_build / "sdf" / str(resolution) / f"{row.shard}.zarr")
            assert shard.tokens(row.uid) == row.tokens[resolution] > 0
        assert RenderShard(tiny_build / "renders" / "paper" / f"{row.shard}.tar").views(
            row.uid
        ) == [0, 1]


def test_an_interrupted_and_extended_build_has_the_same_bytes(tiny_build, tmp_path):
    """The build is killed after its first commit and stopped after its next asset.

    Then it is extended by a resolution and runs to the end.
    """
    out = tmp_path / "build"
    args = [*TINY, "--limit", "12", "--val-percent", "30", "--out", out, "--resolutions", "64"]
    for signum, code, pattern in [
        (signal.SIGKILL, -signal.SIGKILL, "shards/*/renders-paper.json"),
        (signal.SIGTERM, 128 + signal.SIGTERM, ".scratch/*/*/result.json"),
    ]:
        env = environment(tmp_path)
        before = set(out.glob(pattern))
        process = start("pipeline.build", *args, env=env)
        wait_until(partial(new_files, process, out, pattern, before))
        process.send_signal(signum)
        finish(process, code=code)
        assert survivors(env) == []
    committed = {
        path: path.stat().st_mtime_ns
        for marker in out.glob("shards/*/renders-paper.json")
        for name in ("sdf", "renders", "shards")
        for path in (out / name).rglob("*")
        if path.is_file()
        and marker.parent.name in str(path)
        and not path.name.startswith("manifest")
    }
    assert len(committed) > 10
    assert len(list(out.glob("shards/*"))) < 4
    finish(start("pipeline.build", *args, "96", env=environment(tmp_path)))
    assert {path: path.stat().st_mtime_ns for path in committed} == committed
    assert_same(contents(out), contents(tiny_build))
    assert verify(out) == []


def new_files(process, out, pattern, before):
    assert process.poll() is None, process.communicate()[0]
    return set(out.glob(pattern)) - before


def test_options_override_the_preset_and_smoke_is_the_default():
    smoke = configure([])
    assert smoke == PRESETS["smoke"]
    assert (smoke.limit, smoke.resolutions) == (48, (64, 128))
    assert (smoke.views, smoke.image_size) == (12, 256)
    full = configure(["--preset", "full", "--views", "3", "--resolutions", "64"])
    assert (full.resolutions, full.views) == ((64,), 3)
    assert (full.image_size, full.topology_resolution) == (1024, 512)
    assert configure(["--preset=paper"]).resolutions == (256, 384, 512)
    assert configure(["--source", "folder:/meshes"]).limit is None
    assert configure(["--source", "folder:/meshes", "--limit", "5"]).limit == 5


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--resolution 64", "unknown option --resolution, did you mean --resolutions?"),
        ("--preset huge", "smoke"),
        ("--resolutions 65", "--resolutions must be a positive multiple of 8, got 65"),
        ("--topology-resolution 36", "--topology-resolution must be a positive multiple of 8"),
        ("--topology-resolution 32", "--topology-resolution must be at least 64, got 32"),
        (
            "--rank.target-count 2 --rank.best-count 1 --rank.best-resolutions 65",
            "--rank.best-resolutions must be a positive multiple of 8, got 65",
        ),
        ("--source github:/no/such.csv", "/no/such.csv: No such file or directory; name a"),
        ("--views 0", "views must be"),
        ("--views many", "--views: invalid literal for int() with base 10: 'many'"),
        ("--shard-size 0", "--shard-size must be 1 or more, got 0"),
        (
            "--limits.asset-timeout-s inf",
            "--limits.asset-timeout-s must be positive and below 1e9, got inf",
        ),
        (
            "--limits.asset-memory-gb inf",
            "--limits.asset-memory-gb must be positive and below 1e9, got inf",
        ),
        ("--source folder:/no/such/folder", "/no/such/folder"),
        ("--source ftp:x", "unknown source 'ftp:x'"),
        ("--out /proc/nothing", "cannot write to /proc/nothing"),
        ("--out /etc", "/etc exists and is not a build"),
    ],
)
def test_a_bad_request_is_reported_in_one_line_with_exit_code_2(
    options, words, monkeypatch, caplog
):
    monkeypatch.setattr(sys, "argv", ["build", *options.split()])
    with pytest.raises(SystemExit) as end:
        command(main)
    assert end.value.code == 2
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert words in record.getMessage()
    assert "\n" not in record.getMessage()


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("Could not find\nany"),
        ValueError("Invalid address format: here"),
        Exception("Cannot connect to the node"),  # Ray raises this class itself
    ],
)
def test_a_missing_ray_cluster_is_named(error, monkeypatch, tmp_path):
    def init(**_):
        raise error

    monkeypatch.setenv("RAY_ADDRESS", "here")
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", init)
    with pytest.raises(
        UserError, match=r"^no Ray at RAY_ADDRESS=here: [CI].*; correct or unset it$"
    ):
        main([*TINY, "--limit", "1", "--out", str(tmp_path / "out")])


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (OSError("AF_UNIX path length cannot\nexceed 107 bytes"), "AF_UNIX path .* 107 bytes"),
        (RuntimeError("The current node timed out"), "The current node timed out"),
        (Exception(), "Exception"),  # Ray raises this class itself
    ],
)
def test_a_ray_that_cannot_start_is_reported_in_one_line(error, cause, monkeypatch, tmp_path):
    def init(**_):
        raise error

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", init)
    with pytest.raises(RunError, match=f"^Ray cannot start on this machine: {cause}; free .*$"):
        main([*TINY, "--limit", "1", "--out", str(tmp_path / "out")])


def test_a_dead_ray_cluster_ends_the_run_at_once(monkeypatch, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    for address in (f"127.0.0.1:{port}", f"ray://127.0.0.1:{port}"):
        monkeypatch.setenv("RAY_ADDRESS", address)
        started = time.monotonic()
        with pytest.raises(UserError, match=rf"RAY_ADDRESS={address}: .*refused; correct or unset"):
            main([*TINY, "--limit", "1", "--out", str(tmp_path / "out")])
        assert time.monotonic() - started < 20


def test_an_unknown_option_is_reported_without_a_traceback(tmp_path):
    output = finish(start("pipeline.build", "--bogus", env=environment(tmp_path)), code=2)
    assert len(output.splitlines()) == 1
    assert "unknown option --bogus" in output


class SourceThatStartsABuild:
    """A source that starts a second build with the same options while it is listed."""

    name = "second"

    def __init__(self, cfg):
        self.cfg = cfg

    def records(self):
        with pytest.raises(UserError, match=f"another build is running with --out {self.cfg.out};"):
            build(self.cfg, [Listing("ab")])
        return iter(())


@pytest.mark.parametrize(
    "rank", [RankConfig(), RankConfig(target_count=1)], ids=["plain", "ranked"]
)
def test_a_second_build_in_the_same_directory_is_refused(tmp_path, rank):
    cfg = BuildConfig(out=tmp_path / "out", rank=rank)
    for _ in range(2):  # the first build leaves no lock behind
        with pytest.raises(UserError, match="no assets"):
            build(cfg, [SourceThatStartsABuild(cfg)])
    assert not list(tmp_path.glob("out/*"))


def test_a_file_system_without_locks_causes_a_warning(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(
        "fcntl.flock", Mock(side_effect=OSError(errno.ENOLCK, "No locks available"))
    )
    with pytest.raises(UserError, match="no assets"):
        build(BuildConfig(out=tmp_path / "out"), [Listing("")])
    assert "cannot be locked (No locks available)" in caplog.text
