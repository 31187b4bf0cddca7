"""AdamW, the averaged weights, and the guard that keeps bad gradients out of both."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from train.config import LoopConfig

PEAK_BF16_FLOPS = {"H200": 989e12, "H100": 989e12, "H800": 989e12, "A100": 312e12, "A800": 312e12, "L40S": 362e12}


PATIENCE = 5  # spikes in a row that are skipped: what lasts is no bad batch, and clipped steps lead out of it


@dataclass
class Guard:
    """Decides whether a gradient may be applied."""

    spike_factor: float
    clip_norm: float
    max_bad_steps: int
    norms: deque[float] = field(default_factory=lambda: deque(maxlen=100))
    in_a_row: int = 0
    skipped: int = 0

    def judge(self, loss: float, norm: float) -> str:
        """ "" to apply it, else why not."""
        finite = abs(loss) < float("inf") and norm < float("inf")  # both false for NaN
        usual = median(self.norms) if len(self.norms) >= 20 else None
        verdict = ""
        if not finite:
            verdict = "not finite"
        elif usual is not None and self.in_a_row < PATIENCE and norm > max(self.spike_factor * usual, self.clip_norm):
            verdict = f"{norm / usual:.0f} times the usual gradient"
        if finite:
            self.norms.append(norm)  # of spikes too: a lasting change becomes the usual
        self.in_a_row = self.in_a_row + 1 if verdict else 0
        self.skipped += bool(verdict)
        return verdict

    def state(self) -> dict[str, Any]:
        return {"norms": list(self.norms), "in_a_row": self.in_a_row, "skipped": self.skipped}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.norms.clear()
        self.norms.extend(state["norms"])
        self.in_a_row, self.skipped = state["in_a_row"], state["skipped"]


def make_optimizer(model: nn.Module, cfg: LoopConfig, device: torch.device) -> torch.optim.AdamW:
    """AdamW; weight decay on matrices only."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": cfg.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=cfg.learning_rate, betas=cfg.betas, fused=device.type == "cuda")


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Move the averaged weights towards the model's by 1 - decay; what is not trained stays, buffers are copied."""
    pairs = [(a, b) for a, b in zip(average.parameters(), model.parameters(), strict=True) if b.requires_grad]
    mine: list[Tensor] = [a for a, _ in pairs]
    theirs: list[Tensor] = [b for _, b in pairs]
    torch._foreach_lerp_(mine, theirs, 1 - decay)  # pyright: ignore[reportPrivateImportUsage]
    for a, b in zip(average.buffers(), model.buffers(), strict=True):
        a.copy_(b)


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s of a GPU by its data sheet; None if it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for model, peak in PEAK_BF16_FLOPS.items() if model in name), None)
