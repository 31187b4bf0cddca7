"""What the attention kernels share: loads of packed heads, the softmax over a run of keys, tile sizes."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.runtime.integer_math import cdiv

LOG2E = 1.4426950408889634
LONG_OFFSETS = (1 << 31) - 1
LN2 = tl.constexpr(0.6931471805599453)
FOLDED_DTYPES = {torch.bfloat16}  # as many exponents as fp32, unlike fp16; fp32 is computed in fp64
BOUND_LIMIT = tl.constexpr(
    50.0
)  # log2; fp32 and bf16 hold the powers of such scores, their sums and the inverses


@triton.jit
def load_rows(
    x_ptr, n, ok, g, G: tl.constexpr, GS: tl.constexpr, D: tl.constexpr, BQ: tl.constexpr
):
    """All GS heads of kv head g of tokens n: [BQ * GS, D] from [N, G * GS, D]."""
    first = n.to(tl.int64) * (G * GS * D) + g * (GS * D)
    x = tl.load(x_ptr + first[:, None] + tl.arange(0, GS * D)[None, :], ok[:, None], other=0.0)
    return tl.reshape(x, [BQ * GS, D])


@triton.jit
def store_rows(
    x_ptr, x, n, ok, g, G: tl.constexpr, GS: tl.constexpr, D: tl.constexpr, BQ: tl.constexpr
):
    first = n.to(tl.int64) * (G * GS * D) + g * (GS * D)
    x = tl.reshape(x.to(x_ptr.dtype.element_ty), [BQ, GS * D])
    tl.store(x_ptr + first[:, None] + tl.arange(0, GS * D)[None, :], x, ok[:, None])


@triton.jit
def load_heads(x_ptr, n, ok, g, other, G: tl.constexpr, GS: tl.constexpr, BQ: tl.constexpr):
    """One number per head: [BQ * GS] from [N, G * GS]."""
    first = n.to(tl.int64) * (G * GS) + g * GS
    x = tl.load(x_ptr + first[:, None] + tl.arange(0, GS)[None, :], ok[:, None], other=other)
    return tl.reshape(x, [BQ * GS])


@triton.jit
def store_heads(x_ptr, x, n, ok, g, G: tl.constexpr, GS: tl.constexpr, BQ: tl.constexpr):
    first = n.to(tl.int64) * (G * GS) + g * GS
    tl.store(
        x_ptr + first[:, None] + tl.arange(0, GS)[None, :], tl.reshape(x, [BQ, GS]), ok[:, None]
    )


@triton.jit
def products(a, b):
    """a b^T: fp32, but fp64 of fp32, so that forward and backward agree on a logit however large it is."""
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
    """p dp in q's type; of bf16 the rounded factors, which is two products an instruction and little more error."""
    if q.dtype == tl.bfloat16:
        ds = tl.inline_asm_elementwise(
            "{.reg .b32 zero; mov.b32 zero, 0x80008000; fma.rn.bf16x2 $0, $1, $2, zero;}",  # sm_80 has no product
            "=r,r,r", [p.to(tl.bfloat16), dp.to(tl.bfloat16)], tl.bfloat16, True, 2,
        )  # fmt: skip
    else:
        ds = (p * dp).to(q.dtype)
    return ds


@triton.jit
def add_dot(a, b, acc):
    """acc + a b. acc is fp32, but fp64 of fp32: long sums then round no more than a short one."""
    if a.dtype == tl.float32:
        acc += tl.dot(a, b, input_precision="ieee").to(tl.float64)
    else:
        acc = tl.dot(a, b, acc, input_precision="ieee")
    return acc


@triton.jit
def log_sum(m, l, lse_ptr):
    """m + log2 l in the type that lse_ptr holds."""
    return m.to(lse_ptr.dtype.element_ty) + tl.log2(l.to(lse_ptr.dtype.element_ty))


