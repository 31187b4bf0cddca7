"""What the extras install: nothing that hides a package of the project."""

import json
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, distribution

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.child_python import ROOT

PACKAGES = {"kernels", "model", "pipeline", "train"}


def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def all_requirements():
    """Return the requirements of the project with all extras, but those on the project itself."""
    extras = project()["optional-dependencies"].values()
    texts = [*project()["dependencies"], *(text for extra in extras for text in extra)]
    return [Requirement(text) for text in texts if not text.startswith(project()["name"])]


def test_no_dependency_of_any_extra_has_the_name_of_a_package():
    """A distribution named `kernels` exists. It would be imported in place of the project's own."""
    pending = [(requirement, "") for requirement in all_requirements()]
    seen, missing = set(), set()
    while pending:
        requirement, extra = pending.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        for wanted in ("", *sorted(requirement.extras)):
            if (name, wanted) in seen:
                continue
            seen.add((name, wanted))
            try:
                texts = distribution(name).requires or []
            except PackageNotFoundError:
                missing.add(name)
                continue
            pending += [(Requirement(text), wanted) for text in texts]
    names = {name for name, _ in seen}
    assert "torch" in names - missing
    assert not names & PACKAGES


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_installing_all_extras_installs_no_distribution_with_the_name_of_a_package(tmp_path):
    extras = ",".join(project()["optional-dependencies"])
    report = tmp_path / "report.json"
    # What is installed already is the subject of the test above.
    command = [sys.executable, "-m", "pip", "install", "--dry-run"]
    ended = subprocess.run(
        [*command, "--report", report, f"{ROOT}[{extras}]"],
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    if ended.returncode and ("onnection" in ended.stderr or "No matching" in ended.stderr):
        pytest.skip("the package index cannot be reached")
    assert ended.returncode == 0, ended.stderr
    installed = json.loads(report.read_text(encoding="utf-8"))["install"]
    names = {canonicalize_name(item["metadata"]["name"]) for item in installed}
    assert "sparse3d" in names
    assert not names & PACKAGES
