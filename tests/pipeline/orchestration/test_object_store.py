"""Builds into an S3 server over HTTP have the bytes of a local build, whatever fails on the way."""

import logging
import re
import signal
import sys
from dataclasses import replace

import fsspec
import numpy as np
import pytest

from pipeline import build as build_module
from pipeline import estimate as estimate_module
from pipeline import verify as verify_module
from pipeline.core.cli import command
from pipeline.core.errors import RunError
from pipeline.curation.config import RankConfig
from pipeline.inspection.build_report import write_report
from pipeline.inspection.cost_estimate import measure_passes
from pipeline.inspection.verification import verify
from pipeline.orchestration.commit import CommitJob
from pipeline.orchestration.passes import run_passes
from pipeline.orchestration.plan import read_plan
from pipeline.orchestration.transfer import commit
from pipeline.storage.locks import scratch_root
from pipeline.storage.remote import RemotePath
from pipeline.storage.render_shard import RenderShard
from pipeline.storage.sdf_shard import SdfShard
from tests.pipeline.builds import (
    TINY,
    assert_same,
    build,
    config,
    contents,
    environment,
    finish,
    rows_of,
    start,
    survivors,
    wait_until,
)
from tests.pipeline.crashing_source import CrashingSource
from tests.pipeline.s3_server import BUCKET, Cut

SOURCE = CrashingSource(count=5, behaviours=((1, "vanish"),))  # two shards of three
SMALL = {"shard_size": 3}

pytestmark = pytest.mark.usefixtures("shared_ray", "store")


@pytest.fixture(scope="module")
def local_build(shared_ray, tmp_path_factory):
    cfg = config(tmp_path_factory.mktemp("local") / "out", **SMALL)
    return cfg, build(cfg, [SOURCE])


@pytest.fixture
def remote(request, tmp_path):
    """A config of the same build whose output is a prefix of this test's own."""
    prefix = "".join(c if c.isalnum() else "-" for c in request.node.name)
    return prefix, config(
        RemotePath(f"s3://{BUCKET}/{prefix}"), scratch=tmp_path / "scratch", **SMALL
    )


def assert_like_local(store, prefix, local, folder):
    """Check that the objects are the files of a local build, except for stats and report."""
    assert sorted(store.keys(prefix)) == sorted(
        path.relative_to(local).as_posix() for path in local.rglob("*") if path.is_file()
    )
    assert_same(contents(store.download(prefix, folder / "copy")), contents(local))
    assert store.unfinished_uploads() == []


def left_in(scratch):
    return [path.name for path in scratch_root(scratch).rglob("*")]


def test_the_same_objects_with_the_same_bytes_and_readers_that_take_urls(
    store, local_build, remote, tmp_path
):
    local, total = local_build
    prefix, cfg = remote
    assert build(cfg, [SOURCE]) == total == {"done": 4, "rejected": 1, "failed": 0}
    assert_like_local(store, prefix, local.out, tmp_path)
    assert verify(cfg.out) == []
    assert left_in(cfg.scratch) == []
    written = {
        name: store.client.head_object(Bucket=BUCKET, Key=f"{prefix}/{name}")
        for name in store.keys(prefix)
    }
    store.put(f"{prefix}/.scratch/000000/late.tar", b"of a task that was thought dead")
    assert build(cfg, []) == total  # nothing is done again
    assert sorted(store.keys(prefix)) == sorted(written)
    for name, head in written.items():
        again = store.client.head_object(Bucket=BUCKET, Key=f"{prefix}/{name}")
        assert again["LastModified"] == head["LastModified"]

    uid = next(row.uid for row in rows_of(local.out) if row.status == "done")
    here, there = (SdfShard(cfg.out / "sdf/64/000000.zarr") for cfg in (local, cfg))
    assert there.uids == here.uids
    for name in ("cells", "values", "sharp"):
        assert np.array_equal(getattr(there.bricks(uid), name), getattr(here.bricks(uid), name))
    url = f"s3://{BUCKET}/{prefix}/renders/paper/000000.tar"
    here, there = RenderShard(local.out / "renders/paper/000000.tar"), RenderShard(url)
    assert there.keys == here.keys
    assert there.read_bytes(uid, 0) == here.read_bytes(uid, 0)
    assert there.read_images(0) == here.read_images(0)


