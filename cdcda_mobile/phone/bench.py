"""An artifact in its real runtime, with the cores and the memory of a phone: what is measured here, and what is predicted for there.

Speeds are this machine's and say so: they compare artifacts with each other. Whether a model fits is the phone's, and its speed there is
predicted.
"""

from __future__ import annotations

import json
import math
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from cdcda_export.artifact import Artifact
from cdcda_export.bundle import memory_needed
from cdcda_export.card_values import percent
from cdcda_export.errors import ConfigError, ExportError, VerificationFailed, did_you_mean
from cdcda_export.gguf import GgufFile
from cdcda_export.manifest import versions
from cdcda_mobile.phone.classes import Phone
from cdcda_mobile.phone.constrain import Outcome, choose_cores, run_constrained
from cdcda_mobile.phone.measure import Plan
from cdcda_mobile.phone.predict import Prediction, predict, work_of

_MARGIN = 0.9  # of the budget: above it a model is tight
_NINETY = 0.9
_CROWDED = 0.05  # of the time without a core: threads that wait for each other then stand still together


@dataclass(frozen=True)
class Tests:
    """What is asked of the model.

    Attributes:
        prompt: tokens of prefill.
        answer: tokens of decode.
        chained: whether decode goes on behind the prompt.
    """

    prompt: int
    answer: int
    chained: bool


PROTOCOLS = {
    "llama-bench": Tests(512, 128, chained=False),  # llama.cpp's pp512 and tg128
    "pocketpal": Tests(256, 64, chained=True),  # the app's pp256 and tg64
}


def get_protocol(name: str, repeats: int, sustained: float, threads: int) -> Tests:
    """Return a protocol, and look at the numbers that go with it.

    Raises:
        ConfigError: there is no such protocol, or a number makes no sense.
    """
    if name not in PROTOCOLS:
        raise ConfigError(f"There is no protocol '{name}'.{did_you_mean(name, PROTOCOLS)}")
    if repeats < 1 or threads < 0 or not 0 <= sustained < math.inf:
        raise ConfigError("--repeats has to be at least 1, --sustained and --threads at least 0.")
    return PROTOCOLS[name]


@dataclass(frozen=True)
class Spread:
    """Speeds of the repeats of a test, in tokens a second.

    Attributes:
        median: of the repeats.
        p90: what nine of ten reach, interpolated between repeats.
        low: the slowest.
        high: the fastest.
        repeats: how many.
    """

    median: float
    p90: float
    low: float
    high: float
    repeats: int


def spread_of(speeds: Sequence[float]) -> Spread:
    """Summarize the speeds of repeats."""
    slow = quantiles(speeds, n=10, method="inclusive")[0] if len(speeds) > 1 else speeds[0]  # its own tenth: the slow end
    return Spread(median(speeds), slow, min(speeds), max(speeds), len(speeds))


@dataclass(frozen=True)
class Measured:
    """What a run gave; speeds in tokens a second, times in seconds, sizes in bytes.

    Attributes:
        load: time until the model could be asked; None where the runtime does not say (llama-bench on a phone).
        first_token: median time from a whole prompt to its first token.
        prefill: by repeat.
        decode: by repeat.
        token_p90: time that nine of ten answered tokens stayed under; None as above.
        sustained: decode in each ten seconds or so.
        peak_rss: the most memory that was resident.
        crowded: share of the time that its threads were ready and had no core; None as above.
    """

    load: float | None
    first_token: float
    prefill: list[float]
    decode: list[float]
    token_p90: float | None
    sustained: list[float]
    peak_rss: int
    crowded: float | None

    @property
    def speeds(self) -> dict[str, Spread]:
        """Prefill and decode, summarized."""
        return {"prefill": spread_of(self.prefill), "decode": spread_of(self.decode)}

    def as_json(self) -> dict[str, Any]:
        """Return everything, with the summaries."""
        return {**asdict(self), "speeds": {test: vars(spread) for test, spread in self.speeds.items()}}


@dataclass(frozen=True)
class Bench:
    """A run on this machine.

    Attributes:
        artifact: its main file.
        format: gguf, gguf-lora or onnx.
        quant: its quantization.
        bytes: its size.
        protocol: which tests.
        phone: whose limits; '' for none.
        threads: that computed.
        memory: bytes it was held to; 0 for no limit.
        held_by: what held it.
        measured: None where there was not enough memory.
        raw: the seconds of every test.
    """

    artifact: Path
    format: str
    quant: str
    bytes: int
    protocol: str
    phone: str
    threads: int
    memory: int
    held_by: str
    measured: Measured | None
    raw: dict[str, Any]

    @property
    def unusable(self) -> str:
        """Why its speeds say nothing; '' where they do."""
        crowded = (self.measured.crowded or 0.0) if self.measured else 0.0
        if crowded <= _CROWDED:
            return ""
        return f"other processes had its cores for {percent(crowded)} of the time; run it again on a quiet machine"

    def as_json(self) -> dict[str, Any]:
        """Return everything, with the machine and the versions."""
        measured = self.measured.as_json() if self.measured else None
        return {**asdict(self), "artifact": str(self.artifact), "measured": measured, "unusable": self.unusable, **this_machine()}


