"""`python -m train.demo`: every step from shapes to generated meshes, small, with a report page at the end."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from pipeline.core.cli import parse
from pipeline.core.errors import RunError, UserError
from train.demo.page import StepTaken, write_page

log = logging.getLogger(__name__)

PROG = "python -m train.demo"


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Build data, train every stage, generate, evaluate, report. The same command goes on with what is not done."""

    size: Literal["auto", "cpu", "gpu"] = (
        "auto"  # gpu: more data, larger models; auto: where there is one
    )
    data: Path = Path("data/demo")
    out: Path = Path("runs/demo")


@dataclass(frozen=True, kw_only=True)
class Step:
    """One of our commands, as a user would type it after `python -m`."""

    name: str
    command: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is run: the steps of each phase's lanes follow each other, lanes run side by side, phases in turn."""

    phases: tuple[tuple[tuple[Step, ...], ...], ...]
    out: Path
    threads: int = field(default_factory=lambda: os.cpu_count() or 1)


@dataclass(frozen=True, kw_only=True)
class Size:
    """How large a demo is: the words that its commands get."""

    device: str
    preset: str
    resolution: str
    lanes: int  # of training side by side
    build: tuple[str, ...]
    vae: tuple[str, ...]
    structure: tuple[str, ...]
    dit: tuple[str, ...]
    sampling: tuple[str, ...]


SIZES = {
    "cpu": Size(  # about 14 minutes on two cores; fewer assets are learnt by heart sooner
        device="cpu",
        preset="tiny",
        resolution="64",
        lanes=2,
        build=("--limit", "24"),
        vae=("--bricks.no-symmetries", "--loop.steps", "700"),
        structure=("--vae.loop.steps", "300", "--flow.loop.steps", "800"),
        dit=("--flow.loop.steps", "800"),
        sampling=("--options.steps", "20", "--options.guidance", "2.0"),
    ),
    "gpu": Size(
        device="cuda",
        preset="small",
        resolution="256",
        lanes=1,
        build=(
            *("--limit", "96", "--resolutions", "256", "--topology-resolution", "256"),
            *("--views", "24", "--image-size", "512"),
        ),
        vae=("--bricks.resolutions", "256", "--loop.max-minutes", "4"),
        structure=("--vae.loop.max-minutes", "2", "--flow.loop.max-minutes", "4"),
        dit=("--flow.loop.max-minutes", "4"),
        sampling=("--options.steps", "50", "30", "--options.guidance", "3.0"),
    ),
}


def plan(cfg: DemoConfig, size: Size) -> Plan:
    """All commands of the demo. The two that do not need each other, VAE and structure, begin lanes of their own."""
    data, out = ("--data", str(cfg.data)), cfg.out
    common = (*data, "--device", size.device)
    flow = ("--resolution", size.resolution, "--held-out-views", "2")
    vae, structure, dit, export = (out / name for name in ("vae", "structure", "dit", "export"))
    latents = ("--latents", str(out / "latents"), "--vae", str(vae / "latest"))

    def step(module: str, *words: str | Path, name: str = "") -> Step:
        return Step(name=name or module.partition(".")[2], command=(module, *map(str, words)))

    def train(name: str, folder: Path, *words: str) -> Step:
        return step(f"train.{name}", "--preset", size.preset, *common, "--out", folder, *words)

    def judge(name: str, folder: str, *words: str) -> Step:
        given = (
            "generation",
            "--checkpoint",
            export,
            *common,
            "--samples",
            "20000",
            *size.sampling,
        )
        return step("train.evaluate", *given, "--out", out / folder, *words, name=name)

    to_latents = (
        train("vae", vae, *size.vae),
        step("train.encode", *common, *latents, "--resolutions", size.resolution),
        train(
            "dit", dit, *latents, *flow, "--samples", "0", *size.dit
        ),  # slower on two threads than on one
    )
    to_cells = (train("structure", structure, *flow, "--samples", "4", *size.structure),)
    collect = (
        "--vae",
        vae / "latest",
        "--structure",
        structure / "flow/latest",
        "--dit",
        dit / "latest",
    )
    reconstruct = (
        "--checkpoint",
        export / "vae",
        *common,
        "--resolutions",
        size.resolution,
        "--samples",
        "20000",
    )
    phases = (
        ((step("pipeline.build", "--preset", "smoke", "--out", cfg.data, *size.build),),),
        ((step("pipeline.verify", cfg.data),),),
        (to_latents, to_cells) if size.lanes == 2 else ((*to_latents, *to_cells),),
        ((step("train.export", *collect, "--out", export),),),
        (
            (
                step("train.evaluate", "vae", *reconstruct, "--pictures", "6", "--out", out / "reconstruction",
                     name="evaluate vae"),
                judge("evaluate generation of unseen shapes", "unseen", "--split", "val", "--limit", "2"),
            ),
            (judge("evaluate generation", "generation", "--limit", "10"),),
        ),
    )  # fmt: skip
    return Plan(phases=phases, out=out)