def test_one_more_resolution_then_report_and_estimate(store, local_build, remote, tmp_path):
    prefix, cfg = remote
    local = replace(local_build[0], out=tmp_path / "local")
    for this in (local, cfg):
        build(this, [SOURCE])
        build(replace(this, resolutions=(64, 72)), [SOURCE])
    page = write_report(cfg.out)
    text = store.get(f"{prefix}/report/index.html").decode()
    assert str(page) == f"s3://{BUCKET}/{prefix}/report/index.html"
    assert (
        text.count("data:image/webp") == 4 * 4
    )  # three pictures and the thumbnail of each done asset
    write_report(local.out)
    assert_like_local(store, prefix, local.out, tmp_path)
    (cost,), (cost_here,) = (measure_passes(out).values() for out in (cfg.out, local.out))
    same = ("assets", "stored_bytes", "files", "shard_size", "fetched_bytes")
    assert [getattr(cost, name) for name in same] == [getattr(cost_here, name) for name in same]


def test_a_ranked_build(store, remote, tmp_path):
    prefix, cfg = remote
    loose = {"min_tokens": 1, "min_contrast": 0.0, "min_coverage": 0.0, "max_solid_fraction": 1.0}
    rank = RankConfig(
        target_count=2, best_count=1, best_resolutions=(72,), max_leak_fraction=1.0, **loose
    )
    cfg = replace(cfg, rank=rank, screen=replace(cfg.screen, resolution=64, image_size=64))
    local = replace(cfg, out=tmp_path / "local")
    assert run_passes(cfg, [SOURCE]) == run_passes(local, [SOURCE])
    assert_like_local(store, prefix, local.out, tmp_path)
    assert verify(cfg.out) == []
    assert run_passes(cfg, []) == run_passes(local, [])


@pytest.mark.parametrize(
    ("pattern", "where", "after_bytes"),
    [
        (r"^PUT /bucket/[^ ]*/000000\.tar", "body", 1500),
        (r"^PUT /bucket/[^ ]*/values/c/0/0", "body", 3000),
        (r"^PUT /bucket/[^ ]*/shards/000000/manifest\.json", "answer", 0),
        (r"^PUT /bucket/[^ ]*/shards/000001/renders-paper\.json", "answer", 0),
        (r"^PUT /bucket/[^ ]*/plan\.json", "answer", 0),
        (r"^PUT /bucket/[^ ]*/\.scratch/000000/", "body", 1500),
        (r"^GET /bucket/[^ ]*/\.scratch/000000/", "answer", 0),
        (r"^POST /bucket\?delete", "answer", 0),
    ],
)
def test_a_connection_that_is_cut_once_is_made_again(
    store, local_build, remote, tmp_path, pattern, where, after_bytes
):
    prefix, cfg = remote
    cut = Cut(pattern, where, after_bytes=after_bytes)
    store.proxy.cuts = [cut]
    assert build(cfg, [SOURCE]) == local_build[1]
    assert len(cut.done) == 1
    assert_like_local(store, prefix, local_build[0].out, tmp_path)


