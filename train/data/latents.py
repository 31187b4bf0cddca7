"""Latents on disk: what a VAE's encoder says of every asset of a build, written and read shard by shard."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels import token_order
from model.sparse_tensor import Level
from model.sparse_vae import SparseVAE
from pipeline.core.errors import RunError, UserError
from pipeline.core.grid import CELL_SIDE
from pipeline.core.provenance import FORMAT_VERSION

OPEN_SHARDS = 64  # kept open at once
STATISTICS = "stats.json"
ARRAYS = ("cells", "mean", "logvar", "offsets")


def vae_hash(vae: SparseVAE) -> str:
    """12 hex digits of the weights and configuration: the same for a checkpoint and what is exported from it."""
    digest = hashlib.sha256(json.dumps(asdict(vae.config), sort_keys=True).encode())
    for name, tensor in sorted(vae.state_dict().items()):
        digest.update(f"{name} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


@dataclass(frozen=True, kw_only=True, eq=False)
class Latent:
    """One asset at one resolution: a diagonal Gaussian for every cell."""

    cells: NDArray[np.int16]  # [M, 3], sorted by x, y, z
    mean: NDArray[np.float16]  # [M, C]
    logvar: NDArray[np.float16]  # [M, C]


@dataclass(frozen=True, kw_only=True)
class Sums:
    """Per-channel sums over cells, float64 [C], from which mean and deviation of samples follow."""

    cells: int
    mean: NDArray[np.float64]
    square: NDArray[np.float64]  # of the means
    variance: NDArray[np.float64]

    @classmethod
    def of(cls, latents: Iterable[Latent], channels: int) -> Sums:
        total = cls(
            cells=0, mean=np.zeros(channels), square=np.zeros(channels), variance=np.zeros(channels)
        )
        for latent in latents:
            mean, logvar = latent.mean.astype(np.float64), latent.logvar.astype(np.float64)
            mine = cls(
                cells=len(mean), mean=mean.sum(0), square=(mean**2).sum(0), variance=np.exp(logvar).sum(0)
            )  # fmt: skip
            total = total + mine
        return total

    def __add__(self, other: Sums) -> Sums:
        sums = {
            name: getattr(self, name) + getattr(other, name)
            for name in ("mean", "square", "variance")
        }
        return Sums(cells=self.cells + other.cells, **sums)

    def statistics(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Mean and standard deviation of posterior samples, [C] each."""
        mean = self.mean / self.cells
        return mean, np.sqrt(
            np.maximum(self.square / self.cells - mean**2, 0) + self.variance / self.cells
        )


def write_latent_shard(
    path: Path,
    latents: Iterable[tuple[str, bool, Latent]],
    *,
    resolution: int,
    vae: str,
    channels: int,
    source: str,
) -> list[str]:
    """Write (uid, whether it trains, latent) in the given order to a new store `path`; returns the uids.

    All of it appears or nothing: it is written beside and renamed. vae: the hash of the VAE; source: config_hash of the
    bricks. What is left of a killed attempt is replaced. RunError if values are not finite in f16.
    """
    import zarr

    from pipeline.storage.sdf_shard import ArrayWriter

    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        zarr.create_group(partial, zarr_format=3)
        arrays = {
            "cells": ArrayWriter(partial, "cells", "int16", (3,)),
            "mean": ArrayWriter(partial, "mean", "float16", (channels,)),
            "logvar": ArrayWriter(partial, "logvar", "float16", (channels,)),
        }
        offsets, uids, total = [0], [], Sums.of([], channels)
        for uid, trains, latent in latents:
            if not (np.isfinite(latent.mean).all() and np.isfinite(latent.logvar).all()):
                raise RunError(
                    f"latents of {uid} at R = {resolution} are not finite in f16: the VAE has diverged"
                )
            for name, array in arrays.items():
                array.append(getattr(latent, name))
            uids.append(uid)
            offsets.append(offsets[-1] + len(latent.cells))
            if trains:
                total = total + Sums.of([latent], channels)
        arrays["offsets"] = ArrayWriter(partial, "offsets", "int64", ())
        arrays["offsets"].append(np.array(offsets, np.int64))
        for array in arrays.values():
            array.close()
        sums = {name: getattr(total, name).tolist() for name in ("mean", "square", "variance")}
        attributes = {
            "format_version": FORMAT_VERSION, "resolution": resolution, "vae": vae, "source": source, "uids": uids,
            "train_sums": {"cells": total.cells, **sums},
        }  # fmt: skip
        zarr.open_group(partial, mode="r+", zarr_format=3).update_attributes(attributes)
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return uids


class LatentShard:
    """Reads `latents/<vae>/<R>/<shard>.zarr`. ValueError if it is not one, or of another format version."""

    def __init__(self, path: Path | str):
        import zarr
        from zarr.errors import BaseZarrError

        self.path = Path(path)
        try:
            group = zarr.open_group(self.path, mode="r", zarr_format=3)
            self._arrays: dict[str, Any] = {name: group[name] for name in ARRAYS}
            attributes: dict[str, Any] = dict(group.attrs)
        except (OSError, KeyError, ValueError, BaseZarrError) as error:
            raise ValueError(
                f"{self.path} must hold latents (a Zarr v3 group of {', '.join(ARRAYS)})"
            ) from error
        version = attributes.get("format_version")
        if version != FORMAT_VERSION:
            raise ValueError(
                f"{self.path} must have format_version {FORMAT_VERSION}, got {version}: encode it again"
            )
        self.vae, self.resolution, self.source = (
            attributes[name] for name in ("vae", "resolution", "source")
        )
        self.uids: list[str] = list(attributes["uids"])
        sums = attributes["train_sums"]
        arrays = {name: np.array(sums[name]) for name in ("mean", "square", "variance")}
        self.train_sums = Sums(cells=sums["cells"], **arrays)
        self.offsets: NDArray[np.int64] = np.asarray(self._arrays["offsets"][:])
        self._row = {uid: row for row, uid in enumerate(self.uids)}

    def tokens(self, uid: str) -> int:
        """How many cells an asset has. KeyError for an unknown uid."""
        row = self._row[uid]
        return int(self.offsets[row + 1] - self.offsets[row])

    def read(self, uid: str) -> Latent:
        """One asset. KeyError for an unknown uid."""
        row = self._row[uid]
        rows = slice(int(self.offsets[row]), int(self.offsets[row + 1]))
        return Latent(
            **{name: np.asarray(self._arrays[name][rows]) for name in ("cells", "mean", "logvar")}
        )


