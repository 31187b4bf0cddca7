"""One tetrahedron in every supported format, written byte by byte."""

import base64
import io
import json
import struct
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.core.schema import Mesh
from tests.pipeline.mesh_io.fbx_files import binary as fbx_binary
from tests.pipeline.mesh_io.fbx_files import document as fbx_document
from tests.pipeline.mesh_io.fbx_files import mesh as fbx_mesh
from tests.pipeline.mesh_io.fbx_files import model as fbx_model
from tests.pipeline.mesh_io.fbx_files import text as fbx_text

TETRA = np.array([[0, 0, 0], [1, 0, 0], [0, 2, 0], [0, 0, 3]], dtype=np.float32)
FACES = np.array([[0, 2, 1], [0, 1, 3], [0, 3, 2], [1, 2, 3]], dtype=np.uint32)
FLOAT, UINT = 5126, 5125


def write(path: Path, data: str | bytes) -> Path:
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def assert_same_triangles(mesh: Mesh, vertices=TETRA, faces=FACES) -> None:
    """Assert equal oriented triangles in equal order. Each may begin with any corner."""
    expected, found = np.asarray(vertices, dtype=np.float64)[faces], mesh.vertices[mesh.faces]
    assert found.shape == expected.shape
    turns = [np.abs(np.roll(found, k, axis=1) - expected).max(axis=(1, 2)) for k in range(3)]
    assert np.min(turns, axis=0).max() < 1e-6


def png(color=(255, 0, 0, 255), size=(4, 4)) -> bytes:
    file = io.BytesIO()
    Image.new("RGBA", size, color).save(file, "PNG")
    return file.getvalue()


def gltf(
    *, nodes=None, material=None, colors=None, image=None, extra=None, vertices=TETRA, faces=FACES
) -> tuple[dict, bytes]:
    """Return a document of one mesh and its binary data. `extra` is merged into the top level."""
    arrays = [("POSITION", np.asarray(vertices, "<f4"), "VEC3", FLOAT)]
    if image is not None:
        arrays.append(
            ("TEXCOORD_0", np.array([[0, 0], [1, 0], [0, 1], [1, 1]], "<f4"), "VEC2", FLOAT)
        )
    if colors is not None:
        arrays.append(("COLOR_0", np.asarray(colors, "<f4"), "VEC4", FLOAT))
    arrays.append(("indices", np.asarray(faces, "<u4").reshape(-1, 1), "SCALAR", UINT))
    data = b""
    views = []
    accessors = []
    attributes = {}
    for k, (name, array, kind, component) in enumerate(arrays):
        views.append({"buffer": 0, "byteOffset": len(data), "byteLength": array.nbytes})
        accessors.append(
            {"bufferView": k, "componentType": component, "count": len(array), "type": kind}
        )
        attributes[name] = k
        data += array.tobytes()
    primitive = {"indices": attributes.pop("indices"), "attributes": attributes}
    if material is not None or image is not None:
        primitive["material"] = 0
    document = {
        "asset": {"version": "2.0"},
        "scene": 0,
        "nodes": nodes or [{"mesh": 0}],
        "scenes": [{"nodes": [0]}],
        "meshes": [{"primitives": [primitive]}],
        "accessors": accessors,
        "bufferViews": views,
        "materials": [material or {}],
    }
    if image is not None:
        document["materials"][0].setdefault("pbrMetallicRoughness", {})["baseColorTexture"] = {
            "index": 0
        }
        document |= {
            "textures": [{"source": 0}],
            "images": [{"bufferView": len(views), "mimeType": "image/png"}],
        }
        views.append({"buffer": 0, "byteOffset": len(data), "byteLength": len(image)})
        data += image + b"\0" * (-len(image) % 4)
    document["buffers"] = [{"byteLength": len(data)}]
    return document | (extra or {}), data


def glb(document: dict, data: bytes) -> bytes:
    text = json.dumps(document).encode()
    text += b" " * (-len(text) % 4)
    body = (
        struct.pack("<I4s", len(text), b"JSON")
        + text
        + struct.pack("<I4s", len(data), b"BIN\0")
        + data
    )
    return struct.pack("<4sII", b"glTF", 2, 12 + len(body)) + body


OBJ = "\n".join(
    [f"v {x} {y} {z}" for x, y, z in TETRA]
    + [f"f {a + 1} {b + 1} {c + 1}" for a, b, c in FACES.tolist()]
)
OFF = "OFF\n4 4 0\n" + "\n".join(" ".join(map(str, row)) for row in TETRA.tolist())
OFF += "\n" + "\n".join("3 " + " ".join(map(str, row)) for row in FACES.tolist())
PLY = "ply\nformat ascii 1.0\nelement vertex 4\n"
PLY += "property float x\nproperty float y\nproperty float z\nelement face 4\n"
PLY += "property list uchar int vertex_indices\nend_header\n" + OFF.split("\n", 2)[2] + "\n"


