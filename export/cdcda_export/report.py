"""The card as one HTML page."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cdcda_export.manifest import write_atomic


def write_report(card: Mapping[str, Any], path: Path) -> None:
    """Write the card as one self-contained HTML page, atomically."""
    text = html.escape(json.dumps(card, indent=2, ensure_ascii=False, default=str))
    write_atomic(path, f"<!doctype html><html lang='en'><meta charset='utf-8'><title>Card</title><pre>{text}</pre></html>\n")
