"""The benchmark of whole assets on two small meshes."""

import json
import shutil

import numpy as np
import pytest
import trimesh
from PIL import Image

from benchmarks import assets
from pipeline.core.errors import UserError
from pipeline.geometry.config import TopologyConfig
from pipeline.geometry.sdf import compute_bricks
from pipeline.geometry.topology import build_topology
from pipeline.mesh_io.load import load
from pipeline.mesh_io.normalize import normalize
from pipeline.orchestration.asset_stages import load_bricks

PRODUCTS = ("sdf-64", "renders-paper")


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("assets")
    meshes = folder / "meshes"
    meshes.mkdir()
    trimesh.creation.box((1, 2, 3)).export(meshes / "box.ply")
    trimesh.creation.icosphere(subdivisions=2).export(meshes / "ball.stl")
    (meshes / "empty.stl").write_bytes(bytes(84))
    cfg = assets.Measure(
        meshes=meshes,
        out=folder / "out",
        preset="smoke",
        products=PRODUCTS,
        views=2,
        image_size=64,
        processes=2,
        repeats=2,
    )
    return cfg, assets.measure(cfg)


def test_each_asset_is_timed_by_stage(measured):
    cfg, results = measured
    assert sorted(row["mesh"] for row in results["rows"]) == sorted(
        ["ball.stl", "box.ply", "empty.stl"] * 2
    )
    done = [row for row in results["rows"] if row["status"] == "done"]
    assert len(done) == 4
    for row in done:
        assert {"topology", *PRODUCTS} <= set(row["seconds"])
        assert (
            0
            < sum(row["seconds"].values())
            < row["wall_s"]
            <= row["ended_s"] + 0.1
            <= results["wall_s"] + 0.1
        )
        assert (row["device"], row["tokens"].keys()) == ("cpu", {"sdf-64"})
        assert row["renderer"]
    assert results["assets_per_hour"] == pytest.approx(3600 * 4 / results["wall_s"])
    assert (
        json.loads((cfg.out / "assets.json").read_text(encoding="utf-8"))["rows"] == results["rows"]
    )
    text = assets.table(results)
    assert text.count("| box.ply | 12 |") == 2
    assert text.count("| empty.stl | rejected: ") == 2
    assert f"4 visits by 2 processes in {results['wall_s']:.1f} s" in text


def test_the_products_are_those_of_a_build(measured):
    cfg, results = measured
    uid = next(row["uid"] for row in results["rows"] if row["mesh"] == "ball.stl")
    build = assets.build_config(cfg)
    mesh = normalize(load(cfg.meshes / "ball.stl", build.load), build.normalize)
    expected = compute_bricks(build_topology(mesh, TopologyConfig(resolution=128)), 64)
    found = load_bricks(cfg.out / "assets" / uid / "sdf-64", 64)
    np.testing.assert_array_equal(found.cells, expected.cells)
    np.testing.assert_array_equal(found.values, expected.values)
    views = (cfg.out / "assets" / uid / "renders-paper").glob("*.png")
    assert sorted(path.name for path in views) == [f"{uid}-00.png", f"{uid}-01.png"]


def test_compare_finds_changes(measured, tmp_path):
    cfg, results = measured
    uid = next(row["uid"] for row in results["rows"] if row["mesh"] == "box.ply")
    other = tmp_path / "other"
    shutil.copytree(cfg.out, other)
    same = assets.compare(assets.Compare(expected=cfg.out, found=other))
    assert (len(same["sdf"]), len(same["views"])) == (2, 4)
    assert not any(
        row["max_voxels"] or row["wrong_signs"] or row["other_cells"] for row in same["sdf"]
    )
    assert {(row["mean_difference"], row["silhouette_iou"]) for row in same["views"]} == {
        (0.0, 1.0)
    }
    values = np.memmap(other / "assets" / uid / "sdf-64" / "values.bin", np.float16, "r+")
    values[np.abs(values.astype(np.float32)).argmax()] *= -1
    values.flush()
    picture = other / "assets" / uid / "renders-paper" / f"{uid}-01.png"
    rgba = np.asarray(Image.open(picture)).copy()
    covered = np.argwhere(rgba[..., 3] > 127)
    rgba[tuple(covered[0])] = 0
    Image.fromarray(rgba).save(picture)
    out = tmp_path / "apart.json"
    changed = assets.compare(assets.Compare(expected=cfg.out, found=other, out=out))
    assert json.loads(out.read_text(encoding="utf-8")) == changed
    assert sorted(row["wrong_signs"] for row in changed["sdf"]) == [0, 1]
    (view,) = [row for row in changed["views"] if row["mean_difference"]]
    assert view["view"] == f"{uid}-01"
    assert view["silhouette_iou"] == (len(covered) - 1) / len(covered)
    assert (view["coverage"] - view["other_coverage"]) * 64 * 64 == pytest.approx(1)
    said = assets.summary(changed)
    assert "R = 64: 2 assets" in said
    assert "1 wrong_signs" in said
    assert "4 views: " in said


def test_images_are_compared_on_a_black_background():
    white, clear, grey = (
        np.full((2, 2, 4), 255, np.uint8),
        np.zeros((2, 2, 4), np.uint8),
        np.full((2, 2, 4), 255),
    )
    grey[..., :3] = 204
    clear[..., :3] = 90  # invisible colour
    assert assets.compare_images(white, grey.astype(np.uint8))[
        "mean_difference_covered"
    ] == pytest.approx(0.2)
    nothing = assets.compare_images(clear, np.zeros_like(clear))
    assert (nothing["mean_difference"], nothing["silhouette_iou"]) == (0.0, 1.0)
    gone = assets.compare_images(white, clear)
    assert (gone["mean_difference"], gone["silhouette_iou"], gone["pixels_apart"]) == (
        1.0,
        0.0,
        1.0,
    )


def test_errors_say_what_to_do(tmp_path, measured):
    cfg, _ = measured
    with pytest.raises(UserError, match=r"name a sub-command: .* \{measure,compare\}"):
        assets.main([])
    folders = f"--meshes {cfg.meshes} --out {tmp_path}"
    with pytest.raises(
        UserError, match=r"preset smoke makes sdf-64, sdf-128, renders-paper, not sdf-512"
    ):
        assets.main(f"measure {folders} --preset smoke --products sdf-512".split())
    with pytest.raises(UserError, match="processes must be 1 or more, got 0"):
        assets.main(f"measure {folders} --processes 0".split())
    with pytest.raises(UserError, match="no product of an asset in common"):
        assets.main(f"compare --expected {cfg.out} --found {tmp_path}".split())
