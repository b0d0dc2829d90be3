"""``cdcda bench --phone`` against llama-bench: same file, threads, cores and sources; and the memory formula against measured peaks.

The peer is compiled once (about six minutes on two cores) with what llama-cpp-python's own library is compiled with, and kept in the cache
folder. Pairs are interleaved, so that what else the machine does hits both. Run it on a quiet machine: threads that wait for each other
make any number.

python benchmarks/latency.py [--quick]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from cdcda_export.artifact import Artifact, types_of
from cdcda_export.base import Base
from cdcda_export.bundle import memory_needed
from cdcda_export.compiling import CMAKE, NATIVE, Build, compiled
from cdcda_export.converter import converter_version
from cdcda_export.gguf import GgufFile
from cdcda_export.merge import merge_to_gguf
from cdcda_export.progress import Plain
from cdcda_export.quantization import get_quant
from cdcda_export.recipe import ExportConfig
from cdcda_mobile.phone.bench import PROTOCOLS, bench
from cdcda_mobile.phone.classes import get_phone
from cdcda_mobile.phone.constrain import choose_cores
from laboratory import hardware, print_table, write_results

PROGRAM, PROTOCOL = "llama-bench", "llama-bench"
PHONE = "galaxy-s23"
DRAWS = 10_000
REPEATS = 3  # of each side of a pair
QUANTS = ("q4_0", "q8_0", "f16")


def peer() -> Path:
    """Return llama-bench for this machine, compiled the first time."""

    def make(compiler: Build) -> dict[str, str]:
        facts = compiler.unpack(("tools/llama-bench",))
        os.replace(compiler.make("build", NATIVE, (PROGRAM,)) / PROGRAM, compiler.folder / PROGRAM)
        return facts

    inputs = {"program": PROGRAM, "version": converter_version(), "cmake": [*CMAKE, *NATIVE], "machine": hardware()["processor"]}
    return compiled("peers", inputs, PROGRAM, Plain(), make) / PROGRAM


def theirs(program: Path, model: Path, cores: Sequence[int]) -> dict[str, float]:
    """Return llama-bench's prefill and decode in tokens a second: medians."""
    tests = PROTOCOLS[PROTOCOL]
    command = [str(program), "-m", str(model), "-p", str(tests.prompt), "-n", str(tests.answer), "-r", str(REPEATS), "-t", str(len(cores))]
    command += ["-lm", "none", "-o", "json"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, preexec_fn=lambda: os.sched_setaffinity(0, cores)
    ) as process:
        rows = json.loads(process.communicate()[0])
    return {"prefill" if row["n_prompt"] else "decode": statistics.median(row["samples_ts"]) for row in rows}


def ours(artifact: Artifact, threads: int) -> dict[str, float]:
    """Return the same of ``cdcda bench --phone``: within the phone's memory."""
    found = bench(artifact, PROTOCOL, REPEATS, 0.0, get_phone(PHONE), threads, lambda step: None).measured
    assert found is not None
    return {"prefill": statistics.median(found.prefill), "decode": statistics.median(found.decode)}


def interval(ratios: Sequence[float]) -> tuple[float, float, float]:
    """Return the median and the ends of its 95 % bootstrap interval."""
    chance = random.Random(0)
    drawn = sorted(statistics.median(chance.choices(ratios, k=len(ratios))) for _ in range(DRAWS))
    return statistics.median(ratios), drawn[int(0.025 * DRAWS)], drawn[int(0.975 * DRAWS) - 1]


def artifacts(folder: Path) -> dict[str, Artifact]:
    """Return the default base in some quantizations."""
    base, found = Base(), {}
    for name in QUANTS:
        path = folder / f"{name}.gguf"
        merge_to_gguf(base.file, None, types_of(ExportConfig(quant=name), base.file), get_quant(name), path)
        found[name] = Artifact("gguf", name, path, {"model": path}, [path.name], {}, None)
    return found


def memory(made: dict[str, Artifact], threads: int) -> list[dict[str, Any]]:
    """Return what the memory formula says and what was needed, in bytes, for each artifact."""
    empty = subprocess.run(
        [sys.executable, "-c", "import llama_cpp; print(next(l.split()[1] for l in open('/proc/self/status') if l.startswith('VmHWM')))"],
        capture_output=True,
        text=True,
        check=False,
    )
    rows = []
    tests = PROTOCOLS[PROTOCOL]
    for name, artifact in made.items():
        found = bench(artifact, PROTOCOL, 1, 0.0, None, threads, lambda step: None)
        assert found.measured is not None
        needed = memory_needed(GgufFile(artifact.main), found.bytes, tests.prompt + tests.answer)
        python = int(empty.stdout or 0) * 1024
        rows.append({"quant": name, "predicted": needed, "measured": found.measured.peak_rss - python, "python": python})
    return rows


def main() -> None:
    """Measure in pairs, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three pairs")
    os.environ.setdefault("GOMP_SPINCOUNT", "30000")  # as the command does for its child: threads that wait give the core away
    pairs = 3 if parser.parse_args().quick else 64
    program, cores = peer(), choose_cores(get_phone(PHONE).soc.big_cores)
    with TemporaryDirectory(prefix="cdcda-latency-") as folder:
        made = artifacts(Path(folder))
        model = made[QUANTS[0]]
        samples: list[dict[str, dict[str, float]]] = []
        for number in range(pairs):
            # Who goes first alternates.
            both = [("ours", lambda: ours(model, len(cores))), ("llama-bench", lambda: theirs(program, model.main, cores))]
            samples.append({name: run() for name, run in (both if number % 2 else both[::-1])})
        needed = memory(made, len(cores))
    figures: dict[str, float | None] = {}
    rows = []
    for test in ("decode", "prefill"):
        ratios = [sample["ours"][test] / sample["llama-bench"][test] for sample in samples]
        name = "llama_bench_parity" if test == "decode" else "llama_bench_prefill_parity"
        middle, low, high = interval(ratios)
        figures |= {name: middle, f"{name}_low": low, f"{name}_high": high}
        medians = [statistics.median(sample[who][test] for sample in samples) for who in ("ours", "llama-bench")]
        rows.append([test, *medians, middle, low, high])
    print_table(["", "ours tok/s", "llama-bench tok/s", "median ratio", "2.5 %", "97.5 %"], rows)
    figures["memory_formula_error"] = max(abs(row["predicted"] / row["measured"] - 1) for row in needed)
    print_table(["quant", "predicted MB", "measured MB"], [[row["quant"], row["predicted"] / 1e6, row["measured"] / 1e6] for row in needed])
    write_results("latency", figures, {"pairs": samples, "memory": needed, "threads": len(cores), "phone": PHONE})


if __name__ == "__main__":
    main()
