"""Training of the SS-DiT: the loss of its flow, validation and previews."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from model.conditioning.image_conditioned_dit import ConditionedDiT
from model.inference.extract_mesh import extract_meshes
from model.rectified_flow import interpolate, velocity_target
from model.sparse_tensor import SparseTensor
from model.sparse_vae import SparseVAE
from pipeline.core.primitives.voxel_iou import solid_intersection_over_union
from train.data.bricks import BuildIndex
from train.data.latents import LatentStore
from train.data.symmetry import turn_directions
from train.engine.batch_sampler import SampleId
from train.engine.distributed import World
from train.engine.mesh_pictures import picture, save_image, side_by_side, write_ply
from train.stages.conditioned import VALIDATION_TIMES, preview_groups, write_ious
from train.stages.dit.config import DiTTraining
from train.stages.dit.data import DiTBatch, DiTLoader
from train.stages.task import StageTask
from train.stages.validation import assets_of_rank, mean_over_ranks

PICTURE_SIDE = 256  # pixels
COLUMNS = ("image", "generated", "stored latents, decoded")


class DiTTask(StageTask[DiTTraining]):
    """What the SS-DiT adds to the trainer.

    Args:
        cfg: Options of the run. They seed the initial weights, which are equal on all ranks.
        world: The ranks of the run.
        train: The training assets, with their latents' token counts.
        val: The held-out assets.
        store: The latents. Their mean and deviation become part of the model.
        vae: Decodes previews. Without it none are drawn.
    """

    model: ConditionedDiT

    def __init__(
        self,
        cfg: DiTTraining,
        world: World,
        train: BuildIndex,
        val: BuildIndex,
        store: LatentStore,
        vae: SparseVAE | None,
    ):
        super().__init__(cfg, world, val, cfg.flow.loop.seed)
        self.train = train
        self.store = store
        self.vae = vae
        self.model = ConditionedDiT(cfg.model)
        self.model.dit.kept_activations = cfg.flow.kept_activations
        self.model.dit.set_statistics(store.mean, store.std)
        self.model.to(world.device)
        self._flops_per_token: float | None = None

    def losses(self, model: nn.Module, batch: DiTBatch) -> dict[str, Tensor]:
        """Return the squared error of the velocity: its mean in each asset, then over assets."""
        x0_NC = self._clean_latents(batch)
        error_N = self._errors(model, batch, x0_NC, batch.times, batch.dropped)
        level = batch.latents.cells
        weight_B = batch.share / level.asset_starts.diff()
        return {"loss": (error_N * weight_B[level.coords[:, 0].long()]).sum()}

    def _clean_latents(self, batch: DiTBatch) -> Tensor:
        """Return a normalised sample of the posterior, [N, C]: the end x0 of the flow."""
        return self.model.dit.normalize(batch.latents.sample(batch.posterior_noise))

    def _errors(
        self, model: nn.Module, batch: DiTBatch, x0_NC: Tensor, t_B: Tensor, dropped_B: Tensor
    ) -> Tensor:
        """Return the mean squared error of each token's velocity, [N]."""
        level = batch.latents.cells
        x_NC = interpolate(x0_NC, batch.noise, t_B[level.coords[:, 0].long()])
        velocity_NC = model(SparseTensor(x_NC, level), t_B, batch.images, dropped_B)
        return (velocity_NC - velocity_target(x0_NC, batch.noise)).square().mean(1)

    def flops(self, batch: DiTBatch) -> float:
        """Return the operations of one forward pass of the DiT, without the image encoder.

        They are counted for the first batch. Later ones are estimated in proportion to their
        tokens.
        """
        if self._flops_per_token is None:
            with torch.no_grad():
                image_tokens = self.model.encode_images(batch.images)
            count = self.model.dit.flops(batch.latents.cells, image_tokens)
            self._flops_per_token = count / batch.tokens
        return self._flops_per_token * batch.tokens

    def validate(self, model: Any) -> dict[str, float]:
        """Return the mean loss of held-out assets, and the loss at each of VALIDATION_TIMES.

        Noise and views are the same in every validation. All ranks call this together.
        """
        loader = DiTLoader(self.val, self.store, self.cfg, use="validation")
        most = self.cfg.val_batches * self.cfg.flow.batch_size
        assets = assets_of_rank(range(len(self.val)), self.world, most)
        errors = []  # [number of times] of each asset
        for asset in assets:
            # One asset at a time: a large one together with others might exceed the memory.
            batch = loader.batch([SampleId(asset, 0)], 1.0).to(self.world.device)
            x0_NC = self._clean_latents(batch)
            times = [torch.full_like(batch.times, t) for t in VALIDATION_TIMES]
            errors.append(
                torch.stack(
                    [self._errors(model, batch, x0_NC, t_B, batch.dropped).mean() for t_B in times]
                )
            )
        sums = torch.zeros(len(VALIDATION_TIMES), device=self.world.device)
        if errors:
            sums = torch.stack(errors).double().sum(0)
        names = [f"loss_{t}" for t in VALIDATION_TIMES]
        by_time = mean_over_ranks(sums, len(errors), names, self.world)
        return {"loss": sum(by_time.values()) / len(by_time), **by_time} if by_time else {}

    def sample(self, model: Any, folder: Path) -> None:
        """Generate training assets from held-out views, and held-out assets, on their stored cells.

        Writes contact.png with the columns COLUMNS, one PLY file per asset, and iou.json with the
        IoU between generated and stored insides. Writes nothing without a VAE.
        """
        if self.vae is None:
            return
        ious_by_group = {}
        rows = []
        for group in preview_groups(self.cfg, self.train, self.val):
            index = group.index
            loader = DiTLoader(index, self.store, self.cfg, use=group.use)
            ious = {}
            for asset in range(min(len(index), self.cfg.samples)):
                ious[index.uids[asset]], row = self._preview(model, loader, asset, folder)
                rows.append(row)
            ious_by_group[group.name] = ious
        write_ious(folder, ious_by_group)
        if rows:
            save_image(folder / "contact.png", side_by_side(rows, COLUMNS))

    def _preview(
        self, model: Any, loader: DiTLoader, asset: int, folder: Path
    ) -> tuple[float, list[NDArray[np.uint8]]]:
        """Generate one asset. Returns its IoU and the pictures of COLUMNS."""
        assert self.vae is not None
        batch = loader.batch([SampleId(asset, 0)], 1.0).to(self.world.device)
        level = batch.latents.cells
        z_NC = model.generate(
            level,
            model.encode_images(batch.images),
            [asset],
            self.cfg.flow.preview_sampling,
        )
        values = self.vae.decode(z_NC, level)
        stored = self.vae.decode(batch.latents.mean, level)
        generated_mesh, stored_mesh = (extract_meshes(level, x)[0] for x in (values, stored))
        write_ply(folder / f"{batch.uids[0]}.ply", *generated_mesh)
        view = loader.conditions.views.read_view(asset, loader.conditions.view_of(asset, 0))
        symmetry = loader.conditions.symmetry(asset, 0, ())
        axes = turn_directions(camera_axes(view.meta), symmetry)
        row = [on_white(view.rgba, PICTURE_SIDE)]
        for mesh in (generated_mesh, stored_mesh):
            row.append(picture(*mesh, size=PICTURE_SIDE, view=axes))
        return float(solid_intersection_over_union(values, stored, self.cfg.resolution)), row


def camera_axes(meta: dict[str, Any]) -> NDArray[np.float64]:
    """Return the axes of a render's camera as `picture` takes them: rows right, up, towards it."""
    return np.array(meta["c2w"])[:3, :3].T


def on_white(rgba: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """Return a render on white, scaled to a square.

    Args:
        rgba: uint8 [H, W, 4].
        side: Pixels per side of the result.

    Returns:
        RGB, uint8 [side, side, 3].
    """
    image = Image.fromarray(rgba)
    canvas = Image.new("RGBA", image.size, "white")
    canvas.alpha_composite(image)
    return np.asarray(canvas.convert("RGB").resize((side, side), Image.Resampling.BILINEAR))
