"""USD geometry: meshes, basic shapes, instances, frames and what is left out, by exact values."""

import numpy as np
import pytest

pytest.importorskip("pxr", reason="the extra usd is not installed")

from tests.pipeline.mesh_io.measures import (
    BOX,
    BOX_AREA,
    BOX_VOLUME,
    QUADS,
    U_AREA,
    U_SHAPE,
    area,
    assert_box,
    assert_fuzzed_files_are_safe,
    colors_at,
    read,
    rejected,
    volume,
)
from tests.pipeline.mesh_io.usd_files import HEAD, binary, layer, mesh, package, quad, root

FIXED_HEAD = HEAD.replace(")", "    metersPerUnit = 1\n)")


def read_prims(tmp_path, *prims: str, head: str = HEAD):
    return read(tmp_path, "a.usda", layer(root(*prims), head=head))


def box_of(found) -> list[list[float]]:
    return [found.vertices.min(0).round(5).tolist(), found.vertices.max(0).round(5).tolist()]


class TestFiles:
    def test_text_binary_and_packages_give_the_same_box_under_any_extension(self, tmp_path):
        text = layer(root(mesh()))
        contents = {
            "a.usda": text,
            "b.usd": text,
            "c.usdc": binary(text, tmp_path),
            "d.usd": binary(text, tmp_path),
            "e.usdc": text,
            "f.usda": binary(text, tmp_path),
            "g.usdz": package({"a.usda": text}, tmp_path / "p1"),
            "h.USDZ": package({"0/a.usdc": binary(text, tmp_path)}, tmp_path / "p2"),
        }
        for name, content in contents.items():
            found, codes = read(tmp_path, name, content)
            assert_box(found)
            assert codes == {}, name

    def test_text_in_another_encoding_is_read_with_a_warning(self, tmp_path):
        text = layer(root(mesh(body='string userProperties:name = "café"')))
        found, codes = read(tmp_path, "a.usda", text.encode("windows-1252"))
        assert_box(found)
        assert codes == {"text_encoding": 1}

    @pytest.mark.parametrize(
        ("name", "content", "reason"),
        [
            ("a.usda", "hello", "wrong_magic"),
            ("a.usdz", "#usda 1.0\n", "wrong_magic"),
            ("a.usda", "#usda 1.0\ndef Mesh {", "unreadable"),
            ("a.usdc", b"PXR-USDC" + bytes(100), "unreadable"),
            ("a.usdz", b"PK\x03\x04" + bytes(100), "unreadable"),
            ("a.usda", "#usda 1.0\n", "empty_scene"),
            ("a.usda", "#usda 1.0\n" + 'def "a" {\n' * 200_000, "unreadable"),
        ],
    )
    def test_files_without_a_scene_are_rejected(self, tmp_path, name, content, reason):
        assert rejected(tmp_path, name, content) == reason

    def test_a_package_without_a_layer_is_rejected(self, tmp_path):
        content = package({"readme.txt": "x"}, tmp_path / "p")
        assert rejected(tmp_path, "a.usdz", content) == "unreadable"

    def test_a_file_with_points_only_is_rejected_as_that(self, tmp_path):
        cloud = 'def Points "p" {\n point3f[] points = [(0, 0, 0), (1, 1, 1)]\n}\n'
        assert rejected(tmp_path, "a.usda", layer(root(cloud))) == "points_only"

    def test_limits_hold(self, tmp_path):
        text = layer(root(mesh()))
        assert rejected(tmp_path, "a.usda", text, max_faces=11) == "too_many_faces"
        assert rejected(tmp_path, "a.usda", text, max_faces=12) == "loaded"
        assert rejected(tmp_path, "a.usda", text, max_unpacked_bytes=100) == "allocation_bomb"


