"""3MF packages: parts, placements, colours and textures are read, and nothing is lost silently."""

import re

import numpy as np
import pytest

from pipeline.core.errors import Reject
from pipeline.core.schema import Material
from pipeline.curation.reasons import explain
from pipeline.mesh_io.config import LoadConfig
from pipeline.mesh_io.load import load_with_report
from pipeline.mesh_io.load_warnings import WarningLog
from pipeline.mesh_io.reader_context import ReaderContext
from pipeline.mesh_io.readers.threemf import read_threemf
from pipeline.mesh_io.side_files import SideFiles
from tests.pipeline.mesh_files import RELATIONSHIPS, png, write, zipped
from tests.pipeline.mesh_io import measures

CFG = LoadConfig()
RELATIONSHIP_PATH = "_rels/.rels"
MODEL_PATH = "3D/3dmodel.model"
CORE = "http://schemas.microsoft.com/3dmanufacturing/core/2015/02"
NAMESPACES = (
    f'xmlns="{CORE}" '
    'xmlns:m="http://schemas.microsoft.com/3dmanufacturing/material/2015/02" '
    'xmlns:p="http://schemas.microsoft.com/3dmanufacturing/production/2015/06" '
    'xmlns:s="http://schemas.microsoft.com/3dmanufacturing/slice/2015/07" '
    'xmlns:b="http://schemas.microsoft.com/3dmanufacturing/beamlattice/2017/02" '
    'xmlns:x="http://example.com/x"'
)
BOX_FACES = [
    *((0, 2, 1), (0, 3, 2), (4, 5, 6), (4, 6, 7), (0, 1, 5), (0, 5, 4)),
    *((1, 2, 6), (1, 6, 5), (2, 3, 7), (2, 7, 6), (3, 0, 4), (3, 4, 7)),
]


def mesh(size=(1, 1, 1), *, triangle="", first="") -> str:
    """Return the mesh of a box at the origin, with attributes for all triangles or the first."""
    x, y, z = size
    corners = [(0, 0), (x, 0), (x, y), (0, y)]
    vertices = "".join(f'<vertex x="{a}" y="{b}" z="{c}"/>' for c in (0, z) for a, b in corners)
    faces = "".join(
        f'<triangle v1="{a}" v2="{b}" v3="{c}" {first if k == 0 and first else triangle}/>'
        for k, (a, b, c) in enumerate(BOX_FACES)
    )
    return f"<mesh><vertices>{vertices}</vertices><triangles>{faces}</triangles></mesh>"


def model(resources: str, build: str = '<item objectid="1"/>', attributes: str = "") -> bytes:
    return (
        f'<?xml version="1.0" encoding="UTF-8"?><model unit="millimeter" {NAMESPACES} {attributes}>'
        f"<resources>{resources}</resources><build>{build}</build></model>"
    ).encode()


def package(root: bytes, parts: dict[str, bytes] | None = None) -> bytes:
    return zipped(
        {
            "[Content_Types].xml": b"<Types/>",
            RELATIONSHIP_PATH: RELATIONSHIPS,
            MODEL_PATH: root,
            **(parts or {}),
        }
    )


def box(identifier=1, size=(1, 1, 1), attributes="", **looks) -> str:
    return f'<object id="{identifier}" {attributes}>{mesh(size, **looks)}</object>'


@pytest.fixture
def load(tmp_path):
    """Return a function that loads a package: (mesh, {code: count})."""

    def load(content: bytes, cfg: LoadConfig = CFG):
        mesh, report = load_with_report(write(tmp_path / "a.3mf", content), cfg)
        assert (report.up_axis, report.up_origin) == ("z", "stated")
        return mesh, {warning.code: warning.count for warning in report.warnings}

    return load


def scene_of(content: bytes, tmp_path):
    log = WarningLog()
    path = tmp_path / "a.3mf"
    context = ReaderContext(path=path, cfg=CFG, side_files=SideFiles(path, None, log), warnings=log)
    return read_threemf(content, context)


def volume(mesh) -> float:
    corners = mesh.vertices[mesh.faces]
    return float(np.einsum("fi,fi->", corners[:, 0], np.cross(corners[:, 1], corners[:, 2])) / 6)


