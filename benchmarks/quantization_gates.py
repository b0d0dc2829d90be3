"""How far each quantization takes an artifact from the merged float32 model, and the gates that follow.

For every user's adapter in the workspaces (``sample_users.py`` and ``quantization_kl.py`` make them) and every quantization: KL
divergence, top-1 agreement, the arrived share of the change and the error of every rewritten tensor, on the user's test answers.
``--write`` turns the worst of them, times the margin, into ``export/cdcda_export/gates.json``.

    python benchmarks/quantization_gates.py [--quick] [--write] [--workspace DIR ...] [--rows FILE ...]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from cdcda_export.adapter import read_adapter, read_peft
from cdcda_export.arrival import by_kind
from cdcda_export.artifact import CHECKS, Order, open_artifact, write_artifact
from cdcda_export.base import Base
from cdcda_export.gates import Gate
from cdcda_export.ggml import TYPES, dequantize, quantize
from cdcda_export.importance import check_disjoint, importance_of
from cdcda_export.progress import Silent
from cdcda_export.quantization import QUANTS
from cdcda_export.recipe import ExportConfig
from cdcda_export.reference import merged_reference
from cdcda_export.verify import Probe, verify
from cdcda_mobile.dataset import encoding_of
from cdcda_mobile.history import records_in
from laboratory import RESULTS, print_table, write_results

GGUF = tuple(name for name in QUANTS if name != "base")
# With importance: the types that the default base can take; mixes of K-quants fall back to these there.
WEIGHED = ("q4_0", "q4_1", "q5_0", "q5_1", "iq4_nl", "q4_k_m")
QUICK = ("f16", "q8_0", "q4_1", "q4_0")
ONNX = ("int8", "int4")
MARGIN = 1.6
# Where the default base's own type swallows the change (q4_1 on a Q4_1 base), its measurement is no yardstick: q4_0's holds, and the
# artifact fails.
_SWALLOWED, _INSTEAD = 0.8, "q4_0"
_FLOOR = {"kl": 0.002, "top1": 0.02, "arrival": 0.02}
# A gate that an adapter left out would pass is none.
_MOST_ARRIVAL, _LEAST_TOP1 = 0.85, 0.1
# Tensor types whose rows the default base does not have are measured on its weights in rows of this length.
_LONG_ROWS = 256
_CONTEXT = 512

Cell = tuple[str, str, str]
"""Format, quantization, importance."""


def cells(quick: bool) -> list[Cell]:
    """Return what is measured."""
    if quick:
        return [("gguf", quant, "none") for quant in QUICK]
    gguf = [("gguf", quant, "none") for quant in GGUF] + [("gguf", quant, "user") for quant in WEIGHED]
    return [*gguf, ("gguf-lora", "q4_0", "none"), *(("onnx", quant, "none") for quant in ONNX)]


class Person:
    """One user's adapter with what every quantization of it is compared with: made once, in float32."""

    def __init__(self, directory: Path, base: Base) -> None:
        self.name, self.base = directory.name, base
        self.adapter = read_adapter(directory / "adapter", base.file)
        encoding = encoding_of(base.file)
        self.probes = encoding.probes(records_in(directory / "history" / "test.jsonl"), _CONTEXT)
        self._training = encoding.probes(records_in(directory / "history" / "train.jsonl"), _CONTEXT)
        check_disjoint(self._training, self.probes)
        with merged_reference(base, self.adapter, _CONTEXT) as (reference, self.reference_name):
            self._logits = {probe: reference(probe) for probe in self.probes}

    def reference(self, probe: Probe) -> np.ndarray:
        """Return the merged float32 model's logits at a probe's answer positions."""
        return self._logits[probe]

    @cached_property
    def importance(self) -> dict[str, np.ndarray]:
        """What the quantizer weighs its rounding with: from training records only."""
        return importance_of(self.base, self.adapter, self._training, Silent())


