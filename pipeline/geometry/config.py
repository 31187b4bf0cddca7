"""Options of the geometry stage."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.core.grid import check_resolution

MIN_TOPOLOGY = 64  # grid points along one side of the coarsest grid that decides


@dataclass(frozen=True, kw_only=True)
class TopologyConfig:
    """How inside and outside are decided."""

    resolution: int = 512
    """Resolution of the grid on which inside and outside are decided, whatever resolutions are
    stored. At least 64 and a multiple of 8."""

    max_opening: float = 0.05
    """Largest opening that is closed, 0 to 1. It is measured as the share of all directions in
    which the space behind the opening sees out. 0 closes no opening."""

    sharp_degrees: float = 30.0
    """Angle in degrees above which an edge is sharp. The angle of two coplanar faces is 0."""

    def __post_init__(self) -> None:
        check_resolution(self.resolution)
        if self.resolution < MIN_TOPOLOGY:
            raise ValueError(
                f"topology resolution must be at least {MIN_TOPOLOGY}, got {self.resolution}"
            )
        if not 0 <= self.max_opening <= 1:
            raise ValueError(f"max_opening must lie in 0..1, got {self.max_opening}")
