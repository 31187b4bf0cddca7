"""Writes the gradients of global batches, averaged over the ranks, to a file.

Usage: `torchrun ... -m tests.train.two_rank_gradients DATA OUT DEVICE`. Without torchrun the
gradients are those of one rank.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import safetensors.torch
import torch

from tests.train.analytic_builds import TINY, tiny_training
from train.data.bricks import BrickLoader, VAEBatch, read_build_index
from train.engine.batch_sampler import BatchSampler
from train.engine.distributed import World, join_world
from train.engine.prefetch import Prefetcher
from train.stages.vae.task import VAETask

GLOBAL_BATCH = 4
STEPS = 2


def gradients(data: Path, world: World) -> dict[str, torch.Tensor]:
    """Return the summed gradients of STEPS global batches and their losses.

    They are computed in fp64 on the CPU and in fp32 on a GPU.
    """
    dtype = torch.float64 if world.device.type == "cpu" else torch.float32
    index = read_build_index(data, [32]).split("train")
    task = VAETask(tiny_training(data, Path("unused")), world, index.subset([]))
    task.model.to(dtype)
    # The output layers start at zero, through which no gradient flows.
    for parameter in task.model.parameters():
        torch.manual_seed(parameter.numel())
        parameter.data += 0.02 * torch.randn(parameter.shape, dtype=torch.float64).to(parameter)
    model = world.parallel(task.model)
    loader = BrickLoader(index, seed=0, noise_channels=TINY.latent_channels)
    sampler = BatchSampler(
        index.tokens, batch_size=GLOBAL_BATCH // world.size, world_size=world.size, seed=0
    )
    stream = Prefetcher(sampler, partial(loader.load, rank=world.rank), workers=1)
    results: dict[str, torch.Tensor] = {}
    for step in range(STEPS):
        losses = task.losses(model, in_dtype(next(stream).to(world.device), dtype))
        losses["loss"].backward()
        for name, value in losses.items():
            results[f"{name}.{step}"] = world.sum(value.detach()[None]) / world.size
    stream.close()
    return results | {name: parameter.grad for name, parameter in task.model.named_parameters()}  # pyright: ignore


def in_dtype(batch: VAEBatch, dtype: torch.dtype) -> VAEBatch:
    object.__setattr__(batch, "noise", batch.noise.to(dtype))
    return batch


def main() -> None:
    data, out, device = sys.argv[1:]
    torch.set_num_threads(1)
    with join_world(device) as world:  # pyright: ignore[reportArgumentType]
        results = gradients(Path(data), world)
        if world.is_first:
            safetensors.torch.save_file(
                {name: x.cpu().contiguous() for name, x in results.items()}, out
            )
        world.barrier()


if __name__ == "__main__":
    main()
