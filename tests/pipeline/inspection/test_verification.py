"""`verify` finds every breach that is planted in a copy of a sound build."""

import json
import re
import shutil
import sys
import tarfile
from dataclasses import replace
from io import BytesIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zarr

from pipeline.core.cli import command
from pipeline.core.errors import UserError
from pipeline.inspection.verification import verify
from pipeline.storage.commit_marker import tree_sha256
from pipeline.storage.manifest import read_manifest, write_manifest
from pipeline.storage.render_shard import RenderShard, write_render_shard
from pipeline.storage.sdf_shard import SdfShard, write_sdf_shard
from pipeline.verify import main

SHARD = "000001"


@pytest.fixture
def build(tiny_build, tmp_path):
    return shutil.copytree(tiny_build, tmp_path / "build")


def marker(build, product):
    return build / "shards" / SHARD / f"{product}.json"


def update_marker(build, product):
    """Make sizes and hashes in the marker agree with the files again.

    Afterwards only a check of the content can find the damage.
    """
    content = json.loads(marker(build, product).read_text(encoding="utf-8"))
    for file in content["files"]:
        file["bytes"], file["sha256"] = tree_sha256(build / file["path"])
    content["bytes"] = sum(file["bytes"] for file in content["files"])
    marker(build, product).write_text(json.dumps(content), encoding="utf-8")


def sdf(build):
    return build / "sdf" / "64" / f"{SHARD}.zarr"


def tar(build):
    return build / "renders" / "paper" / f"{SHARD}.tar"


def uids(build):
    return SdfShard(sdf(build)).uids


