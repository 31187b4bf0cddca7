"""Export: averaged weights that generate, and stages that do not belong together."""

import json
import shutil
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from model.config import GenerationOptions
from model.inference.generator import Generator
from model.inference.stages import read_export, read_facing_views, write_stages
from model.sparse_vae import SparseVAE
from pipeline.core.errors import UserError
from pipeline.core.provenance import FORMAT_VERSION
from tests.model.tiny_models import FAST, disc_image, random_stages, randomize, stages_of
from train.data.latents import vae_hash
from train.export import main
from train.stages.config import ExportConfig
from train.stages.export import export


def checkpoint(path, model, **training):
    """Write a checkpoint whose plain weights differ from the averaged ones."""
    path.mkdir(parents=True)
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, path / "ema.safetensors")
    save_file(
        {name: torch.zeros_like(tensor) for name, tensor in tensors.items()},
        path / "model.safetensors",
    )
    described = {
        "format_version": FORMAT_VERSION,
        "model": type(model).__name__,
        "config": asdict(model.config),
    }
    (path / "config.json").write_text(
        json.dumps({**described, "training": training}), encoding="utf-8"
    )
    return path


@pytest.fixture
def trained(tmp_path):
    vae, structure, dits = random_stages()
    code = vae_hash(vae)
    paths = {
        "vae": (checkpoint(tmp_path / "vae", vae),),
        "structure": checkpoint(tmp_path / "structure", structure),
        "dit": tuple(
            checkpoint(tmp_path / str(r), dit, resolution=r, vae=code) for r, dit in dits.items()
        ),
    }
    return ExportConfig(**paths, out=tmp_path / "export"), (vae, structure, dits)


def test_exported_stages_generate_the_mesh_of_the_trained_ones(trained):
    cfg, models = trained
    names = ["vae_64", "vae_128", "structure", "dit_64", "dit_128"]
    assert [path.name for path in export(cfg)] == names
    made = Generator.load(cfg.out).generate(disc_image(), 3, FAST)
    same = Generator(stages_of(*models), torch.device("cpu")).generate(disc_image(), 3, FAST)
    assert (made.vertices == same.vertices).all()
    assert (made.faces == same.faces).all()
    files = sorted(
        path.relative_to(cfg.out).as_posix() for path in cfg.out.rglob("*") if path.is_file()
    )
    assert files == [
        f"{name}/{file}" for name in sorted(names) for file in ("config.json", "model.safetensors")
    ]


def test_weights_are_rounded_to_bf16_on_request(trained):
    cfg, (vae, structure, dits) = trained
    export(replace(cfg, precision="bf16"))
    for name, model in (("vae_64", vae), ("structure", structure), ("dit_64", dits[64])):
        stored = load_file(cfg.out / name / "model.safetensors")
        for key, tensor in model.state_dict().items():
            rounded = (
                tensor.bfloat16() if tensor.is_floating_point() and tensor.ndim > 1 else tensor
            )
            assert stored[key].dtype == rounded.dtype
            assert torch.equal(stored[key], rounded)
    loaded = Generator.load(cfg.out)
    assert all(tensor.dtype == torch.float32 for tensor in loaded.structure.parameters())
    weight = loaded.vaes[64].state_dict()
    for key, tensor in vae.state_dict().items():
        assert torch.allclose(weight[key], tensor, rtol=2**-8)


def test_two_vaes_are_exported_each_for_its_dit(trained, tmp_path):
    cfg, (vae, structure, dits) = trained
    fine = randomize(SparseVAE(vae.config), 5, scale=0.2)
    paths = checkpoint(tmp_path / "fine", fine, bricks={"resolutions": [128]}), *cfg.vae
    of_fine = checkpoint(tmp_path / "of-fine", dits[128], resolution=128, vae=vae_hash(fine))
    export(replace(cfg, vae=paths, dit=(cfg.dit[0], of_fine)))
    made = Generator.load(cfg.out).generate(disc_image(), 3, FAST)
    stages = replace(stages_of(vae, structure, dits), vaes={64: vae, 128: fine})
    same = Generator(stages, torch.device("cpu")).generate(disc_image(), 3, FAST)
    assert np.array_equal(made.vertices, same.vertices)
    one = Generator(stages_of(vae, structure, dits), torch.device("cpu"))
    assert not np.array_equal(one.generate(disc_image(), 3, FAST).vertices, made.vertices)
    # The export with one VAE for all resolutions is still read.
    shutil.rmtree(cfg.out / "vae_64")
    (cfg.out / "vae_128").rename(cfg.out / "vae")
    loaded = Generator.load(cfg.out).vaes
    assert loaded[64] is loaded[128]
    (cfg.out / "vae").rename(cfg.out / "vae_128")
    with pytest.raises(UserError, match=r"lacks vae_64"):
        Generator.load(cfg.out)


