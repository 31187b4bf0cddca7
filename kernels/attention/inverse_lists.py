"""Inverse of the selection: for every block the queries that chose it, ascending, without a sort or a host copy.

Queries are taken by chunks (see `BlockIndex`), so that those of one list lie close together. A row is (chunk, block, kv
head); its list is cut into items of at most ITEM entries, one program each. An entry is
((query - first query of the range) << entry_shift(T)) + rank.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention.block_index import BlockIndex
from kernels.attention.top_blocks import rank_dtype
from kernels.runtime.integer_math import cdiv

ITEM = 96
ITEM_FIELDS = (
    8  # block, kv head, first entry, last entry, first row of partial dk and dv, chunk; 32 bytes
)
SCAN = 1024
FEW_ITEMS = 8192  # programs enough for a large GPU


@dataclass(frozen=True)
class QueryRange:
    """A run of chunks that is executed together: their tokens, pairs and rank entries."""

    first_chunk: int
    last_chunk: int
    first: int
    last: int
    first_pair: int
    last_pair: int
    ranks: int  # sum over its chunks of queries * blocks
    tokens: int  # sum over its chunks of the asset's tokens

    @property
    def pairs(self) -> int:
        return self.last_pair - self.first_pair


def query_ranges(index: BlockIndex, bytes_per_query: int, limit: int) -> list[QueryRange]:
    """Cuts the queries between chunks so that each range needs about `limit` bytes, or one chunk."""
    starts, pairs, tokens = index.chunk_table
    chunks = len(starts) - 1
    if chunks == 0:
        return []
    count = min(chunks, cdiv(index.num_tokens * bytes_per_query, limit))
    cuts = sorted({chunks * i // count for i in range(count + 1)})
    ranges = []
    for a, b in itertools.pairwise(cuts):
        ranks = sum((starts[i + 1] - starts[i]) * (pairs[i + 1] - pairs[i]) for i in range(a, b))
        ranges.append(
            QueryRange(a, b, starts[a], starts[b], pairs[a], pairs[b], ranks, sum(tokens[a:b]))
        )
    return ranges


@dataclass(frozen=True, eq=False)
class Lists:
    """Inverse lists of one range."""

    entries: Tensor  # int32 [G * n * T]
    sums: Tensor  # int32 [3, pairs * G], inclusive sums over rows of entries, items, rows of partial dk and dv
    items: Tensor  # int32 [capacity, ITEM_FIELDS]; the first sums[1, -1] are filled

    @property
    def capacity(self) -> int:
        """How many items there may be."""
        return self.items.shape[0]

    @property
    def total(self) -> Tensor:
        """How many items there are, int32 [1]."""
        return self.sums[1, -1:]


def spread(lists: Lists, entries: int) -> int:
    """Programs that share an item, each at least `entries` of it: several where items alone leave a GPU idle."""
    return max(1, min(ITEM // entries, FEW_ITEMS // lists.capacity))


def entry_shift(top_k: int) -> int:
    """Bits of an entry that hold the rank."""
    return (top_k - 1).bit_length()


def item_capacity(pairs: int, entries: int, G: int) -> int:
    """How many items there can be: every row may have one that is not full."""
    return pairs * G + entries // ITEM


@triton.jit(do_not_specialize=["first_pair", "first_chunk", "rows"])
def _count(
    rank_ptr, pair_chunk_ptr, pair_block_ptr, chunk_starts_ptr, chunk_pairs_ptr, chunk_ranks_ptr, block_starts_ptr,
    count_ptr, first_pair, first_chunk, rows, G: tl.constexpr, ITEM: tl.constexpr, SCAN: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    pair, g = first_pair + row // G, row % G
    chunk = tl.load(pair_chunk_ptr + pair)
    size = tl.load(chunk_starts_ptr + chunk + 1) - tl.load(chunk_starts_ptr + chunk)
    base = (tl.load(chunk_ranks_ptr + chunk) - tl.load(chunk_ranks_ptr + first_chunk)) * G
    base += ((pair - tl.load(chunk_pairs_ptr + chunk)) * G + g).to(tl.int64) * size
    total = tl.zeros([SCAN], tl.int32)
    for first in range(0, size, SCAN):
        i = first + tl.arange(0, SCAN)
        total += (tl.load(rank_ptr + base + i, i < size, other=0) > 0).to(tl.int32)
    count = tl.sum(total, 0)
    items = (count + ITEM - 1) // ITEM
    block = tl.load(pair_block_ptr + pair)
    tokens = tl.load(block_starts_ptr + block + 1) - tl.load(block_starts_ptr + block)
    tl.store(count_ptr + row, count)
    tl.store(count_ptr + rows + row, items)
    tl.store(count_ptr + 2 * rows + row, items * tokens)


@triton.jit(do_not_specialize=["first_pair", "first_chunk", "first_token", "rows", "shift"])
def _fill(
    rank_ptr, pair_chunk_ptr, pair_block_ptr, chunk_starts_ptr, chunk_pairs_ptr, chunk_ranks_ptr, block_starts_ptr,
    sum_ptr, entry_ptr, item_ptr, first_pair, first_chunk, first_token, rows, shift,
    G: tl.constexpr, ITEM: tl.constexpr, FIELDS: tl.constexpr, SCAN: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    pair, g = first_pair + row // G, row % G
    chunk = tl.load(pair_chunk_ptr + pair)
    start = tl.load(chunk_starts_ptr + chunk)
    size = tl.load(chunk_starts_ptr + chunk + 1) - start
    base = (tl.load(chunk_ranks_ptr + chunk) - tl.load(chunk_ranks_ptr + first_chunk)) * G
    base += ((pair - tl.load(chunk_pairs_ptr + chunk)) * G + g).to(tl.int64) * size
    before = tl.load(sum_ptr + row - 1, row > 0, other=0)
    item = tl.load(sum_ptr + rows + row - 1, row > 0, other=0)
    partial = tl.load(sum_ptr + 2 * rows + row - 1, row > 0, other=0)
    end = tl.load(sum_ptr + row)
    to = before
    for first in range(0, size, SCAN):
        i = first + tl.arange(0, SCAN)
        rank = tl.load(rank_ptr + base + i, i < size, other=0).to(tl.int32)
        found = (rank > 0).to(tl.int32)
        slot = to + tl.cumsum(found, 0) - 1
        tl.store(entry_ptr + slot, ((start - first_token + i) << shift) + rank - 1, rank > 0)
        to += tl.sum(found, 0)
    block = tl.load(pair_block_ptr + pair)
    tokens = tl.load(block_starts_ptr + block + 1) - tl.load(block_starts_ptr + block)
    for first in range(before, end, ITEM):
        tl.store(item_ptr + item * FIELDS, block)
        tl.store(item_ptr + item * FIELDS + 1, g)
        tl.store(item_ptr + item * FIELDS + 2, first)
        tl.store(item_ptr + item * FIELDS + 3, tl.minimum(first + ITEM, end))
        tl.store(item_ptr + item * FIELDS + 4, partial)
        tl.store(item_ptr + item * FIELDS + 5, chunk)
        item += 1
        partial += tokens


def selected_ranks(selected_GNT: Tensor, index: BlockIndex, queries: QueryRange) -> Tensor:
    """The rank map of a selection that did not come from `top_blocks`; numbers below 0 are skipped."""
    G, _, T = selected_GNT.shape
    n = torch.arange(queries.first, queries.last, device=index.device)
    chunk = index.chunk_of[n]
    start = index.chunk_starts[chunk]
    base = (index.chunk_ranks[chunk] - index.chunk_ranks[queries.first_chunk]) * G + n - start
    block = selected_GNT[:, queries.first : queries.last].long()
    local = block - index.asset_blocks[index.asset_of[n]][:, None]
    g = torch.arange(G, device=index.device)[:, None, None]
    at = base[:, None] + (local * G + g) * (index.chunk_starts[chunk + 1] - start)[:, None]
    ranks = torch.zeros(
        queries.ranks * G + 1, dtype=rank_dtype(T), device=index.device
    )  # the last takes the skipped
    rank = torch.arange(1, T + 1, device=index.device).to(ranks.dtype).expand(at.shape)
    return ranks.scatter_(0, torch.where(block < 0, len(ranks) - 1, at).flatten(), rank.flatten())


def new_ranks(index: BlockIndex, queries: QueryRange, G: int, top_k: int) -> Tensor:
    """The zeroed rank map of a range: by chunk, block, kv head, query."""
    return torch.zeros(queries.ranks * G, dtype=rank_dtype(top_k), device=index.device)


def fill_lists(
    ranks: Tensor, index: BlockIndex, queries: QueryRange, G: int, top_k: int, lists: Lists
) -> None:
    """Writes `lists` from the rank map of `top_blocks`."""
    rows = queries.pairs * G
    args = (
        index.pair_chunk, index.pair_block, index.chunk_starts, index.chunk_pairs, index.chunk_ranks, index.block_starts
    )  # fmt: skip
    counts = ranks.new_empty(3, rows, dtype=torch.int32)
    _count[(rows,)](
        ranks,
        *args,
        counts,
        queries.first_pair,
        queries.first_chunk,
        rows,
        G,
        ITEM,
        SCAN,
        num_warps=4,
    )
    torch.cumsum(counts, 1, dtype=torch.int32, out=lists.sums)
    _fill[(rows,)](
        ranks, *args, lists.sums, lists.entries, lists.items, queries.first_pair, queries.first_chunk, queries.first,
        rows, entry_shift(top_k), G, ITEM, ITEM_FIELDS, SCAN, num_warps=4,
    )  # fmt: skip
