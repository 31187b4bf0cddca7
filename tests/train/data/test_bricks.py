"""Reading bricks and loading batches: equal for any number of workers, and robust to damage."""

import json
import logging
import shutil
from collections import Counter
from functools import partial
from itertools import pairwise

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from model.sparse_tensor import BrickBatch
from pipeline.core.errors import RunError, UserError
from tests.train.analytic_builds import bricks_of, make_build, shape
from train.data.bricks import BrickLoader, BrickReader, read_build_index
from train.data.thread_safe_cache import ThreadSafeCache
from train.engine.batch_sampler import BatchSampler
from train.engine.prefetch import Prefetcher


def make_stream(build, *, workers=0, rank=0, world_size=1, seed=0, **options):
    index = read_build_index(build, [32, 40]).split("train")
    loader = BrickLoader(index, seed=seed, noise_channels=4, **options)
    sampler = BatchSampler(index.tokens, batch_size=2, world_size=world_size, seed=seed)
    return Prefetcher(sampler, partial(loader.load, rank=rank), workers=workers)


def same(a, b):
    return (
        a.uids == b.uids
        and a.share == b.share
        and a.bricks.resolution == b.bricks.resolution
        and torch.equal(a.bricks.cells.coords, b.bricks.cells.coords)
        and torch.equal(a.bricks.values, b.bricks.values)
        and torch.equal(a.bricks.sharp, b.bricks.sharp)
        and torch.equal(a.noise, b.noise)
    )


def test_the_number_of_workers_does_not_change_batches(build):
    streams = [make_stream(build, workers=workers) for workers in (0, 1, 3)]
    for _ in range(12):
        first, *others = [next(stream) for stream in streams]
        assert all(same(first, other) for other in others)
    assert streams[0].state == streams[1].state == streams[2].state
    for stream in streams:
        stream.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_resumes_at_any_batch(build, workers):
    stream = make_stream(build, workers=workers)
    for position in range(5):
        state = json.loads(json.dumps(stream.state))
        again = make_stream(build, workers=workers)
        again.restore(state)
        expected = next(stream)
        assert same(next(again), expected), position
        again.close()
    stream.restore(state)  # a stream in use can be restored, too
    assert same(next(stream), expected)
    stream.close()


def test_two_ranks_share_the_global_batch_of_one_rank(build):
    """The samples have the same symmetries and noise, and their weights give the same mean."""
    whole = make_stream(build)
    whole.jobs.batch_size = 4
    ranks = [make_stream(build, rank=rank, world_size=2) for rank in range(2)]
    for _ in range(6):
        expected, parts = next(whole), [next(rank) for rank in ranks]
        assert samples(expected) == samples(parts[0]) + samples(parts[1])
        assert sum(part.share * part.samples for part in parts) == pytest.approx(2)
        assert expected.share * expected.samples == pytest.approx(1)


def samples(batch):
    """Count the samples of a batch by their bytes. An asset may come twice, in two epochs."""
    of_asset = [
        batch.noise[batch.bricks.cells.coords[:, 0] == n].numpy() for n in range(batch.samples)
    ]
    bricks = batch.bricks.bricks()
    pairs = zip(batch.uids, bricks, of_asset, strict=True)
    return Counter((uid, one.values.tobytes(), noise.tobytes()) for uid, one, noise in pairs)


def test_symmetries_vary_and_can_be_switched_off(build):
    index = read_build_index(build, [32]).split("train")
    plain = BrickLoader(index, seed=0, noise_channels=4, symmetries=False)
    stored = [BrickBatch.collate([bricks_of(shape(n), 32)]).values for n in range(len(index))]
    for n, expected in enumerate(stored):
        assert torch.equal(plain.load_assets([n], 32).bricks.values, expected)
    sampler = BatchSampler(index.tokens, batch_size=6, world_size=1, seed=0)
    loader = BrickLoader(index, seed=0, noise_channels=4)
    looks = [
        {x.values.tobytes() for x in loader.load(sampler.next(), 0).bricks.bricks()}
        for _ in range(3)
    ]
    assert all(a != b for a, b in pairwise(looks)), "symmetries differ between epochs"


# Build index and damaged data


