"""The lines in which a build says what it is doing: start, progress, resuming, report."""

import logging
from pathlib import Path

import pytest

from pipeline.build import build, main
from pipeline.config import BuildConfig
from pipeline.core.text import counted
from pipeline.mesh_io import formats
from pipeline.mesh_io.formats import MeshFormat
from pipeline.orchestration import passes, progress
from pipeline.orchestration.passes import run_passes
from pipeline.orchestration.progress import Progress
from pipeline.orchestration.runner import STARTING
from pipeline.sources.annotations import Annotations
from pipeline.sources.folder import FolderSource
from pipeline.sources.objaverse_xl import ObjaverseXLSource
from tests.pipeline.catalogues import write_objaverse_xl


class Clock:
    """A clock that a test moves."""

    def __init__(self):
        self.now = 100.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


@pytest.fixture
def lines(caplog):
    """The log lines so far."""
    caplog.set_level(logging.INFO)
    return lambda: [record.getMessage() for record in caplog.records]


def show_after(seconds: float, clock: Clock, shown: Progress, *statuses: str) -> None:
    """Let time pass, count one asset of each status, and show the progress."""
    clock.now += seconds
    for status in statuses:
        shown.count(status)
    shown.show()


def test_a_number_has_its_noun():
    assert [counted(n, "shard") for n in (0, 1, 2)] == ["0 shards", "1 shard", "2 shards"]
    assert counted(12_000, "asset") == "12,000 assets"


def test_one_line_says_what_happens_before_the_first_asset_is_finished(clock, lines):
    shown = Progress(6, "assets", shards=1, starting=STARTING)
    for _ in range(12):
        clock.now += 2
        shown.show()
    assert lines() == [STARTING]
    assert "compiles the geometry code (once per machine)" in STARTING


def test_workers_that_are_quick_need_no_such_line(clock, lines):
    shown = Progress(6, "assets", shards=1, starting="starting")
    clock.now += 1
    shown.show()
    shown.count("done")
    clock.now += 5
    shown.show()
    assert lines() == []


def test_lines_show_counts_rate_remaining_time_and_shards(clock, lines):
    shown = Progress(8, "assets", shards=2, starting="starting")
    show_after(120, clock, shown, "rejected")  # compiling says nothing about the rate
    show_after(4, clock, shown, "done", "done")  # too early for another line
    clock.now += 6
    shown.count_shard()
    shown.show()
    assert lines() == [
        "1/8 assets (1 rejected), time left unknown, 0 of 2 shards committed",
        "3/8 assets (2 done, 1 rejected), 0.20/s, 25 s left, 1 of 2 shards committed",
    ]


def test_what_an_earlier_run_finished_counts_but_not_in_the_rate(clock, lines):
    shown = Progress(103, "assets", shards=1, starting="starting")
    for _ in range(100):
        shown.count("done", resumed=True)
    show_after(10, clock, shown)
    shown.count("done")
    show_after(10, clock, shown, "done")
    assert lines() == [
        "starting",
        "102/103 assets (102 done; 100 by an earlier run), 0.10/s, 10 s left, "
        "0 of 1 shards committed",
    ]


def test_the_end_says_what_is_committed_and_says_it_once(clock, lines):
    shown = Progress(2, "assets", shards=1, starting="")
    show_after(11, clock, shown, "done", "done")
    shown.count_shard()
    show_after(11, clock, shown)
    shown.close()
    assert lines() == [
        "2/2 assets (2 done), committing the shards, 0 of 1 shards committed",
        "2/2 assets (2 done), all finished, 1 of 1 shards committed",
    ]


@pytest.fixture
def folder(tmp_path):
    """A folder with one mesh file and two others."""
    for name in ("a.obj", "notes.txt", "b.csv"):
        (tmp_path / "meshes" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "meshes" / name).write_text("v 0 0 0\n", encoding="utf-8")
    return tmp_path / "meshes"


