"""3MF and COLLADA against other writers, hostile files and random damage."""

import locale
import random
import time
import tracemalloc

import collada
import lib3mf
import numpy as np
import pytest

from pipeline.core.color import srgb_to_linear
from pipeline.core.errors import Reject
from pipeline.mesh_io.config import LoadConfig
from pipeline.mesh_io.load import load_with_report
from tests.pipeline.collada_files import bound, box, document, geometry, material, primitive
from tests.pipeline.mesh_files import RELATIONSHIPS, write, zipped
from tests.pipeline.mesh_io import measures

CFG = LoadConfig()
CORE = "http://schemas.microsoft.com/3dmanufacturing/core/2015/02"
FUZZ_SECONDS = 8.0  # of one format
BOX_FACES = [
    *((0, 2, 1), (0, 3, 2), (4, 5, 6), (4, 6, 7), (0, 1, 5), (0, 5, 4)),
    *((1, 2, 6), (1, 6, 5), (2, 3, 7), (2, 7, 6), (3, 0, 4), (3, 4, 7)),
]


def load(tmp_path, content, extension, cfg=CFG):
    mesh, report = load_with_report(write(tmp_path / f"a.{extension}", content), cfg)
    return mesh, {warning.code: warning.count for warning in report.warnings}


def threemf(resources: str, build: str = '<item objectid="1"/>', prolog: str = "") -> bytes:
    model = (
        f'<?xml version="1.0"?>{prolog}<model unit="millimeter" xmlns="{CORE}">'
        f"<resources>{resources}</resources><build>{build}</build></model>"
    )
    return zipped({"_rels/.rels": RELATIONSHIPS, "3D/3dmodel.model": model.encode()})


def threemf_box(identifier=1, name="") -> str:
    corners = [(0, 0), (1, 0), (1, 1), (0, 1)]
    vertices = "".join(f'<vertex x="{x}" y="{y}" z="{z}"/>' for z in (0, 1) for x, y in corners)
    faces = "".join(f'<triangle v1="{a}" v2="{b}" v3="{c}"/>' for a, b, c in BOX_FACES)
    return (
        f'<object id="{identifier}" name="{name}"><mesh><vertices>{vertices}</vertices>'
        f"<triangles>{faces}</triangles></mesh></object>"
    )


def sorted_triangles(corners, *values) -> np.ndarray:
    """Return triangles [F, 3, 3] and values [F, 3, ...] in an order of their own, as one table.

    Each triangle begins with its smallest corner.
    """
    table = np.concatenate(
        [
            np.asarray(array, dtype=float).reshape(len(corners), 3, -1)
            for array in (corners, *values)
        ],
        axis=2,
    ).round(4)
    table += 0.0  # no negative zeros
    rows = []
    for triangle in table.tolist():
        first = triangle.index(min(triangle))
        rows.append(triangle[first:] + triangle[:first])
    return np.array(sorted(rows))


def random_matrix(rng) -> np.ndarray:
    """Return a matrix with rotation, uneven scale, sometimes a mirror, and a move."""
    matrix = np.eye(4)
    matrix[:3, :3] = np.linalg.qr(rng.normal(size=(3, 3)))[0] @ np.diag(rng.uniform(0.5, 2, 3))
    matrix[:3, 3] = rng.uniform(-5, 5, 3)
    return matrix


def placed(points, faces, matrix) -> np.ndarray:
    """Return the triangles [F, 3, 3] of a mesh behind a matrix, outward also if it mirrors."""
    corners = (points @ matrix[:3, :3].T + matrix[:3, 3])[faces]
    return corners[:, ::-1] if np.linalg.det(matrix[:3, :3]) < 0 else corners


def random_mesh(rng) -> tuple[np.ndarray, np.ndarray]:
    points = rng.uniform(-1, 1, (rng.integers(4, 9), 3)).astype(np.float32).astype(float)
    count = int(rng.integers(1, 7))
    faces = np.array([rng.choice(len(points), 3, replace=False) for _ in range(count)])
    return points, faces


def z_up(points):
    return np.stack([points[..., 0], -points[..., 2], points[..., 1]], axis=-1)


@pytest.fixture
def kept_locale():
    """Restore the locale of the process, which lib3mf sets to "C" when it writes a file."""
    before = locale.setlocale(locale.LC_ALL)
    yield
    locale.setlocale(locale.LC_ALL, before)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.usefixtures("kept_locale")
