"""Meshes generated from stored renders against the assets they show: numbers for each, a table, pictures."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from model.config import GenerationOptions
from model.inference.generator import GeneratedMesh, Generator
from model.inference.mesh_export import write_mesh
from model.inference.turntable import CLAY, on_paper
from pipeline.core.cameras import Camera, look_at_origin
from pipeline.core.devices import Device, choose_device
from pipeline.core.errors import RunError, UserError
from pipeline.core.options import CameraSet
from pipeline.core.primitives.marching_cubes import MeshArrays
from pipeline.core.primitives.surface_distance import THRESHOLDS, compare_surfaces
from pipeline.core.primitives.voxel_iou import inside, intersection_over_union
from pipeline.core.schema import Mesh, Part, View
from pipeline.rendering.views import render_from
from train.data.bricks import built_resolutions, read_build_index
from train.data.render_conditions import ViewReader
from train.engine.checkpoint import provenance
from train.engine.mesh_pictures import save_image, side_by_side
from train.evaluation.image_metrics import SIDES, SIZE, DinoFeatures, frechet_distance, normal_maps
from train.evaluation.page import write_page
from train.evaluation.reference_surfaces import References, spread

log = logging.getLogger(__name__)

SIDE = 256  # pixels of a picture


@dataclass(frozen=True, kw_only=True)
class GenerationEvaluation:
    """Generate meshes from stored renders and measure how far they are from the assets on them."""

    checkpoint: Path = Path("runs/export")  # of python -m train.export
    data: Path = Path("data/smoke")  # what python -m pipeline.build made, with renders
    split: Literal["train", "val", "all"] = "train"
    view: int = (
        -1
    )  # of each asset; -1 is the last one, which training leaves out where it holds views out
    cameras: CameraSet = "paper"
    limit: int | None = None  # only N assets, spread over the split
    seed: int = 0
    samples: int = 100_000  # on each surface
    out: Path | None = None  # default: evaluation/ in the checkpoint directory
    device: Device = "auto"
    features: str | None = (
        None  # DINOv2 weights, a folder or a name on the hub: also compare what meshes look like
    )
    options: GenerationOptions = field(default_factory=GenerationOptions)

    def __post_init__(self):
        for name in ("samples", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be 1 or more, got {value}")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One asset; distances in the frame [-1, 1]^3, infinite if nothing was generated."""

    uid: str
    split: str
    view: int
    seconds: float
    tokens: dict[str, int]  # stage -> cells
    faces: int
    closed: bool
    chamfer: float
    normal_consistency: float
    f1: dict[float, float]
    iou: float  # of the solids, on a grid of 64^3
    silhouette_iou: float  # against the image it came from, by the same camera
    nearest: str  # asset of the build whose surface is closest
    nearest_is_right: bool
    dino_similarity: float | None = (
        None  # cosine of the image's and the generated mesh's render's features
    )
    dino_similarity_of_asset: float | None = (
        None  # the same of the asset's stored surface: what a perfect result has
    )


@dataclass(frozen=True)
class _Looks:
    """Normal maps of all assets, generated and stored, as features."""

    features: DinoFeatures
    generated: list[NDArray[np.float64]] = field(default_factory=list)  # [SIDES, C] of each asset
    stored: list[NDArray[np.float64]] = field(default_factory=list)

    def add(self, made: MeshArrays, reference: MeshArrays) -> None:
        self.generated.append(self.features(normal_maps(*made)))
        self.stored.append(self.features(normal_maps(*reference)))

    def distance(self) -> float:
        return frechet_distance(np.concatenate(self.generated), np.concatenate(self.stored))


