"""The assets of a build, and their SDF bricks as training batches."""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
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
from pipeline.core.schema import Bricks
from pipeline.storage.commit_marker import CommitMarker, check_sizes
from pipeline.storage.layout import (
    MANIFEST,
    list_commits,
    manifest_path,
    marker_path,
    product_paths,
)
from pipeline.storage.manifest import check_version
from pipeline.storage.remote import StorePath, read_files, stop_reading
from train.data.rank_batch import RankBatch
from train.data.source import OPEN_SHARDS, ConcurrentReader
from train.data.symmetry import SYMMETRIES, move_bricks
from train.data.thread_safe_cache import ThreadSafeCache
from train.engine.batch_sampler import BatchSampler, SampleId, StepSamples
from train.engine.distributed import World

if TYPE_CHECKING:
    from pipeline.storage.sdf_shard import SdfShard

log = logging.getLogger(__name__)

# Exceptions that reading a damaged shard may raise.
UNREADABLE = (
    ValueError,
    KeyError,
    RuntimeError,
    OSError,
    IndexError,
)
ONE_BITS = 0x3C00  # the bits of 1.0 as float16
MIN_BAD = 5  # unreadable assets below which a run never ends


@dataclass(frozen=True, kw_only=True)
class BuildIndex:
    """The usable assets of a build, numbered 0 .. A - 1, and the sizes of their bricks.

    Attributes:
        root: Directory or URL of the build.
        uids: Identifier of each asset.
        shards: Name of each asset's shard.
        is_val: Whether each asset is held out, bool [A].
        tokens: Number of cells of each asset, int64 [A], by resolution. 0 where an asset has no
            committed bricks.
    """

    root: StorePath
    uids: tuple[str, ...]
    shards: tuple[str, ...]
    is_val: NDArray[np.bool_]
    tokens: dict[int, NDArray[np.int64]]

    def __len__(self) -> int:
        return len(self.uids)

    def split(self, name: str) -> BuildIndex:
        """Return the assets of one split: "train", "val" or "all"."""
        keep = np.ones(len(self), bool) if name == "all" else self.is_val == (name == "val")
        return self.subset(np.flatnonzero(keep))

    def subset(self, assets: Sequence[int] | NDArray[np.int64]) -> BuildIndex:
        """Return the index of some assets, given by their numbers."""
        rows = np.asarray(assets, np.int64)
        return replace(
            self,
            uids=tuple(self.uids[row] for row in rows),
            shards=tuple(self.shards[row] for row in rows),
            is_val=self.is_val[rows],
            tokens={resolution: tokens[rows] for resolution, tokens in self.tokens.items()},
        )


def built_resolutions(root: StorePath) -> list[int]:
    """Return the SDF resolutions of which a build has a committed shard, in increasing order."""
    names = set().union(*list_commits(root).values())
    products = [Product.parse(name) for name in names if is_product_name(name)]
    return sorted(product.resolution for product in products if product.kind == "sdf")


def read_build_index(root: StorePath, resolutions: Sequence[int]) -> BuildIndex:
    """Read which assets of a build are done and lie in committed shards.

    Args:
        root: Directory or URL of the build.
        resolutions: Resolutions for which the result's `tokens` are filled.

    Raises:
        UserError: If `root` is not a build, has another format version or lacks a resolution.
    """
    commits = list_commits(root)
    tables = _read_manifests(root, [shard for shard, names in commits.items() if MANIFEST in names])
    if not tables:
        raise UserError(
            f"{root} is not a build with committed shards; make one: "
            f"python -m pipeline.build --out {root}"
        )
    done = [row for table in tables for row in table.to_pylist() if row["status"] == "done"]
    rows = [row for row in done if row["split"]]
    if len(rows) < len(done):
        log.warning(
            "%d of %d assets of %s are in no split and are left out, because its build is not "
            "finished or they have copies in both splits.",
            *(len(done) - len(rows), len(done), root),
        )
    if done and not rows:
        raise UserError(
            f"the splits of {root} are not decided, because its build was stopped before that; "
            "run its build command again"
        )
    built = set(built_resolutions(root))
    tokens = {}
    for resolution in resolutions:
        name, column = str(Product.sdf(resolution)), tokens_column(resolution)
        counts = [
            (row.get(column) or 0) if name in commits.get(row["shard"], ()) else 0 for row in rows
        ]
        tokens[resolution] = np.array(counts, np.int64)
        if not tokens[resolution].any():
            raise UserError(
                f"{root} has no bricks at R = {resolution}, only at R = {_words(built)}; add them: "
                "run its build command again with "
                f"--resolutions {_words({*built, resolution})}"
            )
    return BuildIndex(
        root=root,
        uids=tuple(row["uid"] for row in rows),
        shards=tuple(row["shard"] for row in rows),
        is_val=np.array([row["split"] == "val" for row in rows], bool),
        tokens=tokens,
    )


