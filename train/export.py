"""`python -m train.export`: the averaged weights of all stages in one directory, as `model.generate` wants them."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from model.checkpoint import load_model, read_config, save_model
from model.conditioning.image_conditioned_dit import ConditionedDiT
from model.sparse_vae import SparseVAE
from model.structure import Structure
from pipeline.core.cli import command, parse
from pipeline.core.errors import UserError
from train.data.latents import vae_hash

log = logging.getLogger(__name__)

Model = TypeVar("Model", bound=nn.Module)
PROG = "python -m train.export"


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Collect trained stages in one directory for python -m model.generate. Stages that are there are replaced."""

    vae: Path | None = Path(
        "runs/vae-tiny/latest"
    )  # checkpoint of python -m train.vae; None: leave it out
    structure: Path | None = Path(
        "runs/structure-tiny/flow/latest"
    )  # of python -m train.structure; None: leave it out
    dit: tuple[Path, ...] = (
        Path("runs/dit-tiny/latest"),
    )  # of python -m train.dit, one for each resolution
    out: Path = Path("runs/export")

    def __post_init__(self) -> None:
        if self.vae is None and self.structure is None and not self.dit:
            raise ValueError("vae, structure or dit must name a checkpoint, got none")


def _load_stage(path: Path, cls: type[Model]) -> Model:
    """Return a checkpoint's model with its averaged weights."""
    if not path.exists():
        raise UserError(f"{path} does not exist: train the stage first, or leave it out")
    return load_model(path, cls)


def export(cfg: ExportConfig) -> list[Path]:
    """Write the stages; returns their directories. UserError if one is missing or they do not belong together."""
    stages: dict[str, tuple[Any, Path]] = {}
    vaes: dict[str, str] = {}  # stage -> the VAE that it is or belongs to
    if cfg.vae is not None:
        vae = _load_stage(cfg.vae, SparseVAE)
        stages["vae"], vaes["vae"] = (vae, cfg.vae), vae_hash(vae)
    if cfg.structure is not None:
        stages["structure"] = (_load_stage(cfg.structure, Structure), cfg.structure)
    for path in cfg.dit:
        dit = _load_stage(path, ConditionedDiT)
        training = read_config(path).get("training") or {}
        resolution, trained_on = training.get("resolution"), training.get("vae")
        if not isinstance(resolution, int):
            raise UserError(f"{path} does not say at which resolution it was trained")
        name = f"dit_{resolution}"
        if name in stages:
            raise UserError(
                f"{path} and {stages[name][1]} are both of R = {resolution}; name one for each resolution"
            )
        stages[name] = (dit, path)
        if trained_on is not None:
            vaes[name] = trained_on
    _check_together(cfg, stages, {**vaes, **_staying(cfg.out, stages)})
    made = []
    for name, (model, source) in stages.items():
        notes = {"vae": vaes[name]} if name in vaes and name != "vae" else {}
        save_model(cfg.out / name, model, model.config, **notes)
        count = sum(tensor.numel() for tensor in model.state_dict().values())
        log.info("%s: %.2f M numbers from %s", cfg.out / name, count / 1e6, source.resolve())
        made.append(cfg.out / name)
    return made


def _staying(out: Path, replaced: Collection[str]) -> dict[str, str]:
    """The VAE of each stage that was exported to `out` before and stays, where it is known; of "vae" its own hash."""
    found = {}
    for path in sorted(out.glob("dit_*/config.json")):
        if path.parent.name in replaced:
            continue
        try:
            vae = json.loads(path.read_text()).get("vae")
        except (OSError, ValueError, AttributeError) as error:
            raise UserError(f"{path} cannot be read: {error}; choose another --out") from error
        if vae is not None:
            found[path.parent.name] = vae
    if "vae" not in replaced and (out / "vae").is_dir():
        try:
            found["vae"] = vae_hash(load_model(out / "vae", SparseVAE))
        except ValueError as error:
            raise UserError(f"{error}; choose another --out") from error
    return found


def _check_together(
    cfg: ExportConfig, stages: Mapping[str, tuple[Any, Path]], vaes: Mapping[str, str]
) -> None:
    """UserError if a DiT that is given, or stays in `out`, was trained on latents of another VAE than that of `out`."""
    if "vae" not in vaes:
        return
    vae = cfg.vae or cfg.out / "vae"
    for name, trained_on in vaes.items():
        if trained_on == vaes["vae"]:
            continue
        if name in stages:
            raise UserError(
                f"{stages[name][1]} was trained on latents of VAE {trained_on}, {vae} is {vaes['vae']}: take the VAE "
                "that made them, or encode and train again"
            )
        raise UserError(
            f"{cfg.out / name} stays, and was trained on latents of VAE {trained_on}, {vae} is {vaes['vae']}: name its "
            "successor with --dit, remove it, or choose another --out"
        )


def main(args: Sequence[str]) -> None:
    export(parse(ExportConfig, args, prog=PROG))


if __name__ == "__main__":
    command(main)
