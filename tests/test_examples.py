"""Every script in examples/ runs as it stands there."""

import json
import os
import re
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import trimesh

from pipeline.core.cameras import camera_of_meta
from pipeline.rendering.transforms import dump_transforms, transforms_of
from pipeline.storage.manifest import read_manifest
from pipeline.storage.render_shard import RenderShard
from pipeline.storage.transforms_shard import write_transforms_shard
from tests.child_python import ROOT, run_python
from tests.pipeline.builds import environment
from tests.train.analytic_builds import add_renders, make_build

EXAMPLES = ROOT / "examples"


def run(script: str, *words: object, env: dict[str, str] | None = None) -> str:
    """Run an example with the project importable and return what it prints."""
    return run_python(EXAMPLES / script, *words, env=env).stdout


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    root = make_build(tmp_path_factory.mktemp("build"), assets=2, val=0, resolutions=(32,))
    add_renders(root, views=2)
    return root


def test_every_script_is_in_the_table():
    names = {path.relative_to(EXAMPLES).as_posix() for path in EXAMPLES.rglob("*.*")} - {
        "README.md"
    }
    table = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in table for name in names if "__pycache__" not in name)


def test_read_a_shard(build):
    text = run("read_a_shard.py", build, 32)
    assert "bricks of 512 values at R = 32" in text
    assert "40 x 40 pixels" in text


def test_unpack_views_writes_the_images_and_their_cameras(build, tmp_path):
    tar = min((build / "renders" / "paper").glob("*.tar"))
    shard = RenderShard(tar)
    uid = shard.uids[0]
    cameras = [camera_of_meta(shard.read_bytes(uid, view)[1]) for view in shard.views(uid)]
    content = transforms_of(cameras, 40, ["../0.png"] * len(cameras))
    write_transforms_shard(
        build / "transforms" / "paper" / tar.name, [(uid, dump_transforms(content))]
    )
    run("unpack_views.py", build, uid, tmp_path / "views")
    unpacked = json.loads((tmp_path / "views" / "transforms.json").read_text(encoding="utf-8"))
    for frame, camera in zip(unpacked["frames"], cameras, strict=True):
        assert (tmp_path / "views" / frame["file_path"]).read_bytes()[1:4] == b"PNG"
        np.testing.assert_allclose(frame["transform_matrix"], camera.c2w)


def test_other_libraries_read_the_same_values(build):
    from pipeline import SdfShard

    text = run("read_with_other_libraries.py", build, 32)
    assert "webdataset: " in text
    assert "datasets: 2 of 2 assets are done" in text
    sys.path.insert(0, str(EXAMPLES))
    try:
        from read_with_other_libraries import points_and_distances
    finally:
        sys.path.remove(str(EXAMPLES))
    path = min((build / "sdf" / "32").glob("*.zarr"))
    shard = SdfShard(path)
    bricks = shard.bricks(shard.uids[0])
    points, distances = points_and_distances(path, 0)
    tau = 2 / 32
    np.testing.assert_allclose(distances, bricks.values.astype(np.float32).reshape(-1) * tau)
    # The first point of each brick is the corner of its cell.
    np.testing.assert_allclose(points[::512], 8 * bricks.cells / 31 - 0.5)


def test_attention_in_another_model_learns():
    lines = run("attention_in_another_model.py").splitlines()
    assert float(lines[-1].rpartition(" ")[2]) > 0.9


def test_add_a_source(tmp_path):
    trimesh.creation.icosphere().export(tmp_path / "ball.stl")
    (tmp_path / "flat.obj").write_text("v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 3\n", encoding="utf-8")
    listed = "file,licence\nball.stl,cc0\nflat.obj,cc0\nlost.glb,cc0\n"
    (tmp_path / "assets.csv").write_text(listed, encoding="utf-8")
    ball, flat, lost = run("add_a_source.py", tmp_path / "assets.csv", tmp_path).splitlines()
    assert ball.startswith("ball.stl: 1280 faces, closed, ")
    assert flat.startswith("flat.obj: rejected, ")
    assert lost == "lost.glb: rejected, file_not_readable"


def test_a_build_from_a_source_of_ones_own_as_the_documentation_shows(tmp_path):
    trimesh.creation.icosphere().export(tmp_path / "ball.stl")
    (tmp_path / "assets.csv").write_text(
        "file,licence\nball.stl,cc0\nlost.glb,cc0\n", encoding="utf-8"
    )
    page = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    (block,) = [
        textwrap.dedent(block)
        for block in re.findall(r"^  ```python\n(.*?)^  ```$", page, re.M | re.S)
        if "CsvSource" in block
    ]
    (tmp_path / "my_build.py").write_text(block, encoding="utf-8")
    env = environment(tmp_path)
    env["PYTHONPATH"] += os.pathsep + str(EXAMPLES)
    run_python("my_build.py", cwd=tmp_path, env=env)
    rows = read_manifest(tmp_path / "data" / "csv" / "manifest" / "000000.parquet")
    assert [(row.url, row.status, row.reason) for row in rows] == [
        ("ball.stl", "done", ""),
        ("lost.glb", "rejected", "file_not_readable"),
    ]


def test_train_on_a_folder(tmp_path):
    meshes = tmp_path / "meshes"
    meshes.mkdir()
    for number in range(2):  # two shapes: copies of one shape are in one split
        shape = trimesh.creation.capsule(height=1 + 3 * number, count=[12, 12])
        shape.export(meshes / f"{number}.stl")
    run("train_on_a_folder.py", meshes, tmp_path / "out", 2, env=environment(tmp_path))
    assert (tmp_path / "out" / "data" / "report" / "index.html").exists()
    assert (tmp_path / "out" / "evaluation" / "index.html").exists()


@pytest.mark.slow
def test_the_laptop_recipe(tmp_path):
    env = {
        **environment(tmp_path),
        "OUT": str(tmp_path / "run"),
        "STEPS": "2",
        "PYTHON": sys.executable,
    }
    subprocess.run(["sh", EXAMPLES / "recipes" / "laptop.sh"], cwd=ROOT, env=env, check=True)
    assert (tmp_path / "run" / "export" / "vae_64" / "model.safetensors").exists()


@pytest.mark.parametrize(
    "script",
    ["paper.sh", "laptop.sh", "slurm.sbatch", "props/train.sh", "props/several_views.sh"],
)
def test_a_recipe_uses_options_that_exist(script):
    """The README's check covers options of commands; here the shell syntax is checked."""
    subprocess.run(
        ["bash" if script.endswith("sbatch") else "sh", "-n", EXAMPLES / "recipes" / script],
        check=True,
    )
