"""Time of transformer blocks, compiled and as CUDA graphs, and of parts of a sampling step."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.dit_config import PartsConfig
from benchmarks.dit_steps import FOREGROUND, TOKENS
from benchmarks.gpu import row_or_failure
from benchmarks.gpu_timing import graph_milliseconds, milliseconds
from benchmarks.token_sets import surface_coords
from kernels import cross_attention
from model.attention import ragged_attention
from model.config import DiTConfig, StructureConfig, VAEConfig
from model.image_tokens import ImageTokens
from model.kv_compression import TokenLayout
from model.layers import WindowBlock
from model.sparse_dit import DiTBlock, ResidualStream
from model.sparse_tensor import Level
from model.structure import dense_level
from pipeline.core.grid import CELL_SIDE
from train.stages.dit.config import DIT_PRESETS

log = logging.getLogger(__name__)

PATCHES = 37**2  # of an image of 518 pixels
CLASS_AND_REGISTERS = 5
Step = Callable[[], Sequence[Tensor | None]]


def surface_level(tokens: int, count: int, side: int, device: torch.device) -> Level:
    """Return a level with `count` assets of about `tokens` cells each on surfaces."""
    parts = [surface_coords(tokens, side, seed) for seed in range(count)]
    for number, part in enumerate(parts):
        part[:, 0] = number
    return Level.from_coords(torch.cat(parts).to(device), side, count)


def image_tokens(count: int, tokens: int, channels: int, device: torch.device) -> ImageTokens:
    """Return random image tokens of `count` assets, `tokens` each."""
    asset = torch.arange(count, device=device).repeat_interleave(tokens)
    coords = F.pad(asset[:, None], (0, 3)).int()
    starts = torch.arange(count + 1, device=device).int() * tokens
    feats = torch.randn(count * tokens, channels, device=device)
    return ImageTokens(feats, coords, starts, tokens)


def dit_step(preset: str, device: torch.device) -> Callable[[nn.Module], Step]:
    """Return what makes a training step of a DiT block, given the block or its compiled form.

    Args:
        preset: Preset of `python -m train.dit`.
        device: The GPU.
    """
    cfg = DIT_PRESETS[preset]
    dit, B = cfg.model.dit, cfg.flow.batch_size
    level = surface_level(TOKENS[preset], B, cfg.resolution // CELL_SIDE, device)
    foreground = int(FOREGROUND * PATCHES) + CLASS_AND_REGISTERS
    image = image_tokens(B, foreground, dit.condition_channels, device)
    layout = TokenLayout.of(level, dit.compress_block)
    # A batch computes these once and not inside of a block.
    _ = layout.place_indicator(dit.compress_block**3, torch.bfloat16), image.asset_of
    x_NC, branch_NC = (torch.randn(len(level), dit.channels, device=device) for _ in range(2))
    gate_BC, time_BC = (torch.randn(B, dit.channels, device=device) for _ in range(2))

    def of(block: nn.Module) -> Step:
        def step() -> Sequence[Tensor | None]:
            leaves = x_NC.detach().requires_grad_(), branch_NC.bfloat16().requires_grad_()
            with torch.autocast("cuda", torch.bfloat16):
                out = block(ResidualStream(*leaves, gate_BC), time_BC, image, layout)
            results = [out.x_NC, out.branch_NC]
            ones = [torch.ones_like(x) for x in results]
            return torch.autograd.grad(results, [*leaves, *block.parameters()], ones)

        return step

    return of


def vae_step(name: str, device: torch.device) -> Callable[[nn.Module], Step]:
    """Return what makes a training step of a transformer block of the SS-VAE.

    Args:
        name: Resolution and number of assets, such as 512x4.
        device: The GPU.
    """
    resolution, count = name.split("x")
    side = int(resolution) // CELL_SIDE
    level = surface_level(TOKENS[resolution], int(count), side, device)
    index, width = level.block_index, VAEConfig().widths[3]
    x_NC = torch.randn(len(level), width, device=device)

    def of(block: nn.Module) -> Step:
        def step() -> Sequence[Tensor | None]:
            leaf = x_NC.detach().requires_grad_()
            with torch.autocast("cuda", torch.bfloat16):
                out = block(leaf, index)
            return torch.autograd.grad(out, [leaf, *block.parameters()], torch.ones_like(out))

        return step

    return of


def relative_error(found: Sequence[Tensor | None], expected: Sequence[Tensor | None]) -> float:
    """Return the norm of the difference of two lists of tensors, relative to the second's."""
    pairs = [
        (a.double(), b.double())
        for a, b in zip(found, expected, strict=True)
        if a is not None and b is not None
    ]
    error = torch.stack([(a - b).square().sum() for a, b in pairs]).sum()
    return (error / torch.stack([b.square().sum() for _, b in pairs]).sum()).sqrt().item()


