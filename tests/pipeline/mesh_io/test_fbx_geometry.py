"""FBX files: containers, node transforms, axes, polygons, layers, deformers and hostile files."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest

from pipeline.core.errors import Reject
from pipeline.mesh_io.config import LoadConfig
from pipeline.mesh_io.load import load_with_report
from tests.pipeline.mesh_files import write
from tests.pipeline.mesh_io.fbx_files import (
    CUBE,
    QUADS,
    axes,
    binary,
    cube,
    document,
    e,
    layer,
    mesh,
    model,
    p,
    polygon_indices,
    properties,
    settings,
    text,
)
from tests.pipeline.mesh_io.measures import area, assert_fuzzed_files_are_safe, volume

CFG = LoadConfig()


@pytest.fixture
def load(tmp_path):
    """Return (mesh, {code: count}) of a tree, bytes or text, written as binary by default."""

    def load(content, cfg=CFG):
        if isinstance(content, list):
            content = binary(content)
        mesh, report = load_with_report(write(tmp_path / "a.fbx", content), cfg)
        return mesh, {warning.code: warning.count for warning in report.warnings}

    return load


def corners_of(mesh) -> np.ndarray:
    return mesh.vertices[mesh.faces]


def box(mesh) -> list[float]:
    points = corners_of(mesh).reshape(-1, 3)
    return np.concatenate([points.min(axis=0), points.max(axis=0)]).round(6).tolist()


CONTAINERS = {
    "binary 7.4": lambda tree: binary(tree, 7400),
    "binary 7.5": lambda tree: binary(tree, 7500),
    "binary 7.7": lambda tree: binary(tree, 7700),
    "binary, big-endian": lambda tree: binary(tree, 7400, order=">"),
    "text": lambda tree: text(tree),
    "text, carriage returns": lambda tree: text(tree).replace(b"\n", b"\r\n"),
    "text, UTF-16": lambda tree: text(tree).decode().encode("utf-16"),
}


class TestContainers:
    @pytest.mark.parametrize("container", CONTAINERS)
    def test_each_container_gives_the_same_cube(self, load, container):
        mesh, codes = load(CONTAINERS[container](cube(p("Lcl Translation", 1.0, 2.0, 3.0))))
        assert codes == {}
        assert len(mesh.faces) == 12
        assert area(mesh) == pytest.approx(24)
        assert volume(mesh) == pytest.approx(8)
        assert box(mesh) == [0, 1, 2, 2, 3, 4]

    @pytest.mark.parametrize("version", [3000, 5800, 8000])
    @pytest.mark.parametrize("container", [binary, text])
    def test_other_versions_are_rejected_by_name(self, load, version, container):
        with pytest.raises(Reject, match=f"unsupported_version format=fbx version={version}"):
            load(container(cube(), version))

    def test_comments_and_leading_commas_are_read(self, load):
        content = text(cube()).replace(b"a: ", b"a: ;a comment, 7\n", 1)
        assert content.count(b'"OO", ') == 2
        assert load(content.replace(b'"OO", ', b'"OO"\n, '))[1] == {}

    def test_a_file_that_ends_early_is_used_as_far_as_it_is_there(self, load):
        content = binary([*cube(), e("Takes", "x" * 100)])
        mesh, codes = load(content[:-260])
        assert codes == {"truncated_data": 1}
        assert volume(mesh) == pytest.approx(8)

    def test_uncompressed_arrays_are_read(self, load):
        assert volume(load(binary(cube(), compress=False))[0]) == pytest.approx(8)

    def test_text_beyond_utf_8_is_read_with_a_warning(self, load):
        content = text(cube()).replace(b"Model::node", "Model::été".encode("cp1252"))
        assert load(content)[1] == {"text_encoding": 1}


class TestTransforms:
    def test_pivots_are_applied_in_the_order_of_the_format(self, load):
        table = """
            Lcl Translation, 1, 2, 3
            Lcl Rotation, 30, 40, 50
            Lcl Scaling, 1, 2, 3
            RotationOffset, 0.1, 0.2, 0.3
            RotationPivot, 0.5, 0, 0
            ScalingOffset, 0, 0.3, 0
            ScalingPivot, 0, 0, 0.7
            PreRotation, 10, 20, 0
            PostRotation, 0, 15, 25
            GeometricTranslation, 0, 1, 0
            GeometricRotation, 90, 0, 0
            GeometricScaling, 1, 1, 2
        """
        lines = (line.strip().split(", ") for line in table.strip().splitlines())
        rows = {name: tuple(map(float, values)) for name, *values in lines}
        mesh, codes = load(cube(*(p(name, *values) for name, values in rows.items())))
        assert codes == {}

        # The same product with scipy's rotations, step by step on homogeneous points.
        from scipy.spatial.transform import Rotation

        def t(name, sign=1):
            matrix = np.eye(4)
            matrix[:3, 3] = np.array(rows[name]) * sign
            return matrix

        def r(name):
            matrix = np.eye(4)
            matrix[:3, :3] = Rotation.from_euler("xyz", rows[name], degrees=True).as_matrix()
            return matrix

        def s(name):
            return np.diag([*rows[name], 1.0])

        matrix = t("Lcl Translation") @ t("RotationOffset") @ t("RotationPivot")
        matrix = matrix @ r("PreRotation") @ r("Lcl Rotation") @ np.linalg.inv(r("PostRotation"))
        matrix = matrix @ t("RotationPivot", -1) @ t("ScalingOffset") @ t("ScalingPivot")
        matrix = matrix @ s("Lcl Scaling") @ t("ScalingPivot", -1)
        matrix = matrix @ t("GeometricTranslation") @ r("GeometricRotation")
        matrix = matrix @ s("GeometricScaling")
        expected = CUBE @ matrix[:3, :3].T + matrix[:3, 3]
        found = np.unique(mesh.vertices.round(9), axis=0)
        assert np.allclose(found, np.unique(expected.round(9), axis=0))

    @pytest.mark.parametrize("order", range(6))
    def test_orders_of_rotation(self, load, order):
        from scipy.spatial.transform import Rotation

        name = ("xyz", "xzy", "yzx", "yxz", "zxy", "zyx")[order]
        degrees = dict(zip("xyz", (10.0, 20.0, 30.0)))
        rows = [p("Lcl Rotation", *degrees.values()), p("RotationOrder", order)]
        mesh, _ = load(cube(*rows, p("RotationActive", 1), p("Lcl Scaling", 1.0, 2.0, 3.0)))
        angles = [degrees[axis] for axis in name]
        turn = Rotation.from_euler(name, angles, degrees=True).as_matrix()
        expected = np.unique(((CUBE * [1, 2, 3]) @ turn.T).round(9), axis=0)
        assert np.allclose(np.unique(mesh.vertices.round(9), axis=0), expected)

    def test_an_inactive_rotation_space_has_no_pre_rotation(self, load):
        rows = [p("PreRotation", 45.0, 0.0, 0.0), p("RotationActive", 0)]
        assert box(load(cube(*rows))[0]) == [-1, -1, -1, 1, 1, 1]

    @pytest.mark.parametrize(
        ("inherit", "size"),
        [
            (0, [1, 2, 2]),  # R r S s: the scaling of the parent acts in the axes of the child
            (1, [2, 1, 2]),  # R S r s
            (2, [1, 1, 1]),  # R r s, halved by the child itself
        ],
    )
    def test_inherited_scales(self, load, inherit, size):
        """The parent is twice as long in x and z, the child is turned by 90 degrees about z."""
        parent = model(3, p("Lcl Scaling", 2.0, 1.0, 2.0), name="parent", kind="Null")
        child = model(2, p("Lcl Rotation", 0.0, 0.0, 90.0), p("InheritType", inherit))
        if inherit == 2:
            child = model(
                2,
                p("Lcl Rotation", 0.0, 0.0, 90.0),
                p("InheritType", inherit),
                p("Lcl Scaling", 1.0, 1.0, 1.0),
            )
        tree = document([mesh(1), parent, child], [(1, 2), (2, 3), (3, 0)])
        low, high = np.split(np.array(box(load(tree)[0])), 2)
        assert np.allclose((high - low) / 2, size)

    def test_a_mirrored_node_keeps_its_outside(self, load):
        assert volume(load(cube(p("Lcl Scaling", -1.0, 1.0, 1.0)))[0]) == pytest.approx(8)

    def test_defaults_come_from_the_templates(self, load):
        template = e(
            "PropertyTemplate", "FbxNode", children=[properties(p("Lcl Scaling", 3.0, 3.0, 3.0))]
        )
        definitions = e("Definitions", children=[e("ObjectType", "Model", children=[template])])
        assert volume(load(cube(top=[definitions]))[0]) == pytest.approx(8 * 27)

    def test_a_node_below_itself_is_cut_with_a_warning(self, load):
        tree = document(
            [mesh(1), model(2), model(3, p("Lcl Translation", 5.0, 0.0, 0.0))],
            [(1, 2), (2, 3), (3, 2)],
        )
        mesh_, codes = load(tree)
        assert codes == {"node_cycle": 1}
        assert len(mesh_.faces) == 12

    def test_nodes_outside_the_scene_are_roots(self, load):
        assert load(document([mesh(1), model(2)], [(1, 2)]))[1] == {}

    def test_a_deep_chain_of_nodes_is_read(self, load):
        nodes = [model(k, p("Lcl Translation", 1.0, 0.0, 0.0)) for k in range(2, 1202)]
        links = [(k, k - 1) for k in range(3, 1202)]
        tree = document([mesh(1), *nodes], [(2, 0), *links, (1, 1201)])
        assert box(load(tree)[0])[0] == pytest.approx(1199)


class TestAxes:
    def report(self, tmp_path, top):
        path = write(tmp_path / "a.fbx", binary(cube(p("Lcl Scaling", 1.0, 2.0, 3.0), top=top)))
        mesh, report = load_with_report(path, CFG)
        low, high = np.split(np.array(box(mesh)), 2)
        return ((high - low) / 2).tolist(), report.up_axis, report.up_origin, volume(mesh)

    @pytest.mark.parametrize(
        ("stated", "size", "up"),
        [
            (axes(0, 1, 2), [1, 2, 3], "y"),
            (axes(0, 2, 1, (1, 1, -1)), [1, 3, 2], "z"),  # 3ds Max
            (axes(1, 2, 0), [2, 3, 1], "z"),  # the front is +x
            (axes(1, 0, 2, (-1, 1, 1)), [2, 1, 3], "x"),
        ],
    )
    def test_stated_axes(self, tmp_path, stated, size, up):
        assert self.report(tmp_path, [stated]) == (size, up, "stated", pytest.approx(48))

    def test_the_front_turns_the_scene(self, load):
        """The file's +x is the front, so it is +z of the result."""
        top = [axes(1, 2, 0)]
        mesh, _ = load(cube(p("Lcl Translation", 5.0, 0.0, 0.0), top=top))
        assert box(mesh) == [-1, -1, 4, 1, 1, 6]

    def test_z_up_is_turned_as_in_other_formats(self, load):
        mesh, _ = load(cube(p("Lcl Translation", 0.0, 0.0, 5.0), top=[axes(0, 2, 1, (1, 1, -1))]))
        assert box(mesh) == [-1, 4, -1, 1, 6, 1]

    def test_an_up_axis_that_points_down_turns_the_scene(self, load):
        mesh, _ = load(cube(p("Lcl Translation", 0.0, 5.0, 0.0), top=[axes(0, 1, 2, (-1, -1, 1))]))
        assert box(mesh) == [-1, -6, -1, 1, -4, 1]

    def test_a_left_handed_system_is_mirrored(self, load):
        mesh, _ = load(cube(p("Lcl Translation", 0.0, 0.0, 5.0), top=[axes(0, 1, 2, (1, 1, -1))]))
        assert box(mesh) == [-1, -1, -6, 1, 1, -4]
        assert volume(mesh) == pytest.approx(8)

    def test_impossible_axes_give_a_warning(self, load):
        assert load(cube(top=[axes(1, 1, 2)]))[1] == {"invalid_value": 1}

    def test_no_axes_are_the_convention(self, tmp_path):
        assert self.report(tmp_path, [])[1:3] == ("y", "convention")


