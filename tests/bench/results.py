"""Where the benchmarks put their numbers."""

import csv
from pathlib import Path

ROOT = Path(__file__).parents[2]


def write_csv(name: str, rows: list[dict]) -> None:
    path = ROOT / "assets" / "results" / name
    path.parent.mkdir(exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
