"""Latents on disk: the SS-VAE's posterior of every asset of a build, written and read by shard."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kernels import token_order
from model.gaussian import Gaussian
from model.sparse_tensor import Level
from model.sparse_vae import SparseVAE
from pipeline.core.errors import RunError, UserError
from pipeline.core.files import replacing
from pipeline.core.grid import CELL_SIDE
from pipeline.core.hashing import options_of
from pipeline.core.provenance import FORMAT_VERSION
from pipeline.storage.locks import workspace
from pipeline.storage.remote import StorePath, list_children
from train.data.source import OPEN_SHARDS, ConcurrentReader
from train.data.thread_safe_cache import ThreadSafeCache

STATISTICS = "stats.json"
LAST_WRITTEN = "zarr.json"  # a store at a URL is complete when it has this object
ARRAYS = ("cells", "mean", "logvar", "offsets")
SUMS = ("mean", "square", "variance")


def vae_hash(vae: SparseVAE) -> str:
    """Return 12 hex digits that identify a VAE by its weights and configuration.

    A checkpoint and an export of the same weights have the same hash.
    """
    digest = hashlib.sha256(json.dumps(options_of(vae.config), sort_keys=True).encode())
    for name, tensor in sorted(vae.state_dict().items()):
        digest.update(f"{name} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


def latents_name(resolution: int, symmetry: int = 0) -> str:
    """Return the name of the directory of latents at a resolution.

    Args:
        resolution: Resolution R of the encoded bricks.
        symmetry: Number of the symmetry of `train.data.symmetry` by which they were transformed.
    """
    return f"{resolution}-symmetry-{symmetry}" if symmetry else str(resolution)


@dataclass(frozen=True, kw_only=True, eq=False)
class Latent:
    """Latents of one asset at one resolution: a diagonal Gaussian for each of its M cells.

    Attributes:
        cells: Positions of the cells, int16 [M, 3], sorted by x, y, z.
        mean: float16 [M, C].
        logvar: Logarithm of the variance, float16 [M, C].
    """

    cells: NDArray[np.int16]
    mean: NDArray[np.float16]
    logvar: NDArray[np.float16]


@dataclass(frozen=True, kw_only=True)
class LatentSums:
    """Sums over cells per channel, from which mean and deviation of posterior samples follow.

    Attributes:
        cells: Number of cells.
        mean: Sum of the means, float64 [C].
        square: Sum of the squared means, float64 [C].
        variance: Sum of the variances, float64 [C].
    """

    cells: int
    mean: NDArray[np.float64]
    square: NDArray[np.float64]
    variance: NDArray[np.float64]

    @classmethod
    def of(cls, latents: Iterable[Latent], channels: int) -> LatentSums:
        """Sum over the cells of some latents with `channels` channels."""
        zeros = np.zeros(channels)
        total = cls(cells=0, mean=zeros, square=zeros, variance=zeros)
        for latent in latents:
            mean = latent.mean.astype(np.float64)
            variance = np.exp(latent.logvar.astype(np.float64))
            total = total + cls(
                cells=len(mean),
                mean=mean.sum(0),
                square=(mean**2).sum(0),
                variance=variance.sum(0),
            )
        return total

    def __add__(self, other: LatentSums) -> LatentSums:
        sums = {name: getattr(self, name) + getattr(other, name) for name in SUMS}
        return LatentSums(cells=self.cells + other.cells, **sums)

    def statistics(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return mean and standard deviation of posterior samples, float64 [C] each."""
        mean = self.mean / self.cells
        of_means = np.maximum(self.square / self.cells - mean**2, 0)
        return mean, np.sqrt(of_means + self.variance / self.cells)


