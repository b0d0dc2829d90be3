"""What every benchmark shares: a table on the screen, and results as JSON with versions and hardware."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cdcda_export.manifest import versions

RESULTS = Path(__file__).parent / "results"


def hardware() -> dict[str, Any]:
    """Return what the machine is: processor, cores in use, memory in GB."""
    model = ""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        model = next((line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")), "")
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
    return {
        "machine": platform.machine(),
        "processor": model,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(memory, 1),
    }


def print_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print a Markdown table, numbers with three decimals."""
    print("| " + " | ".join(header) + " |")
    print("|" + "---|" * len(header))
    for row in rows:
        print("| " + " | ".join(f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in row) + " |")


def write_results(name: str, figures: Mapping[str, float | None], raw: Mapping[str, Any]) -> Path:
    """Write ``results/<name>.json``: figures first (None: not measured), raw samples, versions, hardware, date."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    content = {
        "figures": dict(figures),
        "raw": dict(raw),
        "versions": versions(),
        "hardware": hardware(),
        "date": datetime.now(UTC).date().isoformat(),
    }
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"\nfigures: {json.dumps(content['figures'])}\nwritten: {path}")
    return path
