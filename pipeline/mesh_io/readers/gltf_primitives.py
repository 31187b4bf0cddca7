"""Meshes of glTF files: primitives of all modes, morph targets and the pose of skins."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from pipeline.core.color import linear_to_srgb
from pipeline.mesh_io.readers.gltf_accessors import Accessors, Values, to_floats
from pipeline.mesh_io.readers.gltf_document import Document, Element, GltfError
from pipeline.mesh_io.readers.gltf_draco import DracoMesh, decode_draco
from pipeline.mesh_io.readers.gltf_materials import Materials
from pipeline.mesh_io.readers.gltf_skins import Pose
from pipeline.mesh_io.readers.strips import are_drawn
from pipeline.mesh_io.scene import Attribute, Geometry

DRACO = "KHR_draco_mesh_compression"
POINTS, LINES, LINE_LOOP, LINE_STRIP, TRIANGLES, TRIANGLE_STRIP, TRIANGLE_FAN = range(7)
INFLUENCES = 4  # joints in one set
COLOR_TOLERANCE = 1e-3  # by which rounding may take a colour out of its range

Floats = NDArray[np.float64]


@dataclass(kw_only=True)
class _Arrays:
    """The arrays of one primitive, with V vertices and F triangles.

    Attributes that several primitives share are the same arrays here, so they must not be changed
    in place.
    """

    positions: Floats  # [V, 3]
    triangles: NDArray[np.int64]  # [F, 3]
    normals: Floats | None = None  # [V, 3]
    uv: dict[int, Floats] = field(default_factory=dict)  # [V, 2] each, v = 0 at the top
    colors: Floats | None = None  # [V, 4] linear

    def select(self, used: NDArray[np.int64]) -> _Arrays:
        """Return the arrays with only the vertices `used`, which must be sorted."""
        inside = self.triangles < len(self.positions)
        triangles = np.where(inside, np.searchsorted(used, self.triangles), len(used))
        return _Arrays(
            positions=self.positions[used],
            triangles=triangles,
            normals=None if self.normals is None else self.normals[used],
            uv={key: values[used] for key, values in self.uv.items()},
            colors=None if self.colors is None else self.colors[used],
        )


class Meshes:
    """Reads the meshes of one document.

    Args:
        document: The document.
        accessors: Reads the attributes.
        materials: Converts the materials that the primitives use.
    """

    def __init__(self, document: Document, accessors: Accessors, materials: Materials):
        self.document = document
        self.accessors = accessors
        self.materials = materials
        self.warnings = document.warnings
        self.geometries: list[Geometry] = []
        self.points = 0
        self.errors: list[str] = []  # one of each primitive that cannot be read
        self._read: dict[tuple[int, tuple[float, ...]], tuple[int, ...]] = {}

    def read(
        self, index: int, weights: Sequence[float] | None = None, pose: Pose | None = None
    ) -> tuple[int, ...]:
        """Return the numbers in `geometries` of the primitives of a mesh.

        Args:
            index: Number of the mesh.
            weights: Weights of the morph targets. None takes those of the mesh.
            pose: The skin that moves the mesh, None for a rigid one.

        Raises:
            GltfError: If the mesh does not exist.
        """
        mesh = self.document.element("meshes", index)
        if weights is None:
            weights = mesh.numbers("weights")
        key = index, tuple(weights)
        if pose is not None:
            return self._geometries(mesh, key[1], pose)
        if key not in self._read:
            self._read[key] = self._geometries(mesh, key[1], None)
        return self._read[key]

    def _geometries(
        self, mesh: Element, weights: tuple[float, ...], pose: Pose | None
    ) -> tuple[int, ...]:
        numbers = []
        for primitive in mesh.children("primitives"):
            name = mesh.name if mesh.name != mesh.path else primitive.path
            try:
                geometry = self._geometry(primitive, name, weights, pose)
            except GltfError as error:
                self.errors.append(f"{primitive.path}: {error}")
                self.warnings.add("primitive_unreadable", self.errors[-1])
                continue
            if geometry is not None:
                numbers.append(len(self.geometries))
                self.geometries.append(geometry)
        return tuple(numbers)

    def _geometry(
        self, primitive: Element, name: str, weights: tuple[float, ...], pose: Pose | None
    ) -> Geometry | None:
        """Read one primitive. Return None if it has no faces.

        Raises:
            GltfError: If it cannot be read.
        """
        mode = primitive.index("mode")
        mode = TRIANGLES if mode is None else mode
        if self._is_left_out(primitive, mode, name):
            return None
        draco = self._decode_draco(primitive)
        reader = _AttributeReader(self.accessors, primitive, draco)
        positions = reader.positions()
        corners = self._corners(primitive, draco, len(positions))
        if draco is not None:
            mode = TRIANGLES  # a Draco buffer holds the triangles of a strip one by one
        triangles = self._triangles(mode, corners, positions, name)
        if triangles is None:
            return None
        arrays = _Arrays(positions=positions, triangles=triangles)
        arrays.normals = reader.normals()
        arrays.uv = reader.uv()
        arrays.colors = reader.colors()
        material = self.materials.number(primitive.index("material"))
        if any(weights) or pose is not None:
            used = np.unique(triangles)
            used = used[used < len(positions)]
            arrays = arrays.select(used)
            if any(weights):
                self._morph(arrays, primitive, weights, used, len(positions))
            if pose is not None:
                self._pose(arrays, reader, pose, used)
        shared = not (any(weights) or pose is not None)
        return Geometry.from_triangles(
            arrays.positions,
            arrays.triangles,
            uv={
                key: Attribute(values=self._flipped(values, shared))
                for key, values in arrays.uv.items()
            },
            colors=None
            if arrays.colors is None
            else Attribute(values=self._encoded(arrays.colors, shared)),
            normals=None if arrays.normals is None else Attribute(values=arrays.normals),
            materials=material,
            name=name,
        )

    def _flipped(self, uv: Floats, shared: bool) -> NDArray[np.float32]:
        """Return texture coordinates [V, 2] with v = 0 at the bottom."""

        def flip() -> NDArray[np.float32]:
            return np.column_stack([uv[:, 0], 1.0 - uv[:, 1]]).astype(np.float32)

        return self.accessors.cached(("uv", id(uv)), flip) if shared else flip()

    def _encoded(self, colors: Floats, shared: bool) -> NDArray[np.uint8]:
        """Return linear colours [V, 4] as 8-bit sRGB with alpha."""

        def encode() -> NDArray[np.uint8]:
            clipped = np.clip(np.nan_to_num(colors), 0.0, 1.0)
            clipped[:, :3] = linear_to_srgb(clipped[:, :3])
            return np.rint(clipped * 255).astype(np.uint8)

        return self.accessors.cached(("colors", id(colors)), encode) if shared else encode()

    def _decode_draco(self, primitive: Element) -> DracoMesh | None:
        """Decode a compressed primitive. Return None if it is not compressed.

        Raises:
            GltfError: If it cannot be decoded and has no uncompressed data.
        """
        extension = primitive.extension(DRACO)
        if extension is None:
            return None
        view = extension.index("bufferView")
        try:
            if view is None:
                raise GltfError(f"{extension.path} has no bufferView")
            return self.accessors.cached(
                ("draco", view),
                lambda: decode_draco(bytes(self.accessors.view(view)), self.accessors.context.cfg),
            )
        except GltfError:
            position = primitive.child("attributes").index("POSITION")
            if position is None or "bufferView" not in (
                self.document.element("accessors", position).data
            ):
                raise
            return None  # the uncompressed data say the same

    def _corners(
        self, primitive: Element, draco: DracoMesh | None, num_vertices: int
    ) -> NDArray[np.int64]:
        """Return the vertex of each corner of a primitive, in the order of its mode."""
        if draco is not None:
            return draco.indices
        indices = primitive.index("indices")
        if indices is not None:
            return self.accessors.integers(indices, 1)[:, 0]
        if "indices" in primitive.data:
            raise GltfError("its indices are not an accessor")
        return np.arange(num_vertices)

    def _is_left_out(self, primitive: Element, mode: int, name: str) -> bool:
        """Return whether a primitive has no faces, such as points, which gives a warning.

        Raises:
            GltfError: If the number of its corners is not known.
        """
        if mode in (TRIANGLES, TRIANGLE_STRIP, TRIANGLE_FAN):
            return False
        if mode > TRIANGLE_FAN:
            self.warnings.add("unsupported_primitive", f"{name}: mode {mode}")
            return True
        counted = primitive.index("indices")
        if counted is None:
            counted = primitive.child("attributes").index("POSITION")
        if counted is None:
            raise GltfError("it has no POSITION")
        corners = self.accessors.count(counted)
        if mode == POINTS:
            self.points += corners
            self.warnings.add("points_left_out", name, corners)
        else:
            lines = corners // 2 if mode == LINES else corners - (mode == LINE_STRIP)
            self.warnings.add("lines_left_out", name, max(lines, 1))
        return True

    def _triangles(
        self, mode: int, corners: NDArray[np.int64], positions: Floats, name: str
    ) -> NDArray[np.int64] | None:
        """Return the triangles [F, 3] of corners in the order of a mode, None if it has none."""
        if mode == TRIANGLES:
            if len(corners) % 3:
                self.warnings.add("count_mismatch", f"{name}: {len(corners)} corners of triangles")
            return corners[: len(corners) // 3 * 3].reshape(-1, 3)
        if len(corners) < 3:
            self.warnings.add("count_mismatch", f"{name}: {len(corners)} corners of a strip or fan")
            return None
        if mode == TRIANGLE_FAN:
            first = np.full(len(corners) - 2, corners[0])
            return np.stack([first, corners[1:-1], corners[2:]], axis=1)
        strip = np.stack([corners[:-2], corners[1:-1], corners[2:]], axis=1)
        strip[1::2] = strip[1::2, [1, 0, 2]]  # every second triangle has the other orientation
        return strip[are_drawn(strip, positions)]

    def _morph(
        self,
        arrays: _Arrays,
        primitive: Element,
        weights: tuple[float, ...],
        used: NDArray[np.int64],
        num_vertices: int,
    ) -> None:
        """Add the morph targets of a primitive with their weights."""
        targets = primitive.children("targets")
        if len(targets) != len(weights):
            detail = f"{primitive.path}: {len(weights)} weights for {len(targets)} morph targets"
            self.warnings.add("count_mismatch", detail)
        for target, weight in zip(targets, weights):
            if weight == 0:
                continue
            try:
                moved = self._morphed(arrays, target, weight, used, num_vertices)
            except GltfError as error:
                self.warnings.add("morph_unreadable", f"{target.path}: {error}")
            else:
                arrays.positions, arrays.normals = moved.positions, moved.normals
                arrays.uv, arrays.colors = moved.uv, moved.colors

    def _morphed(
        self,
        arrays: _Arrays,
        target: Element,
        weight: float,
        used: NDArray[np.int64],
        num_vertices: int,
    ) -> _Arrays:
        """Return arrays with one target added.

        Raises:
            GltfError: If the target cannot be read.
        """

        def added(values: Floats, name: str) -> Floats:
            index = target.index(name)
            if index is None:
                return values
            width = self.accessors.stored(index).shape[1]
            change = self.accessors.values(index, width)
            if len(change) != num_vertices or width > values.shape[1]:
                raise GltfError(f"{name} does not fit {num_vertices} vertices")
            result = values.copy()
            result[:, :width] += weight * change[used]
            return result

        return _Arrays(
            positions=added(arrays.positions, "POSITION"),
            triangles=arrays.triangles,
            normals=None if arrays.normals is None else added(arrays.normals, "NORMAL"),
            uv={key: added(values, f"TEXCOORD_{key}") for key, values in arrays.uv.items()},
            colors=None if arrays.colors is None else added(arrays.colors, "COLOR_0"),
        )

    def _pose(
        self, arrays: _Arrays, reader: _AttributeReader, pose: Pose, used: NDArray[np.int64]
    ) -> None:
        """Move the vertices of a primitive with the joints of a skin."""
        try:
            joints, weights = reader.influences(used)
        except GltfError as error:
            self.warnings.add("skin_unreadable", f"{reader.primitive.path}: {error}")
            joints = np.zeros((len(used), 0), dtype=np.int64)
            weights = np.zeros((len(used), 0))
        outside = int(((joints >= pose.num_joints) & (weights != 0)).sum())
        if outside:
            detail = f"{reader.primitive.path}: {outside} joints are not in the skin"
            self.warnings.add("skin_unreadable", detail)
        arrays.positions, arrays.normals, is_mirrored = pose.apply(
            arrays.positions, arrays.normals, joints, weights
        )
        if is_mirrored:
            arrays.triangles = arrays.triangles[:, ::-1]


class _AttributeReader:
    """Reads the attributes of one primitive, from accessors or from a Draco buffer.

    An attribute that cannot be read or does not fit gives a warning and counts as absent, except
    for the positions.
    """

    def __init__(self, accessors: Accessors, primitive: Element, draco: DracoMesh | None):
        self.accessors = accessors
        self.primitive = primitive
        self.draco = draco
        self.attributes = primitive.child("attributes")
        self.num_vertices = 0

    def positions(self) -> Floats:
        """Return the positions [V, 3].

        Raises:
            GltfError: If there are none.
        """
        if self.attributes.index("POSITION") is None:
            raise GltfError("it has no POSITION")
        positions = self._floats("POSITION", (3,))
        self.num_vertices = len(positions)
        return positions

    def normals(self) -> Floats | None:
        """Return the normals [V, 3], None if there are none."""
        return self._optional("NORMAL", (3,))

    def uv(self) -> dict[int, Floats]:
        """Return the texture coordinates [V, 2] by set, with v = 0 at the top."""
        result = {}
        for number in self._sets("TEXCOORD"):
            values = self._optional(f"TEXCOORD_{number}", (2,))
            if values is not None:
                result[number] = values
        return result

    def colors(self) -> Floats | None:
        """Return the linear colours [V, 4], None if there are none."""
        values = self._optional("COLOR_0", (3, 4))
        if values is None:
            return None
        self.accessors.cached(("checked colours", id(values)), lambda: self._check_colors(values))
        if values.shape[1] == 4:
            return values
        return self.accessors.cached(
            ("rgba", id(values)), lambda: np.column_stack([values, np.ones(len(values))])
        )

    def _check_colors(self, colors: Floats) -> None:
        """Report colours [V, 3 or 4] outside of their range. They are clipped."""
        with np.errstate(invalid="ignore"):
            is_valid = ((colors > -COLOR_TOLERANCE) & (colors < 1 + COLOR_TOLERANCE)).all(axis=1)
        detail = f"{self.primitive.path}: colours that are not between 0 and 1"
        self.accessors.warnings.add("invalid_value", detail, int((~is_valid).sum()))

    def influences(self, used: NDArray[np.int64]) -> tuple[NDArray[np.int64], Floats]:
        """Return joints and weights [n, 4 * sets] of the vertices `used`.

        Raises:
            GltfError: If they cannot be read.
        """
        joints = []
        weights = []
        for number in self._sets("JOINTS"):
            joint_set = self._floats(f"JOINTS_{number}", (INFLUENCES,))
            weight_set = self._floats(f"WEIGHTS_{number}", (INFLUENCES,))
            if len(joint_set) != self.num_vertices or len(weight_set) != self.num_vertices:
                raise GltfError(f"joints do not fit {self.num_vertices} vertices")
            joint_set, weight_set = joint_set[used], weight_set[used]
            is_finite = np.isfinite(joint_set) & np.isfinite(weight_set)
            detail = f"{self.primitive.path}: weights that are not finite"
            self.accessors.warnings.add("invalid_value", detail, int((~is_finite).sum()))
            joints.append(np.where(is_finite, joint_set, 0).astype(np.int64))
            weights.append(np.where(is_finite, weight_set, 0))
        if not joints:
            raise GltfError("it has no JOINTS_0")
        if unused := set(self._sets("WEIGHTS")) - set(self._sets("JOINTS")):
            detail = f"{self.primitive.path}: WEIGHTS_{min(unused)} without joints"
            self.accessors.warnings.add("attribute_mismatch", detail, len(unused))
        return np.concatenate(joints, axis=1), np.concatenate(weights, axis=1)

    def _sets(self, semantic: str) -> list[int]:
        """Return the numbers of the sets of a semantic."""
        pattern = re.compile(rf"{semantic}_(\d{{1,6}})")
        return sorted(
            int(match[1])
            for name in self.attributes.data
            if (match := pattern.fullmatch(name)) is not None
        )

    def _optional(self, name: str, widths: tuple[int, ...]) -> Floats | None:
        if name not in self.attributes.data:
            return None
        try:
            values = self._floats(name, widths)
            if len(values) != self.num_vertices:
                raise GltfError(f"{len(values)} values for {self.num_vertices} vertices")
        except GltfError as error:
            detail = f"{self.attributes.path}.{name}: {error}"
            self.accessors.warnings.add("attribute_mismatch", detail)
            return None
        return values

    def _floats(self, name: str, widths: tuple[int, ...]) -> Floats:
        """Return the values of an attribute, which must have one of the widths.

        Raises:
            GltfError: If they cannot be read.
        """
        index = self.attributes.index(name)
        if index is None:
            raise GltfError(f"{name} is not an accessor")
        compressed = self._compressed(name)
        if compressed is None:
            width = self.accessors.stored(index, needs_data=name == "POSITION").shape[1]
            if width not in widths:
                raise GltfError(f"{name} has {width} components")
            return self.accessors.values(index, width)
        if compressed.shape[1] not in widths:
            raise GltfError(f"{name} has {compressed.shape[1]} components")
        key = "draco values", id(compressed), self.accessors.is_normalized(index)
        return self.accessors.cached(key, lambda: to_floats(compressed, normalized=key[2]))

    def _compressed(self, name: str) -> Values | None:
        """Return the values of an attribute in the Draco buffer, None if it is not in there."""
        extension = self.primitive.extension(DRACO)
        if self.draco is None or extension is None:
            return None
        unique_id = extension.child("attributes").index(name)
        if unique_id is None:
            return None
        if unique_id not in self.draco.attributes:
            raise GltfError(f"the Draco buffer has no attribute {unique_id}")
        return self.draco.attributes[unique_id]
