"""Alternatives to the launches of the SSA kernels, and the kernels run with any launch.

Kernels and alternatives whose gain is likeliest and largest come first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from kernels import BlockIndex
from kernels.attention import block_score as block_score_module
from kernels.attention import gates as gates_module
from kernels.attention import segment as segment_module
from kernels.attention import segment_backward as segment_backward_module
from kernels.attention import selection as selection_module
from kernels.attention import selection_backward as selection_backward_module
from kernels.attention.block_score import block_score
from kernels.attention.gates import gates_backward
from kernels.attention.inverse_lists import InverseListStorage
from kernels.attention.launches import (
    Launch,
    block_score_launch,
    combine_launch,
    gates_launch,
    reduce_launch,
    segment_dkdv_launch,
    segment_dq_launch,
    segment_forward_launch,
    selection_dkdv_launch,
    selection_dq_launch,
    selection_forward_launch,
)
from kernels.attention.scaled_keys import scale_keys
from kernels.attention.segment import compressed_segments, segment_forward, window_segments
from kernels.attention.segment_backward import segment_dkdv, segment_dq
from kernels.attention.selection import combine_partials, selection_partials
from kernels.attention.selection_backward import (
    SelectionGradient,
    combine_dq,
    partial_dkdv,
    partial_dq,
    reduce_dkdv,
)
from kernels.attention.softmax import lse_dtype
from kernels.attention.ssa import split_queries, ssa_forward
from kernels.runtime.integer_math import cdiv, next_power_of_2

Change = Mapping[str, int]
Tensors = tuple[Tensor, ...]

ALTERNATIVES: dict[str, tuple[Change, ...]] = {
    "block_score": (
        {"unroll": 2},
        {"unroll": 2, "emulated": 4},
        {"unroll": 2, "emulated": 8},
        {"emulated": 4},
        {"unroll": 2, "tiles": 4, "emulated": 4},
        {"tiles": 4},
        {"tiles": 1},
        {"unroll": 2, "registers": 112},
        {"unroll": 4},
        {"registers": 128},
        {"tiles": 8},
        {"stages": 2},
        {"stages": 4},
    ),
    "compressed_forward": (
        {"emulated": 4},
        {"emulated": 8},
        {"unroll": 2},
        {"unroll": 2, "emulated": 4},
        {"registers": 168, "emulated": 4},
        {"keys": 64, "registers": 168, "emulated": 4},
        {"rows": 64, "keys": 64, "registers": 128, "emulated": 4},
        {"stages": 4},
        {"registers": 120},
        {"rows": 256, "warps": 8},
    ),
    "compressed_dq": (
        {"emulated": 4},
        {"emulated": 8},
        {"rows": 128, "warps": 8},
        {"rows": 128, "warps": 8, "emulated": 4},
        {"keys": 32, "unroll": 2},
        {"registers": 168},
        {"unroll": 2},
        {"stages": 2},
    ),
    "compressed_dkdv": (
        {"emulated": 8},
        {"programs": 2640},
        {"programs": 10560},
        {"registers": 160},
        {"rows": 64, "keys": 64},
        {"keys": 64, "unroll": 2},
        {"unroll": 2},
        {"stages": 2},
        {"keys": 128, "warps": 8, "registers": 128},
    ),
    "selection_forward": (
        {"emulated": 4},
        {"emulated": 8},
        {"unroll": 2},
        {"registers": 128},
        {"rows": 64, "registers": 128},
    ),
    "selection_dq": (
        {"emulated": 4},
        {"emulated": 8},
        {"unroll": 2},
        {"rows": 128, "warps": 8},
        {"registers": 96},
        {"keys": 64, "registers": 128},
    ),
    "selection_dkdv": (
        {"emulated": 8},
        {"registers": 160},
        {"unroll": 2},
        {"stages": 3},
    ),
    "window_forward": ({"emulated": 4}, {"registers": 168}, {"rows": 64, "keys": 64}),
    "window_dq": ({"emulated": 4}, {"keys": 64, "registers": 128}),
    "window_dkdv": ({"emulated": 8}, {"rows": 32, "keys": 128}),
    "gates": ({"rows": 1}, {"rows": 4}, {"warps": 8}),
    "selection_combine": ({"rows": 32}, {"rows": 128}),
    "combine_dq": ({"rows": 32}, {"rows": 128}),
    "reduce_dkdv": ({"keys": 16}, {"keys": 64, "stages": 2}, {"warps": 4}),
}
"""For each kernel the fields of the launch that each alternative changes, for heads of 32."""

RANGE_BYTES = (200 << 20, 800 << 20, 1600 << 20)
"""Alternative sizes of a range of queries."""

KERNELS: dict[str, Any] = {
    "block_score": block_score_module._block_score,
    "compressed_forward": segment_module._segment_fwd,
    "window_forward": segment_module._segment_fwd,
    "selection_forward": selection_module._selection_fwd,
    "selection_combine": selection_module._selection_combine,
    "gates": gates_module._gates_bwd,
    "compressed_dq": segment_backward_module._segment_dq,
    "window_dq": segment_backward_module._segment_dq,
    "compressed_dkdv": segment_backward_module._segment_dkdv,
    "window_dkdv": segment_backward_module._segment_dkdv,
    "selection_dq": selection_backward_module._selection_dq,
    "combine_dq": selection_backward_module._combine_dq,
    "selection_dkdv": selection_backward_module._selection_dkdv,
    "reduce_dkdv": selection_backward_module._reduce_dkdv,
}
"""The Triton kernels that the launches are of."""


def alternatives(present: Launch, changes: Sequence[Change]) -> dict[str, Launch]:
    """Return the changed launches by name, without those that change nothing."""
    named = {
        ", ".join(f"{key} {value}" for key, value in change.items()): replace(present, **change)
        for change in changes
    }
    return {name: launch for name, launch in named.items() if launch != present}


@dataclass(frozen=True)
class Step:
    """The kernels of a step of SSA, each runnable alone with any launch.

    The kernels of the selected branch run on the first range of queries, as within a step.
    """

    index: BlockIndex
    """Block index of the tokens."""

    inputs: list[Tensor]
    """q, k, v, ck, cv and gates."""

    saved: Tensors
    """What the forward pass keeps."""

    present: dict[str, Launch]
    """The launch of each kernel that is chosen for these inputs."""

    run: dict[str, Callable[[Launch | None], Tensors]] = field(repr=False)
    """Each kernel as a function of its launch, which returns the results."""


def make_step(
    index: BlockIndex, inputs: Sequence[Tensor], top_k: int, cotangent: Tensor, scale: float
) -> Step:
    """Run a forward pass and return its kernels and those of its backward pass.

    Args:
        index: Block index of the tokens.
        inputs: q, k, v, ck, cv and gates, contiguous, without gradients.
        top_k: Number of blocks that each query selects, fewer than the smallest asset has.
        cotangent: Gradient of the output.
        scale: Factor of the scores.
    """
    q, k, v, ck, cv, gates = inputs
    N, H, D = q.shape
    G = k.shape[1]
    _, *saved = ssa_forward(inputs, index, top_k, False, scale)
    cmp, sel, win, lse, flags, selected, *lists = saved
    keys, ckeys = scale_keys(k, scale, ck)
    folded = None if keys.scaled is None else flags
    (dcmp, dsel, dwin), _ = gates_backward((cmp, sel, win), lse, gates, cotangent, folded)
    compressed, windows = compressed_segments(index), window_segments(index, False)
    ranges = split_queries(index, H, G, D, top_k, q.element_size())
    queries, part_lists = ranges[0], InverseListStorage(*lists).views(ranges, G, top_k)[0]
    first, last = queries.first_token, queries.last_token
    gradient = SelectionGradient(q, keys, v, dsel, selected, part_lists, index, queries)
    part, part_lse = selection_partials(q, keys, v, part_lists, flags, index, queries, top_k)
    part_dq, part_dkdv = partial_dq(gradient), partial_dkdv(gradient)
    dq = torch.empty_like(q)
    dk, dv = (torch.empty_like(x, dtype=torch.float32) for x in (k, v))

    def forward(segments: Any, branch_keys: Any, values: Tensor) -> Callable[..., Tensors]:
        def run(launch: Launch | None) -> Tensors:
            to = q.new_empty(N, H, dtype=lse_dtype(q))
            chunks = (flags, index.chunk_of)
            return segment_forward(q, branch_keys, values, segments, to, *chunks, launch), to

        return run

    def combine(launch: Launch | None) -> Tensors:
        o, o_lse, out = torch.empty_like(q), torch.empty_like(lse[1]), torch.empty_like(q)
        combine_partials(
            part, part_lse, selected, queries, o, o_lse, (cmp, win, gates, out), launch
        )
        return o[first:last], o_lse[first:last], out[first:last]

    def gate_gradients(launch: Launch | None) -> Tensors:
        branches, dgates = gates_backward((cmp, sel, win), lse, gates, cotangent, folded, launch)
        rows = (x.dot if x.weighted is None else x.weighted for x in branches)
        return dgates, *rows

    def add_dq(launch: Launch | None) -> Tensors:
        combine_dq(part_dq, gradient, dq.zero_(), launch)
        return (dq,)

    def add_dkdv(launch: Launch | None) -> Tensors:
        reduce_dkdv(part_dkdv, gradient, dk.zero_(), dv.zero_(), launch)
        return dk, dv

    run: dict[str, Callable[[Launch | None], Tensors]] = {
        "block_score": lambda x: (block_score(q, ck, lse[0], index, scale, first, last, x),),
        "compressed_forward": forward(compressed, ckeys, cv),
        "compressed_dq": lambda x: (segment_dq(q, ckeys, cv, dcmp, compressed, launch=x),),
        "compressed_dkdv": lambda x: segment_dkdv(q, ckeys, cv, dcmp, compressed, x),
        "selection_forward": lambda x: selection_partials(
            q, keys, v, part_lists, flags, index, queries, top_k, x
        ),
        "selection_dq": lambda x: (partial_dq(gradient, x),),
        "selection_dkdv": lambda x: partial_dkdv(gradient, x),
        "window_forward": forward(windows, keys, v),
        "window_dq": lambda x: (segment_dq(q, keys, v, dwin, windows, launch=x),),
        "window_dkdv": lambda x: segment_dkdv(q, keys, v, dwin, windows, x),
        "gates": gate_gradients,
        "selection_combine": combine,
        "combine_dq": add_dq,
        "reduce_dkdv": add_dkdv,
    }
    score_programs = (len(index.tile_blocks) - 1) * cdiv(queries.num_tokens, 64) * G
    present = {
        "block_score": block_score_launch(q, score_programs),
        "compressed_forward": segment_forward_launch(q),
        "window_forward": segment_forward_launch(q),
        "selection_forward": selection_forward_launch(q),
        "selection_combine": combine_launch(q),
        "gates": gates_launch(next_power_of_2(H), D),
        "compressed_dq": segment_dq_launch(q, False),
        "window_dq": segment_dq_launch(q, True),
        "compressed_dkdv": segment_dkdv_launch(q, len(ck), False, False),
        "window_dkdv": segment_dkdv_launch(q, len(k), True, windows.ordered),
        "selection_dq": selection_dq_launch(q),
        "combine_dq": combine_launch(q),
        "selection_dkdv": selection_dkdv_launch(q),
        "reduce_dkdv": reduce_launch(q),
    }
    return Step(index, list(inputs), tuple(saved), present, run)


def results(step: Step, kernel: str, launch: Launch | None) -> Tensors:
    """Return what a kernel computes. Every element of it is written."""
    tensors = step.run[kernel](launch)
    if kernel == "selection_dkdv":
        rows = _written_rows(step)
        tensors = tuple(x[rows] for x in tensors)
    return tensors


def _written_rows(step: Step) -> slice:
    """The rows of the partial dk and dv of the first range that its items have."""
    q, k = step.inputs[:2]
    lists, top_k = step.saved[6:], step.saved[5].shape[2]
    H, D, G = q.shape[1], q.shape[2], k.shape[1]
    ranges = split_queries(step.index, H, G, D, top_k, q.element_size())
    sums = InverseListStorage(*lists).views(ranges, G, top_k)[0].sums
    return slice(0, int(sums[2, -1]))


def compiled_resources(kernel: str, known: set[str]) -> dict[str, int] | None:
    """Return the resources of the kernel's binary that was compiled last.

    Args:
        kernel: Name of the kernel.
        known: Names of the binaries seen before. The new one is added.

    Returns:
        Registers and spilled bytes of a thread, and bytes of shared memory of a program. None if
        nothing was compiled since.
    """
    function = KERNELS[kernel]
    cache = function.device_caches[torch.cuda.current_device()][0]
    names = {f"{function.__name__} {key}": key for key in cache}
    new = [name for name in names if name not in known]
    known.update(new)
    if not new:
        return None
    binary = cache[names[new[-1]]]
    return {
        "registers": binary.n_regs,
        "spilled": binary.n_spills,
        "shared": binary.metadata.shared,
    }