def run(steps: Plan) -> list[StepTaken]:
    """Everything, in order; what each step took. RunError, with the end of its log, for the first that fails.

    Whatever ends this early ends what is running, too.
    """
    taken: list[StepTaken] = []
    for lanes in steps.phases:
        runner = _Runner(logs=steps.out / "logs", threads=max(1, steps.threads // len(lanes)))
        with ThreadPoolExecutor(len(lanes)) as pool:
            results = [pool.submit(runner.follow, lane) for lane in lanes]
            try:
                wait(results, return_when=FIRST_EXCEPTION)
                for result in results:
                    if result.done():
                        result.result()
            except BaseException:
                runner.stop()
                raise
        taken += [step for result in results for step in result.result()]
    return taken


@dataclass(eq=False)
class _Runner:
    """Runs lanes of steps, each in a process of its own with its words in a log."""

    logs: Path
    threads: int
    running: set[subprocess.Popen[bytes]] = field(default_factory=set)
    stopped: bool = False

    def follow(self, lane: Sequence[Step]) -> list[StepTaken]:
        return [self._step(step) for step in lane if not self.stopped]

    def stop(self) -> None:
        """End what is running and begin nothing more."""
        self.stopped = True
        for process in list(self.running):
            process.terminate()

    def _step(self, step: Step) -> StepTaken:
        self.logs.mkdir(parents=True, exist_ok=True)
        path = self.logs / f"{step.name.replace(' ', '-')}.log"
        log.info("%s: python -m %s", step.name, " ".join(step.command))
        words = [sys.executable, "-m", *step.command]
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.threads)}
        started = time.monotonic()
        with path.open("wb") as file:
            process = subprocess.Popen(
                words, stdout=file, stderr=subprocess.STDOUT, env=environment
            )
            self.running.add(process)
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            self.running.discard(process)
        seconds = time.monotonic() - started
        if process.returncode:
            end = "\n".join(path.read_text(errors="replace").splitlines()[-8:])
            raise RunError(
                f"{step.name} ended with exit code {process.returncode} ({path}):\n{end}"
            )
        log.info("%s done in %.0f s", step.name, seconds)
        return StepTaken(
            name=step.name,
            command=" ".join(("python -m", *step.command)),
            seconds=seconds,
            cpu_seconds=usage.ru_utime + usage.ru_stime,
            peak_bytes=1024 * usage.ru_maxrss,
        )


def main(args: Sequence[str]) -> None:
    cfg = parse(DemoConfig, args, prog=PROG)
    size = ("gpu" if torch.cuda.is_available() else "cpu") if cfg.size == "auto" else cfg.size
    if size == "gpu" and not torch.cuda.is_available():
        raise UserError("--size gpu needs a CUDA device, none found; use --size cpu")
    started = time.monotonic()
    chosen = plan(cfg, SIZES[size])
    log.info("demo of size %s into %s, with %d threads", size, cfg.out, chosen.threads)
    taken = run(chosen)
    page = write_page(cfg.out, cfg.data, taken, size=size, seconds=time.monotonic() - started)
    log.info("open %s", page)
