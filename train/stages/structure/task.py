"""The two halves of the structure stage as the training loop sees them: the occupancy VAE, then the flow."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from model.config import Guidance
from model.image_tokens import ImageTokens
from model.occupancy_vae import (
    OccupancyVAE,
    occupancy_grid,
    occupancy_loss,
)
from model.rectified_flow import interpolate, velocity_target
from model.sparse_tensor import SparseTensor
from model.structure import Structure, dense_level, grid_to_rows, rows_to_grid
from pipeline.core.primitives.voxel_iou import intersection_over_union
from train.data.bricks import BuildIndex
from train.engine.batch_sampler import SampleId
from train.engine.distributed import World
from train.engine.mesh_pictures import picture, save_image, side_by_side
from train.stages.structure.config import StructureTraining
from train.stages.structure.data import GridBatch, GridLoader

TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)  # at which held-out assets are judged
PICTURE = 192  # pixels


class OccupancyTask:
    """Grids to latents and back."""

    def __init__(self, cfg: StructureTraining, world: World, val: BuildIndex):
        torch.manual_seed(cfg.vae.loop.seed)  # the same weights on every rank
        self.cfg, self.world, self.val = cfg, world, val
        self.model = OccupancyVAE(cfg.model.occupancy).to(world.device)
        self._flops_a_sample: float | None = None

    def losses(self, model: nn.Module, batch: GridBatch) -> dict[str, Tensor]:
        logits, posterior = model(batch.occupied, self._noise(batch))
        return occupancy_loss(
            logits, batch.occupied, posterior, self.cfg.vae.kl_weight, batch.share
        )

    def _noise(self, batch: GridBatch) -> Tensor:
        level = dense_level(self.cfg.model.occupancy.latent_side, batch.samples, batch.noise.device)
        return rows_to_grid(batch.noise, level)

    def flops(self, batch: GridBatch) -> float:
        """Counted on the first batch."""
        if self._flops_a_sample is None:
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                self.model(batch.occupied[:1], self._noise(batch)[:1])
            self._flops_a_sample = counter.get_total_flops()
        return self._flops_a_sample * batch.samples

    def validate(self, model: Any) -> dict[str, float]:
        """Losses of held-out assets as they are stored, their latents at the means."""
        found = []
        loader = GridLoader(self.val, self.cfg, images=False, training=False)
        for asset in assets_of(self.val, self.cfg, self.world, self.cfg.vae.batch_size):
            batch = loader.batch([SampleId(asset, 0)], 1.0).to(self.world.device)
            posterior = model.encode(batch.occupied)
            logits, kl_weight = model.decode(posterior.mean), self.cfg.vae.kl_weight
            found.append(occupancy_loss(logits, batch.occupied, posterior, kl_weight))
        return mean_over_ranks(found, ("loss", "bce", "dice", "kl", "iou"), self.world)

    def sample(self, model: Any, folder: Path) -> None:
        """Held-out assets: the stored cells beside the decoded ones."""
        loader, rows = GridLoader(self.val, self.cfg, images=False, training=False), []
        for asset in assets_of(self.val, self.cfg, World(), 1)[: self.cfg.samples]:
            batch = loader.batch([SampleId(asset, 0)], 1.0).to(self.world.device)
            decoded = model.decode(model.encode(batch.occupied).mean) > 0
            rows.append([cells_picture(batch.occupied[0]), cells_picture(decoded[0])])
        if rows:
            save_image(folder / "cells.png", side_by_side(rows))


class FlowTask:
    """Images to latents of grids. The VAE is frozen: `model` holds it so that a checkpoint is the whole stage."""

    model: Structure

    def __init__(
        self,
        cfg: StructureTraining,
        world: World,
        train: BuildIndex,
        val: BuildIndex,
        vae: OccupancyVAE,
    ):
        torch.manual_seed(cfg.flow.loop.seed)
        self.cfg, self.world, self.train, self.val = cfg, world, train, val
        self.model = Structure(cfg.model)
        self.model.vae.load_state_dict(vae.state_dict())
        self.model.vae.requires_grad_(False)
        self.model.flow.dit.activation_checkpointing = cfg.flow.loop.activation_checkpointing
        self.model.to(world.device)
        self._flops_a_sample: float | None = None

    @torch.no_grad()
    def measure(self, loader: GridLoader) -> None:
        """Set the latents' statistics from cfg.flow.statistics training assets, spread over all of them."""
        assets = self.train.tokens[self.cfg.resolution].nonzero()[0]
        count = min(self.cfg.flow.statistics, len(assets))
        rows, total_C, squares_C = 0, torch.zeros(()), torch.zeros(())
        for asset in assets[np.arange(count) * len(assets) // count]:
            batch = loader.batch([SampleId(int(asset), 0)], 1.0).to(self.world.device)
            z_NC = self._latents(self.model, batch).double()
            rows, total_C, squares_C = (
                rows + len(z_NC),
                total_C + z_NC.sum(0),
                squares_C + z_NC.square().sum(0),
            )
        mean_C = total_C / rows
        std_C = ((squares_C - rows * mean_C.square()) / (rows - 1)).clamp(min=1e-6).sqrt()
        self.model.flow.dit.set_statistics(mean_C.float(), std_C.float())

    def losses(self, model: nn.Module, batch: GridBatch) -> dict[str, Tensor]:
        loss_B = self._errors(model, batch, batch.times, batch.dropped)
        return {"loss": batch.share * loss_B.sum()}

    def _latents(self, model: Structure, batch: GridBatch) -> Tensor:
        level = dense_level(self.cfg.model.occupancy.latent_side, batch.samples, batch.noise.device)
        return grid_to_rows(model.vae.encode(batch.occupied).mean, level)

    def _errors(self, model: nn.Module, batch: GridBatch, t_B: Tensor, dropped_B: Tensor) -> Tensor:
        """Mean squared error of the velocity over each asset's latents: [B]."""
        assert batch.images is not None
        level = dense_level(self.cfg.model.occupancy.latent_side, batch.samples, batch.noise.device)
        with torch.no_grad():
            x0_NC = self.model.flow.dit.normalize(self._latents(self.model, batch))
        x_NC = interpolate(x0_NC, batch.noise, t_B[level.coords[:, 0].long()])
        velocity = model(SparseTensor(x_NC, level), t_B, batch.images, dropped_B)
        return (
            (velocity - velocity_target(x0_NC, batch.noise))
            .square()
            .view(batch.samples, -1)
            .mean(1)
        )

    def flops(self, batch: GridBatch) -> float:
        """Of the DiT alone, counted on the first batch."""
        if self._flops_a_sample is None and batch.images is not None:
            level = dense_level(
                self.cfg.model.occupancy.latent_side, batch.samples, batch.noise.device
            )
            images = batch.images
            empty = ImageTokens(
                images.pixels.new_empty(0, 0), images.coords, images.starts, images.max_tokens
            )
            self._flops_a_sample = self.model.flow.dit.flops(level, empty) / batch.samples
        return (self._flops_a_sample or 0.0) * batch.samples

    def validate(self, model: Any) -> dict[str, float]:
        """The loss of held-out assets, at the same times and with the same noise every time."""
        found = []
        loader = GridLoader(self.val, self.cfg, images=True, training=False)
        for asset in assets_of(self.val, self.cfg, self.world, self.cfg.flow.batch_size):
            batch = loader.batch([SampleId(asset, 0)], 1.0).to(self.world.device)
            errors = [
                self._errors(model, batch, torch.full_like(batch.times, t), batch.dropped)
                for t in TIMES
            ]
            found.append({"loss": torch.stack(errors).mean()})
        return mean_over_ranks(found, ("loss",), self.world)

    def sample(self, model: Any, folder: Path) -> None:
        """Training assets from views never shown, and held-out assets: image, generated cells, stored ones."""
        numbers, rows = {}, []
        seen = "held_out_views" if self.cfg.held_out_views else "training_views"
        for name, index, only in (
            (seen, self.train, True),
            ("held_out_assets", self.val, False),
        ):
            loader = GridLoader(index, self.cfg, images=True, training=False, held_out_only=only)
            overlaps = []
            for asset in assets_of(index, self.cfg, World(), 1)[: self.cfg.samples]:
                batch = loader.batch([SampleId(asset, 0)], 1.0).to(self.world.device)
                assert batch.images is not None
                cells = draw_cells(model, model.flow.encode_images(batch.images), asset, self.cfg)
                overlaps.append(float(intersection_over_union(cells, batch.occupied).float()))
                image = batch.images.pixels[0].permute(1, 2, 0).cpu().numpy()
                rows.append(
                    [resized(image), cells_picture(cells[0]), cells_picture(batch.occupied[0])]
                )
            if overlaps:
                numbers[name] = {"iou": float(np.mean(overlaps)), "each": overlaps}
        (folder / "iou.json").write_text(json.dumps(numbers, indent=1) + "\n")
        if rows:
            save_image(folder / "cells.png", side_by_side(rows))


def draw_cells(
    model: Structure, condition: ImageTokens, seed: int, cfg: StructureTraining
) -> Tensor:
    """bool [1, S, S, S] generated for one image."""
    level = model.generate(
        condition, [seed], steps=cfg.flow.steps, guidance=Guidance(scale=cfg.flow.guidance)
    )
    return occupancy_grid(level.coords, level.resolution, 1)


def assets_of(
    index: BuildIndex, cfg: StructureTraining, world: World, batch_size: int
) -> list[int]:
    """This rank's share of the assets with cells, at most val_batches x batch_size where there are several ranks."""
    assets = [int(n) for n in index.tokens[cfg.resolution].nonzero()[0]]
    return assets[world.rank :: world.size][: max(cfg.val_batches * batch_size, cfg.samples)]


def mean_over_ranks(
    found: list[dict[str, Tensor]], names: tuple[str, ...], world: World
) -> dict[str, float]:
    """The mean of every number over all ranks' assets; {} if there is none."""
    sums = torch.zeros(len(names) + 1, dtype=torch.float64, device=world.device)
    for one in found:
        sums += torch.stack([*(one[name].double() for name in names), sums.new_ones(())])
    *totals, count = world.sum(sums).tolist()
    return {name: total / count for name, total in zip(names, totals, strict=True)} if count else {}


def cells_picture(occupied: Tensor) -> NDArray[np.uint8]:
    """RGB of the cells of a bool grid [S, S, S], as little cubes."""
    return picture(*cube_surface(occupied.cpu().numpy()), size=PICTURE)


def cube_surface(occupied: NDArray[np.bool_]) -> tuple[NDArray[np.float64], NDArray[np.int32]]:
    """The faces between cells that are occupied and cells that are not, in the unit cube: vertices, triangles."""
    padded, corners = np.pad(occupied, 1), []
    for axis in range(3):
        u, v = (np.eye(3)[(axis + n) % 3] for n in (1, 2))
        for step, turn in ((1, (0, 1, 2, 3)), (-1, (3, 2, 1, 0))):
            free = occupied & ~np.roll(padded, -step, axis)[1:-1, 1:-1, 1:-1]
            base = np.argwhere(free) + (np.eye(3)[axis] if step == 1 else 0)
            square = np.stack([base, base + u, base + u + v, base + v], axis=1)
            corners.append(square[:, turn])
    quads = np.concatenate(corners)
    first = 4 * np.arange(len(quads))[:, None]
    faces = np.concatenate([first + np.array(corner) for corner in ((0, 1, 2), (0, 2, 3))]).astype(
        np.int32
    )
    return quads.reshape(-1, 3) / len(occupied) - 0.5, faces


def resized(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """RGB of PICTURE x PICTURE, by the nearest pixel."""
    rows, columns = (np.arange(PICTURE) * side // PICTURE for side in image.shape[:2])
    return image[rows][:, columns]