def bounds(mesh) -> np.ndarray:
    """Return the bounding box in the frame of the file, which has z up."""
    points = mesh.vertices[mesh.faces].reshape(-1, 3)
    points = np.stack([points[:, 0], -points[:, 2], points[:, 1]], axis=1)
    return np.stack([points.min(axis=0), points.max(axis=0)])


def colors_at_faces(mesh) -> np.ndarray:
    """Return sRGB colours [F, 3, 3] at the corners of the faces, without textures."""
    colors = measures.linear_colors(mesh)
    low = colors * 12.92
    return np.rint(255 * np.where(low <= 0.04045, low, 1.055 * colors ** (1 / 2.4) - 0.055))


def at(x=0, y=0, z=0, linear="1 0 0 0 1 0 0 0 1") -> str:
    return f'transform="{linear} {x} {y} {z}"'


class TestObjectsInOtherParts:
    def test_components_draw_only_their_own_object_of_a_part(self, load):
        root = model(
            '<object id="9"><components><component p:path="/3D/Objects/o.model" objectid="1"/>'
            f'<component p:path="/3D/Objects/o.model" objectid="2" {at(10)}/>'
            "</components></object>",
            '<item objectid="9"/>',
        )
        part = model(box(1) + box(2, (1, 5, 1)), "")
        mesh, codes = load(package(root, {"3D/Objects/o.model": part}))
        assert (len(mesh.faces), codes) == (24, {})
        assert volume(mesh) == pytest.approx(6)
        np.testing.assert_allclose(bounds(mesh), [[0, 0, 0], [11, 5, 1]])

    def test_equal_ids_in_two_parts_are_two_objects(self, load):
        items = (
            '<item objectid="1" p:path="/3D/a.model"/>'
            f'<item objectid="1" p:path="/3D/b.model" {at(10)}/>'
        )
        parts = {"3D/a.model": model(box(1), ""), "3D/b.model": model(box(1, (2, 3, 4)), "")}
        mesh, codes = load(package(model("", items), parts))
        assert codes == {}
        assert volume(mesh) == pytest.approx(1 + 24)
        np.testing.assert_allclose(bounds(mesh), [[0, 0, 0], [12, 3, 4]])

    def test_the_root_part_has_the_name_that_its_relationship_states(self, load):
        content = zipped(
            {
                RELATIONSHIP_PATH: RELATIONSHIPS.replace(b"/3D/3dmodel.model", b"part.xml"),
                "part.xml": model(box()),
            }
        )
        mesh, codes = load(content)
        assert (volume(mesh), codes) == (pytest.approx(1), {})

    @pytest.mark.parametrize("relationships", [None, b"<R/>", b"cut <"])
    def test_a_package_without_relationships_is_read_with_a_warning(self, load, relationships):
        parts = {"3D/other.model": model(box())}
        if relationships is not None:
            parts[RELATIONSHIP_PATH] = relationships
        mesh, codes = load(zipped(parts))
        assert volume(mesh) == pytest.approx(1)
        assert codes["invalid_value"] >= 1

    @pytest.mark.parametrize("path", ["/3d/objects/A B.MODEL", "/3D/Objects/a%20b.model"])
    def test_part_names_differ_in_case_and_encoding(self, load, path):
        root = model("", f'<item objectid="1" p:path="{path}"/>')
        mesh, codes = load(package(root, {"3D/Objects/a b.model": model(box(), "")}))
        assert (volume(mesh), codes) == (pytest.approx(1), {})

    def test_backslashes_in_the_names_of_the_archive(self, load):
        content = zipped({"_rels\\.rels": RELATIONSHIPS, "3D\\3dmodel.model": model(box())})
        mesh, codes = load(content)
        assert (volume(mesh), codes) == (pytest.approx(1), {})

    @pytest.mark.parametrize("part", [None, b"<model", b"\0\1", model(box(7), "")])
    def test_a_part_or_object_that_is_missing_costs_only_itself(self, load, part):
        root = model(box(1), '<item objectid="1"/><item objectid="2" p:path="/3D/b.model"/>')
        mesh, codes = load(package(root, {} if part is None else {"3D/b.model": part}))
        assert volume(mesh) == pytest.approx(1)
        assert codes["primitive_unreadable"] == 1

    def test_a_part_that_nothing_refers_to_is_reported(self, load):
        mesh, codes = load(package(model(box()), {"3D/lost.model": model(box()), "x.bin": b"1"}))
        assert volume(mesh) == pytest.approx(1)
        assert codes == {"unplaced_geometry": 1, "unknown_element": 1}

    def test_pictures_and_settings_of_slicers_are_no_loss(self, load):
        attachments = {
            "Metadata/thumbnail.png": b"",
            "Metadata/slice_info.config": b"",
            "3D/Objects/Metadata/a.png": b"",
            "3D/_rels/3dmodel.model.rels": b"",
            "3D/Texture/not_used.png": b"",
            "2D/slices.model": b"",
        }
        assert load(package(model(box()), attachments))[1] == {}