CORNERS = TETRA[FACES.astype(int)]


def stl(corners=CORNERS, count=None) -> bytes:
    body = b"".join(struct.pack("<12fH", 0, 0, 0, *triangle.ravel(), 0) for triangle in corners)
    return b"\0" * 80 + struct.pack("<I", len(corners) if count is None else count) + body


def stl_text() -> str:
    facets = "".join(
        "facet normal 0 0 0\nouter loop\n"
        + "".join(f"vertex {x} {y} {z}\n" for x, y, z in t)
        + "endloop\nendfacet\n"
        for t in CORNERS.tolist()
    )
    return f"solid a\n{facets}endsolid a\n"


RELATIONSHIPS = b"""<?xml version="1.0"?>
<Relationships xmlns="http://schemas.openxmlformats.org/package/2006/relationships">
<Relationship Id="r0" Target="/3D/3dmodel.model"
 Type="http://schemas.microsoft.com/3dmanufacturing/2013/01/3dmodel"/></Relationships>"""


def threemf() -> bytes:
    # The format has z up.
    vertices = "".join(f'<vertex x="{x}" y="{-z}" z="{y}"/>' for x, y, z in TETRA)
    faces = "".join(f'<triangle v1="{a}" v2="{b}" v3="{c}"/>' for a, b, c in FACES)
    model = (
        '<?xml version="1.0"?><model unit="millimeter" '
        'xmlns="http://schemas.microsoft.com/3dmanufacturing/core/2015/02">'
        f'<resources><object id="1" type="model"><mesh><vertices>{vertices}</vertices>'
        f"<triangles>{faces}</triangles></mesh></object></resources>"
        '<build><item objectid="1"/></build></model>'
    )
    return zipped(
        {
            "3D/3dmodel.model": model.encode(),
            "[Content_Types].xml": b"<Types/>",
            "_rels/.rels": RELATIONSHIPS,
        }
    )


def gltf_material(color: list[float], metallic: float, roughness: float, **properties) -> dict:
    """Return a material of a glTF file with these factors and further properties."""
    factors = {"baseColorFactor": color, "metallicFactor": metallic, "roughnessFactor": roughness}
    return {"pbrMetallicRoughness": factors, **properties}


def zipped(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return file.getvalue()


def dae() -> bytes:
    positions = " ".join(str(x) for x in TETRA.ravel())
    index = " ".join(str(i) for i in FACES.ravel())
    return f"""<?xml version="1.0"?>
<COLLADA xmlns="http://www.collada.org/2005/11/COLLADASchema" version="1.4.1">
<asset><up_axis>Y_UP</up_axis></asset><library_geometries><geometry id="g"><mesh><source id="p">
<float_array id="pa" count="12">{positions}</float_array><technique_common>
<accessor source="#pa" count="4" stride="3"><param name="X" type="float"/>
<param name="Y" type="float"/><param name="Z" type="float"/></accessor></technique_common>
</source><vertices id="v"><input semantic="POSITION" source="#p"/></vertices><triangles count="4">
<input semantic="VERTEX" source="#v" offset="0"/><p>{index}</p></triangles></mesh></geometry>
</library_geometries>
<library_visual_scenes><visual_scene id="s"><node><instance_geometry url="#g"/></node>
</visual_scene></library_visual_scenes>
<scene><instance_visual_scene url="#s"/></scene></COLLADA>""".encode()


def gltf_embedded() -> str:
    document, data = gltf()
    document["buffers"][0]["uri"] = (
        "data:application/octet-stream;base64," + base64.b64encode(data).decode()
    )
    return json.dumps(document)


def fbx_tetrahedron() -> list:
    return fbx_document(
        [fbx_mesh(1, vertices=TETRA, polygons=FACES.tolist()), fbx_model(2)], [(1, 2), (2, 0)]
    )


VALID_FILES = {
    "glb": glb(*gltf()),
    "gltf": gltf_embedded(),
    "obj": OBJ,
    "off": OFF,
    "ply": PLY,
    "stl": stl(),
    "text.stl": stl_text(),
    "3mf": threemf(),
    "dae": dae(),
    "zae": zipped({"model.dae": dae()}),
    "fbx": fbx_binary(fbx_tetrahedron()),
    "text.fbx": fbx_text(fbx_tetrahedron()),
}
