"""The held-out pictures of the package, how they are made, and what is measured of their meshes."""

import csv

import numpy as np
import pytest
from PIL import Image

from examples.recipes.props import held_out as recipe
from examples.recipes.props.held_out import HeldOutConfig, choose
from examples.recipes.props.make_list import read_rows
from model.inference.checkpoint_source import SHIPPED_WEIGHTS
from model.inference.generator import Generator
from model.inference.stages import STRUCTURE
from pipeline.core.cameras import camera_of_meta
from pipeline.core.errors import RunError, UserError
from pipeline.core.image_codec import decode
from pipeline.core.primitives.marching_cubes import extract
from pipeline.mesh_io.mesh_export import write_mesh
from pipeline.storage.sdf_shard import SdfShard
from tests.train.evaluation.stored_surfaces import VIEWS, FacingSurfaces, rendered_build
from train.data.bricks import read_asset_names
from train.data.symmetry import quarter_turn, turn_directions, turns_to_face
from train.demo import held_out
from train.demo.config import HELD_OUT_CHECKPOINT, HELD_OUT_FOLDER
from train.demo.held_out import (
    measure,
    read_mesh,
    read_pictures,
    read_results,
    rows_of_demo,
    weights_hash,
)
from train.engine.mesh_pictures import LABEL_HEIGHT

SHIPPED = SHIPPED_WEIGHTS / HELD_OUT_CHECKPOINT
needs_weights = pytest.mark.skipif(
    not any(SHIPPED.glob("*/config.json")), reason=f"the weights are not in {SHIPPED}"
)


def test_ten_packs_are_chosen_by_the_hashes_of_their_held_out_files():
    shapes = read_rows(recipe.SHAPES)
    chosen = choose(shapes)
    assert chosen == read_rows(recipe.LIST)
    assert len(chosen) == len({row["file"].partition("/")[0] for row in chosen}) == 10
    for row in chosen:
        pack = row["file"].partition("/")[0] + "/"
        others = [r for r in shapes if r["split"] == "val" and r["file"].startswith(pack)]
        assert row["sha256"] == min(other["sha256"] for other in others)


def test_the_pictures_show_held_out_cc0_assets_from_views_that_are_not_trained_on():
    pictures = read_pictures()
    assert [picture.file for picture in pictures] == [row["file"] for row in read_rows(recipe.LIST)]
    trained = {row["group"] for row in read_rows(recipe.SHAPES) if row["split"] == "train"}
    assert not trained & {row["group"] for row in read_rows(recipe.LIST)}
    licence = (HELD_OUT_FOLDER / "README.md").read_text(encoding="utf-8")
    for picture in pictures:
        rgba = decode((HELD_OUT_FOLDER / picture.image).read_bytes())
        assert rgba.shape == (256, 256, 4)
        assert 0 < (rgba[..., 3] > 127).mean() < 0.9
        assert picture.camera["view"] == 23  # of 24, of which the last four are held out
        assert picture.licence == "CC0-1.0"
        assert f"`{picture.repository.partition('/')[0]}/*`" in licence
    assert sum(path.stat().st_size for path in HELD_OUT_FOLDER.iterdir()) < 500_000


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    return rendered_build(tmp_path_factory.mktemp("build"), side=128)


