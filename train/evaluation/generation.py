"""Evaluation of generation: how far meshes made from renders are from the rendered assets."""

from __future__ import annotations

import logging
import multiprocessing
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from kernels import token_order
from model.conditioning.image_encoder import ImageBatch
from model.conditioning.image_preprocessing import prepare_image
from model.inference.checkpoint_source import is_shipped
from model.inference.generator import Generator
from model.sparse_tensor import Level
from pipeline.core.cameras import camera_of_meta, look_at_origin
from pipeline.core.devices import choose_device
from pipeline.core.errors import RunError, UserError
from pipeline.core.grid import CELL_SIDE
from pipeline.core.primitives.marching_cubes import MeshArrays
from pipeline.core.primitives.surface_distance import EMPTY_METRICS, THRESHOLDS, compare_surfaces
from pipeline.core.primitives.voxel_iou import inside, intersection_over_union
from pipeline.core.schema import View
from pipeline.mesh_io.mesh_export import write_mesh
from pipeline.rendering.views import render_from
from train.data.bricks import BuildIndex, built_resolutions, read_build_index
from train.data.render_conditions import ViewReader
from train.data.source import open_source
from train.data.symmetry import quarter_turn, transform_points, turn_directions, turns_to_face
from train.engine.mesh_pictures import save_image, side_by_side
from train.evaluation.baselines import (
    BY_SHAPE,
    Baselines,
    RetrievalResult,
    best_by_image,
    summarize_retrieval,
)
from train.evaluation.clay import PICTURE_SIDE, clay_mesh, draw, shown
from train.evaluation.config import GenerationEvaluation, RetrievalEvaluation, RetrievalOptions
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
from train.evaluation.retrieval import ImageFeatures, describe_pixels

log = logging.getLogger(__name__)

BEHIND_FOCAL_MM = 100.0  # of the picture from behind if the render has an orthographic camera
COLUMNS = ("image", "generated", "stored surface", "generated, from behind")
EMPTY: MeshArrays = (np.zeros((0, 3)), np.zeros((0, 3), np.int32))
PIXELS, FEATURES = "pixels", "features"  # what retrieval by image compares
BATCH = 32  # images that the encoder describes at once


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
        seed: Seed of the noise.
        nearest_training: Path or URL of the training asset whose surface is nearest to the mesh.
            Empty without retrieval.
        nearest_training_chamfer: Chamfer distance between sampled points of both.
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
    seed: int = 0
    nearest_training: str = ""
    nearest_training_chamfer: float | None = None
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


