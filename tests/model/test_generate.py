"""Generation from an image: unusable images, output files, the chain of stages, and seeds."""

import json
import shutil
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from PIL import Image
from safetensors.torch import load_file, save_file

from model.checkpoint import CheckpointError, load_model, save_model
from model.conditioning.background_removal import load_foreground
from model.conditioning.image_conditioned_dit import ConditionedDiT
from model.conditioning.image_encoder import ImageBatch
from model.conditioning.image_preprocessing import prepare_image
from model.config import GenerationOptions, Guidance, RecommendedSampling, SamplingOptions
from model.generate import GenerateConfig, generate, main, mesh_files
from model.inference import stages
from model.inference.cells_near_mesh import cells_near
from model.inference.generator import Generator
from model.sparse_vae import SparseVAE
from model.structure import dense_level, occupied_level
from pipeline.core.errors import RunError, UserError
from pipeline.core.grid import band, spacing
from tests.child_python import run_python
from tests.model.tiny_models import FAST, VAE, disc_image, random_stages, stages_of


def export(folder):
    """Write an export of random models for R = 64 and 128."""
    vae, structure, dits = random_stages()
    save_model(folder / "vae", vae, vae.config)
    save_model(folder / "structure", structure, structure.config)
    for size, dit in dits.items():
        save_model(folder / f"dit_{size}", dit, dit.config)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return export(tmp_path_factory.mktemp("export"))


@pytest.fixture
def picture(tmp_path):
    disc_image().save(tmp_path / "disc.png")
    return tmp_path / "disc.png"


def sphere_values(level, radius=0.3):
    """Return what a perfect decoder would return for a ball: clamp(sdf / tau), [M, 512]."""
    resolution = 8 * level.resolution
    local = torch.cartesian_prod(*[torch.arange(8)] * 3)
    points = (8 * level.coords[:, None, 1:].long() + local) * spacing(resolution) - 0.5
    return ((points.double().norm(dim=-1) - radius) / band(resolution)).clamp(-1, 1).float()


def test_each_stage_gets_the_cells_of_the_stage_before(monkeypatch):
    vae, structure, dits = random_stages()
    reference = trimesh.creation.icosphere(subdivisions=5, radius=0.3)
    first = cells_near(reference.vertices, reference.faces, 64)
    grid = torch.zeros(1, 8, 8, 8, dtype=torch.bool)
    grid[0, *torch.from_numpy(first.astype(np.int64)).T] = True
    monkeypatch.setattr(structure, "generate", lambda *_, **__: occupied_level(grid))
    monkeypatch.setattr(vae, "decode", lambda _z, level: sphere_values(level))
    generator = Generator(stages_of(vae, structure, dits), torch.device("cpu"))
    made = generator.generate(disc_image(), 0, FAST)
    assert [stage.name for stage in made.stages] == ["structure", "64", "128"]
    assert [stage.tokens for stage in made.stages[:2]] == [len(first)] * 2
    exact = len(cells_near(reference.vertices, reference.faces, 128))
    assert abs(made.stages[2].tokens - exact) < 0.03 * exact
    assert made.open_edges == 0
    assert (made.cleaned.holes, made.cleaned.floaters, made.cleaned.bubbles) == (0, 0, 0)
    np.testing.assert_allclose(np.linalg.norm(made.vertices, axis=1), 0.3, atol=2e-3)
    coarse = generator.generate(disc_image(), 0, replace(FAST, resolution=64))
    assert [stage.name for stage in coarse.stages] == ["structure", "64"]
    assert len(coarse.faces) < 0.5 * len(made.faces)


def test_the_same_seed_gives_the_same_closed_mesh(checkpoint, picture, tmp_path):
    def make(name, **changes):
        out = tmp_path / name
        cfg = GenerateConfig(
            images=(picture,), out=out, checkpoint=checkpoint, device="cpu", generation=FAST
        )
        assert generate(replace(cfg, **changes)) == 0
        return out.read_bytes(), trimesh.load(out, force="mesh", process=False)

    first, mesh = make("a.ply")
    assert mesh.is_watertight
    assert mesh.is_winding_consistent
    assert mesh.volume > 0
    assert make("b.ply")[0] == first
    assert make("c.ply", seed=1)[0] != first
    fewer = make("d.ply", generation=replace(FAST, guidance=1.0))[0]
    assert fewer != first


