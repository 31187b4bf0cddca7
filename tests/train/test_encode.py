"""Encoding of builds: exact latents, complete stores, statistics, resuming, and errors."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

from model.checkpoint import save_model
from model.sparse_tensor import BrickBatch
from model.sparse_vae import SparseVAE
from pipeline.core.errors import RunError, UserError
from pipeline.storage.sdf_shard import SdfShard
from tests.train.analytic_builds import TINY, make_build
from train.data.bricks import BrickReader
from train.data.latents import LatentBatch, LatentShard, LatentStore, vae_hash
from train.encode import main
from train.engine.distributed import World
from train.stages.vae.config import EncodeConfig
from train.stages.vae.encode import LatentEncoder, encode

torch.set_num_threads(1)
SHARDS = ("000000", "000001")


def make_vae(seed=0):
    """Return a VAE of random weights. The last layer of a new encoder would be zero."""
    torch.manual_seed(seed)
    vae = SparseVAE(TINY)
    for parameter in vae.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return vae.eval()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("vae") / "export"
    save_model(path, make_vae(), TINY)
    return path


@pytest.fixture(scope="session")
def encoded(build, checkpoint, tmp_path_factory):
    """Directory of all latents, and of the latents of the VAE."""
    root = tmp_path_factory.mktemp("latents")
    return root, encode(options(build, checkpoint, root), World())


def options(build, checkpoint, root, **others):
    defaults = {
        "resolutions": (32, 40),
        "device": "cpu",
        "precision": "fp32",
        "max_tokens": 60,
        "workers": 2,
    }
    return EncodeConfig(vae=checkpoint, data=build, latents=root, **{**defaults, **others})


def tree(folder):
    """Return the bytes of every file, including leftovers of a killed attempt."""
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


@pytest.mark.parametrize("resolution", [32, 40])
def test_latents_equal_the_posterior_of_each_asset(build, encoded, resolution):
    store = LatentStore(encoded[0], resolution)
    vae = make_vae()
    seen = 0
    for name in SHARDS:
        shard = SdfShard(build / "sdf" / str(resolution) / f"{name}.zarr")
        for uid in shard.uids:
            bricks, latent = shard.bricks(uid), store.read(uid)
            active = (np.abs(bricks.values) < 1).any(1)
            assert np.array_equal(latent.cells, bricks.cells[active])  # by x, y, z
            assert (latent.cells.dtype, latent.mean.dtype, latent.logvar.dtype) == (
                np.int16,
                np.float16,
                np.float16,
            )
            batch = BrickBatch.collate([bricks])
            with torch.no_grad():
                posterior = vae.encode(batch)
            rows = {tuple(xyz): row for row, xyz in enumerate(latent.cells.tolist())}
            order = [rows[tuple(xyz)] for xyz in batch.cells.coords[:, 1:].tolist()]
            for stored, exact in ((latent.mean, posterior.mean), (latent.logvar, posterior.logvar)):
                found = torch.from_numpy(stored[order]).float()
                assert torch.allclose(found, exact, atol=2e-3, rtol=2e-3)
                assert exact.std() > 0.05
            assert store.tokens[uid] == len(latent.cells)
            seen += 1
    assert seen == len(store.tokens) == 8


def test_statistics_are_those_of_posterior_samples_of_training_assets(build, encoded):
    store = LatentStore(encoded[0], 32)
    latents = [store.read(f"analytic-{number:020d}") for number in range(6)]  # 6 and 7 are held out
    mean, logvar = (
        np.concatenate([getattr(x, name) for x in latents]).astype(float)
        for name in ("mean", "logvar")
    )
    samples = mean + np.exp(0.5 * logvar) * np.random.default_rng(0).standard_normal(
        (2000, *mean.shape)
    )
    assert np.allclose(store.mean, mean.mean(0), atol=1e-6)
    assert np.allclose(store.std, samples.reshape(-1, mean.shape[1]).std(0), rtol=0.01)
    assert store.channels == TINY.latent_channels


def test_a_batch_is_in_token_order_and_samples_the_posterior(build, encoded):
    store = LatentStore(encoded[0], 40)
    uids = ["analytic-00000000000000000003", "analytic-00000000000000000000"]
    batch = LatentBatch.collate([store.read(uid) for uid in uids], 40)
    shards = [SdfShard(build / "sdf" / "40" / "000000.zarr").bricks(uid) for uid in uids]
    bricks = BrickBatch.collate(shards)
    assert torch.equal(batch.cells.coords, bricks.cells.coords)
    assert batch.cells.resolution == 5
    with torch.no_grad():
        posterior = make_vae().encode(bricks)
    noise = torch.randn(len(batch.cells), TINY.latent_channels)
    assert torch.allclose(batch.sample(noise), posterior.sample(noise), atol=1e-2)
    with pytest.raises(ValueError, match="at least one asset"):
        LatentBatch.collate([], 40)


def test_only_missing_shards_are_encoded_again(build, checkpoint, encoded, tmp_path):
    root = tmp_path / "latents"
    shutil.copytree(encoded[0], root)
    before, (folder,) = tree(root), root.iterdir()
    gone, kept = (folder / "32" / f"{name}.zarr" for name in SHARDS)
    shutil.rmtree(gone)
    (folder / "32" / "stats.json").unlink()
    (folder / "32" / f".{gone.name}.partial" / "mean").mkdir(
        parents=True
    )  # of a run that was killed
    with pytest.raises(
        UserError, match=r"is not complete \(no stats.json\); complete it: python -m train.encode"
    ):
        LatentStore(root, 32)
    stamps = {path: path.stat().st_mtime_ns for path in kept.rglob("*")}
    encode(options(build, checkpoint, root), World())
    assert tree(root) == before
    assert stamps == {path: path.stat().st_mtime_ns for path in kept.rglob("*")}


def test_ranks_share_the_shards(build, checkpoint, encoded, tmp_path):
    cfg = options(build, checkpoint, tmp_path, resolutions=(32,))
    folder = encode(cfg, World(rank=1, size=2))
    assert [path.name for path in sorted((folder / "32").iterdir())] == ["000001.zarr"]
    encode(cfg, World(rank=0, size=2))
    assert tree(folder / "32") == tree(encoded[1] / "32")


def test_an_interrupted_run_leaves_complete_shards(
    build, checkpoint, encoded, tmp_path, monkeypatch
):
    original = LatentEncoder.encode
    calls = []

    def stops(self, bricks):
        calls.append(len(bricks))
        if len(calls) == 5:
            raise KeyboardInterrupt
        return original(self, bricks)

    monkeypatch.setattr(LatentEncoder, "encode", stops)
    cfg = options(build, checkpoint, tmp_path, max_tokens=1, resolutions=(32,))
    with pytest.raises(KeyboardInterrupt):
        encode(cfg, World())
    assert calls == [1] * 5
    (folder,) = tmp_path.iterdir()
    assert [path.name for path in (folder / "32").iterdir()] == [
        "000000.zarr"
    ]  # of four assets each
    encode(cfg, World())
    assert len(LatentStore(tmp_path, 32).tokens) == 8


def test_the_hash_depends_on_the_weights_alone(tmp_path):
    vae, other = make_vae(), make_vae(1)
    assert vae_hash(vae) == vae_hash(make_vae())
    assert vae_hash(vae) != vae_hash(other)
    assert len(vae_hash(vae)) == 12


def test_latents_of_several_or_other_vaes_are_refused(build, encoded, tmp_path):
    root = tmp_path / "latents"
    shutil.copytree(encoded[0], root)
    save_model(tmp_path / "other", make_vae(1), TINY)
    encode(options(build, tmp_path / "other", root, resolutions=(32,)), World())
    mine, other = encoded[1].name, vae_hash(make_vae(1))
    with pytest.raises(UserError, match="has latents of 2 VAEs at R = 32"):
        LatentStore(root, 32)
    assert LatentStore(root, 32, other).vae == other
    assert LatentStore(root, 40).vae == mine
    with pytest.raises(
        UserError, match=rf"has latents of VAE {mine} at R = 40, not of {other}; make them: python"
    ):
        LatentStore(root, 40, other)
    with pytest.raises(UserError, match="has no latents at R = 48; make them: python"):
        LatentStore(root, 48)
    shutil.rmtree(root / mine / "32" / "000001.zarr")
    shutil.copytree(root / other / "32" / "000001.zarr", root / mine / "32" / "000001.zarr")
    with pytest.raises(
        UserError, match=f"must hold latents of VAE {mine} at R = 32, got VAE {other}"
    ):
        LatentStore(root, 32, mine)


def test_stores_that_are_damaged_or_of_another_format_are_refused(encoded, tmp_path):
    root = tmp_path / "latents"
    shutil.copytree(encoded[0], root)
    (folder,) = root.iterdir()
    described = folder / "32" / "000000.zarr" / "zarr.json"
    text = described.read_text(encoding="utf-8")
    described.write_text(
        text.replace('"format_version": 1', '"format_version": 99'), encoding="utf-8"
    )
    with pytest.raises(UserError, match="must have format_version 1, got 99"):
        LatentStore(root, 32)
    described.write_text(text, encoding="utf-8")
    stats = folder / "32" / "stats.json"
    stats.write_text(
        stats.read_text(encoding="utf-8").replace('"format_version": 1', '"format_version": 99'),
        encoding="utf-8",
    )
    with pytest.raises(UserError, match="has format_version 99, this code reads 1"):
        LatentStore(root, 32)
    for path in (tmp_path / "nothing", folder / "32" / "000000.zarr" / "mean"):
        with pytest.raises(ValueError, match="must hold latents"):
            LatentShard(path)


def test_latents_of_another_build_are_refused(build, checkpoint, encoded, tmp_path):
    fewer = make_build(tmp_path / "fewer", assets=1, val=1, resolutions=(32,))
    root = tmp_path / "latents"
    shutil.copytree(encoded[0], root)
    with pytest.raises(
        UserError,
        match=r"was not made from .*fewer but from analytic-0+2, which it lacks; delete it",
    ):
        encode(options(fewer, checkpoint, root, resolutions=(32,)), World())


def test_unreadable_assets_are_skipped_up_to_a_limit(
    build, checkpoint, encoded, tmp_path, monkeypatch, caplog
):
    broken = {"analytic-00000000000000000001"}
    original = BrickReader.read

    def read(self, asset, resolution):
        if self.index.uids[asset] in broken:
            raise ValueError("no cells")
        return original(self, asset, resolution)

    monkeypatch.setattr(BrickReader, "read", read)
    encode(options(build, checkpoint, tmp_path / "one", resolutions=(32,)), World())
    assert "skipped analytic-00000000000000000001: no cells" in caplog.text
    store, whole = LatentStore(tmp_path / "one", 32), LatentStore(encoded[0], 32)
    assert set(whole.tokens) - set(store.tokens) == broken
    again, exact = (x.read("analytic-00000000000000000002") for x in (store, whole))
    assert np.allclose(again.mean, exact.mean, atol=2e-3)
    broken.add("analytic-00000000000000000003")
    with pytest.raises(
        RunError, match=r"2 of 4 assets cannot be read, .* run python -m pipeline\.verify"
    ):
        encode(options(build, checkpoint, tmp_path / "two", resolutions=(32,)), World())
    assert not list((tmp_path / "two").rglob("*.zarr"))


def test_latents_that_are_not_finite_end_the_run(build, tmp_path):
    vae = make_vae()
    vae.encoder.out.bias.data[0] = 1e6
    save_model(tmp_path / "vae", vae, TINY)
    with pytest.raises(RunError, match="are not finite in float16: the VAE has diverged"):
        encode(options(build, tmp_path / "vae", tmp_path / "latents"), World())


def test_a_build_without_training_assets_is_refused(checkpoint, tmp_path):
    only_val = make_build(tmp_path / "build", assets=0, val=2)
    with pytest.raises(UserError, match="has no asset in split train"):
        encode(options(only_val, checkpoint, tmp_path / "latents", resolutions=(32,)), World())


def test_the_command_encodes_the_resolutions_of_the_vae(build, checkpoint, encoded, tmp_path):
    described = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    trained = tmp_path / "vae"
    shutil.copytree(checkpoint, trained)
    described["training"] = {"bricks": {"resolutions": [40, 512]}, "loop": {"precision": "fp32"}}
    (trained / "config.json").write_text(json.dumps(described), encoding="utf-8")
    data = tmp_path / "build"
    shutil.copytree(build, data)
    main(["--vae", str(trained), "--data", str(data), "--device", "cpu", "--max-tokens", "60"])
    folder = data / "latents" / encoded[1].name
    assert [path.name for path in folder.iterdir()] == [
        "40"
    ]  # the only resolution of the VAE that the build has
    assert tree(folder / "40") == tree(encoded[1] / "40")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--vae", "nowhere"], "nowhere is not a checkpoint"),
        (["--resolutions", "36"], "resolution must be a positive multiple of 8"),
        (["--max-tokens", "0"], "max-tokens must be 1 or more, got 0"),
        (["--resolutions", "48"], "has no bricks at R = 48, only at R = 32 40"),
        (["--data", "nowhere"], "nowhere is not a build"),
    ],
)
def test_bad_options_are_reported_in_one_line(build, checkpoint, arguments, message, tmp_path):
    defaults = {
        "--vae": str(checkpoint),
        "--data": str(build),
        "--latents": str(tmp_path),
        "--device": "cpu",
    }
    defaults |= dict([arguments])
    with pytest.raises(UserError, match=message):
        main([word for pair in defaults.items() for word in pair])


@pytest.mark.gpu
def test_latents_of_the_gpu_agree_with_the_cpu(build, checkpoint, encoded, tmp_path):
    encode(options(build, checkpoint, tmp_path), World(device=torch.device("cuda")))
    ours, exact = LatentStore(tmp_path, 32), LatentStore(encoded[0], 32)
    for uid in exact.tokens:
        assert np.array_equal(ours.read(uid).cells, exact.read(uid).cells)
        assert np.allclose(ours.read(uid).mean, exact.read(uid).mean, atol=0.02)
