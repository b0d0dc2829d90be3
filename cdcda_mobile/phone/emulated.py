"""The phone's own engine on this machine, under QEMU: does ARM's arithmetic give what this machine's gives? Its speed says nothing.

KL divergence and agreement come from llama.cpp's own llama-perplexity: the build for this machine writes its probabilities, the build for
phones reads the same tokens and compares. What a phone answers is asked of its llama-server, over a unix socket as in the app.
"""

from __future__ import annotations

import http.client
import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from cdcda_engine.build import PERPLEXITY, SERVER
from cdcda_engine.variants import VARIANTS
from cdcda_export.errors import ConfigError, ExportError
from cdcda_export.runtime import LlamaCpp, cpu_threads
from cdcda_export.verify import neutral_texts

_CONTEXT, _CHUNKS = 128, 4  # llama-perplexity looks at the second half of each chunk
_ANSWER = 16
STEPS = 5
# A line of llama-perplexity's: chunk, perplexity, ln of its ratio, KL divergence, RMS of the change, same top token; means up to there.
_CHUNK = re.compile(r"^\s*\d+" + 2 * r"\s+\S+ ±\s+\S+" + r"\s+(\S+) ±\s+\S+\s+\S+ ±\s+\S+ %\s+(\S+) ±", re.MULTILINE)
_START_S, _ASK_S = 300.0, 600.0
# A processor of QEMU's that has what the variant needs and nothing newer.
CPUS = {"arm64-v8": "cortex-a53", "arm64-dotprod": "cortex-a76", "arm64-i8mm": "max"}


@dataclass(frozen=True)
class Agreement:
    """How far the phone's probabilities are from this machine's.

    Attributes:
        kl: mean over positions, in nats.
        same_top: share of positions with the same most likely token.
    """

    kl: float
    same_top: float


@dataclass(frozen=True)
class Emulated:
    """What the phone's engine gave.

    Attributes:
        variant: of the engine.
        cpu: that QEMU played.
        positions: that were compared.
        repacked: with the kernels that rearrange the weights at load, as phones run it.
        plain: without them.
        equal: greedy tokens that were the same from the start with the repacked kernels, of each prompt.
        equal_plain: the same without them.
        asked: greedy tokens that this machine gave, of each prompt.
    """

    variant: str
    cpu: str
    positions: int
    repacked: Agreement
    plain: Agreement
    equal: list[int]
    equal_plain: list[int]
    asked: list[int]


def qemu() -> Path:
    """Return QEMU's user emulator for 64-bit ARM.

    Raises:
        ConfigError: it is not there.
    """
    for name in ("qemu-aarch64-static", "qemu-aarch64"):
        found = shutil.which(name)
        if found:
            return Path(found)
    raise ConfigError("The phone's engine runs here under QEMU, which is not installed: `apt install qemu-user-static`.")


def check_variant(name: str) -> None:
    """Look whether there is such a build.

    Raises:
        ConfigError: there is not.
    """
    if name not in CPUS:
        raise ConfigError(f"There is no ARM variant '{name}'; one of: {', '.join(CPUS)}.")


def emulate(model: Path, engine: Path, variant: str, prompts: Sequence[str], step: Callable[[str], object]) -> Emulated:
    """Let the phone's engine execute a model and compare it with this machine's.

    Args:
        model: a GGUF file.
        engine: the folder of the built engine.
        variant: which build; one for ARM.
        prompts: rendered prompts, at least one, of which the greedy answers are compared.
        step: told of every step; there are ``STEPS``.

    Raises:
        ConfigError: QEMU is not there, there is no such variant, or the engine has no build for this machine.
        ExportError: the engine failed.
    """
    check_variant(variant)
    arm = _arm(variant)
    with TemporaryDirectory(prefix="cdcda-emulated-") as place:
        text, logits = Path(place) / "text.txt", Path(place) / "logits"
        paragraphs = neutral_texts()
        # There and back: some 360 tokens are too few, and in another order a paragraph has another context.
        text.write_text("\n\n".join([*paragraphs, *paragraphs[::-1]]), encoding="utf-8")
        common = ["-m", str(model), "-f", str(text), "-c", str(_CONTEXT), "-b", str(_CONTEXT), "--chunks", str(_CHUNKS)]
        common += ["-t", str(cpu_threads()), "--kl-divergence-base", str(logits)]
        said = _say([*_host(engine), *common])
        if not logits.exists() or "Final estimate" not in said:
            raise ExportError(
                f"llama-perplexity read too little of {model}: its tokenizer makes {_CONTEXT * _CHUNKS} tokens of no such text."
            )
        step("this machine")
        ids, ours = _greedy(model, prompts)
        found: list[Agreement] = []
        equal: list[list[int]] = []
        for kernels, options in (("repacked", ()), ("plain", ("--no-repack",))):
            found.append(agreement_of(_say([*arm, str(engine / variant / PERPLEXITY), *common, "--kl-divergence", *options])))
            step(f"{kernels} kernels")
            equal.append(_equal(model, [*arm, str(engine / variant / SERVER), *options], ids, ours, Path(place) / kernels))
            step(f"greedy answers, {kernels} kernels")
    positions = _CHUNKS * (_CONTEXT // 2 - 1)
    return Emulated(variant, CPUS[variant], positions, found[0], found[1], equal[0], equal[1], [len(one) for one in ours])


def _arm(variant: str) -> list[str]:
    """Return how to start a program of a variant; it ends with this process, however that ends."""
    bound = [sys.executable, "-P", "-m", "cdcda_mobile.teachers.bound", str(os.getpid())]
    return [*bound, str(qemu()), "-cpu", CPUS[variant]]


def _host(engine: Path) -> list[str]:
    """Return how to start this machine's llama-perplexity."""
    variant = {"x86_64": "x86_64", "aarch64": "arm64-v8"}.get(platform.machine(), "")
    if variant not in VARIANTS:
        raise ConfigError(f"The engine has no build for this machine ({platform.machine()}) to compare with.")
    return [str(engine / variant / PERPLEXITY)]


def _say(command: Sequence[str]) -> str:
    """Run a program to its end and return everything it said."""
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL, check=False)
    if done.returncode:
        said = [line for line in f"{done.stdout}\n{done.stderr}".splitlines() if line.strip()]
        raise ExportError(f"{PERPLEXITY} ended with {done.returncode}: {said[-1][:200] if said else 'nothing was said'}")
    return f"{done.stdout}\n{done.stderr}"


