"""A teacher on this machine: a server on loopback with a local GGUF, started, health-checked and stopped by us.

Where llama.cpp's own server is there (:mod:`cdcda_mobile.teachers.native_server`), it answers several requests in one pass over the
weights; else it is llama-cpp-python's (:mod:`cdcda_mobile.teachers.teacher_server`), which answers one after the other.
"""

from __future__ import annotations

import json
import os
import queue
import re
import secrets
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import cdcda_export
import cdcda_mobile
from cdcda_export.errors import FileError, TeacherError
from cdcda_export.progress import Progress, Silent
from cdcda_mobile.teachers.teacher import Answer, Request, local_form
from cdcda_mobile.teachers.teacher_server import CONTEXT_TOKENS, KEY_VARIABLE

_START_TIMEOUT_S = 180.0
_STOP_TIMEOUT_S = 1.0  # it holds nothing that could be lost
_SHOWN_LINES = 3
_LOG_TAIL_BYTES = 4000
_WHOLE_LOG_BYTES = 1 << 20
_NATIVE_KEY_VARIABLE = "LLAMA_API_KEY"
_SETTINGS = ("LLAMA_", "AIP_")  # variables that would configure llama.cpp's server past its command line
_KEYS = ("OPENAI_API_KEY", "HF_TOKEN")  # nothing there needs them


@dataclass(frozen=True)
class LocalServer:
    """A running server; ``key`` is random and valid for this run only."""

    base_url: str
    key: str
    alias: str
    process: subprocess.Popen[str]
    log: IO[bytes]

    def tail(self, size: int) -> str:
        """Return the last bytes of the log; the process shares our place in the file, so that is not moved."""
        number = self.log.fileno()
        return os.pread(number, size, max(0, os.fstat(number).st_size - size)).decode(errors="replace")

    def last_words(self) -> str:
        """Return the last lines that the process wrote to standard error, in one line."""
        lines = [line.strip() for line in self.tail(_LOG_TAIL_BYTES).splitlines() if line.strip()]
        status = self.process.poll() or 0
        silent = f"signal {-status} and not a word; `cdcda doctor` may know why" if status < 0 else f"it said nothing, exit status {status}"
        return " / ".join(lines[-_SHOWN_LINES:]) or silent


def _import_path() -> str:
    """Return a PYTHONPATH under which the child finds the packages where this process found them."""
    roots = [str(Path(module.__file__).parent.parent) for module in (cdcda_mobile, cdcda_export) if module.__file__]
    return os.pathsep.join(dict.fromkeys([*roots, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]))


@contextmanager
def local_server(
    gguf: Path,
    alias: str = "",
    progress: Progress | None = None,
    context: int = CONTEXT_TOKENS,
    threads: int = 0,
    timeout_s: float = _START_TIMEOUT_S,
    native: Path | None = None,
    slots: int = 1,
) -> Iterator[LocalServer]:
    """Serve a GGUF on a free loopback port for the length of a ``with`` block.

    The process ends with the block whatever happens in it, and with this process however it ends. Enter it from a thread that
    lives until the end of the block: Linux binds a child's life to the thread that made it.

    Args:
        gguf: the model.
        alias: its name at the endpoint; the file's name by default.
        progress: told while the model loads.
        context: tokens of prompt and answer together.
        threads: 0 for all cores that this process may use.
        timeout_s: for loading.
        native: llama.cpp's server; None for llama-cpp-python's.
        slots: requests that llama.cpp's server answers at once.

    Raises:
        FileError: there is no such file.
        TeacherError: the server did not come up, with its last words.
    """
    if not gguf.is_file():
        raise FileError(f"There is no GGUF {gguf} for the local teacher; see --teacher-gguf.")
    key, shown, name = secrets.token_urlsafe(24), progress or Silent(), alias or gguf.name
    threads = threads or len(os.sched_getaffinity(0))
    if native:
        command, environment = _native(native, gguf, name, slots, context, threads, key)
    else:
        command, environment = _python(gguf, name, context, threads, key)
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=log if native else subprocess.PIPE,
            stderr=log,
            text=True,
            env=environment,
            start_new_session=True,  # Ctrl-C is for us; we stop the server then
        )
        try:
            shown.start("starting the local teacher")
            server = LocalServer("", key, name, process, log)
            port = _await_logged_port(server, timeout_s) if native else _await_port(server, timeout_s)
            server = LocalServer(f"http://127.0.0.1:{port}/v1", key, name, process, log)
            _await_health(server, f"http://127.0.0.1:{port}/health" if native else f"{server.base_url}/models", timeout_s)
            shown.done()
            yield server
        finally:
            _end(process)


def _environment() -> dict[str, str]:
    """Return the environment of a server. Its key is added to it, for other users of this machine can read command lines."""
    kept = {name: value for name, value in os.environ.items() if name not in _KEYS}
    # Threads that spin while they wait make one busy neighbour cost a factor of ten to thirty; sleeping ones, of two.
    kept.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    return {**kept, "PYTHONPATH": _import_path()}


def _python(gguf: Path, alias: str, context: int, threads: int, key: str) -> tuple[list[str], dict[str, str]]:
    # -P: a file html.py in the user's working directory is not the library's.
    command = [sys.executable, "-P", "-m", "cdcda_mobile.teachers.teacher_server", str(gguf), "--alias", alias]
    command += ["--parent", str(os.getpid()), "--context", str(context), "--threads", str(threads)]
    return command, {**_environment(), KEY_VARIABLE: key}


