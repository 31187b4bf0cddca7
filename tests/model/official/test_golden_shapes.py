"""Every published state dict has a key map that covers exactly its names and shapes."""

import json

import pytest
import torch

from model.checkpoint import convert_weights
from model.occupancy_vae import OccupancyVAE
from model.published_settings import dense_dit, dense_vae, refiner, sparse_dit, sparse_vae
from model.published_weights import (
    published_dit_keys,
    published_occupancy_keys,
    published_vae_keys,
)
from model.refiner import VolumeRefiner
from model.sparse_dit import SparseDiT
from model.sparse_vae import SparseVAE
from tests.model.official.golden import FOLDER, shapes

COUNTS = json.loads((FOLDER / "shapes" / "counts.json").read_text(encoding="utf-8"))
SCALES = ("latents_scale", "latents_shift")  # of the VAE, which the key map of a DiT includes


def on_meta(name):
    """Return our model of a published stage on the meta device, and its key map."""
    values = COUNTS[name]["settings"]
    stage = name.split()[1]
    with torch.device("meta"):
        if stage.startswith("sparse_vae"):
            config, _, _ = sparse_vae(values, name)
            return SparseVAE(config), published_vae_keys(config)
        if stage == "dense_vae":
            config, _ = dense_vae(values, 16, name)
            return OccupancyVAE(config), published_occupancy_keys(config)
        if stage.startswith("refiner"):
            return VolumeRefiner(refiner(values, signs="1024" in stage, where=name)), None
        config, _ = (dense_dit if stage == "dense_dit" else sparse_dit)(values, name)
        return SparseDiT(config), published_dit_keys(config)


@pytest.mark.parametrize("name", COUNTS)
def test_official_names_and_shapes_are_covered(name):
    model, keys = on_meta(name)
    counts = COUNTS[name]
    named = shapes(counts["file"].removesuffix(".json"))
    assert len(named) == counts["tensors"]
    weights = {
        key: torch.empty(shape, device="meta")
        for key, shape in named.items()
        if key not in counts["buffers"]
    }
    if isinstance(model, SparseDiT):
        channels = model.config.latent_channels
        weights |= {key: torch.empty(channels, device="meta") for key in SCALES}
    converted = convert_weights(weights, model, name, keys)
    assert set(converted) == set(model.state_dict())
    assert sum(p.numel() for p in model.parameters()) == counts["parameters"]
    for lost in (next(iter(weights)), list(weights)[-1]):
        fewer = {key: x for key, x in weights.items() if key != lost}
        with pytest.raises(ValueError, match=f"missing {lost}"):
            convert_weights(fewer, model, name, keys)
    wrong = {**weights, next(iter(weights)): torch.empty(3, 5, 7, device="meta")}
    with pytest.raises(ValueError, match=r"of shape \[3, 5, 7\] does not fit"):
        convert_weights(wrong, model, name, keys)


def test_official_parameter_counts_of_the_sparse_dits():
    assert COUNTS["v1.0 sparse_dit_512"]["parameters"] == 520_083_472
    assert COUNTS["v1.1 sparse_dit_512"]["parameters"] == 509_286_416
