"""`python -m train.encode`: the latents of every asset of a build, as a trained SS-VAE's encoder sees them."""

from __future__ import annotations

import json
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import torch
from tqdm import tqdm

from model.checkpoint import load_model, read_config
from model.sparse_tensor import BrickBatch
from model.sparse_vae import SparseVAE
from pipeline.core.cli import command, parse
from pipeline.core.devices import Device
from pipeline.core.errors import RunError, UserError
from pipeline.core.grid import check_resolution
from pipeline.core.provenance import FORMAT_VERSION
from pipeline.core.schema import Bricks
from train.data.bricks import (
    UNREADABLE,
    BrickReader,
    BuildIndex,
    built_resolutions,
    read_build_index,
)
from train.data.latents import STATISTICS, Latent, LatentShard, Sums, vae_hash, write_latent_shard
from train.engine.distributed import World, join_world

log = logging.getLogger(__name__)

PROG = "python -m train.encode"
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class EncodeConfig:
    """Encode a build's bricks with a trained SS-VAE. The same command goes on where it was stopped."""

    vae: Path = Path(
        "runs/vae-tiny/latest"
    )  # a checkpoint of python -m train.vae, or an exported model
    data: Path = Path("data/smoke")  # what python -m pipeline.build made
    resolutions: tuple[int, ...] = ()  # default: those the VAE was trained at and the build has
    latents: Path | None = None  # default: latents/ in the build
    device: Device = "auto"
    precision: Literal["bf16", "fp32"] | None = (
        None  # of the arithmetic; default: the VAE's own in training
    )
    max_tokens: int = 46_000  # cells encoded together; a larger asset goes alone
    max_bad_share: float = 0.05  # of a shard's assets that cannot be read, before the run ends
    workers: int = 4  # threads that read ahead

    def __post_init__(self):
        for resolution in self.resolutions:
            check_resolution(resolution)
        if self.max_tokens < 1 or self.workers < 1:
            raise ValueError(
                f"max_tokens and workers must be 1 or more, got {self.max_tokens} and {self.workers}"
            )
        if not 0 <= self.max_bad_share <= 1:
            raise ValueError(f"max_bad_share must be in [0, 1], got {self.max_bad_share}")


class LatentEncoder:
    """A VAE, and bricks to their latents as stored."""

    def __init__(self, vae: SparseVAE, device: torch.device, precision: str):
        self.vae, self.device, self.hash = vae.to(device).eval(), device, vae_hash(vae)
        self.autocast = precision == "bf16"

    @property
    def channels(self) -> int:
        return self.vae.config.latent_channels

    @torch.no_grad()
    def encode(self, bricks: Sequence[Bricks]) -> list[Latent]:
        """One Latent an asset. Cells without an active value after rounding to f16 have none."""
        batch = BrickBatch.collate(bricks).to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            posterior = self.vae.encode(batch)
        coords = batch.cells.coords.cpu().numpy()
        mean, logvar = (x.half().cpu().numpy() for x in (posterior.mean, posterior.logvar))
        found = []
        for asset in range(len(bricks)):
            rows = np.flatnonzero(coords[:, 0] == asset)
            rows = rows[np.lexsort(coords[rows, :0:-1].T)]  # by x, y, z
            found.append(
                Latent(
                    cells=coords[rows, 1:].astype(np.int16), mean=mean[rows], logvar=logvar[rows]
                )
            )
        return found


def encode(cfg: EncodeConfig, world: World) -> Path:
    """Every resolution of the build; returns the folder of this VAE's latents.

    Ranks share the shards. UserError if the VAE, the build or latents that are there do not fit, RunError if too many
    assets cannot be read.
    """
    vae = load_model(cfg.vae, SparseVAE, device=world.device)
    described = read_config(cfg.vae)
    training = described.get("training", {})
    resolutions = cfg.resolutions or _resolutions(
        cfg.data, training.get("bricks", {}).get("resolutions", ())
    )
    encoder = LatentEncoder(
        vae, world.device, cfg.precision or training.get("loop", {}).get("precision", "bf16")
    )
    folder = (cfg.latents or cfg.data / "latents") / encoder.hash
    index = read_build_index(cfg.data, resolutions)
    for resolution in resolutions:
        _encode_resolution(cfg, world, encoder, index, resolution, folder / str(resolution))
    return folder


def _resolutions(data: Path, trained: Sequence[int]) -> tuple[int, ...]:
    built = built_resolutions(data)
    found = tuple(resolution for resolution in trained if resolution in built) or tuple(built)
    if not found:
        raise UserError(
            f"{data} is not a build with bricks; make one: python -m pipeline.build --out {data}"
        )
    return found


