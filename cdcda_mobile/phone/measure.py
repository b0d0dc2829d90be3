"""The measured process: loads an artifact in its real runtime, within its limits, and times it.

``python -m cdcda_mobile.phone.measure`` reads what to do as JSON on standard input and writes JSON lines: ``{"step": ...}`` as it goes
on, and ``{"result": ...}`` at the end. It imports the runtime alone, after it went within its limits.

llama.cpp is asked as ``llama-bench`` asks it: random tokens, no sampling, the cache emptied before each test, a short warm-up of each kind.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from cdcda_export.errors import CdcdaError, ExportError, FileError, MissingDependency
from cdcda_mobile.phone.constrain import enter, is_starved

SUSTAINED_TOKENS = 128  # of sustained decode, after which the cache is emptied: the same in every runtime, and on a phone
_WINDOW_S = 10.0
_UBATCH = 512


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        artifact: a GGUF file, or the directory of an ONNX model.
        format: ``gguf`` or ``onnx``.
        adapter: a LoRA GGUF applied at run time, '' for none.
        threads: that compute.
        prompt: tokens of prefill.
        answer: tokens of decode.
        chained: decode goes on behind the prompt (PocketPal); else from an empty cache (llama-bench).
        repeats: of each test.
        sustained: seconds of decode without a pause, 0 for none.
    """

    artifact: str
    format: str
    adapter: str
    threads: int
    prompt: int
    answer: int
    chained: bool
    repeats: int
    sustained: float = 0.0


@dataclass
class Timings:
    """What was measured, in seconds; speeds follow from it.

    Attributes:
        load: until the model can be asked.
        prefill: of the whole prompt, one for each repeat; also the time to the first token.
        decode: of every answered token, by repeat.
        resident: bytes in memory after each repeat: a leak would show.
        windows: ``tokens`` and ``seconds`` of sustained decode, about ten seconds each.
        peak_rss: bytes.
        swapped: bytes.
        waited: seconds that its threads were ready and had no core, because something else ran there.
        worked: seconds that they computed.
    """

    load: float = 0.0
    prefill: list[float] = field(default_factory=list)
    decode: list[list[float]] = field(default_factory=list)
    resident: list[int] = field(default_factory=list)
    windows: list[dict[str, float]] = field(default_factory=list)
    peak_rss: int = 0
    swapped: int = 0
    waited: float = 0.0
    worked: float = 0.0


class Engine(Protocol):
    """A loaded model."""

    vocabulary: int
    first: int | None

    def clear(self) -> None:
        """Empty the cache."""

    def read(self, ids: Sequence[int]) -> None:
        """Read tokens behind those that were read, and wait until it is done."""


class LlamaEngine:
    """llama.cpp, below the conveniences of its Python classes.

    Args:
        path: the GGUF file.
        adapter: a LoRA GGUF, '' for none.
        threads: that compute.
        context: tokens that fit.

    Raises:
        MemoryError: there is no room for the model or its cache.
        ExportError: llama.cpp does not take the files.
    """

    def __init__(self, path: Path, adapter: str, threads: int, context: int) -> None:
        import llama_cpp

        from cdcda_export.runtime import keep_log_to_ourselves

        self._llama = llama_cpp
        keep_log_to_ourselves(aloud=True)
        llama_cpp.llama_backend_init()
        model = llama_cpp.llama_model_default_params()
        model.load_mode = llama_cpp.LLAMA_LOAD_MODE_NONE  # read, not mapped: what the kernel may drop is not memory that is needed
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), model)
        if not self._model:
            raise self._failure("the model")
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch = context, max(_UBATCH, context), _UBATCH
        settings.n_threads = settings.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(self._model, settings)
        if not self._context:
            raise self._failure("the cache")
        if adapter:
            lora = llama_cpp.llama_adapter_lora_init(self._model, adapter.encode())
            if not lora:
                raise self._failure("the adapter")
            adapters = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(lora)
            llama_cpp.llama_set_adapters_lora(self._context, adapters, 1, (ctypes.c_float * 1)(1.0))
        words = llama_cpp.llama_model_get_vocab(self._model)
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(words)
        self.first = llama_cpp.llama_vocab_bos(words) if llama_cpp.llama_vocab_get_add_bos(words) else None

    def _failure(self, what: str) -> Exception:
        """Return what to raise where llama.cpp gave nothing: its log tells a lack of memory from a damaged file."""
        from cdcda_export.runtime import last_words

        if is_starved("\n".join(last_words())):
            return MemoryError(f"failed to allocate {what}")
        said = [line for line in last_words() if "error" in line.lower() or "failed" in line.lower()]
        return ExportError(f"llama.cpp does not load {what} ({said[0] if said else 'no reason given'})")

    def clear(self) -> None:
        """Empty the cache."""
        self._llama.llama_memory_clear(self._llama.llama_get_memory(self._context), True)

    def read(self, ids: Sequence[int]) -> None:
        """Read tokens and wait until it is done."""
        tokens = (ctypes.c_int32 * len(ids))(*ids)
        code = self._llama.llama_decode(self._context, self._llama.llama_batch_get_one(tokens, len(ids)))
        if code:
            raise RuntimeError(f"llama_decode returned {code}")
        self._llama.llama_synchronize(self._context)


