"""LoRA adapters of the SS-DiT, which the library peft adds to the weights and merges into them."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from model.checkpoint import ADAPTERS, build_config, load_model, read_config
from model.conditioning.image_conditioned_dit import ConditionedDiT
from model.config import ConditionedDiTConfig
from pipeline.core.errors import UserError
from train.stages.dit.config import LoraOptions


def add_adapters(model: ConditionedDiT, options: LoraOptions) -> None:
    """Add adapters to linear layers of the DiT's blocks, and train nothing else.

    The adapted model computes what it did before, because the second factor of each adapter starts
    at zero. The first one is drawn from torch's generator.

    Args:
        model: The model, whose layers are replaced by those of peft.
        options: Rank, scale and layers of the adapters.

    Raises:
        UserError: If peft is not installed, or an entry of `options.modules` names no linear layer.
    """
    names = adapted_layers(model, options.modules)
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise UserError(
            "--lora.rank needs the package peft; pip install 'sparse3d[lora]'"
        ) from error
    model.requires_grad_(False)
    config = LoraConfig(r=options.rank, lora_alpha=options.alpha, target_modules=names)
    inject_adapter_in_model(config, model.dit)


def adapted_layers(model: ConditionedDiT, modules: tuple[str, ...]) -> list[str]:
    """Return the names in the DiT of the linear layers of its blocks that `modules` names.

    Raises:
        UserError: If an entry names no linear layer.
    """
    # The inner layers of the compression of SSA belong to no part of the attention by this rule.
    names: dict[str, list[str]] = {entry: [] for entry in modules}
    seen: set[str] = set()
    for number, block in enumerate(model.dit.blocks):
        for name, layer in block.named_modules():
            if not isinstance(layer, nn.Linear):
                continue
            seen.add(name)
            for entry in modules:
                if name == entry or name.rpartition(".")[0] == entry:
                    names[entry].append(f"blocks.{number}.{name}")
    for entry, matches in names.items():
        if not matches:
            raise UserError(
                f"lora.modules must name linear layers of the DiT's blocks, got {entry!r}; there "
                f"are {', '.join(sorted(seen))}, and attention, cross_attention and mlp name all "
                "layers of theirs"
            )
    return sorted({name for matches in names.values() for name in matches})


def merge_adapters(model: ConditionedDiT) -> None:
    """Add the adapters to the weights and put the linear layers back in place of peft's.

    Args:
        model: A model with adapters. It then has the weights of one without.
    """
    from peft.tuners.lora import LoraLayer

    for name, layer in list(model.dit.named_modules()):
        if isinstance(layer, LoraLayer):
            layer.merge()  # pyright: ignore[reportCallIssue]
            model.dit.set_submodule(name, layer.get_base_layer())


def load_merged(path: Path) -> ConditionedDiT:
    """Load a DiT from an export or a training checkpoint, with its adapters merged if it has any.

    Raises:
        CheckpointError: If the directory does not hold such a model.
        UserError: If the model has adapters and peft is not installed.
    """
    stored = (read_config(path).get("training") or {}).get(ADAPTERS)
    if not stored:
        return load_model(path, ConditionedDiT)
    options = build_config(LoraOptions, stored, f"{path}: lora")

    def adapted(config: ConditionedDiTConfig) -> ConditionedDiT:
        model = ConditionedDiT(config)
        add_adapters(model, options)
        return model

    model = load_model(path, ConditionedDiT, make=adapted, adapters=True)
    merge_adapters(model)
    return model
