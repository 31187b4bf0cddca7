"""The softmax over a run of keys, its log-sum-exp, and the matrix products that both passes share.

Scores are in units of log2: a score is q k * scale * log2(e), and probabilities are powers of two.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.target_info import is_hip

from kernels.attention.packed_heads import load_keys

LOG2E = 1.4426950408889634
LN2 = tl.constexpr(0.6931471805599453)
# In log2. fp32 and bf16 hold the powers of such scores, their sums and the inverses of the sums.
BOUND_LIMIT = tl.constexpr(50.0)


@triton.jit
def products(a, b):
    """a b^T in fp32, or in fp64 for fp32 factors.

    In fp64, forward and backward agree on a score however large it is.
    """
    if a.dtype == tl.float32:
        s = tl.dot(
            a.to(tl.float64),
            tl.trans(b.to(tl.float64)),
            input_precision="ieee",
            out_dtype=tl.float64,
        )
    else:
        s = tl.dot(a, tl.trans(b), input_precision="ieee")
    return s


@triton.jit
def score_gradients(p, dp, q):
    """p * dp in the dtype of q.

    On CUDA, bf16 factors are rounded first. Two such products take one instruction, and the error
    grows little.
    """
    if q.dtype == tl.bfloat16 and not is_hip():
        ds = tl.inline_asm_elementwise(
            # sm_80 has no bf16 product: multiply and add minus zero.
            "{.reg .b32 zero; mov.b32 zero, 0x80008000; fma.rn.bf16x2 $0, $1, $2, zero;}",
            "=r,r,r",
            [p.to(tl.bfloat16), dp.to(tl.bfloat16)],
            tl.bfloat16,
            True,
            2,
        )
    else:
        ds = (p * dp).to(q.dtype)
    return ds


@triton.jit
def round_scores(x, dtype: tl.constexpr):
    """x in dtype.

    Where the result is used twice, Triton rounds to bf16 one number at a time, in the unit of the
    exponentials. Here one instruction rounds two numbers.
    """
    if dtype == tl.bfloat16 and not is_hip():
        y = tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [x], tl.bfloat16, True, 2
        )
    else:
        y = x.to(dtype)
    return y


@triton.jit
def polynomial_exponentials(x, BOUNDED: tl.constexpr):
    """2^x in fp32 without the exponential unit, for x in [-125, 128).

    BOUNDED says that no x is less than -125. Otherwise smaller ones count as -125. The relative
    error is at most 8e-5, a fiftieth of that of rounding to bf16.
    """
    if not BOUNDED:
        x = tl.maximum(x, -125.0)
    # Adding 1.5 * 2^23 rounds to a whole number, which the last bits of the sum hold. The rest lies
    # in [-0.5, 0.5]. The polynomial has the least largest relative error there (Cody and Waite).
    whole = x + 12582912.0
    rest = x - (whole - 12582912.0)
    y = 0.05517167 * rest + 0.24261113
    y = y * rest + 0.69326097
    y = y * rest + 0.99992806
    exponent = whole.to(tl.int32, bitcast=True) << 23
    return (y.to(tl.int32, bitcast=True) + exponent).to(tl.float32, bitcast=True)


@triton.jit
def exponentials(x, EMULATED: tl.constexpr, BOUNDED: tl.constexpr):
    """2^x for scores x [R, C].

    If EMULATED is not 0, one of EMULATED numbers is computed by a polynomial, because the unit of
    exponentials is what most loops over keys wait for. BOUNDED says that no x is less than -125.
    """
    R: tl.constexpr = x.shape[0]
    C: tl.constexpr = x.shape[1]
    if EMULATED == 0:
        y = tl.exp2(x)
    elif EMULATED == 1:
        y = polynomial_exponentials(x, BOUNDED)
    elif C >= 16:
        # Every second group of eight columns. A thread holds as many numbers of either half, so
        # that no number moves.
        a, b = tl.split(tl.permute(tl.reshape(x, [R, C // 16, 2, 8]), [0, 1, 3, 2]))
        a = exponentials(tl.reshape(a, [R, C // 2]), EMULATED // 2, BOUNDED)
        y = tl.join(tl.reshape(a, [R, C // 16, 8]), tl.exp2(b))
        y = tl.reshape(tl.permute(y, [0, 1, 3, 2]), [R, C])
    else:
        # The upper half of the rows.
        a, b = tl.split(tl.permute(tl.reshape(x, [2, R // 2, C]), [1, 2, 0]))
        y = tl.join(exponentials(a, EMULATED // 2, BOUNDED), tl.exp2(b))
        y = tl.reshape(tl.permute(y, [2, 0, 1]), [R, C])
    return y


@triton.jit
def log_sum(row_max, denominator, lse_ptr):
    """row_max + log2(denominator) in the dtype that lse_ptr points to."""
    return row_max.to(lse_ptr.dtype.element_ty) + tl.log2(denominator.to(lse_ptr.dtype.element_ty))


@triton.jit
def row_bound(q, norm_ptr, g, norms, NORMS: tl.constexpr):
    """|q| max|k|, which no score of the row exceeds: [R], in the units of the keys of the norms."""
    c = tl.arange(0, NORMS)
    largest = tl.max(tl.load(norm_ptr + g * norms + c, c < norms, other=0.0), 0)
    q = q.to(tl.float32)
    return tl.sqrt(tl.sum(q * q, 1)) * largest


@triton.jit
def _add_bounded_keys(
    q, sums_R8, acc, scaled_ptr, v_ptr, order_ptr, m, end, g, G: tl.constexpr, D: tl.constexpr,
    BLOCK_K: tl.constexpr, ORDERED: tl.constexpr, FULL: tl.constexpr, LONG: tl.constexpr,
    EMULATED: tl.constexpr,
):  # fmt: skip
    """One step of `attend_run` without a running maximum, for keys m [BLOCK_K]."""
    R: tl.constexpr = q.shape[0]
    k = load_keys(scaled_ptr, order_ptr, m, end, g, G, D, ORDERED, FULL, LONG)  # [BLOCK_K, D]
    v = load_keys(v_ptr, order_ptr, m, end, g, G, D, ORDERED, FULL, LONG)  # [BLOCK_K, D]
    p = exponentials(products(q, k), EMULATED, True).to(tl.float32)  # [R, BLOCK_K]
    if not FULL:
        p = tl.where((m < end)[None, :], p, 0.0)
    sums_R8 += tl.sum(tl.reshape(p, [R, BLOCK_K // 8, 8]), 1)
    acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
    return sums_R8, acc


@triton.jit
def attend_run(
    q, row_max, sums_R8, acc, k_ptr, scaled_ptr, v_ptr, order_ptr, start, end, bounded, g, scale2,
    G: tl.constexpr, D: tl.constexpr, BLOCK_K: tl.constexpr, ORDERED: tl.constexpr,
    LONG: tl.constexpr, UNROLL: tl.constexpr, EMULATED: tl.constexpr,
):  # fmt: skip
    """Fold keys start..end into the softmax state (row_max [R], sums_R8 [R, 8], acc [R, D]).

    If `bounded`, row_max is 0, no score exceeds BOUND_LIMIT and the keys come from scaled_ptr
    (`BranchKeys.scaled`). Otherwise row_max is the running maximum. Rows of the tile that do not
    attend to these keys hold arbitrary values afterwards. sums_R8 holds the denominator in eight
    parts, so that the loop never reduces across threads.
    """
    R: tl.constexpr = q.shape[0]
    c = tl.arange(0, BLOCK_K)
    if bounded:
        # Whole steps without masks, then the rest.
        full = start + (end - start) // BLOCK_K * BLOCK_K
        for first in tl.range(start, full, BLOCK_K, loop_unroll_factor=UNROLL):  # pyright: ignore
            sums_R8, acc = _add_bounded_keys(  # pyright: ignore[reportGeneralTypeIssues]
                q, sums_R8, acc, scaled_ptr, v_ptr, order_ptr, first + c, end, g, G, D, BLOCK_K,
                ORDERED, True, LONG, EMULATED,
            )  # fmt: skip
        if full < end:
            sums_R8, acc = _add_bounded_keys(  # pyright: ignore[reportGeneralTypeIssues]
                q, sums_R8, acc, scaled_ptr, v_ptr, order_ptr, full + c, end, g, G, D, BLOCK_K,
                ORDERED, False, LONG, EMULATED,
            )  # fmt: skip
    else:
        for first in range(start, end, BLOCK_K):
            ok = first + c < end
            k = load_keys(k_ptr, order_ptr, first + c, end, g, G, D, ORDERED, False, LONG)
            v = load_keys(v_ptr, order_ptr, first + c, end, g, G, D, ORDERED, False, LONG)
            s = products(q, k) * scale2  # [R, BLOCK_K]
            s = tl.where(ok[None, :], s, -float("inf"))
            # A new maximum rescales what was summed so far.
            new_max = tl.maximum(row_max, tl.max(s, 1))
            p = tl.exp2(s - new_max[:, None]).to(tl.float32)
            decay = tl.exp2(row_max - new_max).to(tl.float32)
            sums_R8 = sums_R8 * decay[:, None] + tl.sum(tl.reshape(p, [R, BLOCK_K // 8, 8]), 1)
            acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
            row_max = new_max
    return row_max, sums_R8, acc


def lse_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of log-sums for inputs like `x`: fp64 for fp32, otherwise fp32.

    A probability recomputed from an fp64 log-sum carries no rounding of a large logarithm. The
    kernels also compute the probabilities from it in fp64.
    """
    return torch.float64 if x.dtype == torch.float32 else torch.float32
