"""How fast an artifact will be on a phone that nobody holds: a roofline fitted to published measurements.

Decode reads every weight once for a token and waits for memory; prefill multiplies every weight once for a token and waits for that.
What is read and multiplied comes from the artifact's own tensors; the seconds of each chip and storage type from ``roofline.json``, which
``benchmarks/phone_prediction.py`` fits and checks (benchmarks/roofline.py has the formula). Nothing measured on this machine goes in.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from cdcda_export.bundle import kv_bytes_per_token
from cdcda_export.ggml import TYPES
from cdcda_export.gguf import GgufFile
from cdcda_mobile.phone.classes import Phone, Soc

GIGA = 1e9
WIDTH = 2048  # columns that a layer's seconds in prefill are counted in
_EMBEDDING, _OUTPUT = "token_embd.weight", "output.weight"
_ROWS_ONLY = ("per_layer_token_embd.weight",)  # a token reads one row
# That a layer's own time is the same in small models as in those of 0.75 to 4 billion weights is an assumption, and it was measured with
# six threads where an app takes the fast cores. A judgement, not a fit.
_LAYER_DOUBT = 0.5
_WHOLE = 100  # tokens a second from which on nobody wants decimals


@dataclass(frozen=True)
class Work:
    """What a token asks of a processor.

    Attributes:
        weights: storage type -> weights in the layers.
        output: the output matrix' storage type.
        output_weights: its weights.
        layers: how many.
        hidden: columns of a layer.
        kv_bytes: of the cache, for a position.
        state_bytes: of recurrent layers, read and written for every token.
    """

    weights: Mapping[str, int]
    output: str
    output_weights: int
    layers: int
    hidden: int
    kv_bytes: int
    state_bytes: int = 0

    def decode_gb(self) -> dict[str, float]:
        """Return 10^9 bytes that a token reads, by type."""
        read = Counter(self.weights)
        read[self.output] += self.output_weights
        return {name: bytes_of(name, count) / GIGA for name, count in read.items()}

    def prefill_gw(self) -> dict[str, float]:
        """Return 10^9 weights that a token of a prompt is multiplied with, by type; only the last one needs the output matrix."""
        return {name: count / GIGA for name, count in self.weights.items()}

    def memory_gb(self, position: int) -> float:
        """Return 10^9 bytes of cache and state that the token at a position reads and writes."""
        return (self.kv_bytes * position + 2 * self.state_bytes) / GIGA


def bytes_of(kind: str, weights: float) -> float:
    """Return the bytes of weights in a storage type."""
    return weights * TYPES[kind].block_bytes / TYPES[kind].block_size


def work_of(file: GgufFile) -> Work:
    """Read a model's work off its tensors."""
    layers, hidden = int(file.hparam("block_count")), int(file.hparam("embedding_length"))
    output = file[_OUTPUT if _OUTPUT in file else _EMBEDDING]
    weights: Counter[str] = Counter()
    for name, tensor in file.items():
        if name not in (_EMBEDDING, _OUTPUT, *_ROWS_ONLY):
            weights[tensor.type.name] += math.prod(tensor.shape)
    return Work(dict(weights), output.type.name, math.prod(output.shape), layers, hidden, kv_bytes_per_token(file))


@dataclass(frozen=True)
class Speed:
    """Tokens a second, with the ends of the 90 % interval."""

    expected: float
    low: float
    high: float

    def texts(self) -> tuple[str, str, str]:
        """Return the three numbers as people read them."""
        expected, low, high = (f"{value:.0f}" if value >= _WHOLE else f"{value:.3g}" for value in (self.expected, self.low, self.high))
        return expected, low, high


@dataclass(frozen=True)
class Prediction:
    """What is expected of an artifact on a phone.

    Attributes:
        decode: None where neither measurements nor the memory's bandwidth are known.
        prefill: the same, for chips without measurements from their clocks; None where the chip lacks dotprod or has little cores alone.
        measured: whether this very chip was measured with other models.
    """

    decode: Speed | None
    prefill: Speed | None
    measured: bool


def predict(phone: Phone, work: Work, position: int = 288) -> Prediction:
    """Predict decode and prefill speed.

    Args:
        phone: the phone.
        work: the artifact's.
        position: tokens before the one that is decoded; 288 is the middle of pp256 followed by tg64.
    """
    table, soc = coefficients(), phone.soc
    decode = _speed(table["decode"], soc, _bandwidth(soc), work.decode_gb(), work.memory_gb(position), work.layers)
    dotprod = soc.key in table["prefill"]["chips"] or soc.dotprod.value is True
    clock = clock_ghz(soc) if dotprod else None
    prefill = _speed(table["prefill"], soc, clock, work.prefill_gw(), 0.0, work.layers * work.hidden / WIDTH)
    return Prediction(decode, prefill, soc.key in table["decode"]["chips"])


@cache
def coefficients() -> dict[str, Any]:
    """Return ``roofline.json``."""
    found: dict[str, Any] = json.loads(files(__package__).joinpath("roofline.json").read_text(encoding="utf-8"))
    return found


def clock_ghz(soc: Soc) -> float | None:
    """Return the clocks of the cores that compute, summed, in GHz; None where they are unknown, or little: nobody measured such a chip."""
    if soc.is_little:
        return None
    left, total = soc.big_cores, 0.0
    for cluster in soc.clusters.value or ():
        taken = min(left, cluster.count)
        total, left = total + taken * cluster.mhz / 1000, left - taken
    return total or None


def _bandwidth(soc: Soc) -> float | None:
    return soc.bandwidth_gb_s.value


def _speed(
    table: Mapping[str, Any], soc: Soc, strength: float | None, amounts: Mapping[str, float], memory: float, layers: float
) -> Speed | None:
    chip = table["chips"].get(soc.key)
    if chip is None and strength is None:
        return None
    seconds, share = token_seconds(chip or table["others"], amounts, memory, layers, strength)
    half_width, spread = (table["half_width"], chip["layer_spread"]) if chip else (table["others"]["half_width"], 0.0)
    width = interval_factor(half_width, share, spread)
    return Speed(1 / seconds, 1 / seconds / width, width / seconds)


def token_seconds(
    chip: Mapping[str, Any], amounts: Mapping[str, float], memory: float, layers: float, strength: float | None = None
) -> tuple[float, float]:
    """Return the seconds of a token, and which part of them the layers' own term has.

    Args:
        chip: seconds of a unit of each amount, of memory and of a layer; with ``strength`` and ``exponent`` where it stands for any other.
        amounts: by storage type.
        memory: 10^9 bytes.
        layers: how many.
        strength: of the chip that is asked about.
    """
    scale = (chip["strength"] / strength) ** chip["exponent"] if "exponent" in chip and strength else 1.0
    typed = sum(amount * chip["types"][name] for name, amount in amounts.items()) + memory * chip["memory"]
    layered = layers * chip["layers"]
    return float(scale * (typed + layered)), float(layered / (typed + layered))


def interval_factor(half_width: float, share: float, spread: float) -> float:
    """Return by what an expected speed is divided and multiplied for the ends of its 90 % interval.

    Args:
        half_width: relative, of models like those that were measured.
        share: of the layers' own term, which small models hang on and which no small model was measured for.
        spread: standard deviation of that term's logarithm on this chip.
    """
    doubt = 1.645 * share * math.hypot(spread, _LAYER_DOUBT)
    return math.exp(math.hypot(math.log1p(half_width), doubt))
