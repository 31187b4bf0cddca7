"""`python -m train.demo`: build data, train every stage, generate meshes, write a report."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from pipeline.core.cli import command, parse
from pipeline.core.errors import UserError
from train.demo.config import DEMO_SIZES, DemoConfig

log = logging.getLogger(__name__)

PROG = "python -m train.demo"


def main(args: Sequence[str]) -> None:
    cfg = parse(DemoConfig, args, prog=PROG)
    # The options are parsed before torch is imported, which takes seconds.
    import torch

    from train.demo.page import write_page
    from train.demo.plan import plan_demo
    from train.demo.runner import run_demo

    size = ("gpu" if torch.cuda.is_available() else "cpu") if cfg.size == "auto" else cfg.size
    if size == "gpu" and not torch.cuda.is_available():
        raise UserError("--size gpu needs a CUDA device and none was found; use --size cpu")
    started = time.monotonic()
    plan = plan_demo(cfg, DEMO_SIZES[size])
    log.info("The demo of size %s writes to %s. It uses %d threads.", size, cfg.out, plan.threads)
    costs = run_demo(plan)
    page = write_page(cfg.out, cfg.data, costs, size=size, seconds=time.monotonic() - started)
    log.info("The report is %s.", page)


if __name__ == "__main__":
    command(main)