def test_random_scenes_that_lib3mf_writes(tmp_path, seed):
    rng = np.random.default_rng(seed)
    wrapper = lib3mf.get_wrapper()
    model = wrapper.CreateModel()
    objects, meshes = [], []
    for _ in range(3):
        points, faces = random_mesh(rng)
        item = model.AddMeshObject()
        for point in points:
            vertex = lib3mf.Position()
            vertex.Coordinates[:] = point.tolist()
            item.AddVertex(vertex)
        for face in faces:
            triangle = lib3mf.Triangle()
            triangle.Indices[:] = face.tolist()
            item.AddTriangle(triangle)
        # Colours of corners, of which the first is the colour of the object.
        group = model.AddColorGroup()
        colors = rng.integers(0, 256, (4, 3))
        numbers = [group.AddColor(wrapper.RGBAToColor(*map(int, rgb), 255)) for rgb in colors]
        item.SetObjectLevelProperty(group.GetResourceID(), numbers[0])
        chosen = rng.integers(0, 4, faces.shape)
        for index, corners in enumerate(chosen.tolist()):
            properties = lib3mf.TriangleProperties()
            properties.ResourceID = group.GetResourceID()
            properties.PropertyIDs[:] = [numbers[corner] for corner in corners]
            item.SetTriangleProperties(index, properties)
        objects.append(item)
        meshes.append((points, faces, srgb_to_linear(colors / 255)[chosen]))

    def transform(matrix):
        value = lib3mf.Transform()
        for row in range(4):
            value.Fields[row][:] = matrix[:3, row].tolist()
        return value

    pair = model.AddComponentsObject()
    matrices = [random_matrix(rng) for _ in range(4)]
    pair.AddComponent(objects[0], transform(matrices[0]))
    pair.AddComponent(objects[1], transform(matrices[1]))
    model.AddBuildItem(pair, transform(matrices[2]))
    model.AddBuildItem(objects[2], transform(matrices[3]))
    model.QueryWriter("3mf").WriteToFile(str(tmp_path / "a.3mf"))

    mesh, report = load_with_report(tmp_path / "a.3mf", CFG)
    assert report.warnings == ()
    places = [matrices[2] @ matrices[0], matrices[2] @ matrices[1], matrices[3]]
    expected = []
    for (points, faces, colors), matrix in zip(meshes, places, strict=True):
        if np.linalg.det(matrix[:3, :3]) < 0:
            colors = colors[:, ::-1]
        expected.append((placed(points, faces, matrix), colors))
    expected_table = sorted_triangles(*(np.concatenate(arrays) for arrays in zip(*expected)))
    found = sorted_triangles(z_up(mesh.vertices[mesh.faces]), measures.linear_colors(mesh))
    np.testing.assert_allclose(found, expected_table, atol=0.01)


@pytest.mark.parametrize("seed", range(12))
def test_random_scenes_that_pycollada_writes(tmp_path, seed):
    rng = np.random.default_rng(seed)
    scene = collada.Collada()
    scene.assetInfo.upaxis = "Y_UP"
    expected = []
    nodes = []
    for index in range(3):
        points, faces = random_mesh(rng)
        rgb = rng.uniform(0, 1, 3)
        effect = collada.material.Effect(f"e{index}", [], "phong", diffuse=(*rgb, 1))
        material_ = collada.material.Material(f"m{index}", f"m{index}", effect)
        scene.effects.append(effect)
        scene.materials.append(material_)
        uv = rng.uniform(-2, 2, (5, 2))
        shape = collada.geometry.Geometry(
            scene,
            f"g{index}",
            f"g{index}",
            [
                collada.source.FloatSource(f"p{index}", points.ravel(), ("X", "Y", "Z")),
                collada.source.FloatSource(f"t{index}", uv.ravel(), ("S", "T")),
            ],
        )
        inputs = collada.source.InputList()
        inputs.addInput(0, "VERTEX", f"#p{index}")
        inputs.addInput(1, "TEXCOORD", f"#t{index}", set="0")
        uv_index = rng.integers(0, 5, faces.shape)
        corners = np.stack([faces, uv_index], axis=-1).ravel()
        if index == 0:
            shape.primitives.append(shape.createTriangleSet(corners, inputs, "s"))
        else:
            sizes = np.full(len(faces), 3)
            shape.primitives.append(shape.createPolylist(corners, sizes, inputs, "s"))
        scene.geometries.append(shape)
        outer, inner = random_matrix(rng), random_matrix(rng)
        binding = collada.scene.MaterialNode("s", material_, inputs=[])
        leaf = collada.scene.GeometryNode(shape, [binding])
        child = collada.scene.Node(
            f"c{index}", [leaf], [collada.scene.MatrixTransform(inner.ravel())]
        )
        nodes.append(
            collada.scene.Node(f"n{index}", [child], [collada.scene.MatrixTransform(outer.ravel())])
        )
        triangles = placed(points, faces, outer @ inner)
        colors = np.broadcast_to(srgb_to_linear(rgb), triangles.shape)
        expected.append((triangles, colors))
    visual = collada.scene.Scene("s", nodes)
    scene.scenes.append(visual)
    scene.scene = visual
    scene.write(str(tmp_path / "a.dae"))

    mesh, report = load_with_report(tmp_path / "a.dae", CFG)
    assert report.warnings == ()
    expected_table = sorted_triangles(*(np.concatenate(arrays) for arrays in zip(*expected)))
    found = sorted_triangles(mesh.vertices[mesh.faces], measures.linear_colors(mesh))
    np.testing.assert_allclose(found, expected_table, atol=2e-3)


