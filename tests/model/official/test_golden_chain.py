"""All stages after the image encoder in a row, each from the authors' outputs of the one before."""

import numpy as np
import pytest
import torch

from model.conditioning import image_conditioned_dit
from model.conditioning.image_conditioned_dit import ConditionedDiT
from model.config import (
    ConditionedDiTConfig,
    EncoderConfig,
    Guidance,
    SamplingOptions,
    TimeSchedule,
)
from model.image_tokens import ImageTokens
from model.inference.cells_near_mesh import cells_near, normalized
from model.inference.extract_mesh import extract_meshes
from model.inference.refine_volume import crossed_bricks, outside_of, refined_volume
from model.occupancy_vae import OccupancyVAE
from model.published_settings import dense_dit, dense_vae, sparse_dit, sparse_vae
from model.sparse_dit import SparseDiT
from model.sparse_vae import SparseVAE
from model.structure import dense_level, grid_to_rows, rows_to_grid
from tests.model.official.dense_stages import occupied_cells
from tests.model.official.golden import Golden, error, golden_weights, normal
from tests.model.official.refiner_stages import make_refiner, signed_volume
from tests.model.official.sparse_stages import level_of, restored
from tests.model.official.test_golden_sampling import NoEncoder

torch.set_num_threads(2)
CHAIN = Golden("chain")
TOLERANCE = 1e-5
# The chain's lengths are those of the release divided by 8, but positions stay as they are: the
# cells are taken for those of the grids at R = 512 and 1024.
RESOLUTIONS = {512: 64, 1024: 128}
REACH = 4


def stored(stage, name):
    return torch.from_numpy(CHAIN.outputs[stage][name])


def condition():
    feats = torch.from_numpy(CHAIN.inputs["dense_dit"]["condition"])[0]
    count = len(feats)
    starts = torch.tensor([0, count], dtype=torch.int32)
    return ImageTokens(feats, torch.zeros(count, 4, dtype=torch.int32), starts, count)


def sampled(monkeypatch, stage, config, level, noise):
    """Return the latents that our sampler makes of golden noise."""
    settings = CHAIN.settings_of(stage)
    whole = ConditionedDiTConfig(
        dit=config,
        encoder=EncoderConfig(channels=config.condition_channels),
        image_tokens="all",
        schedule=TimeSchedule(spacing="published", shift=settings["shift"]),
    )
    dit = SparseDiT(config).eval()
    dit.load_published(CHAIN.weights(stage), torch.tensor(1.0), torch.tensor(0.0))
    model = ConditionedDiT(whole, dit, NoEncoder())
    monkeypatch.setattr(image_conditioned_dit, "draw_noise", lambda *_: noise)
    guidance = Guidance(scale=settings["guidance"])
    options = SamplingOptions(steps=settings["steps"], guidance=guidance)
    return model.generate(level, condition(), [0], options)


def test_golden_chain_latents_of_the_structure(monkeypatch):
    config, side = dense_dit(CHAIN.settings_of("dense_dit")["constructor"], "chain")
    level = dense_level(side, 1)
    noise = grid_to_rows(torch.from_numpy(CHAIN.inputs["dense_dit"]["noise"]), level)
    latents = sampled(monkeypatch, "dense_dit", config, level, noise)
    assert error(rows_to_grid(latents, level), CHAIN.outputs["dense_dit"]["latents"]) <= TOLERANCE


def test_golden_chain_cells_of_the_structure():
    settings, weights = CHAIN.settings_of("dense_vae"), CHAIN.weights("dense_vae")
    # The chain's encoder halves the grid once and its decoder doubles it twice. Only the decoder is
    # run, so our encoder, which mirrors it, gets any weights.
    values = {
        **settings["constructor"],
        "in_channels": 1,
        "out_channels": 1,
        "num_res_blocks_encoder": 2,
        "num_res_blocks_middle_encoder": 2,
        "model_channels_encoder": [32, 64, 96],
    }
    config, _ = dense_vae(values, 2, "chain")
    model = OccupancyVAE(config).eval()
    from model.checkpoint import convert_weights
    from model.published_weights import published_occupancy_keys

    keys = {
        theirs: value
        for theirs, value in published_occupancy_keys(config).items()
        if theirs.startswith("decoder.")
    }
    state = model.state_dict()
    for theirs, (ours, _) in keys.items():
        state[ours].copy_(weights[theirs])
    assert {f"decoder.{name}" for name in model.decoder.state_dict()} == {
        ours for ours, _ in keys.values()
    }
    assert convert_weights(state, model, "chain")
    with torch.no_grad():
        logits = model.decode(stored("dense_dit", "latents"))
    assert error(logits[:, None], CHAIN.outputs["dense_vae"]["logits"]) <= TOLERANCE
    cells = {tuple(cell) for cell in occupied_cells(model, logits).tolist()}
    assert cells == {tuple(cell) for cell in CHAIN.outputs["dense_vae"]["cells"].tolist()}


