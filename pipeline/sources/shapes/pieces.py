"""The pieces of a shape, and transformations of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

Points = NDArray[np.float64]
Triangles = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Paint:
    """Appearance of a piece: an sRGB colour, or a texture.

    A piece without texture coordinates is mapped along the coordinate axes.
    """

    color: tuple[float, float, float] = (0.8, 0.8, 0.8)  # sRGB, 0..1
    texture: NDArray[np.uint8] | None = None  # [h, w, 3] sRGB, row 0 is the top
    tiles: float = 1.0  # texture repetitions per unit of length, for pieces without uv
    metallic: float = 0.0
    roughness: float = 0.7


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A triangle surface with one paint.

    Vertices at the same position are bitwise equal, so a closed piece is exactly closed.
    """

    vertices: Points  # [V, 3]
    faces: Triangles  # [F, 3]
    paint: Paint = Paint()
    uv: Points | None = None  # [V, 2], v = 0 at the bottom
    colors: Points | None = None  # [V, 3] sRGB 0..1
    crease_degrees: float = 35.0  # edges with a larger angle are not shaded smoothly

    def translated(self, x: float = 0.0, y: float = 0.0, z: float = 0.0) -> Piece:
        """Return the piece moved by (x, y, z)."""
        return replace(self, vertices=self.vertices + np.array([x, y, z]))

    def scaled(self, x: float, y: float | None = None, z: float | None = None) -> Piece:
        """Return the piece scaled about the origin. One number scales all three axes."""
        return replace(
            self,
            vertices=self.vertices * np.array([x, x if y is None else y, x if z is None else z]),
        )

    def rotated(self, axis: str, degrees: float) -> Piece:
        """Return the piece rotated about the x, y or z axis through the origin, right-handed."""
        i, j = {"x": (1, 2), "y": (2, 0), "z": (0, 1)}[axis]
        c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
        vertices = self.vertices.copy()
        vertices[:, i] = c * self.vertices[:, i] - s * self.vertices[:, j]
        vertices[:, j] = s * self.vertices[:, i] + c * self.vertices[:, j]
        return replace(self, vertices=vertices)

    def placed_between(self, start: ArrayLike, end: ArrayLike) -> Piece:
        """Return a piece that extends along y from 0 to 1, moved to extend between two points.

        Its extent across this direction does not change.
        """
        start, end = np.asarray(start, dtype=np.float64), np.asarray(end, dtype=np.float64)
        length = float(np.linalg.norm(end - start))
        y = (end - start) / length
        x = np.cross(y, [0.0, 0.0, 1.0] if abs(y[2]) < 0.9 else [1.0, 0.0, 0.0])
        x /= np.linalg.norm(x)
        frame = np.stack([x, y * length, np.cross(x, y)])
        return replace(self, vertices=self.vertices @ frame + start)

    def painted(self, paint: Paint) -> Piece:
        """Return the piece with another paint."""
        return replace(self, paint=paint)

    def flipped(self) -> Piece:
        """Return the piece with the orientation of all faces reversed."""
        return replace(self, faces=self.faces[:, ::-1])

    def colored(self, color: Callable[[Points], Points]) -> Piece:
        """Return the piece with vertex colours. `color` maps positions [V, 3] to sRGB [V, 3]."""
        return replace(
            self,
            colors=np.clip(color(self.vertices), 0.0, 1.0),
            uv=None,
            paint=Paint(color=(1, 1, 1)),
        )


def joined(pieces: list[Piece]) -> Piece:
    """Join several pieces to one, with the paint of the first and without uv."""
    starts = np.cumsum([0] + [len(piece.vertices) for piece in pieces[:-1]])
    return Piece(
        vertices=np.concatenate([piece.vertices for piece in pieces]),
        faces=np.concatenate(
            [piece.faces + start for piece, start in zip(pieces, starts, strict=True)]
        ),
        paint=pieces[0].paint,
        crease_degrees=pieces[0].crease_degrees,
    )
