"""llama.cpp's own server as the local teacher: how it is found, built, started and lost; a small program speaks its protocol."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cdcda_export.base import default_base
from cdcda_export.cache import cache_folder
from cdcda_export.converter import SDIST_VARIABLE, converter_version
from cdcda_export.errors import BuildError, CdcdaError, ConfigError, DiskFull, FileError, TeacherError
from cdcda_export.progress import Silent
from cdcda_mobile.augmentation.augment import augment
from cdcda_mobile.config import AugmentConfig, HistoryConfig, TeacherConfig
from cdcda_mobile.history import read_history, split_by_time
from cdcda_mobile.teachers.endpoint import OpenAITeacher
from cdcda_mobile.teachers.local_teacher import LocalTeacher, local_server
from cdcda_mobile.teachers.native_server import OFF, SERVER_VARIABLE, build_native_server, native_server, server_command
from cdcda_mobile.teachers.teacher import NATIVE_SAMPLING, Request, hire

FAKE = """#!{python}
import http.server, json, os, sys, threading, time
args = sys.argv[1:]
if "--help" in args:
    sys.exit(print("{help}"))
{before}
running, most, lock = 0, 0, threading.Lock()
began = time.monotonic()
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def log_message(self, *_):
        pass
    def send(self, status, body):
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
    def do_GET(self):
        loading = self.path != "/health" or time.monotonic() < began + 0.1
        self.send(503 if loading else 200, {{"error": {{"message": "Loading model"}}}} if loading else {{"status": "ok"}})
    def do_POST(self):
        global running, most
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.headers["Authorization"] != "Bearer " + os.environ["LLAMA_API_KEY"]:
            return self.send(401, {{"error": {{"message": "Invalid API Key"}}}})
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.1)
        with lock:
            running -= 1
        names = sorted(n for n in os.environ if n.startswith(("LLAMA_", "AIP_", "OPENAI_", "HF_")))
        seen = {{"args": args, "names": names, "body": body, "peer": self.client_address[1], "most": most}}
        usage = {{"prompt_tokens": 7, "completion_tokens": 5}}
        self.send(200, {{"choices": [{{"message": {{"content": json.dumps(seen)}}}}], "usage": usage}})
server = http.server.ThreadingHTTPServer((args[args.index("--host") + 1], int(args[args.index("--port") + 1])), Handler)
print(f"0.00.011 I srv  llama_server: listening on http://127.0.0.1:{{server.server_address[1]}}", file=sys.stderr, flush=True)
server.serve_forever()
"""
OPTIONS = " ".join(word for word in server_command(Path(), Path(), "", 1, 1, 1) if word.startswith("--"))


def fake(path: Path, before: str = "", options: str = OPTIONS) -> Path:
    """A program that passes for llama-server; ``before`` is what it does first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(FAKE.format(python=sys.executable, before=before, help=options))
    path.chmod(0o755)
    return path


def request(text: str = "hello", seed: int = 3) -> Request:
    schema = {"type": "object", "properties": {"input": {"type": "string"}}, "required": ["input"], "additionalProperties": False}
    return Request(({"role": "user", "content": text},), schema, seed, 0.9, 0.95, 60)


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    return path


