"""The configuration of a build: which options decide the hash of a product."""

from dataclasses import replace

import pytest

from pipeline.config import PRESETS, BuildConfig
from pipeline.core.product import Product
from pipeline.curation.config import RankConfig

SDF_64 = Product.sdf(64)
RENDERS = Product.renders("paper")


def test_the_hash_of_a_product_depends_on_what_decides_its_bytes():
    base = BuildConfig()
    sdf = base.product_hash(SDF_64)
    renders = base.product_hash(RENDERS)
    other_outputs = BuildConfig(
        resolutions=(64, 512), topology_resolution=128, workers=3, out=base.out / "x"
    )
    assert other_outputs.product_hash(SDF_64) == sdf
    assert BuildConfig(views=3).product_hash(SDF_64) == sdf
    assert BuildConfig(views=3).product_hash(RENDERS) != renders
    assert BuildConfig(topology_resolution=256).product_hash(SDF_64) != sdf
    assert base.product_hash(Product.sdf(128)) != sdf


@pytest.mark.parametrize(
    ("options", "resolution"),
    [
        ({}, 128),
        ({"resolutions": (256, 512)}, 512),
        ({"resolutions": (256,)}, 256),
        ({"resolutions": (32,)}, 64),
        ({"resolutions": (64, 1024)}, 512),
        ({"resolutions": (256, 512), "topology_resolution": 128}, 128),
        (
            {
                "resolutions": (64,),
                "rank": RankConfig(target_count=2, best_count=1, best_resolutions=(96,)),
            },
            96,
        ),
    ],
)
def test_inside_and_outside_are_decided_at_the_finest_resolution(options, resolution):
    cfg = BuildConfig(**options)
    assert cfg.topology.resolution == resolution
    assert cfg.shared()["topology_resolution"] == resolution
    given = replace(cfg, topology_resolution=resolution)
    assert given.product_hash(RENDERS) == cfg.product_hash(RENDERS)


@pytest.mark.parametrize(("preset", "resolution"), [("smoke", 128), ("full", 512), ("paper", 512)])
def test_presets_decide_inside_and_outside_as_before(preset, resolution):
    assert PRESETS[preset].shared()["topology_resolution"] == resolution


def test_a_ranked_build_of_metrics_version_1_keeps_its_hash():
    """The hash is that of the last code with the options of deduplication by area and looks."""
    cfg = BuildConfig(rank=RankConfig(target_count=4))
    old = replace(
        cfg,
        screen=replace(cfg.screen, metrics_version=1),
        planned_dedup={
            "area_percent": 0.5,
            "tokens_percent": 1.0,
            "occupancy_percent": 2.0,
            "look_bits": 7,
        },
        reader_version=2,
    )
    assert old.product_hash(SDF_64) == "b4ef100ee84b960f"
    assert cfg.product_hash(SDF_64) != old.product_hash(Product.sdf(64))
