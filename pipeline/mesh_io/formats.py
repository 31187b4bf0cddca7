"""The mesh formats that are read, with their readers and the extras that these need."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

from pipeline.core.errors import Reject


@dataclass(frozen=True, kw_only=True)
class MeshFormat:
    """How a mesh format is read.

    Attributes:
        module: The module of the reader. It is imported when a file of the format is read.
        function: The reader, a `pipeline.mesh_io.reader_context.Reader`.
        extra: The extra of pyproject.toml that installs the libraries of the reader. "" means that
            every installation of the pipeline has them.
        requires: The top-level modules that the extra installs.
        needs_blender: Whether the reader runs the Blender that --load.blender names.
    """

    module: str
    function: str
    extra: str = ""
    requires: tuple[str, ...] = ()
    needs_blender: bool = False


_GLTF = MeshFormat(module="pipeline.mesh_io.readers.gltf", function="read_gltf")
_COLLADA = MeshFormat(module="pipeline.mesh_io.readers.collada", function="read_collada")
_USD = MeshFormat(
    module="pipeline.mesh_io.readers.usd", function="read_usd", extra="usd", requires=("pxr",)
)
_BLENDER = MeshFormat(
    module="pipeline.mesh_io.readers.blender", function="read_with_blender", needs_blender=True
)

# Extension in lower case -> how the format is read.
FORMATS: dict[str, MeshFormat] = {
    "glb": _GLTF,
    "gltf": _GLTF,
    "obj": MeshFormat(module="pipeline.mesh_io.readers.obj", function="read_obj"),
    "ply": MeshFormat(module="pipeline.mesh_io.readers.ply", function="read_ply"),
    "stl": MeshFormat(module="pipeline.mesh_io.readers.stl", function="read_stl"),
    "off": MeshFormat(module="pipeline.mesh_io.readers.off", function="read_off"),
    "3mf": MeshFormat(module="pipeline.mesh_io.readers.threemf", function="read_threemf"),
    "dae": _COLLADA,
    "zae": _COLLADA,
    "fbx": MeshFormat(module="pipeline.mesh_io.readers.fbx", function="read_fbx"),
    "usd": _USD,
    "usda": _USD,
    "usdc": _USD,
    "usdz": _USD,
    "abc": _BLENDER,
    "blend": _BLENDER,
}
MESH_FORMATS = frozenset(FORMATS)


def check_format(name: str, blender: str = "") -> MeshFormat:
    """Return how a format is read.

    Args:
        name: The extension in lower case, without the dot.
        blender: The option --load.blender.

    Raises:
        Reject: "unsupported_format" if there is no reader for it, "missing_extra" with the name of
            the extra if the libraries of its reader are not installed, "missing_blender" if its
            reader needs Blender and the option is empty.
    """
    known = FORMATS.get(name)
    if known is None:
        raise Reject("unsupported_format", format=name)
    if any(find_spec(module) is None for module in known.requires):
        error = f"the extra {known.extra} is not installed: pip install 'sparse3d[{known.extra}]'"
        raise Reject("missing_extra", format=name, extra=known.extra, error=error)
    if known.needs_blender and not blender:
        error = "it is read by Blender, and --load.blender does not name one"
        raise Reject("missing_blender", format=name, error=error)
    return known


def why_skipped(name: str, blender: str = "") -> str:
    """Return why files of a format are not read, in words. "" if they are.

    Args:
        name: The extension in lower case, without the dot.
        blender: The option --load.blender.
    """
    try:
        check_format(name, blender)
    except Reject as reject:
        return reject.numbers.get("error", "there is no reader for the format")
    return ""