def time_block(block: nn.Module, of: Callable[[nn.Module], Step]) -> dict[str, float]:
    """Return milliseconds of forward and backward of a block.

    Returns:
        "eager" and "graph", launched by the host and as a CUDA graph, "compiled" and
        "compiled_graph" the same through torch.compile, and "error" of the compiled gradients.
    """
    compiled: Any = torch.compile(block, dynamic=True, fullgraph=True)
    times = {"eager": milliseconds(of(block), 10), "graph": graph_milliseconds(of(block))}
    times["compiled"] = milliseconds(of(compiled), 10)
    times["compiled_graph"] = graph_milliseconds(of(compiled))
    times["error"] = relative_error(of(compiled)(), of(block)())
    return times


@torch.no_grad()
def time_sampling(name: str, dit: DiTConfig, level: Level, image: ImageTokens) -> dict[str, Any]:
    """Time alternatives of parts of a sampling step of one asset, both passes of guidance.

    Args:
        name: Name of the stage.
        dit: Sizes of the DiT.
        level: The cells of both passes.
        image: Image tokens of both passes.

    Returns:
        Milliseconds of the MLP as it is and with GELU in the epilogue of its first product, and of
        cross-attention by our kernels and by cuDNN, and the differences of the results.
    """
    N, C, H, device = len(level), dit.channels, dit.heads, level.device

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=torch.bfloat16)

    x, w1, b1 = random(N, C), random(dit.mlp_ratio * C, C) * C**-0.5, random(dit.mlp_ratio * C)
    w2, b2 = random(C, dit.mlp_ratio * C) * (dit.mlp_ratio * C) ** -0.5, random(C)

    def separate() -> Tensor:
        hidden = F.gelu(torch.addmm(b1, x, w1.t()), approximate="tanh")
        return torch.addmm(b2, hidden, w2.t())

    def epilogue() -> Tensor:
        hidden = torch.ops.aten._addmm_activation.default(b1, x, w1.t(), use_gelu=True)
        return torch.addmm(b2, hidden, w2.t())

    index, S = level.block_index, len(image.coords)
    q, k, v = random(N, H, C // H), random(S, H, C // H), random(S, H, C // H)
    starts, sizes = index.token_starts, index.token_starts.diff().tolist()

    def ours() -> Tensor:
        return cross_attention(q, k, v, index.asset_of, starts, image.asset_of, image.starts)

    def dense() -> Tensor:
        return ragged_attention(q, k, v, starts, image.starts, max(sizes), image.max_tokens)

    return {
        "stage": name,
        "tokens": N,
        "image_tokens": S,
        "mlp": graph_milliseconds(separate),
        "mlp_epilogue": graph_milliseconds(epilogue),
        "mlp_difference": relative_error([epilogue()], [separate()]),
        "cross": graph_milliseconds(ours),
        "cross_dense": graph_milliseconds(dense),
        "cross_difference": relative_error([dense()], [ours()]),
    }


def sampling_rows(device: torch.device) -> list[dict[str, Any]]:
    """Return `time_sampling` of the structure stage and of the SS-DiT at 512."""
    structure = StructureConfig()
    foreground = int(FOREGROUND * PATCHES) + CLASS_AND_REGISTERS
    stages = {
        "structure": (structure.flow.dit, dense_level(structure.occupancy.latent_side, 2, device)),
        "512": (DiTConfig(), surface_level(TOKENS["512"], 1, 64, device).twice()),
    }
    return [
        time_sampling(name, dit, level, image_tokens(2, foreground, dit.channels, device))
        for name, (dit, level) in stages.items()
    ]


def time_parts(
    cfg: PartsConfig, device: torch.device, rows: list[dict[str, Any]], save: Callable[[], None]
) -> None:
    """Time all parts.

    Args:
        cfg: Options of the benchmark.
        device: The GPU.
        rows: Receives one row of numbers per measurement.
        save: Called after each measurement.
    """

    def add(new: list[dict[str, Any]]) -> None:
        rows.extend(new)
        for row in new:
            log.info("%s", row)
        save()
        gc.collect()
        torch.cuda.empty_cache()

    if cfg.sampling:
        add(sampling_rows(device))
    for name in cfg.vae:
        width = VAEConfig()
        window_block = WindowBlock(width.widths[3], width.heads, shifted=True).to(device)
        step = vae_step(name, device)
        add([{"vae": name} | row_or_failure(lambda b=window_block, s=step: time_block(b, s))])
    for preset in cfg.presets:
        dit_block = DiTBlock(DIT_PRESETS[preset].model.dit, odd=True).to(device)
        step = dit_step(preset, device)
        add([{"dit": preset} | row_or_failure(lambda b=dit_block, s=step: time_block(b, s))])
