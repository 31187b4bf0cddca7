"""Runs function calls in child processes that may crash, hang or run out of memory.

A server process imports the pipeline once and forks a child for every call, so a call does not wait
for imports.
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
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO

from pipeline.core.errors import RunError
from pipeline.core.files import is_disk_full

# Exit codes of a child, chosen so that libraries do not use them.
OUT_OF_MEMORY = 86
DISK_FULL = 87
RUN_ERROR = 88
REASONS = {0: "", OUT_OF_MEMORY: "out_of_memory", DISK_FULL: "disk_full", RUN_ERROR: "run_error"}
PR_SET_PDEATHSIG = 1  # option of prctl: the signal that the child gets when its parent dies
POLL_S = 0.01
SERVER_GRACE_S = 60.0  # after a call's time limit, until the server itself counts as hanging


@dataclass(frozen=True, kw_only=True)
class ProcessExit:
    """How a call ended.

    Args:
        reason: "" if the call returned, else "timeout", "out_of_memory", "disk_full", "run_error",
            "error" or "crashed_signal_<N>".
        detail: Last line of the call's log. "" if the call returned.
        seconds: Duration of the call.
        peak_rss_bytes: Largest resident memory of the child.
    """

    reason: str
    detail: str
    seconds: float
    peak_rss_bytes: int


@dataclass(frozen=True, kw_only=True)
class _Request:
    """A call as it is sent to the server. `argument` is unpickled only under the child's limits."""

    function: str
    argument: bytes
    log: Path
    timeout_s: float
    memory_bytes: int
    memory_limit: int


class IsolatedProcess:
    """Calls functions in child processes. Use it from one thread at a time.

    Only `retire` may be called from another thread.

    Args:
        warm_up: A function without arguments as "package.module:name". The server runs it once
            before the first fork, so that every child finds what it imports and compiles.
    """

    def __init__(self, warm_up: str):
        self._warm_up = warm_up
        self._errors: IO[bytes] = io.BytesIO()
        self._server: subprocess.Popen[bytes] | None = None
        self._is_retired = False
        self._starting = threading.Lock()  # between the start of the server and `retire`

    def start(self) -> None:
        """Start the server and wait for its warm-up. A call does it if nothing else did.

        Raises:
            RunError: If the process is retired.
        """
        self._running()

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
        """Call `function(argument)` in a child process.

        Args:
            function: The function as "package.module:name".
            argument: Its argument, which can be pickled.
            log: File for the output of the child.
            timeout_s: Seconds after which the child is killed.
            memory_bytes: Largest memory that the child may allocate.
            memory_limit: The limit of `resource` that enforces `memory_bytes`. CUDA reserves more
                address space than RLIMIT_AS can allow. Calls that use CUDA take RLIMIT_DATA, which
                counts writable private memory only.

        Raises:
            RunError: If the server process dies.
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
            # The server enforces the time limit. Without an answer soon after it, the server hangs.
            if select.select([_pipe(server.stdout)], [], [], timeout_s + SERVER_GRACE_S)[0]:
                answer = _receive(_pipe(server.stdout))
        except (BrokenPipeError, EOFError):
            pass
        if not isinstance(answer, ProcessExit):
            self.close()
            self._errors.seek(0)
            lines = self._errors.read().decode(errors="replace").strip().splitlines()
            message = lines[-1] if lines else "it left no message"
            raise RunError(f"the process that isolates assets died: {message}")
        return answer

    def close(self) -> None:
        """Kill the server. Its child dies with it."""
        if self._server is not None:
            self._server.kill()
            self._server.wait()
            with contextlib.suppress(BrokenPipeError):
                _pipe(self._server.stdin).close()
            _pipe(self._server.stdout).close()
            self._server = None

    def retire(self) -> None:
        """End the call that runs, with RunError, and start no server any more."""
        with self._starting:
            self._is_retired = True
            if self._server is not None:
                self._server.kill()

    def _running(self) -> subprocess.Popen[bytes]:
        """Return the server. Start it and wait for its warm-up if it does not run.

        Raises:
            RunError: If the process is retired.
        """
        if self._server is None or self._server.poll() is not None:
            self._errors = tempfile.TemporaryFile()  # noqa: SIM115  lives as long as the server
            single = dict.fromkeys(
                (
                    *("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"),
                    "PXR_WORK_THREAD_LIMIT",
                ),
                "1",
            )
            with self._starting:
                if self._is_retired:
                    raise RunError("the process that isolates assets is retired")
                self._server = subprocess.Popen(
                    [
                        sys.executable,
                        "-m",
                        "pipeline.orchestration.isolated_process",
                        self._warm_up,
                    ],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=self._errors,
                    # An asset uses one core. With 0, Mesa draws in the calling thread.
                    env={
                        **os.environ,
                        **single,
                        "LP_NUM_THREADS": "0",
                        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
                    },
                    start_new_session=True,  # Ctrl-C on a terminal reaches the driver only
                )
            # The first compilation takes minutes. It must not count against an asset's time limit.
            with contextlib.suppress(EOFError):
                _receive(_pipe(self._server.stdout))
        return self._server


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """Fork a child for every request, until the client closes the pipe.

    Args:
        requests: Pipe with pickled requests.
        answers: Pipe for one pickled ProcessExit per request.
    """
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
    """Set the limits and run the call. This function does not return."""
    code = 1
    try:
        os.setsid()
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != server:  # the server died before the line above
            os._exit(1)
        log = os.open(request.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.dup2(log, 1)
        os.dup2(log, 2)
        for pipe in pipes:  # open in a child, they would keep the client of a dead server waiting
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
        if sys.exc_info()[0] is not None:  # any other error: the server reads it from the log
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _wait(pid: int, timeout_s: float, requests: BinaryIO) -> tuple[int, Any, bool]:
    """Wait for a child. Kill it at the time limit or when the client is gone.

    Returns:
        (exit status, resource usage, whether it was killed at the time limit).
    """
    deadline = time.monotonic() + timeout_s
    timed_out = False
    while True:
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            # Kill what the child left behind before it is reaped, while its id cannot be reused.
            _kill_group(pid)
            _, status, usage = os.wait4(pid, 0)
            return status, usage, timed_out
        # No request comes while a call runs, so a readable pipe means that the client is gone.
        if select.select([requests], [], [], POLL_S)[0]:
            _kill_group(pid)
            os._exit(0)
        if time.monotonic() > deadline:
            timed_out = True
            _kill_group(pid)


def _kill_group(pid: int) -> None:
    for kill in (os.killpg, os.kill):  # there is no group before the child has called setsid
        with contextlib.suppress(ProcessLookupError):
            kill(pid, signal.SIGKILL)


def _reason(status: int) -> str:
    """Return the reason of a ProcessExit from an exit status."""
    if not os.WIFSIGNALED(status):
        return REASONS.get(os.WEXITSTATUS(status), "error")
    number = os.WTERMSIG(status)
    # The kernel kills processes with SIGKILL if the machine runs out of memory.
    return "out_of_memory" if number == signal.SIGKILL else f"crashed_signal_{number}"


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
    """Warm up and serve requests from stdin to stdout.

    Args:
        warm_up: A function without arguments as "package.module:name".
    """
    requests = os.fdopen(os.dup(0), "rb", buffering=0)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # imports that print must not write into the pipe of answers
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    module, _, name = warm_up.partition(":")
    getattr(importlib.import_module(module), name)()
    _send(answers, "warm")
    serve(requests, answers)


if __name__ == "__main__":
    # Classes that are pickled here must belong to the module's own name and not to __main__.
    importlib.import_module("pipeline.orchestration.isolated_process").main(sys.argv[1])
