"""Access to single assets of a build: their rows, original meshes, brick surfaces and renders."""

from __future__ import annotations

import shutil
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from pipeline.core.errors import RunError, UserError
from pipeline.core.primitives.marching_cubes import MeshArrays, extract
from pipeline.core.product import Product
from pipeline.core.schema import Record
from pipeline.inspection.build_report import read_build
from pipeline.mesh_io.config import LoadConfig, NormalizeConfig
from pipeline.mesh_io.load import load
from pipeline.mesh_io.load_warnings import WARNING_CODES
from pipeline.mesh_io.normalize import normalize
from pipeline.orchestration.isolated_process import IsolatedProcess
from pipeline.sources import open_source, side_file_root
from pipeline.storage.layout import product_paths
from pipeline.storage.manifest import ManifestRow
from pipeline.storage.render_shard import RenderShard
from pipeline.storage.sdf_shard import SdfShard

LOCAL_SOURCES = ("folder", "procedural", "shapenet")  # the others download their files
READ_TIMEOUT_S = 120.0
READ_MEMORY_BYTES = 8 * 10**9
OPEN_SHARDS = 16


@dataclass(frozen=True, kw_only=True)
class ReadJob:
    """A request to read the mesh file of an asset.

    Attributes:
        sources: Specifications of the sources among which the asset's one is.
        record: The asset.
        up: Option `--up` of the build.
        row: The manifest row, with the centre and the scale of the mesh if they were measured.
        scratch: Empty directory for unpacked files, and for mesh.npz with the result.
    """

    sources: tuple[str, ...]
    record: Record
    up: str
    row: ManifestRow
    scratch: Path


def read_original(job: ReadJob) -> None:
    """Write the vertices and faces of an asset's file to mesh.npz, in the frame of its bricks.

    Raises:
        FileNotFoundError: If no source has the file.
        Reject: If the file cannot be read.
    """
    for spec in job.sources:
        try:
            source = open_source(spec)
            path = source.materialize(job.record, job.scratch)
        except FileNotFoundError:
            continue
        mesh = load(path, LoadConfig(), up=job.up, root=side_file_root(source, path, job.scratch))
        if job.row.center is None or job.row.scale is None:
            vertices = normalize(mesh, NormalizeConfig()).vertices
        else:
            vertices = (mesh.vertices - np.array(job.row.center)) * job.row.scale
        np.savez(job.scratch / "mesh.npz", vertices=vertices, faces=mesh.faces)
        return
    raise FileNotFoundError(f"{job.record.url} is in none of {', '.join(job.sources)}")


def warm_up() -> None:
    """Do nothing: importing this module imports what reading a mesh file needs."""


