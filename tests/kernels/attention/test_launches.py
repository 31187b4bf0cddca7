"""Every alternative launch of a kernel computes what the present launch computes."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch

from benchmarks.launch_alternatives import ALTERNATIVES, KERNELS, alternatives, make_step, results
from benchmarks.launches_timing import SmallStep, relative_difference
from kernels.attention import scaled_keys
from kernels.attention.launches import CHOSEN, Launch, SsaLaunches
from kernels.attention.ssa import ssa_backward, ssa_forward
from tests.kernel_inputs import random_index
from tests.kernels.attention.test_ssa import make_inputs
from tests.kernels.compile_ahead import SHARED_LIMIT, SPILL_LIMIT
from tests.kernels.compiled_launches import compiled_launches

# The interpreter takes seconds per launch.
FAST = {"block_score", "gates", "reduce_dkdv"}


@pytest.fixture
def step(monkeypatch):
    # The interpreter computes bf16 wrongly, and emulation is for dtypes with scaled keys.
    monkeypatch.setattr(scaled_keys, "FOLDED_DTYPES", {torch.float16})
    index = random_index([70], 16)
    inputs = make_inputs(index, 4, 2, 16, torch.float16)
    inputs[0] *= 0.5
    return make_step(index, inputs, 2, make_inputs(index, 4, 2, 16, torch.float16, 1)[0], 0.25)


@pytest.mark.parametrize(
    "kernel",
    [k if k in FAST else pytest.param(k, marks=pytest.mark.slow) for k in ALTERNATIVES],
)
def test_alternatives_change_no_more_than_roundings(step, kernel):
    assert step.saved[4][0] == 0  # every score is bounded
    expected = [x.clone() for x in results(step, kernel, None)]
    changed = alternatives(step.present[kernel], ALTERNATIVES[kernel])
    assert changed
    emulated = False
    for name, launch in changed.items():
        difference = relative_difference(results(step, kernel, launch), expected)
        assert difference <= 1e-3, name
        emulated |= launch.emulated > 0 and difference > 0
    assert emulated == any("emulated" in change for change in ALTERNATIVES[kernel])


def test_tiles_of_the_block_score_have_the_same_bits(step):
    (expected,) = results(step, "block_score", None)
    for tiles, unroll in ((1, 1), (2, 2), (4, 1), (8, 4)):
        launch = replace(step.present["block_score"], tiles=tiles, unroll=unroll)
        assert torch.equal(results(step, "block_score", launch)[0], expected), (tiles, unroll)


def test_the_table_of_alternatives_names_every_launch():
    names = {field.name for field in fields(SsaLaunches)} - {"range_bytes"}
    assert set(ALTERNATIVES) == set(KERNELS) == names


def test_a_step_takes_the_launches_that_it_is_given(step, monkeypatch):
    taken = []
    original = Launch.options.fget

    def options(launch):
        taken.append(launch)
        return original(launch)

    monkeypatch.setattr(Launch, "options", property(options))
    marked = {
        name: Launch(**{**vars(launch), "stages": 20 + i})
        for i, (name, launch) in enumerate(step.present.items())
    }
    launches = SsaLaunches(**marked)
    out, *saved = ssa_forward(step.inputs, step.index, 2, False, 0.25, launches)
    ssa_backward(out, step.inputs, saved, step.index, 2, False, 0.25, launches)
    assert {launch.stages for launch in taken} == {20 + i for i in range(len(marked))}


def test_a_wrong_result_is_more_than_the_tolerance():
    index = random_index([20], 16)
    inputs, (cotangent, *_) = (make_inputs(index, 2, 2, 16, torch.float16, i) for i in (0, 1))

    class Broken(SmallStep):
        def _reference(self, dtype, selected_GNT):
            out, *grads = super()._reference(dtype, selected_GNT)
            return [out * 1.01, *grads]

    step = SmallStep(index, inputs, 1, cotangent)
    assert step.error(CHOSEN) <= 1
    assert Broken(index, inputs, 1, cotangent).error(CHOSEN) > 1


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "spill_limit"), [(90, SPILL_LIMIT), (80, 1024)])
def test_every_alternative_compiles(arch, spill_limit):
    # Alternatives are measured on Hopper. On an A100 some spill, which only makes them slow.
    launches = compiled_launches("-m", "tests.kernels.attention.compile_launches", arch, "bfloat16")
    assert len(launches) > sum(map(len, ALTERNATIVES.values()))
    for launch in launches:
        assert launch["shared"] <= SHARED_LIMIT, launch
        assert launch["spilled"] <= spill_limit, launch
