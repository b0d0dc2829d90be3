"""What an artifact must reach, by quantization and by tensor type: committed measurements times their margin (``gates.json``)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from cdcda_export.errors import ConfigError

# A matrix that was left out has a share of 0: whatever a kind of layer may lose on average, no single one may lose nearly all.
_ONE_TENSOR, _SIGMAS = 0.8, 6.0
_EXACT = 1e-6


@dataclass(frozen=True)
class Gate:
    """What an artifact of one quantization must reach."""

    kl: float
    top1: float
    arrival: float
    """How far the arrived share of the change may be from 1, for every kind of layer."""

    def of_one(self, noise: float) -> float:
        """Return how far one tensor's share may be from 1, given the spread that rounding alone has on it (``TensorCheck.noise``)."""
        return min(_ONE_TENSOR, 2 * self.arrival) + _SIGMAS * noise


@cache
def _measured() -> dict[str, dict[str, Any]]:
    text = resources.files("cdcda_export").joinpath("gates.json").read_text(encoding="utf-8")
    return dict(json.loads(text))


def get_gate(quant: str) -> Gate:
    """Return the gate of a quantization: committed measurement times its margin (``gates.json``).

    Raises:
        ConfigError: it was never measured.
    """
    gates = _measured()["gates"]
    if quant not in gates:
        raise ConfigError(f"There is no measured gate for '{quant}'; set export.max_kl and export.min_top1 in a recipe.")
    row = gates[quant]
    return Gate(float(row["kl"]), float(row["top1"]), float(row["arrival"]))


def error_bound(kind: str) -> float:
    """Return how far a tensor of this type may be from its float32 weights, relative to their norm (``gates.json``)."""
    return float(_measured()["errors"].get(kind, _EXACT))
