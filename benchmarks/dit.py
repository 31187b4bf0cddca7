"""`python -m benchmarks.dit steps | parts | gradients | learn`: cost and precision of the SS-DiT.

`steps`, `parts` and `gradients` need only a GPU. `learn` trains for minutes. It also needs a build
with bricks at one resolution and renders.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from benchmarks.dit_config import GradientsConfig, LearnConfig, PartsConfig, StepsConfig
from pipeline.core.cli import command
from pipeline.core.files import write_atomically
from pipeline.core.subcommands import parse_subcommand

PROG = "python -m benchmarks.dit"
SUBCOMMANDS = {
    "steps": StepsConfig,
    "parts": PartsConfig,
    "gradients": GradientsConfig,
    "learn": LearnConfig,
}


def main(args: Sequence[str]) -> None:
    name, cfg = parse_subcommand(SUBCOMMANDS, args, prog=PROG)
    # The options are parsed before torch is imported, which takes seconds.
    from benchmarks.gpu import gpu_machine, require_gpu

    device = require_gpu()
    cfg.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"machine": gpu_machine(device), "rows": []}

    def save() -> None:
        text = json.dumps(results, indent=1, default=str).replace("Infinity", "null")
        write_atomically(cfg.out / f"dit-{name}.json", text + "\n")

    if name == "steps":
        from benchmarks.dit_steps import time_steps

        time_steps(cfg, device, results["rows"], save)
    elif name == "parts":
        from benchmarks.dit_parts import time_parts

        time_parts(cfg, device, results["rows"], save)
    elif name == "gradients":
        from benchmarks.dit_gradients import gradient_errors

        results |= gradient_errors(device, blocks=cfg.blocks)
    else:
        from benchmarks.dit_learning import learn

        results |= learn(cfg, device)
    save()


if __name__ == "__main__":
    command(main)
