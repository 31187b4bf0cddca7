"""Reconstructions of an SS-VAE against the stored surfaces: numbers for each asset, a table, pictures."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from model.checkpoint import load_model, read_config
from model.inference.extract_mesh import extract_meshes
from model.sparse_tensor import BrickBatch
from model.sparse_vae import SparseVAE
from pipeline.core.devices import Device, choose_device
from pipeline.core.errors import RunError, UserError
from pipeline.core.primitives.marching_cubes import extract
from pipeline.core.primitives.surface_distance import THRESHOLDS, compare_surfaces
from pipeline.core.primitives.voxel_iou import intersection_over_union
from train.data.bricks import (
    UNREADABLE,
    BrickReader,
    BuildIndex,
    built_resolutions,
    read_build_index,
)
from train.engine.checkpoint import provenance
from train.engine.mesh_pictures import picture, save_image, side_by_side
from train.evaluation.page import write_page

log = logging.getLogger(__name__)

# paper, table 4; what was sampled, and in which frame, it does not say
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


@dataclass(frozen=True, kw_only=True)
class VAEEvaluation:
    """Reconstruct assets with a trained SS-VAE and measure how far the surfaces are from the stored ones."""

    checkpoint: Path = Path("runs/vae-tiny/latest")  # of python -m train.vae, or an exported model
    data: Path = Path("data/smoke")  # what python -m pipeline.build made
    split: Literal["val", "train", "all"] = "val"
    resolutions: tuple[int, ...] = ()  # default: those the checkpoint was trained at
    limit: int | None = None  # only the first N assets
    samples: int = 1_000_000  # on each surface
    pictures: int = 8  # assets that are drawn, reference beside reconstruction
    out: Path | None = None  # default: evaluation/ beside the checkpoint
    device: Device = "auto"

    def __post_init__(self):
        for name, least in (("samples", 1), ("limit", 1), ("pictures", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be {least} or more, got {value}")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One asset at one resolution; distances in the frame [-1, 1]^3, infinite if the reconstruction is empty."""

    uid: str
    split: str
    resolution: int
    reference_resolution: int
    tokens: int
    iou: float  # of the points inside, over all stored points
    chamfer: float
    accuracy: float
    completeness: float
    normal_consistency: float
    f1: dict[float, float] = field(default_factory=dict)


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
) -> tuple[Row, list[NDArray[np.uint8]]] | None:
    """One asset through the VAE (latents at their means), against the surface at its finest stored resolution.

    `reader.index.tokens` says which resolutions are stored. With `draw` also [reference, reconstruction] as images.
    None if the reference has no surface at all (parts thinner than its grid). RunError if it cannot be read.
    """
    index = reader.index
    finest = max(r for r, tokens in index.tokens.items() if tokens[asset])
    try:
        stored, bricks = reader.read(asset, finest), reader.read(asset, resolution)
    except UNREADABLE as error:
        raise RunError(
            f"its bricks cannot be read ({error}); run python -m pipeline.verify {index.root}"
        ) from error
    reference = extract(stored)
    if not len(reference[1]):
        return None
    batch = BrickBatch.collate([bricks]).to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        values, _ = model(batch)
    surface = extract_meshes(batch.cells, values)[0]
    metrics = compare_surfaces(*surface, *reference, samples=samples)
    row = Row(
        uid=index.uids[asset],
        split="val" if index.is_val[asset] else "train",
        resolution=resolution,
        reference_resolution=finest,
        tokens=len(batch.cells),
        iou=intersection_over_union(values < 0, batch.values < 0).item(),
        chamfer=metrics.chamfer,
        accuracy=metrics.accuracy,
        completeness=metrics.completeness,
        normal_consistency=metrics.normal_consistency,
        f1=metrics.f1,
    )
    return row, [picture(*reference), picture(*surface)] if draw else []


def summarize(rows: Sequence[Row], name: str) -> dict[str, Any]:
    """Means over assets, as displayed: distances x 1000, shares in percent.

    Empty reconstructions count as 0 but have no distance, so that their number stands beside it.
    """
    there = [row for row in rows if np.isfinite(row.chamfer)]
    return {
        "name": name,
        "assets": len(rows),
        "empty": len(rows) - len(there),
        "iou": 100 * float(np.mean([row.iou for row in rows])),
        "chamfer": 1000 * float(np.mean([row.chamfer for row in there])) if there else None,
        **{f"f1_{t}": 100 * float(np.mean([row.f1[t] for row in rows])) for t in THRESHOLDS},
        "normal_consistency": 100 * float(np.mean([row.normal_consistency for row in rows])),
    }


