"""The sparse stages of golden files: our models with the golden weights, run on the golden inputs.

The options make one thing wrong, as the controls of the golden files name it.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kernels import token_order
from model.conv import SparseConv3d
from model.image_tokens import ImageTokens
from model.layers import Mlp, position_embedding
from model.published_settings import sparse_dit
from model.published_weights import published_kernel
from model.sparse_dit import SparseDiT
from model.sparse_tensor import Level, SparseTensor
from tests.model.official.golden import Arrays, GoldenSet

LATENTS = 16


def level_of(cells: Tensor, resolution: int, assets: int) -> tuple[Level, Tensor]:
    """Return the level of golden cells, and the golden row of each of its rows."""
    order = token_order(cells)
    return Level.from_coords(cells[order].int(), resolution, assets), order


def restored(x: Tensor, order: Tensor) -> Tensor:
    """Return the rows of a level in the order of the golden file."""
    out = torch.empty_like(x)
    out[order] = x
    return out


def image_tokens(inputs: Arrays, assets: int) -> ImageTokens:
    """Return the condition of a golden set, ragged with coordinates or the same for all assets."""
    feats = torch.from_numpy(inputs["condition"])
    if feats.ndim == 3:
        count = feats.shape[1]
        coords = torch.zeros(assets * count, 4, dtype=torch.int32)
        coords[:, 0] = torch.arange(assets).repeat_interleave(count)
        starts = count * torch.arange(assets + 1, dtype=torch.int32)
        return ImageTokens(feats.flatten(0, 1), coords, starts, count)
    coords = torch.from_numpy(inputs["condition_coords"])
    counts = torch.bincount(coords[:, 0].long(), minlength=assets)
    starts = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()
    return ImageTokens(feats, coords, starts, int(counts.max()))


def make_dit(constructor: dict[str, Any], weights: dict[str, Tensor], **changes: Any) -> SparseDiT:
    """Return our DiT with golden weights. `changes` replace fields of its configuration."""
    config, _ = sparse_dit(constructor, "golden settings")
    model = SparseDiT(replace(config, **changes)).eval()
    if not model.config.condition_projection:
        weights = {name: x for name, x in weights.items() if not name.startswith("cond_proj.")}
    model.load_published(weights, torch.tensor(1.0), torch.tensor(0.0))
    return model


def use_erf_gelu(model: nn.Module) -> None:
    """Replace the tanh approximation of the GELU in every MLP by its definition."""

    def exact(mlp: Mlp, x: Tensor) -> tuple[Tensor, None]:
        return mlp[2](nn.functional.gelu(mlp[0](x))), None

    mlps = [part for part in model.modules() if isinstance(part, Mlp)]
    assert mlps
    for part in mlps:
        part.with_product = partial(exact, part)  # pyright: ignore[reportAttributeAccessIssue]


def count_taps_z_first(model: nn.Module) -> None:
    """Undo the reordering of the taps of every sparse convolution."""
    for part in model.modules():
        if isinstance(part, SparseConv3d):
            part.weight.data = published_kernel(part.weight.data)


def exchange_block_positions(model: SparseDiT) -> None:
    """Exchange x and z in the positions that the compressed keys have in their blocks."""
    m = model.config.compress_block
    for block in model.blocks:
        position = block.attention.key_position  # pyright: ignore[reportAttributeAccessIssue]
        assert isinstance(position, nn.Parameter)
        position.data = position.data.unflatten(0, (m, m, m)).transpose(0, 2).flatten(0, 2)


def run_dit(given: GoldenSet, *, wrong: str = "", **changes: Any) -> dict[str, Tensor]:
    """Return the velocity of a golden set."""
    inputs, constructor = given.inputs, given.settings["constructor"]
    assets = given.settings["assets"]
    model = make_dit(constructor, given.weights, **changes)
    image = image_tokens(inputs, assets)
    t = torch.from_numpy(inputs["t"])
    if wrong == "erf GELU":
        use_erf_gelu(model)
    elif wrong == "taps counted z first":
        count_taps_z_first(model)
    elif wrong == "block positions x and z exchanged":
        exchange_block_positions(model)
    elif wrong == "t not times 1000":
        t = t / 1000
    elif wrong == "condition x and y exchanged":
        image = replace(image, coords=image.coords[:, [0, 2, 1, 3]])
    elif wrong == "condition with positions (0, 0, index)":
        xyz = torch.zeros(len(image.feats_SC), 3)
        xyz[:, 2] = torch.arange(len(xyz)) % image.max_tokens
        positions = position_embedding(xyz, image.feats_SC.shape[1])
        image = replace(image, feats_SC=image.feats_SC + positions)
    else:
        assert not wrong or changes, f"nothing is made wrong by {wrong!r}"
    cells = torch.from_numpy(inputs["cells"])
    level, order = level_of(cells, constructor["resolution"], assets)
    with torch.no_grad():
        latents = SparseTensor(torch.from_numpy(inputs["latents"])[order], level)
        return {"velocity": restored(model(latents, t, image), order)}
