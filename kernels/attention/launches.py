"""Tile sizes and compiler options of the SSA kernels: one function for each kernel chooses them.

They change the time of a kernel. Results change at most in the order of sums, and within the bound
of `kernels.attention.softmax.exponentials` where exponentials are emulated. The choices were
measured on an H200; `python -m benchmarks.ssa launches` measures alternatives on another GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.runtime.triton_ops import register_limit


@dataclass(frozen=True, kw_only=True)
class Launch:
    """Tile sizes and compiler options of a kernel. A kernel ignores the fields that it lacks."""

    rows: int
    """Rows of queries of a tile: pairs of a query and a head, but queries in the block score."""

    keys: int = 0
    """Keys of a tile."""

    warps: int = 4
    """Warps of a program."""

    stages: int = 3
    """Steps of the loop whose loads are in flight, as Triton counts them."""

    registers: int = 0
    """Largest number of registers of a thread. 0 stands for no limit."""

    unroll: int = 1
    """Steps of the loop that are compiled as one."""

    emulated: int = 0
    """One of this many exponentials is computed by a polynomial. A power of two; 0 means none."""

    tiles: int = 1
    """Tiles of queries that a program of the block score processes one after another."""

    programs: int = 0
    """Wanted number of programs of the gradients of segments' keys. The queries are split for it.
    It does not depend on the GPU, so that sums do not."""

    @property
    def options(self) -> dict[str, int]:
        """The compiler options."""
        limit = register_limit(self.registers) if self.registers else {}
        return {"num_warps": self.warps, "num_stages": self.stages, **limit}


@dataclass(frozen=True, kw_only=True)
class SsaLaunches:
    """The launches of a step of SSA. None stands for the choice of the functions below."""

    block_score: Launch | None = None
    compressed_forward: Launch | None = None
    window_forward: Launch | None = None
    selection_forward: Launch | None = None
    selection_combine: Launch | None = None
    gates: Launch | None = None
    compressed_dq: Launch | None = None
    window_dq: Launch | None = None
    selection_dq: Launch | None = None
    combine_dq: Launch | None = None
    compressed_dkdv: Launch | None = None
    window_dkdv: Launch | None = None
    selection_dkdv: Launch | None = None
    reduce_dkdv: Launch | None = None
    range_bytes: int = 0
    """Memory of a range of queries, see `kernels.attention.ssa.RANGE_BYTES`. 0 stands for that."""


CHOSEN = SsaLaunches()
"""All launches as the functions below choose them."""


def _wide(x: Tensor) -> bool:
    """Whether rows are so wide that tiles must be small."""
    return x.dtype == torch.float32 or x.shape[-1] == 128


def _small(x: Tensor) -> bool:
    """Whether rows are so narrow that registers, not shared memory, limit the programs."""
    return x.shape[-1] <= 32 and not _wide(x)


MANY_PROGRAMS = 16384
"""A program of the block score takes two tiles of queries if this many programs remain."""


def block_score_launch(q: Tensor, programs: int) -> Launch:
    """Return the launch of the block score.

    Args:
        q: Queries [N, H, D].
        programs: Number of programs with one tile of queries each.
    """
    D = q.shape[-1]
    rows = 32 if q.dtype == torch.float32 else 64
    return Launch(
        rows=rows,
        stages=3 if D <= 64 else 2,
        registers=96 if D <= 32 and rows == 64 else 0,  # five programs share a multiprocessor
        tiles=2 if programs >= 2 * MANY_PROGRAMS else 1,
    )


def segment_forward_launch(q: Tensor) -> Launch:
    """Return the launch of compressed and window attention for queries [N, H, D]."""
    small = _small(q)
    return Launch(
        rows=64 if _wide(q) else 128,
        keys=32 if q.shape[-1] <= 32 or _wide(q) else 64,
        stages=3 if q.shape[-1] <= 32 else 2,
        # Four programs share a multiprocessor instead of two: measured 12% faster at D = 32.
        registers=128 if small else 0,
    )


def selection_forward_launch(q: Tensor) -> Launch:
    """Return the launch of selection attention for queries [N, H, D]."""
    D = q.shape[-1]
    return Launch(
        rows=32 if D == 128 else 64 if _wide(q) else 128,
        keys=32,
        stages=3 if D <= 32 else 2,
        registers=168 if _small(q) else 0,  # three programs share a multiprocessor
    )


def combine_launch(q: Tensor) -> Launch:
    """Return the launch of the kernels that combine the ranks of queries [N, H, D]."""
    return Launch(rows=max(1, 2048 // q.shape[-1]))


def gates_launch(heads: int, D: int) -> Launch:
    """Return the launch of the gates' backward.

    Args:
        heads: Query heads, rounded up to a power of two.
        D: Head size.
    """
    return Launch(rows=max(1, 2048 // (heads * D)))


def _dq_stages(q: Tensor) -> int:
    return 3 if q.shape[-1] <= 32 else 2 if q.shape[-1] == 64 else 1


def segment_dq_launch(q: Tensor, short: bool) -> Launch:
    """Return the launch of the gradient of queries [N, H, D] of segments.

    Args:
        q: Queries.
        short: `Segments.short`.
    """
    return Launch(
        rows=32 if q.dtype == torch.float32 else 64,
        keys=32 if _wide(q) or short else 64,
        stages=_dq_stages(q),
        registers=128 if _small(q) and not short else 0,  # four programs share a multiprocessor
    )


def selection_dq_launch(q: Tensor) -> Launch:
    """Return the launch of the gradient of queries [N, H, D] of selected blocks."""
    return Launch(rows=32 if _wide(q) else 64, keys=32, stages=_dq_stages(q))


MANY_KEYS = 2048


def segment_dkdv_launch(q: Tensor, keys: int, short: bool, ordered: bool) -> Launch:
    """Return the launch of the gradients of keys and values of segments.

    Args:
        q: Queries [N, H, D].
        keys: Number of keys.
        short: `Segments.short`.
        ordered: `Segments.ordered`.
    """
    # With many keys, 128 of them share a load of two queries. With few, four queries are loaded for
    # 64, and there are more programs.
    many = _small(q) and keys >= MANY_KEYS and not short
    return Launch(
        rows=64 if _small(q) and not many else 32,
        keys=32 if _wide(q) else 128 if many else 64,
        stages=2 if ordered else 3,
        registers=168 if _small(q) else 0,  # three programs share a multiprocessor
        programs=5280,  # eight waves of five per multiprocessor on an H200
    )


def selection_dkdv_launch(q: Tensor) -> Launch:
    """Return the launch of the gradients of keys and values of selected blocks."""
    return Launch(
        rows=32,
        keys=32 if _wide(q) else 128 if _small(q) else 64,
        stages=1 if _wide(q) else 2,
        registers=168 if _small(q) else 0,  # three programs share a multiprocessor
    )


def reduce_launch(q: Tensor) -> Launch:
    """Return the launch of the sums of partial gradients of keys, for queries [N, H, D]."""
    # Four stages of two tiles lie in shared memory.
    return Launch(rows=0, keys=32 if q.shape[-1] <= 64 else 16, warps=2)