def evaluate_generation(cfg: GenerationEvaluation) -> dict[str, Any]:
    """Every chosen asset; writes numbers, a table, a page, meshes and pictures to cfg.out. UserError, RunError."""
    index = read_build_index(cfg.data, built_resolutions(cfg.data))
    references, views = References(index), ViewReader(index, cfg.cameras)
    chosen = [
        n
        for n in references.assets
        if cfg.split == "all" or index.is_val[n] == (cfg.split == "val")
    ]
    if not chosen:
        raise UserError(
            f"{cfg.data} has no asset in split {cfg.split} to evaluate; choose --split all"
        )
    chosen = spread(chosen, cfg.limit or len(chosen))
    count = len(chosen)
    references.compare_with(chosen)
    chosen = [asset for asset in chosen if asset in references.trees]
    generator = Generator.load(cfg.checkpoint, choose_device(cfg.device), cfg.options.resolution)
    out = cfg.out or cfg.checkpoint / "evaluation"
    (out / "meshes").mkdir(parents=True, exist_ok=True)
    looks = (
        _Looks(DinoFeatures.load(cfg.features, choose_device(cfg.device))) if cfg.features else None
    )
    rows, pictures = [], []
    for asset in chosen:
        try:
            reference = references.surface(asset)
            image = views.read_view(asset, _view_of(cfg, views.views(asset)))
        except RunError as error:
            log.warning("%s is left out: %s", index.uids[asset], error)
            continue
        row, images = _evaluate(
            cfg, generator, references, asset, reference, image, out / "meshes", looks
        )
        rows.append(row)
        pictures.append(images)
        right = "right" if row.nearest_is_right else "wrong"
        log.info("%s CD %.1f IoU %.3f silhouette %.3f nearest %s", row.uid, 1000 * row.chamfer, row.iou,
                 row.silhouette_iou, right)  # fmt: skip
    if not rows:
        raise RunError(
            f"none of {count} assets of {cfg.data} can be read; run python -m pipeline.verify {cfg.data}"
        )
    summary = summarize(rows, f"{cfg.split} assets, view {cfg.view}", len(references.trees))
    if looks is not None:
        summary["normal_map_distance"] = looks.distance()
    result = {
        "checkpoint": str(cfg.checkpoint.resolve()),
        "data": str(cfg.data),
        "protocol": {
            "frame": "[-1, 1]^3",
            "distance": "point to surface, unsquared, both ways; chamfer is the mean of both",
            "samples": cfg.samples,
            "reference": "marching cubes of the finest stored SDF",
            "seed": cfg.seed,
            "sampling": generator.describe_sampling(cfg.options),
            "image_encoder": generator.structure.flow.encoder.label,
            "looks": _protocol_of_looks(cfg.features),
        },
        **provenance(),
        "summary": summary,
        "rows": [
            {**asdict(row), "f1": {str(t): value for t, value in row.f1.items()}} for row in rows
        ],
    }
    (out / "evaluation.json").write_text(
        json.dumps(result, indent=1).replace("Infinity", "null") + "\n"
    )
    (out / "table.md").write_text(table(summary) + "\n")
    for row, images in zip(rows, pictures, strict=True):
        save_image(out / "meshes" / f"{row.uid}.png", side_by_side([images]))
    save_image(out / "generated.png", side_by_side(pictures))
    write_page(
        out,
        "Meshes generated from images",
        result["protocol"],
        table(summary),
        {
            "generated.png": "Image, generated mesh, stored surface, by the same camera; generated mesh from behind",
        },
    )
    for line in table(summary).splitlines():
        log.info("%s", line)
    log.info(
        "%s: evaluation.json, table.md, generated.png (image, generated, asset, generated from behind)",
        out,
    )
    return result


def _protocol_of_looks(weights: str | None) -> str | None:
    """What the numbers about looks mean."""
    if weights is None:
        return None
    return (
        f"class token of {weights} at {SIZE} px; normal-map distance: Frechet distance (the FID's formula, with these "
        f"features in place of Inception's) of {SIDES} normal maps an asset, generated against stored, larger for "
        "fewer assets; similarity: cosine of the image and a clay render by the same camera, both cropped to the "
        "foreground"
    )


def _view_of(cfg: GenerationEvaluation, count: int) -> int:
    """Which of `count` views is taken. UserError if there is no such view."""
    if not -count <= cfg.view < count:
        raise UserError(
            f"--view must be from {-count} to {count - 1} for the {count} views there are, got {cfg.view}"
        )
    return cfg.view % count


def _evaluate(
    cfg: GenerationEvaluation,
    generator: Generator,
    references: References,
    asset: int,
    reference: MeshArrays,
    image: View,
    folder: Path,
    looks: _Looks | None,
) -> tuple[Row, list[NDArray[np.uint8]]]:
    index = references.index
    uid, view = index.uids[asset], image.meta["view"]
    eye = look_at_origin(
        *(image.meta[name] for name in ("azimuth_degrees", "elevation_degrees", "focal_mm"))
    )
    empty = Row(
        uid=uid, split="val" if index.is_val[asset] else "train", view=view, seconds=0.0, tokens={}, faces=0,
        closed=False, chamfer=float("inf"), normal_consistency=0.0, f1=dict.fromkeys(THRESHOLDS, 0.0), iou=0.0,
        silhouette_iou=0.0, nearest="", nearest_is_right=False,
    )  # fmt: skip
    try:
        made = generator.generate(image.rgba, cfg.seed, cfg.options, whole_if_opaque=True)
    except RunError as error:
        log.warning("%s: %s", uid, error)
        blank = np.full((SIDE, SIDE, 3), 255, np.uint8)
        if looks is not None:
            looks.add((np.zeros((0, 3)), np.zeros((0, 3), np.int32)), reference)
            empty = replace(empty, dino_similarity=0.0, dino_similarity_of_asset=0.0)
        return empty, [_shown(image.rgba), blank, drawn(reference, [eye])[0], blank]
    write_mesh(folder / f"{uid}.glb", made.vertices, made.faces)
    surface = made.vertices, made.faces
    metrics = compare_surfaces(*surface, *reference, samples=cfg.samples)
    (same,) = render_from(_mesh(surface), [eye], len(image.rgba))
    nearest = references.nearest(surface)
    similarity, best = None, None
    if looks is not None:
        looks.add(surface, reference)
        (right,) = render_from(_mesh(reference), [eye], len(image.rgba))
        similarity, best = (looks.features.similarity(image.rgba, other) for other in (same, right))
    row = replace(
        empty,
        seconds=sum(stage.seconds for stage in made.stages),
        tokens=_tokens(made),
        faces=len(made.faces),
        closed=made.open_edges == 0,
        chamfer=metrics.chamfer,
        normal_consistency=metrics.normal_consistency,
        f1=metrics.f1,
        iou=intersection_over_union(inside(*surface), inside(*reference)),
        silhouette_iou=intersection_over_union(same[..., 3] > 127, image.rgba[..., 3] > 127),
        nearest=index.uids[nearest],
        nearest_is_right=nearest == asset,
        dino_similarity=similarity,
        dino_similarity_of_asset=best,
    )
    behind = look_at_origin(eye.azimuth_degrees + 180, eye.elevation_degrees, eye.focal_mm)
    return row, [
        _shown(image.rgba),
        *drawn(surface, [eye]),
        *drawn(reference, [eye]),
        *drawn(surface, [behind]),
    ]


