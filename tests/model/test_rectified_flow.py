"""Rectified flow against the transport of Gaussians, whose velocity and solution are known."""

from __future__ import annotations

import math

import pytest
import torch

from model import rectified_flow as flow
from model.config import Guidance, TimeDistribution
from model.rectified_flow import (
    draw_noise,
    guide,
    interpolate,
    sample,
    sample_times,
    schedule,
    shift_times,
    velocity_target,
)

MU, S = 1.5, 0.3  # mean and standard deviation of the data


def gaussian_velocity(x, t):
    """Return E[eps - x0 | x_t = x] for independent x0 ~ N(MU, S^2) and eps ~ N(0, 1)."""
    variance = ((1 - t) * S) ** 2 + t**2
    centred = x - (1 - t) * MU
    return t / variance * centred - (MU + (1 - t) * S**2 / variance * centred)


def exact(noise):
    """Return the end of the flow: an affine map, since the flow maps quantiles to quantiles."""
    return MU + S * noise


def error(steps, method, shift=1.0):
    noise = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    return (
        (sample(gaussian_velocity, noise, steps=steps, method=method, shift=shift) - exact(noise))
        .abs()
        .max()
        .item()
    )


@pytest.mark.parametrize("method", ["euler", "heun"])
def test_samplers_reach_the_moments_of_the_data(method):
    noise = draw_noise([3], [200_000], 1).double()
    x = sample(gaussian_velocity, noise, steps=200, method=method)
    assert x.mean().item() == pytest.approx(MU, abs=0.005)
    assert x.std().item() == pytest.approx(S, rel=0.02)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("heun", 2)])
def test_samplers_have_their_order_of_convergence(method, order, shift):
    coarse, fine = error(400, method, shift), error(800, method, shift)
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.12)


def test_one_step_solves_a_straight_path():
    x0, eps = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    assert torch.allclose(
        sample(lambda x, t: velocity_target(x0, eps), eps, steps=1), x0, atol=1e-14
    )


def test_the_velocity_is_the_derivative_of_the_path():
    x0, eps = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    t = torch.tensor([0.0, 0.3, 0.7, 1.0], dtype=torch.float64)
    x = interpolate(x0, eps, t)
    assert torch.equal(x[0], x0[0])
    assert torch.equal(x[3], eps[3])
    slope = (interpolate(x0, eps, t + 1e-3) - interpolate(x0, eps, t - 1e-3)) / 2e-3
    assert torch.allclose(slope, velocity_target(x0, eps), atol=1e-10)


def test_the_schedule_runs_from_one_to_zero():
    assert schedule(4) == [1.0, 0.75, 0.5, 0.25, 0.0]
    shifted = schedule(4, shift=3.0)
    assert shifted[0] == 1.0
    assert shifted[-1] == 0.0
    assert shifted[2] == pytest.approx(0.75)  # 3 * .5 / 2
    t = torch.rand(100)
    assert torch.allclose(shift_times(shift_times(t, 3.0), 1 / 3.0), t, atol=1e-6)


def test_training_times_have_their_distribution():
    generator = torch.Generator().manual_seed(0)
    t = sample_times(TimeDistribution(mean=0.5, std=2.0), 100_000, generator)
    logit = torch.logit(t.double())
    assert logit.mean().item() == pytest.approx(0.5, abs=0.03)
    assert logit.std().item() == pytest.approx(2.0, rel=0.01)
    u = sample_times(TimeDistribution(kind="uniform"), 100_000, generator)
    assert u.sort().values.sub(torch.linspace(0, 1, 100_000)).abs().max() < 0.01
    shifted = sample_times(TimeDistribution(kind="uniform", shift=3.0), 100_000, generator)
    assert shifted.median().item() == pytest.approx(0.75, abs=0.01)
    assert torch.equal(
        *(sample_times(TimeDistribution(), 8, torch.Generator().manual_seed(5)) for _ in range(2))
    )