class TestPolygons:
    def test_a_concave_polygon_has_its_area(self, load):
        outline = [[0, 0, 0], [4, 0, 0], [4, 4, 0], [2, 1, 0], [0, 4, 0]]
        tree = document(
            [mesh(1, vertices=outline, polygons=[range(5)]), model(2)], [(1, 2), (2, 0)]
        )
        assert area(load(tree)[0]) == pytest.approx(10)

    def test_points_and_lines_are_left_out(self, load):
        tree = document(
            [mesh(1, polygons=[*QUADS, [0], [0, 1], [1, 2]]), model(2)], [(1, 2), (2, 0)]
        )
        mesh_, codes = load(tree)
        assert codes == {"points_left_out": 1, "lines_left_out": 2}
        assert len(mesh_.faces) == 12

    def test_a_polygon_with_a_vertex_that_does_not_exist_is_left_out(self, load):
        tree = document([mesh(1, polygons=[*QUADS, [0, 1, 99]]), model(2)], [(1, 2), (2, 0)])
        mesh_, codes = load(tree)
        assert codes == {"index_out_of_range": 1}
        assert len(mesh_.faces) == 12

    def test_holes_and_invisible_polygons_are_left_out(self, load):
        hole = layer(
            "LayerElementHole", "ByPolygon", "Direct", ("Hole", np.array([1, 0, 0, 0, 0, 0]))
        )
        shown = layer(
            "LayerElementVisibility",
            "ByPolygon",
            "Direct",
            ("Visibility", np.array([1, 1, 0, 1, 1, 1])),
        )
        mesh_, codes = load(cube(layers=[hole, shown]))
        assert codes == {"hidden_left_out": 2}
        assert area(mesh_) == pytest.approx(16)

    def test_a_mesh_at_two_nodes_is_drawn_twice(self, load):
        tree = document(
            [mesh(1), model(2), model(3, p("Lcl Translation", 4.0, 0.0, 0.0))],
            [(1, 2), (1, 3), (2, 0), (3, 0)],
        )
        assert volume(load(tree)[0]) == pytest.approx(16)

    def test_a_mesh_without_node_is_reported(self, load):
        tree = document([mesh(1), mesh(3), model(2)], [(1, 2), (2, 0)])
        assert load(tree)[1] == {"unplaced_geometry": 1}

    @pytest.mark.parametrize(
        ("kind", "code"),
        [
            ("NurbsSurface", "curves_left_out"),
            ("NurbsCurve", "curves_left_out"),
            ("Line", "lines_left_out"),
            ("Voxels", "unsupported_primitive"),
        ],
    )
    def test_other_geometry_is_left_out_with_a_code(self, load, kind, code):
        other = e("Geometry", 5, "Geometry::x", kind, children=[e("GeometryVersion", 1)])
        assert load(cube(others=[other], links=[(5, 2)]))[1] == {code: 1}

    def test_too_many_faces_are_rejected(self, load):
        with pytest.raises(Reject, match="too_many_faces"):
            load(cube(), LoadConfig(max_faces=10))

    @pytest.mark.parametrize(
        ("mapping", "reference", "values", "index"),
        [
            ("ByPolygonVertex", "Direct", 24, None),
            ("ByVertice", "Direct", 8, None),
            ("ByVertex", "IndexToDirect", 8, 8),
            ("ByPolygonVertex", "IndexToDirect", 3, 24),
            ("ByPolygonVertex", "Index", 3, 24),
            ("ByPolygon", "Direct", 6, None),
            ("ByPolygon", "IndexToDirect", 2, 6),
            ("AllSame", "Direct", 1, None),
            ("AllSame", "IndexToDirect", 1, 1),
        ],
    )
    def test_all_mappings_of_layers(self, load, mapping, reference, values, index):
        colors = np.random.default_rng(0).integers(0, 256, (values, 4)) / 255
        colors[:, 3] = 1
        arrays = [("Colors", colors.ravel())]
        chosen = np.arange(values)
        if index is not None:
            chosen = np.arange(index)[::-1] % values
            arrays.append(("ColorIndex", chosen.astype(np.int32)))
        mesh_, codes = load(cube(layers=[layer("LayerElementColor", mapping, reference, *arrays)]))
        assert codes == {}
        corner_of = np.concatenate(QUADS)
        rows = {
            "ByPolygonVertex": np.arange(24),
            "ByVertice": corner_of,
            "ByVertex": corner_of,
            "ByPolygon": np.repeat(np.arange(6), 4),
            "AllSame": np.zeros(24, dtype=int),
        }[mapping]
        expected = np.rint(colors * 255)[chosen[rows]].astype(int)  # of each corner
        # The first triangle of each quad has its first three corners.
        (part,) = mesh_.parts
        for quad in range(6):
            corners = mesh_.faces[2 * quad]
            found = {tuple(mesh_.vertices[v].tolist()): part.colors[v].tolist() for v in corners}
            for k in range(3):
                place = tuple(CUBE[QUADS[quad][k]].tolist())
                assert found[place] == expected[4 * quad + k].tolist()

    @pytest.mark.parametrize("count", [1, 23])
    def test_a_layer_that_does_not_fit_is_left_out_with_a_code(self, load, count):
        normals = layer(
            "LayerElementNormal", "ByPolygonVertex", "Direct", ("Normals", np.ones(3 * count))
        )
        assert load(cube(layers=[normals]))[1] == {"attribute_mismatch": 1}


