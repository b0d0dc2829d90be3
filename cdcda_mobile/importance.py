"""Which input channels of each layer matter for this user: what the quantizer weighs its rounding errors with.

Gathered on training records only (never on validation or test), with the adapter in place: the mean squared input of every column, the
same quantity as llama.cpp's imatrix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from cdcda_export.decoder import Decoder, Lora
from cdcda_export.manifest import write_atomic
from cdcda_export.progress import Progress
from cdcda_export.verify import Probe

IMPORTANCE = "importance.safetensors"
_ROWS = 8


@torch.no_grad()
def gather_importance(decoder: Decoder, layers: Mapping[str, Lora], probes: Sequence[Probe], progress: Progress) -> dict[str, np.ndarray]:
    """Return GGUF tensor name -> mean squared input of its columns, float32, shape (columns,)."""
    sums: dict[str, torch.Tensor] = {}

    def add(name: str, x: torch.Tensor) -> None:
        squared = x.square().sum(0)
        sums[name] = sums[name] + squared if name in sums else squared

    progress.start("weighing the channels that matter to this user", len(probes), "records")
    decoder.observe = add
    try:
        for start in range(0, len(probes), _ROWS):
            part = [probe.ids for probe in probes[start : start + _ROWS]]
            decoder.hidden(part, layers)
            progress.advance(len(part))
    finally:
        decoder.observe = None
    progress.done()
    tokens = sum(len(probe.ids) for probe in probes)
    found = {}
    for name, total in sums.items():
        target = decoder.architecture.gguf_name(f"{name}.weight")
        if target is not None:
            found[target] = (total / tokens).cpu().numpy().astype(np.float32)
    return found


def save_importance(importance: Mapping[str, np.ndarray], directory: Path) -> str:
    """Write ``importance.safetensors`` and return its name."""
    from safetensors.numpy import save

    write_atomic(directory / IMPORTANCE, save(dict(importance)))
    return IMPORTANCE


def load_importance(directory: Path) -> dict[str, np.ndarray] | None:
    """Return what training gathered, None where there is none."""
    from safetensors.numpy import load_file

    path = directory / IMPORTANCE
    return load_file(path) if path.exists() else None
