"""The structure stage computes what the authors' DenseDiT and DenseShapeVAE compute."""

import pytest
import torch

from model.layers import position_embedding
from model.published_settings import dense_vae
from tests.model.official.controls import assert_control_fails, assert_golden, names_of_controls
from tests.model.official.dense_stages import run_dense_dit, run_dense_vae
from tests.model.official.golden import Golden

torch.set_num_threads(1)
DITS = ("dense_dit", "dense_dit_16")
VAE = "dense_vae"
GOLDEN = {name: Golden(name) for name in (*DITS, VAE)}
DIT_TOLERANCE = 2e-5
VAE_TOLERANCE = {"moments": 1e-5, "logits": 1e-5, "cells": 0.0}


@pytest.mark.parametrize("name", DITS)
def test_golden_velocity_of_the_dense_dit(name):
    assert_golden(GOLDEN[name], run_dense_dit, DIT_TOLERANCE)


@pytest.mark.parametrize(
    ("name", "wrong"), [(name, wrong) for name in DITS for wrong in names_of_controls(GOLDEN[name])]
)
def test_golden_control_of_the_dense_dit(name, wrong):
    assert_control_fails(GOLDEN[name], wrong, run_dense_dit, DIT_TOLERANCE)


def test_golden_positions_of_the_dense_dit():
    golden = GOLDEN["dense_dit"]
    stored = torch.from_numpy(golden.outputs["all"]["pos_emb"])
    side = golden.settings["constructor"]["resolution"]
    cells = torch.cartesian_prod(*[torch.arange(side)] * 3)
    torch.testing.assert_close(position_embedding(cells, stored.shape[1]), stored)


def test_golden_moments_logits_and_cells_of_the_dense_vae():
    assert_golden(GOLDEN[VAE], run_dense_vae, VAE_TOLERANCE)


@pytest.mark.parametrize("wrong", names_of_controls(GOLDEN[VAE]))
def test_golden_control_of_the_dense_vae(wrong):
    assert_control_fails(GOLDEN[VAE], wrong, run_dense_vae, VAE_TOLERANCE["logits"])


def test_golden_threshold_of_the_dense_vae():
    config, _ = dense_vae(GOLDEN[VAE].settings["constructor"], 4, "golden settings")
    assert config.threshold == 0.1
    notes = GOLDEN[VAE].settings["sets"]["all"]
    assert len(GOLDEN[VAE].outputs["all"]["cells"]) == notes["cells"]
    assert notes["cells_if_logit_above_0"] != notes["cells"]