@pytest.fixture(autouse=True)
def own_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache, no endpoint, and no llama-server that this machine may have."""
    monkeypatch.delenv(SERVER_VARIABLE, raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.setenv("CDCDA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")


# Finding it.


def test_one_that_is_named_is_taken_or_an_error(tmp_path: Path, gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SERVER_VARIABLE, str(fake(tmp_path / "mine")))
    assert native_server() == tmp_path / "mine"
    (tmp_path / "mine").chmod(0o644)
    with pytest.raises(ConfigError, match="mine, which is no program; name a llama-server, or 'off'"):
        native_server()
    with pytest.raises(ConfigError), hire(TeacherConfig(), gguf, 0, Silent(), threading.Event()):
        pass


def test_one_on_the_path_is_taken_if_it_knows_our_options_and_off_means_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert native_server() is None
    on_path = fake(tmp_path / "bin" / "llama-server")
    assert native_server() == on_path
    fake(on_path, options=OPTIONS.replace("--reasoning-format", "--reasoning-formats"))
    assert native_server() is None
    fake(on_path)
    monkeypatch.setenv(SERVER_VARIABLE, OFF)
    assert native_server() is None


# Building it. The tools are scripts; what they are told is what the real ones would be.

CMAKE = """
args = sys.argv[1:]
source, target = (pathlib.Path(args[args.index(name) + 1]) for name in ("-S", "-B"))
assert "-DGGML_NATIVE=ON" in args and "-DBUILD_SHARED_LIBS=OFF" in args
assert (source / "tools" / "server" / "server.cpp").read_text() == "int main;" and not (source / "docs").exists()
target.mkdir()
"""
NINJA = """
target = pathlib.Path(sys.argv[sys.argv.index("-C") + 1])
open({ran!r}, "a").write("x")
print("[1/2] Building CXX object server.cpp.o", flush=True)
time.sleep({pause})
{fails}
print("[2/2] Linking CXX executable bin/llama-server", flush=True)
(target / "bin").mkdir()
(target / "bin" / "llama-server").write_text("#!/bin/sh")
(target / "bin" / "llama-server").chmod(0o755)
"""


def sources(path: Path, leave_out: str = "-") -> Path:
    """A source distribution as small as can be."""
    root = f"llama_cpp_python-{converter_version()}/vendor/llama.cpp"
    with tarfile.open(path, "w:gz") as archive:
        for name in ("CMakeLists.txt", "LICENSE", "tools/server/server.cpp", "docs/build.md"):
            if not name.startswith(leave_out):
                member = tarfile.TarInfo(f"{root}/{name}")
                member.size = 9
                archive.addfile(member, io.BytesIO(b"int main;"))
    return path


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Lays out cmake, ninja and the sources; returns the file in which ninja notes its runs."""

    def lay_out(fails: str = "", pause: float = 0.0) -> Path:
        ran = tmp_path / "ran"
        folder = tmp_path / "tools"
        folder.mkdir(exist_ok=True)
        for name, body in (("cmake", CMAKE), ("ninja", NINJA.format(ran=str(ran), fails=fails, pause=pause))):
            (folder / name).write_text(f"#!{python}\nimport pathlib, sys, time\n{body}")
            (folder / name).chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(folder / "python"))
        monkeypatch.setenv(SDIST_VARIABLE, str(sources(tmp_path / "sources.tar.gz")))
        return ran

    python = sys.executable
    return lay_out


