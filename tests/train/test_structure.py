"""Training of the structure stage: batches, both parts, resuming, presets, and errors."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from model.checkpoint import load_weights, save_model
from model.config import (
    Guidance,
    SamplingOptions,
    StructureConfig,
)
from model.inference.mesh_cleaning import count_open_edges
from model.occupancy_vae import OccupancyVAE, occupancy_grid
from model.structure import Structure
from pipeline.core.cameras import sample_camera
from pipeline.core.errors import UserError
from pipeline.storage.sdf_shard import SdfShard
from tests.model.tiny_models import STRUCTURE, randomize
from tests.train.analytic_builds import add_renders, color_of, make_build, short_loop
from tests.train.metric_rows import all_rows
from train.data.bricks import read_build_index
from train.data.symmetry import SYMMETRIES
from train.engine import checkpoint
from train.engine.batch_sampler import SampleId
from train.engine.distributed import World
from train.engine.mesh_pictures import LABEL_HEIGHT
from train.stages.structure import task as task_module
from train.stages.structure.cell_pictures import cube_surface
from train.stages.structure.config import (
    STRUCTURE_PRESETS,
    FlowTraining,
    OccupancyTraining,
    StructureTraining,
)
from train.stages.structure.data import GridLoader
from train.stages.structure.run import train_flow, train_occupancy_vae, train_structure
from train.stages.structure.task import FlowTask
from train.structure import main

# A grid of 4^3 cells, as builds at R = 32 have it.
MODEL = replace(STRUCTURE, occupancy=replace(STRUCTURE.occupancy, side=4))


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    root = make_build(tmp_path_factory.mktemp("rendered"), assets=4, val=2)
    add_renders(root)
    return root


def config(data, out, *, steps=4, **options):
    loop = short_loop(steps=steps, learning_rate=3e-3, ema_decay=0.9)
    cfg = StructureTraining(
        data=data,
        out=out,
        device="cpu",
        resolution=32,
        held_out_views=2,
        workers=1,
        samples=2,
        model=MODEL,
        vae=OccupancyTraining(batch_size=2, loop=loop),
        flow=FlowTraining(batch_size=2, steps=4, loop=loop),
    )
    return replace(cfg, **options)


def test_grids_hold_the_stored_cells_under_a_symmetry(rendered, tmp_path):
    index = read_build_index(rendered, [32]).split("train")
    loader = GridLoader(index, config(rendered, tmp_path), images=False)
    shard = SdfShard(rendered / "sdf" / "32" / "000000.zarr")
    seen = set()
    for epoch in range(6):
        batch = loader.batch([SampleId(asset, epoch) for asset in range(3)], 0.5)
        for number in range(3):
            blocks = torch.from_numpy(shard.bricks(index.uids[number]).cells.astype(np.int64))
            stored = occupancy_grid(torch.nn.functional.pad(blocks, (1, 0)), 4, 1)[0].numpy()
            turned = [np.flip(stored.transpose(a), np.flatnonzero(m)) for a, m in SYMMETRIES]
            assert any((batch.occupied[number].numpy() == one).all() for one in turned)
        seen.add(batch.occupied[0].numpy().tobytes())
        assert (batch.share, batch.images, batch.tokens) == (0.5, None, 3 * 8)
    assert len(seen) > 1
    plain = GridLoader(index, config(rendered, tmp_path), images=False, use="validation")
    np.testing.assert_array_equal(plain.batch([SampleId(2, 5)], 1.0).occupied[0].numpy(), stored)


def test_a_sample_does_not_depend_on_its_batch(rendered, tmp_path):
    index = read_build_index(rendered, [32]).split("train")
    loader = GridLoader(index, config(rendered, tmp_path), images=True)
    both, alone = (
        loader.batch([SampleId(1, 3), SampleId(0, 2)], 0.5),
        loader.batch([SampleId(0, 2)], 1.0),
    )
    torch.testing.assert_close(both.occupied[1:], alone.occupied)
    torch.testing.assert_close(both.noise[8:], alone.noise)
    torch.testing.assert_close(both.times[1:], alone.times)
    torch.testing.assert_close(both.images.pixels[1:], alone.images.pixels)
    again = loader.batch([SampleId(0, 3)], 1.0)
    assert (again.noise - alone.noise).abs().max() > 0.1
    share = np.mean([loader.batch([SampleId(0, n)], 1.0).dropped.item() for n in range(200)])
    assert 0.03 < share < 0.2


def test_all_views_that_are_not_held_out_come_in_turn(rendered, tmp_path):
    index = read_build_index(rendered, [32]).split("train")
    cfg = config(rendered, tmp_path, flow=replace(config(rendered, tmp_path).flow, augment=False))
    loader = GridLoader(index, cfg, images=True)
    for turn in range(3):
        assert {loader.conditions.view_of(1, 3 * turn + n) for n in range(3)} == {0, 1, 2}
    held = GridLoader(index, cfg, images=True, use="held_out")
    assert {held.conditions.view_of(1, n) for n in range(2)} == {3, 4}
    view = loader.conditions.view_of(1, 4)
    pixel = loader.batch([SampleId(1, 4)], 1.0).images.pixels[0, :, 14, 14]
    assert tuple(pixel.tolist()) == color_of(1, view)
    with pytest.raises(
        UserError, match="held_out_views must be below the 5 views there are, got 5"
    ):
        GridLoader(index, replace(cfg, held_out_views=5), images=True).conditions.view_of(0, 0)


def test_several_views_turn_the_cells_as_the_first_one(rendered, tmp_path):
    index = read_build_index(rendered, [32]).split("train")
    one = config(rendered, tmp_path, facing_views=True, mirrored_views=True)
    several = replace(one, model=replace(MODEL, flow=replace(MODEL.flow, views=3)))
    samples = [SampleId(asset, epoch) for asset in range(3) for epoch in range(4)]
    alone, together = (
        GridLoader(index, cfg, images=True).batch(samples, 0.1) for cfg in (one, several)
    )
    assert torch.equal(alone.occupied, together.occupied)
    assert torch.equal(alone.noise, together.noise)
    first = (together.images.coords[:, 3] == 1).nonzero()[::5, 0]  # class tokens of first views
    numbers = together.images.rows[first] // (5 + 2 * 2)  # of images, which have 2^2 patches
    assert torch.equal(together.images.pixels[numbers], alone.images.pixels)
    assert len(together.images.pixels) > len(samples)
    model = randomize(Structure(several.model), 1)
    task = FlowTask(several, World(), index, index, model.vae)
    loss = task.losses(randomize(task.model, 2), together)["loss"]
    shuffled = replace(
        together, images=replace(together.images, pixels=together.images.pixels // 2)
    )
    assert loss.isfinite()
    assert task.losses(task.model, shuffled)["loss"] != loss


def test_facing_views_turn_the_cells_and_mirrored_views_the_image_too(rendered, tmp_path):
    index = read_build_index(rendered, [32]).split("train")
    flow = replace(config(rendered, tmp_path).flow, augment=False)
    plain_cfg = config(rendered, tmp_path, flow=flow)
    plain = GridLoader(index, plain_cfg, images=True)
    facing = GridLoader(
        index, replace(plain_cfg, facing_views=True, mirrored_views=True), images=True
    )
    turns_seen, mirrored_seen = set(), set()
    for asset, epoch in itertools.product(range(4), range(3)):
        before, after = (x.batch([SampleId(asset, epoch)], 1.0) for x in (plain, facing))
        azimuth = sample_camera(index.uids[asset], plain.conditions.view_of(asset, epoch))
        turns = round(azimuth.azimuth_degrees / 90)
        # x and z after the turns, by the definition of the azimuth: at 90 the eye is on +x.
        cells = before.occupied[0].numpy()
        turned = {0: cells, 1: np.flip(cells, 2), 2: np.flip(cells, (0, 2))}[turns]
        turned = turned.transpose(2, 1, 0) if turns == 1 else turned
        pixels, other = before.images.pixels.numpy(), after.images.pixels.numpy()
        is_mirrored = not np.array_equal(pixels, other)
        if is_mirrored:
            np.testing.assert_array_equal(other, np.flip(pixels, 3))
            turned = np.flip(turned, 0)
        np.testing.assert_array_equal(after.occupied[0].numpy(), turned)
        turns_seen.add(turns)
        mirrored_seen.add(is_mirrored)
    assert len(turns_seen) > 1
    assert mirrored_seen == {False, True}
    held_out = GridLoader(
        index, replace(plain_cfg, mirrored_views=True), images=True, use="held_out"
    )
    kept = held_out.batch([SampleId(0, 0)], 1.0).occupied[0]
    torch.testing.assert_close(kept, plain.batch([SampleId(0, 0)], 1.0).occupied[0])


def test_both_parts_train_and_the_checkpoint_holds_the_whole_stage(rendered, tmp_path):
    cfg = config(rendered, tmp_path / "run", steps=3)
    loop = replace(cfg.flow.loop, validate_every=3, sample_every=3)
    cfg = replace(cfg, vae=replace(cfg.vae, loop=loop), flow=replace(cfg.flow, loop=loop))
    train_structure(cfg, World())
    found = checkpoint.latest(cfg.out / "flow")
    assert json.loads((found / "config.json").read_text(encoding="utf-8"))["model"] == "Structure"
    structure = Structure(MODEL)
    load_weights(found, structure)
    trained = checkpoint.latest(cfg.out / "vae")
    before = {name: tensor.clone() for name, tensor in structure.vae.state_dict().items()}
    load_weights(trained, structure.vae)
    for name, tensor in structure.vae.state_dict().items():
        assert torch.equal(tensor, before[name]), "the flow's training must leave the VAE alone"
    assert (structure.flow.dit.latent_std > 0).all()
    assert (structure.flow.dit.latent_std != 1).all()
    rows = all_rows(cfg.out / "flow")
    assert [row["event"] for row in rows if "event" in row] == ["validation"]
    assert {"iou", "kl", "bce"} <= set(all_rows(cfg.out / "vae")[0])
    folder = cfg.out / "flow" / "samples" / "step-00000003"
    assert set(json.loads((folder / "iou.json").read_text(encoding="utf-8"))) == {
        "held_out_views",
        "held_out_assets",
    }
    assert Image.open(folder / "cells.png").size == (3 * 192, LABEL_HEIGHT + 4 * 192)
    assert Image.open(cfg.out / "vae" / "samples" / "step-00000003" / "cells.png").size == (
        2 * 192,
        LABEL_HEIGHT + 2 * 192,
    )


def test_the_stage_starts_from_an_export_and_keeps_its_vae(rendered, tmp_path, monkeypatch):
    exported = randomize(Structure(MODEL), 3)
    save_model(tmp_path / "export" / "structure", exported, MODEL)
    authors = "uid,author\na,Ann\n"
    (tmp_path / "export" / "attribution.csv").write_text(authors, encoding="utf-8")
    cfg = config(rendered, tmp_path / "run", steps=1, part="flow", init=tmp_path / "export")
    started = []

    class Seen(FlowTask):
        def losses(self, model, batch):
            started.append({name: x.clone() for name, x in self.model.state_dict().items()})
            return super().losses(model, batch)

    monkeypatch.setattr("train.stages.structure.run.FlowTask", Seen)
    train_structure(cfg, World())
    train_structure(cfg, World())  # there is nothing left to do
    assert len(started) == 1
    for name, tensor in exported.state_dict().items():
        if "latent_" not in name:  # the statistics are measured on this run's data
            assert torch.equal(started[0][name], tensor), name
    assert (cfg.out / "attribution.csv").read_text(encoding="utf-8") == authors


def test_a_stage_of_another_number_of_cells_is_refused_before_training(rendered, tmp_path):
    other = replace(MODEL, occupancy=replace(MODEL.occupancy, side=8))
    save_model(tmp_path / "structure", Structure(other), other)
    cfg = config(rendered, tmp_path / "run", init=tmp_path)
    with pytest.raises(UserError, match=r"was trained on 8 cells per side, and this run has 4"):
        train_structure(cfg, World())
    assert not cfg.out.exists()


def test_statistics_are_those_of_the_requested_number_of_assets(rendered, tmp_path):
    cfg = config(rendered, tmp_path, samples=0, val_batches=0)
    chosen = read_build_index(rendered, [32]).split("train")
    loader = GridLoader(chosen, cfg, images=False, use="validation")
    vae = OccupancyVAE(MODEL.occupancy)
    for parameter in vae.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    grids = torch.cat(
        [loader.batch([SampleId(asset, 0)], 1.0).occupied for asset in range(len(chosen))]
    )
    z = vae.eval().encode(grids).mean.movedim(1, -1).flatten(1, 3).double()  # [assets, s^3, C]
    for count, expected in ((1000, z), (2, z[[0, len(chosen) // 2]])):
        task = FlowTask(
            replace(cfg, flow=replace(cfg.flow, statistics=count)), World(), chosen, chosen, vae
        )
        task.measure(loader)
        mean, std = expected.flatten(0, 1).mean(0), expected.flatten(0, 1).std(0).clamp(min=1e-3)
        torch.testing.assert_close(
            task.model.flow.dit.latent_mean.double(), mean, rtol=1e-5, atol=1e-6
        )
        torch.testing.assert_close(
            task.model.flow.dit.latent_std.double(), std, rtol=1e-4, atol=1e-6
        )


@pytest.mark.parametrize("limit", [0, 1 << 20])
def test_kept_latents_are_those_of_each_asset_and_symmetry(rendered, tmp_path, monkeypatch, limit):
    monkeypatch.setattr(task_module, "LATENT_BYTES", limit)
    cfg = config(rendered, tmp_path, facing_views=True, mirrored_views=True)
    index = read_build_index(rendered, [32]).split("train")
    vae = OccupancyVAE(MODEL.occupancy)
    randomize(vae)
    task = FlowTask(cfg, World(), index, index, vae)
    loader = GridLoader(index, cfg, images=True)
    batches = [
        loader.batch([SampleId(asset, epoch) for asset in range(len(index))], 1.0)
        for epoch in (0, 1, 2, 3, 0)
    ]
    assert len({symmetry for batch in batches for symmetry in batch.symmetries}) > 2
    encoded = []
    encode = task.model.vae.encode
    monkeypatch.setattr(task.model.vae, "encode", lambda x: encoded.append(1) or encode(x))
    for batch in batches:
        expected = vae.encode(batch.occupied).mean.movedim(1, -1).flatten(0, 3)
        torch.testing.assert_close(task._latents(batch), expected)
    keys = [key for batch in batches for key in zip(batch.uids, batch.symmetries, strict=True)]
    assert len(encoded) == len(set(keys) if limit else keys)


def test_the_flow_starts_after_the_vae_and_keeps_its_weights(rendered, tmp_path, caplog):
    cfg = config(rendered, tmp_path, steps=4)
    soon = replace(
        cfg, vae=replace(cfg.vae, loop=replace(cfg.vae.loop, steps=10**6, max_minutes=0.002))
    )
    with caplog.at_level("INFO"):
        train_structure(soon, World())
    assert "Run the same command to resume it" in caplog.text
    assert not (cfg.out / "flow").exists()
    done = json.loads(
        (checkpoint.latest(cfg.out / "vae") / "state.json").read_text(encoding="utf-8")
    )["step"]
    whole = replace(soon, vae=replace(cfg.vae, loop=replace(cfg.vae.loop, steps=done)))
    train_structure(whole, World())
    assert checkpoint.latest(cfg.out / "flow").name == "step-00000004"
    assert "keeps the occupancy VAE" not in caplog.text
    train_structure(
        replace(whole, vae=replace(cfg.vae, loop=replace(cfg.vae.loop, steps=done + 1))), World()
    )
    assert "keeps the occupancy VAE that it started with" in caplog.text
    weights = checkpoint.latest(cfg.out / "flow") / "ema.safetensors"
    weights.write_bytes(weights.read_bytes()[:20])
    with pytest.raises(UserError, match=r"ema\.safetensors cannot be used"):
        train_flow(
            whole,
            World(),
            *(read_build_index(rendered, [32]).split(name) for name in ("train", "val")),
        )


def test_previews_of_trained_views_are_not_called_held_out(rendered, tmp_path):
    cfg = config(rendered, tmp_path, steps=1, held_out_views=0)
    train_structure(
        replace(cfg, flow=replace(cfg.flow, loop=replace(cfg.flow.loop, sample_every=1))), World()
    )
    folder = cfg.out / "flow" / "samples" / "step-00000001"
    assert set(json.loads((folder / "iou.json").read_text(encoding="utf-8"))) == {
        "training_views",
        "held_out_assets",
    }


AGAINST_OVERFITTING = replace(
    MODEL,
    flow=replace(
        MODEL.flow,
        dit=replace(MODEL.flow.dit, dropout=0.2),
        encoder=replace(MODEL.flow.encoder, stem="convolutions", dropout=0.2),
    ),
)


def erasing(cfg):
    augmentation = replace(cfg.flow.augmentation, erase_probability=0.5)
    return replace(cfg, flow=replace(cfg.flow, augmentation=augmentation))


@pytest.mark.parametrize("model", [MODEL, AGAINST_OVERFITTING], ids=["plain", "regularised"])
def test_resumed_runs_of_both_parts_equal_uninterrupted_ones(rendered, tmp_path, model):
    whole = erasing(config(rendered, tmp_path / "whole", steps=5, model=model))
    parts = erasing(config(rendered, tmp_path / "parts", steps=2, model=model))
    train_structure(whole, World())
    train_structure(parts, World())
    more = {
        name: replace(getattr(parts, name), loop=getattr(whole, name).loop)
        for name in ("vae", "flow")
    }
    train_structure(replace(parts, part="vae", **more), World())
    resumed, uninterrupted = (
        [row["loss"] for row in all_rows(cfg.out / "vae")] for cfg in (parts, whole)
    )
    assert resumed == uninterrupted
    # The flow in `parts` started on a VAE of two steps, so a new one starts on the VAE of `whole`.
    split = whole
    other = replace(split, out=tmp_path / "split")
    (tmp_path / "split").mkdir()
    (tmp_path / "split" / "vae").symlink_to(whole.out / "vae")
    train_structure(
        replace(
            other, part="flow", flow=replace(other.flow, loop=replace(other.flow.loop, steps=2))
        ),
        World(),
    )
    train_structure(replace(other, part="flow"), World())
    assert [row["loss"] for row in all_rows(other.out / "flow")] == [
        row["loss"] for row in all_rows(whole.out / "flow")
    ]


@pytest.mark.slow
def test_the_stage_learns_which_image_has_which_cells(rendered, tmp_path):
    cfg = config(rendered, tmp_path, steps=300)
    cfg = replace(cfg, vae=replace(cfg.vae, batch_size=4, symmetries=False))
    cfg = replace(cfg, flow=replace(cfg.flow, batch_size=12, augment=False))
    train_structure(cfg, World())
    assert all_rows(cfg.out / "vae")[-1]["iou"] > 0.95
    structure = Structure(MODEL).eval()
    load_weights(checkpoint.latest(cfg.out / "flow"), structure)
    index = read_build_index(rendered, [32]).split("train")
    loader = GridLoader(index, cfg, images=True, use="held_out")
    batch = loader.batch(
        [SampleId(asset, 0) for asset in range(4)], 1.0
    )  # views that training never saw
    with torch.no_grad():
        cells = structure.generate(
            structure.flow.encode_images(batch.images),
            [1, 2, 3, 4],
            SamplingOptions(steps=12, guidance=Guidance(scale=2.0)),
        )
    found = occupancy_grid(cells.coords, 4, 4)
    shared = (found[:, None] & batch.occupied).sum((2, 3, 4)) / (
        found[:, None] | batch.occupied
    ).sum((2, 3, 4))
    assert shared.argmax(1).tolist() == [0, 1, 2, 3]
    assert shared.diagonal().min() > 0.7


def test_the_surface_of_cubes_is_closed_and_faces_outwards():
    occupied = np.zeros((4, 4, 4), bool)
    occupied[1:3, 1, 0] = True
    occupied[3, 3, 3] = True
    vertices, faces = cube_surface(occupied)
    assert len(faces) == 2 * (10 + 6)
    a, b, c = vertices[faces].transpose(1, 0, 2)
    assert (a * np.cross(b, c)).sum() / 6 == pytest.approx(
        3 / 64
    )  # positive if the faces point outwards
    _, welded = np.unique(vertices, axis=0, return_inverse=True)
    assert count_open_edges(welded.reshape(-1)[faces]) == 0


def test_missing_data_is_reported(rendered, tmp_path):
    with pytest.raises(UserError, match=r"holds no occupancy VAE; train it first: .*--part vae"):
        train_structure(config(rendered, tmp_path / "none", part="flow"), World())
    bare = make_build(tmp_path / "bare", assets=2, val=1)
    cfg = config(bare, tmp_path / "bare-run")
    chosen, val = (read_build_index(bare, [32]).split(name) for name in ("train", "val"))
    train_occupancy_vae(cfg, World(), chosen, val)  # takes no images
    with pytest.raises(UserError, match=r"no renders of cameras paper in shard 000000; add them"):
        train_flow(cfg, World(), chosen, val)
    # What the second part lacks is found before the first part is trained.
    both = config(bare, tmp_path / "both")
    with pytest.raises(UserError, match=r"no renders of cameras paper in shard 000000; add them"):
        train_structure(both, World())
    lost = replace(MODEL.flow.encoder, kind="dinov2", weights=str(tmp_path / "no-weights"))
    no_encoder = replace(MODEL, flow=replace(MODEL.flow, encoder=lost))
    with pytest.raises(UserError, match=r"image encoder's weights .*no-weights' are not on this"):
        train_structure(config(rendered, tmp_path / "both", model=no_encoder), World())
    assert not (tmp_path / "both").exists()
    with pytest.raises(ValueError, match="side must be resolution / 8 = 8, got 4"):
        config(rendered, tmp_path, resolution=64)
    with pytest.raises(UserError, match=r"unknown option --vae\.lop"):
        main(["--vae.lop", "3"])


def test_presets_have_the_expected_sizes():
    assert STRUCTURE_PRESETS["base"].model == StructureConfig()
    sizes = {}
    for name, preset in STRUCTURE_PRESETS.items():
        assert preset.preset == name
        if preset.model.flow.encoder.kind == "stand-in":
            sizes[name] = sum(p.numel() for p in Structure(preset.model).parameters())
    assert sizes["tiny"] < 2e6 < sizes["small"] < 40e6
