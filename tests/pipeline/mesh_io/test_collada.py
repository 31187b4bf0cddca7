"""COLLADA documents: frames, primitives, skins and effects are read, nothing is lost silently."""

import re

import numpy as np
import pytest

from pipeline.core.errors import Reject
from pipeline.mesh_io.config import LoadConfig
from pipeline.mesh_io.load import load_with_report
from tests.pipeline.collada_files import (
    bind_uv,
    bound,
    box,
    document,
    geometry,
    material,
    matrices,
    primitive,
    source,
    textured_quad,
    uv_quad,
)
from tests.pipeline.mesh_files import png, write, zipped

CFG = LoadConfig()


@pytest.fixture
def load(tmp_path):
    """Return a function that loads a document: (mesh, {code: count})."""

    def load(content, name="a.dae", up="auto", cfg=CFG):
        mesh, report = load_with_report(write(tmp_path / name, content), cfg, up=up)
        load.report = report
        return mesh, {warning.code: warning.count for warning in report.warnings}

    return load


def volume(mesh) -> float:
    corners = mesh.vertices[mesh.faces]
    return float(np.einsum("fi,fi->", corners[:, 0], np.cross(corners[:, 1], corners[:, 2])) / 6)


def area(mesh) -> float:
    a, b, c = np.moveaxis(mesh.vertices[mesh.faces], 1, 0)
    return float(np.linalg.norm(np.cross(b - a, c - a), axis=1).sum() / 2)


def bounds(mesh) -> np.ndarray:
    points = mesh.vertices[mesh.faces].reshape(-1, 3)
    return np.stack([points.min(axis=0), points.max(axis=0)])


class TestFrame:
    @pytest.mark.parametrize(
        ("axis", "low", "high"),
        [
            ("X_UP", [-2, 0, 0], [0, 1, 3]),
            ("Y_UP", [0, 0, 0], [1, 2, 3]),
            ("Z_UP", [0, 0, -2], [1, 3, 0]),
        ],
    )
    @pytest.mark.parametrize("option", ["auto", "z"])
    def test_the_stated_axis_becomes_y(self, load, axis, low, high, option):
        asset = f"<up_axis>{axis}</up_axis>"
        mesh, codes = load(document(box(size=(1, 2, 3)), asset=asset), up=option)
        assert (volume(mesh), codes) == (pytest.approx(6), {})
        np.testing.assert_allclose(bounds(mesh), [low, high])
        assert load.report.up_origin == "stated"

    def test_without_axis_y_is_the_convention(self, load):
        mesh, codes = load(document(box(size=(1, 2, 3)), asset=""))
        assert (load.report.up_axis, load.report.up_origin, codes) == ("y", "convention", {})
        np.testing.assert_allclose(bounds(mesh), [[0, 0, 0], [1, 2, 3]])
        load(document(box(), asset=""), up="z")
        assert (load.report.up_axis, load.report.up_origin) == ("z", "option")

    def test_transforms_are_applied_in_their_order(self, load):
        transforms = (
            "<translate>10 0 0</translate><rotate>0 0 1 90</rotate><scale>2 1 1</scale>"
            "<matrix>1 0 0 5 0 1 0 0 0 0 1 0 0 0 0 1</matrix>"
        )
        child = '<node><translate>0 0 7</translate><instance_geometry url="#g"/></node>'
        node = f"<node>{transforms}{child}</node>"
        mesh, codes = load(document(box(), node))
        # x + 5, twice, turned to y, then moved by 10: x in [9, 10], y in [10, 12].
        np.testing.assert_allclose(bounds(mesh), [[9, 10, 7], [10, 12, 8]], atol=1e-12)
        assert (volume(mesh), codes) == (pytest.approx(2), {})

    def test_skew_moves_points_along_its_second_axis(self, load):
        node = '<node><skew>45 0 1 0 1 0 0</skew><instance_geometry url="#g"/></node>'
        mesh, codes = load(document(box(), node))
        np.testing.assert_allclose(bounds(mesh), [[0, 0, 0], [2, 1, 1]], atol=1e-12)
        assert (volume(mesh), codes) == (pytest.approx(1), {})

    def test_lookat_places_a_node(self, load):
        node = '<node><lookat>5 0 0 0 0 0 0 1 0</lookat><instance_geometry url="#g"/></node>'
        mesh, codes = load(document(box(size=(1, 2, 3)), node))
        # At x = 5 it looks along -x, so its z axis is x and its x axis is -z.
        np.testing.assert_allclose(bounds(mesh), [[5, 0, -1], [8, 2, 0]], atol=1e-12)
        assert (volume(mesh), codes) == (pytest.approx(6), {})

    @pytest.mark.parametrize(
        "transform", ["<matrix>1 2</matrix>", "<translate/>", "<scale>x</scale>"]
    )
    def test_an_invalid_transform_is_left_out_with_a_warning(self, load, transform):
        node = f'<node>{transform}<instance_geometry url="#g"/></node>'
        mesh, codes = load(document(box(), node))
        assert volume(mesh) == pytest.approx(1)
        assert set(codes) == {"invalid_value"}

    def test_decimal_commas_in_a_transform(self, load):
        node = '<node><translate>1,5 0,0 -2,25</translate><instance_geometry url="#g"/></node>'
        mesh, codes = load(document(box(), node))
        np.testing.assert_allclose(bounds(mesh), [[1.5, 0, -2.25], [2.5, 1, -1.25]])
        assert codes == {"invalid_value": 1}

    def test_library_nodes_are_instanced_and_mirrored(self, load):
        library = '<library_nodes><node id="l"><instance_geometry url="#g"/></node></library_nodes>'
        nodes = (
            '<node><instance_node url="#l"/></node>'
            '<node><scale>-1 1 1</scale><instance_node url="#l"/></node>'
        )
        mesh, codes = load(document(box(), nodes, libraries=library))
        np.testing.assert_allclose(bounds(mesh), [[-1, 0, 0], [1, 1, 1]])
        assert (volume(mesh), codes) == (pytest.approx(2), {})

    def test_a_node_that_instances_itself_is_drawn_once(self, load):
        node = '<node id="n"><instance_geometry url="#g"/><instance_node url="#n"/></node>'
        mesh, codes = load(document(box(), node))
        assert (volume(mesh), codes) == (pytest.approx(1), {"node_cycle": 1})

    def test_a_chain_of_1500_nodes(self, load):
        node = "<node>" * 1500 + '<instance_geometry url="#g"/>' + "</node>" * 1500
        assert volume(load(document(box(), node))[0]) == pytest.approx(1)

    def test_hidden_nodes_are_left_out(self, load):
        hidden = (
            '<node name="h"><instance_geometry url="#g"/><extra><technique profile="FCOLLADA">'
            "<visibility>0</visibility></technique></extra></node>"
        )
        mesh, codes = load(document(box(), '<node><instance_geometry url="#g"/></node>' + hidden))
        assert (volume(mesh), codes) == (pytest.approx(1), {"hidden_left_out": 1})

    def test_without_a_scene_the_first_one_or_all_geometries_are_drawn(self, load):
        content = document(box())
        without = re.sub(b"<scene>.*</scene>", b"", content)
        assert load(without)[1] == {"invalid_value": 1}
        nothing = re.sub(b"<library_visual_scenes>.*</scene>", b"", content)
        mesh, codes = load(nothing)
        assert (volume(mesh), codes) == (pytest.approx(1), {"invalid_value": 1})

    @pytest.mark.parametrize("url", ["#gone", "other.dae#g"])
    @pytest.mark.parametrize("kind", ["geometry", "node", "controller"])
    def test_a_reference_that_leads_nowhere_gives_a_warning(self, load, kind, url):
        nodes = f'<node><instance_geometry url="#g"/><instance_{kind} url="{url}"/></node>'
        mesh, codes = load(document(box(), nodes))
        assert (volume(mesh), codes) == (pytest.approx(1), {"primitive_unreadable": 1})

    def test_a_geometry_that_no_node_draws_is_reported(self, load):
        assert load(document(box() + box("h")))[1] == {"unplaced_geometry": 1}


