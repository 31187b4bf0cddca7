"""Encoding of a build: the latents of every asset, by a trained SS-VAE, shard by shard."""

from __future__ import annotations

import json
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch
from tqdm import tqdm

from model.checkpoint import load_model, read_config
from model.sparse_tensor import BrickBatch
from model.sparse_vae import SparseVAE
from pipeline.core.errors import RunError, UserError
from pipeline.core.provenance import FORMAT_VERSION
from pipeline.core.schema import Bricks
from pipeline.storage.remote import StorePath, delete_file, write_file
from train.data.bricks import (
    UNREADABLE,
    BrickReader,
    BuildIndex,
    built_resolutions,
    read_build_index,
)
from train.data.latents import (
    STATISTICS,
    Latent,
    LatentShard,
    LatentSums,
    is_written,
    latents_name,
    vae_hash,
    write_latent_shard,
)
from train.data.source import ConcurrentReader, open_source
from train.data.symmetry import QUARTER_TURNS, move_bricks
from train.engine.distributed import World
from train.stages.vae.config import EncodeConfig

log = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")


class LatentEncoder:
    """A VAE that turns bricks into latents as they are stored.

    Args:
        vae: The trained VAE.
        device: Device to encode on.
        precision: "bf16" or "fp32".
        symmetry: Number of the symmetry of `train.data.symmetry` by which assets are transformed.
    """

    def __init__(self, vae: SparseVAE, device: torch.device, precision: str, symmetry: int = 0):
        self.vae = vae.to(device).eval()
        self.device = device
        self.hash = vae_hash(vae)
        self.autocast = precision == "bf16"
        self.symmetry = symmetry

    @property
    def channels(self) -> int:
        """Number of channels of a latent."""
        return self.vae.config.latent_channels

    @torch.no_grad()
    def encode(self, bricks: Sequence[Bricks]) -> list[Latent]:
        """Encode some assets together and return one Latent per asset.

        Cells without an active value after rounding to float16 have no latent.
        """
        moved = [move_bricks(asset, self.symmetry) for asset in bricks]
        batch = BrickBatch.collate(*map(list, zip(*moved, strict=True))).to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            posterior = self.vae.encode(batch)
        coords = batch.cells.coords.cpu().numpy()
        mean = posterior.mean.half().cpu().numpy()
        logvar = posterior.logvar.half().cpu().numpy()
        latents = []
        for asset in range(len(bricks)):
            rows = np.flatnonzero(coords[:, 0] == asset)
            rows = rows[np.lexsort(coords[rows, :0:-1].T)]  # by x, y, z
            cells = coords[rows, 1:].astype(np.int16)
            latents.append(Latent(cells=cells, mean=mean[rows], logvar=logvar[rows]))
        return latents


def encode(cfg: EncodeConfig, world: World) -> StorePath:
    """Encode all resolutions of a build. The ranks share the shards.

    Shards that exist already are checked and kept.

    Returns:
        The directory of this VAE's latents.

    Raises:
        UserError: If the VAE, the build or existing latents do not fit together.
        RunError: If too many assets cannot be read, or the VAE has diverged.
    """
    vae = load_model(cfg.vae, SparseVAE, device=world.device)
    training = read_config(cfg.vae).get("training", {})
    trained_resolutions = training.get("bricks", {}).get("resolutions", ())
    data = open_source(cfg.data, cfg.cache)
    resolutions = cfg.resolutions or _default_resolutions(data, trained_resolutions)
    precision = cfg.precision or training.get("loop", {}).get("precision", "bf16")
    symmetries = QUARTER_TURNS if cfg.quarter_turns else QUARTER_TURNS[:1]
    encoders = [LatentEncoder(vae, world.device, precision, symmetry) for symmetry in symmetries]
    folder = (cfg.latents or cfg.data / "latents") / encoders[0].hash
    index = read_build_index(data, resolutions)
    for resolution in resolutions:
        for encoder in encoders:
            name = latents_name(resolution, encoder.symmetry)
            _encode_resolution(cfg, world, encoder, index, resolution, folder / name)
    log.info("The latents are in %s.", folder)
    return folder


def _default_resolutions(data: StorePath, trained: Sequence[int]) -> tuple[int, ...]:
    built = built_resolutions(data)
    resolutions = tuple(resolution for resolution in trained if resolution in built)
    if not (resolutions or built):
        raise UserError(
            f"{data} is not a build with bricks; make one: python -m pipeline.build --out {data}"
        )
    return resolutions or tuple(built)


def _encode_resolution(
    cfg: EncodeConfig,
    world: World,
    encoder: LatentEncoder,
    index: BuildIndex,
    resolution: int,
    folder: StorePath,
) -> None:
    with_bricks = index.subset(np.flatnonzero(index.tokens[resolution]))
    shard_of_asset = np.array(with_bricks.shards)
    shards = sorted(set(with_bricks.shards))

    reader = ConcurrentReader(folder)

    def is_complete() -> bool:
        written = reader.map(lambda name: is_written(folder / f"{name}.zarr"), shards)
        return all(written)

    if world.is_first and not is_complete():  # the build has grown, or a shard was deleted
        delete_file(folder / STATISTICS)
    progress = tqdm(
        shards[world.rank :: world.size],
        desc=f"R = {resolution}",
        unit="shard",
        disable=None if world.is_first else True,
    )
    for name in progress:
        path = folder / f"{name}.zarr"
        assets = with_bricks.subset(np.flatnonzero(shard_of_asset == name))
        if is_written(path):
            _check_existing(path, assets, encoder, resolution)
            continue
        uids = write_latent_shard(
            path,
            _latents(cfg, encoder, assets, resolution),
            resolution=resolution,
            vae=encoder.hash,
            channels=encoder.channels,
            source=_config_hash(assets, resolution, name),
        )
        log.info("Shard %s at R = %d: %d assets are encoded.", name, resolution, len(uids))
    if is_complete():  # the last rank to finish; if there are two, both write the same
        _write_statistics(folder, shards, encoder, resolution)