def test_a_build_says_what_it_makes_and_what_its_source_left_out(
    folder, tmp_path, monkeypatch, lines
):
    monkeypatch.setattr(passes, "run", lambda *_: {"done": 1, "rejected": 0, "failed": 0})
    cfg = BuildConfig(source=(f"folder:{folder}",), out=tmp_path / "out")
    run_passes(cfg, [FolderSource(root=folder)])
    assert lines() == [
        "The source folder has 1 asset to read: 1 obj.",
        "The source folder leaves out 2 files of other kinds: 1 csv, 1 txt.",
        f"{cfg.out}: 1 asset in 1 shard. The products are sdf-64 sdf-128 renders-paper.",
    ]


def test_a_source_says_which_formats_it_reads_and_skips_and_why(tmp_path, monkeypatch, lines):
    monkeypatch.setattr(passes, "run", lambda *_: {"done": 1, "rejected": 0, "failed": 0})
    needs_extra = MeshFormat(module="x", function="y", extra="xyz", requires=("no_such_module",))
    monkeypatch.setitem(formats.FORMATS, "xyz", needs_extra)
    kinds = ("glb", "stl", "stl", "max", "", "xyz")
    rows = [(f"http://x/{k}", "by", kind, None) for k, kind in enumerate(kinds)]
    annotations = Annotations(root=write_objaverse_xl(tmp_path / "xl", {"smithsonian": rows}))
    source = ObjaverseXLSource(annotations=annotations, places=("smithsonian",))
    run_passes(BuildConfig(source=("objaverse-xl",), out=tmp_path / "out"), [source])
    assert lines()[:-1] == [
        "The source objaverse-xl has 3 assets to read: 2 stl, 1 glb.",
        "It skips 1 asset: 1 xyz, because the extra xyz is not installed: "
        "pip install 'sparse3d[xyz]'.",
        "It skips 2 assets: 1 without extension, 1 max, because there is no reader for the format.",
    ]


def test_the_last_lines_say_that_the_report_is_written_and_where_everything_is(
    tmp_path, monkeypatch, lines
):
    order = []

    def run_passes(*_):
        order.append(len(lines()))
        return {"done": 2, "rejected": 1, "failed": 0}

    def write_report(out):
        order.append(lines()[-1])
        return out / "report" / "index.html"

    monkeypatch.setattr("pipeline.orchestration.passes.run_passes", run_passes)
    monkeypatch.setattr("pipeline.inspection.build_report.write_report", write_report)
    monkeypatch.setattr("pipeline.inspection.asset_list.write_attribution", lambda _: None)
    build(BuildConfig(out=tmp_path), sources=[])
    assert order == [0, "Writing the report."]
    assert lines()[1] == "2 assets are done, 1 rejected and 0 failed after 0 s."
    assert [line.split()[-1] for line in lines()[2:]] == [
        str(tmp_path / name) for name in ("sdf", "renders", "manifest", "report/index.html")
    ]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ([], None),
        (["--source", "folder:x", "--preset", "smoke"], None),
        (["--source=folder:x", "--preset=full"], None),
        (["--source", "folder:x"], "SDFs at 64 and 128, 12 views of 256 x 256 pixels"),
        (
            ["--source=folder:x", "--resolutions", "96", "--views", "1"],
            "SDFs at 96, 1 view of 256 x 256 pixels",
        ),
    ],
)
def test_a_build_of_own_assets_without_a_preset_says_what_it_makes(args, said, monkeypatch, lines):
    monkeypatch.setattr("pipeline.build.build", lambda _: None)
    main([*args, "--out", str(Path("nowhere"))])
    assert lines() == (
        []
        if said is None
        else [
            f"No --preset is given, so the preset smoke applies: {said}. --preset "
            "full makes SDFs at 256, 384, 512 and 1024, 45 views of 1024 x 1024 pixels."
        ]
    )
