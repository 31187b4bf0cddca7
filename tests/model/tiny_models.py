"""Tiny configurations of every stage, and models with random weights."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from PIL import Image

from model import config
from model.conditioning.image_conditioned_dit import ConditionedDiT
from model.inference.stages import Stages
from model.sparse_vae import SparseVAE
from model.structure import Structure

OCCUPANCY = config.OccupancyConfig(side=8, widths=(8, 16), blocks=1, groups=8, latent_channels=4)
ENCODER = config.EncoderConfig(kind="stand-in", image_size=28, channels=32, layers=1, heads=2)
DIT = config.DiTConfig(
    channels=32,
    blocks=1,
    heads=2,
    kv_heads=1,
    mlp_ratio=2,
    latent_channels=4,
    condition_channels=32,
    top_k=2,
)
VAE = config.VAEConfig(
    widths=(8, 8, 8, 16), latent_channels=4, heads=1, blocks=1, mlp_ratio=1, groups=8
)
# The DiT of the structure stage, large enough to learn.
STRUCTURE_DIT = replace(DIT, channels=48, blocks=2, heads=3, kv_heads=3, attention="full")
STRUCTURE = config.StructureConfig(
    occupancy=OCCUPANCY, flow=config.ConditionedDiTConfig(dit=STRUCTURE_DIT, encoder=ENCODER)
)
FAST = config.GenerationOptions(steps=(2,), guidance=2.0, min_piece=0.0)


def randomize(model, seed=0, scale=0.05):
    """Add noise to every weight. Output layers start at zero and would hide the other layers."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return model


def random_stages(resolutions=(64, 128)):
    """Return an SS-VAE, a structure stage and one DiT for each resolution, with random weights."""
    torch.manual_seed(0)
    vae = randomize(SparseVAE(VAE), 1, scale=0.2)
    structure_dit = replace(DIT, attention="full", kv_heads=2)
    flow = config.ConditionedDiTConfig(dit=structure_dit, encoder=ENCODER)
    structure = Structure(config.StructureConfig(occupancy=OCCUPANCY, flow=flow))
    conditioned = config.ConditionedDiTConfig(dit=DIT, encoder=ENCODER)
    dits = {size: randomize(ConditionedDiT(conditioned), size, scale=0.2) for size in resolutions}
    return vae, randomize(structure, 2, scale=0.2), dits


def stages_of(vae, structure, dits):
    """Return stages with one VAE for all resolutions."""
    return Stages(structure=structure, dits=dits, vaes=dict.fromkeys(dits, vae))


def disc_image(size=64, mode="RGBA"):
    """Return an image of a shaded disc on a transparent background."""
    row, column = np.mgrid[:size, :size] / size - 0.5
    inside = row**2 + column**2 < 0.16
    grey = np.uint8(255 * np.clip(0.5 + row, 0, 1))
    return Image.fromarray(np.dstack([grey, grey, grey, np.uint8(255 * inside)])).convert(mode)
