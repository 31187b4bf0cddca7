"""Read blend and Alembic files through Blender, which exports GLB in a process of its own."""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

from pipeline.core.errors import Reject
from pipeline.mesh_io.load_warnings import WARNING_CODES
from pipeline.mesh_io.reader_context import ReaderContext
from pipeline.mesh_io.readers.blend_links import check_links
from pipeline.mesh_io.readers.gltf import read_gltf
from pipeline.mesh_io.scene import Scene

SCRIPT = Path(__file__).with_name("blender_script.py")
TIMEOUT_S = 300.0  # of one conversion; the process of the asset has a limit of its own
# Lines in which Blender says that something is wrong with a file.
MESSAGE = re.compile(
    r"^(?:\S+ \| )?(?:(?:.*\b)?(?:warning|error)\b|what\(\)):?\s*(.*)$", re.IGNORECASE
)
# Messages about the windows of Blender, which old files have.
ABOUT_WINDOWS = re.compile(r"region type \d+ missing in space type")


def read_with_blender(content: bytes, context: ReaderContext) -> Scene:
    """Read a blend or abc file, see `pipeline.mesh_io.reader_context.Reader`.

    Blender runs with the limits of this process and without the scripts of the file. It shows what
    a render shows at the first frame, with modifiers and with armatures at rest.

    Args:
        content: The file. Blender reads it from its path.
        context: Names Blender, the file, and the root for images.

    A blend file that links a file outside the root is rejected before Blender runs, because Blender
    opens such files together with it.

    Raises:
        Reject: "unreadable" if Blender cannot be run or cannot convert the file, and as
            `check_links` and `read_gltf`.
    """
    path = context.path.resolve()
    if path.suffix.lower() == ".blend":
        check_links(content, path, context.side_files.root, context.cfg)
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "scene.glb"
        output = _run(_command(context, path, target))
        report = _report(target)
        if report.get("instances", 0) > context.cfg.max_instances:
            limit = context.cfg.max_instances
            raise Reject("too_many_faces", instances=report["instances"], max_instances=limit)
        if not target.exists():
            message = next(iter(_messages(output, path)), "it wrote no file")
            raise Reject("unreadable", error="blender", message=message)
        for code, detail, count in report["found"]:
            assert code in WARNING_CODES
            context.warnings.add(code, detail, count)
        for message in _messages(output, path):
            context.warnings.add("converter_warning", message)
        converted = target.read_bytes()
    return read_gltf(converted, context)


def _command(context: ReaderContext, source: Path, target: Path) -> list[str]:
    """Return the command line. A Python interpreter runs the script itself."""
    blender = context.cfg.blender
    arguments = ["--", str(source), str(context.side_files.root), str(target)]
    arguments.append(str(context.cfg.max_instances))
    if Path(blender).name.startswith("python"):
        return [blender, "-I", str(SCRIPT), *arguments]
    options = ["--background", "--factory-startup", "--disable-autoexec", "--python-exit-code", "1"]
    return [blender, *options, "--python", str(SCRIPT), *arguments]


def _run(command: list[str]) -> str:
    """Run Blender and return what it prints.

    Raises:
        Reject: "unreadable" if it cannot be started or does not end in time.
    """
    try:
        result = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=TIMEOUT_S,
            encoding="utf-8",
            errors="replace",
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise Reject("unreadable", error="blender_timeout", seconds=TIMEOUT_S) from error
    except OSError as error:
        message = f"--load.blender {command[0]} cannot be run: {error.strerror}"
        raise Reject("unreadable", error="blender", message=message) from error
    return result.stdout


def _messages(output: str, path: Path) -> list[str]:
    """Return the warnings and errors that Blender printed, without the directory of the file."""
    lines = [line.strip() for line in output.splitlines()]
    found = []
    for line, following in pairwise([*lines, ""]):
        if match := MESSAGE.match(line):
            is_heading = match[1].endswith(":")  # of a message in the next line
            found.append(f"{match[1]} {following}" if is_heading else match[1])
    # Addresses differ from run to run.
    texts = [re.sub(" at 0x[0-9a-fA-F]+", "", t.replace(str(path.parent), ""))[:120] for t in found]
    kept = (text for text in texts if text and not ABOUT_WINDOWS.match(text))
    return list(dict.fromkeys(kept))


def _report(target: Path) -> dict[str, Any]:
    """Return what the script reported, {} if it did not come to its end."""
    report = target.with_name(f"{target.name}.json")
    return json.loads(report.read_text(encoding="utf-8")) if report.exists() else {}
