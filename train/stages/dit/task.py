"""The SS-DiT as the training loop sees it: the flow's loss, and what it makes of views that it has not seen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from model.conditioning.image_conditioned_dit import ConditionedDiT
from model.config import Guidance
from model.inference.extract_mesh import extract_meshes
from model.rectified_flow import interpolate, velocity_target
from model.sparse_tensor import SparseTensor
from model.sparse_vae import SparseVAE
from pipeline.core.primitives.voxel_iou import intersection_over_union
from train.data.bricks import BuildIndex
from train.data.latents import LatentStore
from train.engine.batch_sampler import SampleId
from train.engine.distributed import World
from train.engine.mesh_pictures import picture, save_image, side_by_side, write_ply
from train.stages.dit.config import DiTTraining
from train.stages.dit.data import DiTBatch, DiTLoader

TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)  # at which held-out assets are judged
PICTURE = 256  # pixels


class DiTTask:
    """Images and noisy latents to velocities. The VAE, if there is one, only shows what samples look like."""

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
        torch.manual_seed(cfg.flow.loop.seed)  # the same weights on every rank
        self.cfg, self.world, self.train, self.val, self.store = cfg, world, train, val, store
        self.model = ConditionedDiT(cfg.model)
        self.model.dit.activation_checkpointing = cfg.flow.loop.activation_checkpointing
        self.model.dit.set_statistics(store.mean, store.std)
        self.model.to(world.device)
        self.vae = vae
        self._flops_a_token: float | None = None

    def losses(self, model: nn.Module, batch: DiTBatch) -> dict[str, Tensor]:
        """Mean squared error of the velocity over an asset's latents, every asset alike."""
        x0_NC = self._start(batch)
        error_N = self._errors(model, batch, x0_NC, batch.times, batch.dropped)
        level = batch.latents.cells
        weight_B = batch.share / level.asset_starts.diff()
        return {"loss": (error_N * weight_B[level.coords[:, 0].long()]).sum()}

    def _start(self, batch: DiTBatch) -> Tensor:
        """The flow's x0 [N, C]: a sample of the posterior."""
        return self.model.dit.normalize(batch.latents.sample(batch.posterior_noise))

    def _errors(
        self, model: nn.Module, batch: DiTBatch, x0_NC: Tensor, t_B: Tensor, dropped_B: Tensor
    ) -> Tensor:
        """Squared error of each token's velocity: [N]."""
        level = batch.latents.cells
        x_NC = interpolate(x0_NC, batch.noise, t_B[level.coords[:, 0].long()])
        velocity_NC = model(SparseTensor(x_NC, level), t_B, batch.images, dropped_B)
        return (velocity_NC - velocity_target(x0_NC, batch.noise)).square().mean(1)

    def flops(self, batch: DiTBatch) -> float:
        """Of the DiT alone, counted for the first batch, in proportion to tokens after that."""
        if self._flops_a_token is None:
            with torch.no_grad():
                condition = self.model.encode_images(batch.images)
            self._flops_a_token = (
                self.model.dit.flops(batch.latents.cells, condition) / batch.tokens
            )
        return self._flops_a_token * batch.tokens

    def validate(self, model: Any) -> dict[str, float]:
        """The loss of held-out assets, and it at each time; the same times, noise and views every time."""
        loader, sums = DiTLoader(self.val, self.store, self.cfg, training=False), []
        for asset in self._assets(
            self.val, self.world
        ):  # one by one: a large one beside others might not fit
            batch = loader.batch([SampleId(asset, 0)], 1.0).to(self.world.device)
            x0_NC = self._start(batch)
            times = [torch.full_like(batch.times, t) for t in TIMES]
            sums.append(
                torch.stack(
                    [self._errors(model, batch, x0_NC, t_B, batch.dropped).mean() for t_B in times]
                )
            )
        found = (
            torch.stack(sums).double().sum(0)
            if sums
            else torch.zeros(len(TIMES), device=self.world.device)
        )
        *errors, count = self.world.sum(
            torch.cat([found.double(), found.new_tensor([len(sums)])])
        ).tolist()
        if not count:
            return {}
        by_time = {f"loss_{t}": error / count for t, error in zip(TIMES, errors, strict=True)}
        return {"loss": sum(by_time.values()) / len(TIMES), **by_time}

    def _assets(self, index: BuildIndex, world: World) -> list[int]:
        """This rank's share, at most val_batches x batch_size."""
        return list(range(len(index)))[world.rank :: world.size][
            : self.cfg.val_batches * self.cfg.flow.batch_size
        ]

    def sample(self, model: Any, folder: Path) -> None:
        """Training assets from views never shown, and held-out assets, on their stored cells.

        Writes `contact.png` (image, generated mesh as that camera sees it, the mesh of the stored latents), meshes, and
        in `iou.json` what they share. Nothing without a VAE.
        """
        if self.vae is None:
            return
        numbers, rows = {}, []
        seen = "held_out_views" if self.cfg.held_out_views else "training_views"
        for name, index, only in (
            (seen, self.train, True),
            ("held_out_assets", self.val, False),
        ):
            loader = DiTLoader(index, self.store, self.cfg, training=False, held_out_only=only)
            found = {}
            for asset in range(min(len(index), self.cfg.samples)):
                found[index.uids[asset]], row = self._sample(model, loader, asset, folder)
                rows.append(row)
            if found:
                numbers[name] = {"iou": float(np.mean(list(found.values()))), "each": found}
        (folder / "iou.json").write_text(json.dumps(numbers, indent=1) + "\n")
        if rows:
            save_image(folder / "contact.png", side_by_side(rows))

    def _sample(
        self, model: Any, loader: DiTLoader, asset: int, folder: Path
    ) -> tuple[float, list[NDArray[np.uint8]]]:
        assert self.vae is not None
        batch = loader.batch([SampleId(asset, 0)], 1.0).to(self.world.device)
        level, flow = batch.latents.cells, self.cfg.flow
        z_NC = model.generate(
            level,
            model.encode_images(batch.images),
            [asset],
            steps=flow.steps,
            guidance=Guidance(scale=flow.guidance),
        )
        values, stored = self.vae.decode(z_NC, level), self.vae.decode(batch.latents.mean, level)
        made, right = (extract_meshes(level, x)[0] for x in (values, stored))
        write_ply(folder / f"{batch.uids[0]}.ply", *made)
        view = loader.conditions.views.read_view(asset, loader.conditions.view_of(asset, 0))
        axes = np.array(view.meta["c2w"])[:3, :3].T
        row = [
            on_white(view.rgba),
            *(picture(*mesh, size=PICTURE, view=axes) for mesh in (made, right)),
        ]
        return float(intersection_over_union(values < 0, stored < 0)), row


def on_white(rgba: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """RGB [PICTURE, PICTURE, 3] of a render."""
    image = Image.fromarray(rgba)
    canvas = Image.new("RGBA", image.size, "white")
    canvas.alpha_composite(image)
    return np.asarray(canvas.convert("RGB").resize((PICTURE, PICTURE), Image.Resampling.BILINEAR))
