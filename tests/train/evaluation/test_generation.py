"""Evaluation of generation: metrics of perfect, wrong, empty and unreadable results."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from model.conditioning.image_encoder import DinoEncoder
from model.inference.generator import Generator
from pipeline.core.cli import parse
from pipeline.core.errors import RunError, UserError
from pipeline.core.primitives.marching_cubes import extract
from pipeline.storage.sdf_shard import SdfShard
from tests.model.test_generate import export
from tests.model.tiny_models import FAST
from tests.train.evaluation.stored_surfaces import (
    VIEWS,
    FacingSurfaces,
    StoredSurfaces,
    rendered_build,
)
from train.data.bricks import BrickReader, read_build_index
from train.data.render_conditions import ViewReader
from train.engine.mesh_pictures import LABEL_HEIGHT
from train.evaluate import main
from train.evaluation import generation, reference_surfaces
from train.evaluation.config import GenerationEvaluation, RetrievalEvaluation
from train.evaluation.generation import evaluate_generation, evaluate_retrieval


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    return rendered_build(tmp_path_factory.mktemp("shown"))


def evaluate(root, out, monkeypatch, model, **options):
    monkeypatch.setattr(Generator, "load", classmethod(lambda *_: model))
    cfg = GenerationEvaluation(
        checkpoint=out, data=root, samples=2000, out=out, device="cpu", **options
    )
    return evaluate_generation(cfg)


def test_the_stored_surface_has_perfect_metrics(rendered, tmp_path, monkeypatch):
    result = evaluate(rendered, tmp_path, monkeypatch, StoredSurfaces(rendered))
    summary = result["summary"]
    assert (summary["assets"], summary["empty"], summary["candidates"]) == (3, 0, 4)
    assert summary["chamfer"] < 1e-6
    assert summary["iou"] == summary["nearest_is_right"] == summary["closed"] == 100.0
    assert summary["silhouette_iou"] > 99.9
    assert summary["normal_consistency"] > 99.0
    assert {row["view"] for row in result["rows"]} == {VIEWS - 1}
    written = json.loads((tmp_path / "evaluation.json").read_text(encoding="utf-8"))
    assert written["protocol"]["image_encoder"] == "stored surfaces"
    assert "nearest of 4 is right %" in (tmp_path / "table.md").read_text(encoding="utf-8")
    assert Image.open(tmp_path / "generated.png").size == (4 * 256, LABEL_HEIGHT + 3 * 256)
    assert len(list((tmp_path / "meshes").glob("*.glb"))) == 3


def test_several_processes_give_the_results_of_one(rendered, tmp_path):
    export(tmp_path / "export")
    options = {"samples": 500, "device": "cpu", "split": "all", "retrieval": True}
    options |= {"checkpoint": tmp_path / "export", "data": rendered, "seeds": (0, 3)}
    results, files = [], []
    for workers in (1, 2):
        out = tmp_path / str(workers)
        cfg = GenerationEvaluation(**options, workers=workers, out=out, generation=FAST)
        content = evaluate_generation(cfg)
        rows = [replace_seconds(row) for row in content["rows"]]
        results.append([content["protocol"], rows, content["retrieved"]])
        written = sorted(path for path in out.rglob("*") if path.suffix in (".png", ".glb"))
        files.append({path.relative_to(out): path.read_bytes() for path in written})
        page = (out / "index.html").read_text(encoding="utf-8")
        assert all(row["uid"] in page for row in rows)
    assert results[0] == results[1]
    assert files[0] == files[1]
    assert len(results[0][1]) == 8
    assert any(row["faces"] for row in results[0][1])
    assert all(row["nearest_training"] for row in results[0][1] if row["faces"])


def replace_seconds(row):
    return {**row, "seconds": None}


def test_processes_that_cannot_start_end_the_evaluation(rendered, tmp_path, monkeypatch):
    monkeypatch.setattr(Generator, "load", classmethod(lambda *_: StoredSurfaces(rendered)))
    cfg = GenerationEvaluation(
        checkpoint=tmp_path / "none", data=rendered, out=tmp_path, device="cpu", workers=2
    )
    with pytest.raises(
        RunError, match="process that evaluates assets died"
    ):  # the processes have the real `Generator.load`
        evaluate_generation(cfg)


def test_features_need_one_process():
    with pytest.raises(ValueError, match="workers must be 1 with features, got 2"):
        GenerationEvaluation(workers=2, features="x")


def test_meshes_that_face_the_camera_are_turned_back(rendered, tmp_path, monkeypatch):
    model = FacingSurfaces(rendered)
    result = evaluate(rendered, tmp_path / "a", monkeypatch, model, facing_views=True)
    assert any(model.turns)
    assert result["summary"]["chamfer"] < 1e-4
    assert result["summary"]["silhouette_iou"] > 99.9
    assert result["protocol"]["facing_views"]
    as_they_are = evaluate(rendered, tmp_path / "b", monkeypatch, FacingSurfaces(rendered))
    assert as_they_are["summary"]["chamfer"] > 10


def test_the_record_of_an_export_decides_whether_meshes_are_turned_back(
    rendered, tmp_path, monkeypatch
):
    model = FacingSurfaces(rendered)
    model.facing_views = True
    result = evaluate(rendered, tmp_path, monkeypatch, model)
    assert any(model.turns)
    assert result["summary"]["chamfer"] < 1e-4
    assert result["protocol"]["facing_views"] is True
    assert "<dt>facing views</dt><dd>True</dd>" in (tmp_path / "index.html").read_text("utf-8")


@pytest.mark.parametrize(("recorded", "word"), [(True, "with"), (False, "without")])
def test_an_option_that_contradicts_the_export_is_refused(
    rendered, tmp_path, monkeypatch, recorded, word
):
    model = StoredSurfaces(rendered)
    model.facing_views = recorded
    with pytest.raises(UserError) as refused:
        evaluate(rendered, tmp_path, monkeypatch, model, facing_views=not recorded)
    assert str(refused.value) == (
        f"{tmp_path} records that it was trained {word} --facing-views, but the option is "
        f"{not recorded}; leave it out"
    )
    assert model.calls == 0


def test_the_option_of_facing_views_needs_no_value():
    def parsed(*words):
        return parse(GenerationEvaluation, [*words, "--view", "1"], prog="x").facing_views

    assert parsed() is None
    assert parsed("--facing-views") is True
    assert parsed("--facing-views", "False") is False
    with pytest.raises(UserError, match="expected True or False, got 'maybe'"):
        parsed("--facing-views", "maybe")


def test_the_surface_of_another_asset_has_worse_metrics_and_is_recognised(
    rendered, tmp_path, monkeypatch
):
    result = evaluate(
        rendered, tmp_path, monkeypatch, StoredSurfaces(rendered, turn=1), view=0, limit=2
    )
    uids = SdfShard(rendered / "sdf" / "40" / "000000.zarr").uids
    assert result["summary"]["nearest_is_right"] == 0.0
    chosen = [row["uid"] for row in result["rows"]]
    assert chosen == [uids[0], uids[1]]
    assert [row["nearest"] for row in result["rows"]] == [uids[1], uids[2]]
    assert result["summary"]["iou"] < 90
    assert result["summary"]["silhouette_iou"] < 95
    assert result["summary"]["chamfer"] > 10


@pytest.fixture(scope="module")
def dino(tmp_path_factory):
    """Return a folder with a DINOv2 of random weights."""
    folder = tmp_path_factory.mktemp("dino")
    DinoEncoder.random(image_size=112).model.save_pretrained(folder)
    return str(folder)


def test_looks_are_compared_if_weights_are_given(rendered, dino, tmp_path, monkeypatch):
    perfect = evaluate(
        rendered, tmp_path / "a", monkeypatch, StoredSurfaces(rendered), features=dino
    )
    summary = perfect["summary"]
    assert summary["normal_map_distance"] == pytest.approx(0, abs=1e-5)
    assert summary["dino_similarity"] == pytest.approx(
        summary["dino_similarity_of_asset"], abs=1e-4
    )
    other = evaluate(
        rendered,
        tmp_path / "b",
        monkeypatch,
        StoredSurfaces(rendered, turn=1, fails=(2,)),
        features=dino,
    )
    assert other["summary"]["normal_map_distance"] > 100 * max(summary["normal_map_distance"], 1e-6)
    assert other["rows"][0]["dino_similarity"] < other["rows"][0]["dino_similarity_of_asset"]
    assert other["rows"][2]["dino_similarity"] == 0.0
    assert dino in other["protocol"]["looks"]
    text = (tmp_path / "b" / "table.md").read_text(encoding="utf-8")
    assert "normal-map FD | DINOv2 cosine | DINOv2 cosine of the asset" in text
    page = (tmp_path / "b" / "index.html").read_text(encoding="utf-8")
    assert f"<td>{other['summary']['normal_map_distance']:.3f}</td>" in page
    assert page.count("data:image/png;base64,") == 1


def test_looks_are_not_compared_without_weights(rendered, tmp_path, monkeypatch):
    result = evaluate(rendered, tmp_path, monkeypatch, StoredSurfaces(rendered))
    assert "normal_map_distance" not in result["summary"]
    assert "DINOv2" not in (tmp_path / "table.md").read_text(encoding="utf-8")
    with pytest.raises(UserError, match="hf download"):
        evaluate(
            rendered,
            tmp_path,
            monkeypatch,
            StoredSurfaces(rendered),
            features=str(tmp_path / "nothing"),
        )


def test_an_empty_mesh_counts_as_zero_but_has_no_distance(rendered, tmp_path, monkeypatch):
    result = evaluate(rendered, tmp_path, monkeypatch, StoredSurfaces(rendered, fails=(1,)))
    summary = result["summary"]
    assert (summary["assets"], summary["empty"]) == (3, 1)
    assert summary["iou"] == pytest.approx(200 / 3)
    assert summary["chamfer"] < 1e-6
    assert (
        json.loads((tmp_path / "evaluation.json").read_text(encoding="utf-8"))["rows"][1]["chamfer"]
        is None
    )


def test_only_the_chosen_assets_and_the_candidates_are_read(rendered, tmp_path, monkeypatch):
    monkeypatch.setattr(reference_surfaces, "CANDIDATES", 2)
    read, original = [], BrickReader.read
    monkeypatch.setattr(
        BrickReader, "read", lambda self, *which: read.append(which) or original(self, *which)
    )
    result = evaluate(rendered, tmp_path, monkeypatch, StoredSurfaces(rendered), limit=1)
    assert result["summary"]["candidates"] == 2
    assert result["summary"]["nearest_is_right"] == 100.0
    assert sorted(read) == [(0, 32), (0, 40), (1, 32)]


def test_an_unreadable_asset_is_skipped(rendered, tmp_path, monkeypatch, caplog):
    original, views = BrickReader.read, ViewReader.read_view

    def damaged(self, asset, resolution):
        if asset == 1:
            raise ValueError("checksum does not match")
        return original(self, asset, resolution)

    def without_view(self, asset, view):
        if asset == 2:
            raise RunError("view 2 is damaged")
        return views(self, asset, view)

    monkeypatch.setattr(BrickReader, "read", damaged)
    monkeypatch.setattr(ViewReader, "read_view", without_view)
    summary = evaluate(rendered, tmp_path, monkeypatch, StoredSurfaces(rendered))["summary"]
    assert (summary["assets"], summary["candidates"], summary["nearest_is_right"]) == (1, 3, 100.0)
    uids = SdfShard(rendered / "sdf" / "40" / "000000.zarr").uids
    assert f"{uids[1]} is skipped: its bricks at R = 32 cannot be read (checksum" in caplog.text
    assert f"{uids[2]} is skipped: view 2 is damaged" in caplog.text
    monkeypatch.setattr(BrickReader, "read", lambda *_: original(*_[:1], 99, 32))
    with pytest.raises(
        RunError, match=r"none of 3 assets of .* can be read; run python -m pipeline.verify"
    ):
        evaluate(rendered, tmp_path, monkeypatch, StoredSurfaces(rendered))


def test_a_wrong_view_checkpoint_or_limit_is_an_error(rendered, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"--view must be from -3 to 2 .* got 3"):
        evaluate(rendered, tmp_path, monkeypatch, StoredSurfaces(rendered), view=3)
    monkeypatch.undo()
    with pytest.raises(UserError, match="lacks vae, structure"):
        main(["generation", "--checkpoint", str(tmp_path), "--data", str(rendered)])
    with pytest.raises(ValueError, match="limit must be 1 or more, got 0"):
        GenerationEvaluation(limit=0)


def mean_colour(images):
    """Describe images by the mean colour of their foreground."""
    return np.stack([image[image[..., 3] > 127][:, :3].mean(0) for image in images]) / 255


def test_training_assets_are_looked_up_as_baselines(rendered, tmp_path, monkeypatch):
    monkeypatch.setattr(generation, "encoder_features", lambda _: mean_colour)
    uids = SdfShard(rendered / "sdf" / "40" / "000000.zarr").uids
    # The held-out asset itself is generated, which no training asset equals.
    perfect = StoredSurfaces(rendered, turn=3)
    result = evaluate(rendered, tmp_path / "a", monkeypatch, perfect, split="val", retrieval=True)
    assert result["summary"]["nearer_than_image"] == result["summary"]["nearer_than_shape"] == 100.0
    kinds = {row.by: row for row in result["retrieved"]}
    assert list(kinds) == ["pixels", "features", "shape"]
    assert all(row.uid == uids[3] and row.retrieved in uids[:3] for row in kinds.values())
    assert kinds["shape"].chamfer == min(row.chamfer for row in kinds.values()) > 0.01
    written = json.loads((tmp_path / "a" / "evaluation.json").read_text(encoding="utf-8"))
    assert [row["by"] for row in written["retrieved"]] == list(kinds)
    # A training asset is generated: it is named on the page, and is as near as the nearest one.
    copied = StoredSurfaces(rendered, turn=uids.index(kinds["shape"].retrieved))
    result = evaluate(rendered, tmp_path / "b", monkeypatch, copied, split="val", retrieval=True)
    (row,) = result["rows"]
    assert row["nearest_training"] == kinds["shape"].retrieved
    assert row["nearest_training_chamfer"] < 0.02 < row["chamfer"]
    assert row["chamfer"] == pytest.approx(kinds["shape"].chamfer, rel=0.05)
    page = (tmp_path / "b" / "index.html").read_text(encoding="utf-8")
    assert f"<td>{kinds['shape'].retrieved}</td>" in page
    table = (tmp_path / "b" / "table.md").read_text(encoding="utf-8")
    assert "retrieval: training asset nearest to the true shape" in table


def test_an_asset_that_may_be_looked_up_finds_itself(rendered, tmp_path):
    options = {"data": rendered, "split": "train", "samples": 2000}
    result = evaluate_retrieval(RetrievalEvaluation(**options, out=tmp_path / "a"))
    assert len(result["rows"]) == 2 * 3
    assert all(row["retrieved"] == row["uid"] for row in result["rows"])
    assert [summary["by"] for summary in result["summaries"]] == ["pixels", "shape"]
    assert all(summary["chamfer"] < 1e-6 for summary in result["summaries"])
    assert {row["retrieved_view"] for row in result["rows"]} == {VIEWS - 1, None}
    # Its last view is not looked up any more if training held it out.
    held_out = RetrievalEvaluation(**options, held_out_views=1, out=tmp_path / "b")
    result = evaluate_retrieval(held_out)
    assert not {row["retrieved_view"] for row in result["rows"]} & {VIEWS - 1}
    with pytest.raises(UserError, match=r"held_out_views must be below the 3 views there are"):
        evaluate_retrieval(replace(held_out, held_out_views=VIEWS))


def test_each_seed_gives_a_mesh_of_its_own(rendered, tmp_path, monkeypatch):
    model = StoredSurfaces(rendered)
    result = evaluate(rendered, tmp_path, monkeypatch, model, limit=1, seeds=(4, 9))
    assert [seed for _, seed, _ in model.seen] == [4, 9]
    assert [row["seed"] for row in result["rows"]] == [4, 9]
    # The second call returns another asset, so the mean is half way.
    chamfers = [1000 * row["chamfer"] for row in result["rows"]]
    assert chamfers[0] < 1e-3 < chamfers[1]
    assert result["summary"]["chamfer"] == pytest.approx(sum(chamfers) / 2)
    uid = result["rows"][0]["uid"]
    names = {path.name for path in (tmp_path / "meshes").iterdir()}
    assert names == {f"{uid}{suffix}" for suffix in (".glb", ".png", "-9.glb", "-9.png")}
    with pytest.raises(ValueError, match=r"seeds must be different .* got \(1, 1\)"):
        GenerationEvaluation(seeds=(1, 1))


def test_stored_cells_lie_where_the_turned_mesh_does(rendered, tmp_path, monkeypatch):
    model = FacingSurfaces(rendered)
    evaluate(rendered, tmp_path, monkeypatch, model, cells="stored", facing_views=True)
    assert any(model.turns)
    for number, (_, _, level) in enumerate(model.stored.seen):
        stored = extract(model.stored.shard.bricks(number))[0]
        angle = -np.radians(90 * model.turns[number])
        turn = np.array(
            [[np.cos(angle), 0, np.sin(angle)], [0, 1, 0], [-np.sin(angle), 0, np.cos(angle)]]
        )
        cells = set(map(tuple, level.coords[:, 1:].tolist()))
        places = np.clip((stored @ turn.T + 0.5) * 4, 0, 3).astype(int)
        # The surfaces at R = 40 and the cells at R = 32 differ by less than a tenth of a cell.
        assert np.mean([tuple(place) in cells for place in places.tolist()]) > 0.98
        assert level.resolution == 4


def test_further_views_are_given_together(rendered, tmp_path, monkeypatch):
    model = StoredSurfaces(rendered)
    evaluate(rendered, tmp_path, monkeypatch, model, limit=1, views=3)
    views = ViewReader(read_build_index(rendered, [40]), "paper")
    expected = [views.read_view(0, view).rgba for view in (2, 1, 0)]
    assert all(np.array_equal(a, b) for a, b in zip(model.seen[0][0], expected, strict=True))


def test_a_model_of_several_views_takes_them_from_all_sides_up_to_its_number(
    rendered, tmp_path, monkeypatch
):
    model = StoredSurfaces(rendered)
    options = {"limit": 4, "views": 3, "facing_views": True}
    evaluate(rendered, tmp_path, monkeypatch, model, **options)
    assert min(len(images) for images, _, _ in model.seen) < 3
    joint = StoredSurfaces(rendered)
    joint.averages_views, joint.max_views = False, 3
    evaluate(rendered, tmp_path, monkeypatch, joint, **options)
    assert [len(images) for images, _, _ in joint.seen] == [3] * len(model.seen)
    joint.max_views = 2
    with pytest.raises(UserError, match="up to 2 views of an asset, --views is 3"):
        evaluate(rendered, tmp_path, monkeypatch, joint, **options)
