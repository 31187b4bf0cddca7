"""Training of the SS-VAE: resuming after a kill, bad options, evaluation, and learning."""

import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from model.checkpoint import load_model, read_config
from model.sparse_tensor import BrickBatch
from model.sparse_vae import SparseVAE
from pipeline.core.cli import parse_with_presets
from pipeline.core.errors import UserError
from pipeline.core.primitives.voxel_iou import intersection_over_union
from tests.child_python import project_environment, run_python, start_python
from tests.train.analytic_builds import tiny_training
from tests.train.metric_rows import all_rows, metric_rows
from train.data.bricks import BrickLoader, BrickReader, read_build_index
from train.engine.distributed import World
from train.evaluate import main as evaluate
from train.evaluation.config import VAEEvaluation
from train.evaluation.vae import evaluate_asset, evaluate_vae
from train.stages.command import train_stage
from train.stages.vae.config import VAE_PRESETS
from train.stages.vae.run import train_vae
from train.vae import main

# Each checkpoint is written before the next step, which then publishes it. Otherwise it is a matter
# of the disk which checkpoint a killed run has published.
SHORT_RUN = """
import sys, torch
from concurrent.futures import wait
from pathlib import Path
from tests.train.analytic_builds import tiny_training
from pipeline.core.cli import command
from train.engine.checkpoint import CheckpointWriter
from train.engine.distributed import World
from train.stages.vae.run import train_vae
torch.set_num_threads(1)
begin = CheckpointWriter.begin
def begin_and_write(self, step, state):
    problem = begin(self, step, state)
    wait([self._written])
    return problem
CheckpointWriter.begin = begin_and_write
options = {"steps": 40, "batch_size": 1, "optimizer": "muon"}
cfg = lambda args: tiny_training(Path(args[0]), Path(args[1]), **options)
command(lambda args: train_vae(cfg(args), World()) and 0)
"""


def exact(out):
    """Return the metrics of each step that must be equal in equal runs. Times are left out."""
    names = ("step", "loss", "in", "ext", "sharp", "kl", "grad_norm", "tokens", "lr")
    return [[row[name] for name in names] for row in metric_rows(out)]