@pytest.mark.parametrize(
    ("name", "there", "not_there"),
    [
        ("000000.index.parquet", "renders/paper/000000.tar", "shards/000000/manifest.json"),
        (
            "shards/000000/renders-paper.json",
            "shards/000000/sdf-64.json",
            "shards/000000/renders-paper.json",
        ),
    ],
)
def test_a_store_that_goes_away_in_a_commit_ends_the_run_in_one_line_and_the_same_command_goes_on(
    store, local_build, remote, tmp_path, name, there, not_there
):
    prefix, cfg = remote
    cfg = replace(cfg, out=replace(cfg.out, retry_waits_s=(0.1, 0.1)))
    store.proxy.cuts = [
        Cut(rf"^PUT /bucket/[^ ]*/{re.escape(name)}", "body", times=10**6, after_bytes=100)
    ]
    with pytest.raises(
        RunError, match=rf"s3://bucket/.*/{re.escape(name)} cannot be written .*same command"
    ):
        build(cfg, [SOURCE])
    held = store.keys(prefix)
    assert there in held  # a part of the commit
    assert not_there not in held
    assert (
        len([name for name in held if name.startswith(".scratch/000000/")]) == 3
    )  # and what it takes to repeat it
    if (
        "shards/000000/sdf-64.json" not in held
    ):  # the half was of other code, and had an object more
        store.put(f"{prefix}/sdf/64/000000.zarr/values/c/0/0/stray", b"stray")
    store.put(f"{prefix}/.scratch/000001/gone.tar", b"stray")
    store.proxy.cuts = []
    visits = tmp_path / "notes"
    visits.mkdir()
    assert build(cfg, [replace(SOURCE, notes=visits)]) == local_build[1]
    assert not {"0.0", "1.0", "2.0"} & {
        path.name for path in visits.iterdir()
    }  # landed assets are not visited again
    assert_like_local(store, prefix, local_build[0].out, tmp_path)
    assert left_in(cfg.scratch) == []


def test_a_commit_whose_worker_was_lost_after_its_last_marker_is_not_repeated(store, remote):
    _, cfg = remote
    build(cfg, [SOURCE])
    records = tuple(read_plan(cfg.out).records("000000"))
    job = CommitJob(config=cfg, shard="000000", records=records, products=cfg.products, wanted=3)
    assert commit(job) == {
        "assets": 3,
        "done": 2,
        "rejected": 1,
        "failed": 0,
    }  # there is nothing left to pack


def test_a_driver_that_is_killed_goes_on_from_what_the_store_has(store, tiny_build, tmp_path):
    prefix, scratch = "killed", tmp_path / "scratch"
    args = [*TINY, "--limit", "12", "--resolutions", "64", "96", "--val-percent", "30"]
    args += ["--out", f"s3://{BUCKET}/{prefix}", "--scratch", scratch]
    env = {**environment(tmp_path), **store.environment()}
    process = start("pipeline.build", *args, env=env)

    def committed_one_and_works_on_another():
        assert process.poll() is None, process.communicate()[0]
        names = store.keys(prefix)
        shards = {name.split("/")[1] for name in names if name.endswith("/renders-paper.json")}
        return shards and any(
            n.startswith(".scratch/") and n.split("/")[1] not in shards for n in names
        )

    wait_until(committed_one_and_works_on_another)
    process.send_signal(signal.SIGKILL)
    finish(process, code=-signal.SIGKILL)
    assert survivors(env) == []
    held = store.keys(prefix)
    assert len([name for name in held if name.endswith("/manifest.json")]) < 4
    finish(start("pipeline.build", *args, env=env))
    assert_like_local(store, prefix, tiny_build, tmp_path)
    assert left_in(scratch) == []


def run_main(main, args, monkeypatch, caplog):
    """Run a command in this process. Return its exit code and its only warning or error."""
    monkeypatch.setattr(sys, "argv", ["command", *args])
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    with pytest.raises(SystemExit) as end:
        command(main)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    lines = [record for record in caplog.records if record.name.startswith("pipeline.")]
    (record,) = [record for record in lines if record.levelno >= logging.WARNING]
    assert "\n" not in record.getMessage()
    return end.value.code, record.getMessage()


@pytest.mark.parametrize(
    ("out", "words"),
    [
        ("s3://no-such-bucket/x", "cannot write to s3://no-such-bucket/x: FileNotFoundError"),
        ("s3://", "s3:// names no bucket"),
        ("bad://x/y", "Protocol not known: bad"),
        ("memory://x", "is visible to one process only"),
        ("gs://bucket/x", "the package for gs:// is missing; pip install 'gcsfs'"),
        ("http://127.0.0.1:9/x", "cannot write to http://127.0.0.1:9/x"),
        (
            "ftp://me:secret@127.0.0.1:1/x",
            "cannot write to ftp://127.0.0.1:1/x: ConnectionRefusedError",
        ),
        ("file://host/x", "a file URL must have three slashes"),
    ],
)
def test_an_output_that_cannot_be_is_one_line_before_any_work(out, words, monkeypatch, caplog):
    code, line = run_main(build_module.main, ["--out", out], monkeypatch, caplog)
    assert code == 2
    assert words in line
    assert "secret" not in line


