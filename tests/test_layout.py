"""Import directions: which package, sub-package and module may import which."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from tests.child_python import ROOT, run_python

# Every unit may import the units above it in its own list, and what EXTERNAL adds. The last unit of
# a package is the package's own top-level modules, among them its commands.
UNITS = {
    "pipeline": [
        "pipeline.core",
        "pipeline.storage",
        "pipeline.mesh_io",
        "pipeline.download",
        "pipeline.geometry",
        "pipeline.rendering",
        "pipeline.curation",
        "pipeline.sources",
        "pipeline.config",
        "pipeline.orchestration",
        "pipeline.inspection",
        "pipeline.conversion",
        "pipeline",
    ],
    "kernels": [
        *("kernels.runtime", "kernels.attention", "kernels.conv", "kernels.fused", "kernels.sdf"),
        "kernels",
    ],
    "model": [
        "model.config",
        "model",
        "model.conditioning",
        "model.structure",
        "model.inference",
        "model.app",
        "model.generate",
        "model.reconstruct",
    ],
    "train": [
        "train.engine",
        "train.data",
        "train.stages",
        "train.costs",
        "train.evaluation",
        "train.demo",
        "train",
    ],
}
# The units of other packages that a package may import. `pipeline` alone names its lazy exports.
EXTERNAL = {
    "pipeline": {"kernels"},  # the GPU path of the SDF, inside the function that takes it
    "kernels": set(),
    # model.reconstruct reads meshes and computes their SDF as the data pipeline does. model.app
    # shows the assets of a build.
    "model": {
        *("kernels", "pipeline.core", "pipeline.rendering", "pipeline.mesh_io"),
        *("pipeline.geometry", "pipeline.inspection"),
    },
    # train.evaluation compares mesh files, which it reads as the data pipeline does.
    "train": {
        *("kernels", "model", "pipeline.core", "pipeline.rendering", "pipeline.storage"),
        "pipeline.mesh_io",
    },
}
FILES = sorted(path for package in UNITS for path in (ROOT / package).rglob("*.py"))
NAMES = [path.relative_to(ROOT).as_posix() for path in FILES]
HEAVY = ("torch", "triton", "numba", "ray", "transformers", "numpy", "trimesh", "zarr", "pyarrow")


def module_of(path: Path) -> str:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


MODULES = {module_of(path): path for path in FILES}
COMMANDS = {
    name
    for name, path in MODULES.items()
    if 'if __name__ == "__main__":' in path.read_text(encoding="utf-8")
} - {"pipeline.orchestration.isolated_process"}  # builds start it, people do not


@cache
def syntax_tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def imports(path: Path, *, at_import_only: bool = False) -> set[str]:
    """Return the modules that a file imports; optionally only those outside functions.

    Imports under `if TYPE_CHECKING` are left out: they do not run.
    """
    pending: list[ast.AST] = [syntax_tree(path)]
    names = set()
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = inner & MODULES.keys()
            names |= modules
            if len(modules) < len(inner):
                names.add(node.module)
        is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            pending += node.orelse
        elif not (at_import_only and is_function):
            pending += ast.iter_child_nodes(node)
    return names


def is_below(name: str, unit: str) -> bool:
    return name == unit or name.startswith(f"{unit}.")


def unit_of(name: str) -> str:
    """Return the most specific unit that contains a module."""
    units = UNITS[name.partition(".")[0]]
    return max((unit for unit in units if is_below(name, unit)), key=len)


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_imports_point_downwards(path):
    module = module_of(path)
    package = module.partition(".")[0]
    units = UNITS[package]
    for name in imports(path):
        other = name.partition(".")[0]
        if other not in UNITS:
            continue
        if other == package:
            rank = units.index(unit_of(name))
            assert rank <= units.index(unit_of(module)), f"{module} imports {name}, which is above"
        else:
            allowed = EXTERNAL[package] | ({"pipeline"} & {name})
            assert any(is_below(name, unit) for unit in allowed), f"{module} imports {name}"
            if package == "pipeline":
                assert name not in imports(path, at_import_only=True), f"{name} is imported at once"


def test_modules_import_each_other_without_cycles():
    below = {name: imports(path) & MODULES.keys() for name, path in MODULES.items()}
    finished: set[str] = set()

    def visit(name: str, chain: tuple[str, ...]) -> None:
        assert name not in chain, " -> ".join((*chain[chain.index(name) :], name))
        if name not in finished:
            for other in below[name] - {name}:
                visit(other, (*chain, name))
            finished.add(name)

    for name in below:
        visit(name, ())


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_no_module_imports_a_command(path):
    module = module_of(path)
    assert not imports(path) & COMMANDS - {module}


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_only_the_executor_of_ray_and_the_launcher_of_ranks_import_ray(path):
    if module_of(path) not in ("pipeline.orchestration.ray_executor", "train.engine.ray_ranks"):
        assert not {name for name in imports(path) if name.partition(".")[0] == "ray"}


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_every_file_says_what_it_contains(path):
    assert not syntax_tree(path).body or ast.get_docstring(syntax_tree(path))


def opens_text(call: ast.Call) -> bool:
    """Say whether a call reads or writes text through a file, a stream or a child process."""
    name = getattr(call.func, "attr", getattr(call.func, "id", ""))
    keywords = {keyword.arg: keyword.value for keyword in call.keywords}
    if name == "read_text":
        return not call.args
    if name == "write_text":
        return len(call.args) == 1
    owner = getattr(getattr(call.func, "value", None), "id", "")
    if name in ("open", "fdopen") and owner not in ("tarfile", "zipfile", "Image"):
        # The mode is the first argument of a path's method and the second one of a function.
        modes = [value for value in (*call.args[:2], keywords.get("mode")) if value is not None]
        texts = [mode.value for mode in modes if isinstance(mode, ast.Constant)]
        return any(isinstance(text, str) and re.fullmatch("[rwax][t+]*", text) for text in texts)
    return getattr(keywords.get("text"), "value", None) is True


def test_text_is_read_and_written_as_utf_8():
    """The encoding of the locale is never used: a library may change the locale of the process."""
    for path in [*FILES, *sorted((ROOT / "tests").rglob("*.py"))]:
        for node in ast.walk(syntax_tree(path)):
            if isinstance(node, ast.Call) and opens_text(node):
                keywords = [keyword.arg for keyword in node.keywords]
                place = f"{path.relative_to(ROOT)}:{node.lineno}"
                assert "encoding" in keywords, f"{place} names no encoding"


def test_packages_and_config_modules_import_nothing_heavy():
    """Each of them is imported by one child, in turn, until one loads a heavy package."""
    configs = [module_of(path) for path in FILES if path.name == "config.py"]
    assert len(configs) > 10
    code = """
import importlib, sys
for module in sys.argv[2].split():
    importlib.import_module(module)
    heavy = sys.modules.keys() & set(sys.argv[1].split())
    if heavy:
        sys.exit(f"{module} loads {sorted(heavy)}")
"""
    run_python("-c", code, " ".join(HEAVY), " ".join([*UNITS, *configs]))


def test_core_imports_neither_ray_nor_opengl_nor_torch():
    for name, path in MODULES.items():
        if is_below(name, "pipeline.core"):
            assert not {other.partition(".")[0] for other in imports(path)} & {
                "ray",
                "moderngl",
            }
            at_once = {other.partition(".")[0] for other in imports(path, at_import_only=True)}
            assert "torch" not in at_once, name
