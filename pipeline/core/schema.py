"""Types that every stage shares: records, meshes, bricks, views, and the ways an asset or a run ends early."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

FORMAT_VERSION = 1  # of every store and shard; a reader refuses another
BLOCK = 8  # grid points along one side of a block (= one cell, one latent token)


class Reject(Exception):
    """A stage turns an asset away: a deterministic verdict, never retried, recorded in the manifest.

    `reason` is a fixed snake_case word (it becomes a funnel row), `numbers` what the rule saw.
    """

    def __init__(self, reason: str, **numbers: Any):
        super().__init__(reason, numbers)
        self.reason, self.numbers = reason, numbers

    def __str__(self) -> str:
        return self.reason + "".join(f" {name}={value}" for name, value in self.numbers.items())


class Transient(Reject):
    """Something outside the asset went wrong and may be gone later: a lost connection, a server in trouble.

    The runner tries again; what stays recorded in the end is a failure, not a verdict.
    """


class UserError(Exception):
    """What the user asked for cannot be done; the message says what and what to do. Exit code 2."""


class RunError(Exception):
    """A run that began cannot go on (a full disk, too many failures); committed work is kept. Exit code 1."""


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


def make_uid(source: str, key: str) -> str:
    """`<source>-<first 20 hex of sha256(key)>`; the key of a folder's file is its relative POSIX path."""
    return f"{source}-{hashlib.sha256(key.encode()).hexdigest()[:20]}"


def split_of(uid: str, val_percent: int) -> str:
    """ "val" for about val_percent of all uids, else "train"; depends on the uid alone."""
    return (
        "val" if int(hashlib.sha256(uid.encode()).hexdigest(), 16) % 100 < val_percent else "train"
    )


def seed_of(*parts: object) -> int:
    """A 64-bit seed from names and numbers, e.g. (uid, "camera", view); the same on every machine."""
    text = "\0".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


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


def check_resolution(resolution: int) -> int:
    """The resolution itself. ValueError if it is not a positive multiple of 8."""
    if resolution <= 0 or resolution % BLOCK:
        raise ValueError(f"resolution must be a positive multiple of {BLOCK}, got {resolution}")
    return resolution


def spacing(resolution: int) -> float:
    """Distance of neighbouring grid points: point i lies at -0.5 + i * spacing, i = 0..R-1."""
    return 1.0 / (check_resolution(resolution) - 1)


def band(resolution: int) -> float:
    """tau in cube units: a point is active where |sdf| < tau. 2, 3, 4, 4 times 1/R at 256, 384, 512, 1024."""
    return min(max(resolution / 128, 2.0), 4.0) / check_resolution(resolution)


@dataclass(frozen=True, kw_only=True)
class Bricks:
    """The sparse SDF of one asset at one resolution: every 8^3 block that holds an active point."""

    resolution: int
    blocks: NDArray[np.int16]  # [M, 3] index // 8, sorted by x, y, z
    values: NDArray[
        np.float16
    ]  # [M, 512] clamp(sdf / tau, -1, 1), point 64 * lx + 8 * ly + lz, negative inside
    sharp: NDArray[np.uint8]  # [M, 64] packed bits (little) in the same order


@dataclass(frozen=True, kw_only=True)
class View:
    """One rendered image and everything needed to project into it."""

    rgba: NDArray[np.uint8]  # [height, width, 4], colour not premultiplied
    meta: dict[str, Any]  # the member .json of CONTRACTS: uid, view, c2w, fov_degrees, ...
