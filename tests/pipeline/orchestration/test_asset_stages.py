"""One asset through all its stages, without Ray or isolation."""

import json

import numpy as np
import pytest

from pipeline.config import BuildConfig
from pipeline.core.hashing import make_uid
from pipeline.core.product import Product
from pipeline.core.schema import Material
from pipeline.curation.config import FilterConfig
from pipeline.mesh_io.load import LoadReport
from pipeline.orchestration.asset_results import AssetJob, AssetNotes
from pipeline.orchestration.asset_stages import load_bricks, process, save_bricks
from pipeline.sources.folder import FolderSource
from pipeline.sources.procedural import ProceduralSource
from tests.child_python import run_python
from tests.pipeline.archive_files import make_zip
from tests.pipeline.collada_files import textured_quad
from tests.pipeline.crashing_source import box
from tests.pipeline.mesh_files import png
from tests.pipeline.mesh_io.test_visible_parts import box as box_of
from tests.pipeline.mesh_io.test_visible_parts import mesh_of
from tests.pipeline.storage.test_sdf_shard import random_bricks

CUBE = box(1)


def visit(tmp_path, text, products=("sdf-64", "sdf-96", "renders-paper"), **options):
    (tmp_path / "in").mkdir(exist_ok=True)
    (tmp_path / "in" / "a.obj").write_text(text, encoding="utf-8")
    source = FolderSource(root=tmp_path / "in")
    (record,) = source.records()
    tiny = {
        "resolutions": (64, 96),
        "topology_resolution": 64,
        "views": 2,
        "image_size": 32,
        **options,
    }
    folder = tmp_path / "-".join(products)
    folder.mkdir()
    process(
        AssetJob(
            record=record,
            source=source,
            config=BuildConfig(**tiny),
            products=tuple(map(Product.parse, products)),
            folder=folder,
        )
    )
    return AssetNotes.load(folder), folder


def test_a_cube_goes_through_every_stage(tmp_path):
    notes, folder = visit(tmp_path, CUBE)
    assert (notes.status, notes.stage, notes.reason) == ("done", "", "")
    stages = "metadata fetch file load normalize geometry topology sdf-64 sdf-96 renders-paper"
    assert " ".join(notes.seconds) == stages
    assert (notes.row["faces"], notes.row["vertices"], notes.row["components"]) == (12, 8, 1)
    assert notes.row["center"] == [0.5, 0.5, 0.5]
    assert notes.row["scale"] == pytest.approx(0.95)
    assert notes.row["sign_path"] == "closed"
    bricks = load_bricks(folder / "sdf-64", 64)
    assert len(bricks.cells) == notes.products["sdf-64"]["tokens"] > 0
    uid = make_uid("folder", "a.obj")
    wanted = {f"{uid}-0{view}.{kind}" for view in (0, 1) for kind in ("png", "json")}
    assert {path.name for path in (folder / "renders-paper").iterdir()} == wanted


def visit_mesh(tmp_path, monkeypatch, mesh, **options):
    """Return the notes of a visit whose file is read as `mesh`."""
    monkeypatch.setattr(
        "pipeline.orchestration.asset_stages.load_with_report",
        lambda path, cfg, *, up, root: (mesh, LoadReport()),
    )
    return visit(tmp_path, CUBE, **options)


def test_all_products_leave_out_what_nobody_sees(tmp_path, monkeypatch):
    ghost = Material(base_color=(1.0, 1.0, 1.0, 0.0), alpha_mode="BLEND")
    mesh = mesh_of(
        (*box_of([0.5] * 3), Material(double_sided=False)),
        (*box_of([0.52] * 3, inverted=True), Material(double_sided=False)),
        (*box_of([5.0] * 3), ghost),
    )
    notes, folder = visit_mesh(tmp_path, monkeypatch, mesh, products=("sdf-64", "renders-paper"))
    assert notes.row["warnings"] == ["outline_hull_left_out", "transparent_left_out"]
    assert notes.row["faces"] == 12
    assert notes.row["scale"] == pytest.approx(0.95)  # of the inner box, which has side 1
    assert notes.numbers["translucent_share"] == 0
    (tmp_path / "alone").mkdir()
    alone = mesh_of((*box_of([0.5] * 3), Material(double_sided=False)))
    _, other = visit_mesh(
        tmp_path / "alone", monkeypatch, alone, products=("sdf-64", "renders-paper")
    )
    for product in ("sdf-64", "renders-paper"):
        for path in (folder / product).iterdir():
            assert (other / product / path.name).read_bytes() == path.read_bytes()


