"""The published layout at tiny sizes: generation, conversion to an export, and unusable folders."""

import json
import shutil

import pytest
import torch
import trimesh
import yaml

from model.config import GenerationOptions
from model.generate import GenerateConfig, generate
from model.inference.checkpoint_source import find_checkpoint
from model.inference.generator import Generator
from model.inference.published_checkpoint import read_published
from model.inference.stages import StageSelection
from pipeline.core.errors import UserError
from tests.model.official.published_folder import (
    sections,
    use_tiny_refiners,
    write_config,
    write_dino,
    write_folder,
)
from tests.model.tiny_models import disc_image
from train.stages.config import ExportConfig
from train.stages.export import export

torch.set_num_threads(1)
VERSIONS = ("1.0", "1.1")


@pytest.fixture(scope="module")
def tiny_refiners():
    with pytest.MonkeyPatch.context() as patch:
        use_tiny_refiners(patch)
        yield


@pytest.fixture(scope="module")
def dino(tmp_path_factory):
    return write_dino(tmp_path_factory.mktemp("dino"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny_refiners):
    root = tmp_path_factory.mktemp("published")
    return {version: write_folder(root / version, version) for version in VERSIONS}


def mesh_of(checkpoint, dino, folder, *, low_memory=False, **options):
    """Generate a mesh on the CPU by the function of the command, and read it."""
    folder.mkdir(exist_ok=True)
    disc_image().save(folder / "disc.png")
    cfg = GenerateConfig(
        images=(folder / "disc.png",),
        out=folder / "mesh.ply",
        checkpoint=str(checkpoint),
        image_encoder=str(dino),
        low_memory=low_memory,
        device="cpu",
        generation=GenerationOptions(steps=(2,), min_piece=0.0, **options),
    )
    assert generate(cfg) == 0
    return (folder / "mesh.ply").read_bytes()


@pytest.mark.parametrize("version", VERSIONS)
def test_an_official_folder_and_its_export_give_the_same_closed_mesh(
    version, folders, dino, tmp_path
):
    made = mesh_of(folders[version], dino, tmp_path / "a")
    mesh = trimesh.load(tmp_path / "a" / "mesh.ply", force="mesh", process=False)
    assert mesh.is_watertight
    assert mesh.is_winding_consistent
    written = export(
        ExportConfig(official=folders[version], image_encoder=str(dino), out=tmp_path / "export")
    )
    assert {"vae_64", "dit_64", "refiner_64", "refiner_128"} <= {path.name for path in written}
    assert mesh_of(tmp_path / "export", dino, tmp_path / "b") == made
    note = json.loads((tmp_path / "export" / "dit_128" / "config.json").read_text(encoding="utf-8"))
    assert note["meshing"] == {"iso_value": 0.2, "normalize": True}


def test_low_memory_gives_the_same_mesh_and_keeps_no_weights(folders, dino, tmp_path):
    options = {"resolution": 64, "refine": "512"}
    usual = mesh_of(folders["1.1"], dino, tmp_path / "usual", **options)
    assert mesh_of(folders["1.1"], dino, tmp_path / "low", low_memory=True, **options) == usual
    generator = Generator.load(
        folders["1.1"], options=GenerationOptions(refine="all"), **at(dino), low_memory=True
    )
    models = [generator.structure, *generator.dits.values(), *generator.vaes.values()]
    models += generator.refiners.values()
    assert len(models) == 7
    assert {tensor.device.type for model in models for tensor in model.parameters()} == {"meta"}
    assert list(generator.structure.flow.encoder.parameters()) == []


def test_the_refiners_of_an_official_folder_change_the_mesh(folders, dino, tmp_path):
    coarse = {
        refine: mesh_of(folders["1.1"], dino, tmp_path / refine, resolution=64, refine=refine)
        for refine in ("none", "512")
    }
    assert coarse["none"] != coarse["512"]
    whole = mesh_of(folders["1.1"], dino, tmp_path / "all", refine="all")
    assert whole
    mesh = trimesh.load(tmp_path / "all" / "mesh.ply", force="mesh", process=False)
    assert mesh.is_watertight
    generator = Generator.load(
        folders["1.1"], options=GenerationOptions(resolution=64, refine="none"), **at(dino)
    )
    assert not generator.refiners
    with pytest.raises(UserError, match="has no refiner for R = 64, which --refine 512 needs"):
        generator.generate(disc_image(), 0, GenerationOptions(refine="512", resolution=64))


def at(dino):
    return {"image_encoder": str(dino)}


def test_official_settings_reach_the_stages(folders, dino):
    for version in VERSIONS:
        stages = read_published(folders[version], StageSelection(refine="all", **at(dino)))
        assert sorted(stages.dits) == sorted(stages.vaes) == sorted(stages.refiners) == [64, 128]
        flow = stages.structure.flow.config
        assert (flow.schedule.shift, flow.schedule.spacing) == (6.0, "published")
        assert flow.image_tokens == "all"
        fine = stages.dits[128]
        assert fine.config.schedule.shift == 8.0
        assert fine.config.dit.position_factor(128) == 0.5
        first = version == "1.0"
        assert fine.config.image_tokens == ("foreground" if first else "all")
        assert (fine.dit.condition is not None) == first
        assert fine.encoder is stages.structure.flow.encoder
        assert next(fine.encoder.parameters()).dtype == torch.float32
        assert next(fine.dit.parameters()).dtype == torch.float32
        # z = x / 2 + 0.25
        torch.testing.assert_close(fine.dit.latent_std, torch.full((4,), 0.5))
        torch.testing.assert_close(fine.dit.latent_mean, torch.full((4,), 0.25))
        assert stages.meshing_of(64).normalize is False
        assert stages.structure.config.occupancy.threshold == 0.1


# Convolutions of a volume in half precision are slow on a CPU.
@pytest.mark.parametrize(
    ("precision", "refine"),
    [("bf16", "512"), ("fp16", "none"), pytest.param("fp16", "512", marks=pytest.mark.slow)],
)
def test_an_official_folder_runs_in_half_precision(precision, refine, folders, dino, tmp_path):
    options = {"resolution": 64, "precision": precision, "refine": refine}
    assert mesh_of(folders["1.1"], dino, tmp_path / "half", **options)


def edited(content, name, **params):
    content[name]["params"].update(params)
    return content


def renamed(content, name, target):
    content[name]["target"] = target
    return content


def without(content, *path):
    inner = content
    for key in path[:-1]:
        inner = inner[key]
    del inner[path[-1]]
    return content


BAD_CONFIGS = {
    "unknown setting": (
        lambda c: edited(c, "sparse_dit_512", window=7),
        "sparse_dit_512: unknown setting window = 7",
    ),
    "missing setting": (
        lambda c: without(c, "sparse_dit_512", "params", "topk"),
        "the setting topk is missing",
    ),
    "another type": (
        lambda c: edited(c, "sparse_vae_512", num_heads_encoder="two"),
        "num_heads_encoder must be of type int, got 'two'",
    ),
    "unsupported value": (
        lambda c: edited(c, "dense_dit", pe_mode="rope"),
        "pe_mode must be 'ape' here, got 'rope'",
    ),
    "no shifted windows": (
        lambda c: edited(c, "sparse_dit_1024", use_shift=False),
        "use_shift must be True here, got False",
    ),
    "unknown target": (
        lambda c: renamed(c, "refiner", "other.Refiner"),
        "refiner has the unknown target 'other.Refiner'",
    ),
    "unknown section": (
        lambda c: {**c, "texture": {}},
        "unknown section texture",
    ),
    "missing section": (
        lambda c: without(c, "sparse_scheduler_512"),
        "missing section sparse_scheduler_512",
    ),
    "resolutions that differ": (
        lambda c: edited(c, "sparse_dit_512", resolution=9, factor=1.0),
        "sparse_dit_512: resolution must be 8 for sparse_vae_512, got 9",
    ),
    "latents that differ": (
        lambda c: edited(c, "sparse_dit_512", in_channels=8, out_channels=8),
        "in_channels must be 4 for sparse_vae_512, got 8",
    ),
    "another version of DINO": (
        lambda c: edited(c, "dense_image_encoder", version="dinov3"),
        "version must be 'dinov2_vitl14_reg' here, got 'dinov3'",
    ),
}


def refuse(path, message, **options):
    with pytest.raises(UserError, match=message) as caught:
        read_published(path, StageSelection(image_encoder="nowhere", **options))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_an_official_configuration_that_is_unusable_is_refused(name, tmp_path):
    change, message = BAD_CONFIGS[name]
    write_config(tmp_path, change(sections("1.1")))
    refuse(tmp_path, message)


def test_official_files_that_are_unusable_are_refused(folders, tmp_path):
    path = tmp_path / "copy"
    shutil.copytree(folders["1.1"], path)
    sparse = path / "model_sparse_1024.ckpt"
    whole = sparse.read_bytes()
    # A download that did not finish.
    sparse.write_bytes(whole[: len(whole) // 2])
    refuse(path, r"model_sparse_1024.ckpt is damaged, or its download did not finish")
    sparse.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    refuse(path, r"model_sparse_1024.ckpt is a pointer of Git LFS .* run `git lfs pull`")
    sparse.write_bytes(b"")
    refuse(path, "model_sparse_1024.ckpt is empty")
    sparse.unlink()
    refuse(path, "model_sparse_1024.ckpt is missing; download the folder again")
    # Only the files of the wanted resolution are read. The encoder is the next thing to fail.
    refuse(path, "nowhere", resolution=64)
    (path / "model_refiner.ckpt").unlink()
    refuse(path, "model_refiner.ckpt is missing", resolution=64)
    refuse(path, "nowhere", resolution=64, refine="none")
    torch.save({"vae": {}}, path / "model_dense.ckpt")
    held = r"model_dense.ckpt must hold vae, dit, got \['vae'\]"
    refuse(path, held, refine="none", resolution=64)
    (path / "config.yaml").unlink()
    refuse(path, "config.yaml is missing")
    (path / "config.yaml").write_text("a: [", encoding="utf-8")
    refuse(path, "config.yaml is not valid YAML")


def test_the_conversion_of_an_official_folder_needs_only_the_files_it_uses(
    folders, dino, tmp_path, caplog
):
    path = tmp_path / "copy"
    shutil.copytree(folders["1.1"], path)

    def convert(name, **options):
        cfg = ExportConfig(
            official=path, image_encoder=str(dino), out=tmp_path / name, steps=(2,), **options
        )
        return {folder.name for folder in export(cfg) if folder.name.startswith("refiner")}

    assert convert("whole") == {"refiner_64", "refiner_128"}
    assert convert("first", refine="512") == {"refiner_64"}
    (path / "model_refiner_1024.ckpt").unlink()
    assert convert("without fine") == {"refiner_64"}
    assert "model_refiner_1024.ckpt is not there" in caplog.text
    with pytest.raises(UserError, match=r"model_refiner_1024.ckpt is missing; .* --refine none"):
        convert("all", refine="all")
    (path / "model_refiner.ckpt").unlink()
    with pytest.raises(UserError, match=r"model_refiner.ckpt is missing; .* --refine none"):
        convert("default")
    assert convert("none", refine="none") == set()


def test_official_weights_of_another_size_are_refused(folders, tmp_path):
    path = tmp_path / "copy"
    shutil.copytree(folders["1.1"], path)
    file = path / "model_sparse_512.ckpt"
    content = torch.load(file, weights_only=True)
    wide = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
    for part in ("encoder", "decoder"):
        wide["sparse_vae_512"]["params"][f"model_channels_{part}"] = 64
    write_config(path, wide)
    refuse(path, r"model_sparse_512.ckpt: vae must hold .*does not fit", refine="none")
    write_config(path, sections("1.1"))
    content["dit"]["extra"] = torch.zeros(1)
    del content["dit"]["input_layer.bias"]
    torch.save(content, file)
    refuse(path, "dit must hold .* unknown extra; missing input_layer.bias", refine="none")
    dense = torch.load(path / "model_dense.ckpt", weights_only=True)
    dense["dit"]["pos_emb"] += 0.1
    torch.save(dense, path / "model_dense.ckpt")
    refuse(path, "pos_emb must be the sines and cosines of the grid", refine="none")


def test_official_files_never_run_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("executed",))

    write_config(tmp_path, sections("1.1"))
    torch.save({"vae": Evil(), "dit": {}}, tmp_path / "model_dense.ckpt")
    for name in ("model_sparse_512", "model_sparse_1024", "model_refiner"):
        torch.save({}, tmp_path / f"{name}.ckpt")
    refuse(tmp_path, "model_dense.ckpt cannot be read")


def test_names_on_the_hub_are_checked(monkeypatch, tmp_path):
    with pytest.raises(UserError, match="must be hf://OWNER/NAME"):
        find_checkpoint("hf://only-one")
    asked = {}

    def download(repository, **options):
        asked.update(repository=repository, **options)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "config.yaml").write_text("", encoding="utf-8")
    assert find_checkpoint("hf://owner/name/sub") == tmp_path / "sub"
    assert asked["repository"] == "owner/name"
    assert asked["allow_patterns"] == ["sub/*"]
    assert asked["ignore_patterns"] == ["sub/*refiner_1024*"]
    with pytest.raises(UserError, match="holds no files; check the name of the subfolder"):
        find_checkpoint("hf://owner/name/other")

    def fail(*_, **__):
        raise OSError("no network\nand more")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(UserError, match=r"cannot be downloaded \(no network\); check the name"):
        find_checkpoint("hf://owner/name")
