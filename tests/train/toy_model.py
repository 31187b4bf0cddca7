"""A model with four parameters for tests of the trainer, whose optimum is known exactly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from train.engine.config import LoopConfig
from train.engine.distributed import World
from train.engine.trainer import Trainer

CONFIG = {"model": "Line", "config": {"inputs": 3}, "training": {}}


class Line(nn.Module):
    """A linear function of three inputs that starts at zero."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, 3))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + self.bias


@dataclass(frozen=True)
class PointBatch:
    """Eight points [8, 3] of one step."""

    x: Tensor
    step: int
    tokens: int = 8
    samples: int = 8

    @property
    def metric_labels(self) -> dict[str, Any]:
        return {"resolution": 32}

    def to(self, device: torch.device) -> PointBatch:
        return self


class PointStream:
    """A stream whose batch n is always the same, unless `change` changes it."""

    def __init__(self, change: Callable[[int, Tensor], Tensor] | None = None):
        self.step = 0
        self.change = change
        self.closed = False

    @property
    def state(self) -> dict[str, Any]:
        return {"step": self.step}

    def restore(self, state: Any) -> None:
        self.step = state["step"]

    def __next__(self) -> PointBatch:
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(self.step))
        if self.change is not None:
            x = self.change(self.step, x)
        self.step += 1
        return PointBatch(x, self.step - 1)

    def wait(self, timeout_s: float) -> bool:
        return True

    def close(self) -> None:
        self.closed = True


class LineTask:
    """Fits y = x . (1, 2, 3) with noise from torch's own generator, so that its state matters.

    `before_loss` is called with the number of each step.
    """

    def __init__(self, before_loss: Callable[[int], None] | None = None):
        self.model = Line()
        self.before_loss = before_loss
        self.validated: list[int] = []
        self.sampled: list[Path] = []

    def losses(self, model: nn.Module, batch: PointBatch) -> dict[str, Tensor]:
        if self.before_loss is not None:
            self.before_loss(batch.step)
        y = batch.x @ torch.tensor([1.0, 2.0, 3.0]) + 0.1 * torch.randn(len(batch.x))
        error = (model(batch.x)[:, 0] - y).square().mean()
        return {"loss": error, "error": error.sqrt()}

    def flops(self, batch: PointBatch) -> float:
        return 48.0

    def validate(self, model: nn.Module) -> dict[str, float]:
        torch.randn(5)  # the trainer must restore the random state
        self.validated.append(1)
        assert not torch.is_grad_enabled()
        return {"loss": float(model(torch.ones(1, 3)))}

    def sample(self, model: nn.Module, folder: Path) -> None:
        (folder / "sample.txt").write_text("a preview", encoding="utf-8")
        self.sampled.append(folder)


def run(
    out: Path,
    *,
    task: LineTask | None = None,
    stream: PointStream | None = None,
    **options: Any,
) -> tuple[int, LineTask]:
    """Train for 30 steps unless `options` say otherwise; return the steps done and the task."""
    options = {
        "steps": 30,
        "precision": "fp32",
        "warmup_steps": 3,
        "learning_rate": 0.1,
        "log_every": 5,
        "checkpoint_every": 10,
        "validate_every": 0,
        "sample_every": 0,
        "ema_decay": 0.9,
        **options,
    }
    task = task or LineTask()
    config = {**CONFIG, "training": {"loop": options}}
    trainer = Trainer(
        task,
        stream or PointStream(),
        LoopConfig(**options),
        out=out,
        world=World(),
        config=config,
    )
    return trainer.run(), task
