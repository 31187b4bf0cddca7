"""A generator without models: every mesh is a ball, and a test decides when a step ends."""

import threading
import time
from types import SimpleNamespace

import torch
import trimesh

from model.inference.generator import GeneratedMesh, StageReport, surface_stage
from model.inference.mesh_cleaning import CleanedMesh

STEPS = 4


class BallGenerator:
    """Has what the page uses of `model.inference.generator.Generator`.

    Args:
        closed_gate: Whether steps wait until `gate` is set.
        step_s: Seconds of a step.
    """

    device = torch.device("cpu")
    facing_views = None
    views_from_one_side = False
    max_views = None

    def __init__(self, *, closed_gate=False, step_s=0.0):
        self.resolutions = [64, 128]
        self.step_s = step_s
        self.gate = threading.Event()
        if not closed_gate:
            self.gate.set()
        self.steps_run = 0
        self.error = None
        self.requests = []
        self.structure = SimpleNamespace()

    def stages_of(self, options):
        last = options.resolution or self.resolutions[-1]
        if last not in self.resolutions:
            raise ValueError(f"resolution must be one of 64, 128, got {last}")
        steps = options.steps[0] if options.steps else STEPS
        return {"structure": steps, str(last): steps, surface_stage(last): 1}

    def describe_sampling(self, options):
        return {"steps": [STEPS, STEPS], "guidance": 7.0}

    def generate(self, image, seed, options, *, whole_if_opaque=False, progress):
        self.requests.append((image, seed, options, whole_if_opaque))
        stages = self.stages_of(options)
        for stage, count in stages.items():
            for _ in progress(stage, range(count)):
                assert self.gate.wait(60)
                time.sleep(self.step_s)
                self.steps_run += 1
                if self.error is not None:
                    raise self.error
        ball = trimesh.creation.icosphere(subdivisions=3, radius=0.4)
        cleaned = CleanedMesh(
            vertices=ball.vertices, faces=ball.faces, holes=0, floaters=0, bubbles=0
        )
        return GeneratedMesh(
            vertices=cleaned.vertices,
            faces=cleaned.faces,
            open_edges=0,
            cleaned=cleaned,
            stages=tuple(StageReport(name=name, seconds=0.1, tokens=1) for name in stages),
        )
