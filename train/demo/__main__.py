"""`python -m train.demo`: shipped weights first, then data, training, meshes and a report."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipeline.core.cli import command, parse
from pipeline.core.errors import UserError
from train.demo.config import DEMO_SIZES, HELD_OUT_CHECKPOINT, DemoConfig, DemoSize

if TYPE_CHECKING:
    from train.demo.held_out import HeldOutRow
    from train.demo.runner import CommandCost

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
    costs, held_out = show_held_out(cfg, DEMO_SIZES[size])
    costs += run_demo(plan)
    seconds = time.monotonic() - started
    page = write_page(cfg.out, cfg.data, costs, held_out, size=size, seconds=seconds)
    log.info("The report is %s.", page)


def show_held_out(cfg: DemoConfig, size: DemoSize) -> tuple[list[CommandCost], list[HeldOutRow]]:
    """Generate meshes from held-out pictures with the shipped weights and write a page of them.

    Returns:
        The cost of the command and the rows of the page. Both are empty, with a warning, if the
        installation does not have the weights.

    Raises:
        RunError: If the command fails, or the package has no stored results.
    """
    from model.inference.checkpoint_source import find_checkpoint
    from train.demo.config import HELD_OUT_FOLDER, LIVE_PICTURES
    from train.demo.held_out import read_pictures, rows_of_demo, write_held_out_page
    from train.demo.plan import held_out_meshes, plan_held_out
    from train.demo.runner import run_demo

    try:
        find_checkpoint(HELD_OUT_CHECKPOINT)
    except UserError as error:
        log.warning("The demo starts with training, without meshes of shipped weights: %s", error)
        return [], []
    pictures = [HELD_OUT_FOLDER / picture.image for picture in read_pictures()[:LIVE_PICTURES]]
    costs = run_demo(plan_held_out(cfg, size, pictures))
    rows = rows_of_demo(held_out_meshes(cfg.out))
    page = write_held_out_page(held_out_meshes(cfg.out) / "index.html", rows)
    log.info("%s shows meshes of objects that the shipped weights never saw.", page)
    return costs, rows


if __name__ == "__main__":
    command(main)
