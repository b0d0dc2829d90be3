"""Real users for the laboratory: journalists of the News Category Dataset (Misra 2022, CC BY 4.0), from the shared data.

What is read here holds what people wrote: it goes into temporary folders only.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cdcda_export.base import default_base
from cdcda_export.gguf import GgufFile
from cdcda_mobile.config import HistoryConfig
from cdcda_mobile.dataset import encoding_of
from cdcda_mobile.history import read_history, split_by_time
from quantization_kl import newest_records

MAX_TOKENS = 512

User = dict[str, list[Any]]


def history_of(path: Path) -> HistoryConfig:
    """Return how the file that ``newest_records`` wrote is read; short histories are allowed."""
    return HistoryConfig(data=str(path), task="headline", map={"input": "text", "output": "title"}, min_records=5)


def read_users(data: Path, count: int, records: int, folder: Path) -> list[User]:
    """Return users as token ids of their newest records: ``train`` and ``validation``, pairs of prompt and answer."""
    path, names = newest_records(data, folder, count, records)
    config, encoding, users = history_of(path), encoding_of(GgufFile(default_base())), []
    for name in names:
        split = split_by_time(read_history(name, config), config)
        parts = {part: encoding.probes(getattr(split, part), MAX_TOKENS) for part in ("train", "validation")}
        users.append({part: [[probe.prompt, probe.answer] for probe in probes] for part, probes in parts.items()})
    return users
