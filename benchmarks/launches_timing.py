"""Times the launches of the SSA kernels against alternatives, each checked before it is timed."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from triton.compiler import CompilationError
from triton.runtime.errors import TritonError

from benchmarks.gpu import require_gpu
from benchmarks.gpu_timing import capture, gpu_and_versions, paired_milliseconds
from benchmarks.launch_alternatives import (
    ALTERNATIVES,
    KERNELS,
    RANGE_BYTES,
    Step,
    Tensors,
    alternatives,
    compiled_resources,
    make_step,
    results,
)
from benchmarks.ssa_config import LaunchesConfig, SsaConfig
from benchmarks.ssa_timing import make_inputs, token_sets
from benchmarks.token_sets import surface_coords
from kernels import BlockIndex
from kernels.attention import reference
from kernels.attention.launches import CHOSEN, Launch, SsaLaunches
from kernels.attention.ssa import ssa_backward, ssa_forward
from pipeline.core.errors import UserError
from pipeline.core.files import write_atomically

log = logging.getLogger(__name__)

DIFFERENCE_LIMIT = 5e-3
"""Largest difference from the present launch's results, relative to their norm: bf16 rounding."""

GAIN = 0.98
"""A launch is better if it takes less than this share of the present one's time at every size."""

TIMING_SHARE = 0.8
"""Share of the time for alternatives. The rest is for whole steps with the better launches."""

FAILURES = (RuntimeError, CompilationError, TritonError, torch.OutOfMemoryError)
"""What a launch ends with that needs more than the GPU has, or that the compiler refuses."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """A launch of a kernel, at one number of tokens."""

    kernel: str
    launch: str
    """What differs from the present launch."""

    tokens: int = 0
    """0 if the launch was not timed."""

    present_ms: float = 0.0
    ms: float = 0.0
    ratio: float = 0.0
    """Median of the time divided by that of the present launch, measured in turn."""

    error: float = 0.0
    """Largest error of a small step, as a share of the tolerance of the kernels' tests."""

    difference: float = 0.0
    """Difference of the results from the present launch's, relative to their norm. 0: the same."""

    registers: int = -1
    spilled: int = -1
    shared: int = -1
    """Of a thread, bytes of a thread, and bytes of a program. -1 stands for not known."""

    failed: str = ""
    """Why the launch cannot be used."""


def largest_error(found: Sequence[Tensor], exact: Sequence[Tensor], rounded: Sequence[Tensor]):
    """Return the largest error as a share of the tolerance of the kernels' tests.

    The tolerance of a tensor is twice the error of the rounded reference, or 4 ulp of its largest
    number.
    """
    share = 0.0
    for x, e, r in zip(found, exact, rounded, strict=True):
        ulp = 4 * torch.finfo(x.dtype).eps * e.abs().max().item()
        allowed = max(2 * (r.double() - e).abs().max().item(), ulp)
        error = torch.nan_to_num((x.double() - e).abs(), nan=float("inf")).max().item()
        share = max(share, error / allowed)
    return share


