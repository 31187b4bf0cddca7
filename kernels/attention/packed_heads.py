"""Loads and stores of tiles in which all query heads of a key/value head are packed into rows.

A row of a packed tile is one (token, query head) pair: row r belongs to token r // GROUP of the
tile and to query head g * GROUP + r % GROUP. G is the number of key/value heads, GROUP the number
of query heads per key/value head, D the head size, BLOCK_Q the number of tokens per tile.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_rows(
    x_ptr, n, ok, g, G: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_Q: tl.constexpr
):
    """Load the query heads of key/value head g: [BLOCK_Q * GROUP, D] from [N, G * GROUP, D]."""
    first = n.to(tl.int64) * (G * GROUP * D) + g * (GROUP * D)
    columns = tl.arange(0, GROUP * D)
    x = tl.load(x_ptr + first[:, None] + columns[None, :], ok[:, None], other=0.0)
    return tl.reshape(x, [BLOCK_Q * GROUP, D])


@triton.jit
def store_rows(
    x_ptr, x, n, ok, g, G: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_Q: tl.constexpr
):
    """Store what `load_rows` loads, in the dtype of the target."""
    first = n.to(tl.int64) * (G * GROUP * D) + g * (GROUP * D)
    x = tl.reshape(x.to(x_ptr.dtype.element_ty), [BLOCK_Q, GROUP * D])
    tl.store(x_ptr + first[:, None] + tl.arange(0, GROUP * D)[None, :], x, ok[:, None])


@triton.jit
def load_heads(x_ptr, n, ok, g, other, G: tl.constexpr, GROUP: tl.constexpr, BLOCK_Q: tl.constexpr):
    """Load one number per head: [BLOCK_Q * GROUP] from [N, G * GROUP]."""
    first = n.to(tl.int64) * (G * GROUP) + g * GROUP
    x = tl.load(x_ptr + first[:, None] + tl.arange(0, GROUP)[None, :], ok[:, None], other=other)
    return tl.reshape(x, [BLOCK_Q * GROUP])


@triton.jit
def store_heads(x_ptr, x, n, ok, g, G: tl.constexpr, GROUP: tl.constexpr, BLOCK_Q: tl.constexpr):
    """Store what `load_heads` loads."""
    first = n.to(tl.int64) * (G * GROUP) + g * GROUP
    x = tl.reshape(x, [BLOCK_Q, GROUP])
    tl.store(x_ptr + first[:, None] + tl.arange(0, GROUP)[None, :], x, ok[:, None])


@triton.jit
def load_keys(
    k_ptr, order_ptr, m, end, g, G: tl.constexpr, D: tl.constexpr, ORDERED: tl.constexpr,
    FULL: tl.constexpr, LONG: tl.constexpr,
):  # fmt: skip
    """Load rows m, or order[m], of key/value head g: [BLOCK_K, D] from [M, G, D].

    Rows from `end` on are zero. FULL says that all rows come before `end`, so no mask is needed.
    """
    if FULL:
        row = tl.load(order_ptr + m) if ORDERED else m
    else:
        row = tl.load(order_ptr + m, m < end, other=0) if ORDERED else m
    if LONG:
        row = row.to(tl.int64)
    x = (row * (G * D) + g * D)[:, None] + tl.arange(0, D)[None, :]
    return tl.load(k_ptr + x) if FULL else tl.load(k_ptr + x, (m < end)[:, None], other=0.0)


@triton.jit
def load_row_gradients(
    q_ptr, do_ptr, lse_ptr, dot_ptr, row, ok, D: tl.constexpr, FULL: tl.constexpr,
    FOLDED: tl.constexpr,
):  # fmt: skip
    """Load what the backward needs of each row: q and do [R, D], lse and dot [R].

    `row` is the row of each tile row in tensors [N * H, D]. FULL says that all rows exist: masks
    would cost a third of the loop over queries. FOLDED says that lse is not needed; `dot` is
    returned in its place.
    """
    x = row[:, None] * D + tl.arange(0, D)[None, :]
    if FULL:
        q = tl.load(q_ptr + x)  # [R, D]
        do = tl.load(do_ptr + x)  # [R, D]
        dot = tl.load(dot_ptr + row)  # [R]
    else:
        q = tl.load(q_ptr + x, ok[:, None], other=0.0)
        do = tl.load(do_ptr + x, ok[:, None], other=0.0)
        dot = tl.load(dot_ptr + row, ok, other=0.0)
    lse = dot
    if not FOLDED:
        # An infinite lse makes the probabilities of missing rows zero.
        lse = tl.load(lse_ptr + row) if FULL else tl.load(lse_ptr + row, ok, other=float("inf"))
    return q, do, lse, dot


def queries_per_tile(rows: int, group: int) -> int:
    """Return the number of tokens whose packed heads fill a tile of `rows` rows.

    A matrix product wants at least 16 rows.
    """
    return max(1, rows // group)
