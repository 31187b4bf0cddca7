"""A build as a job on a Ray head that was started before."""

import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

from pipeline.inspection.verification import verify
from pipeline.storage.manifest import read_manifest
from tests.child_python import ROOT
from tests.pipeline.builds import TINY, environment, finish, start, survivors

RAY = Path(sys.executable).with_name("ray")


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for port_socket in sockets:
        port_socket.bind(("127.0.0.1", 0))
    ports = [port_socket.getsockname()[1] for port_socket in sockets]
    for port_socket in sockets:
        port_socket.close()
    return ports


@contextmanager
def ray_head(folder, env):
    """Start a Ray head and yield the address of its dashboard.

    It is ended by process id. `ray stop` would end every Ray on the machine.
    """
    env["PATH"] = f"{RAY.parent}:{env['PATH']}"  # as in an activated virtual environment
    names = ["port", "dashboard-port", "dashboard-agent-listen-port", "dashboard-agent-grpc-port"]
    names += ["runtime-env-agent-port", "ray-client-server-port", "metrics-export-port"]
    ports = dict(zip(names, free_ports(len(names))))
    temp = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # a short path: Ray puts its sockets there
    options = [f"--{name}={port}" for name, port in ports.items()]
    command = [
        RAY,
        "start",
        "--head",
        "--block",
        "--node-ip-address=127.0.0.1",
        "--num-cpus=2",
        *options,
    ]
    command += ["--object-store-memory=100000000", f"--temp-dir={temp}", "--disable-usage-stats"]
    log = (folder / "head.log").open("w", encoding="utf-8")
    process = subprocess.Popen(list(map(str, command)), env=env, stdout=log, stderr=log, cwd=ROOT)
    address = f"http://127.0.0.1:{ports['dashboard-port']}"
    try:
        deadline = time.monotonic() + 120
        while subprocess.run(
            [RAY, "job", "list", "--address", address], env=env, capture_output=True
        ).returncode:
            assert process.poll() is None, (folder / "head.log").read_text(encoding="utf-8")
            assert time.monotonic() < deadline, (folder / "head.log").read_text(encoding="utf-8")
            time.sleep(0.5)
        yield address
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)
        log.close()
        remaining = survivors(env)
        shutil.rmtree(temp, ignore_errors=True)
    assert remaining == []


def build_in_a_job(address, env, out):
    """Submit a build of two assets as a user does, and check what it made."""
    command = ["python", "-m", "pipeline.build", "--preset", "smoke", *TINY, "--workers", "1"]
    command += ["--limit", "2", "--resolutions", "64", "--out", str(out)]
    submit = [str(RAY), "job", "submit", "--address", address, "--", *command]
    done = subprocess.run(
        submit,
        env=env,
        cwd=out.parent,
        text=True,
        capture_output=True,
        timeout=300,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "succeeded" in done.stdout
    assert verify(out) == []
    rows = read_manifest(out / "manifest" / "000000.parquet")
    assert [row.status for row in rows] == ["done", "done"]


def test_a_local_build_and_then_a_job_on_the_users_ray(tmp_path):
    """A submitted job builds a verified dataset after a local build.

    Without settings of its own, Ray writes a token into the home directory and demands it.
    """
    env = environment(tmp_path)
    del env["RAY_AUTH_MODE"]
    args = [*TINY, "--workers", 1, "--limit", 1, "--resolutions", 64, "--views", 1]
    finish(start("pipeline.build", *args, "--out", tmp_path / "local", env=env))
    assert not (tmp_path / ".ray").exists()
    with ray_head(tmp_path, env) as address:
        build_in_a_job(address, env, tmp_path / "out")
    assert not (tmp_path / ".ray").exists()
