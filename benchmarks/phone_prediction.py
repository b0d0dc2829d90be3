"""Can a phone's speed be told without the phone? Predictions for models and for phones that the fit has not seen, against published speeds.

Fits the roofline of ``roofline.py`` to llama.cpp's CPU speeds on three phones (PocketPal's published baselines, six threads, 256 tokens of
prompt and 64 of answer) and a Raspberry Pi 5, and leaves out one model at a time, then one phone at a time. ``--write`` writes the
coefficients that ship. What was measured with types or layers that cannot be exported here is left out.

    CDCDA_DATA=... python benchmarks/phone_prediction.py [--write]
"""

from __future__ import annotations

import argparse
import csv
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cdcda_export.ggml import TYPES
from cdcda_export.manifest import write_json
from cdcda_mobile.phone.classes import Soc, phones
from cdcda_mobile.phone.predict import WIDTH, Work, bytes_of, clock_ghz, interval_factor, token_seconds
from laboratory import print_table, write_results
from roofline import Cells, Priors, Roofline

Row = Mapping[str, Any]

HERE = Path(__file__).resolve().parent
SHIPPED = HERE.parent / "cdcda_mobile" / "phone" / "roofline.json"
SOURCE = (
    "PocketPal's published baselines (github.com/a-ghorbani/pocketpal-ai, e2e/baselines/benchmark, 2026-05): llama.cpp on the CPU, six "
    "threads; and, for chips without measurements, one of a Raspberry Pi 5 (Arm Learning Path on llama-roofline), four threads"
)
PHONE_POSITION = 288  # in the middle of the 64 answered tokens, after 256
EXPONENTS = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
DEVICES = {"samsung-s23": "snapdragon-8-gen-2", "poco-x7-klee": "dimensity-8500", "poco-myron": "snapdragon-8-elite-gen-5"}
# What cannot be exported here: two storage types, and a model with an embedding in every layer, which two of the phones were too small for.
UNSUPPORTED_TYPES, UNSUPPORTED_MODELS = frozenset({"IQ2_S", "IQ3_S"}), ("gemma-4-e2b",)
NOMINAL = 0.9
# Two-sided 90 % of Student's t by degrees of freedom, and of the normal distribution.
_STUDENT, _NORMAL = {1: 6.314, 2: 2.920, 3: 2.353, 4: 2.132, 5: 2.015}, 1.645
# How much dearer than a byte of repacked weights: types that llama.cpp's ARM kernels repack wait for memory, the others for the
# unpacking of a weight, which costs about the same in all of them.
_PER_WEIGHT = -0.3
_REPACKED = {"Q4_0": -0.4, "IQ4_NL": -0.2, "Q8_0": -0.5, "Q4_K": -0.27, "Q5_K": -0.08, "Q6_K": -0.1, "F32": 0.0, "F16": 0.0, "BF16": 1.0}


def _decode_priors() -> Priors:
    types = {name: _REPACKED.get(name, _PER_WEIGHT - float(np.log(bytes_of(name, 1)))) for name in TYPES}
    return Priors(float(np.log(1 / 25)), types, float(np.log(1e-4)), sigma=0.06, type_sigma=0.25)


def _prefill_priors() -> Priors:
    types = {name: 0.0 if name in _REPACKED else 1.0 for name in TYPES}
    return Priors(float(np.log(1 / 150)), types, float(np.log(3e-5)), sigma=0.08, type_sigma=0.4)


@dataclass(frozen=True)
class Kind:
    """Decode or prefill: its column, priors, and what stands for a chip that nobody measured."""

    column: str
    priors: Priors
    amounts: Callable[[Work], Mapping[str, float]]
    memory: Callable[[Work, int], float]
    layers: Callable[[Work], float]
    strength: Callable[[Soc], float | None]


KINDS = {
    "decode": Kind(
        "tg_tok_s",
        _decode_priors(),
        Work.decode_gb,
        Work.memory_gb,
        lambda work: float(work.layers),
        lambda soc: soc.bandwidth_gb_s.value,
    ),
    "prefill": Kind(
        "pp_tok_s",
        _prefill_priors(),
        Work.prefill_gw,
        lambda work, position: 0.0,
        lambda work: work.layers * work.hidden / WIDTH,
        clock_ghz,
    ),
}


def measured_work() -> dict[tuple[str, str], Work]:
    """Return (model, quantization) -> work of the measured files."""
    found = {}
    for model, row in json.loads((HERE / "data" / "phone_models.json").read_text(encoding="utf-8"))["models"].items():
        for quant, file in row["files"].items():
            sizes = (row["output_weights"], row["layers"], row["hidden"], row["kv_bytes_per_position"], row["state_bytes"])
            found[model, quant] = Work(file["layers"], file["output"], *sizes)
    return found


