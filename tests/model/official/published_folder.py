"""Folders in the layout of the published weights at tiny sizes, with weights of the formula."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from model import published_settings
from model.checkpoint import KeyMap, unchanged
from model.conditioning.image_encoder import DinoEncoder
from model.inference.published_checkpoint import read_settings
from model.layers import position_embedding
from model.occupancy_vae import OccupancyVAE
from model.published_weights import (
    flat_positions,
    published_dit_keys,
    published_kernel,
    published_occupancy_keys,
    published_vae_keys,
)
from model.refiner import VolumeRefiner
from model.sparse_dit import SparseDiT
from model.sparse_vae import SparseVAE
from tests.model.official.golden import golden_weights

TINY_CONFIG = Path(__file__).with_name("tiny_config.yaml")  # of version 1.0
IMAGE_SIZE = 56
ISO_VALUE = 0.2  # of the surface in the published pipeline
TINY_REFINER = (8, 8, 8, 8)  # widths, which are no setting of the published classes


def sections(version: str) -> dict[str, Any]:
    """Return the content of config.yaml of a tiny model of version "1.0" or "1.1"."""
    content = yaml.safe_load(TINY_CONFIG.read_text(encoding="utf-8"))
    if version == "1.1":
        changes = {"compression_block_size": 8, "compression_version": "v1"}
        for name in ("sparse_dit_512", "sparse_dit_1024"):
            content[name]["params"].update(changes, sparse_conditions=False)
    return content


def write_config(path: Path, content: dict[str, Any]) -> None:
    """Write config.yaml."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")


def published_shapes(model: nn.Module, keys: KeyMap) -> dict[str, list[int]]:
    """Return the published names and shapes of a model of ours: the inverse of its key map."""

    def blocks(x: Tensor) -> Tensor:
        m = round(len(x) ** (1 / 3))
        return x.unflatten(0, (m, m, m))

    inverse = {
        unchanged: unchanged,
        torch.t: torch.t,
        published_kernel: published_kernel,
        flat_positions: blocks,
    }
    state = model.state_dict()
    return {
        theirs: list(inverse[convert](state[ours]).shape)
        for theirs, (ours, convert) in keys.items()
        if not theirs.startswith("latents_")
    }


def state_dict(
    model: nn.Module, keys: KeyMap | None, salt: str, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Return weights of the formula under the published names of a model."""
    if keys is None:
        keys = {name: (name, unchanged) for name in model.state_dict()}
    arrays = golden_weights(published_shapes(model, keys), salt)
    return {name: torch.from_numpy(array).to(dtype) for name, array in arrays.items()}


def write_folder(
    path: Path, version: str, *, dtype: torch.dtype = torch.float16, **changes: dict[str, Any]
) -> Path:
    """Write a published folder.

    Args:
        path: The folder.
        version: "1.0" or "1.1".
        dtype: Dtype of the weights.
        **changes: Settings to change, by section.
    """
    content = sections(version)
    for name, settings in changes.items():
        content[name]["params"].update(settings)
    write_config(path, content)
    settings = read_settings(path)
    dense = settings.structure
    dit = SparseDiT(dense.flow.dit)
    side = dense.occupancy.latent_side
    cells = torch.cartesian_prod(*[torch.arange(side)] * 3)
    dit_weights = state_dict(dit, published_dit_keys(dense.flow.dit), "dense_dit:", dtype)
    dit_weights["pos_emb"] = position_embedding(cells, dense.flow.dit.channels).to(dtype)
    occupancy = OccupancyVAE(dense.occupancy)
    keys = published_occupancy_keys(dense.occupancy)
    vae_weights = state_dict(occupancy, keys, "dense_vae:", dtype)
    torch.save({"vae": vae_weights, "dit": dit_weights}, path / "model_dense.ckpt")
    for sparse in settings.sparse.values():
        vae, dit = SparseVAE(sparse.vae), SparseDiT(sparse.dit.dit)
        weights = {
            "vae": state_dict(vae, published_vae_keys(sparse.vae), f"{sparse.name}:", dtype),
            "dit": state_dict(dit, published_dit_keys(sparse.dit.dit), f"{sparse.name}:", dtype),
        }
        # The values lie around that of the surface, so that there is one whatever is rounded.
        weights["vae"]["decoder.out_layer.bias"].fill_(ISO_VALUE)
        torch.save(weights, path / f"model_sparse_{sparse.name}.ckpt")
    names = ("model_refiner.ckpt", "model_refiner_1024.ckpt")
    for name, config in zip(names, settings.refiners.values(), strict=True):
        weights = state_dict(VolumeRefiner(config), None, "refiner:", dtype)
        torch.save({"refiner": weights}, path / name)
    return path


def write_dino(path: Path) -> Path:
    """Write a tiny random DINOv2 as a folder of the transformers library."""
    encoder = DinoEncoder.random(channels=32, layers=1, heads=2, image_size=IMAGE_SIZE)
    encoder.model.save_pretrained(path)  # pyright: ignore[reportCallIssue]
    return path


def use_tiny_refiners(monkeypatch: Any) -> None:
    """Let the published refiners have the widths of TINY_REFINER."""
    monkeypatch.setattr(published_settings, "REFINER_WIDTHS", TINY_REFINER)