class LatentStore:
    """All latents of one VAE at one resolution; reading is safe from several threads.

    UserError, with what to run, if there are none, not all of them, or those of several VAEs and `vae` names none.
    """

    def __init__(self, root: Path, resolution: int, vae: str | None = None):
        self.vae, self.resolution = _choose(root, resolution, vae), resolution
        self.folder = root / self.vae / str(resolution)
        again = f"python -m train.encode --resolutions {resolution} --latents {root}, with the --vae and --data it is of"
        try:
            found = json.loads((self.folder / STATISTICS).read_text())
            version, mean, std = (found[name] for name in ("format_version", "mean", "std"))
        except (OSError, ValueError, LookupError) as error:
            raise UserError(
                f"{self.folder} is not complete (no {STATISTICS}); go on with {again}"
            ) from error
        if version != FORMAT_VERSION:
            raise UserError(
                f"{self.folder} has format_version {version}, this code reads {FORMAT_VERSION}: {again}"
            )
        self.mean, self.std = (
            torch.tensor(mean),
            torch.tensor(std),
        )  # fp32 [C], of posterior samples of train assets
        self.tokens: dict[str, int] = {}  # uid -> cells
        self._shard_of: dict[str, Path] = {}
        for path in sorted(self.folder.glob("*.zarr")):
            shard = self._checked(path)
            self.tokens.update((uid, shard.tokens(uid)) for uid in shard.uids)
            self._shard_of.update(dict.fromkeys(shard.uids, path))
        self._lock = threading.Lock()
        self._open = lru_cache(OPEN_SHARDS)(LatentShard)

    def _checked(self, path: Path) -> LatentShard:
        try:
            shard = LatentShard(path)
        except ValueError as error:
            raise UserError(str(error)) from error
        if (shard.vae, shard.resolution) != (self.vae, self.resolution):
            found = f"VAE {shard.vae} at R = {shard.resolution}"
            raise UserError(
                f"{path} must hold latents of VAE {self.vae} at R = {self.resolution}, got {found}"
            )
        return shard

    def __contains__(self, uid: str) -> bool:
        return uid in self.tokens

    @property
    def channels(self) -> int:
        return len(self.mean)

    def read(self, uid: str) -> Latent:
        """One asset. KeyError for an unknown uid, ValueError, RuntimeError or OSError if it is damaged."""
        with self._lock:
            shard = self._open(self._shard_of[uid])
        latent = shard.read(uid)
        if not (np.isfinite(latent.mean).all() and np.isfinite(latent.logvar).all()):
            raise ValueError("latents must be finite")
        return latent


def _choose(root: Path, resolution: int, vae: str | None) -> str:
    names = sorted(path.parent.name for path in root.glob(f"*/{resolution}") if path.is_dir())
    if vae is None and len(names) == 1:
        return names[0]
    if vae in names:
        return str(vae)
    make = f"python -m train.encode --vae CHECKPOINT --data DATA --latents {root} --resolutions {resolution}"
    if not names:
        raise UserError(f"{root} has no latents at R = {resolution}; make them: {make}")
    if vae is None:
        raise UserError(
            f"{root} has latents of {len(names)} VAEs at R = {resolution} ({', '.join(names)}): name one"
        )
    raise UserError(
        f"{root} has latents of VAE {', '.join(names)} at R = {resolution}, not of {vae}; make them: {make}"
    )


@dataclass(frozen=True, eq=False)
class LatentBatch:
    """Latents of a batch of assets, in token order."""

    cells: Level  # of resolution R / 8
    mean: Tensor  # fp32 [N, C]
    logvar: Tensor  # fp32 [N, C]

    @classmethod
    def collate(cls, latents: Sequence[Latent], resolution: int) -> LatentBatch:
        """One batch on the CPU. ValueError if there is none, or cells repeat or leave the grid."""
        if not latents:
            raise ValueError("latents must be of at least one asset, got none")
        batch = np.repeat(np.arange(len(latents)), [len(latent.cells) for latent in latents])
        xyz = np.concatenate([latent.cells for latent in latents])
        coords = torch.from_numpy(np.concatenate([batch[:, None], xyz], 1).astype(np.int32))
        order = token_order(coords)
        cells = Level.from_coords(coords[order], resolution // CELL_SIDE, len(latents))
        mean, logvar = (
            torch.from_numpy(np.concatenate([getattr(latent, name) for latent in latents])).float()[
                order
            ]
            for name in ("mean", "logvar")
        )
        return cls(cells, mean, logvar)

    def to(self, device: torch.device | str) -> LatentBatch:
        """The same batch there."""
        moved = {name: getattr(self, name).to(device) for name in ("cells", "mean", "logvar")}
        return replace(self, **moved)

    def sample(self, noise_NC: Tensor) -> Tensor:
        """mean + standard deviation * noise: fp32 [N, C]."""
        return self.mean + torch.exp(0.5 * self.logvar) * noise_NC
