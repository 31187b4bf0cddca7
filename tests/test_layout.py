"""Who may import whom, and how long a file may be."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("pipeline", "kernels", "model", "train")
DATA = {
    f"pipeline.{name}" for name in ("schema", "store", "shards", "cameras", "render", "isosurface")
}
MAY_IMPORT = {
    "pipeline": set(),
    "kernels": set(),
    "model": {"kernels"},
    "train": {"model", "kernels"},
}
MAX_LINES = 400

FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
names = [path.relative_to(ROOT).as_posix() for path in FILES]


def module_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


STARTED = {module_of(path) for path in FILES if 'if __name__ == "__main__":' in path.read_text()}
COMMANDS = STARTED - {"pipeline.orchestration.isolated_process"} | {
    "pipeline.orchestration.runner"
}  # the first is started by builds, not by people


def imports(path, *, at_import_only=False):
    """Dotted names of every module that a file imports; those inside functions only if asked for all."""
    tree = ast.parse(path.read_text())
    pending: list[ast.AST] = [tree]
    found = set()
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        skip = at_import_only and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        if not skip:
            pending += ast.iter_child_nodes(node)
    return found


def is_ours(name):
    return name.partition(".")[0] in PACKAGES


@pytest.mark.parametrize("path", FILES, ids=names)
def test_imports_keep_their_direction(path):
    package = path.relative_to(ROOT).parts[0]
    for name in imports(path):
        other = name.partition(".")[0]
        if not is_ours(name) or other == package or other in MAY_IMPORT[package]:
            continue
        if (
            package == "pipeline" and other == "kernels"
        ):  # its GPU path, inside the function that takes it
            assert name not in imports(path, at_import_only=True), (
                f"{name} must be imported where it is used"
            )
            continue
        module = ".".join(name.split(".")[:2])
        allowed = package in ("model", "train") and (module in DATA or name == "pipeline")
        assert allowed, f"{package} must not import {name}"


@pytest.mark.parametrize("path", FILES, ids=names)
def test_nobody_imports_a_command(path):
    module = module_of(path)
    for name in imports(path):
        if name in COMMANDS and module != name:
            assert (module, name) in {
                ("pipeline.build", "pipeline.orchestration.runner"),
                ("pipeline.build", "pipeline.report"),  # whose page ends every build
            }, f"{module} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=names)
def test_only_the_runner_knows_ray(path):
    if path != ROOT / "pipeline" / "runner.py":
        assert not {name for name in imports(path) if name.partition(".")[0] == "ray"}


@pytest.mark.parametrize("path", FILES, ids=names)
def test_files_can_be_read_in_one_sitting_and_say_what_they_are_for(path):
    text = path.read_text()
    assert len(text.splitlines()) <= MAX_LINES
    assert not text.strip() or ast.get_docstring(ast.parse(text)), (
        "opens with one sentence saying what it is for"
    )


def test_the_pipeline_imports_without_torch():
    modules = ["pipeline.build", "pipeline.verify", "pipeline.report", *sorted(DATA)]
    code = f"import sys, {', '.join(modules)}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
