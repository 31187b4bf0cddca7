"""Cost of training steps of the SS-DiT: time, memory and the share of attention."""

from __future__ import annotations

import copy
import gc
import logging
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.dit_config import StepsConfig
from benchmarks.gpu import row_or_failure, step_report
from benchmarks.token_sets import surface_coords
from kernels import spatial_sparse_attention
from model.attention import ragged_attention
from model.conditioning.image_encoder import ImageBatch
from model.conditioning.image_preprocessing import prepare_image
from model.config import Augmentation, EncoderConfig
from model.rectified_flow import draw_noise, sample_times
from model.sparse_tensor import Level
from pipeline.core.grid import CELL_SIDE
from train.data.latents import LatentBatch
from train.engine.distributed import World
from train.engine.optimizer import make_optimizer, update_average
from train.engine.prefetch import Prefetcher
from train.stages.dit.config import DIT_PRESETS, DiTTraining
from train.stages.dit.data import DiTBatch
from train.stages.dit.task import DiTTask

log = logging.getLogger(__name__)

# Mean tokens of an asset: Direct3D-S2 paper (arXiv 2505.17412), section 4.
TOKENS = {"256": 2058, "384": 5510, "512": 10655, "1024": 45904}
VIT_L = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
FOREGROUND = 0.45  # share of an image's patches that show the object


@contextmanager
def dino_of_random_weights() -> Iterator[str]:
    """Yield a folder with a DINOv2 ViT-L of random weights. It costs as much as the real one."""
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    config = Dinov2WithRegistersConfig(**VIT_L, image_size=518, patch_size=14)
    with tempfile.TemporaryDirectory() as folder:
        with torch.device("cuda"):
            model: Any = Dinov2WithRegistersModel(config)
        model.to(torch.bfloat16).cpu().save_pretrained(folder)
        yield folder


def render(size: int, seed: int) -> np.ndarray:
    """Draw a synthetic render: a ring of noise on a transparent ground.

    It covers about FOREGROUND of the patches of its bounding square.

    Args:
        size: Pixels per side.
        seed: Seed of the noise.

    Returns:
        RGBA, uint8 [size, size, 4].
    """
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
    """Return a batch of random latents on cells that are shaped like surfaces.

    Args:
        preset: Key of TOKENS, the number of tokens of each asset.
        cfg: Options of the run.
        first: Number of the first asset. Other numbers give other assets.
    """
    side = cfg.resolution // CELL_SIDE
    B = cfg.flow.batch_size
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
        latents=LatentBatch(mean, torch.full_like(mean, -2.0), cells),
        posterior_noise=posterior,
        noise=noise,
        times=sample_times(cfg.flow.times, B, torch.Generator().manual_seed(first)),
        dropped=torch.zeros(B, dtype=torch.bool),
        images=ImageBatch.collate(images),
        resolution=cfg.resolution,
        share=1 / B,
        uids=tuple(map(str, numbers)),
    )