COMPILED_BY_A_GENERATION = """
import sys
from numba.core.registry import CPUDispatcher
from PIL import Image
from model.inference.generator import Generator
from model.inference.warm_up import warm_up
from tests.model.tiny_models import FAST

def signatures():
    modules = [m for name, m in sys.modules.items() if name.startswith(("model.", "pipeline."))]
    functions = [f for m in modules for f in vars(m).values() if isinstance(f, CPUDispatcher)]
    return {(f.__module__, f.__name__, str(s)) for f in functions for s in f.signatures}

warm_up()
before = signatures()
Generator.load(sys.argv[1]).generate(Image.open(sys.argv[2]), 0, FAST)
print(len(before), sorted(signatures() - before))
"""


@pytest.mark.slow  # compiles for 15 s where no cache is there
def test_a_generation_compiles_nothing_after_the_warm_up(checkpoint, picture):
    ended = run_python("-c", COMPILED_BY_A_GENERATION, checkpoint, picture)
    count, new = ended.stdout.split(maxsplit=1)
    assert int(count) >= 5  # functions that are called from Python
    assert new.strip() == "[]"


def test_low_memory_gives_the_same_mesh_with_one_stage_in_memory(checkpoint, picture, monkeypatch):
    usual = Generator.load(checkpoint).generate(Image.open(picture), 0, FAST)
    loaded, together = [], []

    def watched(*arguments, skeleton=False, **options):
        model = load_model(*arguments, skeleton=skeleton, **options)
        if not skeleton:
            loaded.append((type(model).__name__, weakref.ref(model)))
            together.append(sum(reference() is not None for _, reference in loaded))
        return model

    monkeypatch.setattr(stages, "load_model", watched)
    generator = Generator.load(checkpoint, low_memory=True)
    assert loaded == []
    low = generator.generate(Image.open(picture), 0, FAST)
    np.testing.assert_array_equal(low.vertices, usual.vertices)
    np.testing.assert_array_equal(low.faces, usual.faces)
    names = [name for name, _ in loaded]
    assert names == ["Structure", *2 * ["ConditionedDiT", "SparseVAE"]]
    assert together == [1] * 5
    assert [reference() for _, reference in loaded] == [None] * 5


def test_low_memory_finds_weights_of_another_shape_before_the_work(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "export")
    file = tmp_path / "export" / "dit_128" / "model.safetensors"
    weights = load_file(file)
    weights["dit.input.weight"] = weights["dit.input.weight"][:-1]
    save_file(weights, file)
    with pytest.raises(CheckpointError, match=r"dit_128.*dit\.input\.weight of shape"):
        Generator.load(tmp_path / "export", low_memory=True)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"dit_128.*cannot be used"):
        Generator.load(tmp_path / "export", low_memory=True)


def test_the_velocities_of_several_views_are_averaged():
    _, structure, dits = random_stages((64,))
    level = dense_level(8, 1)
    dit = dits[64]
    tokens = []
    for turn in (Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180):
        prepared = prepare_image(disc_image().transpose(turn), dit.encoder.image_size)
        tokens.append(dit.encode_images(ImageBatch.collate([prepared])))
    # One step is linear in the velocity, so the latents are averaged, too.
    once = SamplingOptions(steps=1, guidance=Guidance(scale=3.0))
    first, second = (dit.generate(level, view, [0], once) for view in tokens)
    both = dit.generate(level, tokens, [0], once)
    torch.testing.assert_close(both, (first + second) / 2, atol=1e-4, rtol=1e-4)
    assert (first - second).abs().max() > 1e-2
    with pytest.raises(ValueError, match="at least one view, got none"):
        structure.generate([], [0], once)


