"""The trainer on a toy model: learning, resuming, bad gradients, full disks, signals, options."""

import errno
import json
import logging
import os
import re
import resource
import shutil
import signal
import threading
from concurrent.futures import ThreadPoolExecutor, wait

import pytest
import torch

from pipeline.core.errors import RunError, UserError
from pipeline.core.signals import Stopped
from tests.train.metric_rows import metric_rows
from tests.train.toy_model import LineTask, PointStream, run
from train.engine import checkpoint


def exact(out):
    """Return the metrics that must be equal in equal runs. Times are left out."""
    names = ("step", "loss", "error", "grad_norm", "lr", "tokens", "skipped")
    return [[row[name] for name in names] for row in metric_rows(out)]


def same_files(a, b):
    return all(
        (a / name).read_bytes() == (b / name).read_bytes()
        for name in (
            "model.safetensors",
            "ema.safetensors",
            "state.json",
            "optimizer.pt",
            "rank-0.pt",
        )
    )


def test_a_run_learns_and_writes_checkpoints_and_metrics(tmp_path):
    done, task = run(tmp_path, steps=200, validate_every=50, sample_every=100)
    assert done == 200
    torch.testing.assert_close(
        task.model.weight.data, torch.tensor([[1.0, 2.0, 3.0]]), atol=0.1, rtol=0
    )
    assert (tmp_path / "latest").resolve().name == "step-00000200"
    assert sorted(path.name for path in (tmp_path / "latest").iterdir()) == [
        "config.json",
        "ema.safetensors",
        "model.safetensors",
        "optimizer.pt",
        "rank-0.pt",
        "state.json",
    ]
    assert [path.name for path in sorted(tmp_path.glob("step-*"))] == [
        f"step-{n:08d}" for n in (180, 190, 200)
    ]
    assert [row["step"] for row in metric_rows(tmp_path)] == list(range(1, 201))
    assert {
        "loss",
        "error",
        "grad_norm",
        "lr",
        "tokens_per_s",
        "mfu",
        "data_s",
        "resolution",
    } <= metric_rows(tmp_path)[0].keys()
    assert [row["step"] for row in metric_rows(tmp_path, "validation")] == [50, 100, 150, 200]
    assert [path.name for path in task.sampled] == ["step-00000100", "step-00000200"]
    config = json.loads((tmp_path / "latest" / "config.json").read_text(encoding="utf-8"))
    assert (config["format_version"], config["model"]) == (1, "Line")
    assert {"versions", "commit", "training", "config"} <= config.keys()


@pytest.mark.parametrize("stop", [7, 10, 23])
def test_a_run_that_crashed_resumes_bit_exactly(tmp_path, stop):
    """A run that crashes after `stop` steps continues like an uninterrupted run."""

    def crash(step):
        if step == stop:
            raise KeyboardInterrupt

    run(tmp_path / "whole", validate_every=7)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", task=LineTask(crash), validate_every=7)
    assert len(metric_rows(tmp_path / "cut")) == stop
    stream = PointStream()
    run(tmp_path / "cut", stream=stream, validate_every=7)
    assert exact(tmp_path / "cut") == exact(tmp_path / "whole")
    assert stream.closed
    assert same_files(tmp_path / "cut" / "latest", tmp_path / "whole" / "latest")
    assert [r["loss"] for r in metric_rows(tmp_path / "cut", "validation")] == [
        r["loss"] for r in metric_rows(tmp_path / "whole", "validation")
    ]


def test_a_finished_run_continues_with_more_steps(tmp_path):
    run(tmp_path / "a", steps=30)
    run(tmp_path / "b", steps=20)
    done, _ = run(tmp_path / "b", steps=30)
    assert done == 30
    assert exact(tmp_path / "a") == exact(tmp_path / "b")


def test_a_finished_run_does_nothing(tmp_path):
    run(tmp_path)
    before = exact(tmp_path)
    done, task = run(tmp_path, sample_every=1)
    assert (done, exact(tmp_path), task.sampled) == (30, before, [])


def test_another_configuration_is_refused(tmp_path):
    run(tmp_path)
    with pytest.raises(
        UserError,
        match=r"was trained with training\.loop\.learning_rate=0\.1, now 0\.2; choose another",
    ):
        run(tmp_path, learning_rate=0.2)


def test_another_format_version_is_refused(tmp_path):
    run(tmp_path)
    path = tmp_path / "latest" / "config.json"
    path.write_text(
        json.dumps({**json.loads(path.read_text(encoding="utf-8")), "format_version": 2}),
        encoding="utf-8",
    )
    with pytest.raises(UserError, match="has format_version 2, this code reads 1"):
        run(tmp_path, steps=40)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "state.json", "rank-0.pt"])
