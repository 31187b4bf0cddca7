"""Rectified flow: the straight path from data to noise, times to train at, samplers, guidance, noise by seed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from model.config import METHODS, Guidance, Method, TimeDistribution

Velocity = Callable[[Tensor, float], Tensor]  # (x [N, C], t) -> [N, C], an estimate of eps - x0


def sample_times(
    distribution: TimeDistribution, count: int, generator: torch.Generator | None = None
) -> Tensor:
    """fp32 [count] on the generator's device, strictly inside (0, 1)."""
    device = generator.device if generator is not None else None
    if distribution.kind == "uniform":
        t_B = torch.rand(count, generator=generator, device=device)
    else:
        normal_B = torch.randn(count, generator=generator, device=device)
        t_B = torch.sigmoid(distribution.mean + distribution.std * normal_B)
    return shift_times(t_B, distribution.shift).clamp(1e-5, 1 - 1e-5)


def shift_times(t: Tensor, shift: float) -> Tensor:
    """shift * t / (1 + (shift - 1) * t): keeps 0 and 1; a shift above 1 moves the times between towards the noise."""
    return shift * t / (1 + (shift - 1) * t)


def interpolate(x0_NC: Tensor, eps_NC: Tensor, t_N: Tensor) -> Tensor:
    """x_t = (1 - t) x0 + t eps: [N, C], with t [N] or [N, 1], one per row."""
    t_N1 = t_N.reshape(-1, 1)
    return (1 - t_N1) * x0_NC + t_N1 * eps_NC


def velocity_target(x0_NC: Tensor, eps_NC: Tensor) -> Tensor:
    """What the network predicts: the path's velocity eps - x0. paper, sec. 4"""
    return eps_NC - x0_NC


def draw_noise(
    seeds: Sequence[int], counts: Sequence[int], channels: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Standard normal fp32 [sum of counts, channels]: the rows of asset i depend on seeds[i] and counts[i] alone.

    Drawn on the CPU, so the same on every device and in every batch. ValueError if there are not as many seeds as
    counts.
    """
    if len(seeds) != len(counts):
        raise ValueError(f"seeds must be {len(counts)}, one an asset, got {len(seeds)}")
    parts = [
        torch.randn(count, channels, generator=torch.Generator().manual_seed(seed))
        for seed, count in zip(seeds, counts, strict=True)
    ]
    return torch.cat([torch.empty(0, channels), *parts]).to(device)


def guide(
    conditional: Velocity, unconditional: Velocity, guidance: Guidance, counts: Sequence[int]
) -> Velocity:
    """u + scale * (c - u) inside the interval, c outside; at scale 1 the unconditional velocity is never asked for.

    counts: rows of each asset in x. With rescale r each asset's guided velocity is multiplied by
    1 - r + r * std(c) / std(guided), deviations over the asset's rows and channels (Lin et al. 2023, sec. 3.4).
    """
    low, high = guidance.interval
    counts = list(counts)

    def velocity(x_NC: Tensor, t: float) -> Tensor:
        c_NC = conditional(x_NC, t)
        if guidance.scale == 1.0 or not low <= t <= high:
            return c_NC
        u_NC = unconditional(x_NC, t)
        guided_NC = u_NC + guidance.scale * (c_NC - u_NC)
        if guidance.rescale == 0.0:
            return guided_NC
        parts = zip(guided_NC.split(counts), c_NC.split(counts), strict=True)
        return torch.cat([_rescaled(guided, c, guidance.rescale) for guided, c in parts])

    return velocity


def _rescaled(guided_NC: Tensor, c_NC: Tensor, share: float) -> Tensor:
    """An asset's guided velocity, closer to the conditional one's deviation; as it is where it has none."""
    if guided_NC.numel() < 2:
        return guided_NC
    want, have = c_NC.float().std(), guided_NC.float().std()
    ratio = torch.where(have > 0, want / have.clamp(min=torch.finfo(torch.float32).tiny), 1.0)
    return guided_NC * (1 - share + share * ratio).to(guided_NC.dtype)


def schedule(steps: int, shift: float = 1.0) -> list[float]:
    """steps + 1 times from 1 to 0, evenly spaced before `shift_times`. ValueError for steps < 1 or shift <= 0."""
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be an int of at least 1, got {steps!r}")
    if not 0.0 < shift < float("inf"):
        raise ValueError(f"shift must be positive and finite, got {shift}")
    return shift_times(torch.linspace(1, 0, steps + 1, dtype=torch.float64), shift).tolist()


@torch.no_grad()
def sample(
    velocity: Velocity,
    noise_NC: Tensor,
    *,
    steps: int,
    method: Method = "euler",
    shift: float = 1.0,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> Tensor:
    """Follows dx/dt = velocity(x, t) from noise at t = 1 to data at t = 0: [N, C] in the noise's dtype.

    Euler asks for the velocity once a step, Heun (second order) twice. `progress` may wrap the steps, as tqdm does.
    ValueError for an unknown method, or as `schedule`.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {method!r}")
    times = schedule(steps, shift)
    x_NC = noise_NC
    for i in progress(range(steps)):
        t, following = times[i], times[i + 1]
        step = following - t
        v_NC = velocity(x_NC, t).to(x_NC.dtype)
        if method == "heun":
            ahead_NC = velocity(x_NC + step * v_NC, following).to(x_NC.dtype)
            v_NC = (v_NC + ahead_NC) / 2
        x_NC = x_NC + step * v_NC
    return x_NC
