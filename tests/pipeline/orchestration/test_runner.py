"""Runs on Ray with assets that crash. The tests share one local Ray, because it starts slowly."""

from dataclasses import replace
from pathlib import Path

import pytest
import ray

from pipeline import build as build_command
from pipeline.core.errors import RunError, UserError
from pipeline.curation.config import FilterConfig
from pipeline.inspection.verification import verify
from pipeline.orchestration.asset_results import AssetJob, save_result
from pipeline.orchestration.commit import CommitJob, commit_locally
from pipeline.orchestration.isolated_process import ProcessExit
from pipeline.orchestration.plan import make_plan, with_values_of_plan
from pipeline.orchestration.runner import missing_products
from pipeline.sources.folder import FolderSource
from pipeline.sources.procedural import ProceduralSource
from pipeline.storage.layout import (
    MANIFEST,
    list_commits,
    marker_path,
    product_paths,
    scratch_folder,
)
from pipeline.storage.sdf_shard import SdfShard
from tests.pipeline.builds import assert_same, build, config, contents, rows_of
from tests.pipeline.crashing_source import CrashingSource, box
from tests.pipeline.mesh_files import OBJ

pytestmark = pytest.mark.usefixtures("shared_ray")


@pytest.fixture(scope="module")
def hostile_build(tmp_path_factory):
    """Build 24 assets in one shard, seven of which fail in different ways."""
    folder = tmp_path_factory.mktemp("hostile")
    behaviours = {
        3: "segfault",
        8: "hang",
        9: "memory",
        14: "leak",
        15: "raise",
        20: "vanish",
        23: "lose_worker",
    }
    notes = folder / "notes"
    notes.mkdir()
    source = CrashingSource(count=24, behaviours=tuple(behaviours.items()), notes=notes)
    cfg = config(folder / "out", limits={"asset_timeout_s": 10.0})
    return cfg, build(cfg, [source]), notes


def test_hostile_assets_end_with_their_reason_and_all_others_are_done(hostile_build):
    cfg, total, _ = hostile_build
    ended = {n: (row.status, row.stage, row.reason) for n, row in enumerate(rows_of(cfg.out))}
    assert {n: end for n, end in ended.items() if end != ("done", "", "")} == {
        3: ("failed", "fetch", "crashed_signal_11"),
        8: ("failed", "fetch", "timeout"),
        9: ("failed", "fetch", "out_of_memory"),
        14: ("failed", "fetch", "out_of_memory"),
        15: ("failed", "fetch", "error_runtimeerror"),
        20: ("rejected", "fetch", "file_not_readable"),
    }
    assert total == {"done": 18, "rejected": 1, "failed": 5}
    assert verify(cfg.out) == []


def test_only_the_lost_worker_was_tried_again(hostile_build):
    _, _, notes = hostile_build
    visits = [path.name.partition(".")[0] for path in notes.iterdir()]
    assert {n for n in visits if visits.count(n) > 1} == {"23"}
    assert visits.count("23") == 2


def test_a_failure_says_what_happened_without_saying_where(hostile_build):
    cfg, _, _ = hostile_build
    numbers = rows_of(cfg.out)[15].numbers
    assert numbers == {"error": "RuntimeError: a bug, seen in scratch/input"}


def test_nothing_is_left_in_scratch_and_a_second_run_does_nothing(hostile_build, caplog):
    cfg, total, notes = hostile_build
    assert not (cfg.out / ".scratch").exists()
    visits = len(list(notes.iterdir()))
    with caplog.at_level("INFO"):
        assert build(cfg, [CrashingSource(count=24, notes=notes)]) == total
    assert len(list(notes.iterdir())) == visits
    assert "Every product of all shards is committed already" in caplog.text


def test_a_worker_lost_every_time_fails_its_asset_after_bounded_retries(tmp_path):
    # Without notes the source does not know that it was here before.
    source = CrashingSource(count=2, behaviours=((1, "lose_worker"),))
    assert build(config(tmp_path / "out", limits={"retries": 1}), [source]) == {
        "done": 1,
        "rejected": 0,
        "failed": 1,
    }
    assert [row.reason for row in rows_of(tmp_path / "out")] == ["", "worker_lost"]


def test_a_full_disk_stops_the_run_in_one_line_and_the_same_command_resumes(tmp_path):
    cfg = config(tmp_path / "out", shard_size=1)
    with pytest.raises(RunError, match=r"disk of .* is full .* run the same command to resume"):
        build(cfg, [CrashingSource(count=3, behaviours=((2, "disk"),))])
    plan = make_plan(cfg, [])
    assert missing_products(plan, cfg, list_commits(cfg.out))["000002"] == cfg.products
    assert build(cfg, [CrashingSource(count=3)])["done"] == 3
    assert verify(cfg.out) == []


def test_a_nearly_full_disk_stops_the_run_before_it_is_full(tmp_path):
    with pytest.raises(RunError, match="is full"):
        build(config(tmp_path / "out", limits={"min_free_gb": 1e9}), [CrashingSource(count=1)])


