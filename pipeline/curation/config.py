"""Options of filtering, screening, ranking and deduplication."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import tyro

from pipeline.core.grid import check_resolution
from pipeline.curation.licences import OPEN_LICENCES
from pipeline.rendering.config import RenderConfig


@dataclass(frozen=True, kw_only=True)
class FilterConfig:
    """Thresholds; lengths are relative to the longest side of the bounding box, so no rule depends on the frame."""

    min_bytes: int = 1
    max_bytes: int = 1 << 30
    min_faces: int = 4  # preset paper: 100
    max_faces: int = 2_000_000
    min_area: float = 1e-4  # of the surface, over the longest side squared
    min_width: float = 1e-3  # second principal extent over the first: below it the shape is a line
    min_thickness: float = (
        1e-5  # third principal extent over the first: below it the shape is one flat sheet
    )
    max_degenerate_share: float = 0.5  # of faces whose area is below degenerate_area
    degenerate_area: float = 1e-12  # over the longest side squared
    max_components: int = 10_000
    # Licences of a catalogue's assets that are let through, "unknown" being one of them. Default: the open ones.
    licences: Annotated[tuple[str, ...], tyro.conf.arg(name="license-allow", prefix_name=False)] = (
        OPEN_LICENCES
    )
    max_animations: int | None = None  # that a catalogue tells of; None: any number
    age_restricted: bool = False  # let through what a catalogue marks as such
    # Tags, and words of a name, that mark what is no object
    banned_words: tuple[str, ...] = (
        "hdri",
        "lidar",
        "nsfw",
        "panorama",
        "pointcloud",
        "point-cloud",
        "skybox",
    )


@dataclass(frozen=True, kw_only=True)
class ScreenConfig:
    """How an asset is looked at before it is known whether it is kept."""

    resolution: int = (
        256  # of its SDF, and at most of the grid on which inside and outside are decided
    )
    image_size: int = 256  # of its four views, pixels a side

    def __post_init__(self):
        if check_resolution(self.resolution) < 64:
            raise ValueError(f"resolution must be at least 64, got {self.resolution}")

    @property
    def render(self) -> RenderConfig:
        return RenderConfig(views=4, image_size=self.image_size, cameras="wide")


@dataclass(frozen=True, kw_only=True)
class DedupConfig:
    """When two assets count as one. Shapes are compared as they are turned: a rotated copy is another asset."""

    area_percent: float = 0.5  # visible surfaces differ by less,
    tokens_percent: float = 1.0  # so do cells of the SDF,
    occupancy_percent: float = (
        2.0  # and so many of the occupied cells of the 16^3 grid are not the other's
    )
    look_bits: int = 7  # of 256 bits of four views that may differ

    def __post_init__(self):
        for name in ("area_percent", "tokens_percent", "occupancy_percent"):
            if not 0 < getattr(self, name) < 100:
                raise ValueError(f"{name} must lie between 0 and 100, got {getattr(self, name)}")
        if not 0 <= self.look_bits <= 7:
            raise ValueError(f"look_bits must lie in 0..7, got {self.look_bits}")


@dataclass(frozen=True, kw_only=True)
class RankConfig:
    """What the second look turns away, and how many are kept. Changing it does not change what was measured."""

    target_count: int | None = (
        None  # keep the best so many of all that are screened; None: no screening, keep all
    )
    best_count: int = 0  # so many of the kept ones, the best, also get
    best_resolutions: tuple[int, ...] = ()  # SDFs at these, in a pass of their own
    min_solid_fraction: float = 0.0  # of the bounding box that is enclosed; 0 lets sheets through
    max_solid_fraction: float = 0.985  # beyond it the shape is the box itself
    max_leak_fraction: float = 0.05  # enclosed only once cracks up to twice as wide are closed
    min_tokens: int = 100  # cells of the SDF at the screening's resolution
    max_tokens: int = 20_000
    min_coverage: float = 0.005  # mean share of the four images that the object covers
    min_brightness: float = 0.02  # mean over its pixels
    min_contrast: float = 0.002  # mean deviation of its pixels' brightest channel
    max_white: float = 0.98  # share of pixels that are overexposed, in the worst view
    max_missing_files: int = 0  # materials and textures that a file names and that are not there
    dedup: DedupConfig = field(default_factory=DedupConfig)

    def __post_init__(self):
        if self.target_count is not None and self.target_count < 1:
            raise ValueError(f"target_count must be 1 or more, got {self.target_count}")
        if self.best_count < 0:
            raise ValueError(f"best_count must be 0 or more, got {self.best_count}")
        if self.best_count and self.target_count is None:
            raise ValueError(f"best_count needs a target_count, got {self.best_count} alone")
        if bool(self.best_count) != bool(self.best_resolutions):
            raise ValueError(
                f"best_count and best_resolutions go together, got {self.best_count} and {self.best_resolutions}"
            )
        for resolution in self.best_resolutions:
            check_resolution(resolution)
