"""The queue of generations: order, progress, estimates, cancel, limits and errors."""

import re
import time
from contextlib import closing

import pytest
import torch

from model.app.config import AppConfig
from model.app.jobs import JobQueue, JobRequest, QueueFull, memory_advice
from model.app.service import Service
from model.config import GenerationOptions
from pipeline.core.errors import RunError, UserError
from tests.child_python import run_python
from tests.model.app.ball_generator import STEPS, BallGenerator
from tests.model.tiny_models import disc_image


def request(**options):
    return JobRequest(images=(disc_image(),), seed=3, options=GenerationOptions(**options))


def queue_of(generator, **limits):
    def generate(request, progress):
        return generator.generate(
            request.images[0], request.seed, request.options, progress=progress
        )

    return closing(JobQueue(generate, generator.stages_of, generator.device, **limits))


def wait_until(condition, timeout_s=10):
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "the condition did not come true"
        time.sleep(0.002)


def test_jobs_run_in_order_and_report_their_place_and_progress():
    generator = BallGenerator(closed_gate=True)
    with queue_of(generator) as queue:
        first, second, third = (queue.submit(request()) for _ in range(3))
        wait_until(lambda: queue.status(first.id).stage == "structure")
        assert [queue.status(job.id).position for job in (first, second, third)] == [0, 1, 2]
        status = queue.status(first.id)
        assert (status.state, status.step, status.steps) == ("running", 0, STEPS)
        assert status.stages == {"structure": STEPS, "128": STEPS, "128 surface": 1}
        assert status.fraction == 0
        assert status.seconds_left is None  # nothing was timed yet
        generator.gate.set()
        for job in (first, second, third):
            assert queue.wait(job.id, 10)
            done = queue.status(job.id)
            assert (done.state, done.fraction, done.error) == ("done", 1.0, "")
            assert job.mesh is not None
    assert first.ended <= second.started <= second.ended <= third.started


def test_the_time_left_follows_from_the_steps_of_earlier_jobs():
    generator = BallGenerator(step_s=0.02)
    with queue_of(generator) as queue:
        job = queue.submit(request())
        assert queue.wait(job.id, 10)
        generator.gate.clear()
        later = queue.submit(request(steps=(10,)))
        wait_until(lambda: queue.status(later.id).stage == "structure")
        left = queue.status(later.id).seconds_left
        assert left == pytest.approx(21 * 0.02, rel=0.5)
        generator.gate.set()
        wait_until(lambda: queue.status(later.id).step >= 5)
        nearer = queue.status(later.id)
        assert nearer.seconds_left < left
        assert 0.2 < nearer.fraction < 0.9


def test_a_running_job_stops_at_the_end_of_its_step():
    generator = BallGenerator(closed_gate=True)
    with queue_of(generator) as queue:
        job = queue.submit(request(steps=(1000,)))
        wait_until(lambda: queue.status(job.id).stage == "structure")
        queue.cancel(job.id)
        generator.gate.set()
        assert queue.wait(job.id, 10)
        assert queue.status(job.id).state == "cancelled"
        assert generator.steps_run == 1  # the step that ran
        assert job.mesh is None
        following = queue.submit(request())
        assert queue.wait(following.id, 10)
        assert queue.status(following.id).state == "done"


def test_a_waiting_job_is_cancelled_without_a_step():
    generator = BallGenerator(closed_gate=True)
    with queue_of(generator) as queue:
        running, waiting = queue.submit(request()), queue.submit(request())
        queue.cancel(waiting.id)
        assert queue.status(waiting.id).state == "cancelled"
        generator.gate.set()
        assert queue.wait(running.id, 10)
        queue.cancel(running.id)  # has ended, so nothing changes
        assert queue.status(running.id).state == "done"
    assert len(generator.requests) == 1


def test_further_jobs_are_refused_and_old_ones_forgotten():
    generator = BallGenerator(closed_gate=True)
    with queue_of(generator, max_queue=1, keep=1) as queue:
        first = queue.submit(request())
        wait_until(lambda: queue.status(first.id).state == "running")
        second = queue.submit(request())
        with pytest.raises(QueueFull, match=r"1 generations are waiting.*--max-queue"):
            queue.submit(request())
        with pytest.raises(ValueError, match="resolution must be one of 64, 128, got 256"):
            queue.submit(request(resolution=256))
        generator.gate.set()
        assert queue.wait(second.id, 10)
        with pytest.raises(KeyError):
            queue.get(first.id)
        assert queue.get(second.id) is second


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RunError("the stage has no surface"), "^the stage has no surface$"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), "too little memory for the stage"),
        (RuntimeError("DefaultCPUAllocator: not enough memory"), "choose a smaller resolution"),
        (MemoryError(), "set the guidance to 1"),
        (RuntimeError("mat1 and mat2\nshapes"), "^the generation failed: RuntimeError: mat1 and"),
        (KeyError("layer"), "^the generation failed: KeyError"),
    ],
)
def test_a_failed_job_says_why_and_the_next_one_runs(error, message):
    generator = BallGenerator()
    with queue_of(generator) as queue:
        generator.error = error
        job = queue.submit(request())
        assert queue.wait(job.id, 10)
        status = queue.status(job.id)
        assert status.state == "failed"
        assert re.search(message, status.error)
        generator.error = None
        following = queue.submit(request())
        assert queue.wait(following.id, 10)
        assert queue.status(following.id).state == "done"


def test_the_advice_names_only_changes_that_help():
    saved = GenerationOptions(guidance=1.0, refine="none")
    advice = memory_advice(saved, "128", torch.device("cuda"))
    assert advice == (
        "the GPU has too little memory for the stage 128; choose a smaller resolution, or close "
        "other programs that use the GPU"
    )
    assert "--precision bf16" in memory_advice(
        GenerationOptions(precision="fp32"), "128", torch.device("cuda")
    )


def test_closing_cancels_what_runs_and_waits():
    generator = BallGenerator(step_s=0.01)
    with queue_of(generator) as queue:
        jobs = [queue.submit(request(steps=(100_000,))) for _ in range(2)]
        wait_until(lambda: queue.status(jobs[0].id).step > 1)
    assert [job.state for job in jobs] == ["cancelled", "cancelled"]


def test_the_page_takes_no_more_images_than_the_models():
    generator = BallGenerator()
    with closing(Service(AppConfig(checkpoint="unused", max_images=3), generator)) as service:
        service.check_count(3)
        assert service.describe()["max_images"] == 3
        generator.max_views = 2
        assert service.describe()["max_images"] == 2
        with pytest.raises(UserError, match="1 to 2 images of one object, got 3"):
            service.check_count(3)


def test_a_page_without_a_build_does_not_wait_for_the_readers_of_builds():
    code = "import sys, model.app.builds; print({'zarr', 'pipeline.inspection'} & set(sys.modules))"
    assert run_python("-c", code).stdout.strip() == "set()"
