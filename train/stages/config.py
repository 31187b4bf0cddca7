"""Options that stages with image conditions have in common, and options of exporting stages."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from model.config import Augmentation, ConditionedDiTConfig, RecommendedSampling, Refine
from pipeline.core.grid import check_resolution
from pipeline.core.options import added, at_least
from pipeline.storage.config import PathOrUrl
from train.data.config import CacheConfig
from train.engine.config import SMALL_LOOP, RankOptions, WorkerKind

# What the presets for minutes on a CPU and for minutes on a GPU have in common.
TINY_OPTIONS: dict[str, Any] = {
    "device": "cpu",
    "resolution": 64,
    "held_out_views": 2,
    "workers": 1,
}
SMALL_OPTIONS: dict[str, Any] = {
    "preset": "small",
    "data": Path("data/full"),
    "resolution": 256,
    "held_out_views": 5,
}

# What the presets of examples/recipes/props have in common.
PROPS_OPTIONS: dict[str, Any] = {
    "preset": "props",
    "data": Path("data/props"),
    "resolution": 256,
    "held_out_views": 4,
    "facing_views": True,
    "mirrored_views": True,
    "workers": 12,
    "worker_kind": "processes",
}
PROPS_AUGMENTATION = Augmentation(color_probability=0.8)
PROPS_LOOP = replace(
    SMALL_LOOP,
    ema_decay=0.998,
    keep_last=1,
    checkpoint_every=500,
    validate_every=1000,
    sample_every=0,
)


def every(steps: int) -> dict[str, int]:
    """Return loop options that save and validate every so many steps, and draw at the end only."""
    return {"checkpoint_every": steps, "validate_every": steps, "sample_every": 1_000_000}


def check_trainable(model: ConditionedDiTConfig) -> None:
    """Check that training can prepare the images of a model.

    Raises:
        ValueError: If the images would have to be prepared as the published pipeline does it, which
            is not augmented.
    """
    if model.encoder.preparation != "one_resize":
        raise ValueError(
            'training augments images, which needs encoder.preparation "one_resize", '
            f"got {model.encoder.preparation!r}"
        )


@dataclass(frozen=True, kw_only=True)
class ConditionedTraining(RankOptions):
    """Training of a stage on the renders of a build."""

    preset: str
    """Set of defaults for all other options."""

    data: PathOrUrl = Path("data/smoke")
    """Directory or URL of a build with renders, made by `python -m pipeline.build`."""

    cache: CacheConfig = field(default_factory=CacheConfig)

    out: Path
    """Directory of the run. It receives checkpoints, metrics.jsonl and samples/."""

    resolution: int = 512
    """Resolution R of the stored SDF. The stage is trained on a grid of R / 8 cells per side."""

    cameras: str = "paper"
    """Renders that are the condition: the name of their product without "renders-", such as paper,
    or paper-ibl for image-based light."""

    held_out_views: int = at_least(0, 0)
    """Number of views of each asset, the last ones, that are not trained on."""

    facing_views: bool = added(False, before=False)
    """Turn each asset by quarter turns about the up axis until the camera of its view is in front
    of it, within 45 degrees of azimuth. The model then generates meshes that face the camera."""

    mirrored_views: bool = added(False, before=False)
    """Mirror half of the training samples, image and shape, from left to right."""

    workers: int = at_least(0, 4)
    """Number of threads or processes that prepare batches ahead. Every number gives the same
    batches."""

    worker_kind: WorkerKind = "threads"
    """What prepares batches ahead. Processes take some seconds to start and more memory, and are
    faster where many small samples make a batch. Both give the same batches."""

    val_batches: int = at_least(0, 8)
    """Number of batches per rank in a validation."""

    samples: int = at_least(0, 8)
    """Number of assets that a preview draws from held-out views, and of held-out assets."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_resolution(self.resolution)


@dataclass(frozen=True, kw_only=True)
class CardOptions:
    """What the model card says besides the stages. A section without a source is left out."""

    write: bool = False
    """Write the model card README.md into the export, also without --push. Any other option of the
    card does so, too."""
    evaluation: tuple[Path, ...] = ()
    """Files evaluation.json of `python -m train.evaluate` for this export. The card shows the table
    beside each."""
    assets: Path | None = None
    """CSV file with the columns licence and split, whose assets the card counts."""
    recipe: Path | None = None
    """Script with the commands that trained the model, which the card shows."""
    limits: Path | None = None
    """Text in Markdown about what the model cannot do, which the card shows."""
    name: str | None = None
    """Name of the checkpoint in the commands on the card, such as props for shipped weights. None
    takes the repository of --push, or the directory."""
    commit: str | None = None
    """Commit of the code that trained and evaluated the model, where evaluations do not record it.
    None takes the commit of the running code for the export and none for evaluations."""


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Collect trained stages in one directory for `python -m model.generate`.

    Stages that were exported to it before are replaced.
    """

    official: Path | None = None
    """Directory of the published Direct3D-S2 weights. They are converted, and --vae, --structure
    and --dit are not read."""
    image_encoder: str | None = None
    """DINOv2 weights that the converted stages name: a folder or a name on the Hugging Face hub.
    None takes those of the published pipeline."""
    refine: Refine | None = None
    """Refiners of the published weights that are converted: "none", the one of the first
    resolution ("512"), or "all". None converts those that generation uses: the first one, and the
    other if its file is there."""
    vae: tuple[Path, ...] = (Path("runs/vae-tiny/latest"),)
    """Checkpoints of `python -m train.vae`, each of which is exported for the resolutions of the
    DiTs that were trained on its latents. Naming none leaves them out."""
    structure: Path | None = Path("runs/structure-tiny/flow/latest")
    """Checkpoint of `python -m train.structure`. None exports no structure stage."""
    dit: tuple[Path, ...] = (Path("runs/dit-tiny/latest"),)
    """Checkpoints of `python -m train.dit`, one for each resolution."""
    out: Path = Path("runs/export")
    """Directory of the exported stages."""
    steps: tuple[int, ...] = ()
    """Sampling steps that `python -m model.generate` takes unless it is given others: of the
    structure stage and of each resolution in ascending order. The last number holds for the stages
    after it. Empty recommends none."""
    guidance: float | None = None
    """Guidance scale that `python -m model.generate` takes unless it is given another one. None
    recommends none."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the weights in the files. "bf16" rounds them and halves the files; biases and
    norms stay in fp32, and so does the arithmetic."""
    push: str | None = None
    """Repository OWNER/NAME on the Hugging Face hub to which the export is uploaded with a model
    card. It is created if there is none. Log in first with `hf auth login`."""
    license: str | None = None
    """Licence of the weights that the model card states, such as apache-2.0. None states none."""
    private: bool = False
    """Create the repository of --push as a private one."""
    card: CardOptions = field(default_factory=CardOptions)

    def __post_init__(self) -> None:
        if self.push is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", self.push):
            raise ValueError(f"push must be OWNER/NAME, got {self.push!r}")
        if self.official is None and not self.vae and self.structure is None and not self.dit:
            raise ValueError("vae, structure or dit must name a checkpoint, got none")
        # Constructing it checks the numbers.
        for steps in self.steps or (None,):
            RecommendedSampling(steps=steps, guidance=self.guidance)
