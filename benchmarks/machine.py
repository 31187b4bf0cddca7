"""Description of the machine that a GPU benchmark ran on."""

from __future__ import annotations

import platform
from typing import Any

import torch

from pipeline.core.errors import UserError
from train.engine.checkpoint import provenance


def gpu_machine(device: torch.device) -> dict[str, Any]:
    """Return the GPU's name, the versions of Python, CUDA and packages, and the commit."""
    return {
        "gpu": torch.cuda.get_device_properties(device).name,
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        **provenance(),
    }


def require_gpu() -> torch.device:
    """Return the first GPU.

    Raises:
        UserError: If there is none.
    """
    if not torch.cuda.is_available():
        raise UserError("this benchmark needs a CUDA device, and none was found")
    return torch.device("cuda", 0)
