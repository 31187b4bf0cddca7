"""Planning and loading: balanced, resumable, the same for any number of workers, and not stopped by damage."""

import json
import logging
import shutil
from collections import Counter
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from model.sparse_tensor import BrickBatch
from pipeline.core.errors import RunError, UserError
from tests.train.analytic_builds import bricks_of, make_build, shape
from train.data.bricks import BrickLoader, BrickReader, read_build_index
from train.engine.batch_sampler import BatchSampler
from train.engine.prefetch import Prefetcher


def planner(tokens=None, **options):
    tokens = tokens or {256: np.arange(1, 12) * 10, 384: np.arange(1, 12) * 25}
    return BatchSampler(tokens, **{"batch_size": 2, "world_size": 2, "seed": 0, **options})


def stream_of(build, *, workers=0, rank=0, world_size=1, seed=0, **options):
    index = read_build_index(build, [32, 40]).split("train")
    loader = BrickLoader(index, seed=seed, noise_channels=4, **options)
    plan = BatchSampler(index.tokens, batch_size=2, world_size=world_size, seed=seed)
    return Prefetcher(plan, partial(loader.load, rank=rank), workers=workers)


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


# Planning


def test_every_asset_comes_once_an_epoch_and_a_step_has_one_resolution():
    plan = planner()
    seen = {256: Counter(), 384: Counter()}
    for step in range(60):
        one = plan.next()
        assert one.step == step
        assert [len(rank) > 0 for rank in one.ranks] == [True, True]
        for draw in (draw for rank in one.ranks for draw in rank):
            seen[one.resolution][draw] += 1
    for resolution, draws in seen.items():
        assert set(draws.values()) == {1}, resolution
        epochs = Counter(draw.epoch for draw in draws)
        assert sum(draws.values()) > 44, "several epochs"
        assert all(count == 11 for epoch, count in epochs.items() if epoch < max(epochs))
        orders = [[draw.asset for draw in draws if draw.epoch == epoch] for epoch in (0, 1)]
        assert orders[0] != orders[1]


def test_goes_on_from_its_state():
    plan = planner()
    for _ in range(7):
        plan.next()
    state = json.loads(json.dumps(plan.state))
    expected = [plan.next() for _ in range(20)]
    again = planner()
    again.restore(state)
    assert [again.next() for _ in range(20)] == expected
    assert [planner(seed=1).next() for _ in range(20)] != [planner().next() for _ in range(20)]
    with pytest.raises(UserError, match="trained at R"):
        planner({512: np.ones(3, int)}).restore(state)


def test_ranks_are_balanced():
    rng = np.random.default_rng(0)
    tokens = {512: (2000 * rng.lognormal(1.5, 0.6, 200)).astype(int)}
    plan = planner(tokens, batch_size=4, world_size=8)
    loads = np.array(
        [[sum(tokens[512][d.asset] for d in rank) for rank in plan.next().ranks] for _ in range(50)]
    )
    unequal = (loads.max(1) / loads.mean(1)).mean()
    in_order = [tokens[512][rng.permutation(200)[:32]].reshape(8, 4).sum(1) for _ in range(50)]
    assert unequal < 1.1 < 1.3 < np.mean([load.max() / load.mean() for load in in_order])


def test_a_budget_holds_and_nothing_is_lost():
    tokens = {256: np.array([100, 90, 80, 10, 10, 10, 500])}
    plan = planner(tokens, batch_size=4, world_size=2, max_tokens=150)
    assert plan.left_out == {256: 1}
    seen = Counter()
    for _ in range(40):
        one = plan.next()
        assert all(0 < sum(tokens[256][d.asset] for d in rank) <= 150 for rank in one.ranks)
        seen.update(draw for rank in one.ranks for draw in rank)
    assert set(seen.values()) == {1}
    per_epoch = Counter(draw.epoch for draw in seen)
    assert all(per_epoch[epoch] == 6 for epoch in range(max(per_epoch)))
    with pytest.raises(
        UserError, match="no training asset at R = 256 with at most max_tokens = 5 cells"
    ):
        planner(tokens, max_tokens=5)


