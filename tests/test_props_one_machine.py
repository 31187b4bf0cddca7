"""The props recipe on one machine: its time plan, its program of commands, and packed results."""

import csv
import os
import signal
import tarfile
import time

import pytest

from examples.recipes.props.one_machine import (
    LEAST_TRAINING_S,
    SHARES,
    OneMachineConfig,
    Phase,
    TimePlan,
    main,
    pack,
    phases_of,
    run,
)
from pipeline.core.cli import parse
from pipeline.core.hashing import sha256_of
from pipeline.inspection.verification import verify
from tests.child_python import start_python
from tests.pipeline.builds import wait_until
from tests.pipeline.crashing_source import box


def test_the_time_plan_divides_what_is_left_and_keeps_the_tail():
    plan = TimePlan.of(1000.0, 27)
    assert (plan.training_end, plan.end) == (1000.0 + 1620 - 300, 1000.0 + 1620)
    # A build of 4 minutes leaves 1,080 s of training for two lanes.
    now = 1000.0 + 240
    vae = plan.training_minutes("vae", now)
    assert vae == pytest.approx((0.4 * 1080 - 20) / 60)
    dit = plan.training_minutes("dit", now + 60 * vae + 20 + 60)  # encoding takes a minute
    assert 60 * (vae + dit) + 20 + 60 + 20 == pytest.approx(1080)
    occupancy = plan.training_minutes("occupancy", now)
    structure = plan.training_minutes("structure", now + 60 * occupancy + 20)
    assert 60 * (occupancy + structure) + 40 == pytest.approx(1080)
    assert plan.training_minutes("dit", plan.end) == LEAST_TRAINING_S / 60
    assert TimePlan.of(0.0, 5).training_end == 240


def configured(tmp_path, *words):
    folder = ("--folder", str(tmp_path / "files"), "--out", str(tmp_path / "out"))
    return parse(OneMachineConfig, [*folder, *words], prog="x")


def test_the_commands_are_those_of_the_recipe_and_take_further_options(tmp_path):
    cfg = configured(tmp_path, "--structure=--model.flow.encoder.stem convolutions")
    phases = {phase.name: phase for phase in phases_of(cfg, cores=16)}
    assert set(SHARES) <= set(phases)
    words = {name: " ".join(map(str, phase.words(1.5))) for name, phase in phases.items()}
    assert "--executor processes --workers 15" in words["build"]
    assert words["occupancy"].endswith(
        "--vae.loop.max-minutes 1.5 --model.flow.encoder.stem convolutions"
    )
    assert "--part flow" in words["structure"]
    assert "--seeds 0 1 2 --workers 10" in words["evaluate-image"]
    assert "--workers 5 --cells stored" in words["evaluate-cells"]
    order = list(phases)
    for name, phase in phases.items():
        assert all(order.index(other) < order.index(name) for other in phase.after)


def test_every_command_accepts_its_options(tmp_path):
    """The options are parsed by each command; what they name need not exist."""
    from pipeline.build import configure
    from pipeline.core.cli import parse_with_presets
    from train.evaluation.config import GenerationEvaluation, VAEEvaluation
    from train.stages.config import ExportConfig
    from train.stages.dit.config import DIT_PRESETS
    from train.stages.structure.config import STRUCTURE_PRESETS
    from train.stages.vae.config import VAE_PRESETS, EncodeConfig

    configs = {"encode": EncodeConfig, "export": ExportConfig, "evaluate-vae": VAEEvaluation}
    configs |= dict.fromkeys(("evaluate-image", "evaluate-cells"), GenerationEvaluation)
    presets = {"vae": VAE_PRESETS, "occupancy": STRUCTURE_PRESETS}
    presets |= {"structure": STRUCTURE_PRESETS, "dit": DIT_PRESETS}
    seen = set()
    for phase in phases_of(configured(tmp_path), cores=16):
        words = [str(word) for word in phase.words(2.0)]
        seen.add(phase.name)
        if phase.name == "build":
            assert configure(words[2:]).views == 24
        elif phase.name in presets:
            cfg = parse_with_presets(presets[phase.name], "tiny", words[2:], prog="x")
            assert cfg.preset == "props"
        elif phase.name in configs:
            parse(configs[phase.name], words[3 if "evaluate" in phase.name else 2 :], prog="x")
    assert seen >= {*configs, *presets, "build"}