def jointly(dit, views=3):
    """Return the model as one that was trained with several views together."""
    model = ConditionedDiT(replace(dit.config, views=views))
    model.load_state_dict(dit.state_dict())
    return model.eval()


def test_a_model_of_several_views_attends_to_all_of_them_together():
    dit = random_stages((64,))[2][64].eval()
    joint, level = jointly(dit), dense_level(8, 1)
    images = [prepare_image(disc_image(size), dit.encoder.image_size) for size in (64, 96)]
    images[1] = replace(images[1], rgb=255 - images[1].rgb)
    tokens = [dit.encode_images(ImageBatch.collate([image])) for image in images]
    guided = SamplingOptions(steps=2, guidance=Guidance(scale=3.0))
    assert torch.equal(
        joint.generate(level, tokens[0], [0], guided), dit.generate(level, tokens[0], [0], guided)
    )
    both = joint.generate(level, tokens, [0], guided)
    trained = joint.encode_images(ImageBatch.collate(images, views=[2]))
    torch.testing.assert_close(both, joint.generate(level, trained, [0], guided))
    assert (both - dit.generate(level, tokens, [0], guided)).abs().max() > 1e-3
    # The first view is told from the second one.
    assert (both - joint.generate(level, tokens[::-1], [0], guided)).abs().max() > 1e-4
    with pytest.raises(ValueError, match="trained with up to 3 views of an object, got 4"):
        joint.generate(level, 4 * tokens[:1], [0], guided)
    without_positions = replace(dit.config.dit, condition_projection=False)
    with pytest.raises(ValueError, match=r"views must be 1 without dit\.condition_projection"):
        replace(dit.config, dit=without_positions, views=2)


def test_an_export_records_with_how_many_views_a_stage_was_trained(checkpoint, picture, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "joint")
    coarse = replace(FAST, steps=(1,), resolution=64)
    for name in ("structure", "dit_64"):
        file = folder / name / "config.json"
        described = json.loads(file.read_text(encoding="utf-8"))
        flow = described["config"] if name == "dit_64" else described["config"]["flow"]
        assert flow["views"] == 1
        flow["views"] = 2
        described["facing_views"] = True
        file.write_text(json.dumps(described), encoding="utf-8")
        generator = Generator.load(folder, options=coarse)
        assert (generator.max_views, generator.facing_views) == (2, True)
        # One stage that averages is enough to need views from one side.
        assert generator.views_from_one_side is (name == "structure")
    images = [load_foreground(picture)] * 3
    with pytest.raises(ValueError, match="trained with up to 2 views of an object, got 3"):
        generator.generate(images, 0, coarse)
    alone = Generator.load(checkpoint, options=coarse).generate(images[:1], 0, coarse)
    np.testing.assert_array_equal(
        generator.generate(images[:1], 0, coarse).vertices, alone.vertices
    )
    for low_memory in (False, True):
        loaded = Generator.load(folder, options=coarse, low_memory=low_memory)
        mesh = loaded.generate(images[:2], 0, coarse)
        assert mesh.vertices.tobytes() != alone.vertices.tobytes()


def test_each_view_is_encoded_for_each_stage(monkeypatch):
    generator = Generator(stages_of(*random_stages((64,))), torch.device("cpu"))
    images = [disc_image(), disc_image(96)]
    seen = []

    def encode(_dit, image, _whole):
        seen.append(image)
        return object()

    monkeypatch.setattr(generator, "_encode_view", encode)
    monkeypatch.setattr(
        generator.structure, "generate", lambda views, *_, **__: pytest.fail(str(len(views)))
    )
    with pytest.raises(pytest.fail.Exception, match=r"^2$"):
        generator.generate(images, 0, FAST)
    assert seen == images
    with pytest.raises(ValueError, match="at least one view, got none"):
        generator.generate([], 0, FAST)