def write_latent_shard(
    path: StorePath,
    latents: Iterable[tuple[str, bool, Latent]],
    *,
    resolution: int,
    vae: str,
    channels: int,
    source: str,
) -> list[str]:
    """Write the latents of a shard. The store appears complete or not at all.

    Args:
        path: The new Zarr store, a directory or a URL.
        latents: uid, whether the asset is a training asset, and latents, in the order of the store.
        resolution: Resolution R of the bricks that were encoded.
        vae: Hash of the VAE, see `vae_hash`.
        channels: Number of channels.
        source: config_hash of the bricks' shard.

    Returns:
        The uids in the order of the store.

    Raises:
        RunError: If a value is not finite in float16.
    """
    import zarr

    from pipeline.storage.sdf_shard import ArrayWriter

    uids: list[str] = []
    offsets = [0]
    total = LatentSums.of([], channels)
    with _publishing(path) as partial:
        partial.mkdir()
        zarr.create_group(partial, zarr_format=3)
        arrays = {
            "cells": ArrayWriter(partial, "cells", "int16", (3,)),
            "mean": ArrayWriter(partial, "mean", "float16", (channels,)),
            "logvar": ArrayWriter(partial, "logvar", "float16", (channels,)),
        }
        for uid, is_training, latent in latents:
            if not (np.isfinite(latent.mean).all() and np.isfinite(latent.logvar).all()):
                raise RunError(
                    f"latents of {uid} at R = {resolution} are not finite in float16: the VAE has "
                    "diverged; train it again with a lower learning rate"
                )
            for name, array in arrays.items():
                array.append(getattr(latent, name))
            uids.append(uid)
            offsets.append(offsets[-1] + len(latent.cells))
            if is_training:
                total = total + LatentSums.of([latent], channels)
        arrays["offsets"] = ArrayWriter(partial, "offsets", "int64", ())
        arrays["offsets"].append(np.array(offsets, np.int64))
        for array in arrays.values():
            array.close()
        attributes = {
            "format_version": FORMAT_VERSION,
            "resolution": resolution,
            "vae": vae,
            "source": source,
            "uids": uids,
            "train_sums": {
                "cells": total.cells,
                **{name: getattr(total, name).tolist() for name in SUMS},
            },
        }
        zarr.open_group(partial, mode="r+", zarr_format=3).update_attributes(attributes)
    return uids


def is_written(path: StorePath) -> bool:
    """Return whether the latents of a shard are at a path as a whole."""
    return (path / LAST_WRITTEN).exists()


@contextmanager
def _publishing(path: StorePath) -> Iterator[Path]:
    """Yield a local directory that becomes the store at `path` at the end."""
    if isinstance(path, Path):
        with replacing(path) as partial:
            yield partial
        return
    with workspace(path) as folder:
        partial = folder / path.name
        yield partial
        path.upload(partial, last=LAST_WRITTEN)


class LatentShard:
    """Reads one store `latents/<vae>/<R>/<shard>.zarr`.

    Attributes:
        vae: Hash of the VAE that made the latents.
        resolution: Resolution R of the encoded bricks.
        source: config_hash of the bricks' shard.
        uids: Identifiers of the assets in the order of the store.
        train_sums: Sums over the cells of the training assets.
        offsets: First row of each asset, int64 [A + 1].

    Raises:
        ValueError: If `path` is not such a store, or has another format version.
    """

    def __init__(self, path: StorePath):
        import zarr
        from zarr.errors import BaseZarrError

        from pipeline.storage.remote_zarr import zarr_store
        from pipeline.storage.row_reader import row_readers

        self.path = path
        try:
            group = zarr.open_group(zarr_store(path), mode="r", zarr_format=3)
            self._arrays: dict[str, Any] = {name: group[name] for name in ARRAYS}
            attributes: dict[str, Any] = dict(group.attrs)
        except (OSError, KeyError, ValueError, BaseZarrError) as error:
            raise ValueError(
                f"{self.path} must hold latents (a Zarr v3 group of {', '.join(ARRAYS)})"
            ) from error
        version = attributes.get("format_version")
        if version != FORMAT_VERSION:
            raise ValueError(
                f"{self.path} must have format_version {FORMAT_VERSION}, got {version}; "
                "encode the build again"
            )
        self.vae: str = attributes["vae"]
        self.resolution: int = attributes["resolution"]
        self.source: str = attributes["source"]
        self.uids: list[str] = list(attributes["uids"])
        sums = attributes["train_sums"]
        arrays = {name: np.array(sums[name]) for name in SUMS}
        self.train_sums = LatentSums(cells=sums["cells"], **arrays)
        self.offsets: NDArray[np.int64] = np.asarray(self._arrays["offsets"][:])
        self._row = {uid: row for row, uid in enumerate(self.uids)}
        self._readers = row_readers(
            {name: self._arrays[name] for name in ("cells", "mean", "logvar")}, path
        )

    def tokens(self, uid: str) -> int:
        """Return the number of cells of an asset. Unknown uids raise KeyError."""
        row = self._row[uid]
        return int(self.offsets[row + 1] - self.offsets[row])

    def read(self, uid: str) -> Latent:
        """Read the latents of an asset. Unknown uids raise KeyError."""
        from pipeline.storage.row_reader import read_rows

        row = self._row[uid]
        start, stop = int(self.offsets[row]), int(self.offsets[row + 1])
        return Latent(
            **{name: read_rows(reader, start, stop) for name, reader in self._readers.items()}
        )