def cells_of(size):
    """Return the level of a resolution's cells, and the golden row of each of its rows."""
    cells = stored("dense_vae" if size == 512 else "cells_1024", "cells").int()
    return level_of(cells, RESOLUTIONS[size], 1)


@pytest.mark.parametrize("size", RESOLUTIONS)
def test_golden_chain_latents_of_the_cells(size, monkeypatch):
    stage = f"dit_{size}"
    settings = CHAIN.settings_of(stage)
    values = {**settings["constructor"], "resolution": RESOLUTIONS[size]}
    config, _ = sparse_dit(values, "chain")
    level, order = cells_of(size)
    noise = normal(f"{stage}.noise", [len(order), 16], CHAIN.settings["salt"]).astype(np.float32)
    latents = sampled(monkeypatch, stage, config, level, torch.from_numpy(noise)[order])
    assert error(restored(latents, order), CHAIN.outputs[stage]["latents"]) <= TOLERANCE


def decoder(size):
    """Return the chain's VAE. Its encoder has fewer blocks and is not run."""
    settings = CHAIN.settings_of(f"vae_{size}")
    constructor = settings["constructor"]
    values = {
        **constructor,
        "resolution": RESOLUTIONS[size],
        "num_blocks_encoder": constructor["num_blocks_decoder"],
    }
    config, _, _ = sparse_vae(values, "chain")
    model = SparseVAE(config).eval()
    weights = dict(CHAIN.weights(f"vae_{size}"))
    extra = {
        name.replace("encoder.blocks.0.", f"encoder.blocks.{n}."): list(x.shape)
        for n in range(1, config.blocks)
        for name, x in weights.items()
        if name.startswith("encoder.blocks.0.")
    }
    arrays = golden_weights(extra, "not run:")
    model.load_published(weights | {name: torch.from_numpy(x) for name, x in arrays.items()})
    return model


def decoded(size):
    level, order = cells_of(size)
    with torch.no_grad():
        latents = stored(f"dit_{size}", "latents")[order]
        values, features = decoder(size).decode_with_features(latents, level)
    return level, order, values, features


@pytest.mark.parametrize("size", RESOLUTIONS)
def test_golden_chain_values_of_the_bricks(size):
    _, order, values, _ = decoded(size)
    stride = CHAIN.settings_of(f"vae_{size}")["stride"]
    made = restored(values, order)
    made = made.flatten()[::stride] if stride > 1 else made
    assert error(made, CHAIN.outputs[f"vae_{size}"]["sdf"]) <= TOLERANCE


def small_level(size):
    """Return the cells on the chain's own grid, which the refiners see."""
    cells = stored("dense_vae" if size == 512 else "cells_1024", "cells").int()
    return level_of(cells, CHAIN.settings_of(f"dit_{size}")["constructor"]["resolution"], 1)[0]


@pytest.mark.slow
def test_golden_chain_refined_volume_at_512():
    settings = CHAIN.settings_of("refiner_512")
    model = make_refiner(settings, CHAIN.weights("refiner_512"), settings["patch"], signs=False)
    _, _, values, features = decoded(512)
    volume = refined_volume(model, small_level(512), values, features)
    assert error(volume, CHAIN.outputs["refiner_512"]["volume"]) <= TOLERANCE


def test_golden_chain_cells_at_1024():
    volume, settings = stored("refiner_512", "volume"), CHAIN.settings_of("cells_1024")
    level = CHAIN.settings_of("refiner_512")["level"]
    ((vertices, faces),) = extract_meshes(*crossed_bricks(volume, level), iso_value=level)
    near = cells_near(normalized(vertices), faces, settings["side"], REACH / settings["side"])
    made = {tuple(cell) for cell in near.tolist()}
    want = {tuple(cell) for cell in stored("cells_1024", "cells")[:, 1:].tolist()}
    # Marching cubes cuts ambiguous cubes otherwise than the authors' library.
    assert len(made ^ want) <= 0.01 * len(want)


@pytest.mark.slow
def test_golden_chain_signs_at_1024():
    settings = CHAIN.settings_of("refiner_1024")
    model = make_refiner(settings, CHAIN.weights("refiner_1024"), settings["patch"], signs=True)
    _, _, values, _ = decoded(1024)
    level = small_level(1024)
    volume = signed_volume(level, values, outside_of(model, level, values))
    want = CHAIN.outputs["refiner_1024"]["volume"]
    differs = np.abs(volume.flatten()[:: settings["stride"]].numpy() - want) > 1e-4
    assert differs.mean() <= 1e-3
