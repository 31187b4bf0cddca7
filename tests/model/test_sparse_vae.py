"""The SS-VAE against a dense VAE of torch operations, finite differences, and single assets."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from kernels import token_order
from model.config import VAEConfig
from model.conv import UpBlock
from model.layers import position_embedding, position_factor
from model.sparse_tensor import BrickBatch, Level, SparseTensor
from model.sparse_vae import SparseVAE
from pipeline.core.schema import Bricks
from tests.model.test_sparse_tensor import random_bricks, random_level

torch.set_num_threads(1)

TINY = VAEConfig(widths=(4, 8, 8, 32), latent_channels=3, heads=2, blocks=2, groups=4)


def random_vae(config=TINY, seed=0, dtype=torch.float64):
    """Return a VAE without parameters at zero or one, so that each of them has an effect."""
    generator = torch.Generator().manual_seed(seed)
    vae = SparseVAE(config).to(dtype)
    with torch.no_grad():
        for parameter in vae.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.1
            parameter.copy_(parameter.double() + noise)
    return vae


def full_bricks(side, seed=0):
    """Return bricks in which every grid point of an (8 * side)^3 grid is active."""
    rng = np.random.default_rng(seed)
    blocks = (
        np.stack(np.meshgrid(*[np.arange(side)] * 3, indexing="ij"), -1)
        .reshape(-1, 3)
        .astype(np.int16)
    )
    values = rng.uniform(-0.99, 0.99, (len(blocks), 512)).astype(np.float16)
    return Bricks(
        resolution=8 * side,
        cells=blocks,
        values=values,
        sharp=np.zeros((len(blocks), 64), np.uint8),
    )


def densify(x, coords, side):
    """Return the rows [N, C] of an asset that fills its grid as [1, C, side, side, side]."""
    volume = x.new_full((side, side, side, x.shape[1]), float("nan"))
    volume[tuple(coords[:, 1:].long().T)] = x
    return volume.permute(3, 0, 1, 2)[None]


def dense_conv(conv, x):
    weight = conv.weight.unflatten(0, (3, 3, 3)).permute(4, 3, 0, 1, 2)
    return F.conv3d(x, weight, conv.bias, padding=1)


def dense_transformer(transformer, x, factor):
    """Apply the transformer to x [1, C, s, s, s] by torch attention with a mask of windows."""
    side = x.shape[-1]
    xyz = torch.cartesian_prod(*[torch.arange(side)] * 3)
    h = F.linear(x[0].flatten(1).T, transformer.input.weight, transformer.input.bias)
    h = h + position_embedding(xyz, transformer.width, factor)
    for n, block in enumerate(transformer.blocks):
        window = (xyz + 4 * (n % 2)) // 8
        mask = (window[:, None] == window).all(2)
        attention, (first, _, last) = block.attention, block.mlp
        qkv = attention.qkv(F.layer_norm(h, h.shape[1:], eps=1e-6)).view(
            len(h), 3, attention.heads, -1
        )
        q, k, v = qkv.permute(1, 2, 0, 3)
        h = h + attention.out(
            F.scaled_dot_product_attention(q, k, v, mask).transpose(0, 1).flatten(1)
        )
        h = h + last(F.gelu(first(F.layer_norm(h, h.shape[1:], eps=1e-6)), approximate="tanh"))
    return h.T.view(1, -1, side, side, side)


def dense_encoder(encoder, x, groups, factor, scale):
    x = encoder.input(x.movedim(1, -1)).movedim(-1, 1)
    for down in encoder.down:
        h = F.silu(F.group_norm(x, groups, down.norm1.weight, down.norm1.bias))
        h = dense_conv(down.conv1, F.avg_pool3d(h, 2) * scale)
        h = dense_conv(
            down.conv2, F.silu(F.group_norm(h, groups, down.norm2.weight, down.norm2.bias))
        )
        x = h + down.skip((F.avg_pool3d(x, 2) * scale).movedim(1, -1)).movedim(-1, 1)
    h = dense_transformer(encoder.transformer, x, factor)[0].flatten(1).T
    return F.layer_norm(h, h.shape[1:]) @ encoder.out.weight.T + encoder.out.bias


def dense_decoder(decoder, z, factor):
    x = dense_transformer(decoder.transformer, z, factor)
    for up in decoder.up:
        x = F.silu(dense_conv(up.conv1, x))
        x = F.silu(dense_conv(up.conv2, F.interpolate(x, scale_factor=2, mode="nearest")))
    return torch.tanh(F.conv3d(x, decoder.out.weight[..., None, None, None], decoder.out.bias))


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def test_parameters_are_those_of_the_paper():
    vae = SparseVAE(VAEConfig(plus_one_pooling=True))
    assert (count(vae.encoder), count(vae.decoder), count(vae)) == (
        22_637_024,
        15_237_089,
        37_874_113,
    )


@pytest.mark.parametrize(
    ("config", "most"),
    [
        (VAEConfig(widths=(8, 16, 32, 64), heads=4, blocks=2, groups=8), 600_000),
        (VAEConfig(widths=(16, 32, 64, 256), heads=4, blocks=2, groups=16, mlp_ratio=3), 6_000_000),
    ],
)
def test_the_configuration_sets_the_number_of_parameters(config, most):
    assert count(SparseVAE(config)) <= most


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"widths": (32, 64, 512)}, r"widths must be 4 positive numbers, got \(32, 64, 512\)"),
        ({"groups": 24}, r"groups must divide all widths \(32, 64, 128, 512\), got 24"),
        ({"heads": 3}, "heads must split 512 channels into one of"),
        ({"heads": 1}, "heads must split 512 channels into one of"),
        ({"blocks": 0}, "blocks must be at least 1, got 0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        VAEConfig(**change)


@pytest.mark.parametrize("plus_one", [False, True])
def test_the_encoder_equals_the_dense_one_on_a_full_grid(plus_one):
    config = VAEConfig(**{**vars(TINY), "plus_one_pooling": plus_one})
    vae, batch = random_vae(config), BrickBatch.collate([full_bricks(2)])
    posterior, voxels = vae.encode(batch), batch.voxels()
    moments = dense_encoder(
        vae.encoder,
        densify(voxels.feats.double(), voxels.coords, 16),
        config.groups,
        position_factor(16),
        8 / 9 if plus_one else 1.0,
    )
    expected = moments.view(2, 2, 2, 6)[tuple(posterior.level.coords[:, 1:].long().T)]
    torch.testing.assert_close(torch.cat([posterior.mean, posterior.logvar], 1), expected)


def test_the_decoder_equals_the_dense_one_on_a_full_grid():
    vae, side = random_vae(), 5  # shifted windows divide it
    cells = torch.cartesian_prod(torch.zeros(1).int(), *[torch.arange(side).int()] * 3)
    level = Level.from_coords(cells[token_order(cells)], side, 1)
    z = torch.randn(side**3, 3, dtype=torch.float64)
    volume = dense_decoder(vae.decoder, densify(z, level.coords, side), position_factor(8 * side))[
        0, 0
    ]
    expected = volume.view(side, 8, side, 8, side, 8).permute(0, 2, 4, 1, 3, 5).flatten(3)
    torch.testing.assert_close(vae.decode(z, level), expected[tuple(level.coords[:, 1:].long().T)])


def test_a_new_model_decodes_zero_and_has_little_noise():
    batch = BrickBatch.collate([random_bricks(12, 32)])
    values, posterior = SparseVAE(TINY)(batch, torch.randn(12, 3))
    for output, start in ((posterior.mean, 0), (posterior.logvar, -6), (values, 0)):
        assert output.dtype == torch.float32
        assert (output == start).all()
    assert values.shape == (12, 512)


def test_latents_are_mean_plus_noise_and_logvar_is_bounded():
    vae, batch = random_vae(), BrickBatch.collate([random_bricks(10, 32)])
    with torch.no_grad():
        vae.encoder.out.bias[3:] = torch.tensor([-100.0, 0.0, 100.0])
    posterior = vae.encode(batch)
    assert (posterior.logvar[:, 0] == -30).all()
    assert (posterior.logvar[:, 2] == 20).all()
    assert (posterior.logvar[:, 1].abs() < 20).all()
    noise = torch.randn(10, 3, dtype=torch.float64)
    torch.testing.assert_close(
        posterior.sample(noise), posterior.mean + (posterior.logvar / 2).exp() * noise
    )
    values, again = vae(batch, noise)
    torch.testing.assert_close(values, vae.decode(again.sample(noise), again.level))
    torch.testing.assert_close(vae(batch)[0], vae.decode(again.mean, again.level))


def loss_of(vae, batch, noise):
    """Return a scalar that depends on every output, and its gradient for every parameter."""
    values, posterior = vae(batch, noise)
    weight = torch.linspace(-1, 1, 512, dtype=values.dtype)
    loss = (
        (values * weight + values**2).sum()
        + posterior.mean.pow(2).sum()
        + posterior.logvar.exp().sum()
    )
    return values, posterior, loss, torch.autograd.grad(loss, list(vae.parameters()))


def test_a_batch_gives_the_result_of_each_asset_alone():
    vae = random_vae()
    bricks = [
        random_bricks(20, 32, seed=1),
        random_bricks(0, 32),
        random_bricks(1, 32),
        random_bricks(25, 32, seed=2),
    ]
    noise = [torch.randn(len(one.cells), 3, dtype=torch.float64) for one in bricks]
    alone = [
        loss_of(vae, BrickBatch.collate([one]), n) for one, n in zip(bricks, noise, strict=True)
    ]
    for order in ([0, 1, 2, 3], [2, 3, 0, 1]):
        batch = BrickBatch.collate([bricks[i] for i in order])
        values, posterior, loss, grads = loss_of(vae, batch, torch.cat([noise[i] for i in order]))
        torch.testing.assert_close(values, torch.cat([alone[i][0] for i in order]))
        torch.testing.assert_close(posterior.logvar, torch.cat([alone[i][1].logvar for i in order]))
        torch.testing.assert_close(loss, sum(one[2] for one in alone))
        for n, grad in enumerate(grads):
            torch.testing.assert_close(grad, sum(one[3][n] for one in alone))


def test_gradients_equal_finite_differences():
    vae, batch = (
        random_vae(),
        BrickBatch.collate([random_bricks(3, 16), random_bricks(1, 16, seed=1)]),
    )
    noise = torch.randn(4, 3, dtype=torch.float64)
    grads = loss_of(vae, batch, noise)[3]
    rng = np.random.default_rng(0)
    step = 1e-5
    for (name, parameter), grad in zip(vae.named_parameters(), grads, strict=True):
        index = tuple(int(rng.integers(n)) for n in parameter.shape)
        if name.endswith("qkv.bias"):
            index = (2 * len(parameter) // 3,)  # a bias of all keys changes nothing
        losses = []
        with torch.no_grad():
            for sign in (step, -2 * step, step):
                parameter[index] += sign
                values, posterior = vae(batch, noise)
                weight = torch.linspace(-1, 1, 512, dtype=values.dtype)
                losses.append(
                    (values * weight + values**2).sum()
                    + posterior.mean.pow(2).sum()
                    + posterior.logvar.exp().sum()
                )
        expected = (losses[0] - losses[1]).item() / (2 * step)
        assert grad[index].item() == pytest.approx(expected, rel=1e-5, abs=1e-6), name
        assert grad.abs().max() > 0, name


def test_recomputing_activations_saves_memory_and_changes_no_value():
    vae, batch = random_vae(), BrickBatch.collate([random_bricks(20, 32)])
    results, sizes = [], []
    for vae.activation_checkpointing in (False, True):
        kept, owned = [], {parameter.data_ptr() for parameter in vae.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, kept=kept: kept.append(t) or t, lambda t: t
        ):
            posterior = vae.encode(batch)
            encoder = len(kept)
            values = vae.decode(posterior.mean, posterior.level)
        for part in (kept[:encoder], kept[encoder:]):
            unique = {
                t.data_ptr(): t.numel()
                for t in part
                if t.is_floating_point() and t.data_ptr() not in owned
            }
            sizes.append(sum(unique.values()))
        results.append(
            [values, *torch.autograd.grad(values.square().sum(), list(vae.decoder.parameters()))]
        )
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    head = 20 * 512 * (2 * TINY.widths[0] + 1)  # values that the last layer keeps in both cases
    assert sizes[2] < 0.4 * sizes[0]
    assert sizes[3] - head < 0.4 * (sizes[1] - head)


def test_autocast_gives_close_values_in_fp32():
    vae, batch = random_vae(dtype=torch.float32), BrickBatch.collate([random_bricks(20, 32)])
    noise = torch.randn(20, 3)
    exact, _ = vae(batch, noise)
    with torch.autocast("cpu", torch.bfloat16):
        values, posterior = vae(batch, noise)
    assert values.dtype == posterior.mean.dtype == posterior.logvar.dtype == torch.float32
    assert 1e-5 < (values - exact).abs().mean() < 0.02 * exact.abs().mean() + 1e-3
    values.square().mean().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in vae.decoder.parameters())
    assert all(
        parameter.grad.isfinite().all()
        for parameter in vae.parameters()
        if parameter.grad is not None
    )


@pytest.mark.parametrize(
    "bricks", [[random_bricks(0, 16)], [random_bricks(0, 16), random_bricks(1, 16)]]
)
def test_empty_and_smallest_assets_train(bricks):
    vae, batch = random_vae(dtype=torch.float32), BrickBatch.collate(bricks)
    values, posterior = vae(batch, torch.zeros(len(batch.cells), 3))
    assert values.shape == (len(batch.cells), 512)
    (values.sum() + posterior.logvar.sum()).backward()
    assert all(parameter.grad.isfinite().all() for parameter in vae.parameters())


def test_an_asset_of_one_voxel_is_encoded():
    one = random_bricks(1, 16)
    one.values[:] = 1
    one.values[0, 100] = 0.25
    vae = random_vae(dtype=torch.float32)
    values, _ = vae(BrickBatch.collate([one]))
    values.sum().backward()
    assert values.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in vae.parameters())


def test_invalid_arguments_are_refused():
    vae, batch = random_vae(), BrickBatch.collate([random_bricks(5, 32)])
    with pytest.raises(ValueError, match=r"z_MC must be \[5, 3\], got \[5, 4\]"):
        vae.decode(torch.zeros(5, 4, dtype=torch.float64), batch.cells)
    batch.values[2] = 1
    with pytest.raises(
        ValueError, match="batch must have an active value in each of its 5 cells, got 1 without"
    ):
        vae.encode(batch)


def count_flops(config, batch):
    """Count by the definition, over all pairs of voxels that a tap joins."""

    def pairs(cells, parents_only=False):
        here, total = set(map(tuple, cells)), 0
        for b, x, y, z in here:
            near = {
                (b, x + d, y + e, z + f) for d, e, f in itertools.product((-1, 0, 1), repeat=3)
            } & here
            total += (
                len({(c, u // 2, v // 2, w // 2) for c, u, v, w in near})
                if parents_only
                else len(near)
            )
        return total

    def blown_up(cells, size):
        return [
            (b, *(size * c + d for c, d in zip(xyz, local, strict=True)))
            for b, *xyz in cells
            for local in itertools.product(range(size), repeat=3)
        ]

    cells, w, M = batch.cells.coords.tolist(), config.widths, len(batch.cells)
    voxels, total = batch.voxels().coords.tolist(), 0
    total += len(voxels) * w[0]
    for a, b in itertools.pairwise(w):
        voxels = list({(c, x // 2, y // 2, z // 2) for c, x, y, z in voxels})
        total += pairs(voxels) * (a * b + b * b) + len(voxels) * a * b
    for n in range(config.blocks):
        windows = {}
        for b, *xyz in cells:
            key = (b, *((c + 4 * (n % 2)) // 8 for c in xyz))
            windows[key] = windows.get(key, 0) + 1
        total += 2 * sum(2 * n * n * w[3] for n in windows.values())
        total += 2 * M * (4 * w[3] ** 2 + 2 * config.mlp_ratio * w[3] ** 2)
    total += M * (w[3] ** 2 + w[3] * 2 * config.latent_channels + config.latent_channels * w[3])
    for (a, b), size in zip(itertools.pairwise(w[::-1]), (2, 4, 8), strict=True):
        total += (
            pairs(blown_up(cells, size // 2)) * a * b
            + pairs(blown_up(cells, size), parents_only=True) * b * b
        )
    return 2 * (total + 512 * M * w[0])


def test_flops_count_the_existing_pairs():
    batch = BrickBatch.collate([random_bricks(9, 32), random_bricks(4, 32, seed=1)])
    assert SparseVAE(TINY).flops(batch) == count_flops(TINY, batch)


def test_an_up_block_treats_absent_cells_as_zero():
    """After each step of the dense computation the voxels of absent cells are set to zero."""
    level, up = random_level([30], side=4, resolution=4), UpBlock(6, 5).double()
    x = torch.randn(30, 6, dtype=torch.float64)
    at = tuple(level.coords[:, 1:].long().T)
    volume, mask = (
        torch.zeros(4, 4, 4, 6, dtype=torch.float64),
        torch.zeros(4, 4, 4, dtype=torch.float64),
    )
    volume[at], mask[at] = x, 1
    h = F.silu(dense_conv(up.conv1, volume.permute(3, 0, 1, 2)[None])) * mask
    fine = dense_conv(up.conv2, F.interpolate(h, scale_factor=2, mode="nearest"))[0]
    expected = fine.view(5, 4, 2, 4, 2, 4, 2).permute(1, 3, 5, 2, 4, 6, 0)[at].reshape(-1, 5)
    torch.testing.assert_close(up(x, level.neighbors, 2), expected)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "allowed"), [(torch.float32, 1e-3), (torch.bfloat16, 0.05)], ids=str
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_gpu_agrees_with_the_cpu_in_fp32(dtype, allowed, checkpointing):
    torch.manual_seed(0)
    vae = SparseVAE(VAEConfig(widths=(16, 32, 64, 128), heads=4, blocks=2, groups=8))
    for out in (vae.encoder.out, vae.decoder.out):
        torch.nn.init.normal_(out.weight, std=0.1)
    batch = BrickBatch.collate(
        [random_bricks(40, 64), random_bricks(0, 64), random_bricks(70, 64, seed=1)]
    )
    noise, parameters = torch.randn(110, 16), list(vae.parameters())
    values, _ = vae(batch, noise)
    grads = torch.autograd.grad(values.square().sum(), parameters)
    vae.activation_checkpointing = checkpointing
    vae.cuda()
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        found, _ = vae(batch.to("cuda"), noise.cuda())
    assert found.dtype == torch.float32
    assert (found.cpu() - values).norm() < allowed * values.norm()
    found_grads = torch.autograd.grad(found.square().sum(), list(vae.parameters()))
    for (name, _), a, b in zip(vae.named_parameters(), found_grads, grads, strict=True):
        assert a.dtype == torch.float32
        assert (a.cpu() - b).norm() < 2 * allowed * b.norm(), name


def test_encoder_and_decoder_share_levels():
    batch = BrickBatch.collate([random_bricks(9, 32)])
    posterior = random_vae().encode(batch)
    assert posterior.level is batch.voxels().level.parents.level.parents.level.parents.level
    assert torch.equal(posterior.level.coords, batch.cells.coords)
    assert isinstance(batch.voxels(), SparseTensor)