def _tokens(made: GeneratedMesh) -> dict[str, int]:
    return {stage.name: stage.tokens for stage in made.stages}


def _mesh(surface: MeshArrays) -> Mesh:
    vertices, faces = surface
    part = Part(vertices=slice(0, len(vertices)), faces=slice(0, len(faces)), material=CLAY)
    return Mesh(vertices=vertices, faces=faces, parts=(part,))


def drawn(surface: MeshArrays, eyes: Sequence[Camera]) -> list[NDArray[np.uint8]]:
    """RGB [SIDE, SIDE, 3] of a surface from each camera. RunError without EGL."""
    return [on_paper(rgba) for rgba in render_from(_mesh(surface), eyes, SIDE)]


def _shown(rgba: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A stored render at the pictures' size, by the nearest pixel."""
    rows, columns = (np.arange(SIDE) * side // SIDE for side in rgba.shape[:2])
    return on_paper(rgba[rows][:, columns])


def summarize(rows: Sequence[Row], name: str, candidates: int) -> dict[str, Any]:
    """Means over assets, as displayed: distances x 1000, shares in percent.

    Where nothing was generated an asset counts as 0 but has no distance, so that the number of those stands beside it.
    """
    there = [row for row in rows if np.isfinite(row.chamfer)]
    with_looks = all(row.dino_similarity is not None for row in rows)
    percent = {
        field: 100 * float(np.mean([getattr(row, field) for row in rows])) for field in _SHARES
    }
    return {
        "name": name,
        "assets": len(rows),
        "empty": len(rows) - len(there),
        "candidates": candidates,
        "chamfer": 1000 * float(np.mean([row.chamfer for row in there])) if there else None,
        **{f"f1_{t}": 100 * float(np.mean([row.f1[t] for row in rows])) for t in THRESHOLDS},
        **percent,
        "seconds": float(np.mean([row.seconds for row in rows])),
        **{
            name: float(np.mean([getattr(row, name) for row in rows]))
            for name in _LOOKS
            if with_looks
        },
    }


_SHARES = ("normal_consistency", "iou", "silhouette_iou", "nearest_is_right", "closed")
_LOOKS = ("dino_similarity", "dino_similarity_of_asset")


def table(summary: dict[str, Any]) -> str:
    """Markdown."""
    heads = {
        "assets": "assets", "empty": "empty", "chamfer": "CD x1000", **{f"f1_{t}": f"F1({t}) %" for t in THRESHOLDS},
        "normal_consistency": "NC %", "iou": "IoU %", "silhouette_iou": "silhouette IoU %",
        "nearest_is_right": f"nearest of {summary['candidates']} is right %", "closed": "closed %", "seconds": "s each",
    }  # fmt: skip
    cells = [summary[name] for name in heads]
    words = [
        "" if cell is None else f"{cell:.1f}" if isinstance(cell, float) else str(cell)
        for cell in cells
    ]
    looks = {
        "normal_map_distance": "normal-map FD", "dino_similarity": "DINOv2 cosine",
        "dino_similarity_of_asset": "DINOv2 cosine of the asset",
    }  # fmt: skip
    heads |= {name: head for name, head in looks.items() if name in summary}
    words += [f"{summary[name]:.3f}" for name in looks if name in summary]
    lines = ["| | " + " | ".join(heads.values()) + " |", "|---" * (len(heads) + 1) + "|"]
    return "\n".join([*lines, f"| {summary['name']} | " + " | ".join(words) + " |"])
