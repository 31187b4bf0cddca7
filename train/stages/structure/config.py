"""Options and presets of training the structure stage."""

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
    TimeDistribution,
)
from pipeline.core.grid import CELL_SIDE
from pipeline.core.options import at_least, check_bounds
from train.data.config import FlowOptions
from train.engine.config import TINY_LOOP, LoopConfig
from train.stages.config import (
    PROPS_AUGMENTATION,
    PROPS_LOOP,
    PROPS_OPTIONS,
    SMALL_OPTIONS,
    TINY_OPTIONS,
    ConditionedTraining,
    check_trainable,
    every,
)

StructurePreset = Literal["tiny", "small", "props", "base"]
StructurePart = Literal["both", "vae", "flow"]


@dataclass(frozen=True, kw_only=True)
class OccupancyTraining:
    """Training of the occupancy VAE, the first part of the stage.

    Raises:
        ValueError: If a number is out of range.
    """

    batch_size: int = at_least(1, 8)
    """Number of assets per rank and step."""

    symmetries: bool = True
    """Apply one of the 48 symmetries of the cube to each asset."""

    kl_weight: float = at_least(0, 1e-3)
    """Weight of the KL divergence of the latents from a standard normal distribution."""

    loop: LoopConfig = field(default_factory=LoopConfig)

    def __post_init__(self) -> None:
        check_bounds(self)


@dataclass(frozen=True, kw_only=True)
class FlowTraining(FlowOptions):
    """Training of the flow model over the occupancy latents, the second part of the stage.

    Raises:
        ValueError: If a number is out of range.
    """

    statistics: int = at_least(1, 2048)
    """Number of assets from which the mean and the deviation of the latents are measured."""


@dataclass(frozen=True, kw_only=True)
class StructureTraining(ConditionedTraining):
    """Train the structure stage on a build: the occupancy VAE in OUT/vae, then the flow model in
    OUT/flow. The same command resumes a stopped run."""

    preset: StructurePreset = "tiny"
    """Set of defaults for all other options. tiny takes minutes on a CPU, small minutes on a GPU,
    props is the recipe of examples/recipes/props, base is the paper's model at 512."""

    part: StructurePart = "both"
    """Part of the stage to train. flow needs a trained VAE in OUT/vae."""

    out: Path = Path("runs/structure-tiny")
    """Directory of both runs, with the subdirectories vae and flow."""

    init: Path | None = None
    """Weights that a new run starts from: a checkpoint, of which the averaged ones are taken; an
    export of `python -m train.export`, of which the structure stage is taken; or the name of
    shipped weights, such as props. --part flow takes the occupancy VAE from there, too, if OUT/vae
    has none. None starts from random weights."""

    vae: OccupancyTraining = field(default_factory=OccupancyTraining)
    flow: FlowTraining = field(default_factory=FlowTraining)
    model: StructureConfig = field(default_factory=StructureConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_trainable(self.model.flow)
        side = self.resolution // CELL_SIDE
        if self.model.occupancy.side != side:
            raise ValueError(
                f"model.occupancy.side must be resolution / {CELL_SIDE} = {side}, "
                f"got {self.model.occupancy.side}"
            )


_TINY_LOOP = replace(TINY_LOOP, steps=400, learning_rate=3e-3, ema_decay=0.99, **every(200))
_SMALL_LOOP = LoopConfig(schedule="cosine", ema_decay=0.995)


def _dense_dit(
    latent_channels: int,
    *,
    channels: int,
    blocks: int,
    mlp_ratio: int,
    encoder: EncoderConfig,
    heads: int = 4,
) -> ConditionedDiTConfig:
    """Return a DiT with full attention, as a dense grid of latents needs it."""
    dit = DiTConfig(
        channels=channels,
        blocks=blocks,
        heads=heads,
        kv_heads=heads,
        mlp_ratio=mlp_ratio,
        latent_channels=latent_channels,
        condition_channels=encoder.channels,
        attention="full",
    )
    return ConditionedDiTConfig(dit=dit, encoder=encoder)


STRUCTURE_PRESETS: dict[str, StructureTraining] = {
    "tiny": StructureTraining(
        **TINY_OPTIONS,
        vae=OccupancyTraining(batch_size=8, loop=_TINY_LOOP),
        flow=FlowTraining(
            batch_size=16, augment=False, loop=replace(_TINY_LOOP, steps=800, learning_rate=2e-3)
        ),
        model=StructureConfig(
            occupancy=OccupancyConfig(
                side=8, widths=(16, 32), blocks=1, groups=8, latent_channels=8
            ),
            flow=_dense_dit(
                8,
                channels=128,
                blocks=4,
                mlp_ratio=2,
                encoder=EncoderConfig(
                    kind="stand-in", image_size=112, channels=64, layers=2, heads=2
                ),
            ),
        ),
    ),
    "small": StructureTraining(
        **SMALL_OPTIONS,
        out=Path("runs/structure-small"),
        vae=OccupancyTraining(
            batch_size=16, loop=replace(_SMALL_LOOP, steps=2000, learning_rate=1e-3)
        ),
        flow=FlowTraining(batch_size=16, loop=replace(_SMALL_LOOP, steps=6000, learning_rate=5e-4)),
        model=StructureConfig(
            occupancy=OccupancyConfig(side=32, widths=(32, 64, 128), latent_channels=8),
            flow=_dense_dit(
                8,
                channels=256,
                blocks=8,
                mlp_ratio=4,
                encoder=EncoderConfig(kind="stand-in", image_size=224, channels=256),
            ),
        ),
    ),
    "props": StructureTraining(
        **PROPS_OPTIONS,
        out=Path("runs/props/structure"),
        vae=OccupancyTraining(
            batch_size=64,
            kl_weight=2e-3,
            loop=replace(PROPS_LOOP, steps=1000, learning_rate=2e-3, optimizer="muon"),
        ),
        flow=FlowTraining(
            batch_size=256,
            times=TimeDistribution(mean=1.0),
            augmentation=PROPS_AUGMENTATION,
            guidance=1.5,
            loop=replace(
                PROPS_LOOP,
                steps=5000,
                learning_rate=2e-3,
                optimizer="muon",
                weight_decay=0.1,
                warmup_steps=100,
            ),
        ),
        model=StructureConfig(
            occupancy=OccupancyConfig(
                side=32, widths=(16, 32, 48), blocks=1, groups=8, latent_channels=4
            ),
            flow=_dense_dit(
                4,
                channels=160,
                blocks=6,
                mlp_ratio=3,
                heads=5,
                encoder=EncoderConfig(kind="stand-in", image_size=112, channels=128),
            ),
        ),
    ),
    # Direct3D-S2 paper (arXiv 2505.17412), section 4: seven days on eight A100 GPUs.
    "base": StructureTraining(
        preset="base",
        data=Path("data/paper"),
        out=Path("runs/structure-base"),
        vae=OccupancyTraining(loop=LoopConfig(steps=100_000)),
        flow=FlowTraining(loop=LoopConfig(steps=500_000)),
    ),
}
