"""A model of three numbers for tests of the loop: what it learns and what went wrong is known exactly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from train.engine.config import LoopConfig
from train.engine.distributed import World
from train.engine.trainer import fit

CONFIG = {"model": "Line", "config": {"inputs": 3}, "training": {}}


class Line(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, 3))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + self.bias


@dataclass(frozen=True)
class Points:
    x: Tensor
    step: int
    tokens: int = 8
    samples: int = 8

    @property
    def metric_labels(self) -> dict[str, Any]:
        return {"resolution": 32}

    def to(self, device: torch.device) -> Points:
        return self


class Numbers:
    """A stream: batch n is the same whenever it is drawn, unless `change` says otherwise."""

    def __init__(self, change: Callable[[int, Tensor], Tensor] | None = None):
        self.step, self.change, self.closed = 0, change, False

    @property
    def state(self) -> dict[str, Any]:
        return {"step": self.step}

    def restore(self, state: Any) -> None:
        self.step = state["step"]

    def __next__(self) -> Points:
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(self.step))
        if self.change is not None:
            x = self.change(self.step, x)
        self.step += 1
        return Points(x, self.step - 1)

    def close(self) -> None:
        self.closed = True


class Fit:
    """Learns y = x . (1, 2, 3) with noise from torch's own generator, so that its state matters too."""

    def __init__(self, before_loss: Callable[[int], None] | None = None):
        self.model, self.before_loss = Line(), before_loss
        self.validated: list[int] = []
        self.sampled: list[Path] = []

    def losses(self, model: nn.Module, batch: Points) -> dict[str, Tensor]:
        if self.before_loss is not None:
            self.before_loss(batch.step)
        y = batch.x @ torch.tensor([1.0, 2.0, 3.0]) + 0.1 * torch.randn(len(batch.x))
        error = (model(batch.x)[:, 0] - y).square().mean()
        return {"loss": error, "error": error.sqrt()}

    def flops(self, batch: Points) -> float:
        return 48.0

    def validate(self, model: nn.Module) -> dict[str, float]:
        torch.randn(5)  # must not be noticed
        self.validated.append(1)
        assert not torch.is_grad_enabled()
        return {"loss": float(model(torch.ones(1, 3)))}

    def sample(self, model: nn.Module, folder: Path) -> None:
        (folder / "sample.txt").write_text("here")
        self.sampled.append(folder)


def run(
    out: Path,
    *,
    task: Fit | None = None,
    stream: Numbers | None = None,
    init: Path | None = None,
    **options: Any,
):
    """(steps done, task)"""
    defaults = {
        "steps": 30,
        "precision": "fp32",
        "warmup_steps": 3,
        "learning_rate": 0.1,
        "log_every": 5,
    }
    defaults |= {"checkpoint_every": 10, "validate_every": 0, "sample_every": 0, "ema_decay": 0.9}
    cfg = LoopConfig(**{**defaults, **options})
    task = task or Fit()
    config = {**CONFIG, "training": {"loop": {**defaults, **options}}}
    return fit(
        task, stream or Numbers(), cfg, out=out, world=World(), config=config, init=init
    ), task
