"""Options of geometry."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.core.grid import check_resolution


@dataclass(frozen=True, kw_only=True)
class TopologyConfig:
    resolution: int = 512  # of the grid on which everything is decided, whatever R is asked for
    max_opening: float = (
        0.05  # an opening is closed if the space behind it sees less than this share of the sphere
    )
    sharp_degrees: float = 30.0  # an edge is sharp where its faces deviate from flat by more

    def __post_init__(self) -> None:
        check_resolution(self.resolution)
        if self.resolution < 64:
            raise ValueError(f"topology resolution must be at least 64, got {self.resolution}")
        if not 0 <= self.max_opening <= 1:
            raise ValueError(f"max_opening must lie in 0..1, got {self.max_opening}")