@pytest.mark.parametrize(
    "damage", [lambda data: data[:20], lambda _: b"[]", lambda _: bytes(range(60, 160))]
)
def test_a_damaged_checkpoint_is_one_clear_error(tmp_path, name, damage):
    run(tmp_path)
    path = (tmp_path / "latest" / name).resolve()
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=r"step-00000030.* cannot be"):
        run(tmp_path, steps=40)


def test_the_error_names_missing_entries_of_the_state(tmp_path):
    run(tmp_path)
    path = tmp_path / "latest" / "state.json"
    path.write_text(json.dumps({"world_size": 1, "step": 30}), encoding="utf-8")
    with pytest.raises(
        UserError, match=r"step-00000030 cannot be read: state\.json lacks data, guard"
    ):
        run(tmp_path, steps=40)


def without_links(source, copy):
    shutil.copytree(source, copy, symlinks=True)
    (copy / "latest").unlink()


def with_links_followed(source, copy):
    shutil.copytree(source, copy)


@pytest.mark.parametrize("copied", [without_links, with_links_followed])
def test_a_copy_of_a_run_resumes_like_the_run(tmp_path, copied):
    run(tmp_path / "whole", steps=50)
    run(tmp_path / "cut", steps=30)
    copied(tmp_path / "cut", tmp_path / "copy")
    done = []
    run(tmp_path / "copy", steps=50, task=LineTask(done.append))
    assert len(done) == 20
    assert exact(tmp_path / "copy") == exact(tmp_path / "whole")
    assert (tmp_path / "copy" / "latest").resolve().name == "step-00000050"
    assert same_files(tmp_path / "copy" / "latest", tmp_path / "whole" / "latest")


def test_all_checkpoints_can_be_kept(tmp_path):
    run(tmp_path, keep_last=0)
    assert [path.name for path in sorted(tmp_path.glob("step-*"))] == [
        f"step-{n:08d}" for n in (10, 20, 30)
    ]


def test_the_checkpoint_is_written_before_the_validation(tmp_path):
    class Unreadable(LineTask):
        def validate(self, model):
            raise RunError("a held-out asset cannot be read")

    for done in (10, 20):
        with pytest.raises(RunError, match="held-out"):
            run(tmp_path, task=Unreadable(), validate_every=10)
        assert (tmp_path / "latest").resolve().name == f"step-{done:08d}"


def test_limits_may_change_when_a_run_is_resumed(tmp_path):
    run(tmp_path, steps=10)
    assert run(tmp_path, steps=20, max_bad_steps=50, max_failed_checkpoints=9)[0] == 20


# Bad gradients


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_batch_is_skipped(tmp_path, bad, caplog):
    change = lambda step, x: x * bad if step in (5, 6) else x  # noqa: E731
    with caplog.at_level(logging.WARNING):
        done, task = run(tmp_path, stream=PointStream(change), steps=60)
    assert done == 60
    assert all(parameter.isfinite().all() for parameter in task.model.parameters())
    assert metric_rows(tmp_path)[-1]["skipped"] == 2
    assert "Step 6 was not applied: not finite (1 skipped so far)" in caplog.text
    torch.testing.assert_close(
        task.model.weight.data, torch.tensor([[1.0, 2.0, 3.0]]), atol=0.3, rtol=0
    )
    for name in ("model", "ema"):
        tensors = checkpoint.safetensors.torch.load_file(
            tmp_path / "latest" / f"{name}.safetensors"
        )
        assert all(tensor.isfinite().all() for tensor in tensors.values())


def test_many_bad_batches_in_a_row_end_the_run_and_keep_its_checkpoint(tmp_path):
    change = lambda step, x: x * float("nan") if step >= 12 else x  # noqa: E731
    with pytest.raises(
        RunError,
        match=r"5 gradients in a row .* not finite; .* the last checkpoint is .*step-00000010",
    ):
        run(tmp_path, stream=PointStream(change), max_bad_steps=5)
    assert (tmp_path / "latest").resolve().name == "step-00000010"


def test_a_gradient_spike_is_skipped(tmp_path):
    before, after = [], []
    task = LineTask(
        lambda step: (before if step == 40 else after).append(task.model.weight.detach().clone())
    )
    run(
        tmp_path,
        task=task,
        stream=PointStream(lambda step, x: 50 * x if step == 40 else x),
        steps=42,
        clip_norm=1.0,
    )
    assert metric_rows(tmp_path)[40]["skipped"] == metric_rows(tmp_path)[39]["skipped"] + 1
    assert torch.equal(after[-1], before[0])


# Checkpoints that are written while training goes on


