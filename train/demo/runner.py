"""Runs the commands of a demo as processes and measures what each of them costs."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.core.errors import RunError
from train.demo.plan import Command, DemoPlan, Sequence

log = logging.getLogger(__name__)

QUOTED_LINES = 8  # of the log of a command that failed


@dataclass(frozen=True, kw_only=True)
class CommandCost:
    """What one command of the demo cost.

    Args:
        name: Name of the command.
        command_line: The command as a user would type it.
        seconds: Wall time.
        cpu_seconds: CPU time of the process and its children.
        peak_bytes: Largest resident memory of the process.
    """

    name: str
    command_line: str
    seconds: float
    cpu_seconds: float
    peak_bytes: int


def run_demo(plan: DemoPlan) -> list[CommandCost]:
    """Run all commands of a demo.

    If a command fails, or the demo is stopped, the commands that still run are terminated.

    Returns:
        The cost of each command, in the order of the plan.

    Raises:
        RunError: If a command fails. The message ends with the last lines of its log.
    """
    costs: list[CommandCost] = []
    for group in plan.groups:
        runner = _GroupRunner(logs=plan.out / "logs", threads=max(1, plan.threads // len(group)))
        with ThreadPoolExecutor(len(group)) as pool:
            results = [pool.submit(runner.run_sequence, sequence) for sequence in group]
            try:
                wait(results, return_when=FIRST_EXCEPTION)
                for result in results:
                    if result.done():
                        result.result()
            except BaseException:
                runner.stop()
                raise
        costs += [cost for result in results for cost in result.result()]
    return costs


@dataclass(eq=False)
class _GroupRunner:
    """Runs the sequences of one group. Each command is a process that writes to a log file."""

    logs: Path
    threads: int  # of each command
    processes: set[subprocess.Popen[bytes]] = field(default_factory=set)  # that run now
    stopped: bool = False

    def run_sequence(self, sequence: Sequence) -> list[CommandCost]:
        return [self._run(command) for command in sequence if not self.stopped]

    def stop(self) -> None:
        """Terminate the processes that run and start no others."""
        self.stopped = True
        for process in list(self.processes):
            process.terminate()

    def _run(self, command: Command) -> CommandCost:
        self.logs.mkdir(parents=True, exist_ok=True)
        path = self.logs / f"{command.name.replace(' ', '-')}.log"
        command_line = " ".join(("python -m", *command.arguments))
        log.info("%s: running %s", command.name, command_line)
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.threads)}
        started = time.monotonic()
        with path.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", *command.arguments],
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
            )
            self.processes.add(process)
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            self.processes.discard(process)
        seconds = time.monotonic() - started
        if process.returncode:
            last_lines = path.read_text(errors="replace", encoding="utf-8").splitlines()[
                -QUOTED_LINES:
            ]
            raise RunError(
                f"{command.name} ended with exit code {process.returncode} (log: {path}):\n"
                + "\n".join(last_lines)
            )
        log.info("%s: done in %.0f s", command.name, seconds)
        return CommandCost(
            name=command.name,
            command_line=command_line,
            seconds=seconds,
            cpu_seconds=usage.ru_utime + usage.ru_stime,
            peak_bytes=1024 * usage.ru_maxrss,
        )
