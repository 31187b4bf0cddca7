"""A build with renders of its stored surfaces, and generators that return these surfaces."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from model.inference.generator import GeneratedMesh, StageReport
from model.inference.mesh_cleaning import clean_mesh
from pipeline.core.cameras import sample_camera
from pipeline.core.errors import RunError
from pipeline.core.image_codec import encode
from pipeline.core.primitives.marching_cubes import extract
from pipeline.core.schema import View
from pipeline.rendering.views import render_from
from pipeline.storage.render_shard import write_render_shard
from pipeline.storage.sdf_shard import SdfShard
from tests.train.analytic_builds import commit, make_build
from train.evaluation.clay import clay_mesh

VIEWS = 3


def rendered_build(path, side=96):
    """Write a build of four shapes with renders of their surfaces and return its directory.

    Args:
        path: Directory of the build.
        side: Pixels along one side of a render.
    """
    root = make_build(path, assets=3, val=1, resolutions=(32, 40))
    shard = SdfShard(root / "sdf" / "40" / "000000.zarr")
    entries = []
    for uid in shard.uids:
        mesh, eyes = (
            clay_mesh(extract(shard.bricks(uid))),
            [sample_camera(uid, view) for view in range(VIEWS)],
        )
        views = []
        for view, rgba in enumerate(render_from(mesh, eyes, side)):
            meta = {"uid": uid, "view": view, **eyes[view].meta(), "width": side, "height": side}
            views.append((encode(View(rgba=rgba, meta=meta)), meta))
        entries.append((uid, views))
    write_render_shard(root / "renders" / "paper" / "000000.tar", entries)
    commit(root, "000000", "renders-paper")
    return root


class FacingSurfaces:
    """A generator that returns stored surfaces, turned until they face the camera of the last view.

    Args:
        root: The build.
    """

    def __init__(self, root):
        self.stored = StoredSurfaces(root)
        self.structure = self.stored.structure
        self.describe_sampling = self.stored.describe_sampling
        self.device, self.resolutions = self.stored.device, self.stored.resolutions
        self.turns = []
        self.facing_views: bool | None = None
        self.averages_views, self.max_views = True, None

    def generate(self, *args, **options):
        uid = self.stored.shard.uids[self.stored.calls]
        azimuth = sample_camera(uid, VIEWS - 1).azimuth_degrees
        mesh = self.stored.generate(*args, **options)
        self.turns.append(round(azimuth / 90))
        angle = -np.radians(90 * self.turns[-1])  # about y, so that the azimuth falls
        turn = np.array(
            [[np.cos(angle), 0, np.sin(angle)], [0, 1, 0], [-np.sin(angle), 0, np.cos(angle)]]
        )
        return replace(mesh, vertices=mesh.vertices @ turn.T)


class StoredSurfaces:
    """A generator that returns stored surfaces instead of generating meshes.

    Args:
        root: The build.
        turn: 0 returns the asset that the image shows, 1 the next one.
        fails: Numbers of the calls that generate nothing.
    """

    def __init__(self, root, turn=0, fails=()):
        self.shard, self.calls, self.turn, self.fails = (
            SdfShard(root / "sdf" / "40" / "000000.zarr"),
            0,
            turn,
            fails,
        )
        self.seen = []
        self.device, self.resolutions = torch.device("cpu"), [32]
        self.facing_views: bool | None = None
        self.averages_views, self.max_views = True, None
        self.structure = torch.nn.Module()
        self.structure.flow = torch.nn.Module()
        self.structure.flow.encoder = type("Encoder", (), {"label": "stored surfaces"})

    def describe_sampling(self, options):
        return {"steps": [2], "guidance": 1.0}

    def generate(self, image, seed, options, whole_if_opaque, cells=None):
        self.seen.append((image, seed, cells))
        number = self.calls
        self.calls += 1
        if number in self.fails:
            raise RunError("no surface")
        cleaned = clean_mesh(*extract(self.shard.bricks((number + self.turn) % 4)))
        surface = {"vertices": cleaned.vertices, "faces": cleaned.faces, "cleaned": cleaned}
        stages = (StageReport(name="structure", seconds=0.5, tokens=7),)
        return GeneratedMesh(**surface, open_edges=0, stages=stages)