def test_no_credentials_a_server_that_is_down_and_a_directory_of_others(
    store, remote, monkeypatch, caplog
):
    prefix, cfg = remote
    args = ["--out", str(cfg.out)]
    with monkeypatch.context() as patch:
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
        code, line = run_main(build_module.main, args, monkeypatch, caplog)
    assert (code, "NoCredentialsError" in line) == (2, True)
    caplog.clear()
    store.proxy.down = True
    for main, first in (
        (build_module.main, args),
        (verify_module.main, args[1:]),
        (estimate_module.main, args[1:]),
    ):
        code, line = run_main(main, first, monkeypatch, caplog)
        assert (code, str(cfg.out) in line, "rror: " in line) == (2, True, True)
        caplog.clear()
    store.proxy.down = False
    assert store.keys(prefix) == []
    code, line = run_main(verify_module.main, args[1:], monkeypatch, caplog)
    assert (code, "nothing at" in line) == (2, True)
    caplog.clear()
    store.put(f"{prefix}/thesis.tex", b"mine")
    code, line = run_main(build_module.main, args, monkeypatch, caplog)
    assert (code, "exists and is not a build" in line) == (2, True)
    assert store.keys(prefix) == ["thesis.tex"]


def test_verify_names_what_was_changed_in_the_store(
    store, remote, local_build, monkeypatch, caplog, tmp_path
):
    prefix, cfg = remote
    build(cfg, [SOURCE])
    for name, change, rule in [
        (
            "sdf/64/000001.zarr/values/c/0/0",
            lambda data: data[:-9] + b"x" + data[-8:],
            "shard 000001: sdf-64: .*sha256",
        ),
        (
            "sdf/64/000001.zarr/values/c/0/0",
            lambda data: data[:-1],
            "shard 000001: sdf-64: .*000001.zarr has .* bytes",
        ),
        (
            "sdf/64/000000.zarr/stray",
            lambda data: b"stray",
            "shard 000000: sdf-64: .*000000.zarr has .* bytes",
        ),
        (
            "renders/paper/000000.tar",
            lambda data: data[:600] + b"x" + data[601:],
            "shard 000000: renders-.*sha256",
        ),
        (
            "manifest/000001.parquet",
            lambda data: b"",
            "shard 000001: .*must be a readable manifest",
        ),
        (
            "shards/000001/sdf-64.json",
            lambda data: data[:40],
            "shard 000001: sdf-64: the commit marker does not parse",
        ),
        (".scratch/000000/left.tar", lambda data: b"", r"build: \.scratch: does not belong here"),
        (
            "sdf/64/000009.zarr/zarr.json",
            lambda data: b"{}",
            "build: sdf/64/000009.zarr: belongs to no shard",
        ),
    ]:
        old = store.get(f"{prefix}/{name}") if name in store.keys(prefix) else None
        store.put(f"{prefix}/{name}", change(old))
        breaches = [str(breach) for breach in verify(cfg.out)]
        assert any(re.match(rule, breach) for breach in breaches), breaches
        if old is None:
            store.client.delete_object(Bucket=BUCKET, Key=f"{prefix}/{name}")
        else:
            store.put(f"{prefix}/{name}", old)
    with monkeypatch.context() as elsewhere:  # an earlier call's workers knew no credentials
        elsewhere.setenv("HOME", str(tmp_path))
        assert verify(local_build[0].out, workers=2) == []
    assert verify(cfg.out, workers=2) == []
    store.client.delete_object(Bucket=BUCKET, Key=f"{prefix}/shards/000000/renders-paper.json")
    with pytest.raises(RunError, match="breaches"):
        verify_module.main([str(cfg.out)])
    assert "renders/paper/000000.tar: has no commit marker" in caplog.text
