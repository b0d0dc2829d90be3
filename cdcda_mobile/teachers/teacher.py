"""The server LLM: what it is asked, what it answered, what it may cost, and who it is.

A teacher is always an OpenAI-compatible endpoint. With none configured, :mod:`cdcda_mobile.teachers.local_teacher` starts one on loopback.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from cdcda_export.errors import ConfigError, DiskFull, FileError, is_disk_full
from cdcda_export.manifest import sha256_file, sha256_json
from cdcda_export.progress import Progress
from cdcda_mobile.config import TeacherConfig

_LOCAL_CONCURRENCY = 2  # the local server answers one at a time; the second request only hides the way there
_LOCAL_TIMEOUT_S = 600.0
# llama.cpp's own sampling options, named so that another version's defaults change nothing.
LOCAL_SAMPLING = {"repeat_penalty": 1.1, "top_k": 40, "min_p": 0.05}
# llama.cpp's own server takes the chain of samplers too: this one is llama-cpp-python's.
NATIVE_SAMPLING = {
    **LOCAL_SAMPLING,
    "samplers": ["penalties", "top_k", "typ_p", "top_p", "min_p", "temperature"],
    "repeat_last_n": 64,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "typical_p": 1.0,
    "dynatemp_range": 0.0,
    "mirostat": 0,
    "cache_prompt": True,  # what a prompt has in common with the last one of its slot is not computed again
}


def local_form(native: Path | None) -> tuple[str, dict[str, Any]]:
    """Return how a local server is asked: the form of structured output, and fields that only it knows.

    Args:
        native: llama.cpp's server; None for llama-cpp-python's, which knows no ``json_schema``.
    """
    return ("json_schema", NATIVE_SAMPLING) if native else ("json_object", LOCAL_SAMPLING)


@dataclass(frozen=True)
class Request:
    """One question to a teacher; the answer is meant to be a function of it.

    ``messages`` are chat turns ``{"role", "content"}``; ``schema`` is the JSON schema that the answer must fit.
    """

    messages: tuple[dict[str, str], ...]
    schema: dict[str, Any]
    seed: int
    temperature: float
    top_p: float
    max_tokens: int

    def key(self, model: str) -> str:
        """Return the SHA-256 of everything that decides the answer, as hex."""
        return sha256_json({"model": model, **asdict(self)})


@dataclass(frozen=True)
class Answer:
    """What a teacher said, and how many tokens it counted."""

    text: str
    prompt_tokens: int
    completion_tokens: int

    @property
    def tokens(self) -> int:
        """All tokens that are paid for."""
        return self.prompt_tokens + self.completion_tokens


class Teacher(Protocol):
    """Who answers requests; safe to call from several threads."""

    name: str

    def start(self) -> None:
        """Get ready to answer; called before the first request, from the thread that outlives all others."""
        ...

    def complete(self, request: Request) -> Answer:
        """Answer one request.

        Raises:
            TeacherError: it cannot, after all retries.
        """
        ...


class Budget:
    """How much a teacher may still be asked; thread-safe.

    Requests that were answered in an earlier, interrupted run count as well: a run that resumes ends where it would have ended.

    Args:
        max_requests: 0 for no limit.
        token_budget: prompt and completion tokens, 0 for no limit. Requests under way when it is reached may pass it.
    """

    def __init__(self, max_requests: int = 0, token_budget: int = 0) -> None:
        self.max_requests, self.token_budget = max_requests, token_budget
        self._requests = self._tokens = 0
        self._lock = threading.Lock()

    def admit(self) -> bool:
        """Count one more request and return True, or return False where the budget has no room for it."""
        with self._lock:
            if self._why():
                return False
            self._requests += 1
            return True

    def spend(self, tokens: int) -> None:
        """Count the tokens of an answer."""
        with self._lock:
            self._tokens += tokens

    def exhausted(self) -> str:
        """Return which limit is reached, in words, or ''."""
        with self._lock:
            return self._why()

    def _why(self) -> str:
        if self.max_requests and self._requests >= self.max_requests:
            return f"--max-requests {self.max_requests}"
        if self.token_budget and self._tokens >= self.token_budget:
            return f"--token-budget {self.token_budget}"
        return ""


class AnswerLog:
    """Every answer that ever arrived, one JSON line each, on disk before it is used: nothing is paid twice.

    Only the user may read it. A last line that a killed process left unfinished is cut off when the log is opened.

    Args:
        path: the file; it and its directory are made where they do not exist.

    Raises:
        FileError: the file cannot be read or written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._answers: dict[str, Answer] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
            os.fchmod(self._descriptor, 0o600)
            self._load(path.read_bytes())
        except OSError as error:
            raise FileError(f"Cannot open the teacher's answers {path}: {error.strerror or error}.") from error

    def _load(self, data: bytes) -> None:
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            os.ftruncate(self._descriptor, whole)
        for line in data[:whole].splitlines():
            try:
                row = json.loads(line)
                answer = Answer(str(row["text"]), int(row["prompt_tokens"]), int(row["completion_tokens"]))
                self._answers[str(row["key"])] = answer
            except (ValueError, KeyError, TypeError):
                continue  # damaged by other hands: that one is asked again

    def get(self, key: str) -> Answer | None:
        """Return the answer to the request with this key, or None."""
        with self._lock:
            return self._answers.get(key)

    def append(self, key: str, model: str, answer: Answer, seconds: float) -> None:
        """Write an answer to disk, and wait until it is there.

        Raises:
            DiskFull: there is no room.
            FileError: it cannot be written.
        """
        line = json.dumps({"key": key, "model": model, **asdict(answer), "seconds": round(seconds, 3)}, ensure_ascii=False) + "\n"
        with self._lock:
            end = os.fstat(self._descriptor).st_size
            try:
                _write_all(self._descriptor, line.encode("utf-8", "replace"))
                os.fsync(self._descriptor)
            except OSError as error:
                os.ftruncate(self._descriptor, end)  # half a line would spoil the next one
                if is_disk_full(error):
                    raise DiskFull(f"No room left to write {self.path}; free some space and run the same command again.") from error
                raise FileError(f"Cannot write {self.path}: {error.strerror or error}.") from error
            self._answers[key] = answer

    def __len__(self) -> int:
        return len(self._answers)

    def close(self) -> None:
        """Close the file; answers can still be looked up."""
        with self._lock:
            if self._descriptor >= 0:
                os.close(self._descriptor)
                self._descriptor = -1


