"""What the stages with image conditions share: batches, the choice of views, validation times."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor

from model.conditioning.image_encoder import ImageBatch
from model.conditioning.image_preprocessing import PreparedImage
from model.config import ConditionedDiTConfig
from train.data.bricks import BuildIndex
from train.data.config import FlowOptions, SampleUse
from train.data.rank_batch import RankBatch
from train.data.render_conditions import RenderConditions
from train.stages.config import ConditionedTraining

VALIDATION_TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)  # of the flow, at which held-out assets are judged


@dataclass(frozen=True, kw_only=True)
class ConditionedBatch(RankBatch):
    """The part of a step's samples that one rank trains a flow on, which starts at `noise`.

    Args:
        times: Time of each sample, fp32 [B] in (0, 1).
        dropped: Whether each sample is trained without its image, bool [B].
    """

    times: Tensor
    dropped: Tensor

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return len(self.noise)

    @property
    def metric_labels(self) -> dict[str, int]:
        """Values that are copied into the step's metrics."""
        return {}

    def to(self, device: torch.device) -> Self:
        """Return the same batch on a device."""
        if device.type == "cpu":
            return self
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        moved = {name: value.to(device) for name, value in values.items() if hasattr(value, "to")}
        return replace(self, **moved)


@dataclass(frozen=True)
class PreviewGroup:
    """Assets that a preview generates.

    Args:
        name: Key of the group in iou.json.
        index: The assets.
        use: Views from which they are generated.
    """

    name: str
    index: BuildIndex
    use: SampleUse


def preview_groups(
    cfg: ConditionedTraining, train: BuildIndex, val: BuildIndex
) -> tuple[PreviewGroup, PreviewGroup]:
    """Return the training assets, from held-out views if there are any, and the held-out assets."""
    views = "held_out_views" if cfg.held_out_views else "training_views"
    held_out_assets = PreviewGroup("held_out_assets", val, "validation")
    return PreviewGroup(views, train, "held_out"), held_out_assets


def write_ious(folder: Path, groups: Mapping[str, Mapping[str, float] | Sequence[float]]) -> None:
    """Write iou.json: the mean IoU of each group of assets, and that of each asset.

    Args:
        folder: Directory of the preview.
        groups: IoU of each asset, by name of the group. Groups without assets are left out.
    """
    content = {}
    for name, each in groups.items():
        if each:
            values = list(each.values()) if isinstance(each, Mapping) else each
            content[name] = {"iou": float(np.mean(values)), "each": each}
    (folder / "iou.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def collate_views(
    images: Sequence[Sequence[PreparedImage]], model: ConditionedDiTConfig
) -> ImageBatch:
    """Return the batch of the views of each sample for a model."""
    flat = [image for views in images for image in views]
    return ImageBatch.collate(flat, model.image_tokens, [len(views) for views in images])


def choose_views(
    index: BuildIndex,
    cfg: ConditionedTraining,
    flow: FlowOptions,
    model: ConditionedDiTConfig,
    use: SampleUse,
) -> RenderConditions:
    """Return what chooses and prepares the images of a stage's samples.

    Args:
        index: Assets of the build.
        cfg: Options of the run.
        flow: Its options of the flow.
        model: Configuration of the model that gets the images.
        use: What the samples are for. Samples for training have up to `model.views` views, which
            are read ahead. Others have one.
    """
    most_views = model.views if use == "training" else 1
    return RenderConditions(
        index,
        flow,
        cameras=cfg.cameras,
        image_size=model.encoder.image_size,
        most_views=most_views,
        held_out=cfg.held_out_views,
        training=use == "training",
        held_out_only=use == "held_out",
        ahead=2 * flow.open_shards * most_views if use == "training" else 0,
        facing=cfg.facing_views,
        mirrored=cfg.mirrored_views,
    )
