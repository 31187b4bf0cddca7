"""Error of all gradients of a small SS-DiT in bf16, against the same model in fp32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.token_sets import surface_coords
from model.config import DiTConfig
from model.image_tokens import ImageTokens
from model.sparse_dit import SparseDiT
from model.sparse_tensor import Level, SparseTensor

TOKENS = (2058, 1900)  # of the two assets: the paper's mean count at 256
IMAGE_TOKENS = (620, 580)


def gradient_errors(device: torch.device, *, blocks: int = 6, seed: int = 0) -> dict[str, Any]:
    """Compute the gradients of one loss in bf16 and in fp32.

    Args:
        device: The GPU.
        blocks: Transformer blocks of the model, whose other sizes are those of the paper.
        seed: Seed of weights and inputs.

    Returns:
        The losses and gradient norms, the error of all gradients together relative to their norm,
        that error of each kind of parameter, and the largest of any parameter.
    """
    torch.manual_seed(seed)
    model = SparseDiT(DiTConfig(blocks=blocks)).to(device)
    for parameter in model.parameters():  # the zeros of new layers would hide the others
        parameter.data += 0.02 * torch.randn_like(parameter)
    side = 32
    parts = [surface_coords(tokens, side, n) for n, tokens in enumerate(TOKENS)]
    for n, part in enumerate(parts):
        part[:, 0] = n
    level = Level.from_coords(torch.cat(parts).to(device), side, len(parts))
    feats = torch.randn(len(level), 16, device=device)
    goal = torch.randn(len(level), 16, device=device)
    time_B = torch.tensor([0.3, 0.7], device=device)
    starts = torch.tensor([0, *IMAGE_TOKENS]).cumsum(0).int()
    coords = torch.randint(0, 37, (sum(IMAGE_TOKENS), 4)).int()
    coords[:, 0] = torch.repeat_interleave(torch.arange(2), torch.tensor(IMAGE_TOKENS))
    image_SC = torch.randn(sum(IMAGE_TOKENS), 1024, device=device)
    image = ImageTokens(image_SC, coords.to(device), starts.to(device), max(IMAGE_TOKENS))

    def gradients(bf16: bool) -> tuple[float, dict[str, Tensor]]:
        model.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            out = model(SparseTensor(feats, level), time_B, image)
        loss = (out - goal).square().mean()
        loss.backward()
        found = {
            name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None
        }
        return loss.item(), found

    exact_loss, exact = gradients(False)
    loss, rounded = gradients(True)
    squares: dict[str, list[float]] = {}
    each = {}
    for name, gradient in exact.items():
        error, size = (x.square().sum().item() for x in (rounded[name] - gradient, gradient))
        kind = name.split(".", 2)[2] if name.startswith("blocks.") else name
        sums = squares.setdefault(kind, [0.0, 0.0])
        sums[0] += error
        sums[1] += size
        each[name] = (error / max(size, 1e-30)) ** 0.5
    total_error, total_size = map(sum, zip(*squares.values(), strict=True))
    worst = max(each, key=lambda name: each[name])
    return {
        "loss": {"fp32": exact_loss, "bf16": loss},
        "norm": {
            "fp32": total_size**0.5,
            "bf16": sum(x.square().sum().item() for x in rounded.values()) ** 0.5,
        },
        "error": (total_error / total_size) ** 0.5,
        "worst": {worst: each[worst]},
        "kinds": {
            kind: (error / max(size, 1e-30)) ** 0.5 for kind, (error, size) in squares.items()
        },
    }
