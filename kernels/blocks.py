"""The token order and the block metadata of SSA, made once per batch and shared by every layer."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, fields
from functools import cached_property

import torch
from torch import Tensor

MAX_COORD = 1 << 15  # three of them and the batch fit one int64 sort key
MAX_BATCH = 1 << 15
TILE_COMPRESSED = 64  # compressed tokens in one tile of the block score ...
TILE_BLOCKS = 16  # ... and blocks; a block with more compressed tokens is a tile of its own
_SCALARS = 5  # leading entries of `host`, before the chunk tables


def _check_sizes(select_block: int, compress_block: int) -> None:
    for name, value in (("select_block", select_block), ("compress_block", compress_block)):
        if not isinstance(value, int) or not 1 <= value <= 64:
            raise ValueError(f"{name} must be an int from 1 to 64, got {value!r}")
    if select_block % compress_block:
        raise ValueError(f"compress_block must divide select_block = {select_block}, got {compress_block}")


def check_coords(coords: Tensor) -> None:
    if coords.ndim != 2 or coords.shape[1] != 4:
        raise ValueError(f"coords must be [N, 4] = (batch, x, y, z), got {list(coords.shape)}")
    if coords.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"coords must be int32 or int64, got {coords.dtype}")


def _cell_key(batch: Tensor, xyz: Tensor, size: int) -> Tensor:
    """int64 [N] that orders cells of `size` voxels by (batch, x, y, z)."""
    side = MAX_COORD // size + 2  # + 2: shifted windows and sizes that do not divide
    x, y, z = (xyz // size).unbind(1)
    return ((batch * side + x) * side + y) * side + z


def _sort_key(coords: Tensor, select_block: int, compress_block: int) -> Tensor:
    """int64 [N], ascending in (batch, block, sub-block, x, y, z); unique per voxel."""
    batch, xyz = coords[:, 0].long(), coords[:, 1:].long()
    key = _cell_key(batch, xyz, select_block)
    for outer, inner in ((select_block, compress_block), (compress_block, 1)):
        ratio = outer // inner
        x, y, z = (xyz % outer // inner).unbind(1)
        key = ((key * ratio + x) * ratio + y) * ratio + z
    return key


def token_order(coords: Tensor, select_block: int = 8, compress_block: int = 4) -> Tensor:
    """The permutation that sorts tokens: int [N, 4] (batch, x, y, z) -> int64 [N], `coords[order]` is sorted.

    Sorted means by (batch, select_block^3 block, compress_block^3 sub-block, x, y, z). Stable. ValueError as
    `BlockIndex.from_coords`, except that values are not checked here.
    """
    check_coords(coords)
    _check_sizes(select_block, compress_block)
    return torch.argsort(_sort_key(coords, select_block, compress_block), stable=True)


def invert_order(order: Tensor) -> Tensor:
    """The inverse permutation: `x[order][invert_order(order)]` is x. int64 [N] -> int64 [N]."""
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device, dtype=order.dtype)
    return inverse


def _runs(key: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of a sorted [N] key: run of each entry [N], run starts [N + 1] padded with N, number of runs []."""
    N = len(key)
    new = torch.ones(N, dtype=torch.bool, device=key.device)
    new[1:] = key[1:] != key[:-1]
    run = new.cumsum(0) - 1
    starts = torch.full((N + 1,), N, device=key.device)
    position = torch.arange(N, device=key.device)
    starts.scatter_reduce_(0, run, position, "amin")  # entries of one run agree on their minimum
    return run, starts, new.sum()


def _asset_starts(asset_of: Tensor, batch_size: int) -> Tensor:
    """First entry of each asset in a sorted [N] column of asset numbers: int64 [A + 1]."""
    return torch.searchsorted(asset_of, torch.arange(batch_size + 1, device=asset_of.device))


