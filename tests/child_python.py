"""Python in child processes: code, modules and scripts of the project under test."""

import os
import subprocess
import sys
from collections.abc import Collection, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def project_environment(*, without: Collection[str] = (), **changes: str) -> dict[str, str]:
    """Return the variables of this process for a child that imports the project from anywhere.

    Args:
        without: Names of variables that the child does not get.
        changes: Variables that the child gets with other values than this process has.
    """
    inherited = {name: value for name, value in os.environ.items() if name not in without}
    paths = [str(ROOT), *filter(None, [inherited.get("PYTHONPATH")])]
    return {**inherited, "PYTHONPATH": os.pathsep.join(paths), **changes}


def run_python(
    *arguments: object,
    env: Mapping[str, str] | None = None,
    cwd: Path = ROOT,
    exit_code: int = 0,
    timeout_s: float = 500,
) -> subprocess.CompletedProcess[str]:
    """Run `python arguments` to its end and check its exit code.

    Args:
        arguments: `"-c", code, ...`, `"-m", module, ...` or a script and its arguments.
        env: All variables of the child, `project_environment()` if None.
        cwd: Working directory of the child.
        exit_code: Expected exit code. A child that is ended by signal N has the exit code -N.
        timeout_s: Seconds after which the child is killed and the test fails.

    Returns:
        The finished process with its standard output and standard error as text.
    """
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env=project_environment() if env is None else env,
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout_s,
        encoding="utf-8",
    )
    outputs = f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    assert done.returncode == exit_code, f"exit code {done.returncode}, not {exit_code}:\n{outputs}"
    return done


def start_python(*arguments: object, env: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    """Start `python arguments` in the root of the project, with its two outputs in one pipe."""
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env=project_environment() if env is None else env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
    )
