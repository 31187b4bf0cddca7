"""Recorded functions: the same results as calls, without the host's work."""

from __future__ import annotations

import pytest
import torch

from kernels import token_order
from model.config import DiTConfig
from model.cuda_graph import ReplayedFunction
from model.image_tokens import ImageTokens
from model.sparse_dit import SparseDiT
from model.sparse_tensor import Level, SparseTensor
from tests.kernel_inputs import random_coords


def test_every_call_on_the_cpu_or_with_gradients_runs_the_function():
    seen = []

    def double(x, y):
        seen.append(x.clone())
        return 2 * x + y

    replayed = ReplayedFunction(double)
    for value in range(4):
        out = replayed(torch.full((3,), float(value)), torch.ones(3))
        assert out.tolist() == [2 * value + 1] * 3
    assert len(seen) == 4


@pytest.mark.gpu
def test_recorded_calls_follow_their_inputs_and_do_not_share_results():
    calls = []

    def function(x, t):
        calls.append(1)
        return (x * t).cumsum(0)

    replayed = ReplayedFunction(function)
    x = torch.arange(5.0, device="cuda")
    with torch.no_grad():
        results = [replayed(x + n, torch.tensor(n + 1.0, device="cuda")) for n in range(5)]
        for n, result in enumerate(results):
            assert torch.equal(result, ((x + n) * (n + 1)).cumsum(0))
        assert len(calls) == 2
        with pytest.raises(ValueError, match=r"must keep the shape \[5\].* got \[4\]"):
            replayed(x[:4], torch.tensor(1.0, device="cuda"))
    replayed(x, torch.tensor(1.0, device="cuda"))
    assert len(calls) == 3, "a call with gradients must not be replayed"


@pytest.mark.gpu
@pytest.mark.parametrize("attention", ["ssa", "full"])
def test_a_recorded_dit_gives_the_same_velocities(attention):
    torch.manual_seed(0)
    sizes = {"channels": 256, "blocks": 4, "heads": 8, "condition_channels": 64}
    model = SparseDiT(DiTConfig(**sizes, latent_channels=16, attention=attention)).cuda()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    coords = random_coords([2500, 1200], 32)
    level = Level.from_coords(coords[token_order(coords)].cuda(), 32, 2)
    starts = torch.tensor([0, 40, 65], dtype=torch.int32, device="cuda")
    places = torch.zeros(65, 4, dtype=torch.int32, device="cuda")
    image = ImageTokens(torch.randn(65, 64, device="cuda"), places, starts, 40)

    def velocity(x_NC, t_B):
        return model(SparseTensor(x_NC, level), t_B, image, fixed=fixed)

    replayed = ReplayedFunction(velocity)
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        fixed = model.fixed_inputs(level, image)
        for n in range(4):
            x_NC = torch.randn(len(level), 16, device="cuda")
            t_B = torch.tensor([0.2 * n, 1 - 0.2 * n], device="cuda")
            assert torch.equal(replayed(x_NC, t_B), velocity(x_NC, t_B))