class TestFrames:
    @pytest.mark.parametrize(
        ("stated", "high"),
        [('upAxis = "Y"', [1, 2, 3]), ('upAxis = "Z"', [1, 3, 0]), ("", [1, 2, 3])],
    )
    def test_the_stated_axis_points_up_and_y_if_none_is_stated(self, tmp_path, stated, high):
        found, codes = read(tmp_path, "a.usda", f"#usda 1.0\n(\n    {stated}\n)\n{mesh()}")
        assert found.vertices.max(0).tolist() == high
        assert codes == {}

    def test_transforms_are_applied_in_the_order_of_the_list(self, tmp_path):
        ops = """double3 xformOp:translate = (10, 0, 0)
        float xformOp:rotateZ = 90
        float3 xformOp:scale = (2, 1, 1)
        uniform token[] xformOpOrder = ["xformOp:translate", "xformOp:rotateZ", "xformOp:scale"]"""
        found, codes = read_prims(tmp_path, mesh(body=ops))
        # Scaled to 2 x 2 x 3, turned so that x becomes y and y becomes -x, then moved.
        assert box_of(found) == [[8, 0, 0], [10, 2, 3]]
        assert volume(found) == pytest.approx(2 * BOX_VOLUME)
        assert codes == {}

    def test_a_reset_of_the_stack_leaves_the_parents_out(self, tmp_path):
        parent = """double3 xformOp:translate = (100, 0, 0)
        uniform token[] xformOpOrder = ["xformOp:translate"]"""
        ops = """double3 xformOp:translate = (1, 0, 0)
        uniform token[] xformOpOrder = ["!resetXformStack!", "xformOp:translate"]"""
        found, codes = read_prims(tmp_path, parent, mesh(body=ops))
        assert box_of(found) == [[1, 0, 0], [2, 2, 3]]
        assert codes == {}

    def test_mirrored_meshes_keep_their_faces_outward(self, tmp_path):
        ops = """float3 xformOp:scale = (-1, 1, 1)
        uniform token[] xformOpOrder = ["xformOp:scale"]"""
        assert volume(read_prims(tmp_path, mesh(body=ops))[0]) == pytest.approx(BOX_VOLUME)

    def test_the_first_sample_counts(self, tmp_path):
        ops = """double3 xformOp:translate.timeSamples = { 5: (1, 0, 0), 9: (7, 0, 0) }
        uniform token[] xformOpOrder = ["xformOp:translate"]"""
        assert box_of(read_prims(tmp_path, mesh(body=ops))[0])[0] == [1, 0, 0]

    @pytest.mark.parametrize("kind", ["float", "double"])
    def test_the_unit_may_have_any_type(self, tmp_path, kind):
        assert_box(read_prims(tmp_path, mesh(), head=FIXED_HEAD)[0])


