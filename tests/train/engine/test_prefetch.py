"""The prefetcher: order of batches and exceptions. Resuming is tested with real bricks."""

import os
import signal
import threading
import time
from functools import partial
from multiprocessing.connection import wait as wait_for_any

import pytest
import torch

from pipeline.core.errors import RunError
from train.engine.prefetch import Prefetcher, start_prefetcher


class Count:
    """The jobs 0, 1, 2, ..."""

    def __init__(self):
        self.number = 0

    @property
    def state(self):
        return {"number": self.number}

    def restore(self, state):
        self.number = state["number"]

    def next(self):
        self.number += 1
        return self.number - 1


def test_an_exception_is_raised_in_place_of_its_batch():
    def load(job):
        if job == 3:
            raise RunError("job 3")
        return job

    stream = Prefetcher(Count(), load, workers=2)
    assert [next(stream) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(RunError, match="job 3"):
        next(stream)
    stream.close()


def test_waiting_for_a_batch_ends_when_it_is_loaded_and_closing_waits_for_none():
    gate = threading.Event()
    stream = Prefetcher(Count(), lambda job: gate.wait(20) and job, workers=1)
    assert not stream.wait(0.01)
    gate.set()
    assert stream.wait(20)
    assert next(stream) == 0
    gate.clear()
    while stream.wait(0):  # the batches that were loaded before
        next(stream)
    started = time.monotonic()
    stream.close()
    assert time.monotonic() - started < 5
    gate.set()


def test_without_threads_no_batch_is_waited_for():
    stream = Prefetcher(Count(), lambda job: job, workers=0)
    assert stream.wait(0)
    assert (next(stream), next(stream)) == (0, 1)


class ProcessLoader:
    """Returns the job, the rank and the process of a batch. Job 5 fails, and job 100 ends it."""

    def __init__(self, factor):
        self.factor = factor

    def load(self, step, rank):
        if step == 5:
            raise RunError("job 5 cannot be read")
        if step == 100:
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.full((2, 3), self.factor * step), rank, os.getpid()

    def close(self):
        pass


def test_processes_load_the_same_batches_in_order_and_hand_on_exceptions():
    make = partial(ProcessLoader, 10)
    stream = start_prefetcher(Count(), make, rank=3, workers=2, kind="processes")
    try:
        for job in range(5):
            values, rank, process = next(stream)
            assert torch.equal(values, torch.full((2, 3), 10 * job))
            assert rank == 3
            assert process != os.getpid()
        assert stream.state == {"number": 5}
        with pytest.raises(RunError, match="job 5 cannot be read"):
            next(stream)
        stream.restore({"number": 2})
        assert next(stream)[0][0, 0] == 20
        stream.restore({"number": 100})
        assert stream.wait(60)
        with pytest.raises(RunError, match="a process that loads batches ended"):
            next(stream)
    finally:
        stream.close()


class EndlessLoader(ProcessLoader):
    """Never returns a batch, as a store that gives no answer for minutes."""

    def load(self, step, rank):
        time.sleep(600)


def test_processes_that_wait_for_data_end_when_the_stream_is_closed():
    make = partial(EndlessLoader, 1)
    stream = start_prefetcher(Count(), make, rank=0, workers=2, kind="processes")
    assert not stream.wait(0.1)
    processes = list(stream._pool._processes.values())
    assert processes
    stream.close()
    # The thread of the pool waits for the same processes. `is_alive` takes a process for a running
    # one if that thread has received its exit status, so the end is read from the sentinel. A
    # process that still starts ends when it has started.
    for process in processes:
        assert wait_for_any([process.sentinel], timeout=120)


def test_threads_and_no_workers_load_in_this_process():
    for workers, kind in ((1, "threads"), (0, "threads"), (0, "processes")):
        make = partial(ProcessLoader, 1)
        stream = start_prefetcher(Count(), make, rank=0, workers=workers, kind=kind)
        assert next(stream)[2] == os.getpid()
        stream.close()
