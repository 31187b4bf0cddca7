"""The configuration of a build: which options decide the hash of a product."""

import json
from dataclasses import replace

import pytest

from pipeline.config import PRESETS, BuildConfig
from pipeline.core.errors import UserError
from pipeline.core.product import Product
from pipeline.curation.config import RankConfig
from pipeline.orchestration.plan import make_plan, with_values_of_plan
from pipeline.sources.procedural import ProceduralSource

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


def test_products_of_views_are_named_by_cameras_and_light(tmp_path):
    def names(**options):
        return [str(product) for product in BuildConfig(**options).products]

    assert names(resolutions=(64,)) == ["sdf-64", "renders-paper"]
    assert names(resolutions=(64,), light="ibl", view_products=("depth", "depth", "mask")) == [
        *("sdf-64", "depth-paper", "mask-paper", "renders-paper-ibl")
    ]
    camera = {"azimuth_degrees": 0, "elevation_degrees": 0, "projection": "orthographic"}
    file = tmp_path / "front.json"
    file.write_text(json.dumps({"cameras": [camera]}), encoding="utf-8")
    assert names(resolutions=(64,), cameras_file=file, cameras="wide") == [
        "sdf-64",
        "renders-front",
    ]
    assert BuildConfig(cameras_file=file).render.views == 1
    with pytest.raises(ValueError, match="cameras_file must not be named like a set"):
        BuildConfig(cameras_file=file.with_name("paper.json"))
    with pytest.raises(UserError, match=r"has no \.exr or \.hdr file"):
        BuildConfig(light="ibl", environment=tmp_path)


def test_light_changes_only_the_renders_hash():
    lamps, lit = BuildConfig(light="lamps"), BuildConfig(light="ibl")
    depth, renders = Product("depth", "paper"), Product.renders("paper")
    assert lamps.product_hash(depth) == lit.product_hash(depth)
    assert lamps.product_hash(renders) != lit.product_hash(renders)
    assert "light" not in lamps.of_product(renders)  # older renders keep their hash


def test_an_existing_build_keeps_its_light(tmp_path):
    options = {"source": ("procedural:1",), "resolutions": (64,), "out": tmp_path / "build"}
    full = BuildConfig(preset="full", **options)
    assert full.planned_light == "ibl"
    make_plan(full, [ProceduralSource(count=1)])
    assert with_values_of_plan(BuildConfig(**options)).planned_light == "ibl"
    # plans of older versions do not state it
    path = tmp_path / "build" / "plan.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    del content["light"]
    path.write_text(json.dumps(content), encoding="utf-8")
    assert with_values_of_plan(full).planned_light == "lamps"
    assert with_values_of_plan(replace(full, light="ibl")).planned_light == "ibl"
