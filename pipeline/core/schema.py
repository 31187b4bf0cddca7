"""Types that several stages share: asset records, meshes, bricks and views."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class Record:
    """One asset as its source lists it, before any file was read.

    Attributes:
        uid: Unique name, see `pipeline.core.hashing.make_uid`.
        source: Name of the source, such as "folder" or "procedural".
        url: Where the bytes come from: a path, a URL, or the source's own key.
        licence: The licence as one word. "unknown" if the source states none.
        sha256: Hash of the file's bytes, if the source states it.
        format: File extension in lower case without the dot.
        metadata: JSON text with what else the source says, such as name, author, tags, category,
            animations and age_restricted, and under "listed" the further columns of a list.
        split_key: Decides the split. Copies of one asset share it. "" stands for the uid.
    """

    uid: str
    source: str
    url: str
    licence: str = "unknown"
    sha256: str | None = None
    format: str = ""
    metadata: str = ""
    split_key: str = ""


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """How a texture is read outside its image and between its texels.

    Attributes:
        wrap_u: What continues the image beyond 0 and 1 in u: "repeat", "mirror" or "clamp".
        wrap_v: The same in v.
        nearest: Whether texels are magnified without interpolation.
    """

    wrap_u: str = "repeat"
    wrap_v: str = "repeat"
    nearest: bool = False


@dataclass(frozen=True, kw_only=True)
class SurfaceMap:
    """A texture that varies a property over a surface.

    Attributes:
        values: uint8 [h, w] of values from 0 to 1, or uint8 [h, w, 3] of tangent-space normals,
            where 1 is -1, 128 is 0 and 255 is 1. Row 0 is at the top.
        sampler: How the texture is read.
    """

    values: NDArray[np.uint8]
    sampler: Sampler = Sampler()


# Names of the maps of a material. Part has the texture coordinates of each as `<name>_uv`.
MAP_NAMES = ("normal", "metallic", "roughness", "occlusion")


@dataclass(frozen=True, kw_only=True)
class Material:
    """A surface material in the metallic-roughness model of glTF.

    Attributes:
        base_color: Linear RGBA factors. They multiply the texture.
        texture: uint8 [h, w, 4], sRGB with alpha, row 0 at the top. None if there is no texture.
        sampler: How the texture is read.
        metallic: 0 for dielectrics to 1 for metals. The mean where there is a map of it.
        roughness: 0 for mirrors to 1 for matte surfaces. The mean where there is a map of it.
        maps: Maps by names of MAP_NAMES. A map replaces the number. "occlusion" is the share of
            the surrounding light that arrives.
        normal_scale: Factor of x and y of the normals of the map.
        alpha_mode: "OPAQUE", "MASK" or "BLEND".
        alpha_cutoff: Alpha below which "MASK" draws nothing.
        double_sided: Whether back faces are drawn.
        emissive: Linear RGB of the emitted light. It multiplies the emissive texture.
        emissive_texture: uint8 [h, w, 4], sRGB; alpha is not used. None if there is none.
        emissive_sampler: How the emissive texture is read.
        unlit: Whether the base colour is drawn as it is, without light.
    """

    base_color: tuple[float, float, float, float] = (0.8, 0.8, 0.8, 1.0)
    texture: NDArray[np.uint8] | None = None
    sampler: Sampler = Sampler()
    metallic: float = 0.0
    roughness: float = 0.8
    maps: Mapping[str, SurfaceMap] = field(default_factory=dict)
    normal_scale: float = 1.0
    alpha_mode: str = "OPAQUE"
    alpha_cutoff: float = 0.5
    double_sided: bool = True
    emissive: tuple[float, float, float] = (0.0, 0.0, 0.0)
    emissive_texture: NDArray[np.uint8] | None = None
    emissive_sampler: Sampler = Sampler()
    unlit: bool = False


@dataclass(frozen=True, kw_only=True)
class Part:
    """A run of faces with one material. They use only the vertices of their own run.

    Attributes:
        vertices: The run of the mesh's vertices.
        faces: The run of the mesh's faces.
        material: The material of the faces.
        uv: float32 [V_part, 2], texture coordinates with v = 0 at the bottom, as in OpenGL.
        emissive_uv: The same for the emissive texture.
        normal_uv: The same for the map of normals.
        metallic_uv: The same for the map of metallic.
        roughness_uv: The same for the map of roughness.
        occlusion_uv: The same for the map of occlusion.
        colors: uint8 [V_part, 4], sRGB with alpha.
        normals: float32 [V_part, 3], unit normals for shading only.
    """

    vertices: slice
    faces: slice
    material: Material = field(default_factory=Material)
    uv: NDArray[np.float32] | None = None
    emissive_uv: NDArray[np.float32] | None = None
    normal_uv: NDArray[np.float32] | None = None
    metallic_uv: NDArray[np.float32] | None = None
    roughness_uv: NDArray[np.float32] | None = None
    occlusion_uv: NDArray[np.float32] | None = None
    colors: NDArray[np.uint8] | None = None
    normals: NDArray[np.float32] | None = None


# Names of the arrays of a part with one row for each vertex.
VERTEX_ARRAYS = ("uv", "emissive_uv", *(f"{name}_uv" for name in MAP_NAMES), "colors", "normals")


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """A triangle mesh with y up, and its appearance by parts.

    Attributes:
        vertices: float64 [V, 3].
        faces: int32 [F, 3], rows of `vertices`.
        parts: Parts in order that cover every face once. () draws all faces with the default
            material.
        center: How the frame came about: p = (p_loaded - center) * scale.
        scale: See `center`.
    """

    vertices: NDArray[np.float64]
    faces: NDArray[np.int32]
    parts: tuple[Part, ...] = ()
    center: tuple[float, float, float] = (0.0, 0.0, 0.0)
    scale: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Bricks:
    """The sparse SDF of one asset at one resolution: every cell with an active grid point.

    A cell is a group of 8^3 grid points, and a brick its stored values. A grid point is active
    where |sdf| < tau, see `pipeline.core.grid.band`. Point (x, y, z) of a cell has index
    64 * x + 8 * y + z.

    Attributes:
        resolution: Grid points along one side of the cube.
        cells: int16 [M, 3], index of each cell along x, y and z, sorted by x, then y, then z.
            The first point of a cell is grid point 8 * index.
        values: float16 [M, 512], clamp(sdf / tau, -1, 1), negative inside.
        sharp: uint8 [M, 64], one bit per point, least significant bit first. It is set for active
            points near sharp edges.
    """

    resolution: int
    cells: NDArray[np.int16]
    values: NDArray[np.float16]
    sharp: NDArray[np.uint8]


# Field of Bricks -> name of the array in shards and scratch files. These names are format.
BRICK_ARRAYS = {"cells": "blocks", "values": "values", "sharp": "sharp"}


@dataclass(frozen=True, kw_only=True)
class View:
    """One rendered image and what is needed to project into it.

    Attributes:
        rgba: uint8 [height, width, 4], sRGB, not premultiplied by alpha.
        meta: The content of the view's json: uid, view, width, height and the numbers of
            `pipeline.core.cameras.Camera`.
    """

    rgba: NDArray[np.uint8]
    meta: dict[str, Any]
