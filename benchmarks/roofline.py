"""The fit behind ``cdcda_mobile/phone/roofline.json``: seconds of a token from what it reads, by chip and storage type.

    seconds = sum over types of  amount(type) * exp(chip + type + chip x type)  +  memory * exp(chip + m)  +  layers * exp(l(chip))

The amount is 10^9 bytes for decode, which waits for memory, and 10^9 weights for prefill, which waits for multiplications. Types
whose kernels unpack weights one by one are bound by that work in both. A type that a chip was never measured with is what its prior
says, moved by what the chip's other types say: that is what the chip x type terms are kept small for. Maximum a posteriori by
Gauss-Newton, with Huber's weights, because a phone that ran short of memory or grew hot measures something else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

_ROUNDS = 60
_STEP = 0.5  # of a parameter in a round, at most
_HUBER = 1.5


@dataclass(frozen=True)
class Priors:
    """What is believed before anything was measured; logarithms.

    Attributes:
        chip: seconds of a unit of an amount, weakly held.
        types: by type, beside the chip.
        layers: seconds of a layer (and, in prefill, 2,048 columns of it).
        sigma: of a measurement.
        type_sigma: of a type, over all chips.
        mix_sigma: of a chip and a type.
        chip_sigma: of a chip.
        layer_sigma: of the layers' term.
        memory_sigma: of the memory's term.
    """

    chip: float
    types: Mapping[str, float]
    layers: float
    sigma: float
    type_sigma: float
    mix_sigma: float = 0.1
    chip_sigma: float = 2.0
    layer_sigma: float = 1.0
    memory_sigma: float = 0.5


@dataclass(frozen=True)
class Cells:
    """Measurements, one in a row.

    Attributes:
        chips: int, shape (n,): the place of each one's chip.
        amounts: float64, shape (n, types).
        memory: float64, shape (n,): 10^9 bytes of cache and state.
        layers: float64, shape (n,).
        seconds: float64, shape (n,): of a token.
    """

    chips: np.ndarray
    amounts: np.ndarray
    memory: np.ndarray
    layers: np.ndarray
    seconds: np.ndarray

    def take(self, which: np.ndarray) -> Cells:
        """Return some of them."""
        return Cells(*(getattr(self, name)[which] for name in ("chips", "amounts", "memory", "layers", "seconds")))


class Roofline:
    """A fitted model.

    Args:
        cells: what it is fitted to.
        chips: names.
        types: names.
        priors: what is believed before.
    """

    def __init__(self, cells: Cells, chips: Sequence[str], types: Sequence[str], priors: Priors) -> None:
        self.chips, self.types, self.priors = tuple(chips), tuple(types), priors
        count = len(self.chips)
        believed = [np.full(count, priors.chip), [priors.types[name] for name in types], np.zeros(count * len(types))]
        spread = [np.full(count, priors.chip_sigma), np.full(len(types), priors.type_sigma), np.full(count * len(types), priors.mix_sigma)]
        believed += [np.full(count, priors.layers), [0.0]]
        spread += [np.full(count, priors.layer_sigma), [priors.memory_sigma]]
        self._believed, self._spread = np.concatenate(believed), np.concatenate(spread)
        self.parameters = self._fit(cells)

    def seconds(self, cells: Cells) -> np.ndarray:
        """Return the seconds of a token: float64, shape (n,)."""
        return self._terms(self.parameters, cells)[0]

    def layer_spread(self) -> dict[str, float]:
        """Return by chip the standard deviation of the logarithm of a layer's seconds, of which large models say little."""
        first = len(self._believed) - 1 - len(self.chips)
        variance = np.linalg.inv(self._precision).diagonal()[first:-1]
        return dict(zip(self.chips, map(float, np.sqrt(variance)), strict=True))

    def tables(self) -> tuple[dict[str, dict[str, float]], dict[str, float], dict[str, float]]:
        """Return by chip: seconds of 10^9 units of each type, seconds of 10^9 bytes of memory, seconds of a layer."""
        chip, kind, mix, layer, memory = self._parts(self.parameters)
        rates = np.exp(chip[:, None] + kind[None] + mix)
        by_type = {name: dict(zip(self.types, map(float, row), strict=True)) for name, row in zip(self.chips, rates, strict=True)}
        return (
            by_type,
            dict(zip(self.chips, map(float, np.exp(chip + memory)), strict=True)),
            dict(zip(self.chips, map(float, np.exp(layer)), strict=True)),
        )

    def _parts(self, p: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, float]:
        c, t = len(self.chips), len(self.types)
        at = np.cumsum([0, c, t, c * t, c])
        return p[at[0] : at[1]], p[at[1] : at[2]], p[at[2] : at[3]].reshape(c, t), p[at[3] : at[4]], float(p[-1])

    def _terms(self, p: np.ndarray, cells: Cells) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Return seconds, and what types, memory and layers have of them."""
        chip, kind, mix, layer, memory = self._parts(p)
        typed = cells.amounts * np.exp(chip[cells.chips][:, None] + kind[None] + mix[cells.chips])
        remembered, layered = cells.memory * np.exp(chip[cells.chips] + memory), cells.layers * np.exp(layer[cells.chips])
        return typed.sum(1) + remembered + layered, typed, remembered, layered

    def _fit(self, cells: Cells) -> np.ndarray:
        p, observed = self._believed.copy(), np.log(cells.seconds)
        weight = np.ones(len(observed))
        for _ in range(_ROUNDS):
            seconds, typed, remembered, layered = self._terms(p, cells)
            jacobian = self._jacobian(cells, seconds, typed, remembered, layered)
            residual = np.log(seconds) - observed
            weight = np.minimum(1.0, _HUBER * self.priors.sigma / np.maximum(np.abs(residual), 1e-9)) / self.priors.sigma**2
            precision = jacobian.T @ (weight[:, None] * jacobian) + np.diag(self._spread**-2.0)
            gradient = jacobian.T @ (weight * residual) + (p - self._believed) / self._spread**2
            self._precision = precision
            p = p - np.clip(np.linalg.solve(precision, gradient), -_STEP, _STEP)
        return p

    def _jacobian(self, cells: Cells, seconds: np.ndarray, typed: np.ndarray, remembered: np.ndarray, layered: np.ndarray) -> np.ndarray:
        """Return the slopes of log(seconds): shape (n, parameters)."""
        n, c, t = len(seconds), len(self.chips), len(self.types)
        rows = np.arange(n)
        by_chip, by_mix, by_layer = np.zeros((n, c)), np.zeros((n, c, t)), np.zeros((n, c))
        by_chip[rows, cells.chips] = typed.sum(1) + remembered
        by_mix[rows, cells.chips] = typed
        by_layer[rows, cells.chips] = layered
        slopes = np.concatenate([by_chip, typed, by_mix.reshape(n, c * t), by_layer, remembered[:, None]], axis=1)
        return slopes / seconds[:, None]
