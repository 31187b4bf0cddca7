"""Training of all stages for minutes, and metrics of meshes generated from held-out views."""

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
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.dit_config import LearnConfig
from benchmarks.gpu import limited
from model.checkpoint import load_model
from model.conditioning.image_conditioned_dit import ConditionedDiT
from model.conditioning.image_encoder import ImageBatch
from model.config import GenerationOptions, Guidance, SamplingOptions
from model.inference.extract_mesh import extract_meshes
from model.inference.generator import Generator
from model.sparse_tensor import Level
from pipeline.core.errors import RunError
from pipeline.core.primitives.marching_cubes import MeshArrays, extract
from pipeline.core.primitives.surface_distance import EMPTY_METRICS, SampledSurface, SurfaceMetrics
from pipeline.core.primitives.voxel_iou import inside, intersection_over_union
from pipeline.core.schema import View
from train.data.bricks import BrickReader, read_build_index
from train.data.render_conditions import ViewReader
from train.engine.batch_sampler import SampleId
from train.engine.distributed import World
from train.engine.mesh_pictures import picture, save_image, side_by_side
from train.stages.config import ExportConfig
from train.stages.dit.config import DIT_PRESETS, DiTTraining
from train.stages.dit.data import DiTLoader, index_with_latents
from train.stages.dit.run import read_latents, train_dit
from train.stages.dit.task import camera_axes, on_white
from train.stages.export import export
from train.stages.structure.config import STRUCTURE_PRESETS, StructureTraining
from train.stages.structure.run import train_structure
from train.stages.vae.config import VAE_PRESETS, BrickConfig, EncodeConfig, VAETraining
from train.stages.vae.encode import encode
from train.stages.vae.run import train_vae

log = logging.getLogger(__name__)

STEPS = 25  # sampling steps of each stage
LOOP: dict[str, Any] = {"warmup_steps": 50, "log_every": 100}
PICTURE_SIDE = 256  # pixels


def learn(cfg: LearnConfig, device: torch.device) -> dict[str, Any]:
    """Train the stages one after another, and generate meshes from views that were held out.

    Returns:
        What the runs logged, metrics of the generated meshes, and the seconds of each part.
    """
    world = World(device=device)
    runs = cfg.out / "runs"
    seconds: dict[str, float] = {}
    started = time.monotonic()

    def note_seconds(part: str) -> None:
        nonlocal started
        seconds[part] = time.monotonic() - started
        started = time.monotonic()

    vae, dit = vae_and_dit_configs(cfg, runs)
    train_vae(vae, world)
    note_seconds("vae")
    encode(
        EncodeConfig(
            vae=vae.out / "latest",
            data=cfg.data,
            resolutions=(cfg.resolution,),
            latents=runs / "latents",
        ),
        world,
    )
    note_seconds("encode")
    train_dit(dit, world)
    note_seconds("dit")
    result: dict[str, Any] = {"loops": run_summaries(runs)}
    if cfg.given_cells:
        result["given_cells"] = generate_on_stored_cells(cfg, dit, world)
        note_seconds("given_cells")
    if all(cfg.structure_minutes):
        structure = structure_config(cfg, runs)
        # One part at a time: "both" would not start the flow before all steps of the VAE are done.
        train_structure(replace(structure, part="vae"), world)
        train_structure(replace(structure, part="flow"), world)
        note_seconds("structure")
        export(
            ExportConfig(
                vae=(vae.out / "latest",),
                structure=structure.out / "flow" / "latest",
                dit=(dit.out / "latest",),
                out=runs / "export",
            )
        )
        result["generated"] = generate_from_images(cfg, dit, runs / "export", device)
        result["loops"] = run_summaries(runs)
        note_seconds("generated")
    return {**result, "seconds": seconds}


def vae_and_dit_configs(cfg: LearnConfig, runs: Path) -> tuple[VAETraining, DiTTraining]:
    """Return the options of two training runs, which end after their minutes."""
    start = VAE_PRESETS["small"]
    vae_loop = replace(start.loop, optimizer="muon", learning_rate=1e-3)
    vae = replace(
        start,
        data=cfg.data,
        out=runs / "vae",
        bricks=BrickConfig(resolutions=(cfg.resolution,), symmetries=False, workers=8),
        loop=limited(vae_loop, cfg.vae_minutes, **LOOP),
    )
    start = DIT_PRESETS["small"]
    dit_loop = replace(start.flow.loop, learning_rate=cfg.learning_rate)
    dit = replace(
        start,
        **_common_options(cfg),
        out=runs / "dit",
        latents=runs / "latents",
        vae=vae.out / "latest",
        flow=replace(
            start.flow,
            augment=False,
            batch_size=cfg.batch_size,
            loop=limited(dit_loop, cfg.dit_minutes, **LOOP),
        ),
    )
    return vae, dit


