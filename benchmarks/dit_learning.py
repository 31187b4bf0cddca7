"""Whether the stages learn: VAE, DiT and structure on a build's meshes, then shapes from views never shown."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from model.checkpoint import load_model
from model.conditioning.image_conditioned_dit import ConditionedDiT
from model.config import GenerationOptions, Guidance
from model.inference.extract_mesh import extract_meshes
from model.inference.generator import Generator
from pipeline.core.errors import RunError
from pipeline.core.primitives.marching_cubes import extract
from pipeline.core.primitives.surface_distance import EMPTY_METRICS, SampledSurface, SurfaceMetrics
from pipeline.core.primitives.voxel_iou import inside, intersection_over_union
from train.data.bricks import BrickReader, read_build_index
from train.data.render_conditions import ViewReader
from train.engine.batch_sampler import SampleId
from train.engine.distributed import World
from train.engine.mesh_pictures import picture, save_image, side_by_side
from train.stages.config import ExportConfig
from train.stages.dit.config import DIT_PRESETS, DiTTraining
from train.stages.dit.data import DiTLoader, index_with_latents
from train.stages.dit.run import read_latents, train_dit
from train.stages.dit.task import on_white
from train.stages.export import export
from train.stages.structure.config import STRUCTURE_PRESETS
from train.stages.structure.run import train_structure
from train.stages.vae.config import VAE_PRESETS, BrickConfig, EncodeConfig
from train.stages.vae.encode import encode
from train.stages.vae.run import train_vae

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Learn:
    """VAE, latents, DiT and structure stage on a build, one after another; then meshes from views never shown."""

    data: Path
    out: Path
    resolution: int = 256
    vae_minutes: float = 0.7
    dit_minutes: float = 1.3
    structure_minutes: tuple[float, float] = (
        0.3,
        0.8,
    )  # of the occupancy VAE and the flow; 0: leave the stage out
    batch_size: int = 8  # of the DiT: with few assets, more steps are worth more
    learning_rate: float = 1e-3  # of the DiT
    held_out_views: int = 2
    given_cells: bool = True  # also judge the DiT alone, on the assets' own cells
    samples: int = 50_000  # on each surface
    guidance: float = 3.0


def learn(cfg: Learn, device: torch.device) -> dict[str, Any]:
    """Everything on the build's training assets, then samples from their last views."""
    world, runs, R = World(device=device), cfg.out / "runs", cfg.resolution
    endless = {
        "steps": 1_000_000,
        "schedule": "constant",
        "checkpoint_every": 1_000_000,
        "validate_every": 0,
    }
    endless |= {"sample_every": 0, "log_every": 100, "warmup_steps": 50, "ema_decay": 0.99}
    seconds: dict[str, float] = {}
    began = time.monotonic()

    def lap(name: str) -> None:
        nonlocal began
        seconds[name], began = time.monotonic() - began, time.monotonic()

    vae = VAE_PRESETS["small"]
    vae = replace(
        vae, data=cfg.data, out=runs / "vae",
        bricks=BrickConfig(resolutions=(R,), symmetries=False, workers=8),
        loop=replace(vae.loop, **endless, optimizer="muon", learning_rate=1e-3, max_minutes=cfg.vae_minutes),
    )  # fmt: skip
    train_vae(vae, world)
    lap("vae")
    latents = runs / "latents"
    encode(
        EncodeConfig(vae=vae.out / "latest", data=cfg.data, resolutions=(R,), latents=latents),
        world,
    )
    lap("encode")
    small = DIT_PRESETS["small"]
    dit = replace(
        small, data=cfg.data, latents=latents, vae=vae.out / "latest", out=runs / "dit", resolution=R, workers=4,
        held_out_views=cfg.held_out_views,
        flow=replace(
            small.flow, augment=False, batch_size=cfg.batch_size,
            loop=replace(
                small.flow.loop, **endless, learning_rate=cfg.learning_rate, max_minutes=cfg.dit_minutes
            ),
        ),
    )  # fmt: skip
    train_dit(dit, world)
    lap("dit")
    result: dict[str, Any] = {"loops": loops(runs)}
    if cfg.given_cells:
        result["given_cells"] = on_given_cells(cfg, dit, world)
        lap("given_cells")
    if all(cfg.structure_minutes):
        start = STRUCTURE_PRESETS["small"]
        structure = replace(
            start, data=cfg.data, out=runs / "structure", resolution=R, workers=4, held_out_views=cfg.held_out_views,
            vae=replace(
                start.vae, symmetries=False,
                loop=replace(start.vae.loop, **endless, max_minutes=cfg.structure_minutes[0]),
            ),
            flow=replace(
                start.flow, augment=False,
                loop=replace(start.flow.loop, **endless, max_minutes=cfg.structure_minutes[1]),
            ),
        )  # fmt: skip
        train_structure(structure, world)
        lap("structure")
        stages = ExportConfig(
            vae=vae.out / "latest", structure=structure.out / "flow" / "latest", dit=(dit.out / "latest",),
            out=runs / "export",
        )  # fmt: skip
        export(stages)
        result |= {
            "generated": from_images(cfg, dit, runs / "export", device),
            "loops": loops(runs),
        }
        lap("generated")
    return {**result, "seconds": seconds}


