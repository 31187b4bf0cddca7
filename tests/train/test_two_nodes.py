"""Training on two nodes equals training on one: torchrun with node ranks, Slurm's recipe, Ray."""

import logging
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util import placement_group_table

from tests.child_python import ROOT, project_environment, start_python
from tests.pipeline.test_ray_job import free_ports
from tests.train.metric_rows import metric_rows
from train.vae import main

pytestmark = pytest.mark.slow
STEPS = 12


def options(build, out, **changes):
    """Return the words of a training command whose steps take tens of milliseconds."""
    chosen = {
        "--data": build,
        "--out": out,
        "--device": "cpu",
        "--bricks.resolutions": 32,
        "--bricks.batch-size": 1,
        "--loop.steps": STEPS,
        "--loop.schedule": "constant",  # runs of other lengths have the same first losses
        "--loop.checkpoint-every": 3,
        "--loop.validate-every": 0,
        "--loop.sample-every": 0,
        "--loop.log-every": 1,
        **changes,
    }
    return [str(word) for pair in chosen.items() for word in pair]


def losses(out):
    return [(row["step"], row["loss"]) for row in metric_rows(out)]


@pytest.fixture(scope="module")
def one_node(build, tmp_path_factory):
    """The losses of two ranks on one node."""
    out = tmp_path_factory.mktemp("one") / "run"
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)
    env = project_environment(OMP_NUM_THREADS="1")
    process = start_python(*launcher, "-m", "train.vae", *options(build, out), env=env)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    found = losses(out)
    assert [step for step, _ in found] == [*range(1, STEPS + 1)]
    return found


def test_two_groups_of_torchrun_have_the_losses_of_one_node(build, one_node, tmp_path):
    (port,) = free_ports(1)
    env = project_environment(OMP_NUM_THREADS="1")
    processes = []
    for node in range(2):
        launcher = ["-m", "torch.distributed.run", "--nnodes", 2, "--node-rank", node]
        launcher += ["--nproc-per-node", 1, "--master-addr", "127.0.0.1", "--master-port", port]
        command = [*launcher, "-m", "train.vae", *options(build, tmp_path / "run")]
        processes.append(start_python(*command, env=env))
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    assert losses(tmp_path / "run") == one_node


SRUN = """#!/bin/bash
# Runs the command once for each of two nodes, and passes SIGTERM on.
shift
for node in 0 1; do
    SLURM_NNODES=2 SLURM_NODEID=$node "$@" &
    pids="$pids $!"
done
trap 'kill -TERM $pids' TERM
code=0
for pid in $pids; do
    while kill -0 $pid 2>/dev/null; do wait $pid; last=$?; done
    [ $last = 0 ] || code=$last
done
exit $code
"""
SCONTROL = """#!/bin/bash
if [ $1 = requeue ]; then echo "$2" > "$REQUEUED"; else echo 127.0.0.1; echo 127.0.0.1; fi
"""