def _tile_starts(compressed_starts: Tensor, asset_end: Tensor, asset_first: Tensor) -> Tensor:
    """Greedy tiles of whole blocks: bool [N + 1], true where a tile begins.

    compressed_starts [N + 1] of each block, asset_end [N + 1] the block that ends each block's asset, asset_first
    [A] the first block of each asset. Follows the chain "next tile" from every asset by pointer doubling.
    """
    block = torch.arange(len(compressed_starts), device=compressed_starts.device)
    following = torch.searchsorted(compressed_starts, compressed_starts + TILE_COMPRESSED, right=True) - 1
    following = torch.minimum(torch.minimum(following, block + TILE_BLOCKS), asset_end)
    following = torch.maximum(following, block + 1).clamp_(max=len(block) - 1)
    reached = torch.zeros_like(block)
    reached[asset_first] = 1
    for _ in range(max(1, len(block).bit_length())):
        reached = torch.maximum(reached, torch.zeros_like(reached).scatter_reduce_(0, following, reached, "amax"))
        following = following[following]
    return reached.bool()


def _chunks(tokens: list[int], blocks: list[int]) -> tuple[list[int], list[int], list[int]]:
    """Cuts each asset's queries into even chunks: their assets [K], token starts and block-pair starts [K + 1].

    A chunk's lists (one per block and kv head) should hold about 64 queries at top-k 8, and its queries fit the L2.
    """
    asset_of, starts, pairs = [], [0], [0]
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
    """Everything SSA's kernels need to know about a batch of assets; int32 on the device unless said otherwise.

    A assets, N tokens, M blocks (select_block^3), P compressed tokens (compress_block^3), W shifted windows,
    K chunks of queries. A chunk never crosses an asset; a pair is a chunk and one of its asset's M_a blocks.
    All fields are tensors, so that an index passes through custom operators.
    """

    asset_of: Tensor  # [N]
    token_starts: Tensor  # [A + 1]
    block_starts: Tensor  # [M + 1] first token of each block
    block_of: Tensor  # [N]
    asset_blocks: Tensor  # [A + 1] first block of each asset
    block_asset: Tensor  # [M]
    compressed_starts: Tensor  # [P + 1] first token of each compressed token
    compressed_of: Tensor  # [N]
    compressed_block: Tensor  # [P]
    compressed_asset: Tensor  # [P]
    block_compressed: Tensor  # [M + 1] first compressed token of each block
    asset_compressed: Tensor  # [A + 1] first compressed token of each asset
    tile_blocks: Tensor  # [tiles + 1] first block of each tile of the block score
    window_order: Tensor  # [N] tokens by aligned window; empty where that is the identity
    window_of: Tensor  # [N] window of each token, in window_order
    window_starts: Tensor  # [windows + 1]
    shifted_order: Tensor  # [N] tokens by shifted window
    shifted_of: Tensor  # [N] window of each token, in shifted_order
    shifted_starts: Tensor  # [W + 1]
    chunk_of: Tensor  # [N]
    chunk_asset: Tensor  # [K]
    chunk_starts: Tensor  # [K + 1]
    chunk_pairs: Tensor  # [K + 1] first pair of each chunk
    chunk_ranks: Tensor  # [K + 1] int64, cumulated queries x blocks
    pair_chunk: Tensor  # [pairs]
    pair_block: Tensor  # [pairs]
    host: Tensor  # int64 on the CPU: select_block, compress_block, largest asset's tokens, blocks,
    #               largest block's tokens; then chunk_starts, chunk_pairs, tokens of each chunk's asset

    @property
    def num_tokens(self) -> int:
        return self.asset_of.shape[0]

    @property
    def num_assets(self) -> int:
        return self.token_starts.shape[0] - 1

    @property
    def num_blocks(self) -> int:
        return self.block_starts.shape[0] - 1

    @property
    def num_compressed(self) -> int:
        return self.compressed_starts.shape[0] - 1

    @property
    def device(self) -> torch.device:
        return self.asset_of.device

    @cached_property
    def max_tokens(self) -> int:
        return int(self.host[2])

    @cached_property
    def max_blocks(self) -> int:
        return int(self.host[3])

    @cached_property
    def max_block_tokens(self) -> int:
        return int(self.host[4])

    @cached_property
    def chunk_table(self) -> tuple[list[int], list[int], list[int]]:
        """On the host: token starts and pair starts of the chunks, [K + 1] each; tokens of each one's asset, [K]."""
        tables = self.host[_SCALARS:].tolist()
        K = (len(tables) - 2) // 3
        return tables[: K + 1], tables[K + 1 : 2 * K + 2], tables[2 * K + 2 :]

    def tensors(self) -> list[Tensor]:
        """The fields in order; `BlockIndex(*index.tensors())` is the same index."""
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
        """Index of sorted voxels: int [N, 4] (batch, x, y, z) on any device, N >= 0, assets may be empty.

        Makes one device-to-host copy; nothing that uses the index makes another. ValueError if coords is not sorted
        as `token_order` says, repeats a voxel, leaves 0 <= x, y, z < 32768 or 0 <= batch < batch_size, or if the
        sizes do not fit: compress_block must divide select_block, 1 <= window <= 64, 0 <= window_shift < window.
        """
        check_coords(coords)
        _check_sizes(select_block, compress_block)
        if not isinstance(batch_size, int) or not 1 <= batch_size <= MAX_BATCH:
            raise ValueError(f"batch_size must be an int from 1 to {MAX_BATCH}, got {batch_size!r}")
        if not isinstance(window, int) or not 1 <= window <= 64:
            raise ValueError(f"window must be an int from 1 to 64, got {window!r}")
        if not isinstance(window_shift, int) or not 0 <= window_shift < window:
            raise ValueError(f"window_shift must be an int from 0 to window - 1 = {window - 1}, got {window_shift!r}")
        return _build(cls, coords, batch_size, select_block, compress_block, window, window_shift)


