"""Inverse of the selection: for every block the queries that chose it, in ascending order.

The lists are built without a sort and without a host copy. Queries are grouped by chunk (see
`BlockIndex`), so that the queries of one list lie close together. A row is a (chunk, block,
key/value head) triple. Its list is cut into items of at most ITEM entries, and one program
processes an item. An entry is ((query - first query of the range) << entry_shift(T)) + rank.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention.block_index import BlockIndex
from kernels.attention.list_entries import entry_shift
from kernels.attention.top_blocks import rank_dtype
from kernels.runtime.integer_math import cdiv

ITEM = 96
"""Largest number of entries of an item."""

# Block, key/value head, first entry, last entry, first row of partial dk and dv, chunk; two unused,
# so that an item takes 32 bytes.
ITEM_FIELDS = 8
SCAN = 1024
"""Queries that a program reads at a time."""

FEW_ITEMS = 8192
"""Number of programs that occupies a large GPU."""


@dataclass(frozen=True)
class ChunkRange:
    """A run of chunks of queries that is executed together."""

    first_chunk: int
    last_chunk: int
    """One past the last chunk, as all `last_` fields."""

    first_token: int
    last_token: int
    first_pair: int
    last_pair: int
    num_ranks: int
    """Sum over the chunks of their queries times the blocks of their asset."""

    asset_tokens: int
    """Sum over the chunks of the tokens of their asset."""

    @property
    def num_tokens(self) -> int:
        """Number of queries."""
        return self.last_token - self.first_token

    @property
    def num_pairs(self) -> int:
        """Number of (chunk, block) pairs."""
        return self.last_pair - self.first_pair

    def partial_rows(self, G: int, top_k: int, max_block_tokens: int) -> int:
        """Return the largest possible number of rows of partial dk and dv.

        Each pair has rows for the tokens of its block once, and once more per full item.
        """
        full_items = self.num_tokens * G * top_k // ITEM
        return self.asset_tokens * G + full_items * max_block_tokens


def chunk_ranges(index: BlockIndex, bytes_per_query: int, limit: int) -> list[ChunkRange]:
    """Cut the queries between chunks into ranges of about `limit` bytes, or of one chunk."""
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
            ChunkRange(
                first_chunk=a,
                last_chunk=b,
                first_token=starts[a],
                last_token=starts[b],
                first_pair=pairs[a],
                last_pair=pairs[b],
                num_ranks=ranks,
                asset_tokens=sum(tokens[a:b]),
            )
        )
    return ranges


@dataclass(frozen=True, eq=False)
class InverseLists:
    """Inverse lists of one range of n queries with top-k T."""

    entries: Tensor
    """int32 [G * n * T]."""

    sums: Tensor
    """int32 [3, pairs * G], inclusive sums of entries, items, and rows of partial dk and dv."""

    items: Tensor
    """int32 [capacity, ITEM_FIELDS]. The first sums[1, -1] of them are filled."""

    @property
    def capacity(self) -> int:
        """Largest possible number of items."""
        return self.items.shape[0]

    @property
    def total(self) -> Tensor:
        """Number of items, int32 [1]."""
        return self.sums[1, -1:]


class InverseListStorage:
    """Storage of the inverse lists of all ranges, in three tensors sized by shapes alone."""

    def __init__(self, entries: Tensor, sums: Tensor, items: Tensor):
        self.entries = entries
        self.sums = sums
        self.items = items

    @staticmethod
    def sizes(N: int, pairs: int, G: int, top_k: int) -> tuple[int, int, int]:
        """Return the number of int32 elements of the three tensors."""
        return N * G * top_k, 3 * pairs * G, item_capacity(pairs, N * G * top_k, G) * ITEM_FIELDS

    @classmethod
    def empty(cls, index: BlockIndex, G: int, top_k: int) -> InverseListStorage:
        """Return storage that is not initialised."""
        sizes = cls.sizes(index.num_tokens, index.pair_block.shape[0], G, top_k)
        return cls(*(torch.empty(size, dtype=torch.int32, device=index.device) for size in sizes))

    def views(self, ranges: list[ChunkRange], G: int, top_k: int) -> list[InverseLists]:
        """Return the parts of the storage that belong to each range."""
        lists = []
        item = 0
        for queries in ranges:
            entries = queries.num_tokens * G * top_k
            capacity = item_capacity(queries.num_pairs, entries, G)
            sums = self.sums[3 * queries.first_pair * G : 3 * queries.last_pair * G]
            items = self.items[item * ITEM_FIELDS : (item + capacity) * ITEM_FIELDS]
            lists.append(
                InverseLists(
                    self.entries[queries.first_token * G * top_k :][:entries],
                    sums.view(3, queries.num_pairs * G),
                    items.view(capacity, ITEM_FIELDS),
                )
            )
            item += capacity
        return lists


def programs_per_item(lists: InverseLists, entries: int) -> int:
    """Return the number of programs that share an item.

    There are several where the items alone would leave a GPU idle. Each program has at least
    `entries` of the item's entries.
    """
    return max(1, min(ITEM // entries, FEW_ITEMS // lists.capacity))


def item_capacity(pairs: int, entries: int, G: int) -> int:
    """Return the largest possible number of items: every row may have one that is not full."""
    return pairs * G + entries // ITEM


@triton.jit
def _locate_row(
    pair_chunk_ptr,
    chunk_starts_ptr,
    chunk_pairs_ptr,
    chunk_ranks_ptr,
    first_pair,
    first_chunk,
    G: tl.constexpr,
):
    """Pair, key/value head, chunk, first query, number of queries and first rank of the row."""
    row = tl.program_id(0)
    pair, g = first_pair + row // G, row % G
    chunk = tl.load(pair_chunk_ptr + pair)
    start = tl.load(chunk_starts_ptr + chunk)
    size = tl.load(chunk_starts_ptr + chunk + 1) - start
    base = (tl.load(chunk_ranks_ptr + chunk) - tl.load(chunk_ranks_ptr + first_chunk)) * G
    base += ((pair - tl.load(chunk_pairs_ptr + chunk)) * G + g).to(tl.int64) * size
    return pair, g, chunk, start, size, base


@triton.jit(do_not_specialize=["first_pair", "first_chunk", "rows"])
def _count(
    rank_ptr, pair_chunk_ptr, pair_block_ptr, chunk_starts_ptr, chunk_pairs_ptr, chunk_ranks_ptr,
    block_starts_ptr, count_ptr, first_pair, first_chunk, rows, G: tl.constexpr, ITEM: tl.constexpr,
    SCAN: tl.constexpr,
):  # fmt: skip
    # One program: one row. Count its entries.
    row = tl.program_id(0)
    pair, _, _, _, size, base = _locate_row(  # pyright: ignore[reportGeneralTypeIssues]
        pair_chunk_ptr, chunk_starts_ptr, chunk_pairs_ptr, chunk_ranks_ptr, first_pair, first_chunk,
        G,
    )  # fmt: skip
    total = tl.zeros([SCAN], tl.int32)
    for first in range(0, size, SCAN):
        i = first + tl.arange(0, SCAN)
        total += (tl.load(rank_ptr + base + i, i < size, other=0) > 0).to(tl.int32)  # [SCAN]
    count = tl.sum(total, 0)

    # Store the entries, items, and rows of partial dk and dv: each item has one per token.
    items = (count + ITEM - 1) // ITEM
    block = tl.load(pair_block_ptr + pair)
    tokens = tl.load(block_starts_ptr + block + 1) - tl.load(block_starts_ptr + block)
    tl.store(count_ptr + row, count)
    tl.store(count_ptr + rows + row, items)
    tl.store(count_ptr + 2 * rows + row, items * tokens)


@triton.jit(do_not_specialize=["first_pair", "first_chunk", "first_token", "rows", "shift"])
def _fill(
    rank_ptr, pair_chunk_ptr, pair_block_ptr, chunk_starts_ptr, chunk_pairs_ptr, chunk_ranks_ptr,
    block_starts_ptr, sum_ptr, entry_ptr, item_ptr, first_pair, first_chunk, first_token, rows,
    shift, G: tl.constexpr, ITEM: tl.constexpr, FIELDS: tl.constexpr, SCAN: tl.constexpr,
):  # fmt: skip
    # One program: one row. Where its entries, items and partial rows begin.
    row = tl.program_id(0)
    pair, g, chunk, start, size, base = _locate_row(  # pyright: ignore[reportGeneralTypeIssues]
        pair_chunk_ptr, chunk_starts_ptr, chunk_pairs_ptr, chunk_ranks_ptr, first_pair, first_chunk,
        G,
    )  # fmt: skip
    before = tl.load(sum_ptr + row - 1, row > 0, other=0)
    item = tl.load(sum_ptr + rows + row - 1, row > 0, other=0)
    partial = tl.load(sum_ptr + 2 * rows + row - 1, row > 0, other=0)
    end = tl.load(sum_ptr + row)

    # Write the entries of the queries that chose the block.
    to = before
    for first in range(0, size, SCAN):
        i = first + tl.arange(0, SCAN)
        rank = tl.load(rank_ptr + base + i, i < size, other=0).to(tl.int32)  # [SCAN], 0 for none
        chosen = (rank > 0).to(tl.int32)
        slot = to + tl.cumsum(chosen, 0) - 1
        tl.store(entry_ptr + slot, ((start - first_token + i) << shift) + rank - 1, rank > 0)
        to += tl.sum(chosen, 0)

    # Cut the list into items.
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


def selected_ranks(selected_GNT: Tensor, index: BlockIndex, queries: ChunkRange) -> Tensor:
    """Return the rank map of a selection that did not come from `top_blocks`.

    Block numbers below 0 are skipped.
    """
    G, _, T = selected_GNT.shape
    device = index.device
    n = torch.arange(queries.first_token, queries.last_token, device=device)
    chunk = index.chunk_of[n]
    start = index.chunk_starts[chunk]
    size = index.chunk_starts[chunk + 1] - start
    base = (index.chunk_ranks[chunk] - index.chunk_ranks[queries.first_chunk]) * G + n - start
    block = selected_GNT[:, queries.first_token : queries.last_token].long()
    local = block - index.asset_blocks[index.asset_of[n]][:, None]
    g = torch.arange(G, device=device)[:, None, None]
    position = base[:, None] + (local * G + g) * size[:, None]
    # One extra element receives the ranks that are skipped.
    ranks = torch.zeros(queries.num_ranks * G + 1, dtype=rank_dtype(T), device=device)
    position = torch.where(block < 0, len(ranks) - 1, position)
    rank = torch.arange(1, T + 1, device=device).to(ranks.dtype).expand(position.shape)
    return ranks.scatter_(0, position.flatten(), rank.flatten())


def new_ranks(index: BlockIndex, queries: ChunkRange, G: int, top_k: int) -> Tensor:
    """Return the zeroed rank map of a range: by chunk, block, key/value head, query."""
    return torch.zeros(queries.num_ranks * G, dtype=rank_dtype(top_k), device=index.device)


def fill_lists(
    ranks: Tensor,
    index: BlockIndex,
    queries: ChunkRange,
    G: int,
    top_k: int,
    lists: InverseLists,
) -> None:
    """Write `lists` from the rank map of `top_blocks` or `selected_ranks`."""
    rows = queries.num_pairs * G
    tables = (
        index.pair_chunk,
        index.pair_block,
        index.chunk_starts,
        index.chunk_pairs,
        index.chunk_ranks,
        index.block_starts,
    )
    counts = ranks.new_empty(3, rows, dtype=torch.int32)
    _count[(rows,)](
        ranks, *tables, counts, queries.first_pair, queries.first_chunk, rows, G, ITEM, SCAN,
        num_warps=4,
    )  # fmt: skip
    torch.cumsum(counts, 1, dtype=torch.int32, out=lists.sums)
    _fill[(rows,)](
        ranks, *tables, lists.sums, lists.entries, lists.items, queries.first_pair,
        queries.first_chunk, queries.first_token, rows, entry_shift(top_k), G, ITEM, ITEM_FIELDS,
        SCAN, num_warps=4,
    )  # fmt: skip