class TestPlacement:
    def test_nested_components_and_items_are_multiplied_as_row_vectors(self, load):
        turn = "0 1 0 -1 0 0 0 0 1"  # x becomes y, y becomes -x
        root = model(
            box(1, (2, 1, 1))
            + f'<object id="2"><components><component objectid="1" {at(5, linear=turn)}/>'
            "</components></object>",
            f'<item objectid="2" {at(0, 100)}/><item objectid="1"/>',
        )
        mesh, codes = load(package(root))
        assert codes == {}
        assert volume(mesh) == pytest.approx(4)
        np.testing.assert_allclose(bounds(mesh), [[0, 0, 0], [5, 102, 1]], atol=1e-12)

    def test_a_mirrored_item_stays_outward(self, load):
        mesh, _ = load(
            package(model(box(), f'<item objectid="1" {at(linear="-1 0 0 0 1 0 0 0 1")}/>'))
        )
        assert volume(mesh) == pytest.approx(1)
        np.testing.assert_allclose(bounds(mesh), [[-1, 0, 0], [0, 1, 1]])

    @pytest.mark.parametrize("transform", ["1 0 0", "a b c d e f g h i j k l"])
    def test_an_invalid_transform_is_left_out_with_a_warning(self, load, transform):
        mesh, codes = load(package(model(box(), f'<item objectid="1" transform="{transform}"/>')))
        assert (volume(mesh), codes) == (pytest.approx(1), {"invalid_value": 1})

    @pytest.mark.parametrize(
        ("unit", "metres"), [("millimeter", 1e-3), ("inch", 0.0254), ("micron", 1e-6)]
    )
    def test_the_unit_is_stated(self, tmp_path, unit, metres):
        content = package(model(box()).replace(b"millimeter", unit.encode()))
        assert scene_of(content, tmp_path).metres_per_unit == metres

    @pytest.mark.parametrize("kind", ["support", "solidsupport"])
    def test_supports_are_left_out_with_a_warning(self, load, kind):
        root = model(
            box(1)
            + box(2, (9, 9, 9), f'type="{kind}"')
            + '<object id="3"><components><component objectid="1"/><component objectid="2"/>'
            "</components></object>",
            '<item objectid="3"/>',
        )
        mesh, codes = load(package(root))
        assert (volume(mesh), codes) == (pytest.approx(1), {"support_left_out": 1})

    def test_other_objects_are_left_out_and_surfaces_drawn(self, load):
        root = model(
            box(1, attributes='type="surface"') + box(2, (9, 9, 9), 'type="other"'),
            '<item objectid="1"/><item objectid="2"/>',
        )
        mesh, codes = load(package(root))
        assert (volume(mesh), codes) == (pytest.approx(1), {"hidden_left_out": 1})

    def test_an_item_that_is_not_printed_now_is_part_of_the_scene(self, load):
        mesh, codes = load(package(model(box(), '<item objectid="1" printable="0"/>')))
        assert (volume(mesh), codes) == (pytest.approx(1), {})

    def test_an_object_that_the_build_does_not_place_is_reported(self, load):
        mesh, codes = load(package(model(box(1) + box(2))))
        assert (volume(mesh), codes) == (pytest.approx(1), {"unplaced_geometry": 1})

    def test_a_component_that_contains_itself_is_drawn_once(self, load):
        root = model(
            box(1) + '<object id="2"><components><component objectid="1"/><component objectid="2"/>'
            "</components></object>",
            '<item objectid="2"/>',
        )
        mesh, codes = load(package(root))
        assert (volume(mesh), codes) == (pytest.approx(1), {"node_cycle": 1})


