"""The list of the props recipe, and copies of its build with a part of the training groups."""

import subprocess
from collections import Counter
from dataclasses import replace
from hashlib import sha256

import numpy as np
import pytest
import trimesh

from examples.recipes.props import add_training_assets
from examples.recipes.props.add_training_assets import (
    MOST_BYTES,
    REPOSITORIES,
    Repository,
    candidates,
    new_shapes,
)
from examples.recipes.props.fewer_groups import SHAPES, copy_build, groups_of_files, main
from examples.recipes.props.make_list import (
    COLUMNS,
    moments_of,
    newest_commit,
    read_rows,
    with_origins,
    write_rows,
)
from pipeline.core.errors import UserError
from pipeline.core.hashing import sha256_of
from pipeline.curation.config import DedupConfig
from pipeline.sources.folder import FolderSource
from pipeline.sources.github_list import GitHubListSource
from pipeline.storage.layout import MANIFEST, manifest_path
from pipeline.storage.manifest import read_manifest, write_manifest
from pipeline.storage.sdf_shard import SdfShard
from tests.train.analytic_builds import commit, make_build
from train.data.bricks import read_build_index

TRAINING, HELD_OUT = 6, 2
GROUPS = ("a", "a", "b", "c", "c", "d", "e", "f")  # of the files 0.glb to 7.glb


def number_of(uid):
    return int(uid.rpartition("-")[2])


@pytest.fixture
def build(tmp_path):
    root = make_build(tmp_path / "build", assets=TRAINING, val=HELD_OUT)
    for shard in ("000000", "000001"):
        path = manifest_path(root, shard)
        rows = [
            replace(row, url=f"{int(row.uid.rpartition('-')[2])}.glb")
            for row in read_manifest(path)
        ]
        write_manifest(path, rows, [32])
        commit(root, shard, MANIFEST)
    return root


def test_every_second_training_group_and_all_held_out_assets_are_kept(build, tmp_path):
    before = {path: path.read_bytes() for path in build.rglob("*") if path.is_file()}
    copy = tmp_path / "copy"
    groups = {f"{number}.glb": group for number, group in enumerate(GROUPS)}
    # a, c of a, b, c, d: the files 0, 1, 3 and 4.
    assert copy_build(build, copy, groups, every=2) == (2, 4)
    index = read_build_index(copy, [32])
    numbers = {
        name: [number_of(uid) for uid in index.split(name).uids] for name in ("train", "val")
    }
    assert numbers == {"train": [0, 1, 3, 4], "val": [6, 7]}
    copied = SdfShard(copy / "sdf" / "32" / "000000.zarr").bricks(0)
    original = SdfShard(build / "sdf" / "32" / "000000.zarr").bricks(0)
    assert (copied.values == original.values).all()
    assert before == {path: path.read_bytes() for path in build.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("groups", "every", "message"),
    [
        ({"0.glb": "a"}, 1, r"groups must name every file of the build, '1\.glb' has none"),
        ({}, 0, "every must be 1 or more, got 0"),
    ],
)
def test_unsuitable_requests_are_refused_before_anything_is_written(
    build, tmp_path, groups, every, message
):
    with pytest.raises(UserError, match=message):
        copy_build(build, tmp_path / "copy", groups, every)
    assert not (tmp_path / "copy").exists()
    with pytest.raises(UserError, match=r"copy must not exist, got .*build; delete it"):
        copy_build(build, build, groups, 1)


def test_commit_and_path_of_a_file_are_found_in_a_clone_by_its_hash(tmp_path):
    clone = tmp_path / "ann" / "kit"
    for name, content in (("models/a.glb", b"1"), ("old/a.glb", b"2"), ("b.glb", b"3")):
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        (clone / name).write_bytes(content)
    git = ["git", "-C", clone, "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (("init", "-q"), ("add", "-A"), ("commit", "-q", "-m", "Add models")):
        subprocess.run([*git, *words], check=True)
    row = {"file": "pack/a.glb", "repository": "ann/kit", "sha256": sha256(b"2").hexdigest()}
    (located,) = with_origins([row], tmp_path)
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, check=True).stdout
    assert located == {**row, "commit": head.decode().strip(), "path": "old/a.glb"}
    with pytest.raises(ValueError, match=r"pack/b\.glb must be a file of ann/kit at"):
        with_origins([{**row, "file": "pack/b.glb"}], tmp_path)


def test_the_committed_lists_name_the_origin_of_every_asset(tmp_path):
    shapes = {record.uid: record for record in GitHubListSource(path=SHAPES).records()}
    assets = {
        record.uid: record
        for record in GitHubListSource(path=SHAPES.with_name("assets.csv")).records()
    }
    assert (len(shapes), len(assets)) == (3601, 3764)
    assert shapes.items() <= assets.items()
    assert {record.licence for record in assets.values()} == {"cc0"}
    # A build of a folder has the same assets under the same names.
    (tmp_path / "kenney-city" / "models").mkdir(parents=True)
    (tmp_path / "kenney-city" / "models" / "building-garage.glb").touch()
    (record,) = FolderSource(root=tmp_path).records()
    assert record.uid in shapes
    groups = groups_of_files(SHAPES)
    assert groups[record.url] == groups[shapes[record.uid].url] == "kenney-city/building_garage"


