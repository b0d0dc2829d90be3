"""How far each quantization takes an artifact from the merged float32 model, and the gates that follow.

For every sample user's adapter (from ``benchmarks/sample_users.py``) and every quantization: KL divergence, top-1 agreement and the arrived
share of the change, on the user's test answers. ``--write`` turns the worst of them, times the margin, into
``export/cdcda_export/gates.json``.

    python benchmarks/quantization_gates.py [--quick] [--write] [--workspace DIR]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from laboratory import RESULTS, print_table, write_results

from cdcda_export.adapter import read_adapter, read_peft
from cdcda_export.artifact import _ARRIVALS, Order, open_artifact, open_base, write_artifact
from cdcda_export.decoder import Decoder
from cdcda_export.gguf import GgufFile
from cdcda_export.manifest import sha256_file
from cdcda_export.progress import Silent
from cdcda_export.recipe import ExportConfig
from cdcda_export.reference import merged_reference
from cdcda_export.verify import Gate, verify
from cdcda_mobile.dataset import encoding_of
from cdcda_mobile.history import Record
from cdcda_mobile.pipeline import read_lines

GGUF = ("f16", "q8_0", "q4_k_m", "q4_1", "q4_0")
ONNX = ("int8", "int4")
MARGIN = 1.6
# Where the default base's own type swallows the change (q4_1 on a Q4_1 base), its measurement is no yardstick: q4_0's holds, and the
# artifact fails.
_SWALLOWED, _INSTEAD = 0.8, "q4_0"
_FLOOR = {"kl": 0.002, "top1": 0.02, "arrival": 0.02}


def measure(user: Path, kind: str, quant: str, base: GgufFile, base_sha: str, decoder: Decoder) -> dict[str, Any]:
    """Return KL, top-1 and arrival of one artifact on its user's test records."""
    config = ExportConfig(format=kind, quant=quant, allow_fallback=True)
    adapter = read_adapter(user / "adapter", base)
    records = [Record(**row) for row in read_lines(user / "history" / "test.jsonl")]
    probes = encoding_of(base).probes(records, config.max_tokens)
    with tempfile.TemporaryDirectory() as folder:
        order = Order(base, base_sha, adapter, config, Path(folder), Path(folder) / "_shared")
        made = write_artifact(order, Silent())
        arrived = _ARRIVALS[kind](base, made, read_peft(adapter.path))
        with (
            open_artifact(made, config.max_tokens) as (runtime, template),
            merged_reference(base, adapter, 512, decoder) as (reference, name),
        ):
            result = verify(runtime, template, probes, reference, name, Gate(1e9, 0.0, 1e9), Silent(), arrived)
        size = made.main.stat().st_size
    return {
        "user": user.name,
        "format": kind,
        "quant": quant,
        "kl": result.kl_mean,
        "top1": result.top1,
        "arrived": result.arrived,
        "nll": result.nll,
        "nll_reference": result.nll_reference,
        "positions": result.positions,
        "bytes": size,
    }


def gates_of(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return the gate of every quantization: the worst user, times the margin."""
    gates: dict[str, dict[str, float]] = {}
    for quant in dict.fromkeys(row["quant"] for row in rows):
        mine = [row for row in rows if row["quant"] == quant]
        arrival = max((abs(share - 1) for row in mine for share in row["arrived"].values()), default=0.0)
        source = mine if arrival < _SWALLOWED else [row for row in rows if row["quant"] == _INSTEAD]
        arrival = max((abs(share - 1) for row in source for share in row["arrived"].values()), default=0.0)
        gates[quant] = {
            "kl": round(max(_FLOOR["kl"], MARGIN * max(row["kl"] for row in source)), 4),
            "top1": round(1 - max(_FLOOR["top1"], MARGIN * max(1 - row["top1"] for row in source)), 4),
            "arrival": round(max(_FLOOR["arrival"], MARGIN * arrival), 4),
        }
    return gates


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="GGUF only, adapters of the quick recipe")
    parser.add_argument("--write", action="store_true", help="write gates.json")
    parser.add_argument("--workspace", type=Path, default=None)
    arguments = parser.parse_args()
    workspace = arguments.workspace or Path("runs") / f"_benchmark-{'quick' if arguments.quick else 'default'}"
    users = sorted(path.parent for path in workspace.glob("*/adapter") if (path / "manifest.json").exists())
    if not users:
        parser.exit(1, f"{workspace} holds no adapters; run benchmarks/sample_users.py first.\n")
    base = open_base(None)
    base_sha, decoder = sha256_file(base.path), Decoder(base)
    formats = (
        [("gguf", quant) for quant in GGUF] + [("gguf-lora", "q4_0")] + ([] if arguments.quick else [("onnx", quant) for quant in ONNX])
    )
    rows = []
    for kind, quant in formats:
        for user in users:
            rows.append(measure(user, kind, quant, base, base_sha, decoder))
            print(f"{kind} {quant} {user.name}: KL {rows[-1]['kl']:.4f} top-1 {rows[-1]['top1']:.3f}", flush=True)
    print_table(
        ["format", "quant", "user", "KL", "top-1", "least arrived", "NLL", "NLL f32", "MB"],
        [
            [r["format"], r["quant"], r["user"], r["kl"], r["top1"], min(r["arrived"].values(), default=float("nan")), r["nll"]]
            + [r["nll_reference"], r["bytes"] / 1e6]
            for r in rows
        ],
    )
    gates = gates_of(rows)
    figures = {f"kl_{quant}": max(r["kl"] for r in rows if r["quant"] == quant) for quant in gates}
    result = write_results("quantization_gates", figures, {"margin": MARGIN, "rows": rows, "gates": gates})
    if arguments.write:
        target = Path(__file__).parents[1] / "export" / "cdcda_export" / "gates.json"
        source = f"benchmarks/{RESULTS.name}/{result.name}: the worst sample user, times {MARGIN}"
        target.write_text(json.dumps({"source": source, "gates": gates}, indent=2) + "\n", encoding="utf-8")
        print(f"gates written: {target}")


if __name__ == "__main__":
    main()
