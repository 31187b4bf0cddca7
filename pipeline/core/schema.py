"""Types that every stage shares: records, meshes, bricks, views, and the ways an asset or a run ends early."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class Record:
    """One asset of a source, before anything was read."""

    uid: str
    source: str  # "folder", "procedural", ...
    url: str  # where its bytes come from: a path, a URL, or the source's own key
    licence: str = "unknown"
    sha256: str | None = None  # of the file's bytes, where the source states it
    format: str = ""  # extension without the dot, lower case
    metadata: str = ""  # JSON: what else the catalogue says, e.g. name, tags, category, animations, age_restricted


@dataclass(frozen=True, kw_only=True)
class Material:
    """glTF metallic-roughness terms; colours are linear factors times an sRGB texture."""

    base_color: tuple[float, float, float, float] = (0.8, 0.8, 0.8, 1.0)
    texture: NDArray[np.uint8] | None = None  # [h, w, 4] sRGB, row 0 is the top
    metallic: float = 0.0
    roughness: float = 0.8
    alpha_mode: str = "OPAQUE"  # OPAQUE | MASK | BLEND
    alpha_cutoff: float = 0.5
    double_sided: bool = True


@dataclass(frozen=True, kw_only=True)
class Part:
    """Appearance of one run of a mesh's faces; its faces use only its own run of vertices."""

    vertices: slice
    faces: slice
    material: Material = field(default_factory=Material)
    uv: NDArray[np.float32] | None = None  # [V_part, 2], v = 0 at the bottom (OpenGL)
    colors: NDArray[np.uint8] | None = None  # [V_part, 4] RGBA, sRGB
    normals: NDArray[np.float32] | None = None  # [V_part, 3] unit, for shading only


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """A triangle mesh in one frame, y up, with its appearance by parts.

    `center` and `scale` tell how the frame came about: p = (p_loaded - center) * scale.
    """

    vertices: NDArray[np.float64]  # [V, 3]
    faces: NDArray[np.int32]  # [F, 3]
    parts: tuple[Part, ...] = ()  # in order, covering every face once; () = default look
    center: tuple[float, float, float] = (0.0, 0.0, 0.0)
    scale: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Bricks:
    """The sparse SDF of one asset at one resolution: every cell of 8^3 points with an active one."""

    resolution: int
    cells: NDArray[np.int16]  # [M, 3] index // 8, sorted by x, y, z
    values: NDArray[
        np.float16
    ]  # [M, 512] clamp(sdf / tau, -1, 1), point 64 * lx + 8 * ly + lz, negative inside
    sharp: NDArray[np.uint8]  # [M, 64] packed bits (little) in the same order


# Name of each field of Bricks in stores and scratch files: part of the format.
BRICK_ARRAYS = {"cells": "blocks", "values": "values", "sharp": "sharp"}


@dataclass(frozen=True, kw_only=True)
class View:
    """One rendered image and everything needed to project into it."""

    rgba: NDArray[np.uint8]  # [height, width, 4], colour not premultiplied
    meta: dict[str, Any]  # the member .json of CONTRACTS: uid, view, c2w, fov_degrees, ...