def loops(runs: Path) -> dict[str, Any]:
    """What each training run's metrics say."""
    found = {}
    for path in sorted(runs.rglob("metrics.jsonl")):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        lines = [line for line in lines if "loss" in line and "event" not in line]
        total = sum(line["seconds"] for line in lines)
        found[str(path.parent.relative_to(runs))] = {
            "steps": len(lines),
            "loss": [
                float(np.mean([line["loss"] for line in part]))
                for part in (lines[:20], lines[-100:])
            ],
            "ms": 1000 * median(line["seconds"] for line in lines),
            "tokens_per_s": median(line["tokens_per_s"] for line in lines),
            "samples": median(line["samples"] for line in lines),
            "data_share": sum(line["data_s"] for line in lines) / total,
            "skipped": lines[-1]["skipped"],
        }
    return found


@dataclass
class Judge:
    """Distances of generated meshes to all assets of a build."""

    cfg: Learn
    uids: Sequence[str]
    right: list[Any]
    rows: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.surfaces = [
            SampledSurface(*mesh, samples=self.cfg.samples, seed=1) for mesh in self.right
        ]

    def distances(self, mesh: Any, assets: Sequence[int]) -> list[SurfaceMetrics]:
        """Of a mesh to some of the assets."""
        if not len(mesh[1]):
            return [EMPTY_METRICS for _ in assets]
        surface = SampledSurface(*mesh, samples=self.cfg.samples)
        return [surface.compare(self.surfaces[asset]) for asset in assets]

    def add(self, asset: int, mesh: Any, **more: Any) -> None:
        metrics = self.distances(mesh, range(len(self.right)))
        nearest = int(np.argmin([found.chamfer for found in metrics]))
        mine = metrics[asset]
        self.rows.append(
            {
                "uid": self.uids[asset],
                "chamfer_x1000": 1000 * mine.chamfer,
                **{f"f1_{t}": 100 * value for t, value in mine.f1.items()},
                "nearest_is_right": nearest == asset and bool(np.isfinite(mine.chamfer)),
                "next_chamfer_x1000": 1000 * sorted(found.chamfer for found in metrics)[1],
                **more,
            }
        )
        log.info("%s", self.rows[-1])

    def summary(self) -> dict[str, Any]:
        there = [row for row in self.rows if np.isfinite(row["chamfer_x1000"])]
        numbers = [name for name, value in self.rows[0].items() if isinstance(value, float)]
        means = {
            name: float(np.mean([row[name] for row in there])) if there else None
            for name in numbers
        }
        right = sum(row["nearest_is_right"] for row in self.rows)
        return {
            "assets": len(self.rows),
            "empty": len(self.rows) - len(there),
            "nearest_is_right": right,
            "mean": means,
            "rows": self.rows,
        }


def judge_of(cfg: Learn) -> Judge:
    reader = BrickReader(read_build_index(cfg.data, [cfg.resolution]))
    assets = range(len(reader.index))
    return Judge(
        cfg,
        reader.index.uids,
        [extract(reader.read(asset, cfg.resolution)) for asset in assets],
    )


