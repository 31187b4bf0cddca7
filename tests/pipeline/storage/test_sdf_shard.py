"""SDF shards: bytes equal to Zarr's own, reading by asset, and checks that name problems."""

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import zarr

from pipeline.core.provenance import FORMAT_VERSION
from pipeline.core.schema import Bricks
from pipeline.storage.sdf_shard import (
    ArrayWriter,
    SdfShard,
    brick_problems,
    check_sdf_shard,
    write_sdf_shard,
)

RESOLUTION = 128


def random_bricks(tokens, seed=0, resolution=RESOLUTION):
    rng = np.random.default_rng(seed)
    side = resolution // 8
    keys = np.sort(rng.choice(side**3, tokens, replace=False))
    cells = np.stack(np.unravel_index(keys, (side,) * 3), axis=1).astype(np.int16)
    values = rng.uniform(-0.99, 0.99, (tokens, 512)).astype(np.float16)
    sharp = rng.integers(0, 256, (tokens, 64)).astype(np.uint8)
    return Bricks(resolution=resolution, cells=cells, values=values, sharp=sharp)


def files(path):
    return {
        child.relative_to(path): child.read_bytes() for child in path.rglob("*") if child.is_file()
    }


# A chunk has 1024 rows. The assets end below, at and beyond chunk borders.
ASSETS = [
    (f"test-{seed}", random_bricks(tokens, seed))
    for seed, tokens in enumerate([1, 1000, 23, 500, 1100, 1])
]


@pytest.fixture
def shard(tmp_path):
    path = tmp_path / "000000.zarr"
    assert write_sdf_shard(path, RESOLUTION, iter(ASSETS), "hash") == 2625
    return path


def test_every_asset_comes_back_by_row_and_by_uid(shard):
    reader = SdfShard(shard)
    assert reader.uids == [uid for uid, _ in ASSETS]
    for row, (uid, bricks) in enumerate(ASSETS):
        assert reader.tokens(uid) == len(bricks.cells)
        for got in (reader.bricks(row), reader.bricks(uid)):
            assert got.resolution == RESOLUTION
            for name in ("cells", "values", "sharp"):
                np.testing.assert_array_equal(
                    getattr(got, name), getattr(bricks, name), strict=True
                )
    assert check_sdf_shard(shard, reader.uids) == []


