"""The demo's commands have the options that they are given, and their paths fit together."""

from pathlib import Path

import pytest

from model.generate import GenerateConfig, mesh_files
from pipeline.config import PRESETS, BuildConfig
from pipeline.core.cli import parse, parse_with_presets
from train.demo.config import DEMO_SIZES, HELD_OUT_FOLDER, LIVE_PICTURES, DemoConfig
from train.demo.held_out import read_pictures
from train.demo.plan import held_out_meshes, plan_demo, plan_held_out
from train.evaluation.config import GenerationEvaluation, VAEEvaluation
from train.stages.config import ExportConfig
from train.stages.dit.config import DIT_PRESETS
from train.stages.structure.config import STRUCTURE_PRESETS
from train.stages.vae.config import VAE_PRESETS, EncodeConfig


def parse_options(command):
    """Return the configuration that a command reads from its arguments."""
    module, *arguments = command.arguments
    presets = {
        "train.vae": VAE_PRESETS,
        "train.dit": DIT_PRESETS,
        "train.structure": STRUCTURE_PRESETS,
    }
    if module in presets:
        return parse_with_presets(presets[module], "tiny", arguments, prog=module)
    if module == "pipeline.build":
        return parse(BuildConfig, arguments, prog=module, default=PRESETS["smoke"])
    if module == "pipeline.verify":
        return arguments
    kinds = {"train.encode": EncodeConfig, "train.export": ExportConfig}
    if module == "train.evaluate":
        kinds[module] = {"vae": VAEEvaluation, "generation": GenerationEvaluation}[arguments.pop(0)]
    return parse(kinds[module], arguments, prog=module)


@pytest.mark.parametrize("size", ["cpu", "gpu"])
def test_every_command_exists_and_reads_what_the_others_wrote(size):
    plan = plan_demo(DemoConfig(data=Path("d"), out=Path("o")), DEMO_SIZES[size])
    configs = {
        command.name: parse_options(command)
        for group in plan.groups
        for sequence in group
        for command in sequence
    }
    build, vae, dit, structure = (configs[name] for name in ("build", "vae", "dit", "structure"))
    assert dit.resolution == structure.resolution
    assert dit.resolution in build.resolutions
    assert dit.resolution in vae.bricks.resolutions
    assert configs["encode"].resolutions == (dit.resolution,)
    assert configs["encode"].vae == vae.out / "latest" == dit.vae
    assert configs["encode"].latents == dit.latents
    assert dit.held_out_views == structure.held_out_views == 2 < build.views
    assert configs["export"].dit == (dit.out / "latest",)
    assert configs["export"].steps
    assert configs["export"].guidance
    assert configs["evaluate generation"].generation.steps is None  # those of the export
    assert configs["export"].structure == structure.out / "flow" / "latest"
    assert configs["evaluate generation"].checkpoint == configs["export"].out
    assert configs["evaluate generation"].view == -1  # a view that training held out
    assert vae.preset == dit.preset == structure.preset == ("small" if size == "gpu" else "tiny")


def test_the_shipped_weights_get_the_pictures_of_the_package(tmp_path):
    pictures = [HELD_OUT_FOLDER / picture.image for picture in read_pictures()[:LIVE_PICTURES]]
    plan = plan_held_out(DemoConfig(out=tmp_path), DEMO_SIZES["cpu"], pictures)
    ((((command,),)),) = plan.groups
    module, *words = command.arguments
    assert module == "model.generate"
    cfg = parse(GenerateConfig, words, prog=module)
    assert (cfg.checkpoint, cfg.device, cfg.images) == ("props", "cpu", tuple(pictures))
    held_out_meshes(tmp_path).mkdir()
    assert mesh_files(cfg) == [
        held_out_meshes(tmp_path) / f"{picture.stem}.glb" for picture in pictures
    ]
