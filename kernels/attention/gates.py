"""Gated sum of the three branches, and what the branches' backward passes need of it.

The definition is `gated_sum` in kernels.attention.reference.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention.launches import Launch, gates_launch
from kernels.attention.softmax import round_scores
from kernels.runtime.integer_math import cdiv, next_power_of_2


@triton.jit
def load_gate(gate_ptr, ok, branch, dtype: tl.constexpr):
    """Sigmoid of a branch's gates: [BLOCK_N] in dtype. gate_ptr points to rows of [N, 3]."""
    return tl.sigmoid(tl.load(gate_ptr + branch, ok, other=0.0).to(dtype))


@triton.jit
def add_gated(gate_ptr, ok, a, b, c):
    """Sum of three tiles [BLOCK_N, BLOCK_C], each times its gate [BLOCK_N], in fp32.

    All kernels that compute the gated sum use this, so that it has the same bits in each of them.
    """
    y = load_gate(gate_ptr, ok, 0, tl.float32)[:, None] * a.to(tl.float32)
    y += load_gate(gate_ptr, ok, 1, tl.float32)[:, None] * b.to(tl.float32)
    y += load_gate(gate_ptr, ok, 2, tl.float32)[:, None] * c.to(tl.float32)
    return y


@triton.jit(do_not_specialize=["N"])
def _gated_sum(
    a_ptr, b_ptr, c_ptr, gate_ptr, out_ptr, N, C: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    ok = n < N
    mask = ok[:, None] & (c < C)[None, :]
    x = n.to(tl.int64)[:, None] * C + c[None, :]
    gate_ptr += n.to(tl.int64) * 3
    a = tl.load(a_ptr + x, mask, other=0.0)
    b = tl.load(b_ptr + x, mask, other=0.0)
    c = tl.load(c_ptr + x, mask, other=0.0)
    y = add_gated(gate_ptr, ok, a, b, c)
    tl.store(out_ptr + x, y.to(out_ptr.dtype.element_ty), mask)


def gated_sum_forward(branches: tuple[Tensor, Tensor, Tensor], gates_N3: Tensor) -> Tensor:
    """Return the gated sum of three contiguous [N, H, D] of one dtype. Gates are contiguous too."""
    out_NHD = torch.empty_like(branches[0])
    N = len(out_NHD)
    C = out_NHD[0].numel() if N else 0
    if N:
        _gated_sum[(cdiv(N, 4), cdiv(C, 512))](
            *branches, gates_N3, out_NHD, N, C, BLOCK_N=4, BLOCK_C=512, num_warps=4
        )
    return out_NHD


@triton.jit
def is_folded(flag_ptr, FOLD: tl.constexpr):
    """True if gates and log-sums were multiplied into the output gradient: flag[0] is 0."""
    folded = False
    if FOLD:
        folded = tl.load(flag_ptr) == 0
    return folded


@triton.jit
def branch_gradient(
    o_ptr, lse_ptr, dot_ptr, moved_ptr, weighted_ptr, gate, do, x, y, ok, folded,
    FOLD: tl.constexpr, MOVE: tl.constexpr,
):  # fmt: skip
    """Store what a branch's backward needs of each row. Return the gate's gradient [BLOCK_N].

    MOVE says that the gate is moved into the log-sum of rows that are not folded.
    """
    o = tl.load(o_ptr + x, ok[:, :, None], other=0.0).to(do.dtype)  # [BLOCK_N, HEADS, D]
    lse = tl.load(lse_ptr + y, ok, other=0.0)  # [BLOCK_N, HEADS]
    dot = tl.sum(o * do, 2)  # [BLOCK_N, HEADS]
    if FOLD and folded:
        # Multiply gate and 2^-lse into do.
        weight = tl.exp2(-lse) * gate[:, None]
        weighted = round_scores(do * weight[:, :, None], weighted_ptr.dtype.element_ty)
        tl.store(weighted_ptr + x, weighted, ok[:, :, None])
        # From the rounded gradient: a row's gradients of scores then still sum to zero.
        tl.store(dot_ptr + y, tl.sum(o * weighted.to(do.dtype), 2), ok)
    else:
        tl.store(dot_ptr + y, dot, ok)
        if MOVE:
            tl.store(moved_ptr + y, lse - tl.log2(gate.to(lse.dtype))[:, None], ok)
    return tl.sum(dot, 1) * gate * (1.0 - gate)


@triton.jit(do_not_specialize=["N"])
def _gates_bwd(
    cmp_ptr, sel_ptr, win_ptr, lse_ptr, gate_ptr, do_ptr, flag_ptr, dot_ptr, moved_ptr, wcmp_ptr,
    wsel_ptr, wwin_ptr, dgate_ptr, N, H: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr,
    BLOCK_N: tl.constexpr, FOLD: tl.constexpr,
):  # fmt: skip
    # One program: all heads of BLOCK_N tokens. HEADS is H rounded up to a power of two.
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    h, d = tl.arange(0, HEADS), tl.arange(0, D)
    ok = n < N
    y = n.to(tl.int64)[:, None] * H + h[None, :]
    x = y[:, :, None] * D + d[None, None, :]
    ok_h = ok[:, None] & (h < H)[None, :]
    mask = ok_h[:, :, None]
    wide = lse_ptr.dtype.element_ty
    do = tl.load(do_ptr + x, mask, other=0.0).to(wide)  # [BLOCK_N, HEADS, D]
    z, size = n.to(tl.int64) * 3, N.to(tl.int64) * H
    folded = is_folded(flag_ptr, FOLD)
    for branch in tl.static_range(3):  # pyright: ignore
        o_ptr = cmp_ptr if branch == 0 else sel_ptr if branch == 1 else win_ptr
        weighted_ptr = wcmp_ptr if branch == 0 else wsel_ptr if branch == 1 else wwin_ptr
        gate = load_gate(gate_ptr + z, ok, branch, wide)
        to = branch * size
        dgate = branch_gradient(
            o_ptr, lse_ptr + to, dot_ptr + to, moved_ptr + to, weighted_ptr, gate, do, x, y, ok_h,
            folded, FOLD, True,
        )  # fmt: skip
        tl.store(dgate_ptr + z + branch, dgate.to(dgate_ptr.dtype.element_ty), ok)


@dataclass(frozen=True, eq=False)
class OutputGradient:
    """Gradient of a branch's output, and the row statistics that its backward needs besides q.

    The backward recomputes probabilities as 2^(score - lse). Where `weighted` is valid, 2^-lse and
    the gate are already multiplied into the gradient.
    """

    do: Tensor
    """[N, H, D], gradient of the gated sum."""

    lse: Tensor
    """fp32 (fp64 for fp32 inputs) [N, H], log2 of the divisor of the probabilities."""

    dot: Tensor
    """[N, H] in the dtype of `lse`, sum over D of the output times the gradient in use."""

    weighted: Tensor | None = None
    """[N, H, D], do * gate * 2^-lse. It replaces `do` and `lse`."""

    flag: Tensor | None = None
    """int32, given with `weighted`. flag[0] = 0 says that `weighted` is valid."""

    def tensors(self, placeholder: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return do, weighted, lse, dot and flag, with arbitrary tensors for absent ones."""
        weighted = self.do if self.weighted is None else self.weighted
        flag = placeholder if self.flag is None else self.flag
        return self.do, weighted, self.lse, self.dot, flag


def gates_backward(
    branches: tuple[Tensor, Tensor, Tensor],
    lse_3NH: Tensor,
    gates_N3: Tensor,
    do_NHD: Tensor,
    flags: Tensor | None = None,
    launch: Launch | None = None,
) -> tuple[tuple[OutputGradient, OutputGradient, OutputGradient], Tensor]:
    """Return the output gradients of the three branches, and the gradient of the gates.

    The output gradient of a branch is gate * do. The gate multiplies every probability of its row,
    as 2^-lse does. If `flags` are given and none is set, both are multiplied into do, and the loops
    over keys never see them. Otherwise the gate is moved into lse. A gate of zero then gives an
    infinite lse and probabilities of zero.

    Args:
        branches: Outputs of the branches, [N, H, D] each.
        lse_3NH: Their log-sums.
        gates_N3: Gates before the sigmoid.
        do_NHD: Gradient of the gated sum.
        flags: Flags of `segment_forward`.
        launch: Tokens of a program. None takes `gates_launch`.
    """
    N, H, D = do_NHD.shape
    fold = flags is not None
    dgates_N3 = torch.empty_like(gates_N3)
    dot_3NH = torch.empty_like(lse_3NH)
    moved_3NH = torch.empty_like(lse_3NH)
    # Three tensors, so that each can be freed on its own.
    weighted = [torch.empty_like(do_NHD) if fold else None for _ in range(3)]
    if N:
        heads = next_power_of_2(H)
        launch = launch or gates_launch(heads, D)
        _gates_bwd[(cdiv(N, launch.rows),)](
            *branches, lse_3NH, gates_N3, do_NHD, gates_N3 if flags is None else flags, dot_3NH,
            moved_3NH, *(do_NHD if x is None else x for x in weighted), dgates_N3, N, H, heads, D,
            launch.rows, FOLD=fold, **launch.options,
        )  # fmt: skip
    cmp, sel, win = (
        OutputGradient(do_NHD, moved_3NH[i], dot_3NH[i], weighted[i], flags) for i in range(3)
    )
    return (cmp, sel, win), dgates_N3
