"""Rectified flow: the straight path from data to noise, training times, guidance and samplers.

Time t runs from 0 (data x0) to 1 (noise eps). The network estimates the velocity eps - x0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from model.config import (
    METHODS,
    SPACINGS,
    Guidance,
    Method,
    Spacing,
    TimeDistribution,
)

PUBLISHED_LAST_TIME = 0.001  # before both shifts, of the published schedule's last but one time

Velocity = Callable[[Tensor, float], Tensor]  # (x_NC, t) -> an estimate of eps - x0, [N, C]
VelocityPair = Callable[[Tensor, float], tuple[Tensor, Tensor]]


def sample_times(
    distribution: TimeDistribution, count: int, generator: torch.Generator | None = None
) -> Tensor:
    """Draw training times.

    Args:
        distribution: Distribution of the times.
        count: Number of times.
        generator: Source of the random numbers. None takes torch's global one.

    Returns:
        fp32 [count] on the generator's device, strictly inside (0, 1).
    """
    device = generator.device if generator is not None else None
    if distribution.kind == "uniform":
        t_B = torch.rand(count, generator=generator, device=device)
    else:
        normal_B = torch.randn(count, generator=generator, device=device)
        t_B = torch.sigmoid(distribution.mean + distribution.std * normal_B)
    return shift_times(t_B, distribution.shift).clamp(1e-5, 1 - 1e-5)


def shift_times(t: Tensor, shift: float) -> Tensor:
    """Return shift * t / (1 + (shift - 1) * t).

    0 and 1 are kept. A shift above 1 moves the times between them towards the noise.
    """
    return shift * t / (1 + (shift - 1) * t)


def interpolate(x0_NC: Tensor, eps_NC: Tensor, t_N: Tensor) -> Tensor:
    """Return the point (1 - t) x0 + t eps of the path.

    Args:
        x0_NC: [N, C] data.
        eps_NC: [N, C] noise.
        t_N: [N] or [N, 1], a time for each row.

    Returns:
        [N, C].
    """
    t_N1 = t_N.reshape(-1, 1)
    return (1 - t_N1) * x0_NC + t_N1 * eps_NC


def velocity_target(x0_NC: Tensor, eps_NC: Tensor) -> Tensor:
    """Return the velocity eps - x0 of the path, which the network learns.

    Direct3D-S2 paper (arXiv 2505.17412), section 4.
    """
    return eps_NC - x0_NC


def draw_noise(
    seeds: Sequence[int], counts: Sequence[int], channels: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Draw standard normal noise for a batch of assets.

    The noise is drawn on the CPU. The rows of asset i depend on seeds[i] and counts[i] alone, so
    they are the same on every device and in every batch.

    Args:
        seeds: Seed of each asset.
        counts: Number of rows of each asset.
        channels: Number C of channels.
        device: Where the noise is put.

    Returns:
        fp32 [sum of counts, C].

    Raises:
        ValueError: If there are not as many seeds as counts.
    """
    if len(seeds) != len(counts):
        raise ValueError(f"seeds must be {len(counts)}, one for each asset, got {len(seeds)}")
    parts = [
        torch.randn(count, channels, generator=torch.Generator().manual_seed(seed))
        for seed, count in zip(seeds, counts, strict=True)
    ]
    return torch.cat([torch.empty(0, channels), *parts]).to(device)