def test_a_vae_without_a_dit_is_exported_for_the_resolutions_of_its_training(trained, tmp_path):
    cfg, (vae, _, _) = trained
    path = checkpoint(tmp_path / "alone", vae, bricks={"resolutions": [32, 64]})
    alone = replace(cfg, vae=(path,), structure=None, dit=())
    assert [folder.name for folder in export(alone)] == ["vae_32", "vae_64"]
    with pytest.raises(UserError, match="does not say at which resolutions it was trained"):
        export(replace(alone, vae=cfg.vae))


def test_an_export_remembers_the_sampling_it_recommends(trained):
    cfg, _ = trained
    export(replace(cfg, steps=(3, 2), guidance=2.0))
    fast = GenerationOptions(min_piece=0.0)
    generator = Generator.load(cfg.out)
    sampling = generator.describe_sampling(fast)
    assert (sampling["steps"], sampling["guidance"]) == ([3, 2, 2], 2.0)
    chosen = generator.describe_sampling(replace(fast, steps=(7,), guidance=1.0))
    assert (chosen["steps"], chosen["guidance"]) == ([7, 7, 7], 1.0)
    same = replace(fast, steps=(3, 2), guidance=2.0)
    made, expected = (generator.generate(disc_image(), 3, options) for options in (fast, same))
    assert (made.vertices == expected.vertices).all()
    # One stage may be exported again with other numbers. The others keep theirs.
    export(replace(cfg, vae=(), structure=None, steps=(9, 5)))
    again = Generator.load(cfg.out).describe_sampling(fast)
    assert (again["steps"], again["guidance"]) == ([3, 5, 5], [2.0, 7.0, 7.0])


def facing(path, source, *, facing_views):
    """Copy a checkpoint to `path` with the option --facing-views in its record of the run."""
    shutil.copytree(source, path)
    described = json.loads((path / "config.json").read_text(encoding="utf-8"))
    described["training"]["facing_views"] = facing_views
    (path / "config.json").write_text(json.dumps(described), encoding="utf-8")
    return path


def test_an_export_records_whether_its_stages_face_the_camera(trained, tmp_path):
    cfg, _ = trained
    export(cfg)
    for name, recorded in [("structure", False), ("dit_64", False), ("vae_64", None)]:
        described = json.loads((cfg.out / name / "config.json").read_text(encoding="utf-8"))
        assert described.get("facing_views") is recorded
    assert Generator.load(cfg.out).facing_views is False
    structure = facing(tmp_path / "turned", cfg.structure, facing_views=True)
    with pytest.raises(UserError) as refused:
        export(replace(cfg, structure=structure))
    assert str(refused.value) == (
        f"{structure} was trained with --facing-views and {cfg.dit[0]} without; export stages "
        "that were trained alike"
    )
    # A stage that stays in the directory counts, too.
    with pytest.raises(UserError, match=r"turned was trained with .*export/dit_\d+ without"):
        export(replace(cfg, structure=structure, vae=(), dit=()))
    dits = tuple(
        facing(tmp_path / f"turned-{path.name}", path, facing_views=True) for path in cfg.dit
    )
    export(replace(cfg, structure=structure, dit=dits))
    stages = read_export(cfg.out)
    assert stages.facing_views is True
    write_stages(tmp_path / "copy", stages)
    assert read_facing_views(tmp_path / "copy" / "structure") is True
    assert read_facing_views(tmp_path / "copy" / "dit_64") is True
    assert read_facing_views(tmp_path / "copy" / "vae_64") is None


def test_an_older_export_does_not_say_whether_it_faces_the_camera(trained):
    cfg, _ = trained
    export(cfg)
    path = cfg.out / "structure" / "config.json"
    described = json.loads(path.read_text(encoding="utf-8"))
    del described["facing_views"]
    path.write_text(json.dumps(described), encoding="utf-8")
    assert Generator.load(cfg.out).facing_views is None
    path.write_text(json.dumps({**described, "facing_views": "yes"}), encoding="utf-8")
    with pytest.raises(UserError, match="facing_views must be true or false, got 'yes'"):
        Generator.load(cfg.out)


def test_an_export_without_a_recommendation_is_sampled_as_before(trained):
    cfg, _ = trained
    export(cfg)
    assert "recommended" not in json.loads(
        (cfg.out / "dit_64" / "config.json").read_text(encoding="utf-8")
    )
    sampling = Generator.load(cfg.out).describe_sampling(GenerationOptions())
    assert (sampling["steps"], sampling["guidance"]) == ([50, 30, 15], 7.0)


def test_a_recommendation_out_of_range_is_refused(trained):
    cfg, _ = trained
    with pytest.raises(ValueError, match="recommended steps must be 1 or more, got 0"):
        replace(cfg, steps=(3, 0))
    with pytest.raises(ValueError, match="recommended guidance must be 0 or more, got -1"):
        replace(cfg, guidance=-1.0)
    export(cfg)
    path = cfg.out / "structure" / "config.json"
    path.write_text(
        json.dumps({**json.loads(path.read_text(encoding="utf-8")), "recommended": {"steps": -5}}),
        encoding="utf-8",
    )
    with pytest.raises(UserError, match=r"structure: recommended .*must be 1 or more, got -5"):
        Generator.load(cfg.out)


