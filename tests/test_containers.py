"""The Dockerfile, the compose file and cluster.yaml name what exists and expose nothing."""

import copy
import json
import re
import shlex
import subprocess
import tomllib
from pathlib import PurePosixPath

import pytest
import yaml

from model.app.builds import API
from model.app.config import AppConfig
from pipeline.core.cli import parse
from tests.child_python import ROOT

DOCKERFILE = (ROOT / "docker" / "Dockerfile").read_text(encoding="utf-8")
COMPOSE = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text(encoding="utf-8"))
CLUSTER = (ROOT / "cluster.yaml").read_text(encoding="utf-8")
LOCAL_SERVICES = {"page", "page-cuda", "ray-head", "ray-worker"}


def instructions():
    """Return (instruction, arguments) of each instruction, with continued lines joined."""
    lines = [line for line in DOCKERFILE.splitlines() if not line.startswith("#")]
    text = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [tuple(line.split(maxsplit=1)) for line in text.splitlines() if line]


def arguments(name):
    return [text for instruction, text in instructions() if instruction == name]


def build_arguments():
    return dict(text.split("=", 1) for text in arguments("ARG"))


def makefile(variable):
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    return re.search(rf"^{variable} \??= (.+)$", text, re.M)[1]


def included(path):
    """Return whether .dockerignore, a list of what is included, has a path or a folder above."""
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    names = {rule[1:] for rule in rules if rule.startswith("!")}
    return bool(names & {path, *map(str, PurePosixPath(path).parents)})


def test_the_extras_of_the_image_exist():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = build_arguments()["EXTRAS"].split(",")
    assert set(extras) <= set(project["optional-dependencies"])
    assert {"app", "generate"} <= set(extras)
    (shown,) = re.findall(r"EXTRAS=([\w,]+)", CLUSTER)
    assert {*extras, "cluster"} == set(shown.split(",")) <= set(project["optional-dependencies"])


def test_the_image_has_the_torch_and_the_system_packages_of_the_makefile():
    assert build_arguments()["TORCH"] == makefile("TORCH")
    installed = " ".join(arguments("RUN")).split()
    assert set(makefile("APT_PACKAGES").split()) <= set(installed)


def test_the_image_has_every_package_and_copies_only_files_that_exist():
    copied = [name for text in arguments("COPY") for name in shlex.split(text)[:-1]]
    assert [name for name in copied if not (ROOT / name).exists() or not included(name)] == []
    assert {"kernels", "model", "pipeline", "train", "pyproject.toml"} <= set(copied)


def test_the_last_user_is_not_root():
    order = [name for name, _ in instructions()]
    known = build_arguments()
    user = re.sub(r"\$\{(\w+)\}", lambda match: known[match[1]], arguments("USER")[-1])
    assert user not in ("root", "0")
    assert all(int(number) > 0 for number in user.split(":"))
    assert order.index("USER") < order.index("CMD")
    # What the user writes to is created for it, before it becomes the user.
    (made,) = [text for text in arguments("RUN") if "useradd" in text]
    for path in ("/cache", "/sparse3d", "/sparse3d/data", "/sparse3d/runs", "/opt/numba"):
        assert path in made.split()
    variables = re.findall(r"(\w+)=(\S+)", " ".join(arguments("ENV")))
    caches = {
        value for name, value in variables if re.fullmatch(r"[A-Z0-9]+(_CACHE_DIR|_HOME)", name)
    }
    assert len(caches) == 4
    assert all(value.startswith(("/cache/", "/opt/numba")) for value in caches)


@pytest.mark.parametrize("script", arguments("RUN"))
def test_every_step_is_valid_shell(script):
    subprocess.run(["sh", "-n", "-c", script], check=True)