def structure_config(cfg: LearnConfig, runs: Path) -> StructureTraining:
    """Return the options of the structure stage, whose parts end after their minutes."""
    start = STRUCTURE_PRESETS["small"]
    vae_minutes, flow_minutes = cfg.structure_minutes
    vae_loop = limited(start.vae.loop, vae_minutes, **LOOP)
    flow_loop = limited(start.flow.loop, flow_minutes, **LOOP)
    return replace(
        start,
        **_common_options(cfg),
        out=runs / "structure",
        vae=replace(start.vae, symmetries=False, loop=vae_loop),
        flow=replace(start.flow, augment=False, loop=flow_loop),
    )


def _common_options(cfg: LearnConfig) -> dict[str, Any]:
    return {
        "data": cfg.data,
        "resolution": cfg.resolution,
        "workers": 4,
        "held_out_views": cfg.held_out_views,
    }


def run_summaries(runs: Path) -> dict[str, Any]:
    """Return steps, losses and speed of each training run, by its directory below `runs`."""
    summaries = {}
    for path in sorted(runs.rglob("metrics.jsonl")):
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        steps = [line for line in lines if "loss" in line and "event" not in line]
        total_s = sum(step["seconds"] for step in steps)
        summaries[str(path.parent.relative_to(runs))] = {
            "steps": len(steps),
            "loss": [
                float(np.mean([step["loss"] for step in part]))
                for part in (steps[:20], steps[-100:])
            ],
            "ms": 1000 * median(step["seconds"] for step in steps),
            "tokens_per_s": median(step["tokens_per_s"] for step in steps),
            "samples": median(step["samples"] for step in steps),
            "data_share": sum(step["data_s"] for step in steps) / total_s,
            "skipped": steps[-1]["skipped"],
        }
    return summaries


@dataclass
class MeshJudge:
    """Compares generated meshes with the stored surfaces of all assets of a build.

    Args:
        samples: Number of points that are sampled on each surface.
        uids: Identifier of each asset.
        stored: Vertices and faces of each asset's stored surface.
        rows: Metrics of the meshes that were added.
    """

    samples: int
    uids: Sequence[str]
    stored: Sequence[MeshArrays]
    rows: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def read(cls, cfg: LearnConfig) -> MeshJudge:
        """Read the stored surfaces of the build."""
        reader = BrickReader(read_build_index(cfg.data, [cfg.resolution]))
        assets = range(len(reader.index))
        stored = [extract(reader.read(asset, cfg.resolution)) for asset in assets]
        return cls(cfg.samples, reader.index.uids, stored)

    def __post_init__(self) -> None:
        self.surfaces = [
            SampledSurface(*mesh, samples=self.samples, seed=1) for mesh in self.stored
        ]

    def distances(self, mesh: MeshArrays, assets: Sequence[int]) -> list[SurfaceMetrics]:
        """Compare a mesh with the stored surfaces of some assets."""
        if not len(mesh[1]):
            return [EMPTY_METRICS for _ in assets]
        surface = SampledSurface(*mesh, samples=self.samples)
        return [surface.compare(self.surfaces[asset]) for asset in assets]

    def add(self, asset: int, mesh: MeshArrays, **more: Any) -> None:
        """Note the metrics of the mesh that was generated for an asset, and `more`."""
        metrics = self.distances(mesh, range(len(self.stored)))
        chamfer = [found.chamfer for found in metrics]
        nearest = int(np.argmin(chamfer))
        row = {
            "uid": self.uids[asset],
            "chamfer_x1000": 1000 * chamfer[asset],
            **{f"f1_{t}": 100 * value for t, value in metrics[asset].f1.items()},
            "nearest_is_right": nearest == asset and bool(np.isfinite(chamfer[asset])),
            "next_chamfer_x1000": 1000 * sorted(chamfer)[1],
            **more,
        }
        self.rows.append(row)
        log.info("%s", row)

    def summary(self) -> dict[str, Any]:
        """Return the means over all meshes that are not empty, and all rows."""
        not_empty = [row for row in self.rows if np.isfinite(row["chamfer_x1000"])]
        metrics = [name for name, value in self.rows[0].items() if isinstance(value, float)]
        means = {
            name: float(np.mean([row[name] for row in not_empty])) if not_empty else None
            for name in metrics
        }
        return {
            "assets": len(self.rows),
            "empty": len(self.rows) - len(not_empty),
            "nearest_is_right": sum(row["nearest_is_right"] for row in self.rows),
            "mean": means,
            "rows": self.rows,
        }