POINTS = [[0, 0, 0], [4, 0, 0], [4, 4, 0], [0, 4, 0], [1, 1, 0], [1, 2, 0], [2, 2, 0], [2, 1, 0]]
L_SHAPE = [[0, 0, 0], [3, 0, 0], [3, 1, 0], [1, 1, 0], [1, 3, 0], [0, 3, 0]]


def one_primitive(kind: str, content: str, count: int) -> bytes:
    """Return a document whose scene is one primitive on `POINTS`."""
    return document(geometry("g", POINTS, primitive(kind, "g", content, count=count)))


# Each kind of primitive with its content on `POINTS`, its count and its area.
KINDS = [
    ("triangles", "<p>0 1 2 0 2 3</p>", 2, 16),
    ("polylist", "<vcount>4 3</vcount><p>0 1 2 3 4 7 6</p>", 2, 16.5),
    ("polygons", "<p>0 1 2 3</p><p>4 7 6</p>", 2, 16.5),
    ("polygons", "<ph><p>0 1 2 3</p><h>4 5 6 7</h></ph>", 1, 15),
    ("trifans", "<p>0 1 2 3</p><p>4 7 6</p>", 2, 16.5),
    ("tristrips", "<p>0 1 3 2</p><p>4 7 5</p>", 2, 16.5),
]


