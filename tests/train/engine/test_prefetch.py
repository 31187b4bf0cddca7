"""The prefetcher: order of batches and exceptions. Resuming is tested with real bricks."""

import threading
import time

import pytest

from pipeline.core.errors import RunError
from train.engine.prefetch import Prefetcher


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
