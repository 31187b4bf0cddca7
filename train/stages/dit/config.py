"""The options of training the SS-DiT, and the presets from which they start: the paper's schedule, and small ones."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from model.config import ConditionedDiTConfig, DiTConfig, EncoderConfig
from pipeline.core.devices import Device
from pipeline.core.grid import check_resolution
from pipeline.core.options import CameraSet
from train.data.config import FlowOptions
from train.engine.config import LoopConfig

DiTPreset = Literal["tiny", "small", "256", "384", "512", "1024"]


@dataclass(frozen=True, kw_only=True)
class DiTTraining:
    """Train the SS-DiT on a build's renders and its latents. The same command goes on with a run that was stopped.

    The presets 256, 384, 512 and 1024 are the paper's stages, each starting from the one before.
    """

    preset: DiTPreset = "tiny"  # where the options below start from
    data: Path = Path("data/smoke")  # what python -m pipeline.build made; its renders are read
    latents: Path | None = None  # what python -m train.encode made; default: latents/ in the build
    vae: Path | None = Path(
        "runs/vae-tiny/latest"
    )  # whose latents they are; None: the only ones, no samples are drawn
    out: Path = Path("runs/dit-tiny")  # checkpoints, metrics.jsonl, samples
    init: Path | None = None  # a checkpoint whose averaged weights a new run starts from
    device: Device = "auto"
    resolution: int = 512  # R of the latents: cells of R / 8 a side
    max_tokens: int | None = (
        None  # cells a rank: fewer assets where they would exceed it, larger ones are left out
    )
    cameras: CameraSet = "paper"  # which renders are the condition
    held_out_views: int = 0  # the last so many views of every asset are not trained on
    max_missing_share: float = 0.01  # of the build's assets that may lack latents
    workers: int = 8  # threads that prepare batches ahead; any number gives the same batches
    val_batches: int = 8  # of each rank in a validation
    samples: int = 8  # assets that are drawn from held-out views, or are held out themselves
    flow: FlowOptions = field(default_factory=FlowOptions)
    model: ConditionedDiTConfig = field(default_factory=ConditionedDiTConfig)

    def __post_init__(self) -> None:
        check_resolution(self.resolution)
        for name in ("held_out_views", "workers", "val_batches", "samples"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"max_tokens must be 1 or more, got {self.max_tokens}")
        if not 0 <= self.max_missing_share < 1:
            raise ValueError(f"max_missing_share must be in [0, 1), got {self.max_missing_share}")


def _paper(
    resolution: int,
    learning_rate: float,
    batch_size: int,
    max_tokens: int,
    steps: int,
    init: int | None,
) -> DiTTraining:
    """A stage on eight GPUs. paper, sec. 4; steps and max_tokens are ours, the paper gives days."""
    return DiTTraining(
        preset=str(resolution),  # pyright: ignore[reportArgumentType]
        data=Path("data/paper"),
        vae=Path("runs/vae-base-1024/latest" if resolution == 1024 else "runs/vae-base/latest"),
        out=Path(f"runs/dit-{resolution}"),
        init=None if init is None else Path(f"runs/dit-{init}/latest"),
        resolution=resolution,
        max_tokens=max_tokens,
        flow=FlowOptions(
            batch_size=batch_size,
            guidance=7.0,
            loop=LoopConfig(
                steps=steps,
                learning_rate=learning_rate,
                activation_checkpointing=resolution >= 512,
                ema_decay=0.9999,
            ),
        ),
    )


DIT_PRESETS: dict[str, DiTTraining] = {
    "tiny": DiTTraining(  # minutes on a CPU
        device="cpu",
        resolution=64,
        held_out_views=2,
        workers=1,
        samples=4,
        flow=FlowOptions(
            batch_size=8,
            augment=False,
            steps=12,
            loop=LoopConfig(
                steps=400,
                learning_rate=2e-3,
                warmup_steps=20,
                schedule="cosine",
                ema_decay=0.98,
                precision="fp32",
                checkpoint_every=100,
                validate_every=100,
                sample_every=1_000_000,  # at the end alone
            ),
        ),
        model=ConditionedDiTConfig(
            dit=DiTConfig(
                channels=128, blocks=4, heads=4, kv_heads=2, mlp_ratio=2, condition_channels=64
            ),
            encoder=EncoderConfig(kind="stand-in", image_size=112, channels=64, layers=2, heads=2),
        ),
    ),
    "small": DiTTraining(  # minutes on a GPU
        preset="small",
        data=Path("data/full"),
        vae=Path("runs/vae-small/latest"),
        out=Path("runs/dit-small"),
        resolution=256,
        max_tokens=65_536,
        held_out_views=5,
        flow=FlowOptions(
            batch_size=16,
            loop=LoopConfig(
                steps=5000,
                learning_rate=5e-4,
                warmup_steps=100,
                schedule="cosine",
                ema_decay=0.995,
                validate_every=500,
                sample_every=2500,
            ),
        ),
        model=ConditionedDiTConfig(
            dit=DiTConfig(channels=384, blocks=8, heads=12, kv_heads=3, condition_channels=256),
            encoder=EncoderConfig(kind="stand-in", image_size=224, channels=256),
        ),
    ),
    "256": _paper(256, 1e-4, 8, 32_768, 200_000, None),
    "384": _paper(384, 1e-4, 8, 65_536, 150_000, 256),
    "512": _paper(512, 5e-5, 8, 131_072, 100_000, 384),
    "1024": _paper(1024, 2e-5, 2, 131_072, 50_000, 512),
}
