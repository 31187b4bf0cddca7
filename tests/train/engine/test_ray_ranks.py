"""The launcher of ranks on Ray without a cluster: the ranks' processes, failures and restarts."""

from __future__ import annotations

import multiprocessing
import signal
import time

import psutil
import pytest

from pipeline.core.errors import RunError, UserError
from pipeline.core.signals import Stop, Stopped
from train.engine import ranks, ray_ranks
from train.engine.config import RankOptions
from train.engine.rank_process import RankPlace
from train.engine.ray_ranks import Failure, RankProcess, with_restarts

LOST = Failure(reason="Rank 1 on 10.0.0.2 was lost", code=None)


def ended(rank, timeout_s=20.0):
    """Poll a rank until it has ended. Return its lines and its exit code."""
    deadline, lines, code = time.monotonic() + timeout_s, [], None
    while code is None:
        assert time.monotonic() < deadline
        new, code = rank.poll()
        lines += new
        time.sleep(0.01)
    return lines, code


def start(tmp_path, code, **env):
    (tmp_path / "probe.py").write_text(code, encoding="utf-8")
    rank = RankProcess()
    assert rank.start("probe", ["a b"], {"PYTHONUNBUFFERED": "1", **env}, tmp_path) == ""
    return rank


def test_a_rank_has_its_environment_and_all_of_its_lines_are_passed_on(tmp_path):
    place = RankPlace(rank=3, size=4, local_rank=1, local_size=2)
    code = "import os, sys; print(sys.argv[1], *(os.environ[n] for n in NAMES)); sys.exit('é')"
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    rank = start(tmp_path, f"NAMES = {names}\n{code}", **place.environment("10.0.0.1", 77))
    assert ended(rank) == (["a b 3 4 1 10.0.0.1 77", "é"], 1)


def test_a_rank_gets_signals(tmp_path):
    rank = start(tmp_path, "import time; print('up'); time.sleep(60)")
    while not rank.poll()[0]:
        time.sleep(0.01)
    rank.signal(signal.SIGTERM)
    assert ended(rank)[1] == -signal.SIGTERM


def test_a_rank_is_killed_with_its_actor(tmp_path):
    """Otherwise it would write files beside the rank that replaces it."""
    (tmp_path / "probe.py").write_text(
        "import os, pathlib, time\n"
        "pathlib.Path('new').write_text(str(os.getpid()), encoding='utf-8')\n"
        "os.rename('new', 'pid'); time.sleep(60)",
        encoding="utf-8",
    )

    def act() -> None:
        RankProcess().start("probe", [], {}, tmp_path)
        time.sleep(60)

    actor = multiprocessing.get_context("fork").Process(target=act)
    actor.start()
    deadline = time.monotonic() + 20
    while not (tmp_path / "pid").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    actor.kill()
    pid = int((tmp_path / "pid").read_text(encoding="utf-8"))
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_node_without_the_working_directory_says_so(tmp_path):
    problem = RankProcess().start("probe", [], {}, tmp_path / "missing")
    assert problem == f"there is no directory {tmp_path / 'missing'}"


def attempts(*results):
    """Return a function that gives one result after another, and the results that are left."""
    left = list(results)
    return lambda: left.pop(0), left


@pytest.mark.parametrize(
    ("results", "code"),
    [
        ([None], 0),
        ([LOST, LOST, None], 0),
        ([Failure(reason="Rank 0 ended with exit code 2", code=2)], 2),
    ],
)
def test_lost_ranks_are_started_again_and_refused_options_are_not(results, code, caplog):
    attempt, left = attempts(*results)
    assert with_restarts(attempt, 2, Stop()) == code
    assert not left
    assert caplog.messages == [
        f"Rank 1 on 10.0.0.2 was lost. Restart {number} of 2 from the last checkpoint."
        for number in range(1, results.count(LOST) + 1)
    ]


def test_the_number_of_restarts_is_bounded():
    attempt, left = attempts(*[LOST] * 4)
    with pytest.raises(RunError, match=r"was lost, and all 2 restarts are used up; .* to resume"):
        with_restarts(attempt, 2, Stop())
    assert len(left) == 1


def test_a_signal_ends_the_restarts():
    stop = Stop()
    stop.signum = signal.SIGTERM
    attempt, left = attempts(LOST, None)
    with pytest.raises(Stopped):
        with_restarts(attempt, 2, stop)
    assert left == [None]


def test_the_failure_that_explains_the_others_is_the_reason():
    others = Failure(reason="Rank 0 ended with exit code 1", code=1)
    refused = Failure(reason="Rank 2 ended with exit code 2", code=2)
    assert min([others, LOST], key=ray_ranks._severity) is LOST
    assert min([others, LOST, refused], key=ray_ranks._severity) is refused


def test_a_run_on_ray_needs_a_cluster_that_answers(monkeypatch):
    options = RankOptions(ray_gpus=2)
    monkeypatch.setattr("ray.is_initialized", lambda: False)  # as outside this process of tests
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(UserError, match="--ray-gpus needs a Ray cluster: submit the command with"):
        ranks.started_ranks("train.dit", [], options)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(UserError, match=r"no Ray at RAY_ADDRESS=127.0.0.1:1: .*; correct it"):
        ranks.started_ranks("train.dit", [], options)

    def refuse(**_):
        raise RuntimeError("Version mismatch:\nthe cluster runs 2.9")

    monkeypatch.setenv("RAY_ADDRESS", "here")
    monkeypatch.setattr("ray.init", refuse)
    with pytest.raises(UserError, match=r"^no Ray at RAY_ADDRESS=here: V.* 2\.9; correct it$"):
        ranks.started_ranks("train.dit", [], options)
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(UserError, match=r"--ray-gpus needs the package ray; pip install 'sparse3d"):
        ranks.started_ranks("train.dit", [], options)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"ray_gpus": 0}, "ray_gpus must be 1 or more, got 0"),
        ({"ray_gpus": 2, "gpus": 2}, "ray_gpus cannot be given together with gpus, got 2"),
        (
            {"ray_gpus": 2, "device": "cuda:1"},
            "ray_gpus needs device auto, cuda or cpu, got cuda:1",
        ),
        ({"ray_restarts": -1}, "ray_restarts must be 0 or more, got -1"),
    ],
)
def test_impossible_options_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        RankOptions(**values)
