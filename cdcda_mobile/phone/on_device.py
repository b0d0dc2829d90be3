"""The same protocol on a real phone: llama.cpp's own llama-bench, put there with the model, run on the big cores, and taken away again."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cdcda_engine.build import BENCH
from cdcda_engine.variants import best_variant
from cdcda_export.artifact import Artifact
from cdcda_export.errors import ConfigError, DeviceError
from cdcda_export.manifest import versions
from cdcda_mobile.phone.bench import Measured, Tests, get_protocol
from cdcda_mobile.phone.device import Device, State, big_cores

_SUSTAINED_TOKENS = 128  # of one repeat in the sustained run
_NS = 1e9


@dataclass(frozen=True)
class OnDevice:
    """A run on a phone.

    Attributes:
        artifact: its main file.
        quant: its quantization.
        bytes: its size.
        phone: what the phone says of itself.
        variant: of the engine.
        protocol: which tests.
        cores: that computed.
        measured: speeds and memory.
        before: battery and temperature.
        after: the same, when it was done.
        raw: llama-bench's rows.
    """

    artifact: Path
    quant: str
    bytes: int
    phone: dict[str, str]
    variant: str
    protocol: str
    cores: list[int]
    measured: Measured
    before: State
    after: State
    raw: list[dict[str, Any]]

    def as_json(self) -> dict[str, Any]:
        """Return everything, with the versions."""
        return {**asdict(self), "artifact": str(self.artifact), "versions": versions()}


def bench_on_device(
    device: Device,
    artifact: Artifact,
    engine: Path,
    protocol: str,
    repeats: int,
    sustained: float,
    threads: int,
    sent: Callable[[int], object],
    step: Callable[[str], object],
) -> OnDevice:
    """Measure an artifact on a phone.

    Args:
        device: the phone.
        artifact: a merged GGUF.
        engine: the folder of the built engine.
        protocol: a key of ``PROTOCOLS``.
        repeats: of each test.
        sustained: seconds of decode without a pause.
        threads: that compute; 0 for one on each big core.
        sent: told of bytes that went to the phone.
        step: told of every test that is done.

    Raises:
        ConfigError: this artifact does not run in the engine alone, or a number makes no sense.
        DeviceError: the phone is gone, or the engine failed there.
        DiskFull: the phone has no room.
    """
    if artifact.format != "gguf":
        raise ConfigError(f"The phone's engine measures merged GGUF files, and this is {artifact.format}; export one with --format gguf.")
    tests = get_protocol(protocol, repeats, sustained, threads)
    model = artifact.files["model"]
    variant = best_variant(device.abi, device.features())
    cores = big_cores(device.cores())[: threads or None]
    with device.staging() as folder:
        device.push(engine / variant / BENCH, f"{folder}/{BENCH}", sent, 0o755)
        device.push(model, f"{folder}/model.gguf", sent)
        before = device.state()
        run = _Run(device, folder, cores, step)
        prefill = run.rows(["-p", tests.prompt, "-n", 0, "-r", repeats])
        decode = run.rows(["-p", 0, "-n", tests.answer, "-d", tests.prompt if tests.chained else 0, "-r", repeats])
        long = []
        if sustained:
            speed = tests.answer * _NS / (sum(decode[0]["samples_ns"]) / repeats)
            times = max(2, math.ceil(sustained * speed / _SUSTAINED_TOKENS))
            long = run.rows(["-p", 0, "-n", _SUSTAINED_TOKENS, "-r", times])
        after = device.state()
    measured = _measured(prefill[0], decode[0], long, run.peak, tests)
    size = model.stat().st_size
    return OnDevice(
        artifact.main,
        artifact.quant,
        size,
        device.describe(),
        variant,
        protocol,
        cores,
        measured,
        before,
        after,
        [*prefill, *decode, *long],
    )


class _Run:
    """Runs of llama-bench in one folder of one phone."""

    def __init__(self, device: Device, folder: str, cores: list[int], step: Callable[[str], object]) -> None:
        self._device, self._folder, self._step = device, folder, step
        mask = f"0x{sum(1 << core for core in cores):x}"
        self._common = f"-m model.gguf -t {len(cores)} -C {mask} --cpu-strict 1 -lm none -o jsonl --progress"
        self.peak = 0
        self._complaint = ""

    def rows(self, options: list[str | int]) -> list[dict[str, Any]]:
        """Return the rows of a run."""
        found: list[dict[str, Any]] = []

        def line(text: str) -> None:
            memory = re.match(r"VmHWM:\s+(\d+) kB", text)
            done = re.match(r"llama-bench: benchmark \d+/\d+: (\w+) run (\d+)/\d+", text)
            if text.startswith("{"):
                found.append(json.loads(text))
            elif memory:
                self.peak = max(self.peak, int(memory[1]) * 1024)
            elif done:
                self._step(f"{done[1]} {done[2]}")
            elif text.strip() and not text.startswith("llama-bench: benchmark"):
                self._complaint = text.strip()

        command = f"./{BENCH} {self._common} {' '.join(map(str, options))}"
        # The high-water mark of its memory is asked for as long as it runs: afterwards nobody knows it.
        watch = "while kill -0 $p 2>/dev/null; do grep VmHWM /proc/$p/status 2>/dev/null; sleep 0.5; done"
        status = self._device.stream(f"cd {self._folder} && {{ {command} 2>&1 & p=$!; echo $p > pid; {watch}; wait $p; }}", line)
        if status or not found:
            raise DeviceError(f"The engine failed on the phone ({self._complaint or f'exit status {status}'}).")
        return found


def _measured(prefill: dict[str, Any], decode: dict[str, Any], long: list[dict[str, Any]], peak: int, tests: Tests) -> Measured:
    seconds = sorted(ns / _NS for ns in prefill["samples_ns"])
    return Measured(
        load=None,
        first_token=seconds[len(seconds) // 2],
        prefill=[tests.prompt / one for one in seconds],
        decode=[tests.answer * _NS / ns for ns in decode["samples_ns"]],
        token_p90=None,
        sustained=[_SUSTAINED_TOKENS * _NS / ns for row in long for ns in row["samples_ns"]],
        peak_rss=peak,
        crowded=None,
    )