def test_too_many_failures_stop_the_run_and_are_tried_again_once_the_cause_is_gone(tmp_path):
    cfg = config(tmp_path / "out", limits={"max_failed_share": 0.5})
    for behaviour in ("raise", "vanish"):
        source = CrashingSource(count=12, behaviours=tuple((n, behaviour) for n in range(12)))
        if behaviour == "raise":
            with pytest.raises(
                RunError, match=r"10 of 1\d assets failed, the last in fetch: error_runtimeerror"
            ):
                build(cfg, [source])
        else:
            assert build(cfg, [source]) == {"done": 0, "rejected": 12, "failed": 0}


def test_finished_assets_are_not_visited_again(tmp_path):
    cfg = config(tmp_path / "out", shard_size=3)
    notes = tmp_path / "notes"
    notes.mkdir()
    with pytest.raises(RunError):
        build(cfg, [CrashingSource(count=3, behaviours=((2, "disk"),), notes=notes)])
    landed = {path.parent.name for path in (cfg.out / ".scratch" / "000000").glob("*/result.json")}
    build(cfg, [CrashingSource(count=3, notes=notes)])
    again = [path.name for path in notes.iterdir() if path.name.endswith(".1")]
    assert len(again) == 3 - len([uid for uid in landed if "." not in uid])


def test_resuming_with_fewer_resolutions_gives_the_bytes_of_never_having_asked_for_more(tmp_path):
    more, fewer = config(tmp_path / "out", resolutions=(64, 96)), config(tmp_path / "out")
    with pytest.raises(RunError):
        build(more, [CrashingSource(count=3, behaviours=((2, "disk"),))])
    assert list(more.out.glob(".scratch/000000/*/result.json"))
    clean = config(tmp_path / "clean")
    assert build(fewer, [CrashingSource(count=3)]) == build(clean, [CrashingSource(count=3)])
    assert_same(contents(fewer.out), contents(clean.out))


def test_an_asset_that_one_product_turns_away_keeps_the_others(tmp_path):
    cfg = config(tmp_path / "out", image_size=1)  # at one pixel every view touches the border
    assert build(cfg, [CrashingSource(count=2)]) == {"done": 0, "rejected": 2, "failed": 0}
    for row in rows_of(cfg.out):
        assert (row.stage, row.tokens[64] > 0) == ("renders-paper", True)
    assert verify(cfg.out) == []


def test_a_commit_that_was_cut_short_is_made_again(tmp_path, caplog):
    cfg, source = config(tmp_path / "out"), CrashingSource(count=3, behaviours=((1, "vanish"),))
    build(cfg, [source])
    before = contents(cfg.out)
    (
        cfg.out / "shards" / "000000" / "renders-paper.json"
    ).unlink()  # the product lies there, its marker does not
    assert any("no commit marker" in breach.rule for breach in verify(cfg.out))
    with caplog.at_level("INFO"):
        build(cfg, [source])
    line = "Resuming: 0 of 1 shards have every product. Missing: renders-paper of 1 shard."
    assert line in caplog.messages
    assert_same(contents(cfg.out), before)
    assert verify(cfg.out) == []


def test_a_product_that_is_made_again_is_never_without_what_its_marker_vouches_for(
    tmp_path, monkeypatch
):
    cfg, source = config(tmp_path / "out"), CrashingSource(count=1)
    plan = make_plan(cfg, [source])
    (record,) = plan.records("000000")
    job = CommitJob(config=cfg, shard="000000", records=(record,), products=cfg.products, wanted=1)
    paths = {
        marker_path(cfg.out, job.shard, product): product_paths(product, job.shard)
        for product in job.products
    }
    looked = []

    def look(path):
        looked.append(path)
        assert all(
            (cfg.out / part).exists()
            for marker in paths
            if marker.exists()
            for part in paths[marker]
        )

    for _ in range(
        2
    ):  # the second time as after a crash that left these markers and none of the manifest
        folder = scratch_folder(cfg.out, job.shard, record.uid).with_name("visit")
        folder.mkdir(parents=True)
        visit = AssetJob(
            record=record, source=None, config=cfg, products=job.products, folder=folder
        )
        save_result(
            visit, ProcessExit(reason="timeout", detail="", seconds=0.0, peak_rss_bytes=0), 1
        )
        commit_locally(job)
        marker_path(cfg.out, job.shard, MANIFEST).unlink()
        for module in ("pipeline.orchestration.commit", "pipeline.core.files"):
            monkeypatch.setattr(f"{module}.sync", look)
    assert len(looked) == 6


