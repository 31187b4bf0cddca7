"""The elements of COLLADA 1.4 and 1.5 that the reader uses."""

from __future__ import annotations

from pipeline.mesh_io.xml_tree import ElementKind, Schema

NAMESPACES = {
    "http://www.collada.org/2005/11/COLLADASchema": "",
    "http://www.collada.org/2008/03/COLLADASchema": "",
    "http://www.w3.org/2001/XMLSchema-instance": "xsi",
    "http://www.w3.org/1998/Math/MathML": "math",
}
PRIMITIVES = ("triangles", "trifans", "tristrips", "polylist", "polygons", "lines", "linestrips")
TRANSFORMS = ("matrix", "translate", "rotate", "scale", "skew", "lookat")
SHADERS = ("constant", "lambert", "phong", "blinn")
VALUE_ARRAYS = ("float_array", "int_array")
NAME_ARRAYS = ("Name_array", "IDREF_array", "SIDREF_array")
PARAMETER_VALUES = ("float", "float2", "float3", "float4", "surface", "sampler2D")

_TEXT = ElementKind(has_text=True)
_LIBRARIES = (
    "library_geometries library_controllers library_nodes library_visual_scenes library_effects"
    " library_materials library_images"
)
_MESH_CHILDREN = " ".join(("source vertices", *PRIMITIVES))
_INSTANCES = "node instance_node instance_geometry instance_controller"
_PRIMITIVE = ElementKind("count material", "input vcount p ph")


def _library(children: str) -> ElementKind:
    return ElementKind("id", f"asset extra {children}")


SCHEMA: Schema = {
    "COLLADA": ElementKind("", f"asset scene extra {_LIBRARIES}"),
    "asset": ElementKind("", "unit up_axis extra"),
    "unit": ElementKind("meter"),
    "up_axis": _TEXT,
    # Applications put their own data here. What the reader knows of it is named.
    "extra": ElementKind("", "technique", is_open=True),
    "technique": ElementKind("profile", "double_sided visibility", is_open=True),
    "profile_COMMON/technique": ElementKind("", " ".join(("asset extra", *SHADERS))),
    "double_sided": _TEXT,
    "visibility": _TEXT,
    # Geometry
    "library_geometries": _library("geometry"),
    "geometry": ElementKind("id name", "asset extra mesh convex_mesh spline brep"),
    "mesh": ElementKind("", f"extra {_MESH_CHILDREN}"),
    "convex_mesh": ElementKind("convex_hull_of", f"extra {_MESH_CHILDREN}"),
    "spline": ElementKind(is_opaque=True),
    "brep": ElementKind(is_opaque=True),
    "source": ElementKind(
        "id", " ".join(("asset technique_common", *VALUE_ARRAYS, *NAME_ARRAYS)), has_text=True
    ),
    "float_array": ElementKind("id count", has_text=True),
    "int_array": ElementKind("id count", has_text=True),
    "Name_array": ElementKind("id count", has_text=True),
    "IDREF_array": ElementKind("id count", has_text=True),
    "SIDREF_array": ElementKind("id count", has_text=True),
    "technique_common": ElementKind("", "accessor instance_material"),
    "accessor": ElementKind("source count stride offset", "param"),
    "param": ElementKind("name type ref", has_text=True),
    "vertices": ElementKind("id", "input extra"),
    "input": ElementKind("semantic source offset set"),
    **dict.fromkeys(PRIMITIVES, _PRIMITIVE),
    "vcount": _TEXT,
    "p": _TEXT,
    "ph": ElementKind("", "p h"),
    "h": _TEXT,
    # Controllers
    "library_controllers": _library("controller"),
    "controller": ElementKind("id", "asset extra skin morph"),
    "skin": ElementKind("source", "bind_shape_matrix source joints vertex_weights extra"),
    "bind_shape_matrix": _TEXT,
    "joints": ElementKind("", "input extra"),
    "vertex_weights": ElementKind("count", "input vcount v extra"),
    "v": _TEXT,
    "morph": ElementKind("source method", "source targets extra"),
    "targets": ElementKind("", "input extra"),
    # Scene
    "library_nodes": _library("node"),
    "library_visual_scenes": _library("visual_scene"),
    "visual_scene": ElementKind("id", "asset extra node"),
    "node": ElementKind("id name sid", " ".join(("asset extra", _INSTANCES, *TRANSFORMS))),
    **dict.fromkeys(TRANSFORMS, _TEXT),
    "instance_node": ElementKind("url", "extra"),
    "instance_geometry": ElementKind("url", "bind_material extra"),
    "instance_controller": ElementKind("url", "skeleton bind_material extra"),
    "skeleton": _TEXT,
    "bind_material": ElementKind("", "technique_common technique extra"),
    "instance_material": ElementKind("symbol target", "bind_vertex_input extra"),
    "bind_vertex_input": ElementKind("semantic input_semantic input_set"),
    "scene": ElementKind("", "instance_visual_scene extra"),
    "instance_visual_scene": ElementKind("url", "extra"),
    # Appearance
    "library_materials": _library("material"),
    "material": ElementKind("id name", "asset extra instance_effect"),
    "instance_effect": ElementKind("url", "setparam extra"),
    "setparam": ElementKind("ref", " ".join(PARAMETER_VALUES)),
    "library_effects": _library("effect"),
    "effect": ElementKind("id name", "asset extra image newparam profile_COMMON"),
    "profile_COMMON": ElementKind("", "asset extra image newparam technique"),
    "newparam": ElementKind("sid", " ".join(PARAMETER_VALUES)),
    "float": _TEXT,
    "float2": _TEXT,
    "float3": _TEXT,
    "float4": _TEXT,
    "surface": ElementKind("", "init_from extra"),
    "sampler2D": ElementKind(
        "", "source instance_image wrap_s wrap_t minfilter magfilter texcoord extra"
    ),
    "instance_image": ElementKind("url"),
    **dict.fromkeys(("wrap_s", "wrap_t", "minfilter", "magfilter"), _TEXT),
    "texcoord": ElementKind("semantic"),
    **dict.fromkeys(SHADERS, ElementKind("", "emission diffuse transparent transparency")),
    "emission": ElementKind("", "color texture param"),
    "diffuse": ElementKind("", "color texture param"),
    "transparent": ElementKind("opaque", "color texture param"),
    "transparency": ElementKind("", "float param"),
    "color": _TEXT,
    "texture": ElementKind("texture texcoord", "extra"),
    "library_images": _library("image"),
    "image": ElementKind("id name", "asset extra init_from data"),
    "init_from": ElementKind("", "ref hex", has_text=True),
    "ref": _TEXT,
    "hex": _TEXT,
    "data": _TEXT,
}
