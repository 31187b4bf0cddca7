"""Read a mesh file of any supported format into one triangle mesh with its appearance."""

from __future__ import annotations

import struct
import zipfile
import zlib
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Literal

from pipeline.core.errors import Reject
from pipeline.core.schema import Mesh
from pipeline.mesh_io.assemble import assemble
from pipeline.mesh_io.config import LoadConfig
from pipeline.mesh_io.file_checks import check_file
from pipeline.mesh_io.formats import MeshFormat, check_format
from pipeline.mesh_io.load_warnings import LoadWarning, WarningLog
from pipeline.mesh_io.reader_context import Reader, ReaderContext
from pipeline.mesh_io.scene import Axis
from pipeline.mesh_io.side_files import SideFiles

# What the readers and the libraries that they use raise on a damaged file.
PARSER_ERRORS = (
    ValueError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    BufferError,
    EOFError,
    LookupError,
    NameError,
    NotImplementedError,
    OSError,
    RecursionError,
    RuntimeError,
    StopIteration,
    SyntaxError,  # lxml
    TypeError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)

# Up axis of the formats that state none.
DEFAULT_UP: Axis = "y"


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """What is known about how a file was read.

    Attributes:
        warnings: What was missing or left out. None of it is fatal.
        up_axis: The axis of the file that points up.
        up_origin: Where that axis comes from: "stated" by the file or its format, "option", or
            "convention".
    """

    warnings: tuple[LoadWarning, ...] = ()
    up_axis: Axis = DEFAULT_UP
    up_origin: Literal["stated", "option", "convention"] = "convention"


def load(path: Path, cfg: LoadConfig, *, up: str = "auto", root: Path | None = None) -> Mesh:
    """Read a mesh file. This is `load_with_report` without the report."""
    return load_with_report(path, cfg, up=up, root=root)[0]


def load_with_report(
    path: Path, cfg: LoadConfig, *, up: str = "auto", root: Path | None = None
) -> tuple[Mesh, LoadReport]:
    """Read a mesh file of any format of `pipeline.mesh_io.formats` into one triangle mesh, y up.

    Everything that is left out is reported with a code of `pipeline.mesh_io.load_warnings`. Side
    files are read from the directory of the file, and from other places below `root`. The readers
    use libraries that are not hardened, so call this in a process of its own for files from
    untrusted sources.

    Args:
        path: The file. Its extension decides the format.
        cfg: Limits of faces, instances, unpacked bytes and texture size.
        up: The axis that points up in formats that do not state one: "y", "z" or "auto", which is
            y. A stated axis always applies.
        root: Directory that holds all side files. None means the directory of the file.

    Returns:
        The mesh in the frame of the file, turned to y up, and the report.

    Raises:
        Reject: "empty_file", "lfs_pointer", "wrong_magic", "unsupported_format", "missing_extra"
            (the libraries of the reader are not installed), "missing_blender", "unreadable" (with
            the parser's error), "allocation_bomb", "too_many_faces", "gltf_1" (glTF 1.0 is not
            read), "unsupported_version" (FBX before 6.0 is not read), "empty_scene", "points_only",
            "index_out_of_range", "non_finite_vertices" or "degenerate".
        ValueError: If `up` is none of the three words.
    """
    if up not in ("auto", "y", "z"):
        raise ValueError(f'up must be "auto", "y" or "z", got {up!r}')
    warnings = WarningLog()
    try:
        extension = check_file(path)
        reader = _reader(check_format(extension, cfg.blender))
        side_files = SideFiles(path, root, warnings)
        context = ReaderContext(path=path, cfg=cfg, side_files=side_files, warnings=warnings)
        scene = reader(path.read_bytes(), context)
        axis, origin = _up_axis(scene.up_axis, up)
        mesh = assemble(scene, cfg, warnings, axis)
    except Reject as error:
        # A file whose geometry was left out entirely says what that was.
        if error.reason != "empty_scene" or not warnings.items():
            raise
        details = [str(warning) for warning in warnings.items()]
        raise Reject(error.reason, **error.numbers, warnings=details) from error
    except PARSER_ERRORS as error:
        # Without the directory the message is the same on every machine.
        message = str(error).replace(str(path.parent), "")[:200]
        raise Reject("unreadable", error=type(error).__name__, message=message) from error
    return mesh, LoadReport(warnings=warnings.items(), up_axis=axis, up_origin=origin)


def _reader(mesh_format: MeshFormat) -> Reader:
    """Import the reader of a format. The libraries of the other formats are not imported."""
    return getattr(import_module(mesh_format.module), mesh_format.function)


def _up_axis(
    stated: Axis | None, up: str
) -> tuple[Axis, Literal["stated", "option", "convention"]]:
    if stated is not None:
        return stated, "stated"
    if up != "auto":
        return ("z" if up == "z" else "y"), "option"
    return DEFAULT_UP, "convention"
