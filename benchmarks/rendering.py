"""`python -m benchmarks.rendering`: time of a view, and a comparison with Blender Cycles.

There are two commands. `measure` renders mesh files and prints the CPU seconds of a view. `compare`
renders ten scenes with image-based light and with Cycles, which another Python runs, from the same
camera in the same environment, and writes differences and pictures.
"""

from __future__ import annotations

import json
import logging
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import trimesh
from numpy.typing import NDArray
from PIL import Image

from pipeline.core.cameras import Camera, look_at_origin
from pipeline.core.cli import command
from pipeline.core.errors import UserError
from pipeline.core.image_codec import encode
from pipeline.core.options import Light
from pipeline.core.schema import Material, Mesh, Part, SurfaceMap
from pipeline.core.subcommands import parse_subcommand
from pipeline.mesh_io.config import LoadConfig, NormalizeConfig
from pipeline.mesh_io.load import load_with_report
from pipeline.mesh_io.normalize import normalize
from pipeline.rendering.config import RenderConfig
from pipeline.rendering.draw_calls import draw_calls
from pipeline.rendering.environments import environment
from pipeline.rendering.gl_renderer import open_renderer
from pipeline.rendering.prefilter import EnvironmentLight, prepared_environment
from pipeline.rendering.surface_shaders import displayed
from pipeline.rendering.views import render_views, renderer_string
from pipeline.sources.procedural import make_shape
from pipeline.sources.shapes import to_glb

log = logging.getLogger(__name__)

PROG = "python -m benchmarks.rendering"
SHAPES = (  # of the procedural source, each with the number of its environment
    ("0001-chair", 0),
    ("0006-robot", 10),
    ("0009-car", 3),
    ("0014-house", 13),
    ("0028-castle", 12),
    ("0004-mug", 5),
    ("0040-bookshelf", 7),
)
OTHERS = (("materials", 2), ("bricks", 11), ("columns", 4))
PAGE = 235  # brightness behind the pictures


@dataclass(frozen=True, kw_only=True)
class Measure:
    """Render mesh files and print the CPU seconds of a view."""

    files: tuple[Path, ...]
    """Mesh files."""

    views: int = 45
    """Number of views of each mesh."""

    image_size: int = 1024
    """Width and height of a view in pixels."""

    light: Light = "ibl"
    """Light of the views."""


@dataclass(frozen=True, kw_only=True)
class Compare:
    """Compare image-based light with Blender Cycles."""

    blender: Path
    """Python that has bpy."""

    out: Path
    """Directory for the scenes, the pictures and the table."""

    image_size: int = 256
    """Width and height of the pictures."""

    samples: int = 128
    """Samples of a pixel in Cycles."""


def measure(cfg: Measure) -> None:
    """Print what a view of each file costs: drawing it and encoding it as PNG."""
    log.info("%s", renderer_string())
    options = RenderConfig(views=cfg.views, image_size=cfg.image_size, light=cfg.light)
    for path in cfg.files:
        mesh = load_with_report(path, LoadConfig(), root=path.parent)[0]
        mesh = normalize(mesh, NormalizeConfig())
        for number in range(16):
            prepared_environment(number)  # once per machine
        started = time.process_time()
        sizes = [len(encode(view)) for view in render_views(mesh, "benchmark", options)]
        seconds = (time.process_time() - started) / cfg.views
        log.info(
            "%s: %.3f CPU seconds and %.0f KB a view, %d faces",
            path.name,
            seconds,
            np.mean(sizes) / 1e3,
            len(mesh.faces),
        )


def joined(pieces: Sequence[tuple[trimesh.Trimesh, Material, dict[str, Any]]]) -> Mesh:
    """Return one mesh of several, each of which becomes a part with its material."""
    vertices, faces, parts, v, f = [], [], [], 0, 0
    for shape, material, looks in pieces:
        vertices.append(np.asarray(shape.vertices, np.float64))
        faces.append(np.asarray(shape.faces, np.int32) + v)
        runs = {
            "vertices": slice(v, v + len(shape.vertices)),
            "faces": slice(f, f + len(shape.faces)),
        }
        parts.append(Part(**runs, material=material, **looks))
        v, f = v + len(shape.vertices), f + len(shape.faces)
    return Mesh(vertices=np.concatenate(vertices), faces=np.concatenate(faces), parts=tuple(parts))