class LatentStore:
    """All latents of one VAE at one resolution. It may be read from several threads.

    Args:
        root: Directory or URL of the latents, with one directory per VAE.
        resolution: Resolution R of the encoded bricks.
        vae: Hash of the VAE. None takes the only one.
        symmetry: Number of the symmetry of `train.data.symmetry` that the bricks were transformed
            by before they were encoded.

    Attributes:
        root: As given.
        symmetry: As given.
        folder: `root/<vae>/<R>`.
        mean: Mean of posterior samples of training assets, float32 [C].
        std: Their standard deviation, float32 [C].
        tokens: Number of cells by uid.

    Raises:
        UserError: If there are no such latents, if they are incomplete, or if there are several
            VAEs and `vae` names none of them.
    """

    def __init__(
        self, root: StorePath, resolution: int, vae: str | None = None, *, symmetry: int = 0
    ):
        self.root = root
        self.vae = _choose_vae(root, resolution, vae)
        self.resolution = resolution
        self.folder = root / self.vae / latents_name(resolution, symmetry)
        self.symmetry = symmetry
        self._turned: dict[int, LatentStore] = {symmetry: self}
        command = (
            f"python -m train.encode --resolutions {resolution} --latents {root}"
            f"{' --quarter-turns' if symmetry else ''}, with the --vae and --data that they were "
            "made from"
        )
        try:
            statistics = json.loads((self.folder / STATISTICS).read_text(encoding="utf-8"))
            version = statistics["format_version"]
            self.mean = torch.tensor(statistics["mean"])
            self.std = torch.tensor(statistics["std"])
        except (OSError, ValueError, LookupError) as error:
            raise UserError(
                f"{self.folder} is not complete (no {STATISTICS}); complete it: {command}"
            ) from error
        if version != FORMAT_VERSION:
            raise UserError(
                f"{self.folder} has format_version {version}, this code reads {FORMAT_VERSION}; "
                f"make the latents again: {command}"
            )
        self.tokens: dict[str, int] = {}
        self._shard_of: dict[str, StorePath] = {}
        paths = [path for path in list_children(self.folder) if path.name.endswith(".zarr")]
        self._lock = threading.Lock()
        self._open: ThreadSafeCache[StorePath, LatentShard] = ThreadSafeCache(OPEN_SHARDS)
        shards = ConcurrentReader(root).map(self._open_checked, paths)
        for path, shard in zip(paths, shards, strict=True):
            self.tokens.update((uid, shard.tokens(uid)) for uid in shard.uids)
            self._shard_of.update(dict.fromkeys(shard.uids, path))

    def __reduce__(self) -> tuple[Any, ...]:
        make = partial(LatentStore, self.root, self.resolution, self.vae, symmetry=self.symmetry)
        return make, ()

    def _open_checked(self, path: StorePath) -> LatentShard:
        try:
            shard = self._shard(path)
        except ValueError as error:
            raise UserError(str(error)) from error
        if (shard.vae, shard.resolution) != (self.vae, self.resolution):
            raise UserError(
                f"{path} must hold latents of VAE {self.vae} at R = {self.resolution}, got VAE "
                f"{shard.vae} at R = {shard.resolution}; delete it and encode again"
            )
        return shard

    def _shard(self, path: StorePath) -> LatentShard:
        return self._open.get(path, lambda: LatentShard(path))

    def __contains__(self, uid: str) -> bool:
        return uid in self.tokens

    def turned(self, symmetry: int) -> LatentStore:
        """Return the latents of the same assets that were transformed by a symmetry.

        Raises:
            UserError: If they were not made, see `python -m train.encode --quarter-turns`.
        """
        with self._lock:
            if symmetry not in self._turned:
                self._turned[symmetry] = LatentStore(
                    self.root, self.resolution, self.vae, symmetry=symmetry
                )
            return self._turned[symmetry]

    @property
    def channels(self) -> int:
        """Number of channels C of a latent."""
        return len(self.mean)

    def read(self, uid: str) -> Latent:
        """Read the latents of an asset.

        Raises:
            ValueError: If they are not finite. Damaged files also raise KeyError, RuntimeError or
                OSError.
        """
        latent = self._shard(self._shard_of[uid]).read(uid)
        if not (np.isfinite(latent.mean).all() and np.isfinite(latent.logvar).all()):
            raise ValueError("latents must be finite")
        return latent