def test_noise_depends_on_seed_and_count_alone():
    together = draw_noise([7, 8, 9], [3, 0, 5], 4)
    assert torch.equal(together[:3], draw_noise([7], [3], 4))
    assert torch.equal(together[3:], draw_noise([9], [5], 4))
    assert not torch.equal(draw_noise([7], [3], 4), draw_noise([8], [3], 4))
    with pytest.raises(ValueError, match="seeds must be 2, one for each asset, got 1"):
        draw_noise([1], [3, 4], 4)


def test_guidance_of_one_is_the_conditional_velocity():
    def never(x, t):
        raise AssertionError("asked for the unconditional velocity")

    noise = draw_noise([1], [50], 2)
    plain = sample(gaussian_velocity, noise, steps=5)
    assert torch.equal(
        sample(guide(gaussian_velocity, never, Guidance(scale=1.0), [50]), noise, steps=5), plain
    )


def test_guidance_acts_inside_its_interval():
    asked = []

    def both(x, t):
        asked.append(t)
        return torch.full_like(x, 3.0), torch.full_like(x, 2.0)

    velocity = guide(
        lambda x, t: torch.full_like(x, 3.0),
        both,
        Guidance(scale=4, interval=(0.3, 0.6)),
        [2],
    )
    x = torch.zeros(2, 1)
    # Inside the interval the velocity is 2 + 4 * (3 - 2).
    values = [velocity(x, t)[0, 0].item() for t in (0.2, 0.3, 0.6, 0.7)]
    assert values == [3.0, 6.0, 6.0, 3.0]
    assert asked == [0.3, 0.6]


def test_rescaling_keeps_the_deviation_of_each_asset():
    c, u = draw_noise([1, 2], [30, 40], 3), draw_noise([3, 4], [30, 40], 3) * 0.5
    counts = [30, 40]

    def guided(rescale):
        options = Guidance(scale=5.0, rescale=rescale)
        return guide(lambda x, t: c, lambda x, t: (c, u), options, counts)(c, 0.5)

    plain, full, half = guided(0.0), guided(1.0), guided(0.5)
    for v, w, p, h in zip(
        full.split(counts), c.split(counts), plain.split(counts), half.split(counts), strict=True
    ):
        assert v.std().item() == pytest.approx(w.std().item(), rel=1e-5)
        assert p.std() > 2 * w.std()
        assert torch.allclose(h, (p + v) / 2, atol=1e-5)
    options = Guidance(scale=5.0, rescale=1.0)
    alone = guide(lambda x, t: c[:30], lambda x, t: (c[:30], u[:30]), options, [30])(c[:30], 0.5)
    assert torch.equal(full[:30], alone)


def test_rescaling_a_constant_velocity_changes_nothing():
    options = Guidance(scale=2.0, rescale=1.0)
    velocity = guide(lambda x, t: x * 0 + 1, lambda x, t: (x * 0 + 1, x * 0), options, [4, 0])
    v = velocity(torch.ones(4, 1), 0.5)
    assert torch.equal(v, torch.full((4, 1), 2.0))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Guidance(scale=-1), "scale must be at least 0"),
        (lambda: Guidance(interval=(0.6, 0.3)), "interval must be"),
        (lambda: Guidance(rescale=1.5), "rescale must be from 0 to 1"),
        (lambda: TimeDistribution(kind="cosine"), "kind must be"),  # pyright: ignore[reportArgumentType]
        (lambda: TimeDistribution(std=0), "std must be positive"),
        (lambda: schedule(0), "steps must be an int of at least 1, got 0"),
        (lambda: schedule(2, shift=0), "shift must be positive"),
        (
            lambda: sample(gaussian_velocity, torch.zeros(1, 1), steps=1, method="rk4"),
            "method must be one of",
        ),
    ],
)
def test_invalid_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_progress_wraps_the_steps():
    seen = []

    def watch(steps):
        for step in steps:
            seen.append(step)
            yield step

    flow.sample(gaussian_velocity, torch.zeros(1, 1), steps=3, progress=watch)
    assert seen == [0, 1, 2]
