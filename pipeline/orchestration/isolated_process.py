"""Runs one call at a time in a child that may crash, hang or eat memory without harm to anybody else.

A server process imports the pipeline once and forks a child for every call, so that a call does not pay the imports.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import importlib
import io
import os
import pickle
import resource
import select
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO

from pipeline.core.errors import RunError
from pipeline.core.files import is_disk_full

OUT_OF_MEMORY, DISK_FULL, RUN_ERROR = (
    86,
    87,
    88,
)  # exit codes of a child, chosen where nobody else's lie
PR_SET_PDEATHSIG = 1
POLL_S = 0.01


@dataclass(frozen=True, kw_only=True)
class ProcessExit:
    """How a call ended. `reason` is "" when it returned, else a fixed word; `detail` the last line of its log."""

    reason: str
    detail: str
    seconds: float
    peak_rss_bytes: int


@dataclass(frozen=True, kw_only=True)
class _Request:
    function: str  # "package.module:name"
    argument: bytes  # pickled: only the child, whose limits are set, unpacks it
    log: Path
    timeout_s: float
    memory_bytes: int
    memory_limit: int


class IsolatedProcess:
    """`call` runs `function(argument)` in a forked child; use it from one thread at a time.

    `warm_up` names a function without arguments that the server runs once, before the first fork: what it imports
    and compiles is there for every child.
    """

    def __init__(self, warm_up: str):
        self._warm_up = warm_up
        self._errors: IO[bytes] = io.BytesIO()
        self._server: subprocess.Popen[bytes] | None = None

    def call(
        self,
        function: str,
        argument: Any,
        *,
        log: Path,
        timeout_s: float,
        memory_bytes: int,
        memory_limit: int = resource.RLIMIT_AS,
    ) -> ProcessExit:
        """Runs to the end, to a crash or to a limit. RunError if the server itself dies.

        CUDA reserves address space for all of a machine's memory before it uses any: calls that use it are held by
        RLIMIT_DATA, which counts private memory that can be written to, reserved space and the GPU's own aside.
        """
        request = _Request(
            function=function,
            argument=pickle.dumps(argument),
            log=log,
            timeout_s=timeout_s,
            memory_bytes=memory_bytes,
            memory_limit=memory_limit,
        )
        server = self._running()
        answer = None
        try:
            _send(_pipe(server.stdin), request)
            # The server keeps the limit; a minute more, and it is the server that hangs.
            if select.select([_pipe(server.stdout)], [], [], timeout_s + 60)[0]:
                answer = _receive(_pipe(server.stdout))
        except (BrokenPipeError, EOFError):
            pass
        if not isinstance(answer, ProcessExit):
            self.close()
            self._errors.seek(0)
            lines = self._errors.read().decode(errors="replace").strip().splitlines() or [
                "no message"
            ]
            raise RunError(f"the process that isolates assets died: {lines[-1]}")
        return answer

    def close(self) -> None:
        """End the server and whatever runs below it."""
        if self._server is not None:
            self._server.kill()
            self._server.wait()
            with contextlib.suppress(BrokenPipeError):
                _pipe(self._server.stdin).close()
            _pipe(self._server.stdout).close()
            self._server = None

    def _running(self) -> subprocess.Popen[bytes]:
        if self._server is None or self._server.poll() is not None:
            self._errors = tempfile.TemporaryFile()  # noqa: SIM115  lives as long as the server
            single = dict.fromkeys(
                ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"), "1"
            )
            self._server = subprocess.Popen(
                [sys.executable, "-m", "pipeline.orchestration.isolated_process", self._warm_up],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                # One asset takes one core; Mesa draws in the calling thread with 0.
                env={
                    **os.environ,
                    **single,
                    "LP_NUM_THREADS": "0",
                    "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
                },
                start_new_session=True,  # Ctrl-C on a terminal goes to the driver alone
            )
            # Warm: compiling for the first time takes a minute, which no asset's limit should have to pay.
            with contextlib.suppress(EOFError):
                _receive(_pipe(self._server.stdout))
        return self._server


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """Fork a child for every request until the other side is gone."""
    while True:
        try:
            request = _receive(requests)
        except EOFError:
            return
        started = time.monotonic()
        server = os.getpid()
        pid = os.fork()
        if pid == 0:
            _child(request, server, (requests.fileno(), answers.fileno()))
        status, usage, timed_out = _wait(pid, request.timeout_s, requests)
        reason = "timeout" if timed_out else _reason(status)
        answer = ProcessExit(
            reason=reason,
            detail=_last_line(request.log) if reason else "",
            seconds=time.monotonic() - started,
            peak_rss_bytes=usage.ru_maxrss * 1024,
        )
        _send(answers, answer)


def _child(request: _Request, server: int, pipes: tuple[int, ...]) -> None:
    """Runs the call with its limits set; never returns."""
    code = 1
    try:
        os.setsid()
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != server:  # it died before the line above
            os._exit(1)
        log = os.open(request.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.dup2(log, 1)
        os.dup2(log, 2)
        for pipe in pipes:  # a child that held them would keep a dead server's client waiting
            os.close(pipe)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(request.memory_limit, (request.memory_bytes, request.memory_bytes))
        module, _, name = request.function.partition(":")
        getattr(importlib.import_module(module), name)(pickle.loads(request.argument))
        code = 0
    except MemoryError:
        code = OUT_OF_MEMORY
    except RunError as error:
        code = RUN_ERROR
        sys.stderr.write(f"{error}\n")
    except OSError as error:
        if is_disk_full(error):
            code = DISK_FULL
        elif error.errno == errno.ENOMEM:
            code = OUT_OF_MEMORY
        traceback.print_exc()
    finally:
        if sys.exc_info()[0] is not None:  # anything else: its last line is found in the log
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _wait(pid: int, timeout_s: float, requests: BinaryIO) -> tuple[int, Any, bool]:
    """(status, resource usage, timed out) of a child, which is killed at the limit or when nobody waits for it."""
    deadline = time.monotonic() + timeout_s
    timed_out = False
    while True:
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            _kill_group(
                pid
            )  # before the child is reaped, while its number cannot be anybody else's
            _, status, usage = os.wait4(pid, 0)
            return status, usage, timed_out
        if select.select([requests], [], [], POLL_S)[
            0
        ]:  # nothing is asked while a call runs: the other side is gone
            _kill_group(pid)
            os._exit(0)
        if time.monotonic() > deadline:
            timed_out = True
            _kill_group(pid)


def _kill_group(pid: int) -> None:
    for end in (os.killpg, os.kill):  # there is no group before the child has called setsid
        with contextlib.suppress(ProcessLookupError):
            end(pid, signal.SIGKILL)


def _reason(status: int) -> str:
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        return (
            "out_of_memory" if number == signal.SIGKILL else f"crashed_signal_{number}"
        )  # the kernel's OOM killer
    code = os.WEXITSTATUS(status)
    known = {0: "", OUT_OF_MEMORY: "out_of_memory", DISK_FULL: "disk_full", RUN_ERROR: "run_error"}
    return known.get(code, "error")


def _last_line(log: Path) -> str:
    if not log.exists():
        return ""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 4096))
        lines = file.read().decode(errors="replace").strip().splitlines()
    return lines[-1][:500] if lines else ""


def _send(pipe: BinaryIO, value: object) -> None:
    data = pickle.dumps(value)
    pipe.write(struct.pack("<Q", len(data)) + data)
    pipe.flush()


def _receive(pipe: BinaryIO) -> Any:
    header = pipe.read(8)
    if len(header) < 8:
        raise EOFError
    return pickle.loads(pipe.read(struct.unpack("<Q", header)[0]))


def _pipe(pipe: Any) -> BinaryIO:
    assert pipe is not None
    return pipe


def main(warm_up: str) -> None:
    requests = os.fdopen(os.dup(0), "rb", buffering=0)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # an import that prints must not talk into the protocol
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    module, _, name = warm_up.partition(":")
    getattr(importlib.import_module(module), name)()
    _send(answers, "warm")
    serve(requests, answers)


if __name__ == "__main__":
    # As a child of the module's proper name: what is pickled here must be found under it there.
    importlib.import_module("pipeline.orchestration.isolated_process").main(sys.argv[1])
