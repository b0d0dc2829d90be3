"""Fixtures that many tests share; the tiny models themselves are made in ``tiny.py``."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

# As the commands do, and before numpy and OpenMP are loaded: without it every test that computes is slow beside another process.
os.environ.setdefault("GOMP_SPINCOUNT", "30000")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# Where tests run several at once (pytest-xdist), each worker and all that it starts has cores of its own: threads that wait for each
# other are many times slower as soon as somebody else has one of their cores.
if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    _cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, _cores[int(worker.removeprefix("gw")) :: int(os.environ["PYTEST_XDIST_WORKER_COUNT"])] or _cores)

# A script that runs us in its background has us ignore SIGINT, and so would the commands that the tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

from cdcda_export.base import default_base
from tiny import make_adapter, make_gguf

ARCHS = ("llama", "qwen2", "qwen3", "gemma3")


@pytest.fixture(scope="session", params=ARCHS)
def tiny_base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random base of every architecture."""
    return make_gguf(tmp_path_factory.mktemp("base") / f"tiny-{request.param}.gguf", request.param)


@pytest.fixture(scope="session")
def llama_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random llama."""
    return make_gguf(tmp_path_factory.mktemp("base") / "tiny-llama.gguf")


@pytest.fixture(scope="session")
def llama_adapter(llama_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LoRA adapter of the tiny llama."""
    return make_adapter(tmp_path_factory.mktemp("adapter") / "tiny-adapter", llama_base)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real people's records and published measurements, where they are."""
    folder = os.environ.get("CDCDA_DATA")
    if not folder:
        pytest.skip("CDCDA_DATA is not set")
    return Path(folder)


@pytest.fixture(scope="session")
def real_base() -> Path:
    """The default base model, SmolLM2-135M-Instruct."""
    return default_base()


@pytest.fixture(scope="session")
def user_engine() -> Path | None:
    """The engine of phones in the user's cache folder, where ``make test`` has it built."""
    from cdcda_engine.build import engine

    return engine()


@pytest.fixture
def phone_engine(user_engine: Path | None) -> Path:
    """The engine of phones."""
    if user_engine is None:
        pytest.skip("the engine of phones is not there; run `cdcda build-engine`")
    return user_engine


@pytest.fixture(scope="session")
def user_llama_server() -> Path | None:
    """llama.cpp's own server in the user's cache folder, where ``make test`` has it built."""
    from cdcda_mobile.teachers.native_server import native_server

    return native_server()


@pytest.fixture
def llama_server(user_llama_server: Path | None) -> Path:
    """llama.cpp's own server."""
    if user_llama_server is None:
        pytest.skip("llama.cpp's own server is not there; run `cdcda build-server`")
    return user_llama_server


@pytest.fixture(scope="session", autouse=True)
def own_cache(user_llama_server: Path | None, user_engine: Path | None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep what tests derive from tiny bases out of the user's cache folder, and local teachers where answers are bitwise the same."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CDCDA_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("CDCDA_LLAMA_SERVER", "off")
        yield