class TestMeshes:
    def test_concave_polygons_have_their_area(self, tmp_path):
        corners = [(x, y, 0) for x, y in U_SHAPE]
        found, codes = read_prims(tmp_path, mesh("u", corners, [list(range(8))]))
        assert area(found) == pytest.approx(U_AREA)
        assert codes == {}

    def test_left_handed_meshes_are_turned_outward(self, tmp_path):
        inward = [face[::-1] for face in QUADS]
        body = 'uniform token orientation = "leftHanded"'
        assert_box(read_prims(tmp_path, mesh(faces=inward, body=body))[0])

    def test_holes_are_not_drawn(self, tmp_path):
        found, codes = read_prims(tmp_path, mesh(body="int[] holeIndices = [0, 1]"))
        assert area(found) == pytest.approx(BOX_AREA - 2 * 2 * 3)
        assert codes == {}

    def test_a_stated_subdivision_surface_is_the_cage_with_a_warning(self, tmp_path):
        text = mesh().replace('subdivisionScheme = "none"', 'subdivisionScheme = "catmullClark"')
        found, codes = read_prims(tmp_path, text)
        assert_box(found)
        assert codes == {"subdivision_cage": 1}

    @pytest.mark.parametrize(
        ("old", "new", "codes", "faces"),
        [
            ("[4, 4, 4, 4, 4, 4]", "[4, 4, 4, 4, 4]", {"count_mismatch": 1}, 10),
            ("[4, 4, 4, 4, 4, 4]", "[4, 4, 4, 4, 4, 5]", {"count_mismatch": 1}, 10),
            ("[0, 1, 3, 2,", "[0, 1, 3, 200,", {"index_out_of_range": 1}, 10),
            ("[0, 1, 3, 2,", "[0, 1, 3, -2,", {"index_out_of_range": 1}, 10),
        ],
    )
    def test_broken_counts_and_indices_cost_their_polygons(self, tmp_path, old, new, codes, faces):
        text = mesh()
        assert old in text
        found, warned = read_prims(tmp_path, text.replace(old, new))
        assert len(found.faces) == faces
        assert warned == codes

    def test_a_broken_mesh_costs_itself(self, tmp_path):
        broken = mesh("broken").replace("[4, 4, 4, 4, 4, 4]", "[4, -4, 4, 4, 4, 4]")
        wrong_type = 'def Mesh "wrong" {\n string points = "x"\n}\n'
        found, codes = read_prims(tmp_path, broken, wrong_type, mesh())
        assert_box(found)
        assert codes == {"primitive_unreadable": 2}

    def test_a_file_whose_only_mesh_is_broken_is_rejected(self, tmp_path):
        broken = mesh().replace("[4, 4, 4, 4, 4, 4]", "[4, -4, 4, 4, 4, 4]")
        assert rejected(tmp_path, "a.usda", layer(root(broken))) == "unreadable"

    def test_the_surface_of_tetrahedra_is_drawn(self, tmp_path):
        text = """def TetMesh "t"
        {
            point3f[] points = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1)]
            int4[] tetVertexIndices = [(0, 1, 2, 3), (1, 2, 3, 4)]
        }
        """
        found, codes = read_prims(tmp_path, text)
        assert len(found.faces) == 6
        assert abs(volume(found)) == pytest.approx(1 / 6 + 1 / 3)
        assert codes == {}

    @pytest.mark.parametrize(
        ("interpolation", "values", "expected"),
        [
            ("constant", [(1, 0, 0)], {0: (1, 0, 0), 7: (1, 0, 0)}),
            ("vertex", [(k / 7, 0, 0) for k in range(8)], {0: (0, 0, 0), 7: (1, 0, 0)}),
            ("varying", [(k / 7, 0, 0) for k in range(8)], {0: (0, 0, 0), 7: (1, 0, 0)}),
        ],
    )
    def test_display_colors_are_linear_and_become_srgb(
        self, tmp_path, interpolation, values, expected
    ):
        body = f"""color3f[] primvars:displayColor = {list(values)} (
            interpolation = "{interpolation}"
        )"""
        found, codes = read_prims(tmp_path, mesh(body=body))
        for vertex, color in expected.items():
            assert colors_at(found, BOX[vertex]) == {(*(255 * x for x in color), 255)}
        assert codes == {}
        assert found.parts[0].material.base_color == (1.0, 1.0, 1.0, 1.0)

    def test_half_of_linear_light_is_188(self, tmp_path):
        body = "color3f[] primvars:displayColor = [(0.5, 0, 1)]"
        found, _ = read_prims(tmp_path, mesh(body=body))
        assert colors_at(found, BOX[0]) == {(188, 0, 255, 255)}

    def test_colors_of_faces_and_indexed_colors_of_corners(self, tmp_path):
        shades = [(k / 5, 0, 0) for k in range(6)]
        uniform = f"""color3f[] primvars:displayColor = {shades} (
            interpolation = "uniform"
        )"""
        found, codes = read_prims(tmp_path, mesh(body=uniform))
        # The corner (0, 0, 0) belongs to the faces 0, 2 and 4, linear 0, 0.4 and 0.8.
        assert {color[0] for color in colors_at(found, BOX[0])} == {0, 170, 231}
        assert codes == {}
        indices = [0] * 23 + [1]  # the last corner is that of the vertex 3 in the face 5
        corners = f"""color3f[] primvars:displayColor = [(1, 0, 0), (0, 1, 0)] (
            interpolation = "faceVarying"
        )
        int[] primvars:displayColor:indices = {indices}"""
        found, codes = read_prims(tmp_path, mesh(body=corners))
        assert colors_at(found, BOX[3]) == {(255, 0, 0, 255), (0, 255, 0, 255)}
        assert colors_at(found, BOX[0]) == {(255, 0, 0, 255)}
        assert codes == {}

    def test_colors_follow_their_corners_past_holes_and_in_left_handed_meshes(self, tmp_path):
        shades = [(k / 23, 0, 0) for k in range(24)]
        body = f"""color3f[] primvars:displayColor = {shades} (
            interpolation = "faceVarying"
        )
        int[] holeIndices = [0, 1, 3, 4, 5]
        uniform token orientation = "leftHanded" """
        found, _ = read_prims(tmp_path, mesh(body=body))
        expected = [round(255 * srgb(k / 23)) for k in range(8, 12)]
        for vertex, shade in zip(QUADS[2], expected, strict=True):
            assert {color[0] for color in colors_at(found, BOX[vertex])} == {shade}

    def test_translucent_display_opacity_is_blended(self, tmp_path):
        body = """color3f[] primvars:displayColor = [(1, 1, 1)]
        float[] primvars:displayOpacity = [0.5]"""
        found, _ = read_prims(tmp_path, mesh(body=body))
        assert colors_at(found, BOX[0]) == {(255, 255, 255, 128)}
        assert found.parts[0].material.alpha_mode == "BLEND"

    def test_colors_of_ancestors_are_inherited(self, tmp_path):
        found, _ = read_prims(tmp_path, "color3f[] primvars:displayColor = [(1, 0, 0)]", mesh())
        assert colors_at(found, BOX[0]) == {(255, 0, 0, 255)}

    @pytest.mark.parametrize(
        "body",
        [
            '[(1, 0, 0)] (\n interpolation = "vertex"\n)',
            '[(1, 0, 0)] (\n interpolation = "faceVarying"\n)',
            '[(1, 0, 0)] (\n interpolation = "uniform"\n)',
            '[(1, 0, 0)] (\n interpolation = "words"\n)',
            "[(1, 0, 0), (0, 1, 0)]",
            "[(1, 0, 0)]\n int[] primvars:displayColor:indices = [7]",
        ],
    )
    def test_colors_that_do_not_fit_give_a_warning(self, tmp_path, body):
        found, codes = read_prims(tmp_path, mesh(body=f"color3f[] primvars:displayColor = {body}"))
        assert_box(found)
        assert set(codes) == {"attribute_mismatch"}

    def test_normals_are_read_from_both_places(self, tmp_path):
        for name in ("normals", "primvars:normals"):
            body = f"""normal3f[] {name} = [(0, 3, 4)] (
                interpolation = "constant"
            )"""
            found, codes = read_prims(tmp_path, mesh(body=body))
            np.testing.assert_allclose(found.parts[0].normals, [[0, 0.6, 0.8]] * 8, atol=1e-6)
            assert codes == {}


