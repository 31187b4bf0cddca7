"""A build's bricks as an endless, resumable stream of training batches: one resolution a step, balanced over ranks."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.sparse_tensor import BrickBatch
from pipeline.core.errors import RunError, UserError
from pipeline.core.grid import CELL_SIDE
from pipeline.core.hashing import seed_of
from pipeline.core.product import Product, is_product_name, resolution_of_column, tokens_column
from pipeline.core.provenance import FORMAT_VERSION
from pipeline.core.schema import Bricks
from train.data.symmetry import SYMMETRIES, transform_bricks
from train.engine.batch_sampler import SampleId, StepSamples

if TYPE_CHECKING:
    from pipeline.storage.sdf_shard import SdfShard

log = logging.getLogger(__name__)

UNREADABLE = (
    ValueError,
    KeyError,
    RuntimeError,
    OSError,
    IndexError,
)  # what a damaged store raises
OPEN_SHARDS = 64  # kept open at once; each is a few small objects
ONE_BITS = 0x3C00  # of 1.0 as float16


@dataclass(frozen=True, kw_only=True)
class BuildIndex:
    """The assets of a build that came through, with the committed SDF resolutions of each."""

    root: Path
    uids: tuple[str, ...]
    shards: tuple[str, ...]  # of each asset
    is_val: NDArray[np.bool_]  # [A]
    tokens: dict[int, NDArray[np.int64]]  # R -> [A] cells, 0 where an asset has no bricks at R

    def __len__(self) -> int:
        return len(self.uids)

    def split(self, name: str) -> BuildIndex:
        """Only "train", "val", or "all" of it."""
        keep = np.ones(len(self), bool) if name == "all" else self.is_val == (name == "val")
        return self.subset(np.flatnonzero(keep))

    def subset(self, assets: Sequence[int] | NDArray[np.int64]) -> BuildIndex:
        rows = np.asarray(assets, np.int64)
        return replace(
            self,
            uids=tuple(self.uids[row] for row in rows),
            shards=tuple(self.shards[row] for row in rows),
            is_val=self.is_val[rows],
            tokens={resolution: tokens[rows] for resolution, tokens in self.tokens.items()},
        )


def built_resolutions(root: Path) -> list[int]:
    """The SDF resolutions that a build has committed in some shard, increasing."""
    names = {path.stem for path in (root / "shards").glob("*/*.json")}
    products = [Product.parse(name) for name in names if is_product_name(name)]
    return sorted(product.resolution for product in products if product.kind == "sdf")


def read_build_index(root: Path, resolutions: Sequence[int]) -> BuildIndex:
    """Every asset of the build that is done, in committed shards; `tokens` for the resolutions asked for.

    UserError, with what to run, if `root` is no build, of another format version, or lacks a resolution.
    """
    tables = [
        _manifest(path)
        for path in sorted((root / "manifest").glob("*.parquet"))
        if (root / "shards" / path.stem / "manifest.json").exists()
    ]
    if not tables:
        if ":/" in str(root):
            raise UserError(
                f"{root} looks like a URL; training reads a directory: copy the build to one"
            )
        raise UserError(
            f"{root} is not a build with committed shards; make one: python -m pipeline.build --out {root}"
        )
    rows = [row for table in tables for row in table.to_pylist() if row["status"] == "done"]
    built = set(built_resolutions(root))
    tokens = {}
    for resolution in resolutions:
        committed = {
            path.parent.name for path in (root / "shards").glob(f"*/{Product.sdf(resolution)}.json")
        }
        tokens[resolution] = np.array(
            [
                (row.get(tokens_column(resolution)) or 0) if row["shard"] in committed else 0
                for row in rows
            ],
            np.int64,
        )
        if not tokens[resolution].any():
            raise UserError(
                f"{root} has no bricks at R = {resolution}, only at R = {_words(built)}; add them: the command that "
                f"made it with --resolutions {_words({*built, resolution})}"
            )
    return BuildIndex(
        root=root,
        uids=tuple(row["uid"] for row in rows),
        shards=tuple(row["shard"] for row in rows),
        is_val=np.array([row["split"] == "val" for row in rows], bool),
        tokens=tokens,
    )


def _words(resolutions: set[int]) -> str:
    return " ".join(map(str, sorted(resolutions)))


def _manifest(path: Path) -> pa.Table:
    wanted = ("uid", "status", "shard", "split")
    try:
        schema = pq.read_schema(path)
        # Only these: not every Arrow reads a missing list of fixed length, as the centre of a rejected asset is.
        names = [name for name in schema.names if name in wanted or resolution_of_column(name)]
        table = pq.read_table(path, columns=names)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path} is not a readable manifest: {error}") from error
    version = (schema.metadata or {}).get(b"format_version", b"none").decode()
    if version != str(FORMAT_VERSION):
        raise UserError(
            f"{path} has format_version {version}, this code reads {FORMAT_VERSION}: rebuild it"
        )
    return table


def magnitude_bits(values: NDArray[np.float16]) -> NDArray[np.uint16]:
    """|values| as integers of the same order, NaN above all: numpy compares these forty times as fast as halves."""
    return values.view(np.uint16) & np.uint16(0x7FFF)


class BrickReader:
    """Reads single assets of a build index; safe to use from several threads."""

    def __init__(self, index: BuildIndex):
        self.index = index
        self._lock = threading.Lock()
        self._open = lru_cache(OPEN_SHARDS)(self._open_shard)

    def read(self, asset: int, resolution: int) -> Bricks:
        """One asset's bricks, checked. ValueError, KeyError, RuntimeError or OSError if they cannot be used."""
        with self._lock:
            shard = self._open(resolution, self.index.shards[asset])
        bricks = shard.bricks(self.index.uids[asset])
        if not len(bricks.cells):
            raise ValueError("no blocks")
        if bricks.cells.min() < 0 or bricks.cells.max() >= resolution // CELL_SIDE:
            raise ValueError(f"blocks must lie in 0..{resolution // CELL_SIDE - 1}")
        size = magnitude_bits(bricks.values)
        if size.max() > ONE_BITS:
            raise ValueError(
                f"values must be finite and in [-1, 1], got {np.abs(bricks.values).max()}"
            )
        if size.min() == ONE_BITS:
            raise ValueError("no active point")
        return bricks

    def _open_shard(self, resolution: int, name: str) -> SdfShard:
        from pipeline.storage.sdf_shard import (
            SdfShard,  # here: importing the stream does not take Zarr
        )

        path = self.index.root / "sdf" / str(resolution) / f"{name}.zarr"
        shard = SdfShard(path)
        if shard.resolution != resolution:
            raise ValueError(f"{path} must have resolution {resolution}, got {shard.resolution}")
        return shard


