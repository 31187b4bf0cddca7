"""Options of rendering."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from pipeline.core.options import CameraSet, ImageFormat


@dataclass(frozen=True, kw_only=True)
class RenderConfig:
    """ValueError for a number out of range or an unknown name."""

    views: int = 45  # paper, sec. 2 (data)
    image_size: int = 1024  # pixels a side; paper, sec. 2 (data)
    cameras: CameraSet = "paper"
    format: ImageFormat = "png"
    attempts: int = 4  # draws of one view before its asset is rejected
    min_coverage: float = 1e-4  # share of the image below which a view is empty

    def __post_init__(self) -> None:
        for name in ("views", "image_size", "attempts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.min_coverage < 1:
            raise ValueError(f"min_coverage must lie between 0 and 1, got {self.min_coverage}")
        for name, allowed in (("cameras", get_args(CameraSet)), ("format", get_args(ImageFormat))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