def read_asset_names(root: StorePath) -> dict[str, str]:
    """Return the name of each asset of a build by its uid: its path or URL, or else its uid.

    Raises:
        UserError: If the build has another format version.
    """
    commits = list_commits(root)
    tables = _read_manifests(root, [shard for shard, names in commits.items() if MANIFEST in names])
    rows = [row for table in tables for row in table.to_pylist()]
    return {row["uid"]: row.get("url") or row["uid"] for row in rows}


def log_training_data(
    training: BuildIndex, held_out: BuildIndex, sampler: BatchSampler, world: World
) -> None:
    """Log how many assets are trained on, held out and left out. Only the first rank logs."""
    if not world.is_first:
        return
    log.info(
        "Training on %d assets of %s at R = %s, with %d held-out assets.",
        len(training),
        training.root,
        _words(set(sampler.tokens)),
        len(held_out),
    )
    for resolution, left_out in sampler.left_out.items():
        if left_out:
            log.warning(
                "%d assets exceed max_tokens at R = %d and are left out.", left_out, resolution
            )
    if not len(held_out):
        log.warning("%s has no held-out assets, so nothing is validated.", training.root)


def _words(resolutions: set[int]) -> str:
    return " ".join(map(str, sorted(resolutions)))


def _read_manifests(root: StorePath, shards: Sequence[str]) -> list[pa.Table]:
    """Read the manifests of some shards, concurrently if they are remote.

    Every manifest from a URL must have the hash that its commit marker states.
    """
    if isinstance(root, Path):
        paths = [manifest_path(root, shard) for shard in shards]
        return [_manifest(path, path.read_bytes()) for path in paths if path.exists()]
    paths = [manifest_path(root, shard) for shard in shards]
    below = Path()
    contents = read_files(root, [str(manifest_path(below, shard)) for shard in shards])
    markers = read_files(root, [str(marker_path(below, shard, MANIFEST)) for shard in shards])
    tables = []
    for path, content, marker in zip(paths, contents, markers, strict=True):
        try:
            (described,) = CommitMarker.from_json(marker).files
        except ValueError as error:
            raise UserError(f"the commit marker of {path} is damaged: {error}") from error
        if hashlib.sha256(content).hexdigest() != described.sha256:
            raise UserError(
                f"{path} differs from what its commit marker states; "
                f"run python -m pipeline.verify {root}"
            )
        tables.append(_manifest(path, content))
    return tables


def _manifest(path: StorePath, content: bytes) -> pa.Table:
    wanted = ("uid", "status", "shard", "split", "url")
    try:
        schema = pq.read_schema(pa.BufferReader(content))
        # Other columns are not read: not every version of Arrow reads a missing list of fixed
        # length, as the centre of a rejected asset is.
        names = [name for name in schema.names if name in wanted or resolution_of_column(name)]
        table = pq.read_table(pa.BufferReader(content), columns=names)
    except (OSError, pa.ArrowException) as error:
        raise UserError(
            f"{path} is not a readable manifest: {error}; copy the build again, or make it again"
        ) from error
    try:
        check_version(path, schema)
    except ValueError as error:
        raise UserError(str(error)) from error
    return table


def magnitude_bits(values: NDArray[np.float16]) -> NDArray[np.uint16]:
    """Return |values| as integers in the same order, with NaN above all numbers.

    NumPy compares these integers about forty times as fast as float16 values.

    Args:
        values: float16 of any shape.

    Returns:
        uint16 of the same shape.
    """
    return values.view(np.uint16) & np.uint16(0x7FFF)


