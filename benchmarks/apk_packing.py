"""What a second user's APK takes beyond a plain copy of the model: shell and engine are packed once, the model every time.

python benchmarks/apk_packing.py [--quick]
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from cdcda_apk import APPLICATION_ID
from cdcda_apk.packing import Cargo, pack
from cdcda_apk.shell import find_shell
from cdcda_apk.signing import own_key
from cdcda_engine.build import build_engine
from cdcda_export.progress import Plain
from laboratory import print_table, write_results

# Bytes of a model: the default base in q4_0, and one that fills a package by half.
MODELS = {"small": 92_000_000, "large": 1_000_000_000}
CHUNK = 1 << 20


def model(path: Path, size: int, seed: int) -> Path:
    """Write bytes that no compression makes smaller."""
    chance = random.Random(seed)
    with path.open("wb") as stream:
        for at in range(0, size, CHUNK):
            stream.write(chance.randbytes(min(CHUNK, size - at)))
    return path


def copy(source: Path, target: Path) -> None:
    """Copy a file to the disk, as packing does: in chunks, and done when it is there."""
    with source.open("rb") as given, target.open("wb") as stream:
        while chunk := given.read(CHUNK):
            stream.write(chunk)
        stream.flush()
        os.fsync(stream.fileno())


def main() -> None:
    """Measure in pairs, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one pair of the small model")
    quick = parser.parse_args().quick
    shell, engine = find_shell(None, Plain()), build_engine(Plain())
    figures: dict[str, float | None] = {}
    raw, rows = {}, []
    with TemporaryDirectory(prefix="cdcda-packing-") as name:
        folder = Path(name)
        key, licences = own_key(folder / "key.p12"), folder / "LICENCES.txt"
        licences.write_text("none")

        def packing(path: Path) -> None:
            pack(shell, engine, Cargo({}, {"model.gguf": path}, licences), APPLICATION_ID, key, folder / "app.apk", lambda count: None)

        for kind in list(MODELS)[: 1 if quick else None]:
            first, second = (model(folder / f"{seed}.gguf", MODELS[kind], seed) for seed in (1, 2))
            packing(first)  # the first user's: shell and engine are put together
            pairs = []
            for _ in range(1 if quick else 7):
                began = time.perf_counter()
                packing(second)
                packed = time.perf_counter()
                copy(second, folder / "copy")
                pairs.append({"packing": packed - began, "copy": time.perf_counter() - packed})
            beyond = statistics.median(pair["packing"] - pair["copy"] for pair in pairs)
            whole, copied = (statistics.median(pair[what] for pair in pairs) for what in ("packing", "copy"))
            figures |= {f"{kind}_second_user_s": whole, f"{kind}_copy_s": copied, f"{kind}_beyond_copying_s": beyond}
            rows.append([f"{MODELS[kind] / 1e6:.0f} MB", whole, copied, beyond])
            raw[kind] = {"bytes": MODELS[kind], "pairs": pairs}
    print_table(["model", "second user's APK, s", "plain copy, s", "beyond copying, s"], rows)
    write_results("apk_packing", figures, raw)


if __name__ == "__main__":
    main()
