"""Training of the SS-DiT: losses, checkpoints, resuming, presets, and errors."""

from __future__ import annotations

import json
import shutil
from dataclasses import fields, replace

import pytest
import torch
from PIL import Image

from model.checkpoint import load_model, read_config
from model.conditioning.image_conditioned_dit import ConditionedDiT
from model.conditioning.image_encoder import DinoEncoder
from model.config import ConditionedDiTConfig, DiTConfig, EncoderConfig
from pipeline.core.errors import RunError, UserError
from pipeline.core.options import BEFORE
from tests.train.metric_rows import metric_rows
from tests.train.ss_dit_fixtures import (
    MODEL,
    config,
    loader_of,
    make_vae,
    task_of,
    wake,
    weights,
)
from train.dit import main
from train.engine import checkpoint
from train.engine.batch_sampler import SampleId
from train.engine.distributed import World
from train.engine.mesh_pictures import LABEL_HEIGHT
from train.stages.dit.config import DIT_PRESETS
from train.stages.dit.data import index_with_latents
from train.stages.dit.run import read_latents, train_dit
from train.stages.dit.task import DiTTask

ADDED_TO_DIT = {option.name for option in fields(DiTConfig) if BEFORE in option.metadata}


def test_steps_on_one_batch_lower_its_loss_reproducibly(rendered, tmp_path):
    losses = []
    for _ in range(2):
        task = task_of(config(rendered, tmp_path))
        batch = loader_of(config(rendered, tmp_path)).batch([SampleId(0, 0), SampleId(1, 0)], 0.5)
        optimizer = torch.optim.SGD(task.model.parameters(), lr=0.05)
        step_losses = []
        for _ in range(4):
            loss = task.losses(task.model, batch)["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step_losses.append(loss.item())
        losses.append(step_losses)
    assert losses[0] == losses[1]
    assert all(later < earlier for earlier, later in zip(losses[0], losses[0][1:], strict=False))


def test_the_loss_weighs_all_assets_equally_on_any_number_of_ranks(rendered, tmp_path):
    task = task_of(config(rendered, tmp_path))
    loader = loader_of(config(rendered, tmp_path))
    wake(task.model)
    draws = [SampleId(0, 0), SampleId(3, 1), SampleId(5, 0)]
    whole = task.losses(task.model, loader.batch(draws, 1 / 3))["loss"]
    ranks = [
        task.losses(task.model, loader.batch(part, 2 / 3))["loss"]
        for part in (draws[:1], draws[1:])
    ]
    torch.testing.assert_close(sum(ranks) / 2, whole)
    alone = []
    for draw in draws:
        batch = loader.batch([draw], 1.0)
        alone.append(
            task._errors(
                task.model, batch, task._clean_latents(batch), batch.times, batch.dropped
            ).mean()
        )
    torch.testing.assert_close(torch.stack(alone).mean(), whole)


def test_a_checkpoint_records_what_the_export_needs(rendered, tmp_path):
    cfg = config(
        rendered, tmp_path / "run", loop={"steps": 2, "validate_every": 2, "sample_every": 2}
    )
    assert train_dit(cfg, World()) == 2
    found = checkpoint.latest(cfg.out)
    model = load_model(found, ConditionedDiT)
    training = read_config(found)["training"]
    _, store = read_latents(cfg, World())
    assert (training["resolution"], training["vae"]) == (32, store.vae)
    assert model.config == MODEL
    assert torch.equal(model.dit.latent_mean, store.mean)
    assert torch.equal(model.dit.latent_std, store.std)
    assert metric_rows(cfg.out, "validation")[0]["loss"] > 0
    folder = cfg.out / "samples" / "step-00000002"
    numbers = json.loads((folder / "iou.json").read_text(encoding="utf-8"))
    assert set(numbers) == {"held_out_views", "held_out_assets"}
    assert Image.open(folder / "contact.png").size == (3 * 256, LABEL_HEIGHT + 2 * 256)
    assert len(list(folder.glob("*.ply"))) == 2


def test_a_run_that_crashed_between_checkpoints_resumes_bit_exactly(
    rendered, tmp_path, monkeypatch
):
    whole = config(rendered, tmp_path / "whole", steps=7)
    crashed = config(rendered, tmp_path / "crashed", steps=7, workers=0)
    train_dit(whole, World())
    original = DiTTask.losses
    calls = []

    def dies(self, model, batch):
        calls.append(batch.uids)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return original(self, model, batch)

    monkeypatch.setattr(DiTTask, "losses", dies)
    with pytest.raises(KeyboardInterrupt):
        train_dit(crashed, World())
    assert checkpoint.latest(crashed.out).name == "step-00000004"
    train_dit(crashed, World())
    assert calls[6:8] == calls[4:6], "the stream continues after the last checkpoint"
    for name in ("model", "ema"):
        ours, theirs = weights(crashed.out, name), weights(whole.out, name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), name
    assert [row["loss"] for row in metric_rows(crashed.out)] == [
        row["loss"] for row in metric_rows(whole.out)
    ]


def test_a_run_with_several_views_resumes_bit_exactly_and_records_them(rendered, tmp_path):
    several = replace(MODEL, views=2)
    whole = config(rendered, tmp_path / "whole", steps=4, model=several)
    parts = [config(rendered, tmp_path / "parts", steps=n, model=several) for n in (2, 4)]
    for cfg in (whole, *parts):
        train_dit(cfg, World())
    for name in ("model", "ema"):
        ours, theirs = weights(tmp_path / "parts", name), weights(whole.out, name)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs), name
    assert read_config(whole.out / "latest")["config"]["views"] == 2
    with pytest.raises(UserError, match=r"views"):
        train_dit(config(rendered, whole.out, steps=5), World())
    # The gradient of a batch with several views differs from that of one view.
    train_dit(config(rendered, tmp_path / "one", steps=4), World())
    one = weights(tmp_path / "one")
    assert any(not torch.equal(one[key], ours[key]) for key in one)


