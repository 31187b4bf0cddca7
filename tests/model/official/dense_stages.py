"""The dense stages of golden files: our models with the golden weights on the golden inputs.

The option `wrong` makes one thing wrong, as the controls of the golden files name it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from model.attention import HeadNorm
from model.config import DiTConfig
from model.image_tokens import ImageTokens
from model.occupancy_vae import CellLayerNorm, OccupancyVAE
from model.published_settings import dense_dit, dense_vae
from model.sparse_dit import SparseDiT
from model.sparse_tensor import SparseTensor
from model.structure import dense_level, grid_to_rows, rows_to_grid
from tests.model.official.golden import GoldenSet
from tests.model.official.sparse_stages import image_tokens, use_erf_gelu

LATENT_SIDE = 4  # of the golden dense VAE


def make_dense_dit(
    constructor: dict[str, Any], weights: dict[str, Tensor], **changes: Any
) -> SparseDiT:
    """Return our DiT with the golden weights of a dense DiT."""
    config, _ = dense_dit(constructor, "golden settings")
    config: DiTConfig = replace(config, **changes)
    model = SparseDiT(config).eval()
    if not config.qk_norm:
        weights = {name: x for name, x in weights.items() if not name.endswith("gamma")}
    model.load_published(weights, torch.tensor(1.0), torch.tensor(0.0))
    return model


def run_dense_dit(given: GoldenSet, *, wrong: str = "") -> dict[str, Tensor]:
    """Return the velocity of a golden set, and the positions of its grid."""
    constructor, inputs = given.settings["constructor"], given.inputs
    side, batch = constructor["resolution"], len(inputs["latents"])
    changes: dict[str, Any] = {
        "no q and k norm": {"qk_norm": False},
        "position factor 4": {"position_resolution": 4 * 8 * side},
    }.get(wrong, {})
    model = make_dense_dit(constructor, given.weights, **changes)
    level = dense_level(side, batch)
    t = torch.from_numpy(inputs["t"])
    image: ImageTokens = image_tokens(inputs, batch)
    latents = torch.from_numpy(inputs["latents"])
    if wrong == "erf GELU":
        use_erf_gelu(model)
    elif wrong == "t not times 1000":
        t = t / 1000
    elif wrong == "norm without sqrt(head size)":
        for part in model.modules():
            if isinstance(part, HeadNorm):
                part.gamma.data /= part.gamma.shape[1] ** 0.5
    elif wrong == "positions with x fastest":
        latents = latents.transpose(2, 4)
    else:
        assert not wrong or changes, f"nothing is made wrong by {wrong!r}"
    with torch.no_grad():
        velocity = model(SparseTensor(grid_to_rows(latents, level), level), t, image)
    velocity = rows_to_grid(velocity, level)
    return {"velocity": velocity.transpose(2, 4) if "x fastest" in wrong else velocity}


class _GroupNorm(nn.GroupNorm):
    """A group norm with the weights of a layer norm."""

    def __init__(self, norm: CellLayerNorm, groups: int):
        super().__init__(groups, norm.normalized_shape[0])
        self.load_state_dict(norm.state_dict())


def _replace_norms(model: nn.Module, groups: int) -> None:
    for part in list(model.modules()):
        if isinstance(part, nn.Sequential):
            for number, layer in enumerate(part):
                if isinstance(layer, CellLayerNorm):
                    part[number] = _GroupNorm(layer, groups)


def _permute_up_steps(model: OccupancyVAE, *, offsets_first: bool) -> None:
    """Deal out the channels of every up-step in another order."""
    for part in model.decoder:
        conv = getattr(part, "conv", None)
        if isinstance(conv, nn.Conv3d):
            for tensor in (conv.weight, conv.bias):
                assert tensor is not None
                C = len(tensor) // 8
                if offsets_first:
                    data = tensor.data.unflatten(0, (8, C)).transpose(0, 1)
                else:
                    data = tensor.data.unflatten(0, (C, 2, 2, 2)).transpose(1, 3).flatten(1, 3)
                tensor.data = data.flatten(0, 1).contiguous()


def make_dense_vae(
    constructor: dict[str, Any], weights: dict[str, Tensor], latent_side: int = LATENT_SIDE
) -> OccupancyVAE:
    """Return our occupancy VAE with golden weights."""
    config, _ = dense_vae(constructor, latent_side, "golden settings")
    model = OccupancyVAE(config).eval()
    model.load_published(weights)
    return model


def run_dense_vae(given: GoldenSet, *, wrong: str = "") -> dict[str, Tensor]:
    """Return moments, logits and cells of the golden set."""
    model = make_dense_vae(given.settings["constructor"], given.weights)
    occupancy = torch.from_numpy(given.inputs["occupancy"]) > 0
    if wrong == "group norm 32":
        _replace_norms(model, 32)
    elif wrong == "norm over channels and space":
        _replace_norms(model, 1)
    elif wrong.startswith("up-step's channels"):
        _permute_up_steps(model, offsets_first="offsets first" in wrong)
    with torch.no_grad():
        if wrong == "occupancy not mapped to -1 and 1":
            moments = model.encoder(occupancy[:, None].float())
        else:
            assert not wrong or "norm" in wrong or "up-step" in wrong
            posterior = model.encode(occupancy)
            moments = torch.cat([posterior.mean, posterior.logvar], 1)
        logits = model.decode(torch.from_numpy(given.inputs["latents"]))
    return {"moments": moments, "logits": logits[:, None], "cells": occupied_cells(model, logits)}


def occupied_cells(model: OccupancyVAE, logits: Tensor) -> Tensor:
    """Return the cells (batch, x, y, z) that a dense VAE decoded, sorted."""
    return model.occupied(logits).nonzero().int()
