"""The baselines of generation: retrieved training assets, compared as generated meshes are."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.core.cameras import camera_of_meta
from pipeline.core.errors import RunError
from pipeline.core.primitives.marching_cubes import MeshArrays
from pipeline.core.primitives.surface_distance import SampledSurface
from pipeline.core.primitives.voxel_iou import inside, intersection_over_union
from pipeline.core.schema import View
from pipeline.rendering.views import render_from
from train.data.bricks import built_resolutions, read_asset_names, read_build_index
from train.data.render_conditions import ViewReader
from train.data.source import open_source
from train.evaluation.clay import clay_mesh
from train.evaluation.config import RetrievalOptions
from train.evaluation.reference_surfaces import ReferenceSurfaces
from train.evaluation.results import SurfaceResult, mean_percent, summarize_surfaces
from train.evaluation.retrieval import (
    ImageFeatures,
    RetrievedAsset,
    TrainingShapes,
    TrainingViews,
    training_assets,
    turned_surface,
)

log = logging.getLogger(__name__)

BY_SHAPE = "shape"  # name of the upper bound of retrieval


@dataclass(frozen=True, kw_only=True)
class RetrievalResult(SurfaceResult):
    """How far a retrieved training asset is from the stored surface of an asset.

    Args:
        by: What was compared to find it: "pixels", "features" or "shape".
        retrieved: uid of the training asset.
        name: Its path or URL.
        retrieved_view: Number of the view that was found, if images were compared.
        turns: Quarter turns about the up axis that bring it into the asset's frame.
        silhouette_iou: As in `GenerationResult`.
    """

    by: str
    retrieved: str
    name: str
    retrieved_view: int | None
    turns: int
    silhouette_iou: float


class Baselines:
    """Looks up training assets and compares them with the assets that are evaluated.

    Args:
        cfg: Options of the retrieval.
        features: What describes images, by name. Each gives one baseline.

    Raises:
        UserError: If the training build cannot be used or has no training asset.
        RunError: If no training asset can be read.
    """

    def __init__(self, cfg: RetrievalOptions, features: Mapping[str, ImageFeatures]):
        data = open_source(cfg.training_data or cfg.data, cfg.cache)
        self.index = read_build_index(data, built_resolutions(data))
        self.names = read_asset_names(data)
        self.samples = cfg.samples
        self.references = ReferenceSurfaces(self.index)
        assets = training_assets(self.index, self.references.assets)
        log.info("Reading %d training assets for retrieval.", len(assets))
        turned = bool(cfg.facing_views)
        self.shapes = TrainingShapes(self.references, assets, turned=turned)
        views = ViewReader(self.index, cfg.cameras)
        self.views = {
            name: TrainingViews(views, assets, cfg.held_out_views, describe, turned=turned)
            for name, describe in features.items()
        }

    def compare(
        self, target: SurfaceResult, image: View, reference: MeshArrays
    ) -> list[tuple[RetrievalResult, MeshArrays]]:
        """Return the result and the surface of each way of looking up.

        Args:
            target: Names the asset that is evaluated.
            image: Its view that is the query.
            reference: Its stored surface, which is the query of the upper bound.
        """
        azimuth = image.meta["azimuth_degrees"]
        found = {name: views.nearest(image.rgba, azimuth) for name, views in self.views.items()}
        found[BY_SHAPE] = self.shapes.nearest(reference)
        sampled = SampledSurface(*reference, samples=self.samples)
        reference_solid = inside(*reference)
        camera = camera_of_meta(image.meta)
        results = []
        for by, retrieved in found.items():
            surface = self.surface(retrieved)
            metrics = SampledSurface(*surface, samples=self.samples).compare(sampled)
            (render,) = render_from(clay_mesh(surface), [camera], len(image.rgba))
            uid = self.index.uids[retrieved.asset]
            silhouettes = render[..., 3] > 127, image.rgba[..., 3] > 127
            result = RetrievalResult(
                uid=target.uid,
                split=target.split,
                iou=float(intersection_over_union(inside(*surface), reference_solid)),
                chamfer=metrics.chamfer,
                normal_consistency=metrics.normal_consistency,
                f1=metrics.f1,
                by=by,
                retrieved=uid,
                name=self.names[uid],
                retrieved_view=retrieved.view,
                turns=retrieved.turns,
                silhouette_iou=float(intersection_over_union(*silhouettes)),
            )
            results.append((result, surface))
        return results

    def surface(self, retrieved: RetrievedAsset) -> MeshArrays:
        """Return the stored surface of a retrieved asset, turned into the query's frame.

        Raises:
            RunError: If it cannot be read.
        """
        return turned_surface(self.references.surface(retrieved.asset), retrieved.turns)

    def nearest_training_asset(self, surface: MeshArrays) -> tuple[str, float]:
        """Return the name of the training asset nearest to a mesh, and their Chamfer distance."""
        nearest = self.shapes.nearest(surface)
        return self.names[self.index.uids[nearest.asset]], nearest.distance


def summarize_retrieval(results: Sequence[RetrievalResult]) -> list[dict[str, Any]]:
    """Return the means over assets for each way of looking up, in the units of the tables."""
    summaries = []
    for by in dict.fromkeys(result.by for result in results):
        of_kind = [result for result in results if result.by == by]
        label = "training asset nearest to the true shape" if by == BY_SHAPE else f"by {by}"
        summaries.append(
            {
                **summarize_surfaces(of_kind, f"retrieval: {label}"),
                "by": by,
                "silhouette_iou": mean_percent([result.silhouette_iou for result in of_kind]),
            }
        )
    return summaries


def best_by_image(summaries: Sequence[Mapping[str, Any]]) -> str:
    """Return the way of looking up by image that has the smaller mean Chamfer distance.

    Raises:
        RunError: If nothing was looked up by image.
    """
    by_image = [summary for summary in summaries if summary["by"] != BY_SHAPE]
    if not by_image:
        raise RunError("no training asset was looked up by image")
    return min(by_image, key=lambda summary: summary["chamfer"])["by"]
