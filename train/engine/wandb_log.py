"""Weights & Biases: the metrics of a run through the package wandb, if the user names a project."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.core.errors import UserError
from pipeline.core.files import write_atomically

ID_FILE = "wandb-id"  # in a run's directory, so that a resumed run continues its curves


class WandbLog:
    """Sends the metrics of a run to Weights & Biases, or keeps them in OUT/wandb.

    The environment variable WANDB_MODE=offline keeps them, and `wandb sync` sends them later.

    Args:
        out: Directory of the run.
        project: Name of the project.
        config: JSON content that describes the run.

    Raises:
        UserError: If the package is not installed, or the service cannot be used.
    """

    def __init__(self, out: Path, project: str, config: Mapping[str, Any]):
        try:
            import wandb
        except ImportError as error:
            raise UserError(
                "--loop.wandb-project needs the package wandb; pip install 'sparse3d[wandb]'"
            ) from error
        self._error: type[Exception] = wandb.Error
        id_file = out / ID_FILE
        if not id_file.exists():
            write_atomically(id_file, uuid.uuid4().hex[:12])
        try:
            self._run = wandb.init(
                project=project,
                id=id_file.read_text(encoding="utf-8").strip(),
                name="/".join(out.absolute().parts[-2:]),
                dir=out,
                resume="allow",
                config=dict(config),
                settings=wandb.Settings(console="off", silent=True),
            )
        except self._error as error:
            cause = " ".join(str(error).split())
            raise UserError(
                f"Weights & Biases cannot be used: {cause}; log in with wandb login, or set "
                "WANDB_MODE=offline"
            ) from error
        # A resumed run may repeat steps, which W&B's own counter would not accept.
        self._run.define_metric("*", step_metric="step")

    def log(self, group: str, step: int, metrics: Mapping[str, Any]) -> None:
        """Log the numbers among some metrics as "group/name"."""
        numbers = {
            f"{group}/{name}": value
            for name, value in metrics.items()
            if isinstance(value, int | float)
        }
        self._run.log({"step": step, **numbers})

    def close(self) -> None:
        """Finish the run. Metrics that could not be sent stay in OUT/wandb."""
        self._run.finish()
