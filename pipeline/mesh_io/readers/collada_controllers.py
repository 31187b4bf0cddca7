"""Skins and morph targets of COLLADA documents in the pose that the scene states."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from pipeline.mesh_io.load_warnings import WarningLog
from pipeline.mesh_io.readers.collada_geometry import GeometryReader, Primitive
from pipeline.mesh_io.readers.collada_values import Document
from pipeline.mesh_io.scene import Attribute, Geometry
from pipeline.mesh_io.xml_tree import Element

MAX_CHAIN = 16  # controllers that refer to each other


class ControllerError(ValueError):
    """A controller cannot be read."""


@dataclass(frozen=True, kw_only=True)
class Skin:
    """A skin of V vertices and J joints.

    Attributes:
        joints: Names of the joints, as the nodes' sid or id.
        inverse_bind: float64 [J, 4, 4].
        bind_shape: float64 [4, 4], applied before the joints.
        vertices: int64 [W], the vertex of each weight.
        joint_of: int64 [W], its joint. -1 is the bind shape itself.
        weights: float64 [W].
    """

    joints: list[str]
    inverse_bind: NDArray[np.float64]
    bind_shape: NDArray[np.float64]
    vertices: NDArray[np.int64]
    joint_of: NDArray[np.int64]
    weights: NDArray[np.float64]

    def matrices(self, poses: NDArray[np.float64], count: int) -> NDArray[np.float64]:
        """Return the matrix of each vertex, float64 [V, 4, 4].

        A vertex without weights keeps the bind shape. Weights are divided by their sum.

        Args:
            poses: Matrix of each joint, [J, 4, 4].
            count: The number of vertices.
        """
        bones = np.concatenate([poses @ self.inverse_bind, np.eye(4)[None]])
        sums = np.bincount(self.vertices, weights=self.weights, minlength=count)
        matrices = np.zeros((count, 4, 4))
        for row in range(4):
            for column in range(4):
                values = self.weights * bones[self.joint_of, row, column]
                matrices[:, row, column] = np.bincount(
                    self.vertices, weights=values, minlength=count
                )
        is_weighted = sums != 0
        matrices[is_weighted] /= sums[is_weighted, None, None]
        matrices[~is_weighted] = np.eye(4)
        return matrices @ self.bind_shape


class ControllerReader:
    """Reads the controllers of a document.

    Args:
        document: The document.
        geometries: Reads the meshes.
        warnings: Receives "skin_unreadable" and "morph_unreadable".
    """

    def __init__(self, document: Document, geometries: GeometryReader, warnings: WarningLog):
        self._document = document
        self._geometries = geometries
        self._warnings = warnings
        self.used_geometries: set[int] = set()  # id() of the geometries of controllers

    def read(self, controller: Element) -> tuple[list[Primitive], Skin | None]:
        """Return the mesh of a controller with its morph targets applied, and its skin.

        Args:
            controller: A <controller>.

        Returns:
            The primitives without skin, and the skin, or None if there is none or if it cannot be
            read.

        Raises:
            ControllerError: If there is no mesh.
        """
        skin = None
        morphs: list[Element] = []
        element = controller
        for _ in range(MAX_CHAIN):
            if element.name == "geometry":
                break
            child = element.first("skin", "morph")
            if child is None:
                raise ControllerError(f"controller {element.get('id')} is empty")
            if child.name == "skin" and skin is None:
                skin = child
            elif child.name == "skin":
                self._warnings.add("skin_unreadable", f"{element.get('id')}: a skin of a skin")
            else:
                morphs.append(child)
            source = self._document.find(child.get("source"), "geometry", "controller")
            if source is None:
                raise ControllerError(f"no geometry {child.get('source')}")
            element = source
        else:
            raise ControllerError(f"controller {controller.get('id')} refers to itself")
        self.used_geometries.add(id(element))
        primitives = self._geometries.primitives(element)
        for morph in reversed(morphs):
            primitives = self._with_morph(primitives, morph)
        return primitives, None if skin is None else self._skin(skin, controller)

    def _with_morph(self, primitives: list[Primitive], morph: Element) -> list[Primitive]:
        """Return the primitives with the weighted targets of a morph."""
        targets, weights = self._targets(morph)
        is_relative = morph.get("method", "NORMALIZED").upper() == "RELATIVE"
        for target in targets:
            if target is not None:
                self.used_geometries.add(id(target))
        moved: dict[int, NDArray[np.float64]] = {}  # by id() of the array of base positions
        result = []
        for index, primitive in enumerate(primitives):
            base = primitive.geometry.positions
            if id(base) not in moved:
                positions = base.copy()
                total = 0.0
                for target, weight in zip(targets, weights):
                    if weight == 0 or target is None:
                        continue
                    others = self._geometries.primitives(target)
                    shape = others[min(index, len(others) - 1)].geometry if others else None
                    if shape is None or len(shape.positions) != len(base):
                        self._warnings.add("morph_unreadable", f"target {target.get('id')}")
                        continue
                    positions += weight * shape.positions
                    total += weight
                moved[id(base)] = positions if is_relative else positions - total * base
            geometry = replace(primitive.geometry, positions=moved[id(base)])
            result.append(replace(primitive, geometry=geometry))
        return result

    def _targets(self, morph: Element) -> tuple[list[Element | None], NDArray[np.float64]]:
        inputs = {
            item.get("semantic"): item.get("source")
            for element in morph.all("targets")
            for item in element.all("input")
        }
        names = self._document.names(inputs.get("MORPH_TARGET", ""))
        weights = None
        if "MORPH_WEIGHT" in inputs:
            weights = self._document.values(inputs["MORPH_WEIGHT"], "morph weights")
        if names is None or weights is None:
            self._warnings.add("morph_unreadable", "no targets or no weights")
            return [], np.empty(0)
        if len(names) != len(weights):
            self._warnings.add("morph_unreadable", f"{len(weights)} weights for {len(names)}")
        targets = [self._document.find(name, "geometry") for name in names]
        missing = [name for name, target in zip(names, targets, strict=True) if target is None]
        if missing:
            self._warnings.add("morph_unreadable", f"no geometry {missing[0]}", len(missing))
        return targets, weights[:, 0]

    def _skin(self, element: Element, controller: Element) -> Skin | None:
        try:
            return self._parsed_skin(element)
        except ControllerError as error:
            self._warnings.add("skin_unreadable", f"{controller.get('id')}: {error}")
            return None

    def _parsed_skin(self, element: Element) -> Skin:
        document = self._document
        matrix = document.numbers(element.first("bind_shape_matrix"), 16)
        if len(matrix) not in (0, 16) or not np.isfinite(matrix).all():
            raise ControllerError("the bind shape matrix is invalid")
        joints = element.first("joints")
        table = element.first("vertex_weights")
        if joints is None or table is None:
            raise ControllerError("there are no joints or no weights")
        sources = {item.get("semantic"): item.get("source") for item in joints.all("input")}
        names = document.names(sources.get("JOINT", ""))
        inverse = document.values(sources.get("INV_BIND_MATRIX", ""), "inverse bind matrices")
        if names is None or inverse is None or inverse.size != 16 * len(names):
            raise ControllerError("joints and inverse bind matrices do not fit")
        inputs = {item.get("semantic"): item for item in table.all("input")}
        if not {"JOINT", "WEIGHT"} <= inputs.keys():
            raise ControllerError("the weights have no joints or no values")
        values = document.values(inputs["WEIGHT"].get("source"), "weights")
        counts = document.integers(table.first("vcount"))
        stride = 1 + max(document.integer(item, "offset", 0) for item in table.all("input"))
        entries = document.integers(table.first("v"))
        if values is None or (counts < 0).any() or int(counts.sum()) * stride != len(entries):
            raise ControllerError("the counts of the weights do not fit")
        rows = entries.reshape(-1, stride)
        joint_of = rows[:, document.integer(inputs["JOINT"], "offset", 0)]
        weight_of = rows[:, document.integer(inputs["WEIGHT"], "offset", 0)]
        if len(rows) and (
            joint_of.min() < -1
            or joint_of.max() >= len(names)
            or weight_of.min() < 0
            or weight_of.max() >= len(values)
        ):
            raise ControllerError("an index of the weights does not exist")
        weights = values[:, 0][weight_of] if len(rows) else np.empty(0)
        is_finite = np.isfinite(weights)
        self._warnings.add(
            "invalid_value", "weights of joints that are not finite", int((~is_finite).sum())
        )
        weights = np.where(is_finite, weights, 0)
        return Skin(
            joints=names,
            inverse_bind=inverse.reshape(-1, 4, 4),
            bind_shape=matrix.reshape(4, 4) if len(matrix) else np.eye(4),
            vertices=np.repeat(np.arange(len(counts)), counts),
            joint_of=joint_of,
            weights=weights,
        )


def with_matrices(geometry: Geometry, matrices: NDArray[np.float64]) -> Geometry:
    """Return a geometry whose vertices are moved by a matrix each.

    Args:
        geometry: The geometry with V vertices.
        matrices: float64 [V, 4, 4].
    """
    positions = np.einsum("vij,vj->vi", matrices[:, :3, :3], geometry.positions)
    positions += matrices[:, :3, 3]
    normals = geometry.normals
    if normals is not None:
        linear = matrices[:, :3, :3]
        # The cofactors transform normals, also by singular matrices.
        rows = [np.cross(linear[:, (i + 1) % 3], linear[:, (i + 2) % 3]) for i in range(3)]
        cofactors = np.stack(rows, axis=1)
        owner = np.arange(len(positions))
        if normals.domain == "corner":
            owner = geometry.corners.clip(0, max(len(positions) - 1, 0))
        values = np.asarray(normals.values, dtype=np.float64)
        if len(values) == len(owner):
            values = np.einsum("nij,nj->ni", cofactors[owner], values).astype(np.float32)
            normals = Attribute(values=values, domain=normals.domain)
    return replace(geometry, positions=positions, normals=normals)
