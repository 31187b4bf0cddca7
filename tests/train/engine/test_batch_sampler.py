"""The batch sampler: every asset once an epoch, balanced ranks, token limits, and resuming."""

import json
from collections import Counter

import numpy as np
import pytest

from pipeline.core.errors import UserError
from train.engine.batch_sampler import BatchSampler, ShardBatchSampler


def make_sampler(tokens=None, **options):
    tokens = tokens or {256: np.arange(1, 12) * 10, 384: np.arange(1, 12) * 25}
    return BatchSampler(tokens, **{"batch_size": 2, "world_size": 2, "seed": 0, **options})


def test_every_asset_comes_once_an_epoch_and_a_step_has_one_resolution():
    sampler = make_sampler()
    seen = {256: Counter(), 384: Counter()}
    for step in range(60):
        one = sampler.next()
        assert one.step == step
        assert [len(rank) > 0 for rank in one.ranks] == [True, True]
        for draw in (draw for rank in one.ranks for draw in rank):
            seen[one.resolution][draw] += 1
    for resolution, draws in seen.items():
        assert set(draws.values()) == {1}, resolution
        epochs = Counter(draw.epoch for draw in draws)
        assert sum(draws.values()) > 44, "several epochs"
        assert all(count == 11 for epoch, count in epochs.items() if epoch < max(epochs))
        orders = [[draw.asset for draw in draws if draw.epoch == epoch] for epoch in (0, 1)]
        assert orders[0] != orders[1]


def test_a_sampler_resumes_from_its_state():
    sampler = make_sampler()
    for _ in range(7):
        sampler.next()
    state = json.loads(json.dumps(sampler.state))
    expected = [sampler.next() for _ in range(20)]
    again = make_sampler()
    again.restore(state)
    assert [again.next() for _ in range(20)] == expected
    assert [make_sampler(seed=1).next() for _ in range(20)] != [
        make_sampler().next() for _ in range(20)
    ]
    with pytest.raises(UserError, match="trained at R"):
        make_sampler({512: np.ones(3, int)}).restore(state)


def test_ranks_are_balanced():
    rng = np.random.default_rng(0)
    tokens = {512: (2000 * rng.lognormal(1.5, 0.6, 200)).astype(int)}
    sampler = make_sampler(tokens, batch_size=4, world_size=8)
    loads = np.array(
        [
            [sum(tokens[512][d.asset] for d in rank) for rank in sampler.next().ranks]
            for _ in range(50)
        ]
    )
    unequal = (loads.max(1) / loads.mean(1)).mean()
    in_order = [tokens[512][rng.permutation(200)[:32]].reshape(8, 4).sum(1) for _ in range(50)]
    assert unequal < 1.1 < 1.3 < np.mean([load.max() / load.mean() for load in in_order])


def test_no_rank_exceeds_max_tokens_and_no_asset_is_lost():
    tokens = {256: np.array([100, 90, 80, 10, 10, 10, 500])}
    sampler = make_sampler(tokens, batch_size=4, world_size=2, max_tokens=150)
    assert sampler.left_out == {256: 1}
    seen = Counter()
    for _ in range(40):
        one = sampler.next()
        assert all(0 < sum(tokens[256][d.asset] for d in rank) <= 150 for rank in one.ranks)
        seen.update(draw for rank in one.ranks for draw in rank)
    assert set(seen.values()) == {1}
    per_epoch = Counter(draw.epoch for draw in seen)
    assert all(per_epoch[epoch] == 6 for epoch in range(max(per_epoch)))
    message = "no training asset at R = 256 with at most 5 cells, the smallest has 10; raise --"
    with pytest.raises(UserError, match=f"{message}max-tokens"):
        make_sampler(tokens, max_tokens=5)
    with pytest.raises(UserError, match=f"{message}token-budget"):
        make_sampler(tokens, token_budget=5)
    with pytest.raises(UserError, match="no training asset at R = 256; build more assets"):
        make_sampler({256: np.array([0, 0])})


def test_assets_repeat_when_there_are_fewer_than_a_batch():
    one = make_sampler({256: np.array([5, 6])}, batch_size=4, world_size=2).next()
    assert sum(map(len, one.ranks)) == 8


def test_a_token_budget_fills_the_steps():
    rng = np.random.default_rng(0)
    tokens = {256: (2000 * rng.lognormal(0.0, 0.3, 300)).astype(int)}
    sampler = make_sampler(tokens, world_size=4, token_budget=20_000)
    seen = Counter()
    fills = []
    for _ in range(40):
        step = sampler.next()
        loads = [sum(tokens[256][d.asset] for d in rank) for rank in step.ranks]
        assert max(loads) <= 20_000
        assert step.loss_weight == 4 / sum(len(rank) for rank in step.ranks)
        fills.append(sum(loads) / 80_000)
        seen.update(draw for rank in step.ranks for draw in rank)
    assert set(seen.values()) == {1}, "no sample is left out or repeated"
    assert np.mean(fills) > 0.9


def test_a_token_budget_takes_at_least_one_asset_per_rank_and_resumes():
    tokens = {256: np.array([90, 80, 70, 60, 50])}
    sampler = make_sampler(tokens, token_budget=100)
    for _ in range(5):
        assert all(len(rank) == 1 for rank in sampler.next().ranks)
    again = make_sampler(tokens, token_budget=100)
    again.restore(json.loads(json.dumps(sampler.state)))
    assert again.next() == sampler.next()
    with pytest.raises(
        UserError, match="R = 256 with at most 40 cells, the smallest has 50; raise --token-budget"
    ):
        make_sampler(tokens, token_budget=40)


def staggered(shards, **options):
    """Draw one asset a step. Asset n lies in shard n // 10."""
    tokens = {256: np.ones(10 * shards, int)}
    names = [f"{n // 10:06d}" for n in range(10 * shards)]
    options = {"batch_size": 1, "world_size": 1, "seed": 0} | options
    return ShardBatchSampler(tokens, names, staggered=True, **options)


def test_staggered_shards_begin_and_end_one_after_another():
    """At any time about as many shards as are mixed are read, and each begins in its own time."""
    sampler = staggered(30, mixed=4)
    epochs = [[sampler.next().ranks[0][0].asset for _ in range(300)] for _ in range(2)]
    assert epochs[0] != epochs[1]
    for order in epochs:
        assert sorted(order) == list(range(300)), "every asset once"
        shard_of_step = np.array(order) // 10
        steps = [np.flatnonzero(shard_of_step == shard) for shard in range(30)]
        begins = np.sort([step[0] for step in steps])
        assert np.diff(begins).max() < 40, "no shards wait for a group to end"
        is_open = sum(
            ((np.arange(300) >= step[0]) & (np.arange(300) <= step[-1])).astype(int)
            for step in steps
        )
        assert is_open.max() <= 6
        assert max(step[-1] - step[0] for step in steps) < 60
        mixture = [len(set(shard_of_step[first : first + 20])) for first in range(40, 240)]
        assert min(mixture) >= 3, "no shard is read on its own"


def test_staggered_shards_of_a_small_build_are_shuffled_together_and_resume():
    whole = BatchSampler({256: np.ones(30, int)}, batch_size=1, world_size=1, seed=0)
    small = staggered(3, mixed=3)
    assert [small.next() for _ in range(60)] == [whole.next() for _ in range(60)]
    sampler, again = staggered(9, mixed=2), staggered(9, mixed=2)
    for _ in range(7):
        sampler.next()
    again.restore(json.loads(json.dumps(sampler.state)))
    assert [again.next() for _ in range(100)] == [sampler.next() for _ in range(100)]
