"""Time of training steps of the SS-DiT on several GPUs compared with one.

Usage: `torchrun --nproc-per-node N -m benchmarks.scaling --out DIR`.

Every rank takes a batch of the preset's size and does whole steps like the trainer: first one rank
while the others wait, then all together, averaging their gradients. The averaged gradients are
compared with those that the first rank computes alone from the batches of all ranks.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.dit_steps import Stepper, dino_of_random_weights, synthetic_batch
from benchmarks.gpu import gpu_machine
from model.config import EncoderConfig
from pipeline.core.cli import command, parse
from pipeline.core.errors import UserError
from train.engine.distributed import World, join_world
from train.stages.dit.config import DIT_PRESETS
from train.stages.dit.data import DiTBatch

log = logging.getLogger(__name__)

PROG = "torchrun --nproc-per-node N -m benchmarks.scaling"


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """Time training steps of the SS-DiT on several GPUs and on one."""

    out: Path
    """Directory of the results."""
    presets: tuple[str, ...] = ("256", "512")
    """Presets of train.dit."""
    repeats: int = 10
    """Number of timed steps."""


def seconds(step: Callable[[], None], repeats: int) -> float:
    """Return the median wall time of a step, waiting for the GPU as the trainer does."""
    times = []
    for _ in range(repeats + 3):
        began = time.monotonic()
        step()
        torch.cuda.synchronize()
        times.append(time.monotonic() - began)
    return median(times[3:])


def gradients(stepper: Stepper, model: nn.Module, batches: Sequence[DiTBatch]) -> dict[str, Tensor]:
    """Return the mean of the batches' gradients in fp32, by the name of the parameter."""
    total: dict[str, Tensor] = {}
    for batch in batches:
        with torch.autocast("cuda", torch.bfloat16):
            loss = stepper.task.losses(model, batch.to(stepper.device))["loss"]
        loss.backward()
        for name, x in stepper.task.model.named_parameters():
            if x.grad is not None:
                total[name] = total.get(name, 0) + x.grad / len(batches)
        stepper.optimizer.zero_grad(set_to_none=True)
    return total


def difference(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Return |actual - expected| / |expected| of all gradients as one vector."""
    squares = sum(float((actual[name] - x).double().square().sum()) for name, x in expected.items())
    return (squares / sum(float(x.double().square().sum()) for x in expected.values())) ** 0.5


@contextmanager
def shared_weights(world: World) -> Iterator[str]:
    """Yield a directory of encoder weights, which the first rank writes for all ranks."""
    with dino_of_random_weights() if world.is_first else nullcontext("") as folder:
        message = [folder]
        dist.broadcast_object_list(message, 0)
        yield message[0]
        world.barrier()


def measure(preset: str, weights: str, world: World, repeats: int) -> dict[str, Any]:
    """Measure a preset. Only the first rank's row has the time alone and the differences."""
    chosen = DIT_PRESETS[preset]
    chosen = replace(chosen, model=replace(chosen.model, encoder=EncoderConfig(weights=weights)))
    stepper = Stepper(chosen, world.device)
    model = stepper.task.model
    batches = [
        synthetic_batch(preset, chosen, first=rank * chosen.flow.batch_size)
        for rank in range(world.size)
    ]
    batch = batches[world.rank]
    row: dict[str, Any] = {}
    stepper.step(batch)  # compiles the kernels
    world.barrier()
    if world.is_first:
        row["ms_alone"] = 1000 * seconds(lambda: stepper.step(batch), repeats)
    world.barrier()
    with torch.no_grad():
        for x in model.parameters():
            # Few gradients flow through the zero weights of a new model.
            x.add_(torch.randn_like(x), alpha=0.02 if x.requires_grad else 0.0)
            dist.broadcast(x, 0)
    expected = gradients(stepper, model, batches) if world.is_first else {}
    own = gradients(stepper, model, [batch])
    wrapped = world.parallel(model)
    averaged = gradients(stepper, wrapped, [batch])
    if world.is_first:
        row["gradient_difference"] = difference(averaged, expected)
        row["difference_of_one_rank"] = difference(own, expected)
    together = seconds(lambda: stepper.step(batch, wrapped), repeats)
    row |= {
        "ms_together": 1000 * together,
        "tokens_per_s": sum(x.tokens for x in batches) / together,
    }
    if world.is_first:
        row["efficiency"] = row["ms_alone"] / row["ms_together"]
    return {
        "preset": preset,
        "ranks": world.size,
        "batch_per_rank": batch.samples,
        "tokens": batch.tokens,
        **row,
    }


def main(args: Sequence[str]) -> None:
    """Measure the presets and write scaling.json."""
    cfg = parse(Scaling, args, prog=PROG)
    with join_world("cuda") as world:
        if world.size == 1:
            raise UserError(f"the benchmark needs several ranks; start it with {PROG}")
        rows = []
        with shared_weights(world) as weights:
            for preset in cfg.presets:
                rows.append(measure(preset, weights, world, cfg.repeats))
                log.info("%s", rows[-1])
                torch.cuda.empty_cache()
                world.barrier()
        if world.is_first:
            machine = gpu_machine(world.device)
            cfg.out.mkdir(parents=True, exist_ok=True)
            text = json.dumps({"machine": machine, "rows": rows}, indent=1, default=str)
            (cfg.out / "scaling.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    command(main)