@pytest.mark.parametrize(("build", "code"), [("cpu", 0), ("cuda", 0), ("gpu", 1)])
def test_an_unknown_build_of_torch_is_refused(build, code):
    (script,) = [text for text in arguments("RUN") if "case " in text]
    harmless = re.sub(r"\bapt-get\b|\brm\b", ":", script)
    ended = subprocess.run(
        ["sh", "-c", harmless],
        env={"TORCH_BUILD": build},
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert ended.returncode == code
    assert ("got gpu" in ended.stderr) == (code == 1)


def test_the_files_name_no_server_but_that_of_torch():
    folder = ROOT / "docker"
    text = "".join(path.read_text(encoding="utf-8") for path in sorted(folder.iterdir()))
    hosts = set(re.findall(r"https?://([^/:'\"\s]+)", text))
    assert hosts == {"127.0.0.1", "download.pytorch.org"}


def test_the_command_of_the_image_and_of_the_page_is_understood():
    commands = [json.loads(arguments("CMD")[-1])]
    commands += [COMPOSE["services"][name]["command"] for name in ("page", "page-cuda")]
    for command in commands:
        assert command[:3] == ["python", "-m", "model.app"]
        config = parse(AppConfig, command[3:], prog="model.app")
        assert (config.host, config.port) == ("0.0.0.0", 7860)
    assert arguments("EXPOSE") == ["7860"]


def test_the_services_are_reached_from_this_machine_alone():
    services = COMPOSE["services"]
    assert set(services) == LOCAL_SERVICES
    for name, service in services.items():
        ports = service.get("ports", [])
        assert all(port.startswith("127.0.0.1:") for port in ports), name
        assert service.get("network_mode") is None
    assert services["page"].get("profiles") is None


def test_the_services_are_built_with_arguments_of_the_dockerfile_and_keep_a_cache():
    for name, service in COMPOSE["services"].items():
        build = service["build"]
        assert (ROOT / "docker" / build["context"] / build["dockerfile"]).is_file()
        assert set(build["args"]) <= set(build_arguments()), name
        volumes = dict(reversed(volume.rsplit(":", 1)) for volume in service["volumes"])
        assert volumes["/cache"] in COMPOSE["volumes"]
        assert set(volumes) == {"/cache", "/sparse3d/data", "/sparse3d/runs"}
    kind = {name: service["image"] for name, service in COMPOSE["services"].items()}
    assert kind["page"] != kind["page-cuda"]


def test_the_health_of_the_page_is_asked_with_a_request_that_it_answers():
    (url,) = re.findall(r"http://[^']+", COMPOSE["services"]["page"]["healthcheck"]["test"][-1])
    server = (ROOT / "model" / "app" / "api.py").read_text(encoding="utf-8")
    answered = re.search(r'openapi_url=f"\{API\}(.+)"', server)[1]
    assert url == f"http://127.0.0.1:7860{API}{answered}"


def test_the_head_starts_no_tasks_and_workers_wait_for_it():
    head, worker = (COMPOSE["services"][name] for name in ("ray-head", "ray-worker"))
    assert {"--head", "--num-cpus=0", "--block"} <= set(head["command"].split())
    assert "--address=ray-head:6379" in worker["command"].split()
    assert worker["depends_on"] == {"ray-head": {"condition": "service_healthy"}}
    assert "healthcheck" in head


def cluster_of_images():
    """Return cluster.yaml with its last section in place of all lines from `file_mounts` on."""
    kept, _, rest = CLUSTER.partition("\nfile_mounts:")
    section = rest.partition("# ---- With the image")[2].splitlines()[1:]
    text = "\n".join(line.removeprefix("# ") for line in section)
    return yaml.safe_load(f"{kept}\n{text}\n")


def test_ray_accepts_a_cluster_whose_nodes_run_the_image():
    pytest.importorskip("ray", reason="Ray is not installed")
    from ray.autoscaler._private.util import prepare_config, validate_config

    cluster = cluster_of_images()
    filled = prepare_config(copy.deepcopy(cluster))
    validate_config(filled)
    assert filled["docker"]["container_name"] == "sparse3d"
    assert filled["file_mounts"] == {}
    assert filled["setup_commands"] == []
    original = yaml.safe_load(CLUSTER)
    assert set(original) - set(cluster) <= {"rsync_exclude"}
    starts = [*cluster["head_start_ray_commands"], *cluster["worker_start_ray_commands"]]
    assert [start for start in starts if ".venv" in start] == []