def test_reads_only_what_is_committed_and_done(tmp_path):
    root = make_build(tmp_path / "build", assets=7, val=1, shard_size=4)
    assert len(read_build_index(root, [32])) == 8
    assert len(read_build_index(root, [32]).split("val")) == 1
    path = root / "manifest" / "000000.parquet"
    table = pq.read_table(path)
    status = ["rejected", *["done"] * 3]
    column = table.column_names.index("status")
    pq.write_table(table.set_column(column, table.schema.field(column), [status]), path)
    assert len(read_build_index(root, [32])) == 7
    (root / "shards" / "000001" / "sdf-32.json").unlink()
    assert [*(read_build_index(root, [32]).tokens[32] > 0)] == [True] * 3 + [False] * 4
    (root / "shards" / "000001" / "manifest.json").unlink()
    assert len(read_build_index(root, [32])) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: shutil.rmtree(root / "manifest"), "not a build with committed shards"),
        (
            lambda root: (root / "manifest" / "000000.parquet").write_bytes(b"PAR1"),
            "not a readable manifest",
        ),
        (lambda root: re_version(root, b"2"), "format_version 2, this code reads 1: rebuild it"),
        (
            lambda root: None,
            r"no bricks at R = 256, only at R = 32; add them: .* --resolutions 32 256",
        ),
    ],
)
def test_unusable_builds_are_refused_in_one_line(tmp_path, change, message):
    root = make_build(tmp_path / "build", assets=2, val=0)
    change(root)
    with pytest.raises(UserError, match=message) as error:
        read_build_index(root, [256])
    assert "\n" not in str(error.value)


def re_version(root, version):
    path = root / "manifest" / "000000.parquet"
    table = pq.read_table(path)
    pq.write_table(table.replace_schema_metadata({b"format_version": version}), path)


def damage(root, resolution=32, shard="000000"):
    """Overwrite the compressed chunk of a shard's values."""
    chunk = next(
        path
        for path in (root / "sdf" / str(resolution) / f"{shard}.zarr" / "values" / "c").rglob("*/0")
    )
    data = bytearray(chunk.read_bytes())
    data[: len(data) // 2] = bytes(len(data) // 2)
    chunk.write_bytes(data)


def test_damaged_assets_are_skipped_counted_and_logged(tmp_path, caplog):
    root = make_build(tmp_path / "build", assets=8, val=0, shard_size=2)
    damage(root)
    index = read_build_index(root, [32])
    loader = BrickLoader(index, seed=0, noise_channels=4)
    sampler = BatchSampler(index.tokens, batch_size=4, world_size=1, seed=0)
    with caplog.at_level(logging.WARNING):
        batches = [loader.load(sampler.next(), 0) for _ in range(6)]
    assert {uid for batch in batches for uid in batch.uids} == set(index.uids[2:])
    assert all(batch.samples == 4 for batch in batches), "unreadable assets are replaced"
    assert loader.bad == {(0, 32), (1, 32)}
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2, "each unreadable asset is logged once"
    assert all("is skipped, shard 000000" in message for message in messages)


def test_too_much_damage_ends_the_run(tmp_path):
    root = make_build(tmp_path / "build", assets=8, val=0, shard_size=8)
    damage(root)
    index = read_build_index(root, [32])
    loader = BrickLoader(index, seed=0, noise_channels=4)
    with pytest.raises(
        RunError, match=r"5 of 5 assets in .* cannot be read, .*python -m pipeline.verify"
    ):
        loader.load_assets([0], 32)


@pytest.mark.parametrize("value", [np.nan, 1.5])
def test_values_out_of_range_are_unreadable(tmp_path, monkeypatch, value):
    root = make_build(tmp_path / "build", assets=2, val=0)
    reader = BrickReader(read_build_index(root, [32]))
    bricks = reader.read(0, 32)
    bricks.values[3, 7] = value
    monkeypatch.setattr("pipeline.storage.sdf_shard.SdfShard.bricks", lambda *_: bricks)
    with pytest.raises(ValueError, match=r"values must be finite and in \[-1, 1\]"):
        reader.read(0, 32)


def test_kept_bricks_are_not_read_again_and_stay_within_their_memory(build, tmp_path):
    copy = shutil.copytree(build, tmp_path / "build")
    index = read_build_index(copy, [32])
    first = BrickReader(index).read(0, 32)
    size = first.cells.nbytes + first.values.nbytes + first.sharp.nbytes
    reader = BrickReader(index, kept_bytes=size)
    before = [reader.read(asset, 32) for asset in (0, 1)]
    shutil.rmtree(copy / "sdf")
    reader._open = ThreadSafeCache(1)
    assert reader.read(0, 32) is before[0]
    with pytest.raises((OSError, ValueError)):  # there was no room for the second asset
        reader.read(1, 32)


def test_kept_bricks_give_the_same_batches(build):
    plain, kept = make_stream(build), make_stream(build, kept_bytes=1 << 30)
    assert all(same(next(plain), next(kept)) for _ in range(12))  # the third epoch of each R
