"""Sum of the three branches, each times the sigmoid of its gate, and what the branches' gradients need of it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.sizes import cdiv, next_power_of_2


@triton.jit(do_not_specialize=["N"])
def _gated_sum(a_ptr, b_ptr, c_ptr, gate_ptr, out_ptr, N, C: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr):
    n, c = tl.program_id(0) * BN + tl.arange(0, BN), tl.program_id(1) * BC + tl.arange(0, BC)
    ok = n < N
    mask = ok[:, None] & (c < C)[None, :]
    x = n.to(tl.int64)[:, None] * C + c[None, :]
    gate_ptr += n.to(tl.int64) * 3
    y = tl.sigmoid(tl.load(gate_ptr, ok, other=0.0).to(tl.float32))[:, None] * tl.load(a_ptr + x, mask).to(tl.float32)
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
        _gated_sum[(cdiv(N, 4), cdiv(C, 512))](*branches, gates_N3, out_NHD, N, C, BN=4, BC=512, num_warps=4)
    return out_NHD


@triton.jit
def _branch_dot(o_ptr, lse_ptr, dot_ptr, gate, do, x, y, ok):
    """Writes dot = sum over D of o * do and moves the gate into lse; returns the gate's gradient."""
    dot = tl.sum(tl.load(o_ptr + x, ok[:, :, None], other=0.0).to(do.dtype) * do, 2)
    tl.store(dot_ptr + y, dot, ok)
    lse = tl.load(lse_ptr + y, ok, other=0.0)
    tl.store(lse_ptr + y, lse - tl.log2(gate.to(lse_ptr.dtype.element_ty))[:, None], ok)
    return tl.sum(dot, 1) * gate * (1.0 - gate)


@triton.jit(do_not_specialize=["N"])
def _gates_bwd(
    cmp_ptr, sel_ptr, win_ptr, lse_ptr, gate_ptr, do_ptr, dot_ptr, dgate_ptr, N,
    H: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    ok, h, d = n < N, tl.arange(0, HEADS), tl.arange(0, D)
    y = n.to(tl.int64)[:, None] * H + h[None, :]
    x = y[:, :, None] * D + d[None, None, :]
    ok_h = ok[:, None] & (h < H)[None, :]
    mask = ok_h[:, :, None]
    wide = lse_ptr.dtype.element_ty
    do = tl.load(do_ptr + x, mask, other=0.0).to(wide)
    z = n.to(tl.int64) * 3
    size = N.to(tl.int64) * H
    gate = tl.sigmoid(tl.load(gate_ptr + z, ok, other=0.0).to(wide))
    dgate = _branch_dot(cmp_ptr, lse_ptr, dot_ptr, gate, do, x, y, ok_h)
    tl.store(dgate_ptr + z, dgate.to(dgate_ptr.dtype.element_ty), ok)
    gate = tl.sigmoid(tl.load(gate_ptr + z + 1, ok, other=0.0).to(wide))
    dgate = _branch_dot(sel_ptr, lse_ptr + size, dot_ptr + size, gate, do, x, y, ok_h)
    tl.store(dgate_ptr + z + 1, dgate.to(dgate_ptr.dtype.element_ty), ok)
    gate = tl.sigmoid(tl.load(gate_ptr + z + 2, ok, other=0.0).to(wide))
    dgate = _branch_dot(win_ptr, lse_ptr + 2 * size, dot_ptr + 2 * size, gate, do, x, y, ok_h)
    tl.store(dgate_ptr + z + 2, dgate.to(dgate_ptr.dtype.element_ty), ok)


def gates_backward(
    branches: tuple[Tensor, Tensor, Tensor], lse_3NH: Tensor, gates_N3: Tensor, do_NHD: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What the branches' backward needs: lse - log2 gate and dot = sum over D of o * do, fp32 [3, N, H]; dgates.

    A branch's output gradient is gate * do. The gate multiplies every probability of its row, so it is moved into lse
    (a gate of zero gives infinity, hence probabilities of zero) and no gated copy of do is made.
    """
    dgates_N3, dot_3NH = torch.empty_like(gates_N3), torch.empty_like(lse_3NH)
    shifted_3NH = lse_3NH.clone()
    N, H, D = do_NHD.shape
    if N:
        heads = next_power_of_2(H)
        BN = max(1, 2048 // (heads * D))
        _gates_bwd[(cdiv(N, BN),)](
            *branches, shifted_3NH, gates_N3, do_NHD, dot_3NH, dgates_N3, N, H, heads, D, BN, num_warps=4
        )
    return shifted_3NH, dot_3NH, dgates_N3
