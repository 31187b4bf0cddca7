import errno
import json
import logging
import re
import signal
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pyarrow.parquet as pq
import pytest

from pipeline.build import build, configure, main
from pipeline.config import PRESETS, BuildConfig
from pipeline.core.cli import command
from pipeline.core.errors import RunError, UserError
from pipeline.core.hashing import make_uid
from pipeline.core.product import Product
from pipeline.core.schema import Record
from pipeline.curation.config import RankConfig
from pipeline.inspection.verification import verify
from pipeline.orchestration.manifest import read_manifest
from pipeline.orchestration.plan import make_plan, read_plan
from pipeline.storage.render_shard import RenderShard
from pipeline.storage.sdf_shard import SdfShard
from tests.pipeline.builds import (
    ROOT,
    TINY,
    assert_same,
    contents,
    environment,
    finish,
    start,
    survivors,
    wait_until,
)


def test_tree_of_a_finished_build(tiny_build):
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


def test_bricks_renders_and_manifest_tell_of_the_same_assets(tiny_build):
    planned = pq.read_table(tiny_build / "plan.parquet").to_pylist()
    assert [row["row"] for row in planned] == [0, 1, 2] * 4
    rows = [
        row for path in sorted((tiny_build / "manifest").iterdir()) for row in read_manifest(path)
    ]
    assert [row["uid"] for row in rows] == [row["uid"] for row in planned]
    assert {row["status"] for row in rows} == {"done"}
    for row in rows:
        assert row["scale"] > 0
        for resolution in (64, 96):
            shard = SdfShard(tiny_build / "sdf" / str(resolution) / f"{row['shard']}.zarr")
            assert shard.tokens(row["uid"]) == row[f"tokens_{resolution}"] > 0
        assert RenderShard(tiny_build / "renders" / "paper" / f"{row['shard']}.tar").views(
            row["uid"]
        ) == [0, 1]


def test_stopped_killed_and_grown_a_build_ends_with_the_same_bytes(tiny_build, tmp_path):
    """SIGKILL after the first commit; SIGTERM as soon as anything is new; then one more resolution, to the end."""
    out = tmp_path / "build"
    args = [*TINY, "--limit", "12", "--val-percent", "30", "--out", out, "--resolutions", "64"]
    for signum, code, news in [
        (signal.SIGKILL, -signal.SIGKILL, "shards/*/renders-paper.json"),
        (signal.SIGTERM, 128 + signal.SIGTERM, ".scratch/*/*/result.json"),
    ]:
        env, before = environment(tmp_path), set(out.glob(news))
        process = start("pipeline.build", *args, env=env)
        wait_until(
            lambda process=process, news=news, before=before: news_of(process, out, news) - before
        )
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


def news_of(process, out, pattern):
    assert process.poll() is None, process.communicate()[0]
    return set(out.glob(pattern))


def test_smoke_preset_is_the_default_and_each_option_overrides_it():
    smoke = configure([])
    assert smoke == PRESETS["smoke"]
    assert (smoke.limit, smoke.resolutions, smoke.views, smoke.image_size) == (
        48,
        (64, 128),
        12,
        256,
    )
    full = configure(["--preset", "full", "--views", "3", "--resolutions", "64"])
    assert (full.resolutions, full.views, full.image_size, full.topology_resolution) == (
        (64,),
        3,
        1024,
        512,
    )
    assert configure(["--preset=paper"]).resolutions == (256, 384, 512)
    assert configure(["--source", "folder:/meshes"]).limit is None
    assert configure(["--source", "folder:/meshes", "--limit", "5"]).limit == 5


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--resolution", "64"], "unknown option --resolution, did you mean --resolutions?"),
        (["--preset", "huge"], "smoke"),
        (["--resolutions", "65"], "multiple of 8, got 65"),
        (["--views", "0"], "views must be"),
        (["--views", "many"], "--views: invalid literal for int() with base 10: 'many'"),
        (["--shard-size", "0"], "shard_size must be 1 or more, got 0"),
        (
            ["--limits.asset-timeout-s", "inf"],
            "asset_timeout_s must be positive and below 1e9, got inf",
        ),
        (
            ["--limits.asset-memory-gb", "inf"],
            "asset_memory_gb must be positive and below 1e9, got inf",
        ),
        (["--source", "folder:/no/such/folder"], "/no/such/folder"),
        (["--source", "ftp:x"], "unknown source 'ftp:x'"),
        (["--out", "/proc/nothing"], "cannot write to /proc/nothing"),
        (["--out", "/etc"], "/etc exists and is not a build"),
    ],
)
def test_bad_usage_is_one_line_and_exit_code_2(args, words, monkeypatch, caplog):
    monkeypatch.setattr(sys, "argv", ["build", *args])
    with pytest.raises(SystemExit) as end:
        command(main)
    assert end.value.code == 2
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert words in record.getMessage()
    assert "\n" not in record.getMessage()