class BrickReader:
    """Reads the bricks of single assets. It may be used from several threads.

    Args:
        index: Assets of the build.
        kept_bytes: Size of the bricks that are kept in memory, the first ones that are read. In an
            epoch every asset is read once, so bricks that replace each other would never be found.

    Attributes:
        index: Assets of the build.
        concurrent: Runs reads of several assets at the same time if the build is remote.
    """

    def __init__(self, index: BuildIndex, *, kept_bytes: int = 0):
        self.index = index
        self._lock = threading.Lock()
        self._kept: dict[tuple[int, int], Bricks] = {}
        self._room = kept_bytes
        self._open: ThreadSafeCache[tuple[int, str], SdfShard] = ThreadSafeCache(OPEN_SHARDS)
        self.concurrent = ConcurrentReader(index.root)

    def read(self, asset: int, resolution: int) -> Bricks:
        """Read and check the bricks of an asset.

        Args:
            asset: Number of the asset in the index.
            resolution: Resolution R of the bricks.

        Raises:
            ValueError: If the bricks are empty, outside the grid or not in [-1, 1]. Damaged files
                also raise the other exceptions of UNREADABLE.
        """
        with self._lock:
            kept = self._kept.get((asset, resolution))
        if kept is not None:
            return kept
        name = self.index.shards[asset]
        shard = self._open.get((resolution, name), lambda: self._open_shard(resolution, name))
        bricks = shard.bricks(self.index.uids[asset])
        if not len(bricks.cells):
            raise ValueError("the asset has no cells")
        if bricks.cells.min() < 0 or bricks.cells.max() >= resolution // CELL_SIDE:
            found = f"{bricks.cells.min()}..{bricks.cells.max()}"
            raise ValueError(f"cells must lie in 0..{resolution // CELL_SIDE - 1}, got {found}")
        size = magnitude_bits(bricks.values)
        if size.max() > ONE_BITS:
            raise ValueError(
                f"values must be finite and in [-1, 1], got {np.abs(bricks.values).max()}"
            )
        if size.min() == ONE_BITS:
            raise ValueError("no active point")
        self._keep(asset, bricks)
        return bricks

    def _keep(self, asset: int, bricks: Bricks) -> None:
        size = bricks.cells.nbytes + bricks.values.nbytes + bricks.sharp.nbytes
        key = (asset, bricks.resolution)
        with self._lock:
            if size <= self._room and key not in self._kept:
                self._room -= size
                self._kept[key] = bricks

    def _open_shard(self, resolution: int, name: str) -> SdfShard:
        from pipeline.storage.sdf_shard import SdfShard  # imports zarr, which not all users need

        path = self.index.root / product_paths(Product.sdf(resolution), name)[0]
        check_sizes(self.index.root, name, Product.sdf(resolution))
        shard = SdfShard(path)
        if shard.resolution != resolution:
            raise ValueError(f"{path} must have resolution {resolution}, got {shard.resolution}")
        return shard


@dataclass(frozen=True, kw_only=True)
class VAEBatch(RankBatch):
    """The part of a step's samples that one rank trains the SS-VAE on.

    `noise` is that of the posterior samples and has a row for each cell.

    Attributes:
        bricks: Bricks of the assets.
    """

    bricks: BrickBatch

    @property
    def tokens(self) -> int:
        """Number of cells."""
        return len(self.bricks.cells)

    @property
    def metric_labels(self) -> dict[str, int]:
        """Values that are copied into the step's metrics."""
        return {"resolution": self.bricks.resolution}

    def to(self, device: torch.device) -> VAEBatch:
        """Return the batch on a device. Pinned memory is copied without waiting."""
        if device.type == "cpu":
            return self
        bricks = self.bricks.to(device, non_blocking=True)
        return replace(self, bricks=bricks, noise=self.noise.to(device, non_blocking=True))

    def pin_memory(self) -> VAEBatch:
        """Return a copy in page-locked memory, from which `to` copies without waiting."""
        return replace(self, bricks=self.bricks.pin_memory(), noise=self.noise.pin_memory())