def test_the_files_are_those_that_zarr_itself_writes(shard, tmp_path):
    """Zarr's own writer, which gets the whole arrays, is an independent writer of the format."""
    ours = zarr.open_group(shard, mode="r")
    theirs = zarr.create_group(tmp_path / "zarr", zarr_format=3, attributes=dict(ours.attrs))
    for name, width in (("blocks", 2), ("values", 2), ("sharp", 1), ("offsets", 8)):
        array = ours[name]
        copy = theirs.create_array(
            name,
            shape=array.shape,
            dtype=array.dtype,
            chunks=(1024, *array.shape[1:]),
            shards=(-(-array.shape[0] // 1024) * 1024, *array.shape[1:]),
            compressors=zarr.codecs.BloscCodec(
                cname="zstd", clevel=5, shuffle="shuffle", typesize=width
            ),
        )
        copy[:] = array[:]
    assert files(tmp_path / "zarr") == files(shard)


def test_each_array_is_one_file_and_the_attributes_describe_the_grid(shard):
    assert sorted(str(name) for name in files(shard)) == sorted(
        ["zarr.json"]
        + [
            f"{name}/{file}"
            for name in ("blocks", "values", "sharp")
            for file in ("zarr.json", "c/0/0")
        ]
        + ["offsets/zarr.json", "offsets/c/0"]
    )
    assert dict(zarr.open_group(shard, mode="r").attrs) == {
        "format_version": FORMAT_VERSION,
        "resolution": 128,
        "tau": 2 / 128,
        "block_size": 8,
        "origin": -0.5,
        "spacing": 1 / 127,
        "uids": [uid for uid, _ in ASSETS],
        "config_hash": "hash",
    }


def test_the_same_assets_give_the_same_bytes(shard, tmp_path):
    write_sdf_shard(tmp_path / "again.zarr", RESOLUTION, ASSETS, "hash")
    assert files(tmp_path / "again.zarr") == files(shard)


def test_a_shard_without_assets_is_sound(tmp_path):
    write_sdf_shard(tmp_path / "none.zarr", RESOLUTION, [], "hash")
    assert len(SdfShard(tmp_path / "none.zarr")) == 0
    assert check_sdf_shard(tmp_path / "none.zarr", []) == []


def test_writing_holds_one_chunk_in_memory(tmp_path):
    zarr.create_group(tmp_path / "a", zarr_format=3)
    writer = ArrayWriter(tmp_path / "a", "values", np.float16, (512,))
    rows = np.zeros((512, 512), np.float16)
    tracemalloc.start()
    for _ in range(100):  # 52 MB
        writer.append(rows)
    writer.close()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8e6


def test_dense_places_every_point(tmp_path):
    values = np.linspace(-1, 1, 1024).astype(np.float16).reshape(2, 512)
    bricks = Bricks(
        resolution=16,
        cells=np.array([[0, 0, 1], [1, 0, 0]], np.int16),
        values=values,
        sharp=np.zeros((2, 64), np.uint8),
    )
    write_sdf_shard(tmp_path / "s.zarr", 16, [("a", bricks)], "hash")
    dense = SdfShard(tmp_path / "s.zarr").dense("a")
    assert np.isfinite(dense).sum() == 1024
    assert dense[1, 2, 8 + 3] == values[0, 64 * 1 + 8 * 2 + 3]
    assert dense[8 + 7, 6, 5] == values[1, 64 * 7 + 8 * 6 + 5]


def test_another_format_version_is_refused_with_a_reason(shard):
    zarr.open_group(shard, mode="r+").update_attributes({"format_version": FORMAT_VERSION + 1})
    with pytest.raises(
        ValueError, match=f"format_version {FORMAT_VERSION}, got {FORMAT_VERSION + 1}"
    ):
        SdfShard(shard)


def test_another_directory_is_refused(tmp_path):
    with pytest.raises(ValueError, match="must be an SDF shard"):
        SdfShard(tmp_path)


def test_another_resolution_and_a_repeated_uid_are_refused(tmp_path):
    with pytest.raises(ValueError, match="resolution 128"):
        write_sdf_shard(tmp_path / "a", 128, [("a", random_bricks(3, resolution=64))], "hash")
    with pytest.raises(ValueError, match="new uid"):
        write_sdf_shard(
            tmp_path / "b", 128, [("a", random_bricks(3)), ("a", random_bricks(3))], "hash"
        )


def changed(**arrays):
    return replace(random_bricks(50), **arrays)


def edited(name, place, value):
    array = getattr(random_bricks(50), name).copy()
    array[place] = value
    return changed(**{name: array})


BAD_BRICKS = {
    "cells are not in x, y, z order": changed(cells=random_bricks(50).cells[::-1].copy()),
    "duplicate cells": changed(cells=np.repeat(random_bricks(50).cells[::2], 2, axis=0)),
    "outside 0..15": edited("cells", 49, 16),
    "values are not finite": edited("values", (3, 7), np.nan),
    "values are outside [-1, 1]": edited("values", (3, 7), 1.5),
    "without an active point": changed(
        values=np.ones((50, 512), np.float16), sharp=np.zeros((50, 64), np.uint8)
    ),
    "sharp points that are not active": edited("values", slice(3), -1),
    "has no cells": random_bricks(0),
}


@pytest.mark.parametrize("rule", BAD_BRICKS)
def test_a_check_names_the_asset_and_the_rule(tmp_path, rule):
    write_sdf_shard(
        tmp_path / "s.zarr",
        RESOLUTION,
        [("good", random_bricks(9)), ("bad", BAD_BRICKS[rule])],
        "hash",
    )
    problems = check_sdf_shard(tmp_path / "s.zarr")
    assert all(problem.startswith("bad: ") for problem in problems)
    assert any(rule in problem for problem in problems)


def test_points_that_rounding_made_inactive_are_accepted(tmp_path):
    """A layer of sharp points at 0.9999 tau is stored as 1.

    The last cell has no other active point.
    """
    values = np.full((3, 8, 8, 8), 1, np.float16)
    values[:2, :, :, :5] = 0.5  # cells 0 and 1 along z; the points of cell 2 look inactive
    sharp = np.zeros((3, 8, 8, 8), bool)
    sharp[:2, :, :, 5] = True
    bricks = Bricks(
        resolution=RESOLUTION,
        cells=np.array([[3, 3, 0], [3, 3, 1], [3, 3, 2]], np.int16),
        values=values.reshape(3, 512),
        sharp=np.packbits(sharp.reshape(3, 512), axis=1, bitorder="little"),
    )
    assert list(brick_problems(bricks)) == []
    far = replace(bricks, cells=np.array([[3, 3, 0], [3, 3, 1], [3, 3, 3]], np.int16))
    assert list(brick_problems(far)) == ["has 1 cells without an active point"]
    sharp[:2, 4, 4, 5] = False
    sharp[:2, 4, 4, 6] = True  # two points away from any active one
    deep = replace(bricks, sharp=np.packbits(sharp.reshape(3, 512), axis=1, bitorder="little"))
    assert list(brick_problems(deep)) == ["has 2 sharp points that are not active"]


@pytest.mark.parametrize(
    ("attributes", "rule"),
    [
        ({"tau": 0.5}, "tau"),
        ({"origin": 0}, "origin"),
        ({"config_hash": None}, "config_hash"),
        ({"uids": ["a"] * 6}, "occurs twice"),
        ({"uids": ["a"]}, "offsets must be"),
    ],
)
def test_a_check_compares_attributes(shard, attributes, rule):
    zarr.open_group(shard, mode="r+").update_attributes(attributes)
    assert any(rule in problem for problem in check_sdf_shard(shard))


def test_a_check_finds_decreasing_offsets_and_other_assets(shard):
    assert any("manifest" in problem for problem in check_sdf_shard(shard, ["test-0"]))
    zarr.open_group(shard, mode="r+")["offsets"][1] = 2000
    assert any(
        "offsets must begin with 0 and must not decrease" in problem
        for problem in check_sdf_shard(shard)
    )


def test_a_check_reports_a_chunk_that_cannot_be_decoded(shard):
    path = shard / "values" / "c" / "0" / "0"
    data = bytearray(path.read_bytes())
    data[40:4000] = bytes(3960)
    path.write_bytes(data)
    assert any("unreadable" in problem for problem in check_sdf_shard(shard))
