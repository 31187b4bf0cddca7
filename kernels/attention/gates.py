"""Sum of the three branches, each times the sigmoid of its gate, and what the branches' gradients need of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.runtime.integer_math import cdiv, next_power_of_2


@triton.jit(do_not_specialize=["N"])
def _gated_sum(
    a_ptr, b_ptr, c_ptr, gate_ptr, out_ptr, N, C: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr
):
    n, c = tl.program_id(0) * BN + tl.arange(0, BN), tl.program_id(1) * BC + tl.arange(0, BC)
    ok = n < N
    mask = ok[:, None] & (c < C)[None, :]
    x = n.to(tl.int64)[:, None] * C + c[None, :]
    gate_ptr += n.to(tl.int64) * 3
    y = tl.sigmoid(tl.load(gate_ptr, ok, other=0.0).to(tl.float32))[:, None] * tl.load(
        a_ptr + x, mask
    ).to(tl.float32)
    gate = tl.sigmoid(tl.load(gate_ptr + 1, ok, other=0.0).to(tl.float32))
    y += gate[:, None] * tl.load(b_ptr + x, mask).to(tl.float32)
    gate = tl.sigmoid(tl.load(gate_ptr + 2, ok, other=0.0).to(tl.float32))
    y += gate[:, None] * tl.load(c_ptr + x, mask).to(tl.float32)
    tl.store(out_ptr + x, y.to(out_ptr.dtype.element_ty), mask)


def gated_sum_forward(branches: tuple[Tensor, Tensor, Tensor], gates_N3: Tensor) -> Tensor:
    """Three [N, H, D] of one dtype -> their gated sum; contiguous inputs."""
    out_NHD = torch.empty_like(branches[0])
    N, C = len(out_NHD), out_NHD[0].numel() if len(out_NHD) else 0
    if N:
        _gated_sum[(cdiv(N, 4), cdiv(C, 512))](
            *branches, gates_N3, out_NHD, N, C, BN=4, BC=512, num_warps=4
        )
    return out_NHD


@triton.jit
def _branch_dot(
    o_ptr, lse_ptr, dot_ptr, moved_ptr, weighted_ptr, gate, do, x, y, ok, folded, FOLD: tl.constexpr
):
    """Writes what the branch's backward needs of each row; returns the gate's gradient."""
    o = tl.load(o_ptr + x, ok[:, :, None], other=0.0).to(do.dtype)
    lse = tl.load(lse_ptr + y, ok, other=0.0)
    dot = tl.sum(o * do, 2)
    if FOLD and folded:
        weighted = (do * (tl.exp2(-lse) * gate[:, None])[:, :, None]).to(
            weighted_ptr.dtype.element_ty
        )
        tl.store(weighted_ptr + x, weighted, ok[:, :, None])
        # Of what was rounded: a row's gradients of scores then still sum to zero.
        tl.store(dot_ptr + y, tl.sum(o * weighted.to(do.dtype), 2), ok)
    else:
        tl.store(dot_ptr + y, dot, ok)
        tl.store(moved_ptr + y, lse - tl.log2(gate.to(lse.dtype))[:, None], ok)
    return tl.sum(dot, 1) * gate * (1.0 - gate)


@triton.jit(do_not_specialize=["N"])
def _gates_bwd(
    cmp_ptr, sel_ptr, win_ptr, lse_ptr, gate_ptr, do_ptr, flag_ptr, dot_ptr, moved_ptr, wcmp_ptr, wsel_ptr, wwin_ptr,
    dgate_ptr, N,
    H: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, BN: tl.constexpr, FOLD: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    ok, h, d = n < N, tl.arange(0, HEADS), tl.arange(0, D)
    y = n.to(tl.int64)[:, None] * H + h[None, :]
    x = y[:, :, None] * D + d[None, None, :]
    ok_h = ok[:, None] & (h < H)[None, :]
    mask = ok_h[:, :, None]
    wide = lse_ptr.dtype.element_ty
    do = tl.load(do_ptr + x, mask, other=0.0).to(wide)
    z, size = n.to(tl.int64) * 3, N.to(tl.int64) * H
    folded = True
    if FOLD:
        folded = tl.load(flag_ptr) == 0
    for branch in tl.static_range(3):  # pyright: ignore
        o_ptr = cmp_ptr if branch == 0 else sel_ptr if branch == 1 else win_ptr
        weighted_ptr = wcmp_ptr if branch == 0 else wsel_ptr if branch == 1 else wwin_ptr
        gate, to = tl.sigmoid(tl.load(gate_ptr + z + branch, ok, other=0.0).to(wide)), branch * size
        dgate = _branch_dot(
            o_ptr,
            lse_ptr + to,
            dot_ptr + to,
            moved_ptr + to,
            weighted_ptr,
            gate,
            do,
            x,
            y,
            ok_h,
            folded,
            FOLD,
        )
        tl.store(dgate_ptr + z + branch, dgate.to(dgate_ptr.dtype.element_ty), ok)


@dataclass(frozen=True, eq=False)
class Rows:
    """What a branch's backward needs of each row besides q: its gradient, and the log of what divides probabilities."""

    do: Tensor  # [N, H, D]
    lse: Tensor  # fp32 (fp64 of fp32) [N, H]
    dot: Tensor  # as lse: sum over D of o * the gradient that is taken
    weighted: Tensor | None = None  # [N, H, D], do * 2^-lse: takes the place of both
    flag: Tensor | None = None  # int32, given with weighted; flag[0] = 0: weighted is to be taken

    def tensors(self, some: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """do, weighted, lse, dot, flag; some of them stand for those that there are not."""
        weighted, flag = (
            self.do if self.weighted is None else self.weighted,
            some if self.flag is None else self.flag,
        )
        return self.do, weighted, self.lse, self.dot, flag


def gates_backward(
    branches: tuple[Tensor, Tensor, Tensor],
    lse_3NH: Tensor,
    gates_N3: Tensor,
    do_NHD: Tensor,
    flags: Tensor | None = None,
) -> tuple[tuple[Rows, Rows, Rows], Tensor]:
    """Rows of the three branches, and dgates.

    A branch's output gradient is gate * do. The gate multiplies every probability of its row, as 2^-lse does. Given
    flags (`segment_forward`), and none set, both are multiplied into do, and the loops over keys never see them.
    Otherwise the gate is moved into lse (a gate of zero gives infinity, hence probabilities of zero).
    """
    fold, (N, H, D) = flags is not None, do_NHD.shape
    dgates_N3, dot_3NH, moved_3NH = (
        torch.empty_like(gates_N3),
        torch.empty_like(lse_3NH),
        torch.empty_like(lse_3NH),
    )
    weighted = [
        torch.empty_like(do_NHD) if fold else None for _ in range(3)
    ]  # three, so that each can be freed
    if N:
        heads = next_power_of_2(H)
        BN = max(1, 2048 // (heads * D))
        _gates_bwd[(cdiv(N, BN),)](
            *branches, lse_3NH, gates_N3, do_NHD, gates_N3 if flags is None else flags, dot_3NH, moved_3NH,
            *(do_NHD if x is None else x for x in weighted), dgates_N3, N, H, heads, D, BN, FOLD=fold, num_warps=4,
        )  # fmt: skip
    cmp, sel, win = (Rows(do_NHD, moved_3NH[i], dot_3NH[i], weighted[i], flags) for i in range(3))
    return (cmp, sel, win), dgates_N3