def measure(person: Person, cell: Cell) -> dict[str, Any]:
    """Return what one artifact of one user is: metrics and hashes, no text."""
    kind, quant, weighed = cell
    config = ExportConfig(format=kind, quant=quant, allow_fallback=True, importance=weighed)
    importance = person.importance if weighed == "user" else None
    base, adapter = person.base, person.adapter
    with tempfile.TemporaryDirectory() as folder:
        made = write_artifact(Order(base, adapter, config, Path(folder), Path(folder) / "_shared", importance), Silent())
        checks = CHECKS[kind](base.file, made, read_peft(adapter.path))
        with open_artifact(made, _CONTEXT) as (runtime, template):
            gate = Gate(1e9, 0.0, 1e9)
            result = verify(runtime, template, person.probes, person.reference, person.reference_name, gate, Silent())
        size = made.as_card(Path(folder))["bytes"]
    errors: dict[str, float] = {}
    for check in checks:
        if kind != "gguf-lora":  # there the error is relative to the change, and nothing is rounded
            errors[check.type] = max(errors.get(check.type, 0.0), check.error)
    return {
        "user": person.name,
        "format": kind,
        "quant": quant,
        "importance": weighed,
        "kl": result.kl_mean,
        "top1": result.top1,
        "arrived": by_kind(checks),
        "least_arrived_tensor": min((c.arrived for c in checks if c.arrived is not None), default=None),
        "most_arrived_tensor": max((c.arrived for c in checks if c.arrived is not None), default=None),
        "errors": errors,
        "nll": result.nll,
        "nll_reference": result.nll_reference,
        "positions": result.positions,
        "bytes": size,
    }


def gate_name(row: dict[str, Any]) -> str:
    """Return the name of the gate that a row counts for."""
    return str(row["quant"]) + ("+importance" if row["importance"] == "user" else "")


def _arrival_error(rows: list[dict[str, Any]]) -> float:
    return max((abs(share - 1) for row in rows for share in row["arrived"].values()), default=0.0)


