"""A build of ten thousand small assets uses bounded memory and leaves nothing behind."""

import os
import shutil
import tempfile
import threading
from pathlib import Path

import numpy as np
import psutil
import pytest

from pipeline.storage.manifest import read_manifest
from tests.pipeline.builds import environment, finish, marked, start, survivors

pytestmark = pytest.mark.slow
MB = 1 << 20


class Watch:
    """Records committed shards, processes and memory every two seconds."""

    def __init__(self, out: Path, env: dict[str, str], driver: int):
        self.rows, self.over = [], threading.Event()
        self.thread = threading.Thread(target=self._watch, args=(out, env, driver), daemon=True)
        self.thread.start()

    def _watch(self, out: Path, env: dict[str, str], driver: int) -> None:
        while not self.over.wait(2):
            memory = {}
            for process in marked(env):
                try:
                    memory[process.pid] = process.memory_full_info().uss
                except psutil.Error:
                    continue
            shards = len(list(out.glob("shards/*/manifest.json")))
            if driver in memory:
                self.rows.append((shards, len(memory), sum(memory.values()), memory[driver]))

    def stop(self) -> np.ndarray:
        """[samples, 4]"""
        self.over.set()
        self.thread.join()
        return np.array(self.rows, dtype=float)


@pytest.mark.timeout(4 * 3600)
def test_ten_thousand_assets_in_bounded_memory_and_without_a_trace(tmp_path):
    soak(tmp_path, assets=10_000, shard=100)


def soak(folder: Path, assets: int, shard: int) -> None:
    """Build and check."""
    env, out = environment(folder), folder / "out"
    temp = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # short: Ray's sockets lie in it
    options = [
        "--views",
        "1",
        "--image-size",
        "32",
        "--topology-resolution",
        "128",
        "--resolutions",
        "64",
    ]
    options += [
        "--source",
        f"procedural:{assets}",
        "--shard-size",
        shard,
        "--workers",
        os.cpu_count(),
    ]
    process = start("pipeline.build", *options, "--out", out, env=env | {"TMPDIR": str(temp)})
    watch = Watch(out, env, process.pid)
    finish(process, timeout_s=4 * 3600)
    done, processes, memory, driver = watch.stop().T
    assert survivors(env) == []
    shutil.rmtree(temp / "ray", ignore_errors=True)  # Ray's logs
    assert list(temp.iterdir()) == []
    temp.rmdir()
    assert not (out / ".scratch").exists()
    rows = sum(len(read_manifest(path)) for path in (out / "manifest").iterdir())
    assert rows == assets
    # The first tenth fills pools and caches. After it, memory and processes must not grow.
    share = done * shard / assets
    early, late = (share >= 0.1) & (share < 0.5), share >= 0.6
    assert min(early.sum(), late.sum()) > 5
    assert processes[late].max() <= processes[early].max() + 2
    for name, used in (("all", memory), ("driver", driver)):
        before, after = (float(np.median(used[part])) / MB for part in (early, late))
        assert after < 1.1 * before + 20, f"{name}: {before:.0f} MB early, {after:.0f} MB late"
