"""The loop on a model of four numbers: learning, resuming to the bit, bad gradients, full disks, signals."""

import copy
import errno
import json
import logging
import os
import re
import resource
import shutil
import signal
from dataclasses import replace

import pytest
import torch

from pipeline.core.errors import RunError, UserError
from pipeline.core.signals import Stopped
from tests.train.toy_model import LineTask, PointStream, run
from train.engine import checkpoint
from train.engine.config import LoopConfig
from train.engine.optimizer import GradientGuard, make_optimizer, update_average


def rows(out, event=None):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line.get("event") == event]


def exact(out):
    """What must be the same to the bit; times are not."""
    names = ("step", "loss", "error", "grad_norm", "lr", "tokens", "skipped")
    return [[row[name] for name in names] for row in rows(out)]


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


def test_learns_and_leaves_what_it_promises(tmp_path):
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
    assert [row["step"] for row in rows(tmp_path)] == list(range(1, 201))
    assert {
        "loss",
        "error",
        "grad_norm",
        "lr",
        "tokens_per_s",
        "mfu",
        "data_s",
        "resolution",
    } <= rows(tmp_path)[0].keys()
    assert [row["step"] for row in rows(tmp_path, "validation")] == [50, 100, 150, 200]
    assert [path.name for path in task.sampled] == ["step-00000100", "step-00000200"]
    config = json.loads((tmp_path / "latest" / "config.json").read_text())
    assert (config["format_version"], config["model"]) == (1, "Line")
    assert {"versions", "commit", "training", "config"} <= config.keys()


@pytest.mark.parametrize("stop", [7, 10, 23])
def test_resumes_to_the_bit_after_any_end(tmp_path, stop):
    """Cut off after `stop` steps without warning, between two checkpoints: the next ones are those of a whole run."""

    def crash(step):
        if step == stop:
            raise KeyboardInterrupt

    run(tmp_path / "whole", validate_every=7)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", task=LineTask(crash), validate_every=7)
    assert len(rows(tmp_path / "cut")) == stop
    stream = PointStream()
    run(tmp_path / "cut", stream=stream, validate_every=7)
    assert exact(tmp_path / "cut") == exact(tmp_path / "whole")
    assert stream.closed
    assert same_files(tmp_path / "cut" / "latest", tmp_path / "whole" / "latest")
    assert [r["loss"] for r in rows(tmp_path / "cut", "validation")] == [
        r["loss"] for r in rows(tmp_path / "whole", "validation")
    ]


def test_steps_may_be_raised(tmp_path):
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
    path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": 2}))
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


def test_what_a_state_lacks_is_named(tmp_path):
    run(tmp_path)
    path = tmp_path / "latest" / "state.json"
    path.write_text(json.dumps({"world_size": 1, "step": 30}))
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
def test_a_copy_of_a_run_goes_on_where_the_run_would(tmp_path, copied):
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


def test_a_validation_that_ends_the_run_costs_no_step(tmp_path):
    class Unreadable(LineTask):
        def validate(self, model):
            raise RunError("a held-out asset cannot be read")

    for done in (10, 20):
        with pytest.raises(RunError, match="held-out"):
            run(tmp_path, task=Unreadable(), validate_every=10)
        assert (tmp_path / "latest").resolve().name == f"step-{done:08d}"


def test_limits_may_change_when_a_run_goes_on(tmp_path):
    run(tmp_path, steps=10)
    assert run(tmp_path, steps=20, max_bad_steps=50, max_failed_checkpoints=9)[0] == 20


def test_where_a_run_starts_matters_at_its_start_alone(tmp_path):
    with pytest.raises(
        UserError, match="nowhere does not exist; train it first, or name a checkpoint with --init"
    ):
        checkpoint.check_init(tmp_path / "nowhere", tmp_path / "out")
    run(tmp_path / "out", steps=10)
    checkpoint.check_init(tmp_path / "nowhere", tmp_path / "out")
    checkpoint.check_init(None, tmp_path / "new")


def test_starts_from_the_average_of_another_run(tmp_path):
    _, first = run(tmp_path / "first", steps=50)
    seen = []
    task = LineTask(lambda step: seen.append(task.model.weight.detach().clone()))
    run(tmp_path / "second", task=task, steps=1, init=tmp_path / "first" / "latest")
    average = checkpoint.safetensors.torch.load_file(
        tmp_path / "first" / "latest" / "ema.safetensors"
    )
    assert torch.equal(seen[0], average["weight"])
    assert not torch.equal(seen[0], first.model.weight)
    with pytest.raises(UserError, match="is not a checkpoint"):
        run(tmp_path / "third", init=tmp_path)


