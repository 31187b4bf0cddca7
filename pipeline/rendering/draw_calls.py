"""A mesh as a few draw calls: parts merged by what one call can draw, corners split where the shading breaks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.core.schema import Material, Mesh, Part
from pipeline.rendering.shading import smooth_normals, to_linear

SMALL_AREA = 4.5e-4  # cube units, 150 pixels at 1024
FLAT_COSINE = 0.95  # of the angle between the normals at a face's corners
DULL_ROUGHNESS = 0.5


@dataclass(frozen=True, kw_only=True)
class DrawCall:
    """Faces drawn by one call: same texture, same alpha mode; everything else varies by vertex."""

    positions: NDArray[np.float32]  # [N, 3]
    normals: NDArray[np.float32]  # [N, 3]
    surface: NDArray[np.float32]  # [N, 4] metallic, roughness, unused
    uv: NDArray[np.float32]  # [N, 2]
    colors: NDArray[np.float32]  # [N, 4] linear
    faces: NDArray[np.int64]  # [F, 3]
    texture: NDArray[np.uint8] | None
    alpha_mode: str
    alpha_cutoff: float
    per_vertex: bool  # light at the corners


def _is_solid(part: Part, texture_is_solid: bool) -> bool:
    """True where blending cannot show anything: many exporters call everything blended."""
    colors_are_solid = part.colors is None or bool((part.colors[:, 3] == 255).all())
    return part.material.base_color[3] >= 1 and texture_is_solid and colors_are_solid


def _part_arrays(mesh: Mesh, part: Part) -> dict[str, NDArray[Any]]:
    """The part's vertices, split where its faces need different normals."""
    vertices = mesh.vertices[part.vertices].astype(np.float32)
    faces = mesh.faces[part.faces].astype(np.int64) - (part.vertices.start or 0)
    material = part.material
    source = np.arange(len(vertices))
    normals = None if part.normals is None else part.normals.astype(np.float32)
    if (
        normals is not None
        and np.isfinite(normals).all()
        and (np.linalg.norm(normals, axis=1) > 0.5).all()
    ):
        # Turned so that the normals are on a face's front; which side is seen is then known by the winding.
        triangles = vertices[faces]
        front = np.cross(triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0])
        turned = np.einsum("ij,ij->i", front, normals[faces].sum(axis=1)) < 0
        faces[turned] = faces[turned][:, ::-1]
    else:
        corners, corner_of = (
            smooth_normals(vertices, faces).reshape(-1, 3),
            faces.reshape(-1).copy(),
        )
        normals = np.zeros_like(vertices)
        normals[corner_of] = (
            corners  # any one of them; the corners that differ get a vertex of their own
        )
        split = np.flatnonzero((normals[corner_of] * corners).sum(axis=1) < 0.9999)
        faces.reshape(-1)[split] = len(vertices) + np.arange(len(split))
        source = np.concatenate([source, corner_of[split]])
        normals = np.concatenate([normals, corners[split]])
    colors = np.tile(np.asarray(material.base_color, np.float32), (len(source), 1))
    if part.colors is not None:
        colors[:, :3] *= to_linear(part.colors[source, :3])
        colors[:, 3] *= part.colors[source, 3].astype(np.float32) / 255
    uv = (
        np.zeros((len(source), 2), np.float32)
        if part.uv is None
        else np.nan_to_num(part.uv[source])
    )
    surface = np.tile(
        np.array([material.metallic, material.roughness, 0, 0], np.float32), (len(source), 1)
    )
    return {
        "positions": vertices[source],
        "normals": normals,
        "surface": surface,
        "uv": uv.astype(np.float32),
        "colors": colors,
        "faces": faces,
    }


def _lit_at_corners(arrays: dict[str, NDArray[Any]]) -> NDArray[np.bool_]:
    """Faces [F] that look the same with light interpolated: small ones, and flat ones without highlights."""
    corners, normals = arrays["positions"][arrays["faces"]], arrays["normals"][arrays["faces"]]
    area = (
        np.linalg.norm(
            np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), axis=1
        )
        / 2
    )
    flat = (np.einsum("fij,fij->fi", normals, np.roll(normals, 1, axis=1)) > FLAT_COSINE).all(
        axis=1
    )
    metallic, roughness = arrays["surface"][arrays["faces"][:, 0], :2].T
    return (area < SMALL_AREA) | (flat & (metallic < 0.5) & (roughness >= DULL_ROUGHNESS))


def draw_calls(mesh: Mesh) -> list[DrawCall]:
    """The mesh's faces, grouped so that an asset of a thousand parts is still drawn by a handful of calls."""
    whole = Part(
        vertices=slice(0, len(mesh.vertices)), faces=slice(0, len(mesh.faces)), material=Material()
    )
    groups: dict[tuple[Any, ...], list[Part]] = {}
    solid: dict[int | None, bool] = {None: True}  # texture -> no alpha below 255
    for part in mesh.parts or (whole,):
        material, texture, mode = part.material, None, part.material.alpha_mode
        if part.uv is not None and material.texture is not None:
            texture = id(material.texture)
        if mode == "BLEND":
            if texture not in solid and material.texture is not None:
                solid[texture] = bool((material.texture[..., 3] == 255).all())
            mode = "OPAQUE" if _is_solid(part, solid[texture]) else mode
        groups.setdefault(
            (texture, mode, material.alpha_cutoff if mode == "MASK" else 0.0), []
        ).append(part)
    result = []
    for (texture, mode, cutoff), parts in groups.items():
        arrays = [_part_arrays(mesh, part) for part in parts]
        first = np.cumsum([0] + [len(a["positions"]) for a in arrays])
        for a, offset in zip(arrays, first):
            a["faces"] = a["faces"] + offset
        merged = {name: np.concatenate([a[name] for a in arrays]) for name in arrays[0]}
        image = parts[0].material.texture if texture is not None else None
        at_corners = _lit_at_corners(merged) & (
            mode != "BLEND"
        )  # blended faces are sorted, so they stay together
        for per_vertex in (False, True):
            chosen = merged["faces"][at_corners == per_vertex]
            if len(chosen):
                used, faces = np.unique(chosen, return_inverse=True)
                arrays = {name: merged[name][used] for name in merged if name != "faces"}
                arrays["faces"] = faces.reshape(-1, 3)
                result.append(
                    DrawCall(
                        **arrays,
                        texture=image,
                        alpha_mode=mode,
                        alpha_cutoff=cutoff,
                        per_vertex=per_vertex,
                    )
                )
    return result
