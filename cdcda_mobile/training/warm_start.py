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


def whole(layers: dict[str, Lora], warm_start: str, base: Base) -> dict[str, Lora]:
    """Return what was trained together with the shared adapter that it was started from, '' for none: one adapter for the base itself."""
    return folded(shared_layers(Path(warm_start), base), layers) if warm_start else layers


def folded(shared: dict[str, Lora], personal: dict[str, Lora]) -> dict[str, Lora]:
    """Return one adapter that changes the base as the two together do: the ranks add up, the scale is 1, what one lacks is zero.

    Where the ranks of one adapter differ from module to module, all get its largest.
    """
    ranks = [max(lora.down.shape[0] for lora in layers.values()) for layers in (shared, personal)]
    found = {}
    for name in dict.fromkeys([*shared, *personal]):
        present = shared.get(name) or personal[name]
        rows, columns = present.up.shape[0], present.down.shape[1]
        downs, ups = [], []
        for layers, rank in zip((shared, personal), ranks, strict=True):
            down, up = torch.zeros(rank, columns, device=present.down.device), torch.zeros(rows, rank, device=present.down.device)
            if name in layers:
                lora = layers[name]
                own = lora.down.shape[0]
                down[:own], up[:, :own] = lora.down, lora.up * lora.scale
            downs.append(down)
            ups.append(up)
        found[name] = Lora(torch.cat(downs), torch.cat(ups, dim=1), 1.0)
    return found