def table(summaries: Sequence[dict[str, Any]]) -> str:
    """Markdown, the paper's rows last."""
    columns = (
        "assets",
        "empty",
        "iou",
        "chamfer",
        *(f"f1_{t}" for t in THRESHOLDS),
        "normal_consistency",
    )
    heads = ("assets", "empty", "IoU %", "CD x1000", *(f"F1({t}) %" for t in THRESHOLDS), "NC %")
    lines = ["| | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for summary in (*summaries, *PAPER):
        cells = [summary.get(column) for column in columns]
        words = [
            "" if cell is None else f"{cell:.2f}" if isinstance(cell, float) else str(cell)
            for cell in cells
        ]
        lines.append(f"| {summary['name']} | " + " | ".join(words) + " |")
    return "\n".join(lines)


def evaluate_vae(cfg: VAEEvaluation) -> dict[str, Any]:
    """Every asset of the split at every resolution; writes numbers, a table, a page and pictures to cfg.out."""
    device = choose_device(cfg.device)
    model = load_model(cfg.checkpoint, SparseVAE, device=device)
    trained = tuple(
        read_config(cfg.checkpoint).get("training", {}).get("bricks", {}).get("resolutions", ())
    )
    stored = built_resolutions(cfg.data)
    wanted = (
        cfg.resolutions or tuple(r for r in trained if r in stored) or trained or tuple(stored[:1])
    )
    index = read_build_index(cfg.data, sorted({*stored, *wanted})).split(cfg.split)
    rows, images = _rows(cfg, model, index, wanted, device)
    if not rows:
        raise UserError(
            f"{cfg.data} has no asset in split {cfg.split} to evaluate; choose --split all"
        )
    groups = groupby(
        sorted(rows, key=lambda row: (row.resolution, row.split)),
        lambda row: (row.resolution, row.split),
    )
    summaries = [summarize(list(group), f"R = {key[0]}, {key[1]}") for key, group in groups]
    result = {
        "checkpoint": str(cfg.checkpoint.resolve()),
        "data": str(cfg.data),
        "protocol": {
            "frame": "[-1, 1]^3",
            "distance": "point to surface, unsquared, both ways; chamfer is the mean of both",
            "samples": cfg.samples,
            "reference": "marching cubes of the finest stored SDF",
            "latents": "posterior mean",
        },
        **provenance(),
        "summaries": summaries,
        "paper": PAPER,
        "rows": [
            {**asdict(row), "f1": {str(t): value for t, value in row.f1.items()}} for row in rows
        ],
    }
    out = cfg.out or cfg.checkpoint.resolve().parent / "evaluation"
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, indent=1).replace("Infinity", "null")  # of an empty reconstruction
    (out / "evaluation.json").write_text(text + "\n")
    (out / "table.md").write_text(table(summaries) + "\n")
    if images:
        save_image(out / "reconstructions.png", side_by_side(images))
    caption = {"reconstructions.png": "Stored surface, reconstruction"} if images else {}
    write_page(
        out, "Surfaces through the SS-VAE and back", result["protocol"], table(summaries), caption
    )
    for line in table(summaries).splitlines():
        log.info("%s", line)
    log.info(
        "%s: evaluation.json, table.md%s",
        out,
        ", reconstructions.png (reference left)" if images else "",
    )
    return result


def _rows(
    cfg: VAEEvaluation,
    model: nn.Module,
    index: BuildIndex,
    resolutions: Sequence[int],
    device: torch.device,
) -> tuple[list[Row], list[list[NDArray[np.uint8]]]]:
    reader, rows, images = BrickReader(index), [], []
    for resolution in resolutions:
        for asset in np.flatnonzero(index.tokens[resolution])[: cfg.limit]:
            draw = len(images) < cfg.pictures
            options = {"device": device, "samples": cfg.samples, "draw": draw}
            try:
                found = evaluate_asset(model, reader, int(asset), resolution, **options)
            except RunError as error:
                log.warning("%s left out: %s", index.uids[asset], error)
                continue
            if found is None:
                log.warning(
                    "%s has no surface at its finest resolution, left out", index.uids[asset]
                )
                continue
            row, drawn = found
            rows.append(row)
            images += [drawn] if draw else []
            log.info("%s R=%d IoU %.4f CD %.3f", row.uid, resolution, row.iou, 1000 * row.chamfer)
    return rows, images