LAUGHS = "".join(
    f'<!ENTITY l{level} "{f"&l{level - 1};" * 10 if level else "lol"}">' for level in range(12)
)
ENTITIES = {
    "billion laughs": f"<!DOCTYPE x [{LAUGHS}]>",
    "external entity": '<!DOCTYPE x [<!ENTITY l11 SYSTEM "file:///etc/passwd">]>',
    "parameter entity": '<!DOCTYPE x [<!ENTITY % p SYSTEM "file:///etc/passwd"> %p;]>',
}


class TestHostileXml:
    @pytest.mark.parametrize("name", ENTITIES)
    def test_documents_that_define_entities_are_rejected(self, tmp_path, name):
        contents = {
            "3mf": threemf(threemf_box(name="&l11;"), prolog=ENTITIES[name]),
            "dae": document(box(), "<node name='&l11;'/>").replace(
                b"<COLLADA", ENTITIES[name].encode() + b"<COLLADA"
            ),
        }
        for extension, content in contents.items():
            with pytest.raises(Reject) as caught:
                load(tmp_path, content, extension)
            assert caught.value.numbers["error"] == "xml_entities"

    def test_an_external_document_type_is_not_read(self, tmp_path):
        prolog = b'<!DOCTYPE COLLADA SYSTEM "file:///etc/passwd">'
        content = document(box()).replace(b"<COLLADA", prolog + b"<COLLADA")
        assert load(tmp_path, content, "dae")[1] == {}
        # Without its definition an entity is plain text.
        content = content.replace(b"<node ", b"<node name='&passwd;' ")
        assert load(tmp_path, content, "dae")[1] == {"invalid_value": 1}

    def test_components_that_multiply_are_rejected(self, tmp_path):
        double = "".join(
            f'<object id="{level}"><components>'
            + f'<component objectid="{level - 1}"/>' * 2
            + "</components></object>"
            for level in range(2, 60)
        )
        content = threemf(threemf_box() + double, '<item objectid="59"/>')
        with pytest.raises(Reject, match="too_many_faces"):
            load(tmp_path, content, "3mf")

    def test_nodes_that_multiply_are_rejected(self, tmp_path):
        nodes = '<node id="n0"><instance_geometry url="#g"/></node>' + "".join(
            f'<node id="n{level}">' + f'<instance_node url="#n{level - 1}"/>' * 2 + "</node>"
            for level in range(1, 60)
        )
        library = f"<library_nodes>{nodes}</library_nodes>"
        node = '<node><instance_node url="#n59"/></node>'
        with pytest.raises(Reject, match="too_many_faces"):
            load(tmp_path, document(box(), node, libraries=library), "dae")

    def test_deep_nesting_is_rejected(self, tmp_path):
        for extension, content in {
            "dae": document(box(), "<node>" * 100_000),
            "3mf": threemf("<components>" * 100_000),
        }.items():
            with pytest.raises(Reject, match="unreadable"):
                load(tmp_path, content, extension)

    @pytest.mark.parametrize(
        ("old", "new"),
        [
            ('count="24"', 'count="2000000000"'),
            ('count="8" stride="3"', 'count="2000000000" stride="3"'),
            ('stride="3"', 'stride="2000000000"'),
            ('count="8" stride="3"', 'count="8" stride="3" offset="2000000000"'),
            ('offset="0"', 'offset="2000000000"'),
            ("<vcount>4 ", "<vcount>2000000000 "),
            ('<polylist count="6"', '<polylist count="2000000000"'),
        ],
    )
    def test_huge_counts_allocate_nothing(self, tmp_path, old, new):
        content = document(box()).decode()
        assert old in content
        load(tmp_path, content, "dae")  # imports are not counted
        tracemalloc.start()
        try:
            load(tmp_path, content.replace(old, new), "dae")
        except Reject:
            pass
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert peak < 5_000_000

    @pytest.mark.parametrize("extension", ["3mf", "zae"])
    def test_packages_that_unpack_to_far_more_are_rejected(self, tmp_path, extension):
        content = zipped({"_rels/.rels": RELATIONSHIPS, "3D/3dmodel.model": bytes(70 << 20)})
        with pytest.raises(Reject, match="allocation_bomb"):
            load(tmp_path, content, extension)

    def test_more_triangles_than_allowed_end_the_parsing(self, tmp_path):
        with pytest.raises(Reject, match="too_many_faces"):
            load(tmp_path, threemf(threemf_box()), "3mf", LoadConfig(max_faces=11))

    def test_a_list_that_is_longer_than_the_buffers_of_the_parser_is_read_whole(self, tmp_path):
        count = 400_000
        faces = f"<p>{'0 1 2 ' * count}</p>"
        points = [[0, 0, 0], [1, 0, 0], [0, 1, 0]]
        content = document(geometry("g", points, primitive("triangles", "g", faces)))
        mesh, _ = load(tmp_path, content, "dae")
        assert len(mesh.faces) == count


