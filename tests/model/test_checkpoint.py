"""Saving and loading models: round trips, atomicity and errors."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import nn

from model import checkpoint
from model.checkpoint import build_config, copy_weights, load_model, save_model


@dataclass(frozen=True, kw_only=True)
class Sizes:
    widths: tuple[int, ...] = (3, 4)
    bias: bool = True


class Tiny(nn.Module):
    Config = Sizes

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.layer = nn.Linear(*config.widths, bias=config.bias)
        self.register_buffer("shift", torch.randn(2))


class Other(Tiny):
    pass


class Drawing(nn.Module):
    """Has the tensors of a Tiny, and draws them in each way that the models use."""

    Config = Sizes

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.layer = nn.Linear(*config.widths)
        nn.init.xavier_uniform_(self.layer.weight)
        nn.init.normal_(self.layer.weight, std=0.02)
        self.layer.bias = nn.Parameter(torch.empty(config.widths[1]).uniform_(-1, 1))
        self.register_buffer("shift", torch.empty(2).normal_())


Drawing.__name__ = "Tiny"


@pytest.fixture
def saved(tmp_path):
    model = Tiny(Sizes())
    save_model(tmp_path / "runs" / "vae", model, model.config)
    return tmp_path / "runs" / "vae", model


def test_a_saved_model_is_loaded_unchanged(saved):
    path, model = saved
    back = load_model(path, Tiny, config=Sizes())
    assert back.config == model.config
    assert not back.training
    assert all(
        torch.equal(a, b)
        for a, b in zip(back.state_dict().values(), model.state_dict().values(), strict=True)
    )
    assert sorted(p.name for p in path.iterdir()) == ["config.json", "model.safetensors"]
    assert [p.name for p in path.parent.iterdir()] == ["vae"]


def test_loading_draws_no_random_weights(saved):
    path, model = saved
    state = torch.get_rng_state()
    back = load_model(path, Drawing)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(back.layer.weight, model.layer.weight)
    assert Drawing(Sizes()).layer.weight.std() > 0  # outside, weights are drawn as before


def test_saving_again_replaces_the_directory(saved):
    path, _ = saved
    other = Tiny(Sizes(widths=(5, 2)))
    save_model(path, other, other.config)
    assert torch.equal(load_model(path, Tiny).layer.weight, other.layer.weight)
    assert [p.name for p in path.parent.iterdir()] == ["vae"]


def test_a_failed_save_keeps_the_old_directory(saved, monkeypatch):
    path, model = saved

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        save_model(path, Tiny(Sizes()), Sizes())
    assert torch.equal(load_model(path, Tiny).layer.weight, model.layer.weight)
    assert [p.name for p in path.parent.iterdir()] == ["vae"]


def test_a_failed_rename_restores_the_old_directory(saved, monkeypatch):
    path, model = saved
    replace_path = Path.replace

    def refuse(self, target):
        if self.name == ".vae.partial":
            raise OSError(5, "Input/output error")
        return replace_path(self, target)

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(OSError, match="Input/output"):
        save_model(path, Tiny(Sizes()), Sizes())
    assert torch.equal(load_model(path, Tiny).layer.weight, model.layer.weight)
    assert [p.name for p in path.parent.iterdir()] == ["vae"]


def test_another_configuration_or_class_is_refused(saved):
    path, _ = saved
    with pytest.raises(
        ValueError,
        match=r"vae must have widths = \(3, 5\) \(found: \(3, 4\)\), bias = False \(found: True",
    ):
        load_model(path, Tiny, config=Sizes(widths=(3, 5), bias=False))
    with pytest.raises(ValueError, match="must be a checkpoint of a Other, got Tiny"):
        load_model(path, Other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 9}, "has format_version 9, this code reads 1"),
        ({"config": {"widths": [3, 4], "depth": 2}}, r"unknown: \['depth'\], missing: \['bias'\]"),
        (
            {"config": {"widths": [3, 5], "bias": True}},
            r"layer.bias of shape \[4\] does not fit \[5\]; layer.weight",
        ),
        ({"config": {"widths": [3, 4], "bias": False}}, "unknown layer.bias"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(saved, change, message):
    path, _ = saved
    described = json.loads((path / "config.json").read_text(encoding="utf-8"))
    (path / "config.json").write_text(json.dumps({**described, **change}), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        load_model(path, Tiny)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("content", [None, "half a fi"])
def test_a_damaged_directory_is_refused(saved, name, content):
    path, _ = saved
    (path / name).unlink()
    if content is not None:
        (path / name).write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=name):
        load_model(path, Tiny)


def test_weights_are_copied_from_published_names():
    model = Tiny(Sizes())
    keys = {
        "net.kernel": ("layer.weight", lambda x: x.reshape(3, 4).T),
        "net.bias": ("layer.bias", lambda x: x),
        "shift": ("shift", lambda x: x),
    }
    weights = {"net.kernel": torch.arange(12.0), "net.bias": torch.ones(4), "shift": torch.zeros(2)}
    copy_weights(weights, model, "file", keys)
    assert torch.equal(model.layer.weight, torch.arange(12.0).reshape(3, 4).T)
    before = model.layer.weight.clone()
    bad = {"net.kernel": torch.zeros(11), "extra": torch.zeros(1), "shift": torch.zeros(3)}
    message = (
        r"file must hold the weights of this Tiny: unknown extra; missing net.bias; "
        r"net.kernel of shape \[11\] does not fit \[4, 3\]; shift of shape \[3\] does not fit \[2\]"
    )
    with pytest.raises(ValueError, match=message):
        copy_weights(bad, model, "file", keys)
    assert torch.equal(model.layer.weight, before)


def test_configurations_compare_by_value(saved):
    assert load_model(saved[0], Tiny, config=replace(Sizes(), widths=(3, 4))).config == Sizes()


@dataclass(frozen=True)
class Pair:
    first: Sizes
    name: str = "pair"


def test_a_nested_configuration_is_restored():
    pair = Pair(first=replace(Sizes(), widths=(5, 6)))
    values = json.loads(json.dumps(asdict(pair)))
    assert build_config(Pair, values, "file") == pair
    values["first"]["odd"] = 1
    with pytest.raises(
        ValueError, match=r"file: first must have the fields of Sizes; unknown: \['odd'\]"
    ):
        build_config(Pair, values, "file")
