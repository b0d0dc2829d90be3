"""What each quantization costs real people: KL divergence from their merged float32 model, on their own held-out prompts.

Twelve journalists of the News Category Dataset (Misra 2022, CC BY 4.0): their newest 80 records, split by time, one LoRA adapter each on
real records only; then every quantization of the table, with and without importance from their training records. Per-user paired
differences to q4_0 come with bootstrap intervals.

    CDCDA_DATA=... python benchmarks/quantization_kl.py [--quick] [--workspace DIR]
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from cdcda_export.base import Base
from cdcda_export.progress import Plain
from cdcda_mobile.config import AugmentConfig, HistoryConfig, TrainConfig
from cdcda_mobile.pipeline import Pipeline, UserJob
from cdcda_mobile.workspace import write_lines
from laboratory import print_table, write_results
from quantization_gates import Cell, measure_all, users_in

USERS, RECORDS = 12, 80
CELLS: tuple[Cell, ...] = (
    ("gguf", "q8_0", "none"),
    ("gguf", "q4_0", "none"),
    ("gguf", "q4_0", "user"),
    ("gguf", "q4_1", "none"),
    ("gguf", "q4_1", "user"),
    ("gguf", "q5_0", "none"),
    ("gguf", "q4_k_m", "none"),
    ("onnx", "int8", "none"),
    ("onnx", "int4", "none"),
)
_RESAMPLES = 10_000


def newest_records(data: Path, folder: Path, users: int, records: int = RECORDS) -> tuple[Path, list[str]]:
    """Write the newest records of users who have at least ``RECORDS`` of them, and return the file and the users."""
    rows: dict[str, list[dict[str, Any]]] = defaultdict(list)
    with gzip.open(data / "personal" / "headlines.jsonl.gz", "rt", encoding="utf-8") as stream:
        for line in stream:
            row = json.loads(line)
            rows[row["user"]].append(row)
    chosen = sorted((user for user in rows if len(rows[user]) >= RECORDS), key=str)[:users]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "records.jsonl"
    kept = [row for user in chosen for row in rows[user][-records:]]
    write_lines(path, kept)
    return path, chosen


def train(path: Path, users: list[str], workspace: Path, base: Base) -> None:
    """Train one adapter for each user; finished ones are reused."""
    history = HistoryConfig(data=str(path), task="headline", map={"input": "text", "output": "title"})
    for user in users:
        job = UserJob(user, workspace, history=history, augment=AugmentConfig(keep=0), train=TrainConfig(epochs=2))
        Pipeline(job, Plain(), base).run(until="adapter")


def interval(differences: np.ndarray) -> tuple[float, float, float]:
    """Return mean and 95 % bootstrap interval of per-user differences."""
    rng = np.random.default_rng(0)
    means = rng.choice(differences, (_RESAMPLES, len(differences))).mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(differences.mean()), float(low), float(high)


def main() -> None:
    """Train, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two users, no ONNX")
    parser.add_argument("--workspace", type=Path, default=Path("runs") / "_benchmark-headlines")
    arguments = parser.parse_args()
    if "CDCDA_DATA" not in os.environ:
        parser.exit(1, "Name the folder of the shared data in CDCDA_DATA.\n")
    base = Base()
    path, chosen = newest_records(Path(os.environ["CDCDA_DATA"]), arguments.workspace / "_data", 2 if arguments.quick else USERS)
    train(path, chosen, arguments.workspace, base)
    wanted = [cell for cell in CELLS if not arguments.quick or cell[0] == "gguf"]
    rows = measure_all([user for user in users_in([arguments.workspace]) if user.name in chosen], wanted, base)
    by_cell = {cell: [r for r in rows if (r["format"], r["quant"], r["importance"]) == cell] for cell in wanted}
    plain = np.array([row["kl"] for row in by_cell["gguf", "q4_0", "none"]])
    figures, table = {}, []
    for cell, found in by_cell.items():
        name = cell[1] + ("_importance" if cell[2] == "user" else "")
        kl, top1 = np.array([r["kl"] for r in found]), np.array([r["top1"] for r in found])
        cost = np.array([r["nll"] - r["nll_reference"] for r in found])
        mean, low, high = interval(kl - plain)
        figures |= {f"kl_{name}": float(kl.mean()), f"kl_{name}_minus_q4_0": mean}
        figures |= {f"kl_{name}_minus_q4_0_low": low, f"kl_{name}_minus_q4_0_high": high}
        arrived = np.mean([np.mean(list(r["arrived"].values())) for r in found])
        table.append(
            [name, kl.mean(), kl.min(), kl.max(), top1.mean(), cost.mean(), float(arrived), f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"]
        )
    print_table(["quant", "KL mean", "least", "most", "top-1", "NLL cost", "arrived", "KL minus q4_0 (95 %)"], table)
    setting = {"users": len(chosen), "records": RECORDS, "base": base.file.path.name, "base_sha256": base.sha256}
    write_results("quantization_kl" + ("-quick" if arguments.quick else ""), figures, {"setting": setting, "rows": rows})


if __name__ == "__main__":
    main()