class BuildBrowser:
    """The assets of a build, finished or not. Methods may be called from several threads.

    Args:
        out: Output directory of the build.

    Attributes:
        rows: The manifest rows by uid, in the order of the plan.
        resolutions: Resolutions of the bricks, in ascending order.
        cameras: Camera sets of the renders.

    Raises:
        UserError: If `out` is not a build, or is incomplete.
    """

    def __init__(self, out: Path):
        build = read_build(out)
        self.out = out
        self.rows: dict[str, ManifestRow] = {row.uid: row for row in build.rows}
        self.resolutions = [
            product.resolution for product in build.markers if product.kind == "sdf"
        ]
        self.cameras = [product.variant for product in build.markers if product.kind == "renders"]
        self._plan = build.plan
        self._child = IsolatedProcess("pipeline.inspection.build_browser:warm_up")
        self._reading = threading.Lock()
        self._sdf_shard = lru_cache(OPEN_SHARDS)(SdfShard)
        self._render_shard = lru_cache(OPEN_SHARDS)(RenderShard)

    def close(self) -> None:
        """End the process that reads mesh files."""
        self._child.close()

    def find(self, text: str = "", status: str = "") -> list[ManifestRow]:
        """Return the rows that contain a text, in the order of the plan.

        Args:
            text: Part of the uid, the URL, the reason, the stage or a warning code, in any case.
                "" is in all rows.
            status: "done", "rejected" or "failed". "" takes all of them.
        """
        wanted = text.lower()
        return [
            row
            for row in self.rows.values()
            if status in ("", row.status)
            and wanted
            in "\n".join((row.uid, row.url, row.reason, row.stage, *row.warnings)).lower()
        ]

    def warnings(self, uid: str) -> list[tuple[str, str, Sequence[str]]]:
        """Return (code, meaning, examples) of each warning of an asset's reader.

        Raises:
            KeyError: If the build has no such asset.
        """
        row = self.rows[uid]
        lines = row.numbers.get("load_warnings", ())
        return [
            (
                code,
                WARNING_CODES.get(code, "This code is not known to this version."),
                [line for line in lines if line.partition(":")[0].partition(" ")[0] == code],
            )
            for code in row.warnings
        ]

    def is_local(self, uid: str) -> bool:
        """Return whether the file of an asset can be read without a download.

        Raises:
            KeyError: If the build has no such asset.
        """
        return self.rows[uid].source in LOCAL_SOURCES

    def original(self, uid: str) -> MeshArrays:
        """Read the mesh file of an asset, in a process of its own.

        Returns:
            The vertices [V, 3] in the frame of the bricks, and the faces [F, 3].

        Raises:
            KeyError: If the build has no such asset.
            UserError: If the file is not on this machine.
            RunError: If the file cannot be read.
        """
        row = self.rows[uid]
        if not self.is_local(uid):
            raise UserError(f"{row.url} is a download of the source {row.source}, not a local file")
        record = next(r for r in self._plan.records(row.shard) if r.uid == uid)
        specs = [
            spec
            for spec in self._plan.info.config["source"]
            if spec.partition(":")[0].partition("?")[0] == row.source
        ]
        folder = Path(tempfile.mkdtemp(prefix="original-"))
        up = self._plan.info.config.get("up", "auto")
        job = ReadJob(sources=tuple(specs), record=record, up=up, row=row, scratch=folder)
        try:
            with self._reading:
                end = self._child.call(
                    "pipeline.inspection.build_browser:read_original",
                    job,
                    log=folder / "log.txt",
                    timeout_s=READ_TIMEOUT_S,
                    memory_bytes=READ_MEMORY_BYTES,
                )
            if end.reason:
                raise RunError(f"{row.url} cannot be read: {end.detail or end.reason}")
            with np.load(folder / "mesh.npz") as arrays:
                return arrays["vertices"], arrays["faces"]
        finally:
            shutil.rmtree(folder)

    def bricks(self, uid: str, resolution: int) -> MeshArrays:
        """Extract the surface of an asset's bricks.

        Returns:
            The vertices [V, 3] in the cube [-0.5, 0.5]^3, and the faces [F, 3].

        Raises:
            KeyError: If the asset has no bricks at this resolution.
        """
        row = self.rows[uid]
        if resolution not in self.resolutions:
            raise KeyError(resolution)
        path = self.out / product_paths(Product.sdf(resolution), row.shard)[0]
        return extract(self._sdf_shard(path).bricks(uid))

    def views(self, uid: str, cameras: str) -> list[int]:
        """Return the numbers of the stored renders of an asset.

        Raises:
            KeyError: If the build has no such asset or camera set.
        """
        return self._renders(uid, cameras).views(uid)

    def render(self, uid: str, cameras: str, view: int) -> bytes:
        """Return the encoded image of a stored render.

        Raises:
            KeyError: If there is none.
        """
        return self._renders(uid, cameras).read_bytes(uid, view)[0]

    def _renders(self, uid: str, cameras: str) -> RenderShard:
        row = self.rows[uid]
        if cameras not in self.cameras:
            raise KeyError(cameras)
        path = self.out / product_paths(Product.renders(cameras), row.shard)[0]
        return self._render_shard(path)