class TestColors:
    RED = (
        '<basematerials id="5"><base name="r" displaycolor="#FF0000"/>'
        '<base name="g" displaycolor="#008000FF"/></basematerials>'
    )
    GROUP = (
        '<m:colorgroup id="6"><m:color color="#FF0000"/><m:color color="#00FF0080"/>'
        '<m:color color="#204060"/></m:colorgroup>'
    )

    def test_a_base_material_of_the_object_and_of_a_triangle(self, load):
        content = self.RED + box(attributes='pid="5" pindex="0"', first='pid="5" p1="1"')
        mesh, codes = load(package(model(content)))
        colors = colors_at_faces(mesh)
        assert codes == {}
        assert (colors == [255, 0, 0]).all(axis=(1, 2)).sum() == 11
        assert (colors == [0, 128, 0]).all(axis=(1, 2)).sum() == 1

    def test_alpha_of_a_base_material_is_drawn(self, load):
        content = self.RED.replace("#FF0000", "#FF000080") + box(attributes='pid="5" pindex="0"')
        mesh, _ = load(package(model(content)))
        (part,) = mesh.parts
        assert part.material.alpha_mode == "BLEND"
        assert part.material.base_color == pytest.approx((1, 0, 0, 128 / 255))

    def test_corner_colors_are_srgb_and_opaque(self, load):
        content = self.GROUP + box(
            attributes='pid="6" pindex="2"', first='pid="6" p1="0" p2="1" p3="2"'
        )
        mesh, codes = load(package(model(content)))
        colors = colors_at_faces(mesh)
        assert codes == {}
        (row,) = np.flatnonzero((colors != [32, 64, 96]).any(axis=(1, 2)))
        assert sorted(colors[row].tolist()) == [[0, 255, 0], [32, 64, 96], [255, 0, 0]]
        assert all(part.colors is None or (part.colors[:, 3] == 255).all() for part in mesh.parts)

    def test_one_color_for_all_is_a_material(self, load):
        mesh, _ = load(package(model(self.GROUP + box(attributes='pid="6" pindex="0"'))))
        (part,) = mesh.parts
        assert part.colors is None
        assert part.material.base_color == (1, 0, 0, 1)

    def test_p2_and_p3_default_to_p1_and_pid_to_the_object(self, load):
        content = self.GROUP + box(attributes='pid="6" pindex="2"', first='p1="0"')
        mesh, codes = load(package(model(content)))
        assert codes == {}
        assert (colors_at_faces(mesh) == [255, 0, 0]).all(axis=(1, 2)).sum() == 1

    def test_faces_without_property_keep_the_default_material(self, load):
        mesh, codes = load(package(model(self.GROUP + box(first='pid="6" p1="0"'))))
        assert codes == {}
        assert (colors_at_faces(mesh) == [231, 231, 231]).all(axis=(1, 2)).sum() == 11

    def test_colors_of_equal_ids_belong_to_their_part(self, load):
        root = model(
            self.RED + box(1, attributes='pid="5" pindex="0"'),
            f'<item objectid="1"/><item objectid="1" p:path="/3D/b.model" {at(5)}/>',
        )
        other = model(
            self.RED.replace("#FF0000", "#0000FF") + box(1, attributes='pid="5" pindex="0"'), ""
        )
        mesh, codes = load(package(root, {"3D/b.model": other}))
        assert codes == {}
        assert {part.material.base_color for part in mesh.parts} == {(1, 0, 0, 1), (0, 0, 1, 1)}

    def material_of(self, load, resources: str, property_id: int) -> Material:
        """Return the material of a box that uses the first property of a group of resources."""
        content = resources + box(attributes=f'pid="{property_id}" pindex="0"')
        mesh, codes = load(package(model(content)))
        (part,) = mesh.parts
        assert codes == {}
        return part.material

    def test_composites_are_mixed_in_linear_light(self, load):
        content = (
            '<basematerials id="5"><base name="r" displaycolor="#FF0000"/>'
            '<base name="b" displaycolor="#0000FF"/></basematerials>'
            '<m:compositematerials id="7" matid="5" matindices="0 1">'
            '<m:composite values="3 1"/></m:compositematerials>'
        )
        material = self.material_of(load, content, property_id=7)
        assert material.base_color == pytest.approx((0.75, 0, 0.25, 1), abs=0.005)

    @pytest.mark.parametrize(
        ("method", "expected"), [("mix", (0.5, 0.5, 0, 1)), ("multiply", (0, 0, 0, 1))]
    )
    def test_multi_properties_blend_their_layers(self, load, method, expected):
        content = (
            '<m:colorgroup id="6"><m:color color="#FF0000"/></m:colorgroup>'
            '<m:colorgroup id="7"><m:color color="#00FF0080"/></m:colorgroup>'
            f'<m:multiproperties id="8" pids="6 7" blendmethods="{method}">'
            '<m:multi pindices="0 0"/></m:multiproperties>'
        )
        for resources in (content, content.replace("<m:multi ", "<multi ")):
            material = self.material_of(load, resources, property_id=8)
            assert material.base_color == pytest.approx(expected, abs=0.005)

    @pytest.mark.parametrize("method", ["mix", "multiply"])
    def test_two_textures_in_one_property_are_reported(self, load, method):
        content = "".join(
            f'<m:texture2d id="{k}" path="/3D/{k}.png" contenttype="image/png"/>'
            f'<m:texture2dgroup id="1{k}" texid="{k}"><m:tex2coord u="0" v="0"/></m:texture2dgroup>'
            for k in (3, 4)
        )
        content += (
            f'<m:multiproperties id="8" pids="13 14" blendmethods="{method}">'
            '<m:multi pindices="0 0"/></m:multiproperties>'
        )
        images = {f"3D/{k}.png": png((k, 0, 0, 255)) for k in (3, 4)}
        mesh, codes = load(package(model(content + box(attributes='pid="8" pindex="0"')), images))
        (part,) = mesh.parts
        drawn = {"mix": 4, "multiply": 3}[method]  # the upper texture, or the lower one
        assert part.material.texture[0, 0].tolist() == [drawn, 0, 0, 255]
        assert codes == {"appearance_ignored": 1}

    def test_metallic_display_properties(self, load):
        content = (
            '<m:pbmetallicdisplayproperties id="3"><m:pbmetallic name="a" metallicness="0.9" '
            'roughness="0.25"/></m:pbmetallicdisplayproperties>'
            '<basematerials id="5" displaypropertiesid="3"><base name="r" displaycolor="#FF0000"/>'
            "</basematerials>"
        )
        material = self.material_of(load, content, property_id=5)
        assert (material.metallic, material.roughness) == (0.9, 0.25)

    @pytest.mark.parametrize(
        ("resources", "attributes", "code"),
        [
            (RED, 'pid="77" pindex="0"', "material_missing"),
            (RED, 'pid="5" pindex="9"', "material_missing"),
            (RED.replace("#FF0000", "red"), 'pid="5" pindex="0"', "invalid_value"),
            (
                '<m:translucentdisplayproperties id="3"><m:translucent attenuation="1 1 1"/>'
                "</m:translucentdisplayproperties>"
                + RED.replace('id="5"', 'id="5" displaypropertiesid="3"'),
                'pid="5" pindex="0"',
                "appearance_ignored",
            ),
        ],
    )
    def test_a_look_that_cannot_be_read_costs_only_itself(self, load, resources, attributes, code):
        mesh, codes = load(package(model(resources + box(attributes=attributes))))
        assert volume(mesh) == pytest.approx(1)
        assert set(codes) == {code}


