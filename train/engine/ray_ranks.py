"""Running a command as one rank per GPU of a Ray cluster, with restarts after a lost node."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from pipeline.core.errors import RunError, UserError
from pipeline.core.ray_address import connecting
from pipeline.core.signals import Stop, note_signals
from train.engine.config import RankOptions
from train.engine.rank_process import GRACE_S, RankPlace, describe_end, serve_store

log = logging.getLogger(__name__)

PLACEMENT_TIMEOUT_S = 1800.0  # for so many GPUs to be free, also after a node was lost
REPORT_EVERY_S = 60.0  # while waiting for GPUs
POLL_S = 0.2
USER_ERROR = 2  # exit code of a request that cannot be fulfilled, which no restart changes
PR_SET_PDEATHSIG = 1  # option of prctl: the signal that the child gets when its parent dies
LIBC = ctypes.CDLL(None)


@dataclass(frozen=True, kw_only=True)
class Node:
    """The machine of a rank and the GPUs that Ray gave it there."""

    name: str  # Ray's identifier
    address: str
    gpus: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Seat:
    """A rank with the actor that runs it.

    Args:
        actor: Handle of a RankProcess.
        place: Numbers of the rank.
        address: Address of its machine.
        gpus: All GPUs that the ranks of this machine use.
    """

    actor: Any
    place: RankPlace
    address: str
    gpus: tuple[str, ...]

    def describe(self, what: str) -> str:
        """Return a sentence about the rank, such as "Rank 1 on 10.0.0.2 was lost"."""
        return f"Rank {self.place.rank} on {self.address} {what}"


@dataclass(frozen=True, kw_only=True)
class Failure:
    """How the ranks of one attempt ended if they did not all succeed.

    Args:
        reason: One sentence without a period, such as "Rank 1 on 10.0.0.2 was killed by SIGKILL".
        code: Exit code of the rank. None if it was killed, or lost with its node.
    """

    reason: str
    code: int | None


class RankProcess:
    """One rank: a child process that runs the command. A Ray actor holds it on its node.

    The child is killed when the actor dies, so that no rank of an earlier attempt writes files.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._lines: deque[str] = deque()
        self._reader: threading.Thread | None = None

    def node(self) -> Node:
        """Return where the actor runs."""
        context = ray.get_runtime_context()
        return Node(
            name=context.get_node_id(),
            address=ray.util.get_node_ip_address(),
            gpus=tuple(context.get_accelerator_ids().get("GPU", ())),
        )

    def start(self, module: str, args: Sequence[str], env: Mapping[str, str], folder: Path) -> str:
        """Start the rank.

        Args:
            module: The module, run as `python -m` does it.
            args: Its arguments.
            env: Variables that the rank gets besides those of the actor.
            folder: Working directory.

        Returns:
            "" or why the rank could not be started.
        """
        if not folder.is_dir():
            return f"there is no directory {folder}"
        parent = os.getpid()

        def die_with_parent() -> None:
            LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:  # the actor died before the line above
                os._exit(1)

        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *args],
            env={**os.environ, **env},
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",
            preexec_fn=die_with_parent,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, args=[self._process], daemon=True)
        self._reader.start()
        return ""

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            self._lines.append(line.rstrip("\n"))

    def poll(self) -> tuple[list[str], int | None]:
        """Return the lines since the last call, and the exit code if the rank has ended."""
        assert self._process is not None
        assert self._reader is not None
        code = self._process.poll()
        if code is not None:
            self._reader.join(POLL_S)  # a child of the rank may hold the pipe open
        lines = [self._lines.popleft() for _ in range(len(self._lines))]
        return lines, code

    def signal(self, signum: int) -> None:
        """Send a signal to the rank, unless it has ended."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signum)


def run_on_ray(module: str, args: Sequence[str], options: RankOptions) -> int:
    """Run a module as ranks of torch.distributed on a Ray cluster.

    If a rank fails, is killed or is lost with its node, all ranks are started again, up to
    `ray_restarts` times. They resume from the last checkpoint. SIGINT and SIGTERM are passed on.

    Args:
        module: The module, run as `python -m` does it in the working directory of this process.
        args: Its arguments.
        options: Number of ranks and of restarts.

    Returns:
        0, or 2 if a rank refused its options.

    Raises:
        UserError: If there is no cluster.
        RunError: If all restarts are used up, or the cluster does not have so many GPUs in time.
        Stopped: After SIGINT or SIGTERM, when all ranks have ended.
    """
    with _connected(), note_signals() as stop:
        return with_restarts(
            lambda: _attempt(module, args, options, stop), options.ray_restarts, stop
        )


def with_restarts(attempt: Callable[[], Failure | None], restarts: int, stop: Stop) -> int:
    """Repeat an attempt until it succeeds, its options are refused, or no restart is left.

    Args:
        attempt: Runs all ranks to their end. Returns None if all succeeded.
        restarts: Number of further attempts.
        stop: The signal that ended the attempt, if any.

    Returns:
        0, or 2 if a rank refused its options.

    Raises:
        RunError: If the last attempt failed, too.
        Stopped: If a signal ended the attempt.
    """
    for number in range(restarts + 1):
        failure = attempt()
        stop.check()
        if failure is None:
            return 0
        if failure.code == USER_ERROR:
            return USER_ERROR
        if number < restarts:
            log.warning(
                "%s. Restart %d of %d from the last checkpoint.",
                failure.reason,
                number + 1,
                restarts,
            )
    raise RunError(
        f"{failure.reason}, and all {restarts} restarts are used up; see the lines of the rank "
        "above, and run the same command to resume"
    )


@contextmanager
def _connected() -> Iterator[None]:
    """Use the caller's connection to Ray, or connect to the cluster at RAY_ADDRESS.

    Raises:
        UserError: If there is no cluster.
    """
    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        raise UserError(
            "--ray-gpus needs a Ray cluster: submit the command with ray job submit, or set "
            "RAY_ADDRESS; --gpus uses the GPUs of this machine without Ray"
        )
    with connecting(address, advice="correct it"):
        ray.init(log_to_driver=False, logging_level=logging.ERROR)
    try:
        yield
    finally:
        ray.shutdown()


def _attempt(module: str, args: Sequence[str], options: RankOptions, stop: Stop) -> Failure | None:
    """Run all ranks once. Returns None if all of them succeeded.

    Raises:
        UserError: If a node lacks the working directory.
        RunError: If the cluster does not have so many GPUs in time.
        Stopped: If a signal came before the ranks were started.
    """
    assert options.ray_gpus is not None
    gpus = 0 if options.device == "cpu" else 1
    bundle: dict[str, float] = {"CPU": 1, "GPU": gpus} if gpus else {"CPU": 1}
    group = placement_group([bundle] * options.ray_gpus, strategy="PACK")
    actors: list[Any] = []
    try:
        _wait_for(group, options, stop)
        actor = ray.remote(num_cpus=1, num_gpus=gpus, max_restarts=0)(RankProcess)
        for number in range(options.ray_gpus):
            strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=number)
            actors.append(actor.options(scheduling_strategy=strategy).remote())
        host = ray.util.get_node_ip_address()
        store = serve_store(host)
        try:
            seats = _seats(actors)
            problems = ray.get([_start(seat, host, store.port, module, args) for seat in seats])
        except RayError as error:
            return Failure(reason=f"A node was lost ({_first_line(error)})", code=None)
        for seat, problem in zip(seats, problems, strict=True):
            if problem:
                raise UserError(
                    f"the node {seat.address} cannot start a rank: {problem}; submit the command "
                    "from a directory that all nodes have"
                )
        return follow(seats, stop)
    finally:
        for handle in actors:
            ray.kill(handle)
        remove_placement_group(group)


def _wait_for(group: PlacementGroup, options: RankOptions, stop: Stop) -> None:
    """Wait until the ranks have a place.

    Raises:
        RunError: If that takes longer than PLACEMENT_TIMEOUT_S.
        Stopped: After SIGINT or SIGTERM.
    """
    kind = "CPU" if options.device == "cpu" else "GPU"
    started = time.monotonic()
    next_report = started
    while not group.wait(timeout_seconds=1):
        stop.check()
        total = int(ray.cluster_resources().get(kind, 0))
        free = int(ray.available_resources().get(kind, 0))
        state = f"the cluster has {total} {kind}s, of which {free} are free"
        now = time.monotonic()
        if now - started > PLACEMENT_TIMEOUT_S:
            raise RunError(
                f"--ray-gpus {options.ray_gpus} could not be placed within "
                f"{PLACEMENT_TIMEOUT_S:.0f} s: {state}; add nodes, wait for other jobs or ask for "
                "fewer"
            )
        if now >= next_report:
            next_report = now + REPORT_EVERY_S
            log.info("Waiting for %d %ss: %s.", options.ray_gpus, kind, state)


def _seats(actors: Sequence[Any]) -> list[Seat]:
    """Number the ranks so that those of a node follow each other."""
    nodes: list[Node] = ray.get([actor.node.remote() for actor in actors])
    of_node: dict[str, list[int]] = defaultdict(list)
    for number, node in enumerate(nodes):
        of_node[node.name].append(number)
    seats: list[Seat] = []
    for numbers in of_node.values():
        # Each rank sees all GPUs of its node, which NCCL needs to connect them directly.
        gpus = tuple(gpu for number in numbers for gpu in nodes[number].gpus)
        for local_rank, number in enumerate(numbers):
            place = RankPlace(
                rank=len(seats),
                size=len(actors),
                local_rank=local_rank,
                local_size=len(numbers),
            )
            address = nodes[number].address
            seats.append(Seat(actor=actors[number], place=place, address=address, gpus=gpus))
    log.info("Starting %d ranks on %d nodes.", len(seats), len(of_node))
    return seats


def _start(seat: Seat, host: str, port: int, module: str, args: Sequence[str]) -> ray.ObjectRef:
    env = {**seat.place.environment(host, port), "PYTHONUNBUFFERED": "1"}
    if seat.gpus:
        env["CUDA_VISIBLE_DEVICES"] = ",".join(seat.gpus)
    return seat.actor.start.remote(module, list(args), env, Path.cwd())


def follow(seats: Sequence[Seat], stop: Stop) -> Failure | None:
    """Wait until all ranks have ended, and write their lines to standard error.

    After the first failure the other ranks get SIGTERM and GRACE_S seconds. A rank that lost its
    peers fails as well, so the reason is the most telling of all failures.

    Args:
        seats: The ranks, which have been started.
        stop: A signal, which is passed on to the ranks.

    Returns:
        None if all ranks succeeded.
    """
    polls: dict[ray.ObjectRef, Seat] = {seat.actor.poll.remote(): seat for seat in seats}
    failures: list[Failure] = []
    deadline = float("inf")
    passed_on = False
    while polls and time.monotonic() < deadline:
        if stop.signum and not passed_on:
            passed_on = True
            _signal(polls.values(), stop.signum)
        ready, _ = ray.wait(list(polls), num_returns=len(polls), timeout=POLL_S)
        for poll in ready:
            seat = polls.pop(poll)
            failure, is_running = _poll_result(poll, seat)
            if is_running:
                polls[seat.actor.poll.remote()] = seat
            elif failure is not None:
                failures.append(failure)
        if failures and not stop.signum and deadline == float("inf"):
            _signal(polls.values(), signal.SIGTERM)
            deadline = time.monotonic() + GRACE_S
        time.sleep(POLL_S)
    return min(failures, key=_severity, default=None)


def _poll_result(poll: ray.ObjectRef, seat: Seat) -> tuple[Failure | None, bool]:
    """Write the new lines of a rank. Returns its failure, if any, and whether it is running."""
    try:
        lines, code = ray.get(poll)
    except RayError as error:
        reason = seat.describe(f"was lost ({_first_line(error)})")
        return Failure(reason=reason, code=None), False
    for line in lines:
        sys.stderr.write(f"rank {seat.place.rank}: {line}\n")
    if code is None or code == 0:
        return None, code is None
    return Failure(reason=seat.describe(describe_end(code)), code=None if code < 0 else code), False


def _signal(seats: Iterable[Seat], signum: int) -> None:
    for seat in seats:
        seat.actor.signal.remote(signum)  # a lost actor is noticed by its poll


def _severity(failure: Failure) -> int:
    """Return a number that is smaller for failures which explain those of other ranks."""
    if failure.code == USER_ERROR:
        return 0
    return 1 if failure.code is None else 2


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".:")