def test_views_of_one_object_give_one_mesh(checkpoint, picture, tmp_path):
    other = tmp_path / "other.png"
    disc_image().transpose(Image.Transpose.ROTATE_90).save(other)
    coarse = replace(FAST, steps=(1,), resolution=64)

    def make(name, **files):
        cfg = GenerateConfig(
            **files, out=tmp_path / name, checkpoint=checkpoint, device="cpu", generation=coarse
        )
        assert generate(cfg) == 0
        return (tmp_path / name).read_bytes()

    alone = make("alone.stl", images=(picture,))
    assert make("one_view.stl", views=(picture,)) == alone
    both = make("both.stl", views=(picture, other))
    assert both not in (alone, make("other.stl", images=(other,)))
    # The mean does not depend on the order of the views.
    assert make("swapped.stl", views=(other, picture)) == both


def test_views_of_a_model_that_faces_the_camera_must_be_from_one_side(
    checkpoint, picture, tmp_path, caplog
):
    folder = shutil.copytree(checkpoint, tmp_path / "facing")
    config = folder / "structure" / "config.json"
    described = json.loads(config.read_text(encoding="utf-8"))
    config.write_text(json.dumps({**described, "facing_views": True}), encoding="utf-8")
    other = tmp_path / "other.png"
    disc_image().transpose(Image.Transpose.ROTATE_90).save(other)
    coarse = replace(FAST, steps=(1,), resolution=64)
    for views, said in (((picture,), False), ((picture, other), True)):
        caplog.clear()
        cfg = GenerateConfig(
            views=views, out=tmp_path / "m.stl", checkpoint=folder, device="cpu", generation=coarse
        )
        assert generate(cfg) == 0
        assert ("all --views must be from the same side" in caplog.text) is said


def test_views_are_files_of_one_object(picture, tmp_path):
    views = (picture, tmp_path / "back.png")
    cfg = GenerateConfig(views=views, out=tmp_path, device="cpu")
    assert mesh_files(cfg) == [tmp_path / "disc.glb"]
    assert mesh_files(replace(cfg, out=tmp_path / "a.obj")) == [tmp_path / "a.obj"]
    preview = replace(cfg, out=tmp_path / "back.glb", preview="png")
    preview = replace(preview, views=(picture, tmp_path / "back.preview.png"))
    with pytest.raises(UserError, match=r"back\.preview\.png is an image and would be replaced"):
        mesh_files(preview)
    with pytest.raises(UserError, match=r"back\.png must be a readable image"):
        main(["--views", *map(str, views), "--device", "cpu"])
    for words, found in (((), "neither"), ((str(picture), "--views", str(picture)), "both")):
        with pytest.raises(UserError, match=f"views of one object, got {found}"):
            main(list(words))


def test_each_of_several_images_gives_the_mesh_it_gives_alone(checkpoint, picture, tmp_path):
    other = tmp_path / "other.png"
    disc_image().transpose(Image.Transpose.ROTATE_90).save(other)
    cfg = GenerateConfig(
        images=(other, picture),
        out=tmp_path / "out",
        checkpoint=checkpoint,
        device="cpu",
        generation=FAST,
    )
    assert generate(replace(cfg, format="stl")) == 0
    alone = replace(cfg, images=(picture,), out=tmp_path / "alone.stl")
    assert generate(alone) == 0
    assert (tmp_path / "out" / "disc.stl").read_bytes() == (tmp_path / "alone.stl").read_bytes()
    assert (tmp_path / "out" / "other.stl").read_bytes() != (tmp_path / "alone.stl").read_bytes()


def test_an_image_that_fails_does_not_stop_the_others(
    checkpoint, picture, tmp_path, caplog, monkeypatch
):
    calls = []

    def fail_first(self, *arguments, **options):
        calls.append(arguments)
        if len(calls) == 1:
            raise RunError("no surface")
        return original(self, *arguments, **options)

    original = Generator.generate
    monkeypatch.setattr(Generator, "generate", fail_first)
    disc_image(96).save(tmp_path / "a.png")
    cfg = GenerateConfig(
        images=(tmp_path / "a.png", picture), out=tmp_path, checkpoint=checkpoint, generation=FAST
    )
    assert generate(replace(cfg, device="cpu")) == 1
    assert "a.png: no surface" in caplog.text
    assert not (tmp_path / "a.glb").exists()
    assert (tmp_path / "disc.glb").exists()


