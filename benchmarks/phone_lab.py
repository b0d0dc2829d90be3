"""Good beside fast: a sample user's model in every kind of export, measured here and predicted for phones; and 20 repeats: any leak?

Runs the default job for sample user 42, exports the adapter in every kind, measures each with ``cdcda bench`` within the limits of a phone,
20 repeats in one process, and joins everything with ``cdcda bench --table``. What its gate refuses is a line of the table too. Run it on a
quiet machine.

python benchmarks/phone_lab.py [--quick] [--workspace DIR]
"""

from __future__ import annotations

import argparse
import json
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from cdcda_export.errors import VerificationFailed
from cdcda_export.progress import Plain
from cdcda_export.recipe import ExportConfig
from cdcda_mobile.cli import main as cdcda
from cdcda_mobile.config import AugmentConfig
from cdcda_mobile.pipeline import UserJob, run_user_job
from laboratory import print_table, write_results

USER, PHONE = "42", "galaxy-s23"
PHONES = ("galaxy-a16", "pixel-7a", PHONE, "poco-f8-ultra")
KINDS = (
    ExportConfig(quant="q4_0"),
    ExportConfig(quant="q4_0", importance="user"),
    ExportConfig(quant="q5_0"),
    ExportConfig(quant="q4_k_m", allow_fallback=True),
    ExportConfig(quant="q8_0"),
    ExportConfig(quant="f16"),
    ExportConfig(format="gguf-lora", quant="q8_0"),
    ExportConfig(format="onnx", quant="int8"),
    ExportConfig(format="onnx", quant="int4"),
)
REPEATS = 20
_SMALLEST = 0.0001


def asked(*words: str) -> Any:
    """Return what a command of ``cdcda`` says as JSON.

    Raises:
        SystemExit: it failed; its sentence is on the screen.
    """
    said = StringIO()
    with redirect_stdout(said):
        code = cdcda([*words, "--json"])
    if code:
        raise SystemExit(code)
    return json.loads(said.getvalue())


def middle_eighty(values: list[float]) -> float:
    """Return the distance from the 10th to the 90th percentile as a share of the median."""
    cuts = quantiles(values, n=10, method="inclusive")
    return (cuts[-1] - cuts[0]) / median(values)


def growth(resident: list[int]) -> int:
    """Return how many bytes the second half of the repeats held more than the first, in medians; the first repeat pays for what stays."""
    later = resident[1:]
    return int(median(later[len(later) // 2 :]) - median(later[: len(later) // 2]))


def readme_table(result: dict[str, Any]) -> str:
    """Return the table that README.md shows: a line for each kind of export, a column for each phone."""
    rows = result["raw"]["rows"]
    lines = [
        ["export", "size", "memory", "KL", "gain kept", "tasks", "decode here", *(f"{phone}, predicted" for phone in PHONES)],
        ["---"] * (7 + len(PHONES)),
    ]
    for name in dict.fromkeys(row["name"] for row in rows):
        mine = {row["phone"]: row for row in rows if row["name"] == name}
        row = mine[PHONE]
        quality = row["quality"]
        lines.append(
            [
                name,
                f"{row['bytes'] / 1e6:.0f} MB",
                f"{row['fit']['needed'] / 1e6:.0f} MB" if row["fit"] else "",
                f"{quality['kl']:.4f}" if quality["kl"] >= _SMALLEST else f"< {_SMALLEST:g}",
                f"{quality['kept']:.0%}" if quality["kept"] is not None else "",
                ", ".join(f"{task} {value:.3f}" for task, value in quality["metrics"].items()),
                _spread(result["raw"]["runs"][name]["measured"]["decode"]),
                *(_predicted(mine[phone]) for phone in PHONES),
            ]
        )
    lines += [[name, "refused by its gate", *[""] * (len(lines[0]) - 2)] for name in result["raw"]["refused"]]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _spread(values: list[float]) -> str:
    low, *_, high = quantiles(values, n=10, method="inclusive")
    return f"{median(values):.0f} ({low:.0f}-{high:.0f})"


def _predicted(row: dict[str, Any]) -> str:
    speed = row["decode"]
    return f"{speed['expected']:.0f} ({speed['low']:.0f}-{speed['high']:.0f})" if speed else "not calibrated"


def main() -> None:
    """Export, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="real records only, two kinds, five repeats")
    parser.add_argument("--workspace", type=Path, default=Path("runs") / "_phone_lab")
    options = parser.parse_args()
    kinds, repeats = (KINDS[:2], 5) if options.quick else (KINDS, REPEATS)
    augment = AugmentConfig(keep=0) if options.quick else AugmentConfig()
    refused = {}
    for kind in kinds:
        try:
            run_user_job(UserJob(USER, options.workspace, augment=augment, export=kind), Plain())
        except VerificationFailed as failure:
            refused[kind.directory] = str(failure)
            print(failure)
    run = options.workspace / USER
    measured = {}
    for row in asked("bench", str(run), "--table", "--phone", PHONE):
        place = run / row["name"]
        measured[row["name"]] = asked("bench", str(place), "--phone", PHONE, "--repeats", str(repeats), "--quiet")
    rows = asked("bench", str(run), "--table", "--phone", ",".join(PHONES))
    spreads = {name: middle_eighty(found["measured"]["decode"]) for name, found in measured.items()}
    grown = {name: growth(found["raw"]["resident"]) for name, found in measured.items()}
    print(readme_table({"raw": {"rows": rows, "refused": refused, "runs": measured}}))
    told = [
        [name, median(found["measured"]["decode"]), spreads[name], grown[name] / 1e6, found["unusable"]] for name, found in measured.items()
    ]
    print_table(["export", "decode tok/s", "middle 80 % / median", "memory grew by MB", "not to be used"], told)
    figures = {
        "kinds": len(measured),
        "repeats": repeats,
        "decode_spread_median": median(spreads.values()),
        "decode_spread_worst": max(spreads.values()),
        "memory_growth_bytes_worst": max(grown.values()),
    }
    kept = {
        name: {key: found[key] for key in ("measured", "unusable", "threads", "memory", "held_by")} | {"resident": found["raw"]["resident"]}
        for name, found in measured.items()
    }
    write_results("phone_lab", figures, {"user": USER, "rows": rows, "refused": refused, "runs": kept})


if __name__ == "__main__":
    main()
