"""The same protocol on a real phone: llama.cpp's own llama-bench, put there with the model, run on the big cores, and taken away again."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from cdcda_engine.build import BENCH
from cdcda_engine.variants import best_variant
from cdcda_export.artifact import Artifact
from cdcda_export.errors import ConfigError, DeviceError
from cdcda_export.manifest import versions
from cdcda_mobile.phone.bench import PROTOCOLS, Measured, Tests, get_protocol
from cdcda_mobile.phone.device import Device, State, big_cores
from cdcda_mobile.phone.measure import SUSTAINED_TOKENS

_NS = 1e9
_KILLED = 137  # by SIGKILL, which is what Android's low-memory killer sends


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
        pinned: whether the phone let the threads stay on these cores.
        measured: speeds and memory; None where there was not enough memory.
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
    pinned: bool
    measured: Measured | None
    before: State
    after: State
    raw: list[dict[str, Any]]

    @property
    def unusable(self) -> str:
        """Why its speeds say nothing; '' where they do."""
        if not self.pinned:
            return "the phone did not let the threads stay on these cores"
        hot = self.before.throttling or self.after.throttling
        return "the phone slows itself down because it is hot; let it cool and run it again" if hot else ""

    def as_json(self) -> dict[str, Any]:
        """Return everything, with the versions."""
        measured = self.measured.as_json() if self.measured else None
        return {**asdict(self), "artifact": str(self.artifact), "measured": measured, "unusable": self.unusable, "versions": versions()}


@dataclass(frozen=True)
class Plan:
    """What is asked of which phone; everything that can be refused was looked at.

    Attributes:
        device: the phone.
        artifact: a merged GGUF.
        variant: of the engine.
        cores: that compute.
        protocol: a key of ``PROTOCOLS``.
        repeats: of each test.
        sustained: seconds of decode without a pause.
    """

    device: Device
    artifact: Artifact
    variant: str
    cores: list[int]
    protocol: str
    repeats: int
    sustained: float

    @property
    def tests(self) -> Tests:
        """The protocol's."""
        return PROTOCOLS[self.protocol]


def plan_for(device: Device, artifact: Artifact, protocol: str, repeats: int, sustained: float, threads: int) -> Plan:
    """Look at everything before an engine is compiled or anything is sent.

    Args:
        device: the phone.
        artifact: a merged GGUF.
        protocol: a key of ``PROTOCOLS``.
        repeats: of each test.
        sustained: seconds of decode without a pause.
        threads: that compute, on the fastest cores; 0 for one on each big core.

    Raises:
        ConfigError: this artifact or this phone cannot be measured, or a number makes no sense.
        DeviceError: the phone is gone.
    """
    if artifact.format != "gguf":
        raise ConfigError(f"The phone's engine measures merged GGUF files, and this is {artifact.format}; export one with --format gguf.")
    get_protocol(protocol, repeats, sustained, threads)
    variant, cores = best_variant(device.abi, device.features()), big_cores(device.cores())
    if threads > len(cores):
        raise ConfigError(f"The phone has {len(cores)} fast cores; --threads {threads} would make them wait for slow ones.")
    return Plan(device, artifact, variant, cores[: threads or None], protocol, repeats, sustained)