def test_translucent_assets_can_be_rejected(tmp_path, monkeypatch):
    glass = Material(base_color=(1.0, 1.0, 1.0, 0.5), alpha_mode="BLEND")
    notes, _ = visit_mesh(
        tmp_path,
        monkeypatch,
        mesh_of((*box_of([1] * 3), glass)),
        filter=FilterConfig(max_translucent_share=0.9),
    )
    assert (notes.status, notes.stage, notes.reason) == ("rejected", "load", "translucent")
    assert notes.numbers["translucent_share"] == 1


def test_a_resolution_at_which_an_asset_is_too_thin_can_be_rejected(tmp_path, monkeypatch):
    """A plate of 1/60 of its sides is thinner than a voxel at 32, but not at 96."""
    notes, _ = visit_mesh(
        tmp_path,
        monkeypatch,
        mesh_of((*box_of([0.5, 0.5 / 60, 0.5]), Material())),
        products=("sdf-32", "sdf-96"),
        resolutions=(32, 96),
        filter=FilterConfig(max_thin_share=0.5),
    )
    assert (notes.status, notes.stage, notes.reason) == ("rejected", "sdf-32", "too_thin")
    assert notes.numbers["thin_share_32"] == pytest.approx(1, abs=0.01)
    assert notes.numbers["thin_share_96"] == 0
    assert list(notes.products) == ["sdf-96"]


def test_the_up_axis_is_that_of_the_build_where_a_file_states_none(tmp_path):
    """A shape that is read as z-up has its centre at (x, z, -y). glTF states y up."""
    stated = ProceduralSource(count=1)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.obj").write_text(
        "v 1 2 3\nv 2 2 3\nv 1 4 3\nv 1 2 6\n" + "f 1 3 2\nf 1 2 4\nf 1 4 3\nf 2 3 4\n",
        encoding="utf-8",
    )
    for source, origin in ((FolderSource(root=tmp_path / "in"), "option"), (stated, "stated")):
        (record,) = source.records()
        rows = {}
        for up in ("y", "z"):
            folder = tmp_path / f"{source.name}-{up}"
            folder.mkdir()
            cfg = BuildConfig(up=up, topology_resolution=64)
            process(AssetJob(record=record, source=source, config=cfg, products=(), folder=folder))
            rows[up] = AssetNotes.load(folder).row
        x, y, z = rows["y"]["center"]
        turned = [x, z, -y] if origin == "option" else [x, y, z]
        assert rows["z"]["center"] == pytest.approx(turned)
        assert (rows["z"]["up_axis"], rows["z"]["up_origin"]) == (
            "z" if origin == "option" else "y",
            origin,
        )
    with pytest.raises(ValueError, match='up must be "auto", "y" or "z", got \'x\''):
        BuildConfig(up="x")


def test_a_products_files_do_not_depend_on_the_other_products(tmp_path):
    _, everything = visit(tmp_path, CUBE)
    for product in ("sdf-96", "renders-paper"):
        _, alone = visit(tmp_path, CUBE, products=(product,))
        files = sorted(path.name for path in (everything / product).iterdir())
        assert files
        for name in files:
            assert (alone / product / name).read_bytes() == (
                everything / product / name
            ).read_bytes()


@pytest.mark.parametrize(
    ("text", "stage", "reason"),
    [
        ("", "file", "file_too_small"),
        ("v 0 0 0\nv 1 0 0\n", "load", None),
        (
            "v 0 0 0\nv 1 0 0\nv 0 1 0\nv 1 1 0\nf 1 2 3\nf 2 4 3\nf 1 3 2\nf 2 3 4\n",
            "geometry",
            "flat",
        ),
    ],
)
def test_a_rejection_ends_the_asset_where_it_happens(tmp_path, text, stage, reason):
    notes, folder = visit(tmp_path, text)
    assert (notes.status, notes.stage) == ("rejected", stage)
    assert reason in (None, notes.reason)
    assert notes.products == {}
    assert not (folder / "sdf-64").exists()


