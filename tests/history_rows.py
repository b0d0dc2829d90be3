"""Rows of made-up people for the tests of histories, and the config that asks for few of them."""

from __future__ import annotations

import datetime as dt
import json
from pathlib import Path
from typing import Any

from cdcda_mobile.config import HistoryConfig

Rows = list[dict[str, Any]]


def rows_of(user: str, count: int, start: int = 0) -> Rows:
    """Dated headline records of one user, one a day."""
    return [
        {
            "user": user,
            "id": f"{user}-{number}",
            "date": (dt.date(2020, 1, 1) + dt.timedelta(days=number)).isoformat(),
            "task": "headline",
            "input": f"{user} writes about matter number {number}",
            "output": f"Matter {number} of {user}",
        }
        for number in range(start, start + count)
    ]


def write_jsonl(path: Path, rows: Rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def config(data: object, **more: Any) -> HistoryConfig:
    """A config that is content with one record."""
    return HistoryConfig(**{"data": str(data), "min_records": 1, **more})
