"""`python -m benchmarks.dit`: what training steps of the SS-DiT cost, and what minutes of training come to.

`steps` needs nothing but a GPU; `learn` a build of meshes with bricks at one resolution and renders.
"""

from __future__ import annotations

import copy
import gc
import json
import logging
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.dit_learning import Learn, learn
from benchmarks.token_sets import surface_coords
from kernels import spatial_sparse_attention
from model.attention import ragged_attention
from model.conditioning.image_encoder import ImageBatch
from model.conditioning.image_preprocessing import prepare_image
from model.config import Augmentation, EncoderConfig
from model.rectified_flow import draw_noise
from model.sparse_tensor import Level
from pipeline.core.cli import command, parse
from pipeline.core.errors import UserError
from pipeline.core.grid import CELL_SIDE
from train.data.latents import LatentBatch
from train.engine.checkpoint import provenance
from train.engine.distributed import World
from train.engine.optimizer import make_optimizer, peak_flops, update_average
from train.engine.prefetch import Prefetcher
from train.stages.dit.config import DIT_PRESETS, DiTTraining
from train.stages.dit.data import DiTBatch
from train.stages.dit.task import DiTTask

log = logging.getLogger(__name__)

PROG = "python -m benchmarks.dit"
TOKENS = {"256": 2058, "384": 5510, "512": 10655, "1024": 45904}  # mean of an asset; paper, sec. 4
FOREGROUND = 0.45  # share of an image's patches that are kept


@dataclass(frozen=True, kw_only=True)
class Steps:
    """Time whole training steps of the paper's presets on synthetic cells with its token counts."""

    out: Path
    presets: tuple[str, ...] = ("256", "384", "512", "1024")
    repeats: int = 5
    workers: int = 16  # that decode renders while the GPU works


