"""The stored surfaces that generated meshes are held against, and which of many assets a mesh is closest to."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from scipy.spatial import KDTree

from pipeline.core.errors import RunError
from pipeline.core.primitives.marching_cubes import MeshArrays, extract
from pipeline.core.primitives.surface_distance import sample_surface
from train.data.bricks import UNREADABLE, BrickReader, BuildIndex

log = logging.getLogger(__name__)

POINTS = 4096  # of each surface, for telling which asset is meant
CANDIDATES = 500  # assets among which that is asked, unless more are evaluated; some 300 kB each


def spread(assets: Sequence[int], count: int) -> list[int]:
    """At most `count` of them, evenly."""
    count = min(count, len(assets))
    return [assets[n * len(assets) // count] for n in range(count)]


class References:
    """A build's stored surfaces: each is read when it is asked for, since a build has more than fit into memory."""

    def __init__(self, index: BuildIndex):
        self.index, self._reader = index, BrickReader(index)
        self.assets = [n for n in range(len(index)) if self._resolutions(n)]  # with cells
        self.trees: dict[int, KDTree] = {}

    def _resolutions(self, asset: int) -> list[int]:
        return [r for r, tokens in self.index.tokens.items() if tokens[asset]]

    def surface(self, asset: int) -> MeshArrays:
        """At the finest resolution that is stored. RunError if it has none or cannot be read."""
        return self._read(asset, max(self._resolutions(asset)))

    def _read(self, asset: int, resolution: int) -> MeshArrays:
        try:
            surface = extract(self._reader.read(asset, resolution))
        except UNREADABLE as error:
            raise RunError(
                f"its bricks at R = {resolution} cannot be read ({error}); run python -m pipeline.verify "
                f"{self.index.root}"
            ) from error
        if not len(surface[1]):
            raise RunError(f"it has no surface at R = {resolution}")
        return surface

    def compare_with(self, chosen: Sequence[int]) -> None:
        """Sets among which `nearest` looks: the chosen assets, and others up to CANDIDATES. Those that cannot be read
        are left out. Points lie on the coarsest surfaces, which differ far less than assets do."""
        mine = set(chosen)
        others = [asset for asset in self.assets if asset not in mine]
        others = spread(others, max(0, CANDIDATES - len(mine))) if others else []
        for asset in sorted([*chosen, *others]):
            try:
                surface = self._read(asset, min(self._resolutions(asset)))
            except RunError as error:
                log.warning("%s is left out: %s", self.index.uids[asset], error)
                continue
            self.trees[asset] = KDTree(sample_surface(*surface, POINTS, seed=0)[0])

    def nearest(self, surface: MeshArrays) -> int:
        """The asset with the smallest distance between points, both ways."""
        points = sample_surface(*surface, POINTS, seed=1)[0]
        tree = KDTree(points)
        there = {asset: other.query(points)[0].mean() for asset, other in self.trees.items()}
        return min(
            there, key=lambda asset: there[asset] + tree.query(self.trees[asset].data)[0].mean()
        )