@triton.jit
def load_keys(
    k_ptr, order_ptr, m, end, g,
    G: tl.constexpr, D: tl.constexpr, ORDERED: tl.constexpr, FULL: tl.constexpr, LONG: tl.constexpr,
):  # fmt: skip
    """Rows m (or order[m]) of kv head g: [BK, D] from [M, G, D]; zero from `end` on, unless FULL says none is."""
    if FULL:
        row = tl.load(order_ptr + m) if ORDERED else m
    else:
        row = tl.load(order_ptr + m, m < end, other=0) if ORDERED else m
    if LONG:
        row = row.to(tl.int64)
    x = (row * (G * D) + g * D)[:, None] + tl.arange(0, D)[None, :]
    return tl.load(k_ptr + x) if FULL else tl.load(k_ptr + x, (m < end)[:, None], other=0.0)


@triton.jit
def row_bound(q, norm_ptr, g, norms, NORMS: tl.constexpr):
    """|q| max|k|: no score of the row exceeds it. [R] in the units of the keys that the norms are of."""
    c = tl.arange(0, NORMS)
    largest = tl.max(tl.load(norm_ptr + g * norms + c, c < norms, other=0.0), 0)
    q = q.to(tl.float32)
    return tl.sqrt(tl.sum(q * q, 1)) * largest


