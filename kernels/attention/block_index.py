"""Block index: the metadata of a batch that SSA needs, made once and shared by every layer."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, fields
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.runtime.coords import (
    MAX_BATCH,
    MAX_COORD,
    check_block_sizes,
    check_coords,
    cube_keys,
    sort_key,
)
from kernels.runtime.integer_math import cdiv

# Largest numbers of compressed tokens and of blocks in one tile of the block score. A block with
# more compressed tokens is a tile of its own.
TILE_COMPRESSED = 64
TILE_BLOCKS = 16
_SCALARS = 5  # leading entries of `BlockIndex.host`, before the chunk tables


def _runs(key_KN: Tensor) -> tuple[Tensor, Tensor]:
    """Number the runs of equal keys in K sorted rows.

    Returns the run of each entry, int32 [K, N], and the number of runs, int64 [K].
    """
    is_first_KN = torch.ones_like(key_KN, dtype=torch.bool)
    torch.ne(key_KN[:, 1:], key_KN[:, :-1], out=is_first_KN[:, 1:])
    return is_first_KN.cumsum(1, dtype=torch.int32).sub_(1), is_first_KN.sum(1)


def _tile_starts(
    compressed_starts: Tensor, asset_end: Tensor, asset_first: Tensor, smallest: int
) -> Tensor:
    """Mark the blocks at which tiles begin. A tile is a greedy run of whole blocks of one asset.

    Pointer doubling follows the tiles from the first block of every asset.

    Args:
        compressed_starts: [W], first compressed token of each block.
        asset_end: [W], the block that ends each block's asset.
        asset_first: [A], first block of each asset.
        smallest: Smallest number of blocks of a tile that is not cut by the end of its asset.

    Returns:
        bool [W]. The last entry stands for the end of the last block and is True.
    """
    last = len(compressed_starts) - 1
    block = torch.arange(1, last + 2, device=compressed_starts.device)

    # The first block of the next tile, for a tile that begins at each block.
    next_tile = torch.searchsorted(
        compressed_starts, compressed_starts + TILE_COMPRESSED, right=True
    ).sub_(1)
    next_tile = torch.minimum(torch.minimum(next_tile, block + (TILE_BLOCKS - 1)), asset_end)
    next_tile = torch.maximum(next_tile, block).clamp_(max=last)

    # Follow 1, 2, 4, ... tiles at a time from the tiles that were reached so far.
    is_start = torch.zeros_like(block, dtype=torch.bool)
    is_start.index_fill_(0, asset_first.long(), True)
    for _ in range((cdiv(last, smallest) - 1).bit_length()):
        is_start.index_fill_(0, torch.where(is_start, next_tile, last), True)
        next_tile = next_tile.take(next_tile)
    return is_start


def _chunks(tokens: list[int], blocks: list[int]) -> tuple[list[int], list[int], list[int]]:
    """Cut the queries of each asset into even chunks.

    A chunk's inverse lists (one per block and key/value head) should hold about 64 queries at top-k
    8, and its queries should fit the L2 cache.

    Args:
        tokens: Number of tokens of each asset.
        blocks: Number of blocks of each asset.

    Returns:
        Assets of the K chunks [K], and first token and first (chunk, block) pair of each [K + 1].
    """
    asset_of = []
    starts = [0]
    pairs = [0]
    for asset, (N, M) in enumerate(zip(tokens, blocks, strict=True)):
        size = min(max(1 << (8 * M - 1).bit_length(), 2048), 8192) if M else 2048
        count = max(1, round(N / size)) if N else 0
        first = starts[-1]
        for i in range(count):
            asset_of.append(asset)
            starts.append(first + N * (i + 1) // count)
            pairs.append(pairs[-1] + M)
    return asset_of, starts, pairs


@dataclass(frozen=True, eq=False)
class BlockIndex:
    """Metadata of a batch of assets for spatial sparse attention. Made by `from_coords`.

    A assets, N tokens, M blocks (select_block^3 voxels), P compressed tokens (compress_block^3
    voxels), W windows, K chunks of queries. A chunk never crosses an asset. A pair is a chunk and
    one of the blocks of its asset. All fields are tensors, so that an index passes through custom
    operators. They are int32 and on the device of the index unless said otherwise.
    """

    asset_of: Tensor
    """[N], asset of each token."""

    token_starts: Tensor
    """[A + 1], first token of each asset."""

    block_starts: Tensor
    """[M + 1], first token of each block."""

    block_of: Tensor
    """[N], block of each token."""

    asset_blocks: Tensor
    """[A + 1], first block of each asset."""

    block_asset: Tensor
    """[M], asset of each block."""

    compressed_starts: Tensor
    """[P + 1], first token of each compressed token."""

    compressed_of: Tensor
    """[N], compressed token of each token."""

    compressed_block: Tensor
    """[P], block of each compressed token."""

    compressed_asset: Tensor
    """[P], asset of each compressed token."""

    block_compressed: Tensor
    """[M + 1], first compressed token of each block."""

    asset_compressed: Tensor
    """[A + 1], first compressed token of each asset."""

    tile_blocks: Tensor
    """[tiles + 1], first block of each tile of the block score."""

    window_order: Tensor
    """[N], tokens sorted by aligned window. Empty where that is the token order itself."""

    window_of: Tensor
    """[N], aligned window of each token, in window_order."""

    window_starts: Tensor
    """[W + 1], first position of each aligned window in window_order."""

    shifted_order: Tensor
    """[N], tokens sorted by shifted window."""

    shifted_of: Tensor
    """[N], shifted window of each token, in shifted_order."""

    shifted_starts: Tensor
    """[W + 1], first position of each shifted window in shifted_order."""

    chunk_of: Tensor
    """[N], chunk of each token."""

    chunk_asset: Tensor
    """[K], asset of each chunk."""

    chunk_starts: Tensor
    """[K + 1], first token of each chunk."""

    chunk_pairs: Tensor
    """[K + 1], first pair of each chunk."""

    chunk_ranks: Tensor
    """int64 [K + 1], cumulative sum of queries times blocks of the chunks."""

    pair_chunk: Tensor
    """[pairs], chunk of each pair."""

    pair_block: Tensor
    """[pairs], block of each pair."""

    host: Tensor
    """int64 on the CPU: select_block, compress_block, tokens and blocks of the largest asset, and
    tokens of the largest block; then chunk_starts, chunk_pairs and the tokens of each chunk's
    asset."""

    @property
    def num_tokens(self) -> int:
        """Number of tokens N."""
        return self.asset_of.shape[0]

    @property
    def num_assets(self) -> int:
        """Number of assets A."""
        return self.token_starts.shape[0] - 1

    @property
    def num_blocks(self) -> int:
        """Number of blocks M."""
        return self.block_starts.shape[0] - 1

    @property
    def num_compressed(self) -> int:
        """Number of compressed tokens P."""
        return self.compressed_starts.shape[0] - 1

    @property
    def device(self) -> torch.device:
        """Device of the index."""
        return self.asset_of.device

    @cached_property
    def compressed_counts(self) -> Tensor:
        """Number of tokens of each compressed token, int32 [P]."""
        return self.compressed_starts.diff()

    @cached_property
    def max_tokens(self) -> int:
        """Number of tokens of the largest asset."""
        return int(self.host[2])

    @cached_property
    def max_blocks(self) -> int:
        """Number of blocks of the largest asset."""
        return int(self.host[3])

    @cached_property
    def max_block_tokens(self) -> int:
        """Number of tokens of the largest block."""
        return int(self.host[4])

    @cached_property
    def chunk_table(self) -> tuple[list[int], list[int], list[int]]:
        """First tokens and first pairs of the chunks [K + 1], and tokens of their assets [K]."""
        tables = self.host[_SCALARS:].tolist()
        K = (len(tables) - 2) // 3
        return tables[: K + 1], tables[K + 1 : 2 * K + 2], tables[2 * K + 2 :]

    def tensors(self) -> list[Tensor]:
        """Return the fields in order. `BlockIndex(*index.tensors())` is the same index."""
        return [getattr(self, field.name) for field in fields(self)]

    @classmethod
    def from_coords(
        cls,
        coords: Tensor,
        batch_size: int,
        *,
        select_block: int = 8,
        compress_block: int = 4,
        window: int = 8,
        window_shift: int = 4,
    ) -> BlockIndex:
        """Return the index of sorted voxels.

        Makes one device-to-host copy. Nothing that uses the index makes another.

        Args:
            coords: int32 or int64 [N, 4] = (batch, x, y, z) on any device, sorted as
                `coords[token_order(coords)]` is, without repeated voxels. N may be 0, and assets
                may be empty. 0 <= x, y, z < 32768 and 0 <= batch < batch_size.
            batch_size: Number of assets, 1 to 32768.
            select_block: Side of a selection block in voxels, 1 to 64.
            compress_block: Side of a compression block in voxels. It must divide select_block.
            window: Side of a window in voxels, 1 to 64.
            window_shift: Shift of the shifted windows in voxels, 0 to window - 1.

        Raises:
            ValueError: If `coords` or a size does not fit. The message names the first bad row.
        """
        check_coords(coords)
        check_block_sizes(select_block, compress_block)
        if not isinstance(batch_size, int) or not 1 <= batch_size <= MAX_BATCH:
            raise ValueError(f"batch_size must be an int from 1 to {MAX_BATCH}, got {batch_size!r}")
        if not isinstance(window, int) or not 1 <= window <= 64:
            raise ValueError(f"window must be an int from 1 to 64, got {window!r}")
        if not isinstance(window_shift, int) or not 0 <= window_shift < window:
            raise ValueError(
                f"window_shift must be an int from 0 to window - 1 = {window - 1}, "
                f"got {window_shift!r}"
            )
        return _build(cls, coords, batch_size, select_block, compress_block, window, window_shift)


def _raise_bad(coords: Tensor, batch_size: int, select_block: int, compress_block: int) -> None:
    """Raise the ValueError that names the first bad row."""
    xyz, batch = coords[:, 1:], coords[:, 0]
    key = sort_key(coords, select_block, compress_block)
    outside = ((xyz < 0) | (xyz >= MAX_COORD)).any(1) | (batch < 0) | (batch >= batch_size)
    unsorted, repeated = torch.zeros_like(outside), torch.zeros_like(outside)
    unsorted[1:], repeated[1:] = key[1:] < key[:-1], key[1:] == key[:-1]
    row = int((outside | unsorted | repeated).int().argmax())
    where = f"row {row} is {coords[row].tolist()}"
    if outside.any():
        raise ValueError(
            f"coords must have 0 <= batch < {batch_size} and 0 <= x, y, z < {MAX_COORD}; {where}"
        )
    if unsorted.any():
        raise ValueError(
            f"coords must be sorted by (batch, {select_block}^3 block, {compress_block}^3 "
            f"sub-block, x, y, z), as coords[token_order(coords)] is; {where}, after a larger one"
        )
    raise ValueError(f"coords must not repeat a voxel; {where}, as is the row before")


def _build(
    cls, coords, batch_size, select_block, compress_block, window, window_shift
) -> BlockIndex:
    device = coords.device
    N = len(coords)
    # Room for one more than N. Rows of int32 [.., W] then start where kernels load fastest.
    W = (N + 4) // 4 * 4
    value_checks = list(coords.aminmax(dim=0)) if N else []
    if N > 1:
        steps = sort_key(coords, select_block, compress_block).diff()
        value_checks.append(steps.amin(0, keepdim=True))

    # Until the copy to the host nothing may depend on a value, and bad coordinates must not index
    # out of range either. Sort by window. Where windows are blocks, tokens are sorted already.
    identity = window == select_block
    windows = ((window, window_shift),) if identity else ((window, 0), (window, window_shift))
    key_KN = cube_keys(coords, ((select_block, 0), (compress_block, 0), *windows))
    window_key_KN, order = key_KN[2:].sort(dim=1, stable=True)

    # Number the blocks, sub-blocks and windows, and find the first token of each.
    run_KN, count_K = _runs(torch.cat([key_KN[:2], window_key_KN]))
    position = torch.arange(W, dtype=torch.int32, device=device)
    start_KW = torch.searchsorted(run_KN, position.repeat(len(run_KN), 1), out_int32=True)

    # Block, sub-block, windows and asset of each token. From column N on: the number of blocks,
    # sub-blocks and windows, and the last asset.
    batch = coords[:, 0].int().clamp(0, batch_size - 1)
    end_K = F.pad(count_K.int(), (0, 1), value=batch_size - 1)
    of_KW = torch.cat([torch.cat([run_KN, batch[None]]), end_K[:, None].expand(-1, W - N)], 1)

    # First token, block and compressed token of each asset; block and asset of each block and of
    # each compressed token.
    assets = torch.arange(batch_size + 1, dtype=torch.int32, device=device)
    token_starts = torch.searchsorted(batch, assets, out_int32=True)
    asset_blocks, asset_compressed = (of_KW[i].index_select(0, token_starts) for i in range(2))
    of_block_KW, of_compressed_KW = (of_KW.index_select(1, start_KW[i]) for i in range(2))

    # Tiles of the block score.
    ends_W = asset_blocks[1:].index_select(0, of_block_KW[-1])
    smallest = max(1, min(TILE_BLOCKS, TILE_COMPRESSED // (select_block // compress_block) ** 3))
    tile_W = _tile_starts(of_block_KW[1], ends_W, asset_blocks[:-1], smallest)
    tile_W = (tile_W & (position < count_K[0])).cumsum(0, dtype=torch.int32)
    tile_blocks = torch.searchsorted(tile_W, position + 1, out_int32=True)
    counts = [count_K, tile_W[-1:], start_KW[0].diff().amax(0, keepdim=True)]

    # The one device-to-host copy, then the checks of the values.
    checked, counted, starts_A, blocks_A = _copy_to_host(
        [value_checks, counts, [token_starts], [asset_blocks]]
    )
    low, high, smallest_step = checked[:4], checked[4:8], checked[8:]
    if N and (
        min(low) < 0
        or high[0] >= batch_size
        or max(high[1:]) >= MAX_COORD
        or min(smallest_step, default=1) < 1
    ):
        _raise_bad(coords, batch_size, select_block, compress_block)
    M, P, *num_windows, num_tiles, max_block_tokens = counted

    # Chunks of queries, made on the host.
    tokens = [b - a for a, b in itertools.pairwise(starts_A)]
    blocks = [b - a for a, b in itertools.pairwise(blocks_A)]
    chunk_asset, chunk_starts, chunk_pairs = _chunks(tokens, blocks)
    host = [select_block, compress_block, max(tokens), max(blocks), max_block_tokens]
    tables = chunk_starts + chunk_pairs + [tokens[asset] for asset in chunk_asset]
    ranks = (
        (b - a) * blocks[asset]
        for asset, (a, b) in zip(chunk_asset, itertools.pairwise(chunk_starts), strict=True)
    )
    chunk_ranks = torch.tensor([0, *itertools.accumulate(ranks)]).to(device)

    # Pair number minus block number is constant within a chunk. From it the chunk and the block of
    # each pair.
    offset = [
        pairs - blocks_A[asset] for asset, pairs in zip(chunk_asset, chunk_pairs, strict=False)
    ]
    chunk_asset, chunk_starts, chunk_pairs, offset = _copy_to_device(
        [chunk_asset, chunk_starts, chunk_pairs, offset], device
    )
    pair = torch.arange(tables[2 * len(offset) + 1], dtype=torch.int32, device=device)
    pair_chunk = torch.searchsorted(chunk_pairs[1:], pair, right=True, out_int32=True)
    aligned, shifted = (0, 2) if identity else (2, 3)
    return cls(
        asset_of=of_KW[-1, :N],
        token_starts=token_starts,
        block_starts=start_KW[0, : M + 1],
        block_of=of_KW[0, :N],
        asset_blocks=asset_blocks,
        block_asset=of_block_KW[-1, :M],
        compressed_starts=start_KW[1, : P + 1],
        compressed_of=of_KW[1, :N],
        compressed_block=of_compressed_KW[0, :P],
        compressed_asset=of_compressed_KW[-1, :P],
        block_compressed=of_block_KW[1, : M + 1],
        asset_compressed=asset_compressed,
        tile_blocks=tile_blocks[: num_tiles + 1].clamp(max=M),
        window_order=position[:0] if identity else order[0].int(),
        window_of=of_KW[aligned, :N],
        window_starts=start_KW[aligned, : (M if identity else num_windows[0]) + 1],
        shifted_order=order[-1].int(),
        shifted_of=of_KW[shifted, :N],
        shifted_starts=start_KW[shifted, : num_windows[-1] + 1],
        chunk_of=torch.searchsorted(chunk_starts[1:], position[:N], right=True, out_int32=True),
        chunk_asset=chunk_asset,
        chunk_starts=chunk_starts,
        chunk_pairs=chunk_pairs,
        chunk_ranks=chunk_ranks,
        pair_chunk=pair_chunk,
        pair_block=pair - offset.index_select(0, pair_chunk),
        host=torch.tensor(host + tables),
    )


def _copy_to_host(parts: list[list[Tensor]]) -> list[list[int]]:
    """Return the numbers of all tensors of each part, with one copy for all parts."""
    numbers = iter(torch.cat([x for part in parts for x in part]).tolist())
    return [list(itertools.islice(numbers, sum(x.numel() for x in part))) for part in parts]


def _copy_to_device(lists: list[list[int]], device: torch.device) -> list[Tensor]:
    """Return int32 tensors of the lists, made by one copy. Each starts where loads are fastest."""
    firsts = []
    numbers = []
    for values in lists:
        firsts.append(len(numbers))
        numbers += values + [0] * (-len(values) % 4)
    packed = torch.tensor(numbers, dtype=torch.int32).to(device)
    return [
        packed[first : first + len(values)] for first, values in zip(firsts, lists, strict=True)
    ]