class TestVisibility:
    @pytest.mark.parametrize(
        "rows",
        [[p("Visibility", 0.0)], [p("Show", 0)], [p("Visibility", False)]],
    )
    def test_hidden_nodes_are_left_out(self, load, rows):
        extra = [mesh(5), model(6, *rows)]
        mesh_, codes = load(cube(others=extra, links=[(5, 6), (6, 0)]))
        assert codes == {"hidden_left_out": 1}
        assert len(mesh_.faces) == 12

    @pytest.mark.parametrize(("inherits", "faces"), [(1, 12), (0, 24)])
    def test_visibility_is_inherited_where_the_child_says_so(self, load, inherits, faces):
        extra = [
            model(4, p("Visibility", 0.0), kind="Null"),
            mesh(5),
            model(6, p("Visibility Inheritance", inherits)),
        ]
        mesh_, _ = load(cube(others=extra, links=[(4, 0), (5, 6), (6, 4)]))
        assert len(mesh_.faces) == faces

    def test_a_hidden_display_layer_hides_its_nodes(self, load):
        group = e(
            "CollectionExclusive",
            7,
            "DisplayLayer::x",
            "DisplayLayer",
            children=[properties(p("Show", 0))],
        )
        extra = [mesh(5), model(6), group]
        _, codes = load(cube(others=extra, links=[(5, 6), (6, 0), (6, 7)]))
        assert codes == {"hidden_left_out": 1}

    def test_only_the_finest_level_of_detail_is_drawn(self, load):
        flat = [[0, 1, 3, 2]]
        objects = [
            model(10, name="group", kind="LodGroup"),
            mesh(1),
            model(2, name="LOD0"),
            mesh(3, polygons=flat),
            model(4, name="LOD1"),
        ]
        tree = document(objects, [(10, 0), (2, 10), (4, 10), (1, 2), (3, 4)])
        mesh_, codes = load(tree)
        assert codes == {}
        assert len(mesh_.faces) == 12