def flip_a_byte(build):
    path = sdf(build) / "values" / "c" / "0" / "0"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def flip_a_byte_of_a_render(build):
    data = bytearray(tar(build).read_bytes())
    data[len(data) // 2] ^= 1
    tar(build).write_bytes(data)


def truncate_the_tar(build):
    data = tar(build).read_bytes()
    tar(build).write_bytes(data[: len(data) // 2])


def truncate_the_tar_and_update_its_marker(build):
    truncate_the_tar(build)
    update_marker(build, "renders-paper")


def write_bricks(build, change):
    shard = SdfShard(sdf(build))
    assets = [(uid, shard.bricks(uid)) for uid in shard.uids]
    shutil.rmtree(sdf(build))
    write_sdf_shard(sdf(build), 64, change(assets), str(shard.attributes["config_hash"]))
    update_marker(build, "sdf-64")


def put_a_cell_out_of_order(build):
    def swap(assets):
        for name in ("cells", "values", "sharp"):
            array = getattr(assets[1][1], name)
            array[[0, 1]] = array[[1, 0]]
        return assets

    write_bricks(build, swap)


def make_a_value_not_finite(build):
    def spoil(assets):
        assets[1][1].values[0, 0] = np.nan
        return assets

    write_bricks(build, spoil)


def drop_an_asset(build):
    write_bricks(build, lambda assets: assets[:1] + assets[2:])


def drop_a_cell(build):
    def shorten(assets):
        uid, bricks = assets[1]
        kept = {name: getattr(bricks, name)[:-1] for name in ("cells", "values", "sharp")}
        return [assets[0], (uid, type(bricks)(resolution=64, **kept)), *assets[2:]]

    write_bricks(build, shorten)


def change_the_format_version(build):
    zarr.open_group(sdf(build), mode="r+").update_attributes({"format_version": 99})
    update_marker(build, "sdf-64")


def write_views(build, change):
    shard = RenderShard(tar(build))
    entries = [
        (uid, [shard.read_bytes(uid, view) for view in shard.views(uid)]) for uid in shard.uids
    ]
    write_render_shard(tar(build), change(entries))
    update_marker(build, "renders-paper")


def drop_a_view_of_each(build):
    write_views(build, lambda entries: [(uid, views[:-1]) for uid, views in entries])


def swap_assets_in_the_tar(build):
    write_views(build, lambda entries: [entries[1], entries[0], *entries[2:]])


def drop_one_view(build):
    """Drop one view of one asset from the tar file and from its index."""
    index = tar(build).with_suffix(".index.parquet")
    table = pq.read_table(index)
    victim = f"{uids(build)[1]}-01"
    members = {}
    with tarfile.open(tar(build)) as archive:
        for member in archive:
            if not member.name.startswith(victim):
                members[member.name] = archive.extractfile(member).read()
    rows = []
    with tarfile.open(tar(build), "w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            rows.append((name.rpartition(".")[0], name, archive.offset + 512, len(data)))
            archive.addfile(info, BytesIO(data))
    columns = [pa.array(column, field.type) for column, field in zip(zip(*rows), table.schema)]
    pq.write_table(pa.table(columns, schema=table.schema), index)
    update_marker(build, "renders-paper")


def manifest(build):
    return build / "manifest" / f"{SHARD}.parquet"


def write_rows(build, change):
    write_manifest(manifest(build), change(read_manifest(manifest(build))), [64, 96])
    update_marker(build, "manifest")


def drop_a_manifest_row(build):
    write_rows(build, lambda rows: rows[:1] + rows[2:])


def reorder_manifest_rows(build):
    write_rows(build, lambda rows: [rows[1], rows[0], *rows[2:]])


def edit_row(**changes):
    def damage(build):
        write_rows(build, lambda rows: [rows[0], replace(rows[1], **changes), *rows[2:]])

    return damage


def edit_tokens(tokens):
    def damage(build):
        row = read_manifest(manifest(build))[1]
        edit_row(tokens={**row.tokens, **tokens})(build)

    return damage


def edit_marker(product, **changes):
    def damage(build):
        content = json.loads(marker(build, product).read_text(encoding="utf-8"))
        marker(build, product).write_text(json.dumps({**content, **changes}), encoding="utf-8")

    return damage


def edit_plan(build):
    info = json.loads((build / "plan.json").read_text(encoding="utf-8"))
    info["config"]["up"] = "z"
    (build / "plan.json").write_text(json.dumps(info), encoding="utf-8")


A = "<the second asset>"  # stands for its uid
BREACHES = [  # damage, asset that the breach names, pattern of the rule
    (flip_a_byte, "", "sdf-64: .*zarr does not have its marker's sha256"),
    (flip_a_byte_of_a_render, "", "renders-paper: .*tar does not have its marker's sha256"),
    (truncate_the_tar, "", "renders-paper: .*tar has .* bytes, its marker says"),
    (
        truncate_the_tar_and_update_its_marker,
        "",
        "renders-paper: .*(truncated|ends within|different members)",
    ),
    (put_a_cell_out_of_order, A, "sdf-64: cells are not in x, y, z order"),
    (make_a_value_not_finite, A, "sdf-64: values are not finite"),
    (drop_an_asset, "", "sdf-64: uids must be"),
    (drop_a_cell, A, "sdf-64: .* tokens, the manifest says"),
    (change_the_format_version, "", "sdf-64: .*format_version 1, got 99"),
    (drop_a_view_of_each, A, "renders-paper: missing view"),
    (drop_one_view, A, "renders-paper: missing view"),
    (swap_assets_in_the_tar, "", "renders-paper: .*order"),
    (drop_a_manifest_row, A, "has no row in the manifest"),
    (reorder_manifest_rows, "", "rows of the manifest are not in the order of the plan"),
    (edit_row(split="test"), A, "split must be"),
    (edit_row(status="maybe"), A, "has status maybe"),
    (edit_row(reason="odd"), A, "has status done with reason 'odd'"),
    (edit_row(scale=float("nan")), A, "finite center and scale"),
    (edit_tokens({64: 1}), A, "tokens, the manifest says 1"),
    (edit_tokens({64: None}), A, "is done without sdf-64"),
    (edit_row(url="elsewhere"), A, "differs from the plan"),
    (edit_row(row=0), A, "row 0"),
    (lambda build: manifest(build).unlink(), "", "manifest: .* is missing"),
    (lambda build: marker(build, "sdf-64").unlink(), "", "sdf-64: has no commit marker"),
    (lambda build: marker(build, "manifest").unlink(), "", "manifest: has no commit marker"),
    (
        lambda build: marker(build, "sdf-64").write_text("{", encoding="utf-8"),
        "",
        "commit marker does not parse",
    ),
    (lambda build: shutil.rmtree(sdf(build)), "", "sdf-64: .* is missing"),
    (
        lambda build: tar(build).with_suffix(".index.parquet").unlink(),
        "",
        "index.parquet is missing",
    ),
    (edit_marker("sdf-64", config_hash="0"), "", "config_hash is not the hash of the config"),
    (edit_marker("sdf-64", format_version=0), "", "format_version is 0, must be 1"),
    (edit_marker("sdf-64", counts={}), "", "sdf-64: the marker counts {}"),
    (edit_marker("sdf-64", bytes=1), "", "marker's bytes are not the sum"),
    (edit_marker("sdf-64", shard="000000"), "", "marker is of sdf-64 of shard 000000"),
    (edit_marker("renders-paper", files=[]), "", "renders-paper: the marker lists"),
    (edit_marker("manifest", counts={"assets": 0}), "", "marker counts other assets"),
]


@pytest.mark.parametrize(
    ("damage", "asset", "rule"), BREACHES, ids=[rule for _, _, rule in BREACHES]
)
def test_a_breach_is_found_and_named(build, damage, asset, rule):
    asset = asset and uids(build)[1]
    damage(build)
    breaches = verify(build)
    assert any(
        breach.shard == SHARD and breach.asset == asset and re.search(rule, breach.rule)
        for breach in breaches
    ), [*map(str, breaches)]


@pytest.mark.parametrize(
    ("damage", "rule"),
    [
        (edit_plan, "config_hash is not the hash of the config"),
        (lambda build: (build / "notes.txt").touch(), "notes.txt: does not belong here"),
        (lambda build: (build / ".scratch").mkdir(), "build is not finished"),
        (lambda build: (build / "sdf" / "64" / "000009.zarr").mkdir(), "belongs to no shard"),
        (
            lambda build: (build / "sdf" / "32").mkdir() or (build / "sdf/32/000000.zarr").mkdir(),
            "has no commit marker",
        ),
    ],
)
def test_a_breach_of_the_whole_build_is_found(build, damage, rule):
    damage(build)
    assert any(breach.shard == "" and re.search(rule, breach.rule) for breach in verify(build))


def test_a_sound_build_passes_with_one_and_several_workers(tiny_build):
    assert verify(tiny_build) == verify(tiny_build, workers=2) == []


def test_latents_belong_to_a_build_and_are_not_checked(build):
    (build / "latents/0123456789ab/64/000000.zarr").mkdir(parents=True)
    assert verify(build) == []


@pytest.mark.parametrize(("damage", "code"), [(None, 0), (flip_a_byte, 1)])
def test_exit_code_of_the_command(build, damage, code, monkeypatch, caplog):
    if damage:
        damage(build)
    monkeypatch.setattr(sys, "argv", ["verify", str(build)])
    with pytest.raises(SystemExit) as end:
        command(main)
    assert end.value.code == code
    assert (f"shard {SHARD}: sdf-64" in caplog.text) == bool(code)


def test_another_directory_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="is not a build"):
        verify(tmp_path)
