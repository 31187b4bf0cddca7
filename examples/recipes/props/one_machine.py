"""The props recipe on one machine with many cores and one GPU, without Ray and without a network.

    python -m examples.recipes.props.one_machine --folder FOLDER --minutes 27

The program runs the commands of `train.sh`, those that do not need each other at the same time: the
structure stage trains beside the SS-VAE and the SS-DiT. MINUTES are divided among the commands, so
that an export and its evaluation are always made. A program that was killed continues when it is
started again: builds and runs resume, and commands that are complete are not repeated. The results
are packed into files of limited size.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import shlex
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from examples.recipes.props.make_list import HERE
from pipeline.core.cli import command, parse
from pipeline.core.errors import RunError
from pipeline.core.files import write_atomically
from pipeline.core.hashing import sha256_of
from pipeline.core.signals import Stop, note_signals

log = logging.getLogger(__name__)

PROG = "python -m examples.recipes.props.one_machine"
PR_SET_PDEATHSIG = 1  # option of prctl: the signal that a process gets when its parent dies
POLL_S = 0.2
STOP_S = 60.0  # for a command that is told to stop: it finishes a step and writes a checkpoint
ATTEMPTS = 2  # of a command that fails
BAD_REQUEST = 2  # exit code of a command whose options are wrong, which is not repeated
SEEDS = ("0", "1", "2")

# The time plan. What a training command gets is its share of the time from its start to the end of
# training. The tail after that is for the export and the evaluation.
TAIL_SHARE = 0.2
MOST_TAIL_S = 300.0
STARTUP_S = 20.0  # of a training command before its own clock starts
LEAST_TRAINING_S = 3.0
SHARES = {"vae": 0.4, "dit": 1.0, "occupancy": 0.12, "structure": 1.0}


@dataclass(frozen=True, kw_only=True)
class OneMachineConfig:
    """Build, train, export and evaluate the props on one machine within a given time."""

    folder: Path
    """Directory of the files of the list, at the paths of its column "file"."""
    list: Path = HERE / "shapes.csv"
    """List of the assets, with the columns of shapes.csv."""
    out: Path = Path("runs/props")
    """Directory of the build, the runs, the export and the evaluation."""
    minutes: float = 27.0
    """Minutes from the start of this program within which everything ends. The build is not cut
    short."""
    results: Path | None = None
    """Directory of the packed results. None takes `results` in --out."""
    part_mb: float = 15.0
    """Largest size of a file of the packed results in MB."""
    workers: int | None = None
    """Number of processes that build, and that evaluate. None takes the cores but one."""
    preset: str = "props"
    """Preset of the training commands."""
    resolution: int = 256
    """Resolution of the build that the preset trains at."""
    build: str = "--views 24 --image-size 128 --image-format webp"
    """Options of `pipeline.build` besides those that the program gives."""
    vae: str = ""
    """Further options of `train.vae`."""
    structure: str = ""
    """Further options of `train.structure`, for both of its parts."""
    dit: str = ""
    """Further options of `train.dit`."""
    export: str = "--precision bf16 --steps 25 12 --guidance 3"
    """Options of `train.export` besides those that the program gives."""
    evaluate: str = "--samples 20000"
    """Further options of `train.evaluate generation`."""

    def __post_init__(self) -> None:
        if not self.minutes > 0:
            raise ValueError(f"minutes must be positive, got {self.minutes}")
        if not self.part_mb > 0:
            raise ValueError(f"part_mb must be positive, got {self.part_mb}")
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"workers must be 1 or more, got {self.workers}")

    @property
    def packed(self) -> Path:
        """Directory of the packed results."""
        return self.out / "results" if self.results is None else self.results


@dataclass(frozen=True, kw_only=True)
class TimePlan:
    """When training and everything end, in seconds of `time.monotonic`."""

    training_end: float
    end: float

    @classmethod
    def of(cls, started: float, minutes: float) -> TimePlan:
        """Divide the time of a program that started at `started`."""
        end = started + 60 * minutes
        return cls(training_end=end - min(MOST_TAIL_S, TAIL_SHARE * 60 * minutes), end=end)

    def training_minutes(self, name: str, now: float) -> float:
        """Return the value of --loop.max-minutes of a training command that starts now."""
        seconds = SHARES[name] * (self.training_end - now) - STARTUP_S
        return max(seconds, LEAST_TRAINING_S) / 60


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A command of the program.

    Args:
        name: Its name, which is also that of its log.
        after: Names of the phases that must be complete before.
        words: Returns the words after `python`, given the minutes of training, which are 0 for
            commands that do not train.
        ends: Whether the command is stopped at the end of the time plan.
    """

    name: str
    after: tuple[str, ...]
    words: Callable[[float], Sequence[object]]
    ends: bool = False


