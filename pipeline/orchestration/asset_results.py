"""One visit to an asset: its job, the notes of its stages and the result in scratch."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config import BuildConfig
from pipeline.core.errors import Reject, Transient
from pipeline.core.files import write_atomically
from pipeline.core.product import Product
from pipeline.core.schema import Record
from pipeline.orchestration.isolated_process import ProcessExit
from pipeline.sources import Source
from pipeline.storage.layout import scratch_folder

NOTES = "asset.json"  # written while the stages run, so that it survives a crash
RESULT = "result.json"


@dataclass(frozen=True, kw_only=True)
class AssetJob:
    """Work on one asset.

    Args:
        record: The asset.
        source: Where its bytes come from. None if only the end of the job is to be recorded.
        config: Options of the build.
        products: The products to make, in order.
        folder: An existing, empty directory that no other job uses.
        gpu: The GPU that the job may use, as CUDA numbers them. None lets images use any GPU and
            distances the first one.
    """

    record: Record
    source: Source | None
    config: BuildConfig
    products: tuple[Product, ...]
    folder: Path
    gpu: str | None = None


@dataclass(kw_only=True)
class AssetNotes:
    """What is known about an asset so far. `save` replaces the file as a whole after every stage.

    Args:
        stage: The running stage or product. "" once the asset is done.
        status: "running", then "done", "rejected" or "failed".
        reason: A fixed word for the cause of a rejection or failure.
        row: Columns of the manifest, by name.
        numbers: Measured values for the manifest's column `numbers`.
        products: {name of a finished product: its counts, device and renderer}.
        seconds: {stage or product: its duration}.
        transient: Whether the asset failed for a cause that may be gone later.
    """

    stage: str = "start"
    status: str = "running"
    reason: str = ""
    row: dict[str, Any] = field(default_factory=dict)
    numbers: dict[str, Any] = field(default_factory=dict)
    products: dict[str, dict[str, Any]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    transient: bool = False

    def save(self, folder: Path) -> None:
        """Write the notes into the job's directory."""
        write_atomically(folder / NOTES, json.dumps(asdict(self), default=_to_plain))

    @staticmethod
    def load(folder: Path) -> AssetNotes:
        """Read the notes of a job's directory. Return empty ones if the job wrote none."""
        path = folder / NOTES
        return (
            AssetNotes(**json.loads(path.read_text(encoding="utf-8")))
            if path.exists()
            else AssetNotes()
        )

    def reject(self, stage: str, verdict: Reject) -> None:
        """Record a verdict.

        The first verdict decides stage and reason. The numbers of all verdicts are kept.
        """
        if isinstance(verdict, Transient):
            self.stage, self.status, self.reason = stage, "failed", verdict.reason
            self.transient = True
        elif self.status != "rejected":
            self.stage, self.status, self.reason = stage, "rejected", verdict.reason
        self.numbers |= verdict.numbers


@dataclass(frozen=True, kw_only=True)
class AssetResult:
    """How one visit to an asset ended.

    Args:
        uid: The asset.
        status: "done", "rejected" or "failed".
        stage: The stage or product that ended the asset. "" if it is done.
        reason: A fixed word for the cause. "" if it is done.
        row: Columns of the manifest, by name.
        numbers: Measured values for the manifest's column `numbers`.
        products: {name of a finished product: its counts, device and renderer}.
        seconds: {stage or product: its duration}.
        wall_s: Seconds of the whole visit.
        peak_rss_bytes: Largest memory use of the process that worked on the asset.
        host: Name of the machine.
        attempts: Number of the attempt, from 1.
        transient: Whether the asset failed for a cause that may be gone later.
    """

    uid: str
    status: str
    stage: str
    reason: str
    row: dict[str, Any] = field(default_factory=dict)
    numbers: dict[str, Any] = field(default_factory=dict)
    products: dict[str, dict[str, Any]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    wall_s: float = 0.0
    peak_rss_bytes: int = 0
    host: str = ""
    attempts: int = 1
    transient: bool = False

    @property
    def tokens(self) -> dict[int, int]:
        """{resolution: number of tokens} of the SDF bricks that the visit made."""
        return {
            Product.parse(name).resolution: counts["tokens"]
            for name, counts in self.products.items()
            if "tokens" in counts
        }


def save_result(job: AssetJob, end: ProcessExit, attempts: int) -> AssetResult:
    """Record how a job ended and move its directory to its final place in scratch.

    Args:
        job: The job. Its directory holds the notes and the files of finished products.
        end: How the process of the job ended. It decides the verdict, unless the notes say that
            the asset was rejected.
        attempts: Number of the attempt, from 1.
    """
    notes = AssetNotes.load(job.folder)
    status, reason, numbers = notes.status, notes.reason, notes.numbers
    if end.reason and status != "rejected":
        status, reason = "failed", end.reason
        if end.reason == "error":
            # "package.SomeError: message" -> "error_someerror"
            name = end.detail.split(":")[0].rpartition(".")[2].lower()
            reason = f"error_{name or 'unknown'}"
            numbers = {**numbers, "error": end.detail}
    # The place of the build must not show in its bytes.
    numbers = json.loads(json.dumps(numbers).replace(str(job.folder), "scratch"))
    result = AssetResult(
        uid=job.record.uid,
        status=status,
        stage=notes.stage,
        reason=reason,
        row=notes.row,
        numbers=numbers,
        products=notes.products,
        seconds=notes.seconds,
        wall_s=end.seconds,
        peak_rss_bytes=end.peak_rss_bytes,
        host=socket.gethostname(),
        attempts=attempts,
        transient=status == "failed" and notes.transient,
    )
    shutil.rmtree(job.folder / "input", ignore_errors=True)
    (job.folder / NOTES).unlink(missing_ok=True)
    hashes = {str(product): job.config.product_hash(product) for product in job.products}
    content = {"hashes": hashes, "result": asdict(result)}
    (job.folder / RESULT).write_text(json.dumps(content), encoding="utf-8")
    final = job.folder.with_name(job.record.uid)
    shutil.rmtree(final, ignore_errors=True)
    job.folder.replace(final)
    return result


def read_result(
    out: Path, cfg: BuildConfig, shard: str, uid: str, products: Sequence[Product]
) -> AssetResult | None:
    """Read the result of an earlier visit from local scratch.

    Args:
        out: The directory whose scratch is read.
        cfg: Options of this run.
        shard: Name of the shard.
        uid: The asset.
        products: The products that this visit is to make.

    Returns:
        The result, or None if there is none or if it cannot be used (see `parse_result`).
    """
    path = scratch_folder(out, shard, uid) / RESULT
    return parse_result(path.read_text(encoding="utf-8"), cfg, products) if path.exists() else None


def parse_result(text: str, cfg: BuildConfig, products: Sequence[Product]) -> AssetResult | None:
    """Parse a result and check that its visit made what is needed now.

    Args:
        text: Content of RESULT.
        cfg: Options of this run.
        products: The products that are needed.

    Returns:
        The result. None if the visit did not try all of `products` with these options, or if it
        tried a product that this run does not make: its traces would stay in the manifest.
    """
    content = json.loads(text)
    tried = content["hashes"]
    needed = {str(product) for product in products}
    hashes = {str(product): cfg.product_hash(product) for product in cfg.products}
    if not needed <= set(tried) <= set(hashes):
        return None
    if any(tried[name] != hashes[name] for name in tried):
        return None
    return AssetResult(**content["result"])


def _to_plain(value: Any) -> Any:
    """Turn numpy values into what JSON can hold."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    return str(value)
