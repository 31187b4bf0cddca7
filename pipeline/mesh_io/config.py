"""Options of reading and normalising meshes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class LoadConfig:
    max_faces: int = (
        4_000_000  # after instances are written out; the geometry filter has its own, lower limit
    )
    max_instances: int = 20_000  # placements of geometry in a scene
    max_unpacked_bytes: int = 1 << 30  # of a zipped format
    max_texture_side: int = 4096  # larger images are halved until they fit


@dataclass(frozen=True, kw_only=True)
class NormalizeConfig:
    half_extent: float = 0.475  # largest |coordinate| of the result; 0.5 touches the wall

    def __post_init__(self):
        if not 0 < self.half_extent <= 0.5:
            raise ValueError(f"half_extent must be in (0, 0.5], got {self.half_extent}")