def _write_all(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


@dataclass(frozen=True)
class Hired:
    """A teacher with what the caller has to know of it.

    ``embedded`` says that the base model teaches itself; ``local`` that it costs this machine's time and no money.
    """

    teacher: Teacher
    concurrency: int
    local: bool
    embedded: bool


def endpoint_of(config: TeacherConfig) -> str:
    """Return the endpoint's URL, '' for the local teacher: who names a GGUF means it, whatever the environment says.

    Raises:
        ConfigError: a model is named, and no endpoint that would have it.
    """
    url = config.base_url or ("" if config.gguf else os.environ.get("OPENAI_BASE_URL", ""))
    if config.model and not url:
        raise ConfigError(
            f"--teacher-model {config.model} is a model of an endpoint, and none is named: set OPENAI_BASE_URL or --teacher-base-url "
            "(a model on this machine is named by --teacher-gguf FILE alone)."
        )
    return url


def slots_of(config: TeacherConfig) -> int:
    """Return how many requests llama.cpp's server is given at once.

    On two cores 2, 4, 8 and 16 slots differ by a tenth, 4 being the best: there the products bound it, not the memory.
    """
    return max(1, config.concurrency)


@contextmanager
def hire(config: TeacherConfig, base_gguf: Path, seed: int, progress: Progress, stop: threading.Event) -> Iterator[Hired]:
    """Give the teacher that a configuration names; a local one starts when it is first needed and stops at the end.

    Args:
        config: the endpoint, or none for the local teacher.
        base_gguf: the local teacher's model where ``config.gguf`` names no other.
        seed: of the jitter between retries.
        progress: told while the local teacher loads.
        stop: set by the caller to end retries early.

    Raises:
        ConfigError: the endpoint is no URL or only its model is named, or ``CDCDA_LLAMA_SERVER`` is no program.
        FileError: the GGUF cannot be read.
        MissingDependency: openai is not installed.
        TeacherError: the endpoint does not name its model.
    """
    from cdcda_mobile.teachers.endpoint import OpenAITeacher

    url = endpoint_of(config)
    if url:
        remote = OpenAITeacher(url, config.model, config.timeout_s, config.retries, seed=seed, stop=stop)
        try:
            yield Hired(remote, max(1, config.concurrency), local=False, embedded=False)
        finally:
            remote.close()
        return
    from cdcda_mobile.teachers.local_teacher import LocalTeacher
    from cdcda_mobile.teachers.native_server import native_server

    if os.environ.get("OPENAI_API_KEY"):
        progress.say("OPENAI_API_KEY is set but no endpoint is named (--teacher-base-url or OPENAI_BASE_URL): nothing leaves this machine.")
    gguf = Path(config.gguf) if config.gguf else base_gguf
    name = f"{gguf.name}@{sha256_file(gguf)[:12]}"
    native = native_server()
    concurrency = slots_of(config) if native else min(_LOCAL_CONCURRENCY, max(1, config.concurrency))
    local = LocalTeacher(gguf, name, max(config.timeout_s, _LOCAL_TIMEOUT_S), progress, stop, native, concurrency)
    try:
        yield Hired(local, concurrency, local=True, embedded=not config.gguf)
    finally:
        local.close()
