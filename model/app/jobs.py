"""The queue of generations: one at a time, with progress, an estimate of the time, and cancel."""

from __future__ import annotations

import gc
import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from PIL import Image

from model.config import GenerationOptions
from model.inference.generator import GeneratedMesh, Progress
from pipeline.core.errors import RunError, UserError

log = logging.getLogger(__name__)

State = Literal["queued", "running", "done", "failed", "cancelled"]
ENDED = ("done", "failed", "cancelled")
# What torch says in a plain RuntimeError if the memory of the CPU does not suffice.
OUT_OF_MEMORY = ("not enough memory", "can't allocate memory", "out of memory")
NEW_WEIGHT = 0.5  # of the last generation in the running mean of the seconds of a step


@dataclass(frozen=True, kw_only=True)
class JobRequest:
    """What is to be generated.

    Attributes:
        images: RGBA images of one object, whose background is transparent.
        seed: Seed of the noise.
        options: Sampling and cleaning options.
        whole_if_opaque: Take an image without transparent pixels as foreground.
    """

    images: tuple[Image.Image, ...]
    seed: int
    options: GenerationOptions
    whole_if_opaque: bool = False


@dataclass(frozen=True, kw_only=True)
class JobStatus:
    """The state of a job at one moment.

    Attributes:
        id: Name of the job, which nobody can guess.
        state: "queued", "running", "done", "failed" or "cancelled".
        position: Number of jobs that run or wait before this one. 0 unless it is queued.
        stage: Stage that runs, or the last one that ran. "" before the first one.
        step: Number of finished steps of the stage.
        steps: Number of steps of the stage.
        stages: Number of steps of every stage by name, in order.
        fraction: Share of the whole work that is done, from 0 to 1.
        seconds: Seconds since the job started. 0 while it waits.
        stage_seconds_left: Estimate for the stage. None before its first step is finished.
        seconds_left: Estimate for the whole job. None while a later stage was never timed.
        error: Why the job failed, and what to do. "" otherwise.
    """

    id: str
    state: State
    position: int
    stage: str
    step: int
    steps: int
    stages: dict[str, int]
    fraction: float
    seconds: float
    stage_seconds_left: float | None
    seconds_left: float | None
    error: str


class QueueFull(Exception):
    """No further job is accepted before another one ends."""


class _Cancelled(Exception):
    """The job was cancelled while it ran."""


class Job:
    """A generation. The queue alone changes its fields.

    Attributes:
        id: Name of the job.
        request: What is to be generated.
        stages: Number of steps of every stage by name, in order.
        state: See `JobStatus`.
        mesh: The result of a job that is done.
        error: Why the job failed.
    """

    def __init__(self, request: JobRequest, stages: dict[str, int]):
        self.id = secrets.token_urlsafe(16)
        self.request = request
        self.stages = stages
        self.state: State = "queued"
        self.mesh: GeneratedMesh | None = None
        self.error = ""
        self.stage = ""
        self.step = 0
        self.started = 0.0
        self.stage_started = 0.0
        self.ended = 0.0
        self.cancelled = threading.Event()


