"""AdamW and Muon against their definitions, averaged weights, and the check for bad gradients."""

import copy
import json
from dataclasses import replace

import pytest
import torch

from train.engine.config import LoopConfig
from train.engine.optimizer import GradientGuard, make_optimizer, update_average


def test_the_guard_accepts_a_lasting_change():
    guard = GradientGuard(spike_factor=10, clip_norm=1.0, max_bad_steps=100)
    assert not any(guard.judge(1.0, 0.2) for _ in range(60))
    assert guard.judge(1.0, 0.9) == "", "a norm below the clipping norm is not a spike"
    assert guard.judge(1.0, 30.0) == "150 times the usual gradient"
    assert guard.judge(float("nan"), 0.2) == guard.judge(1.0, float("inf")) == "not finite"
    guard.judge(1.0, 0.2)
    verdicts = [guard.judge(1.0, 30.0) for _ in range(80)]
    assert all(verdicts[:5])
    assert not any(verdicts[5:6]), "a lasting change is not a bad batch"
    assert not any(verdicts[60:])
    assert all(guard.judge(float("nan"), 1.0) for _ in range(10)), (
        "a loss that is not finite is always skipped"
    )
    assert guard.in_a_row == 10
    copy = GradientGuard(10, 1.0, 100)
    copy.restore(json.loads(json.dumps(guard.state())))
    assert copy == guard


def test_the_average_follows_its_definition():
    a, b = (torch.nn.Linear(3, 2).requires_grad_(True) for _ in range(2))
    expected = 0.9 * a.weight.detach().double() + 0.1 * b.weight.detach().double()
    b.bias.requires_grad_(False)
    bias = a.bias.detach().clone()
    update_average(a, b, 0.9)
    torch.testing.assert_close(a.weight.double(), expected, atol=1e-7, rtol=0)
    assert torch.equal(a.bias, bias), "parameters that are not trained stay"


def test_only_matrices_have_weight_decay():
    groups = make_optimizer(
        torch.nn.Linear(3, 2), LoopConfig(weight_decay=0.1), torch.device("cpu")
    ).param_groups
    assert [(group["weight_decay"], [p.ndim for p in group["params"]]) for group in groups] == [
        (0.1, [2]),
        (0.0, [1]),
    ]


def test_muon_moves_matrices_along_their_polar_factor_and_others_like_adamw():
    """The first step is U V^T times the rate, by an SVD, for linear layers and convolutions."""
    torch.manual_seed(0)
    model = torch.nn.ModuleDict(
        {"linear": torch.nn.Linear(6, 4), "dense": torch.nn.Conv3d(3, 5, 3)}
    )
    # A matrix of one row belongs to AdamW.
    model["sparse"] = torch.nn.ParameterList([torch.randn(27, 4, 3), torch.randn(1, 6)])
    cfg = LoopConfig(optimizer="muon", weight_decay=0.1, learning_rate=0.01)
    optimizer = make_optimizer(model, cfg, torch.device("cpu"))
    twin = copy.deepcopy(model)
    adamw = make_optimizer(twin, replace(cfg, optimizer="adamw"), torch.device("cpu"))
    before = {}
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        grad = torch.randn_like(p)
        before[name] = (p.detach().clone(), grad)
        p.grad, q.grad = grad.clone(), grad.clone()
    optimizer.step()
    adamw.step()
    flat = {"linear.weight": (4, 6), "dense.weight": (5, 81), "sparse.0": (108, 3)}
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        old, grad = before[name]
        if name not in flat:
            assert torch.equal(p, q), name
            continue
        change = (old * (1 - 0.01 * 0.1) - p).view(flat[name]).detach() / (
            0.01 * 0.2 * max(flat[name]) ** 0.5
        )
        U, _, Vh = torch.linalg.svd(grad.view(flat[name]), full_matrices=False)
        along = torch.diagonal(U.T @ change @ Vh.T)
        assert ((along > 0.6) & (along < 1.3)).all(), (name, along)
        torch.testing.assert_close(change, (U * along) @ Vh, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_an_optimizer_resumes_bit_exactly_from_its_saved_state(name, tmp_path):
    cfg = LoopConfig(optimizer=name, learning_rate=0.01)
    cpu = torch.device("cpu")
    path = tmp_path / "optimizer.pt"
    torch.manual_seed(0)
    grads = [[torch.randn(4, 6), torch.randn(4)] for _ in range(6)]
    model = torch.nn.Linear(6, 4)
    optimizer = make_optimizer(model, cfg, cpu)
    for turn, pair in enumerate(grads):
        if turn == 3:
            torch.save(optimizer.state_dict(), path)
            twin = copy.deepcopy(model)
        for p, grad in zip(model.parameters(), pair, strict=True):
            p.grad = grad.clone()
        optimizer.step()
    resumed = make_optimizer(twin, cfg, cpu)
    resumed.load_state_dict(torch.load(path, weights_only=True))
    for pair in grads[3:]:
        for p, grad in zip(twin.parameters(), pair, strict=True):
            p.grad = grad.clone()
        resumed.step()
    assert all(
        torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True)
    )
