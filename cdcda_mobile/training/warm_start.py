"""Two stages: a shared task adapter first, the person on top of it, and one plain adapter of both for the export."""

from __future__ import annotations

from pathlib import Path

import torch

from cdcda_export.base import Base
from cdcda_export.decoder import Lora
from cdcda_export.errors import AdapterError
from cdcda_export.reference import lora_of


def shared_layers(directory: Path, base: Base) -> dict[str, Lora]:
    """Return a shared adapter's layers by module name.

    Raises:
        AdapterError: it is broken, does not fit the base, or changes more than the projections of the layers.
    """
    from cdcda_export.adapter import read_adapter, read_peft

    read_adapter(directory, base.file)  # refuses what does not fit
    peft = read_peft(directory)
    outside = sorted({*peft.replaced, *(module for module in peft.pairs if not module.startswith("model.layers."))})
    if outside:
        raise AdapterError(f"{directory} changes {outside[0]} too; --warm-start takes an adapter of the layers' projections alone.")
    return lora_of(peft, base.decoder.device)


def folded(shared: dict[str, Lora], personal: dict[str, Lora]) -> dict[str, Lora]:
    """Return one adapter that changes the base as the two together do: the ranks add up, the scale is 1, what one lacks is zero."""
    ranks = [next(iter(layers.values())).down.shape[0] for layers in (shared, personal)]
    found = {}
    for name in dict.fromkeys([*shared, *personal]):
        present = shared.get(name) or personal[name]
        rows, columns = present.up.shape[0], present.down.shape[1]
        downs, ups = [], []
        for layers, rank in zip((shared, personal), ranks, strict=True):
            lora = layers.get(name)
            downs.append(lora.down if lora else torch.zeros(rank, columns, device=present.down.device))
            ups.append(lora.up * lora.scale if lora else torch.zeros(rows, rank, device=present.down.device))
        found[name] = Lora(torch.cat(downs), torch.cat(ups, dim=1), 1.0)
    return found
