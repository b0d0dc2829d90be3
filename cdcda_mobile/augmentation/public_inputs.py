"""Inputs of others, for the strategy that lets the teacher answer them in the user's voice."""

from __future__ import annotations

import json
from pathlib import Path

from cdcda_export.errors import DataError, FileError
from cdcda_mobile.tasks import get_task


def read_inputs(path: Path) -> dict[str, list[str]]:
    """Return inputs by task from JSON lines ``{"task", "input"}``, each once, in the order of the file.

    Raises:
        FileError: the file cannot be read.
        DataError: a line is no such object.
        ConfigError: there is no such task.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(f"Cannot read {path}: {getattr(error, 'strerror', None) or error}; see augment.inputs.") from error
    found: dict[str, dict[str, None]] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            task, text = row["task"], row["input"].strip()
        except (ValueError, KeyError, TypeError, AttributeError):
            raise DataError(f'{path}:{number} is no JSON object with "task" and "input"; see augment.inputs.') from None
        found.setdefault(get_task(task).name, {})[text] = None
    return {task: list(texts) for task, texts in found.items()}
