"""USD files that tests write: layers of text, binary layers and packages."""

import zipfile
from collections.abc import Mapping
from pathlib import Path

from pxr import Sdf

from tests.pipeline.mesh_io.measures import BOX, QUADS

HEAD = '#usda 1.0\n(\n    defaultPrim = "root"\n    upAxis = "Y"\n)\n'


def points(rows) -> str:
    return "[" + ", ".join(f"({', '.join(map(str, row))})" for row in rows) + "]"


def mesh(name: str = "box", vertices=BOX, faces=QUADS, body: str = "", metadata: str = "") -> str:
    """Return a mesh, a box without arguments, with further lines in its body."""
    corners = [corner for face in faces for corner in face]
    return f"""def Mesh "{name}" {metadata}
{{
    point3f[] points = {points(vertices)}
    int[] faceVertexCounts = {[len(face) for face in faces]}
    int[] faceVertexIndices = {corners}
    uniform token subdivisionScheme = "none"
    {body}
}}
"""


def quad(body: str = "", name: str = "quad", metadata: str = "") -> str:
    """Return a unit square in the plane z = 0 with coordinates `st` from 0 to 1."""
    st = """texCoord2f[] primvars:st = [(0, 0), (1, 0), (1, 1), (0, 1)] (
        interpolation = "vertex"
    )
    """
    corners = [(0, 0, 0), (1, 0, 0), (1, 1, 0), (0, 1, 0)]
    return mesh(name, corners, [[0, 1, 2, 3]], st + body, metadata)


def layer(*prims: str, head: str = HEAD) -> str:
    return head + "\n".join(prims)


def root(*prims: str, kind: str = "Xform", metadata: str = "") -> str:
    body = "\n".join(prims)
    return f'def {kind} "root" {metadata}\n{{\n{body}\n}}\n'


def binary(text: str, folder: Path) -> bytes:
    """Return a layer in the binary form."""
    stored = Sdf.Layer.CreateAnonymous("a.usda")
    stored.ImportFromString(text)
    stored.Export(str(folder / "binary.usdc"))
    return (folder / "binary.usdc").read_bytes()


def package(members: Mapping[str, bytes | str], path: Path) -> bytes:
    """Return a usdz package, whose members are not compressed."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path.read_bytes()


def material(
    inputs: str, *, shaders: str = "", name: str = "look", identifier: str = "UsdPreviewSurface"
) -> str:
    """Return a material at /root/NAME whose surface has inputs, and further shaders in it."""
    return f"""def Material "{name}"
{{
    token outputs:surface.connect = </root/{name}/surface.outputs:surface>
    def Shader "surface"
    {{
        uniform token info:id = "{identifier}"
        {inputs}
        token outputs:surface
    }}
    {shaders}
}}
"""


def texture(
    file: str = "a.png", *, name: str = "image", inputs: str = "", st: str = "reader"
) -> str:
    """Return a texture shader that reads the coordinates of the shader `st`."""
    return f"""def Shader "{name}"
{{
    uniform token info:id = "UsdUVTexture"
    asset inputs:file = @{file}@
    float2 inputs:st.connect = </root/look/{st}.outputs:result>
    {inputs}
    float outputs:r
    float outputs:g
    float outputs:b
    float outputs:a
    float3 outputs:rgb
}}
"""


def reader(varname: str = "st", *, name: str = "reader", kind: str = "float2") -> str:
    return f"""def Shader "{name}"
{{
    uniform token info:id = "UsdPrimvarReader_{kind}"
    string inputs:varname = "{varname}"
    {kind} outputs:result
}}
"""


BIND = '(\n    prepend apiSchemas = ["MaterialBindingAPI"]\n)'
BOUND = "rel material:binding = </root/look>"