@torch.no_grad()
def generate_on_stored_cells(cfg: LearnConfig, run: DiTTraining, world: World) -> dict[str, Any]:
    """Evaluate the SS-DiT alone, on each asset's stored cells.

    Each asset is generated from its own held-out view and from a view of another asset. The
    pictures are written to given_cells.png.
    """
    vae, store = read_latents(run, world)
    assert vae is not None
    index = index_with_latents(run, store)
    judge = MeshJudge.read(cfg)
    model = load_model(run.out / "latest", ConditionedDiT, device=world.device)
    loader = DiTLoader(index, store, run, use="held_out")
    rows = []
    for asset, uid in enumerate(index.uids):
        batch = loader.batch([SampleId(asset, 0)], 1.0).to(world.device)
        other = loader.batch([SampleId((asset + 1) % len(index), 0)], 1.0).to(world.device)
        level = batch.latents.cells

        def generate(images: ImageBatch, level: Level = level) -> Tensor:
            z_NC = model.generate(
                level,
                model.encode_images(images),
                [0],
                SamplingOptions(steps=STEPS, guidance=Guidance(scale=cfg.guidance)),
            )
            return vae.decode(z_NC, level)

        with torch.autocast("cuda", torch.bfloat16, enabled=world.device.type == "cuda"):
            reconstructed = vae.decode(batch.latents.mean, level)
            generated = generate(batch.images)
            from_wrong_image = generate(other.images)
        mesh, wrong_mesh, vae_mesh = (
            extract_meshes(level, values)[0]
            for values in (generated, from_wrong_image, reconstructed)
        )
        row_of_build = judge.uids.index(uid)
        wrong, vae_alone = (
            judge.distances(other_mesh, [row_of_build])[0] for other_mesh in (wrong_mesh, vae_mesh)
        )
        inside_stored = reconstructed < 0
        judge.add(
            row_of_build,
            mesh,
            iou=100 * float(intersection_over_union(generated < 0, inside_stored)),
            wrong_image_iou=100
            * float(intersection_over_union(from_wrong_image < 0, inside_stored)),
            wrong_image_chamfer_x1000=1000 * wrong.chamfer,
            vae_chamfer_x1000=1000 * vae_alone.chamfer,
        )
        view = loader.conditions.views.read_view(asset, loader.conditions.view_of(asset, 0))
        rows.append(picture_row(view, [mesh, wrong_mesh, judge.stored[row_of_build]]))
    save_pairs(
        cfg.out / "given_cells.png", rows, ("image", "generated", "from a wrong image", "stored")
    )
    return judge.summary()


def generate_from_images(
    cfg: LearnConfig, run: DiTTraining, stages: Path, device: torch.device
) -> dict[str, Any]:
    """Evaluate all stages together: generate each asset from its last view, which was held out.

    The pictures are written to generated.png.
    """
    generator = Generator.load(stages, device)
    judge = MeshJudge.read(cfg)
    index = read_build_index(cfg.data, [cfg.resolution])
    views = ViewReader(index, run.cameras)
    options = GenerationOptions(steps=(STEPS, STEPS), guidance=cfg.guidance)
    rows = []
    for asset, uid in enumerate(index.uids):
        view = views.read_view(asset, views.views(asset) - 1)
        mesh = np.zeros((0, 3)), np.zeros((0, 3), np.int32)
        iou = 0.0
        tokens = 0
        try:
            generated = generator.generate(view.rgba, 0, options, whole_if_opaque=True)
        except RunError as error:
            log.warning("%s: nothing was generated: %s", uid, error)
        else:
            mesh = generated.vertices, generated.faces
            tokens = generated.stages[-1].tokens
        if len(mesh[1]):
            iou = float(intersection_over_union(inside(*mesh), inside(*judge.stored[asset])))
        judge.add(asset, mesh, iou=100 * iou, cells=tokens)
        rows.append(picture_row(view, [mesh, judge.stored[asset]]))
    save_pairs(cfg.out / "generated.png", rows, ("image", "generated", "stored"))
    return judge.summary()


def picture_row(view: View, meshes: Sequence[MeshArrays]) -> list[NDArray[np.uint8]]:
    """Return a render, and pictures of meshes as its camera sees them."""
    axes = camera_axes(view.meta)
    pictures = [picture(*mesh, size=PICTURE_SIDE, view=axes) for mesh in meshes]
    return [on_white(view.rgba, PICTURE_SIDE), *pictures]


def save_pairs(
    path: Path, rows: Sequence[Sequence[NDArray[np.uint8]]], labels: tuple[str, ...]
) -> None:
    """Write rows of pictures in two columns, the first half of the rows on the left."""
    half = len(rows) // 2
    pairs = [[*left, *right] for left, right in zip(rows[:half], rows[half:], strict=False)]
    save_image(path, side_by_side(pairs, labels * 2))
