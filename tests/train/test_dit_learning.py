"""Training of the SS-DiT for minutes: learning, restarts of killed ranks, and all commands."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from model.checkpoint import load_model
from model.conditioning.image_conditioned_dit import ConditionedDiT
from model.config import ConditionedDiTConfig, Guidance, SamplingOptions
from model.sparse_tensor import BrickBatch
from pipeline.core.primitives.marching_cubes import extract
from pipeline.core.primitives.surface_distance import compare_surfaces
from tests.child_python import project_environment, run_python
from tests.train.analytic_builds import add_renders, ellipsoid, make_build, tiny_training
from tests.train.engine.test_distributed import torchrun
from tests.train.metric_rows import metric_rows
from tests.train.ss_dit_fixtures import (
    MODEL,
    VIEWS,
    config,
    encode_with,
    loader_of,
    weights,
)
from train.data.bricks import BrickReader, read_build_index
from train.dit import main
from train.encode import main as encode_main
from train.engine import checkpoint
from train.engine.batch_sampler import SampleId
from train.engine.distributed import World
from train.stages.dit.run import read_latents, train_dit
from train.stages.vae.run import train_vae
from train.vae import main as vae_main


def read_ply(path):
    """Read a file that train.engine.mesh_pictures.write_ply wrote."""
    header, _, body = path.read_bytes().partition(b"end_header\n")
    counts = [
        int(line.split()[-1]) for line in header.decode().splitlines() if line.startswith("element")
    ]
    vertices = np.frombuffer(body, "<f4", 3 * counts[0]).reshape(-1, 3)
    rows = np.frombuffer(
        body, np.dtype([("count", "u1"), ("corners", "<i4", (3,))]), offset=12 * counts[0]
    )
    return vertices, rows["corners"]


def ball(number):
    """Return one of four balls in the same eight cells, which only the image tells apart."""
    return ellipsoid((0.05 * (-1) ** number, 0.05 * (-1) ** (number // 2), 0), [0.12] * 3)


@pytest.mark.slow
def test_the_model_learns_which_image_has_which_shape(tmp_path):
    data = make_build(tmp_path / "build", assets=4, val=0, field=ball)
    add_renders(data, VIEWS)
    options = {
        "learning_rate": 3e-3,
        "ema_decay": 0.95,
        "checkpoint_every": 1000,
        "schedule": "cosine",
    }
    vae = tiny_training(
        data, tmp_path / "vae", steps=500, batch_size=4, symmetries=False, **options
    )
    train_vae(vae, World())
    encode_with(vae.out / "latest", data)
    model = ConditionedDiTConfig(
        dit=replace(MODEL.dit, channels=64, heads=4, kv_heads=2, blocks=3), encoder=MODEL.encoder
    )
    loop = {**options, "warmup_steps": 20}
    cfg = config((data, vae.out / "latest"), tmp_path / "dit", steps=400, loop=loop, model=model)
    cfg = replace(cfg, flow=replace(cfg.flow, batch_size=8, augment=False))
    train_dit(cfg, World())
    dit = load_model(checkpoint.latest(cfg.out), ConditionedDiT)
    decoder, _ = read_latents(cfg, World())
    loader = loader_of(cfg, use="held_out")  # views that training never saw
    batch = loader.batch([SampleId(asset, 0) for asset in range(4)], 1.0)
    level = batch.latents.cells
    assert level.asset_starts.tolist() == [0, 8, 16, 24, 32]
    assert torch.equal(level.coords[:8, 1:], level.coords[24:, 1:])
    with torch.no_grad():
        z = dit.generate(
            level,
            dit.encode_images(batch.images),
            [1, 2, 3, 4],
            SamplingOptions(steps=12, guidance=Guidance(scale=2.0)),
        )
        found = decoder.decode(z, level).view(4, -1) < 0
    bricks = [BrickReader(loader.index).read(asset, 32) for asset in range(4)]
    right = BrickBatch.collate(bricks).values.view(4, -1) < 0
    shared = (found[:, None] & right).sum(2) / (found[:, None] | right).sum(2)
    assert shared.argmax(1).tolist() == [0, 1, 2, 3]
    assert shared.diagonal().min() > 0.8, shared


@pytest.mark.slow
def test_a_killed_rank_is_restarted_and_resumes_from_the_last_checkpoint(rendered, tmp_path):
    outputs = {}
    for name, step in (("whole", 0), ("killed", 6)):
        options = {
            "--data": rendered[0],
            "--vae": rendered[1],
            "--out": tmp_path / name,
            "--resolution": 32,
            "--samples": 0,
            "--model.dit.channels": 32,
            "--model.dit.heads": 2,
            "--model.dit.kv-heads": 1,
            "--model.dit.blocks": 1,
            "--flow.batch-size": 2,
            "--flow.loop.steps": 8,
            "--flow.loop.checkpoint-every": 3,
            "--flow.loop.validate-every": 0,
            "--flow.loop.log-every": 1,
        }
        words = [word for pair in options.items() for word in pair]
        process = torchrun(
            "--max-restarts",
            1,
            "-m",
            "tests.train.killed_rank_run",
            tmp_path / f"{name}-flag",
            step,
            *words,
        )
        outputs[name] = process.communicate(timeout=300)[0]
        assert process.returncode == 0, outputs[name]
    assert "Resuming from" not in outputs["whole"]
    assert f"Resuming from {tmp_path / 'killed' / 'step-00000003'}" in outputs["killed"]
    assert [row["step"] for row in metric_rows(tmp_path / "killed")] == list(range(1, 9))
    killed, whole = weights(tmp_path / "killed"), weights(tmp_path / "whole")
    assert all(torch.equal(killed[key], whole[key]) for key in whole)


@pytest.mark.slow
def test_all_commands_lead_from_meshes_to_generated_meshes(tmp_path):
    """A mesh generated from a new view of an asset is nearest to that asset."""
    data = tmp_path / "build"
    words = [
        *("--limit", "4", "--resolutions", "32", "--topology-resolution", "64"),
        *("--image-size", "112", "--val-percent", "0", "--workers", "1"),
    ]
    env = project_environment(OMP_NUM_THREADS="1")
    run_python("-m", "pipeline.build", "--preset", "smoke", "--out", data, *words, env=env)
    run, common = str(tmp_path / "vae"), ["--data", str(data), "--device", "cpu"]
    options = [
        *("--bricks.resolutions", "32", "--bricks.no-symmetries"),
        *("--loop.steps", "250", "--loop.sample-every", "0"),
    ]
    vae_main([*common, "--out", run, *options])
    encode_main([*common, "--vae", f"{run}/latest"])
    out = tmp_path / "dit"
    dit = "--resolution 32 --flow.loop.steps 200"
    main([*common, "--vae", f"{run}/latest", "--out", str(out), *dit.split()])
    (folder,) = (out / "samples").iterdir()
    numbers = json.loads((folder / "iou.json").read_text(encoding="utf-8"))["held_out_views"]
    made = {path.stem: read_ply(path) for path in folder.glob("*.ply")}
    reader = BrickReader(read_build_index(data, [32]))
    uids = reader.index.uids
    assert len(made) == len(uids) == 4
    right = [extract(reader.read(asset, 32)) for asset in range(4)]
    for number, uid in enumerate(uids):
        distances = [compare_surfaces(*made[uid], *mesh, samples=5000).chamfer for mesh in right]
        assert int(np.argmin(distances)) == number, (uid, distances)
    assert numbers["iou"] > 0.5, numbers
