"""AdamW and Muon, the averaged weights, and the guard that keeps bad gradients out of all of them."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from train.engine.config import LoopConfig

PEAK_BF16_FLOPS = {
    "H200": 989e12,
    "H100": 989e12,
    "H800": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
}


PATIENCE = 5  # spikes in a row that are skipped: what lasts is no bad batch, and clipped steps lead out of it


@dataclass
class GradientGuard:
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
        elif (
            usual is not None
            and self.in_a_row < PATIENCE
            and norm > max(self.spike_factor * usual, self.clip_norm)
        ):
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


class Muon(torch.optim.AdamW):
    """Muon for the groups with `muon` set, AdamW for the others; step() uses the gradients of the former up.

    A matrix moves along its Nesterov momentum with all singular values made equal, by 0.2 * sqrt(longer side) times the
    learning rate: an element moves as far as under AdamW, so both share one rate and weight decay. A convolution counts
    as one matrix of all its taps. Its weights act alike on many voxels, and where each takes AdamW's full step at once
    the output overshoots: that is what keeps a decoder of full blocks from learning faster.
    Sources: kellerjordan.github.io/posts/muon; arXiv 2502.16982, sec. 2.2.
    """

    MOMENTUM = 0.95
    RMS = 0.2

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            moved = [p for p in group["params"] if p.grad is not None] if group["muon"] else []
            if moved:
                self._move(moved, self._directions(moved), group["lr"], group["weight_decay"])
        super().step()

    def _directions(self, moved: list[Tensor]) -> list[Tensor]:
        """Nesterov momentum of each, whose gradient it takes."""
        states = [self.state[p] for p in moved]
        for p, state in zip(moved, states, strict=True):
            if not state:  # AdamW, when it loads a state, wants a step in each
                state["step"], state["momentum"] = torch.zeros(()), torch.zeros_like(p)
            state["step"] += 1
        momenta: list[Tensor] = [state["momentum"] for state in states]
        grads = [p.grad for p in moved if p.grad is not None]
        torch._foreach_mul_(momenta, self.MOMENTUM)  # pyright: ignore[reportPrivateImportUsage]
        torch._foreach_add_(momenta, grads)  # pyright: ignore[reportPrivateImportUsage]
        for p in moved:
            p.grad = None
        directions = torch._foreach_add(grads, momenta, alpha=self.MOMENTUM)  # pyright: ignore[reportPrivateImportUsage]
        return list(directions)

    def _move(
        self, moved: list[Tensor], directions: list[Tensor], rate: float, decay: float
    ) -> None:
        torch._foreach_mul_(moved, 1 - rate * decay)  # pyright: ignore[reportPrivateImportUsage]
        alike: dict[torch.Size, list[tuple[Tensor, Tensor]]] = defaultdict(
            list
        )  # of one shape: one stack
        for p, direction in zip(moved, map(_matrix, directions), strict=True):
            alike[direction.shape].append((p, direction))
        for shape, pairs in alike.items():
            steps = orthogonal(torch.stack([direction for _, direction in pairs]))
            changes: list[Tensor] = [
                step.view(p.shape) for (p, _), step in zip(pairs, steps.unbind(), strict=True)
            ]
            alpha = -rate * self.RMS * max(shape) ** 0.5
            torch._foreach_add_([p for p, _ in pairs], changes, alpha=alpha)  # pyright: ignore[reportPrivateImportUsage]


def _matrix(p: Tensor) -> Tensor:
    """Inputs by outputs, or outputs by inputs: of [taps, C, O] (model.conv) and of torch's [O, C, ...] alike."""
    return p.flatten(0, 1) if p.ndim == 3 else p.flatten(1)


def orthogonal(stack_BMN: Tensor, iterations: int = 5) -> Tensor:
    """Each matrix with its singular values brought near 1, between 0.7 and 1.2, by Newton and Schulz's iteration.

    The coefficients are those of kellerjordan.github.io/posts/muon: steepest at 0, with no limit at 1. fp32 in and out,
    contiguous; bf16 inside on a GPU, which the iteration bears.
    """
    tall = stack_BMN.shape[1] > stack_BMN.shape[2]
    x = stack_BMN.mT if tall else stack_BMN
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    x = x.bfloat16() if x.is_cuda else x
    for _ in range(iterations):
        square = x @ x.mT
        square = torch.baddbmm(square, square, square, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, square, x, beta=3.4445)
    return (x.mT if tall else x).to(stack_BMN.dtype, memory_format=torch.contiguous_format)


def make_optimizer(model: nn.Module, cfg: LoopConfig, device: torch.device) -> torch.optim.AdamW:
    """What cfg.optimizer names; weight decay on matrices only."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    muon = cfg.optimizer == "muon"
    matrices = [p for p in parameters if p.ndim > 1]
    of_muon = [
        p for p in matrices if muon and min(_matrix(p).shape) > 1
    ]  # a row or column has one direction
    taken = {id(p) for p in of_muon}
    groups = [
        {"params": of_muon, "weight_decay": cfg.weight_decay, "muon": True},
        {
            "params": [p for p in matrices if id(p) not in taken],
            "weight_decay": cfg.weight_decay,
            "muon": False,
        },
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0, "muon": False},
    ]
    kind = Muon if muon else torch.optim.AdamW
    return kind(
        [group for group in groups if group["params"]],
        lr=cfg.learning_rate,
        betas=cfg.betas,
        fused=device.type == "cuda",
    )


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Move the averaged weights towards the model's by 1 - decay; what is not trained stays, buffers are copied."""
    pairs = [
        (a, b)
        for a, b in zip(average.parameters(), model.parameters(), strict=True)
        if b.requires_grad
    ]
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
