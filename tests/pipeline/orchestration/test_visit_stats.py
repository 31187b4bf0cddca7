import pyarrow.parquet as pq

from pipeline.orchestration.asset_results import AssetResult
from pipeline.orchestration.visit_stats import append_stats


def test_stats_keep_every_visit(tmp_path):
    for attempts in (1, 2):
        append_stats(
            tmp_path / "s.parquet",
            [AssetResult(uid="a", status="done", stage="", reason="", attempts=attempts)],
        )
    assert pq.read_table(tmp_path / "s.parquet")["attempts"].to_pylist() == [1, 2]