def test_added_assets_are_new_shapes_and_never_copies_of_held_out_ones(tmp_path):
    kinds = {
        "old/chair.glb": trimesh.creation.box((1, 2, 3)),
        "quaternius/kit/held_out_again.glb": trimesh.creation.box((2, 4, 6)),
        "quaternius/kit/new.glb": trimesh.creation.box((1, 1, 3)),
        "quaternius/kit/new_again.glb": trimesh.creation.box((1, 1, 3)),
        "quaternius/kit/new-transformed.glb": trimesh.creation.box((1, 3, 3)),
        "quaternius/kit/tile.glb": trimesh.creation.box((2, 3, 3)),
    }
    for name, mesh in kinds.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        mesh.export(tmp_path / name)
    (tmp_path / "quaternius/kit/large.glb").write_bytes(bytes(MOST_BYTES + 1))
    showcase = replace(REPOSITORIES[0], leave_out=("til?",))
    rows = candidates(tmp_path, showcase, "c0ffee")
    assert [row["group"] for row in rows] == [
        "quaternius/kit/held_out_again",
        "quaternius/kit/new",
        "quaternius/kit/new_again",
    ]
    assert {(row["split"], row["author"]) for row in rows} == {("train", "Quaternius")}
    assert {row["commit"] for row in rows} == {"c0ffee"}
    assert rows[1]["path"] == "public/glb/kit/new.glb"
    files = ["old/chair.glb", *(row["file"] for row in rows)]
    moments = np.stack([moments_of(tmp_path / file, tmp_path) for file in files])
    listed = [{"sha256": sha256_of(tmp_path / "old/chair.glb")}]
    assert new_shapes(listed, rows, moments) == [False, True, False]


def test_an_asset_that_nearly_has_a_listed_shape_is_left_out(tmp_path):
    files = ("a.glb", "b.glb", "c.glb")
    for file, height in zip(files, (1, 1.002, 1.2), strict=True):
        trimesh.creation.box((2, height, 3)).export(tmp_path / file)
    moments = np.stack([moments_of(tmp_path / file, tmp_path) for file in files])
    rows = [{"sha256": sha256_of(tmp_path / file)} for file in files]
    assert new_shapes(rows[:1], rows[1:], moments) == [False, True]
    assert new_shapes(rows[:1], rows[1:], moments, DedupConfig()) == [True, True]


def git(folder, *words):
    author = ("-c", "user.name=a", "-c", "user.email=a@b")
    subprocess.run(["git", "-C", folder, *author, *words], check=True)


def test_listed_rows_stay_and_new_ones_are_neither_flat_nor_copies(tmp_path, monkeypatch):
    listed = [
        {column: "x" for column in COLUMNS}
        | {"file": f"old/{name}.glb", "shape": f"old/{name}.glb", "sha256": name, "split": split}
        for name, split in (("a", "train"), ("b", "val"))
    ]
    for name in ("assets.csv", "shapes.csv"):
        write_rows(tmp_path / name, listed)
    before = {
        name: (tmp_path / name).read_text(encoding="utf-8") for name in ("assets.csv", "shapes.csv")
    }
    boxes = {
        "files/old/a.glb": (2, 1, 3),
        "files/old/b.glb": (2, 2, 3),
        "clones/ann/kit/in/set/copy.glb": (4, 2, 6),
        "clones/ann/kit/in/set/held out.glb": (2, 2.002, 3),
        "clones/ann/kit/in/set/new.glb": (1, 3, 1),
        "clones/ann/kit/in/set/new again.glb": (1, 3, 1),
        "clones/ann/kit/in/set/thin.glb": (3, 0.03, 3),
        "clones/ann/kit/in/other/left.glb": (1, 5, 1),
    }
    for name, sides in boxes.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        trimesh.creation.box(sides).export(tmp_path / name)
    clone = tmp_path / "clones/ann/kit"
    git(clone, "init", "-q")
    git(clone, "add", "-A")
    git(clone, "commit", "-q", "-m", "Add models")
    repository = Repository("ann/kit", "in", "ann", "set/*.glb", "Ann")
    monkeypatch.setattr(add_training_assets, "HERE", tmp_path)
    monkeypatch.setattr(add_training_assets, "REPOSITORIES", (repository,))
    for _ in range(2):  # again: the rows of these repositories are made anew
        add_training_assets.main(tmp_path / "clones", tmp_path / "files")
        for name, text in before.items():
            assert (tmp_path / name).read_text(encoding="utf-8").startswith(text)
            (row,) = read_rows(tmp_path / name)[2:]
            assert (row["file"], row["path"], row["split"]) == (
                *("ann/set/new again.glb", "in/set/new again.glb"),
                "train",
            )
            assert row["commit"] == newest_commit(clone)
    assert not (tmp_path / "files/ann/other").exists()


def test_no_added_asset_is_held_out():
    rows = read_rows(SHAPES)
    added = {repository.name for repository in REPOSITORIES}
    splits = Counter((row["repository"] in added, row["split"]) for row in rows)
    assert splits == {(False, "train"): 562, (False, "val"): 78, (True, "train"): 2961}


def test_the_command_takes_the_groups_of_the_committed_list(build, tmp_path, capsys):
    groups = groups_of_files(SHAPES)
    files = sorted(groups)[: TRAINING + HELD_OUT]
    for shard in ("000000", "000001"):
        path = manifest_path(build, shard)
        rows = [replace(row, url=files[int(row.url[:-4])]) for row in read_manifest(path)]
        write_manifest(path, rows, [32])
    main([str(build), str(tmp_path / "copy"), "1"])
    kept = len({groups[file] for file in files[:TRAINING]})
    assert capsys.readouterr().out == f"{kept} groups with {TRAINING} training assets\n"
    for words in ((), (str(build),), (str(build), "copy", "half")):
        with pytest.raises(UserError, match=r"the arguments must be BUILD COPY \[N\], got "):
            main(words)