def _first_bad(coords: Tensor, key: Tensor, batch_size: int) -> Tensor:
    """int64 [8]: how many rows break the range, the order, uniqueness; the first such row and its values."""
    xyz, batch = coords[:, 1:], coords[:, 0]
    outside = ((xyz < 0) | (xyz >= MAX_COORD)).any(1) | (batch < 0) | (batch >= batch_size)
    unsorted, repeated = torch.zeros_like(outside), torch.zeros_like(outside)
    unsorted[1:], repeated[1:] = key[1:] < key[:-1], key[1:] == key[:-1]
    row = (outside | unsorted | repeated).int().argmax()
    counts = torch.stack([outside.sum(), unsorted.sum(), repeated.sum(), row])
    return torch.cat([counts, coords.index_select(0, row[None])[0].long()])  # coords[row] would wait for the host


def _raise_bad(bad: list[int], batch_size: int, select_block: int, compress_block: int) -> None:
    outside, unsorted, repeated, row, *values = bad
    where = f"row {row} is {values}"
    if outside:
        raise ValueError(f"coords must have 0 <= batch < {batch_size} and 0 <= x, y, z < {MAX_COORD}; {where}")
    if unsorted:
        raise ValueError(
            f"coords must be sorted by (batch, {select_block}^3 block, {compress_block}^3 sub-block, x, y, z), as "
            f"coords[token_order(coords)] is; {where}, after a larger one"
        )
    if repeated:
        raise ValueError(f"coords must not repeat a voxel; {where}, as is the row before")