class BrickLoader:
    """Loads a rank's samples of a step: reads bricks, applies symmetries, adds noise, collates.

    A batch depends on its samples alone. An asset that cannot be read is replaced by the next
    readable one in the index.

    Args:
        index: Assets of the training run.
        seed: Seed of symmetries and noise.
        noise_channels: Number of channels C of the noise.
        symmetries: Whether each sample is transformed by a random symmetry of the cube.
        max_bad_share: Share of the assets tried so far that may be unreadable. Beyond it, and from
            MIN_BAD assets on, loading raises RunError.
        largest: Largest number of cells of an asset that may replace another. None: no limit.
        pin: Whether batches are put into page-locked memory.
        kept_bytes: Size of the bricks that are kept in memory, see `BrickReader`.
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
        kept_bytes: int = 0,
    ):
        self.index = index
        self.seed = seed
        self.noise_channels = noise_channels
        self.symmetries = symmetries
        self.reader = BrickReader(index, kept_bytes=kept_bytes)
        self.max_bad_share = max_bad_share
        self.largest = largest
        self.pin = pin
        self.bad: set[tuple[int, int]] = set()  # (asset, resolution)
        self._is_closed = False
        self._tried: set[tuple[int, int]] = set()
        self._lock = threading.Lock()

    def load(self, step: StepSamples, rank: int) -> VAEBatch:
        """Load the batch of one rank in one step.

        Raises:
            RunError: If too many assets cannot be read.
        """
        batch = self._collate(step.ranks[rank], step.resolution, step.loss_weight)
        return batch.pin_memory() if self.pin else batch

    def close(self) -> None:
        """End reads, also those that wait for a store. Later loads raise RunError."""
        self._is_closed = True
        stop_reading(self.index.root)

    def load_assets(self, assets: Sequence[int], resolution: int) -> VAEBatch:
        """Load a batch of chosen assets as in their first epoch, for one rank."""
        samples = [SampleId(asset, 0) for asset in assets]
        return self._collate(samples, resolution, 1 / len(samples))

    def _collate(self, samples: Sequence[SampleId], resolution: int, share: float) -> VAEBatch:
        bricks, points, seeds, uids = [], [], [], []
        read = partial(self._readable, resolution=resolution)
        found = self.reader.concurrent.map(read, [sample.asset for sample in samples])
        for sample, (asset, asset_bricks) in zip(samples, found, strict=True):
            uid = self.index.uids[asset]
            # Seeds use names instead of numbers: a sample is the same in every index.
            key = (self.seed, resolution, sample.epoch, uid)
            symmetry = seed_of("symmetry", *key) % len(SYMMETRIES) if self.symmetries else 0
            moved, order = move_bricks(asset_bricks, symmetry)
            bricks.append(moved)
            points.append(order)
            seeds.append(seed_of("noise", *key) >> 1)  # torch requires seeds below 2^63
            uids.append(uid)
        batch = BrickBatch.collate(bricks, points)
        return VAEBatch(
            bricks=batch,
            noise=sample_noise(batch, seeds, self.noise_channels),
            share=share,
            uids=tuple(uids),
        )

    def _readable(self, asset: int, resolution: int) -> tuple[int, Bricks]:
        """Return the first readable asset from `asset` on, and its bricks."""
        tokens = self.index.tokens[resolution]
        for step in range(len(tokens)):
            candidate = (asset + step) % len(tokens)
            fits = tokens[candidate] and (self.largest is None or tokens[candidate] <= self.largest)
            if not fits or (candidate, resolution) in self.bad:
                continue
            self._check_open()
            try:
                bricks = self.reader.read(candidate, resolution)
            except UNREADABLE as error:
                self._check_open()  # an interpreter that ends fails reads of sound assets
                self._note_bad(candidate, resolution, error)
                continue
            with self._lock:
                self._tried.add((candidate, resolution))
            return candidate, bricks
        raise RunError(
            f"no asset of {self.index.root} can be read at R = {resolution}; "
            f"run python -m pipeline.verify {self.index.root}"
        )

    def _check_open(self) -> None:
        if self._is_closed:
            raise RunError(f"nothing is read from {self.index.root} after the run has ended")

    def _note_bad(self, asset: int, resolution: int, error: Exception) -> None:
        with self._lock:
            self._tried.add((asset, resolution))
            if (asset, resolution) in self.bad:
                return
            self.bad.add((asset, resolution))
            bad, tried = len(self.bad), len(self._tried)
        uid, shard = self.index.uids[asset], self.index.shards[asset]
        log.warning(
            "%s at R = %d is skipped, shard %s: %s (%d of %d assets are unreadable).",
            uid,
            resolution,
            shard,
            error,
            bad,
            tried,
        )
        if bad >= MIN_BAD and bad > self.max_bad_share * tried:
            raise RunError(
                f"{bad} of {tried} assets in {self.index.root} cannot be read, the last one "
                f"{uid}: {error}; run python -m pipeline.verify {self.index.root}"
            ) from error


def sample_noise(batch: BrickBatch, seeds: Sequence[int], channels: int) -> Tensor:
    """Draw standard normal noise for the cells of a batch.

    Args:
        batch: Bricks of A assets with M cells in total.
        seeds: One seed per asset, from which the noise of its cells is drawn.
        channels: Number of channels.

    Returns:
        float32 [M, channels] on the CPU.
    """
    starts = batch.cells.asset_starts.tolist()
    pieces = [
        torch.randn(end - start, channels, generator=torch.Generator().manual_seed(seed))
        for seed, start, end in zip(seeds, starts[:-1], starts[1:], strict=True)
    ]
    return torch.cat(pieces)