def _choose_vae(root: StorePath, resolution: int, vae: str | None) -> str:
    names = [path.name for path in list_children(root) if (path / str(resolution)).exists()]
    if vae is None and len(names) == 1:
        return names[0]
    if vae in names:
        return str(vae)
    make = (
        f"python -m train.encode --vae CHECKPOINT --data DATA --latents {root} "
        f"--resolutions {resolution}"
    )
    if not names:
        raise UserError(f"{root} has no latents at R = {resolution}; make them: {make}")
    if vae is None:
        raise UserError(
            f"{root} has latents of {len(names)} VAEs at R = {resolution} ({', '.join(names)}); "
            "name one with --vae"
        )
    raise UserError(
        f"{root} has latents of VAE {', '.join(names)} at R = {resolution}, not of {vae}; "
        f"make them: {make}"
    )


@dataclass(frozen=True, eq=False)
class LatentBatch(Gaussian):
    """Posteriors of the latents of a batch of assets with N cells in total, in token order.

    Attributes:
        mean: float32 [N, C].
        logvar: Logarithm of the variance, float32 [N, C].
        cells: The cells as a level of resolution R / 8.
    """

    cells: Level

    @classmethod
    def collate(cls, latents: Sequence[Latent], resolution: int) -> LatentBatch:
        """Join the latents of several assets, at resolution R, to a batch on the CPU.

        Raises:
            ValueError: If there are no latents, or cells repeat or lie outside the grid.
        """
        if not latents:
            raise ValueError("latents must be of at least one asset, got none")
        batch = np.repeat(np.arange(len(latents)), [len(latent.cells) for latent in latents])
        xyz = np.concatenate([latent.cells for latent in latents])
        coords = torch.from_numpy(np.concatenate([batch[:, None], xyz], 1).astype(np.int32))
        order = token_order(coords)
        cells = Level.from_coords(coords[order], resolution // CELL_SIDE, len(latents))
        mean = np.concatenate([latent.mean for latent in latents])
        logvar = np.concatenate([latent.logvar for latent in latents])
        return cls(
            torch.from_numpy(mean).float()[order],
            torch.from_numpy(logvar).float()[order],
            cells,
        )

    def to(self, device: torch.device | str) -> LatentBatch:
        """Return the same batch on a device."""
        moved = {name: getattr(self, name).to(device) for name in ("cells", "mean", "logvar")}
        return replace(self, **moved)
