"""Training the SS-DiT: batches that depend on names alone, the shards' order, learning, resuming, what is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

import pipeline.render
from model.checkpoint import save_model
from model.condition import DinoEncoder, EncoderConfig
from model.conditioned import ConditionedConfig, ConditionedDiT
from model.dit import DiTConfig
from model.flow import Guidance
from model.sparse import BrickBatch
from model.vae import SparseVAE
from pipeline.isosurface import extract
from pipeline.schema import RunError, UserError
from pipeline.shards import RenderShard
from tests.train.builds import TINY, add_renders, color_of, ellipsoid, make_build, tiny_training
from tests.train.test_distributed import ENVIRONMENT, ROOT, torchrun
from train import checkpoint
from train.conditions import FlowOptions, Once, ViewReader, time_of
from train.config import LoopConfig
from train.data import BrickReader, read_catalogue
from train.distributed import World
from train.dit import main, read_latents, train
from train.dit_config import DIT_PRESETS, DiTTraining
from train.dit_data import DiTLoader, joined
from train.dit_task import DiTTask
from train.encode import Encoding, encode
from train.encode import main as encode_main
from train.export import read_stage
from train.plan import Draw, ShardPlanner
from train.surfaces import compare_surfaces
from train.vae import main as vae_main
from train.vae import train as train_vae

torch.set_num_threads(1)
VIEWS = 5
MODEL = ConditionedConfig(
    dit=DiTConfig(channels=32, blocks=2, heads=2, kv_heads=1, mlp_ratio=2, condition_channels=16),
    encoder=EncoderConfig(kind="stand-in", image_size=28, channels=16, layers=1, heads=2),
)


def make_vae(path, seed=0):
    """A checkpoint of random weights."""
    torch.manual_seed(seed)
    vae = SparseVAE(TINY)
    for parameter in vae.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    save_model(path, vae, TINY)
    return path


def encode_with(vae, data):
    encode(Encoding(vae=vae, data=data, resolutions=(32,), device="cpu", precision="fp32", workers=1), World())


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """(build with renders and latents, the VAE of its latents)."""
    root = make_build(tmp_path_factory.mktemp("rendered"), assets=6, val=2, shard_size=4)
    add_renders(root, VIEWS)
    vae = make_vae(tmp_path_factory.mktemp("vae") / "export")
    encode_with(vae, root)
    return root, vae


def config(build, out, *, steps=4, loop=None, **options):
    data, vae = build
    defaults = {
        "steps": steps, "precision": "fp32", "warmup_steps": 2, "log_every": 100, "checkpoint_every": 2,
        "validate_every": 0, "sample_every": 0, "learning_rate": 3e-3, "ema_decay": 0.9,
    }  # fmt: skip
    flow = FlowOptions(batch_size=3, steps=2, open_shards=1, loop=LoopConfig(**{**defaults, **(loop or {})}))
    chosen = {"device": "cpu", "resolution": 32, "held_out_views": 2, "workers": 2, "samples": 1, "model": MODEL}
    return DiTTraining(**{"data": data, "vae": vae, "out": out, "flow": flow, **chosen, **options})


def loader_of(cfg, split="train", **options):
    _, store = read_latents(cfg, World())
    return DiTLoader(joined(cfg, store).split(split), store, cfg, **options)


def task_of(cfg):
    vae, store = read_latents(cfg, World())
    catalogue = joined(cfg, store)
    return DiTTask(cfg, World(), catalogue.split("train"), catalogue.split("val"), store, vae)


def metrics(path, event=None):
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row.get("event") == event]


def read_ply(path):
    """What train.pictures.write_ply wrote."""
    header, _, body = path.read_bytes().partition(b"end_header\n")
    counts = [int(line.split()[-1]) for line in header.decode().splitlines() if line.startswith("element")]
    vertices = np.frombuffer(body, "<f4", 3 * counts[0]).reshape(-1, 3)
    rows = np.frombuffer(body, np.dtype([("count", "u1"), ("corners", "<i4", (3,))]), offset=12 * counts[0])
    return vertices, rows["corners"]


def wake(model):
    """The output layers start at zero, through which neither image nor latent is felt."""
    torch.manual_seed(5)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)


# Batches


def test_a_sample_is_the_same_in_every_batch(build, tmp_path):
    loader = loader_of(config(build, tmp_path))
    both, alone = loader.batch([Draw(1, 3), Draw(0, 2)], 0.5), loader.batch([Draw(0, 2)], 1.0)
    first = int(both.latents.cells.asset_starts[1])
    assert torch.equal(both.latents.cells.coords[first:, 1:], alone.latents.cells.coords[:, 1:])
    for name in ("noise", "posterior_noise"):
        assert torch.equal(getattr(both, name)[first:], getattr(alone, name)), name
    assert torch.equal(both.latents.mean[first:], alone.latents.mean)
    assert torch.equal(both.times[1:], alone.times)
    assert torch.equal(both.images.pixels[1:], alone.images.pixels)
    assert (both.share, both.samples, both.tokens) == (0.5, 2, len(both.noise))
    again = loader.batch([Draw(0, 3)], 1.0)
    for name in ("noise", "posterior_noise"):
        assert (getattr(again, name) - getattr(alone, name)).abs().max() > 0.1, name
    assert again.times != alone.times
    assert (alone.noise - alone.posterior_noise).abs().max() > 0.1


def test_latents_and_image_are_of_one_asset(build, tmp_path):
    cfg = config(build, tmp_path)
    loader = loader_of(replace(cfg, flow=replace(cfg.flow, augment=False)))
    store = loader.store
    for asset in range(4):
        batch = loader.batch([Draw(asset, 1)], 1.0)
        stored = store.read(batch.uids[0])
        assert {tuple(row) for row in batch.latents.cells.coords[:, 1:].tolist()} == {
            *map(tuple, stored.cells.tolist())
        }
        pixel = batch.images.pixels[0, :, 14, 14]
        number = int(batch.uids[0][-3:])
        assert tuple(pixel.tolist()) == color_of(number, loader.conditions.view_of(asset, 1))


def test_the_flow_starts_at_samples_of_the_posterior_with_unit_statistics(build, tmp_path):
    task, loader = task_of(config(build, tmp_path)), loader_of(config(build, tmp_path))
    batches = [loader.batch([Draw(asset, epoch)], 1.0) for asset in range(6) for epoch in range(25)]
    x0 = torch.cat([task._start(batch) for batch in batches])
    assert x0.mean(0).abs().max() < 0.08
    assert (x0.std(0) - 1).abs().max() < 0.05
    batch = batches[0]
    z = batch.latents.mean + (batch.latents.logvar / 2).exp() * batch.posterior_noise
    assert torch.allclose(task.model.dit.denormalize(task._start(batch)), z, atol=1e-5)


def test_a_tenth_is_trained_without_image(build, tmp_path):
    cfg = config(build, tmp_path)
    dropped = [time_of(cfg.flow, (0, "dit", 32, n, "some-uid"), training=True)[1] for n in range(4000)]
    assert 0.085 < np.mean(dropped) < 0.115
    loader, draws = loader_of(cfg), [Draw(0, n) for n in range(30)]
    uid = loader.catalogue.uids[0]
    expected = [time_of(cfg.flow, (0, "dit", 32, draw.epoch, uid), training=True)[1] for draw in draws]
    assert sum(expected) > 0
    assert loader.batch(draws, 1.0).dropped.tolist() == expected
    assert not loader_of(cfg, training=False).batch(draws, 1.0).dropped.any()


def test_what_is_dropped_does_not_see_its_image(build, tmp_path):
    task, loader = task_of(config(build, tmp_path)), loader_of(config(build, tmp_path))
    wake(task.model)
    batch = loader.batch([Draw(0, 0), Draw(1, 0)], 1.0)
    black = replace(batch.images, pixels=torch.zeros_like(batch.images.pixels))
    x0 = task._start(batch)
    for dropped in (torch.tensor([True, False]), torch.tensor([False, False])):
        ours, theirs = (
            task._errors(task.model, replace(batch, images=images), x0, batch.times, dropped)
            for images in (batch.images, black)
        )
        first = int(batch.latents.cells.asset_starts[1])
        assert torch.equal(ours[:first], theirs[:first]) == bool(dropped[0])
        assert not torch.equal(ours[first:], theirs[first:])


# The order of the shards


def test_a_shard_is_read_view_by_view_and_only_what_is_used_is_decoded(build, tmp_path, monkeypatch):
    cfg = config(build, tmp_path)
    loader = loader_of(cfg)
    reads, decoded = Counter(), []
    read_images, decode = RenderShard.read_images, pipeline.render.decode
    monkeypatch.setattr(
        RenderShard, "read_images", lambda self, view: reads.update([(self.path.stem, view)]) or read_images(self, view)
    )
    monkeypatch.setattr(pipeline.render, "decode", lambda data: decoded.append(1) or decode(data))
    planner = ShardPlanner(
        loader.catalogue.tokens, loader.catalogue.shards, mixed=1, batch_size=2, world_size=1, seed=0
    )
    for _ in range(9):  # three epochs: of the views that may be seen
        loader.load(planner.next(), 0)
    assert reads == Counter({(shard, view): 1 for shard in ("000000", "000001") for view in range(VIEWS - 2)})
    assert len(decoded) == 3 * 6


def test_an_epoch_takes_shards_in_turn(build):
    shards = [f"{n // 3}" for n in range(30)]
    planner = ShardPlanner({32: np.arange(30) % 4}, shards, mixed=2, batch_size=1, world_size=1, seed=0)
    drawn = [planner.next().ranks[0][0] for _ in range(2 * 22)]  # every fourth has no cells
    orders = []
    for epoch in range(2):
        assets = [draw.asset for draw in drawn if draw.epoch == epoch]
        assert sorted(assets) == [n for n in range(30) if n % 4]
        turns = [shards[asset] for asset in assets]
        positions = {shard: [n for n, other in enumerate(turns) if other == shard] for shard in set(turns)}
        together = [max(p) - min(p) for p in positions.values()]
        assert max(together) < 6, "two shards of three are mixed"
        assert any(span >= len(p) for span, p in zip(together, positions.values(), strict=True)), "mixed"
        orders.append(assets)
    assert orders[0] != orders[1]
    planner.restore({"step": 30, "cursors": {"32": 30}})
    assert [planner.next().ranks[0][0] for _ in range(14)] == drawn[30:]


def test_once_is_made_once_and_few_are_kept():
    made, once = [], Once(2)
    for key in (1, 2, 1, 3, 1, 2):
        assert once.get(key, lambda key=key: made.append(key) or 10 * key) == 10 * key
    assert made == [1, 2, 3, 2]
    with pytest.raises(ZeroDivisionError):
        once.get(9, lambda: 1 // 0)
    assert once.get(9, lambda: 7) == 7, "an error is not kept"


# Steps


def test_steps_on_one_batch_lower_its_loss_the_same_way_every_time(build, tmp_path):
    losses = []
    for _ in range(2):
        task = task_of(config(build, tmp_path))
        batch = loader_of(config(build, tmp_path)).batch([Draw(0, 0), Draw(1, 0)], 0.5)
        optimizer, found = torch.optim.SGD(task.model.parameters(), lr=0.05), []
        for _ in range(4):
            loss = task.losses(task.model, batch)["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        losses.append(found)
    assert losses[0] == losses[1]
    assert all(later < earlier for earlier, later in zip(losses[0], losses[0][1:], strict=False))


def test_the_loss_weighs_assets_alike_and_ranks_add_up(build, tmp_path):
    task, loader = task_of(config(build, tmp_path)), loader_of(config(build, tmp_path))
    wake(task.model)
    draws = [Draw(0, 0), Draw(3, 1), Draw(5, 0)]
    whole = task.losses(task.model, loader.batch(draws, 1 / 3))["loss"]
    ranks = [task.losses(task.model, loader.batch(part, 2 / 3))["loss"] for part in (draws[:1], draws[1:])]
    torch.testing.assert_close(sum(ranks) / 2, whole)
    alone = []
    for draw in draws:
        batch = loader.batch([draw], 1.0)
        alone.append(task._errors(task.model, batch, task._start(batch), batch.times, batch.dropped).mean())
    torch.testing.assert_close(torch.stack(alone).mean(), whole)


def test_a_checkpoint_says_what_export_needs(build, tmp_path):
    cfg = config(build, tmp_path / "run", loop={"steps": 2, "validate_every": 2, "sample_every": 2})
    assert train(cfg, World()) == 2
    found = checkpoint.latest(cfg.out)
    model, training = read_stage(found, ConditionedDiT)
    _, store = read_latents(cfg, World())
    assert (training["resolution"], training["vae"]) == (32, store.vae)
    assert model.config == MODEL
    assert torch.equal(model.dit.latent_mean, store.mean)
    assert torch.equal(model.dit.latent_std, store.std)
    assert metrics(cfg.out, "validation")[0]["loss"] > 0
    folder = cfg.out / "samples" / "step-00000002"
    numbers = json.loads((folder / "iou.json").read_text())
    assert set(numbers) == {"held_out_views", "held_out_assets"}
    assert Image.open(folder / "contact.png").size == (3 * 256, 2 * 256)
    assert len(list(folder.glob("*.ply"))) == 2


def weights(out, name="model"):
    return safetensors.torch.load_file(checkpoint.latest(out) / f"{name}.safetensors")


def test_resumes_to_the_bit_between_checkpoints_and_in_the_middle_of_a_shard(build, tmp_path, monkeypatch):
    whole, cut = config(build, tmp_path / "whole", steps=7), config(build, tmp_path / "cut", steps=7, workers=0)
    train(whole, World())
    original, calls = DiTTask.losses, []

    def dies(self, model, batch):
        calls.append(batch.uids)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return original(self, model, batch)

    monkeypatch.setattr(DiTTask, "losses", dies)
    with pytest.raises(KeyboardInterrupt):
        train(cut, World())
    assert checkpoint.latest(cut.out).name == "step-00000004"
    train(cut, World())
    assert calls[6:8] == calls[4:6], "the stream went on after the last checkpoint"
    for name in ("model", "ema"):
        ours, theirs = weights(cut.out, name), weights(whole.out, name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), name
    assert [row["loss"] for row in metrics(cut.out)] == [row["loss"] for row in metrics(whole.out)]


def test_a_stage_starts_from_the_one_before_with_statistics_of_its_own(build, tmp_path):
    first = config(build, tmp_path / "first", steps=3)
    train(first, World())
    data = tmp_path / "other"
    shutil.copytree(build[0], data)
    stats = next(data.glob("latents/*/32/stats.json"))
    described = json.loads(stats.read_text())
    stats.write_text(json.dumps({**described, "std": [2 * x for x in described["std"]]}))
    seen = []

    class Seen(DiTTask):
        def losses(self, model, batch):
            seen.append({name: x.detach().clone() for name, x in self.model.state_dict().items()})
            return super().losses(model, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.dit.DiTTask", Seen)
        train(config((data, build[1]), tmp_path / "second", steps=1, init=first.out / "latest"), World())
    average = weights(first.out, "ema")
    for name, tensor in seen[0].items():
        factor = 2 if name == "dit.latent_std" else 1
        torch.testing.assert_close(tensor, factor * average[name], msg=name)
    with pytest.raises(UserError, match="does not exist; train it first"):
        main(["--init", str(tmp_path / "nowhere")])


def test_a_frozen_encoder_is_neither_trained_nor_kept(build, tmp_path):
    DinoEncoder.random(channels=16, image_size=28).model.save_pretrained(tmp_path / "dino")
    frozen = EncoderConfig(kind="dinov2", weights=str(tmp_path / "dino"), image_size=28, channels=16)
    cfg = config(build, tmp_path / "run", steps=2, model=replace(MODEL, encoder=frozen))
    train(cfg, World())
    assert {name.partition(".")[0] for name in weights(cfg.out)} == {"dit"}
    described = json.loads((checkpoint.latest(cfg.out) / "config.json").read_text())
    assert described["config"]["encoder"]["kind"] == "dinov2"


# What is refused


def test_latents_that_are_missing_or_of_another_vae(build, tmp_path):
    data = tmp_path / "build"
    shutil.copytree(build[0], data)
    (folder,) = (data / "latents").iterdir()
    other = make_vae(tmp_path / "other", 1)
    with pytest.raises(UserError, match=rf"has latents of VAE {folder.name} at R = 32, not of .*; make them: python"):
        train(config((data, other), tmp_path / "run"), World())
    with pytest.raises(UserError, match=r"has no latents at R = 64; make them: python -m train.encode"):
        train(config((data, build[1]), tmp_path / "run", resolution=64), World())
    shutil.rmtree(folder / "32" / "000001.zarr")
    with pytest.raises(
        UserError,
        match=r"4 of 8 assets of .* have no latents in .*, analytic-0+4 for one; make them: python -m train.enc",
    ):
        train(config((data, build[1]), tmp_path / "run"), World())
    cfg = config((data, build[1]), tmp_path / "run", max_missing_share=0.5)
    assert len(joined(cfg, read_latents(cfg, World())[1])) == 4
    with pytest.raises(UserError, match="nowhere does not exist; name the VAE that made the latents"):
        train(config((data, tmp_path / "nowhere"), tmp_path / "run"), World())
    wide = replace(MODEL, dit=replace(MODEL.dit, latent_channels=8))
    with pytest.raises(UserError, match="latent_channels must be the 16 channels of"):
        train(config(build, tmp_path / "run", model=wide), World())
    assert not (tmp_path / "run").exists()


def test_renders_that_are_missing_or_damaged(build, tmp_path):
    data = tmp_path / "build"
    shutil.copytree(build[0], data)
    tar = data / "renders" / "paper" / "000000.tar"
    tar.write_bytes(tar.read_bytes()[:3000])
    cfg = config((data, build[1]), tmp_path / "run")
    with pytest.raises(RunError, match=r"view \d of analytic-.* in shard 000000: .* run python -m pipeline.verify"):
        train(cfg, World())
    (data / "shards" / "000000" / "renders-paper.json").unlink()
    with pytest.raises(
        UserError, match=r"no renders of cameras paper in shard 000000; add them: python -m pipeline.build"
    ):
        train(cfg, World())
    with pytest.raises(UserError, match="held_out_views must be below the 5 views there are, got 5"):
        train(config(build, tmp_path / "held", held_out_views=5), World())


def test_random_and_streamed_reading_agree(build):
    catalogue = read_catalogue(build[0], [32])
    streamed, single = ViewReader(catalogue, "paper", ahead=2), ViewReader(catalogue, "paper")
    for asset in range(len(catalogue)):
        for view in range(VIEWS):
            assert np.array_equal(streamed.read(asset, view), single.read(asset, view))


def test_missing_image_encoder_says_what_to_run(build, tmp_path):
    model = ConditionedConfig(
        dit=replace(MODEL.dit, condition_channels=1024), encoder=EncoderConfig(weights=str(tmp_path / "nowhere"))
    )
    cfg = config(build, tmp_path, model=model)
    with pytest.raises(UserError, match=r"run `hf download facebook/dinov2-with-registers-large"):
        train(cfg, World())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--resolution", "36"], "resolution must be a positive multiple of 8"),
        (["--max-tokens", "0"], "max_tokens must be 1 or more"),
        (["--max-missing-share", "2"], r"max_missing_share must be in \[0, 1\)"),
        (["--workers", "-1"], "workers must be 0 or more"),
        (["--flow.dropout", "1"], r"dropout must be in \[0, 1\)"),
        (["--flow.open-shards", "0"], "open_shards must be 1 or more"),
        (["--preset", "2048"], "invalid choice '2048'"),
        (["--flow.lop", "3"], "unknown option --flow.lop"),
    ],
)
def test_bad_options_in_one_line(arguments, message):
    with pytest.raises(UserError, match=message):
        main(arguments)


def test_presets_are_the_papers_schedule():
    table = {"256": (1e-4, 8, None), "384": (1e-4, 8, "256"), "512": (5e-5, 8, "384"), "1024": (2e-5, 2, "512")}
    for name, (rate, batch, before) in table.items():  # paper, sec. 4
        preset = DIT_PRESETS[name]
        assert (preset.flow.loop.learning_rate, preset.flow.batch_size) == (rate, batch)
        assert preset.init == (None if before is None else DIT_PRESETS[before].out / "latest")
        assert (preset.resolution, preset.model) == (int(name), ConditionedConfig())
        assert (preset.flow.dropout, preset.flow.times.kind) == (0.1, "logit_normal")
    assert all(preset.preset == name for name, preset in DIT_PRESETS.items())
    assert {name for name, p in DIT_PRESETS.items() if p.model.encoder.kind == "stand-in"} == {"tiny", "small"}


# Learning, and dying


def ball(number):
    """Four balls within the same eight cells, so that the image alone says which one it is."""
    return ellipsoid((0.05 * (-1) ** number, 0.05 * (-1) ** (number // 2), 0), [0.12] * 3)


@pytest.mark.slow
def test_the_image_says_which_shape(tmp_path):
    data = make_build(tmp_path / "build", assets=4, val=0, field=ball)
    add_renders(data, VIEWS)
    options = {"learning_rate": 3e-3, "ema_decay": 0.95, "checkpoint_every": 1000, "schedule": "cosine"}
    vae = tiny_training(data, tmp_path / "vae", steps=500, batch_size=4, symmetries=False, **options)
    train_vae(vae, World())
    encode_with(vae.out / "latest", data)
    model = ConditionedConfig(dit=replace(MODEL.dit, channels=64, heads=4, kv_heads=2, blocks=3), encoder=MODEL.encoder)
    loop = {**options, "warmup_steps": 20}
    cfg = config((data, vae.out / "latest"), tmp_path / "dit", steps=400, loop=loop, model=model)
    cfg = replace(cfg, flow=replace(cfg.flow, batch_size=8, augment=False))
    train(cfg, World())
    dit, _ = read_stage(checkpoint.latest(cfg.out), ConditionedDiT)
    decoder, _ = read_latents(cfg, World())
    loader = loader_of(cfg, training=False, held_out_only=True)  # views that training never saw
    batch = loader.batch([Draw(asset, 0) for asset in range(4)], 1.0)
    level = batch.latents.cells
    assert level.asset_starts.tolist() == [0, 8, 16, 24, 32]
    assert torch.equal(level.coords[:8, 1:], level.coords[24:, 1:])
    with torch.no_grad():
        z = dit.generate(level, dit.condition(batch.images), [1, 2, 3, 4], steps=12, guidance=Guidance(scale=2.0))
        found = decoder.decode(z, level).view(4, -1) < 0
    bricks = [BrickReader(loader.catalogue).read(asset, 32) for asset in range(4)]
    right = BrickBatch.collate(bricks).values.view(4, -1) < 0
    shared = (found[:, None] & right).sum(2) / (found[:, None] | right).sum(2)
    assert shared.argmax(1).tolist() == [0, 1, 2, 3]
    assert shared.diagonal().min() > 0.8, shared


@pytest.mark.slow
def test_a_killed_rank_is_started_again_and_goes_on_from_the_last_checkpoint(build, tmp_path):
    outputs = {}
    for name, step in (("whole", 0), ("killed", 6)):
        options = {
            "--data": build[0], "--vae": build[1], "--out": tmp_path / name, "--resolution": 32, "--samples": 0,
            "--model.dit.channels": 32, "--model.dit.heads": 2, "--model.dit.kv-heads": 1, "--model.dit.blocks": 1,
            "--flow.batch-size": 2, "--flow.loop.steps": 8, "--flow.loop.checkpoint-every": 3,
            "--flow.loop.validate-every": 0, "--flow.loop.log-every": 1,
        }  # fmt: skip
        words = [word for pair in options.items() for word in pair]
        process = torchrun("--max-restarts", 1, "-m", "tests.train.mortal", tmp_path / f"{name}-flag", step, *words)
        outputs[name] = process.communicate(timeout=300)[0]
        assert process.returncode == 0, outputs[name]
    assert "going on from" not in outputs["whole"]
    assert f"going on from {tmp_path / 'killed' / 'step-00000003'}" in outputs["killed"]
    assert [row["step"] for row in metrics(tmp_path / "killed")] == list(range(1, 9))
    ours, theirs = weights(tmp_path / "killed"), weights(tmp_path / "whole")
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.slow
def test_from_meshes_to_generated_meshes(tmp_path):
    """Every command in turn on procedural assets; what a new view of one gives is nearest to that one."""
    data = tmp_path / "build"
    words = [
        "--limit",
        "4",
        "--resolutions",
        "32",
        "--topology-resolution",
        "64",
        "--image-size",
        "112",
        "--val-percent",
        "0",
        "--workers",
        "1",
    ]
    command = [sys.executable, "-m", "pipeline.build", "--preset", "smoke", "--out", str(data), *words]
    subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, check=True, capture_output=True, timeout=300)
    run, common = str(tmp_path / "vae"), ["--data", str(data), "--device", "cpu"]
    options = [
        "--bricks.resolutions",
        "32",
        "--bricks.no-symmetries",
        "--loop.steps",
        "250",
        "--loop.sample-every",
        "0",
    ]
    vae_main([*common, "--out", run, *options])
    encode_main([*common, "--vae", f"{run}/latest"])
    out = tmp_path / "dit"
    main([*common, "--vae", f"{run}/latest", "--out", str(out), "--resolution", "32", "--flow.loop.steps", "200"])
    (folder,) = (out / "samples").iterdir()
    numbers = json.loads((folder / "iou.json").read_text())["held_out_views"]
    made = {path.stem: read_ply(path) for path in folder.glob("*.ply")}
    reader = BrickReader(read_catalogue(data, [32]))
    uids = reader.catalogue.uids
    assert len(made) == len(uids) == 4
    right = [extract(reader.read(asset, 32)) for asset in range(4)]
    for number, uid in enumerate(uids):
        distances = [compare_surfaces(*made[uid], *mesh, samples=5000).chamfer for mesh in right]
        assert int(np.argmin(distances)) == number, (uid, distances)
    assert numbers["iou"] > 0.5, numbers