class JobQueue:
    """Runs generations one after the other in a thread of its own.

    Args:
        generate: Makes the mesh of a request. It passes its steps through the given `Progress`.
        stages_of: Returns the number of steps of each stage of a request, by name and in order. It
            raises ValueError for options that cannot be used.
        device: Device of the models. The end of a step waits for it, so that a cancelled job stops
            and a time is right although the host runs ahead of a GPU.
        max_queue: Largest number of waiting jobs.
        keep: Number of ended jobs that are kept.
    """

    def __init__(
        self,
        generate: Callable[[JobRequest, Progress], GeneratedMesh],
        stages_of: Callable[[GenerationOptions], dict[str, int]],
        device: torch.device,
        *,
        max_queue: int = 16,
        keep: int = 64,
    ):
        self._generate = generate
        self._stages_of = stages_of
        self._device = device
        self._max_queue = max_queue
        self._keep = keep
        self._jobs: dict[str, Job] = {}
        self._waiting: deque[Job] = deque()
        self._running: Job | None = None
        self._closed = False
        self._step_seconds: dict[str, float] = {}
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="generation", daemon=True)
        self._thread.start()

    def submit(self, request: JobRequest) -> Job:
        """Append a job to the queue.

        Raises:
            QueueFull: If as many jobs wait as may wait.
            ValueError: If the options cannot be used.
        """
        job = Job(request, self._stages_of(request.options))
        with self._changed:
            if len(self._waiting) >= self._max_queue:
                raise QueueFull(
                    f"{len(self._waiting)} generations are waiting, which is the limit; try again "
                    "when some have ended, or start the server with a larger --max-queue"
                )
            self._jobs[job.id] = job
            self._waiting.append(job)
            self._changed.notify_all()
        return job

    def get(self, name: str) -> Job:
        """Return a job.

        Raises:
            KeyError: If there is none of this name, or it ended and was forgotten.
        """
        with self._changed:
            return self._jobs[name]

    def cancel(self, name: str) -> None:
        """Take a job from the queue, or stop it at the end of the step that runs.

        A job that has ended stays as it is.

        Raises:
            KeyError: As `get`.
        """
        with self._changed:
            job = self._jobs[name]
            job.cancelled.set()
            if job.state == "queued":
                self._waiting.remove(job)
                self._end(job, "cancelled")

    def status(self, name: str) -> JobStatus:
        """Return the state of a job.

        Raises:
            KeyError: As `get`.
        """
        with self._changed:
            job, now = self._jobs[name], time.monotonic()
            position = 0
            if job.state == "queued":
                position = self._waiting.index(job) + (self._running is not None)
            stage_left, left = self._time_left(job, now)
            return JobStatus(
                id=job.id,
                state=job.state,
                position=position,
                stage=job.stage,
                step=job.step,
                steps=job.stages.get(job.stage, 0),
                stages=dict(job.stages),
                fraction=self._fraction(job),
                seconds=(job.ended or now) - job.started if job.started else 0.0,
                stage_seconds_left=stage_left,
                seconds_left=left,
                error=job.error,
            )

    def wait(self, name: str, timeout_s: float) -> bool:
        """Wait until a job has ended. Return whether it has.

        Raises:
            KeyError: As `get`.
        """
        job = self.get(name)
        with self._changed:
            return self._changed.wait_for(lambda: job.state in ENDED, timeout_s)

    def close(self) -> None:
        """Cancel all jobs and end the thread."""
        with self._changed:
            self._closed = True
            names = [job.id for job in self._jobs.values() if job.state not in ENDED]
            self._changed.notify_all()
        for name in names:
            self.cancel(name)
        self._thread.join()

    def _work(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # the current device is that of the thread
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    return
                job = self._running = self._waiting.popleft()
                job.state = "running"
                job.started = time.monotonic()
                self._changed.notify_all()
            state, error = self._run(job)
            with self._changed:
                job.error = error
                self._running = None
                self._end(job, state)

    def _run(self, job: Job) -> tuple[State, str]:
        """Generate the mesh of a job and return the state in which it ends, and the error."""
        try:
            job.mesh = self._generate(
                job.request, lambda stage, steps: self._watched(job, stage, steps)
            )
        except _Cancelled:
            return "cancelled", ""
        except (RunError, UserError, ValueError) as error:
            return "failed", str(error)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                log.exception("the generation failed")
                return "failed", f"the generation failed: {_first_line(error)}"
            error.__traceback__ = None  # its frames hold the tensors
            return "failed", memory_advice(job.request.options, job.stage, self._device)
        except Exception as error:
            log.exception("the generation failed")
            return "failed", f"the generation failed: {_first_line(error)}"
        finally:
            if job.mesh is None:
                gc.collect()
                if self._device.type == "cuda":
                    torch.cuda.empty_cache()
        return "done", ""

    def _watched(self, job: Job, stage: str, steps: Iterable[int]) -> Iterator[int]:
        """Yield the steps of a stage; count and time them, and stop if the job is cancelled."""
        with self._changed:
            job.stage, job.step, job.stage_started = stage, 0, time.monotonic()
        for step in steps:
            if job.cancelled.is_set():
                raise _Cancelled
            yield step
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            with self._changed:
                job.step += 1
        if job.cancelled.is_set():
            raise _Cancelled
        if job.step:
            measured = (time.monotonic() - job.stage_started) / job.step
            known = self._step_seconds.get(stage, measured)
            self._step_seconds[stage] = known + NEW_WEIGHT * (measured - known)

    def _end(self, job: Job, state: State) -> None:
        """Set the last state of a job and forget the oldest ended jobs. The lock is held."""
        job.state, job.ended = state, time.monotonic()
        ended = [other for other in self._jobs.values() if other.state in ENDED]
        for other in sorted(ended, key=lambda other: other.ended)[: -self._keep]:
            del self._jobs[other.id]
        self._changed.notify_all()

    def _time_left(self, job: Job, now: float) -> tuple[float | None, float | None]:
        """Return estimates of the seconds left for the stage and for the job."""
        if job.state in ENDED:
            return 0.0, 0.0
        names = list(job.stages)
        done = names[: names.index(job.stage)] if job.stage in names else []
        step_seconds = dict(self._step_seconds)
        stage_left = None
        if job.stage in names:
            spent = now - job.stage_started
            if job.step:
                step_seconds[job.stage] = spent / job.step
            if job.stage in step_seconds:
                stage_left = step_seconds[job.stage] * job.stages[job.stage] - spent
                stage_left = max(stage_left, 0.0)
        later = names[len(done) + (job.stage in names) :]
        if any(name not in step_seconds for name in later) or (job.stage and stage_left is None):
            return stage_left, None
        total = sum(step_seconds[name] * job.stages[name] for name in later)
        return stage_left, total + (stage_left or 0.0)

    def _fraction(self, job: Job) -> float:
        """Return the share of the work that is done, weighted by the known times of the steps."""
        if job.state == "done":
            return 1.0
        if job.stage not in job.stages:
            return 0.0
        known = [seconds for seconds in self._step_seconds.values() if seconds > 0]
        usual = sum(known) / len(known) if known else 1.0
        weights = {
            name: steps * self._step_seconds.get(name, usual) for name, steps in job.stages.items()
        }
        before = list(job.stages)[: list(job.stages).index(job.stage)]
        part = weights[job.stage] * job.step / job.stages[job.stage]
        return (sum(weights[name] for name in before) + part) / (sum(weights.values()) or 1.0)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that the memory of the CPU or the GPU does not suffice."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(
        words in str(error).lower() for words in OUT_OF_MEMORY
    )


def memory_advice(options: GenerationOptions, stage: str, device: torch.device) -> str:
    """Return what happened and which options need less memory.

    Args:
        options: The options of the generation that ran out of memory.
        stage: The stage in which it did.
        device: Device of the models.
    """
    changes = ["choose a smaller resolution"]
    if options.guidance != 1:
        changes.append("set the guidance to 1")
    if options.refine != "none":
        changes.append("start the server with --refine none")
    if device.type == "cuda":
        if options.precision == "fp32":
            changes.append("start the server with --precision bf16")
        changes.append("close other programs that use the GPU")
        where = "the GPU has"
    else:
        changes.append("close other programs")
        where = "this machine has"
    return (
        f"{where} too little memory for the stage {stage or 'before the first step'}; "
        f"{', '.join(changes[:-1])}, or {changes[-1]}"
    )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