def bench(
    artifact: Artifact, protocol: str, repeats: int, sustained: float, phone: Phone | None, threads: int, step: Callable[[str], None]
) -> Bench:
    """Measure an artifact on this machine.

    Args:
        artifact: a finished one.
        protocol: a key of ``PROTOCOLS``.
        repeats: of each test.
        sustained: seconds of decode without a pause.
        phone: whose cores and memory it gets; None for this machine's.
        threads: that compute; 0 for the smaller of the phone's and this machine's.
        step: told of every test that is done.

    Raises:
        ConfigError: there is no such protocol, a number makes no sense, or the phone has fewer fast cores than threads are asked for.
        VerificationFailed: something slowed the run down, so that it says nothing.
        ExportError: the runtime failed.
    """
    tests = get_protocol(protocol, repeats, sustained, threads)
    if phone and threads > phone.soc.big_cores:
        raise ConfigError(f"A {phone.name} has {phone.soc.big_cores} fast cores; --threads {threads} would make them wait for slow ones.")
    wanted = threads or (phone.soc.big_cores if phone else 0) or 10**6
    cores = choose_cores(wanted)
    memory = (phone.memory_budget.value or 0) if phone else 0
    onnx = artifact.format == "onnx"
    place = artifact.main.parent if onnx else artifact.files["model"]
    adapter = str(artifact.files["adapter"]) if "adapter" in artifact.files else ""
    plan = Plan(str(place), "onnx" if onnx else "gguf", adapter, len(cores), tests.prompt, tests.answer, tests.chained, repeats, sustained)
    result: dict[str, Any] = {}

    def line(text: str) -> None:
        row = json.loads(text)
        result.update(row.get("result", {}))
        if "step" in row:
            step(row["step"])

    outcome = run_constrained([sys.executable, "-m", "cdcda_mobile.phone.measure"], asdict(plan), cores, memory, line)
    _check(outcome, result, artifact.main)
    size = sum(path.stat().st_size for path in artifact.files.values())
    measured = None if outcome.out_of_memory else summarize(result, tests)
    key = phone.key if phone else ""
    return Bench(artifact.main, artifact.format, artifact.quant, size, protocol, key, len(cores), memory, outcome.held_by, measured, result)


def _check(outcome: Outcome, result: dict[str, Any], path: Path) -> None:
    if outcome.out_of_memory:
        return
    if outcome.status or not result:
        said = outcome.complaint.strip().splitlines()
        raise ExportError(f"The runtime failed on {path}: {said[-1] if said else f'exit status {outcome.status}'}")
    if outcome.throttled:
        raise VerificationFailed(
            f"A CPU quota stopped the run in {outcome.throttled} periods, so its speeds say nothing; run it where whole cores are free, or "
            "with fewer --threads."
        )
    if result["swapped"]:
        raise VerificationFailed("The machine moved the model to swap, so the speeds say nothing; free some memory and run it again.")


def summarize(result: dict[str, Any], tests: Tests) -> Measured:
    """Return speeds of the seconds that ``measure`` wrote."""
    tokens = sorted(seconds for repeat in result["decode"] for seconds in repeat)
    return Measured(
        load=result["load"],
        first_token=median(result["prefill"]),
        prefill=[tests.prompt / seconds for seconds in result["prefill"]],
        decode=[len(repeat) / sum(repeat) for repeat in result["decode"]],
        token_p90=tokens[min(len(tokens) - 1, int(_NINETY * len(tokens)))],
        sustained=[row["tokens"] / row["seconds"] for row in result["windows"]],
        peak_rss=result["peak_rss"],
        crowded=result["waited"] / max(1e-9, result["waited"] + result["worked"]),
    )


@dataclass(frozen=True)
class Fit:
    """Whether a model goes into an app's memory.

    Attributes:
        verdict: fits, tight, ``does not fit`` or unknown.
        needed: bytes of weights, cache and the numbers of a batch.
        budget: bytes; None where it is not known.
    """

    verdict: str
    needed: int
    budget: int | None


def fit_of(phone: Phone, file: GgufFile, size: int, context: int) -> Fit:
    """Say whether a GGUF goes into a phone's memory.

    Args:
        phone: the phone.
        file: the model.
        size: of everything that is loaded, in bytes.
        context: tokens.
    """
    needed = memory_needed(file, size, context)
    budget = phone.memory_budget.value
    if budget is None:
        return Fit("unknown", needed, None)
    return Fit("fits" if needed <= _MARGIN * budget else "tight" if needed <= budget else "does not fit", needed, budget)


def predicted(phone: Phone, artifact: Artifact, protocol: str) -> Prediction | None:
    """Return what is expected of a GGUF on a phone; None for another format, for which nothing was calibrated."""
    if artifact.format != "gguf":
        return None
    tests = PROTOCOLS[protocol]
    return predict(phone, work_of(GgufFile(artifact.files["model"])), tests.answer // 2 + tests.prompt * tests.chained)


def this_machine() -> dict[str, Any]:
    """Return the machine and the versions, for a result."""
    host = {"machine": platform.machine(), "processor": _processor(), "cores": len(choose_cores(10**6))}
    return {"host": host, "versions": versions()}


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines: Sequence[str] = cpuinfo.read_text(errors="replace").splitlines() if cpuinfo.exists() else ()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())
