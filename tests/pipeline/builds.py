"""Tiny builds for tests: options, separate processes, and comparison of finished builds."""

from __future__ import annotations

import json
import os
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from pipeline.config import BuildConfig, LimitsConfig
from pipeline.core.hashing import make_uid
from pipeline.core.schema import Record
from pipeline.orchestration.plan import make_plan
from pipeline.sources import Source
from pipeline.storage.manifest import ManifestRow, read_manifest
from tests.child_python import project_environment, start_python

RAY_AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
TINY = [
    *("--views", "2", "--image-size", "64", "--topology-resolution", "64"),
    *("--shard-size", "3", "--workers", "2"),
]


class Listing:
    """A source that lists assets but has no files."""

    def __init__(self, keys: Sequence[str], name: str = "listing"):
        self.keys = keys
        self.name = name

    def records(self) -> Iterator[Record]:
        for key in self.keys:
            yield Record(
                uid=make_uid(self.name, key), source=self.name, url=key, licence="cc0", format="obj"
            )


def environment(home: Path) -> dict[str, str]:
    """Return variables for a child process: its own HOME, no other Ray, and a mark.

    All descendants of the process inherit the mark, and `marked` finds them by it.
    """
    return project_environment(
        without={name for name in os.environ if name.startswith("RAY_")},
        HOME=str(home),
        RAY_AUTH_MODE="disabled",
        RAY_USAGE_STATS_ENABLED="0",
        TEST_MARK=uuid.uuid4().hex,
    )


def start(module: str, *args: object, env: dict[str, str]) -> subprocess.Popen[str]:
    """Start `python -m module args` with piped output."""
    return start_python("-m", module, *args, env=env)


def finish(process: subprocess.Popen[str], code: int = 0, timeout_s: float = 300) -> str:
    """Wait for a process, check its exit code and return its output."""
    output = process.communicate(timeout=timeout_s)[0]
    assert process.returncode == code, f"exit code {process.returncode}, expected {code}:\n{output}"
    return output


def marked(env: dict[str, str], word: str = "") -> list[psutil.Process]:
    """Return the processes started with `env` whose command line contains a word."""
    processes = []
    for process in psutil.process_iter():
        try:
            # psutil's environ() stops early, because the processes of Ray write their titles over
            # the first variables.
            variables = Path(f"/proc/{process.pid}/environ").read_bytes()
            if env["TEST_MARK"].encode() in variables and word in " ".join(process.cmdline()):
                processes.append(process)
        except (psutil.Error, OSError):
            continue
    return processes


def survivors(env: dict[str, str], within_s: float = 30) -> list[str]:
    """Wait until the processes started with `env` have ended.

    Ray's own agents do not count. After a killed driver they take up to two minutes to end.

    Returns:
        The command lines of the processes that still run after `within_s` seconds.
    """
    deadline = time.monotonic() + within_s
    while True:
        lines = []
        for process in marked(env):
            with suppress(psutil.Error):
                lines.append(" ".join(process.cmdline()).strip())
        lines = [line for line in lines if line not in RAY_AGENTS]
        if not lines or time.monotonic() > deadline:
            return lines
        time.sleep(0.2)


def contents(out: Path) -> dict[str, bytes]:
    """Read every file of a build that must not differ between runs.

    The commit of the code is removed, because it may change during the tests.
    """
    files = {}
    for path in sorted(out.rglob("*")):
        name = path.relative_to(out).as_posix()
        if path.is_file() and not {"stats", "report"} & set(path.relative_to(out).parts):
            files[name] = path.read_bytes()
    for name in [name for name in files if name.endswith("plan.json")]:
        files[name] = json.dumps({**json.loads(files[name]), "commit": None}).encode()
    return files


def assert_same(left: dict[str, bytes], right: dict[str, bytes]) -> None:
    """Check that two builds have the same files with the same bytes."""
    assert sorted(left) == sorted(right)
    assert [name for name in left if left[name] != right[name]] == []


def wait_until(condition: Callable[[], object], within_s: float = 300.0) -> None:
    """Wait until a condition holds. Fail if it does not hold within that time."""
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, f"the condition did not hold within {within_s} s"
        time.sleep(0.02)


def config(out: Path, limits: dict | None = None, **options: Any) -> BuildConfig:
    """Return the configuration of a tiny build in this process. It needs the fixture shared_ray."""
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
    """Run a build without its report."""
    from pipeline.orchestration.runner import run  # only these tests need Ray

    return run(make_plan(cfg, sources), cfg, sources)


def rows_of(out: Path) -> list[ManifestRow]:
    """Read the rows of every manifest, in the order of the plan."""
    return [
        row for path in sorted((out / "manifest").glob("*.parquet")) for row in read_manifest(path)
    ]