# Bad gradients


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_batch_costs_its_step_only(tmp_path, bad, caplog):
    change = lambda step, x: x * bad if step in (5, 6) else x  # noqa: E731
    with caplog.at_level(logging.WARNING):
        done, task = run(tmp_path, stream=PointStream(change), steps=60)
    assert done == 60
    assert all(parameter.isfinite().all() for parameter in task.model.parameters())
    assert rows(tmp_path)[-1]["skipped"] == 2
    assert "Step 6 was not applied: not finite (1 skipped so far)" in caplog.text
    torch.testing.assert_close(
        task.model.weight.data, torch.tensor([[1.0, 2.0, 3.0]]), atol=0.3, rtol=0
    )
    for name in ("model", "ema"):
        tensors = checkpoint.safetensors.torch.load_file(
            tmp_path / "latest" / f"{name}.safetensors"
        )
        assert all(tensor.isfinite().all() for tensor in tensors.values())


def test_many_bad_batches_end_the_run_and_keep_its_checkpoint(tmp_path):
    change = lambda step, x: x * float("nan") if step >= 12 else x  # noqa: E731
    with pytest.raises(
        RunError,
        match=r"5 gradients in a row .* not finite; .* the last checkpoint is .*step-00000010",
    ):
        run(tmp_path, stream=PointStream(change), max_bad_steps=5)
    assert (tmp_path / "latest").resolve().name == "step-00000010"


def test_a_spike_is_not_applied(tmp_path):
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
    assert rows(tmp_path)[40]["skipped"] == rows(tmp_path)[39]["skipped"] + 1
    assert torch.equal(after[-1], before[0])


def test_guard_gets_used_to_a_lasting_change():
    guard = GradientGuard(spike_factor=10, clip_norm=1.0, max_bad_steps=100)
    assert not any(guard.judge(1.0, 0.2) for _ in range(60))
    assert guard.judge(1.0, 0.9) == "", (
        "10 times the usual, but below the norm to which all are clipped"
    )
    assert guard.judge(1.0, 30.0) == "150 times the usual gradient"
    assert guard.judge(float("nan"), 0.2) == guard.judge(1.0, float("inf")) == "not finite"
    guard.judge(1.0, 0.2)
    verdicts = [guard.judge(1.0, 30.0) for _ in range(80)]
    assert all(verdicts[:5])
    assert not any(verdicts[5:6]), "what lasts is no bad batch"
    assert not any(verdicts[60:])
    assert all(guard.judge(float("nan"), 1.0) for _ in range(10)), "but this is one for ever"
    assert guard.in_a_row == 10
    copy = GradientGuard(10, 1.0, 100)
    copy.restore(json.loads(json.dumps(guard.state())))
    assert copy == guard


# Full disks and signals


def test_a_full_disk_keeps_the_last_checkpoint_and_training_goes_on(tmp_path, monkeypatch, caplog):
    real = checkpoint.write_durably
    full = {"now": False}

    def write(path, data):
        if full["now"] and path.name == "optimizer.pt":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        real(path, data)

    monkeypatch.setattr(checkpoint, "write_durably", write)
    task = LineTask(
        lambda step: full.update(now=10 <= step < 25)
    )  # the checkpoint of step 20 fails, that of 30 does not
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


