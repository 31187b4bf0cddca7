"""Options of rendering."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from pipeline.core.options import CameraSet, ImageFormat, Light, added


@dataclass(frozen=True, kw_only=True)
class RenderConfig:
    """How views are rendered."""

    # The defaults of `views` and `image_size` are those of the Direct3D-S2 paper
    # (arXiv 2505.17412), section 2.

    views: int = 45
    """Number of views per asset."""

    image_size: int = 1024
    """Width and height of a view in pixels."""

    cameras: CameraSet = "paper"
    """Distribution of the cameras. paper samples the front half, 10 to 40 degrees above the
    horizontal plane. wide samples all directions. orthographic looks along the six axes first,
    then from all directions, with parallel rays."""

    format: ImageFormat = "png"
    """Format of the image files. Both are lossless; WebP files are smaller and take longer."""

    attempts: int = 4
    """Number of cameras that are tried for one view before the asset is rejected."""

    min_coverage: float = 1e-4
    """Share of an image that the object must cover, 0 to 1. A view below it counts as empty."""

    light: Light = added("lamps", before="lamps")  # noqa: RUF009
    """Light of the renders. lamps is a sky, a ground and three lights that move with the camera.
    ibl is image-based light: an environment per view, with soft shadows and the maps of the
    materials."""

    environments: tuple[str, ...] = added((), before=())
    """File name and sha256 of each HDR file of ibl, such as "room.exr 9f86d0...". Empty for the
    environments that the project makes."""

    camera_list: tuple[str, ...] = added((), before=())
    """Cameras of a file as JSON texts, which replace the camera set and the number of views. Empty
    if there is no file."""

    def __post_init__(self) -> None:
        for name in ("views", "image_size", "attempts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.min_coverage < 1:
            raise ValueError(f"min_coverage must lie between 0 and 1, got {self.min_coverage}")
        for name, allowed in (
            ("cameras", get_args(CameraSet)),
            ("format", get_args(ImageFormat)),
            ("light", get_args(Light)),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