def _build(cls, coords, batch_size, select_block, compress_block, window, window_shift) -> BlockIndex:
    device, N = coords.device, len(coords)
    batch, xyz = coords[:, 0].long(), coords[:, 1:].long()
    bad = torch.zeros(8, dtype=torch.int64, device=device)
    if N:
        bad = _first_bad(coords, _sort_key(coords, select_block, compress_block), batch_size)
    # Until the copy below nothing may depend on a value; bad coordinates must not index out of range either.
    batch, xyz = batch.clamp(0, batch_size - 1), xyz.clamp(0, MAX_COORD - 1)
    batch = batch.cummax(0).values if N else batch
    block_of, block_starts, M = _runs(_cell_key(batch, xyz, select_block))
    compressed_of, compressed_starts, P = _runs(_cell_key(batch, xyz, compress_block))
    token_starts = _asset_starts(batch, batch_size)
    pad_block = torch.cat([block_of, M[None]])
    asset_blocks = pad_block[token_starts]
    asset_compressed = torch.cat([compressed_of, P[None]])[token_starts]
    block_compressed = torch.cat([compressed_of, P[None]])[block_starts]
    asset_of_block = torch.cat([batch, batch.new_full((1,), batch_size - 1)])[block_starts]
    tiles = _tile_starts(block_compressed, asset_blocks[asset_of_block + 1], asset_blocks[:-1])
    tiles &= torch.arange(N + 1, device=device) < M
    tile_of = tiles.long().cumsum(0) - 1
    tile_blocks = torch.full((N + 2,), N, device=device)
    tile_blocks.scatter_reduce_(0, tile_of.clamp(min=0), torch.arange(N + 1, device=device), "amin")
    windows = []
    for shift in (0, window_shift):
        key = _cell_key(batch, xyz + shift, window)
        order = torch.argsort(key, stable=True)
        windows.append((order, *_runs(key[order])))
    counts = torch.diff(block_starts)
    scalars = torch.stack([M, P, tiles.sum(), windows[0][3], windows[1][3], counts.max() if N else M])

    copy = torch.cat([bad, scalars, token_starts, asset_blocks]).tolist()  # the one device-to-host copy
    _raise_bad(copy[:8], batch_size, select_block, compress_block)
    M, P, num_tiles, num_windows, num_shifted, max_block_tokens = copy[8:14]
    starts_A, blocks_A = copy[14 : 15 + batch_size], copy[15 + batch_size :]
    tokens = [b - a for a, b in itertools.pairwise(starts_A)]
    blocks = [b - a for a, b in itertools.pairwise(blocks_A)]
    chunk_asset, chunk_starts, chunk_pairs = _chunks(tokens, blocks)
    host = [select_block, compress_block, max(tokens), max(blocks), max_block_tokens]
    tables = chunk_starts + chunk_pairs + [tokens[asset] for asset in chunk_asset]

    def up(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64).to(device)

    chunk_starts_K, chunk_pairs_K, chunk_asset_K = up(chunk_starts), up(chunk_pairs), up(chunk_asset)
    sizes, pairs = torch.diff(chunk_starts_K), torch.diff(chunk_pairs_K)
    chunk_of = torch.repeat_interleave(sizes, output_size=N)
    pair_chunk = torch.repeat_interleave(pairs, output_size=chunk_pairs[-1])
    pair_block = torch.arange(chunk_pairs[-1], device=device) - chunk_pairs_K[pair_chunk]
    pair_block = pair_block + asset_blocks[chunk_asset_K[pair_chunk]]
    chunk_ranks = torch.cat([sizes.new_zeros(1), (sizes * pairs).cumsum(0)])
    tile_blocks = torch.cat([tile_blocks[:num_tiles], tile_blocks.new_full((1,), M)])
    aligned, shifted = windows
    identity = window == select_block
    tensors = [
        batch,
        token_starts,
        torch.cat([block_starts[:M], block_starts.new_full((1,), N)]),
        block_of,
        asset_blocks,
        asset_of_block[:M],
        torch.cat([compressed_starts[:P], compressed_starts.new_full((1,), N)]),
        compressed_of,
        block_of[compressed_starts[:P]],
        batch[compressed_starts[:P]],
        torch.cat([block_compressed[:M], block_compressed.new_full((1,), P)]),
        asset_compressed,
        tile_blocks,
        aligned[0][:0] if identity else aligned[0],
        aligned[1],
        torch.cat([aligned[2][:num_windows], aligned[2].new_full((1,), N)]),
        shifted[0],
        shifted[1],
        torch.cat([shifted[2][:num_shifted], shifted[2].new_full((1,), N)]),
        chunk_of,
        chunk_asset_K,
        chunk_starts_K,
        chunk_pairs_K,
    ]
    tensors = [tensor.int() for tensor in tensors] + [chunk_ranks, pair_chunk.int(), pair_block.int()]
    return cls(*tensors, torch.tensor(host + tables))
