"""The SS-DiT computes what the authors' SparseDiT computes, in both published versions."""

import re

import pytest
import torch

from model.sparse_dit import SparseDiT
from tests.model.official.controls import assert_control_fails, assert_golden, names_of_controls
from tests.model.official.golden import Golden
from tests.model.official.sparse_stages import run_dit

torch.set_num_threads(1)
FILES = ("dit_v10_512", "dit_v10_1024", "dit_v11_512", "dit_v11_1024")
GOLDEN = {name: Golden(name) for name in FILES}
CONTROLS = [(name, wrong) for name in FILES for wrong in names_of_controls(GOLDEN[name])]
TOLERANCE = 2e-5


def changed_options(golden, wrong):
    """Return the fields of our configuration that make a control wrong."""
    constructor = golden.settings["constructor"]
    if match := re.fullmatch(r"position factor ([\d.]+)", wrong):
        resolution = 8 * constructor["resolution"]
        return {"position_resolution": int(float(match[1]) * resolution)}
    if match := re.fullmatch(r"top-k (\d+)", wrong):
        return {"top_k": int(match[1])}
    return {
        "pooling divides by n": {"plus_one_pooling": False},
        "no shifted windows": {"shifted_windows": False},
        "condition not projected, not placed": {"condition_projection": False},
    }.get(wrong, {})


@pytest.mark.parametrize("name", FILES)
def test_golden_velocity(name):
    assert_golden(GOLDEN[name], run_dit, TOLERANCE)


@pytest.mark.parametrize(("name", "wrong"), CONTROLS)
def test_golden_control(name, wrong):
    golden = GOLDEN[name]
    options = changed_options(golden, wrong)
    assert_control_fails(golden, wrong, run_dit, TOLERANCE, **options)


def test_golden_settings_cover_both_attentions():
    constructors = [golden.settings["constructor"] for golden in GOLDEN.values()]
    assert {c["compression_version"] for c in constructors} == {"v1", "v2"}
    assert {c["factor"] for c in constructors} == {1.0, 0.5}
    assert SparseDiT.Config().position_factor(1024) == 0.5
