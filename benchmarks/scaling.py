"""`torchrun --nproc-per-node N -m benchmarks.scaling --out DIR`: training steps of the SS-DiT on N GPUs against one.

Every rank takes a batch of the preset's size and does whole steps, as the loop does them: first one rank while the
others wait, then all together, who also average their gradients. These averages are held against what the first rank
finds by itself from everybody's batches.
"""

from __future__ import annotations

import json
import logging
import platform
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

from benchmarks.dit import Stepper, dino_of_random_weights, synthetic_batch
from model.config import EncoderConfig
from pipeline.core.cli import command, parse
from pipeline.core.errors import UserError
from train.engine.checkpoint import provenance
from train.engine.distributed import World, join_world
from train.stages.dit.config import DIT_PRESETS
from train.stages.dit.data import DiTBatch

log = logging.getLogger(__name__)

PROG = "torchrun --nproc-per-node N -m benchmarks.scaling"


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """Time training steps of the SS-DiT on several GPUs against one."""

    out: Path
    presets: tuple[str, ...] = ("256", "512")
    repeats: int = 10


def seconds(step: Callable[[], None], repeats: int) -> float:
    """Median wall time of a step that is waited for, as the loop waits for every loss."""
    times = []
    for _ in range(repeats + 3):
        began = time.monotonic()
        step()
        torch.cuda.synchronize()
        times.append(time.monotonic() - began)
    return median(times[3:])


def gradients(stepper: Stepper, model: nn.Module, batches: Sequence[DiTBatch]) -> dict[str, Tensor]:
    """The mean of the batches' gradients, by name, fp32."""
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


def difference(found: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    """|found - right| / |right|, of all gradients as one vector."""
    apart = sum(float((found[name] - x).double().square().sum()) for name, x in right.items())
    return (apart / sum(float(x.double().square().sum()) for x in right.values())) ** 0.5


@contextmanager
def shared_weights(world: World) -> Iterator[str]:
    """The first rank's folder of encoder weights, for all ranks; transformers writes on that one alone."""
    with dino_of_random_weights() if world.is_first else nullcontext("") as folder:
        told = [folder]
        dist.broadcast_object_list(told, 0)
        yield told[0]
        world.barrier()


def measure(preset: str, weights: str, world: World, repeats: int) -> dict[str, Any]:
    """One row; what only the first rank knows is there on the first rank."""
    chosen = DIT_PRESETS[preset]
    chosen = replace(chosen, model=replace(chosen.model, encoder=EncoderConfig(weights=weights)))
    stepper = Stepper(chosen, world.device)
    model = stepper.task.model
    batches = [
        synthetic_batch(preset, chosen, first=rank * chosen.flow.batch_size)
        for rank in range(world.size)
    ]
    mine, about = batches[world.rank], {}
    stepper.step(mine)  # everybody compiles
    world.barrier()
    if world.is_first:
        about["ms_alone"] = 1000 * seconds(lambda: stepper.step(mine), repeats)
    world.barrier()
    with torch.no_grad():
        for x in model.parameters():
            # Zero weights, as a new model has them, would let few gradients through.
            x.add_(torch.randn_like(x), alpha=0.02 if x.requires_grad else 0.0)
            dist.broadcast(x, 0)
    right = gradients(stepper, model, batches) if world.is_first else {}
    own = gradients(stepper, model, [mine])
    wrapped = world.parallel(model)
    averaged = gradients(stepper, wrapped, [mine])
    if world.is_first:
        about["gradient_difference"] = difference(averaged, right)
        about["difference_of_one_rank"] = difference(own, right)
    together = seconds(lambda: stepper.step(mine, wrapped), repeats)
    about |= {
        "ms_together": 1000 * together,
        "tokens_per_s": sum(x.tokens for x in batches) / together,
    }
    if world.is_first:
        about["efficiency"] = about["ms_alone"] / about["ms_together"]
    return {
        "preset": preset,
        "ranks": world.size,
        "batch_per_rank": mine.samples,
        "tokens": mine.tokens,
        **about,
    }


def main(args: Sequence[str]) -> None:
    cfg = parse(Scaling, args, prog=PROG)
    with join_world("cuda") as world:
        if world.size == 1:
            raise UserError(f"scaling needs several ranks: {PROG}")
        rows = []
        with shared_weights(world) as weights:
            for preset in cfg.presets:
                rows.append(measure(preset, weights, world, cfg.repeats))
                log.info("%s", rows[-1])
                torch.cuda.empty_cache()
                world.barrier()
        if world.is_first:
            gpu = torch.cuda.get_device_properties(world.device).name
            machine = {
                "gpu": gpu,
                "python": platform.python_version(),
                "cuda": torch.version.cuda,
                **provenance(),
            }
            cfg.out.mkdir(parents=True, exist_ok=True)
            text = json.dumps({"machine": machine, "rows": rows}, indent=1, default=str)
            (cfg.out / "scaling.json").write_text(text + "\n")


if __name__ == "__main__":
    command(main)
