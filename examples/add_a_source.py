"""A source of assets: a CSV file that lists mesh files with their licences.

`records` and `materialize` are all that a source needs. This example processes its assets by hand.
To use a source in builds, add its scheme to `open_source` in pipeline/sources/__init__.py.

python examples/add_a_source.py assets.csv scratch/
"""

import csv
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.core.errors import Reject
from pipeline.core.hashing import make_uid
from pipeline.core.schema import Record
from pipeline.curation.config import FilterConfig
from pipeline.curation.filters import filter_geometry
from pipeline.geometry.config import TopologyConfig
from pipeline.geometry.sdf import compute_bricks
from pipeline.geometry.topology import build_topology
from pipeline.mesh_io.config import LoadConfig, NormalizeConfig
from pipeline.mesh_io.load import load
from pipeline.mesh_io.normalize import normalize


@dataclass(frozen=True)
class CsvSource:
    """Assets of a CSV file with the columns `file` and `licence`."""

    path: Path
    name = "csv"

    def records(self) -> Iterator[Record]:
        """Yield one record per line, in the order of the file."""
        with self.path.open(newline="", encoding="utf-8") as file:
            for line in csv.DictReader(file):
                mesh = Path(line["file"])
                yield Record(
                    uid=make_uid(self.name, mesh.as_posix()),
                    source=self.name,
                    url=mesh.as_posix(),
                    licence=line["licence"],
                    format=mesh.suffix[1:].lower(),
                )

    def materialize(self, record: Record, scratch: Path) -> Path:
        """Return the mesh file of a record.

        Raises:
            Reject: "file_not_readable" if it is not there.
        """
        path = self.path.parent / record.url
        if not path.is_file():
            raise Reject("file_not_readable")
        return path


def main(path: Path, scratch: Path) -> None:
    source = CsvSource(path)
    for record in source.records():
        try:
            mesh = load(source.materialize(record, scratch), LoadConfig())
            mesh = normalize(mesh, NormalizeConfig())
            filter_geometry(mesh, FilterConfig())
            topology = build_topology(mesh, TopologyConfig(resolution=64))
            bricks = compute_bricks(topology, 64)
            verdict = f"{topology.sign_path}, {len(bricks.cells)} bricks"
            print(f"{record.url}: {len(mesh.faces)} faces, {verdict}")
        except Reject as verdict:
            print(f"{record.url}: rejected, {verdict}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
