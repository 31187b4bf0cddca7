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

from pipeline.schema import RunError, UserError
from train.command import command, parse
from train.demo_page import StepTaken, write_page

log = logging.getLogger(__name__)

PROG = "python -m train.demo"


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Build data, train every stage, generate, evaluate, report. The same command goes on with what is not done."""

    size: Literal["auto", "cpu", "gpu"] = "auto"  # gpu: more data, larger models; auto: where there is one
    data: Path = Path("data/smoke")
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
    build: Path
    out: Path
    note: str
    threads: int = field(default_factory=lambda: os.cpu_count() or 1)


def plan(cfg: DemoConfig, size: str) -> Plan:
    """All commands of the demo. The two halves that do not need each other, VAE and structure, train side by side."""
    gpu = size == "gpu"
    data, out = str(cfg.data), cfg.out
    if gpu:
        resolution, preset, device = "256", "small", "cuda"
        build = ("--limit", "96", "--resolutions", "256", "--topology-resolution", "256", "--views", "24",
                 "--image-size", "512")  # fmt: skip
        minutes = ("--loop.max-minutes", "4")
        flow = ("--flow.loop.max-minutes", "4")
        occupancy = ("--vae.loop.max-minutes", "2")
        sampling = ("--options.steps", "50", "30", "--options.guidance", "3.0")
    else:
        resolution, preset, device = "64", "tiny", "cpu"
        build, minutes, occupancy = (), (), ("--vae.loop.steps", "300")
        flow = ()
        sampling = ("--options.steps", "20", "--options.guidance", "2.0")
    held_out = ("--held-out-views", "2")
    common = ("--data", data, "--device", device)

    def train(name: str, *words: str) -> Step:
        return Step(name=name, command=(f"train.{name}", "--preset", preset, *common, *words))

    vae = train("vae", "--out", str(out / "vae"), *(("--bricks.resolutions", resolution) if gpu else ()), *minutes)
    encode = Step(
        name="encode",
        command=("train.encode", "--vae", str(out / "vae/latest"), *common, "--resolutions", resolution,
                 "--latents", str(out / "latents")),
    )  # fmt: skip
    dit = train(
        "dit", "--latents", str(out / "latents"), "--vae", str(out / "vae/latest"), "--out", str(out / "dit"),
        "--resolution", resolution, *held_out, "--samples", "0", *flow,
    )  # fmt: skip
    structure = train(
        "structure", "--out", str(out / "structure"), "--resolution", resolution, *held_out, "--samples", "4",
        *occupancy, *flow,
    )  # fmt: skip
    export = Step(
        name="export",
        command=("train.export", "--vae", str(out / "vae/latest"), "--structure", str(out / "structure/flow/latest"),
                 "--dit", str(out / "dit/latest"), "--out", str(out / "export")),
    )  # fmt: skip
    judge = ("--checkpoint", str(out / "export"), *common, "--samples", "20000", *sampling)
    phases = (
        (
            (
                Step(name="build", command=("pipeline.build", "--preset", "smoke", "--out", data, *build)),
                Step(name="verify", command=("pipeline.verify", data)),
            ),
        ),
        ((vae, encode, dit), (structure,)) if not gpu else ((vae, encode, dit, structure),),
        ((export,),),
        (
            (
                Step(
                    name="evaluate vae",
                    command=("train.evaluate", "vae", "--checkpoint", str(out / "export/vae"), *common, "--resolutions",
                             resolution, "--samples", "20000", "--pictures", "6", "--out", str(out / "reconstruction")),
                ),
            ),
            (
                Step(
                    name="evaluate generation",
                    command=("train.evaluate", "generation", *judge, "--limit", "12", "--out", str(out / "generation")),
                ),
                Step(
                    name="evaluate generation of unseen shapes",
                    command=("train.evaluate", "generation", *judge, "--split", "val", "--limit", "3", "--out",
                             str(out / "unseen")),
                ),
            ),
        ),
    )  # fmt: skip
    return Plan(phases=phases, build=cfg.data, out=out, note=size)


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
            process = subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT, env=environment)
            self.running.add(process)
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            self.running.discard(process)
        seconds = time.monotonic() - started
        if process.returncode:
            end = "\n".join(path.read_text(errors="replace").splitlines()[-8:])
            raise RunError(f"{step.name} ended with exit code {process.returncode} ({path}):\n{end}")
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
    chosen = plan(cfg, size)
    log.info("demo of size %s into %s, with %d threads", size, cfg.out, chosen.threads)
    taken = run(chosen)
    page = write_page(cfg.out, cfg.data, taken, size=size, seconds=time.monotonic() - started)
    log.info("open %s", page)


if __name__ == "__main__":
    command(main)