def test_the_mesh_file_of_each_image(tmp_path):
    def of(*images, **options):
        return mesh_files(GenerateConfig(images=tuple(Path(image) for image in images), **options))

    assert of("x/a.png") == [Path("a.glb")]
    assert of("a.png", out=Path("b.OBJ")) == [Path("b.OBJ")]
    assert of("a.png", out=tmp_path, format="ply") == [tmp_path / "a.ply"]
    assert of("a.png", "b.jpg", out=Path("new")) == [Path("new/a.glb"), Path("new/b.glb")]
    with pytest.raises(UserError, match=r"\.glb, \.obj, \.ply, \.stl, got c\.fbx"):
        of("a.png", out=Path("c.fbx"))
    with pytest.raises(UserError, match=r"must be a directory for 2 images, got c\.glb"):
        of("a.png", "b.png", out=Path("c.glb"))
    with pytest.raises(UserError, match=r"both be written to a\.glb"):
        of("x/a.png", "y/a.jpg")
    with pytest.raises(
        UserError, match=r"a\.preview\.png is an image and would be replaced by its mesh or preview"
    ):
        of("a.png", "a.preview.png", preview="png")


def test_inputs_are_checked_before_models_are_loaded(picture, tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    cfg = GenerateConfig(
        images=(picture,), out=tmp_path / "file" / "a.glb", checkpoint=tmp_path / "nowhere"
    )
    with pytest.raises(UserError, match=r"file cannot be written to \(.*\); choose another --out"):
        generate(cfg)
    # The library looks as if it were not installed.
    for module, package in (("igl", "libigl"), ("meshoptimizer", "meshoptimizer --pre")):
        with monkeypatch.context() as context:
            context.setitem(sys.modules, module, None)
            with pytest.raises(UserError, match=f"pip install {package}$"):
                generate(replace(cfg, out=tmp_path / "a.glb", generation=replace(FAST, faces=500)))
    with pytest.raises(UserError, match="nowhere is not a directory; name an export"):
        generate(replace(cfg, out=tmp_path / "a.glb"))


def test_a_preview_keeps_the_image_and_may_fail_without_the_mesh(
    checkpoint, picture, tmp_path, caplog, monkeypatch
):
    before = picture.read_bytes()
    disc_image(96).save(picture.with_name("other.png"))
    images = (picture, picture.with_name("other.png"))
    cfg = GenerateConfig(
        images=images, out=picture.parent, checkpoint=checkpoint, device="cpu", generation=FAST
    )
    assert generate(replace(cfg, preview="png")) == 0
    assert picture.read_bytes() == before
    assert Image.open(picture.with_name("disc.preview.png")).size == (1280, 640)

    def no_egl(*_):
        raise RunError("no EGL")

    monkeypatch.setattr("model.inference.turntable.render_from", no_egl)
    (picture.with_name("disc.glb")).unlink()
    assert generate(replace(cfg, preview="png")) == 2
    assert "other.png: no EGL" in caplog.text
    assert picture.with_name("disc.glb").exists()


def write_unusual_image(name, folder):
    """Write an image file of an unusual or unusable kind."""
    path = folder / f"{name}.png"
    if name == "transparent":
        Image.new("RGBA", (64, 64), (255, 0, 0, 0)).save(path)
    elif name == "one_pixel":
        Image.new("RGBA", (1, 1), (255, 0, 0, 255)).save(path)
    elif name == "huge":
        Image.new("1", (20_000, 20_000)).save(path)
    elif name == "opaque":
        disc_image().convert("RGB").save(path)
    elif name == "empty":
        path.write_bytes(b"")
    elif name == "truncated":
        disc_image().save(path)
        path.write_bytes(path.read_bytes()[:200])
    elif name == "text":
        path.write_text("<html>not found</html>", encoding="utf-8")
    elif name == "grayscale":
        disc_image(mode="LA").save(path)
    elif name == "sixteen_bit":
        import struct
        import zlib

        def chunk(kind, data):
            return (
                struct.pack(">I", len(data))
                + kind
                + data
                + struct.pack(">I", zlib.crc32(kind + data))
            )

        alpha = np.asarray(disc_image())[..., 3].astype(">u2") * 257
        rows = np.dstack([np.full_like(alpha, 40_000)] * 3 + [alpha]).astype(">u2")
        raw = b"".join(b"\0" + row.tobytes() for row in rows)
        head = struct.pack(">IIBBBBB", 64, 64, 16, 6, 0, 0, 0)
        parts = (chunk(b"IHDR", head), chunk(b"IDAT", zlib.compress(raw)), chunk(b"IEND", b""))
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    elif name == "animated":
        path = path.with_suffix(".gif")
        frames = [disc_image().rotate(90 * n) for n in range(3)]
        frames[0].save(path, save_all=True, append_images=frames[1:], disposal=2)
    return path


@pytest.mark.parametrize("name", ["grayscale", "sixteen_bit", "animated"])
def test_unusual_images_are_accepted(name, tmp_path):
    image = load_foreground(write_unusual_image(name, tmp_path))
    assert (image.mode, image.size) == ("RGBA", (64, 64))
    covered = (np.asarray(image)[..., 3] > 127).mean()
    assert covered == pytest.approx(np.pi * 0.16, rel=0.03)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("transparent", "must have a foreground"),
        ("one_pixel", "at least 8 pixels|not clearly cut out"),
        ("huge", r"at most \d+ pixels \(8192 x 8192\)"),
        ("opaque", "not clearly cut out.*pip install rembg.*--keep-background"),
        ("empty", "readable image"),
        ("truncated", "readable image"),
        ("text", "readable image"),
        ("missing", "readable image"),
    ],
)
def test_unusable_images_are_refused_by_name(name, message, tmp_path, monkeypatch):
    # The library looks as if it were not installed.
    monkeypatch.setitem(sys.modules, "rembg", None)
    path = write_unusual_image(name, tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        load_foreground(path)
    assert path.name in str(caught.value)


def test_a_background_can_be_kept_or_removed(tmp_path, monkeypatch):
    path = write_unusual_image("opaque", tmp_path)
    assert load_foreground(path, keep_background=True).getextrema()[3] == (255, 255)

    class Library:
        @staticmethod
        def remove(image):
            assert image.mode == "RGB"
            return disc_image()

    monkeypatch.setitem(sys.modules, "rembg", Library)
    assert load_foreground(path).getextrema()[3] == (0, 255)


def test_errors_name_missing_stages(checkpoint, tmp_path):
    with pytest.raises(
        UserError,
        match=r"lacks vae, structure, dit_<resolution>: train the stages .* train\.export",
    ):
        Generator.load(tmp_path)
    with pytest.raises(UserError, match="has models for R = 64, 128, none for 512"):
        Generator.load(checkpoint, options=replace(FAST, resolution=512))
    assert Generator.load(checkpoint, options=replace(FAST, resolution=64)).resolutions == [64]
    vae, structure, dits = random_stages()
    with pytest.raises(
        ValueError, match=r"one for R = 64, .* structure stage's cells, got \[128\]"
    ):
        Generator(stages_of(vae, structure, {128: dits[128]}), torch.device("cpu"))
    other = SparseVAE(replace(VAE, latent_channels=8))
    with pytest.raises(
        ValueError, match=r"dits\[64\] must have the VAE's 8 latent channels, got 4"
    ):
        Generator(stages_of(other, structure, dits), torch.device("cpu"))


def test_empty_and_oversized_stages_are_errors(checkpoint, monkeypatch):
    generator = Generator.load(checkpoint)
    with pytest.raises(RunError, match=r"cells at R = \d+ are more than --max-tokens 3"):
        generator.generate(disc_image(), 0, replace(FAST, max_tokens=3))
    with pytest.raises(ValueError, match="resolution must be one of 64, 128, got 256"):
        generator.generate(disc_image(), 0, replace(FAST, resolution=256))
    monkeypatch.setattr(generator.vaes[64], "decode", lambda _z, level: torch.ones(len(level), 512))
    with pytest.raises(RunError, match="R = 64 has no surface"):
        generator.generate(disc_image(), 0, FAST)
    nothing = torch.zeros(1, 8, 8, 8, dtype=torch.bool)
    monkeypatch.setattr(generator.structure, "generate", lambda *_, **__: occupied_level(nothing))
    with pytest.raises(RunError, match="structure stage generated no cell"):
        generator.generate(disc_image(), 0, FAST)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": ()}, "steps must be 1 or more for each stage"),
        ({"steps": (5, 0)}, "steps must be 1 or more for each stage"),
        ({"guidance": -1.0}, "guidance must be 0 or more"),
        ({"min_piece": 1.0}, "min_piece must be in"),
        ({"faces": 2}, "faces must be 4 or more, got 2"),
    ],
)
def test_options_out_of_range_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        GenerationOptions(**change)