@pytest.fixture(scope="module")
def whole(build, tmp_path_factory):
    """The metrics of an uninterrupted run."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("whole")
    train_vae(tiny_training(build, out, steps=40, batch_size=1, optimizer="muon"), World())
    return exact(out)


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 143)])
def test_a_killed_run_resumes_with_the_same_losses(build, tmp_path, whole, signum, code):
    env = project_environment(OMP_NUM_THREADS="1")
    process = start_python("-c", SHORT_RUN, build, tmp_path, env=env)
    metrics = tmp_path / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while not (metrics.exists() and metrics.read_text(encoding="utf-8").count("\n") >= 13):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signum)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == code, output
    done = len(exact(tmp_path))
    assert 13 <= done < 20, "more than 20 steps must follow the kill"
    kept = int((tmp_path / "latest").resolve().name[5:])
    assert kept == (done if signum == signal.SIGTERM else done // 10 * 10)
    train_vae(tiny_training(build, tmp_path, steps=40, batch_size=1, optimizer="muon"), World())
    assert exact(tmp_path) == whole


def test_the_number_of_workers_does_not_change_losses(build, tmp_path, whole):
    train_vae(
        tiny_training(build, tmp_path, steps=40, batch_size=1, optimizer="muon", workers=0), World()
    )
    assert exact(tmp_path) == whole


def test_activation_checkpointing_does_not_change_losses(build, tmp_path, whole):
    cfg = tiny_training(
        build, tmp_path, steps=40, batch_size=1, optimizer="muon", activation_checkpointing=True
    )
    train_vae(replace(cfg, loop=replace(cfg.loop, max_minutes=0.02)), World())
    found = exact(tmp_path)
    assert found
    np.testing.assert_allclose(found, whole[: len(found)], rtol=1e-4)


def test_a_nan_in_the_batch_is_skipped(build, tmp_path, monkeypatch):
    load = BrickLoader.load

    def broken(self, step_samples, rank):
        batch = load(self, step_samples, rank)
        if step_samples.step == 3:
            batch.noise[:] = float("nan")
        return batch

    monkeypatch.setattr(BrickLoader, "load", broken)
    assert train_vae(tiny_training(build, tmp_path, steps=6), World()) == 6
    lines = all_rows(tmp_path)
    assert [line["skipped"] for line in lines] == [0, 0, 0, 1, 1, 1]
    assert np.isnan(lines[3]["loss"])
    assert np.isfinite(lines[5]["loss"])


def test_a_run_validates_and_writes_reconstructions(build, tmp_path):
    train_vae(tiny_training(build, tmp_path, steps=2, validate_every=2, sample_every=2), World())
    (event,) = metric_rows(tmp_path, "validation")
    assert {"loss", "in", "ext", "sharp", "kl", "iou"} <= event.keys()
    folder = tmp_path / "samples" / "step-00000002"
    assert {path.suffix for path in folder.iterdir()} == {".ply", ".png"}


def test_a_checkpoint_can_be_loaded_as_a_model(build, tmp_path):
    """Both the weights of the last step and the averaged weights can be loaded."""
    train_vae(tiny_training(build, tmp_path, steps=3), World())
    latest = tmp_path / "latest"
    model = load_model(latest, SparseVAE, averaged=False)
    assert model.config == tiny_training(build, tmp_path).model
    average = load_model(latest, SparseVAE)
    assert read_config(latest)["training"]["loop"]["steps"] == 3
    assert not torch.equal(average.decoder.out.weight, model.decoder.out.weight)


def test_a_perfect_model_has_perfect_metrics(build):
    """A model that returns its input is compared with the same and with a finer resolution."""

    class Identity(torch.nn.Module):
        def forward(self, batch):
            return batch.values.float(), None

    index = read_build_index(build, [32])
    options = {"device": torch.device("cpu"), "samples": 5000}
    row, _ = evaluate_asset(Identity(), BrickReader(index), 1, 32, **options)
    assert row.chamfer < 1e-9
    assert row.iou == 1
    assert row.f1 == {0.01: 1.0, 0.005: 1.0, 0.001: 1.0}
    finer = read_build_index(build, [32, 40])
    row, images = evaluate_asset(Identity(), BrickReader(finer), 1, 32, draw=True, **options)
    assert row.reference_resolution == 40
    assert 1e-5 < row.chamfer < 0.01
    assert [image.shape for image in images] == [(320, 320, 3)] * 2


def test_evaluation_of_a_run(build, tmp_path):
    train_vae(tiny_training(build, tmp_path, steps=2), World())
    cfg = VAEEvaluation(
        checkpoint=tmp_path / "latest", data=build, split="all", samples=500, limit=3
    )
    result = evaluate_vae(cfg)
    written = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text(encoding="utf-8"))
    assert [row["uid"] for row in written["rows"]] == [row["uid"] for row in result["rows"]]
    assert len(written["rows"]) == 3
    table = (tmp_path / "evaluation" / "table.md").read_text(encoding="utf-8")
    assert "| R = 32, train | 3 |" in table
    assert (
        "Direct3D-S2, 512 (paper, protocol unknown) |  |  |  | 13.59 |  | 99.98 | 41.11 |" in table
    )
    assert (tmp_path / "evaluation" / "reconstructions.png").exists()


# Presets and errors


def test_an_asset_that_cannot_be_read_is_left_out_of_an_evaluation(
    build, tmp_path, monkeypatch, caplog
):
    train_vae(tiny_training(build, tmp_path / "run", steps=1), World())
    original = BrickReader.read
    damaged = []

    def read(self, asset, resolution):
        if asset == 0:
            damaged.append(self.index.uids[0])
            raise ValueError("checksum does not match")
        return original(self, asset, resolution)

    monkeypatch.setattr(BrickReader, "read", read)
    cfg = VAEEvaluation(
        checkpoint=tmp_path / "run" / "latest", data=build, split="val", samples=500, device="cpu"
    )
    found = evaluate_vae(cfg)
    assert f"{damaged[0]} is skipped: its bricks cannot be read (checksum" in caplog.text
    assert damaged[0] not in {row["uid"] for row in found["rows"]}
    assert len(found["rows"]) == 1


def test_presets_follow_the_paper_and_have_the_expected_sizes():
    base, more, small = (VAE_PRESETS[name] for name in ("base", "base-1024", "small"))
    assert (base.bricks.resolutions, base.bricks.batch_size, base.loop.learning_rate) == (
        (256, 384, 512),
        4,
        1e-4,
    )
    assert (more.bricks.resolutions, more.bricks.batch_size, more.loop.learning_rate) == (
        (1024,),
        1,
        1e-5,
    )
    assert more.init == Path("runs/vae-base/latest")
    sizes = {
        name: sum(p.numel() for p in SparseVAE(cfg.model).parameters())
        for name, cfg in VAE_PRESETS.items()
    }
    assert sizes["base"] == sizes["base-1024"] == 37_874_113
    assert sizes["small"] <= 6_000_000
    assert small.preset == "small"
    assert all(cfg.preset == name for name, cfg in VAE_PRESETS.items())


def test_options_start_from_the_preset():
    args = ["--preset", "small", "--loop.steps", "7", "--model.widths", "32", "32", "32", "96"]
    cfg = parse_with_presets(VAE_PRESETS, "tiny", args, prog="x")
    assert (cfg.preset, cfg.loop.steps, cfg.bricks.resolutions) == ("small", 7, (256,))
    assert cfg.model.widths == (32, 32, 32, 96)
    assert parse_with_presets(VAE_PRESETS, "tiny", [], prog="x") == VAE_PRESETS["tiny"]
    with pytest.raises(UserError, match=r"did you mean --loop\.steps"):
        parse_with_presets(VAE_PRESETS, "tiny", ["--steps", "7"], prog="x")
    with pytest.raises(UserError, match="steps must be 1 or more, got 0"):
        parse_with_presets(VAE_PRESETS, "tiny", ["--loop.steps", "0"], prog="x")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--data", "/nowhere"], "/nowhere is not a build"),
        (["--device", "cuda"], "needs a CUDA device"),
        (
            ["--preset", "base-1024"],
            r"runs/vae-base/latest does not exist; train it first, or name .* --init",
        ),
        (["--preset", "huge"], "preset"),
        (["--out", __file__], "is a file; name a directory for the run"),
    ],
)
def test_the_command_reports_errors_in_one_line(args, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=message) as error:
        main(args)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("stage", ["vae", "structure", "dit"])
def test_a_run_is_not_written_into_a_build(tmp_path, stage):
    (tmp_path / "plan.json").write_text("{}", encoding="utf-8")
    args = ["--data", str(tmp_path), "--out", str(tmp_path), "--device", "cpu"]
    with pytest.raises(UserError, match=r"is a build; name another directory for the run"):
        train_stage(stage, args)
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_a_checkpoint_of_another_model_is_refused(build, tmp_path):
    cfg = tiny_training(build, tmp_path / "a", steps=1)
    train_vae(cfg, World())
    wider = replace(cfg, model=replace(cfg.model, widths=(8, 8, 16, 64)))
    with pytest.raises(UserError, match=r"was trained with config\.widths="):
        train_vae(wider, World())
    with pytest.raises(
        UserError,
        match=r"ema\.safetensors cannot be used with --init: .* does not fit .*--model options",
    ):
        train_vae(replace(wider, out=tmp_path / "b", init=tmp_path / "a" / "latest"), World())
    path = tmp_path / "a" / "latest" / "config.json"
    path.write_text(
        json.dumps({**json.loads(path.read_text(encoding="utf-8")), "model": "SparseDiT"}),
        encoding="utf-8",
    )
    with pytest.raises(UserError, match="must be a checkpoint of a SparseVAE, got SparseDiT"):
        load_model(tmp_path / "a" / "latest", SparseVAE)


def test_evaluate_lists_its_subcommands():
    with pytest.raises(UserError, match="name a sub-command"):
        evaluate([])
    with pytest.raises(UserError, match="/nowhere is not a checkpoint"):
        evaluate(["vae", "--checkpoint", "/nowhere"])


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_resumes_to_the_bit_on_a_gpu(build, tmp_path, precision):
    """Deterministic runs are equal to the bit on a GPU.

    The runs share a process, because kernels may be tuned differently in another process.
    """
    world = World(device=torch.device("cuda", 0))

    def run(name, steps):
        options = {
            "precision": precision,
            "deterministic": True,
            "batch_size": 2,
            "activation_checkpointing": True,
        }
        return train_vae(tiny_training(build, tmp_path / name, steps=steps, **options), world)

    try:
        run("whole", 40)
        run("resumed", 15)
        run("resumed", 40)
    finally:
        torch.use_deterministic_algorithms(False)
    assert exact(tmp_path / "resumed") == exact(tmp_path / "whole")
    losses = [row[1] for row in exact(tmp_path / "whole")]
    assert np.isfinite(losses).all()
    assert np.mean(losses[-5:]) < np.mean(losses[:5])


@pytest.mark.gpu
def test_a_gpu_follows_the_cpu(build, tmp_path, whole):
    """The first losses agree in fp32. Later ones drift apart because of rounding."""
    cfg = tiny_training(build, tmp_path, steps=40, batch_size=1, optimizer="muon")
    train_vae(
        replace(cfg, loop=replace(cfg.loop, max_minutes=0.5)), World(device=torch.device("cuda", 0))
    )
    np.testing.assert_allclose(np.array(exact(tmp_path))[:5], np.array(whole)[:5], rtol=1e-2)


@pytest.mark.slow
@pytest.mark.timeout(5400)  # minutes on an idle core; cores are shared
def test_the_tiny_preset_memorises_16_shapes(tmp_path):
    """Without symmetries the preset reconstructs its training shapes with an IoU of 0.9."""
    data = tmp_path / "data"
    words = [
        *("--limit", 16, "--val-percent", 0, "--resolutions", 64, "--views", 1),
        *("--image-size", 64, "--workers", 1),
    ]
    env = project_environment(OMP_NUM_THREADS="1", HOME=str(tmp_path))
    run_python("-m", "pipeline.build", "--out", data, *words, env=env)
    cfg = VAE_PRESETS["tiny"]
    cfg = replace(
        cfg, data=data, out=tmp_path / "run", bricks=replace(cfg.bricks, symmetries=False)
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    try:
        assert train_vae(cfg, World()) == cfg.loop.steps
    finally:
        torch.set_num_threads(threads)
    model = load_model(cfg.out / "latest", SparseVAE)
    reader = BrickReader(read_build_index(data, [64]))
    overlaps = []
    for asset in range(16):
        batch = BrickBatch.collate([reader.read(asset, 64)])
        with torch.no_grad():
            overlaps.append(intersection_over_union(model(batch)[0] < 0, batch.values < 0).item())
    assert np.mean(overlaps) >= 0.9, overlaps