class OnnxEngine:
    """ONNX Runtime; the cache is a value that each run returns.

    Args:
        directory: of the model.

    Raises:
        MemoryError: there is no room for the model.
        FileError: it is damaged.
    """

    first: int | None = None

    def __init__(self, directory: Path) -> None:
        from cdcda_export.onnx_runtime import OnnxModel

        try:
            self._model = OnnxModel(directory)
        except (FileError, MissingDependency) as error:  # damaged or not installed: said whatever the reason was
            if is_starved(str(error.__cause__)):
                raise MemoryError("failed to allocate the model") from error
            raise
        self.vocabulary = self._model.vocabulary
        self.clear()

    def clear(self) -> None:
        """Empty the cache."""
        self._past, self._seen = self._model.empty(), 0

    def read(self, ids: Sequence[int]) -> None:
        """Read tokens."""
        _, self._past = self._model.step(list(ids), self._past, self._seen)
        self._seen += len(ids)


def measure(plan: Plan, say: Callable[[str], None]) -> Timings:
    """Load the artifact and time it.

    Args:
        plan: what to do.
        say: told of every test that is done.

    Raises:
        MemoryError: there is no room.
        CdcdaError: the runtime does not take the artifact.
    """
    found, started = Timings(), time.perf_counter()
    engine: Engine
    if plan.format == "gguf":
        engine = LlamaEngine(Path(plan.artifact), plan.adapter, plan.threads, max(plan.prompt + plan.answer, SUSTAINED_TOKENS))
    else:
        engine = OnnxEngine(Path(plan.artifact))
    found.load = time.perf_counter() - started
    say("load")
    chance = random.Random(0)

    def tokens(count: int) -> list[int]:
        return [chance.randrange(engine.vocabulary) for _ in range(count)]

    def opening(count: int) -> list[int]:
        drawn = tokens(count)
        return drawn if engine.first is None else [engine.first, *drawn[1:]]

    def timed(ids: Sequence[int]) -> float:
        begin = time.perf_counter()
        engine.read(ids)
        return time.perf_counter() - begin

    for ids in (opening(min(plan.prompt, 64)), tokens(1)):  # the first of each kind pays for what is set up once
        engine.read(ids)
    for _ in range(plan.repeats):
        engine.clear()
        found.prefill.append(timed(opening(plan.prompt)))
        if not plan.chained:
            engine.clear()
        found.decode.append([timed(opening(1) if step == 0 and not plan.chained else tokens(1)) for step in range(plan.answer)])
        found.resident.append(_status("VmRSS"))
        say("repeat")
    _sustain(plan, engine, found, timed, tokens, say)
    found.peak_rss, found.swapped = _status("VmHWM"), _status("VmSwap")
    found.worked, found.waited = _scheduled()
    return found


def _sustain(
    plan: Plan,
    engine: Engine,
    found: Timings,
    timed: Callable[[Sequence[int]], float],
    tokens: Callable[[int], list[int]],
    say: Callable[[str], None],
) -> None:
    """Decode without a pause."""
    seen = SUSTAINED_TOKENS
    for _ in range(windows_of(plan.sustained)):
        spent, count = 0.0, 0
        while spent < _WINDOW_S:
            if seen == SUSTAINED_TOKENS:
                engine.clear()
                seen = 0
            spent += timed(tokens(1))
            seen, count = seen + 1, count + 1
        found.windows.append({"tokens": count, "seconds": spent})
        say("window")


def windows_of(sustained: float) -> int:
    """Return how many windows so many seconds of sustained decode have; what was asked for is never nothing."""
    return math.ceil(sustained / _WINDOW_S)


def _status(name: str) -> int:
    """Return a field of this process' status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return 0


def _scheduled() -> tuple[float, float]:
    """Return the seconds that this process' threads computed and waited for a core (Documentation/scheduler/sched-stats.rst of Linux)."""
    totals = [0, 0]
    for task in Path("/proc/self/task").iterdir():
        for at, nanoseconds in enumerate((task / "schedstat").read_text().split()[:2]):
            totals[at] += int(nanoseconds)
    return totals[0] / 1e9, totals[1] / 1e9


def main() -> int:
    """Do what standard input says."""
    given = json.load(sys.stdin)
    limits = given.pop("limits")
    enter(limits["cores"], limits["memory"])
    os.environ["GGML_NO_BACKTRACE"] = "1"  # where ggml aborts, it would start a debugger that writes between our lines

    def write(row: dict[str, Any]) -> None:
        print(json.dumps(row), flush=True)

    try:
        found = measure(Plan(**given), lambda step: write({"step": step}))
    except MemoryError as error:
        print(f"out of memory: {error}", file=sys.stderr)
        return 1
    except CdcdaError as error:
        print(error, file=sys.stderr)
        return 1
    write({"result": asdict(found)})
    return 0


if __name__ == "__main__":
    sys.exit(main())