def test_the_last_number_of_steps_holds_for_later_stages():
    options = GenerationOptions(steps=(5, 3))
    steps = [options.sampling(stage, RecommendedSampling()).steps for stage in range(4)]
    assert steps == [5, 3, 3, 3]


def test_the_command_logs_the_mesh_and_the_stages(checkpoint, picture, tmp_path):
    out = tmp_path / "mesh.obj"
    words = [
        picture,
        "-o",
        out,
        "--checkpoint",
        checkpoint,
        "--device",
        "cpu",
        "--steps",
        "2",
        "--preview",
        "png",
    ]
    done = run_python("-m", "model.generate", *words)
    for word in ("stand-in", "closed", "structure", "64 ", "128 ", "peak memory", "preview"):
        assert word in done.stderr
    assert trimesh.load(out, force="mesh").is_watertight
    assert Image.open(out.with_suffix(".preview.png")).size == (1280, 640)
    with pytest.raises(UserError, match=r"no\.png must be a readable image: No such file"):
        main([str(tmp_path / "no.png")])
    with pytest.raises(UserError, match=r"seed must be from 0 to 2\^63 - 1, got -1"):
        main([str(picture), "--seed", "-1"])


def test_help_imports_no_heavy_library():
    ended = run_python("-X", "importtime", "-m", "model.generate", "--help")
    assert "--guidance" in ended.stdout
    lines = ended.stderr.splitlines()
    imported = {
        line.rpartition("|")[2].strip() for line in lines if line.startswith("import time:")
    }
    assert "model.config" in imported
    assert not imported & {"torch", "numba", "transformers", "ray", "trimesh", "scipy", "triton"}