class Bar(Silent):
    """Remembers its steps."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[list[Any]] = []

    def start(self, label: str, total: int | None = None, unit: str = "") -> None:
        self.steps.append([label, total, 0])

    def advance(self, n: int = 1, note: str = "") -> None:
        self.steps[-1][2] += n


def test_it_is_built_once_found_from_then_on_and_nothing_else_is_left(tools: Callable[..., Path]) -> None:
    ran, bar = tools(), Bar()
    built = build_native_server(bar)
    assert bar.steps[-1] == ["compiling llama.cpp's server", 2, 2]
    assert built == native_server() == build_native_server(Silent()) and os.access(built, os.X_OK)
    assert ran.read_text() == "x"
    assert sorted(path.name for path in built.parent.iterdir()) == ["facts.json", "llama-server"]
    assert "[2/2]" in (built.parent.parent / "build.log").read_text()
    built.write_text("somebody else's")
    assert native_server() is None


def test_two_that_want_it_at_once_build_it_once(tools: Callable[..., Path]) -> None:
    ran, built = tools(pause=0.3), list[Path]()
    threads = [threading.Thread(target=lambda: built.append(build_native_server(Silent()))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 2 and built[0] == built[1] and ran.read_text() == "x"


@pytest.mark.parametrize(
    ("fails", "error", "says"),
    [
        ("print('a.cpp:3:1: error: no such type'); sys.exit('ninja: error: stopped')", BuildError, r"\(a.cpp:3:1: error: no such type\)"),
        ("sys.exit(3)", BuildError, r"cannot be compiled \(exit status 3\)"),
        ("sys.exit('cc1plus: fatal: No space left on device')", DiskFull, "name another folder with CDCDA_CACHE"),
    ],
)
def test_a_compile_that_fails_says_why_in_one_sentence_and_is_not_trusted(
    fails: str, error: type[CdcdaError], says: str, tools: Callable[..., Path]
) -> None:
    tools(fails)
    with pytest.raises(error, match=says) as raised:
        build_native_server(Silent())
    log = cache_folder() / "servers" / "build.log"
    assert "\n" not in str(raised.value) and "[1/2]" in log.read_text()
    assert error is DiskFull or str(log) in str(raised.value)
    assert native_server() is None and not [path for path in log.parent.iterdir() if path.is_dir()]


def test_what_is_missing_for_a_build_is_named(tools: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tools()
    sources(tmp_path / "sources.tar.gz", leave_out="tools")
    with pytest.raises(FileError, match="lacks .*tools/server"):
        build_native_server(Silent())
    (tmp_path / "tools" / "ninja").unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="needs ninja: run `pip install cmake ninja`"):
        build_native_server(Silent())


# Running it.


def test_it_is_asked_with_a_schema_a_key_and_every_sampling_option(tmp_path: Path, gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LLAMA_ARG_HOST", "AIP_MODE", "OPENAI_API_KEY", "HF_TOKEN"):
        monkeypatch.setenv(name, "x")
    teacher = LocalTeacher(gguf, "base", 5, Silent(), threading.Event(), fake(tmp_path / "server"), slots=3)
    try:
        teacher.start()
        answers = [json.loads(teacher.complete(request()).text) for _ in range(3)]
        server = teacher._server
        assert server is not None and server.key not in Path(f"/proc/{server.process.pid}/cmdline").read_text()
    finally:
        teacher.close()
    assert server.process.poll() is not None
    seen = answers[0]
    options = dict(zip(seen["args"], seen["args"][1:], strict=False))
    assert options["--model"] == str(gguf) and options["--host"] == "127.0.0.1" and options["--parallel"] == "3"
    assert options["--ctx-size"] == str(3 * 2048) and options["--alias"] == "base" and server.key not in seen["args"]
    assert seen["names"] == ["LLAMA_API_KEY"]
    assert seen["body"]["response_format"]["json_schema"]["schema"] == request().schema
    assert {name: seen["body"][name] for name in NATIVE_SAMPLING} == NATIVE_SAMPLING
    assert len({answer["peer"] for answer in answers}) == 1  # one connection served all


def test_as_many_requests_at_once_as_there_are_slots(tmp_path: Path, gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SERVER_VARIABLE, str(fake(tmp_path / "server")))
    with hire(TeacherConfig(gguf=str(gguf), concurrency=5), gguf, 0, Silent(), threading.Event()) as hired:
        assert (hired.concurrency, hired.local, hired.embedded) == (5, True, False)
        hired.teacher.start()
        seen = list[dict[str, Any]]()
        threads = [threading.Thread(target=lambda: seen.append(json.loads(hired.teacher.complete(request()).text))) for _ in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert max(answer["most"] for answer in seen) == 5


@pytest.mark.parametrize(
    ("before", "says"),
    [
        ("sys.exit('E srv  load_model: failed to load model')", "did not start: E srv  load_model: failed to load model"),
        ("time.sleep(30)", "did not start within 0.5 s"),
        ("print('listening on http://127.0.0.1:9', file=sys.stderr); sys.exit('E srv: out of memory')", "stopped at once: .*out of memory"),
    ],
)
def test_one_that_does_not_come_up_says_why_and_is_gone(before: str, says: str, tmp_path: Path, gguf: Path) -> None:
    with pytest.raises(TeacherError, match=says) as raised:
        with local_server(gguf, native=fake(tmp_path / "server", before), timeout_s=0.5 if "sleep" in before else 30):
            pass
    assert "\n" not in str(raised.value)


def test_what_is_no_program_at_all_says_so(tmp_path: Path, gguf: Path) -> None:
    (tmp_path / "server").write_bytes(b"\x00\x01")
    (tmp_path / "server").chmod(0o755)
    with pytest.raises(TeacherError, match="did not start: .*server: Exec format error"):
        with local_server(gguf, native=tmp_path / "server"):
            pass


def test_one_that_dies_says_so(tmp_path: Path, gguf: Path) -> None:
    teacher = LocalTeacher(gguf, "base", 5, Silent(), threading.Event(), fake(tmp_path / "server"))
    try:
        teacher.start()
        assert teacher._server is not None
        teacher._server.process.kill()
        teacher._server.process.wait()
        with pytest.raises(TeacherError, match="local teacher died: .*listening on"):
            teacher.complete(request())
    finally:
        teacher.close()


PARENT = """
import sys, time
from pathlib import Path
from cdcda_mobile.teachers.local_teacher import local_server
with local_server(Path(sys.argv[1]), native=Path(sys.argv[2])) as server:
    print(server.process.pid, flush=True)
    time.sleep(60)