def deformer(key, kind, *children, label="Deformer::d"):
    return e("Deformer", key, label, kind, children=children)


def moved_matrix(x, y, z):
    """A translation as the format stores matrices: by columns."""
    matrix = np.eye(4)
    matrix[3, :3] = x, y, z
    return e("Transform", matrix.ravel())


class TestDeformers:
    def shaped(self, percent, *, shapes=1, full=None):
        objects = [
            deformer(20, "BlendShape"),
            deformer(
                21,
                "BlendShapeChannel",
                properties(p("DeformPercent", percent)),
                *([e("FullWeights", np.array(full))] if full else []),
                label="SubDeformer::c",
            ),
        ]
        links = [(20, 1), (21, 20)]
        for k in range(shapes):
            moves = np.zeros((4, 3))
            moves[:, 2] = 2.0 * (k + 1)
            objects.append(
                e(
                    "Geometry",
                    30 + k,
                    "Geometry::s",
                    "Shape",
                    children=[
                        e("Indexes", np.arange(4, 8, dtype=np.int32)),
                        e("Vertices", moves.ravel()),
                        e("Normals", np.zeros(12)),
                    ],
                )
            )
            links.append((30 + k, 21))
        return cube(others=objects, links=links)

    @pytest.mark.parametrize(("percent", "top"), [(0.0, 1), (50.0, 2), (100.0, 3), (-50.0, 0)])
    def test_a_blend_shape_has_its_stated_weight(self, load, percent, top):
        mesh_, codes = load(self.shaped(percent))
        assert codes == {}
        assert box(mesh_)[5] == pytest.approx(top)

    @pytest.mark.parametrize(
        ("percent", "top"), [(0.0, 1), (20.0, 2), (40.0, 3), (70.0, 4), (100.0, 5)]
    )
    def test_shapes_of_one_channel_follow_each_other(self, load, percent, top):
        mesh_, _ = load(self.shaped(percent, shapes=2, full=[40.0, 100.0]))
        assert box(mesh_)[5] == pytest.approx(top)

    @pytest.mark.parametrize(
        ("percent", "top"),
        [
            (-50.0, 3),  # the first shape alone
            (-100.0, 5),  # it is continued beyond its end
            (-25.0, 2),
            (50.0, 3),  # half of the second shape
            (200.0, 9),
        ],
    )
    def test_shapes_on_both_sides_of_the_mesh_are_continued(self, load, percent, top):
        mesh_, _ = load(self.shaped(percent, shapes=2, full=[-50.0, 100.0]))
        assert box(mesh_)[5] == pytest.approx(top)

    def test_a_shape_with_weights_by_vertex_moves_each_by_its_own(self, load):
        mesh_, codes = load(self.shaped(100.0, full=[0.0, 25.0, 50.0, 100.0]))
        tops = {tuple(v[:2]): v[2] for v in mesh_.vertices.tolist() if v[2] > 0}
        assert codes == {}
        assert tops == {(-1, -1): 1, (1, -1): 1.5, (-1, 1): 2, (1, 1): 3}

    def test_a_shape_of_vertices_that_do_not_exist_costs_itself(self, load):
        content = binary(self.shaped(100.0))
        indices = np.arange(4, 8, dtype=np.int32)
        old, new = (zlib.compress(a.tobytes()) for a in (indices, indices + 1))
        assert len(old) == len(new)
        assert content.count(old) == 1
        mesh_, codes = load(content.replace(old, new))
        assert codes == {"morph_unreadable": 1}
        assert volume(mesh_) == pytest.approx(8)

    def skinned(self, *, bone_at=(0.0, 0.0, 0.0), weights=None, rows=(), bones=((5.0, 0.0, 0.0),)):
        """The cube with its upper half (z = 1) bound to a bone, whose bind pose is the origin."""
        objects = [deformer(20, "Skin")]
        links = [(20, 1)]
        for k, offset in enumerate(bones):
            objects += [
                deformer(
                    21 + 2 * k,
                    "Cluster",
                    e("Indexes", np.arange(4, 8, dtype=np.int32)),
                    e("Weights", np.ones(4) if weights is None else np.array(weights[k])),
                    moved_matrix(*bone_at),
                    e("TransformLink", np.eye(4).ravel()),
                    label="SubDeformer::c",
                ),
                model(22 + 2 * k, p("Lcl Translation", *offset), kind="LimbNode"),
            ]
            links += [(21 + 2 * k, 20), (22 + 2 * k, 21 + 2 * k), (22 + 2 * k, 0)]
        return cube(*rows, others=objects, links=links)

    def test_a_skin_stands_as_its_bones_stand(self, load):
        mesh_, codes = load(self.skinned())
        assert codes == {}
        assert box(mesh_) == [-1, -1, -1, 6, 1, 1]
        assert volume(mesh_) == pytest.approx(8)  # sheared

    def test_the_matrix_of_a_cluster_leads_from_the_mesh_to_the_bone(self, load):
        mesh_, _ = load(self.skinned(bone_at=(-5.0, 0.0, 0.0)))
        assert box(mesh_) == [-1, -1, -1, 1, 1, 1]

    def test_weights_are_divided_by_their_sum(self, load):
        tree = self.skinned(
            bones=((4.0, 0.0, 0.0), (0.0, 0.0, 0.0)), weights=([3.0] * 4, [1.0] * 4)
        )
        assert box(load(tree)[0])[3] == pytest.approx(4)

    def test_the_node_does_not_move_bound_vertices(self, load):
        mesh_, _ = load(self.skinned(rows=[p("Lcl Translation", 0.0, 0.0, -10.0)]))
        assert box(mesh_) == [-1, -1, -11, 6, 1, 1]

    def test_a_skin_without_bone_costs_itself(self, load):
        tree = self.skinned()
        links = tree[-1][2]
        tree[-1] = ("Connections", (), [row for row in links if row[1][1:] != (22, 21)])
        mesh_, codes = load(tree)
        assert codes == {"skin_unreadable": 1}
        assert box(mesh_) == [-1, -1, -1, 1, 1, 1]