def phases_of(cfg: OneMachineConfig, cores: int) -> list[Phase]:
    """Return the commands of the program in an order in which they can run one after another.

    Args:
        cfg: Options of the program.
        cores: Number of cores of the machine.
    """
    workers = cfg.workers or max(1, cores - 1)
    loaders = max(1, cores // 2 - 1)  # of each of the two training commands of a time
    out, data = cfg.out, cfg.out / "data"
    source = f"github:{cfg.list}?folder={cfg.folder}"
    stage = ("--preset", cfg.preset, "--data", data)
    vae = ("--vae", out / "vae/latest")
    export = out / "export"
    loop = "loop.max-minutes"

    def structure(part: str) -> Callable[[float], Sequence[object]]:
        return lambda minutes: (
            *("-m", "train.structure", *stage, "--part", part, "--out", out / "structure"),
            *("--workers", loaders, f"--{part}.{loop}", minutes, *shlex.split(cfg.structure)),
        )

    def generation(name: str, workers: int, *options: str) -> Callable[[float], Sequence[object]]:
        return lambda _: (
            *("-m", "train.evaluate", "generation", "--checkpoint", export, "--data", data),
            *("--split", "val", "--seeds", *SEEDS, "--workers", workers, *options),
            *("--out", out / "evaluation" / name, *shlex.split(cfg.evaluate)),
        )

    of_image = max(1, 2 * workers // 3)  # the evaluation from the image takes longer
    return [
        Phase(name="compile", after=(), words=lambda _: ("-c", COMPILE)),
        Phase(
            name="build",
            after=("compile",),
            words=lambda _: (
                *("-m", "pipeline.build", "--executor", "processes", "--workers", workers),
                *("--source", source, "--ids", cfg.list, "--split-column", "split"),
                *("--resolutions", cfg.resolution, "--no-report", "--out", data),
                *shlex.split(cfg.build),
            ),
        ),
        Phase(name="verify", after=("build",), words=lambda _: ("-m", "pipeline.verify", data)),
        Phase(
            name="vae",
            after=("build",),
            words=lambda minutes: (
                *("-m", "train.vae", *stage, "--out", out / "vae", f"--{loop}", minutes),
                *("--bricks.workers", loaders, *shlex.split(cfg.vae)),
            ),
        ),
        Phase(name="occupancy", after=("build",), words=structure("vae")),
        Phase(name="structure", after=("occupancy",), words=structure("flow")),
        Phase(
            name="encode",
            after=("vae",),
            words=lambda _: (
                *("-m", "train.encode", *vae, "--data", data, "--quarter-turns"),
                *("--workers", loaders),
            ),
        ),
        Phase(
            name="dit",
            after=("encode",),
            words=lambda minutes: (
                *("-m", "train.dit", *stage, *vae, "--out", out / "dit", "--workers", loaders),
                *(f"--flow.{loop}", minutes, *shlex.split(cfg.dit)),
            ),
        ),
        Phase(  # beside the training of the SS-DiT; it compiles what the other evaluations need
            name="evaluate-vae",
            after=("encode",),
            words=lambda _: (
                *("-m", "train.evaluate", "vae", "--checkpoint", out / "vae/latest"),
                *("--data", data, "--resolutions", cfg.resolution, "--samples", 20000),
                *("--out", out / "evaluation/vae"),
            ),
            ends=True,
        ),
        Phase(
            name="export",
            after=("structure", "dit"),
            words=lambda _: (
                *("-m", "train.export", *vae, "--structure", out / "structure/flow/latest"),
                *("--dit", out / "dit/latest", "--out", export, *shlex.split(cfg.export)),
            ),
        ),
        Phase(
            name="evaluate-image",
            after=("export", "evaluate-vae"),
            words=generation("image", of_image),
            ends=True,
        ),
        Phase(
            name="evaluate-cells",
            after=("export", "evaluate-vae"),
            words=generation("cells", max(1, workers - of_image), "--cells", "stored"),
            ends=True,
        ),
    ]


# Several processes that compile the same functions at the same time can fail.
COMPILE = (
    "from pipeline.orchestration.asset_stages import warm_up; warm_up(); "
    "from model.inference.warm_up import warm_up; warm_up()"
)


@dataclass
class _Running:
    """A command that runs."""

    phase: Phase
    process: subprocess.Popen[bytes]
    started: float
    is_stopped: bool = False  # because the time is over


class Program:
    """Runs phases as soon as what they need is complete.

    Args:
        phases: The phases.
        out: Directory of their records, OUT/phases, and of their output, OUT/logs.
        plan: When they end.
    """

    def __init__(self, phases: Sequence[Phase], out: Path, plan: TimePlan):
        self.phases = phases
        self.plan = plan
        self.records, self.logs = out / "phases", out / "logs"
        self.done = {phase.name for phase in phases if self._record(phase).exists()}
        self.attempts: dict[str, int] = {}
        self.failed: dict[str, str] = {}  # reason by name
        self.running: dict[str, _Running] = {}

    def run(self, stop: Stop, after_each: Callable[[], None]) -> None:
        """Run everything that can be run.

        Args:
            stop: The signal that ends the program, if any.
            after_each: Called after each phase that is complete.

        Raises:
            Stopped: After a signal, when the commands have stopped.
        """
        self.logs.mkdir(parents=True, exist_ok=True)
        self.records.mkdir(parents=True, exist_ok=True)
        try:
            while True:
                for phase in self.phases:
                    if self._can_start(phase):
                        self._start(phase)
                if not self.running:
                    return
                time.sleep(POLL_S)
                stop.check()
                for running in list(self.running.values()):
                    if running.phase.ends and time.monotonic() > self.plan.end:
                        self._end(running)
                    if running.process.poll() is not None:
                        self._finish(running, after_each)
        finally:
            self._stop_all()

    def _record(self, phase: Phase) -> Path:
        return self.records / f"{phase.name}.json"

    def _can_start(self, phase: Phase) -> bool:
        name = phase.name
        if name in self.done or name in self.failed or name in self.running:
            return False
        if not self.done.issuperset(phase.after):
            return False
        if phase.ends and time.monotonic() > self.plan.end:
            self.failed[name] = "not started, the time is over"
            return False
        return True

    def _start(self, phase: Phase) -> None:
        now, name = time.monotonic(), phase.name
        minutes = self.plan.training_minutes(name, now) if name in SHARES else 0.0
        words = [str(word) for word in phase.words(minutes)]
        self.attempts[name] = self.attempts.get(name, 0) + 1
        log.info("%s starts%s.", name, f" for {minutes:.1f} minutes" if minutes else "")
        with (self.logs / f"{name}.log").open("ab") as output:
            output.write(f"$ python {shlex.join(words)}\n".encode())
            output.flush()
            process = subprocess.Popen(
                [sys.executable, *words],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )
        self.running[name] = _Running(phase, process, now)

    def _end(self, running: _Running) -> None:
        """Kill a command because the time is over."""
        running.is_stopped = True
        os.killpg(running.process.pid, signal.SIGKILL)
        running.process.wait()

    def _finish(self, running: _Running, after_each: Callable[[], None]) -> None:
        name, code = running.phase.name, running.process.returncode
        del self.running[name]
        seconds = time.monotonic() - running.started
        if running.is_stopped:
            self.failed[name] = f"ended after {seconds:.0f} s, because the time is over"
        elif code == 0:
            write_atomically(
                self._record(running.phase),
                json.dumps({"seconds": round(seconds, 1), "attempts": self.attempts[name]}) + "\n",
            )
            self.done.add(name)
            log.info("%s is complete after %.0f s.", name, seconds)
            after_each()
        elif code != BAD_REQUEST and self.attempts[name] < ATTEMPTS:
            log.warning("%s ended with code %d after %.0f s. It is repeated.", name, code, seconds)
        else:
            self.failed[name] = f"ended with code {code}, see {self.logs / name}.log"
        if name in self.failed:
            log.warning("%s %s.", name, self.failed[name])

    def _stop_all(self) -> None:
        """Let the commands that run write a checkpoint and stop."""
        for running in self.running.values():
            if running.process.poll() is None:
                running.process.terminate()
        deadline = time.monotonic() + STOP_S
        for running in self.running.values():
            try:
                running.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                os.killpg(running.process.pid, signal.SIGKILL)
                running.process.wait()


def _die_with_parent() -> None:
    """End this process when its parent ends, so that no command outlives a killed program."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def pack(out: Path, packed: Path, part_bytes: int) -> list[Path]:
    """Pack the export, the evaluation, the metrics and the logs into files of limited size.

    `cat results.tar.* | tar x` unpacks them. Generated meshes are left out. Each file is replaced
    as a whole.

    Args:
        out: Directory of the program.
        packed: Directory of the files, which also gets their SHA256SUMS.
        part_bytes: Largest size of a file.

    Returns:
        The files.
    """
    packed.mkdir(parents=True, exist_ok=True)
    archive = packed / ".results.tar"
    patterns = ("export/**/*", "evaluation/*/*", "**/metrics.jsonl", "logs/*", "phases/*")
    files = {path for pattern in patterns for path in out.glob(pattern) if path.is_file()}
    with tarfile.open(archive, "w") as tar:
        for path in sorted(files):
            tar.add(path, path.relative_to(out), recursive=False)
    parts = []
    with archive.open("rb") as file:
        while content := file.read(part_bytes):
            parts.append(packed / f"results.tar.{len(parts):03d}")
            write_atomically(parts[-1], content)
    archive.unlink()
    for old in set(packed.glob("results.tar.*")) - set(parts):
        old.unlink()
    sums = "".join(f"{sha256_of(part)}  {part.name}\n" for part in parts)
    write_atomically(packed / "SHA256SUMS", sums)
    return parts


def run(cfg: OneMachineConfig, phases: Sequence[Phase]) -> Mapping[str, str]:
    """Run the phases of the program and pack their results.

    Returns:
        The reason of each phase that is not complete, by name.
    """
    started = time.monotonic()
    program = Program(phases, cfg.out, TimePlan.of(started, cfg.minutes))
    if program.done:
        log.info("Resuming: %s are complete.", ", ".join(sorted(program.done)))

    def pack_results() -> None:
        if program.done & {"export", "structure", "dit"}:
            pack(cfg.out, cfg.packed, int(cfg.part_mb * 1e6))

    with note_signals() as stop:
        program.run(stop, pack_results)
    parts = pack(cfg.out, cfg.packed, int(cfg.part_mb * 1e6))
    size = sum(part.stat().st_size for part in parts) / 1e6
    log.info("%s has %d files of results, %.1f MB.", cfg.packed, len(parts), size)
    log.info("The program took %.0f s.", time.monotonic() - started)
    missing = [phase.name for phase in phases if phase.name not in program.done]
    return {name: program.failed.get(name, "did not start") for name in missing}


def main(args: Sequence[str]) -> None:
    """Parse the options and run the program."""
    cfg = parse(OneMachineConfig, args, prog=PROG)
    missing = run(cfg, phases_of(cfg, len(os.sched_getaffinity(0))))
    if missing:
        reasons = "; ".join(f"{name} {reason}" for name, reason in missing.items())
        raise RunError(f"not everything is complete: {reasons}")


if __name__ == "__main__":
    command(main)
