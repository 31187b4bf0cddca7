"""LoRA: adapters start as nothing, alone are trained, resume exactly and merge into the weights."""

import shutil
from dataclasses import replace

import pytest
import torch

from model.checkpoint import CheckpointError, load_model, save_model
from model.conditioning.image_conditioned_dit import ConditionedDiT
from model.config import KEPT_LEVELS
from pipeline.core.errors import UserError
from tests.model.tiny_models import randomize
from tests.train.analytic_builds import add_renders, make_build
from tests.train.ss_dit_fixtures import (
    MODEL,
    config,
    encode_with,
    loader_of,
    make_vae,
    task_of,
    weights,
)
from train.engine.batch_sampler import SampleId
from train.engine.distributed import World
from train.stages.config import ExportConfig
from train.stages.dit.config import DiTTraining, LoraOptions
from train.stages.dit.lora import adapted_layers, add_adapters, merge_adapters
from train.stages.dit.run import train_dit
from train.stages.export import export

pytest.importorskip("peft", reason="the adapters need the extra lora")

LORA = LoraOptions(rank=4, alpha=8)
FULL = replace(MODEL, dit=replace(MODEL.dit, attention="full", kv_heads=2))


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    """Return a build with renders and latents, and the VAE that made them."""
    root = tmp_path_factory.mktemp("lora")
    data = make_build(root / "build", assets=4, val=1)
    add_renders(data)
    vae = make_vae(root / "vae")
    encode_with(vae, data)
    return data, vae


@pytest.fixture
def base(tmp_path):
    """Return the export of a DiT with random weights."""
    torch.manual_seed(0)
    save_model(tmp_path / "base" / "dit_32", randomize(ConditionedDiT(MODEL), 1), MODEL)
    return tmp_path / "base"


def tuned(rendered, out, init, **options):
    return config(rendered, out, init=init, lora=LORA, **options)


def velocity(task, batch, model=None):
    """Return the loss, which is a mean over all velocities."""
    return task.losses(model or task.model, batch)["loss"]


def wake_adapters(model):
    """Give the second factors values: they start at zero and hide the first ones."""
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)


@pytest.mark.parametrize("model", [MODEL, FULL], ids=["ssa", "full"])
def test_adapters_change_nothing_at_first_and_merge_to_what_they_add(rendered, tmp_path, model):
    cfg = config(rendered, tmp_path, model=model)
    task = task_of(cfg)
    randomize(task.model, 1)
    batch = loader_of(cfg).batch([SampleId(0, 0), SampleId(2, 0)], 1.0)
    with torch.no_grad():
        before = velocity(task, batch)
        names = set(task.model.state_dict())
        add_adapters(task.model, LORA)
        assert torch.equal(velocity(task, batch), before)
        adapted_names = adapted_layers(ConditionedDiT(model), LORA.modules)
        # Each adapter acts, also where a layer's weight is joined with others or enters a kernel.
        for name in adapted_names:
            factor = task.model.dit.get_submodule(name).lora_B["default"].weight
            factor.copy_(torch.linspace(-1, 1, factor.numel()).view_as(factor))
            assert not torch.equal(velocity(task, batch), before), name
            factor.zero_()
        wake_adapters(task.model)
        adapted = velocity(task, batch)
        assert (adapted - before).abs() > 1e-4
        merge_adapters(task.model)
        torch.testing.assert_close(velocity(task, batch), adapted, rtol=1e-5, atol=0)
    assert set(task.model.state_dict()) == names