def test_an_unusable_image_is_refused_before_torch_is_imported(tmp_path):
    (tmp_path / "no.png").write_bytes(b"")
    code = f"""
import sys
from model.generate import main
from pipeline.core.errors import UserError
try:
    main([{str(tmp_path / "no.png")!r}, "-o", {str(tmp_path / "no.glb")!r}])
except UserError as error:
    print(error, "torch" in sys.modules)
"""
    ended = run_python("-c", code)
    assert ended.stdout.endswith("False\n"), ended.stderr
    assert "readable image" in ended.stdout


def test_a_device_is_checked_with_the_options(picture):
    with pytest.raises(UserError, match=r'device must be "auto", "cpu", "cuda" or "cuda:N", got'):
        main([str(picture), "--device", "gpu"])
    assert GenerateConfig(images=(picture,), device="cuda:1").device == "cuda:1"


@pytest.mark.gpu
def test_same_seed_same_mesh_on_a_gpu(checkpoint):
    first, again, other = (
        Generator.load(checkpoint, "cuda").generate(disc_image(), seed, FAST) for seed in (5, 5, 6)
    )
    np.testing.assert_array_equal(first.vertices, again.vertices)
    np.testing.assert_array_equal(first.faces, again.faces)
    assert first.open_edges == 0
    assert first.vertices.shape != other.vertices.shape or (first.vertices != other.vertices).any()
