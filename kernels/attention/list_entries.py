"""Entries and items of the inverse lists: how a kernel decodes them.

`kernels.attention.inverse_lists` explains and builds the lists.
"""

from __future__ import annotations

import triton
import triton.language as tl


def entry_shift(top_k: int) -> int:
    """Return the number of bits of an entry that hold the rank."""
    return (top_k - 1).bit_length()


@triton.jit
def load_item(item_ptr, starts_ptr, FIELDS: tl.constexpr):
    """The item of this program: key/value head, first and last entry, first row of partial sums.

    Also returns the first and last token of the item's block, and the item's chunk.
    """
    item_ptr += tl.program_id(0) * FIELDS
    block, g = tl.load(item_ptr), tl.load(item_ptr + 1)
    first, last = tl.load(item_ptr + 2), tl.load(item_ptr + 3)
    start, end = tl.load(starts_ptr + block), tl.load(starts_ptr + block + 1)
    return g, first, last, tl.load(item_ptr + 4), start, end, tl.load(item_ptr + 5)


@triton.jit
def load_entries(
    entry_ptr, e, last, first_token, top_k, shift, g, G: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_Q: tl.constexpr, FULL: tl.constexpr, LONG: tl.constexpr,
):  # fmt: skip
    """Decode entries e..e + BLOCK_Q into the R = BLOCK_Q * GROUP rows of one key/value head.

    Returns the row of each in tensors [N * H, ...], its row in partial results [n * T * H, ...],
    and whether it lies before `last`. FULL says that all do. Addresses are computed by row, not by
    token and head: a reshape of a tile would go through shared memory.
    """
    r = tl.arange(0, BLOCK_Q * GROUP)
    slot = e + r // GROUP
    ok = slot < last
    entry = tl.load(entry_ptr + slot) if FULL else tl.load(entry_ptr + slot, ok, other=0)  # [R]
    n = entry >> shift
    to = n * top_k + entry - (n << shift)
    n += first_token
    if LONG:
        n, to = n.to(tl.int64), to.to(tl.int64)
    h = g * GROUP + r % GROUP
    return n * (G * GROUP) + h, to * (G * GROUP) + h, ok
