"""Converts a mesh into draw calls: merged parts, with vertices split at creases."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.core.schema import Material, Mesh, Part, Sampler, SurfaceMap
from pipeline.rendering.shading import smooth_normals, to_linear

# A face is lit per vertex if it is small, or if it is flat and has no highlights.
SMALL_AREA = 4.5e-4  # square units of the cube: 150 pixels of an image of 1024 pixels
FLAT_COSINE = 0.95  # smallest cosine between the normals of a flat face's corners
MIRROR_ROUGHNESS = 0.3  # smallest roughness of a surface that shows no details of what it mirrors
DULL_ROUGHNESS = 0.5  # smallest roughness of a material without highlights
SAME_NORMAL_COSINE = 0.9999  # corners whose normals have a smaller cosine get separate vertices


@dataclass(frozen=True, kw_only=True)
class Emission:
    """Light that faces emit.

    Attributes:
        color: Linear RGB.
        texture: uint8 [h, w, 4] sRGB that multiplies the colour, None if there is none.
        sampler: How the texture is read.
    """

    color: tuple[float, float, float]
    texture: NDArray[np.uint8] | None
    sampler: Sampler

    @property
    def key(self) -> tuple[Any, ...]:
        """Parts with equal keys emit the same light."""
        return self.color, id(self.texture), self.sampler


@dataclass(frozen=True, kw_only=True)
class MapTexture:
    """A map of a draw call: its values and where the vertices read them.

    Attributes:
        surface_map: Values and sampler.
        uv: float32 [N, 2].
    """

    surface_map: SurfaceMap
    uv: NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class DrawCall:
    """Faces that are drawn by one call.

    They have one texture, one emission and one alpha mode, and are all lit or all unlit. All other
    properties vary by vertex.
    """

    positions: NDArray[np.float32]  # [N, 3]
    normals: NDArray[np.float32]  # [N, 3]
    surface: NDArray[np.float32]  # [N, 4] metallic, roughness, unused
    uv: NDArray[np.float32]  # [N, 2]
    emissive_uv: NDArray[np.float32]  # [N, 2]
    colors: NDArray[np.float32]  # [N, 4] linear
    faces: NDArray[np.int64]  # [F, 3]
    texture: NDArray[np.uint8] | None  # [h, w, 4] sRGB
    sampler: Sampler  # of the texture
    emission: Emission | None
    unlit: bool  # the colour is drawn as it is
    alpha_mode: str  # OPAQUE, MASK or BLEND
    alpha_cutoff: float
    per_vertex: bool  # lit at the vertices and interpolated, instead of per pixel
    maps: dict[str, MapTexture]  # by names of MAP_NAMES
    normal_scale: float  # factor of x and y of the normals of the map


# Arrays of a draw call with one row for each vertex.
VERTEX_ARRAYS = ("positions", "normals", "surface", "uv", "emissive_uv", "colors")


def _is_opaque(part: Part, texture_is_opaque: bool) -> bool:
    """Return whether blending has no effect. Many exporters mark every material as blended."""
    colors_are_opaque = part.colors is None or bool((part.colors[:, 3] == 255).all())
    return part.material.base_color[3] >= 1 and texture_is_opaque and colors_are_opaque


def _emission(part: Part) -> Emission | None:
    """Return the light that a part emits, None if it emits none."""
    material = part.material
    if not any(material.emissive):
        return None
    if material.emissive_texture is None:
        return Emission(color=material.emissive, texture=None, sampler=Sampler())
    if part.emissive_uv is None:
        return None  # without coordinates nobody knows which texels emit
    return Emission(
        color=material.emissive,
        texture=material.emissive_texture,
        sampler=material.emissive_sampler,
    )


def _uv_of_vertices(
    uv: NDArray[np.float32] | None, source: NDArray[np.int64]
) -> NDArray[np.float32]:
    """Return the texture coordinates [N, 2] of the vertices `source`, 0 if there are none."""
    if uv is None:
        return np.zeros((len(source), 2), np.float32)
    return np.nan_to_num(uv[source]).astype(np.float32)


def _part_arrays(mesh: Mesh, part: Part, maps: Iterable[str]) -> dict[str, NDArray[Any]]:
    """Return the arrays of a part by their names in `DrawCall`, and `<name>_uv` for its maps.

    Vertices are split where the faces need different normals.
    """
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
        # the file's normals: turn faces so that the normals are on their front
        triangles = vertices[faces]
        front = np.cross(triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0])
        turned = np.einsum("ij,ij->i", front, normals[faces].sum(axis=1)) < 0
        faces[turned] = faces[turned][:, ::-1]
    else:
        # computed normals: a vertex takes that of one corner, and other corners that differ get
        # vertices of their own
        corners = smooth_normals(vertices, faces).reshape(-1, 3)
        corner_of = faces.reshape(-1).copy()
        normals = np.zeros_like(vertices)
        normals[corner_of] = corners
        cosine = (normals[corner_of] * corners).sum(axis=1)
        split = np.flatnonzero(cosine < SAME_NORMAL_COSINE)
        faces.reshape(-1)[split] = len(vertices) + np.arange(len(split))
        source = np.concatenate([source, corner_of[split]])
        normals = np.concatenate([normals, corners[split]])
    # colours, texture coordinates and surface properties of each vertex
    colors = np.tile(np.asarray(material.base_color, np.float32), (len(source), 1))
    if part.colors is not None:
        colors[:, :3] *= to_linear(part.colors[source, :3])
        colors[:, 3] *= part.colors[source, 3].astype(np.float32) / 255
    surface = np.tile(
        np.array([material.metallic, material.roughness, 0, 0], np.float32), (len(source), 1)
    )
    return {
        "positions": vertices[source],
        "normals": normals,
        "surface": surface,
        "uv": _uv_of_vertices(part.uv, source),
        "emissive_uv": _uv_of_vertices(part.emissive_uv, source),
        "colors": colors,
        "faces": faces,
        **{f"{name}_uv": _uv_of_vertices(getattr(part, f"{name}_uv"), source) for name in maps},
    }


def _can_have_interpolated_mirrors(
    arrays: dict[str, NDArray[Any]], textured: bool
) -> NDArray[np.bool_]:
    """Return the faces [F] whose image of the surroundings may be interpolated.

    A mirror shows details, and what a metal reflects is not linear in the colour of a texture.
    """
    metallic, roughness = arrays["surface"][arrays["faces"][:, 0], :2].T
    return (roughness >= MIRROR_ROUGHNESS) & ((metallic == 0) | (not textured))


def _can_be_lit_per_vertex(arrays: dict[str, NDArray[Any]]) -> NDArray[np.bool_]:
    """Return the faces [F] whose image is the same if their light is interpolated."""
    corners, normals = arrays["positions"][arrays["faces"]], arrays["normals"][arrays["faces"]]
    doubled_area = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    area = np.linalg.norm(doubled_area, axis=1) / 2
    flat = (np.einsum("fij,fij->fi", normals, np.roll(normals, 1, axis=1)) > FLAT_COSINE).all(
        axis=1
    )
    metallic, roughness = arrays["surface"][arrays["faces"][:, 0], :2].T
    return (area < SMALL_AREA) | (flat & (metallic < 0.5) & (roughness >= DULL_ROUGHNESS))


def _maps_of(part: Part) -> dict[str, SurfaceMap]:
    """Return the maps of a part that have texture coordinates."""
    return {
        name: surface_map
        for name, surface_map in part.material.maps.items()
        if getattr(part, f"{name}_uv") is not None
    }


def draw_calls(mesh: Mesh, *, with_maps: bool = False) -> list[DrawCall]:
    """Group the faces of a mesh into draw calls.

    Parts that one call can draw are merged, so that an asset of a thousand parts needs a few calls.

    Args:
        mesh: The mesh.
        with_maps: Whether the calls have the maps of the materials. Otherwise metallic and
            roughness are the means of their maps. Faces with maps are lit per pixel.
    """
    # group the parts by what must be the same within a call
    whole = Part(
        vertices=slice(0, len(mesh.vertices)), faces=slice(0, len(mesh.faces)), material=Material()
    )
    groups: dict[tuple[Any, ...], list[Part]] = {}
    opaque: dict[int | None, bool] = {None: True}  # texture -> no alpha below 255
    for part in mesh.parts or (whole,):
        material, texture, mode = part.material, None, part.material.alpha_mode
        if part.uv is not None and material.texture is not None:
            texture = id(material.texture)
        if mode == "BLEND":
            if texture not in opaque and material.texture is not None:
                opaque[texture] = bool((material.texture[..., 3] == 255).all())
            mode = "OPAQUE" if _is_opaque(part, opaque[texture]) else mode
        cutoff = material.alpha_cutoff if mode == "MASK" else 0.0
        sampler = Sampler() if texture is None else material.sampler
        emission = None if material.unlit else _emission(part)
        emission_key = None if emission is None else emission.key
        maps = _maps_of(part) if with_maps and not material.unlit else {}
        map_key = tuple((name, id(m.values), m.sampler) for name, m in sorted(maps.items()))
        scale = material.normal_scale if "normal" in maps else 1.0
        key = (texture, mode, cutoff, sampler, emission_key, material.unlit, map_key, scale)
        groups.setdefault(key, []).append(part)

    calls = []
    for (
        texture,
        mode,
        cutoff,
        sampler,
        emission_key,
        unlit,
        map_key,
        scale,
    ), parts in groups.items():
        # merge the arrays of the parts
        maps = _maps_of(parts[0]) if map_key else {}
        arrays = [_part_arrays(mesh, part, maps) for part in parts]
        first = np.cumsum([0] + [len(a["positions"]) for a in arrays])
        for a, offset in zip(arrays, first):
            a["faces"] = a["faces"] + offset
        merged = {name: np.concatenate([a[name] for a in arrays]) for name in arrays[0]}
        image = parts[0].material.texture if texture is not None else None
        # blended faces are sorted together, so they stay in one call
        per_vertex_faces = _can_be_lit_per_vertex(merged) & (mode != "BLEND") & (not unlit)
        if with_maps:
            per_vertex_faces &= _can_have_interpolated_mirrors(merged, image is not None)
            per_vertex_faces &= not maps
        for per_vertex in (False, True):
            chosen = merged["faces"][per_vertex_faces == per_vertex]
            if len(chosen):
                used, faces = np.unique(chosen, return_inverse=True)
                arrays = {name: merged[name][used] for name in merged if name != "faces"}
                map_textures = {
                    name: MapTexture(surface_map=surface_map, uv=arrays.pop(f"{name}_uv"))
                    for name, surface_map in maps.items()
                }
                calls.append(
                    DrawCall(
                        **arrays,
                        faces=faces.reshape(-1, 3),
                        texture=image,
                        sampler=sampler,
                        emission=None if emission_key is None else _emission(parts[0]),
                        unlit=unlit,
                        alpha_mode=mode,
                        alpha_cutoff=cutoff,
                        per_vertex=per_vertex,
                        maps=map_textures,
                        normal_scale=scale,
                    )
                )
    return calls
