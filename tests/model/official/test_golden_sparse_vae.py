"""The SS-VAE computes what the authors' SparseSDFVAE computes."""

import re

import pytest
import torch

from model import layers
from model.published_settings import sparse_vae as vae_settings
from model.sparse_tensor import BrickBatch, Level
from model.sparse_vae import SparseVAE
from tests.model.official.controls import assert_control_fails, assert_golden, names_of_controls
from tests.model.official.golden import Golden
from tests.model.official.sparse_stages import (
    count_taps_z_first,
    level_of,
    restored,
    use_erf_gelu,
)

torch.set_num_threads(1)
GOLDEN = Golden("vae")
TOLERANCE = 1e-5


def run_vae(given, *, wrong="", monkeypatch=None):
    """Return the posterior, the decoded values and the features of a golden set."""
    settings, inputs = given.settings, given.inputs
    config, _, _ = vae_settings(settings["constructor"], "golden settings")
    if wrong == "pooling divides by n":
        config = type(config)(**{**vars(config), "plus_one_pooling": False})
    model = SparseVAE(config).eval()
    model.load_published(given.weights)
    cells = torch.from_numpy(inputs["cells"])
    level, order = level_of(cells, settings["cell_resolution"], settings["assets"])
    values, latents = (torch.from_numpy(inputs[key])[order] for key in ("values", "latents"))
    if wrong == "taps counted z first":
        count_taps_z_first(model)
    elif wrong == "erf GELU":
        use_erf_gelu(model)
    elif wrong == "no shifted windows":
        for part in (model.encoder, model.decoder):
            for block in part.transformer.blocks:
                block.shifted = False
    elif match := re.fullmatch(r"position factor ([\d.]+)", wrong):
        monkeypatch.setattr(layers, "position_factor", lambda _: float(match[1]))
    elif wrong and wrong not in ("pooling divides by n", "points counted x first"):
        raise AssertionError(wrong)
    sharp = torch.zeros(values.shape, dtype=torch.bool)
    batch = BrickBatch(level, values, sharp, settings["R"])
    with torch.no_grad():
        posterior = model.encode(batch)
        sdf, features = model.decode_with_features(latents, level)
    if wrong == "points counted x first":
        sdf = sdf.unflatten(1, (8, 8, 8)).transpose(1, 3).flatten(1)
    made = {"mean": posterior.mean, "logvar": posterior.logvar, "sdf": sdf}
    if "features" in GOLDEN.outputs[given.name]:
        made["features"] = features.unflatten(0, (-1, 512))
    return {key: restored(x, order) for key, x in made.items()}


def test_golden_posterior_values_and_features():
    assert_golden(GOLDEN, run_vae, TOLERANCE)
    assert any("features" in outputs for outputs in GOLDEN.outputs.values())


@pytest.mark.parametrize("wrong", names_of_controls(GOLDEN))
def test_golden_control(wrong, monkeypatch):
    assert_control_fails(GOLDEN, wrong, run_vae, TOLERANCE, monkeypatch=monkeypatch)


def test_golden_chunks_change_nothing():
    """The authors' decoder works in chunks, ours as a whole. Their results agree."""
    (control,) = (row for row in GOLDEN.controls if row["wrong"].startswith("none:"))
    assert control["max"] == 0
    assert isinstance(level_of(torch.tensor([[0, 1, 2, 3]]), 64, 1)[0], Level)