def test_a_directory_never_holds_a_dit_with_another_vae(trained, tmp_path):
    cfg, (vae, _, dits) = trained
    export(cfg)
    before = {path: path.read_bytes() for path in cfg.out.rglob("*") if path.is_file()}
    with torch.no_grad():
        next(vae.parameters()).add_(1.0)
    other = checkpoint(tmp_path / "other", vae, bricks={"resolutions": [128]})
    of_other = checkpoint(tmp_path / "of-other", dits[64], resolution=64, vae=vae_hash(vae))
    with pytest.raises(
        UserError,
        match=r"dit_128 stays, and was trained on latents of VAE .* replace it with --dit",
    ):
        export(ExportConfig(vae=(other,), structure=None, dit=(), out=cfg.out))
    with pytest.raises(
        UserError,
        match=r"of-other was trained on latents of VAE .*export/vae_64 is .*; export the VAE",
    ):
        export(ExportConfig(vae=(), structure=None, dit=(of_other,), out=cfg.out))
    assert before == {path: path.read_bytes() for path in cfg.out.rglob("*") if path.is_file()}
    kept = cfg.out / "vae_128" / "model.safetensors"
    export(ExportConfig(vae=(other,), structure=None, dit=(of_other,), out=cfg.out))
    assert kept.read_bytes() == before[kept]
    assert vae_hash(Generator.load(cfg.out).vaes[64]) == vae_hash(vae)


def test_a_damaged_stage_can_be_replaced(trained):
    cfg, _ = trained
    export(cfg)
    for name in ("vae_64", "dit_64"):
        (cfg.out / name / "config.json").write_text("[]", encoding="utf-8")
    with pytest.raises(UserError, match=r"dit_64 is not a checkpoint: .*; choose another --out"):
        export(ExportConfig(vae=(), structure=cfg.structure, dit=(), out=cfg.out))
    export(cfg)
    assert Generator.load(cfg.out).resolutions == [64, 128]


def test_stages_can_be_replaced_one_by_one(trained):
    cfg, (_, structure, _) = trained
    export(cfg)
    before = (cfg.out / "vae_64" / "model.safetensors").read_bytes()
    with torch.no_grad():
        next(structure.parameters()).add_(1.0)
    again = checkpoint(cfg.out.parent / "later", structure)
    export(ExportConfig(vae=(), structure=again, dit=(), out=cfg.out))
    assert (cfg.out / "vae_64" / "model.safetensors").read_bytes() == before
    loaded = Generator.load(cfg.out).structure
    torch.testing.assert_close(next(loaded.parameters()), next(structure.parameters()))


def test_a_dit_of_another_vae_is_refused(trained, tmp_path):
    cfg, (_, _, dits) = trained
    other = checkpoint(tmp_path / "other", dits[64], resolution=64, vae="0123456789ab")
    with pytest.raises(
        UserError, match=r"other was trained on latents of VAE 0123456789ab, .*vae is [0-9a-f]{12}"
    ):
        export(ExportConfig(vae=cfg.vae, structure=None, dit=(other,), out=cfg.out))
    assert not cfg.out.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vae": ("nowhere",)}, "nowhere does not exist: train the stage first"),
        ({"vae": ("structure",)}, "structure must be a checkpoint of a SparseVAE, got Structure"),
        ({"dit": ("64", "64")}, "are both of R = 64"),
        ({"dit": ("structure",)}, "must be a checkpoint of a ConditionedDiT, got Structure"),
    ],
)
def test_unsuitable_checkpoints_are_refused(trained, tmp_path, options, message):
    cfg, _ = trained
    given = {name: value for name, value in asdict(cfg).items()}
    for name, value in options.items():
        given[name] = (
            tuple(tmp_path / one for one in value) if isinstance(value, tuple) else tmp_path / value
        )
    with pytest.raises(UserError, match=message):
        export(ExportConfig(**given))


def test_a_checkpoint_without_a_resolution_or_of_another_layout_is_refused(trained, tmp_path):
    cfg, (_, _, dits) = trained
    silent = checkpoint(tmp_path / "silent", dits[64])
    with pytest.raises(UserError, match="does not say at which resolution"):
        export(ExportConfig(vae=(), structure=None, dit=(silent,), out=cfg.out))
    described = json.loads((silent / "config.json").read_text(encoding="utf-8"))
    del described["config"]["encoder"]
    (silent / "config.json").write_text(json.dumps(described), encoding="utf-8")
    with pytest.raises(UserError, match=r"unknown: \[\], missing: \['encoder'\]"):
        export(ExportConfig(vae=(), structure=None, dit=(silent,), out=cfg.out))
    with pytest.raises(UserError, match="must name a checkpoint, got none"):
        main(["--vae", "--structure", "None", "--dit"])