def srgb(linear: float) -> float:
    return linear * 12.92 if linear <= 0.0031308 else 1.055 * linear ** (1 / 2.4) - 0.055


class TestShapes:
    # The exact areas are those of round shapes. Polygons with 32 sides stay 1% below.
    @pytest.mark.parametrize(
        ("text", "box", "exact_area"),
        [
            ('def Cube "a" {\n double size = 4\n}', [[-2] * 3, [2] * 3], 96),
            ('def Cube "a" {\n}', [[-1] * 3, [1] * 3], 24),
            ('def Sphere "a" {\n double radius = 2\n}', [[-2] * 3, [2] * 3], 16 * np.pi),
            ('def Cylinder "a" {\n double height = 4\n}', [[-1, -1, -2], [1, 1, 2]], 10 * np.pi),
            (
                'def Cylinder "a" {\n uniform token axis = "X"\n double height = 4\n}',
                [[-2, -1, -1], [2, 1, 1]],
                10 * np.pi,
            ),
            (
                'def Cone "a" {\n uniform token axis = "Y"\n}',
                [[-1, -1, -1], [1, 1, 1]],
                np.pi * (1 + 5**0.5),
            ),
            ('def Capsule "a" {\n double radius = 1\n}', [[-1, -1, -1.5], [1, 1, 1.5]], 6 * np.pi),
            (
                'def Cylinder_1 "a" {\n double radiusTop = 0.5\n}',
                [[-1, -1, -1], [1, 1, 1]],
                np.pi * (1 + 0.25 + 1.5 * (4 + 0.25) ** 0.5),
            ),
            (
                'def Plane "a" {\n double width = 4\n double length = 2\n}',
                [[-2, -1, 0], [2, 1, 0]],
                8,
            ),
            (
                'def Plane "a" {\n double width = 4\n uniform token axis = "X"\n}',
                [[0, -1, -2], [0, 1, 2]],
                8,
            ),
        ],
    )
    def test_a_shape_has_its_box_and_its_area(self, tmp_path, text, box, exact_area):
        found, codes = read_prims(tmp_path, text)
        np.testing.assert_allclose(box_of(found), box, atol=1e-4)
        assert 0.985 * exact_area <= area(found) <= exact_area * 1.0001
        assert "Plane" in text or volume(found) > 0
        assert codes == {}

    def test_planes_face_along_their_axis(self, tmp_path):
        for k, axis in enumerate("XYZ"):
            found, _ = read_prims(tmp_path, f'def Plane "a" {{\n uniform token axis = "{axis}"\n}}')
            a, b, c = found.vertices[found.faces[0]]
            assert np.cross(b - a, c - a)[k] > 0

    def test_a_shape_has_the_display_color(self, tmp_path):
        text = 'def Sphere "a" {\n color3f[] primvars:displayColor = [(0, 0, 1)]\n}'
        found, _ = read_prims(tmp_path, text)
        assert colors_at(found, (0, 0, 1)) == {(0, 0, 255, 255)}