def write_export(path):
    """Write files that are named as those of an export, without models, and return their folder."""
    for stage in ("dit_32", STRUCTURE):
        (path / stage).mkdir(parents=True)
        (path / stage / "model.safetensors").write_bytes(stage.encode())
    described = '{"format_version": 1, "facing_views": true}'
    (path / STRUCTURE / "config.json").write_text(described, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def options(build, tmp_path_factory):
    """Return options of the command for two assets of a build, and their list."""
    root = tmp_path_factory.mktemp("made")
    names = read_asset_names(build)
    uids = SdfShard(build / "sdf" / "40" / "000000.zarr").uids
    with (root / "list.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(("file", "repository", "licence"))
        table.writerows((names[uids[n]], "a/b", "CC0-1.0") for n in (2, 0))
    folders = {"folder": root / "pictures", "out": root / "evaluation"}
    cfg = HeldOutConfig(
        build=build,
        checkpoint=write_export(root / "export"),
        device="cpu",
        **folders,
        sheet=root / "sheet.webp",
    )
    return cfg, root / "list.csv"


@pytest.fixture(scope="module")
def made(options, build):
    """Make pictures and results of stored surfaces that face their cameras."""
    cfg, assets = options
    model = FacingSurfaces(build)
    model.facing_views = True
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe, "LIST", assets)
        patch.setattr(Generator, "load", classmethod(lambda *_: model))
        pictures = recipe.write_pictures(build, cfg.folder)
        recipe.write_results(cfg, build, pictures)
    return cfg, pictures


def test_the_command_stores_pictures_and_numbers_of_each_mesh(made):
    cfg, pictures = made
    results = read_results(cfg.folder)
    assert results["weights"] == weights_hash(cfg.checkpoint)
    assert (
        list(results["rows"]) == [picture.name for picture in pictures] == sorted(results["rows"])
    )
    for picture in pictures:
        row = results["rows"][picture.name]
        assert row["silhouette_iou"] > 0.99
        assert row["chamfer"] < 1e-6
        assert row["view"] == picture.camera["view"] == VIEWS - 1
        with Image.open(cfg.out / "meshes" / f"{picture.camera['uid']}.png") as image:
            drawn = np.asarray(image, np.float64)[LABEL_HEIGHT:, 256:]
        with Image.open(cfg.folder / picture.meshes) as image:
            assert np.abs(np.asarray(image, np.float64) - drawn).mean() < 3  # WebP with loss
    recipe.write_sheet(cfg.sheet, cfg.folder)
    with Image.open(cfg.sheet) as sheet:
        assert sheet.size == (2 * 256, 2 * (256 + LABEL_HEIGHT))


def test_other_weights_have_another_hash(tmp_path):
    export = write_export(tmp_path / "export")
    before = weights_hash(export)
    (export / "README.md").write_text("a card", encoding="utf-8")
    assert weights_hash(export) == before
    (export / STRUCTURE / "model.safetensors").write_bytes(b"other")
    assert weights_hash(export) != before


def test_the_demo_measures_its_own_meshes_and_shows_stored_numbers_of_others(
    made, build, tmp_path, monkeypatch
):
    cfg, pictures = made
    monkeypatch.setattr(held_out, "LIVE_PICTURES", 1)
    monkeypatch.setattr(held_out, "find_checkpoint", lambda _: cfg.checkpoint)
    shard = SdfShard(build / "sdf" / "40" / "000000.zarr")
    vertices, faces = extract(shard.bricks(pictures[0].camera["uid"]))
    turns = turns_to_face(pictures[0].camera["azimuth_degrees"])
    facing = turn_directions(vertices, quarter_turn(turns))
    write_mesh(tmp_path / "meshes" / f"{pictures[0].name}.glb", facing, faces[:-1])
    first, second = rows_of_demo(tmp_path / "meshes", cfg.folder)
    assert (first.live, second.live) == (True, False)
    assert (first.closed, first.faces) == (False, len(faces) - 1)
    assert first.silhouette_iou > 0.99
    stored = read_results(cfg.folder)["rows"][pictures[1].name]
    assert (second.faces, second.chamfer) == (stored["faces"], stored["chamfer"])
    assert second.closed
    assert len(first.images) == len(second.images) == 4


def test_a_mesh_that_faces_the_camera_is_turned_back(build):
    shard = SdfShard(build / "sdf" / "40" / "000000.zarr")
    surface = extract(shard.bricks(0))
    picture = {"azimuth_degrees": 100.0, "elevation_degrees": 20.0, "focal_mm": 60.0}
    camera = camera_of_meta(picture)
    rgba = np.zeros((128, 128, 4), np.uint8)
    (render,) = held_out.render_from(held_out.clay_mesh(surface), [camera], 128)
    rgba[...] = render
    turned = turn_directions(surface[0], quarter_turn(1)), surface[1]
    numbers, _ = measure(turned, rgba, camera, facing=True)
    assert numbers["silhouette_iou"] > 0.99
    assert numbers["closed"]
    unturned, _ = measure(turned, rgba, camera, facing=False)
    assert unturned["silhouette_iou"] < 0.95


def test_what_is_missing_is_one_line(build, tmp_path, monkeypatch):
    with pytest.raises(RunError, match=r"keg\.glb was not generated"):
        read_mesh(tmp_path / "keg.glb")
    with pytest.raises(RunError, match=r"results\.json does not exist; run python -m examples"):
        read_results(tmp_path)
    with pytest.raises(UserError, match="--checkpoint needs --build"):
        recipe.main(["--checkpoint", "props"])
    (tmp_path / "list.csv").write_text("file\nlost.glb\n", encoding="utf-8")
    monkeypatch.setattr(recipe, "LIST", tmp_path / "list.csv")
    with pytest.raises(UserError, match=r"lacks lost\.glb; build all assets of .*list\.csv"):
        recipe.write_pictures(build, tmp_path)


@needs_weights
def test_the_stored_results_are_those_of_the_shipped_weights():
    results = read_results()
    assert results["weights"] == weights_hash(SHIPPED)
    assert list(results["rows"]) == [picture.name for picture in read_pictures()]
    for row in results["rows"].values():
        assert row["split"] == "val"
        assert row["view"] == 23


@needs_weights
@pytest.mark.slow
def test_the_shipped_weights_generate_the_stored_mesh(tmp_path):
    from model.generate import main

    picture = read_pictures()[0]
    file = tmp_path / "mesh.glb"
    image = str(HELD_OUT_FOLDER / picture.image)
    assert main([image, "--checkpoint", "props", "--device", "cpu", "-o", str(file)]) == 0
    rgba = decode((HELD_OUT_FOLDER / picture.image).read_bytes())
    numbers, _ = measure(read_mesh(file), rgba, camera_of_meta(picture.camera), facing=True)
    stored = read_results()["rows"][picture.name]
    # Another machine rounds differently, so the mesh is not the same to the bit.
    assert numbers["silhouette_iou"] == pytest.approx(stored["silhouette_iou"], abs=0.05)
    assert numbers["closed"]
