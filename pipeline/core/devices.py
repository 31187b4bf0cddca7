"""The `--device` option of all commands: "auto", "cpu", "cuda" or "cuda:N"."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated

import tyro

from pipeline.core.errors import UserError

if TYPE_CHECKING:
    import torch

# The type of the option in a configuration, which checks it with `check_device`.
Device = Annotated[str, tyro.conf.arg(metavar="{auto,cpu,cuda,cuda:N}")]


def check_device(name: str) -> str:
    """Return the name of a device unchanged if it is valid. This does not import torch.

    Args:
        name: "auto", "cpu", "cuda", or "cuda:N" with the number N of a GPU.

    Raises:
        ValueError: If `name` is anything else.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:[0-9]+)?", name):
        raise ValueError(f'device must be "auto", "cpu", "cuda" or "cuda:N", got {name!r}')
    return name


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """Return the device that a `--device` option names, and make it the current one.

    Triton launches kernels on the current CUDA device, whatever the device of their arguments.

    Args:
        name: "auto", "cpu", "cuda" or "cuda:N". "auto" is a GPU if torch finds one, else the CPU.
        local_rank: Number of this process on its machine. "auto" and "cuda" take the GPU of this
            number.

    Raises:
        UserError: If `name` is not valid, if there is no such GPU, or if several processes are to
            share "cuda:N".
    """
    try:
        check_device(name)
    except ValueError as error:
        raise UserError(f"--{error}") from None
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu" or (name == "auto" and not count):
        return torch.device("cpu")
    _, _, number = name.partition(":")
    if number and local_rank:
        raise UserError(
            f"--device {name} names one GPU, but this is process {local_rank} of its machine; "
            "use --device cuda"
        )
    index = int(number) if number else local_rank
    if index >= count:
        who = f"rank {local_rank} of this machine" if local_rank else f"--device {name}"
        ranks = f" or --nproc-per-node {count}" if count and not number else ""
        raise UserError(f"{who} needs a CUDA device, {count} found; use --device cpu{ranks}")
    torch.cuda.set_device(index)
    return torch.device("cuda", index)