def bench_on_device(
    plan: Plan,
    engine: Path,
    sent: Callable[[int], object],
    step: Callable[[str], object],
) -> OnDevice:
    """Measure an artifact on a phone.

    Args:
        plan: what is asked.
        engine: the folder of the built engine.
        sent: told of bytes that went to the phone.
        step: told of every test that is done.

    Raises:
        DeviceError: the phone is gone, or the engine failed there.
        DiskFull: the phone has no room.
    """
    device, tests, model = plan.device, plan.tests, plan.artifact.files["model"]
    rows: list[dict[str, Any]] = []
    measured = None
    with device.staging() as folder:
        device.push(engine / plan.variant / BENCH, f"{folder}/{BENCH}", sent, 0o755)
        device.push(model, f"{folder}/model.gguf", sent)
        before = device.state()
        run = _Run(device, folder, plan.cores, step)
        try:
            rows += run.rows(["-p", tests.prompt, "-n", 0, "-r", plan.repeats])
            rows += run.rows(["-p", 0, "-n", tests.answer, "-d", tests.prompt if tests.chained else 0, "-r", plan.repeats])
            if plan.sustained:
                speed = tests.answer * _NS / median(rows[1]["samples_ns"])
                times = max(2, math.ceil(plan.sustained * speed / SUSTAINED_TOKENS))
                rows += run.rows(["-p", 0, "-n", SUSTAINED_TOKENS, "-r", times])
            measured = _measured(rows[0], rows[1], rows[2:], run.peak, tests)
        except _OutOfMemory:
            pass
        after = device.state()
    return OnDevice(
        artifact=plan.artifact.main,
        quant=plan.artifact.quant,
        bytes=model.stat().st_size,
        phone=device.describe(),
        variant=plan.variant,
        protocol=plan.protocol,
        cores=plan.cores,
        pinned=run.pinned,
        measured=measured,
        before=before,
        after=after,
        raw=rows,
    )


class _OutOfMemory(Exception):
    """The phone has not enough memory for the model."""


class _Run:
    """Runs of llama-bench in one folder of one phone."""

    def __init__(self, device: Device, folder: str, cores: list[int], step: Callable[[str], object]) -> None:
        self._device, self._folder, self._step = device, folder, step
        mask = f"0x{sum(1 << core for core in cores):x}"
        self._common = f"-m model.gguf -t {len(cores)} -C {mask} --cpu-strict 1 -lm none -o jsonl --progress"
        self.peak, self.pinned = 0, True

    def rows(self, options: list[str | int]) -> list[dict[str, Any]]:
        """Return the rows of a run.

        Raises:
            _OutOfMemory: the phone ended it for its memory, or gave none.
            DeviceError: it failed.
        """
        found: list[str] = []
        complaint = ""

        def line(text: str) -> None:
            nonlocal complaint
            memory = re.match(r"VmHWM:\s+(\d+) kB", text)
            done = re.match(r"llama-bench: benchmark \d+/\d+: (\w+) run (\d+)/\d+", text)
            if text.startswith("{"):
                found.append(text)
            elif memory:
                self.peak = max(self.peak, int(memory[1]) * 1024)
            elif done:
                self._step(f"{done[1]} {done[2]}")
            elif "failed to set affinity" in text:
                self.pinned = False
            elif text.strip() and not text.startswith("llama-bench: benchmark"):
                complaint = text.strip()

        command = f"./{BENCH} {self._common} {' '.join(map(str, options))} 2>&1 > rows"
        # The high-water mark of its memory is asked for as long as it runs: afterwards nobody knows it. The rows come last, in one piece.
        watch = "while kill -0 $p 2>/dev/null; do grep VmHWM /proc/$p/status 2>/dev/null; sleep 0.5; done"
        status = self._device.stream(
            f"cd {self._folder} && {{ {command} & p=$!; echo $p > pid; {watch}; wait $p; s=$?; cat rows; (exit $s); }}", line
        )
        if status == _KILLED or re.search("failed to (load model|create context)", complaint):
            raise _OutOfMemory
        try:
            rows = [json.loads(text) for text in found]
        except ValueError:
            rows = []
        if status or not rows:
            raise DeviceError(f"The engine failed on the phone ({complaint or f'exit status {status}'}).")
        return rows


def _measured(prefill: dict[str, Any], decode: dict[str, Any], long: list[dict[str, Any]], peak: int, tests: Tests) -> Measured:
    seconds = [ns / _NS for ns in prefill["samples_ns"]]
    return Measured(
        load=None,
        first_token=median(seconds),
        prefill=[tests.prompt / one for one in seconds],
        decode=[tests.answer * _NS / ns for ns in decode["samples_ns"]],
        token_p90=None,
        sustained=[SUSTAINED_TOKENS * _NS / ns for row in long for ns in row["samples_ns"]],
        peak_rss=peak,
        crowded=None,
    )