class TestTextures:
    TEXTURE = (
        '<m:texture2d id="4" path="/3D/Textures/a.png" contenttype="image/png" {styles}/>'
        '<m:texture2dgroup id="9" texid="4"><m:tex2coord u="0" v="0"/><m:tex2coord u="1.5" v="0"/>'
        '<m:tex2coord u="0" v="2"/></m:texture2dgroup>'
    )
    LOOK = 'pid="9" p1="0" p2="1" p3="2"'

    def content(self, styles='tilestyleu="mirror" tilestylev="clamp" filter="nearest"') -> bytes:
        return model(self.TEXTURE.format(styles=styles) + box(triangle=self.LOOK))

    def test_coordinates_wraps_and_filter(self, load):
        mesh, codes = load(package(self.content(), {"3D/Textures/a.png": png((10, 20, 30, 255))}))
        (part,) = mesh.parts
        assert codes == {}
        assert part.material.texture[0, 0].tolist() == [10, 20, 30, 255]
        assert part.material.base_color == (1, 1, 1, 1)
        sampler = part.material.sampler
        assert (sampler.wrap_u, sampler.wrap_v, sampler.nearest) == ("mirror", "clamp", True)
        corners = part.uv[mesh.faces]
        expected = np.broadcast_to([[0, 0], [1.5, 0], [0, 2]], corners.shape)
        np.testing.assert_array_equal(corners, expected)

    def test_the_default_is_to_repeat(self, load):
        mesh, _ = load(package(self.content(""), {"3D/Textures/a.png": png()}))
        assert mesh.parts[0].material.sampler.wrap_u == "repeat"

    @pytest.mark.parametrize(
        ("parts", "code"),
        [({}, "side_file_missing"), ({"3D/Textures/a.png": b"GIF89a"}, "image_unreadable")],
    )
    def test_an_image_that_is_missing_or_damaged_costs_only_itself(self, load, parts, code):
        mesh, codes = load(package(self.content(), parts))
        assert (volume(mesh), codes) == (pytest.approx(1), {code: 1})

    def test_a_mesh_with_textured_and_colored_triangles(self, load):
        resources = self.TEXTURE.format(styles="") + TestColors.GROUP
        root = model(resources + box(attributes='pid="6" pindex="0"', first=self.LOOK))
        mesh, codes = load(package(root, {"3D/Textures/a.png": png()}))
        assert codes == {}
        textured = [part for part in mesh.parts if part.material.texture is not None]
        assert [part.faces.stop - part.faces.start for part in textured] == [1]
        assert (colors_at_faces(mesh) == [255, 0, 0]).all(axis=(1, 2)).sum() == 11


