"""Keys of a branch, and for bf16 a copy that is already multiplied by the scale of the scores."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention.packed_heads import load_keys
from kernels.attention.softmax import LOG2E
from kernels.runtime.integer_math import cdiv

# bf16 has as many exponents as fp32, unlike fp16. fp32 inputs are computed in fp64 anyway.
FOLDED_DTYPES = {torch.bfloat16}


@triton.jit
def _scale_slice(
    k_ptr, scaled_ptr, norm_ptr, M, c, slices, g, scale2, G: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Scale the keys of slice c and store the largest norm among them."""
    step = tl.cdiv(tl.cdiv(M, slices), BLOCK_M) * BLOCK_M
    largest = tl.zeros([BLOCK_M], tl.float32)
    for first in range(c * step, tl.minimum(c * step + step, M), BLOCK_M):
        m = first + tl.arange(0, BLOCK_M)
        k = load_keys(k_ptr, k_ptr, m, M, g, G, D, False, False, True)  # [BLOCK_M, D]
        k = k.to(tl.float32) * scale2
        k = k.to(scaled_ptr.dtype.element_ty)
        first_column = m.to(tl.int64) * (G * D) + g * D
        x_ptr = scaled_ptr + first_column[:, None] + tl.arange(0, D)[None, :]
        tl.store(x_ptr, k, (m < M)[:, None])
        k = k.to(tl.float32)  # the norm of what was rounded
        largest = tl.maximum(largest, tl.sqrt(tl.sum(k * k, 1)))
    # 1.001 covers the rounding of the sums.
    tl.store(norm_ptr + g * slices + c, tl.max(largest, 0) * 1.001)


@triton.jit(do_not_specialize=["M", "P", "slices", "num_flags"])
def _scale_keys(
    k_ptr, ck_ptr, scaled_ptr, cscaled_ptr, norm_ptr, cnorm_ptr, flag_ptr, M, P, slices, num_flags,
    scale2, G: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    # The first `slices` programs scale the M keys, the others the P compressed keys.
    c, g = tl.program_id(0), tl.program_id(1)
    if c < slices:
        _scale_slice(k_ptr, scaled_ptr, norm_ptr, M, c, slices, g, scale2, G, D, BLOCK_M)
    else:
        rest = tl.num_programs(0) - slices
        _scale_slice(ck_ptr, cscaled_ptr, cnorm_ptr, P, c - slices, rest, g, scale2, G, D, BLOCK_M)
    # One program clears the flags.
    if (c == 0) & (g == 0):
        for first in range(0, num_flags, BLOCK_M):
            i = first + tl.arange(0, BLOCK_M)
            tl.store(flag_ptr + i, i * 0, i < num_flags)


@dataclass(frozen=True, eq=False)
class BranchKeys:
    """The keys of a branch. For bf16 a scaled copy spares kernels two operations per score."""

    k: Tensor
    """[M, G, D]."""

    scale: float
    """Factor of the scores."""

    scaled: Tensor | None = None
    """[M, G, D], k * scale * log2(e) rounded to bf16. Right only for moderate scores."""

    norms: Tensor | None = None
    """fp32 [G, slices], largest norm of `scaled` in each slice of its rows, rounded up."""

    @property
    def plain_and_scaled(self) -> tuple[Tensor, Tensor]:
        """k and `scaled`, or k twice where there is no scaled copy."""
        return self.k, self.k if self.scaled is None else self.scaled


def scale_keys(
    k_MGD: Tensor, scale: float, ck_PGD: Tensor | None = None, flags: Tensor | None = None
) -> tuple[BranchKeys, BranchKeys]:
    """Return the keys and the compressed keys with their scaled copies.

    One launch serves all of SSA.

    Args:
        k_MGD: [M, G, D], contiguous.
        scale: Factor of the scores.
        ck_PGD: [P, G, D], contiguous. None stands for no compressed keys.
        flags: int32, set to 0 in the same launch (for dtypes with a scaled copy).

    Returns:
        The keys `k_MGD` and the compressed keys `ck_PGD`. Only dtypes in FOLDED_DTYPES have scaled
        copies.
    """
    M, G, D = k_MGD.shape
    if ck_PGD is None:
        ck_PGD = k_MGD[:0]
    if k_MGD.dtype not in FOLDED_DTYPES:
        return BranchKeys(k_MGD, scale), BranchKeys(ck_PGD, scale)
    P = len(ck_PGD)
    num_flags = 0 if flags is None else len(flags)
    slices = [min(256, cdiv(rows, 256)) for rows in (max(M, 1), P)]
    norms, cnorms = (k_MGD.new_empty(G, n, dtype=torch.float32) for n in slices)
    scaled, cscaled = torch.empty_like(k_MGD), torch.empty_like(ck_PGD)
    _scale_keys[(sum(slices), G)](
        k_MGD, ck_PGD, scaled, cscaled, norms, cnorms, norms if flags is None else flags, M, P,
        slices[0], num_flags, scale * LOG2E, G, D, BLOCK_M=64,
    )  # fmt: skip
    return BranchKeys(k_MGD, scale, scaled, norms), BranchKeys(ck_PGD, scale, cscaled, cnorms)
