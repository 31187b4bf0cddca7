"""The scene that every mesh reader returns, before instancing, triangulation and texture decoding.

A reader puts in what its file states. The shared steps of `pipeline.mesh_io.assemble` make the
triangle mesh from it, so that each rule (instancing, polygons, colours, axes) exists once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Domain = Literal["vertex", "corner", "polygon"]
Wrap = Literal["repeat", "mirror", "clamp"]
Axis = Literal["x", "y", "z"]


@dataclass(frozen=True, kw_only=True)
class SceneImage:
    """An encoded image of a file.

    Attributes:
        name: How the file names it, for warnings.
        content: The encoded bytes (PNG, JPEG, WebP, KTX2, ...), or uint8 pixels [h, w, 4] sRGB if
            the file stores pixels. None if the image is missing; the reader has warned then.
    """

    name: str
    content: bytes | NDArray[np.uint8] | None


@dataclass(frozen=True, kw_only=True)
class TextureSlot:
    """How a material uses an image.

    Attributes:
        image: Index in `Scene.images`.
        uv_set: Key of `Geometry.uv`.
        transform: float64 [2, 3]. The image is read at transform @ (u, v, 1), with v = 0 at the
            bottom of the image. None is the identity.
        wrap_u: What continues the image beyond 0 and 1 in u.
        wrap_v: The same in v.
        nearest: Whether texels are magnified without interpolation.
        channel: The channel that holds the values of a slot with one value a texel, "r", "g", "b"
            or "a". "auto" takes alpha if some texel is not opaque, otherwise the brightness.
    """

    image: int
    uv_set: int = 0
    transform: NDArray[np.float64] | None = None
    wrap_u: Wrap = "repeat"
    wrap_v: Wrap = "repeat"
    nearest: bool = False
    channel: Literal["auto", "r", "g", "b", "a"] = "auto"


@dataclass(frozen=True, kw_only=True)
class SceneMaterial:
    """A material as a file states it, in the metallic-roughness model of glTF.

    Attributes:
        name: Name in the file, for warnings.
        base_color: Linear RGBA factors. They multiply the texture.
        base_color_texture: sRGB colours with alpha.
        texture_replaces_color: Whether a texture that can be drawn takes the place of the RGB
            factors, for formats in which they are the colour of an untextured surface.
        opacity_texture: Values that multiply alpha, for formats that keep them in an image of
            their own.
        metallic: 0 for dielectrics to 1 for metals.
        roughness: 0 for mirrors to 1 for matte surfaces.
        metallic_texture: Values that multiply `metallic`.
        roughness_texture: Values that multiply `roughness`.
        glossiness_texture: Values g for formats that state glossiness: the roughness is
            1 - (1 - `roughness`) * g.
        emissive: Linear RGB of the emitted light. It multiplies the texture and may exceed 1.
        emissive_texture: sRGB colours.
        normal_texture: Tangent-space normals.
        normal_scale: Factor of the normals' x and y.
        occlusion_texture: Ambient occlusion.
        occlusion_strength: 0 for no occlusion to 1 for that of the texture.
        alpha_mode: "OPAQUE", "MASK" or "BLEND".
        alpha_cutoff: Alpha below which "MASK" draws nothing.
        double_sided: Whether back faces are drawn.
        unlit: Whether the base colour is drawn as it is, without light.
    """

    name: str = ""
    base_color: tuple[float, float, float, float] = (0.8, 0.8, 0.8, 1.0)
    base_color_texture: TextureSlot | None = None
    texture_replaces_color: bool = False
    opacity_texture: TextureSlot | None = None
    metallic: float = 0.0
    roughness: float = 0.8
    metallic_texture: TextureSlot | None = None
    roughness_texture: TextureSlot | None = None
    glossiness_texture: TextureSlot | None = None
    emissive: tuple[float, float, float] = (0.0, 0.0, 0.0)
    emissive_texture: TextureSlot | None = None
    normal_texture: TextureSlot | None = None
    normal_scale: float = 1.0
    occlusion_texture: TextureSlot | None = None
    occlusion_strength: float = 1.0
    alpha_mode: Literal["OPAQUE", "MASK", "BLEND"] = "OPAQUE"
    alpha_cutoff: float = 0.5
    double_sided: bool = True
    unlit: bool = False


@dataclass(frozen=True, kw_only=True)
class Attribute:
    """Values on the vertices, corners or polygons of a geometry.

    Attributes:
        values: [N, ...], one row for each element of the domain.
        domain: "vertex", "corner" (rows of `Geometry.corners`) or "polygon".
    """

    values: NDArray[np.generic]
    domain: Domain = "vertex"


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """Polygons, which may be concave and may have holes, with their attributes.

    V vertices, C corners, K contours, P polygons.

    Attributes:
        positions: float64 [V, 3].
        corners: int64 [C], rows of `positions`, contour by contour.
        contours: int64 [K + 1], where each contour begins in `corners`; the last entry is C.
        polygons: int64 [P + 1], where each polygon begins in the contours; the last entry is K.
            The first contour of a polygon is its outline and the others are holes. None means that
            each contour is a polygon of its own.
        uv: Texture coordinates by set, float32 [N, 2] with v = 0 at the bottom of the image.
        colors: uint8 [N, 4], sRGB with alpha.
        normals: float32 [N, 3]. They need not have length 1.
        materials: int64 [P], index in `Scene.materials` for each polygon, or a single index for
            all. -1 is no material.
        name: Name in the file, for warnings.
    """

    positions: NDArray[np.float64]
    corners: NDArray[np.int64]
    contours: NDArray[np.int64]
    polygons: NDArray[np.int64] | None = None
    uv: dict[int, Attribute] = field(default_factory=dict)
    colors: Attribute | None = None
    normals: Attribute | None = None
    materials: NDArray[np.int64] | int = -1
    name: str = ""

    @classmethod
    def from_triangles(
        cls,
        positions: NDArray[np.float64],
        triangles: NDArray[np.int64],
        *,
        uv: dict[int, Attribute] | None = None,
        colors: Attribute | None = None,
        normals: Attribute | None = None,
        materials: NDArray[np.int64] | int = -1,
        name: str = "",
    ) -> Geometry:
        """Return a geometry of triangles [F, 3]."""
        return cls(
            positions=positions,
            corners=np.ascontiguousarray(triangles, dtype=np.int64).reshape(-1),
            contours=np.arange(0, 3 * len(triangles) + 1, 3),
            uv=uv or {},
            colors=colors,
            normals=normals,
            materials=materials,
            name=name,
        )

    @property
    def num_polygons(self) -> int:
        """Number of polygons."""
        return len(self.contours if self.polygons is None else self.polygons) - 1


@dataclass(frozen=True, kw_only=True)
class Node:
    """A node of the scene graph. A node may have several parents, and is then drawn several times.

    Attributes:
        matrix: float64 [4, 4] that maps coordinates of the node to those of its parent. It is
            applied to column vectors.
        geometries: Indices in `Scene.geometries`.
        children: Indices in `Scene.nodes`.
        materials: {material of the geometry: material drawn instead}, both indices in
            `Scene.materials` (-1 is no material), for formats that bind materials at the node.
        name: Name in the file, for warnings.
    """

    matrix: NDArray[np.float64] = field(default_factory=lambda: np.eye(4))
    geometries: tuple[int, ...] = ()
    children: tuple[int, ...] = ()
    materials: dict[int, int] = field(default_factory=dict)
    name: str = ""


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What a reader read from one file.

    Attributes:
        geometries: The geometries.
        nodes: The nodes of the scene graph.
        roots: Indices of the nodes without parent. Only what they reach is drawn.
        materials: The materials.
        images: The images of the materials.
        up_axis: The axis that points up, if the file or the format states one.
        metres_per_unit: Length of a unit, if the file or the format states one. The pipeline
            normalises sizes, so this is information only.
        points: Number of points that belong to no polygon or line, for the error of a file that
            has only points.
    """

    geometries: list[Geometry] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    roots: list[int] = field(default_factory=list)
    materials: list[SceneMaterial] = field(default_factory=list)
    images: list[SceneImage] = field(default_factory=list)
    up_axis: Axis | None = None
    metres_per_unit: float | None = None
    points: int = 0

    @classmethod
    def of_geometries(
        cls,
        geometries: list[Geometry],
        *,
        materials: list[SceneMaterial] | None = None,
        images: list[SceneImage] | None = None,
        points: int = 0,
    ) -> Scene:
        """Return a scene that draws each geometry once, for formats without a scene graph."""
        return cls(
            geometries=geometries,
            nodes=[Node(geometries=tuple(range(len(geometries))))],
            roots=[0],
            materials=materials or [],
            images=images or [],
            points=points,
        )
