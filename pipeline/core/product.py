"""Products: what a build makes of every shard, named `sdf-512`, `renders-paper` or `depth-wide`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

# Kinds of products that have one file for each view of an asset, and the one that has a file for
# each asset with all its cameras.
EXTENSIONS = {
    "normals": "normal.exr",
    "depth": "depth.exr",
    "albedo": "albedo.png",
    "metallic-roughness": "metallic_roughness.png",
    "mask": "mask.png",
}
VIEW_KINDS = ("renders", *EXTENSIONS)
TRANSFORMS = "transforms"
_NAME = re.compile(rf"(sdf|screen)-(\d+)|({'|'.join((*VIEW_KINDS, TRANSFORMS))})-(.+)")


@dataclass(frozen=True)
class Product:
    """One resolution, one camera set or one screening of a build.

    Products have an order, in which an asset goes through them: SDF bricks with increasing
    resolution, then renders, what else views show, or screening.

    Args:
        kind: "sdf", "screen", one of VIEW_KINDS or TRANSFORMS.
        variant: The resolution in digits, or the name of the camera set. That of renders in
            image-based light ends with "-ibl", and with "-ibl-NAME" for other environments than
            those of the project.
    """

    kind: str
    variant: str

    def __post_init__(self):
        if not is_product_name(str(self)):
            raise ValueError(
                "a product must be sdf-RESOLUTION, screen-RESOLUTION, or one of "
                f"{', '.join((*VIEW_KINDS, TRANSFORMS))} with -CAMERAS, got {self}"
            )

    @classmethod
    def parse(cls, name: str) -> Product:
        """Return the product with this name. `str` is the inverse.

        Raises:
            ValueError: If `name` is not the name of a product.
        """
        match = _NAME.fullmatch(name)
        if match is None:
            return cls(*name.partition("-")[::2])
        return cls(match[1] or match[3], match[2] or match[4])

    @classmethod
    def sdf(cls, resolution: int) -> Product:
        """Return the SDF bricks at a resolution."""
        return cls("sdf", str(resolution))

    @classmethod
    def renders(cls, cameras: str) -> Product:
        """Return the renders of a camera set."""
        return cls("renders", cameras)

    @classmethod
    def screen(cls, resolution: int) -> Product:
        """Return the screening measurements taken at a resolution."""
        return cls("screen", str(resolution))

    def __str__(self) -> str:
        return f"{self.kind}-{self.variant}"

    def __lt__(self, other: Product) -> bool:
        return self._order < other._order

    def extension(self, format: str) -> str:
        """Return what follows `<uid>-<view>.` in the names of the files of views.

        Args:
            format: Format of renders, "png" or "webp".
        """
        return format if self.kind == "renders" else EXTENSIONS[self.kind]

    @property
    def has_views(self) -> bool:
        """Whether the product has a file for each view of an asset."""
        return self.kind in VIEW_KINDS

    @property
    def _order(self) -> tuple[int, int, str]:
        return (0, self.resolution, "") if self.kind == "sdf" else (1, 0, str(self))

    @property
    def resolution(self) -> int:
        """Grid points along one side.

        Raises:
            ValueError: If the product has none.
        """
        if self.kind not in ("sdf", "screen"):
            raise ValueError(f"{self} has no resolution")
        return int(self.variant)


def is_product_name(name: str) -> bool:
    """Return whether `name` names a product.

    A manifest's `stage` is the name of a product or of a stage that all products share.
    """
    return _NAME.fullmatch(name) is not None


def tokens_column(resolution: int) -> str:
    """Return the manifest column with the tokens at a resolution, such as "tokens_512"."""
    return f"tokens_{resolution}"


@lru_cache
def resolution_of_column(name: str) -> int | None:
    """Return the resolution of a `tokens_<R>` column of the manifest, None for another column."""
    match = re.fullmatch(r"tokens_(\d+)", name)
    return int(match[1]) if match else None