@pytest.mark.parametrize(
    "error", [ConnectionError("Could not find\nany"), ValueError("Invalid address format: here")]
)
def test_a_ray_that_is_not_there_is_named(error, monkeypatch, tmp_path):
    def init(**_):
        raise error

    monkeypatch.setenv("RAY_ADDRESS", "here")
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", init)
    with pytest.raises(
        UserError, match=r"^no Ray at RAY_ADDRESS=here: [CI].*; correct or unset it$"
    ):
        main([*TINY, "--limit", "1", "--out", str(tmp_path / "out")])


def test_bad_usage_leaves_the_process_with_a_line_and_no_traceback(tmp_path):
    output = finish(start("pipeline.build", "--bogus", env=environment(tmp_path)), code=2)
    assert len(output.splitlines()) == 1
    assert "unknown option --bogus" in output


def fail(_):
    raise RunError("the disk is full")


def interrupt(_):
    signal.raise_signal(signal.SIGINT)


def terminate(_):
    signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize(
    ("action", "code"), [(fail, 1), (interrupt, 130), (terminate, 143), (lambda _: None, 0)]
)
def test_exit_codes(action, code):
    handlers = [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)]
    try:
        with pytest.raises(SystemExit) as end:
            command(action)
    finally:
        for signum, handler in zip((signal.SIGINT, signal.SIGTERM), handlers):
            signal.signal(signum, handler)
    assert end.value.code == code


def write_below_a_file(_):
    Path(__file__, "page.html").write_text("")


def write_to_a_folder(_):
    Path(__file__).parent.write_text("")


def forbidden(_):
    raise PermissionError(errno.EROFS, "Read-only file system", "report/.index.html.partial")


@pytest.mark.parametrize("action", [write_below_a_file, write_to_a_folder, forbidden])
def test_a_place_that_cannot_be_written_to_is_one_line(action, caplog):
    with pytest.raises(SystemExit) as end:
        command(action)
    assert end.value.code == 1
    (record,) = caplog.records
    assert re.fullmatch(
        r"\S+: [A-Z][-a-z ]+; choose another place or allow writing there", record.getMessage()
    )


def missing(_):
    Path("/no/such/file").read_text()


def test_a_mistake_of_ours_keeps_its_traceback():
    with pytest.raises(FileNotFoundError):
        command(missing)


class Listing:
    """A source that only lists."""

    def __init__(self, keys, name="listing"):
        self.keys, self.name = keys, name

    def records(self):
        for key in self.keys:
            yield Record(
                uid=make_uid(self.name, key), source=self.name, url=key, licence="cc0", format="obj"
            )


def test_a_plan_is_read_back_whole_and_not_made_again(tmp_path):
    cfg = BuildConfig(out=tmp_path / "out", shard_size=2, limit=5)
    plan = make_plan(cfg, [Listing("abcdefg")])
    assert plan.shards == ["000000", "000001", "000002"]
    assert [record.url for name in plan.shards for record in plan.shard(name)] == list("abcde")
    again = make_plan(cfg, [Listing("xyz")])
    assert again.shard("000001") == plan.shard("000001") == list(Listing("cd").records())
    assert read_plan(cfg.out).info == plan.info


def test_an_asset_listed_twice_counts_once(tmp_path, caplog):
    plan = make_plan(BuildConfig(out=tmp_path), [Listing("ab"), Listing("bc")])
    assert [record.url for record in plan.shard("000000")] == list("abc")
    assert "comes twice" in caplog.text


def test_a_plan_needs_an_asset(tmp_path):
    with pytest.raises(UserError, match="no assets"):
        make_plan(BuildConfig(out=tmp_path / "out"), [Listing("")])
    assert not (tmp_path / "out").exists()


