"""What trains a group of users in one pass: by hand on CPU cores, by autograd on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor
from typing import Protocol

import torch
from torch import Tensor

from cdcda_export.decoder import Decoder
from cdcda_mobile.training.lora import Layout
from cdcda_mobile.training.memory import tokens_of_pass
from cdcda_mobile.training.packed import PackedEngine
from cdcda_mobile.training.packing import Row
from cdcda_mobile.training.padded import PaddedEngine


class Engine(Protocol):
    """Computes losses and gradients of users side by side; see ``PackedEngine`` for shapes and units."""

    device: torch.device
    queues: bool
    cpu_seconds: float

    def gradients(
        self, batches: Sequence[Sequence[Row]], adapters: Sequence[Tensor], gradients: Sequence[Tensor], parts: int = 1
    ) -> Tensor:
        """Write each user's gradient and return the losses, on the device; nothing waits for it."""
        ...

    def nll(self, batches: Sequence[Sequence[Row]], adapters: Sequence[Tensor] | None, parts: int = 1) -> Tensor:
        """Return the mean negative log likelihood per answer token of each user."""
        ...


def engine_of(decoder: Decoder, layout: Layout, pool: Executor | None) -> Engine:
    """Return the engine for the device that the base lies on."""
    if decoder.device.type == "cpu":
        return PackedEngine(decoder, layout, pool)
    return PaddedEngine(decoder, layout, tokens_of_pass(decoder))
