"""Read USD files: layers of text or binary data, and packages of them."""

# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from pxr import Pcp, Sdf, Tf, Usd, UsdGeom, UsdSkel, UsdUtils

from pipeline.core.errors import Reject
from pipeline.mesh_io.reader_context import ReaderContext
from pipeline.mesh_io.readers.usd_accounting import CONTAINERS, Accounting, is_ignored
from pipeline.mesh_io.readers.usd_geometry import (
    DISPLAY,
    MESHES,
    SHAPES,
    GeometryReader,
    Subset,
    Surface,
)
from pipeline.mesh_io.readers.usd_layers import Layers, error_text
from pipeline.mesh_io.readers.usd_materials import Look, Materials
from pipeline.mesh_io.readers.usd_values import TIME, UsdError, array, matrix
from pipeline.mesh_io.scene import Axis, Geometry, Node, Scene, SceneMaterial

PIXELS = ("PointInstancer", *MESHES, *SHAPES)
# Geometry that is not drawn -> the code of its warning.
UNDRAWN_GEOMETRY = {
    "BasisCurves": "curves_left_out",
    "HermiteCurves": "curves_left_out",
    "NurbsCurves": "curves_left_out",
    "NurbsPatch": "curves_left_out",
    "Points": "points_left_out",
    "Volume": "unsupported_primitive",
    "ParticleField": "unsupported_primitive",
    "ParticleField3DGaussianSplat": "unsupported_primitive",
    "GenerativeProcedural": "unsupported_primitive",
    "Preliminary_Text": "unsupported_primitive",
}
GEOMETRY = (*PIXELS, *UNDRAWN_GEOMETRY)
# What the walk enters: defined prims, and for prototypes of instancers also classes and overrides.
DEFINED = Usd.TraverseInstanceProxies(
    Usd.PrimIsActive & Usd.PrimIsDefined & Usd.PrimIsLoaded & ~Usd.PrimIsAbstract
)
ACTIVE = Usd.TraverseInstanceProxies(Usd.PrimIsActive & Usd.PrimIsLoaded)
PLAIN = SceneMaterial()
COLORED = SceneMaterial(base_color=(1.0, 1.0, 1.0, 1.0))
TRANSLUCENT = SceneMaterial(base_color=(1.0, 1.0, 1.0, 1.0), alpha_mode="BLEND")
LEFT_OUT_PURPOSES = ("proxy", "guide")


def read_usd(content: bytes, context: ReaderContext) -> Scene:
    """Read a usd, usda, usdc or usdz file, see `pipeline.mesh_io.reader_context.Reader`.

    The scene is the composed stage with the selected variants. An attribute with samples has the
    value of the first one. Subdivision surfaces are drawn as their cage, and skinned meshes with
    the points that they state.

    Raises:
        Reject: "unreadable", "allocation_bomb" or "too_many_faces".
    """
    # Without a receiver the library prints its messages. What they are about is reported below.
    diagnostics = UsdUtils.CoalescingDiagnosticDelegate()
    try:
        return _StageReader(content, context).read()
    except Tf.ErrorException as error:
        raise Reject("unreadable", error="usd", message=error_text(error)) from error
    finally:
        diagnostics.TakeUncoalescedDiagnostics()


@dataclass(kw_only=True)
class _Node:
    """A node of the scene while it is built; see `Node`."""

    matrix: NDArray[np.float64]
    name: str
    geometries: list[int] = field(default_factory=list)
    children: list[int] = field(default_factory=list)
    materials: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class _Visit:
    """A prim that the walk enters.

    Attributes:
        prim: The prim.
        parent: Index of the node of its parent, None for roots.
        purpose: The purpose that it inherits.
        predicate: Which children the walk enters.
        node: Index of the node that is already there for it, or None.
    """

    prim: Usd.Prim
    parent: int | None
    purpose: str
    predicate: Usd._PrimFlagsPredicate
    node: int | None = None