class TestLeftOut:
    @pytest.mark.parametrize(
        ("text", "code"),
        [
            ('def BasisCurves "a" {\n}', "curves_left_out"),
            ('def NurbsPatch "a" {\n}', "curves_left_out"),
            ('def Points "a" {\n}', "points_left_out"),
            ('def Volume "a" {\n}', "unsupported_primitive"),
            (mesh("a", body='token visibility = "invisible"'), "hidden_left_out"),
            (mesh("a", body='uniform token purpose = "proxy"'), "hidden_left_out"),
            (mesh("a", body='uniform token purpose = "guide"'), "hidden_left_out"),
            ('def Blob "a" {\n}', "unknown_element"),
            ('def Xform "a" {\n uniform double blobs = 1\n}', "unknown_attribute"),
            (
                'def Xform "a" (\n prepend apiSchemas = ["BlobAPI"]\n) {\n}',
                "unknown_extension",
            ),
            ('over "a" {\n int[] faceVertexIndices = [0]\n}', "unplaced_geometry"),
        ],
    )
    def test_what_is_not_drawn_gives_a_warning(self, tmp_path, text, code):
        found, codes = read_prims(tmp_path, mesh(), text)
        assert_box(found)
        assert codes == {code: 1}

    @pytest.mark.parametrize(
        "text",
        [
            'def Camera "a" {\n}',
            'def SphereLight "a" {\n}',
            'def "a" (\n active = false\n) {\n}',
            'class "a" {\n}',
            'def Xform "a" {\n custom double blobs = 1\n}',
            mesh("a", body='token visibility = "inherited"\n uniform token purpose = "render"'),
        ],
    )
    def test_what_alters_nothing_gives_no_warning(self, tmp_path, text):
        assert read_prims(tmp_path, mesh(), text)[1] == {}

    def test_a_hidden_parent_hides_and_a_purpose_is_inherited(self, tmp_path):
        hidden = f'def Xform "h" {{\n token visibility = "invisible"\n{mesh("m")}\n}}'
        render = mesh("r", body='uniform token purpose = "render"')
        guide = f'def Xform "g" {{\n uniform token purpose = "guide"\n{mesh("m")}\n{render}\n}}'
        found, codes = read_prims(tmp_path, hidden, guide)
        assert_box(found)  # of the mesh that is for renders itself
        assert codes == {"hidden_left_out": 2}


def test_a_skinned_mesh_stands_where_its_skeleton_binds_it(tmp_path):
    moved = "double3 xformOp:translate = (100, 0, 0)"
    order = 'uniform token[] xformOpOrder = ["xformOp:translate"]'
    skin = f"""{moved}
        {order}
        rel skel:skeleton = </root/s>
        int[] primvars:skel:jointIndices = [0] (
            interpolation = "constant"
            elementSize = 1
        )
        matrix4d primvars:skel:geomBindTransform = (
            (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 5, 0, 1)
        )"""
    skeleton = f"""def Skeleton "s"
    {{
        double3 xformOp:translate = (10, 0, 0)
        {order}
        uniform token[] joints = ["a"]
    }}
    """
    bound = mesh(body=skin, metadata='(\n prepend apiSchemas = ["SkelBindingAPI"]\n)')
    found, codes = read(tmp_path, "a.usda", layer(root(skeleton, bound, kind="SkelRoot")))
    assert box_of(found) == [[10, 5, 0], [11, 7, 3]]  # (0, 5, 0) and (10, 0, 0), not (100, 0, 0)
    assert codes == {}


INSTANCED = """def Xform "{name}" (
    instanceable = true
    references = </proto>
)
{{
    double3 xformOp:translate = ({x}, 0, 0)
    uniform token[] xformOpOrder = ["xformOp:translate"]
    {body}
}}
"""
PROTO = f'class Xform "proto"\n{{\n{mesh()}\n}}\n'


