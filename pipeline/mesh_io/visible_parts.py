"""Leave out what nobody sees: transparent faces, and inverted hulls that draw an outline.

Distances, renders, measurements and sharp edges all take the mesh that comes out of here, so one
rule says for all of them what belongs to the object.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numba import njit
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial import KDTree

from pipeline.core.errors import Reject
from pipeline.core.schema import VERTEX_ARRAYS, Material, Mesh, Part
from pipeline.mesh_io.load_warnings import WarningLog

# A fragment with less alpha leaves no trace in an 8-bit image.
INVISIBLE_ALPHA = 0.5 / 255
# A surface is translucent where its alpha lies between these two.
TRANSLUCENT_ALPHA = (0.02, 0.98)
# Texels that are looked at for one face. A face that repeats a texture more often is kept.
MAX_TEXELS = 1 << 24
MANY_TEXELS = 64  # for each face, from which equal faces are looked at once
# Texels of which the translucent share of one face is made. Larger faces are sampled evenly.
MAX_SHARE_TEXELS = 1 << 16
# An outline hull lies within this share of its diagonal outside of what it outlines.
MAX_HULL_GAP = 0.05
# Share of the hull's area that must have the outlined surface behind it.
MIN_HULL_COVER = 0.85
HULL_SAMPLES = 1000  # points of each candidate
SURFACE_SAMPLES = 20_000  # points of what it may outline


def keep_visible(mesh: Mesh, warnings: WarningLog) -> tuple[Mesh, float]:
    """Leave out fully transparent faces and outline hulls.

    A face is fully transparent if its material blends or masks, and nothing of it is drawn: neither
    the factor of the material, nor the colours of its vertices, nor any texel under it has enough
    alpha. An outline hull is a single-sided, closed surface that is inside out and lies closely
    around another surface, so that only its far side is drawn, as a rim. A mesh that is merely
    inside out has nothing behind its faces and is kept.

    Args:
        mesh: The mesh in any frame.
        warnings: Takes "transparent_left_out" and "outline_hull_left_out", with numbers of faces.

    Returns:
        mesh: The mesh without these faces, or `mesh` itself.
        translucent_share: Share of its area that is neither opaque nor invisible, 0 to 1.

    Raises:
        Reject: "fully_transparent" if nothing is left.
    """
    shown, translucent = _opacity(mesh)
    warnings.add("transparent_left_out", count=int((~shown).sum()))
    if not shown.any():
        raise Reject("fully_transparent", faces=len(mesh.faces))
    hull = _outline_hull(mesh, shown)
    warnings.add("outline_hull_left_out", count=int(hull.sum()))
    keep = shown & ~hull
    areas = np.linalg.norm(_doubled_areas(mesh), axis=1) * keep
    share = float((areas * translucent).sum() / max(areas.sum(), np.finfo(float).tiny))
    return (mesh if keep.all() else _with_faces(mesh, keep)), share


def warm_up() -> None:
    """Compile the numba functions."""
    _texel_opacity(
        np.zeros((1, 1), np.uint8), np.zeros((1, 3, 2)), np.ones((1, 3)), INVISIBLE_ALPHA, 0, 0
    )


def _parts(mesh: Mesh) -> tuple[Part, ...]:
    whole = Part(vertices=slice(0, len(mesh.vertices)), faces=slice(0, len(mesh.faces)))
    return mesh.parts or (whole,)


def _doubled_areas(mesh: Mesh) -> NDArray[np.float64]:
    """Return the normals [F, 3] of the faces, as long as twice their areas."""
    corners = mesh.vertices[mesh.faces]
    return np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])


def _with_faces(mesh: Mesh, keep: NDArray[np.bool_]) -> Mesh:
    """Return a mesh with some of the faces, the vertices that they use and the parts they form."""
    vertices, faces, parts = [], [], []
    num_vertices = num_faces = 0
    for part in _parts(mesh):
        chosen = mesh.faces[part.faces][keep[part.faces]]
        if not len(chosen):
            continue
        used, local = np.unique(chosen, return_inverse=True)
        own = used - (part.vertices.start or 0)
        vertices.append(mesh.vertices[used])
        faces.append(local.reshape(-1, 3) + num_vertices)
        arrays = {
            name: None if (array := getattr(part, name)) is None else array[own]
            for name in VERTEX_ARRAYS
        }
        parts.append(
            replace(
                part,
                vertices=slice(num_vertices, num_vertices + len(used)),
                faces=slice(num_faces, num_faces + len(chosen)),
                **arrays,
            )
        )
        num_vertices += len(used)
        num_faces += len(chosen)
    return replace(
        mesh,
        vertices=np.concatenate(vertices),
        faces=np.concatenate(faces).astype(np.int32),
        parts=tuple(parts) if mesh.parts else (),
    )


def _opacity(mesh: Mesh) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """Return whether each face is drawn at all, and the share of it that is translucent: [F]."""
    shown = np.ones(len(mesh.faces), np.bool_)
    translucent = np.zeros(len(mesh.faces))
    for part in _parts(mesh):
        if part.material.alpha_mode == "OPAQUE":
            continue
        faces = mesh.faces[part.faces] - (part.vertices.start or 0)
        corner_alpha = np.full((len(faces), 3), float(part.material.base_color[3]))
        if part.colors is not None:
            corner_alpha *= part.colors[faces, 3] / 255.0
        limits = _drawn_alpha(part.material)
        texture = part.material.texture
        if texture is None or part.uv is None or (texture[..., 3] == 255).all():
            largest, middle = corner_alpha.max(axis=1), corner_alpha.mean(axis=1)
            shown[part.faces] = largest >= limits
            is_between = (middle > TRANSLUCENT_ALPHA[0]) & (middle < TRANSLUCENT_ALPHA[1])
            share = is_between.astype(float)
        else:
            sampler = part.material.sampler
            wraps = [
                ("repeat", "mirror", "clamp").index(w) for w in (sampler.wrap_u, sampler.wrap_v)
            ]
            uv = part.uv[faces].astype(np.float64)
            first = which = slice(None)
            texels = np.prod(np.ptp(uv, axis=1) * texture.shape[1::-1], axis=1).sum()
            if texels > MANY_TEXELS * len(faces):
                # Many faces may show the same part of a texture, such as the leaves of a tree.
                rows = np.column_stack([uv.reshape(-1, 6), corner_alpha.max(axis=1)])
                _, first, which = np.unique(rows, axis=0, return_index=True, return_inverse=True)
                which = which.reshape(-1)
            drawn, shares = _texel_opacity(
                np.ascontiguousarray(texture[..., 3]),
                uv[first],
                corner_alpha[first],
                limits,
                *wraps,
            )
            shown[part.faces], share = drawn[which], shares[which]
        if part.material.alpha_mode == "BLEND":
            translucent[part.faces] = share
    return shown, translucent


def _drawn_alpha(material: Material) -> float:
    """Return the least alpha that a material draws."""
    if material.alpha_mode == "MASK":
        return max(material.alpha_cutoff, INVISIBLE_ALPHA)
    return INVISIBLE_ALPHA


@njit(cache=True)
def _wrapped(i, size, wrap):
    """Return the texel that a sampler reads at index i: 0 repeats, 1 mirrors, 2 clamps."""
    if wrap == 0:
        return i % size
    if wrap == 1:
        i = i % (2 * size)
        return i if i < size else 2 * size - 1 - i
    return min(max(i, 0), size - 1)


@njit(cache=True)
def _texel_opacity(alpha, uv, corner_alpha, limit, wrap_u, wrap_v):
    """Return whether each face is drawn, and the translucent share of its texels: [F].

    Args:
        alpha: uint8 [h, w] alpha of the texture, row 0 at the top.
        uv: float64 [F, 3, 2] texture coordinates, v = 0 at the bottom.
        corner_alpha: float64 [F, 3] factor at the corners. The largest one counts.
        limit: Least alpha that is drawn.
        wrap_u, wrap_v: See `_wrapped`.
    """
    height, width = alpha.shape
    shown, share = np.zeros(len(uv), np.bool_), np.zeros(len(uv))
    for f in range(len(uv)):
        factor = corner_alpha[f].max()
        if factor < limit:
            continue
        # the corners in texels; texel (i, j) reaches from (i, j) to (i + 1, j + 1)
        x, y = uv[f, :, 0] * width, (1 - uv[f, :, 1]) * height
        if not (np.isfinite(x).all() and np.isfinite(y).all()):
            shown[f] = True
            continue
        x0, y0 = np.floor(x.min()), np.floor(y.min())
        x1, y1 = max(np.ceil(x.max()) - 1, x0), max(np.ceil(y.max()) - 1, y0)
        if (x1 - x0 + 1) * (y1 - y0 + 1) > MAX_TEXELS:
            shown[f] = True
            continue
        area = (x[1] - x[0]) * (y[2] - y[0]) - (x[2] - x[0]) * (y[1] - y[0])
        turn = 1.0 if area >= 0 else -1.0
        inside = between = 0
        step = int(np.ceil(np.sqrt((x1 - x0 + 1) * (y1 - y0 + 1) / MAX_SHARE_TEXELS)))
        while True:
            for j in range(int(y0), int(y1) + 1, step):
                row = _wrapped(j, height, wrap_v)
                for i in range(int(x0), int(x1) + 1, step):
                    # the texel is apart from the triangle if an edge has all of it outside
                    reach = True
                    for e in range(3):
                        g = (e + 1) % 3
                        ex, ey = turn * (x[g] - x[e]), turn * (y[g] - y[e])
                        away = ex * (j + 0.5 - y[e]) - ey * (i + 0.5 - x[e])
                        # a texel that only touches the triangle is not under it
                        if away < -0.499999 * (abs(ex) + abs(ey)):
                            reach = False
                            break
                    if not reach:
                        continue
                    value = factor * alpha[row, _wrapped(i, width, wrap_u)] / 255
                    inside += 1
                    if value >= limit:
                        shown[f] = True
                    if TRANSLUCENT_ALPHA[0] < value < TRANSLUCENT_ALPHA[1]:
                        between += 1
            if step == 1 or shown[f]:
                break
            # No sample is drawn, so all texels are looked at.
            inside = between = 0
            step = 1
        shown[f] = shown[f] or inside == 0  # a line between texels
        share[f] = between / max(inside, 1)
    return shown, share


def _outline_hull(mesh: Mesh, shown: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return which faces [F] belong to outline hulls.

    The candidates are the connected surfaces of single-sided materials that are inside out.
    """
    hull = np.zeros(len(mesh.faces), np.bool_)
    single = np.zeros(len(mesh.faces), np.bool_)
    for part in _parts(mesh):
        single[part.faces] = not part.material.double_sided
    single &= shown
    if not single.any():
        return hull
    normals = _doubled_areas(mesh)
    corners = mesh.vertices[mesh.faces]
    centers = corners.mean(axis=1)
    label = _surfaces(mesh)
    count = int(label.max()) + 1
    # signed volume of each surface, relative to the mean of its faces' centres
    faces_of = np.bincount(label, minlength=count)
    middle = np.stack([np.bincount(label, centers[:, k], count) for k in range(3)], axis=1)
    middle /= np.maximum(faces_of, 1)[:, None]
    volumes = np.bincount(label, ((centers - middle[label]) * normals).sum(axis=1), count)
    is_inverted = (volumes < 0) & (np.bincount(label, ~single, count) == 0)
    others = shown & ~is_inverted[label]
    if not is_inverted.any() or not others.any():
        return hull
    rng = np.random.default_rng(0)
    points, facing = _sample(corners, normals, np.flatnonzero(others), SURFACE_SAMPLES, rng)
    if not len(points):
        return hull
    tree = KDTree(points)
    order = np.argsort(label, kind="stable")
    starts = np.searchsorted(label[order], np.arange(count + 1))
    for surface in np.flatnonzero(is_inverted):
        own = order[starts[surface] : starts[surface + 1]]
        samples, inward = _sample(corners, normals, own, HULL_SAMPLES, rng)
        if not len(samples):
            continue
        box = corners[own].reshape(-1, 3)
        gap = MAX_HULL_GAP * float(np.linalg.norm(box.max(axis=0) - box.min(axis=0)))
        distance, nearest = tree.query(samples, distance_upper_bound=gap)
        nearest = np.asarray(nearest)
        near = np.isfinite(distance)
        offset = points[nearest[near]] - samples[near]
        # the other surface is on the drawn side, and faces the hull
        is_behind = (offset * inward[near]).sum(axis=1) > 0
        is_facing = (facing[nearest[near]] * inward[near]).sum(axis=1) < 0
        if (is_behind & is_facing).sum() >= MIN_HULL_COVER * len(samples):
            hull[own] = True
    return hull


