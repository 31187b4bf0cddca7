"""Options of `python -m train.evaluate`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from model.config import GenerationOptions
from pipeline.core.devices import Device, check_device
from pipeline.core.options import at_least, check_bounds
from pipeline.storage.config import PathOrUrl
from train.data.config import CacheConfig

Split = Literal["train", "val", "all"]


def _flag(words: list[str]) -> bool:
    """Return the value of an option that may be given without one."""
    values = {"True": True, "False": False}
    if words and words[0] not in values:
        raise ValueError(f"expected True or False, got {words[0]!r}")
    return values[words[0]] if words else True


# An option that is set by its name alone, and is None where it is not given.
OptionalFlag = Annotated[
    bool | None,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=(0, 1),
        metavar="[{True,False}]",
        instance_from_str=_flag,
        is_instance=lambda value: value is None or isinstance(value, bool),
        str_from_instance=lambda value: [str(value)],
    ),
]


@dataclass(frozen=True, kw_only=True)
class AssetSelection:
    """Which assets are evaluated, and where the results are written.

    Raises:
        ValueError: If a number is out of range.
    """

    data: PathOrUrl = Path("data/smoke")
    """Directory or URL of a build made by `python -m pipeline.build`."""

    cache: CacheConfig = field(default_factory=CacheConfig)

    split: Split = "val"
    """Assets to evaluate: those of the training set, those held out, or all."""

    limit: int | None = at_least(1, None)
    """Number of assets to evaluate. None evaluates all of the split."""

    samples: int = at_least(1, 100_000)
    """Number of points that are sampled on each surface to measure distances."""

    def __post_init__(self) -> None:
        check_bounds(self)


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig(AssetSelection):
    """What is evaluated on which assets.

    Raises:
        ValueError: If a number is out of range.
    """

    checkpoint: Path
    """Directory of the model."""

    out: Path | None = None
    """Directory of the results. None takes `evaluation` in the run of the VAE, or in the
    export."""

    device: Device = "auto"
    """Device to run on. auto is a GPU if there is one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_device(self.device)


@dataclass(frozen=True, kw_only=True)
class VAEEvaluation(EvaluationConfig):
    """Reconstruct assets with a trained SS-VAE and measure how far the surfaces are from the stored
    ones."""

    checkpoint: Path = Path("runs/vae-tiny/latest")
    """Checkpoint of `python -m train.vae`, or an exported VAE."""

    resolutions: tuple[int, ...] = ()
    """Resolutions to evaluate. The default is the ones that the VAE was trained at."""

    limit: int | None = None
    """Number of assets to evaluate, the first ones of the split. None evaluates all of it."""

    samples: int = 1_000_000
    """Number of points that are sampled on each surface to measure distances."""

    pictures: int = at_least(0, 8)
    """Number of assets whose stored surface and reconstruction are drawn."""


@dataclass(frozen=True, kw_only=True)
class RetrievalOptions(AssetSelection):
    """The input views, and the training assets among which the most similar one is looked up."""

    limit: int | None = None
    """Number of assets to evaluate, spread evenly over the split. None evaluates all of it."""

    view: int = -1
    """Number of the view that is the input. Negative numbers count from the last one, -1."""

    cameras: str = "paper"
    """Renders to read: the name of their product without "renders-", such as paper, or paper-ibl
    for image-based light."""

    facing_views: OptionalFlag = None
    """Turn each generated mesh back by the quarter turns that brought the camera of its view to the
    front, as models that were trained with `--facing-views` need it. Retrieved assets are turned
    so that the cameras of both views are in the same quarter. The default is what the export
    records, and False without a record."""

    training_data: PathOrUrl | None = None
    """Build whose training assets are looked up. None takes --data."""

    held_out_views: int = at_least(0, 0)
    """Number of views at the end of each training asset that were not trained on and are not
    looked up."""


@dataclass(frozen=True, kw_only=True)
class MeshEvaluation:
    """Compare the mesh files of two directories that have one name: normal maps of 22 views, their
    sharp edges, Chamfer distance and F1 score.

    Raises:
        ValueError: If a number is out of range.
    """

    pred: Path
    """Directory of the meshes to judge."""

    reference: Path
    """Directory of the reference meshes. Files of both with one name are compared."""

    out: Path = Path("runs/meshes")
    """Directory of the results."""

    size: int = at_least(16, 512)
    """Pixels per side of each normal map."""

    samples: int = at_least(1, 100_000)
    """Number of points that are sampled on each surface to measure distances."""

    def __post_init__(self) -> None:
        check_bounds(self)


@dataclass(frozen=True, kw_only=True)
class RetrievalEvaluation(RetrievalOptions):
    """Measure how near the training assets come that look most like a view of each asset, and the
    one that is nearest to its shape. Generated meshes must be nearer than these baselines."""

    split: Split = "val"
    """Assets to evaluate: those of the training set, those held out, or all."""

    out: Path = Path("runs/retrieval")
    """Directory of the results."""


@dataclass(frozen=True, kw_only=True)
class GenerationEvaluation(RetrievalOptions, EvaluationConfig):
    """Generate meshes from stored renders and measure how far they are from the rendered assets."""

    checkpoint: Path = Path("runs/export")
    """Directory of the exported stages, written by `python -m train.export`. "props" takes the
    weights of the package."""

    split: Split = "train"
    """Assets to evaluate: those of the training set, those held out, or all."""

    views: int = at_least(1, 1)
    """Number of views that are the input together: the one of --view and those before it. With
    --facing-views only views that need the same quarter turns are taken, unless the model was
    trained with several views."""

    cells: Literal["generated", "stored"] = "generated"
    """Cells of the first resolution: those that the structure stage generates ("generated"), or
    those of the asset ("stored"), which shows what the other stages do alone."""

    seeds: tuple[int, ...] = (0,)
    """Seeds of the noise that generation starts from. A mesh is generated for each of them, and the
    results are means over all."""

    retrieval: bool = False
    """Also compare with the training assets that look most like the view, by their pixels and by
    the features of the model's image encoder, and with the one nearest to the true shape."""

    features: str | None = None
    """DINOv2 weights, as a folder or a name on the Hugging Face hub. With them the evaluation also
    compares how the meshes look. None skips that."""

    workers: int = at_least(1, 1)
    """Number of processes that generate and compare meshes, each with the models in its memory. The
    results are those of one process. --features needs one."""

    generation: GenerationOptions = field(default_factory=GenerationOptions)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(f"seeds must be different numbers from 0 on, got {self.seeds}")
        if self.workers > 1 and self.features is not None:
            raise ValueError(f"workers must be 1 with features, got {self.workers}")