@contextmanager
def dino_of_random_weights() -> Iterator[str]:
    """A folder with a DINOv2 ViT-L of random weights: it costs what the pretrained one does."""
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    config = Dinov2WithRegistersConfig(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, mlp_ratio=4, image_size=518, patch_size=14,
        num_register_tokens=4,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        with torch.device("cuda"):
            model: Any = Dinov2WithRegistersModel(config).to(torch.bfloat16)
        model.cpu().save_pretrained(folder)
        yield folder


def render(size: int, seed: int) -> np.ndarray:
    """RGBA [size, size, 4]: a disc of noise that covers about FOREGROUND of its own bounding square's patches."""
    rng = np.random.default_rng(seed)
    row, column = np.mgrid[:size, :size] / size - 0.5
    radius = np.hypot(row, column)
    ring = (radius < 0.45) & (radius > 0.45 * (1 - FOREGROUND / 0.785) ** 0.5)
    noise = (
        rng.integers(0, 256, (size // 8 + 1, size // 8 + 1, 3))
        .repeat(8, 0)
        .repeat(8, 1)[:size, :size]
    )
    return np.dstack([noise, 255 * ring]).astype(np.uint8)


def synthetic_batch(preset: str, cfg: DiTTraining, first: int = 0) -> DiTBatch:
    """Assets on surface-like cells of the paper's mean counts, their latents random; others for another `first`."""
    side, B = cfg.resolution // CELL_SIDE, cfg.flow.batch_size
    numbers = range(first, first + B)
    parts = [surface_coords(TOKENS[preset], side, seed) for seed in numbers]
    for number, part in enumerate(parts):
        part[:, 0] = number
    cells = Level.from_coords(torch.cat(parts), side, B)
    counts, channels = [len(part) for part in parts], cfg.model.dit.latent_channels
    mean, posterior, noise = (
        draw_noise([10 * n + k for n in numbers], counts, channels) for k in range(3)
    )
    images = [prepare_image(render(518, n), 518) for n in numbers]
    return DiTBatch(
        latents=LatentBatch(cells, mean, torch.full_like(mean, -2.0)),
        posterior_noise=posterior,
        noise=noise,
        times=cfg.flow.times.sample(B, torch.Generator().manual_seed(first)),
        dropped=torch.zeros(B, dtype=torch.bool),
        images=ImageBatch.collate(images),
        resolution=cfg.resolution,
        share=1 / B,
        uids=tuple(map(str, numbers)),
    )


class Stepper:
    """A model with optimiser and average, and whole training steps of it as the loop does them."""

    def __init__(self, cfg: DiTTraining, device: torch.device):
        channels = cfg.model.dit.latent_channels
        store: Any = SimpleNamespace(mean=torch.zeros(channels), std=torch.ones(channels))
        nothing: Any = None
        self.cfg, self.device = cfg, device
        self.task = DiTTask(cfg, World(device=device), nothing, nothing, store, None)
        self.average = copy.deepcopy(self.task.model).requires_grad_(False)
        self.optimizer = make_optimizer(self.task.model, cfg.flow.loop, device)

    def step(self, batch: DiTBatch, model: nn.Module | None = None) -> None:
        """One step; `model` is the task's, perhaps wrapped."""
        there = batch.to(self.device)  # anew: its blocks are found again, as in training
        with torch.autocast("cuda", torch.bfloat16):
            loss = self.task.losses(model or self.task.model, there)["loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.task.model.parameters(), self.cfg.flow.loop.clip_norm)
        self.optimizer.step()
        update_average(self.average, self.task.model, 0.999)
        self.optimizer.zero_grad(set_to_none=True)

    def measure(self, batch: DiTBatch, repeats: int) -> dict[str, Any]:
        """Median of whole steps, and the peak of memory."""
        for _ in range(2):
            self.step(batch)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        times = [milliseconds(lambda: self.step(batch)) for _ in range(repeats)]
        there = batch.to(self.device)
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            condition = self.task.model.encode_images(there.images)
            encoder = median(
                milliseconds(lambda: self.task.model.encode_images(there.images)) for _ in range(3)
            )
        flops, ms = 3 * self.task.model.dit.flops(there.latents.cells, condition), median(times)
        return {
            "ms": ms,
            "ms_min": min(times),
            "ms_max": max(times),
            "tokens_per_s": 1000 * batch.tokens / ms,
            "tflop": flops / 1e12,
            "mfu": flops / (ms / 1000) / (peak_flops(self.device) or float("nan")),
            "peak_gb": torch.cuda.max_memory_allocated() / 1e9,
            "encoder_ms": encoder,
            "image_tokens": len(there.images.coords),
        }


def milliseconds(function: Callable[[], object]) -> float:
    """Of one call, by CUDA events."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def attention_ms(stepper: Stepper, batch: DiTBatch, repeats: int) -> dict[str, float]:
    """Forward and backward of all layers' attention alone, without projections; SSA in its compressed keys too."""
    cfg = stepper.cfg.model.dit
    N, H, G, D = batch.tokens, cfg.heads, cfg.kv_heads, cfg.channels // cfg.heads
    layout = stepper.task.model.dit.layout(batch.latents.cells.to(stepper.device))
    index, full = layout.index, cfg.attention == "full"

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=stepper.device, dtype=torch.bfloat16).requires_grad_()

    kv = H if full else G
    q, k, v = random(N, H, D), random(N, kv, D), random(N, kv, D)
    ck, cv, gates = (
        random(len(layout.compressed), G, D),
        random(len(layout.compressed), G, D),
        random(N, 3),
    )

    def run(shifted: bool) -> Tensor:
        if full:
            starts, most = index.token_starts, index.max_tokens
            return ragged_attention(q, k, v, starts, starts, most, most)
        return spatial_sparse_attention(
            q, k, v, ck, cv, gates, index, top_k=cfg.top_k, shifted=shifted
        )

    forward = backward = 0.0
    for shifted in (False, True):
        out = run(shifted)
        gradient = torch.randn_like(out)
        inputs = (q, k, v) if full else (q, k, v, ck, cv, gates)
        torch.autograd.grad(out, inputs, gradient)
        times = []
        for _ in range(repeats):
            kept: list[Tensor] = []
            there = milliseconds(lambda shifted=shifted, kept=kept: kept.append(run(shifted)))
            back = milliseconds(lambda kept=kept: torch.autograd.grad(kept[0], inputs, gradient))  # noqa: B023
            times.append((there, back))
        there, back = (median(part) for part in zip(*times, strict=True))
        forward, backward = forward + cfg.blocks / 2 * there, backward + cfg.blocks / 2 * back
    return {"forward_ms": forward, "backward_ms": backward}


def time_steps(
    cfg: Steps, device: torch.device, rows: list[dict[str, Any]], save: Callable[[], None]
) -> None:
    """Every preset with SSA and with full attention, with and without activation checkpointing."""
    with dino_of_random_weights() as weights:
        for attention in ("ssa", "full"):
            stepper = None
            for preset in cfg.presets:
                chosen = DIT_PRESETS[preset]
                dit = replace(chosen.model.dit, attention=attention)
                model = replace(chosen.model, dit=dit, encoder=EncoderConfig(weights=weights))
                chosen = replace(chosen, model=model)
                stepper = stepper or Stepper(chosen, device)
                batch = synthetic_batch(preset, chosen)
                repeats = 2 if attention == "full" and preset == "1024" else cfg.repeats
                alone = attention_ms(stepper, batch, repeats)
                for checkpointing in (False, True):
                    stepper.task.model.dit.activation_checkpointing = checkpointing
                    try:
                        row = stepper.measure(batch, repeats)
                        inside = alone["backward_ms"] + (1 + checkpointing) * alone["forward_ms"]
                        row |= {"attention_share": inside / row["ms"], **alone}
                    except torch.cuda.OutOfMemoryError as error:
                        stepper.optimizer.zero_grad(set_to_none=True)
                        row = {"failed": str(error).splitlines()[0]}
                    gc.collect()
                    torch.cuda.empty_cache()
                    about = {
                        "preset": preset,
                        "attention": attention,
                        "batch": batch.samples,
                        "tokens": batch.tokens,
                    }
                    rows.append({**about, "checkpointing": checkpointing, **row})
                    log.info("%s", rows[-1])
                    save()
                if attention == "ssa" and preset == "256":  # the fastest step has to wait the most
                    stepper.task.model.dit.activation_checkpointing = False
                    rows.append(time_with_decoding(stepper, batch, cfg.workers))
                    log.info("%s", rows[-1])
            del stepper
            gc.collect()
            torch.cuda.empty_cache()


class Count:
    """A plan whose jobs are numbers."""

    def __init__(self) -> None:
        self.state: dict[str, int] = {"n": 0}

    def restore(self, state: dict[str, int]) -> None:
        self.state = dict(state)

    def next(self) -> int:
        self.state = {"n": self.state["n"] + 1}
        return self.state["n"]


def time_with_decoding(
    stepper: Stepper, batch: DiTBatch, workers: int, steps: int = 30
) -> dict[str, Any]:
    """Steps whose images are decoded and augmented from 1024^2 PNGs while the GPU works: how long it has to wait."""
    from PIL import Image

    from pipeline.core.image_codec import decode

    with tempfile.TemporaryDirectory() as folder:
        files = []
        for number in range(batch.samples):
            path = Path(folder) / f"{number}.png"
            Image.fromarray(render(1024, number)).save(path)
            files.append(path.read_bytes())

    def image(n: int) -> Any:
        return prepare_image(
            decode(files[n % len(files)]),
            518,
            augmentation=Augmentation(),
            rng=np.random.default_rng(n),
        )

    def load(job: int) -> DiTBatch:
        first = job * batch.samples
        return replace(
            batch, images=ImageBatch.collate([image(first + n) for n in range(batch.samples)])
        )

    with ThreadPoolExecutor(workers) as pool:
        began = time.monotonic()
        done = len(list(pool.map(image, range(256))))
        rate = done / (time.monotonic() - began)
    stream, waited = Prefetcher(Count(), load, workers=workers), 0.0
    for number in range(steps + 5):
        if number == 5:
            torch.cuda.synchronize()
            began, waited = time.monotonic(), 0.0
        asked = time.monotonic()
        there = next(stream)
        waited += time.monotonic() - asked
        stepper.step(there)
        torch.cuda.synchronize()  # the loop, too, waits for the loss of every step
    seconds = time.monotonic() - began
    stream.close()
    kilobytes = sum(map(len, files)) / len(files) / 1000
    return {
        "loading": f"1024^2 PNGs of {kilobytes:.0f} KB, {workers} threads",
        "images_per_s_alone": rate,
        "images_per_s_needed": steps * batch.samples / seconds,
        "gpu_idle_share": waited / seconds,
        "ms": 1000 * seconds / steps,
    }


def main(args: Sequence[str]) -> None:
    kinds: dict[str, type] = {"steps": Steps, "learn": Learn}
    if not args or args[0] not in kinds:
        raise UserError(f"say what to do: {PROG} {'|'.join(kinds)} [options]")
    cfg = parse(kinds[args[0]], args[1:], prog=f"{PROG} {args[0]}")
    if not torch.cuda.is_available():
        raise UserError("measuring needs a CUDA device")
    device = torch.device("cuda", 0)
    cfg.out.mkdir(parents=True, exist_ok=True)
    gpu = torch.cuda.get_device_properties(device).name
    machine = {
        "gpu": gpu,
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        **provenance(),
    }
    results: dict[str, Any] = {"machine": machine, "rows": []}

    def save() -> None:
        text = json.dumps(results, indent=1, default=str).replace("Infinity", "null")
        (cfg.out / f"dit-{args[0]}.json").write_text(text + "\n")

    if isinstance(cfg, Steps):
        time_steps(cfg, device, results["rows"], save)
    else:
        results |= learn(cfg, device)
    save()


if __name__ == "__main__":
    command(main)