def test_a_file_that_has_changed_since_its_first_products_gets_no_others(tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("kept", "changed"):
        (tmp_path / f"in/{name}.obj").write_text(box(1), encoding="utf-8")
    source, out = FolderSource(root=tmp_path / "in"), tmp_path / "out"
    assert build(config(out), [source]) == {"done": 2, "rejected": 0, "failed": 0}
    before = {row.url: row for row in rows_of(out)}
    (tmp_path / "in/changed.obj").write_text(box(2), encoding="utf-8")
    assert build(config(out, resolutions=(64, 96)), [source]) == {
        "done": 1,
        "rejected": 1,
        "failed": 0,
    }
    after = {row.url: row for row in rows_of(out)}
    row = before["changed.obj"]
    assert after["changed.obj"] == replace(
        row,
        status="rejected",
        stage="fetch",
        reason="wrong_sha256",
        tokens={**row.tokens, 96: None},
        numbers=row.numbers | {"expected": row.sha256},
    )
    assert SdfShard(out / "sdf/96/000000.zarr").uids == [after["kept.obj"].uid]
    assert verify(out) == []


def test_a_relative_output_is_the_drivers_wherever_the_workers_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # Ray and its workers were started elsewhere
    total = build_command.build(config(Path("out")), [CrashingSource(count=1)])
    assert total == {"done": 1, "rejected": 0, "failed": 0}
    assert verify(tmp_path / "out") == []


@pytest.mark.parametrize(("workers", "tasks"), [(1, 1), (2, 4)])
def test_no_more_is_in_flight_than_may_be_worked_on_where_ray_has_more_cores(
    workers, tasks, tmp_path, monkeypatch
):
    """The Ray of these tests has two cores."""
    flying, wait = [], ray.wait

    def note(refs, **options):
        flying.append(len(refs))
        return wait(refs, **options)

    monkeypatch.setattr("pipeline.orchestration.ray_executor.ray.wait", note)
    cfg = replace(config(tmp_path / "out"), workers=workers)
    assert build(cfg, [CrashingSource(count=6)])["done"] == 6
    assert max(flying) == tasks


def test_an_output_directory_of_another_configuration_is_refused(hostile_build):
    cfg, _, _ = hostile_build
    other = config(cfg.out, topology_resolution=128, val_percent=3)
    with pytest.raises(
        UserError,
        match=r"with --topology-resolution 64, now 128; --val-percent 12, now 3; choose another",
    ):
        make_plan(other, [])


def test_other_options_of_a_product_that_is_there_are_refused(hostile_build):
    cfg, _, _ = hostile_build
    with pytest.raises(UserError, match=r"renders-paper .*--views 1, now 2"):
        build(config(cfg.out, views=2), [CrashingSource(count=24)])


def test_what_may_pass_is_tried_again_after_a_while_and_is_a_failure_if_it_does_not(tmp_path):
    """Asset 1 fails once and asset 2 always. There is one retry."""
    notes = tmp_path / "notes"
    notes.mkdir()
    source = CrashingSource(count=4, behaviours=((1, "trouble_once"), (2, "trouble")), notes=notes)
    cfg = config(tmp_path / "out", limits={"retries": 1, "retry_wait_s": 0.2}, shard_size=2)
    assert build(cfg, [source]) == {"done": 3, "rejected": 0, "failed": 1}
    assert sorted(path.name for path in notes.iterdir()) == [
        "0.0",
        "1.0",
        "1.1",
        "2.0",
        "2.1",
        "3.0",
    ]
    assert [(row.status, row.stage, row.reason) for row in rows_of(cfg.out)][2] == (
        "failed",
        "fetch",
        "http_503",
    )
    assert rows_of(cfg.out)[2].numbers == {"host": "example.org"}
    assert verify(cfg.out) == []


def test_a_build_of_an_older_reader_gets_no_new_products(tmp_path, monkeypatch):
    """What is committed stays usable: it is verified, and a run with nothing to make ends well."""
    source = ProceduralSource(count=1)
    old = config(tmp_path, reader_version=1)
    with monkeypatch.context() as patch:  # the time when reader 1 was the newest
        patch.setattr("pipeline.orchestration.runner.READER_VERSION", 1)
        build(old, [source])
    same = with_values_of_plan(config(tmp_path))
    assert build(same, [source])["done"] == 1
    assert verify(tmp_path) == []
    more = with_values_of_plan(config(tmp_path, resolutions=(64, 96)))
    with pytest.raises(UserError, match=r"was made by reader 1 .*; build into a new directory"):
        build(more, [source])


def test_a_warning_can_reject_an_asset(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.obj").write_text("mtllib gone.mtl\n" + OBJ, encoding="utf-8")
    (folder / "b.obj").write_text(OBJ, encoding="utf-8")
    sources = [FolderSource(root=folder)]
    kept = config(tmp_path / "kept", resolutions=(64,))
    assert build(kept, sources)["done"] == 2
    rows = {row.url: row for row in rows_of(kept.out)}
    assert "side_file_missing" in rows["a.obj"].warnings
    assert "side_file_missing: gone.mtl" in rows["a.obj"].numbers["load_warnings"]
    assert (rows["b.obj"].warnings, rows["b.obj"].up_axis) == ((), "y")
    assert rows["b.obj"].up_origin == "convention"
    filters = FilterConfig(reject_warnings=("side_file_missing",))
    rejecting = config(tmp_path / "rejecting", resolutions=(64,), filter=filters)
    build(rejecting, sources)
    rows = {row.url: row for row in rows_of(rejecting.out)}
    assert (rows["a.obj"].stage, rows["a.obj"].reason) == ("load", "load_warning")
    assert rows["a.obj"].numbers["code"] == "side_file_missing"
    assert rows["b.obj"].status == "done"
