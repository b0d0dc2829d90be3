"""Does a phone's engine compute what this machine computes? Sample user 42's exports under QEMU, by ``cdcda bench --arm``.

KL divergence at 252 positions, and greedy answers to the user's own held-out prompts, token by token, with the kernels that rearrange
weights at load and without. Times mean nothing under QEMU; the machine need not be quiet.

python benchmarks/arm_agreement.py [--quick] [--workspace DIR]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from cdcda_export.progress import Plain
from cdcda_export.recipe import ExportConfig
from cdcda_mobile.pipeline import UserJob, run_user_job
from laboratory import print_table, write_results
from phone_lab import USER, asked

RUNS = (("q4_0", "arm64-i8mm"), ("q8_0", "arm64-i8mm"))
FIRST = 8  # greedy tokens that should be the same


def same_start(found: dict[str, Any], equal: str) -> int:
    """Return of how many prompts the first tokens are all the same; an answer may be shorter."""
    return sum(same >= min(FIRST, given) for same, given in zip(found[equal], found["asked"], strict=True))


def main() -> None:
    """Export, execute, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one export in one build")
    parser.add_argument("--workspace", type=Path, default=Path("runs") / "_phone_lab")
    options = parser.parse_args()
    figures: dict[str, float | None] = {}
    raw, rows = {}, []
    for quant, variant in RUNS[:1] if options.quick else RUNS:
        config = ExportConfig(quant=quant)
        run_user_job(UserJob(USER, options.workspace, export=config), Plain())
        found = asked("bench", str(options.workspace / USER / config.directory), "--arm", variant)
        raw[f"{quant} {variant}"] = found
        for kernels, equal in (("repacked", "equal"), ("plain", "equal_plain")):
            name = f"{quant}_{variant.replace('-', '_')}_{kernels}"
            same = same_start(found, equal)
            figures |= {f"{name}_kl": found[kernels]["kl"], f"{name}_same_top": found[kernels]["same_top"]}
            figures[f"{name}_same_first_{FIRST}"] = same / len(found["asked"])
            rows.append([quant, variant, kernels, found[kernels]["kl"], found[kernels]["same_top"], f"{same} of {len(found['asked'])}"])
    print_table(["export", "build", "kernels", "KL", "same top token", f"first {FIRST} greedy tokens the same"], rows)
    write_results("arm_agreement", figures, raw)


if __name__ == "__main__":
    main()
