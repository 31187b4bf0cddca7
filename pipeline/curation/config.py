"""Options of filtering, screening, ranking and deduplication."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated

import tyro

from pipeline.core.grid import check_resolution
from pipeline.core.options import added
from pipeline.curation.licences import OPEN_LICENCES
from pipeline.mesh_io.load_warnings import WARNING_CODES
from pipeline.rendering.config import RenderConfig

# Terms of the quality score and their weights. docs/data_quality.md explains them.
TERM_WEIGHTS = {
    "bends": 0.32,
    "edges": 0.03,  # bends count sharp edges, too
    "tokens": 0.05,
    "topology": 0.1,
    "outline": 0.1,
    "colors": 0.1,
    "views": 0.05,
    "complete": 0.1,
    "object": 0.1,
    "ground": 0.05,
}
SHARE_KINDS = ("source", "licence", "tag")


def parse_assignments(option: str, words: Sequence[str]) -> dict[str, float]:
    """Parse words such as "folder=0.4".

    Args:
        option: Name of the option, for errors.
        words: The words.

    Returns:
        {name: number}.

    Raises:
        ValueError: If a word is not a name, "=" and a finite number, or a name comes twice.
    """
    numbers: dict[str, float] = {}
    for word in words:
        name, _, text = word.rpartition("=")
        try:
            number = float(text)
        except ValueError:
            number = float("nan")
        if not name or name in numbers or not abs(number) < float("inf"):
            raise ValueError(f"{option} must be different words NAME=NUMBER, got {word!r}")
        numbers[name] = number
    return numbers


@dataclass(frozen=True, kw_only=True)
class FilterConfig:
    """Rules that reject an asset by its metadata, file or geometry."""

    # Lengths and areas are relative to the longest side of the bounding box, so no rule depends on
    # the units of a file.

    min_bytes: int = 1
    """Smallest accepted file size in bytes."""

    max_bytes: int = 1 << 30
    """Largest accepted file size in bytes. Larger files are not downloaded."""

    min_faces: int = 4
    """Smallest accepted number of triangles. Increase it to reject very simple shapes; the preset
    "paper" uses 100."""

    max_faces: int = 2_000_000
    """Largest accepted number of triangles. Reduce it if workers run out of memory or time."""

    min_area: float = 1e-4
    """Smallest accepted surface area, relative to the square of the longest side of the bounding
    box. 0 disables the rule."""

    min_width: float = 1e-3
    """Smallest accepted ratio of the second to the first principal extent. Below it the shape is a
    line. 0 disables the rule."""

    min_thickness: float = 1e-5
    """Smallest accepted ratio of the third to the first principal extent. Below it the shape is one
    flat sheet. 0 accepts flat sheets."""

    max_degenerate_share: float = 0.5
    """Largest accepted share of degenerate triangles, 0 to 1. 1 disables the rule."""

    degenerate_area: float = 1e-12
    """Area below which a triangle counts as degenerate, relative to the square of the longest side
    of the bounding box."""

    max_components: int = 10_000
    """Largest accepted number of connected components of the surface."""

    licences: Annotated[tuple[str, ...], tyro.conf.arg(name="license-allow", prefix_name=False)] = (
        OPEN_LICENCES
    )
    """Accepted licences of catalogue assets, such as by, cc0 or mit. The word unknown accepts
    assets without a licence. The default is the open licences. Folders and the embedded shapes
    always pass."""

    max_animations: int | None = None
    """Largest accepted number of animations that a catalogue states. None accepts any number, 0
    rejects animated assets."""

    age_restricted: bool = False
    """Accept assets that a catalogue marks as age-restricted."""

    reject_warnings: tuple[str, ...] = added((), before=())
    """Codes of load warnings that reject an asset, such as side_file_missing or truncated_data. The
    manifest's column "warnings" and docs/mesh_files.md list the codes. The default accepts all."""

    max_translucent_share: float = added(1.0, before=1.0)
    """Largest accepted share of the surface that is translucent, 0 to 1. Fully transparent faces do
    not count, because they are left out. 1 disables the rule."""

    max_thin_share: float = added(1.0, before=1.0)
    """Largest accepted share of the visible surface that leaves no sign change in the bricks of a
    resolution, 0 to 1. Such parts are thinner than a voxel. 1 disables the rule."""

    banned_words: tuple[str, ...] = (
        "hdri",
        "lidar",
        "nsfw",
        "panorama",
        "pointcloud",
        "point-cloud",
        "skybox",
    )
    """Words that reject an asset if a catalogue gives one as a tag or as a whole word of the name.
    Upper and lower case do not matter."""

    def __post_init__(self):
        for name in ("max_translucent_share", "max_thin_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in 0..1, got {getattr(self, name)}")
        unknown = [code for code in self.reject_warnings if code not in WARNING_CODES]
        if unknown:
            raise ValueError(
                f"reject_warnings must name codes of load warnings, got {unknown[0]!r}; "
                f"the codes are {' '.join(WARNING_CODES)}"
            )