class TestPrimitives:
    @pytest.mark.parametrize(("kind", "content", "count", "expected"), KINDS)
    def test_every_kind_is_read_with_its_orientation(self, load, kind, content, count, expected):
        mesh, codes = load(one_primitive(kind, content, count))
        assert codes == {}
        assert area(mesh) == pytest.approx(expected)
        a, b, c = np.moveaxis(mesh.vertices[mesh.faces], 1, 0)
        assert (np.cross(b - a, c - a)[:, 2] > 0).all()

    def test_a_concave_polygon_has_the_area_of_its_outline(self, load):
        faces = "<vcount>6</vcount><p>0 1 2 3 4 5</p>"
        mesh, codes = load(
            document(geometry("g", L_SHAPE, primitive("polylist", "g", faces, count=1)))
        )
        assert (area(mesh), codes) == (pytest.approx(5), {})

    def test_inputs_with_offsets_of_their_own(self, load):
        inputs = (
            '<input semantic="NORMAL" source="#n" offset="2"/>'
            '<input semantic="TEXCOORD" source="#t" offset="1" set="0"/>'
            '<input semantic="COLOR" source="#c" offset="2"/>'
        )
        sources = (
            source("n", [[0, 0, 2], [0, 3, 0]])
            + source("t", [[0.25, 0.5], [1, 0], [0, 1]], "S T")
            + source("c", [[1, 0, 0], [0, 0.5, 1]], "R G B")
        )
        faces = "<p>0 0 0  1 1 0  2 2 1</p>"
        content = geometry(
            "g", POINTS, primitive("triangles", "g", faces, count=1, inputs=inputs), sources=sources
        )
        mesh, codes = load(document(content))
        (part,) = mesh.parts
        order = np.argsort(mesh.vertices[:, 0] + 2 * mesh.vertices[:, 1])
        assert codes == {}
        assert part.colors[order].tolist() == [
            [255, 0, 0, 255],
            [255, 0, 0, 255],
            [0, 128, 255, 255],
        ]
        np.testing.assert_allclose(part.normals[order], [[0, 0, 1], [0, 0, 1], [0, 1, 0]])

    def test_normals_and_colors_of_the_vertices(self, load):
        vertices = '<input semantic="COLOR" source="#c"/>'
        sources = source("c", np.tile([0, 1, 0, 0.5], (8, 1)), "R G B A")
        faces = primitive("triangles", "g", "<p>0 1 2</p>", count=1)
        mesh, codes = load(
            document(geometry("g", POINTS, faces, sources=sources, vertices=vertices))
        )
        assert codes == {}
        assert mesh.parts[0].colors.tolist() == [[0, 255, 0, 128]] * 3

    def test_strides_offsets_and_unnamed_columns_of_accessors(self, load):
        values = "9 9 0 0 7 0 4 0 7 0 4 4 7 0"
        accessor = (
            f'<source id="q"><float_array id="q-a" count="14">{values}</float_array>'
            '<technique_common><accessor source="#q-a" count="3" stride="4" offset="2">'
            '<param name="X" type="float"/><param name="Y" type="float"/><param type="float"/>'
            '<param name="Z" type="float"/></accessor></technique_common></source>'
        )
        content = geometry(
            "g", POINTS, primitive("triangles", "g", "<p>0 1 2</p>", count=1), sources=accessor
        ).replace('source="#g-p"', 'source="#q"')
        mesh, codes = load(document(content))
        assert (area(mesh), codes) == (pytest.approx(8), {})

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("0,0,0,4,0,0,4,4,0", 8),  # separators
            ("0,0 0,0 0,0 4,0 0,0 0,0 4,0 4,0 0,0", 8),  # decimal points
            ("0\n0\t0\r\n4 0 0\n\n4 4 0", 8),
        ],
    )
    def test_commas_and_line_breaks_in_numbers(self, load, text, expected):
        content = geometry("g", POINTS[:3], primitive("triangles", "g", "<p>0 1 2</p>", count=1))
        content = re.sub("(<float_array[^>]*>)[^<]*", rf"\g<1>{text}", content)
        mesh, codes = load(document(content))
        assert area(mesh) == pytest.approx(expected)
        assert set(codes) == ({"invalid_value"} if "," in text else set())

    @pytest.mark.parametrize(("kind", "content", "count", "expected"), KINDS)
    def test_a_wrong_count_gives_a_warning(self, load, kind, content, count, expected):
        mesh, codes = load(one_primitive(kind, content, count + 5))
        assert (area(mesh), set(codes)) == (pytest.approx(expected), {"count_mismatch"})

    @pytest.mark.parametrize(
        ("kind", "content", "count", "faces"),
        [
            ("triangles", "<p>0 1 2 0 2</p>", 1, 1),
            ("polylist", "<vcount>3 3 3</vcount><p>0 1 2 0 2 3</p>", 3, 2),
            ("polylist", "<vcount>3</vcount><p>0 1 2 0 2 3</p>", 1, 1),
        ],
    )
    def test_missing_or_further_indices_give_a_warning(self, load, kind, content, count, faces):
        mesh, codes = load(one_primitive(kind, content, count))
        assert (len(mesh.faces), set(codes)) == (faces, {"count_mismatch"})

    def test_a_float_array_that_is_shorter_than_stated(self, load):
        content = geometry("g", POINTS, primitive("triangles", "g", "<p>0 1 2</p>", count=1))
        mesh, codes = load(document(content.replace('count="24"', 'count="2000000000"')))
        assert (len(mesh.faces), codes) == (1, {"count_mismatch": 1})

    @pytest.mark.parametrize("index", ["99", "-1", "99999999999999999999", "x"])
    def test_polygons_with_indices_that_do_not_exist_are_left_out(self, load, index):
        faces = f"<p>0 1 2 0 2 {index}</p>"
        content = geometry("g", POINTS, primitive("triangles", "g", faces, count=2))
        mesh, codes = load(document(content))
        assert len(mesh.faces) == 1
        assert codes["index_out_of_range"] == 1

    def test_lines_curves_and_hulls_are_reported(self, load):
        lines = primitive("lines", "g", "<p>0 1 2 3</p>", count=2)
        faces = primitive("triangles", "g", "<p>0 1 2</p>", count=1)
        extra = (
            '<geometry id="c"><spline><new/></spline></geometry>'
            '<geometry id="h"><convex_mesh convex_hull_of="#g"/></geometry>'
        )
        nodes = "".join(f'<node><instance_geometry url="#{name}"/></node>' for name in "gch")
        mesh, codes = load(document(geometry("g", POINTS, lines + faces) + extra, nodes))
        assert len(mesh.faces) == 1
        assert codes == {"lines_left_out": 2, "curves_left_out": 1, "unsupported_primitive": 1}

    def test_a_broken_primitive_costs_only_itself(self, load):
        good = primitive("triangles", "g", "<p>0 1 2</p>", count=1)
        broken = good.replace("#g-v", "#gone").replace("VERTEX", "POSITION")
        mesh, codes = load(document(geometry("g", POINTS, broken + good)))
        assert len(mesh.faces) == 1
        assert codes["primitive_unreadable"] == 1

    def test_text_coordinates_with_an_invalid_number_are_rejected(self, load):
        content = document(box()).replace(b">0 0 0 1", b">0 0 zero 1")
        with pytest.raises(Reject, match="non_finite_vertices"):
            load(content)


