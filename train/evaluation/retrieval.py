"""Retrieval as a baseline: the training asset that looks most like an image or is nearest in shape.

A model that generates is worth its training only if its meshes are nearer to the true shapes than
training assets that are looked up.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.spatial import KDTree

from pipeline.core.errors import RunError, UserError
from pipeline.core.primitives.marching_cubes import MeshArrays
from pipeline.core.primitives.surface_distance import sample_surface
from train.data.bricks import BuildIndex
from train.data.render_conditions import ViewReader
from train.data.symmetry import quarter_turn, turn_directions, turns_to_face
from train.evaluation.reference_surfaces import ReferenceSurfaces

log = logging.getLogger(__name__)

IMAGE_SIDE = 64  # pixels per side of the images whose pixels are compared
POINTS = 4096  # samples of each surface whose distances are compared
FEW_POINTS = 128  # samples that choose the surfaces that are compared exactly
COMPARED = 64  # surfaces that are compared with all samples

# The features of prepared images, one row each.
ImageFeatures = Callable[[Sequence[NDArray[np.uint8]]], NDArray[np.float32]]


@dataclass(frozen=True, kw_only=True)
class RetrievedAsset:
    """A training asset that was looked up.

    Attributes:
        asset: Row of the index of the training assets.
        turns: Quarter turns about the up axis that bring it into the frame of the query.
        view: Number of the view that was found, or None if shapes were compared.
        distance: Distance of the images or the features, or the Chamfer distance between sampled
            points in the frame [-1, 1]^3.
    """

    asset: int
    turns: int
    view: int | None
    distance: float


def pixels(rgba: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return an image as a row of RGBA values: cropped to its foreground, premultiplied, 64^2.

    Args:
        rgba: uint8 [H, W, 4].

    Returns:
        float32 [4 * IMAGE_SIDE^2] in [0, 1].

    Raises:
        ValueError: If the image has no foreground.
    """
    rows, columns = np.nonzero(rgba[..., 3] > 127)
    if not len(rows):
        raise ValueError("image must have a foreground")
    top, left, bottom, right = rows.min(), columns.min(), rows.max() + 1, columns.max() + 1
    side = max(bottom - top, right - left)
    values = rgba[top:bottom, left:right].astype(np.float32) / 255
    values[..., :3] *= values[..., 3:]
    square = np.zeros((side, side, 4), np.float32)
    y, x = (side - (bottom - top)) // 2, (side - (right - left)) // 2
    square[y : y + bottom - top, x : x + right - left] = values
    size = (IMAGE_SIDE, IMAGE_SIDE)
    channels = [
        np.asarray(Image.fromarray(square[..., n]).resize(size, Image.Resampling.BOX))
        for n in range(4)
    ]
    return np.stack(channels, -1).reshape(-1)


class TrainingViews:
    """The training views of all training assets, as candidates of retrieval by image.

    Args:
        views: Reads the renders.
        assets: Rows of the index of the training assets.
        held_out: Number of views at the end of each asset that were not trained on.
        describe: Returns a row of values for each of some RGBA images.
        turned: Turn what is found so that the quarter of its view's camera is that of the query's.

    Raises:
        UserError: If all views are held out.
        RunError: If no view can be read.
    """

    def __init__(
        self,
        views: ViewReader,
        assets: Sequence[int],
        held_out: int,
        describe: ImageFeatures,
        *,
        turned: bool,
    ):
        self.describe = describe
        self.turned = turned
        rows: list[NDArray[np.float16]] = []
        self._found: list[tuple[int, int, float]] = []  # asset, view, azimuth
        for asset in assets:
            count = views.views(asset) - held_out
            if count < 1:
                raise UserError(
                    f"held_out_views must be below the {views.views(asset)} views there are, "
                    f"got {held_out}"
                )
            images = []
            for view in range(count):
                try:
                    image = views.read_view(asset, view)
                    if not (image.rgba[..., 3] > 127).any():
                        continue
                except RunError as error:
                    log.warning("%s", error)
                    continue
                images.append(image.rgba)
                self._found.append((asset, view, image.meta["azimuth_degrees"]))
            if images:
                rows.append(describe(images).astype(np.float16))
        if not rows:
            raise RunError("no view of the training assets can be read")
        self._rows = np.concatenate(rows)

    def nearest(self, rgba: NDArray[np.uint8], azimuth_degrees: float) -> RetrievedAsset:
        """Return the training asset of the view that is most like an image.

        Args:
            rgba: uint8 [H, W, 4].
            azimuth_degrees: Azimuth of the image's camera.
        """
        (query,) = self.describe([rgba])
        squared = np.concatenate(
            [
                ((self._rows[first : first + 1024].astype(np.float32) - query) ** 2).sum(1)
                for first in range(0, len(self._rows), 1024)
            ]
        )
        number = int(squared.argmin())
        asset, view, azimuth = self._found[number]
        turns = 0
        if self.turned:
            turns = (turns_to_face(azimuth) - turns_to_face(azimuth_degrees)) % 4
        return RetrievedAsset(
            asset=asset, turns=turns, view=view, distance=float(squared[number] ** 0.5)
        )