class Stepper:
    """A model with its optimizer and its averaged weights, trained as the trainer does it.

    Args:
        cfg: Options of the run.
        device: The GPU.
    """

    def __init__(self, cfg: DiTTraining, device: torch.device):
        channels = cfg.model.dit.latent_channels
        store: Any = SimpleNamespace(mean=torch.zeros(channels), std=torch.ones(channels))
        no_index: Any = None
        self.cfg = cfg
        self.device = device
        self.task = DiTTask(cfg, World(device=device), no_index, no_index, store, None)
        self.average = copy.deepcopy(self.task.model).requires_grad_(False)
        self.optimizer = make_optimizer(self.task.model, cfg.flow.loop, device)

    def step(self, batch: DiTBatch, model: nn.Module | None = None) -> None:
        """Do one training step.

        Args:
            batch: A batch on the CPU. It is copied in every step, so that its block index is
                computed again as in training.
            model: The task's model, which may be wrapped for distributed training.
        """
        batch_on_gpu = batch.to(self.device)
        with torch.autocast("cuda", torch.bfloat16):
            loss = self.task.losses(model or self.task.model, batch_on_gpu)["loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.task.model.parameters(), self.cfg.flow.loop.clip_norm)
        self.optimizer.step()
        update_average(self.average, self.task.model, 0.999)
        self.optimizer.zero_grad(set_to_none=True)

    def measure(self, batch: DiTBatch, repeats: int) -> dict[str, Any]:
        """Return the median time of whole steps, the peak of memory and the time of the encoder."""
        for _ in range(2):
            self.step(batch)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        times = [milliseconds(lambda: self.step(batch)) for _ in range(repeats)]
        peak_gb = torch.cuda.max_memory_allocated() / 1e9
        started = time.monotonic()
        self.step(batch)
        host_ms = 1000 * (time.monotonic() - started)  # the step copies once, at its start
        busy_ms, launches = self.profile(batch)
        batch_on_gpu = batch.to(self.device)
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            image_tokens = self.task.model.encode_images(batch_on_gpu.images)
            encoder_ms = median(
                milliseconds(lambda: self.task.model.encode_images(batch_on_gpu.images))
                for _ in range(3)
            )
        forward_flops = self.task.model.dit.flops(batch_on_gpu.latents.cells, image_tokens)
        report = step_report(
            times, tokens=batch.tokens, forward_flops=forward_flops, device=self.device
        )
        return {
            **report,
            "peak_gb": peak_gb,
            "host_ms": host_ms,
            "launches": launches,
            "idle_share": max(0.0, 1 - busy_ms / report["ms"]),
            "encoder_ms": encoder_ms,
            "image_tokens": len(batch_on_gpu.images.coords),
        }

    def profile(self, batch: DiTBatch) -> tuple[float, int]:
        """Return the milliseconds in which the GPU works on a step, and its number of kernels."""
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            self.step(batch)
            torch.cuda.synchronize()
        kernels = [event for event in profiler.events() if event.device_time > 0]
        return sum(event.device_time for event in kernels) / 1000, len(kernels)


def milliseconds(function: Callable[[], object]) -> float:
    """Return the milliseconds of one call, measured with CUDA events."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def attention_ms(stepper: Stepper, batch: DiTBatch, repeats: int) -> dict[str, float]:
    """Time the self-attention of all layers alone.

    Projections are left out. In SSA the gradients of compressed keys and values are included.

    Returns:
        Milliseconds of all forward and of all backward passes.
    """
    cfg = stepper.cfg.model.dit
    N, H, G, D = batch.tokens, cfg.heads, cfg.kv_heads, cfg.channels // cfg.heads
    layout = stepper.task.model.dit.layout(batch.latents.cells.to(stepper.device))
    index, full = layout.index, cfg.attention == "full"

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=stepper.device, dtype=torch.bfloat16).requires_grad_()

    kv = H if full else G
    q = random(N, H, D)
    k = random(N, kv, D)
    v = random(N, kv, D)
    compressed_k = random(len(layout.compressed), G, D)
    compressed_v = random(len(layout.compressed), G, D)
    gates = random(N, 3)

    def run(shifted: bool) -> Tensor:
        if full:
            starts, most = index.token_starts, index.max_tokens
            return ragged_attention(q, k, v, starts, starts, most, most)
        return spatial_sparse_attention(
            q,
            k,
            v,
            compressed_k,
            compressed_v,
            gates,
            index,
            top_k=cfg.top_k,
            shifted=shifted,
        )

    forward = backward = 0.0
    for shifted in (False, True):
        out = run(shifted)
        gradient = torch.randn_like(out)
        inputs = (q, k, v) if full else (q, k, v, compressed_k, compressed_v, gates)
        torch.autograd.grad(out, inputs, gradient)
        times = []
        for _ in range(repeats):
            outputs: list[Tensor] = []
            forward_time = milliseconds(
                lambda shifted=shifted, outputs=outputs: outputs.append(run(shifted))
            )
            backward_time = milliseconds(
                lambda outputs=outputs: torch.autograd.grad(outputs[0], inputs, gradient)  # noqa: B023
            )
            times.append((forward_time, backward_time))
        medians = [median(column) for column in zip(*times, strict=True)]
        # Half of the layers have shifted windows.
        forward += cfg.blocks / 2 * medians[0]
        backward += cfg.blocks / 2 * medians[1]
    return {"forward_ms": forward, "backward_ms": backward}


def time_steps(
    cfg: StepsConfig, device: torch.device, rows: list[dict[str, Any]], save: Callable[[], None]
) -> None:
    """Time every preset with each kind of attention and each level of kept activations.

    Args:
        cfg: Options of the benchmark.
        device: The GPU.
        rows: Receives one row of numbers per measurement.
        save: Called after each measurement.
    """
    with dino_of_random_weights() as weights:
        for attention in cfg.attention:
            stepper = None
            for preset in cfg.presets:
                chosen = DIT_PRESETS[preset]
                dit = replace(chosen.model.dit, attention=attention)
                model = replace(chosen.model, dit=dit, encoder=EncoderConfig(weights=weights))
                flow = replace(chosen.flow, batch_size=cfg.batch_size or chosen.flow.batch_size)
                chosen = replace(chosen, model=model, flow=flow)
                stepper = stepper or Stepper(chosen, device)
                batch = synthetic_batch(preset, chosen)
                repeats = 2 if attention == "full" and preset == "1024" else cfg.repeats
                alone = attention_ms(stepper, batch, repeats)
                for kept in cfg.kept:
                    stepper.task.model.dit.kept_activations = kept
                    row = row_or_failure(
                        partial(stepper.measure, batch, repeats), stepper.optimizer.zero_grad
                    )
                    if "ms" in row:
                        inside = alone["backward_ms"] + alone["forward_ms"]
                        row |= {"attention_share": inside / row["ms"], **alone}
                    labels = {
                        "preset": preset,
                        "attention": attention,
                        "batch": batch.samples,
                        "tokens": batch.tokens,
                    }
                    rows.append({**labels, "kept": kept, **row})
                    log.info("%s", rows[-1])
                    save()
                if attention == "ssa" and preset == "256":  # the fastest step waits the most
                    stepper.task.model.dit.kept_activations = "all"
                    rows.append(time_with_decoding(stepper, batch, cfg.workers))
                    log.info("%s", rows[-1])
            del stepper
            gc.collect()
            torch.cuda.empty_cache()


class StepNumbers:
    """A job source for `Prefetcher` whose jobs are the numbers 1, 2, ..."""

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
    """Time steps whose images are decoded and augmented while the GPU computes.

    Args:
        stepper: The model.
        batch: A batch, whose images are replaced.
        workers: Number of threads that decode PNG files of 1024^2 pixels.
        steps: Number of timed steps.

    Returns:
        Images per second that the threads can deliver and that training needs, and the share of the
        time in which the GPU waits.
    """
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
        decoded = len(list(pool.map(image, range(256))))
        rate = decoded / (time.monotonic() - began)
    waited = 0.0
    stream = Prefetcher(StepNumbers(), load, workers=workers)
    for number in range(steps + 5):
        if number == 5:  # the first steps are a warm-up
            torch.cuda.synchronize()
            began = time.monotonic()
            waited = 0.0
        started = time.monotonic()
        loaded = next(stream)
        waited += time.monotonic() - started
        stepper.step(loaded)
        torch.cuda.synchronize()  # the trainer waits for the loss of every step, too
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
