"""The options of training the structure stage, and the presets from which they start."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from model.config import (
    ConditionedDiTConfig,
    DiTConfig,
    EncoderConfig,
    OccupancyConfig,
    StructureConfig,
)
from pipeline.core.devices import Device
from pipeline.core.grid import CELL_SIDE, check_resolution
from pipeline.core.options import CameraSet
from train.data.config import FlowOptions
from train.engine.config import LoopConfig

StructurePreset = Literal["tiny", "small", "base"]


@dataclass(frozen=True, kw_only=True)
class OccupancyTraining:
    """The first half: the occupancy VAE. ValueError for a number out of range."""

    batch_size: int = 8  # assets a rank
    symmetries: bool = True  # each under one of the cube's 48
    kl_weight: float = 1e-3
    loop: LoopConfig = field(default_factory=LoopConfig)

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be 1 or more, got {self.batch_size}")
        if self.kl_weight < 0:
            raise ValueError(f"kl_weight must be 0 or more, got {self.kl_weight}")


@dataclass(frozen=True, kw_only=True)
class FlowTraining(FlowOptions):
    """The second half: the flow model over its latents. ValueError for a number out of range."""

    statistics: int = 2048  # assets from which the latents' mean and deviation are measured

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.statistics < 1:
            raise ValueError(f"statistics must be 1 or more, got {self.statistics}")


@dataclass(frozen=True, kw_only=True)
class StructureTraining:
    """Train the structure stage on a build: the occupancy VAE in OUT/vae, then the flow model in OUT/flow.

    The same command goes on with a run that was stopped.
    """

    preset: StructurePreset = "tiny"  # where the options below start from
    part: Literal["both", "vae", "flow"] = "both"
    data: Path = Path("data/smoke")  # what python -m pipeline.build made
    out: Path = Path("runs/structure-tiny")
    device: Device = "auto"
    resolution: int = 512  # R of the stored cells that are the targets: a grid of R / 8 a side
    cameras: CameraSet = "paper"  # which renders are the condition
    held_out_views: int = 0  # the last so many views of every asset are not trained on
    workers: int = 4  # threads that prepare batches ahead; any number gives the same batches
    val_batches: int = 8  # of each rank in a validation
    samples: int = 8  # assets that are drawn from held-out views, or are held out themselves
    vae: OccupancyTraining = field(default_factory=OccupancyTraining)
    flow: FlowTraining = field(default_factory=FlowTraining)
    model: StructureConfig = field(default_factory=StructureConfig)

    def __post_init__(self) -> None:
        check_resolution(self.resolution)
        if self.model.occupancy.side != self.resolution // CELL_SIDE:
            raise ValueError(
                f"model.occupancy.side must be resolution / {CELL_SIDE} = {self.resolution // CELL_SIDE}, "
                f"got {self.model.occupancy.side}"
            )
        for name in ("held_out_views", "workers", "val_batches", "samples"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")


_TINY_LOOP = LoopConfig(
    steps=400,
    learning_rate=3e-3,
    warmup_steps=20,
    schedule="cosine",
    ema_decay=0.99,
    precision="fp32",
    checkpoint_every=200,
    validate_every=200,
    sample_every=1_000_000,  # at the end alone
)

STRUCTURE_PRESETS: dict[str, StructureTraining] = {
    "tiny": StructureTraining(  # minutes on a CPU
        device="cpu",
        resolution=64,
        held_out_views=2,
        workers=1,
        vae=OccupancyTraining(batch_size=8, loop=_TINY_LOOP),
        flow=FlowTraining(
            batch_size=16, augment=False, loop=replace(_TINY_LOOP, steps=800, learning_rate=2e-3)
        ),
        model=StructureConfig(
            occupancy=OccupancyConfig(
                side=8, widths=(16, 32), blocks=1, groups=8, latent_channels=8
            ),
            flow=ConditionedDiTConfig(
                dit=DiTConfig(
                    channels=128,
                    blocks=4,
                    heads=4,
                    kv_heads=4,
                    mlp_ratio=2,
                    latent_channels=8,
                    condition_channels=64,
                    attention="full",
                ),
                encoder=EncoderConfig(
                    kind="stand-in", image_size=112, channels=64, layers=2, heads=2
                ),
            ),
        ),
    ),
    "small": StructureTraining(  # minutes on a GPU
        preset="small",
        data=Path("data/full"),
        out=Path("runs/structure-small"),
        resolution=256,
        held_out_views=5,
        vae=OccupancyTraining(
            batch_size=16,
            loop=LoopConfig(steps=2000, learning_rate=1e-3, schedule="cosine", ema_decay=0.995),
        ),
        flow=FlowTraining(
            batch_size=16,
            loop=LoopConfig(steps=6000, learning_rate=5e-4, schedule="cosine", ema_decay=0.995),
        ),
        model=StructureConfig(
            occupancy=OccupancyConfig(side=32, widths=(32, 64, 128), latent_channels=8),
            flow=ConditionedDiTConfig(
                dit=DiTConfig(
                    channels=256,
                    blocks=8,
                    heads=4,
                    kv_heads=4,
                    latent_channels=8,
                    condition_channels=256,
                    attention="full",
                ),
                encoder=EncoderConfig(kind="stand-in", image_size=224, channels=256),
            ),
        ),
    ),
    "base": StructureTraining(  # paper, sec. 4: seven days on eight A100
        preset="base",
        data=Path("data/paper"),
        out=Path("runs/structure-base"),
        vae=OccupancyTraining(loop=LoopConfig(steps=100_000)),
        flow=FlowTraining(loop=LoopConfig(steps=500_000)),
    ),
}
