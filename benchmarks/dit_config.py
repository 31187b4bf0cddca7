"""Options of `python -m benchmarks.dit`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from model.config import KEPT_LEVELS, KeptActivations


@dataclass(frozen=True, kw_only=True)
class StepsConfig:
    """Time training steps of the paper's presets on synthetic tokens. This only needs a GPU."""

    out: Path
    """Directory of the results, dit-steps.json."""

    presets: tuple[str, ...] = ("256", "384", "512", "1024")
    """Presets of `python -m train.dit` to time."""

    attention: tuple[Literal["ssa", "full"], ...] = ("ssa", "full")
    """Kinds of self-attention to time."""

    kept: tuple[KeptActivations, ...] = KEPT_LEVELS
    """What the blocks keep for the backward pass. Each of these is timed."""

    batch_size: int | None = None
    """Number of assets of a step. None takes that of each preset."""

    repeats: int = 5
    """Number of timed steps. Their median is reported."""

    workers: int = 16
    """Number of threads that decode renders while the GPU computes."""


@dataclass(frozen=True, kw_only=True)
class PartsConfig:
    """Time transformer blocks with and without torch.compile and as CUDA graphs, and alternatives
    of parts of a sampling step. This only needs a GPU."""

    out: Path
    """Directory of the results, dit-parts.json."""

    presets: tuple[str, ...] = ("256", "512", "1024")
    """Presets of `python -m train.dit` whose block is timed."""

    vae: tuple[str, ...] = ("256x4", "512x4", "1024x1")
    """Resolution and number of assets of the batches for which a block of the SS-VAE is timed."""

    sampling: bool = True
    """Also time the MLP with GELU in the product's epilogue, and cross-attention by cuDNN."""


@dataclass(frozen=True, kw_only=True)
class GradientsConfig:
    """Compare all gradients of a small SS-DiT in bf16 with those in fp32. This only needs a GPU."""

    out: Path
    """Directory of the results, dit-gradients.json."""

    blocks: int = 6
    """Transformer blocks of the model, whose other sizes are those of the paper."""


@dataclass(frozen=True, kw_only=True)
class LearnConfig:
    """Train all stages on a build for minutes, then generate meshes from views that were held out.

    The build needs bricks at one resolution and renders.
    """

    data: Path
    """Directory of the build."""

    out: Path
    """Directory of the runs, the pictures and the results, dit-learn.json."""

    resolution: int = 256
    """Resolution of the bricks."""

    vae_minutes: float = 0.7
    """Minutes of training the SS-VAE."""

    dit_minutes: float = 1.3
    """Minutes of training the SS-DiT."""

    structure_minutes: tuple[float, float] = (0.3, 0.8)
    """Minutes of training the occupancy VAE and the flow of the structure stage. The stage is left
    out if either is 0."""

    batch_size: int = 8
    """Number of assets per step of the SS-DiT. Small batches allow more steps in the same time."""

    learning_rate: float = 1e-3
    """Learning rate of the SS-DiT."""

    held_out_views: int = 2
    """Number of views of each asset, the last ones, that are not trained on."""

    given_cells: bool = True
    """Also evaluate the SS-DiT alone, on the stored cells of each asset."""

    samples: int = 50_000
    """Number of points that are sampled on each surface to measure distances."""

    guidance: float = 3.0
    """Guidance scale of generation."""
