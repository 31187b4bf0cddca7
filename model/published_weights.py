"""Names and layouts of the published Direct3D-S2 weights, and ours."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from model.checkpoint import KeyMap, unchanged
from model.config import Compression, DiTConfig, OccupancyConfig, VAEConfig


class _Keys(dict[str, tuple[str, Callable[[Tensor], Tensor]]]):
    """A key map that grows by whole layers. `theirs` and `ours` are the names of a layer."""

    def add_tensors(self, theirs: str, ours: str, *names: str) -> None:
        """Add tensors that have the same names and layouts in both."""
        for name in names:
            self[f"{theirs}.{name}"] = (f"{ours}.{name}", unchanged)

    def add_linear(self, theirs: str, ours: str) -> None:
        """Add a layer with a weight and a bias of one layout, such as a linear layer or a norm."""
        self.add_tensors(theirs, ours, "weight", "bias")

    def add_conv(
        self, theirs: str, ours: str, convert: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        """Add a convolution of torchsparse, whose kernel `convert` changes to our layout."""
        self[f"{theirs}.conv.kernel"] = (f"{ours}.weight", convert or published_kernel)
        self[f"{theirs}.conv.bias"] = (f"{ours}.bias", unchanged)


def published_kernel(kernel: Tensor) -> Tensor:
    """Reorder the taps of a torchsparse kernel.

    Args:
        kernel: [27, in, out]. x varies fastest among the taps of torchsparse, z among ours.

    Returns:
        [27, in, out].
    """
    return kernel.unflatten(0, (3, 3, 3)).permute(2, 1, 0, 3, 4).flatten(0, 2)


def flat_positions(x: Tensor) -> Tensor:
    """Flatten the positions in a block: [m, m, m, C] -> [m^3, C]."""
    return x.flatten(0, 2)


def published_vae_keys(config: VAEConfig) -> KeyMap:
    """Return the key map of a published SS-VAE of this configuration."""
    keys = _Keys()
    keys.add_linear("encoder.input_layer1", "encoder.input")
    for n in range(3):
        theirs, ours = f"encoder.downsample.{n}", f"encoder.down.{n}"
        keys.add_linear(f"{theirs}.act_layers.0", f"{ours}.norm1")
        keys.add_conv(f"{theirs}.out_layers.0", f"{ours}.conv1")
        keys.add_linear(f"{theirs}.out_layers.1", f"{ours}.norm2")
        keys.add_conv(f"{theirs}.out_layers.3", f"{ours}.conv2")
        # A convolution with one tap, [in, out], is our linear layer, [out, in].
        keys.add_conv(f"{theirs}.skip_connection", f"{ours}.skip", torch.t)
        keys.add_conv(f"decoder.upsample.{n}.act_layers.0", f"decoder.up.{n}.conv1")
        keys.add_conv(f"decoder.upsample.{n}.out_layers.0", f"decoder.up.{n}.conv2")
    for part in ("encoder", "decoder"):
        keys.add_linear(f"{part}.input_layer", f"{part}.transformer.input")
        keys.add_linear(f"{part}.out_layer", f"{part}.out")
        for n in range(config.blocks):
            theirs, ours = f"{part}.blocks.{n}", f"{part}.transformer.blocks.{n}"
            keys.add_linear(f"{theirs}.attn.to_qkv", f"{ours}.attention.qkv")
            keys.add_linear(f"{theirs}.attn.to_out", f"{ours}.attention.out")
            keys.add_linear(f"{theirs}.mlp.mlp.0", f"{ours}.mlp.0")
            keys.add_linear(f"{theirs}.mlp.mlp.2", f"{ours}.mlp.2")
    return keys


def published_occupancy_keys(config: OccupancyConfig) -> KeyMap:
    """Return the key map of a published dense VAE of this configuration.

    Our parts are one sequence of layers for each of encoder and decoder.
    """
    keys = _Keys()
    depths = len(config.widths)
    encoder_blocks, decoder_blocks = config.blocks, config.decoder_blocks or config.blocks
    # Published names of the layers that follow one another, and whether each one is residual.
    steps = {"encoder": [("input_layer", False)], "decoder": [("input_layer", False)]}
    number = 0
    for depth in range(depths):
        if depth:
            steps["encoder"].append((f"blocks.{number}.conv", False))
            number += 1
        steps["encoder"] += [(f"blocks.{number + n}", True) for n in range(encoder_blocks)]
        number += encoder_blocks
    steps["encoder"] += [(f"middle_block.{n}", True) for n in range(encoder_blocks)]
    steps["decoder"] += [(f"middle_block.{n}", True) for n in range(decoder_blocks)]
    number = 0
    for depth in reversed(range(depths)):
        steps["decoder"] += [(f"blocks.{number + n}", True) for n in range(decoder_blocks)]
        number += decoder_blocks
        if depth:
            steps["decoder"].append((f"blocks.{number}.conv", False))
            number += 1
    for part, layers in steps.items():
        for position, (name, residual) in enumerate(layers):
            theirs, ours = f"{part}.{name}", f"{part}.{position}"
            if residual:
                for n, half in (("1", "first"), ("2", "second")):
                    keys.add_linear(f"{theirs}.norm{n}", f"{ours}.{half}.0")
                    keys.add_linear(f"{theirs}.conv{n}", f"{ours}.{half}.2")
            else:
                up = part == "decoder" and position > 0
                keys.add_linear(theirs, f"{ours}.conv" if up else ours)
        keys.add_linear(f"{part}.out_layer.0", f"{part}.{len(layers)}")
        keys.add_linear(f"{part}.out_layer.2", f"{part}.{len(layers) + 2}")
    return keys


def published_dit_keys(config: DiTConfig) -> KeyMap:
    """Return the key map of a published SS-DiT of this configuration.

    It includes "latents_scale" and "latents_shift" of the published VAE.
    """
    keys = _Keys()
    # The published DiT works on latents z / scale + shift.
    keys["latents_scale"] = ("latent_std", torch.reciprocal)
    keys["latents_shift"] = ("latent_mean", unchanged)
    keys.add_linear("input_layer", "input")
    keys.add_linear("t_embedder.mlp.0", "time.0")
    keys.add_linear("t_embedder.mlp.2", "time.2")
    if config.condition_projection:
        keys.add_linear("cond_proj", "condition")
    keys.add_linear("out_layer", "out")
    for n in range(config.blocks):
        block = f"blocks.{n}"
        keys.add_linear(f"{block}.adaLN_modulation.1", f"{block}.modulation")
        keys.add_linear(f"{block}.norm2", f"{block}.cross_norm")
        for theirs, ours in (("to_q", "query"), ("to_kv", "key_value"), ("to_out", "out")):
            keys.add_linear(f"{block}.cross_attn.{theirs}", f"{block}.cross_attention.{ours}")
        for layer in (0, 2):
            keys.add_linear(f"{block}.mlp.mlp.{layer}", f"{block}.mlp.{layer}")
        _add_self_attention(keys, config, f"{block}.self_attn", f"{block}.attention")
    return keys


def _add_self_attention(keys: _Keys, config: DiTConfig, theirs: str, ours: str) -> None:
    if config.attention == "full":
        keys.add_linear(f"{theirs}.to_qkv", f"{ours}.qkv")
        keys.add_linear(f"{theirs}.to_out", f"{ours}.out")
        if config.qk_norm:
            keys.add_tensors(f"{theirs}.q_rms_norm", f"{ours}.query_norm", "gamma")
            keys.add_tensors(f"{theirs}.k_rms_norm", f"{ours}.key_norm", "gamma")
        return
    layers = {"proj_q": "query", "proj_k": "key", "proj_v": "value", "proj_o": "out"}
    for their_layer, our_layer in {**layers, "gate.0": "gate"}.items():
        keys.add_tensors(f"{theirs}.{their_layer}", f"{ours}.{our_layer}", "weight")
    keys[f"{theirs}.intra_block_pe"] = (f"{ours}.key_position", flat_positions)
    for side in ("key", "value"):
        _add_compression(
            keys, config.compression, f"{theirs}.compression_{side}", f"{ours}.compress_{side}"
        )


def _add_compression(keys: _Keys, version: Compression, theirs: str, ours: str) -> None:
    if version == "v1":
        keys.add_conv(f"{theirs}.act_layers.0", f"{ours}.linear", torch.t)
        return
    keys.add_linear(f"{theirs}.act_layers.0", f"{ours}.norm1")
    keys.add_linear(f"{theirs}.out_layers.1", f"{ours}.norm2")
    keys.add_conv(f"{theirs}.out_layers.0", f"{ours}.conv1")
    keys.add_conv(f"{theirs}.out_layers.3", f"{ours}.conv2")
