import os
import resource
import signal
import time

import numpy as np
import psutil
import pytest

from pipeline.core.errors import RunError
from pipeline.orchestration.isolated_process import IsolatedProcess
from tests.child_python import start_python
from tests.pipeline.builds import wait_until
from tests.pipeline.crashing_source import CrashingSource

HERE = "tests.pipeline.orchestration.test_isolated_process"
GB = 10**9


def nothing():
    pass


def behave(argument):
    behaviour, folder = argument
    source = CrashingSource(count=1, behaviours=((0, behaviour),))
    source.materialize(next(source.records()), folder)


def write_limits(path):
    path.write_text(
        f"{resource.getrlimit(resource.RLIMIT_AS)[0]} {os.getpid()} {os.getppid()}",
        encoding="utf-8",
    )


def allocate(megabytes):
    np.ones(megabytes << 20, np.uint8)


def write_pids_and_sleep(folder):
    (folder / f"{os.getpid()}").touch()
    if os.fork() == 0:
        (folder / f"{os.getpid()}").touch()
    time.sleep(600)


def leave_a_child_behind(folder):
    if os.fork() == 0:
        (folder / f"{os.getpid()}").touch()
        time.sleep(600)
    wait_until(lambda: list(folder.iterdir()))


def kill_the_server(folder):
    (folder / f"{os.getpid()}").touch()
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(600)


def fail_for_all(_):
    raise RunError("no EGL on this machine")


def broken():
    raise RuntimeError("cannot even start")


@pytest.fixture(scope="module")
def isolated():
    one = IsolatedProcess(f"{HERE}:nothing")
    yield one
    one.close()


def call(isolated, name, argument, tmp_path, timeout_s=60.0, memory_bytes=8 * GB):
    log = tmp_path / "log.txt"
    return isolated.call(
        f"{HERE}:{name}", argument, log=log, timeout_s=timeout_s, memory_bytes=memory_bytes
    )


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [
        ("", ""),
        ("segfault", "crashed_signal_11"),
        ("abort", "crashed_signal_6"),
        ("memory", "out_of_memory"),
        ("leak", "out_of_memory"),
        ("disk", "disk_full"),
        ("raise", "error"),
        ("hang", "timeout"),
    ],
)
def test_a_call_ends_with_its_reason_and_the_next_one_is_not_harmed(
    isolated, tmp_path, behaviour, reason
):
    limit = 0.5 if behaviour == "hang" else 60
    end = call(
        isolated, "behave", (behaviour, tmp_path), tmp_path, timeout_s=limit, memory_bytes=3 * GB
    )
    assert end.reason == reason
    assert end.seconds < (5 if behaviour == "hang" else 60)
    assert call(isolated, "behave", ("", tmp_path), tmp_path).reason == ""


def test_the_detail_is_the_last_line_of_the_traceback(isolated, tmp_path):
    end = call(isolated, "behave", ("raise", tmp_path), tmp_path)
    assert end.detail == f"RuntimeError: a bug, seen in {tmp_path}"
    assert "Traceback" in (tmp_path / "log.txt").read_text(encoding="utf-8")


def test_an_error_that_is_nobodys_fault_is_told_apart(isolated, tmp_path):
    end = call(isolated, "fail_for_all", None, tmp_path)
    assert (end.reason, end.detail) == ("run_error", "no EGL on this machine")


def test_limits_hold_for_one_call_each_in_a_process_of_its_own(isolated, tmp_path):
    seen = []
    for limit in (2 * GB, 3 * GB):
        assert (
            call(isolated, "write_limits", tmp_path / "limits", tmp_path, memory_bytes=limit).reason
            == ""
        )
        seen.append((tmp_path / "limits").read_text(encoding="utf-8").split())
    assert [int(words[0]) for words in seen] == [2 * GB, 3 * GB]
    assert seen[0][1] != seen[1][1]
    assert seen[0][2] == seen[1][2]  # both forked from one server


def test_peak_memory_is_the_calls_own(isolated, tmp_path):
    large = call(isolated, "allocate", 300, tmp_path).peak_rss_bytes
    small = call(isolated, "allocate", 1, tmp_path).peak_rss_bytes
    assert 250 << 20 < large - small < 350 << 20


def test_a_hanging_call_takes_its_own_children_along(isolated, tmp_path):
    folder = tmp_path / "pids"
    folder.mkdir()
    assert (
        call(isolated, "write_pids_and_sleep", folder, tmp_path, timeout_s=1.5).reason == "timeout"
    )
    pids = [int(path.name) for path in folder.iterdir()]
    assert len(pids) == 2
    wait_until(lambda: not any(alive(pid) for pid in pids))


def test_a_call_that_returns_leaves_no_child_behind(isolated, tmp_path):
    folder = tmp_path / "pids"
    folder.mkdir()
    assert call(isolated, "leave_a_child_behind", folder, tmp_path).reason == ""
    (pid,) = [int(path.name) for path in folder.iterdir()]
    wait_until(lambda: not alive(pid))


def test_a_call_dies_with_its_server_and_the_next_gets_a_new_one(tmp_path):
    folder = tmp_path / "pids"
    folder.mkdir()
    one = IsolatedProcess(f"{HERE}:nothing")
    with pytest.raises(RunError, match="isolates assets died"):
        call(one, "kill_the_server", folder, tmp_path)
    (pid,) = [int(path.name) for path in folder.iterdir()]
    wait_until(lambda: not alive(pid))
    assert call(one, "allocate", 1, tmp_path).reason == ""
    one.close()


def test_nothing_outlives_a_killed_client(tmp_path):
    folder = tmp_path / "pids"
    folder.mkdir()
    code = (
        "from pathlib import Path\n"
        "from tests.pipeline.orchestration.test_isolated_process import *\n"
        f"one = IsolatedProcess('{HERE}:nothing'); folder = Path({str(folder)!r})\n"
        "call(one, 'write_pids_and_sleep', folder, folder.parent, timeout_s=600)\n"
    )
    client = start_python("-c", code)
    wait_until(lambda: len(list(folder.iterdir())) == 2)
    pids = [child.pid for child in psutil.Process(client.pid).children(recursive=True)]
    assert len(pids) == 3  # server, call, and what the call forked
    client.send_signal(signal.SIGKILL)
    client.communicate()
    wait_until(lambda: not any(alive(pid) for pid in pids))


def test_a_server_that_cannot_start_says_why(tmp_path):
    with pytest.raises(RunError, match="cannot even start"):
        call(IsolatedProcess(f"{HERE}:broken"), "allocate", 1, tmp_path)


def alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