class TestInstances:
    def test_instances_share_their_geometry_and_keep_what_they_inherit(self, tmp_path):
        red = "color3f[] primvars:displayColor = [(1, 0, 0)]"
        text = layer(
            root(
                INSTANCED.format(name="a", x=0, body=""),
                INSTANCED.format(name="b", x=10, body=""),
                INSTANCED.format(name="c", x=20, body=red),
            ),
            PROTO,
        )
        found, codes = read(tmp_path, "a.usda", text)
        assert box_of(found) == [[0, 0, 0], [21, 2, 3]]
        assert area(found) == pytest.approx(3 * BOX_AREA)
        assert colors_at(found, (20, 0, 0)) == {(255, 0, 0, 255)}
        assert colors_at(found, (10, 0, 0)) == {()}
        assert codes == {}

    def instancer(self, body: str) -> str:
        over = f'over "q"\n{{\n{mesh()}\n}}\n'
        return f"""def PointInstancer "i"
        {{
            rel prototypes = [</root/i/q>]
            {body}
            {over}
        }}"""

    def test_a_point_instancer_places_its_prototypes(self, tmp_path):
        body = """int[] protoIndices = [0, 0, 0]
        point3f[] positions = [(0, 0, 0), (10, 0, 0), (20, 0, 0)]
        quath[] orientations = [(1, 0, 0, 0), (0.7071, 0, 0, 0.7071), (1, 0, 0, 0)]
        float3[] scales = [(1, 1, 1), (1, 1, 1), (2, 2, 2)]"""
        found, codes = read_prims(tmp_path, self.instancer(body))
        # The second one is turned by 90 degrees about z: x from -2 to 0, y from 0 to 1.
        np.testing.assert_allclose(box_of(found), [[0, 0, 0], [22, 4, 6]], atol=1e-2)
        second = found.vertices[(found.vertices[:, 0] > 5) & (found.vertices[:, 0] < 15)]
        np.testing.assert_allclose(second.max(0), [10, 1, 3], atol=1e-2)
        assert area(found) == pytest.approx(6 * BOX_AREA, rel=1e-3)
        assert codes == {}

    def test_invisible_instances_are_left_out(self, tmp_path):
        body = """int[] protoIndices = [0, 0]
        point3f[] positions = [(0, 0, 0), (10, 0, 0)]
        int64[] invisibleIds = [1]"""
        found, codes = read_prims(tmp_path, self.instancer(body))
        assert_box(found)
        assert codes == {"hidden_left_out": 1}

    def test_missing_prototypes_and_arrays_that_do_not_fit_give_warnings(self, tmp_path):
        body = "int[] protoIndices = [0, 7]\n point3f[] positions = [(0, 0, 0), (1, 0, 0)]"
        found, codes = read_prims(tmp_path, self.instancer(body))
        assert_box(found)
        assert codes == {"invalid_value": 1}
        body = "int[] protoIndices = [0, 0]\n point3f[] positions = [(0, 0, 0)]"
        found, codes = read_prims(tmp_path, mesh(), self.instancer(body))
        assert_box(found)
        assert codes == {"primitive_unreadable": 1, "unplaced_geometry": 1}

    def test_an_instancer_below_its_own_prototype_ends(self, tmp_path):
        inner = """def PointInstancer "i"
        {
            rel prototypes = [</root/p>]
            int[] protoIndices = [0]
            point3f[] positions = [(0, 0, 0)]
        }"""
        found, codes = read_prims(tmp_path, f'def Xform "p"\n{{\n{mesh()}\n{inner}\n}}')
        assert codes["node_cycle"] >= 1
        assert area(found) >= BOX_AREA - 1e-6

    def test_too_many_instances_are_rejected(self, tmp_path):
        body = f"int[] protoIndices = {[0] * 30}\n point3f[] positions = {[(0, 0, 0)] * 30}"
        text = layer(root(self.instancer(body)))
        assert rejected(tmp_path, "a.usda", text, max_instances=29) == "too_many_faces"
        assert rejected(tmp_path, "a.usda", text, max_instances=30) == "loaded"


def test_damaged_text_is_loaded_or_rejected(tmp_path):
    text = layer(root(mesh(), quad(), INSTANCED.format(name="b", x=1, body="")), PROTO)
    assert_fuzzed_files_are_safe(tmp_path, "a.usda", text.encode(), rounds=120)


def test_damaged_binary_layers_are_loaded_or_rejected(tmp_path):
    content = binary(layer(root(mesh(), quad())), tmp_path)
    assert_fuzzed_files_are_safe(tmp_path, "a.usdc", content, rounds=120)


def test_damaged_packages_are_loaded_or_rejected(tmp_path):
    inner = package({"b.usda": layer(root(mesh()))}, tmp_path / "b.usdz")
    text = layer(root(quad()) + 'def "other" (references = @b.usdz@) {\n}\n')
    content = package({"a.usda": text, "b.usdz": inner}, tmp_path / "c.usdz")
    assert_fuzzed_files_are_safe(tmp_path, "a.usdz", content, rounds=120)
