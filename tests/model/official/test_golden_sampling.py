"""Sampling times, guided trajectories and cells near a mesh are those of the authors' pipeline."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from model.checkpoint import copy_weights
from model.conditioning import image_conditioned_dit
from model.conditioning.image_conditioned_dit import ConditionedDiT
from model.conditioning.image_encoder import ImageEncoder
from model.config import (
    ConditionedDiTConfig,
    EncoderConfig,
    Guidance,
    SamplingOptions,
    TimeSchedule,
)
from model.inference.cells_near_mesh import cells_near, normalized
from model.inference.published_checkpoint import dit_weights
from model.published_settings import LatentScale, dense_dit, sparse_dit
from model.published_weights import published_dit_keys
from model.rectified_flow import schedule
from model.sparse_dit import SparseDiT
from model.structure import dense_level, grid_to_rows, rows_to_grid
from tests.model.official.golden import Golden, error
from tests.model.official.sparse_stages import image_tokens, level_of, restored

torch.set_num_threads(1)
SCHEDULER, SAMPLER, CELLS = Golden("scheduler"), Golden("sampler"), Golden("cells")
TOLERANCE = 2e-5
TIME_TOLERANCE = 1e-6
REACH = 4


@pytest.mark.parametrize("name", SCHEDULER.outputs)
def test_golden_sigmas(name):
    settings, want = SCHEDULER.settings_of(name), SCHEDULER.outputs[name]["sigmas"]
    steps, shift = settings["steps"], settings["shift"]
    times = schedule(steps, shift, "published")
    np.testing.assert_allclose(times, want, rtol=0, atol=TIME_TOLERANCE)

    def off(times):
        return np.abs(np.array(times) - want).max()

    once = torch.linspace(1, 0.001, steps, dtype=torch.float64)
    wrong = {
        "even steps 1 .. 0, shifted once": schedule(steps, shift),
        "shift 1": schedule(steps, 1.0),
        "last step's end not shifted twice": [*(shift * once / (1 + (shift - 1) * once)), 0.0],
    }
    for row in SCHEDULER.controls:
        if row["set"] == name and not row["wrong"].startswith("none:"):
            assert off(wrong.pop(row["wrong"])) == pytest.approx(row["max"], rel=0.02)
            assert row["max"] > TIME_TOLERANCE
    assert not wrong


class NoEncoder(ImageEncoder):
    """An encoder that is never called."""

    trainable = False


def make_model(settings, weights, **times):
    """Return our DiT with its sampling schedule, and the resolution of its level."""
    constructor = settings["constructor"]
    read = dense_dit if settings["stage"] == "DenseDiT" else sparse_dit
    dit_config, _ = read(constructor, "golden settings")
    config = ConditionedDiTConfig(
        dit=dit_config,
        encoder=EncoderConfig(channels=dit_config.condition_channels),
        schedule=TimeSchedule(**{"spacing": "published", "shift": settings["shift"], **times}),
    )
    scale = LatentScale(scale=settings["latents_scale"], shift=settings["latents_shift"])
    dit = SparseDiT(dit_config).eval()
    keys = published_dit_keys(dit_config)
    copy_weights(dit_weights(weights, config, scale), dit, "golden weights", keys)
    return ConditionedDiT(config, dit, NoEncoder()), constructor["resolution"]


def trajectory(monkeypatch, name, guidance=7.0, **times):
    """Return the states and the final latents of a golden set, from the public `generate`."""
    settings, inputs = SAMPLER.settings_of(name), SAMPLER.inputs[name]
    model, resolution = make_model(settings, SAMPLER.weights(name), **times)
    noise = torch.from_numpy(inputs["noise"])
    dense = settings["stage"] == "DenseDiT"
    if dense:
        level = dense_level(resolution, 1)
        rows = grid_to_rows(noise, level)
    else:
        level, order = level_of(torch.from_numpy(inputs["cells"]), resolution, 1)
        rows = noise[order]
    states = []

    def record(_module, arguments):
        # Both passes of a step may be one batch. They have the same latents.
        states.append(arguments[0].feats[: len(level)])

    model.dit.register_forward_pre_hook(record)
    monkeypatch.setattr(image_conditioned_dit, "draw_noise", lambda *_: rows)
    final = model.generate(
        level,
        image_tokens(inputs, 1),
        [0],
        SamplingOptions(steps=settings["steps"], guidance=Guidance(scale=guidance)),
    )
    states = states[:: len(states) // settings["steps"]]
    states = [*states, model.dit.normalize(final)]
    assert len(states) == settings["steps"] + 1

    def golden_rows(x):
        return rows_to_grid(x, level) if dense else restored(x, order)

    return torch.stack([golden_rows(x) for x in states]), golden_rows(final)


@pytest.mark.parametrize("name", SAMPLER.outputs)
def test_golden_trajectories(name, monkeypatch):
    states, final = trajectory(monkeypatch, name)
    want = SAMPLER.outputs[name]
    assert error(states, want["states"]) <= TOLERANCE
    assert error(final, want["final"]) <= TOLERANCE


CHANGES = {
    "shift 1": {"shift": 1.0, "spacing": "even"},
    "even steps, shifted once": {"spacing": "even"},
    "guidance 6.5": {"guidance": 6.5},
    "latents not denormalised": {},
}


@pytest.mark.parametrize(
    "row", SAMPLER.controls, ids=lambda row: f"{row['set']}-{row['wrong']}".replace(" ", "_")
)
def test_golden_control_of_the_sampler(row, monkeypatch):
    states, final = trajectory(monkeypatch, row["set"], **CHANGES[row["wrong"]])
    made = {"states": states, "final": final}
    if row["wrong"] == "latents not denormalised":
        made["final"] = states[-1]
    found = error(made[row["output"]], SAMPLER.outputs[row["set"]][row["output"]])
    assert found > TOLERANCE
    assert found == pytest.approx(row["rel_l2"], rel=0.1)


@pytest.mark.parametrize("name", CELLS.outputs)
def test_golden_cells_near_a_mesh(name):
    inputs, want = CELLS.inputs[name], CELLS.outputs[name]
    side = CELLS.settings_of(name)["side"]
    # The authors' frame is -1 .. 1, ours half of it.
    vertices = normalized(inputs["vertices"] / 2)
    np.testing.assert_allclose(2 * vertices, want["normalised"], rtol=0, atol=1e-6)
    # The distances are taken to the authors' vertices, which are rounded to fp32.
    near = cells_near(want["normalised"] / 2, inputs["faces"], side, REACH / side)
    cells = {tuple(cell) for cell in want["cells"][:, 1:].tolist()}
    assert {tuple(cell) for cell in near.tolist()} == cells
    differs = CELLS.settings_of(name)["cells_that_differ_without_normalising"]
    other = cells_near(inputs["vertices"] / 2, inputs["faces"], side, REACH / side)
    assert len(cells ^ {tuple(cell) for cell in other.tolist()}) == differs


def test_sampling_steps_go_from_noise_to_data():
    times = schedule(50, 6.0, "published")
    assert times[0] == 1.0
    assert times[-1] == 0.0
    assert all(later < earlier for earlier, later in pairwise(times))