@dataclass(frozen=True, kw_only=True)
class ScreenConfig:
    """How an asset is measured before ranking decides whether to keep it."""

    resolution: int = 256
    """Resolution of the SDF that screening measures, a multiple of 8 and at least 64. The grid that
    decides inside and outside is not finer than this during screening."""

    image_size: int = 256
    """Side in pixels of the four views that screening renders."""

    # Version of the metrics, which the tables of older builds do not have.

    metrics_version: tyro.conf.Suppress[int] = added(2, before=1)  # noqa: RUF009

    def __post_init__(self):
        if check_resolution(self.resolution) < 64:
            raise ValueError(f"resolution must be at least 64, got {self.resolution}")

    @property
    def render(self) -> RenderConfig:
        """Options of the four views."""
        return RenderConfig(views=4, image_size=self.image_size, cameras="wide")


@dataclass(frozen=True, kw_only=True)
class DedupConfig:
    """When two assets count as copies. Colours do not matter, and neither do quarter turns about
    the up axis and mirroring."""

    shape_tolerance: float = 5e-5
    """Largest difference between the surface moments of two copies, above 0 and at most 0.01. The
    moments of an asset lie in -1..1."""

    def __post_init__(self):
        if not 0 < self.shape_tolerance <= 0.01:
            raise ValueError(
                f"shape_tolerance must be above 0 and at most 0.01, got {self.shape_tolerance}"
            )


@dataclass(frozen=True, kw_only=True)
class RankConfig:
    """Which screened assets are kept. Changing these options does not repeat the measurements."""

    target_count: int | None = None
    """Number of assets to keep: the best ones of all that pass screening. None disables screening
    and keeps every asset that passes the filters."""

    best_count: int = 0
    """Number of kept assets, the best ones, that also get SDFs at --rank.best-resolutions. 0 makes
    none. It needs --rank.target-count."""

    best_resolutions: tuple[int, ...] = ()
    """SDF resolutions of the best assets, such as 1024. They must not be among --resolutions."""

    min_solid_fraction: float = 0.0
    """Smallest accepted share of the bounding box that the surface encloses, 0 to 1. 0 accepts open
    sheets; a small value such as 0.01 rejects them."""

    max_solid_fraction: float = 0.985
    """Largest accepted share of the bounding box that the surface encloses, 0 to 1. Above it the
    shape is a plain box. 1 accepts boxes."""

    max_leak_fraction: float = 0.05
    """Largest accepted share of the bounding box that is enclosed only after cracks up to twice as
    wide are closed, 0 to 1. Above it the mesh leaks. 1 disables the rule."""

    min_tokens: int = 100
    """Smallest accepted number of SDF cells. Cells of other resolutions of the screening are
    converted to 256: their number grows with the square of the resolution."""

    max_tokens: int = 20_000
    """Largest accepted number of SDF cells, converted to a resolution of 256."""

    min_coverage: float = 0.005
    """Smallest accepted share of the image that the object covers, 0 to 1, as the mean of the four
    views."""

    min_brightness: float = 0.02
    """Smallest accepted mean brightness of the object's pixels, 0 to 1, as the mean of the four
    views. Below it the renders are almost black."""

    min_contrast: float = 0.002
    """Smallest accepted standard deviation of the brightest channel over the object's pixels, 0 to
    1, as the mean of the four views."""

    max_white: float = 0.98
    """Largest accepted share of overexposed pixels of the object, 0 to 1, in the worst of the four
    views."""

    max_missing_files: int = 0
    """Largest accepted number of materials and textures that a file refers to and that are
    missing."""

    weights: tuple[str, ...] = added((), before=())
    """Weights of terms of the score that are not to have their own, as TERM=WEIGHT, such as
    colors=0.3. A column of numbers of the list that --ids names is a term, too."""

    min_listed: tuple[str, ...] = added((), before=())
    """Smallest accepted values of columns of the list that --ids names, as COLUMN=NUMBER, such as
    aesthetic_score=5.5. An asset without the value is rejected."""

    max_listed: tuple[str, ...] = added((), before=())
    """Largest accepted values of columns of the list, as COLUMN=NUMBER. true and false count as 1
    and 0, so is_scene=0 rejects scenes. An asset without the value is rejected."""

    max_share: tuple[str, ...] = added((), before=())
    """Largest shares of the kept assets, as SOURCE=SHARE, licence:NAME=SHARE or tag:NAME=SHARE,
    such as folder=0.4. An asterisk for the name limits each source, licence or tag: source:*=0.4.
    Fewer assets are kept than asked for if the shares require it."""

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
                "best_count and best_resolutions go together, got "
                f"{self.best_count} and {self.best_resolutions}"
            )
        for resolution in self.best_resolutions:
            check_resolution(resolution, "best_resolutions")
        for name in ("weights", "min_listed", "max_listed"):
            parse_assignments(name, getattr(self, name))
        weights = {**TERM_WEIGHTS, **parse_assignments("weights", self.weights)}
        if min(weights.values()) < 0 or not any(weights.values()):
            raise ValueError(
                f"weights must be 0 or more, and one above 0, got {' '.join(self.weights)}"
            )
        for key, share in parse_assignments("max_share", self.max_share).items():
            kind, colon, name = key.partition(":")
            if not 0 < share <= 1 or (colon and (kind not in SHARE_KINDS or not name)):
                raise ValueError(
                    "max_share must be SOURCE=SHARE, licence:NAME=SHARE or tag:NAME=SHARE with a "
                    f"share above 0 and at most 1, got {key}={share:g}"
                )