def materials_scene() -> Mesh:
    """Return a board of balls: metals above, dielectrics below, from smooth to rough."""
    pieces = []
    for row, (color, metallic) in enumerate(
        [((1.0, 0.72, 0.30, 1.0), 1.0), ((0.9, 0.9, 0.92, 1.0), 1.0), ((0.6, 0.05, 0.04, 1.0), 0.0)]
    ):
        for column in range(5):
            ball = trimesh.creation.icosphere(4, 0.085)
            ball.apply_translation([0.19 * (column - 2), 0.2 * (1 - row), 0.1])
            roughness = 0.05 + 0.2 * column
            pieces.append(
                (ball, Material(base_color=color, metallic=metallic, roughness=roughness), {})
            )
    board = trimesh.creation.box([0.98, 0.64, 0.03])
    pieces.append((board, Material(base_color=(0.5, 0.5, 0.5, 1.0)), {}))
    return joined(pieces)


def bricks_scene() -> Mesh:
    """Return a cube of bricks with maps of colour, normals and roughness."""
    side = 256
    y, x = np.mgrid[0:side, 0:side]
    row = y // 32
    inside = (
        np.minimum(y % 32, 31 - y % 32),
        np.minimum((x + 32 * (row % 2)) % 64, 63 - (x + 32 * (row % 2)) % 64),
    )
    height = np.clip(np.minimum(*inside) / 5.0, 0, 1)
    slope_y, slope_x = np.gradient(height * 4)
    normal = np.stack([-slope_x, slope_y, np.ones_like(height)], axis=-1)
    normal /= np.linalg.norm(normal, axis=-1, keepdims=True)
    shade = np.random.default_rng(0).uniform(0.7, 1.1, (8, 9))[row, (x + 32 * (row % 2)) // 64]
    brick = np.array([150, 70, 50]) * shade[..., None]
    color = np.where(height[..., None] > 0.5, brick, 150).clip(0, 255)
    texture = np.concatenate([color, np.full((side, side, 1), 255)], axis=-1).astype(np.uint8)
    maps = {
        "normal": SurfaceMap(values=np.rint(normal * 127 + 128).astype(np.uint8)),
        "roughness": SurfaceMap(values=np.where(height > 0.5, 110, 230).astype(np.uint8)),
    }
    cube = trimesh.creation.box([0.8, 0.8, 0.8])
    cube.unmerge_vertices()
    uv = np.empty((len(cube.vertices), 2), np.float32)
    for face, normal_of_face in zip(cube.faces, cube.face_normals, strict=True):
        others = [axis for axis in range(3) if axis != np.abs(normal_of_face).argmax()]
        uv[face] = cube.vertices[face][:, others] / 0.8 + 0.5
    white = (1.0, 1.0, 1.0, 1.0)
    material = Material(base_color=white, texture=texture, roughness=0.7, maps=maps)
    return joined([(cube, material, {"uv": uv, "normal_uv": uv, "roughness_uv": uv})])


def columns_scene() -> Mesh:
    """Return a floor with columns, a ball and a ring, which throw shadows."""
    stone = Material(base_color=(0.7, 0.66, 0.6, 1.0), roughness=0.9)
    pieces: list[Any] = [
        (trimesh.creation.box([0.95, 0.04, 0.95]).apply_translation([0, -0.4, 0]), stone, {})
    ]
    upright = trimesh.transformations.rotation_matrix(np.pi / 2, [1, 0, 0])
    for x in (-0.32, 0.32):
        for z in (-0.32, 0.0, 0.32):
            column = trimesh.creation.cylinder(0.055, 0.6, sections=48).apply_transform(upright)
            pieces.append((column.apply_translation([x, -0.08, z]), stone, {}))
    ball = trimesh.creation.icosphere(4, 0.14).apply_translation([0, -0.24, 0.1])
    pieces.append((ball, Material(base_color=(0.1, 0.3, 0.7, 1.0), roughness=0.3), {}))
    ring = trimesh.creation.torus(0.2, 0.03).apply_translation([0, 0.05, -0.1])
    pieces.append(
        (ring, Material(base_color=(0.95, 0.64, 0.54, 1), metallic=1, roughness=0.35), {})
    )
    return joined(pieces)


def scenes(folder: Path) -> list[tuple[str, Mesh, int]]:
    """Return the names, meshes and environments of the ten scenes."""
    result = []
    for key, number in SHAPES:
        path = folder / f"{key}.glb"
        path.write_bytes(to_glb(make_shape(key)))
        mesh = load_with_report(path, LoadConfig(), root=folder)[0]
        result.append((key.partition("-")[2], normalize(mesh, NormalizeConfig()), number))
    makers = {"materials": materials_scene, "bricks": bricks_scene, "columns": columns_scene}
    return result + [(name, makers[name](), number) for name, number in OTHERS]


def save_scene(
    path: Path, mesh: Mesh, eye: Camera, panorama: NDArray[np.float32], size: int
) -> None:
    """Write what benchmarks/render_in_cycles.py draws."""
    arrays: dict[str, Any] = {
        "c2w": eye.c2w,
        "focal_mm": eye.focal_mm,
        "panorama": panorama,
        "size": size,
    }
    calls = draw_calls(mesh, with_maps=True)
    for number, call in enumerate(calls):
        for name in ("positions", "normals", "faces", "uv", "colors", "surface", "texture"):
            if getattr(call, name) is not None:
                arrays[f"{number}_{name}"] = getattr(call, name)
        for name, texture in call.maps.items():
            arrays[f"{number}_{name}"] = texture.surface_map.values
            arrays[f"{number}_{name}_uv"] = texture.uv
    np.savez(path, calls=len(calls), **arrays)


def on_page(linear: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Return a picture of premultiplied linear radiance [h, w, 4] on a bright page."""
    alpha = linear[..., 3:].clip(0, 1)
    color = displayed(linear[..., :3] / np.maximum(alpha, 1e-4))
    return np.rint(color * alpha + PAGE * (1 - alpha)).astype(np.uint8)


def compare(cfg: Compare) -> None:
    """Render all scenes twice, and write pictures and a table of differences."""
    cfg.out.mkdir(parents=True, exist_ok=True)
    script = Path(__file__).with_name("render_in_cycles.py")
    rows = []
    for index, (name, mesh, number) in enumerate(scenes(cfg.out)):
        eye = look_at_origin(25.0 + 4 * index, 20.0, 60.0)
        save_scene(cfg.out / f"{name}.npz", mesh, eye, environment(number).radiance, cfg.image_size)
        started = time.process_time()
        with open_renderer(mesh, cfg.image_size, with_maps=True, with_shadows=True) as renderer:
            light = EnvironmentLight(environment=prepared_environment(number))
            ours = renderer.draw_environment(eye, light, radiance=True)
        seconds = time.process_time() - started
        reference_file = cfg.out / f"{name}.npy"
        if not reference_file.exists():
            words = [cfg.out / f"{name}.npz", reference_file, cfg.samples]
            subprocess.run(
                [str(cfg.blender), str(script), *map(str, words)],
                check=True,
                stdout=subprocess.DEVNULL,
                encoding="utf-8",
            )
        reference = np.load(reference_file)
        rows.append({"scene": name, "environment": light.environment.name, "seconds": seconds})
        rows[-1] |= differences(ours, reference)
        pair = np.concatenate([on_page(ours), on_page(reference)], axis=1)
        Image.fromarray(pair).save(cfg.out / f"{name}.png")
        log.info("%s", json.dumps(rows[-1]))
    numbers = [key for key in rows[0] if key not in ("scene", "environment")]
    mean = {key: float(np.mean([row[key] for row in rows])) for key in numbers}
    log.info("mean %s", json.dumps(mean))
    (cfg.out / "differences.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    tiles = [np.asarray(Image.open(cfg.out / f"{row['scene']}.png")) for row in rows]
    half = (len(tiles) + 1) // 2
    sheet = np.concatenate(
        [np.concatenate(tiles[start : start + half]) for start in (0, half)], axis=1
    )
    Image.fromarray(sheet).save(cfg.out / "rendering.webp", quality=80, method=6)


def differences(ours: NDArray[np.floating], reference: NDArray[np.floating]) -> dict[str, float]:
    """Compare two images of premultiplied linear radiance [h, w, 4] where both have the object.

    Returns:
        picture: Mean absolute difference of the pictures, of 255.
        p95: 95th percentile of it.
        ratio: Mean radiance of ours, divided by that of the reference.
        coverage: Mean absolute difference of alpha, over the whole image.
    """
    inside = (ours[..., 3] > 0.999) & (reference[..., 3] > 0.999)
    a, b = ours[inside][:, :3], reference[inside][:, :3]
    error = np.abs(displayed(a).astype(int) - displayed(b))
    return {
        "picture": round(float(error.mean()), 2),
        "p95": round(float(np.quantile(error, 0.95)), 1),
        "ratio": round(float(a.mean() / b.mean()), 3),
        "coverage": round(float(np.abs(ours[..., 3] - reference[..., 3]).mean()), 4),
    }


def main(args: Sequence[str]) -> None:
    """Run one of the two commands."""
    name, cfg = parse_subcommand({"measure": Measure, "compare": Compare}, args, prog=PROG)
    if name == "compare" and not cfg.blender.exists():
        raise UserError(f"--blender must be a Python with bpy, got {cfg.blender}")
    compare(replace(cfg, out=cfg.out.absolute())) if name == "compare" else measure(cfg)


if __name__ == "__main__":
    command(main)
