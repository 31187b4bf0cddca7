"""Options of the cache of remote data, and of flow models that are trained on renders."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from model.config import (
    KEPT_LEVELS,
    Augmentation,
    Guidance,
    KeptActivations,
    SamplingOptions,
    TimeDistribution,
)
from pipeline.core.options import at_least, check_bounds
from train.engine.config import LoopConfig


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """The local cache of builds and latents that are read from a URL.

    Raises:
        ValueError: If the limit is not positive.
    """

    dir: Path = Path.home() / ".cache" / "sparse3d" / "data"
    """Directory of the cache. The processes of a machine share it, and later runs find what it
    holds. Data from local directories is not cached."""
    max_gb: float = 50.0
    """Largest size of the cache in gigabytes. What was not used for longest is deleted first."""

    def __post_init__(self) -> None:
        if not self.max_gb > 0:
            raise ValueError(f"max_gb must be positive, got {self.max_gb}")

    @property
    def max_bytes(self) -> int:
        """The limit in bytes."""
        return int(self.max_gb * 1e9)


SampleUse = Literal["training", "validation", "held_out"]
"""What samples are for. Those of "training" are augmented, and their images are dropped sometimes.
Those of "validation" show the same views as they are, those of "held_out" the held-out views."""


@dataclass(frozen=True, kw_only=True)
class FlowOptions:
    """Training of a flow model that is conditioned on rendered images.

    Raises:
        ValueError: If a number is out of range.
    """

    # Batch size: Direct3D-S2 paper (arXiv 2505.17412), section 4.

    batch_size: int = at_least(1, 8)
    """Number of assets per rank and step."""
    dropout: float = 0.1
    """Share of samples that are trained without their image, as classifier-free guidance needs."""
    times: TimeDistribution = field(default_factory=TimeDistribution)
    augment: bool = True
    """Augment the images in training."""
    augmentation: Augmentation = field(default_factory=Augmentation)
    guidance: float = 3.0
    """Guidance scale of the previews drawn during training."""
    steps: int = at_least(1, 25)
    """Sampling steps of the previews drawn during training."""
    open_shards: int = at_least(1, 16)
    """Number of shards whose renders are mixed in a batch and kept in memory, about 10 MB each."""
    kept_activations: KeptActivations | Literal["auto"] = "auto"
    """What the blocks of the DiT keep for the backward pass, which computes the rest again. "all"
    keeps every activation. "products" keeps the blocks' inputs and the results of attention and of
    matrix products, except the queries of SSA. "attention" keeps the blocks' inputs and the results
    of attention. "auto" takes in each step the first of them that fits the memory of the GPU.
    Gradients are the same to the bit."""
    loop: LoopConfig = field(default_factory=LoopConfig)

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.kept_activations not in ("auto", *KEPT_LEVELS):
            raise ValueError(
                f"kept_activations must be one of {('auto', *KEPT_LEVELS)}, "
                f"got {self.kept_activations!r}"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")

    @property
    def preview_sampling(self) -> SamplingOptions:
        """How the previews are sampled."""
        return SamplingOptions(steps=self.steps, guidance=Guidance(scale=self.guidance))
