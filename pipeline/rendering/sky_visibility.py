"""Soft shadows: which share of an environment's light reaches each vertex of a mesh.

The directions from which light comes are the same for all views, so what they see of the mesh is
drawn once per asset. Every environment then weights the directions by its own light.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import pi, sqrt

import numpy as np
from numba import njit
from numpy.typing import NDArray

from pipeline.rendering.draw_calls import VERTEX_ARRAYS, DrawCall, MapTexture
from pipeline.rendering.environments import directions, halved, solid_angles

DIRECTIONS = 64
DEPTH_SIDE = 512  # pixels of a depth map
# Edges of faces within which shadows are interpolated, in units of the cube.
MIN_EDGE = 0.02  # shorter edges are not split
MAX_EDGE = 0.15  # longer edges are split even where no shadow is found
UNEVEN = 255 * 0.03  # change of what the middle of an edge sees, compared with its ends
MIN_BACK = 0.3  # share of even light that arrives at the back of an open surface
EXTRA_FACES = 100_000  # that splitting may add
ROUNDS = 7  # of halving edges
BLOCK = 64  # vertices that are weighted together


@cache
def light_directions() -> NDArray[np.float32]:
    """Return DIRECTIONS unit vectors that cover the sphere evenly, read-only float32 [D, 3]."""
    y = 1 - (2 * np.arange(DIRECTIONS) + 1) / DIRECTIONS
    angle = np.arange(DIRECTIONS) * (pi * (3 - sqrt(5)))  # the golden angle
    ring = np.sqrt(1 - y * y)
    unit = np.stack([ring * np.sin(angle), y, ring * np.cos(angle)], axis=1).astype(np.float32)
    unit.setflags(write=False)
    return unit


def light_from(panorama: NDArray[np.float32], yaw: float) -> NDArray[np.float32]:
    """Gather the light of a panorama at the light directions.

    Each pixel is shared between the nearest directions, so that a sun that moves fades from one to
    the next.

    Args:
        panorama: float32 [h, 2 * h, 3].
        yaw: Angle in radians by which the environment is turned about the y axis.

    Returns:
        float32 [D, 3], radiance times solid angle.
    """
    while len(panorama) > 32:
        panorama = halved(panorama)
    height = len(panorama)
    pixels = directions(height).reshape(-1, 3)
    cos, sin = np.cos(yaw), np.sin(yaw)
    turned = pixels @ np.array([[cos, 0, -sin], [0, 1, 0], [sin, 0, cos]], np.float32)
    weight = np.exp(60 * (turned @ light_directions().T - 1))  # a width of 10 degrees
    weight /= weight.sum(axis=1, keepdims=True)
    power = (panorama * solid_angles(height)[:, None, None]).reshape(-1, 3)
    return (weight.T @ power).astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class DepthMaps:
    """What every light direction sees of a mesh.

    Attributes:
        depth: uint16 [D, S, S], row 0 at the bottom: 0 at the light's end of the box to 65535.
        radius: Half the side and half the depth of the box, whose centre is the origin.
    """

    depth: NDArray[np.uint16]
    radius: float

    def seen_from(
        self, positions: NDArray[np.float32], normals: NDArray[np.float32]
    ) -> NDArray[np.uint8]:
        """Return which directions see points of the surface.

        Args:
            positions: float32 [V, 3].
            normals: float32 [V, 3].

        Returns:
            uint8 [V, D], 0 to 255, for the side of the surface that faces the direction.
        """
        seen = np.empty((len(positions), DIRECTIONS), np.uint8)
        _look_up(self.depth, light_frames(), self.radius, positions, normals, seen)
        return seen


@cache
def light_frames() -> NDArray[np.float32]:
    """Return the rows right, up and towards the light of each direction.

    Returns:
        Read-only float32 [D, 3, 3].
    """
    ahead = light_directions().astype(np.float64)
    right = np.cross([0.0, 1.0, 0.0], ahead)
    right /= np.linalg.norm(right, axis=1, keepdims=True)  # no direction is vertical
    frames = np.stack([right, np.cross(ahead, right), ahead], axis=1).astype(np.float32)
    frames.setflags(write=False)
    return frames


def split_at_shadows(calls: Sequence[DrawCall], maps: DepthMaps) -> list[DrawCall]:
    """Halve edges across which shadows do not change evenly, so that they can be interpolated.

    Edges with equal ends are split alike in all calls, so no cracks open between them.

    Args:
        calls: The draw calls.
        maps: The depth maps of the mesh.

    Returns:
        The calls, with more vertices and faces.
    """
    parts = [_SplitCall(call, maps) for call in calls]
    room = EXTRA_FACES
    for _ in range(ROUNDS):
        wanted = [part.find_middles() for part in parts if not part.call.unlit]
        middles = np.concatenate([*wanted, np.empty((0, 3), np.float32)])
        keys = np.unique(_keys(middles))
        if not 0 < 3 * len(keys) <= room:
            break
        room -= 3 * len(keys)
        for part in parts:
            part.split(keys)
    return [part.result() for part in parts]


def _keys(positions: NDArray[np.float32]) -> NDArray[np.uint64]:
    """Return a hash of each position [N, 3].

    Two edges of one hash are both split, which costs faces but opens no crack.
    """
    bits = np.ascontiguousarray(positions + np.float32(0)).view(np.uint32)  # -0 becomes 0
    x, y, z = bits.astype(np.uint64).T
    key = x * np.uint64(0x9E3779B97F4A7C15) + y * np.uint64(0xC2B2AE3D27D4EB4F)
    return key + z * np.uint64(0x165667B19E3779F9)


class _SplitCall:
    """A draw call whose faces are being split."""

    def __init__(self, call: DrawCall, maps: DepthMaps):
        self.call = call
        self.faces = call.faces
        self._maps = maps
        self._arrays = {name: getattr(call, name) for name in VERTEX_ARRAYS}
        self._arrays |= {f"{name}_uv": texture.uv for name, texture in call.maps.items()}
        self._seen: NDArray[np.uint8] | None = None
        self._looked_at = np.empty(0, np.int64)  # the edges that find_middles knows

    def _long_edges(self) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
        """Return which edges [F, 3] of the faces can be split, and the ends [E, 2] of those."""
        positions = self._arrays["positions"]
        # edge k of a face joins corners k and k + 1
        ends = np.stack([self.faces, np.roll(self.faces, -1, axis=1)], axis=-1)  # [F, 3, 2]
        gap = (positions[ends[..., 0]] - positions[ends[..., 1]]).astype(np.float64)
        is_long = (gap**2).sum(axis=-1) > MIN_EDGE**2
        return is_long, np.sort(ends[is_long], axis=1)

    def find_middles(self) -> NDArray[np.float32]:
        """Return the middles [N, 3] of the edges that shadows cross."""
        positions, normals = self._arrays["positions"], self._arrays["normals"]
        ends = self._long_edges()[1]
        edges = np.setdiff1d(ends[:, 0] << 32 | ends[:, 1], self._looked_at)
        self._looked_at = np.union1d(self._looked_at, edges)
        ends = np.stack([edges >> 32, edges & 0xFFFFFFFF], axis=1)
        if self._seen is None:
            self._seen = self._maps.seen_from(positions, normals)
        elif len(self._seen) < len(positions):
            added = slice(len(self._seen), None)
            self._seen = np.concatenate(
                [self._seen, self._maps.seen_from(positions[added], normals[added])]
            )
        middle = _middles(positions, ends)
        normal = _middle_normals(normals, ends)
        at_middle = self._maps.seen_from(middle, normal).astype(np.int16)
        at_ends = self._seen[ends].astype(np.int16).sum(axis=1) // 2
        cosine = normal @ light_directions().T
        # the inner side of a closed surface, which nothing lights, is not looked at
        back = np.maximum(-cosine, 0)
        is_open = (back * at_middle).mean(axis=1) > 255 * MIN_BACK * back.mean(axis=1)
        cosine = np.where(cosine > 0, cosine, back * is_open[:, None])
        change = (np.abs(at_middle - at_ends) * cosine).sum(axis=1)
        uneven = change > UNEVEN * cosine.sum(axis=1)
        length = np.linalg.norm(positions[ends[:, 0]] - positions[ends[:, 1]], axis=1)
        return middle[uneven | (length > MAX_EDGE)]

    def split(self, keys: NDArray[np.uint64]) -> None:
        """Split the edges whose middles are among `keys`."""
        is_long, ends = self._long_edges()
        edges, pair_of = np.unique(ends[:, 0] << 32 | ends[:, 1], return_inverse=True)
        pairs = np.stack([edges >> 32, edges & 0xFFFFFFFF], axis=1)
        chosen = np.isin(_keys(_middles(self._arrays["positions"], pairs)), keys)
        if not chosen.any():
            return
        first = len(self._arrays["positions"])
        number = np.where(chosen, first + np.cumsum(chosen) - 1, -1)
        middles = np.full(self.faces.shape, -1)
        middles[is_long] = number[pair_of.reshape(-1)]
        for name, values in self._arrays.items():
            of_edges = _middle_normals if name == "normals" else _middles
            self._arrays[name] = np.concatenate([values, of_edges(values, pairs[chosen])])
        self.faces = _split_faces(self.faces, middles)

    def result(self) -> DrawCall:
        """Return the draw call with the faces as they are now."""
        maps = {
            name: MapTexture(surface_map=texture.surface_map, uv=self._arrays[f"{name}_uv"])
            for name, texture in self.call.maps.items()
        }
        arrays = {name: self._arrays[name] for name in VERTEX_ARRAYS}
        return replace(self.call, faces=self.faces, maps=maps, **arrays)


def _middles(values: NDArray[np.float32], pairs: NDArray[np.int64]) -> NDArray[np.float32]:
    """Return the means of the rows of `values` [N, C] that pairs [E, 2] join."""
    return (values[pairs[:, 0]] + values[pairs[:, 1]]) * np.float32(0.5)


def _middle_normals(normals: NDArray[np.float32], pairs: NDArray[np.int64]) -> NDArray[np.float32]:
    middle = _middles(normals, pairs)
    length = np.linalg.norm(middle, axis=1, keepdims=True)
    # opposite normals have no mean, so the middle takes one of them
    middle = np.where(length > 1e-3, middle / np.maximum(length, 1e-3), normals[pairs[:, 0]])
    return middle.astype(np.float32)


def _split_faces(faces: NDArray[np.int64], middles: NDArray[np.int64]) -> NDArray[np.int64]:
    """Replace faces [F, 3] by their pieces. `middles` [F, 3] are new vertices on edges, or -1."""
    count = (middles >= 0).sum(axis=1)
    pieces = [faces[count == 0]]
    for number in (1, 2, 3):
        chosen = count == number
        if not chosen.any():
            continue
        f, m = faces[chosen], middles[chosen]
        if number < 3:
            # turn each face so that its first edge is split, and with two also the second
            wanted = m >= 0 if number == 1 else (m >= 0) & (np.roll(m, -1, axis=1) >= 0)
            order = (wanted.argmax(axis=1)[:, None] + np.arange(3)) % 3
            f, m = np.take_along_axis(f, order, axis=1), np.take_along_axis(m, order, axis=1)
        (a, b, c), (p, q, r) = f.T, m.T
        patterns = {
            1: [(a, p, c), (p, b, c)],
            2: [(p, b, q), (a, p, q), (a, q, c)],
            3: [(a, p, r), (p, b, q), (r, q, c), (p, q, r)],
        }
        pieces += [np.stack(piece, axis=1) for piece in patterns[number]]
    return np.concatenate(pieces)


@njit(cache=True)
def _look_up(depth, frames, radius, positions, normals, seen):
    """Write which directions see points of the surface.

    Args:
        depth: uint16 [D, S, S], see `DepthMaps`.
        frames: float32 [D, 3, 3], rows right, up and towards the light.
        radius: Half the side and half the depth of the box.
        positions: float32 [V, 3].
        normals: float32 [V, 3].
        seen: uint8 [V, D], 0 to 255, for the side of the surface that faces the direction.
    """
    side = depth.shape[1]
    texel = 2 * radius / side
    for d in range(len(frames)):
        for v in range(len(positions)):
            facing = 0.0
            for k in range(3):
                facing += normals[v, k] * frames[d, 2, k]
            # the surface must not shadow itself
            offset = 1.5 * texel if facing > 0 else -1.5 * texel
            x = y = z = 0.0
            for k in range(3):
                p = positions[v, k] + offset * normals[v, k]
                x += p * frames[d, 0, k]
                y += p * frames[d, 1, k]
                z += p * frames[d, 2, k]
            u = (x / radius + 1) * side / 2 - 0.5
            w = (y / radius + 1) * side / 2 - 0.5
            near = (1 - (z + texel) / radius) / 2 * 65535
            i0, j0 = int(np.floor(u)), int(np.floor(w))
            fu, fw = u - i0, w - j0
            total = 0.0
            for dj in range(2):
                for di in range(2):
                    i, j = i0 + di, j0 + dj
                    weight = (fu if di else 1 - fu) * (fw if dj else 1 - fw)
                    if i < 0 or j < 0 or i >= side or j >= side or near <= depth[d, j, i]:
                        total += weight
            seen[v, d] = int(255 * total + 0.5)


@njit(cache=True)
def _arriving_shares(seen, normals, towards, light, albedo, shares):
    """Write which share of the light arrives at both sides of each vertex.

    Args:
        seen: uint8 [V, D].
        normals: float32 [V, 3].
        towards: float32 [D, 3], the light directions.
        light: float32 [D, 3].
        albedo: float32 [V, 3], colours that reflect light into the shadows.
        shares: uint8 [V, 2, 4], 0 to 255: front and back, three channels of the light and the
            share of even light from all directions.
    """
    # A vertex of a block is a lane of the innermost loops, which the compiler vectorises.
    total = np.empty((2, 4, BLOCK), np.float32)
    arrived = np.empty((2, 4, BLOCK), np.float32)
    cosine = np.empty((2, BLOCK), np.float32)
    part = np.empty((2, BLOCK), np.float32)
    normal = np.empty((3, BLOCK), np.float32)
    seeing = np.empty((len(towards), BLOCK), np.float32)
    for first in range(0, len(normals), BLOCK):
        size = min(BLOCK, len(normals) - first)
        total[:] = 1e-9
        arrived[:] = 1e-9
        for j in range(size):
            for k in range(3):
                normal[k, j] = normals[first + j, k]
            for d in range(len(towards)):
                seeing[d, j] = seen[first + j, d]
        for d in range(len(towards)):
            x, y, z = towards[d]
            for j in range(size):
                facing = normal[0, j] * x + normal[1, j] * y + normal[2, j] * z
                cosine[0, j] = facing if facing > 0 else np.float32(0)
                cosine[1, j] = np.float32(0) if facing > 0 else -facing
            for side in range(2):
                for j in range(size):
                    part[side, j] = cosine[side, j] * seeing[d, j] * np.float32(1 / 255)
            for side in range(2):
                for k in range(4):
                    power = light[d, k] if k < 3 else np.float32(1)
                    for j in range(size):
                        total[side, k, j] += cosine[side, j] * power
                        arrived[side, k, j] += part[side, j] * power
        for j in range(size):
            for side in range(2):
                for k in range(4):
                    share = arrived[side, k, j] / total[side, k, j]
                    if k < 3:
                        # Light that the surroundings reflect into a crevice: the fit of Jimenez et
                        # al. 2016, "Practical Realtime Strategies for Accurate Indirect Occlusion".
                        c = albedo[first + j, k]
                        a, b, g = 2.0404 * c - 0.3324, 4.7951 * c - 0.6417, 2.7552 * c + 0.6903
                        share = max(share, ((share * a - b) * share + g) * share)
                    shares[first + j, side, k] = int(255 * min(share, 1.0) + 0.5)


class SkyVisibility:
    """What each vertex of some draw calls sees of its surroundings.

    Args:
        calls: The draw calls.
        maps: The depth maps of the mesh.
    """

    def __init__(self, calls: Sequence[DrawCall], maps: DepthMaps):
        self._calls = list(calls)
        self._seen = [maps.seen_from(call.positions, call.normals) for call in calls]
        self._albedo = [mean_albedo(call) for call in calls]

    def shares(self, light: NDArray[np.float32]) -> list[NDArray[np.uint8]]:
        """Return the shares of the light that arrive, uint8 [V, 2, 4] for each call.

        Args:
            light: float32 [D, 3] of `light_from`.
        """
        results = []
        for call, seen, albedo in zip(self._calls, self._seen, self._albedo, strict=True):
            shares = np.empty((len(seen), 2, 4), np.uint8)
            _arriving_shares(seen, call.normals, light_directions(), light, albedo, shares)
            results.append(shares)
        return results


def mean_albedo(call: DrawCall) -> NDArray[np.float32]:
    """Return the colour of each vertex times the mean of the texture, float32 [V, 3], 0 to 1."""
    from pipeline.rendering.shading import to_linear

    texture = 1.0
    if call.texture is not None:
        step = max(1, max(call.texture.shape[:2]) // 64)
        texture = to_linear(call.texture[::step, ::step, :3]).reshape(-1, 3).mean(axis=0)
    return np.clip(call.colors[:, :3] * texture, 0, 1).astype(np.float32)