def test_a_disk_that_stays_full_ends_the_run(tmp_path, caplog):
    """The kernel refuses writes beyond a size, in every file: a stand-in for a disk that is full for real."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    task = LineTask(
        lambda step: (
            resource.setrlimit(resource.RLIMIT_FSIZE, (1500, limits[1])) if step == 10 else None
        )
    )
    try:
        with pytest.raises(
            RunError,
            match=r"2 checkpoints in a row could not be written .*the last checkpoint is .*step-00000010",
        ):
            run(tmp_path, task=task, steps=100, max_failed_checkpoints=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "latest").resolve().name == "step-00000010"
    assert not list(tmp_path.glob(".step*"))
    assert "metrics cannot be written" in caplog.text
    run(tmp_path, steps=100)  # room again: the same command goes on
    assert exact(tmp_path)[10:] == exact_whole(tmp_path)[10:]


def exact_whole(tmp_path):
    run(tmp_path / "whole", steps=100)
    return exact(tmp_path / "whole")


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_and_keeps_it(tmp_path, signum):
    task = LineTask(lambda step: os.kill(os.getpid(), signum) if step == 13 else None)
    handlers = signal.getsignal(signum)
    with pytest.raises(Stopped) as stop:
        run(tmp_path / "cut", task=task, validate_every=1, sample_every=1)
    assert stop.value.signum == signum
    assert signal.getsignal(signum) is handlers
    assert (tmp_path / "cut" / "latest").resolve().name == "step-00000014"
    assert [path.name for path in task.sampled][-1] == "step-00000013", (
        "nothing is drawn when there is a hurry"
    )
    run(tmp_path / "cut", validate_every=1, sample_every=1)
    run(tmp_path / "whole", validate_every=1, sample_every=1)
    assert exact(tmp_path / "cut") == exact(tmp_path / "whole")


def test_a_time_limit_ends_a_run_early_with_a_checkpoint(tmp_path):
    done, _ = run(tmp_path, steps=10_000_000, max_minutes=0.005, checkpoint_every=10_000_000)
    assert 0 < done < 10_000_000
    assert (tmp_path / "latest").resolve().name == f"step-{done:08d}"


def test_a_checkpoint_half_written_by_a_killed_run_is_swept_up(tmp_path):
    (tmp_path / ".step-00000010.partial").mkdir()
    (tmp_path / "step-00000010").mkdir()  # renamed, but `latest` was not set
    run(tmp_path)
    assert not list(tmp_path.glob(".step*"))
    assert (tmp_path / "step-00000010" / "state.json").exists()


# Optimiser and options


def test_average_follows_by_its_definition():
    a, b = (torch.nn.Linear(3, 2).requires_grad_(True) for _ in range(2))
    expected = 0.9 * a.weight.detach().double() + 0.1 * b.weight.detach().double()
    b.bias.requires_grad_(False)
    bias = a.bias.detach().clone()
    update_average(a, b, 0.9)
    torch.testing.assert_close(a.weight.double(), expected, atol=1e-7, rtol=0)
    assert torch.equal(a.bias, bias), "what is not trained is not touched"


def test_only_matrices_decay():
    groups = make_optimizer(
        torch.nn.Linear(3, 2), LoopConfig(weight_decay=0.1), torch.device("cpu")
    ).param_groups
    assert [(group["weight_decay"], [p.ndim for p in group["params"]]) for group in groups] == [
        (0.1, [2]),
        (0.0, [1]),
    ]


def test_the_optimizer_of_matrices_gives_each_its_polar_factor_and_the_others_adamw():
    """Against the SVD: U V^T times the rate, for linears, our convolutions and those of torch, in the first step."""
    torch.manual_seed(0)
    model = torch.nn.ModuleDict(
        {"linear": torch.nn.Linear(6, 4), "dense": torch.nn.Conv3d(3, 5, 3)}
    )
    model["sparse"] = torch.nn.ParameterList(
        [torch.randn(27, 4, 3), torch.randn(1, 6)]
    )  # the row is AdamW's
    cfg = LoopConfig(optimizer="muon", weight_decay=0.1, learning_rate=0.01)
    optimizer = make_optimizer(model, cfg, torch.device("cpu"))
    twin = copy.deepcopy(model)
    adamw = make_optimizer(twin, replace(cfg, optimizer="adamw"), torch.device("cpu"))
    before = {}
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        grad = torch.randn_like(p)
        before[name] = (p.detach().clone(), grad)
        p.grad, q.grad = grad.clone(), grad.clone()
    optimizer.step()
    adamw.step()
    flat = {"linear.weight": (4, 6), "dense.weight": (5, 81), "sparse.0": (108, 3)}
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        old, grad = before[name]
        if name not in flat:
            assert torch.equal(p, q), name
            continue
        change = (old * (1 - 0.01 * 0.1) - p).view(flat[name]).detach() / (
            0.01 * 0.2 * max(flat[name]) ** 0.5
        )
        U, _, Vh = torch.linalg.svd(grad.view(flat[name]), full_matrices=False)
        along = torch.diagonal(U.T @ change @ Vh.T)
        assert ((along > 0.6) & (along < 1.3)).all(), (name, along)
        torch.testing.assert_close(change, (U * along) @ Vh, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_an_optimizer_goes_on_from_its_saved_state_bit_for_bit(name, tmp_path):
    cfg, cpu, path = (
        LoopConfig(optimizer=name, learning_rate=0.01),
        torch.device("cpu"),
        tmp_path / "optimizer.pt",
    )
    torch.manual_seed(0)
    grads = [[torch.randn(4, 6), torch.randn(4)] for _ in range(6)]
    model = torch.nn.Linear(6, 4)
    optimizer = make_optimizer(model, cfg, cpu)
    for turn, pair in enumerate(grads):
        if turn == 3:
            torch.save(optimizer.state_dict(), path)
            twin = copy.deepcopy(model)
        for p, grad in zip(model.parameters(), pair, strict=True):
            p.grad = grad.clone()
        optimizer.step()
    resumed = make_optimizer(twin, cfg, cpu)
    resumed.load_state_dict(torch.load(path, weights_only=True))
    for pair in grads[3:]:
        for p, grad in zip(twin.parameters(), pair, strict=True):
            p.grad = grad.clone()
        resumed.step()
    assert all(
        torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True)
    )


def test_learning_rates():
    constant = LoopConfig(steps=100, learning_rate=1.0, warmup_steps=3)
    assert [constant.rate(step) for step in (0, 1, 3, 99)] == [0.25, 0.5, 1.0, 1.0]
    cosine = LoopConfig(steps=100, learning_rate=1.0, warmup_steps=0, schedule="cosine")
    assert [cosine.rate(step) for step in (0, 50, 100)] == pytest.approx([1.0, 0.55, 0.1])


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("steps", 0),
        ("learning_rate", 0.0),
        ("ema_decay", 1.0),
        ("max_minutes", 0.0),
        ("spike_factor", 1.0),
        ("keep_last", -1),
        ("betas", (0.9, 1.0)),
        ("seed", 1 << 40),
    ],
)
def test_options_out_of_range(option, value):
    with pytest.raises(ValueError, match=re.escape(f", got {value}")) as caught:
        LoopConfig(**{option: value})
    assert str(caught.value).startswith(f"{option} must be ")
