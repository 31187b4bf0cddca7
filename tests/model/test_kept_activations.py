"""Activations that are not kept come back as they were, and attention is never computed twice."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import pytest
import torch
from torch.utils import checkpoint

from model import attention
from model.config import KEPT_LEVELS, DiTConfig
from model.kept_activations import BlockActivations, bytes_per_token, choose_level
from model.sparse_dit import SparseDiT
from tests.kernel_inputs import DEVICE
from tests.kernels import conftest as _faster_interpreter  # noqa: F401
from tests.model.test_sparse_dit import TINY, make_dit, make_inputs

OPTIONS = [
    {},
    {"compression": "v2", "channels": 128},
    {"attention": "full"},
    {"condition_projection": False},
    {"compress_block": 8, "shifted_windows": False},
    {"attention": "full", "dropout": 0.3},
]


def gradients_of(level, **options):
    model = make_dit(**options)
    model.kept_activations = level
    x, t, image = make_inputs([40, 30], [5, 7])
    torch.manual_seed(0)
    model(x, t, image).sin().sum().backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_all_levels_give_the_same_gradients_to_the_bit(options):
    first = gradients_of("all", **options)
    for level in (*KEPT_LEVELS[1:], "auto"):
        for name, gradient in gradients_of(level, **options).items():
            assert torch.equal(gradient, first[name]), (level, name)


@pytest.mark.parametrize("level", KEPT_LEVELS)
def test_attention_is_computed_once(level, monkeypatch):
    calls = []
    for name in ("ssa_with_branches", "cross_attention"):
        function = getattr(attention, name)

        def counted(*args, function=function, name=name, **options):
            calls.append(name)
            return function(*args, **options)

        monkeypatch.setattr(attention, name, counted)
    gradients_of(level)
    assert sorted(calls) == ["cross_attention"] * 2 + ["ssa_with_branches"] * 2


@pytest.fixture
def triton_on_the_cpu(monkeypatch):
    """Let the model run the Triton kernels on CPU tensors, in the interpreter."""
    if DEVICE == "cuda":
        pytest.skip("the tests on the GPU run the kernels")
    modules = ("fused.add_norm", "fused.mlp")
    modules += tuple(f"attention.{name}" for name in ("checks", "branches", "block_mean"))
    for name in modules:
        module = importlib.import_module(f"kernels.{name}")
        monkeypatch.setattr(module, "use_triton", lambda backend, x: True)


def test_the_kernels_give_the_same_gradients_and_keep_less(triton_on_the_cpu, monkeypatch):
    sizes, gradients = kept_numbers({"dtype": torch.float32, "blocks": 1}, [9, 3], monkeypatch)
    for same in zip(*gradients, strict=True):
        assert all(torch.equal(same[0], other) for other in same[1:])
    product = 12 * 4 * TINY["channels"]  # of the MLP
    assert sizes["all"] > sizes["products"]
    assert sizes["products"] > sizes["attention"] + product


@pytest.mark.parametrize("options", [{}, {"attention": "full"}], ids=str)
def test_later_levels_keep_less(options, monkeypatch):
    sizes, _ = kept_numbers(options, [40, 30], monkeypatch)
    assert sizes["all"] > sizes["products"] > sizes["attention"] > 0


def kept_numbers(options, tokens, monkeypatch):
    """Return how many numbers the blocks keep at each level, and the gradients of each level."""
    gradients = []
    sizes = {}
    pack = BlockActivations._pack
    for level in KEPT_LEVELS:
        saved: list[Any] = []

        def counted(self, x, saved=saved):
            saved.append(pack(self, x))
            return saved[-1]

        monkeypatch.setattr(BlockActivations, "_pack", counted)
        monkeypatch.setattr(BlockActivations, "hooks", BlockActivations._hooks)
        model = make_dit(**options)
        x, t, image = make_inputs(tokens, [5, 7], model.out.weight.dtype)
        model.kept_activations = level
        loss = model(x, t, image).sin().sum()  # its graph keeps the addresses from being used again
        kept = [x.content for x in saved if isinstance(x.content, torch.Tensor)]
        sizes[level] = sum({x.data_ptr(): x.numel() for x in kept}.values())
        loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    return sizes, gradients


def test_a_dropped_tensor_is_computed_once_for_all_its_uses():
    calls = []

    def double(x):
        calls.append(1)
        return 2 * x

    kept = BlockActivations("products", "cpu")
    x = torch.randn(5, requires_grad=True)
    with kept.hooks():
        a = double(x)
        kept.drop("products", a, double, x)
        b = double(a)
        kept.drop("products", b, double, a)
        unused = double(b)
        kept.drop("attention", unused, double, b)  # a later level: it is kept
        loss = (b.square() + a.square() * a.sin() + unused.square()).sum()
    assert len(calls) == 3
    loss.backward()
    assert len(calls) == 5
    y = x.detach().requires_grad_()
    ((4 * y).square() + (2 * y).square() * (2 * y).sin() + (8 * y).square()).sum().backward()
    assert torch.allclose(x.grad, y.grad)


def test_a_graph_can_be_walked_twice():
    kept = BlockActivations("attention", "cpu")
    x = torch.randn(5, requires_grad=True)
    with kept.hooks():
        a = 2 * x
        kept.drop("attention", a, lambda x: 2 * x, x)
        loss = a.square().sum()
    first = torch.autograd.grad(loss, x, retain_graph=True)
    assert torch.equal(*first, *torch.autograd.grad(loss, x))


def test_nothing_is_registered_without_gradients():
    kept = BlockActivations("attention", "cpu")
    with torch.no_grad(), kept.hooks():
        a = torch.ones(3)
        kept.drop("attention", a, torch.neg, a)
    assert not kept._recipes


@pytest.mark.parametrize("options", [{}, {"compression": "v2", "channels": 128}], ids=str)
def test_torch_can_keep_the_attention_selectively(options):
    """Selective checkpointing sees the operators and unpacks saved tensors once."""
    model, (x, t, image) = make_dit(**options), make_inputs([40, 30], [5, 7])
    if DEVICE == "cuda":
        pytest.skip("the model of this test is fp64")
    first = gradients_of("all", **options)
    kept = [torch.ops.aten.addmm.default]
    context = functools.partial(checkpoint.create_selective_checkpoint_contexts, kept)
    out = checkpoint.checkpoint(
        lambda feats: model(x.replace(feats), t, image),
        x.feats,
        use_reentrant=False,
        context_fn=context,
    )
    out.sin().sum().backward()
    assert all(torch.equal(p.grad, first[name]) for name, p in model.named_parameters())


@pytest.mark.gpu
@pytest.mark.parametrize("level", KEPT_LEVELS)
def test_the_estimate_of_the_memory_is_that_of_the_gpu(level):
    model, config, forward = gpu_model(level)
    before = torch.cuda.memory_allocated()
    loss, tokens = forward()
    used = torch.cuda.memory_allocated() - before
    estimate = tokens * config.blocks * bytes_per_token(config, level, 2)
    assert 0.8 * estimate < used < 1.2 * estimate, (level, used, estimate)
    loss.backward()
    assert model.out.weight.grad is not None


@pytest.mark.gpu
def test_torch_can_keep_ssa_and_cross_attention_selectively():
    gradients, peaks = [], []
    ops = [torch.ops.sparse3d.ssa.default, torch.ops.sparse3d.segment_attention.default]
    context = functools.partial(checkpoint.create_selective_checkpoint_contexts, ops)
    for selective in (False, True):
        model, _, forward = gpu_model("all")
        if selective:
            for block in model.blocks:
                block.forward = functools.partial(
                    checkpoint.checkpoint, block.forward, use_reentrant=False, context_fn=context
                )
        torch.cuda.reset_peak_memory_stats()
        forward()[0].backward()
        peaks.append(torch.cuda.max_memory_allocated())
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert peaks[1] < 0.8 * peaks[0]


def gpu_model(level):
    """Return a DiT on the GPU, its configuration, and a forward pass."""
    from benchmarks.token_sets import surface_coords
    from model.sparse_tensor import Level, SparseTensor
    from tests.model.test_sparse_dit import make_image_tokens

    torch.manual_seed(0)
    config = DiTConfig(blocks=12, channels=512, heads=16, condition_channels=64)
    model = SparseDiT(config).cuda()
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    model.kept_activations = level
    cells = Level.from_coords(surface_coords(20_000, 128).cuda(), 128, 1)
    images = make_image_tokens([500], 64, torch.float32)
    feats, coords, starts = (x.cuda() for x in (images.feats_SC, images.coords, images.starts))
    image = type(images)(feats, coords, starts, 500)
    noise = torch.randn(len(cells), 16, device="cuda")
    t = torch.tensor([0.4], device="cuda")

    def forward():
        with torch.autocast("cuda", torch.bfloat16):
            return model(SparseTensor(noise, cells), t, image).square().mean(), len(cells)

    forward()[0].backward()  # compiles, and makes the gradients
    return model, config, forward


def test_the_level_follows_from_the_memory():
    config = DiTConfig()
    sizes = [bytes_per_token(config, level, 2) for level in KEPT_LEVELS]
    assert sizes == sorted(sizes, reverse=True)
    tokens, spare = 90_000, 10 << 30
    chosen = [choose_level(config, tokens, 2, gib << 30, spare) for gib in (16, 40, 90, 110, 140)]
    assert chosen == ["attention"] * 2 + ["products"] * 2 + ["all"]
    assert choose_level(DiTConfig(**TINY), 100, 2, 8 << 30, 0) == "all"