class BlockedWrites:
    """Lets the writing of the checkpoint of one step wait until `release` is called."""

    def __init__(self, monkeypatch, step):
        self.real = checkpoint.write_durably
        self.step = step
        self.released = threading.Event()
        self.waited = []
        monkeypatch.setattr(checkpoint, "write_durably", self.write)

    def write(self, path, data):
        if f"step-{self.step:08d}" in str(path):
            self.waited.append(self.released.wait(30))
        self.real(path, data)


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    """The checkpoint has the state of its own step, although five steps follow before it ends."""
    run(tmp_path / "whole", keep_last=0)
    blocked = BlockedWrites(monkeypatch, 10)
    unfinished = []

    def release(step):
        if step == 15:
            unfinished.append(checkpoint.latest(tmp_path / "run"))
            blocked.released.set()

    run(tmp_path / "run", task=LineTask(release), keep_last=0)
    assert unfinished == [None]
    assert blocked.waited
    assert all(blocked.waited)
    for step in (10, 20, 30):
        name = f"step-{step:08d}"
        assert same_files(tmp_path / "run" / name, tmp_path / "whole" / name)
    assert exact(tmp_path / "run") == exact(tmp_path / "whole")


def test_the_next_checkpoint_waits_for_the_one_before(tmp_path, monkeypatch):
    blocked = BlockedWrites(monkeypatch, 10)
    timer = threading.Timer(0.5, blocked.released.set)
    timer.start()
    run(tmp_path, keep_last=0)
    assert all(blocked.waited)
    assert [path.name for path in sorted(tmp_path.glob("step-*"))] == [
        "step-00000010",
        "step-00000020",
        "step-00000030",
    ]


def test_a_signal_waits_for_the_pending_checkpoint_and_writes_its_own(tmp_path, monkeypatch):
    blocked = BlockedWrites(monkeypatch, 10)

    def stop(step):
        if step == 12:
            os.kill(os.getpid(), signal.SIGTERM)
            blocked.released.set()

    with pytest.raises(Stopped):
        run(tmp_path, task=LineTask(stop), keep_last=0)
    assert [path.name for path in sorted(tmp_path.glob("step-*"))] == [
        "step-00000010",
        "step-00000013",
    ]


def test_an_unexpected_error_while_writing_is_a_failed_checkpoint(tmp_path, monkeypatch, caplog):
    real = checkpoint.write_durably

    def write(path, data):
        if "step-00000010" in str(path) and path.name == "state.json":
            raise RuntimeError("out of memory")
        real(path, data)

    monkeypatch.setattr(checkpoint, "write_durably", write)
    assert run(tmp_path)[0] == 30
    assert "Step 10: the checkpoint could not be written: RuntimeError: out of mem" in caplog.text
    assert not (tmp_path / "step-00000010").exists()
    assert not list(tmp_path.glob(".step*"))


@pytest.mark.gpu
def test_copies_on_the_host_are_those_of_the_gpu():
    device = torch.device("cuda")
    copies = checkpoint.HostCopies(device)
    for _ in range(2):
        value = {"a": [torch.randn(1000, device=device), 3], "b": torch.arange(4)}
        copied = copies.copy(value)
        copies.wait()
        assert copied["a"][0].is_pinned()
        assert torch.equal(copied["a"][0], value["a"][0].cpu())
        assert copied["a"][1] == 3
        assert torch.equal(copied["b"], value["b"])


# Full disks and signals


@pytest.fixture
def at_once(monkeypatch):
    """Write checkpoints before training goes on, so that the disk's state is that of the step."""

    class Immediate(ThreadPoolExecutor):
        def submit(self, *args, **options):
            future = super().submit(*args, **options)
            wait([future])
            return future

    monkeypatch.setattr(checkpoint, "ThreadPoolExecutor", Immediate)


@pytest.mark.usefixtures("at_once")
def test_training_continues_when_one_checkpoint_cannot_be_written(tmp_path, monkeypatch, caplog):
    real = checkpoint.write_durably
    full = {"now": False}

    def write(path, data):
        if full["now"] and path.name == "optimizer.pt":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        real(path, data)

    monkeypatch.setattr(checkpoint, "write_durably", write)
    task = LineTask(
        lambda step: full.update(now=10 <= step < 25)
    )  # only the checkpoint of step 20 fails
    with caplog.at_level(logging.ERROR):
        done, _ = run(tmp_path, task=task)
    assert done == 30
    assert "Step 20: the checkpoint could not be written" in caplog.text
    assert "No space left on device. The last checkpoint is" in caplog.text
    assert sorted(path.name for path in tmp_path.glob("*step*")) == [
        "step-00000010",
        "step-00000030",
    ]
    assert not list(tmp_path.glob(".step*"))


