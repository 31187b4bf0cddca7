"""A build on several Ray nodes survives the loss of a worker, a node and the driver."""

import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from pipeline.inspection.verification import verify
from tests.child_python import ROOT
from tests.pipeline.builds import (
    TINY,
    assert_same,
    contents,
    environment,
    finish,
    marked,
    start,
    survivors,
    wait_until,
)
from tests.pipeline.test_ray_job import RAY, free_ports

pytestmark = pytest.mark.slow


class Nodes:
    """Ray nodes on this machine, each a process tree known by the mark in its environment."""

    def __init__(self, home: Path, temp: Path):
        self.home, self.temp, self.marked = home, temp, []
        port, *others = free_ports(4)
        names = ("ray-client-server-port", "dashboard-agent-listen-port", "metrics-export-port")
        options = [f"--{name}={number}" for name, number in zip(names, others, strict=True)]
        self.address = f"127.0.0.1:{port}"
        self._start(
            "--head", f"--port={port}", "--include-dashboard=false", "--num-cpus=0", *options
        )
        self._joined(1)

    def add(self) -> dict[str, str]:
        """A node with one CPU; its environment, by which it is killed."""
        ports = free_ports(2)
        names = ("dashboard-agent-listen-port", "metrics-export-port")
        options = [f"--{name}={port}" for name, port in zip(names, ports, strict=True)]
        env = self._start(f"--address={self.address}", "--num-cpus=1", *options)
        self._joined(len(self.marked))
        return env

    def _start(self, *options: str) -> dict[str, str]:
        env = environment(self.home)
        command = [
            RAY,
            "start",
            "--block",
            "--node-ip-address=127.0.0.1",
            "--object-store-memory=100000000",
            *options,
        ]
        if "--head" in options:
            command.append(f"--temp-dir={self.temp}")
        log = (self.home / f"node-{len(self.marked)}.log").open("w", encoding="utf-8")
        process = subprocess.Popen(
            list(map(str, command)), env=env, stdout=log, stderr=log, cwd=ROOT
        )
        self.marked.append((env, process))
        return env

    def _joined(self, count: int) -> None:
        """Wait until so many nodes have joined. Ray lists lost nodes, too."""
        code = (
            f"import ray; ray.init({self.address!r}, log_to_driver=False, logging_level='ERROR'); "
        )
        code += f"assert len(ray.nodes()) >= {count}"
        command = [str(RAY.with_name("python")), "-c", code]
        wait_until(
            lambda: (
                not subprocess.run(command, env=self.marked[0][0], capture_output=True).returncode
            ),
            120,
        )

    def close(self) -> None:
        for env, process in reversed(self.marked):
            kill_all(env)
            process.wait(60)


def kill_all(env: dict[str, str]) -> None:
    """SIGKILL to a whole node, as if its power were cut."""
    while processes := marked(env):
        for process in processes:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        time.sleep(0.05)


@pytest.fixture
def nodes(tmp_path):
    temp = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # short: Ray's sockets lie in it
    cluster = Nodes(tmp_path, temp)
    try:
        yield cluster
    finally:
        cluster.close()
        shutil.rmtree(temp, ignore_errors=True)


@pytest.mark.timeout(900)
def test_a_lost_worker_a_lost_node_and_a_lost_driver_leave_no_trace(tiny_build, nodes, tmp_path):
    out = tmp_path / "build"
    first, second = nodes.add(), nodes.add()
    args = [
        *TINY,
        "--limit",
        "12",
        "--val-percent",
        "30",
        "--out",
        out,
        "--resolutions",
        "64",
        "96",
    ]
    env = environment(tmp_path) | {"RAY_ADDRESS": nodes.address}
    driver = start("pipeline.build", *args, env=env)

    def landed():
        assert driver.poll() is None, driver.communicate()[0]
        return len(list(out.glob(".scratch/*/*/result.json"))) + 3 * len(
            list(out.glob("shards/*/manifest.json"))
        )

    wait_until(lambda: landed() >= 1)
    wait_until(lambda: landed() and marked(first, "ray::_asset_task"))
    os.kill(marked(first, "ray::_asset_task")[0].pid, signal.SIGKILL)
    wait_until(lambda: landed() >= 4)
    assert landed() < 12, "the build was over before its node was lost"
    kill_all(second)
    nodes.add()
    before = landed()
    wait_until(lambda: landed() > before)
    driver.send_signal(signal.SIGKILL)
    driver.wait(60)
    assert len(list(out.glob("shards/*/manifest.json"))) < 4, (
        "the build was over before its driver was lost"
    )
    wait_until(
        lambda: not marked(first, "ray::_asset_task"), 120
    )  # Ray ends what a lost driver had begun
    output = finish(start("pipeline.build", *args, env=env))
    assert "12 assets are done, 0 rejected and 0 failed" in output, output
    assert_same(contents(out), contents(tiny_build))
    assert verify(out) == []
    assert not (out / ".scratch").exists()
    assert survivors(env) == []