@dataclass(frozen=True)
class _EvaluatedAssets:
    """The assets that are evaluated, with their surfaces and renders."""

    index: BuildIndex
    references: ReferenceSurfaces
    views: ViewReader
    chosen: list[int]

    @classmethod
    def choose(cls, cfg: RetrievalOptions) -> _EvaluatedAssets:
        """Open the build and choose assets of the split.

        Raises:
            UserError: If the build cannot be used, or the split has no asset.
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
        return cls(index, references, views, spread_evenly(in_split, cfg.limit or len(in_split)))

    def read(self, cfg: RetrievalOptions, asset: int) -> tuple[MeshArrays, View]:
        """Return the stored surface of an asset and the view that is the input.

        Raises:
            RunError: If either cannot be read.
        """
        surface = self.references.surface(asset)
        return surface, self.views.read_view(asset, _view_number(cfg, self.views.views(asset)))

    def target(self, asset: int) -> SurfaceResult:
        """Return the result of an asset of which nothing was generated."""
        return SurfaceResult(
            uid=self.index.uids[asset],
            split="val" if self.index.is_val[asset] else "train",
            iou=0.0,
            chamfer=EMPTY_METRICS.chamfer,
            normal_consistency=EMPTY_METRICS.normal_consistency,
            f1=EMPTY_METRICS.f1,
        )

    def none_readable(self, cfg: RetrievalOptions) -> RunError:
        return RunError(
            f"none of {len(self.chosen)} assets of {cfg.data} can be read; "
            f"run python -m pipeline.verify {cfg.data}"
        )


def evaluate_retrieval(cfg: RetrievalEvaluation) -> dict[str, Any]:
    """Look up training assets for every chosen asset, compare them, and write the results.

    Returns:
        The content of evaluation.json.

    Raises:
        UserError: If a build cannot be used, or the split has no asset.
        RunError: If none of the assets can be read, or nothing can be rendered.
    """
    assets = _EvaluatedAssets.choose(cfg)
    baselines = Baselines(cfg, {PIXELS: describe_pixels})
    results: list[RetrievalResult] = []
    pictures = []
    for asset in assets.chosen:
        try:
            reference, image = assets.read(cfg, asset)
        except RunError as error:
            log.warning("%s is skipped: %s", assets.index.uids[asset], error)
            continue
        compared = baselines.compare(assets.target(asset), image, reference)
        camera = camera_of_meta(image.meta)
        results += [result for result, _ in compared]
        surfaces = [surface for _, surface in compared]
        pictures.append(
            [shown(image.rgba), *(draw(surface, camera) for surface in (*surfaces, reference))]
        )
        log.info(
            "%s: %s",
            assets.index.uids[asset],
            ", ".join(f"CD x1000 by {r.by} {1000 * r.chamfer:.1f}" for r, _ in compared),
        )
    if not results:
        raise assets.none_readable(cfg)
    summaries = summarize_retrieval(results)
    labels = ("image", *(f"by {summary['by']}" for summary in summaries), "stored surface")
    return write_results(
        cfg.out,
        cfg,
        checkpoint=None,
        title="Training assets that are like held-out ones",
        protocol={**surface_protocol(cfg), **_protocol_of_retrieval(cfg, baselines)},
        results=results,
        table=generation_table(summaries),
        details=_retrieval_details(results),
        sheet=PictureSheet(file="retrieved.png", labels=labels, rows=pictures),
        summaries=summaries,
    )


def _protocol_of_retrieval(cfg: RetrievalOptions, baselines: Baselines) -> dict[str, Any]:
    """Return how training assets are looked up."""
    return {
        "training_assets": len(baselines.shapes),
        "looked_up_views": "all but the last "
        f"{cfg.held_out_views} of each training asset; {PIXELS}: distance of RGBA images of 64^2 "
        "pixels, cropped to the foreground",
        "looked_up_turned": bool(cfg.facing_views),
    }


def _retrieval_details(results: Sequence[RetrievalResult]) -> str:
    """Return a table of what was looked up for each asset."""
    rows = [
        {
            "name": result.uid,
            "by": result.by,
            "found": result.name,
            "chamfer": 1000 * result.chamfer,
            "silhouette_iou": 100 * result.silhouette_iou,
        }
        for result in results
    ]
    heads = {
        "by": "by",
        "found": "training asset",
        "chamfer": "CD x1000",
        "silhouette_iou": "silhouette IoU %",
    }
    return markdown_table(rows, heads, dict.fromkeys(heads, 1))


def evaluate_generation(cfg: GenerationEvaluation) -> dict[str, Any]:
    """Generate a mesh for every chosen asset and seed, compare it, and write meshes and results.

    Returns:
        The content of evaluation.json.

    Raises:
        UserError: If the models or the build cannot be used, or the split has no asset.
        RunError: If none of the assets can be read, or nothing can be rendered.
    """
    assets = _EvaluatedAssets.choose(cfg)
    references = assets.references
    device = choose_device(cfg.device)
    generator = Generator.load(cfg.checkpoint, device, cfg.generation)
    cfg = replace(cfg, facing_views=_facing_views(cfg, generator.facing_views))
    if generator.max_views is not None and cfg.views > generator.max_views:
        raise UserError(
            f"{cfg.checkpoint} was trained with up to {generator.max_views} views of an asset, "
            f"--views is {cfg.views}"
        )
    references.load_candidates(assets.chosen)
    out = cfg.out or _default_out(cfg.checkpoint)
    meshes = out / "meshes"
    meshes.mkdir(parents=True, exist_ok=True)
    looks = None
    if cfg.features is not None:
        looks = _NormalMapFeatures(DinoFeatures.load(cfg.features, device))
    evaluator = _Evaluator(cfg, generator, assets, meshes, looks)
    results: list[GenerationResult] = []
    retrieved: list[RetrievalResult] = []
    pictures = []
    readable = [asset for asset in assets.chosen if asset in references.trees]
    with _evaluated_assets(evaluator, readable) as evaluated:
        baselines = None
        if cfg.retrieval:  # other processes generate meanwhile
            features = encoder_features(generator)
            baselines = Baselines(cfg, {PIXELS: describe_pixels, FEATURES: features})
        for asset, made in zip(readable, evaluated, strict=True):
            if not made:
                continue  # a warning was logged when it could not be read
            if baselines is not None:
                made = [one.with_nearest(baselines) for one in made]
                reference, image = assets.read(cfg, asset)
                compared = baselines.compare(assets.target(asset), image, reference)
                retrieved += [retrieval for retrieval, _ in compared]
            results += [one.result for one in made]
            pictures.append(made[0].pictures)
    if not results:
        raise assets.none_readable(cfg)
    view = "last view" if cfg.view == -1 else f"view {cfg.view}"
    summary = summarize(results, f"{cfg.split} assets, {view}", len(references.trees))
    if looks is not None:
        summary["normal_map_distance"] = looks.distance()
    summaries = summarize_retrieval(retrieved)
    if retrieved:
        summary |= compare_with_retrieval(results, retrieved, best_by_image(summaries))
    protocol = {
        **surface_protocol(cfg),
        "seeds": cfg.seeds,
        "views": cfg.views,
        "cells": cfg.cells,
        "facing_views": cfg.facing_views,
        "sampling": generator.describe_sampling(cfg.generation),
        "image_encoder": generator.structure.flow.encoder.label,
        "looks": _protocol_of_looks(cfg.features),
        **({} if baselines is None else _protocol_of_retrieval(cfg, baselines)),
    }
    return write_results(
        out,
        cfg,
        checkpoint=cfg.checkpoint,
        title="Meshes generated from images",
        protocol=protocol,
        results=results,
        table=generation_table([summary, *summaries]),
        details=None if baselines is None else _generation_details(results, retrieved),
        sheet=PictureSheet(file="generated.png", labels=COLUMNS, rows=pictures),
        summary=summary,
        **({} if baselines is None else {"retrieval": summaries, "retrieved": retrieved}),
    )


def _facing_views(cfg: GenerationEvaluation, recorded: bool | None) -> bool:
    """Return whether generated meshes face the camera of their view.

    Args:
        cfg: Options of the evaluation.
        recorded: What the export records. None if it has no record.

    Raises:
        UserError: If --facing-views contradicts the export.
    """
    if recorded is None:
        return bool(cfg.facing_views)
    if cfg.facing_views not in (None, recorded):
        trained = "with" if recorded else "without"
        raise UserError(
            f"{cfg.checkpoint} records that it was trained {trained} --facing-views, but the "
            f"option is {cfg.facing_views}; leave it out"
        )
    return recorded


def _default_out(checkpoint: Path) -> Path:
    """Return the directory of the results beside the stages, but never one in the package."""
    if is_shipped(checkpoint):
        return Path("runs") / f"evaluation-{checkpoint}"
    return checkpoint / "evaluation"


def encoder_features(generator: Generator) -> ImageFeatures:
    """Return what describes images by the mean token of the structure stage's image encoder.

    The rows have unit length.
    """
    flow = generator.structure.flow
    size, kept = flow.encoder.image_size, flow.config.image_tokens

    @torch.no_grad()
    def describe(images: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
        rows = []
        for first in range(0, len(images), BATCH):
            some = [
                prepare_image(rgba, size, whole_if_opaque=True)
                for rgba in images[first : first + BATCH]
            ]
            tokens = flow.encode_images(ImageBatch.collate(some, kept).to(generator.device))
            for start, end in zip(tokens.starts[:-1], tokens.starts[1:], strict=True):
                mean = tokens.feats_SC[start:end].float().mean(0)
                rows.append((mean / mean.norm().clamp(min=1e-12)).cpu().numpy())
        return np.stack(rows)

    return describe


def compare_with_retrieval(
    results: Sequence[GenerationResult], retrieved: Sequence[RetrievalResult], by_image: str
) -> dict[str, Any]:
    """Return how many assets are nearer to what was generated than to what was looked up.

    Args:
        results: Generated meshes, of one or several seeds for each asset.
        retrieved: What was looked up for the same assets.
        by_image: The way of looking up by image that is the baseline.

    Returns:
        Shares of the assets in percent. The Chamfer distance of an asset is the mean over its
        seeds. An empty mesh is nearer than nothing.
    """
    chamfers: dict[str, list[float]] = {}
    for result in results:
        chamfers.setdefault(result.uid, []).append(result.chamfer)
    shares = {}
    for name, by in (("nearer_than_image", by_image), ("nearer_than_shape", BY_SHAPE)):
        baseline = {result.uid: result.chamfer for result in retrieved if result.by == by}
        shares[name] = mean_percent(
            [float(np.mean(each)) < baseline[uid] for uid, each in chamfers.items()]
        )
    return {"image_retrieval": by_image, **shares}


def _generation_details(
    results: Sequence[GenerationResult], retrieved: Sequence[RetrievalResult]
) -> str:
    """Return a table of each mesh, its nearest training asset and the baselines of its asset."""
    kinds = tuple(dict.fromkeys(result.by for result in retrieved))
    baselines = {(result.uid, result.by): 1000 * result.chamfer for result in retrieved}
    rows = [
        {
            "name": result.uid,
            "seed": result.seed,
            "chamfer": 1000 * result.chamfer,
            **{by: baselines[result.uid, by] for by in kinds},
            "silhouette_iou": 100 * result.silhouette_iou,
            "nearest_training": result.nearest_training or None,
            "distance": None
            if result.nearest_training_chamfer is None
            else 1000 * result.nearest_training_chamfer,
        }
        for result in results
    ]
    heads = {
        "seed": "seed",
        "chamfer": "CD x1000",
        **{by: f"CD of retrieval by {by}" for by in kinds},
        "silhouette_iou": "silhouette IoU %",
        "nearest_training": "training asset nearest to the mesh",
        "distance": "its CD x1000 to the mesh",
    }
    return markdown_table(rows, heads, dict.fromkeys(heads, 1))


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


def _view_number(cfg: RetrievalOptions, count: int) -> int:
    """Return the number of the input view, from 0 to `count` - 1."""
    if not -count <= cfg.view < count:
        raise UserError(
            f"--view must be from {-count} to {count - 1} for the {count} views of each asset, "
            f"got {cfg.view}"
        )
    return cfg.view % count


class _Evaluated(NamedTuple):
    """A mesh that was generated and compared."""

    result: GenerationResult
    pictures: list[NDArray[np.uint8]]  # of COLUMNS
    mesh: MeshArrays | None  # None if nothing was generated

    def with_nearest(self, baselines: Baselines) -> _Evaluated:
        """Return the same with the training asset that is nearest to the mesh."""
        if self.mesh is None:
            return self
        training, distance = baselines.nearest_training_asset(self.mesh)
        result = replace(self.result, nearest_training=training, nearest_training_chamfer=distance)
        return self._replace(result=result)


@dataclass(frozen=True)
class _Evaluator:
    """Generates and compares meshes."""

    cfg: GenerationEvaluation
    generator: Generator
    assets: _EvaluatedAssets
    folder: Path
    looks: _NormalMapFeatures | None

    def evaluate_asset(self, asset: int) -> list[_Evaluated]:
        """Generate and compare the meshes of all seeds, and write them and their pictures.

        Returns:
            One entry for each seed. None at all, after a warning, if the asset cannot be read.
        """
        cfg, uid = self.cfg, self.assets.index.uids[asset]
        try:
            reference, image = self.assets.read(cfg, asset)
            inputs = [image.rgba, *self.further_views(asset, image)]
            cells = self.stored_cells(asset, image) if cfg.cells == "stored" else None
        except RunError as error:
            log.warning("%s is skipped: %s", uid, error)
            return []
        made = []
        for seed in cfg.seeds:
            one = self.evaluate(asset, reference, image, inputs, cells, seed)
            name = uid if seed == cfg.seeds[0] else f"{uid}-{seed}"
            save_image(self.folder / f"{name}.png", side_by_side([one.pictures], COLUMNS))
            log.info(
                "%s: CD x1000 %.1f, IoU %.3f, silhouette IoU %.3f, nearest asset %s",
                name,
                1000 * one.result.chamfer,
                one.result.iou,
                one.result.silhouette_iou,
                "right" if one.result.nearest_is_right else "wrong",
            )
            made.append(one)
        return made

    def _turns(self, image: View) -> int:
        """Return the quarter turns that bring the camera of a view to the front."""
        return turns_to_face(image.meta["azimuth_degrees"]) if self.cfg.facing_views else 0

    def further_views(self, asset: int, image: View) -> list[NDArray[np.uint8]]:
        """Return the images that are the input besides the one of --view.

        Raises:
            RunError: If one cannot be read.
        """
        views, first = self.assets.views, image.meta["view"]
        count = views.views(asset)
        images = []
        for step in range(1, count):
            if len(images) == self.cfg.views - 1:
                break
            view = views.read_view(asset, (first - step) % count)
            if not self.generator.averages_views or self._turns(view) == self._turns(image):
                images.append(view.rgba)
        return images

    def stored_cells(self, asset: int, image: View) -> Level:
        """Return an asset's stored cells of the first resolution, turned as its mesh will be.

        Raises:
            RunError: If they cannot be read.
        """
        resolution = self.generator.resolutions[0]
        side = resolution // CELL_SIDE
        cells = self.assets.references.cells(asset, resolution)
        xyz = transform_points(cells, side, quarter_turn(self._turns(image))).astype(np.int32)
        coords = torch.from_numpy(np.concatenate([np.zeros((len(xyz), 1), np.int32), xyz], 1))
        return Level.from_coords(coords[token_order(coords)].to(self.generator.device), side, 1)

    def evaluate(
        self,
        asset: int,
        reference: MeshArrays,
        image: View,
        inputs: list[NDArray[np.uint8]],
        cells: Level | None,
        seed: int,
    ) -> _Evaluated:
        """Generate and compare one mesh."""
        cfg, looks, index = self.cfg, self.looks, self.assets.index
        camera = camera_of_meta(image.meta)
        target = self.assets.target(asset)
        empty = GenerationResult(**vars(target), view=image.meta["view"], seed=seed)
        name = target.uid if seed == cfg.seeds[0] else f"{target.uid}-{seed}"
        source = inputs[0] if len(inputs) == 1 else inputs
        try:
            generated = self.generator.generate(
                source, seed, cfg.generation, whole_if_opaque=True, cells=cells
            )
        except RunError as error:
            log.warning("%s: nothing was generated: %s", name, error)
            blank = np.full((PICTURE_SIDE, PICTURE_SIDE, 3), 255, np.uint8)
            if looks is not None:
                looks.add(EMPTY, reference)
                empty = replace(empty, dino_similarity=0.0, dino_similarity_of_asset=0.0)
            images = [shown(image.rgba), blank, draw(reference, camera), blank]
            return _Evaluated(empty, images, None)
        back = quarter_turn(-self._turns(image))
        mesh = turn_directions(generated.vertices, back), generated.faces
        write_mesh(self.folder / f"{name}.glb", *mesh)
        metrics = compare_surfaces(*mesh, *reference, samples=cfg.samples)
        (render,) = render_from(clay_mesh(mesh), [camera], len(image.rgba))
        nearest = self.assets.references.nearest(mesh)
        similarity = similarity_of_asset = None
        if looks is not None:
            looks.add(mesh, reference)
            (reference_render,) = render_from(clay_mesh(reference), [camera], len(image.rgba))
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
        images = [
            shown(image.rgba),
            draw(mesh, camera),
            draw(reference, camera),
            draw(mesh, behind),
        ]
        return _Evaluated(result, images, mesh)


_evaluator_of_process: _Evaluator | None = None  # in a process that evaluates some of the assets


@contextmanager
def _evaluated_assets(
    evaluator: _Evaluator, assets: Sequence[int]
) -> Iterator[Iterator[list[_Evaluated]]]:
    """Yield what `evaluate_asset` returns for each asset, in their order.

    Other processes begin at once if `workers` is above 1. The first asset is evaluated by one
    process alone, so that the others find compiled code on the disk.

    Raises:
        RunError: If one of these processes dies, in the block.
    """
    cfg = evaluator.cfg
    if cfg.workers == 1 or len(assets) < 2:
        yield (evaluator.evaluate_asset(asset) for asset in assets)
        return
    level = logging.getLogger().getEffectiveLevel()
    pool = ProcessPoolExecutor(
        cfg.workers,
        multiprocessing.get_context("spawn"),  # CUDA does not survive a fork
        _open_evaluator,
        (cfg, evaluator.folder, level),
    )
    try:
        first = pool.submit(_evaluate_in_process, assets[0])
        others: Future[list[Future[list[_Evaluated]]]] = Future()

        def submit_others(_first: object) -> None:
            try:
                others.set_result([pool.submit(_evaluate_in_process, a) for a in assets[1:]])
            except RuntimeError as error:  # the pool is broken or closed
                others.set_exception(error)

        first.add_done_callback(submit_others)

        def results() -> Iterator[list[_Evaluated]]:
            yield first.result()
            for future in others.result():
                yield future.result()

        yield results()
    except BrokenProcessPool as error:
        raise RunError(
            "a process that evaluates assets died, see the lines above; lower --workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _open_evaluator(cfg: GenerationEvaluation, folder: Path, level: int) -> None:
    """Open the models and the assets in a process."""
    global _evaluator_of_process
    torch.set_num_threads(1)
    logging.basicConfig(level=level, format="%(message)s")
    assets = _EvaluatedAssets.choose(cfg)
    generator = Generator.load(cfg.checkpoint, choose_device(cfg.device), cfg.generation)
    assets.references.load_candidates(assets.chosen)
    _evaluator_of_process = _Evaluator(cfg, generator, assets, folder, None)


def _evaluate_in_process(asset: int) -> list[_Evaluated]:
    assert _evaluator_of_process is not None
    return _evaluator_of_process.evaluate_asset(asset)


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


def generation_table(summaries: Sequence[Mapping[str, Any]]) -> str:
    """Format summaries of `summarize` and of `summarize_retrieval` as Markdown."""
    found = set().union(*summaries)
    candidates = summaries[0].get("candidates")
    heads = {
        "assets": "assets",
        "empty": "empty",
        "chamfer": "CD x1000",
        **{f"f1_{t}": f"F1({t}) %" for t in THRESHOLDS},
        "normal_consistency": "normals %",
        "iou": "IoU %",
        "silhouette_iou": "silhouette IoU %",
        "nearest_is_right": f"nearest of {candidates} is right %",
        "nearer_than_image": "nearer than image retrieval %",
        "nearer_than_shape": "nearer than the nearest training shape %",
        "closed": "closed %",
        "seconds": "seconds",
    }
    heads_of_looks = {
        "normal_map_distance": "normal-map FD",
        "dino_similarity": "DINOv2 cosine",
        "dino_similarity_of_asset": "DINOv2 cosine of the asset",
    }
    digits = dict.fromkeys(heads, 1) | dict.fromkeys(heads_of_looks, 3)
    heads = {key: head for key, head in (heads | heads_of_looks).items() if key in found}
    return markdown_table(summaries, heads, digits)