def _native(server: Path, gguf: Path, alias: str, slots: int, context: int, threads: int, key: str) -> tuple[list[str], dict[str, str]]:
    from cdcda_mobile.teachers.native_server import server_command

    bound = [sys.executable, "-P", "-m", "cdcda_mobile.teachers.bound", str(os.getpid())]
    environment = {name: value for name, value in _environment().items() if not name.startswith(_SETTINGS)}
    return bound + server_command(server, gguf, alias, slots, context, threads), environment | {_NATIVE_KEY_VARIABLE: key}


def _await_logged_port(server: LocalServer, timeout_s: float) -> int:
    """Return the port that llama.cpp's server writes into its log before it loads the model."""
    until = time.monotonic() + timeout_s
    while time.monotonic() < until:
        ended = server.process.poll() is not None
        found = re.search(r"listening on http://127\.0\.0\.1:(\d+)", server.tail(_WHOLE_LOG_BYTES))
        if found:
            return int(found[1])
        if ended:
            raise TeacherError(f"The local teacher did not start: {server.last_words()}")
        time.sleep(0.02)
    raise TeacherError(f"The local teacher did not start within {timeout_s:g} s; is the machine short of memory?")


def _await_port(server: LocalServer, timeout_s: float) -> int:
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()

    def read() -> None:
        stdout = server.process.stdout
        for line in stdout or ():
            lines.put(line)  # what comes after the port is read as well, so that the pipe never fills
        lines.put("")

    threading.Thread(target=read, daemon=True).start()
    until = time.monotonic() + timeout_s
    while True:
        try:
            line = lines.get(timeout=max(0.0, until - time.monotonic()))
        except queue.Empty:
            raise TeacherError(f"The local teacher did not start within {timeout_s:g} s; is the machine short of memory?") from None
        if not line:
            with suppress(subprocess.TimeoutExpired):
                server.process.wait(_STOP_TIMEOUT_S)
            raise TeacherError(f"The local teacher did not start: {server.last_words()}")
        try:
            return int(json.loads(line)["port"])
        except (ValueError, KeyError, TypeError):
            continue  # a library's chatter


def _await_health(server: LocalServer, url: str, timeout_s: float) -> None:
    import urllib.error
    import urllib.request

    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {server.key}"})
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    until = time.monotonic() + timeout_s
    while True:
        try:
            with direct.open(request, timeout=5) as reply:
                if reply.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            if server.process.poll() is not None:
                raise TeacherError(f"The local teacher stopped at once: {server.last_words()}") from None
            if time.monotonic() > until:
                raise TeacherError(f"The local teacher listens but does not answer after {timeout_s:g} s.") from None
        time.sleep(0.05)


def _end(process: subprocess.Popen[str]) -> None:
    process.terminate()
    try:
        process.wait(_STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()  # in the middle of an answer it listens to nothing else
        process.wait()
    finally:
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                stream.close()


class LocalTeacher:
    """The local server as a teacher; it starts with :meth:`start`, so that a run whose answers are all known starts nothing.

    Args:
        gguf: the model.
        name: identifies the model by its content.
        timeout_s: of one request.
        progress: told while the model loads.
        stop: once set, nothing is tried again.
        native: llama.cpp's server; None for llama-cpp-python's.
        slots: requests that llama.cpp's server answers at once.

    With llama-cpp-python's server an answer is a function of its request. With llama.cpp's and several slots its last bits depend on
    what is computed beside it, so the same request may be answered in other words; what was answered once is in the answer log.
    """

    def __init__(
        self,
        gguf: Path,
        name: str,
        timeout_s: float,
        progress: Progress,
        stop: threading.Event,
        native: Path | None = None,
        slots: int = 1,
    ) -> None:
        self.name = name
        self._native, self._slots = native, slots
        self._gguf, self._timeout_s, self._progress, self._stop = gguf, timeout_s, progress, stop
        self._stack = ExitStack()
        self._server: LocalServer | None = None
        self._client: Any = None

    def start(self) -> None:
        """Start the server, if it does not run yet.

        Raises:
            TeacherError: it does not come up.
        """
        if self._client is not None:
            return
        from cdcda_mobile.teachers.endpoint import OpenAITeacher

        server = local_server(self._gguf, self.name, self._progress, native=self._native, slots=self._slots)
        self._server = self._stack.enter_context(server)
        form, extra = local_form(self._native)
        self._client = OpenAITeacher(
            self._server.base_url,
            self.name,
            self._timeout_s,
            retries=1,
            stop=self._stop,
            key=self._server.key,
            first_format=form,
            extra=extra,
        )
        self._stack.callback(self._client.close)

    def complete(self, request: Request) -> Answer:
        """Answer one request.

        Raises:
            TeacherError: the server died, or failed.
        """
        if self._client is None or self._server is None:
            raise TeacherError("The local teacher was not started.")
        try:
            answer: Answer = self._client.complete(request)
        except TeacherError as error:
            if self._server.process.poll() is not None and not self._stop.is_set():
                raise TeacherError(f"The local teacher died: {self._server.last_words()}") from error
            raise
        return answer

    def close(self) -> None:
        """Stop the server."""
        self._stack.close()
