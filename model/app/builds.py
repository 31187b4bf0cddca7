"""The assets of a build for the page and the HTTP API: descriptions, mesh files and renders."""

from __future__ import annotations

import shutil
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.mesh_io.mesh_export import write_mesh

if TYPE_CHECKING:
    from pipeline.core.primitives.marching_cubes import MeshArrays

MAX_FILES = 64  # mesh files that are kept
API = "/api"


def asset_url(uid: str, name: str) -> str:
    """Return the path of a file of an asset on the server."""
    return f"{API}/assets/{uid}/{name}"


class Builds:
    """A build and the mesh files that were made of its assets.

    Args:
        out: Output directory of the build.

    Raises:
        UserError: If `out` is not a build.
    """

    def __init__(self, out: Path):
        # Imported here: a page without --data does not wait for the readers of builds.
        from pipeline.inspection.build_browser import BuildBrowser

        self.browser = BuildBrowser(out)
        self._folder = Path(tempfile.mkdtemp(prefix="sparse3d-data-"))
        self._writing = threading.Lock()

    def close(self) -> None:
        """Remove the mesh files and end the process that reads originals."""
        self.browser.close()
        shutil.rmtree(self._folder)

    def describe(self, uid: str) -> dict[str, Any]:
        """Return an asset's manifest row, warnings and paths of its files, as JSON values.

        Raises:
            KeyError: If the build has no such asset.
        """
        browser, row = self.browser, self.browser.rows[uid]
        local = browser.is_local(uid)
        return {
            "row": row.to_columns(),
            "warnings": [
                {"code": code, "meaning": meaning, "examples": list(examples)}
                for code, meaning, examples in browser.warnings(uid)
            ],
            "original": asset_url(uid, "original.glb") if local else None,
            "bricks": {
                str(resolution): asset_url(uid, f"bricks-{resolution}.glb")
                for resolution in browser.resolutions
                if row.tokens.get(resolution)
            },
            "renders": {
                cameras: [
                    asset_url(uid, f"renders/{cameras}/{view}")
                    for view in browser.views(uid, cameras)
                ]
                for cameras in browser.cameras
            },
        }

    def original(self, uid: str) -> Path:
        """Return a GLB file with the geometry of an asset's file.

        Raises:
            KeyError: If the build has no such asset.
            UserError: If the file is not on this machine.
            RunError: If the file cannot be read.
        """
        return self._file(f"{uid}-original", lambda: self.browser.original(uid))

    def bricks(self, uid: str, resolution: int) -> Path:
        """Return a GLB file with the surface of an asset's bricks.

        Raises:
            KeyError: If the asset has no bricks at this resolution.
        """
        return self._file(f"{uid}-{resolution}", lambda: self.browser.bricks(uid, resolution))

    def _file(self, name: str, make: Callable[[], MeshArrays]) -> Path:
        path = self._folder / f"{name}.glb"
        with self._writing:
            if not path.exists():
                write_mesh(path, *make())
                files = sorted(self._folder.iterdir(), key=lambda file: file.stat().st_mtime)
                for file in files[:-MAX_FILES]:
                    file.unlink()
        return path
