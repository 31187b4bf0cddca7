"""The estimate of a training: measured runs, carried over to other GPUs, steps and stages."""

import json
import random

import pytest

from pipeline.core.errors import UserError
from tests.train.analytic_builds import add_renders, make_build
from train.costs.config import EstimateTraining
from train.costs.estimate import byte_sizes, estimate, predicted_run, table_lines
from train.costs.gpus import time_ratios
from train.costs.measured_run import read_run
from train.costs.schedule import LATENT_BYTES, TOKENS, hit_rate, stages
from train.estimate import main


def make_run(out, *, model="ConditionedDiT", steps=20, step_s=0.5, tokens=1000, **options):
    """Write what a run of equal steps leaves: 3 s of start, a slow first step, pauses of 2 s."""
    out.mkdir(parents=True)
    every = options.pop("checkpoint_every", 4)
    loop = {"checkpoint_every": every, "validate_every": 0, "sample_every": 0, **options}
    elapsed, lines = 3.0, []
    for step in range(1, steps + 1):
        seconds = step_s + (7.0 if step == 1 else 0.0)
        elapsed += seconds
        row = {"step": step, "loss": 1.0, "seconds": seconds, "elapsed_s": elapsed, "data_s": 0.1}
        lines.append(json.dumps({**row, "tokens": tokens, "samples": 8}))
        elapsed += 2.0 if step % every == 0 else 0.0
    (out / "metrics.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    folder = out / "step-00000020"
    folder.mkdir()
    config = {
        "format_version": 1,
        "model": model,
        "training": {"loop": loop},
        "hardware": {"device": "NVIDIA H200", "ranks": 1},
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "state.json").write_text("{}", encoding="utf-8")
    return out


def test_a_longer_run_takes_its_steps_its_start_and_its_pauses(tmp_path):
    run = read_run(make_run(tmp_path / "run"), 0.2)
    assert run.step_s == pytest.approx(0.5)
    assert run.data_share == pytest.approx(0.2)
    # 3 s before the first step, 7 s for compiling, 200 steps, 49 checkpoints before the last one.
    assert run.seconds(200) == pytest.approx(3 + 7 + 200 * 0.5 + 49 * 2)


def test_pauses_that_were_not_measured_are_named(tmp_path):
    out = make_run(tmp_path / "run", validate_every=50)
    lines = predicted_run(EstimateTraining(runs=(out,), steps=200))
    assert "takes" in lines[0]
    assert "Its pauses for checkpoint and validate, validate were not measured" in lines[1]


def test_a_resumed_run_is_measured_since_it_was_resumed(tmp_path):
    out = make_run(tmp_path / "run")
    rows = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    other = [json.loads(row) for row in rows]
    for row in other:
        row |= {"step": row["step"] + 20, "seconds": 1.0, "elapsed_s": float(row["step"])}
    text = "\n".join([*rows, *map(json.dumps, other)])
    (out / "metrics.jsonl").write_text(text, encoding="utf-8")
    assert read_run(out, 0.2).step_s == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("steps", "message"),
    [(0, "holds no training run; name one that has ended"), (6, "has 4 steps to measure after")],
)
def test_a_run_that_cannot_be_measured_is_refused(tmp_path, steps, message):
    if steps:
        make_run(tmp_path / "run", steps=steps)
    with pytest.raises(UserError, match=message):
        read_run(tmp_path / "run", 0.2)


def test_times_are_carried_over_by_the_ceilings():
    assert time_ratios("h200", "h200") == (1, 1)
    assert time_ratios("h200", "h100") == pytest.approx((1, 4.8 / 3.35))
    assert time_ratios("h200", "a100") == pytest.approx((4.8 / 2.039, 989 / 312))


def test_gpu_days_follow_from_tokens_and_steps(tmp_path):
    out = make_run(tmp_path / "run", step_s=0.5, tokens=8 * TOKENS[256])
    cfg = EstimateTraining(runs=(out,), scaling=1.0, h200_usd=2.0)
    found = {row.stage: row for row in estimate(cfg)[0]}
    dit = found["train.dit 256"]
    days = 200_000 * 8 * 0.5 / 86_400
    assert dit.costs["h200"].days == pytest.approx((days, days))
    assert dit.costs["h200"].usd == pytest.approx((48 * days, 48 * days))
    slower = found["train.dit 512"].costs["h200"].days[0]
    assert slower == pytest.approx(days / 2 * TOKENS[512] / TOKENS[256])
    assert found["train.vae base"].run == ""
    assert not found["train.vae base"].costs
    # The latents of an asset and one render.
    of_sample = TOKENS[256] * LATENT_BYTES + 113_000
    assert dit.reading.megabytes_per_s == pytest.approx(64 * of_sample / 0.5 / 1e6)
    with_cache = 452_000 * (TOKENS[256] * LATENT_BYTES + 113_000 * 28.3)
    assert dit.reading.read_with_it_tb == pytest.approx(with_cache / 1e12, rel=0.01)


def test_the_table_names_every_stage_and_every_assumption(tmp_path, capsys):
    out = make_run(tmp_path / "run")
    main([str(out), "--json", str(tmp_path / "estimate.json")])
    text = capsys.readouterr().out
    cfg = EstimateTraining(runs=(out,))
    assert all(f"| {stage.name} |" in text for stage in stages(cfg))
    rows, assumptions = estimate(cfg)
    assert all(f"- {sentence}\n" in text for sentence in assumptions)
    assert len({line.count("|") for line in table_lines(rows, cfg)}) == 1
    content = json.loads((tmp_path / "estimate.json").read_text(encoding="utf-8"))
    assert [row["stage"] for row in content["stages"]] == [stage.name for stage in stages(cfg)]


def test_a_run_on_a_cpu_needs_the_name_of_a_gpu(tmp_path):
    out = make_run(tmp_path / "run")
    path = out / "step-00000020" / "config.json"
    text = path.read_text(encoding="utf-8").replace("NVIDIA H200", "cpu")
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match="a run on cpu cannot be carried over to a100, h100, h200"):
        estimate(EstimateTraining(runs=(out,)))
    assert estimate(EstimateTraining(runs=(out,), measured_on="a100"))[0]


def test_bytes_are_those_of_the_markers_of_a_build(tmp_path):
    root = make_build(tmp_path / "build", assets=2, val=0)
    add_renders(root, views=3)
    for path, counts in (("sdf-32", {"tokens": 100}), ("renders-paper", {"views": 6})):
        (marker,) = (root / "shards" / "000000").glob(f"{path}*")
        content = json.loads(marker.read_text(encoding="utf-8"))
        marker.write_text(
            json.dumps({**content, "counts": counts, "bytes": 4200}), encoding="utf-8"
        )
    assert byte_sizes(root) == {"bricks": 42, "latents": LATENT_BYTES, "render": 700}


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_the_hit_rate_is_that_of_a_simulated_cache(share):
    rng, objects, hits, reads = random.Random(0), 1000, 0, 0
    cache: dict[int, None] = {}
    for epoch in range(12):
        for key in rng.sample(range(objects), objects):
            reads += epoch > 0
            if key in cache:
                hits += epoch > 0
                del cache[key]
            cache[key] = None
            if len(cache) > share * objects:
                del cache[next(iter(cache))]
    assert hits / reads == pytest.approx(hit_rate(share), abs=0.02)
    assert hit_rate(1.5) == 1
