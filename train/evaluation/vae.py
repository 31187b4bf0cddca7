"""Evaluation of an SS-VAE: how far reconstructed surfaces are from the stored ones."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from model.checkpoint import load_model, read_config
from model.inference.extract_mesh import extract_meshes
from model.sparse_tensor import BrickBatch
from model.sparse_vae import SparseVAE
from pipeline.core.devices import choose_device
from pipeline.core.errors import RunError, UserError
from pipeline.core.primitives.marching_cubes import extract
from pipeline.core.primitives.surface_distance import THRESHOLDS, compare_surfaces
from pipeline.core.primitives.voxel_iou import solid_intersection_over_union
from train.data.bricks import (
    UNREADABLE,
    BrickReader,
    BuildIndex,
    built_resolutions,
    read_build_index,
)
from train.data.source import open_source
from train.engine.mesh_pictures import picture
from train.evaluation.config import VAEEvaluation
from train.evaluation.results import (
    PictureSheet,
    SurfaceResult,
    markdown_table,
    summarize_surfaces,
    surface_protocol,
    write_results,
)

log = logging.getLogger(__name__)

# Direct3D-S2 paper (arXiv 2505.17412), table 4. It states neither what was sampled nor in which
# frame.
PAPER = (
    {
        "name": "Direct3D-S2, 512 (paper, protocol unknown)",
        "chamfer": 13.59,
        "f1_0.005": 99.98,
        "f1_0.001": 41.11,
    },
    {
        "name": "Direct3D-S2, 1024 (paper, protocol unknown)",
        "chamfer": 7.91,
        "f1_0.005": 100.0,
        "f1_0.001": 70.19,
    },
)
HEADS = {
    "assets": "assets",
    "empty": "empty",
    "iou": "IoU %",
    "chamfer": "CD x1000",
    **{f"f1_{t}": f"F1({t}) %" for t in THRESHOLDS},
    "normal_consistency": "normals %",
}


@dataclass(frozen=True, kw_only=True)
class Reconstruction(SurfaceResult):
    """How far the reconstruction of one asset at one resolution is from its stored surface.

    Args:
        resolution: Resolution of the bricks that were encoded.
        reference_resolution: Finest stored resolution of the asset, that of the reference.
        tokens: Number of cells.
        accuracy: Mean distance from the reconstruction to the reference.
        completeness: Mean distance from the reference to the reconstruction.
    """

    resolution: int
    reference_resolution: int
    tokens: int
    accuracy: float
    completeness: float


@torch.no_grad()
def evaluate_asset(
    model: nn.Module,
    reader: BrickReader,
    asset: int,
    resolution: int,
    *,
    device: torch.device,
    samples: int,
    draw: bool = False,
) -> tuple[Reconstruction, list[NDArray[np.uint8]]] | None:
    """Encode and decode one asset and compare it with its finest stored surface.

    The latents are the means of the posterior.

    Args:
        model: The SS-VAE, on `device`.
        reader: Reads the bricks. `reader.index.tokens` says which resolutions are stored.
        asset: Row of the build index.
        resolution: Resolution of the bricks that are encoded.
        device: Where the model runs. On a GPU it runs in bf16.
        samples: Number of points that are sampled on each surface.
        draw: Also draw both surfaces.

    Returns:
        The result and, if `draw`, pictures of the stored surface and of the reconstruction. None if
        the stored surface is empty, as it is for parts thinner than the grid.

    Raises:
        RunError: If the bricks cannot be read.
    """
    index = reader.index
    finest = max(r for r, tokens in index.tokens.items() if tokens[asset])
    try:
        reference_bricks = reader.read(asset, finest)
        bricks = reader.read(asset, resolution)
    except UNREADABLE as error:
        raise RunError(
            f"its bricks cannot be read ({error}); run python -m pipeline.verify {index.root}"
        ) from error
    reference = extract(reference_bricks)
    if not len(reference[1]):
        return None
    batch = BrickBatch.collate([bricks]).to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        values, _ = model(batch)
    surface = extract_meshes(batch.cells, values)[0]
    metrics = compare_surfaces(*surface, *reference, samples=samples)
    result = Reconstruction(
        uid=index.uids[asset],
        split="val" if index.is_val[asset] else "train",
        resolution=resolution,
        reference_resolution=finest,
        tokens=len(batch.cells),
        iou=solid_intersection_over_union(values, batch.values, resolution).item(),
        chamfer=metrics.chamfer,
        accuracy=metrics.accuracy,
        completeness=metrics.completeness,
        normal_consistency=metrics.normal_consistency,
        f1=metrics.f1,
    )
    return result, [picture(*reference), picture(*surface)] if draw else []


def reconstruction_table(summaries: Sequence[Mapping[str, Any]]) -> str:
    """Format summaries of `summarize_surfaces` as Markdown, with the paper's numbers below."""
    return markdown_table([*summaries, *PAPER], HEADS, dict.fromkeys(HEADS, 2))