def phase(name, code="", after=(), ends=False):
    return Phase(name=name, after=after, words=lambda _: ("-c", code), ends=ends)


def test_phases_run_at_the_same_time_in_their_order_and_once(tmp_path, caplog):
    caplog.set_level("INFO")
    notes = tmp_path / "notes"
    note = f"from pathlib import Path; f = Path({str(notes)!r}).open('a'); f.write('{{}} ')"
    # a and b wait for each other.
    meet = (
        "import time; from pathlib import Path; Path({mine!r}).touch()\n"
        "while not Path({other!r}).exists(): time.sleep(0.01)"
    )
    left, right = str(tmp_path / "left"), str(tmp_path / "right")
    phases = [
        phase("a", meet.format(mine=left, other=right)),
        phase("b", meet.format(mine=right, other=left)),
        phase("c", note.format("c"), after=("a", "b")),
    ]
    cfg = configured(tmp_path)
    assert run(cfg, phases) == {}
    assert run(cfg, phases) == {}
    assert notes.read_text(encoding="utf-8") == "c "
    assert "Resuming: a, b, c are complete." in caplog.text


def test_a_command_that_fails_is_repeated_once_and_others_go_on(tmp_path):
    once = (
        "import sys; from pathlib import Path; p = Path({!r}); "
        "q = p.exists(); p.touch(); sys.exit(not q)"
    )
    phases = [
        phase("flaky", once.format(str(tmp_path / "flaky"))),
        phase("broken", "import sys; sys.exit(1)"),
        phase("refused", once.format(str(tmp_path / "refused")).replace("not q", "2 * (not q)")),
        phase("never", after=("broken",)),
        phase("other", after=("flaky",)),
    ]
    cfg = configured(tmp_path)
    missing = run(cfg, phases)
    assert sorted(missing) == ["broken", "never", "refused"]
    assert missing["broken"] == f"ended with code 1, see {cfg.out}/logs/broken.log"
    log = (cfg.out / "logs" / "broken.log").read_text(encoding="utf-8")
    assert log.count("$ python -c") == 2
    assert run(cfg, phases) == {key: missing[key] for key in ("broken", "never")}


def test_an_evaluation_ends_with_the_time_and_the_results_are_packed(tmp_path):
    cfg = configured(tmp_path, "--minutes", "0.03")
    phases = [
        phase("training", "import time; time.sleep(2.5)"),  # a build is not cut short
        phase("evaluation", "import time; time.sleep(60)", ends=True),
        phase("late", after=("training",), ends=True),
    ]
    started = time.monotonic()
    missing = run(cfg, phases)
    assert time.monotonic() - started < 30
    assert missing.keys() == {"evaluation", "late"}
    assert missing["evaluation"].endswith("because the time is over")
    assert missing["late"] == "not started, the time is over"
    assert list(cfg.packed.glob("results.tar.*"))


SLEEPING = """
import sys
from examples.recipes.props import one_machine
from examples.recipes.props.one_machine import Phase
from pipeline.core.cli import command
code = sys.argv.pop(1)
one_machine.phases_of = lambda cfg, cores: [
    Phase(name="sleeps", after=(), words=lambda _: ("-c", code))
]
command(one_machine.main)
"""


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 143)])
def test_no_command_outlives_the_program(tmp_path, signum, code):
    pid = tmp_path / "pid"
    sleeps = f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    words = ("--folder", tmp_path, "--out", tmp_path / "out")
    process = start_python("-c", SLEEPING, sleeps, *words)
    wait_until(lambda: pid.exists() and pid.read_text(encoding="utf-8"), 30)
    child = int(pid.read_text(encoding="utf-8"))
    process.send_signal(signum)
    process.communicate(timeout=30)
    assert process.returncode == code

    def is_gone():
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            return True
        return False

    wait_until(is_gone, 10)


