"""The token order and the block metadata of SSA, made once per batch and shared by every layer."""

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

TILE_COMPRESSED = 64  # compressed tokens in one tile of the block score ...
TILE_BLOCKS = 16  # ... and blocks; a block with more compressed tokens is a tile of its own
_SCALARS = 5  # leading entries of `host`, before the chunk tables


def _runs(key_KN: Tensor) -> tuple[Tensor, Tensor]:
    """Of K sorted keys: run of each entry, int32 [K, N], and how many there are, int64 [K]."""
    new_KN = torch.ones_like(key_KN, dtype=torch.bool)
    torch.ne(key_KN[:, 1:], key_KN[:, :-1], out=new_KN[:, 1:])
    return new_KN.cumsum(1, dtype=torch.int32).sub_(1), new_KN.sum(1)


def _tile_starts(
    compressed_starts: Tensor, asset_end: Tensor, asset_first: Tensor, smallest: int
) -> Tensor:
    """Greedy tiles of whole blocks: bool [W], true where a tile begins, and somewhere past the last block.

    compressed_starts [W] of each block, asset_end [W] the block that ends each block's asset, asset_first [A] the first
    block of each asset; whole tiles have at least `smallest` blocks. Follows the chain "next tile" from every asset by
    pointer doubling.
    """
    last = len(compressed_starts) - 1
    block = torch.arange(1, last + 2, device=compressed_starts.device)
    following = torch.searchsorted(
        compressed_starts, compressed_starts + TILE_COMPRESSED, right=True
    ).sub_(1)
    following = torch.minimum(torch.minimum(following, block + (TILE_BLOCKS - 1)), asset_end)
    following = torch.maximum(following, block).clamp_(max=last)
    reached = torch.zeros_like(block, dtype=torch.bool)
    reached.index_fill_(0, asset_first.long(), True)
    for _ in range((cdiv(last, smallest) - 1).bit_length()):
        reached.index_fill_(0, torch.where(reached, following, last), True)
        following = following.take(following)
    return reached


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
    def compressed_counts(self) -> Tensor:
        """int32 [P]: tokens of each compressed token."""
        return self.compressed_starts.diff()

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
        check_block_sizes(select_block, compress_block)
        if not isinstance(batch_size, int) or not 1 <= batch_size <= MAX_BATCH:
            raise ValueError(f"batch_size must be an int from 1 to {MAX_BATCH}, got {batch_size!r}")
        if not isinstance(window, int) or not 1 <= window <= 64:
            raise ValueError(f"window must be an int from 1 to 64, got {window!r}")
        if not isinstance(window_shift, int) or not 0 <= window_shift < window:
            raise ValueError(
                f"window_shift must be an int from 0 to window - 1 = {window - 1}, got {window_shift!r}"
            )
        return _build(cls, coords, batch_size, select_block, compress_block, window, window_shift)


def _raise_bad(coords: Tensor, batch_size: int, select_block: int, compress_block: int) -> None:
    """The ValueError that names the first bad row."""
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
            f"coords must be sorted by (batch, {select_block}^3 block, {compress_block}^3 sub-block, x, y, z), as "
            f"coords[token_order(coords)] is; {where}, after a larger one"
        )
    raise ValueError(f"coords must not repeat a voxel; {where}, as is the row before")


def _build(
    cls, coords, batch_size, select_block, compress_block, window, window_shift
) -> BlockIndex:
    device, N = coords.device, len(coords)
    W = (
        (N + 4) // 4 * 4
    )  # room for one more than N; rows of int32 [.., W] start where kernels load fastest
    checks = list(coords.aminmax(dim=0)) if N else []
    if N > 1:
        checks.append(sort_key(coords, select_block, compress_block).diff().amin(0, keepdim=True))
    # Until the copy below nothing may depend on a value; bad coordinates must not index out of range either.
    identity = window == select_block  # tokens lie by aligned window
    windows = ((window, window_shift),) if identity else ((window, 0), (window, window_shift))
    key_KN = cube_keys(coords, ((select_block, 0), (compress_block, 0), *windows))
    placed, order = key_KN[2:].sort(dim=1, stable=True)
    run_KN, count_K = _runs(torch.cat([key_KN[:2], placed]))
    position = torch.arange(W, dtype=torch.int32, device=device)
    start_KW = torch.searchsorted(run_KN, position.repeat(len(run_KN), 1), out_int32=True)
    batch = coords[:, 0].int().clamp(0, batch_size - 1)
    end_K = F.pad(count_K.int(), (0, 1), value=batch_size - 1)
    # Block, sub-block, windows and asset of each token; from N on how many there are, and the last asset.
    of_KW = torch.cat([torch.cat([run_KN, batch[None]]), end_K[:, None].expand(-1, W - N)], 1)
    assets = torch.arange(batch_size + 1, dtype=torch.int32, device=device)
    token_starts = torch.searchsorted(batch, assets, out_int32=True)
    asset_blocks, asset_compressed = (of_KW[i].index_select(0, token_starts) for i in range(2))
    of_block_KW, of_compressed_KW = (of_KW.index_select(1, start_KW[i]) for i in range(2))
    ends_W = asset_blocks[1:].index_select(0, of_block_KW[-1])
    smallest = max(1, min(TILE_BLOCKS, TILE_COMPRESSED // (select_block // compress_block) ** 3))
    tile_W = _tile_starts(of_block_KW[1], ends_W, asset_blocks[:-1], smallest)
    tile_W = (tile_W & (position < count_K[0])).cumsum(0, dtype=torch.int32)
    tile_blocks = torch.searchsorted(tile_W, position + 1, out_int32=True)
    counts = [count_K, tile_W[-1:], start_KW[0].diff().amax(0, keepdim=True)]

    # The one device-to-host copy.
    checked, counted, starts_A, blocks_A = _copied([checks, counts, [token_starts], [asset_blocks]])
    low, high, steps = checked[:4], checked[4:8], checked[8:]
    if N and (
        min(low) < 0
        or high[0] >= batch_size
        or max(high[1:]) >= MAX_COORD
        or min(steps, default=1) < 1
    ):
        _raise_bad(coords, batch_size, select_block, compress_block)
    M, P, *num_windows, num_tiles, max_block_tokens = counted
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
    before = [
        pairs - blocks_A[asset] for asset, pairs in zip(chunk_asset, chunk_pairs, strict=False)
    ]
    chunk_asset, chunk_starts, chunk_pairs, before = _uploaded(
        [chunk_asset, chunk_starts, chunk_pairs, before], device
    )
    pair = torch.arange(tables[2 * len(before) + 1], dtype=torch.int32, device=device)
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
        pair_block=pair - before.index_select(0, pair_chunk),
        host=torch.tensor(host + tables),
    )


def _copied(parts: list[list[Tensor]]) -> list[list[int]]:
    """Of each part the numbers of all its tensors, in one copy."""
    numbers = iter(torch.cat([x for part in parts for x in part]).tolist())
    return [list(itertools.islice(numbers, sum(x.numel() for x in part))) for part in parts]


def _uploaded(lists: list[list[int]], device: torch.device) -> list[Tensor]:
    """int32 copies of the lists on the device, in one copy; each starts where kernels load fastest."""
    firsts, numbers = [], []
    for one in lists:
        firsts.append(len(numbers))
        numbers += one + [0] * (-len(one) % 4)
    packed = torch.tensor(numbers, dtype=torch.int32).to(device)
    return [packed[first : first + len(one)] for first, one in zip(firsts, lists, strict=True)]