def test_a_dataset_smaller_than_a_batch_repeats():
    one = planner({256: np.array([5, 6])}, batch_size=4, world_size=2).next()
    assert sum(map(len, one.ranks)) == 8


# Loading


def test_workers_change_nothing(build):
    streams = [stream_of(build, workers=workers) for workers in (0, 1, 3)]
    for _ in range(12):
        first, *others = [next(stream) for stream in streams]
        assert all(same(first, other) for other in others)
    assert streams[0].state == streams[1].state == streams[2].state
    for stream in streams:
        stream.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_resumes_at_any_batch(build, workers):
    stream = stream_of(build, workers=workers)
    for position in range(5):
        state = json.loads(json.dumps(stream.state))
        again = stream_of(build, workers=workers)
        again.restore(state)
        expected = next(stream)
        assert same(next(again), expected), position
        again.close()
    stream.restore(state)  # also one that is under way
    assert same(next(stream), expected)
    stream.close()


def test_ranks_share_the_global_batch_of_one(build):
    """The same samples, transformed alike, with the same noise, weighted to the same mean."""
    whole = stream_of(build)
    whole.jobs.batch_size = 4
    ranks = [stream_of(build, rank=rank, world_size=2) for rank in range(2)]
    for _ in range(6):
        expected, parts = next(whole), [next(rank) for rank in ranks]
        assert samples(expected) == samples(parts[0]) + samples(parts[1])
        assert sum(part.share * part.samples for part in parts) == pytest.approx(2)
        assert expected.share * expected.samples == pytest.approx(1)


def samples(batch):
    """Each asset of a batch by its bytes; one may come twice, in two epochs."""
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
    plan = BatchSampler(index.tokens, batch_size=6, world_size=1, seed=0)
    loader = BrickLoader(index, seed=0, noise_channels=4)
    looks = [
        {x.values.tobytes() for x in loader.load(plan.next(), 0).bricks.bricks()} for _ in range(3)
    ]
    assert all(a != b for a, b in pairwise(looks)), "other symmetries in other epochs"


# Catalogues and damage


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
def test_other_data_is_refused_in_one_line(tmp_path, change, message):
    root = make_build(tmp_path / "build", assets=2, val=0)
    change(root)
    with pytest.raises(UserError, match=message) as error:
        read_build_index(root, [256])
    assert "\n" not in str(error.value)


def test_a_url_is_refused_with_what_to_do_instead():
    with pytest.raises(UserError, match=r"looks like a URL, but .*; copy the build"):
        read_build_index(Path("s3://bucket/build"), [32])


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


def test_a_damaged_shard_is_skipped_counted_and_said(tmp_path, caplog):
    root = make_build(tmp_path / "build", assets=8, val=0, shard_size=2)
    damage(root)
    index = read_build_index(root, [32])
    loader = BrickLoader(index, seed=0, noise_channels=4)
    plan = BatchSampler(index.tokens, batch_size=4, world_size=1, seed=0)
    with caplog.at_level(logging.WARNING):
        batches = [loader.load(plan.next(), 0) for _ in range(6)]
    assert {uid for batch in batches for uid in batch.uids} == set(index.uids[2:])
    assert all(batch.samples == 4 for batch in batches), (
        "replaced, so that weights and ranks stay as planned"
    )
    assert loader.bad == {(0, 32), (1, 32)}
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2, "said once each"
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
def test_values_out_of_range_are_not_trained_on(tmp_path, monkeypatch, value):
    root = make_build(tmp_path / "build", assets=2, val=0)
    reader = BrickReader(read_build_index(root, [32]))
    bricks = reader.read(0, 32)
    bricks.values[3, 7] = value
    monkeypatch.setattr("pipeline.storage.sdf_shard.SdfShard.bricks", lambda *_: bricks)
    with pytest.raises(ValueError, match=r"values must be finite and in \[-1, 1\]"):
        reader.read(0, 32)


def test_an_exception_comes_out_where_its_batch_would_have(build):
    def load(plan):
        if plan.step == 3:
            raise RunError("step 3")
        return plan.step

    stream = Prefetcher(planner(), load, workers=2)
    assert [next(stream) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(RunError, match="step 3"):
        next(stream)
    stream.close()
