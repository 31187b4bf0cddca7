"""Stored surfaces of a build, and the search for the one that a generated mesh is nearest to."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import KDTree

from pipeline.core.errors import RunError
from pipeline.core.primitives.marching_cubes import MeshArrays, extract
from pipeline.core.primitives.surface_distance import sample_surface
from pipeline.core.schema import Bricks
from train.data.bricks import UNREADABLE, BrickReader, BuildIndex

log = logging.getLogger(__name__)

POINTS = 4096  # samples of each surface in the search for the nearest one
CANDIDATES = 500  # assets in the search, or more if more are evaluated; each takes about 300 kB


def spread_evenly(assets: Sequence[int], count: int) -> list[int]:
    """Return at most `count` of the assets, at even distances in their order."""
    count = min(count, len(assets))
    return [assets[n * len(assets) // count] for n in range(count)]


class ReferenceSurfaces:
    """Stored surfaces of a build.

    A surface is read when it is needed, because a build can exceed the memory.

    Args:
        index: The build's assets.

    Attributes:
        assets: Rows of the index that have cells.
        trees: Points on the surface of each candidate of `nearest`, by row of the index.
    """

    def __init__(self, index: BuildIndex):
        self.index = index
        self._reader = BrickReader(index)
        self.assets = [asset for asset in range(len(index)) if self._resolutions(asset)]
        self.trees: dict[int, KDTree] = {}

    def _resolutions(self, asset: int) -> list[int]:
        return [resolution for resolution, tokens in self.index.tokens.items() if tokens[asset]]

    def surface(self, asset: int) -> MeshArrays:
        """Return an asset's surface at its finest stored resolution.

        Raises:
            RunError: If it cannot be read or is empty.
        """
        return self._read(asset, max(self._resolutions(asset)))

    def cells(self, asset: int, resolution: int) -> NDArray[np.int16]:
        """Return an asset's cells at a resolution, [M, 3].

        Raises:
            RunError: If they cannot be read, or the build does not have the resolution.
        """
        if resolution not in self._resolutions(asset):
            raise RunError(f"it has no bricks at R = {resolution}")
        return self._bricks(asset, resolution).cells

    def _bricks(self, asset: int, resolution: int) -> Bricks:
        try:
            return self._reader.read(asset, resolution)
        except UNREADABLE as error:
            raise RunError(
                f"its bricks at R = {resolution} cannot be read ({error}); "
                f"run python -m pipeline.verify {self.index.root}"
            ) from error

    def _read(self, asset: int, resolution: int) -> MeshArrays:
        surface = extract(self._bricks(asset, resolution))
        if not len(surface[1]):
            raise RunError(f"it has no surface at R = {resolution}")
        return surface

    def load_candidates(self, chosen: Sequence[int]) -> None:
        """Choose and read the candidates of `nearest`.

        They are the chosen assets, and others up to CANDIDATES. An asset that cannot be read is
        skipped with a warning. The coarsest surfaces are read, because their differences from the
        finest ones are small compared with the differences between assets.

        Args:
            chosen: Rows of the index.
        """
        is_chosen = set(chosen)
        others = [asset for asset in self.assets if asset not in is_chosen]
        if others:
            others = spread_evenly(others, max(0, CANDIDATES - len(is_chosen)))
        for asset in sorted([*chosen, *others]):
            try:
                surface = self._read(asset, min(self._resolutions(asset)))
            except RunError as error:
                log.warning("%s is skipped: %s", self.index.uids[asset], error)
                continue
            self.trees[asset] = KDTree(sample_surface(*surface, POINTS, seed=0)[0])

    def nearest(self, surface: MeshArrays) -> int:
        """Return the candidate with the smallest Chamfer distance between sampled points.

        Returns:
            Its row of the index.
        """
        points = sample_surface(*surface, POINTS, seed=1)[0]
        tree = KDTree(points)

        def distance(asset: int) -> float:
            candidate = self.trees[asset]
            return candidate.query(points)[0].mean() + tree.query(candidate.data)[0].mean()

        return min(self.trees, key=distance)