def test_a_file_whose_hash_differs_from_that_of_its_source_is_rejected(tmp_path):
    (tmp_path / "out").mkdir()
    source = ProceduralSource(count=1)
    (record,) = source.records()
    record = type(record)(**{**vars(record), "sha256": "0" * 64})
    process(
        AssetJob(
            record=record,
            source=source,
            config=BuildConfig(),
            products=(Product.sdf(64),),
            folder=tmp_path / "out",
        )
    )
    notes = AssetNotes.load(tmp_path / "out")
    assert (notes.status, notes.stage, notes.reason) == ("rejected", "fetch", "wrong_sha256")


def test_bricks_survive_scratch(tmp_path):
    bricks = random_bricks(7)
    save_bricks(tmp_path, bricks)
    again = load_bricks(tmp_path, bricks.resolution)
    for name in ("cells", "values", "sharp"):
        np.testing.assert_array_equal(getattr(again, name), getattr(bricks, name), strict=True)


WARM = """
import sys, tempfile
from pathlib import Path
from numba.core.dispatcher import Dispatcher
from pipeline.orchestration.asset_results import AssetJob, AssetNotes
from pipeline.orchestration.asset_stages import process, warm_up
from pipeline.config import BuildConfig
from pipeline.core.product import Product
from pipeline.sources.procedural import ProceduralSource

def compiled():
    return {
        f"{name}.{key}": len(value.signatures)
        for name, module in sys.modules.items() if name.startswith("pipeline.")
        for key, value in vars(module).items() if isinstance(value, Dispatcher)
    }

warm_up()
before = compiled()
source = ProceduralSource(count=int(sys.argv[1]))
for record in source.records():
    folder = Path(tempfile.mkdtemp(dir=sys.argv[2]))
    config = BuildConfig(resolutions=(64,), topology_resolution=64)
    products = (Product.sdf(64),)
    process(AssetJob(record=record, source=source, config=config, products=products, folder=folder))
    assert AssetNotes.load(folder).status == "done", AssetNotes.load(folder)
after = compiled()
late = sorted(name for name in after if after[name] != before.get(name))
sys.exit(f"compiled by an asset, not by the warm-up: {late}" if late else 0)
"""


def test_the_warm_up_leaves_nothing_for_an_asset_to_compile(tmp_path):
    """A function that a child compiles is compiled again by every other child."""
    run_python("-c", WARM, 12, tmp_path)


def test_notes_of_a_crashed_stage_say_how_far_it_got(tmp_path):
    AssetNotes(stage="load", row={"sha256": "x"}).save(tmp_path)
    assert json.loads((tmp_path / "asset.json").read_text(encoding="utf-8"))["stage"] == "load"
    assert AssetNotes.load(tmp_path).status == "running"


def load_only_asset(tmp_path, root) -> AssetNotes:
    """Run the stages of the only asset of a folder up to the topology."""
    source = FolderSource(root=root)
    (record,) = source.records()
    folder = tmp_path / "job"
    folder.mkdir()
    config = BuildConfig(resolutions=(64,), topology_resolution=64)
    process(AssetJob(record=record, source=source, config=config, products=(), folder=folder))
    return AssetNotes.load(folder)


@pytest.mark.parametrize("kind", ["folder", "zip", "zip in zip"])
def test_a_texture_in_another_directory_of_the_source_is_found(tmp_path, kind):
    """A document in models/, and its texture in ../Textures/ with another case."""
    root = tmp_path / "in"
    members = {
        "models/a.dae": textured_quad("../textures/A.png"),
        "Textures/a.PNG": png(),
    }
    if kind == "zip in zip":
        inner = make_zip(tmp_path / "inner.zip", members).read_bytes()
        members = {"source/inner.zip": inner}
    root.mkdir()
    if kind == "folder":
        for name, content in members.items():
            (root / name).parent.mkdir()
            (root / name).write_bytes(content)
    else:
        make_zip(root / "a.zip", members)
    notes = load_only_asset(tmp_path, root)
    assert notes.reason == "flat"  # the square was loaded
    assert not notes.row.get("warnings")


def test_a_texture_outside_the_source_is_missing(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    root = tmp_path / "in"
    root.mkdir()
    (root / "a.dae").write_bytes(textured_quad("../a.png"))
    assert load_only_asset(tmp_path, root).row["warnings"] == ["side_file_missing"]
