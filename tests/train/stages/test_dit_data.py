"""Batches of the SS-DiT: reproducible samples, dropped images, and the order of reading."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

import pipeline.core.image_codec
from model.checkpoint import load_model
from model.conditioning.image_preprocessing import prepare_image
from model.sparse_tensor import BrickBatch
from model.sparse_vae import SparseVAE
from pipeline.core.errors import UserError
from pipeline.core.hashing import seed_of
from pipeline.storage.render_shard import RenderShard
from tests.train.analytic_builds import color_of
from tests.train.ss_dit_fixtures import VIEWS, config, loader_of, task_of, wake
from train.data.bricks import BrickReader, read_build_index
from train.data.render_conditions import ViewReader, sample_time
from train.data.symmetry import move_bricks
from train.data.thread_safe_cache import ThreadSafeCache
from train.engine.batch_sampler import SampleId, ShardBatchSampler
from train.engine.distributed import World
from train.stages.dit.run import train_dit
from train.stages.vae.config import EncodeConfig
from train.stages.vae.encode import encode


def test_a_sample_is_the_same_in_every_batch(rendered, tmp_path):
    loader = loader_of(config(rendered, tmp_path))
    both, alone = (
        loader.batch([SampleId(1, 3), SampleId(0, 2)], 0.5),
        loader.batch([SampleId(0, 2)], 1.0),
    )
    first = int(both.latents.cells.asset_starts[1])
    assert torch.equal(both.latents.cells.coords[first:, 1:], alone.latents.cells.coords[:, 1:])
    for name in ("noise", "posterior_noise"):
        assert torch.equal(getattr(both, name)[first:], getattr(alone, name)), name
    assert torch.equal(both.latents.mean[first:], alone.latents.mean)
    assert torch.equal(both.times[1:], alone.times)
    assert torch.equal(both.images.pixels[1:], alone.images.pixels)
    assert (both.share, both.samples, both.tokens) == (0.5, 2, len(both.noise))
    again = loader.batch([SampleId(0, 3)], 1.0)
    for name in ("noise", "posterior_noise"):
        assert (getattr(again, name) - getattr(alone, name)).abs().max() > 0.1, name
    assert again.times != alone.times
    assert (alone.noise - alone.posterior_noise).abs().max() > 0.1


def test_latents_and_image_belong_to_the_same_asset(rendered, tmp_path):
    cfg = config(rendered, tmp_path)
    loader = loader_of(replace(cfg, flow=replace(cfg.flow, augment=False)))
    store = loader.store
    for asset in range(4):
        batch = loader.batch([SampleId(asset, 1)], 1.0)
        stored = store.read(batch.uids[0])
        assert {tuple(row) for row in batch.latents.cells.coords[:, 1:].tolist()} == {
            *map(tuple, stored.cells.tolist())
        }
        pixel = batch.images.pixels[0, :, 14, 14]
        number = int(batch.uids[0][-3:])
        assert tuple(pixel.tolist()) == color_of(number, loader.conditions.view_of(asset, 1))


def test_samples_have_one_to_n_views_of_which_the_first_is_that_of_one_view(rendered, tmp_path):
    plain = config(rendered, tmp_path)
    cfg = replace(plain, model=replace(plain.model, views=3))
    one, several = loader_of(plain), loader_of(cfg)
    counts = Counter()
    for epoch, asset in itertools.product(range(40), range(3)):
        batches = [loader.batch([SampleId(asset, epoch)], 1.0) for loader in (one, several)]
        for name in ("noise", "posterior_noise", "times", "dropped"):
            assert torch.equal(getattr(batches[0], name), getattr(batches[1], name)), name
        alone, together = (batch.images for batch in batches)
        assert torch.equal(alone.pixels, together.pixels[:1])
        assert torch.equal(alone.coords, together.coords[: len(alone.coords)])
        counts[len(together.pixels)] += 1
        views = [several.conditions.view_of(asset, epoch, n) for n in range(3)]
        assert sorted(views) == [0, 1, 2]  # the two held-out views are never among them
        assert views[0] == one.conditions.view_of(asset, epoch)
    assert set(counts) == {1, 2, 3}
    assert min(counts.values()) > 20
    # A batch is made of its samples, whatever their numbers of views.
    samples = [SampleId(asset, 7) for asset in range(3)]
    parts = [several.batch([sample], 1.0).images for sample in samples]
    batch = several.batch(samples, 1.0).images
    assert torch.equal(batch.pixels, torch.cat([part.pixels for part in parts]))
    assert batch.starts.diff().tolist() == [len(part.coords) for part in parts]
    for use in ("validation", "held_out"):
        assert len(loader_of(cfg, use=use).batch(samples, 1.0).images.pixels) == 3


def test_one_view_is_augmented_by_the_key_of_its_sample(rendered, tmp_path):
    loader = loader_of(config(rendered, tmp_path))
    conditions = loader.conditions
    batch = loader.batch([SampleId(2, 5)], 1.0)
    key = ("augmentation", loader.cfg.flow.loop.seed, "dit", 32, 5, batch.uids[0])
    expected = prepare_image(
        conditions.views.read(2, conditions.view_of(2, 5)),
        28,
        augmentation=loader.cfg.flow.augmentation,
        rng=np.random.default_rng(seed_of(*key)),
        whole_if_opaque=True,
    )
    assert np.array_equal(batch.images.pixels[0].permute(1, 2, 0), expected.rgb)


def test_more_views_than_there_are_to_train_on_are_refused(rendered, tmp_path):
    cfg = config(rendered, tmp_path)
    loader = loader_of(replace(cfg, model=replace(cfg.model, views=4)))
    with pytest.raises(UserError, match=r"views must be at most 3, .* to train on, got 4"):
        loader.batch([SampleId(0, 0)], 1.0)


def test_the_clean_latents_are_normalised_samples_of_the_posterior(rendered, tmp_path):
    task, loader = task_of(config(rendered, tmp_path)), loader_of(config(rendered, tmp_path))
    batches = [
        loader.batch([SampleId(asset, epoch)], 1.0) for asset in range(6) for epoch in range(25)
    ]
    x0 = torch.cat([task._clean_latents(batch) for batch in batches])
    assert x0.mean(0).abs().max() < 0.08
    assert (x0.std(0) - 1).abs().max() < 0.05
    batch = batches[0]
    z = batch.latents.mean + (batch.latents.logvar / 2).exp() * batch.posterior_noise
    assert torch.allclose(task.model.dit.denormalize(task._clean_latents(batch)), z, atol=1e-5)


def test_a_tenth_of_the_samples_is_trained_without_image(rendered, tmp_path):
    cfg = config(rendered, tmp_path)
    dropped = [
        sample_time(cfg.flow, (0, "dit", 32, n, "some-uid"), training=True)[1] for n in range(4000)
    ]
    assert 0.085 < np.mean(dropped) < 0.115
    loader, samples = loader_of(cfg), [SampleId(0, n) for n in range(30)]
    uid = loader.index.uids[0]
    expected = [
        sample_time(cfg.flow, (0, "dit", 32, sample.epoch, uid), training=True)[1]
        for sample in samples
    ]
    assert sum(expected) > 0
    assert loader.batch(samples, 1.0).dropped.tolist() == expected
    assert not loader_of(cfg, use="validation").batch(samples, 1.0).dropped.any()


def test_a_dropped_image_does_not_influence_the_prediction(rendered, tmp_path):
    task, loader = task_of(config(rendered, tmp_path)), loader_of(config(rendered, tmp_path))
    wake(task.model)
    batch = loader.batch([SampleId(0, 0), SampleId(1, 0)], 1.0)
    black = replace(batch.images, pixels=torch.zeros_like(batch.images.pixels))
    x0 = task._clean_latents(batch)
    for dropped in (torch.tensor([True, False]), torch.tensor([False, False])):
        with_image, with_black = (
            task._errors(task.model, replace(batch, images=images), x0, batch.times, dropped)
            for images in (batch.images, black)
        )
        first = int(batch.latents.cells.asset_starts[1])
        assert torch.equal(with_image[:first], with_black[:first]) == bool(dropped[0])
        assert not torch.equal(with_image[first:], with_black[first:])


def test_a_shard_is_read_view_by_view_and_only_used_images_are_decoded(
    rendered, tmp_path, monkeypatch
):
    cfg = config(rendered, tmp_path)
    loader = loader_of(cfg)
    reads, decoded = Counter(), []
    read_images, decode = RenderShard.read_images, pipeline.core.image_codec.decode
    monkeypatch.setattr(
        RenderShard,
        "read_images",
        lambda self, view: reads.update([(self.path.stem, view)]) or read_images(self, view),
    )
    monkeypatch.setattr(
        pipeline.core.image_codec, "decode", lambda data: decoded.append(1) or decode(data)
    )
    sampler = ShardBatchSampler(
        loader.index.tokens,
        loader.index.shards,
        mixed=1,
        batch_size=2,
        world_size=1,
        seed=0,
    )
    for _ in range(9):  # three epochs over the views that are not held out
        loader.load(sampler.next(), 0)
    assert reads == Counter(
        {(shard, view): 1 for shard in ("000000", "000001") for view in range(VIEWS - 2)}
    )
    assert len(decoded) == 3 * 6


def test_an_epoch_mixes_the_given_number_of_shards(rendered):
    shards = [f"{n // 3}" for n in range(30)]
    sampler = ShardBatchSampler(
        {32: np.arange(30) % 4}, shards, mixed=2, batch_size=1, world_size=1, seed=0
    )
    drawn = [sampler.next().ranks[0][0] for _ in range(2 * 22)]  # every fourth asset has no cells
    orders = []
    for epoch in range(2):
        assets = [sample.asset for sample in drawn if sample.epoch == epoch]
        assert sorted(assets) == [n for n in range(30) if n % 4]
        turns = [shards[asset] for asset in assets]
        positions = {
            shard: [n for n, other in enumerate(turns) if other == shard] for shard in set(turns)
        }
        spans = [max(p) - min(p) for p in positions.values()]
        assert max(spans) < 6, "at most two shards of three assets are mixed"
        assert any(span >= len(p) for span, p in zip(spans, positions.values(), strict=True)), (
            "shards are mixed"
        )
        orders.append(assets)
    assert orders[0] != orders[1]
    sampler.restore({"step": 30, "cursors": {"32": 30}})
    assert [sampler.next().ranks[0][0] for _ in range(14)] == drawn[30:]


def test_a_cached_value_is_made_once_and_few_are_kept():
    made, cache = [], ThreadSafeCache(2)
    for key in (1, 2, 1, 3, 1, 2):
        assert cache.get(key, lambda key=key: made.append(key) or 10 * key) == 10 * key
    assert made == [1, 2, 3, 2]
    with pytest.raises(ZeroDivisionError):
        cache.get(9, lambda: 1 // 0)
    assert cache.get(9, lambda: 7) == 7, "an error is not cached"


def test_random_and_streamed_reading_give_the_same_images(rendered):
    index = read_build_index(rendered[0], [32])
    streamed, single = ViewReader(index, "paper", ahead=2), ViewReader(index, "paper")
    for asset in range(len(index)):
        for view in range(VIEWS):
            assert np.array_equal(streamed.read(asset, view), single.read(asset, view))


def test_facing_views_take_the_latents_of_turned_assets(rendered, tmp_path):
    data, vae = rendered
    latents = tmp_path / "latents"
    options = {"latents": latents, "facing_views": True, "mirrored_views": True}
    cfg = config(rendered, tmp_path / "run", **options)
    encoding = EncodeConfig(
        **{"vae": vae, "data": data, "resolutions": (32,), "latents": latents, "device": "cpu"},
        **{"precision": "fp32", "workers": 1},
    )
    encode(encoding, World())
    with pytest.raises(UserError, match=r"not complete .* train\.encode .* --quarter-turns"):
        loader_of(cfg)
    encode(replace(encoding, quarter_turns=True), World())
    loader = loader_of(cfg)
    reader = BrickReader(read_build_index(data, [32]).split("train"))
    model = load_model(vae, SparseVAE)
    seen = set()
    for asset, epoch in itertools.product(range(2), range(4)):
        batch = loader.batch([SampleId(asset, epoch)], 1.0)
        key = (cfg.flow.loop.seed, "dit", 32, epoch, batch.uids[0])
        symmetry = loader.conditions.symmetry(asset, epoch, key)
        bricks, points = move_bricks(reader.read(asset, 32), symmetry)
        with torch.no_grad():
            expected = model.encode(BrickBatch.collate([bricks], [points]))
        assert torch.equal(batch.latents.cells.coords, expected.level.coords)
        torch.testing.assert_close(batch.latents.mean, expected.mean, rtol=2e-3, atol=2e-3)
        seen.add(symmetry)
    assert len(seen) > 2
    loop = {"steps": 1, "sample_every": 1}
    train_dit(config(rendered, tmp_path / "run", loop=loop, **options), World())
    assert (tmp_path / "run" / "samples" / "step-00000001" / "contact.png").exists()
