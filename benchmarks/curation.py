"""`python -m benchmarks.curation FOLDER...`: the labelled copies and the hand-made ranking.

The assets are looked for below the folders by the sha256 of benchmarks/data/copy_labels.csv and
benchmarks/data/hand_ranking.csv. Each is screened at a low resolution. The command prints how many
labelled pairs are found on either half of the labels, and the rank correlation of the score with
the hand-made ranking. Ratings of round 1 were in view when the score was made, and so were those of
round 2 whose sha256 is even. The others are held out.
"""

from __future__ import annotations

import csv
import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tyro
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.stats import spearmanr

from pipeline.config import BuildConfig
from pipeline.core.cli import command, parse
from pipeline.core.errors import Reject, UserError
from pipeline.core.hashing import sha256_of
from pipeline.curation.config import RankConfig, ScreenConfig
from pipeline.curation.dedup import find_copies, signatures_of_looks
from pipeline.curation.rank import quality_terms, weighted_score
from pipeline.curation.screening_metrics import METRICS_SCHEMA, compute_metrics
from pipeline.curation.shape_moments import SIGNATURES, decode_moments
from pipeline.geometry.config import TopologyConfig
from pipeline.geometry.topology import build_topology
from pipeline.mesh_io.formats import MESH_FORMATS
from pipeline.mesh_io.load import load_with_report
from pipeline.mesh_io.load_warnings import WarningLog
from pipeline.mesh_io.normalize import normalize
from pipeline.mesh_io.visible_parts import keep_visible
from pipeline.orchestration.plan import read_plan
from pipeline.storage.layout import CATALOGUE

log = logging.getLogger(__name__)

DATA = Path(__file__).parent / "data"
SMALLEST_GROUP = 8  # of assets with a rank correlation
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class CurationConfig:
    """Measure deduplication and ranking on labelled assets."""

    folders: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """Folders with the assets. Their files are recognised by their sha256."""

    builds: tuple[Path, ...] = ()
    """Ranked builds whose screening has measured assets at the same resolution and image size.
    These are not measured again."""

    cache: Path = Path("data/curation.jsonl")
    """File that keeps the metrics of each asset, so that an interrupted run resumes."""

    resolution: int = 64
    """Resolution of the screening."""

    image_size: int = 128
    """Side in pixels of the four views."""


def measure(cfg: CurationConfig) -> tuple[dict[str, Row], list[Row], list[Row]]:
    """Screen the labelled assets.

    Returns:
        The metrics by sha256, the labelled pairs and the rated assets.
    """
    pairs = _read(DATA / "copy_labels.csv")
    rated = _read(DATA / "hand_ranking.csv")
    wanted = {pair[name] for pair in pairs for name in ("sha256_a", "sha256_b")}
    wanted |= {row["sha256"] for row in rated}
    metrics: dict[str, Row] = {}
    if cfg.cache.exists():
        lines = cfg.cache.read_text(encoding="utf-8").splitlines()
        metrics = {row["sha256"]: row for row in map(json.loads, lines)}
    for build in cfg.builds:
        metrics |= {key: row for key, row in _measured_by(build, cfg).items() if key in wanted}
    cfg.cache.parent.mkdir(parents=True, exist_ok=True)
    with cfg.cache.open("a", encoding="utf-8") as file:
        for folder in cfg.folders:
            for path in sorted(folder.rglob("*")):
                if path.suffix.lower().lstrip(".") not in MESH_FORMATS or not path.is_file():
                    continue
                sha256 = sha256_of(path)
                if sha256 in wanted and sha256 not in metrics:
                    metrics[sha256] = {"sha256": sha256, **_screen(path, folder, cfg)}
                    file.write(json.dumps(metrics[sha256]) + "\n")
                    file.flush()
    missing = wanted - set(metrics)
    if missing:
        log.warning("%d of %d labelled assets are not in the folders.", len(missing), len(wanted))
    return metrics, pairs, rated


def _read(path: Path) -> list[Row]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _measured_by(build: Path, cfg: CurationConfig) -> dict[str, Row]:
    """Return the metrics of the assets that a ranked build has screened, by sha256.

    Raises:
        UserError: If the build was screened at another resolution or image size.
    """
    screen = read_plan(build).info.config["screen"]
    sizes = {name: screen[name] for name in ("resolution", "image_size")}
    if sizes != {name: getattr(cfg, name) for name in sizes}:
        raise UserError(f"{build} was screened with {sizes}; give the same --resolution and sizes")
    result = {}
    for row in pq.read_table(build / CATALOGUE).to_pylist():
        if row["sha256"] is None:
            continue
        if row["status"] != "done":
            result[row["sha256"]] = {"sha256": row["sha256"], "rejected": row["reason"]}
            continue
        for name in SIGNATURES:
            row[name] = row[name].hex()
        result[row["sha256"]] = row
    return result


def _screen(path: Path, root: Path, cfg: CurationConfig) -> Row:
    """Return the metrics of one asset, or the reason of its rejection."""
    build = BuildConfig()
    try:
        mesh, report = load_with_report(path, build.load, up="auto", root=root)
        mesh = normalize(keep_visible(mesh, WarningLog())[0], build.normalize)
        faces = len(mesh.faces)
        topology = build_topology(mesh, TopologyConfig(resolution=cfg.resolution))
        screen = ScreenConfig(resolution=cfg.resolution, image_size=cfg.image_size)
        row = asdict(compute_metrics(mesh, topology, screen))
    except Reject as verdict:
        return {"rejected": verdict.reason}
    for name in SIGNATURES:
        row[name] = row[name].hex()
    missing = sum(item.count for item in report.warnings if item.code == "side_file_missing")
    return {**row, "faces": faces, "missing_files": missing}


