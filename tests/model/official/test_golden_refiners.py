"""The refiners compute what the authors' Voxel_RefinerXL and Voxel_RefinerXL_sign compute."""

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from model.published_settings import refiner as refiner_config
from model.refiner import VolumeRefiner
from tests.model.official.controls import WITHIN, assert_control_fails, names_of_controls
from tests.model.official.golden import Golden
from tests.model.official.refiner_stages import run_refiner_512, run_refiner_1024

torch.set_num_threads(2)
GOLDEN = {size: Golden(f"refiner_{size}") for size in (512, 1024)}
TOLERANCES = {"refined": 5e-6, "volume_values": 5e-6, "unet": 5e-6, "logits": 5e-6, "halved": 1e-6}
EPS = "norm eps 1e-6"  # lies too close to the tolerance; the constructed modules are read instead
MAY_DIFFER = 1e-3  # share of the signs whose logits are nearly 0


# Controls for which all patches are computed again, which takes minutes.
SLOW = ("filled with 0 outside the cells", "halved with the mean")


def controls(size):
    """Return what is wrong in each control of a refiner, as parameters of a test."""
    return [
        pytest.param(wrong, marks=[pytest.mark.slow] if wrong in SLOW else [])
        for wrong in names_of_controls(GOLDEN[size], EPS)
    ]


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def test_golden_refiner_512():
    errors = GOLDEN[512].errors(run_refiner_512)
    assert set(errors) == {"patch/unet", "patch/refined", "whole/volume_values"}
    for key, error in errors.items():
        assert error <= TOLERANCES[key.split("/")[1]], f"{key} is off by {error:.2e}"


@pytest.mark.parametrize("wrong", controls(512))
def test_golden_control_of_the_refiner_512(wrong, monkeypatch):
    run = partial(run_refiner_512, monkeypatch=monkeypatch)
    assert_control_fails(GOLDEN[512], wrong, run, TOLERANCES["refined"])


def test_golden_refiner_1024():
    golden = GOLDEN[1024]
    errors = golden.errors(run_refiner_1024, ("patch",))
    assert set(errors) == {"patch/unet", "patch/logits"}
    for key, error in errors.items():
        assert error <= TOLERANCES[key.split("/")[1]], f"{key} is off by {error:.2e}"
    want = golden.outputs["whole"]
    made = run_refiner_1024(golden.given("whole"))
    np.testing.assert_allclose(made["halved"].numpy(), want["halved"], rtol=0, atol=1e-6)
    bits = np.unpackbits(made["signs"]) != np.unpackbits(want["signs"])
    assert bits.mean() <= MAY_DIFFER
    differs = np.abs(made["volume_values"].numpy() - want["volume_values"]) > 1e-5
    assert differs.mean() <= MAY_DIFFER


@pytest.mark.parametrize("wrong", controls(1024))
def test_golden_control_of_the_refiner_1024(wrong, monkeypatch):
    run = partial(run_refiner_1024, monkeypatch=monkeypatch)
    assert_control_fails(GOLDEN[1024], wrong, run, TOLERANCES["logits"])


@pytest.mark.parametrize("size", GOLDEN)
def test_golden_epsilon_of_the_norms(size):
    """The controls of another epsilon are within a factor of four of the tolerance."""
    recorded = GOLDEN[size].control(EPS)
    assert all(4 * TOLERANCES["refined"] > error / WITHIN for error in recorded.values())
    values = GOLDEN[size].settings["constructor"]
    with torch.device("meta"):
        model = VolumeRefiner(refiner_config(values, signs=size == 1024, where="golden settings"))
    epsilons = {part.eps for part in model.modules() if isinstance(part, nn.GroupNorm)}
    assert epsilons == {1e-5}
