"""Kernel launches that a child process compiles for a GPU and describes as JSON."""

import json

from tests.child_python import project_environment, run_python


def compiled_launches(*arguments: object) -> list[dict]:
    """Run `python arguments` without Triton's interpreter and read the launches that it prints."""
    environment = project_environment(without={"TRITON_INTERPRET"})
    launches = json.loads(run_python(*arguments, env=environment).stdout)
    assert [launch for launch in launches if "failed" in launch] == []
    return launches
