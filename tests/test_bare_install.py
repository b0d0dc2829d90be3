"""The bare install in a virtual environment of its own: an adapter becomes a verified GGUF where there is no torch."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tiny import make_adapter, make_gguf

ROOT = Path(__file__).resolve().parent.parent


def _wheel_folder() -> Path:
    """Where set-up keeps the llama.cpp wheel of this machine."""
    spec = importlib.util.spec_from_file_location("llama_wheel", ROOT / "scripts" / "llama_wheel.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["llama_wheel"] = module
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(ROOT / "scripts"))
    version = module.pinned_version((ROOT / "constraints.txt").read_text())
    return Path(module.cache_folder(os.environ)) / module.key_of_this_machine(version, os.environ).digest()


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin directory of a virtual environment with the bare install."""
    folder = tmp_path_factory.mktemp("bare")
    uv = Path(sys.executable).with_name("uv")
    assert uv.exists(), "set-up puts uv into the environment; run `make test`"
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("COV", "VIRTUAL_ENV", "PYTHONPATH"))}
    subprocess.run([uv, "venv", "-q", "--python", sys.executable, folder / "venv"], check=True, env=environment)
    command = [uv, "pip", "install", "-q", "--python", folder / "venv" / "bin" / "python", "-c", ROOT / "constraints.txt"]
    subprocess.run([*command, "--find-links", _wheel_folder(), str(ROOT)], check=True, env=environment)
    return folder / "venv" / "bin"


def _run(*command: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("COV", "PYTHONPATH"))}
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, cwd=cwd, env=environment, check=False)


def test_there_is_no_torch_and_an_adapter_is_exported_and_verified(bare: Path, tmp_path: Path) -> None:
    missing = _run(bare / "python", "-c", "import torch", cwd=tmp_path)
    assert "No module named 'torch'" in missing.stderr
    base = make_gguf(tmp_path / "tiny.gguf")
    make_adapter(tmp_path / "adapter", base)
    (tmp_path / "own.txt").write_text(
        "The lock keeper sleeps until nine and the geese know it.\n\nNobody has paid for the winch in a year.\n"
    )
    common = ["--adapter", "adapter", "--base", "tiny.gguf", "--quant", "q8_0", "--json", "--quiet"]
    done = _run(bare / "cdcda-export", *common, "--format", "gguf", "--text", "own.txt", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    card = json.loads(done.stdout)
    assert card["verification"]["passed"]
    assert card["verification"]["reference"] == "merged model in float32 (llama.cpp)"
    assert card["personal_gain"] is None
    assert (tmp_path / card["artifact"]["file"]).exists()
    lora = _run(bare / "cdcda-export", *common, "--format", "gguf-lora", cwd=tmp_path)
    assert lora.returncode == 0, lora.stderr
    said = _run(bare / "cdcda", "chat", "runs/_adapters/adapter/gguf-q8_0", "--prompt", "hello", cwd=tmp_path)
    assert said.returncode == 0, said.stderr


def test_what_needs_more_names_the_install_line(bare: Path, tmp_path: Path) -> None:
    base = make_gguf(tmp_path / "tiny.gguf")
    make_adapter(tmp_path / "adapter", base)
    onnx = _run(bare / "cdcda-export", "--adapter", "adapter", "--base", base, "--format", "onnx", cwd=tmp_path)
    assert onnx.returncode == 1
    assert "pip install 'cdcda-mobile[" in onnx.stderr
    job = _run(bare / "cdcda-export", "--user", "42", cwd=tmp_path)
    assert job.returncode == 1
    assert "pip install 'cdcda-mobile[train]'" in job.stderr
    doctor = _run(bare / "cdcda", "doctor", cwd=tmp_path)
    assert "MISSING" in doctor.stdout
