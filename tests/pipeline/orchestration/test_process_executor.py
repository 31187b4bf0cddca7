"""Builds without Ray: the same bytes, the same verdicts, and no process that outlives a build."""

import signal
import threading
from dataclasses import replace

import pytest

from pipeline.core.errors import RunError
from pipeline.inspection.verification import verify
from pipeline.orchestration import process_executor
from pipeline.orchestration.isolated_process import IsolatedProcess
from pipeline.orchestration.process_executor import ProcessExecutor
from tests.child_python import start_python
from tests.pipeline.builds import (
    TINY,
    assert_same,
    build,
    config,
    contents,
    environment,
    finish,
    marked,
    rows_of,
    start,
    survivors,
    wait_until,
)
from tests.pipeline.crashing_source import CrashingSource

WITHOUT_RAY = (
    "import sys; sys.modules['ray'] = None; from pipeline import build; build.main(sys.argv[1:])"
)


def processes(out, **options):
    return replace(config(out, **options), executor="processes")


@pytest.fixture(scope="module")
def crashing_build(tmp_path_factory):
    """A build of 8 assets in two shards, three of which end badly and one of which is retried."""
    folder = tmp_path_factory.mktemp("crashing")
    (folder / "notes").mkdir()
    behaviours = ((1, "segfault"), (3, "vanish"), (4, "trouble_once"), (6, "raise"))
    source = CrashingSource(count=8, behaviours=behaviours, notes=folder / "notes")
    cfg = processes(folder / "out", shard_size=4, limits={"retry_wait_s": 0.2})
    return cfg, build(cfg, [source]), source


def test_assets_end_with_their_reason_and_all_others_are_done(crashing_build):
    cfg, total, source = crashing_build
    assert total == {"done": 5, "rejected": 1, "failed": 2}
    assert [row.reason for row in rows_of(cfg.out)] == [
        *("", "crashed_signal_11", "", "file_not_readable"),
        *("", "", "error_runtimeerror", ""),
    ]
    assert len(list(source.notes.glob("4.*"))) == 2
    assert verify(cfg.out) == []
    assert not (cfg.out / ".scratch").exists()


@pytest.mark.usefixtures("shared_ray")
def test_the_bytes_are_those_of_a_build_on_ray(crashing_build, tmp_path):
    cfg, total, source = crashing_build
    on_ray = replace(cfg, executor="ray", out=tmp_path / "out")
    (tmp_path / "notes").mkdir()
    assert build(on_ray, [replace(source, notes=tmp_path / "notes")]) == total
    assert_same(contents(cfg.out), contents(on_ray.out))


def test_a_build_that_was_killed_leaves_no_process_and_resumes(tmp_path, tiny_build):
    """The interpreter of this build has no Ray."""
    args = [*TINY, "--limit", 12, "--resolutions", 64, 96, "--val-percent", 30]
    args = ["-c", WITHOUT_RAY, *args, "--executor", "processes", "--out", tmp_path / "out"]
    env = environment(tmp_path)
    killed = start_python(*args, env=env)
    wait_until(lambda: list((tmp_path / "out").glob("shards/*/manifest.json")))
    killed.send_signal(signal.SIGKILL)
    finish(killed, -signal.SIGKILL)
    assert survivors(env) == []
    assert len(list((tmp_path / "out").glob("shards/*/manifest.json"))) < 4
    finish(start_python(*args, env=env))
    assert_same(contents(tmp_path / "out"), contents(tiny_build))


def test_a_signal_ends_the_build_and_its_processes(tmp_path):
    env = environment(tmp_path)
    args = [*TINY, "--limit", 12, "--resolutions", 64, "--executor", "processes"]
    process = start("pipeline.build", *args, "--out", tmp_path / "out", env=env)
    wait_until(lambda: len(marked(env, "isolated_process")) == 2)
    process.send_signal(signal.SIGINT)
    finish(process, 128 + signal.SIGINT)
    assert survivors(env, within_s=5) == []


def test_a_full_disk_stops_the_build_in_one_line(tmp_path):
    with pytest.raises(RunError, match=r"disk of .* is full .* run the same command to resume"):
        build(processes(tmp_path), [CrashingSource(count=3, behaviours=((2, "disk"),))])


class Server:
    """An IsolatedProcess that notes when it starts and is called."""

    def __init__(self, events):
        self.events, self.is_started = events, False

    def start(self):
        self.is_started = True
        self.events.append("start")

    def retire(self):
        pass

    close = retire


def test_one_process_compiles_before_any_other_starts(tmp_path, monkeypatch):
    events = []
    together = threading.Barrier(3)

    def run(*_, process, gpu):
        events.append("call")
        together.wait(timeout=10)  # all three processes are in use at the same time

    monkeypatch.setattr(process_executor, "isolated_process", lambda _: Server(events))
    monkeypatch.setattr(process_executor, "run_asset_task", run)
    source = CrashingSource(count=3)
    with ProcessExecutor(replace(config(tmp_path), workers=3), {source.name: source}) as executor:
        tasks = [executor.submit_asset(record, "000000", (), 1) for record in source.records()]
        for task in tasks:
            executor.result(task)
    assert events[0] == "start"
    assert sorted(events) == ["call"] * 3 + ["start"]


def test_assets_share_a_gpu_up_to_the_given_number(tmp_path):
    cfg = replace(config(tmp_path), workers=6, device="cuda", assets_per_gpu=2)
    with ProcessExecutor(cfg, {}) as executor:
        assert executor.task_limit == 4


def test_a_retired_process_starts_no_server():
    process = IsolatedProcess("os:getpid")
    process.retire()
    with pytest.raises(RunError, match="is retired"):
        process.start()
