"""The prefetcher: order of batches and exceptions. Resuming is tested with real bricks."""

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
