"""How long the default base takes to load in a fresh process, imports included: ours against transformers' own GGUF path.

python benchmarks/base_load.py [--quick]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

from laboratory import print_table, write_results

OURS = """
from cdcda_export.base import open_base
from cdcda_export.decoder import Decoder
from cdcda_mobile.dataset import encoding_of
base = open_base(None)
Decoder(base), encoding_of(base)
"""
THEIRS = """
from cdcda_export.base import default_base
from transformers import AutoModelForCausalLM, AutoTokenizer
path = default_base()
AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name)
AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
"""


def seconds(code: str) -> float:
    """Return the wall time of a fresh interpreter that runs the code, in seconds."""
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    return time.monotonic() - began


def main() -> None:
    """Measure in pairs, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one pair")
    pairs = 1 if parser.parse_args().quick else 5
    ours, theirs = [], []
    for _ in range(pairs):
        ours.append(seconds(OURS))
        theirs.append(seconds(THEIRS))
    print_table(
        ["", "median s", "least s", "most s"],
        [[n, statistics.median(x), min(x), max(x)] for n, x in (("ours", ours), ("transformers", theirs))],
    )
    ratio = statistics.median(t / o for o, t in zip(ours, theirs, strict=True))
    figures = {"base_load_seconds": statistics.median(ours), "base_load_ratio": ratio}
    write_results("base_load", figures, {"ours_seconds": ours, "transformers_seconds": theirs})


if __name__ == "__main__":
    main()