def agreement_of(said: str) -> Agreement:
    """Read what llama-perplexity found.

    Raises:
        ExportError: it did not say it.
    """
    found = _CHUNK.findall(said)
    if not found:
        complaint = next((line for line in said.splitlines() if " E " in line), "no reason given")
        raise ExportError(f"llama-perplexity compared nothing ({complaint.strip()}).")
    kl, top = found[-1]
    return Agreement(float(kl), float(top) / 100)


def _greedy(model: Path, prompts: Sequence[str]) -> tuple[list[list[int]], list[list[int]]]:
    """Return the ids of prompts, and this machine's greedy tokens behind each."""
    with LlamaCpp(model, vocab_only=True) as words:
        ids = [words.encode(prompt) for prompt in prompts]
    with LlamaCpp(model, _room(ids)) as runtime:
        return ids, [runtime.greedy(one, _ANSWER) for one in ids]


def _room(ids: Sequence[Sequence[int]]) -> int:
    """Return the context that the longest prompt and its answer need."""
    return max(map(len, ids)) + _ANSWER + 1


def _equal(model: Path, server: Sequence[str], ids: Sequence[list[int]], ours: Sequence[list[int]], socket_path: Path) -> list[int]:
    """Return how many greedy tokens of a server are the same as this machine's from the start, of each prompt."""
    equal = []
    command = [*server, "-m", str(model), "-c", str(_room(ids)), "-t", str(cpu_threads()), "--parallel", "1"]
    with served(command, socket_path) as ask:
        for prompt, expected in zip(ids, ours, strict=True):
            asked = {"prompt": prompt, "n_predict": _ANSWER, "temperature": 0.0, "return_tokens": True, "cache_prompt": False}
            theirs = ask(asked)["tokens"]
            equal.append(
                next((at for at, (a, b) in enumerate(zip(expected, theirs, strict=False)) if a != b), min(len(expected), len(theirs)))
            )
    return equal


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=_ASK_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


@contextmanager
def served(command: Sequence[str], path: Path) -> Iterator[Callable[[Mapping[str, Any]], dict[str, Any]]]:
    """Start a llama-server on a unix socket and give what asks it for a completion.

    Args:
        command: without the socket.
        path: of the socket; its name has to end with ``.sock`` for llama-server, which is added.

    Raises:
        ExportError: it does not start, or fails.
    """
    path, said = path.with_suffix(".sock"), path.with_suffix(".log")
    with said.open("wb") as log:
        process = subprocess.Popen(
            [*command, "--host", str(path), "--no-ui", "--offline"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=log
        )

    def request(method: str, place: str, body: Mapping[str, Any] | None = None) -> tuple[int, bytes]:
        connection = _UnixConnection(path)
        try:
            connection.request(method, place, json.dumps(body) if body is not None else None, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def ask(body: Mapping[str, Any]) -> dict[str, Any]:
        status, content = request("POST", "/completion", body)
        if status != http.client.OK:
            raise ExportError(f"The phone's llama-server answered {status}: {content[:200].decode(errors='replace')}")
        return dict(json.loads(content))

    try:
        until = time.monotonic() + _START_S
        while True:
            with suppress(OSError, http.client.HTTPException):
                if request("GET", "/health")[0] == http.client.OK:
                    break
            if process.poll() is not None or time.monotonic() > until:
                lines = said.read_text(errors="replace").strip().splitlines() or [f"exit status {process.poll()}"]
                raise ExportError(f"The phone's llama-server does not start ({lines[-1][:200]}).")
            time.sleep(0.2)
        yield ask
    finally:
        process.kill()
        process.wait()