@torch.no_grad()
def on_given_cells(cfg: Learn, run: DiTTraining, world: World) -> dict[str, Any]:
    """The DiT alone: an asset's own cells, a view of it that was never shown, and the same under a wrong image."""
    vae, store = read_latents(run, world)
    assert vae is not None
    index, judge, rows = index_with_latents(run, store), judge_of(cfg), []
    model = load_model(run.out / "latest", ConditionedDiT, device=world.device)
    loader = DiTLoader(index, store, run, training=False, held_out_only=True)
    bricks = BrickReader(read_build_index(cfg.data, [cfg.resolution]))
    for asset, uid in enumerate(index.uids):
        place = bricks.index.uids.index(uid)
        batch = loader.batch([SampleId(asset, 0)], 1.0).to(world.device)
        wrong = loader.batch([SampleId((asset + 1) % len(index), 0)], 1.0).to(world.device)
        level, meshes = batch.latents.cells, []
        with torch.autocast("cuda", torch.bfloat16, enabled=world.device.type == "cuda"):
            stored = vae.decode(batch.latents.mean, level)
            values = [
                vae.decode(
                    model.generate(
                        level,
                        model.encode_images(images),
                        [0],
                        steps=25,
                        guidance=Guidance(scale=cfg.guidance),
                    ),
                    level,
                )
                for images in (batch.images, wrong.images)
            ]
        meshes = [extract_meshes(level, x)[0] for x in (*values, stored)]
        metrics = [judge.distances(mesh, [place])[0] for mesh in meshes[1:]]
        judge.add(
            place, meshes[0], iou=100 * float(intersection_over_union(values[0] < 0, stored < 0)),
            wrong_image_iou=100 * float(intersection_over_union(values[1] < 0, stored < 0)),
            wrong_image_chamfer_x1000=1000 * metrics[0].chamfer, vae_chamfer_x1000=1000 * metrics[1].chamfer,
        )  # fmt: skip
        view = loader.conditions.views.read_view(asset, loader.conditions.view_of(asset, 0))
        axes = np.array(view.meta["c2w"])[:3, :3].T
        shown = (meshes[0], meshes[1], judge.right[place])
        rows.append(
            [on_white(view.rgba, 256), *(picture(*mesh, size=256, view=axes) for mesh in shown)]
        )
    half = len(rows) // 2
    pairs = [[*left, *right] for left, right in zip(rows[:half], rows[half:], strict=False)]
    save_image(cfg.out / "given_cells.png", side_by_side(pairs))
    return judge.summary()


def from_images(cfg: Learn, run: DiTTraining, stages: Path, device: torch.device) -> dict[str, Any]:
    """Every stage: from the last view of each asset, which training never saw, to a mesh."""
    generator, judge = Generator.load(stages, device), judge_of(cfg)
    index, rows = read_build_index(cfg.data, [cfg.resolution]), []
    views = ViewReader(index, run.cameras)
    options = GenerationOptions(steps=(25, 25), guidance=cfg.guidance)
    for asset in range(len(index)):
        view = views.read_view(asset, views.views(asset) - 1)
        axes = np.array(view.meta["c2w"])[:3, :3].T
        try:
            made = generator.generate(view.rgba, 0, options, whole_if_opaque=True)
            mesh, tokens = (made.vertices, made.faces), made.stages[-1].tokens
        except RunError as error:
            log.warning("%s: %s", index.uids[asset], error)
            mesh, tokens = (np.zeros((0, 3)), np.zeros((0, 3), np.int32)), 0
        right = judge.right[asset]
        iou = intersection_over_union(inside(*mesh), inside(*right)) if len(mesh[1]) else 0.0
        judge.add(asset, mesh, iou=100 * float(iou), cells=tokens)
        rows.append(
            [on_white(view.rgba, 256), *(picture(*x, size=256, view=axes) for x in (mesh, right))]
        )
    half = len(rows) // 2
    pairs = [[*left, *other] for left, other in zip(rows[:half], rows[half:], strict=False)]
    save_image(cfg.out / "generated.png", side_by_side(pairs))
    return judge.summary()