@dataclass(frozen=True, kw_only=True)
class VAEBatch:
    """What one rank works on in one step."""

    bricks: BrickBatch
    noise: Tensor  # float32 [M, C] standard normal: each asset's own, whatever it is batched with
    share: float  # weight of one sample: ranks / samples of all of them, so that the ranks' mean is the global mean
    uids: tuple[str, ...]

    @property
    def tokens(self) -> int:
        return len(self.bricks.cells)

    @property
    def samples(self) -> int:
        return len(self.uids)

    @property
    def metric_labels(self) -> dict[str, int]:
        return {"resolution": self.bricks.resolution}

    def to(self, device: torch.device) -> VAEBatch:
        """The same batch there."""
        if device.type == "cpu":
            return self
        bricks = self.bricks.to(device, non_blocking=True)
        return replace(self, bricks=bricks, noise=self.noise.to(device, non_blocking=True))

    def pin_memory(self) -> VAEBatch:
        """A copy in page-locked memory, from which `to` does not keep the host waiting."""
        return replace(self, bricks=self.bricks.pin_memory(), noise=self.noise.pin_memory())


class BrickLoader:
    """Turns a planned step into this rank's batch: reads, transforms, collates. Depends on the plan alone.

    An asset that cannot be read is replaced by the next readable one that is not larger than `largest`, and counted;
    beyond `max_bad_share` of the distinct assets tried (and 5 of them) RunError. pin: page-locked batches.
    """

    def __init__(
        self,
        index: BuildIndex,
        *,
        seed: int,
        noise_channels: int,
        symmetries: bool = True,
        max_bad_share: float = 0.05,
        largest: int | None = None,
        pin: bool = False,
    ):
        self.reader = BrickReader(index)
        self.index, self.seed, self.noise_channels = index, seed, noise_channels
        self.symmetries, self.max_bad_share, self.largest, self.pin = (
            symmetries,
            max_bad_share,
            largest,
            pin,
        )
        self.bad: set[tuple[int, int]] = set()  # (asset, resolution)
        self._tried: set[tuple[int, int]] = set()
        self._lock = threading.Lock()

    def load(self, plan: StepSamples, rank: int) -> VAEBatch:
        """The batch of one rank in one step."""
        batch = self._collate(
            plan.ranks[rank], plan.resolution, len(plan.ranks) / sum(map(len, plan.ranks))
        )
        return batch.pin_memory() if self.pin else batch

    def load_assets(self, assets: Sequence[int], resolution: int) -> VAEBatch:
        """Chosen assets, each for the first time."""
        return self._collate([SampleId(asset, 0) for asset in assets], resolution, 1 / len(assets))

    def _collate(self, draws: Sequence[SampleId], resolution: int, share: float) -> VAEBatch:
        bricks, seeds, uids = [], [], []
        for draw in draws:
            asset, one = self._readable(draw.asset, resolution)
            uid = self.index.uids[asset]
            # Names, not numbers: a sample is the same whatever else the index holds.
            key = (self.seed, resolution, draw.epoch, uid)
            if self.symmetries:
                one = transform_bricks(one, seed_of("symmetry", *key) % len(SYMMETRIES))
            bricks.append(one)
            seeds.append(seed_of("noise", *key) >> 1)  # torch wants it below 2^63
            uids.append(uid)
        batch = BrickBatch.collate(bricks)
        return VAEBatch(
            bricks=batch,
            noise=sample_noise(batch, seeds, self.noise_channels),
            share=share,
            uids=tuple(uids),
        )

    def _readable(self, asset: int, resolution: int) -> tuple[int, Bricks]:
        tokens = self.index.tokens[resolution]
        for step in range(len(tokens)):
            candidate = (asset + step) % len(tokens)
            fits = tokens[candidate] and (self.largest is None or tokens[candidate] <= self.largest)
            if not fits or (candidate, resolution) in self.bad:
                continue
            try:
                bricks = self.reader.read(candidate, resolution)
            except UNREADABLE as error:
                self._note_bad(candidate, resolution, error)
                continue
            with self._lock:
                self._tried.add((candidate, resolution))
            return candidate, bricks
        raise RunError(f"{self.index.root}: no asset can be read at R = {resolution}")

    def _note_bad(self, asset: int, resolution: int, error: Exception) -> None:
        with self._lock:
            self._tried.add((asset, resolution))
            if (asset, resolution) in self.bad:
                return
            self.bad.add((asset, resolution))
            bad, tried = len(self.bad), len(self._tried)
        uid, shard = self.index.uids[asset], self.index.shards[asset]
        log.warning(
            "%s at R = %d skipped, shard %s: %s (%d bad of %d)",
            uid,
            resolution,
            shard,
            error,
            bad,
            tried,
        )
        if bad >= 5 and bad > self.max_bad_share * tried:
            raise RunError(
                f"{bad} of {tried} assets in {self.index.root} cannot be read, the last one {uid}: {error}; "
                f"run python -m pipeline.verify {self.index.root}"
            ) from error


def sample_noise(batch: BrickBatch, seeds: Sequence[int], channels: int) -> Tensor:
    """float32 [M, channels] standard normal on the CPU, the rows of each asset from its own seed."""
    starts = batch.cells.asset_starts.tolist()
    pieces = [
        torch.randn(end - start, channels, generator=torch.Generator().manual_seed(seed))
        for seed, start, end in zip(seeds, starts[:-1], starts[1:], strict=True)
    ]
    return torch.cat(pieces)