class TrainingShapes:
    """The surfaces of all training assets, as candidates of retrieval by shape.

    Args:
        references: The stored surfaces of the training build.
        assets: Rows of its index.
        turned: Also take every asset turned by 90, 180 and 270 degrees about the up axis.

    Raises:
        RunError: If no surface can be read.
    """

    def __init__(self, references: ReferenceSurfaces, assets: Sequence[int], *, turned: bool):
        self.turned = turned
        self._points: dict[int, NDArray[np.float64]] = {}
        for asset in assets:
            try:
                surface = references.surface(asset)
            except RunError as error:
                log.warning("%s is no candidate: %s", references.index.uids[asset], error)
                continue
            self._points[asset] = 2 * sample_surface(*surface, POINTS, seed=0)[0]
        if not self._points:
            raise RunError("no surface of the training assets can be read")
        self._few = {asset: KDTree(points[:FEW_POINTS]) for asset, points in self._points.items()}

    def __len__(self) -> int:
        return len(self._points)

    def nearest(self, surface: MeshArrays) -> RetrievedAsset:
        """Return the training asset with the smallest Chamfer distance between sampled points."""
        points = 2 * sample_surface(*surface, POINTS, seed=1)[0]
        candidates = []
        for turns in range(4 if self.turned else 1):
            # Turning the query back is turning the candidate.
            query = turn_directions(points, quarter_turn(-turns))
            few = KDTree(query[:FEW_POINTS])
            candidates += [
                (_chamfer(few, tree), asset, turns, query) for asset, tree in self._few.items()
            ]
        candidates.sort(key=lambda candidate: candidate[:3])
        distance, asset, turns = min(
            (_chamfer(KDTree(query), KDTree(self._points[asset])), asset, turns)
            for _, asset, turns, query in candidates[:COMPARED]
        )
        return RetrievedAsset(asset=asset, turns=turns, view=None, distance=distance)


def turned_surface(surface: MeshArrays, turns: int) -> MeshArrays:
    """Return a surface after quarter turns about the up axis, as `RetrievedAsset.turns` counts."""
    vertices, faces = surface
    return turn_directions(np.asarray(vertices, np.float64), quarter_turn(turns)), faces


def _chamfer(a: KDTree, b: KDTree) -> float:
    """Return the mean of both directions' mean distances between two sets of points."""
    return float((a.query(b.data)[0].mean() + b.query(a.data)[0].mean()) / 2)


def describe_pixels(images: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
    """Return `pixels` of each image."""
    return np.stack([pixels(image) for image in images])


def training_assets(index: BuildIndex, usable: Sequence[int]) -> list[int]:
    """Return the usable assets of the training split.

    Raises:
        UserError: If there is none.
    """
    assets = [asset for asset in usable if not index.is_val[asset]]
    if not assets:
        raise UserError(f"{index.root} has no training asset, which retrieval needs")
    return assets
