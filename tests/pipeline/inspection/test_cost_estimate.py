"""The estimate: what it reads from builds, and the arithmetic on it."""

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
from pipeline.orchestration.manifest import PACK_SECONDS, Result, append_stats

COST = Cost(
    **{
        "assets": 100,
        "seconds": 36.0,
        "error": 3.6,
        "gpu_seconds": 0.0,
        "fetched_bytes": 1e7,
        "stored_bytes": 1e6,
    },
    **{"files": 10.0, "shard_size": 64, "memory_bytes": 5e8},
)


def config(tmp_path, **options):
    return EstimateConfig(directory=tmp_path, **options)


def test_one_pass_is_visits_times_mean(tmp_path):
    found = estimate_cost(
        {"build": COST}, config(tmp_path, assets=6400, busy=1.0, start_s=0.0, deadline_h=1.0)
    )
    assert found.core_hours == pytest.approx(64.0)
    assert found.core_hours_error == pytest.approx(6.4)
    assert (found.nodes, found.cores, found.wall_hours) == (1, 64, pytest.approx(1.0))
    assert (found.fetched_tb, found.stored_tb) == (pytest.approx(0.064), pytest.approx(0.0064))
    assert found.files == 1000
    assert found.gigabits_per_s == pytest.approx(0.064 * 8e3 / 3600)
    assert found.compute_usd == pytest.approx(64 * 0.04)
    assert found.node_memory_gb == pytest.approx(32.0)


def test_a_ranked_build_looks_at_all_and_builds_those_it_keeps(tmp_path):
    passes = {
        "screen": COST,
        "build": replace(COST, seconds=360.0),
        "best": replace(COST, seconds=3600.0),
    }
    found = estimate_cost(passes, config(tmp_path, assets=1000, keep=100, best=10))
    assert found.core_hours == pytest.approx(10 + 10 + 10)
    assert found.core_hours_error == pytest.approx((1000**2 + 100**2 + 10**2) ** 0.5 * 3.6 / 3600)
    assert found.stored_tb == pytest.approx(1110 * 1e6 / 1e12)


@pytest.mark.parametrize("deadline_h", [1.0, 24.0, 168.0])
def test_the_cluster_meets_the_deadline_and_a_node_less_does_not(tmp_path, deadline_h):
    cfg = config(tmp_path, assets=1_000_000, deadline_h=deadline_h)
    found = estimate_cost({"build": COST}, cfg)
    assert found.wall_hours <= deadline_h
    fewer = found.cores - cfg.cores_per_node
    assert fewer == 0 or found.core_hours / cfg.busy / fewer + cfg.start_s / 3600 > deadline_h


def test_a_deadline_that_nothing_meets(tmp_path):
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
def test_options_out_of_range(tmp_path, option, value):
    with pytest.raises(ValueError, match=option):
        config(tmp_path, **{option: value})


def test_what_a_build_took_is_read_from_its_stats_and_markers(tiny_build):
    (cost,) = measure_passes(tiny_build).values()
    stats = [
        row
        for path in sorted((tiny_build / "stats").iterdir())
        for row in pq.read_table(path).to_pylist()
    ]
    pack = sum(
        float(pq.read_schema(path).metadata[PACK_SECONDS.encode()])
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


def test_files_of_the_best_count_on_the_shards_that_have_them(tiny_build, tmp_path):
    """Finer distances of the first two shards out of four, made by a pass that adds no manifest."""
    out = shutil.copytree(tiny_build, tmp_path / "copy")
    for shard in ("000002", "000003"):
        (out / "shards" / shard / "sdf-96.json").unlink()
        shutil.rmtree(out / "sdf" / "96" / f"{shard}.zarr")
    info = json.loads((out / "plan.json").read_text())
    info["config"]["rank"] = {"best_resolutions": [96], "best_count": 6}
    (out / "plan.json").write_text(json.dumps(info))
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
    everything = sum(below.values()) - best  # it is in there twice
    assert passes["build"].files == (everything - best) / 4


def test_the_table_and_the_numbers(tiny_build, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    main([str(tiny_build), "--assets", "12", "--json", str(tmp_path / "e.json")])
    numbers = json.loads((tmp_path / "e.json").read_text())
    assert numbers["estimate"]["core_hours"] == pytest.approx(
        numbers["passes"]["build"]["seconds"] * 12 / 3600
    )
    assert "core-hours" in caplog.text
    with pytest.raises(UserError, match="no directory"):
        main(["/no/such"])
    with pytest.raises(UserError, match="no directory /no/such to write --json to"):
        main([str(tiny_build), "--json", "/no/such/e.json"])
    assert caplog.text.count("core-hours") == 1


def test_packing_adds_up_over_the_passes_of_a_shard(tmp_path):
    path = tmp_path / "a.parquet"
    for seconds in (1.5, 2.0):
        append_stats(path, [Result(uid="a", status="done", stage="", reason="")], seconds)
    assert pq.read_schema(path).metadata[PACK_SECONDS.encode()] == b"3.5"
    assert pq.read_table(path).num_rows == 2
