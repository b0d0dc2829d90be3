"""Which input channels of each matrix matter for this user: what the quantizer weighs its rounding errors with.

The mean squared input of every column, the same quantity as llama.cpp's imatrix (``tools/imatrix/imatrix.cpp``), but on the user's own
training records and with the adapter in place. A record that the artifact is verified on must never be among them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from cdcda_export.errors import DataError, MissingDependency
from cdcda_export.progress import Progress
from cdcda_export.verify import Probe

if TYPE_CHECKING:
    from torch import Tensor

    from cdcda_export.adapter import Adapter
    from cdcda_export.base import Base
    from cdcda_export.decoder import Decoder, Lora

RECORDS = 64
"""At most so many of the newest records are read."""
_BATCH = 8
_FLOOR = 1e-6


def check_disjoint(training: Sequence[Probe], held_out: Sequence[Probe]) -> None:
    """Refuse to weigh with a record that the artifact is judged on.

    Raises:
        DataError: a record is in both.
    """
    seen = {(probe.prompt, probe.answer) for probe in training}
    shared = sum((probe.prompt, probe.answer) in seen for probe in held_out)
    if shared:
        raise DataError(
            f"{shared} of {len(held_out)} held-out records are among the records that importance is gathered on; "
            "remove the duplicates from the history or use --importance none."
        )


def gather_importance(decoder: Decoder, layers: Mapping[str, Lora], probes: Sequence[Probe], progress: Progress) -> dict[str, np.ndarray]:
    """Return how strongly each column of each matrix is used.

    Args:
        decoder: the base model; whole tensors that the adapter replaces must be in place (``reference.apply_whole_tensors``).
        layers: the adapter.
        probes: the user's training records, oldest first; the newest ``RECORDS`` are read, prompt and answer.
        progress: told of every record.

    Returns:
        GGUF tensor name -> mean squared input of its columns, float32, shape (columns,), strictly positive. It has every matrix of the
        layers and an untied ``output.weight``; an embedding that is also the output has none, as in llama.cpp.

    Raises:
        DataError: there is no record.
    """
    import torch

    if not probes:
        raise DataError("There is no training record to gather importance on; use --importance none.")
    newest = probes[-RECORDS:]
    sums: dict[str, Tensor] = {}
    last: tuple[Tensor, Tensor] | None = None

    def add(name: str, x: Tensor) -> None:
        nonlocal last
        # q, k and v read the same tensor, gate and up too.
        if last is None or last[0] is not x:
            last = x, x.square().sum(0, dtype=torch.float64)
        sums[name] = sums[name] + last[1] if name in sums else last[1]

    progress.start("weighing the channels that matter to this user", len(newest), "records")
    decoder.observe = add
    try:
        with torch.no_grad():
            for start in range(0, len(newest), _BATCH):
                part = newest[start : start + _BATCH]
                decoder.hidden([probe.ids for probe in part], layers)
                progress.advance(len(part))
    finally:
        decoder.observe = None
    progress.done()
    if decoder.weights["lm_head.weight"] is decoder.weights["model.embed_tokens.weight"]:
        del sums["lm_head"]
    tokens = sum(len(probe.ids) for probe in newest)
    named = {decoder.architecture.gguf_name(f"{name}.weight"): total for name, total in sums.items()}
    return {name: _positive((total / tokens).cpu().numpy()) for name, total in named.items() if name is not None}


def importance_of(base: Base, adapter: Adapter, probes: Sequence[Probe], progress: Progress) -> dict[str, np.ndarray]:
    """Gather importance with an adapter in place; the arguments and the result are those of ``gather_importance``.

    Raises:
        MissingDependency: torch is not installed.
        DataError: there is no record.
    """
    from cdcda_export.reference import has_torch, personalised

    if not has_torch():
        raise MissingDependency("torch (for --importance user)", "train")
    return gather_importance(*personalised(base, adapter), probes, progress)


def _positive(mean: np.ndarray) -> np.ndarray:
    """Lift columns that the records never excite.

    ggml stores zeros for a block that weighs nothing at all (``make_qx_quants``), but what these few records leave silent may speak on
    another text.
    """
    average = float(mean.mean())
    return np.maximum(mean, average * _FLOOR).astype(np.float32) if average > 0 else np.ones(mean.shape, np.float32)