"""


def test_it_ends_with_a_killed_parent(tmp_path: Path, gguf: Path) -> None:
    command = [sys.executable, "-c", PARENT, str(gguf), str(fake(tmp_path / "server"))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as parent:
        assert parent.stdout is not None
        child = Path("/proc", parent.stdout.readline().strip())
        assert str(tmp_path / "server") in (child / "cmdline").read_text()
        parent.send_signal(signal.SIGKILL)
        parent.wait(20)
    until = time.monotonic() + 10
    while child.exists() and "Z" not in (child / "stat").read_text().rpartition(")")[2] and time.monotonic() < until:
        time.sleep(0.02)
    assert time.monotonic() < until


# The real one.


@pytest.mark.model
def test_the_real_server_answers_in_json_several_at_once(llama_server: Path) -> None:
    texts = dict[int, str]()
    teacher = LocalTeacher(default_base(), "base", 120, Silent(), threading.Event(), llama_server, slots=3)
    try:
        teacher.start()

        def ask(seed: int) -> None:
            texts[seed] = teacher.complete(request("Write a sentence about the sea as JSON with the field input.", seed)).text

        threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(set(texts.values())) == 3 and all(list(json.loads(text)) == ["input"] for text in texts.values())
        server = teacher._server
        assert server is not None
        with pytest.raises(TeacherError, match="does not accept"):
            OpenAITeacher(server.base_url, "base", key="wrong").complete(request())
    finally:
        teacher.close()


@pytest.mark.model
def test_augmentation_with_the_real_server_and_a_second_run_starts_nothing(
    llama_server: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SERVER_VARIABLE, str(llama_server))
    split = split_by_time(read_history("42", HistoryConfig()), HistoryConfig())

    def once() -> tuple[Any, bytes]:
        result = augment(
            tuple(split.train), (*split.validation, *split.test), "42", AugmentConfig(keep=2), TeacherConfig(), default_base(), 0,
            tmp_path / "stage.partial", tmp_path / "answers.jsonl", Silent(),
        )  # fmt: skip
        return result, (tmp_path / "stage.partial" / "kept.jsonl").read_bytes()

    first, written = once()
    assert first.embedded and len(first.kept) == 2
    second, again = once()
    assert second.paid_requests == 0 and again == written