class TestAccounting:
    @pytest.mark.parametrize(
        ("tree", "code"),
        [
            (cube(top=[e("Mystery", 1)]), "unknown_element"),
            (cube(others=[e("Mystery", 9, "Mystery::x", "")]), "unknown_element"),
            (cube(layers=[e("Mystery", 1)]), "unknown_element"),
            (cube(layers=[layer("LayerElementMystery", "ByPolygon", "Direct")]), "unknown_element"),
            (cube(p("Mystery", 1)), "unknown_attribute"),
            (cube(top=[settings(p("Mystery", 1))]), "unknown_attribute"),
            (cube(others=[deformer(9, "Mystery")], links=[(9, 1)]), "unknown_element"),
            (cube(links=[(77, 2)]), "invalid_value"),
        ],
    )
    def test_what_no_part_of_the_reader_uses_is_reported(self, load, tree, code):
        for content in (binary(tree), text(tree)):
            assert load(content)[1] == {code: 1}

    def test_properties_of_users_are_ignored(self, load):
        assert load(cube(p("Mystery", 1, flags="U")))[1] == {}

    def test_of_two_objects_with_one_number_none_is_lost(self, load):
        twin = model(2, p("Lcl Translation", 4.0, 0.0, 0.0))
        mesh_, codes = load(cube(others=[twin, mesh(1)]))
        assert codes == {"invalid_value": 2, "unplaced_geometry": 1}
        assert len(mesh_.faces) == 12

    def test_another_method_of_skinning_is_reported(self, load):
        tree = TestDeformers().skinned(bones=((4.0, 0.0, 0.0), (0.0, 0.0, 0.0)))
        skin = next(item for item in tree[1][2] if item[1][-1] == "Skin")
        tree[1][2][tree[1][2].index(skin)] = deformer(
            20, "Skin", e("SkinningType", "DualQuaternion")
        )
        assert load(tree)[1] == {"skin_approximated": 1}

    def test_a_subdivision_surface_is_drawn_as_its_cage(self, load):
        tree = cube(layers=[e("Smoothness", 3)])
        assert load(tree)[1] == {"appearance_ignored": 1}