class _StageReader:
    """Reads the prims of one stage and what they draw."""

    def __init__(self, content: bytes, context: ReaderContext):
        self.cfg = context.cfg
        self.warnings = context.warnings
        self.accounting = Accounting(context.warnings)
        layers = Layers(content, context)
        self.root = layers.root
        self.stage = Usd.Stage.Open(layers.root, None, load=Usd.Stage.LoadAll)
        self.geometry = GeometryReader(context)
        self.materials = Materials(layers, self.geometry, self.accounting, context)
        self.nodes: list[_Node] = []
        self.roots: list[int] = []
        self.geometries: list[Geometry] = []
        self.points = 0
        self.errors: list[str] = []
        self._numbers: dict[object, int | None] = {}  # geometry by what it is made of
        self._prototypes: dict[Sdf.Path, int] = {}
        self._pending: list[_Visit] = []

    def read(self) -> Scene:
        self._report_composition()
        root = self.stage.GetPseudoRoot()
        self._pending = [
            _Visit(prim=prim, parent=None, purpose="default", predicate=DEFINED)
            for prim in reversed(root.GetFilteredChildren(DEFINED))
        ]
        while self._pending:
            self._visit(self._pending.pop())
        self._warn_undefined()
        self.accounting.report()
        if self.errors and not self.geometries:
            raise Reject(
                "unreadable",
                error="no_primitive",
                primitives=len(self.errors),
                message=self.errors[0][:120],
            )
        return Scene(
            geometries=self.geometries,
            nodes=[
                Node(
                    matrix=node.matrix,
                    geometries=tuple(node.geometries),
                    children=tuple(node.children),
                    materials=node.materials,
                    name=node.name,
                )
                for node in self.nodes
            ],
            roots=self.roots,
            materials=self.materials.materials,
            images=self.materials.images,
            up_axis=self._up_axis(),
            metres_per_unit=self._metres_per_unit(),
            points=self.points,
        )

    def _up_axis(self) -> Axis:
        """Return the up axis of the root layer. The format's default is y."""
        axes: dict[object, Axis] = {"X": "x", "Y": "y", "Z": "z", None: "y"}
        stated = self._metadata("upAxis")
        if stated not in axes:
            self.warnings.add("invalid_value", f"the up axis {stated}")
        return axes.get(stated, "y")

    def _metres_per_unit(self) -> float:
        """Return the unit of the root layer. The format's default is a centimetre."""
        stated = self._metadata("metersPerUnit")
        return float(stated) if isinstance(stated, int | float) else 0.01

    def _metadata(self, name: str) -> object:
        """Return metadata of the root layer, whatever its type, or None."""
        root = self.root.pseudoRoot
        return root.GetInfo(name) if root.HasInfo(name) else None

    def _report_composition(self) -> None:
        """Report what could not be composed."""
        for error in self.stage.GetCompositionErrors():
            kind = type(error).__name__.removeprefix("Error")
            is_cycle = isinstance(error, Pcp.ErrorArcCycle | Pcp.ErrorSublayerCycle)
            code = "node_cycle" if is_cycle else "reference_unresolved"
            self.warnings.add(code, f"{error.rootSite.path}: {kind}")

    def _visit(self, visit: _Visit) -> None:
        """Add the node of a prim and its geometry, and queue its children."""
        prim = visit.prim
        kind = str(prim.GetTypeName())
        if kind in ("Material", "NodeGraph", "Shader", "GeomSubset"):
            return
        imageable = UsdGeom.Imageable(prim)
        if imageable and imageable.GetVisibilityAttr().Get(TIME) == UsdGeom.Tokens.invisible:
            self._warn_hidden(visit, "invisible")
            return
        purpose = visit.purpose
        if imageable and imageable.GetPurposeAttr().HasAuthoredValue():
            purpose = str(imageable.GetPurposeAttr().Get(TIME))
        index = self._add_node(visit)
        if kind in GEOMETRY and self._is_left_out(prim, purpose):
            self.warnings.add("hidden_left_out", f"{prim.GetPath()}: purpose {purpose}")
        elif kind == "PointInstancer":
            self.accounting.check(prim)
            self._add_instances(prim, index, purpose)
            return  # its descendants are drawn as prototypes only
        elif kind in (*MESHES, *SHAPES):
            self.accounting.check(prim)
            self._add_geometry(prim, index, visit.predicate)
        elif kind in UNDRAWN_GEOMETRY:
            self._warn_undrawn(prim, kind)
        elif kind in CONTAINERS:
            self.accounting.check(prim)
        elif not is_ignored(f"prim {kind}"):
            self.accounting.unknown_prim(prim)
        self._pending += [
            _Visit(prim=child, parent=index, purpose=purpose, predicate=visit.predicate)
            for child in reversed(prim.GetFilteredChildren(visit.predicate))
        ]

    def _is_left_out(self, prim: Usd.Prim, purpose: str) -> bool:
        if purpose not in ("default", "render", *LEFT_OUT_PURPOSES):
            self.warnings.add("invalid_value", f"{prim.GetPath()}: the purpose {purpose}")
        return purpose in LEFT_OUT_PURPOSES

    def _warn_hidden(self, visit: _Visit, why: str) -> None:
        prims = Usd.PrimRange(visit.prim, visit.predicate)
        if any(str(prim.GetTypeName()) in GEOMETRY for prim in prims):
            self.warnings.add("hidden_left_out", f"{visit.prim.GetPath()}: {why}")

    def _warn_undrawn(self, prim: Usd.Prim, kind: str) -> None:
        count = 1
        if kind == "Points":
            count = max(1, len(array(prim.GetAttribute("points"), np.float64, 3)))
            self.points += count
        self.warnings.add(UNDRAWN_GEOMETRY[kind], f"{prim.GetPath()}: {kind}", count)

    def _warn_undefined(self) -> None:
        """Report meshes that only overrides of missing prims state."""
        for prim in self.stage.TraverseAll():
            is_used = any(prim.GetPath().HasPrefix(path) for path in self._prototypes)
            is_class = prim.IsAbstract() or not prim.IsActive()
            if prim.IsDefined() or is_used or is_class:
                continue
            if str(prim.GetTypeName()) in PIXELS or prim.HasAttribute("faceVertexIndices"):
                self.warnings.add("unplaced_geometry", f"{prim.GetPath()} is not defined")

    def _add_node(self, visit: _Visit) -> int:
        """Return the index of the node of a prim, which has its matrix and its parent."""
        local, is_reset = np.eye(4), False
        placed = UsdGeom.Xformable(visit.prim)
        bound = _bind_matrix(visit.prim)
        if bound is not None:
            local, is_reset = bound, True
        elif placed:
            local = matrix(placed.GetLocalTransformation(TIME))
            is_reset = placed.GetResetXformStack()
        index = len(self.nodes) if visit.node is None else visit.node
        if visit.node is None:
            self.nodes.append(_Node(matrix=local, name=str(visit.prim.GetPath())))
        else:
            self.nodes[index].matrix = local
        if visit.node is None:
            if visit.parent is None or is_reset:
                self.roots.append(index)
            else:
                self.nodes[visit.parent].children.append(index)
        return index

    def _add_geometry(self, prim: Usd.Prim, index: int, predicate: Usd._PrimFlagsPredicate) -> None:
        """Read the geometry of a prim, or share that of another instance of it."""
        source = prim.GetPrimInPrototype() if prim.IsInstanceProxy() else prim
        try:
            look = self.materials.bound_look(prim)
            subsets = self._subsets(prim, predicate)
            surface, material = self._surface(prim, look, -1)
            inherited = self._inherited_values(prim, source)
            key = (
                source.GetPath(),
                surface,
                tuple((path, subset.surface) for path, subset in subsets),
                inherited,
            )
            if key not in self._numbers:
                self._numbers[key] = None
                geometry = self.geometry.read(prim, surface, [subset for _, subset in subsets])
                self._numbers[key] = len(self.geometries)
                self.geometries.append(geometry)
        except (UsdError, Tf.ErrorException) as error:
            message = f"{prim.GetPath()}: {error_text(error)}"
            self.errors.append(message)
            self.warnings.add("primitive_unreadable", message)
            return
        number = self._numbers[key]
        if number is not None:
            self.nodes[index].geometries.append(number)
            self.nodes[index].materials[-1] = material

    def _inherited_values(self, prim: Usd.Prim, source: Usd.Prim) -> tuple[object, ...]:
        """Return what the ancestors of an instance give to its geometry, which others may not."""
        if source == prim:
            return ()
        values = []
        for primvar in UsdGeom.PrimvarsAPI(prim).FindPrimvarsWithInheritance():
            attribute = primvar.GetAttr()
            if attribute.GetPrim() != prim:
                values.append((str(primvar.GetName()), str(primvar.Get(TIME))[:1000]))
        return tuple(values)

    def _surface(self, prim: Usd.Prim, look: Look | None, material: int) -> tuple[Surface, int]:
        """Return what draws polygons, and the index of their material.

        Args:
            prim: The prim with the polygons.
            look: The material that is bound, or None.
            material: -1 to leave the material to the node, any other value to use the index.
        """
        if look is not None:
            tint, index = look.tint, look.material
        else:
            tint = DISPLAY
            has_color = UsdGeom.PrimvarsAPI(prim).FindPrimvarWithInheritance(DISPLAY.color)
            plain = COLORED if has_color and has_color.HasValue() else PLAIN
            is_translucent = self.geometry.has_translucency(prim)
            index = self.materials.add(TRANSLUCENT if is_translucent else plain)
        return Surface(material=-1 if material == -1 else index, tint=tint), index

    def _subsets(
        self, prim: Usd.Prim, predicate: Usd._PrimFlagsPredicate
    ) -> list[tuple[Sdf.Path, Subset]]:
        """Return the subsets of the faces of a mesh that bind materials, by their paths."""
        subsets = []
        own = UsdGeom.Tokens.face
        for child in prim.GetFilteredChildren(predicate):
            if child.GetTypeName() != "GeomSubset":
                continue
            self.accounting.check(child)
            subset = UsdGeom.Subset(child)
            binding = child.GetRelationship("material:binding")
            if subset.GetElementTypeAttr().Get(TIME) != own or not binding:
                continue
            look = self.materials.bound_look(child)
            surface, _ = self._surface(prim, look, 0)
            polygons = array(subset.GetIndicesAttr(), np.int64)
            subsets.append((child.GetName(), Subset(polygons=polygons, surface=surface)))
        return subsets

    def _add_instances(self, prim: Usd.Prim, index: int, purpose: str) -> None:
        """Add a node for each instance of a point instancer."""
        instancer = UsdGeom.PointInstancer(prim)
        targets = instancer.GetPrototypesRel().GetTargets()
        try:
            prototype_of = array(instancer.GetProtoIndicesAttr(), np.int64)
            if len(prototype_of) > self.cfg.max_instances:
                raise Reject(
                    "too_many_faces",
                    instances=len(prototype_of),
                    max_instances=self.cfg.max_instances,
                )
            placements = instancer.ComputeInstanceTransformsAtTime(
                TIME,
                TIME,
                UsdGeom.PointInstancer.ExcludeProtoXform,
                UsdGeom.PointInstancer.IgnoreMask,
            )
            mask = list(instancer.ComputeMaskAtTime(TIME))
        except (UsdError, Tf.ErrorException) as error:
            self.warnings.add("primitive_unreadable", f"{prim.GetPath()}: {error_text(error)}")
            return
        if len(placements) != len(prototype_of):
            detail = f"{prim.GetPath()}: {len(placements)} for {len(prototype_of)} instances"
            self.warnings.add("primitive_unreadable", detail)
            return
        shown = mask if len(mask) == len(prototype_of) else [True] * len(prototype_of)
        hidden = len(shown) - sum(shown)
        self.warnings.add("hidden_left_out", f"{prim.GetPath()}: instances", hidden)
        prototypes = [self._prototype(prim, target, purpose) for target in targets]
        missing = 0
        for number, placement, is_shown in zip(prototype_of, placements, shown, strict=True):
            if not is_shown:
                continue
            node = prototypes[number] if 0 <= number < len(prototypes) else None
            if node is None:
                missing += 1
                continue
            self.nodes[index].children.append(len(self.nodes))
            self.nodes.append(
                _Node(matrix=matrix(placement), name=str(prim.GetPath()), children=[node])
            )
        self.warnings.add("invalid_value", f"{prim.GetPath()}: missing prototypes", missing)

    def _prototype(self, instancer: Usd.Prim, path: Sdf.Path, purpose: str) -> int | None:
        """Return the index of the node of a prototype, None if there is no such prim."""
        prim = self.stage.GetPrimAtPath(path)
        if not prim or not prim.IsActive():
            self.warnings.add("reference_unresolved", f"{instancer.GetPath()}: {path}")
            return None
        if path not in self._prototypes:
            self._prototypes[path] = len(self.nodes)
            self.nodes.append(_Node(matrix=np.eye(4), name=str(path)))
            self._pending.append(
                _Visit(
                    prim=prim,
                    parent=None,
                    purpose=purpose,
                    predicate=ACTIVE,
                    node=self._prototypes[path],
                )
            )
        return self._prototypes[path]


def _bind_matrix(prim: Usd.Prim) -> NDArray[np.float64] | None:
    """Return the matrix from a skinned mesh to the scene in its bind pose, None without a skin.

    The skeleton places a skinned mesh, and not the transform of its own prim.
    """
    joints = UsdGeom.PrimvarsAPI(prim).FindPrimvarWithInheritance("skel:jointIndices")
    if prim.GetTypeName() != "Mesh" or not joints or not joints.HasValue():
        return None
    binding = UsdSkel.BindingAPI(prim)
    skeleton = binding.GetInheritedSkeleton()
    if not skeleton or not UsdSkel.Root.Find(prim):
        return None
    world = matrix(skeleton.ComputeLocalToWorldTransform(TIME))
    bind = UsdGeom.PrimvarsAPI(prim).FindPrimvarWithInheritance("skel:geomBindTransform")
    value = bind.Get(TIME) if bind else None
    return world if value is None else world @ matrix(value)
