"""Optimizers (AdamW and Muon), averaged weights, and the check for bad gradients."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from train.engine.config import LoopConfig

PEAK_BF16_FLOPS = {  # dense FLOP/s by the data sheets
    "H200": 989e12,
    "H100": 989e12,
    "H800": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
}

# Number of spikes in a row that are skipped. More are not bad batches but a lasting change, out of
# which clipped steps lead.
MAX_SPIKES_IN_A_ROW = 5
MIN_NORMS = 20  # known norms from which on spikes are looked for


@dataclass
class GradientGuard:
    """Decides whether a gradient is applied or skipped."""

    spike_factor: float
    """A norm of this multiple of the median of recent norms is a spike."""
    clip_norm: float
    """A norm below this is never a spike."""
    max_bad_steps: int
    """Number of skipped gradients in a row after which the trainer ends the run."""
    norms: deque[float] = field(default_factory=lambda: deque(maxlen=100))
    """Norms of the recent finite gradients."""
    in_a_row: int = 0
    """Number of gradients skipped since the last one that was applied."""
    skipped: int = 0
    """Number of all skipped gradients."""

    def judge(self, loss: float, norm: float) -> str:
        """Decide about the gradient of a step.

        Args:
            loss: Loss of the global batch.
            norm: Norm of the gradient before clipping.

        Returns:
            "" if the gradient is to be applied, else why it is to be skipped.
        """
        finite = abs(loss) < float("inf") and norm < float("inf")  # both are false for NaN
        usual = median(self.norms) if len(self.norms) >= MIN_NORMS else None
        verdict = ""
        if not finite:
            verdict = "not finite"
        elif (
            usual is not None
            and self.in_a_row < MAX_SPIKES_IN_A_ROW
            and norm > max(self.spike_factor * usual, self.clip_norm)
        ):
            verdict = f"{norm / usual:.0f} times the usual gradient"
        if finite:
            self.norms.append(norm)  # also that of a spike, so that a lasting change becomes usual
        self.in_a_row = self.in_a_row + 1 if verdict else 0
        self.skipped += bool(verdict)
        return verdict

    def state(self) -> dict[str, Any]:
        """Return the JSON state for `restore`."""
        return {"norms": list(self.norms), "in_a_row": self.in_a_row, "skipped": self.skipped}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a state that `state` returned."""
        self.norms.clear()
        self.norms.extend(state["norms"])
        self.in_a_row = state["in_a_row"]
        self.skipped = state["skipped"]


class Muon(torch.optim.AdamW):
    """Muon for the parameter groups with `muon` set, AdamW for the others.

    A matrix moves along its Nesterov momentum with all singular values made equal, by
    0.2 * sqrt(longer side) times the learning rate. An element then moves as far as under AdamW, so
    both share one learning rate and weight decay. The weights of a convolution are one matrix of
    all its taps: they act on many voxels in the same way, and the output overshoots if each of them
    takes AdamW's full step at once.

    `step` deletes the gradients of Muon's parameters.

    Sources: kellerjordan.github.io/posts/muon and arXiv 2502.16982, section 2.2.
    """

    MOMENTUM = 0.95
    RMS = 0.2  # of AdamW's updates, which Muon's are scaled to

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update all parameters that have gradients."""
        for group in self.param_groups:
            moved = [p for p in group["params"] if p.grad is not None] if group["muon"] else []
            if moved:
                self._move(moved, self._directions(moved), group["lr"], group["weight_decay"])
        super().step()

    def _directions(self, moved: list[Tensor]) -> list[Tensor]:
        """Return the Nesterov momentum of each parameter and delete its gradient."""
        states = [self.state[p] for p in moved]
        for p, state in zip(moved, states, strict=True):
            if not state:  # AdamW requires an entry "step" when it loads a state
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
        # Matrices of one shape are orthogonalised together.
        same_shape: dict[torch.Size, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for p, direction in zip(moved, map(_matrix, directions), strict=True):
            same_shape[direction.shape].append((p, direction))
        for shape, pairs in same_shape.items():
            steps = orthogonal(torch.stack([direction for _, direction in pairs]))
            changes: list[Tensor] = [
                step.view(p.shape) for (p, _), step in zip(pairs, steps.unbind(), strict=True)
            ]
            alpha = -rate * self.RMS * max(shape) ** 0.5
            torch._foreach_add_([p for p, _ in pairs], changes, alpha=alpha)  # pyright: ignore[reportPrivateImportUsage]


def _matrix(p: Tensor) -> Tensor:
    """Return weights [taps, C, O] of model.conv or [O, C, ...] of torch as a matrix."""
    return p.flatten(0, 1) if p.ndim == 3 else p.flatten(1)


def orthogonal(stack_BMN: Tensor, iterations: int = 5) -> Tensor:
    """Bring the singular values of matrices near 1 (0.7 to 1.2) by Newton-Schulz iteration.

    The coefficients of kellerjordan.github.io/posts/muon are steepest at 0 and do not converge to
    exactly 1. On a GPU the iteration runs in bf16.

    Args:
        stack_BMN: [B, M, N] fp32.
        iterations: Number of iterations.

    Returns:
        [B, M, N] fp32, contiguous.
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
    """Make the optimizer that `cfg.optimizer` names, with weight decay on matrices only.

    Args:
        model: Parameters that require gradients are trained.
        cfg: Options of the trainer.
        device: Device of the model.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    muon = cfg.optimizer == "muon"
    matrices = [p for p in parameters if p.ndim > 1]
    # A single row or column has one singular value, so Muon would only fix its length.
    of_muon = [p for p in matrices if muon and min(_matrix(p).shape) > 1]
    ids = {id(p) for p in of_muon}
    of_adamw = [p for p in matrices if id(p) not in ids]
    vectors = [p for p in parameters if p.ndim <= 1]
    groups = [
        {"params": of_muon, "weight_decay": cfg.weight_decay, "muon": True},
        {"params": of_adamw, "weight_decay": cfg.weight_decay, "muon": False},
        {"params": vectors, "weight_decay": 0.0, "muon": False},
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
    """Move averaged weights towards the model's weights.

    Args:
        average: Copy of the model. Parameters that are not trained stay, and buffers are copied.
        model: The trained model.
        decay: The average becomes decay * average + (1 - decay) * model.
    """
    averaged: list[Tensor] = []
    trained: list[Tensor] = []
    for a, b in zip(average.parameters(), model.parameters(), strict=True):
        if b.requires_grad:
            averaged.append(a)
            trained.append(b)
    torch._foreach_lerp_(averaged, trained, 1 - decay)  # pyright: ignore[reportPrivateImportUsage]
    for a, b in zip(average.buffers(), model.buffers(), strict=True):
        a.copy_(b)


def device_name(device: torch.device) -> str:
    """Return the name of a GPU, such as "NVIDIA H200", or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def peak_flops(device: torch.device) -> float | None:
    """Return the dense bf16 FLOP/s of a GPU by its data sheet, or None if it is not known."""
    if device.type != "cuda":
        return None
    name = device_name(device)
    return next((peak for model, peak in PEAK_BF16_FLOPS.items() if model in name), None)