class TestVolumesForSlicers:
    @pytest.mark.parametrize(
        ("metadata", "code"),
        [
            ('key="volume_type" value="ParameterModifier"', "hidden_left_out"),
            ('key="volume_type" value="SupportBlocker"', "support_left_out"),
            ('key="volume_type" value="NegativeVolume"', "unsupported_primitive"),
            ('key="modifier" value="1"', "hidden_left_out"),
            ('key="volume_type" value="ModelPart"', None),
        ],
    )
    def test_triangles_of_prusaslicer(self, load, metadata, code):
        # Two boxes in one mesh, of which the second one is a volume for the slicer.
        two = mesh()
        vertices = re.search("<vertices>(.*)</vertices>", two)[1]
        faces = re.search("<triangles>(.*)</triangles>", two)[1]
        moved = re.sub('x="(.*?)"', lambda match: f'x="{int(match[1]) + 5}"', vertices)
        shifted = re.sub('v([123])="(.*?)"', lambda m: f'v{m[1]}="{int(m[2]) + 8}"', faces)
        content = two.replace(vertices, vertices + moved).replace(faces, faces + shifted)
        settings = (
            '<config><object id="1"><metadata type="object" key="name" value="a"/>'
            '<volume firstid="0" lastid="11"><metadata key="volume_type" value="ModelPart"/>'
            f'</volume><volume firstid="12" lastid="23"><metadata type="volume" {metadata}/>'
            "</volume></object></config>"
        )
        parts = {"Metadata/Slic3r_PE_model.config": settings.encode()}
        found, codes = load(package(model(f'<object id="1">{content}</object>'), parts))
        assert volume(found) == pytest.approx(2 if code is None else 1)
        assert codes == ({} if code is None else {code: 1})

    def test_parts_of_bambu_studio(self, load):
        root = model(
            '<object id="9"><components><component p:path="/3D/o.model" objectid="1"/>'
            '<component p:path="/3D/o.model" objectid="2"/></components></object>',
            '<item objectid="9"/>',
        )
        settings = (
            b'<config><object id="9"><part id="1" subtype="normal_part"/>'
            b'<part id="2" subtype="modifier_part"><metadata key="x" value="y"/></part></object>'
            b'<plate><metadata key="a" value="b"/></plate></config>'
        )
        parts = {
            "3D/o.model": model(box(1) + box(2, (9, 9, 9)), ""),
            "Metadata/model_settings.config": settings,
        }
        found, codes = load(package(root, parts))
        assert (volume(found), codes) == (pytest.approx(1), {"hidden_left_out": 1})

    @pytest.mark.parametrize(
        ("name", "settings", "expected"),
        [
            (
                "Slic3r_PE.config",
                b"; a = 1\n; extruder_colour = #FF0000;#00FF00\n",
                "#FF0000 #00FF00",
            ),
            ("Slic3r_PE.config", b'; filament_colour = "";#00FF00\n', "#00FF00"),
            ("Slic3r_PE.config", b"; extruder_colour = \n; b = #FFFFFF\n", None),
            ("project_settings.config", b'{"filament_colour": ["#FF0000", "#FF0000"]}', "#FF0000"),
            ("project_settings.config", b'{"filament_colour": []}', None),
            ("project_settings.config", b"[1]", None),
        ],
    )
    def test_colours_of_filaments_are_reported(self, tmp_path, name, settings, expected):
        content = package(model(box()), {f"Metadata/{name}": settings})
        _, report = load_with_report(write(tmp_path / "a.3mf", content), CFG)
        found = [(warning.code, *warning.examples) for warning in report.warnings]
        code = "appearance_ignored"
        assert found == ([] if expected is None else [(code, f"filament colours {expected}")])

    @pytest.mark.parametrize("name", ["project_settings.config", "model_settings.config"])
    def test_settings_that_cannot_be_read_cost_only_themselves(self, load, name):
        found, codes = load(package(model(box()), {f"Metadata/{name}": b"<config"}))
        assert (volume(found), codes) == (pytest.approx(1), {"invalid_value": 1})


