"""The README, docs and recipes: their Python runs, and their commands have the options shown."""

import importlib
import inspect
import re
import sys

import pytest
import torch

from tests.child_python import ROOT
from tests.train.analytic_builds import add_renders, make_build

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [
    README,
    *(path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))),
]
RECIPES = [
    path.read_text(encoding="utf-8")
    for pattern in ("*.sh", "*.sbatch")
    for path in sorted((ROOT / "examples" / "recipes").rglob(pattern))
]
SETUPS = [
    # A comment may continue a command in its next line.
    re.sub(r"^#? +", "", (ROOT / name).read_text(encoding="utf-8"), flags=re.M)
    for name in ("cluster.yaml", "docker/compose.yaml", "CONTRIBUTING.md", "examples/README.md")
]
PROPS = (ROOT / "examples" / "recipes" / "props" / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README, re.M | re.S)

torch.set_num_threads(1)


def run(block):
    names = {}
    exec(compile(block, "README.md", "exec"), names)
    return names


def test_the_kernels_as_functions():
    torch.manual_seed(0)
    found = run(next(block for block in BLOCKS if "spatial_sparse_attention(" in block))
    N = found["N"]
    assert 700 < N <= 900
    assert found["out"].shape == (N, 32, 32)
    assert found["y"].shape == (N, 128)
    assert all(found[name].grad.abs().sum() > 0 for name in "qkv")


def test_reading_the_data(tmp_path, monkeypatch):
    make_build(tmp_path / "data" / "smoke", assets=2, val=0, resolutions=(32, 128))
    add_renders(tmp_path / "data" / "smoke", views=2)
    monkeypatch.chdir(tmp_path)
    found = run(next(block for block in BLOCKS if "SdfShard" in block))
    M = len(found["bricks"].cells)
    assert M > 0
    assert (found["bricks"].values.shape, found["bricks"].sharp.shape) == ((M, 512), (M, 64))
    assert found["view"].rgba.shape == (40, 40, 4)


def test_the_documentation_names_every_stage_and_only_reasons_that_exist():
    package = (ROOT / "pipeline").rglob("*.py")
    code = "\n".join(path.read_text(encoding="utf-8") for path in package)
    stages = re.findall(r'_stage\(job, notes, "(\w+)"\)', code)
    assert len(stages) >= 7
    table = (ROOT / "docs" / "catalogue.md").read_text(encoding="utf-8").partition("| stage |")[2]
    manifest = (ROOT / "docs" / "format.md").read_text(encoding="utf-8").partition("| `stage` |")[2]
    for stage in stages:
        assert f"`{stage}`" in table
        assert f"`{stage}`" in manifest.partition("\n")[0]
    reasons = [
        reason
        for line in table.splitlines()[2:]
        for reason in re.findall(r"`([a-z_0-9]+)`", line.rpartition(" | ")[2])
        if line.startswith("| `")
    ]
    assert len(reasons) > 20
    assert [reason for reason in reasons if f'"{reason}"' not in code] == []


MODULES = "pipeline|train|model|kernels|benchmarks|examples"
TEXT = "\n".join(
    [*PAGES, PROPS, *SETUPS, *(text.replace("train train.", "-m train.") for text in RECIPES)]
)
SHOWN = re.findall(
    rf"(?:-m |`(?=[\w.]+ ))((?:{MODULES})\.[\w.]+(?: [^`#\n]*)?)",
    re.sub(r"\\\n +", "", TEXT).replace("\n--", " --"),
)
COMMANDS = sorted({line.strip() for line in SHOWN})


def options_of(module, part, monkeypatch, capsys):
    """Return the options that a command or one of its parts lists with --help-all."""
    monkeypatch.setattr(sys, "argv", [module, *part, "--help-all"])
    monkeypatch.setenv("COLUMNS", "200")
    found = importlib.import_module(module)
    if hasattr(found, "__path__"):  # a package, which `python -m` runs by its __main__
        found = importlib.import_module(f"{module}.__main__")
    main = found.main
    with pytest.raises(SystemExit) as ended:
        main(sys.argv[1:]) if inspect.signature(main).parameters else main()
    assert ended.value.code in (0, None)
    return set(re.findall(r"(?<![\w-])--?[a-z][\w.-]*", capsys.readouterr().out))


@pytest.mark.parametrize("line", COMMANDS)
def test_every_option_that_the_documentation_shows_exists(line, monkeypatch, capsys):
    module, *words = line.split()
    part = [words[0]] if words and re.fullmatch("[a-z]+", words[0]) else []
    known = options_of(module, part, monkeypatch, capsys)
    assert {word for word in words if word.startswith("-")} <= known


# Options of other programs, groups of options, and the option that lists all others.
EVALUATIONS = [["vae"], ["generation"], ["retrieval"], ["meshes"]]
FOREIGN = {"--requeue", "--filter.*", "--filter", "--model", "--rank", "--help-all"}


def test_every_option_that_the_text_of_a_page_names_exists_somewhere(monkeypatch, capsys):
    pages = [text for text in (*PAGES, *SETUPS) if text is not SETUPS[1]]
    prose = re.sub(r"^```.*?^```", "", "\n".join(pages), flags=re.M | re.S)
    named = {
        word.rstrip(".")
        for code in re.findall(r"`(--[^`]+)`", prose)
        for word in code.split()
        if re.match(r"--[a-z]", word)
    }
    assert len(named) > 100
    commands = [
        (f"{path.parent.name}.{path.stem}", part)
        for package in ("pipeline", "model", "train")
        for path in sorted((ROOT / package).glob("*.py"))
        if "__main__" in path.read_text(encoding="utf-8")
        for part in (EVALUATIONS if path.stem == "evaluate" else [[]])
    ]
    commands += [("model.app", []), ("train.demo", []), ("benchmarks.ssa", ["launches"])]
    assert len(commands) > 20
    known = {
        option
        for module, part in commands
        for option in options_of(module, part, monkeypatch, capsys)
    }
    assert named - known - FOREIGN == set()


def anchors(text):
    """Return the anchors of the headings of a page, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)
    plain = [re.sub(r"[^\w\- ]", "", heading.lower()).strip() for heading in headings]
    return {
        anchor for text in plain for anchor in (text.replace(" ", "-"), re.sub("[- ]+", "-", text))
    }


def test_every_link_between_pages_leads_somewhere():
    pages = [
        *(ROOT / name for name in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md")),
        *(
            path
            for top in ("docs", "examples", "benchmarks")
            for path in (ROOT / top).rglob("*.md")
        ),
    ]
    links = 0
    for page in pages:
        text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
        for link in re.findall(r"\]\(([^)\s]+)\)", text):
            if re.match("[a-z]+:", link):
                continue
            links += 1
            name, _, anchor = link.partition("#")
            target = (page.parent / name).resolve() if name else page
            assert target.exists(), f"{page.name}: {link}"
            if anchor:
                assert anchor in anchors(target.read_text(encoding="utf-8")), f"{page.name}: {link}"
            if page.parent == ROOT / "docs":  # the site has nothing else
                assert target.is_relative_to(ROOT / "docs"), f"{page.name}: {link}"
    assert links > 60