@triton.jit
def attend_run(
    q, m, l8, acc, k_ptr, scaled_ptr, v_ptr, order_ptr, start, end, bounded, g, scale2,
    G: tl.constexpr, D: tl.constexpr, BK: tl.constexpr, ORDERED: tl.constexpr, LONG: tl.constexpr,
):  # fmt: skip
    """Folds keys start..end into (m, l8, acc).

    bounded: m is 0, no score exceeds BOUND_LIMIT and the keys are taken from scaled_ptr (`Keys.scaled`); else m is the
    running maximum. Rows whose keys these are not hold anything afterwards. l8 [R, 8] holds the denominator in eight
    parts, so that the loop never reduces across threads.
    """
    R: tl.constexpr = q.shape[0]
    c = tl.arange(0, BK)
    if bounded:
        full = start + (end - start) // BK * BK
        for first in range(start, full, BK):
            k = load_keys(scaled_ptr, order_ptr, first + c, end, g, G, D, ORDERED, True, LONG)
            v = load_keys(v_ptr, order_ptr, first + c, end, g, G, D, ORDERED, True, LONG)
            p = tl.exp2(products(q, k)).to(tl.float32)
            l8 += tl.sum(tl.reshape(p, [R, BK // 8, 8]), 1)
            acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
        if full < end:
            ok = full + c < end
            k = load_keys(scaled_ptr, order_ptr, full + c, end, g, G, D, ORDERED, False, LONG)
            v = load_keys(v_ptr, order_ptr, full + c, end, g, G, D, ORDERED, False, LONG)
            p = tl.exp2(products(q, k)).to(tl.float32)
            p = tl.where(ok[None, :], p, 0.0)
            l8 += tl.sum(tl.reshape(p, [R, BK // 8, 8]), 1)
            acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
    else:
        for first in range(start, end, BK):
            ok = first + c < end
            k = load_keys(k_ptr, order_ptr, first + c, end, g, G, D, ORDERED, False, LONG)
            v = load_keys(v_ptr, order_ptr, first + c, end, g, G, D, ORDERED, False, LONG)
            s = products(q, k) * scale2
            s = tl.where(ok[None, :], s, -float("inf"))
            m_new = tl.maximum(m, tl.max(s, 1))
            p = tl.exp2(s - m_new[:, None]).to(tl.float32)
            decay = tl.exp2(m - m_new).to(tl.float32)
            l8 = l8 * decay[:, None] + tl.sum(tl.reshape(p, [R, BK // 8, 8]), 1)
            acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
            m = m_new
    return m, l8, acc


@triton.jit
def _slice_keys(
    k_ptr,
    to_ptr,
    norm_ptr,
    M,
    c,
    slices,
    g,
    scale2,
    G: tl.constexpr,
    D: tl.constexpr,
    BM: tl.constexpr,
):
    step = tl.cdiv(tl.cdiv(M, slices), BM) * BM
    largest = tl.zeros([BM], tl.float32)
    for first in range(c * step, tl.minimum(c * step + step, M), BM):
        m = first + tl.arange(0, BM)
        k = load_keys(k_ptr, k_ptr, m, M, g, G, D, False, False, True).to(tl.float32) * scale2
        k = k.to(to_ptr.dtype.element_ty)
        tl.store(
            to_ptr + (m.to(tl.int64) * (G * D) + g * D)[:, None] + tl.arange(0, D)[None, :],
            k,
            (m < M)[:, None],
        )
        k = k.to(tl.float32)
        largest = tl.maximum(largest, tl.sqrt(tl.sum(k * k, 1)))
    # 1.001 covers the rounding of the sums.
    tl.store(norm_ptr + g * slices + c, tl.max(largest, 0) * 1.001)


@triton.jit(do_not_specialize=["M", "P", "slices", "num_flags"])
def _log2_keys(
    k_ptr, ck_ptr, to_ptr, cto_ptr, norm_ptr, cnorm_ptr, flag_ptr, M, P, slices, num_flags, scale2,
    G: tl.constexpr, D: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    c, g = tl.program_id(0), tl.program_id(1)
    if c < slices:
        _slice_keys(k_ptr, to_ptr, norm_ptr, M, c, slices, g, scale2, G, D, BM)
    else:
        _slice_keys(
            ck_ptr,
            cto_ptr,
            cnorm_ptr,
            P,
            c - slices,
            tl.num_programs(0) - slices,
            g,
            scale2,
            G,
            D,
            BM,
        )
    if (c == 0) & (g == 0):
        for first in range(0, num_flags, BM):
            i = first + tl.arange(0, BM)
            tl.store(flag_ptr + i, i * 0, i < num_flags)


@dataclass(frozen=True, eq=False)
class Keys:
    """The keys of a branch, and in bf16 what spares kernels a multiplication and a subtraction a score."""

    k: Tensor  # [M, G, D]
    scale: float
    scaled: Tensor | None = None  # k * scale * log2 e, rounded: right only for moderate scores
    norms: Tensor | None = (
        None  # fp32 [G, slices], largest |scaled| of each slice of the rows, rounded up
    )

    @property
    def both(self) -> tuple[Tensor, Tensor]:
        """k and scaled, or k twice."""
        return self.k, self.k if self.scaled is None else self.scaled


def log2_keys(
    k_MGD: Tensor, scale: float, ck_PGD: Tensor | None = None, flags: Tensor | None = None
) -> tuple[Keys, Keys]:
    """k, and ck or no keys. One launch serves all of SSA: it also sets flags, int32, to 0."""
    (M, G, D), ck_PGD = k_MGD.shape, k_MGD[:0] if ck_PGD is None else ck_PGD
    if k_MGD.dtype not in FOLDED_DTYPES:
        return Keys(k_MGD, scale), Keys(ck_PGD, scale)
    P, num_flags = len(ck_PGD), 0 if flags is None else len(flags)
    slices = [min(256, cdiv(rows, 256)) for rows in (max(M, 1), P)]
    norms, cnorms = (k_MGD.new_empty(G, n, dtype=torch.float32) for n in slices)
    scaled, cscaled = torch.empty_like(k_MGD), torch.empty_like(ck_PGD)
    _log2_keys[(sum(slices), G)](
        k_MGD, ck_PGD, scaled, cscaled, norms, cnorms, norms if flags is None else flags, M, P, slices[0], num_flags,
        scale * LOG2E, G, D, BM=64,
    )  # fmt: skip
    return Keys(k_MGD, scale, scaled, norms), Keys(ck_PGD, scale, cscaled, cnorms)


def lse_dtype(x: Tensor) -> torch.dtype:
    """Of log-sums: fp64 for fp32, so that a probability recomputed from one carries no rounding of a large logarithm.

    Everything that the kernels derive from it (probabilities, their exponential) is then fp64 as well.
    """
    return torch.float64 if x.dtype == torch.float32 else torch.float32


def long_offsets(*tensors: Tensor) -> bool:
    """Whether an element's offset may need 64 bits."""
    return max(x.numel() for x in tensors) > LONG_OFFSETS


def on_device(x: Tensor) -> contextlib.AbstractContextManager:
    """Launches inside go to x's GPU, whichever is current. Every operator opens it once; launchers rely on that."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def queries_per_tile(rows: int, group: int) -> int:
    """Tokens whose packed heads fill a tile of `rows`; a matrix product wants at least 16 rows."""
    return max(1, rows // group)