def gates_of(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return the gate of every quantization: the worst user, times the margin."""
    gates: dict[str, dict[str, float]] = {}
    for name in dict.fromkeys(map(gate_name, rows)):
        mine = [row for row in rows if gate_name(row) == name]
        source = mine if _arrival_error(mine) < _SWALLOWED else [row for row in rows if gate_name(row) == _INSTEAD]
        gates[name] = {
            "kl": round(max(_FLOOR["kl"], MARGIN * max(row["kl"] for row in source)), 4),
            "top1": round(max(_LEAST_TOP1, 1 - max(_FLOOR["top1"], MARGIN * max(1 - row["top1"] for row in source))), 4),
            "arrival": round(min(_MOST_ARRIVAL, max(_FLOOR["arrival"], MARGIN * _arrival_error(source))), 4),
        }
    return gates


def error_bounds(rows: list[dict[str, Any]], base: Base) -> dict[str, float]:
    """Return how far a tensor of each type may be from its float32 weights: the worst that was measured, times the margin."""
    worst: dict[str, float] = {}
    for row in rows:
        for kind, error in row["errors"].items():
            worst[kind] = max(worst.get(kind, 0.0), error)
    storable = [kind for kind in TYPES.values() if kind.name[0] in "QB" or kind.name in ("F32", "F16", "IQ4_NL", "IQ4_XS")]
    rng = np.random.default_rng(0)
    for weights in _matrices(base, rng):
        for kind in storable:
            for weight_of in (None, np.exp(rng.normal(0, 1.5, _LONG_ROWS)).astype(np.float32)):
                stored = dequantize(quantize(weights, kind, weight_of), kind, weights.shape)
                error = float(np.linalg.norm(stored - weights) / np.linalg.norm(weights))
                worst[kind.name] = max(worst.get(kind.name, 0.0), error)
    return {kind: round(max(1e-6, MARGIN * error), 6) for kind, error in sorted(worst.items())}


def _matrices(base: Base, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Yield float32 matrices in rows of 256: real ones, moved off the grid that the default base lies on, and heavy-tailed ones."""
    for name in ("blk.0.attn_k.weight", "blk.0.attn_output.weight", "blk.14.ffn_down.weight", "blk.29.ffn_up.weight"):
        tensor = base.file[name]
        weights = dequantize(tensor.data, tensor.type, tensor.shape).reshape(-1, _LONG_ROWS)
        yield weights + rng.normal(0, 0.3 * weights.std(), weights.shape).astype(np.float32)
    yield rng.standard_normal((1024, _LONG_ROWS), dtype=np.float32)
    yield rng.standard_t(5, (1024, _LONG_ROWS)).astype(np.float32)


def users_in(workspaces: Sequence[Path]) -> list[Path]:
    """Return the directories of all users with a finished adapter."""
    return sorted(path.parent for workspace in workspaces for path in workspace.glob("*/adapter") if (path / "manifest.json").exists())


def measure_all(users: Sequence[Path], wanted: Sequence[Cell], base: Base) -> list[dict[str, Any]]:
    """Measure every user in every cell, and say each as it comes."""
    rows = []
    people = [Person(user, base) for user in users]
    for cell in wanted:
        for person in people:
            rows.append(measure(person, cell))
            print(f"{' '.join(cell)} {person.name}: KL {rows[-1]['kl']:.4f} top-1 {rows[-1]['top1']:.3f}", flush=True)
    return rows


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="four quantizations, no importance, no ONNX, adapters of the quick recipe")
    parser.add_argument("--write", action="store_true", help="write gates.json")
    parser.add_argument("--workspace", type=Path, nargs="+", help="runs/_benchmark-default")
    parser.add_argument("--rows", type=Path, nargs="+", default=[], help="results with rows that need not be measured again")
    arguments = parser.parse_args()
    if arguments.quick and arguments.write:
        parser.error("--quick measures too little to write gates from")
    workspaces = arguments.workspace or [Path("runs") / f"_benchmark-{'quick' if arguments.quick else 'default'}"]
    users = users_in(workspaces)
    if not users:
        parser.exit(1, f"{', '.join(map(str, workspaces))} holds no adapters; run benchmarks/sample_users.py first.\n")
    base = Base()
    rows = [row for path in arguments.rows for row in json.loads(path.read_text(encoding="utf-8"))["raw"]["rows"]]
    known = {(row["format"], row["quant"], row["importance"]) for row in rows}
    rows += measure_all(users, [cell for cell in cells(arguments.quick) if cell not in known], base)
    print_table(
        ["format", "quant", "importance", "user", "KL", "top-1", "least arrived", "NLL", "NLL f32", "MB"],
        [
            [r["format"], r["quant"], r["importance"], r["user"], r["kl"], r["top1"], min(r["arrived"].values(), default=float("nan"))]
            + [r["nll"], r["nll_reference"], r["bytes"] / 1e6]
            for r in rows
        ],
    )
    gates, errors = gates_of(rows), error_bounds(rows, base)
    figures = {f"kl_{name}": max(r["kl"] for r in rows if gate_name(r) == name) for name in gates}
    name = "quantization_gates" + ("-quick" if arguments.quick else "")
    result = write_results(name, figures, {"margin": MARGIN, "rows": rows, "gates": gates, "errors": errors})
    if arguments.write:
        target = Path(__file__).parents[1] / "export" / "cdcda_export" / "gates.json"
        source = f"benchmarks/{RESULTS.name}/{result.name}: the worst user, times {MARGIN}"
        target.write_text(json.dumps({"source": source, "gates": gates, "errors": errors}, indent=2) + "\n", encoding="utf-8")
        print(f"gates written: {target}")


if __name__ == "__main__":
    main()