@pytest.mark.usefixtures("at_once")
def test_the_run_ends_when_checkpoints_cannot_be_written_repeatedly(tmp_path, caplog):
    """A limit of the file size stands in for a full disk: the kernel refuses larger files."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    task = LineTask(
        lambda step: (
            resource.setrlimit(resource.RLIMIT_FSIZE, (1500, limits[1])) if step == 10 else None
        )
    )
    try:
        with pytest.raises(
            RunError,
            match=r"2 checkpoints in a row could not be written .* checkpoint is .*step-00000010",
        ):
            run(tmp_path, task=task, steps=100, max_failed_checkpoints=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "latest").resolve().name == "step-00000010"
    assert not list(tmp_path.glob(".step*"))
    assert "metrics cannot be written" in caplog.text
    run(tmp_path, steps=100)  # without the limit the same command resumes
    assert exact(tmp_path)[10:] == metrics_of_an_uninterrupted_run(tmp_path)[10:]


def metrics_of_an_uninterrupted_run(tmp_path):
    run(tmp_path / "whole", steps=100)
    return exact(tmp_path / "whole")


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_with_a_checkpoint_of_the_current_step(tmp_path, signum):
    task = LineTask(lambda step: os.kill(os.getpid(), signum) if step == 13 else None)
    handlers = signal.getsignal(signum)
    with pytest.raises(Stopped) as stop:
        run(tmp_path / "cut", task=task, validate_every=1, sample_every=1)
    assert stop.value.signum == signum
    assert signal.getsignal(signum) is handlers
    assert (tmp_path / "cut" / "latest").resolve().name == "step-00000014"
    assert [path.name for path in task.sampled][-1] == "step-00000013", (
        "no previews are drawn after a signal"
    )
    run(tmp_path / "cut", validate_every=1, sample_every=1)
    run(tmp_path / "whole", validate_every=1, sample_every=1)
    assert exact(tmp_path / "cut") == exact(tmp_path / "whole")


class StalledStream(PointStream):
    """A stream that never has batch number `stalled`. A signal arrives while it is waited for."""

    def __init__(self, stalled, signum):
        super().__init__()
        self.stalled, self.signum, self.waits = stalled, signum, 0

    def wait(self, timeout_s):
        if self.step < self.stalled:
            return True
        self.waits += 1
        if self.waits == 3:
            os.kill(os.getpid(), self.signum)
        return False


@pytest.mark.parametrize("stalled", [10, 17])  # with and without a checkpoint that is pending
def test_a_signal_while_a_batch_is_waited_for_ends_the_run_with_a_checkpoint(tmp_path, stalled):
    run(tmp_path / "whole")
    stream = StalledStream(stalled, signal.SIGTERM)
    with pytest.raises(Stopped):
        run(tmp_path / "cut", stream=stream)
    assert stream.waits == 3
    assert (tmp_path / "cut" / "latest").resolve().name == f"step-{stalled:08d}"
    run(tmp_path / "cut")
    assert exact(tmp_path / "cut") == exact(tmp_path / "whole")
    assert same_files(tmp_path / "cut" / "latest", tmp_path / "whole" / "latest")


def test_a_time_limit_ends_a_run_that_waits_for_a_batch(tmp_path):
    done, _ = run(tmp_path, stream=StalledStream(5, 0), max_minutes=0.01)
    assert done == 5
    assert (tmp_path / "latest").resolve().name == "step-00000005"


def test_log_lines_show_the_time_left_and_the_last_one_names_the_files(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        run(tmp_path, steps=20, sample_every=20)
    lines = [record.getMessage() for record in caplog.records]
    steps = [line for line in lines if line.startswith("Step ")]
    assert len(steps) == 4
    line = re.search(r"^Step 5/20: loss .*  ([0-9.e-]+) s/step  0:(\d\d):(\d\d) left$", steps[0])
    assert line
    # 15 steps are left. The line has three digits of the seconds of a step, and whole seconds.
    assert abs(60 * int(line[2]) + int(line[3]) - 15 * float(line[1])) <= 0.51 + 0.01 * 15
    assert lines[-1] == (
        f"Done: 20 of 20 steps; checkpoints are in {tmp_path}, metrics in "
        f"{tmp_path / 'metrics.jsonl'}, previews in {tmp_path / 'samples'}/."
    )


def test_a_time_limit_ends_a_run_early_with_a_checkpoint(tmp_path):
    done, _ = run(tmp_path, steps=10_000_000, max_minutes=0.005, checkpoint_every=10_000_000)
    assert 0 < done < 10_000_000
    assert (tmp_path / "latest").resolve().name == f"step-{done:08d}"


def test_partial_checkpoints_of_a_killed_run_are_deleted(tmp_path):
    (tmp_path / ".step-00000010.partial").mkdir()
    (tmp_path / "step-00000010").mkdir()  # renamed before `latest` was set
    run(tmp_path)
    assert not list(tmp_path.glob(".step*"))
    assert (tmp_path / "step-00000010" / "state.json").exists()
