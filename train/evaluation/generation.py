"""Evaluation of generation: how far meshes made from renders are from the rendered assets."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.inference.generator import Generator
from model.inference.turntable import CLAY, over_background
from pipeline.core.cameras import Camera, camera_of_meta, look_at_origin
from pipeline.core.devices import choose_device
from pipeline.core.errors import RunError, UserError
from pipeline.core.primitives.marching_cubes import MeshArrays
from pipeline.core.primitives.surface_distance import EMPTY_METRICS, THRESHOLDS, compare_surfaces
from pipeline.core.primitives.voxel_iou import inside, intersection_over_union
from pipeline.core.schema import Mesh, Part, View
from pipeline.mesh_io.mesh_export import write_mesh
from pipeline.rendering.views import render_from
from train.data.bricks import built_resolutions, read_build_index
from train.data.render_conditions import ViewReader
from train.data.source import open_source
from train.data.symmetry import quarter_turn, turn_directions, turns_to_face
from train.engine.mesh_pictures import save_image, side_by_side
from train.evaluation.config import GenerationEvaluation
from train.evaluation.image_metrics import (
    NORMAL_MAPS,
    SIZE,
    DinoFeatures,
    frechet_distance,
    normal_maps,
)
from train.evaluation.reference_surfaces import ReferenceSurfaces, spread_evenly
from train.evaluation.results import (
    PictureSheet,
    SurfaceResult,
    markdown_table,
    mean_percent,
    summarize_surfaces,
    surface_protocol,
    write_results,
)

log = logging.getLogger(__name__)

BEHIND_FOCAL_MM = 100.0  # of the picture from behind if the render has an orthographic camera
PICTURE_SIDE = 256  # pixels
COLUMNS = ("image", "generated", "stored surface", "generated, from behind")
EMPTY: MeshArrays = (np.zeros((0, 3)), np.zeros((0, 3), np.int32))


@dataclass(frozen=True, kw_only=True)
class GenerationResult(SurfaceResult):
    """How far the mesh that was generated for one asset is from its stored surface.

    `iou` compares the solids on a grid of 64^3 points.

    Args:
        view: Number of the view that was the input.
        seconds: Time of all stages together.
        tokens: Number of tokens by stage.
        faces: Number of faces.
        closed: Whether no edge of the mesh is open.
        silhouette_iou: Intersection over union of the input image's foreground and of the mesh
            rendered with the same camera.
        nearest: uid of the asset whose surface is nearest to the mesh.
        nearest_is_right: Whether that is the rendered asset.
        dino_similarity: Cosine between DINOv2 features of the input image and of the mesh rendered
            with the same camera. None if no weights were given.
        dino_similarity_of_asset: The same for the stored surface, which a perfect mesh would reach.
    """

    view: int
    seconds: float = 0.0
    tokens: dict[str, int] = field(default_factory=dict)
    faces: int = 0
    closed: bool = False
    silhouette_iou: float = 0.0
    nearest: str = ""
    nearest_is_right: bool = False
    dino_similarity: float | None = None
    dino_similarity_of_asset: float | None = None


@dataclass(frozen=True)
class _NormalMapFeatures:
    """Features of the normal maps of all assets: of the generated meshes and of the stored ones."""

    features: DinoFeatures
    generated: list[NDArray[np.float64]] = field(default_factory=list)  # [NORMAL_MAPS, C] per asset
    stored: list[NDArray[np.float64]] = field(default_factory=list)

    def add(self, mesh: MeshArrays, reference: MeshArrays) -> None:
        self.generated.append(self.features(normal_maps(*mesh)))
        self.stored.append(self.features(normal_maps(*reference)))

    def distance(self) -> float:
        return frechet_distance(np.concatenate(self.generated), np.concatenate(self.stored))


def evaluate_generation(cfg: GenerationEvaluation) -> dict[str, Any]:
    """Generate a mesh for every chosen asset, compare it, and write meshes and results.

    Returns:
        The content of evaluation.json.

    Raises:
        UserError: If the models or the build cannot be used, or the split has no asset.
        RunError: If none of the assets can be read, or nothing can be rendered.
    """
    data = open_source(cfg.data, cfg.cache)
    index = read_build_index(data, built_resolutions(data))
    references = ReferenceSurfaces(index)
    views = ViewReader(index, cfg.cameras)
    in_split = [
        asset
        for asset in references.assets
        if cfg.split == "all" or index.is_val[asset] == (cfg.split == "val")
    ]
    if not in_split:
        raise UserError(f"{cfg.data} has no usable asset in split {cfg.split}; use --split all")
    chosen = spread_evenly(in_split, cfg.limit or len(in_split))
    references.load_candidates(chosen)
    device = choose_device(cfg.device)
    generator = Generator.load(cfg.checkpoint, device, cfg.generation)
    out = cfg.out or cfg.checkpoint / "evaluation"
    meshes = out / "meshes"
    meshes.mkdir(parents=True, exist_ok=True)
    looks = None
    if cfg.features is not None:
        looks = _NormalMapFeatures(DinoFeatures.load(cfg.features, device))
    results = []
    pictures = []
    for asset in chosen:
        if asset not in references.trees:
            continue  # a warning was logged when it could not be read
        try:
            reference = references.surface(asset)
            image = views.read_view(asset, _view_number(cfg, views.views(asset)))
        except RunError as error:
            log.warning("%s is skipped: %s", index.uids[asset], error)
            continue
        result, row = _evaluate(cfg, generator, references, asset, reference, image, meshes, looks)
        save_image(meshes / f"{result.uid}.png", side_by_side([row], COLUMNS))
        results.append(result)
        pictures.append(row)
        log.info(
            "%s: CD x1000 %.1f, IoU %.3f, silhouette IoU %.3f, nearest asset %s",
            result.uid,
            1000 * result.chamfer,
            result.iou,
            result.silhouette_iou,
            "right" if result.nearest_is_right else "wrong",
        )
    if not results:
        raise RunError(
            f"none of {len(chosen)} assets of {cfg.data} can be read; "
            f"run python -m pipeline.verify {cfg.data}"
        )
    view = "last view" if cfg.view == -1 else f"view {cfg.view}"
    summary = summarize(results, f"{cfg.split} assets, {view}", len(references.trees))
    if looks is not None:
        summary["normal_map_distance"] = looks.distance()
    protocol = {
        **surface_protocol(cfg),
        "seed": cfg.seed,
        "facing_views": cfg.facing_views,
        "sampling": generator.describe_sampling(cfg.generation),
        "image_encoder": generator.structure.flow.encoder.label,
        "looks": _protocol_of_looks(cfg.features),
    }
    return write_results(
        out,
        cfg,
        title="Meshes generated from images",
        protocol=protocol,
        results=results,
        table=generation_table(summary),
        sheet=PictureSheet(file="generated.png", labels=COLUMNS, rows=pictures),
        summary=summary,
    )


def _protocol_of_looks(weights: str | None) -> str | None:
    """Return how the numbers about looks are measured."""
    if weights is None:
        return None
    return (
        f"class token of {weights} at {SIZE} px; normal-map distance: Frechet distance (the "
        "formula of the FID with these features instead of Inception's) between the "
        f"{NORMAL_MAPS} normal maps per asset of generated and of stored surfaces, which is "
        "larger for fewer assets; similarity: cosine of the image and a clay render with the "
        "same camera, both cropped to the foreground"
    )


def _view_number(cfg: GenerationEvaluation, count: int) -> int:
    """Return the number of the input view, from 0 to `count` - 1."""
    if not -count <= cfg.view < count:
        raise UserError(
            f"--view must be from {-count} to {count - 1} for the {count} views of each asset, "
            f"got {cfg.view}"
        )
    return cfg.view % count


def _evaluate(
    cfg: GenerationEvaluation,
    generator: Generator,
    references: ReferenceSurfaces,
    asset: int,
    reference: MeshArrays,
    image: View,
    folder: Path,
    looks: _NormalMapFeatures | None,
) -> tuple[GenerationResult, list[NDArray[np.uint8]]]:
    """Generate and compare one mesh. Returns the result and the pictures of COLUMNS."""
    index = references.index
    uid = index.uids[asset]
    camera = camera_of_meta(image.meta)
    empty = GenerationResult(
        uid=uid,
        split="val" if index.is_val[asset] else "train",
        view=image.meta["view"],
        iou=0.0,
        chamfer=EMPTY_METRICS.chamfer,
        normal_consistency=EMPTY_METRICS.normal_consistency,
        f1=EMPTY_METRICS.f1,
    )
    try:
        generated = generator.generate(image.rgba, cfg.seed, cfg.generation, whole_if_opaque=True)
    except RunError as error:
        log.warning("%s: nothing was generated: %s", uid, error)
        blank = np.full((PICTURE_SIDE, PICTURE_SIDE, 3), 255, np.uint8)
        if looks is not None:
            looks.add(EMPTY, reference)
            empty = replace(empty, dino_similarity=0.0, dino_similarity_of_asset=0.0)
        return empty, [_shown(image.rgba), blank, draw(reference, camera), blank]
    vertices = generated.vertices
    if cfg.facing_views:
        back = quarter_turn(-turns_to_face(image.meta["azimuth_degrees"]))
        vertices = turn_directions(vertices, back)
    mesh = vertices, generated.faces
    write_mesh(folder / f"{uid}.glb", *mesh)
    metrics = compare_surfaces(*mesh, *reference, samples=cfg.samples)
    (render,) = render_from(_clay_mesh(mesh), [camera], len(image.rgba))
    nearest = references.nearest(mesh)
    similarity = similarity_of_asset = None
    if looks is not None:
        looks.add(mesh, reference)
        (reference_render,) = render_from(_clay_mesh(reference), [camera], len(image.rgba))
        similarity = looks.features.similarity(image.rgba, render)
        similarity_of_asset = looks.features.similarity(image.rgba, reference_render)
    result = replace(
        empty,
        seconds=sum(stage.seconds for stage in generated.stages),
        tokens={stage.name: stage.tokens for stage in generated.stages},
        faces=len(generated.faces),
        closed=generated.open_edges == 0,
        chamfer=metrics.chamfer,
        normal_consistency=metrics.normal_consistency,
        f1=metrics.f1,
        iou=intersection_over_union(inside(*mesh), inside(*reference)),
        silhouette_iou=intersection_over_union(render[..., 3] > 127, image.rgba[..., 3] > 127),
        nearest=index.uids[nearest],
        nearest_is_right=nearest == asset,
        dino_similarity=similarity,
        dino_similarity_of_asset=similarity_of_asset,
    )
    focal = camera.focal_mm or BEHIND_FOCAL_MM  # an orthographic camera has none
    behind = look_at_origin(camera.azimuth_degrees + 180, camera.elevation_degrees, focal)
    return result, [
        _shown(image.rgba),
        draw(mesh, camera),
        draw(reference, camera),
        draw(mesh, behind),
    ]


def _clay_mesh(surface: MeshArrays) -> Mesh:
    vertices, faces = surface
    part = Part(vertices=slice(0, len(vertices)), faces=slice(0, len(faces)), material=CLAY)
    return Mesh(vertices=vertices, faces=faces, parts=(part,))


def draw(surface: MeshArrays, camera: Camera) -> NDArray[np.uint8]:
    """Render a surface as clay on grey.

    Args:
        surface: Vertices and faces.
        camera: Where it is seen from.

    Returns:
        RGB, uint8 [PICTURE_SIDE, PICTURE_SIDE, 3].

    Raises:
        RunError: If there is no OpenGL with EGL.
    """
    (rgba,) = render_from(_clay_mesh(surface), [camera], PICTURE_SIDE)
    return over_background(rgba)


def _shown(rgba: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return a stored render on grey at the size of the pictures, scaled to the nearest pixel."""
    rows, columns = (np.arange(PICTURE_SIDE) * side // PICTURE_SIDE for side in rgba.shape[:2])
    return over_background(rgba[rows][:, columns])


def summarize(results: Sequence[GenerationResult], name: str, candidates: int) -> dict[str, Any]:
    """Return the means over assets in the units of the table.

    Args:
        results: The assets, at least one.
        name: Name of the group of assets.
        candidates: Number of assets among which the nearest one was sought.

    Returns:
        The entries of `summarize_surfaces`; in percent the mean silhouette IoU, the share of assets
        whose nearest asset is the right one and the share of closed meshes; and mean seconds. The
        mean similarities are included if every result has them.
    """
    percent = {
        share: mean_percent([getattr(result, share) for result in results])
        for share in ("silhouette_iou", "nearest_is_right", "closed")
    }
    similarities = {}
    if all(result.dino_similarity is not None for result in results):
        similarities = {
            metric: float(np.mean([getattr(result, metric) for result in results]))
            for metric in ("dino_similarity", "dino_similarity_of_asset")
        }
    return {
        **summarize_surfaces(results, name),
        "candidates": candidates,
        **percent,
        "seconds": float(np.mean([result.seconds for result in results])),
        **similarities,
    }


def generation_table(summary: Mapping[str, Any]) -> str:
    """Format a summary of `summarize` as Markdown."""
    heads = {
        "assets": "assets",
        "empty": "empty",
        "chamfer": "CD x1000",
        **{f"f1_{t}": f"F1({t}) %" for t in THRESHOLDS},
        "normal_consistency": "normals %",
        "iou": "IoU %",
        "silhouette_iou": "silhouette IoU %",
        "nearest_is_right": f"nearest of {summary['candidates']} is right %",
        "closed": "closed %",
        "seconds": "seconds",
    }
    heads_of_looks = {
        "normal_map_distance": "normal-map FD",
        "dino_similarity": "DINOv2 cosine",
        "dino_similarity_of_asset": "DINOv2 cosine of the asset",
    }
    heads_of_looks = {key: head for key, head in heads_of_looks.items() if key in summary}
    digits = dict.fromkeys(heads, 1) | dict.fromkeys(heads_of_looks, 3)
    return markdown_table([summary], heads | heads_of_looks, digits)