def test_packed_results_are_those_files_and_of_limited_size(tmp_path):
    out = tmp_path / "out"
    files = {
        "export/dit_256/model.safetensors": os.urandom(2500),
        "evaluation/image/evaluation.json": b"{}",
        "structure/flow/metrics.jsonl": b"{}\n",
        "logs/build.log": b"done",
    }
    left_out = {"evaluation/image/meshes/a.glb": b"mesh", "vae/step-1/ema.safetensors": b"weights"}
    for name, content in (files | left_out).items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(content)
    packed = tmp_path / "packed"
    packed.mkdir()
    (packed / "results.tar.099").touch()  # A part that an earlier, larger archive left.
    parts = pack(out, packed, 4000)
    assert len(parts) > 1
    assert sorted(path.name for path in packed.iterdir()) == [
        "SHA256SUMS",
        *(part.name for part in parts),
    ]
    assert max(part.stat().st_size for part in parts) == 4000
    sums = (packed / "SHA256SUMS").read_text(encoding="utf-8").split()
    assert sums[::2] == [sha256_of(part) for part in parts]
    whole = tmp_path / "whole.tar"
    whole.write_bytes(b"".join(part.read_bytes() for part in parts))
    with tarfile.open(whole) as tar:
        tar.extractall(tmp_path / "unpacked", filter="data")
    unpacked = tmp_path / "unpacked"
    assert {
        path.relative_to(unpacked).as_posix(): path.read_bytes()
        for path in unpacked.rglob("*")
        if path.is_file()
    } == files


@pytest.mark.slow
def test_the_program_goes_from_files_to_an_evaluation(tmp_path):
    folder = tmp_path / "files"
    (folder / "pack").mkdir(parents=True)
    rows = []
    for number in range(4):
        path = folder / "pack" / f"{number}.obj"
        path.write_text(box(0.5 + number / 4), encoding="utf-8")
        row = {"file": f"pack/{number}.obj", "repository": "ada/pack", "commit": "0" * 40}
        row |= {"path": f"{number}.obj", "sha256": sha256_of(path), "licence": "CC0-1.0"}
        row |= {"author": "Ada", "group": str(number), "shape": row["file"]}
        rows.append(row | {"split": "val" if number == 3 else "train"})
    with (tmp_path / "list.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    short = "loop.steps 3"
    words = [
        *("--folder", folder, "--list", tmp_path / "list.csv", "--out", tmp_path / "out"),
        *("--preset", "tiny", "--resolution", 64, "--minutes", 10, "--workers", 2),
        "--build=--views 4 --image-size 64 --topology-resolution 64",
        f"--vae=--{short}",
        f"--structure=--vae.{short} --flow.{short} --facing-views --mirrored-views",
        f"--dit=--flow.{short} --facing-views --mirrored-views",
        "--export=--precision bf16 --steps 2",
        "--evaluate=--samples 500 --generation.guidance 1",
    ]
    main(list(map(str, words)))
    out = tmp_path / "out"
    assert verify(out / "data") == []
    assert not (out / "data" / "report").exists()
    assert (out / "data" / "attribution.csv").exists()
    for name in ("image", "cells", "vae"):
        assert (out / "evaluation" / name / "index.html").is_file()
    main(list(map(str, words)))  # nothing is left to do
    for name in ("vae", "structure/flow", "dit"):
        lines = (out / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        assert sum('"step": 3' in line and '"loss"' in line for line in lines) >= 1