def guide(
    conditional: Velocity, both: VelocityPair, guidance: Guidance, counts: Sequence[int]
) -> Velocity:
    """Combine two velocities by classifier-free guidance.

    Inside the interval of times the velocity is u + scale * (c - u), outside it is c. At scale 1
    `both` is never called. With rescale r the guided velocity of each asset is multiplied
    by 1 - r + r * std(c) / std(guided), with deviations over the asset's rows and channels (Lin et
    al. 2023, section 3.4).

    Args:
        conditional: c, with the image.
        both: c, and u without the image.
        guidance: Scale, interval and rescale.
        counts: Number of rows of each asset in x.
    """
    low, high = guidance.interval
    counts = list(counts)

    def velocity(x_NC: Tensor, t: float) -> Tensor:
        if guidance.scale == 1.0 or not low <= t <= high:
            return conditional(x_NC, t)
        c_NC, u_NC = both(x_NC, t)
        guided_NC = u_NC + guidance.scale * (c_NC - u_NC)
        if guidance.rescale == 0.0:
            return guided_NC
        pairs = zip(guided_NC.split(counts), c_NC.split(counts), strict=True)
        return torch.cat([_rescale(guided, c, guidance.rescale) for guided, c in pairs])

    return velocity


def _rescale(guided_NC: Tensor, c_NC: Tensor, share: float) -> Tensor:
    """Move the deviation of an asset's guided velocity towards that of the conditional one.

    A velocity without a deviation is returned unchanged.
    """
    if guided_NC.numel() < 2:
        return guided_NC
    wanted = c_NC.float().std()
    actual = guided_NC.float().std()
    tiny = torch.finfo(torch.float32).tiny
    ratio = torch.where(actual > 0, wanted / actual.clamp(min=tiny), 1.0)
    return guided_NC * (1 - share + share * ratio).to(guided_NC.dtype)


def schedule(steps: int, shift: float = 1.0, spacing: Spacing = "even") -> list[float]:
    """Return steps + 1 times from 1 to 0.

    Args:
        steps: Number of steps.
        shift: Shift of the times, see `shift_times`.
        spacing: "even" spaces them evenly before the shift. "published" does so for all but the
            last one, from 1 to a time of 0.001 that is shifted itself, so that this end is shifted
            twice. The published Direct3D-S2 pipeline samples at these times.

    Raises:
        ValueError: If `steps` is below 1, `shift` is not positive and finite, or `spacing` is
            unknown.
    """
    if spacing not in SPACINGS:
        raise ValueError(f"spacing must be one of {SPACINGS}, got {spacing!r}")
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be an int of at least 1, got {steps!r}")
    if not 0.0 < shift < float("inf"):
        raise ValueError(f"shift must be positive and finite, got {shift}")
    if spacing == "even":
        return shift_times(torch.linspace(1, 0, steps + 1, dtype=torch.float64), shift).tolist()
    end = shift_times(torch.tensor(PUBLISHED_LAST_TIME, dtype=torch.float64), shift).item()
    times = shift_times(torch.linspace(1, end, steps, dtype=torch.float64), shift)
    return [*times.tolist(), 0.0]


@torch.no_grad()
def sample(
    velocity: Velocity,
    noise_NC: Tensor,
    *,
    steps: int,
    method: Method = "euler",
    shift: float = 1.0,
    spacing: Spacing = "even",
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> Tensor:
    """Follow dx/dt = velocity(x, t) from noise at t = 1 to data at t = 0.

    Args:
        velocity: The velocity. Euler calls it once a step, Heun (second order) twice.
        noise_NC: [N, C].
        steps: Number of steps.
        method: "euler" or "heun".
        shift: Shift of the times, see `shift_times`.
        spacing: Spacing of the times, see `schedule`.
        progress: Wraps the steps, as tqdm does.

    Returns:
        [N, C] in the noise's dtype.

    Raises:
        ValueError: If the method is unknown, or as `schedule`.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {method!r}")
    times = schedule(steps, shift, spacing)
    x_NC = noise_NC
    for i in progress(range(steps)):
        t, next_t = times[i], times[i + 1]
        step = next_t - t
        v_NC = velocity(x_NC, t).to(x_NC.dtype)
        if method == "heun":
            next_v_NC = velocity(x_NC + step * v_NC, next_t).to(x_NC.dtype)
            v_NC = (v_NC + next_v_NC) / 2
        x_NC = x_NC + step * v_NC
    return x_NC
