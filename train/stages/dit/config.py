"""Options and presets of training the SS-DiT."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from model.config import ConditionedDiTConfig, DiTConfig, EncoderConfig
from pipeline.core.options import added, at_least, check_bounds
from pipeline.storage.config import PathOrUrl
from train.data.config import FlowOptions
from train.engine.config import SMALL_LOOP, TINY_LOOP, LoopConfig
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

DiTPreset = Literal["tiny", "small", "props", "256", "384", "512", "1024"]


@dataclass(frozen=True, kw_only=True)
class LoraOptions:
    """Low-rank adapters (LoRA) of linear layers, which are trained in place of all weights.

    Raises:
        ValueError: If a number is out of range.
    """

    rank: int = at_least(0, 0)
    """Rank of the adapters. 0 trains all weights without adapters. 8 to 32 are usual, and need the
    extra lora."""

    alpha: int = at_least(1, 16)
    """Scale of the adapters. Their product is multiplied by alpha / rank."""

    modules: tuple[str, ...] = ("attention", "cross_attention", "mlp")
    """Linear layers of each block that get adapters. Names of parts, such as mlp, take all linear
    layers directly in them, and names of layers, such as attention.query, that one."""

    def __post_init__(self) -> None:
        check_bounds(self)


@dataclass(frozen=True, kw_only=True)
class DiTTraining(ConditionedTraining):
    """Train the SS-DiT on the renders and the latents of a build. The same command resumes a
    stopped run."""

    preset: DiTPreset = "tiny"
    """Set of defaults for all other options. tiny takes minutes on a CPU, small minutes on a GPU,
    props is the recipe of examples/recipes/props. 256, 384, 512 and 1024 are the paper's runs, each
    of which starts from the one before."""

    latents: PathOrUrl | None = None
    """Directory or URL of the latents, written by `python -m train.encode`. The default is
    `latents` in the build."""

    vae: Path | None = Path("runs/vae-tiny/latest")
    """Checkpoint of the VAE that made the latents. Without one (None) no previews are drawn, and
    the build must have the latents of one VAE only."""

    out: Path = Path("runs/dit-tiny")
    """Directory of the run. It receives checkpoints, metrics.jsonl and samples/."""

    init: Path | None = None
    """Weights that a new run starts from: a checkpoint, of which the averaged ones are taken; an
    export of `python -m train.export`, of which the stage of this kind and resolution is taken; or
    the name of shipped weights, such as props. None starts from random weights."""

    init_any_positions: bool = False
    """Start from the weights of `init` although their run multiplied the cells' coordinates by
    another factor."""

    max_tokens: int | None = None
    """Largest number of tokens per rank and step. A step takes fewer assets where they would exceed
    it, and assets that exceed it alone are left out. None sets no limit."""

    token_budget: int | None = added(None, before=None)
    """Number of tokens per rank and step that assets are drawn for, instead of flow.batch_size
    assets. Steps at low resolutions then keep a GPU busy. The loss of a step stays the mean over
    its assets. None draws flow.batch_size assets, as the paper does."""

    max_missing_share: float = 0.01
    """Share of the build's assets that may lack latents before the run ends."""

    workers: int = 8
    """Number of threads or processes that prepare batches ahead. Every number gives the same
    batches."""

    lora: LoraOptions = field(default_factory=LoraOptions)
    flow: FlowOptions = field(default_factory=FlowOptions)
    model: ConditionedDiTConfig = field(default_factory=ConditionedDiTConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_trainable(self.model)
        if self.lora.rank and self.init is None:
            raise ValueError("lora.rank adapts trained weights; name them with --init")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"max_tokens must be 1 or more, got {self.max_tokens}")
        if self.token_budget is not None and self.token_budget < 1:
            raise ValueError(f"token_budget must be 1 or more, got {self.token_budget}")
        if not 0 <= self.max_missing_share < 1:
            raise ValueError(f"max_missing_share must be in [0, 1), got {self.max_missing_share}")


def _paper_preset(
    preset: DiTPreset,
    *,
    init: DiTPreset | None,
    learning_rate: float,
    batch_size: int,
    max_tokens: int,
    steps: int,
) -> DiTTraining:
    """Return a run of the paper on eight GPUs.

    Learning rate and batch size: Direct3D-S2 paper (arXiv 2505.17412), section 4. The paper gives
    days of training, so the steps and `max_tokens` are ours.
    """
    resolution = int(preset)
    loop = LoopConfig(
        steps=steps,
        learning_rate=learning_rate,
        ema_decay=0.9999,
    )
    return DiTTraining(
        preset=preset,
        data=Path("data/paper"),
        vae=Path("runs/vae-base-1024/latest" if resolution == 1024 else "runs/vae-base/latest"),
        out=Path(f"runs/dit-{preset}"),
        init=None if init is None else Path(f"runs/dit-{init}/latest"),
        resolution=resolution,
        max_tokens=max_tokens,
        flow=FlowOptions(batch_size=batch_size, guidance=7.0, loop=loop),
    )


DIT_PRESETS: dict[str, DiTTraining] = {
    "tiny": DiTTraining(
        **TINY_OPTIONS,
        samples=4,
        flow=FlowOptions(
            batch_size=8,
            augment=False,
            steps=12,
            loop=replace(TINY_LOOP, steps=400, learning_rate=2e-3, **every(100)),
        ),
        model=ConditionedDiTConfig(
            dit=DiTConfig(
                channels=128, blocks=4, heads=4, kv_heads=2, mlp_ratio=2, condition_channels=64
            ),
            encoder=EncoderConfig(kind="stand-in", image_size=112, channels=64, layers=2, heads=2),
        ),
    ),
    "small": DiTTraining(
        **SMALL_OPTIONS,
        vae=Path("runs/vae-small/latest"),
        out=Path("runs/dit-small"),
        max_tokens=65_536,
        flow=FlowOptions(
            batch_size=16,
            loop=replace(
                SMALL_LOOP, steps=5000, learning_rate=5e-4, validate_every=500, sample_every=2500
            ),
        ),
        model=ConditionedDiTConfig(
            dit=DiTConfig(channels=384, blocks=8, heads=12, kv_heads=3, condition_channels=256),
            encoder=EncoderConfig(kind="stand-in", image_size=224, channels=256),
        ),
    ),
    "props": DiTTraining(
        **PROPS_OPTIONS,
        vae=Path("runs/props/vae/latest"),
        out=Path("runs/props/dit"),
        token_budget=60_000,
        flow=FlowOptions(
            augmentation=PROPS_AUGMENTATION,
            loop=replace(PROPS_LOOP, steps=4000, learning_rate=1e-3),
        ),
        model=ConditionedDiTConfig(
            dit=DiTConfig(
                channels=128,
                blocks=4,
                heads=4,
                kv_heads=2,
                mlp_ratio=2,
                latent_channels=8,
                condition_channels=96,
            ),
            encoder=EncoderConfig(kind="stand-in", image_size=112, channels=96, layers=4, heads=3),
        ),
    ),
    "256": _paper_preset(
        "256", init=None, learning_rate=1e-4, batch_size=8, max_tokens=32_768, steps=200_000
    ),
    "384": _paper_preset(
        "384", init="256", learning_rate=1e-4, batch_size=8, max_tokens=65_536, steps=150_000
    ),
    "512": _paper_preset(
        "512", init="384", learning_rate=5e-5, batch_size=8, max_tokens=131_072, steps=100_000
    ),
    "1024": _paper_preset(
        "1024", init="512", learning_rate=2e-5, batch_size=2, max_tokens=131_072, steps=50_000
    ),
}