def _config_hash(index: BuildIndex, resolution: int, name: str) -> str:
    """Return the config_hash of a shard's bricks."""
    from pipeline.storage.sdf_shard import SdfShard

    shard = SdfShard(index.root / "sdf" / str(resolution) / f"{name}.zarr")
    return str(shard.attributes.get("config_hash"))


def _check_existing(
    path: StorePath, assets: BuildIndex, encoder: LatentEncoder, resolution: int
) -> None:
    """Raise UserError if an existing store does not hold the latents of these assets."""
    try:
        shard = LatentShard(path)
        source = _config_hash(assets, resolution, path.name.removesuffix(".zarr"))
    except UNREADABLE as error:
        raise UserError(f"{error}; delete {path} to encode it again") from error
    unknown = sorted(set(shard.uids) - set(assets.uids))
    same_vae = (shard.vae, shard.resolution) == (encoder.hash, resolution)
    if unknown or shard.source != source or not same_vae:
        other = f"{unknown[0]}, which it lacks" if unknown else "other bricks or another VAE"
        raise UserError(
            f"{path} was not made from {assets.root} but from {other}; delete it to encode it again"
        )


def _latents(
    cfg: EncodeConfig, encoder: LatentEncoder, assets: BuildIndex, resolution: int
) -> Iterator[tuple[str, bool, Latent]]:
    """Yield (uid, whether it is a training asset, latent) for the assets of a shard, in order."""
    reader = BrickReader(assets)
    errors: list[str] = []

    def read(asset: int) -> Bricks | None:
        try:
            return reader.read(asset, resolution)
        except UNREADABLE as error:
            errors.append(f"{assets.uids[asset]}: {error}")
            return None

    # Assets are encoded in groups of at most max_tokens cells.
    group: list[tuple[int, Bricks]] = []
    group_tokens = 0
    with ThreadPoolExecutor(cfg.workers) as pool:
        all_bricks = _map_ahead(pool, read, range(len(assets)), 2 * cfg.workers)
        for asset, bricks in enumerate(all_bricks):
            if bricks is None:
                log.warning("At R = %d the encoder skipped %s.", resolution, errors[-1])
                _check_bad_share(cfg, assets, errors)
                continue
            if group and group_tokens + len(bricks.cells) > cfg.max_tokens:
                yield from _encode_group(encoder, assets, group)
                group = []
                group_tokens = 0
            group.append((asset, bricks))
            group_tokens += len(bricks.cells)
    if group:
        yield from _encode_group(encoder, assets, group)


def _check_bad_share(cfg: EncodeConfig, assets: BuildIndex, errors: Sequence[str]) -> None:
    if len(errors) > max(1, cfg.max_bad_share * len(assets)):
        raise RunError(
            f"{len(errors)} of {len(assets)} assets cannot be read, the last one {errors[-1]}; "
            f"run python -m pipeline.verify {assets.root}"
        )


def _encode_group(
    encoder: LatentEncoder, assets: BuildIndex, group: Sequence[tuple[int, Bricks]]
) -> Iterator[tuple[str, bool, Latent]]:
    latents = encoder.encode([bricks for _, bricks in group])
    for (asset, _), latent in zip(group, latents, strict=True):
        yield assets.uids[asset], not assets.is_val[asset], latent


def _map_ahead(
    pool: ThreadPoolExecutor, function: Callable[[Item], Result], items: Iterable[Item], depth: int
) -> Iterator[Result]:
    """Yield the function's results in order. At most `depth` are computed ahead."""
    pending: deque = deque()
    for item in items:
        pending.append(pool.submit(function, item))
        if len(pending) > depth:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def _write_statistics(
    folder: StorePath, shards: Sequence[str], encoder: LatentEncoder, resolution: int
) -> None:
    """Write mean and standard deviation of the latents of all training assets."""
    total = LatentSums.of([], encoder.channels)
    assets = 0
    stores = ConcurrentReader(folder).map(lambda name: LatentShard(folder / f"{name}.zarr"), shards)
    for shard in stores:
        total = total + shard.train_sums
        assets += len(shard.uids)
    if not total.cells:
        raise UserError(
            f"{folder} has no asset in split train, so the statistics of the latents cannot be "
            "measured; build training assets"
        )
    mean, std = total.statistics()
    statistics = {
        "format_version": FORMAT_VERSION,
        "resolution": resolution,
        "vae": encoder.hash,
        "assets": assets,
        "train_cells": total.cells,
        "of": "posterior samples of train assets, every cell alike",
        "mean": mean.tolist(),
        "std": std.tolist(),
    }
    text = json.dumps(statistics, indent=1) + "\n"
    write_file(folder / STATISTICS, text.encode(), several_writers=True)