def _surfaces(mesh: Mesh) -> NDArray[np.int64]:
    """Return the connected surface [F] of each face. Vertices at one position are one."""
    _, place = np.unique(mesh.vertices + 0.0, axis=0, return_inverse=True)
    faces = place.reshape(-1)[mesh.faces]
    rows, cols = faces[:, [0, 1]].ravel(), faces[:, [1, 2]].ravel()
    size = len(mesh.vertices)
    graph = coo_array((np.ones(len(rows), np.int8), (rows, cols)), shape=(size, size))
    _, label = connected_components(graph.tocsr(), directed=False)
    return np.unique(label[faces[:, 0]], return_inverse=True)[1].reshape(-1)


def _sample(
    corners: NDArray[np.float64],
    normals: NDArray[np.float64],
    faces: NDArray[np.int64],
    count: int,
    rng: np.random.Generator,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return points [N, 3] spread over faces by area, and their unit normals [N, 3]."""
    areas = np.linalg.norm(normals[faces], axis=1)
    total = areas.sum()
    if not total > 0:
        return np.empty((0, 3)), np.empty((0, 3))
    chosen = faces[rng.choice(len(faces), count, p=areas / total)]
    u, v = rng.random((2, count, 1))
    u, v = np.where(u + v > 1, 1 - u, u), np.where(u + v > 1, 1 - v, v)
    a, b, c = corners[chosen].transpose(1, 0, 2)
    unit = normals[chosen] / np.linalg.norm(normals[chosen], axis=1, keepdims=True)
    return a + u * (b - a) + v * (c - a), unit