@pytest.fixture
def slurm(tmp_path):
    """Start the recipe with commands that stand for Slurm's, on two nodes of one GPU."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (folder / name).write_text(text, encoding="utf-8")
        (folder / name).chmod(stat.S_IRWXU)
    (port,) = free_ports(1)
    env = project_environment(
        OMP_NUM_THREADS="1",
        PATH=f"{folder}:{os.environ['PATH']}",
        PYTHON=sys.executable,
        PORT=str(port),
        REQUEUED=str(tmp_path / "requeued"),
        SLURM_GPUS_ON_NODE="1",
        SLURM_JOB_NODELIST="node-[0-1]",
        SLURM_JOB_ID="77",
    )
    recipe = ROOT / "examples" / "recipes" / "slurm.sbatch"

    def start(*words):
        return subprocess.Popen(
            ["bash", recipe, *map(str, words)],
            env=env,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
        )

    return start


def test_the_recipe_for_slurm_has_the_losses_of_one_node_and_is_requeued_after_sigterm(
    slurm, build, one_node, tmp_path
):
    out, requeued = tmp_path / "run", tmp_path / "requeued"
    job = slurm("train.vae", *options(build, out, **{"--loop.steps": 100_000}))
    while not (out / "latest").exists():
        assert job.poll() is None, job.communicate()[0]
        time.sleep(0.05)
    job.send_signal(signal.SIGTERM)
    output = job.communicate(timeout=200)[0]
    assert job.returncode == 0, output
    assert requeued.read_text(encoding="utf-8") == "77\n"
    done = losses(out)
    latest = (out / "latest").resolve()
    assert latest.name == f"step-{len(done):08d}", output
    assert {"rank-0.pt", "rank-1.pt"} <= {path.name for path in latest.iterdir()}
    # The job in the queue runs the same command.
    job = slurm("train.vae", *options(build, out, **{"--loop.steps": len(done) + STEPS}))
    output = job.communicate(timeout=300)[0]
    assert job.returncode == 0, output
    assert [step for step, _ in losses(out)] == [*range(1, len(done) + STEPS + 1)]
    assert losses(out)[: min(len(done), STEPS)] == one_node[: len(done)]


def test_the_recipe_for_slurm_ends_with_the_code_of_a_run_that_failed(slurm, tmp_path):
    job = slurm("train.vae", *options(tmp_path / "nothing", tmp_path / "run"))
    output = job.communicate(timeout=200)[0]
    assert job.returncode != 0
    assert "nothing is not a build with committed shards" in output
    assert not (tmp_path / "requeued").exists()


@pytest.fixture(scope="module")
def cluster():
    """A Ray cluster whose head has no GPU, and two nodes that say they have one each."""
    patch = pytest.MonkeyPatch()
    patch.setenv("RAY_AUTH_MODE", "disabled")
    patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    patch.setenv("RAY_raylet_start_wait_time_s", "180")
    patch.setenv("OMP_NUM_THREADS", "1")
    temp = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # a short path: Ray puts its sockets there
    head = {"num_cpus": 0, "include_dashboard": False, "temp_dir": temp}
    # A lost node is noticed after seconds.
    settings = {"health_check_period_ms": 1000, "health_check_failure_threshold": 5}
    arguments = {**head, **NODE_MEMORY, "_system_config": settings}
    nodes = Cluster(initialize_head=True, head_node_args=arguments)
    try:
        for _ in range(2):
            add_node(nodes)
        nodes.wait_for_nodes()
        patch.setenv("RAY_ADDRESS", nodes.address)
        yield nodes
    finally:
        ray.shutdown()
        nodes.shutdown()
        patch.undo()
        shutil.rmtree(temp, ignore_errors=True)


NODE_MEMORY = {"object_store_memory": 10**8}


def add_node(cluster):
    return cluster.add_node(num_cpus=1, num_gpus=1, **NODE_MEMORY)


@pytest.fixture
def on_ray(cluster, build):
    """Run train.vae on the two nodes of the cluster in this process."""
    words = {"--ray-gpus": 2, "--device": "auto"}  # each rank takes a node's GPU, and torch a CPU
    return lambda out, **changes: main(options(build, out, **words, **changes))


def test_two_nodes_of_ray_have_the_losses_of_one_node(on_ray, one_node, tmp_path, capfd, caplog):
    caplog.set_level(logging.INFO)
    assert on_ray(tmp_path / "run") == 0
    assert losses(tmp_path / "run") == one_node
    assert "Starting 2 ranks on 2 nodes." in caplog.messages
    lines = capfd.readouterr().err.splitlines()
    assert any(line.startswith("rank 0: ") and f"Step {STEPS}/{STEPS}" in line for line in lines)


def test_a_lost_node_of_ray_means_a_restart_from_the_last_checkpoint(
    cluster, on_ray, one_node, tmp_path, caplog
):
    """A node with a rank is lost after a checkpoint. A third node takes its place."""
    out = tmp_path / "run"
    add_node(cluster)

    def lose() -> None:
        while not (out / "latest").exists():
            time.sleep(0.01)
        (group,) = [g for g in placement_group_table().values() if g["state"] == "CREATED"]
        used = set(group["bundles_to_node_id"].values())
        node = next(node for node in cluster.worker_nodes if node.node_id in used)
        cluster.remove_node(node, allow_graceful=False)

    thread = threading.Thread(target=lose)
    thread.start()
    # The run is longer than that of one node, so that the node is lost before its end.
    assert on_ray(out, **{"--loop.steps": 20 * STEPS}) == 0
    thread.join()
    restarts = [text for text in caplog.messages if "Restart 1 of 10 from the last" in text]
    assert len(restarts) == 1, caplog.messages
    found = losses(out)
    assert [step for step, _ in found] == [*range(1, 20 * STEPS + 1)]
    assert found[:STEPS] == one_node


def test_refused_options_end_a_run_on_ray_at_once(on_ray, tmp_path, capfd, caplog):
    assert on_ray(tmp_path / "run", **{"--data": tmp_path / "nothing"}) == 2
    assert "nothing is not a build with committed shards" in capfd.readouterr().err
    assert not [text for text in caplog.messages if "Restart" in text]