def test_a_run_of_older_code_resumes_as_it_was_trained(rendered, tmp_path):
    """Its file lacks the options that were added since, one of which has another default now."""

    def older(out, steps):
        cfg = config(rendered, out, steps=steps)
        dit = replace(cfg.model.dit, min_position_factor=1.0)
        return replace(cfg, model=replace(cfg.model, dit=dit))

    train_dit(older(tmp_path / "whole", 4), World())
    train_dit(older(tmp_path / "older", 2), World())
    stored = read_config(tmp_path / "older" / "latest")
    assert "min_position_factor" in ADDED_TO_DIT
    assert ADDED_TO_DIT.isdisjoint(stored["config"]["dit"])
    assert "token_budget" not in stored["training"]
    resumed = config(rendered, tmp_path / "older", steps=4)
    assert resumed.model.dit.min_position_factor != 1.0
    train_dit(resumed, World())
    ours, theirs = weights(tmp_path / "older"), weights(tmp_path / "whole")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert [row["step"] for row in metric_rows(tmp_path / "older")] == [1, 2, 3, 4]
    assert read_config(tmp_path / "older" / "latest")["config"] == stored["config"]


def test_a_run_starts_from_init_with_the_statistics_of_its_own_latents(rendered, tmp_path):
    first = config(rendered, tmp_path / "first", steps=3)
    train_dit(first, World())
    data = tmp_path / "other"
    shutil.copytree(rendered[0], data)
    stats = next(data.glob("latents/*/32/stats.json"))
    described = json.loads(stats.read_text(encoding="utf-8"))
    stats.write_text(
        json.dumps({**described, "std": [2 * x for x in described["std"]]}), encoding="utf-8"
    )
    seen = []

    class Seen(DiTTask):
        def losses(self, model, batch):
            seen.append({name: x.detach().clone() for name, x in self.model.state_dict().items()})
            return super().losses(model, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.stages.dit.run.DiTTask", Seen)
        train_dit(
            config((data, rendered[1]), tmp_path / "second", steps=1, init=first.out / "latest"),
            World(),
        )
    average = weights(first.out, "ema")
    for name, tensor in seen[0].items():
        factor = 2 if name == "dit.latent_std" else 1
        torch.testing.assert_close(tensor, factor * average[name], msg=name)
    with pytest.raises(UserError, match="does not exist; train it first"):
        main(["--init", str(tmp_path / "nowhere")])


def test_a_frozen_encoder_is_neither_trained_nor_saved(rendered, tmp_path):
    DinoEncoder.random(channels=16, image_size=28).model.save_pretrained(tmp_path / "dino")
    frozen = EncoderConfig(
        kind="dinov2", weights=str(tmp_path / "dino"), image_size=28, channels=16
    )
    cfg = config(rendered, tmp_path / "run", steps=2, model=replace(MODEL, encoder=frozen))
    train_dit(cfg, World())
    assert {name.partition(".")[0] for name in weights(cfg.out)} == {"dit"}
    described = json.loads((checkpoint.latest(cfg.out) / "config.json").read_text(encoding="utf-8"))
    assert described["config"]["encoder"]["kind"] == "dinov2"


# Errors


def test_latents_that_are_missing_or_of_another_vae_are_refused(rendered, tmp_path):
    data = tmp_path / "build"
    shutil.copytree(rendered[0], data)
    (folder,) = (data / "latents").iterdir()
    other = make_vae(tmp_path / "other", 1)
    with pytest.raises(
        UserError,
        match=rf"has latents of VAE {folder.name} at R = 32, not of .*; make them: python",
    ):
        train_dit(config((data, other), tmp_path / "run"), World())
    with pytest.raises(
        UserError, match=r"has no latents at R = 64; make them: python -m train.encode"
    ):
        train_dit(config((data, rendered[1]), tmp_path / "run", resolution=64), World())
    shutil.rmtree(folder / "32" / "000001.zarr")
    with pytest.raises(
        UserError,
        match=r"4 of 8 assets of .* have no latents in .*, for example analytic-0+4; "
        "run python -m train.encode --vae",
    ):
        train_dit(config((data, rendered[1]), tmp_path / "run"), World())
    cfg = config((data, rendered[1]), tmp_path / "run", max_missing_share=0.5)
    assert len(index_with_latents(cfg, read_latents(cfg, World())[1])) == 4
    with pytest.raises(
        UserError, match="nowhere does not exist; name the VAE that made the latents"
    ):
        train_dit(config((data, tmp_path / "nowhere"), tmp_path / "run"), World())
    wide = replace(MODEL, dit=replace(MODEL.dit, latent_channels=8))
    with pytest.raises(UserError, match="latent_channels must be the 16 channels of"):
        train_dit(config(rendered, tmp_path / "run", model=wide), World())
    assert not (tmp_path / "run").exists()


def test_renders_that_are_missing_or_damaged_are_refused(rendered, tmp_path):
    data = tmp_path / "build"
    shutil.copytree(rendered[0], data)
    tar = data / "renders" / "paper" / "000000.tar"
    tar.write_bytes(tar.read_bytes()[:3000])
    cfg = config((data, rendered[1]), tmp_path / "run")
    with pytest.raises(
        RunError,
        match=r"view \d of analytic-.* in shard 000000 cannot be read: .* run python -m pipeline",
    ):
        train_dit(cfg, World())
    (data / "shards" / "000000" / "renders-paper.json").unlink()
    with pytest.raises(
        UserError,
        match=r"no renders of cameras paper in shard 000000; add them: python -m pipeline.build",
    ):
        train_dit(cfg, World())
    with pytest.raises(
        UserError, match="held_out_views must be below the 5 views there are, got 5"
    ):
        train_dit(config(rendered, tmp_path / "held", held_out_views=5), World())


def test_the_error_for_a_missing_image_encoder_names_the_download(rendered, tmp_path):
    model = ConditionedDiTConfig(
        dit=replace(MODEL.dit, condition_channels=1024),
        encoder=EncoderConfig(weights=str(tmp_path / "nowhere")),
    )
    cfg = config(rendered, tmp_path, model=model)
    with pytest.raises(UserError, match=r"run `hf download facebook/dinov2-with-registers-large"):
        train_dit(cfg, World())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--resolution", "36"], "resolution must be a positive multiple of 8"),
        (["--max-tokens", "0"], "--max-tokens must be 1 or more"),
        (["--max-missing-share", "2"], r"--max-missing-share must be in \[0, 1\)"),
        (["--workers", "-1"], "workers must be 0 or more"),
        (["--flow.dropout", "1"], r"dropout must be in \[0, 1\)"),
        (["--flow.open-shards", "0"], "--flow.open-shards must be 1 or more"),
        (["--preset", "2048"], "invalid choice '2048'"),
        (["--flow.lop", "3"], "unknown option --flow.lop"),
    ],
)
def test_bad_options_are_reported_in_one_line(arguments, message):
    with pytest.raises(UserError, match=message):
        main(arguments)


def test_presets_follow_the_schedule_of_the_paper():
    table = {
        "256": (1e-4, 8, None),
        "384": (1e-4, 8, "256"),
        "512": (5e-5, 8, "384"),
        "1024": (2e-5, 2, "512"),
    }
    for name, (
        rate,
        batch,
        before,
    ) in table.items():  # Direct3D-S2 paper (arXiv 2505.17412), section 4
        preset = DIT_PRESETS[name]
        assert (preset.flow.loop.learning_rate, preset.flow.batch_size) == (rate, batch)
        assert preset.init == (None if before is None else DIT_PRESETS[before].out / "latest")
        assert (preset.resolution, preset.model) == (int(name), ConditionedDiTConfig())
        assert (preset.flow.dropout, preset.flow.times.kind) == (0.1, "logit_normal")
    assert all(preset.preset == name for name, preset in DIT_PRESETS.items())
    assert {name for name, p in DIT_PRESETS.items() if p.model.encoder.kind == "stand-in"} == {
        "tiny",
        "small",
        "props",
    }
