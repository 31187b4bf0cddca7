"""The structure stage: its weights, rows and grids, sampling of batches, and learning."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from kernels import token_order
from model.checkpoint import load_model, save_model
from model.conditioning.image_conditioned_dit import ConditionedDiT
from model.conditioning.image_encoder import DinoEncoder, ImageBatch
from model.conditioning.image_preprocessing import PreparedImage
from model.config import ConditionedDiTConfig, Guidance, SamplingOptions, StructureConfig
from model.occupancy_vae import occupancy_grid, occupancy_loss
from model.rectified_flow import interpolate, velocity_target
from model.sparse_tensor import SparseTensor
from model.structure import Structure, dense_level, grid_to_rows, occupied_level, rows_to_grid
from pipeline.core.primitives.voxel_iou import intersection_over_union
from tests.model.test_occupancy_vae import shells
from tests.model.tiny_models import ENCODER, OCCUPANCY, STRUCTURE, STRUCTURE_DIT, randomize


def images(*colors):
    """Return images of one colour each, with foreground in three of four patches."""
    mask = np.ones((28, 28), bool)
    mask[14:, 14:] = False
    return ImageBatch.collate(
        [PreparedImage(np.tile(np.uint8(color), (28, 28, 1)), mask) for color in colors]
    )


RED, GREEN, BLUE = (220, 30, 30), (30, 200, 40), (20, 40, 220)


def test_rows_and_grids_are_converted_back_and_forth():
    level = dense_level(4, 3)
    assert len(level) == 3 * 64
    torch.testing.assert_close(token_order(level.coords), torch.arange(len(level)))
    grid = torch.randn(3, 5, 4, 4, 4)
    rows = grid_to_rows(grid, level)
    for n in (0, 77, 191):
        b, x, y, z = level.coords[n].tolist()
        torch.testing.assert_close(rows[n], grid[b, :, x, y, z])
    torch.testing.assert_close(rows_to_grid(rows, level), grid)


def test_a_grid_is_converted_to_a_level():
    occupied = shells(8, 3)
    occupied[1] = False  # an asset without any cell
    level = occupied_level(occupied)
    assert (level.resolution, level.batch_size) == (8, 3)
    torch.testing.assert_close(occupancy_grid(level.coords, 8, 3), occupied)
    assert level.asset_starts[1] == level.asset_starts[2]


def test_a_trainable_encoder_is_part_of_the_weights(tmp_path):
    torch.manual_seed(0)
    structure = Structure(STRUCTURE).eval()
    assert any(name.startswith("flow._learning.") for name in structure.state_dict())
    save_model(tmp_path / "structure", structure, STRUCTURE)
    again = load_model(tmp_path / "structure", Structure)
    assert again.config == STRUCTURE
    assert again.resolution == 64
    batch = images(RED, BLUE)
    torch.testing.assert_close(
        again.flow.encode_images(batch).feats_SC, structure.flow.encode_images(batch).feats_SC
    )
    assert again.flow.encode_images(batch).feats_SC.requires_grad


def test_a_frozen_encoder_is_shared_and_not_saved(monkeypatch):
    encoder = DinoEncoder.random(channels=32, layers=1, heads=2, image_size=28)
    monkeypatch.setattr(
        "model.conditioning.image_conditioned_dit.build_encoder", lambda _config: encoder
    )
    flow = ConditionedDiT(
        ConditionedDiTConfig(dit=STRUCTURE_DIT, encoder=replace(ENCODER, kind="dinov2"))
    )
    assert flow.encoder is encoder
    assert {name.partition(".")[0] for name in flow.state_dict()} == {"dit"}
    assert all(not parameter.requires_grad for parameter in encoder.parameters())
    assert len(list(flow.parameters())) == len(list(flow.dit.parameters()))
    twin = copy.deepcopy(flow)
    assert twin.encoder is encoder
    assert twin.dit is not flow.dit
    assert not flow.encode_images(images(RED)).feats_SC.requires_grad
    flow.to(torch.float64)
    assert next(encoder.parameters()).dtype == torch.float64  # converted together with the DiT


@torch.no_grad()
def test_a_dropped_image_is_the_unconditional_one():
    flow = randomize(ConditionedDiT(STRUCTURE.flow))
    level = dense_level(4, 2)
    x = SparseTensor(torch.randn(len(level), 4), level)
    t = torch.tensor([0.3, 0.8])
    batch = images(RED, BLUE)
    kept, none = flow(x, t, batch), flow.dit(x, t, flow.encode_images(batch).unconditional())
    half = flow(x, t, batch, torch.tensor([True, False]))
    torch.testing.assert_close(half[:64], none[:64])
    torch.testing.assert_close(half[64:], kept[64:])
    assert (kept[:64] - none[:64]).abs().max() > 1e-3


def test_a_sample_does_not_depend_on_its_batch():
    flow = randomize(ConditionedDiT(STRUCTURE.flow)).eval()
    flow.dit.set_statistics(torch.tensor([1.0, -2.0, 0.5, 0.0]), torch.tensor([0.5, 2.0, 1.0, 3.0]))
    options = SamplingOptions(steps=3, guidance=Guidance(scale=3.0))
    both = flow.generate(dense_level(4, 2), flow.encode_images(images(RED, BLUE)), [7, 9], options)
    alone = flow.generate(dense_level(4, 1), flow.encode_images(images(BLUE)), [9], options)
    torch.testing.assert_close(both[64:], alone, rtol=1e-4, atol=1e-4)
    other = flow.generate(dense_level(4, 1), flow.encode_images(images(BLUE)), [10], options)
    assert (other - alone).abs().max() > 0.1
    red = flow.generate(dense_level(4, 1), flow.encode_images(images(RED)), [9], options)
    assert (red - alone).abs().max() > 1e-4
    plain = flow.generate(
        dense_level(4, 1),
        flow.encode_images(images(BLUE)),
        [9],
        SamplingOptions(steps=3, guidance=Guidance(scale=1.0)),
    )
    assert (plain - alone).abs().max() > 1e-5
    with pytest.raises(ValueError, match="each of 2 assets, got 1 seeds and 2 images"):
        flow.generate(dense_level(4, 2), flow.encode_images(images(RED, BLUE)), [7], options)


def test_the_stage_learns_which_image_has_which_cells():
    torch.manual_seed(0)
    structure, occupied = Structure(STRUCTURE), shells(8, 3, seed=1)
    optimizer = torch.optim.AdamW(structure.vae.parameters(), 6e-3)
    for _ in range(80):
        logits, posterior = structure.vae(occupied, torch.randn(3, 4, 4, 4, 4))
        optimizer.zero_grad()
        losses = occupancy_loss(logits, occupied, posterior, kl_weight=1e-3, share=1 / 3)
        losses["loss"].backward()
        optimizer.step()
    level, flow = dense_level(4, 3), structure.flow
    with torch.no_grad():
        z_NC = grid_to_rows(structure.vae.encode(occupied).mean, level)
    flow.dit.set_statistics(z_NC.mean(0), z_NC.std(0))
    x0, batch = flow.dit.normalize(z_NC), images(RED, GREEN, BLUE)
    optimizer = torch.optim.AdamW(flow.parameters(), 4e-3)
    for _ in range(200):
        t, eps = torch.rand(3), torch.randn_like(x0)
        t_N = t[level.coords[:, 0].long()]
        velocity = flow(
            SparseTensor(interpolate(x0, eps, t_N), level), t, batch, torch.rand(3) < 0.1
        )
        optimizer.zero_grad()
        (velocity - velocity_target(x0, eps)).square().mean().backward()
        optimizer.step()
    turned = images(BLUE, RED, GREEN)
    cells = structure.eval().generate(
        flow.encode_images(turned),
        [1, 2, 3],
        SamplingOptions(steps=12, guidance=Guidance(scale=2.0)),
    )
    found = occupancy_grid(cells.coords, 8, 3)
    assert intersection_over_union(found, occupied[[2, 0, 1]], (1, 2, 3)).min() > 0.8
    # The shapes themselves overlap less than that.
    assert intersection_over_union(found, occupied, (1, 2, 3)).max() < 0.6


def test_configurations_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="must be the occupancy VAE's 4, got 8"):
        StructureConfig(
            occupancy=OCCUPANCY,
            flow=replace(STRUCTURE.flow, dit=replace(STRUCTURE_DIT, latent_channels=8)),
        )
    with pytest.raises(ValueError, match='must be "full" on a dense grid'):
        StructureConfig(
            occupancy=OCCUPANCY,
            flow=replace(STRUCTURE.flow, dit=replace(STRUCTURE_DIT, attention="ssa", kv_heads=3)),
        )
    with pytest.raises(ValueError, match="the encoder's channels, got 32 and 64"):
        ConditionedDiTConfig(dit=STRUCTURE_DIT, encoder=replace(ENCODER, channels=64))
