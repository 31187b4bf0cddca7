"""Small SS-DiT runs on builds of analytic shapes: options, loaders, tasks and results."""

from __future__ import annotations

import safetensors.torch
import torch

from model.checkpoint import save_model
from model.config import ConditionedDiTConfig, DiTConfig, EncoderConfig
from model.sparse_vae import SparseVAE
from tests.train.analytic_builds import TINY, short_loop
from train.data.config import FlowOptions
from train.engine import checkpoint
from train.engine.distributed import World
from train.stages.dit.config import DiTTraining
from train.stages.dit.data import DiTLoader, index_with_latents
from train.stages.dit.run import read_latents
from train.stages.dit.task import DiTTask
from train.stages.vae.config import EncodeConfig
from train.stages.vae.encode import encode

VIEWS = 5
MODEL = ConditionedDiTConfig(
    dit=DiTConfig(channels=32, blocks=2, heads=2, kv_heads=1, mlp_ratio=2, condition_channels=16),
    encoder=EncoderConfig(kind="stand-in", image_size=28, channels=16, layers=1, heads=2),
)


def make_vae(path, seed=0):
    """Write a VAE of random weights and return its directory."""
    torch.manual_seed(seed)
    vae = SparseVAE(TINY)
    for parameter in vae.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    save_model(path, vae, TINY)
    return path


def encode_with(vae, data):
    """Encode the bricks of a build at R = 32."""
    encode(
        EncodeConfig(
            vae=vae, data=data, resolutions=(32,), device="cpu", precision="fp32", workers=1
        ),
        World(),
    )


def config(rendered, out, *, steps=4, loop=None, **options):
    """Return the options of a run of seconds.

    Args:
        rendered: The build and the VAE.
        out: Directory of the run.
        steps: Number of steps.
        loop: Options of the loop to replace.
        **options: Other options to replace.
    """
    data, vae = rendered
    defaults = {"steps": steps, "checkpoint_every": 2, "learning_rate": 3e-3, "ema_decay": 0.9}
    flow = FlowOptions(
        batch_size=3, steps=2, open_shards=1, loop=short_loop(**{**defaults, **(loop or {})})
    )
    chosen = {
        "device": "cpu",
        "resolution": 32,
        "held_out_views": 2,
        "workers": 2,
        "samples": 1,
        "model": MODEL,
    }
    return DiTTraining(**{"data": data, "vae": vae, "out": out, "flow": flow, **chosen, **options})


def loader_of(cfg, split="train", **options):
    _, store = read_latents(cfg, World())
    return DiTLoader(index_with_latents(cfg, store).split(split), store, cfg, **options)


def task_of(cfg):
    vae, store = read_latents(cfg, World())
    index = index_with_latents(cfg, store)
    return DiTTask(cfg, World(), index.split("train"), index.split("val"), store, vae)


def wake(model):
    """Randomise all weights: new output layers are zero and hide the inputs."""
    torch.manual_seed(5)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)


def weights(out, name="model"):
    """Return the state dict of a run's newest checkpoint."""
    return safetensors.torch.load_file(checkpoint.latest(out) / f"{name}.safetensors")