SHADER = (
    '<phong><emission><color>0 0 0 1</color></emission><diffuse><texture texture="i" '
    'texcoord="UV"/></diffuse><transparent opaque="RGB_ZERO"><color>0 0 0 1</color></transparent>'
    "<transparency><float>0.5</float></transparency></phong>"
)
IMAGES = '<library_images><image id="i"><init_from>a.png</init_from></image></library_images>'
WORDS = [b"", b"0", b"-1", b"9" * 30, b"nan", b"1e999", b"<", b"/>", b"&", b'"', b"\0", b"\xff\xfe"]


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Return a content with a few random changes of bytes, words, attributes and elements."""
    for _ in range(rng.randint(1, 4)):
        kind = rng.randrange(5)
        start = rng.randrange(len(content))
        if kind == 0:  # a byte
            content = content[:start] + bytes([rng.randrange(256)]) + content[start + 1 :]
        elif kind == 1:  # a cut
            end = min(start + rng.randrange(1, 200), len(content))
            content = content[:start] + content[end:]
        elif kind == 2:  # a repetition
            end = min(start + rng.randrange(1, 200), len(content))
            content = content[:end] + content[start:end] + content[end:]
        elif kind == 3:  # a word
            end = content.find(b" ", start)
            content = content[:start] + rng.choice(WORDS) + content[end:] if end > 0 else content
        else:  # the value of an attribute
            first = content.find(b'="', start)
            last = content.find(b'"', first + 2)
            if 0 < first < last:
                content = content[: first + 2] + rng.choice(WORDS[:6]) + content[last:]
    return content


@pytest.mark.parametrize("extension", ["dae", "3mf", "zip"])
def test_random_damage_gives_a_mesh_or_a_rejection(tmp_path, extension):
    rng = random.Random(0)
    libraries = IMAGES + material(SHADER)
    valid = document(box(material="a"), bound(), libraries=libraries)
    model = (
        f'<model xmlns="{CORE}" unit="inch"><resources><basematerials id="5"><base name="a" '
        f'displaycolor="#FF0000"/></basematerials>{threemf_box()}<object id="2" pid="5" pindex="0">'
        '<components><component objectid="1" transform="1 0 0 0 1 0 0 0 1 5 0 0"/></components>'
        '</object></resources><build><item objectid="2"/></build></model>'
    ).encode()
    end = time.monotonic() + FUZZ_SECONDS
    reasons = set()
    for _ in range(400):
        if extension == "dae":
            content = damaged(valid, rng)
        elif extension == "3mf":
            parts = {"_rels/.rels": RELATIONSHIPS, "3D/3dmodel.model": damaged(model, rng)}
            content = zipped(parts)
        else:
            content = damaged(zipped({"3D/3dmodel.model": model}), rng)
        try:
            mesh, _ = load(tmp_path, content, "3mf" if extension == "zip" else extension)
            assert np.isfinite(mesh.vertices).all()
            reasons.add("read")
        except Reject as error:
            reasons.add(error.reason)
        if time.monotonic() > end:
            break
    assert len(reasons) > 1