UNKNOWN = "<x:new><x:inner a='1'/></x:new>"
LEVELS = {
    "model": (b"<resources>", f"{UNKNOWN}<resources>"),
    "resources": (b"<object ", f"{UNKNOWN}<object "),
    "object": (b"<mesh>", f"{UNKNOWN}<mesh>"),
    "mesh": (b"<vertices>", f"{UNKNOWN}<vertices>"),
    "vertices": (b"<vertex", f"{UNKNOWN}<vertex"),
    "triangles": (b"<triangle ", f"{UNKNOWN}<triangle "),
    "vertex": (b'z="0"/>', f'z="0">{UNKNOWN}</vertex>'),
    "triangle": (b'v3="1" />', f'v3="1">{UNKNOWN}</triangle>'),
    "build": (b"<item", f"{UNKNOWN}<item"),
    "item": (b'<item objectid="1"/>', f'<item objectid="1">{UNKNOWN}</item>'),
    "core namespace": (b"<mesh>", "<new/><mesh>"),
    "text": (b"<mesh>", "words<mesh>"),
}
WITH_ATTRIBUTES = ("model", "resources", "object", "mesh", "vertices", "vertex", "triangle", "item")


class TestUnknownContent:
    @pytest.mark.parametrize("level", LEVELS)
    def test_an_unknown_element_gives_a_warning(self, load, level):
        old, new = LEVELS[level]
        content = model(box())
        assert old in content
        mesh, codes = load(package(content.replace(old, new.encode(), 1)))
        assert (volume(mesh), codes) == (pytest.approx(1), {"unknown_element": 1})

    @pytest.mark.parametrize("attribute", ["new", "x:new"])
    @pytest.mark.parametrize("name", WITH_ATTRIBUTES)
    def test_an_unknown_attribute_gives_a_warning(self, load, name, attribute):
        content, count = re.subn(
            f"<{name}\\b", f'<{name} {attribute}="1"', model(box()).decode(), count=1
        )
        assert count == 1
        mesh, codes = load(package(content.encode()))
        assert (volume(mesh), codes) == (pytest.approx(1), {"unknown_attribute": 1})

    def test_a_required_extension_that_is_unknown_gives_a_warning(self, load):
        mesh, codes = load(package(model(box(), attributes='requiredextensions="m x"')))
        assert (volume(mesh), codes) == (pytest.approx(1), {"unknown_extension": 1})

    def test_a_beam_lattice_and_coarse_slices_are_reported(self, load):
        content = model(
            box(attributes='s:slicestackid="3" s:meshresolution="lowres"').replace(
                "</mesh>", "<b:beamlattice><b:beams/></b:beamlattice></mesh>"
            )
        )
        mesh, codes = load(package(content))
        assert (volume(mesh), codes) == (pytest.approx(1), {"unsupported_primitive": 2})

    def test_a_package_of_lattices_alone_says_what_was_left_out(self, load):
        points = re.sub(
            "<triangles>.*</triangles>", "<b:beamlattice><b:beams/></b:beamlattice>", mesh()
        )
        with pytest.raises(Reject) as rejected:
            load(package(model(f'<object id="1">{points}</object>')))
        assert rejected.value.reason == "empty_scene"
        (warning,) = rejected.value.numbers["warnings"]
        assert warning.startswith("unsupported_primitive: ")
        assert "b:beamlattice" in warning
        assert explain("empty_scene", rejected.value.numbers, {}) == warning

    def test_painted_triangles_are_reported(self, load):
        mesh, codes = load(package(model(box(triangle='paint_color="4" paint_seam="1"'))))
        assert (volume(mesh), codes) == (pytest.approx(1), {"appearance_ignored": 12})

    def test_other_prefixes_and_an_unknown_root_namespace(self, load):
        content = model(box()).replace(b"<", b"<q:").replace(b"<q:/", b"</q:")
        content = content.replace(b"<q:?", b"<?").replace(b"xmlns=", b"xmlns:q=")
        assert load(package(content))[1] == {}
        other = model(box()).replace(CORE.encode(), b"http://example.com/3mf")
        mesh, codes = load(package(other))
        assert (volume(mesh), codes) == (pytest.approx(1), {"unknown_extension": 1})