def turned(degrees, offset=(0, 0, 0)) -> np.ndarray:
    """Return the matrix of a rotation around z and a move."""
    matrix = np.eye(4)
    angle = np.radians(degrees)
    matrix[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    matrix[:3, 3] = offset
    return matrix


def skin(weights="0 0 " * 8, counts="1 " * 8, values=(1,), joints=("j",), inverse=None, shape=""):
    inverse = np.eye(4)[None] if inverse is None else inverse
    names = source("sj", joints, "JOINT", kind="Name_array")
    return (
        f'<library_controllers><controller id="k"><skin source="#g">{shape}{names}'
        f"{matrices('sb', inverse)}{source('sw', values, 'WEIGHT')}"
        '<joints><input semantic="JOINT" source="#sj"/>'
        '<input semantic="INV_BIND_MATRIX" source="#sb"/></joints>'
        f'<vertex_weights count="8"><input semantic="JOINT" source="#sj" offset="0"/>'
        f'<input semantic="WEIGHT" source="#sw" offset="1"/><vcount>{counts}</vcount>'
        f"<v>{weights}</v></vertex_weights></skin></controller></library_controllers>"
    )


SKINNED = (
    '<node id="b"><instance_controller url="#k"><skeleton>#j</skeleton></instance_controller>'
    "</node>"
)


def matrix_text(matrix) -> str:
    return "<matrix>" + " ".join(map(str, np.asarray(matrix).ravel())) + "</matrix>"


class TestControllers:
    def test_a_skin_follows_its_joints_and_not_its_own_node(self, load):
        nodes = f'<node id="j" sid="j" type="JOINT"><translate>0 5 0</translate></node>{SKINNED}'
        nodes = nodes.replace('<node id="b">', '<node id="b"><translate>99 0 0</translate>')
        mesh, codes = load(document(box(), nodes, libraries=skin()))
        assert (volume(mesh), codes) == (pytest.approx(1), {})
        np.testing.assert_allclose(bounds(mesh), [[0, 5, 0], [1, 6, 1]])

    def test_bind_shape_and_inverse_bind_matrices(self, load):
        # The joint is where it was bound, so that only the bind shape matrix remains.
        pose = turned(30, (3, 4, 5))
        shape = f"<bind_shape_matrix>{matrix_text(turned(0, (0, 0, 7)))[8:-9]}</bind_shape_matrix>"
        nodes = f'<node id="j" sid="j">{matrix_text(pose)}</node>{SKINNED}'
        library = skin(inverse=np.linalg.inv(pose)[None], shape=shape)
        mesh, codes = load(document(box(), nodes, libraries=library))
        assert codes == {}
        np.testing.assert_allclose(bounds(mesh), [[0, 0, 7], [1, 1, 8]], atol=1e-5)

    def test_weights_blend_joints_and_are_divided_by_their_sum(self, load):
        joints = '<node id="j" sid="j"><node sid="k"><translate>0 0 4</translate></node></node>'
        # The lower four vertices follow j, the upper four half of each, with weights of sum 2.
        weights = "0 0 " * 4 + "0 0 1 0 " * 4
        library = skin(
            weights, "1 1 1 1 2 2 2 2", joints=("j", "k"), inverse=np.tile(np.eye(4), (2, 1, 1))
        )
        mesh, codes = load(document(box(), joints + SKINNED, libraries=library))
        assert codes == {}
        np.testing.assert_allclose(bounds(mesh), [[0, 0, 0], [1, 1, 3]])

    def test_joint_minus_one_and_no_weight_keep_the_bind_shape(self, load):
        nodes = f'<node id="j" sid="j"><translate>0 0 9</translate></node>{SKINNED}'
        library = skin("-1 0 " * 4, "1 1 1 1 0 0 0 0")
        mesh, codes = load(document(box(), nodes, libraries=library))
        assert codes == {}
        np.testing.assert_allclose(bounds(mesh), [[0, 0, 0], [1, 1, 1]])

    def test_a_skin_with_its_skeleton_is_instanced(self, load):
        library = (
            f'<library_nodes><node id="l"><node id="j" sid="j"><translate>0 1 0</translate></node>'
            f"{SKINNED}</node></library_nodes>"
        )
        nodes = (
            '<node><translate>10 0 0</translate><instance_node url="#l"/></node>'
            '<node><translate>20 0 0</translate><instance_node url="#l"/></node>'
        )
        mesh, codes = load(document(box(), nodes, libraries=skin() + library))
        assert (volume(mesh), codes) == (pytest.approx(2), {})
        np.testing.assert_allclose(bounds(mesh), [[10, 1, 0], [21, 2, 1]])

    @pytest.mark.parametrize(
        ("old", "new"),
        [
            ("<vcount>1 ", "<vcount>7 "),
            ("<v>0 0 ", "<v>5 0 "),
            ("<v>0 0 ", "<v>0 8 "),
            (">j<", ">nobody<"),
            ('source="#sb"', 'source="#gone"'),
            ("<joints>", "<joints><new/>"),
        ],
    )
    def test_a_skin_that_cannot_be_read_leaves_its_mesh(self, load, old, new):
        nodes = f'<node id="j" sid="j"/>{SKINNED}'
        content = document(box(), nodes, libraries=skin()).decode()
        assert old in content
        mesh, codes = load(content.replace(old, new, 1))
        assert volume(mesh) == pytest.approx(1)
        assert codes.keys() & {"skin_unreadable", "unknown_element"}

    @pytest.mark.parametrize(
        ("method", "high"), [("RELATIVE", [1, 1, 4]), ("NORMALIZED", [1, 1, 2]), (None, [1, 1, 2])]
    )
    def test_morph_targets_are_applied_with_their_weights(self, load, method, high):
        targets = source("mt", ["t", "u"], "IDREF", kind="IDREF_array")
        attribute = "" if method is None else f' method="{method}"'
        library = (
            f'<library_controllers><controller id="k"><morph source="#g"{attribute}>{targets}'
            f"{source('mw', [0.5, 0], 'WEIGHT')}<targets>"
            '<input semantic="MORPH_TARGET" source="#mt"/>'
            '<input semantic="MORPH_WEIGHT" source="#mw"/></targets></morph></controller>'
            "</library_controllers>"
        )
        target = (0, 0, 6) if method == "RELATIVE" else (1, 1, 3)
        shapes = box() + box("t", target) + box("u", (9, 9, 9))
        node = '<node><instance_controller url="#k"/></node>'
        mesh, codes = load(document(shapes, node, libraries=library))
        assert codes == {}
        np.testing.assert_allclose(bounds(mesh)[1], high)

    def test_a_skin_of_a_morph(self, load):
        library = (
            f'<library_controllers><controller id="w"><morph source="#g" method="RELATIVE">'
            f"{source('mt', ['t'], 'IDREF', kind='IDREF_array')}{source('mw', [1], 'WEIGHT')}"
            '<targets><input semantic="MORPH_TARGET" source="#mt"/>'
            '<input semantic="MORPH_WEIGHT" source="#mw"/></targets></morph></controller>'
            "</library_controllers>"
        )
        nodes = f'<node id="j" sid="j"><translate>0 5 0</translate></node>{SKINNED}'
        libraries = library + skin().replace('source="#g"', 'source="#w"')
        mesh, codes = load(document(box() + box("t", (0, 0, 1)), nodes, libraries=libraries))
        assert codes == {}
        np.testing.assert_allclose(bounds(mesh), [[0, 5, 0], [1, 6, 2]])

    def test_a_controller_that_refers_to_itself_gives_a_warning(self, load):
        library = skin().replace('source="#g"', 'source="#k"')
        nodes = f'<node id="j" sid="j"/><node><instance_geometry url="#g"/></node>{SKINNED}'
        mesh, codes = load(document(box(), nodes, libraries=library))
        assert volume(mesh) == pytest.approx(1)
        assert codes["primitive_unreadable"] == 1


def color(name, text) -> str:
    return f"<{name}><color>{text}</color></{name}>"


class TestEffects:
    def load_material(self, load, shader, **options):
        content = document(box(material="a"), bound(), libraries=material(shader, **options))
        mesh, codes = load(content)
        (part,) = mesh.parts
        return part.material, codes

    @pytest.mark.parametrize("shader", ["lambert", "phong", "blinn"])
    def test_diffuse_and_emission_are_srgb(self, load, shader):
        content = (
            f"<{shader}>{color('emission', '0 1 0 1')}{color('diffuse', '0.5 0 1 1')}</{shader}>"
        )
        found, codes = self.load_material(load, content)
        assert codes == {}
        assert found.base_color == pytest.approx((0.2140, 0, 1, 1), abs=1e-3)
        assert found.emissive == (0, 1, 0)
        assert found.alpha_mode == "OPAQUE"

    def test_a_constant_surface_emits_its_color(self, load):
        found, _ = self.load_material(load, f"<constant>{color('emission', '1 0 0 1')}</constant>")
        assert (found.base_color, found.emissive) == ((0, 0, 0, 1), (1, 0, 0))

    @pytest.mark.parametrize(
        ("transparent", "transparency", "expected"),
        [
            ('<transparent opaque="A_ONE"><color>0 0 0 1</color></transparent>', "0.25", 0.25),
            ('<transparent opaque="A_ONE"><color>1 1 1 0.5</color></transparent>', "0.5", 0.25),
            ('<transparent opaque="RGB_ZERO"><color>0 0 0 1</color></transparent>', "1", 1),
            ('<transparent opaque="RGB_ZERO"><color>1 1 1 1</color></transparent>', "0.25", 0.75),
            ('<transparent opaque="RGB_ZERO"><color>0 1 0 1</color></transparent>', "1", 0.28484),
            ('<transparent opaque="A_ZERO"><color>0 0 0 0.25</color></transparent>', "1", 0.75),
            ('<transparent opaque="RGB_ONE"><color>0.5 0.5 0.5 0</color></transparent>', "1", 0.5),
            ("", "0.5", 0.5),
        ],
    )
    def test_opacity_in_all_modes(self, load, transparent, transparency, expected):
        shader = (
            f"<phong>{color('diffuse', '1 1 1 1')}{transparent}"
            f"<transparency><float>{transparency}</float></transparency></phong>"
        )
        found, codes = self.load_material(load, shader)
        assert codes == {}
        assert found.base_color[3] == pytest.approx(expected, abs=1e-4)
        assert found.alpha_mode == ("OPAQUE" if expected == 1 else "BLEND")

    def test_transparency_0_of_old_writers_is_opaque_with_a_warning(self, load):
        transparency = "<transparency><float>0</float></transparency>"
        shader = f"<phong>{color('diffuse', '1 1 1 1')}{transparency}</phong>"
        found, codes = self.load_material(load, shader)
        assert (found.base_color[3], codes) == (1, {"invalid_value": 1})

    @pytest.mark.parametrize("profile", ["GOOGLEEARTH", "MAX3D", "FCOLLADA"])
    def test_double_sided(self, load, profile):
        shader = f"<lambert>{color('diffuse', '1 1 1 1')}</lambert>"
        for value, expected in (("0", False), ("1", True)):
            extra = (
                f'<extra><technique profile="{profile}"><double_sided>{value}</double_sided>'
                "</technique></extra>"
            )
            found, codes = self.load_material(load, shader, extra=extra)
            assert (found.double_sided, codes) == (expected, {})

    def test_parameters_are_replaced_by_the_material(self, load):
        parameters = '<newparam sid="c"><float3>1 0 0</float3></newparam>'
        shader = '<lambert><diffuse><param ref="c"/></diffuse></lambert>'
        found, _ = self.load_material(load, shader, parameters=parameters)
        assert found.base_color == (1, 0, 0, 1)
        instance = '<setparam ref="c"><float4>0 0 1 1</float4></setparam>'
        found, codes = self.load_material(load, shader, parameters=parameters, instance=instance)
        assert (found.base_color, codes) == ((0, 0, 1, 1), {})

    @pytest.mark.parametrize(
        ("old", "new", "code"),
        [
            ('target="#m"', 'target="#gone"', "material_missing"),
            ('symbol="a"', 'symbol="z"', "material_missing"),
            ('url="#m-e"', 'url="#gone"', "material_unreadable"),
            ("<color>1 0 0 1<", "<color>1 0<", "invalid_value"),
            ("lambert>", "new>", "unknown_element"),
        ],
    )
    def test_a_material_that_is_missing_costs_only_itself(self, load, old, new, code):
        shader = f"<lambert>{color('diffuse', '1 0 0 1')}</lambert>"
        content = document(box(material="a"), bound(), libraries=material(shader)).decode()
        assert old in content
        mesh, codes = load(content.replace(old, new))
        assert volume(mesh) == pytest.approx(1)
        assert code in codes or codes == {"material_unreadable": 1}
        assert mesh.parts[0].material.base_color == (0.8, 0.8, 0.8, 1)

    def test_a_symbol_that_is_the_material_itself(self, load):
        shader = f"<lambert>{color('diffuse', '1 0 0 1')}</lambert>"
        node = '<node><instance_geometry url="#g"/></node>'
        mesh, codes = load(document(box(material="m"), node, libraries=material(shader)))
        assert (mesh.parts[0].material.base_color, codes) == ((1, 0, 0, 1), {})

    def test_two_instances_with_different_materials(self, load):
        one = material(f"<lambert>{color('diffuse', '1 0 0 1')}</lambert>")
        two = material(f"<lambert>{color('diffuse', '0 0 1 1')}</lambert>", identifier="k")
        mesh, codes = load(
            document(box(material="a"), bound() + bound(target="#k"), libraries=one + two)
        )
        assert codes == {}
        assert {part.material.base_color[:3] for part in mesh.parts} == {(1, 0, 0), (0, 0, 1)}


SAMPLER = (
    '<newparam sid="s1"><surface type="2D"><init_from>i</init_from></surface></newparam>'
    '<newparam sid="s2"><sampler2D><source>s1</source><wrap_s>MIRROR</wrap_s><wrap_t>CLAMP</wrap_t>'
    "<magfilter>NEAREST</magfilter></sampler2D></newparam>"
)
SAMPLER_15 = '<newparam sid="s2"><sampler2D><instance_image url="#i"/></sampler2D></newparam>'


class TestTextures:
    def content(self, parameters=SAMPLER, image="<init_from>a.png</init_from>", texture="s2"):
        shader = (
            f'<lambert><diffuse><texture texture="{texture}" texcoord="UV"/></diffuse></lambert>'
        )
        images = f'<library_images><image id="i">{image}</image></library_images>'
        return document(
            uv_quad(),
            bound(inputs=bind_uv("UV", 0)),
            libraries=images + material(shader, parameters=parameters),
        )

    def test_samplers_and_wraps(self, load, tmp_path):
        write(tmp_path / "a.png", png((9, 8, 7, 255)))
        mesh, codes = load(self.content())
        (part,) = mesh.parts
        sampler = part.material.sampler
        assert codes == {}
        assert part.material.texture[0, 0].tolist() == [9, 8, 7, 255]
        assert (sampler.wrap_u, sampler.wrap_v, sampler.nearest) == ("mirror", "clamp", True)
        np.testing.assert_allclose(part.uv, mesh.vertices[:, :2])

    @pytest.mark.parametrize(
        ("parameters", "image", "texture"),
        [
            (SAMPLER_15, "<init_from><ref>a.png</ref></init_from>", "s2"),
            ("", "<init_from>a.png</init_from>", "i"),
            (SAMPLER, f"<data>{png((9, 8, 7, 255)).hex()}</data>", "s2"),
            (SAMPLER, f'<init_from><hex format="png">{png().hex()}</hex></init_from>', "s2"),
            (SAMPLER, "<init_from>file:///C:/models/A.PNG</init_from>", "s2"),
        ],
    )
    def test_other_ways_to_an_image(self, load, tmp_path, parameters, image, texture):
        write(tmp_path / "a.png", png((9, 8, 7, 255)))
        mesh, codes = load(self.content(parameters, image, texture))
        assert mesh.parts[0].material.texture is not None
        assert codes == {}

    @pytest.mark.parametrize(
        ("image", "code"),
        [
            ("<init_from>gone.png</init_from>", "side_file_missing"),
            ("<init_from>a.dae</init_from>", "image_unreadable"),
            ("", "image_unreadable"),
            ("<data>xyz</data>", "image_unreadable"),
        ],
    )
    def test_an_image_that_is_missing_costs_only_itself(self, load, image, code):
        mesh, codes = load(self.content(image=image))
        assert (area(mesh), codes) == (pytest.approx(1), {code: 1})

    def test_the_bound_set_of_coordinates_is_used(self, load, tmp_path):
        write(tmp_path / "a.png", png())
        libraries = self.content().decode().partition("</asset>")[2]
        libraries = libraries.partition("<library_geometries>")[0]
        for number in (0, 3):
            node = bound(inputs=bind_uv("UV", number))
            mesh, codes = load(document(uv_quad((0, 3)), node, libraries=libraries))
            expected = mesh.vertices[:, :2] + [number, 0]
            np.testing.assert_allclose(mesh.parts[0].uv, expected)
            assert codes == {}

    @pytest.mark.parametrize(
        ("mode", "pixel", "alpha"),
        [
            ("A_ONE", (200, 100, 50, 64), 64),
            ("RGB_ZERO", (255, 255, 255, 255), 0),
            ("RGB_ZERO", (0, 0, 0, 255), 255),
            ("RGB_ONE", (128, 128, 128, 255), 128),
            ("A_ZERO", (0, 0, 0, 55), 200),
        ],
    )
    def test_a_texture_of_opacity(self, load, tmp_path, mode, pixel, alpha):
        write(tmp_path / "a.png", png(pixel))
        texture = '<texture texture="i" texcoord="UV"/>'
        content = textured_quad("a.png").replace(
            b"</lambert>",
            f'<transparent opaque="{mode}">{texture}</transparent></lambert>'.encode(),
        )
        content = content.replace(
            b'<diffuse><texture texture="i" texcoord="UV"/></diffuse>',
            color("diffuse", "1 1 1 1").encode(),
        )
        mesh, codes = load(content)
        found = mesh.parts[0].material
        assert codes == {}
        assert found.alpha_mode == "BLEND"
        assert found.texture[0, 0, 3] == alpha


class TestZippedDocuments:
    def test_a_manifest_names_the_document_and_images_are_read(self, load):
        members = {
            "manifest.xml": b"<dae_root>./d/scene.dae</dae_root>",
            "d/scene.dae": textured_quad("../Tex/a.png"),
            "other.dae": document(box()),
            "tex/a.png": png(),
        }
        mesh, codes = load(zipped(members), "a.zae")
        assert (area(mesh), codes) == (pytest.approx(1), {})
        assert mesh.parts[0].material.texture is not None

    def test_without_manifest_the_only_document_is_read(self, load):
        mesh, codes = load(zipped({"a/b.dae": textured_quad("a.png"), "a/a.png": png()}), "a.zae")
        assert (area(mesh), codes) == (pytest.approx(1), {})

    def test_images_outside_the_package_are_missing(self, load, tmp_path):
        write(tmp_path / "a.png", png())
        mesh, codes = load(zipped({"b.dae": textured_quad("../a.png")}), "a.zae")
        assert (area(mesh), codes) == (pytest.approx(1), {"side_file_missing": 1})

    def test_a_manifest_that_names_nothing_gives_a_warning(self, load):
        members = {"manifest.xml": b"<dae_root>x.dae</dae_root>", "b.dae": document(box())}
        assert load(zipped(members), "a.zae")[1] == {"invalid_value": 1}


UNKNOWN = '<new a="1"><inner/></new>'
LEVELS = [
    *("COLLADA", "asset", "library_geometries", "geometry", "mesh", "source", "accessor"),
    *("technique_common", "vertices", "polylist", "library_visual_scenes", "visual_scene"),
    *("node", "instance_geometry", "bind_material", "instance_material", "scene"),
    *("library_materials", "material", "instance_effect", "library_effects", "effect"),
    *("profile_COMMON", "technique", "lambert", "diffuse", "color", "up_axis", "p", "vcount"),
]


class TestUnknownContent:
    def content(self) -> str:
        shader = f"<lambert>{color('diffuse', '1 0 0 1')}</lambert>"
        return document(box(material="a"), bound(), libraries=material(shader)).decode()

    @pytest.mark.parametrize("level", LEVELS)
    def test_an_unknown_element_gives_a_warning(self, load, level):
        content, count = re.subn(
            rf"(<{level}\b[^>]*>)", rf"\g<1>{UNKNOWN}", self.content(), count=1
        )
        assert count == 1
        mesh, codes = load(content)
        assert volume(mesh) == pytest.approx(1)
        assert codes == {"unknown_element": 1}

    @pytest.mark.parametrize("level", LEVELS)
    def test_an_unknown_attribute_gives_a_warning(self, load, level):
        content, count = re.subn(rf"<{level}\b", f'<{level} new="1"', self.content(), count=1)
        assert count == 1
        mesh, codes = load(content)
        assert volume(mesh) == pytest.approx(1)
        assert codes == {"unknown_attribute": 1}

    def test_an_unknown_input_and_a_nested_asset_give_warnings(self, load):
        content = self.content().replace(
            "<vcount>", '<input semantic="NEW" source="#g-p" offset="0"/><vcount>'
        )
        assert load(content)[1] == {"unknown_attribute": 1}
        nested = "<asset><up_axis>Z_UP</up_axis></asset>"
        content = self.content().replace("<node>", f"<node>{nested}")
        assert load(content)[1] == {"unknown_element": 1}

    def test_data_of_applications_is_ignored(self, load):
        extra = '<extra type="x"><technique profile="MAYA"><a b="1">c<d/></a></technique></extra>'
        content = self.content().replace("</node>", f"{extra}</node>")
        assert load(content)[1] == {}

    @pytest.mark.parametrize("encoding", ["utf-16", "latin-1", "utf-8-sig", "cp1252", "gbk"])
    def test_encodings(self, load, encoding):
        declared = {"utf-8-sig": "utf-8"}.get(encoding, encoding)
        name = "木头" if encoding == "gbk" else "Würfel"
        content = self.content().replace('encoding="utf-8"', f'encoding="{declared}"')
        content = content.replace("<node>", f'<node name="{name}">')
        mesh, codes = load(content.encode(encoding))
        assert (volume(mesh), codes) == (pytest.approx(1), {})

    @pytest.mark.parametrize(
        "namespace", ["", ' xmlns="http://www.collada.org/2008/03/COLLADASchema"']
    )
    def test_namespaces(self, load, namespace):
        content = re.sub(' xmlns="[^"]*"', namespace, self.content())
        mesh, codes = load(content)
        assert (volume(mesh), codes) == (pytest.approx(1), {})

    def test_a_prefix_for_all_elements(self, load):
        content = re.sub("<(/?)([a-zA-Z])", r"<\g<1>c:\g<2>", self.content())
        mesh, codes = load(content.replace("xmlns=", "xmlns:c="))
        assert (volume(mesh), codes) == (pytest.approx(1), {})


def test_references_may_be_percent_encoded(load):
    """The asset was empty."""
    nodes = '<node><instance_geometry url="#my%20box"/></node>'
    mesh, codes = load(document(box("my box"), nodes))
    assert (volume(mesh), codes) == (pytest.approx(1), {})


def test_a_visual_scene_that_is_not_shown_is_reported(load):
    """Its placement of the box was left out without a warning, since the box is drawn elsewhere."""
    other = '<visual_scene id="t"><node><instance_geometry url="#g"/></node></visual_scene>'
    empty = '<visual_scene id="u"/>'
    content = document(box()).replace(
        b"</library_visual_scenes>", f"{other}{empty}</library_visual_scenes>".encode()
    )
    mesh, codes = load(content)
    assert (volume(mesh), codes) == (pytest.approx(1), {"unplaced_geometry": 1})