def _encode_resolution(
    cfg: EncodeConfig,
    world: World,
    encoder: LatentEncoder,
    index: BuildIndex,
    resolution: int,
    folder: Path,
) -> None:
    with_bricks = index.subset(np.flatnonzero(index.tokens[resolution]))
    names = np.array(with_bricks.shards)
    shards = sorted(set(with_bricks.shards))
    mine = shards[world.rank :: world.size]

    def complete() -> bool:
        return all((folder / f"{name}.zarr").exists() for name in shards)

    if world.is_first and not complete():  # shards that are new to the build, or were removed
        (folder / STATISTICS).unlink(missing_ok=True)
    bar = tqdm(
        mine, desc=f"R = {resolution}", unit="shard", disable=None if world.is_first else True
    )
    for name in bar:
        path, chosen = folder / f"{name}.zarr", with_bricks.subset(np.flatnonzero(names == name))
        if path.exists():
            _check_there(path, chosen, encoder, resolution)
            continue
        held = write_latent_shard(
            path,
            _latents(cfg, encoder, chosen, resolution),
            resolution=resolution,
            vae=encoder.hash,
            channels=encoder.channels,
            source=_source(chosen, resolution, name),
        )
        log.info("shard %s at R = %d: %d assets", name, resolution, len(held))
    if complete():  # for whoever finishes last; if that is two, both write the same
        _write_statistics(folder, shards, encoder, resolution, world.rank)


def _source(index: BuildIndex, resolution: int, name: str) -> str:
    from pipeline.storage.sdf_shard import SdfShard

    shard = SdfShard(index.root / "sdf" / str(resolution) / f"{name}.zarr")
    return str(shard.attributes.get("config_hash"))


def _check_there(path: Path, chosen: BuildIndex, encoder: LatentEncoder, resolution: int) -> None:
    try:
        shard = LatentShard(path)
        source = _source(chosen, resolution, path.stem)
    except UNREADABLE as error:
        raise UserError(f"{error}; remove {path} to have it made again") from error
    strangers = sorted(set(shard.uids) - set(chosen.uids))
    if (
        strangers
        or shard.source != source
        or (shard.vae, shard.resolution) != (encoder.hash, resolution)
    ):
        what = f"{strangers[0]}, which it lacks" if strangers else "other bricks or another VAE"
        raise UserError(
            f"{path} was not made from {chosen.root} but from {what}: remove it to have it made again"
        )


def _latents(
    cfg: EncodeConfig, encoder: LatentEncoder, chosen: BuildIndex, resolution: int
) -> Iterator[tuple[str, bool, Latent]]:
    """(uid, whether it trains, latent) of a shard's assets in order, encoded in groups of at most max_tokens."""
    reader, bad = BrickReader(chosen), []

    def read(asset: int) -> Bricks | None:
        try:
            return reader.read(asset, resolution)
        except UNREADABLE as error:
            bad.append(f"{chosen.uids[asset]}: {error}")
            return None

    group: list[tuple[int, Bricks]] = []
    with ThreadPoolExecutor(cfg.workers) as pool:
        for asset, bricks in enumerate(_ahead(pool, read, range(len(chosen)), 2 * cfg.workers)):
            if bricks is None:
                log.warning("R = %d, skipped %s", resolution, bad[-1])
                if len(bad) > max(1, cfg.max_bad_share * len(chosen)):
                    verify = f"python -m pipeline.verify {chosen.root}"
                    raise RunError(
                        f"{len(bad)} of {len(chosen)} assets cannot be read, as {bad[-1]}; run {verify}"
                    )
                continue
            if (
                group
                and len(bricks.cells) + sum(len(one.cells) for _, one in group) > cfg.max_tokens
            ):
                yield from _encoded(encoder, chosen, group)
                group = []
            group.append((asset, bricks))
    if group:
        yield from _encoded(encoder, chosen, group)


def _encoded(
    encoder: LatentEncoder, chosen: BuildIndex, group: Sequence[tuple[int, Bricks]]
) -> Iterator[tuple[str, bool, Latent]]:
    for (asset, _), latent in zip(
        group, encoder.encode([bricks for _, bricks in group]), strict=True
    ):
        yield chosen.uids[asset], not chosen.is_val[asset], latent


def _ahead(
    pool: ThreadPoolExecutor, function: Callable[[Item], Result], items: Iterable[Item], depth: int
) -> Iterator[Result]:
    """The function's results in order, at most `depth` of them made before they are asked for."""
    pending: deque = deque()
    for item in items:
        pending.append(pool.submit(function, item))
        if len(pending) > depth:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def _write_statistics(
    folder: Path, shards: Sequence[str], encoder: LatentEncoder, resolution: int, rank: int
) -> None:
    total, assets = Sums.of([], encoder.channels), 0
    for name in shards:
        shard = LatentShard(folder / f"{name}.zarr")
        total, assets = total + shard.train_sums, assets + len(shard.uids)
    if not total.cells:
        raise UserError(
            f"{folder}: no asset is in split train, so the latents' statistics cannot be measured"
        )
    mean, std = total.statistics()
    found = {
        "format_version": FORMAT_VERSION,
        "resolution": resolution,
        "vae": encoder.hash,
        "assets": assets,
        "train_cells": total.cells,
        "of": "posterior samples of train assets, every cell alike",
        "mean": mean.tolist(),
        "std": std.tolist(),
    }
    partial = folder / f".{STATISTICS}.{rank}.partial"
    partial.write_text(json.dumps(found, indent=1) + "\n")
    partial.replace(folder / STATISTICS)


def main(args: Sequence[str]) -> None:
    cfg = parse(EncodeConfig, args, prog=PROG)
    with join_world(cfg.device) as world:
        if not world.is_first:
            logging.getLogger().setLevel(logging.WARNING)
        folder = encode(cfg, world)
        log.info("latents in %s", folder)


if __name__ == "__main__":
    command(main)