def version_6(*, as_array: bool):
    """Return a file of version 6.1: meshes in nodes, and names instead of numbers."""
    row = e("Property", "Lcl Translation", "Vector", "A+", 1.0, 2.0, 3.0)
    arrays = {"Vertices": CUBE.ravel(), "PolygonVertexIndex": polygon_indices(QUADS)}
    node = e(
        "Model",
        "Model::Cube",
        "Mesh",
        children=[
            e("Version", 232),
            e("Properties60", children=[row]),
            *(e(name, *([a] if as_array else a.tolist())) for name, a in arrays.items()),
        ],
    )
    return document([node], [("Model::Cube", "Model::Scene")], links="Connect")


class TestVersion6:
    @pytest.mark.parametrize("kind", ["text", "binary"])
    def test_meshes_lie_in_their_nodes(self, load, kind):
        tree = version_6(as_array=kind == "text")
        mesh_, codes = load(text(tree, 6100) if kind == "text" else binary(tree, 6100))
        assert codes == {}
        assert box(mesh_) == [0, 1, 2, 2, 3, 4]
        assert volume(mesh_) == pytest.approx(8)


class TestHostileFiles:
    def test_a_deflate_bomb_is_rejected(self, load):
        content = binary(cube())
        packed = zlib.compress(CUBE.ravel().tobytes())
        head = struct.pack("<III", 24, 1, len(packed))
        for count in (1 << 27, 1 << 31):
            bomb = content.replace(
                head + packed, struct.pack("<III", count, 1, len(packed)) + packed
            )
            assert bomb != content
            with pytest.raises(Reject, match="allocation_bomb"):
                load(bomb)

    def test_the_arrays_of_a_file_share_one_limit(self, load):
        cfg = LoadConfig(max_unpacked_bytes=200)
        with pytest.raises(Reject, match="allocation_bomb"):
            load(cube(), cfg)

    @pytest.mark.parametrize("container", [binary, text])
    def test_deep_nesting_is_rejected(self, load, container):
        element = e("a", 1)
        for _ in range(100):
            element = e("a", 1, children=[element])
        with pytest.raises(Reject, match="nested_too_deeply"):
            load(container([element]))

    def test_many_instances_are_rejected(self, load):
        nodes = [model(k) for k in range(2, 60)]
        tree = document([mesh(1), *nodes], [(1, k) for k in range(2, 60)])
        with pytest.raises(Reject, match="too_many_faces"):
            load(tree, LoadConfig(max_instances=50))

    def test_a_file_without_objects_is_rejected(self, load):
        with pytest.raises(Reject, match="no_objects"):
            load([e("Creator", "x")])

    def test_infinite_scales_are_rejected_as_such(self, load):
        with pytest.raises(Reject, match="non_finite_vertices"):
            load(
                cube(p("Lcl Scaling", 1e200, 1e200, 1e200), p("GeometricScaling", 1e200, 1.0, 1.0))
            )

    @pytest.mark.parametrize("container", [binary, text])
    def test_fuzzed_files_are_loaded_or_rejected(self, tmp_path, container):
        colors = layer("LayerElementColor", "AllSame", "Direct", ("Colors", np.ones(4)))
        tree = TestDeformers().skinned()
        tree[1][2].append(e("Geometry", 99, "Geometry::x", "Mesh", children=[colors]))
        assert_fuzzed_files_are_safe(tmp_path, "a.fbx", container(tree), rounds=150)