def measurements(data: Path) -> list[dict[str, Any]]:
    """Return the published speeds of what can be exported here, with ``work``, ``chip`` and the ``position`` of an answered token."""
    work, rows = measured_work(), []
    with open(data / "phones" / "measurements.csv", encoding="utf-8") as lines:
        rows += [{**row, "chip": DEVICES[row["device"]], "position": PHONE_POSITION} for row in csv.DictReader(lines)]
    with open(HERE / "data" / "boards.csv", encoding="utf-8") as lines:
        rows += [{**row, "device": row["chip"], "position": int(row["tg_tokens"]) // 2} for row in csv.DictReader(lines)]
    rows = [{**row, "work": work[row["model"], row["quant"]]} for row in rows if row["model"] not in UNSUPPORTED_MODELS]
    return [row for row in rows if not UNSUPPORTED_TYPES & {*row["work"].weights}]


def cells_of(rows: Sequence[Row], kind: Kind, chips: Sequence[str]) -> Cells:
    """Return measurements as the fit takes them."""
    work = [row["work"] for row in rows]
    return Cells(
        np.array([chips.index(row["chip"]) for row in rows]),
        np.array([[kind.amounts(one).get(name, 0.0) for name in TYPES] for one in work]),
        np.array([kind.memory(one, row["position"]) for one, row in zip(work, rows, strict=True)]),
        np.array([kind.layers(one) for one in work]),
        np.array([1 / float(row[kind.column]) for row in rows]),
    )


def fit(rows: Sequence[Row], kind: Kind) -> Roofline:
    """Return the model of some measurements and the chips in them."""
    chips = list(dict.fromkeys(row["chip"] for row in rows))
    return Roofline(cells_of(rows, kind, chips), chips, [*TYPES], kind.priors)


@dataclass(frozen=True)
class Errors:
    """What came of leaving something out, for every row: float64, shape (n,).

    Attributes:
        log: log(predicted / measured speed); NaN where nothing else of the chip is known.
        share: of the layers' term in the prediction.
        spread: of that term's logarithm.
    """

    log: np.ndarray
    share: np.ndarray
    spread: np.ndarray

    @property
    def known(self) -> np.ndarray:
        """Which rows have one."""
        return ~np.isnan(self.log)

    def half_width(self, which: np.ndarray | None = None) -> float:
        """Return the relative half-width that holds the nominal share of (some of) the errors."""
        taken = self.known if which is None else self.known & which
        return float(np.expm1(np.quantile(np.abs(self.log[taken]), NOMINAL)))

    def worst_half_width(self, groups: np.ndarray, but: str = "") -> float:
        """Return the half-width for a group that nobody has seen: what the worst seen one needs, wider by Student's t for so few."""
        widths = [self.half_width(groups == name) for name in dict.fromkeys(groups) if name != but and self.known[groups == name].any()]
        return float(np.expm1(np.log1p(max(widths)) * _STUDENT[len(widths) - 1] / _NORMAL))

    def coverage(self, widths: np.ndarray, which: np.ndarray | None = None) -> tuple[float, float]:
        """Return which part of (some of) the errors lies in intervals of these half-widths, and the median half-width as a user sees it."""
        taken = self.known if which is None else self.known & which
        factors = np.array([interval_factor(*row) for row in zip(widths, self.share, self.spread, strict=True)])[taken]
        return float(np.mean(np.abs(self.log[taken]) <= np.log(factors))), float(np.median(factors - 1 / factors) / 2)


def left_out(rows: Sequence[Row], kind: Kind, by: str, tables: Callable[[Sequence[Row], Kind], Mapping[str, Any]]) -> Errors:
    """Predict every row from a fit without the rows of its model or chip.

    Args:
        rows: the measurements.
        kind: decode or prefill.
        by: the column of which one value is left out at a time.
        tables: makes of the other rows what is known of each chip.
    """
    found = np.full((3, len(rows)), np.nan)
    for value in dict.fromkeys(row[by] for row in rows):
        known = tables([row for row in rows if row[by] != value], kind)
        for at, row in enumerate(rows):
            if row[by] == value and row["chip"] in known:
                table, work = known[row["chip"]], row["work"]
                parts = (kind.amounts(work), kind.memory(work, row["position"]), kind.layers(work))
                seconds, share = token_seconds(table, *parts, _strength(row["chip"], kind))
                found[:, at] = -np.log(seconds * float(row[kind.column])), share, table.get("layer_spread", 0.0)
    return Errors(*found)


def measured_chips(rows: Sequence[Row], kind: Kind) -> dict[str, Any]:
    """Return what is known of each chip, as it ships; one model says too little of a chip."""
    fitted = fit(rows, kind)
    by_type, memory, layers = fitted.tables()
    spread = fitted.layer_spread()
    return {
        chip: {"types": by_type[chip], "memory": memory[chip], "layers": layers[chip], "layer_spread": spread[chip]}
        for chip in fitted.chips
        if len({row["model"] for row in rows if row["chip"] == chip}) > 1
    }


def any_other_chip(rows: Sequence[Row], kind: Kind, exponent: float) -> dict[str, Any]:
    """Return what is expected of a chip that nobody measured: the means of the measured ones, told at a strength in their middle."""
    fitted = fit(rows, kind)
    by_type, memory, layers = fitted.tables()
    strengths = {chip: _strength(chip, kind) for chip in fitted.chips}
    middle = float(np.exp(np.mean(np.log([*strengths.values()]))))

    def mean(values: Mapping[str, float]) -> float:
        return float(np.exp(np.mean([np.log(value * (strengths[chip] / middle) ** exponent) for chip, value in values.items()])))

    types = {name: mean({chip: row[name] for chip, row in by_type.items()}) for name in TYPES}
    return {"types": types, "memory": mean(memory), "layers": mean(layers), "strength": middle, "exponent": exponent}


def _strength(chip: str, kind: Kind) -> float:
    soc = next(phone.soc for phone in phones().values() if phone.soc.key == chip)
    strength = kind.strength(soc)
    assert strength is not None, f"{chip} is measured, so its strength has to be known"
    return strength


def without_a_phone(rows: Sequence[Row], kind: Kind, exponent: float | None = None) -> Errors:
    """Predict every row from the other phones; without an exponent, with that which is the best for those."""
    chips = {row["chip"] for row in rows}

    def tables(others: Sequence[Row], kind: Kind) -> Mapping[str, Any]:
        return dict.fromkeys(chips, any_other_chip(others, kind, best_exponent(others, kind) if exponent is None else exponent))

    return left_out(rows, kind, "chip", tables)


def best_exponent(rows: Sequence[Row], kind: Kind) -> float:
    """Return how speed follows strength: of a few exponents the one with the least squared error, phones weighing the same."""
    chips = np.array([row["chip"] for row in rows])

    def loss(exponent: float) -> float:
        errors = without_a_phone(rows, kind, exponent).log
        return float(np.mean([np.mean(errors[chips == chip] ** 2) for chip in dict.fromkeys(chips)]))

    return min(EXPONENTS, key=loss)


def shipped_of(rows: Sequence[Row], kind: Kind) -> tuple[dict[str, Any], Errors, Errors]:
    """Return what ships of decode or prefill, and the errors of leaving out models and phones."""
    by_model, by_phone = left_out(rows, kind, "model", measured_chips), without_a_phone(rows, kind)
    relative = np.abs(np.expm1(by_model.log[by_model.known]))
    others = any_other_chip(rows, kind, best_exponent(rows, kind))
    shipped = {
        "chips": measured_chips(rows, kind),
        "half_width": by_model.half_width(),
        "median_error": float(np.median(relative)),
        "p90_error": float(np.quantile(relative, NOMINAL)),
        "others": {**others, "half_width": by_phone.worst_half_width(np.array([row["chip"] for row in rows]))},
    }
    return shipped, by_model, by_phone


def main() -> None:
    """Fit, check, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the coefficients that ship")
    options = parser.parse_args()
    rows = measurements(Path(os.environ["CDCDA_DATA"]))
    models, chips = (np.array([row[name] for row in rows]) for name in ("model", "chip"))
    figures: dict[str, float | None] = {}
    raw: dict[str, Any] = {}
    shipped: dict[str, Any] = {"source": SOURCE}
    for name, kind in KINDS.items():
        shipped[name], by_model, by_phone = shipped_of(rows, kind)
        figures |= {f"{name}_{error}": shipped[name][error] for error in ("median_error", "p90_error")}
        # Nobody's interval comes from its own errors.
        of_others = np.array([by_model.half_width(models != model) for model in models])
        of_other_phones = np.array([by_phone.worst_half_width(chips, but=chip) for chip in chips])
        for place, errors, widths in (("", by_model, of_others), ("phone_out_", by_phone, of_other_phones)):
            figures[f"{name}_{place}interval_coverage"], figures[f"{name}_{place}interval_half_width"] = errors.coverage(widths)
        raw[name] = [
            [row["chip"], row["model"], row["quant"], float(row[kind.column]), *(round(float(np.expm1(e)), 4) for e in both)]
            for row, *both in zip(rows, by_model.log, by_phone.log, strict=True)
        ]
        for chip in dict.fromkeys(chips):
            held = by_phone.coverage(of_other_phones, chips == chip)[0]
            raw.setdefault("phone_out_coverage", {})[f"{chip}, {name}"] = held
    figures["interval_coverage"] = figures["decode_interval_coverage"]
    figures["interval_half_width"] = figures["decode_interval_half_width"]
    figures["phone_out_coverage"] = figures["decode_phone_out_interval_coverage"]
    print_table(("figure", "value"), [[name, value] for name, value in figures.items()])
    if options.write:
        write_json(SHIPPED, shipped)
    write_results("phone_prediction", figures, raw)


if __name__ == "__main__":
    main()