def test_adapters_have_the_gradients_of_their_merged_product(rendered, tmp_path):
    """d loss / d B = scale * (d loss / d W) A^T, where W is the weight without adapters."""
    cfg = config(rendered, tmp_path)
    batch = loader_of(cfg).batch([SampleId(0, 0), SampleId(2, 0)], 1.0)
    plain, adapted = task_of(cfg), task_of(cfg)
    for task in (plain, adapted):
        randomize(task.model, 1)
    add_adapters(adapted.model, LORA)
    velocity(plain, batch).backward()
    grads = {}
    for kept in KEPT_LEVELS:
        adapted.model.dit.kept_activations = kept
        adapted.model.zero_grad()
        velocity(adapted, batch).backward()
        grads[kept] = {n: p.grad for n, p in adapted.model.named_parameters() if p.requires_grad}
    for name in adapted_layers(plain.model, LORA.modules):
        layer = adapted.model.dit.get_submodule(name)
        weight = plain.model.dit.get_submodule(name).weight
        expected = LORA.alpha / LORA.rank * weight.grad @ layer.lora_A["default"].weight.T
        found = layer.lora_B["default"].weight.grad
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6, msg=name)
    for kept in KEPT_LEVELS[1:]:
        for name, grad in grads["all"].items():
            assert torch.equal(grads[kept][name], grad), (kept, name)


def test_a_run_trains_only_adapters_resumes_exactly_and_is_exported_merged(
    rendered, base, tmp_path
):
    whole = tuned(rendered, tmp_path / "whole", base)
    train_dit(whole, World())
    halves = tuned(rendered, tmp_path / "halves", base, steps=2)
    train_dit(halves, World())
    train_dit(tuned(rendered, tmp_path / "halves", base), World())
    for name in ("model", "ema"):
        ours, theirs = weights(halves.out, name), weights(whole.out, name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    trained = weights(whole.out)
    start = load_model(base / "dit_32", ConditionedDiT).state_dict()
    for name, tensor in trained.items():
        plain = name.replace(".base_layer", "")
        if "lora_B" in name:
            assert tensor.any(), name
        elif "lora_A" not in name and "latent_" not in name:
            assert torch.equal(tensor, start[plain]), name
    # The export has the names of a model without adapters, and their product in the weights.
    averaged = weights(whole.out, "ema")
    shutil.copytree(base, tmp_path / "export")
    shutil.copytree(rendered[1], tmp_path / "export" / "vae_32")
    paths = {"vae": (), "structure": None, "dit": (whole.out / "latest",)}
    export(ExportConfig(**paths, out=tmp_path / "export"))
    merged = load_model(tmp_path / "export" / "dit_32", ConditionedDiT).state_dict()
    assert merged.keys() == start.keys()
    name = "dit.blocks.0.mlp.0"
    factors = [averaged[f"{name}.lora_{x}.default.weight"] for x in "BA"]
    expected = start[f"{name}.weight"] + LORA.alpha / LORA.rank * factors[0] @ factors[1]
    torch.testing.assert_close(merged[f"{name}.weight"], expected)
    with pytest.raises(CheckpointError, match="has LoRA adapters; merge them with python -m train"):
        load_model(whole.out / "latest", ConditionedDiT)
    with pytest.raises(UserError, match=r"was trained with training\.lora\.alpha=8, now 1"):
        train_dit(replace(whole, lora=replace(LORA, alpha=1)), World())
    with pytest.raises(UserError, match="has LoRA adapters; merge them with python -m train"):
        train_dit(tuned(rendered, tmp_path / "next", whole.out / "latest"), World())


def test_wrong_options_are_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"lora\.rank adapts trained weights; name them with --init"
    ):
        DiTTraining(out=tmp_path, lora=LORA)
    with pytest.raises(ValueError, match="rank must be 0 or more, got -1"):
        LoraOptions(rank=-1)
    with pytest.raises(ValueError, match="alpha must be 1 or more, got 0"):
        LoraOptions(rank=1, alpha=0)
    model = ConditionedDiT(MODEL)
    with pytest.raises(UserError, match=r"got 'attention\.qkv'; there are .*attention\.query"):
        add_adapters(model, replace(LORA, modules=("mlp", "attention.qkv")))
    assert adapted_layers(model, ("mlp.0",)) == ["blocks.0.mlp.0", "blocks.1.mlp.0"]