class Second:
    """A source in the midst of whose listing another build begins with the same options."""

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
def test_a_directory_is_one_builds_at_a_time(tmp_path, rank):
    cfg = BuildConfig(out=tmp_path / "out", rank=rank)
    for _ in range(2):  # the first one has left no lock
        with pytest.raises(UserError, match="no assets"):
            build(cfg, [Second(cfg)])
    assert not list(tmp_path.glob("out/*"))


def test_a_directory_that_cannot_be_locked_is_used_with_a_warning(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(
        "fcntl.flock", Mock(side_effect=OSError(errno.ENOLCK, "No locks available"))
    )
    with pytest.raises(UserError, match="no assets"):
        build(BuildConfig(out=tmp_path / "out"), [Listing("")])
    assert "cannot be locked (No locks available)" in caplog.text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format_version": 99}, "format_version 99, this code reads 1"),
        ({"config": {}}, "was built with"),
    ],
)
def test_a_plan_of_another_format_or_configuration_is_refused(tmp_path, change, words):
    cfg = BuildConfig(out=tmp_path)
    make_plan(cfg, [Listing("ab")])
    info = json.loads((tmp_path / "plan.json").read_text())
    (tmp_path / "plan.json").write_text(json.dumps({**info, **change}))
    with pytest.raises(UserError, match=words):
        make_plan(cfg, [Listing("ab")])


SDF_64 = Product.sdf(64)
RENDERS = Product.renders("paper")


def test_what_a_products_hash_depends_on():
    base = BuildConfig()
    sdf, renders = base.product_hash(SDF_64), base.product_hash(RENDERS)
    assert (
        BuildConfig(resolutions=(64, 512), workers=3, out=base.out / "x").product_hash(SDF_64)
        == sdf
    )
    assert BuildConfig(views=3).product_hash(SDF_64) == sdf
    assert BuildConfig(views=3).product_hash(RENDERS) != renders
    assert BuildConfig(topology_resolution=256).product_hash(SDF_64) != sdf
    assert base.product_hash(Product.sdf(128)) != sdf


class Many:
    """A catalogue that is longer than what is written at once, one of its records coming twice."""

    name = "many"

    def __init__(self, count):
        self.count = count

    def records(self):
        for number in [*range(self.count), 5]:
            yield Record(
                uid=make_uid(self.name, str(number)),
                source=self.name,
                url=str(number),
                metadata='{"n": 1}',
            )


def test_a_plan_is_written_piece_by_piece(tmp_path, monkeypatch):
    pieces = []
    write = pq.ParquetWriter.write_table
    monkeypatch.setattr("pipeline.orchestration.plan.ROWS", 100)
    monkeypatch.setattr(
        pq.ParquetWriter,
        "write_table",
        lambda self, table: pieces.append(len(table)) or write(self, table),
    )
    plan = make_plan(BuildConfig(out=tmp_path / "out", limit=None), [Many(250)])
    assert pieces == [100, 100, 50]
    assert plan.assets == 250
    assert [record.url for name in plan.shards for record in plan.shard(name)] == [
        str(number) for number in range(250)
    ]
    assert plan.shard("000003")[0].metadata == '{"n": 1}'
    assert not (tmp_path / "out/.plan.parquet.partial").exists()


def test_a_plan_from_before_there_were_catalogues_is_read(tmp_path):
    cfg = BuildConfig(out=tmp_path, limit=None)
    plan = make_plan(cfg, [Many(10)])
    pq.write_table(plan.table.drop_columns(["metadata"]), tmp_path / "plan.parquet")
    assert [record.metadata for record in read_plan(tmp_path).shard("000000")] == [""] * 10


@pytest.mark.slow
def test_the_plan_of_a_million_assets_takes_less_than_a_minute_and_2_gb(tmp_path):
    code = (
        "import resource, time; from pathlib import Path; from pipeline.config import BuildConfig; "
    )
    code += "from pipeline.orchestration.plan import make_plan; from tests.pipeline.test_build import Many; "
    code += f"make_plan(BuildConfig(out=Path({str(tmp_path / 'out')!r}), limit=None), [Many(1_000_000)]); "
    code += "print(time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    seconds, kilobytes = map(float, done.stdout.split())
    assert seconds < 60
    assert kilobytes < 2e6
