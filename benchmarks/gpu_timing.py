"""Timing of GPU functions, and the measured peak rates of a GPU."""

from __future__ import annotations

import collections
import platform
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from pipeline.core.provenance import commit_of_code


def gpu_and_versions() -> dict[str, Any]:
    """Return the name of the GPU, the versions of torch, Triton and Python, and the commit."""
    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "commit": commit_of_code() or "unknown",
    }


def milliseconds_pair(values: Iterable[float] | None) -> str:
    """Return two times as "forward/backward", or "-" if there are none."""
    return "-" if values is None else "/".join(f"{value:.3g}" for value in values)


def milliseconds(function: Callable[[], object], repeats: int = 20) -> float:
    """Return the median of CUDA event times after a warm-up."""
    for _ in range(min(3, repeats)):
        function()
    events = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(repeats)]
    for start, end in events:
        start.record()
        function()
        end.record()
    torch.cuda.synchronize()
    return float(np.median([start.elapsed_time(end) for start, end in events]))


def capture(function: Callable[[], object]) -> Callable[[], object]:
    """Return a function that replays the given one as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = function()

    def replay() -> object:
        graph.replay()
        return outputs  # the graph writes to them

    return replay


def graph_milliseconds(function: Callable[[], object]) -> float:
    """Return the median time of the function as a CUDA graph, without launches by the host."""
    return milliseconds(capture(function))


def paired_milliseconds(
    first: Callable[[], object], second: Callable[[], object], sample_ms: float
) -> tuple[float, float, float]:
    """Time two functions in turn, so that both see the same clock rates.

    Args:
        first: A function.
        second: Another one.
        sample_ms: Milliseconds that the repetitions of one function may take. There are at least
            three of each.

    Returns:
        The medians of both, and the median of second / first.
    """
    once = milliseconds(first, 1) + milliseconds(second, 1)
    repeats = min(50, max(3, int(2 * sample_ms / once)))
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(3)] for _ in range(repeats)]
    for start, middle, end in events:
        start.record()
        first()
        middle.record()
        second()
        end.record()
    torch.cuda.synchronize()
    times = np.array([[a.elapsed_time(b), b.elapsed_time(c)] for a, b, c in events])
    first_ms, second_ms = np.median(times, axis=0)
    return float(first_ms), float(second_ms), float(np.median(times[:, 1] / times[:, 0]))


def kernel_milliseconds(function: Callable[[], object], repeats: int = 5) -> dict[str, float]:
    """Return the milliseconds in each kernel of one call, largest first."""
    function()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(repeats):
            function()
        torch.cuda.synchronize()
    times: dict[str, float] = collections.defaultdict(float)
    for event in profile.events() or ():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            name = event.name if event.name.startswith("_") else "torch"
            times[name] += event.device_time / 1e3 / repeats
    return dict(sorted(times.items(), key=lambda item: -item[1]))


@triton.jit
def _exponentials(x_ptr, y_ptr, ROUNDS: tl.constexpr, SIZE: tl.constexpr):
    i = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    x = tl.load(x_ptr + i)
    for _ in range(ROUNDS):
        x = tl.exp2(-x)
    tl.store(y_ptr + i, x)


def peak_rates() -> dict[str, float]:
    """Return the measured rates of this GPU.

    Returns:
        "flop": bf16 FLOP/s of a matrix product. "byte": bytes/s of a copy, read and written. "exp":
        powers of two per second.
    """
    a, b = torch.randn(2, 8192, 8192, device="cuda").bfloat16()
    x = torch.rand(1 << 24, device="cuda")
    y = torch.empty_like(x)
    big = torch.empty(2, 1 << 30, dtype=torch.uint8, device="cuda")
    rounds, grid = 256, (x.numel() // 1024,)
    product_ms = milliseconds(lambda: a @ b)
    copy_ms = milliseconds(lambda: big[0].copy_(big[1]))
    exp_ms = milliseconds(lambda: _exponentials[grid](x, y, rounds, 1024))
    return {
        "flop": 2 * 8192**3 / product_ms * 1e3,
        "byte": 2 * (1 << 30) / copy_ms * 1e3,
        "exp": rounds * x.numel() / exp_ms * 1e3,
    }