class TestDamage:
    def test_triangles_with_indices_that_do_not_exist_are_left_out(self, load):
        content = model(box()).replace(b'v1="0" v2="2" v3="1"', b'v1="0" v2="99999999999" v3="x"')
        mesh, codes = load(package(content))
        assert (len(mesh.faces), codes) == (11, {"index_out_of_range": 1})

    def test_degenerate_triangles_are_dropped(self, load):
        content = model(box()).replace(b'v1="0" v2="2" v3="1"', b'v1="0" v2="2" v3="2"')
        assert len(load(package(content))[0].faces) == 11

    @pytest.mark.parametrize("value", ["", "x", "1,5"])
    def test_a_coordinate_that_is_no_number_is_rejected(self, load, value):
        content = model(box()).replace(b'x="0"', f'x="{value}"'.encode(), 1)
        with pytest.raises(Reject) as caught:
            load(package(content))
        assert caught.value.reason == "non_finite_vertices"

    @pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig", "latin-1", "cp1252"])
    def test_encodings(self, load, encoding):
        text = model(box(attributes='name="Würfel"')).decode()
        declared = "utf-8" if encoding == "utf-8-sig" else encoding
        content = text.replace("UTF-8", declared).encode(encoding)
        mesh, codes = load(package(content))
        assert (volume(mesh), codes) == (pytest.approx(1), {})

    def test_text_that_is_not_in_the_declared_encoding_gives_a_warning(self, load):
        content = model(box(attributes='name="Würfel"')).decode().encode("latin-1")
        mesh, codes = load(package(content))
        assert (volume(mesh), codes) == (pytest.approx(1), {"text_encoding": 1})

    def test_bytes_after_the_root_element_give_a_warning(self, load):
        mesh, codes = load(package(model(box()) + b"<more/>"))
        assert (volume(mesh), codes) == (pytest.approx(1), {"trailing_data": 1})

    def test_a_bare_ampersand_gives_a_warning(self, load):
        mesh, codes = load(package(model(box(attributes='name="A & B &deg;"'))))
        assert (volume(mesh), codes) == (pytest.approx(1), {"invalid_value": 2})


def test_a_part_in_another_unit_than_the_root_is_reported(load):
    root = model(
        '<object id="2"><components><component objectid="1" p:path="/3D/b.model"/></components>'
        "</object>",
        '<item objectid="2"/>',
    )
    part = model(box(), build="")
    mesh, codes = load(package(root, {"3D/b.model": part}))
    assert (volume(mesh), codes) == (pytest.approx(1), {})
    inches = part.replace(b'unit="millimeter"', b'unit="inch"')
    mesh, codes = load(package(root, {"3D/b.model": inches}))
    assert (volume(mesh), codes) == (pytest.approx(1), {"invalid_value": 1})


def test_a_texture_coordinate_that_is_no_number_is_reported(load):
    resources = (
        '<m:texture2d id="4" path="/3D/t.png" contenttype="image/png"/>'
        '<m:texture2dgroup id="9" texid="4"><m:tex2coord u="left" v="0"/></m:texture2dgroup>'
    )
    content = package(model(resources + box(attributes='pid="9" pindex="0"')), {"3D/t.png": png()})
    mesh, codes = load(content)
    assert (volume(mesh), codes.keys()) == (pytest.approx(1), {"invalid_value"})