def half_of(pairs: Sequence[Row]) -> list[int]:
    """Return the half of each pair, 0 or 1. No asset occurs in both halves."""
    names = sorted({pair[name] for pair in pairs for name in ("asset_a", "asset_b")})
    number = {name: index for index, name in enumerate(names)}
    ends = np.array([[number[pair["asset_a"]], number[pair["asset_b"]]] for pair in pairs])
    graph = coo_array((np.ones(len(ends)), ends.T), shape=(len(names), len(names)))
    label = connected_components(graph.tocsr(), directed=False)[1]
    first = {int(group): names[int(np.flatnonzero(label == group)[0])] for group in set(label)}
    digests = [hashlib.sha256(first[int(label[end])].encode()).hexdigest() for end in ends[:, 0]]
    return [int(digest, 16) % 2 for digest in digests]


def count_pairs(metrics: dict[str, Row], pairs: Sequence[Row]) -> list[Row]:
    """Count the labelled pairs that deduplication calls copies, by half and label."""
    sound = {key: row for key, row in metrics.items() if "rejected" not in row}
    hashes = sorted(sound)
    visible, faces = (
        decode_moments([bytes.fromhex(sound[key][name]) for key in hashes]) for name in SIGNATURES
    )
    cap_share = np.array([float(sound[key]["cap_share"]) for key in hashes])
    signatures = signatures_of_looks(hashes, visible, faces, cap_share)
    copies = find_copies(signatures, RankConfig().dedup)
    group = dict(zip(hashes, copies.shape_group.tolist()))
    rows = []
    halves = half_of(pairs)
    for half in (0, 1):
        for label in ("copy", "different"):
            chosen = [
                pair
                for pair, own in zip(pairs, halves)
                if own == half and pair["label"] == label and _both(pair, sound)
            ]
            found = []
            for pair in chosen:
                a, b = sorted((group[pair["sha256_a"]], group[pair["sha256_b"]]))
                if a == b or (a, b) in copies.pairs:
                    found.append("same_shape" if a == b else copies.pairs[a, b].kind)
            kinds = {kind: found.count(kind) for kind in sorted(set(found))}
            rows.append(
                {"half": half, "label": label, "pairs": len(chosen), "found": len(found)} | kinds
            )
    return rows


def _both(pair: Row, sound: dict[str, Row]) -> bool:
    return pair["sha256_a"] in sound and pair["sha256_b"] in sound


def score_of_version_1(values: dict[str, np.ndarray]) -> np.ndarray:
    """Return the score before the terms of today: faces, textures, solidity, views, side files."""
    textures = np.where(values["textured"] > 0, 1.0, 0.5 * (values["colored"] > 0))
    views = np.clip(values["coverage_mean"] / 0.15, 0, 1)
    views *= np.clip(values["contrast_mean"] / 0.1, 0, 1)
    detail = np.clip(np.log10(np.maximum(values["faces"], 1) / 100) / 4, 0, 1)
    solid, complete = 1 - values["sheet_share"], values["missing_files"] == 0
    return 0.3 * detail + 0.25 * textures + 0.2 * solid + 0.15 * views + 0.1 * complete


def correlations(metrics: dict[str, Row], rated: Sequence[Row]) -> list[Row]:
    """Return the rank correlation of both scores with the ratings, by part and kind."""
    rows = [row for row in rated if "rejected" not in metrics.get(row["sha256"], {"rejected": ""})]
    numbers = [column.name for column in METRICS_SCHEMA if not pa.types.is_string(column.type)]
    numbers = [name for name in numbers if not name.endswith("_moments")]
    values = {
        name: np.array([float(metrics[row["sha256"]][name]) for row in rows])
        for name in [*numbers, "faces", "missing_files"]
    }
    rating = np.array([int(row["rating"]) for row in rows])
    kinds = np.array([row["kind"] for row in rows])
    held_out = np.array([is_held_out(row) for row in rows])
    before = score_of_version_1(values)
    after = weighted_score(quality_terms(values), RankConfig())
    groups = {
        (part, kind): in_part & ((kinds == kind) | (kind == "all"))
        for part, in_part in (("in view", ~held_out), ("held out", held_out))
        for kind in ("all", *sorted(set(kinds.tolist())))
    }
    return [
        {
            "part": part,
            "kind": kind,
            "assets": int(chosen.sum()),
            **{
                name: round(float(spearmanr(score[chosen], rating[chosen]).statistic), 3)
                for name, score in (("before", before), ("after", after))
            },
        }
        for (part, kind), chosen in groups.items()
        if chosen.sum() >= SMALLEST_GROUP
    ]


def is_held_out(row: Row) -> bool:
    """Return whether a rating was not in view when the score was made."""
    return row["round"] == "2" and int(row["sha256"], 16) % 2 == 1


def main(args: Sequence[str]) -> None:
    """Parse the options, measure and print the tables."""
    cfg = parse(CurationConfig, args, prog="python -m benchmarks.curation")
    metrics, pairs, rated = measure(cfg)
    for row in (*count_pairs(metrics, pairs), *correlations(metrics, rated)):
        log.info("%s", json.dumps(row))


if __name__ == "__main__":
    command(main)