def relative_difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the largest norm of a difference, relative to the expected norm. 0 for equal bits."""
    largest = 0.0
    for x, e in zip(found, expected, strict=True):
        if not torch.equal(x, e):
            difference = torch.linalg.vector_norm(x.double() - e.double())
            share = (difference / torch.linalg.vector_norm(e.double())).item()
            largest = max(largest, share if share == share else float("inf"))
    return largest


class SmallStep:
    """A step that is small enough for the fp64 reference."""

    def __init__(self, index: BlockIndex, inputs: list[Tensor], top_k: int, cotangent: Tensor):
        self._index = index
        self._inputs = inputs
        self._top_k = top_k
        self._cotangent = cotangent
        self._scale = inputs[0].shape[2] ** -0.5
        self._selected: Tensor | None = None
        self._references: tuple[list[Tensor], list[Tensor]] = ([], [])

    def error(self, launches: SsaLaunches) -> float:
        """Return the `largest_error` of output and gradients with these launches."""
        options = (self._index, self._top_k, False, self._scale, launches)
        out, *saved = ssa_forward(self._inputs, *options)
        grads = ssa_backward(self._cotangent, self._inputs, saved, *options)
        selected = saved[5]
        if self._selected is None or not torch.equal(selected, self._selected):
            self._selected = selected
            self._references = (
                self._reference(torch.float64, selected),
                self._reference(self._inputs[0].dtype, selected),
            )
        return largest_error([out, *grads], *self._references)

    def _reference(self, dtype: torch.dtype, selected_GNT: Tensor) -> list[Tensor]:
        x = [t.to(dtype).requires_grad_() for t in self._inputs]
        out = reference.spatial_sparse_attention(
            x, self._index, top_k=self._top_k, shifted=False, scale=self._scale,
            selected_GNT=selected_GNT,
        )  # fmt: skip
        return [out.detach(), *torch.autograd.grad(out, x, self._cotangent.to(dtype))]


class Timer:
    """Checks launches and times them against the present ones, until the time is over."""

    def __init__(
        self,
        steps: list[Step],
        small: Callable[[SsaLaunches], float],
        sample_ms: float,
        seconds_left: Callable[[], float],
    ):
        self._steps = steps
        self._small = small
        self._sample_ms = sample_ms
        self._seconds_left = seconds_left
        self._binaries: set[str] = set()

    def resources(self, kernel: str) -> dict[str, int]:
        """Return the resources of the binary that was compiled since the last call."""
        return compiled_resources(kernel, self._binaries) or {}

    def time(self, first: Callable[[], object], second: Callable[[], object]):
        """Return the milliseconds of both and the ratio."""
        return paired_milliseconds(capture(first), capture(second), self._sample_ms)

    def alternatives(self, kernel: str) -> Iterator[Measurement]:
        """Measure the alternatives of a kernel, in order."""
        # The present launch can depend on the number of tokens, and so what an alternative changes.
        launches = [alternatives(s.present[kernel], ALTERNATIVES[kernel]) for s in self._steps]
        for name in dict.fromkeys(name for named in launches for name in named):
            if self._seconds_left() <= 0:
                return
            pairs = zip(self._steps, launches, strict=True)
            changed = [(step, named[name]) for step, named in pairs if name in named]
            yield from self._alternative(kernel, name, changed)

    def _alternative(
        self, kernel: str, name: str, changed: list[tuple[Step, Launch]]
    ) -> Iterator[Measurement]:
        row = Measurement(kernel=kernel, launch=name)
        try:
            for step, _ in changed:
                step.run[kernel](None)
            self.resources(kernel)  # those of the present launch do not count
            step, launch = changed[-1]
            step.run[kernel](launch)
            row = replace(row, **self.resources(kernel))
            row = replace(row, error=self._small(replace(CHOSEN, **{kernel: launch})))
        except FAILURES as error:
            yield replace(row, failed=(str(error).strip() or repr(error)).splitlines()[0][:120])
            return
        if row.error > 1:
            yield replace(row, failed=f"error {row.error:.3g} of the tolerance")
            return
        for step, launch in changed:
            if self._seconds_left() <= 0:
                return
            tokens = step.index.num_tokens
            found = relative_difference(results(step, kernel, launch), results(step, kernel, None))
            row = replace(row, tokens=tokens, difference=found)
            if found > DIFFERENCE_LIMIT:
                yield replace(row, failed=f"results differ by {found:.1e}")
                return
            present_ms, ms, ratio = self.time(
                partial(step.run[kernel], None), partial(step.run[kernel], launch)
            )
            yield replace(row, present_ms=present_ms, ms=ms, ratio=ratio)


def better_launches(rows: Iterable[Measurement], step: Step) -> SsaLaunches:
    """Return, for a step, the fastest launches of those that are better at every measured size."""
    ratios: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        if not row.failed:
            ratios.setdefault((row.kernel, row.launch), []).append(row.ratio)
    best: dict[str, tuple[float, str]] = {}
    for (kernel, name), values in ratios.items():
        if max(values) < GAIN and kernel in ALTERNATIVES:
            best[kernel] = min(best.get(kernel, (1.0, "")), (sum(values) / len(values), name))
    launches = {
        kernel: alternatives(step.present[kernel], ALTERNATIVES[kernel]).get(name)
        for kernel, (_, name) in best.items()
    }
    return replace(CHOSEN, **launches)


def measure_whole(
    timer: Timer, step: Step, cotangent: Tensor, name: str, launches: SsaLaunches
) -> Iterator[Measurement]:
    """Measure a forward and a backward pass with other launches."""
    top_k, scale = step.saved[5].shape[2], step.inputs[0].shape[2] ** -0.5
    options = (step.index, top_k, False, scale)

    def forward(launches: SsaLaunches) -> Tensors:
        return ssa_forward(step.inputs, *options, launches)

    def backward(saved: Sequence[Tensor], launches: SsaLaunches) -> Tensors:
        return ssa_backward(cotangent, step.inputs, saved, *options, launches)

    passes = {"forward": (partial(forward, CHOSEN), partial(forward, launches))}
    saved = forward(launches)[1:]
    passes["backward"] = partial(backward, step.saved, CHOSEN), partial(backward, saved, launches)
    for way, (present, other) in passes.items():
        found = relative_difference(other()[:1], present()[:1])
        present_ms, ms, ratio = timer.time(present, other)
        yield Measurement(
            kernel=f"whole {way}", launch=name, tokens=step.index.num_tokens,
            present_ms=present_ms, ms=ms, ratio=ratio, difference=found,
        )  # fmt: skip


def table(rows: Iterable[Measurement]) -> str:
    """Return a Markdown table of measurements."""
    lines = [
        "| kernel | launch | tokens | present ms | ms | ratio | difference | error "
        "| registers, spilled, shared bytes |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        used = ", ".join(
            "-" if value < 0 else str(value)
            for value in (row.registers, row.spilled, row.shared)
        )  # fmt: skip
        if row.failed:
            times = [f"{row.tokens or '-'}", "-", "-", row.failed]
        else:
            times = [f"{row.tokens}", f"{row.present_ms:.3g}", f"{row.ms:.3g}", f"{row.ratio:.3f}"]
        difference = "equal" if row.difference == 0 else f"{row.difference:.1e}"
        cells = [row.kernel, row.launch, *times, difference, f"{row.error:.2f}", used]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def check_names(kernels: Sequence[str]) -> None:
    """Check the names of kernels.

    Raises:
        UserError: If a name is not in the table of alternatives.
    """
    unknown = [name for name in kernels if name not in ALTERNATIVES]
    if unknown:
        raise UserError(f"kernels must be among {', '.join(ALTERNATIVES)}, got {unknown[0]}")


def _random_step(coords: Tensor, cfg: LaunchesConfig) -> tuple[BlockIndex, list[Tensor], Tensor]:
    """Index, random inputs and a random gradient of the output."""
    index = BlockIndex.from_coords(coords.cuda(), 1)
    sizes = SsaConfig(heads=cfg.heads, kv_heads=cfg.kv_heads, head_size=cfg.head_size)
    inputs = [x.detach() for x in make_inputs(index, coords.cuda(), sizes)]
    if cfg.top_k >= index.max_blocks:
        raise UserError(f"top-k must be below {index.max_blocks} blocks, got {cfg.top_k}")
    return index, inputs, torch.randn_like(inputs[0])


def _write(path: Path, machine: dict, rows: Sequence[Measurement]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    result = {**machine, "rows": [asdict(row) for row in rows]}
    write_atomically(path, json.dumps(result, indent=1) + "\n")


def time_launches(cfg: LaunchesConfig) -> None:
    """Print a table, and write it as JSON.

    Raises:
        UserError: If there is no GPU, or a kernel is not known, or a token set cannot be used.
    """
    begin = time.monotonic()
    check_names(cfg.kernels)
    require_gpu()

    def seconds_left(share: float) -> float:
        return begin + share * cfg.total_s - time.monotonic()

    scale = cfg.head_size**-0.5
    index, inputs, cotangent = _random_step(surface_coords(2062, 32), cfg)
    small = SmallStep(index, inputs, cfg.top_k, cotangent)
    present_error = small.error(CHOSEN)
    log.info("present launches: error %.2f of the tolerance", present_error)
    steps, cotangents = [], []
    for coords in token_sets(SsaConfig(tokens=cfg.tokens, coords=cfg.coords)):
        index, inputs, cotangent = _random_step(coords, cfg)
        steps.append(make_step(index, inputs, cfg.top_k, cotangent, scale))
        cotangents.append(cotangent)
        log.info("%d tokens after %.0f s", index.num_tokens, time.monotonic() - begin)

    timer = Timer(steps, small.error, cfg.sample_ms, lambda: seconds_left(TIMING_SHARE))
    machine = {**gpu_and_versions(), "present_error": present_error}
    machine["present"] = [
        {name: asdict(launch) for name, launch in step.present.items()} for step in steps
    ]
    rows: list[Measurement] = []
    for kernel in cfg.kernels or ALTERNATIVES:
        for row in timer.alternatives(kernel):
            rows.append(row)
            log.info("%s", table([row]).splitlines()[-1])
        _write(cfg.out, machine, rows)

    better = [better_launches(rows, step) for step in steps]
    whole = [] if better == [CHOSEN] * len(steps) else [("better launches", better)]
    if not cfg.kernels:
        for n in RANGE_BYTES:
            sizes = [SsaLaunches(range_bytes=n)] * len(steps)
            whole.append((f"range_bytes {n >> 20} MiB", sizes))
    for name, launches in whole:
        for i, step in enumerate(steps):
            if seconds_left(1) > 0:
                rows += measure_whole(timer, step, cotangents[i], name, launches[i])
    _write(cfg.out, machine, rows)

    gpu = ", ".join(f"{name} {machine[name]}" for name in ("gpu", "torch", "triton", "commit"))
    done = {row.kernel for row in rows}
    missing = [kernel for kernel in cfg.kernels or KERNELS if kernel not in done]
    sys.stdout.write(f"{gpu}\n{table(rows)}\n")
    sys.stdout.write(f"better: {better[-1]}\n")
    if missing:
        sys.stdout.write(f"no time for: {', '.join(missing)}\n")
