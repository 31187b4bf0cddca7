"""Tiny builds for tests: options, processes of their own, and what two finished builds have in common."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from pipeline.config import BuildConfig, LimitsConfig
from pipeline.orchestration.manifest import read_manifest
from pipeline.orchestration.plan import make_plan
from pipeline.sources import Source

RAY_AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
ROOT = Path(__file__).resolve().parents[2]
TINY = [
    "--views",
    "2",
    "--image-size",
    "64",
    "--topology-resolution",
    "64",
    "--shard-size",
    "3",
    "--workers",
    "2",
]


def environment(home: Path) -> dict[str, str]:
    """Of a child process: its own HOME, no Ray of anybody else's, a mark by which its descendants are known."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    extra = {"HOME": str(home), "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    return {**kept, **extra, "PYTHONPATH": str(ROOT), "TEST_MARK": uuid.uuid4().hex}


def start(module: str, *args: object, env: dict[str, str]) -> subprocess.Popen[str]:
    """`python -m module args`, its output piped."""
    return subprocess.Popen(
        [sys.executable, "-m", module, *map(str, args)],
        env=env,
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def finish(process: subprocess.Popen[str], code: int = 0, timeout_s: float = 300) -> str:
    """Wait for the process; its output. Fails unless it exits with `code`."""
    output = process.communicate(timeout=timeout_s)[0]
    assert process.returncode == code, f"exit code {process.returncode}, expected {code}:\n{output}"
    return output


def marked(env: dict[str, str], word: str = "") -> list[psutil.Process]:
    """Processes started with `env` whose command line has the word."""
    found = []
    for process in psutil.process_iter():
        try:
            # Not psutil's environ(): Ray's processes write their titles over the first variables, where it stops.
            ours = env["TEST_MARK"].encode() in Path(f"/proc/{process.pid}/environ").read_bytes()
            if ours and word in " ".join(process.cmdline()):
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


def survivors(env: dict[str, str], within_s: float = 30) -> list[str]:
    """Command lines of the processes started with `env` that are still there after that long; [] as soon as none is.

    Ray's own agents do not count: after a killed driver they take up to two minutes to see that they are alone.
    """
    deadline = time.monotonic() + within_s
    while True:
        found = []
        for process in marked(env):
            with suppress(psutil.Error):
                found.append(" ".join(process.cmdline()).strip())
        found = [line for line in found if line not in RAY_AGENTS]
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.2)


def contents(out: Path) -> dict[str, bytes]:
    """Every file of a build that must not vary between runs. The commit is left out: it may change under a test."""
    files = {}
    for path in sorted(out.rglob("*")):
        name = path.relative_to(out).as_posix()
        if path.is_file() and not {"stats", "report"} & set(path.relative_to(out).parts):
            files[name] = path.read_bytes()
    for name in [name for name in files if name.endswith("plan.json")]:
        files[name] = json.dumps({**json.loads(files[name]), "commit": None}).encode()
    return files


def assert_same(left: dict[str, bytes], right: dict[str, bytes]) -> None:
    assert sorted(left) == sorted(right)
    assert [name for name in left if left[name] != right[name]] == []


def wait_until(condition: Callable[[], object], within_s: float = 300.0) -> None:
    """Returns as soon as the condition holds; fails if it does not within that time."""
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {within_s} s"
        time.sleep(0.02)


def config(out: Path, limits: dict | None = None, **options: Any) -> BuildConfig:
    """Of a tiny build in this process; it needs the fixture shared_ray."""
    tiny = {
        "resolutions": (64,),
        "topology_resolution": 64,
        "views": 1,
        "image_size": 32,
        "val_percent": 12,
    }
    limits = {"asset_memory_gb": 4.0, "min_free_gb": 0.0, **(limits or {})}
    return BuildConfig(out=out, workers=2, limits=LimitsConfig(**limits), **{**tiny, **options})


def build(cfg: BuildConfig, sources: Sequence[Source]) -> dict[str, int]:
    """A build without its report."""
    from pipeline.orchestration.runner import run  # Ray is for those who build

    return run(make_plan(cfg, sources), cfg, sources)


def rows_of(out: Path) -> list[dict[str, Any]]:
    """Of every manifest, in plan order."""
    return [
        row for path in sorted((out / "manifest").glob("*.parquet")) for row in read_manifest(path)
    ]
