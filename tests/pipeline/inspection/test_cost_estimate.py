"""The cost estimate: what it measures on a build, and its arithmetic."""

import json
import logging
import math
import shutil
from dataclasses import replace

import pyarrow.parquet as pq
import pytest

from pipeline.core.errors import UserError
from pipeline.estimate import main
from pipeline.inspection.config import EstimateConfig
from pipeline.inspection.cost_estimate import Cost, estimate_cost, measure_passes
from pipeline.orchestration.asset_results import AssetResult
from pipeline.orchestration.visit_stats import COMMIT_SECONDS, append_stats

SECONDS = {"seconds": 36.0, "error": 3.6, "gpu_seconds": 0.0}
BYTES = {"fetched_bytes": 1e7, "stored_bytes": 1e6, "memory_bytes": 5e8}
COST = Cost(assets=100, files=10.0, shard_size=64, **SECONDS, **BYTES)


def config(tmp_path, **options):
    return EstimateConfig(directory=tmp_path, **options)


def test_one_pass_costs_its_mean_times_its_visits(tmp_path):
    estimate = estimate_cost(
        {"build": COST}, config(tmp_path, assets=6400, busy=1.0, start_s=0.0, deadline_h=1.0)
    )
    assert estimate.core_hours == pytest.approx(64.0)
    assert estimate.core_hours_error == pytest.approx(6.4)
    assert (estimate.nodes, estimate.cores, estimate.wall_hours) == (1, 64, pytest.approx(1.0))
    assert estimate.fetched_tb == pytest.approx(0.064)
    assert estimate.stored_tb == pytest.approx(0.0064)
    assert estimate.files == 1000
    assert estimate.gigabits_per_s == pytest.approx(0.064 * 8e3 / 3600)
    assert estimate.compute_usd == pytest.approx(64 * 0.04)
    assert estimate.node_memory_gb == pytest.approx(32.0)


def test_a_ranked_build_screens_all_assets_and_builds_the_kept_ones(tmp_path):
    passes = {
        "screen": COST,
        "build": replace(COST, seconds=360.0),
        "best": replace(COST, seconds=3600.0),
    }
    estimate = estimate_cost(passes, config(tmp_path, assets=1000, keep=100, best=10))
    assert estimate.core_hours == pytest.approx(10 + 10 + 10)
    assert estimate.core_hours_error == pytest.approx(
        (1000**2 + 100**2 + 10**2) ** 0.5 * 3.6 / 3600
    )
    assert estimate.stored_tb == pytest.approx(1110 * 1e6 / 1e12)


@pytest.mark.parametrize("deadline_h", [1.0, 24.0, 168.0])
def test_the_cluster_meets_the_deadline_and_one_node_less_does_not(tmp_path, deadline_h):
    cfg = config(tmp_path, assets=1_000_000, deadline_h=deadline_h)
    estimate = estimate_cost({"build": COST}, cfg)
    assert estimate.wall_hours <= deadline_h
    fewer = estimate.cores - cfg.cores_per_node
    assert fewer == 0 or estimate.core_hours / cfg.busy / fewer + cfg.start_s / 3600 > deadline_h


def test_an_impossible_deadline_is_refused(tmp_path):
    with pytest.raises(UserError, match="shorter than the workers' start"):
        estimate_cost({"build": COST}, config(tmp_path, deadline_h=0.01))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("assets", 0),
        ("busy", 1.5),
        ("deadline_h", -1),
        ("deadline_h", math.nan),
        ("deadline_h", math.inf),
    ],
)
def test_options_out_of_range_are_refused(tmp_path, option, value):
    with pytest.raises(ValueError, match=option):
        config(tmp_path, **{option: value})


def test_costs_are_measured_from_stats_and_markers(tiny_build):
    (cost,) = measure_passes(tiny_build).values()
    stats = [
        row
        for path in sorted((tiny_build / "stats").iterdir())
        for row in pq.read_table(path).to_pylist()
    ]
    pack = sum(
        float(pq.read_schema(path).metadata[COMMIT_SECONDS.encode()])
        for path in (tiny_build / "stats").iterdir()
    )
    assert pack > 0
    assert cost.assets == 12
    assert cost.seconds == pytest.approx((sum(row["seconds"] for row in stats) + pack) / 12)
    products = ("sdf", "renders")
    stored = sum(
        p.stat().st_size for name in products for p in (tiny_build / name).rglob("*") if p.is_file()
    )
    assert cost.stored_bytes == pytest.approx(stored / 12)
    names = (*products, "manifest", "stats", "shards")
    files = sum(p.is_file() for name in names for p in (tiny_build / name).rglob("*"))
    assert cost.files == pytest.approx(files / 4)
    assert cost.gpu_seconds == 0


def test_files_of_the_best_assets_are_counted_per_shard_that_has_them(tiny_build, tmp_path):
    """Two of four shards have a finer resolution, made by a pass that writes no new manifest."""
    out = shutil.copytree(tiny_build, tmp_path / "copy")
    for shard in ("000002", "000003"):
        (out / "shards" / shard / "sdf-96.json").unlink()
        shutil.rmtree(out / "sdf" / "96" / f"{shard}.zarr")
    info = json.loads((out / "plan.json").read_text(encoding="utf-8"))
    info["config"]["rank"] = {"best_resolutions": [96], "best_count": 6}
    (out / "plan.json").write_text(json.dumps(info), encoding="utf-8")
    passes = measure_passes(out)
    below = {
        name: sum(path.is_file() for path in out.rglob("*") if name in path.as_posix())
        for name in (
            "copy/sdf/96",
            "sdf-96.json",
            "copy/sdf/",
            "copy/renders",
            "copy/manifest",
            "stats",
            "copy/shards",
        )
    }
    best = below["copy/sdf/96"] + below["sdf-96.json"]
    assert passes["best"].files == best / 2
    everything = sum(below.values()) - best  # `below` counts these files twice
    assert passes["build"].files == (everything - best) / 4


def test_the_command_logs_a_table_and_writes_the_numbers(tiny_build, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    main([str(tiny_build), "--assets", "12", "--json", str(tmp_path / "e.json")])
    numbers = json.loads((tmp_path / "e.json").read_text(encoding="utf-8"))
    assert numbers["estimate"]["core_hours"] == pytest.approx(
        numbers["passes"]["build"]["seconds"] * 12 / 3600
    )
    assert "core-hours" in caplog.text
    with pytest.raises(UserError, match="no directory"):
        main(["/no/such"])
    with pytest.raises(UserError, match="no directory /no/such to write --json to"):
        main([str(tiny_build), "--json", "/no/such/e.json"])
    assert caplog.text.count("core-hours") == 1


def test_packing_seconds_add_up_over_the_passes_of_a_shard(tmp_path):
    path = tmp_path / "a.parquet"
    for seconds in (1.5, 2.0):
        append_stats(path, [AssetResult(uid="a", status="done", stage="", reason="")], seconds)
    assert pq.read_schema(path).metadata[COMMIT_SECONDS.encode()] == b"3.5"
    assert pq.read_table(path).num_rows == 2