def evaluate_vae(cfg: VAEEvaluation) -> dict[str, Any]:
    """Evaluate every asset of the split at every resolution and write the results.

    Returns:
        The content of evaluation.json.

    Raises:
        UserError: If the checkpoint or the build cannot be used, or the split has no asset.
    """
    device = choose_device(cfg.device)
    model = load_model(cfg.checkpoint, SparseVAE, device=device)
    training = read_config(cfg.checkpoint).get("training", {})
    trained_at = training.get("bricks", {}).get("resolutions", ())
    data = open_source(cfg.data, cfg.cache)
    stored = built_resolutions(data)
    resolutions = (
        cfg.resolutions
        or tuple(r for r in trained_at if r in stored)
        or tuple(trained_at)
        or tuple(stored[:1])
    )
    index = read_build_index(data, sorted({*stored, *resolutions})).split(cfg.split)
    results, pictures = _evaluate_assets(cfg, model, index, resolutions, device)
    if not results:
        raise UserError(f"{cfg.data} has no usable asset in split {cfg.split}; use --split all")

    def group(result: Reconstruction) -> tuple[int, str]:
        return result.resolution, result.split

    summaries = [
        summarize_surfaces(list(members), f"R = {resolution}, {split}")
        for (resolution, split), members in groupby(sorted(results, key=group), group)
    ]
    return write_results(
        cfg.out or cfg.checkpoint.resolve().parent / "evaluation",
        cfg,
        checkpoint=cfg.checkpoint,
        title="Reconstructions of the SS-VAE",
        protocol={**surface_protocol(cfg), "latents": "posterior mean"},
        results=results,
        table=reconstruction_table(summaries),
        sheet=PictureSheet(
            file="reconstructions.png",
            labels=("stored surface", "reconstruction"),
            rows=pictures,
        ),
        summaries=summaries,
        paper=PAPER,
    )


def _evaluate_assets(
    cfg: VAEEvaluation,
    model: nn.Module,
    index: BuildIndex,
    resolutions: Sequence[int],
    device: torch.device,
) -> tuple[list[Reconstruction], list[list[NDArray[np.uint8]]]]:
    reader = BrickReader(index)
    results = []
    pictures = []
    for resolution in resolutions:
        for asset in np.flatnonzero(index.tokens[resolution])[: cfg.limit]:
            draw = len(pictures) < cfg.pictures
            options = {"device": device, "samples": cfg.samples, "draw": draw}
            try:
                evaluated = evaluate_asset(model, reader, int(asset), resolution, **options)
            except RunError as error:
                log.warning("%s is skipped: %s", index.uids[asset], error)
                continue
            if evaluated is None:
                log.warning(
                    "%s is skipped: it has no surface at its finest resolution", index.uids[asset]
                )
                continue
            result, images = evaluated
            results.append(result)
            if draw:
                pictures.append(images)
            log.info(
                "%s at R = %d: IoU %.4f, CD x1000 %.3f",
                result.uid,
                resolution,
                result.iou,
                1000 * result.chamfer,
            )
    return results, pictures
