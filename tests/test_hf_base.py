"""Hugging Face bases: the converter is fetched once, a model is converted once, and what cannot be is refused in one sentence."""

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
from collections.abc import Callable, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from cdcda_export.base import open_base
from cdcda_export.cache import cache_folder
from cdcda_export.converter import CONVERT_LORA, CONVERT_MODEL, SDIST_VARIABLE, converter_version, converters
from cdcda_export.errors import CdcdaError, ExportError, FileError, MissingDependency, UnsupportedArchitecture
from cdcda_export.ggml import dequantize
from cdcda_export.gguf import GgufFile
from cdcda_export.hf_base import _outtype, check_directory, conversion_inputs, resolve_base
from cdcda_export.progress import Silent
from cdcda_export.runtime import LlamaCpp
from reference import convert_f32, hf_directory_of, tiny_hf

IDS = [5, 77, 120, 33, 64, 200, 9, 250] * 4
HF_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


class Steps(Silent):
    """Remembers what was said."""

    def __init__(self) -> None:
        super().__init__()
        self.labels: list[str] = []
        self.units = 0

    def start(self, label: str, total: int | None = None, unit: str = "") -> None:
        self.labels.append(label)

    def advance(self, n: int = 1, note: str = "") -> None:
        self.units += n


@pytest.fixture(scope="session")
def converter_cache() -> Path:
    """Where the converter lies; it is fetched once per machine."""
    return converters()


@pytest.fixture
def cache(converter_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of this test's own that holds the converter already."""
    folder = tmp_path / "cache"
    (folder / "converters").mkdir(parents=True)
    (folder / "converters" / converter_cache.name).symlink_to(converter_cache)
    monkeypatch.setenv("CDCDA_CACHE", str(folder))
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_hf("llama", tmp_path_factory.mktemp("hf") / "Tiny-Llama-3M")


def copy_of(directory: Path, target: Path) -> Path:
    """Copy a model's files; the weights are shared, for no test writes into them."""
    target.mkdir(parents=True)
    for path in directory.iterdir():
        if path.suffix == ".safetensors":
            os.link(path, target / path.name)
        else:
            (target / path.name).write_bytes(path.read_bytes())
    return target


# Types and tolerances: llama.cpp keeps keys and values in float16, and rounds activations to the type of the weights.
@pytest.mark.parametrize(
    ("arch", "dtype", "stored", "tolerance"),
    [("llama", "float32", {"F32"}, 0.01), ("qwen2", "bfloat16", {"BF16", "F32"}, 0.05), ("qwen3", "float16", {"F16", "F32"}, 0.01)]
    + [("gemma3", "float32", {"F32"}, 0.01)],
)
def test_a_converted_model_is_the_model(
    arch: str, dtype: str, stored: set[str], tolerance: float, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    import transformers

    from cdcda_export.base_model import load_base_model

    directory = tiny_hf(arch, tmp_path / f"tiny-{arch}", dtype)
    steps = Steps()
    base = open_base(directory, steps)
    assert (steps.labels, steps.units) == (["converting the base model (once)"], 100)
    assert base.architecture == arch
    assert set(base.type_histogram()) == stored
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        wanted = model(torch.tensor([IDS])).logits[0].numpy()
        np.testing.assert_array_equal(load_base_model(base)(torch.tensor([IDS])).logits[0].numpy(), wanted)
    with LlamaCpp(base.path, n_ctx=64) as runtime:
        got = runtime.logits(IDS)
    assert np.abs(wanted).max() > 2
    assert np.abs(got - wanted).max() < tolerance
    # the second time nothing is converted, wherever the model lies and though there is no index and no hub
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setattr(sys, "executable", "/bin/false")
    again = Steps()
    moved = directory.rename(tmp_path / "elsewhere")
    (tmp_path / "deeper").mkdir()
    assert resolve_base(moved.rename(tmp_path / "deeper" / f"tiny-{arch}"), again) == base.path
    assert again.labels == []


def test_other_weights_or_another_tokenizer_are_another_base(llama: Path, cache: Path, tmp_path: Path) -> None:
    """An entry is named by every file that the converter reads, so neither can be served in the other's place."""
    same = conversion_inputs(llama, "m")
    assert conversion_inputs(copy_of(llama, tmp_path / "copy"), "m") == same
    assert conversion_inputs(llama, "other") != same
    for name, changed in (("tokenizer_config.json", '{"bos_token": "<|im_end|>"}'), ("generation_config.json", '{"top_k": 7}')):
        other = copy_of(llama, tmp_path / name)
        (other / name).write_text(changed)
        assert conversion_inputs(other, "m") != same
    other = copy_of(llama, tmp_path / "weights")
    weights = load_file(other / "model.safetensors")
    (other / "model.safetensors").unlink()
    save_file({name: values + 1 for name, values in weights.items()}, other / "model.safetensors", {"format": "pt"})
    assert conversion_inputs(other, "m") != same


def test_mixed_types_become_float32(llama: Path, tmp_path: Path) -> None:
    save_file({"a": np.ones(2, np.float16), "b": np.ones(2, np.float32)}, tmp_path / "mixed.safetensors")
    save_file({"a": np.ones(2, np.float16)}, tmp_path / "half.safetensors")
    assert _outtype([tmp_path / "mixed.safetensors"]) == "f32"
    assert _outtype([tmp_path / "half.safetensors"]) == "f16"
    assert _outtype([tmp_path / "half.safetensors", llama / "model.safetensors"]) == "f32"


def without(name: str, directory: Path) -> None:
    (directory / name).unlink()


def with_json(name: str, changes: dict[str, Any], directory: Path) -> None:
    values = json.loads((directory / name).read_text())
    (directory / name).write_text(json.dumps(values | changes))


def as_pickle(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


def with_index(directory: Path) -> None:
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def truncated(directory: Path) -> None:
    data = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors").write_bytes(data[: len(data) // 2])


def with_weight_map(places: object, directory: Path) -> None:
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def with_offsets(offsets: object, directory: Path) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": offsets}}).encode()
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))


def as_int8(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    save_file({"model.norm.weight": np.ones(64, np.int8)}, directory / "model.safetensors")


def broken_json(directory: Path, text: str = "{") -> None:
    (directory / "config.json").write_text(text)


REFUSED: dict[str, tuple[Callable[[Path], None], type[CdcdaError], str]] = {
    "no config": (partial(without, "config.json"), FileError, "holds no config.json; name a GGUF file, or a directory"),
    "broken config": (broken_json, FileError, "not readable JSON"),
    "no weights": (partial(without, "model.safetensors"), FileError, "holds no model.safetensors"),
    "pickle": (as_pickle, FileError, "holds only pickles.*safe_serialization=True"),
    "no tokenizer": (partial(without, "tokenizer.json"), FileError, "holds no tokenizer.json or tokenizer.model"),
    "architecture": (
        partial(with_json, "config.json", {"architectures": ["MambaForCausalLM"]}),
        UnsupportedArchitecture,
        "is a MambaForCausalLM, which cannot be exported; these can: LlamaForCausalLM",
    ),
    "code": (
        partial(with_json, "tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}}),
        FileError,
        "brings code of its own .auto_map in tokenizer_config.json., which is never run",
    ),
    "quantized": (
        partial(with_json, "config.json", {"quantization_config": {"quant_method": "gptq"}}),
        FileError,
        "quantized already .gptq",
    ),
    "missing shard": (with_index, FileError, "lacks model-00002-of-00002.safetensors, which its index names"),
    "truncated": (truncated, FileError, "is truncated or no safetensors file"),
    "integers": (as_int8, FileError, "stores weights as I8"),
    "deep config": (partial(broken_json, text="[" * 100_000), FileError, "not readable JSON"),
    "architectures as a table": (
        partial(with_json, "config.json", {"architectures": {"a": 1}}),
        UnsupportedArchitecture,
        "cannot be exported; these can",
    ),
    "architectures nested": (
        partial(with_json, "config.json", {"architectures": [["LlamaForCausalLM\n"]]}),
        UnsupportedArchitecture,
        "cannot be exported; these can",
    ),
    "quantization as a text": (partial(with_json, "config.json", {"quantization_config": "gptq"}), FileError, "quantized already .gptq"),
    "no offsets": (partial(with_offsets, []), FileError, "is truncated or no safetensors file"),
    "offsets of another kind": (partial(with_offsets, [0, "x"]), FileError, "is truncated or no safetensors file"),
    "index as a list": (partial(with_weight_map, ["model.safetensors"]), FileError, "does not name the files of its weights"),
    "index nested": (partial(with_weight_map, {"a": ["model.safetensors"]}), FileError, "does not name the files of its weights"),
    "index leads out": (
        partial(with_weight_map, {"a": "../model/model.safetensors"}),
        FileError,
        "does not name the files of its weights",
    ),
    "index leads to a directory": (partial(with_weight_map, {"a": ".."}), FileError, "lacks .., which its index names"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_converted_is_refused_before_anything_runs(
    what: str, llama: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil, error, message = REFUSED[what]
    directory = copy_of(llama, tmp_path / "model")
    spoil(directory)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(error, match=message) as raised:
        resolve_base(directory, Silent())
    assert "\n" not in str(raised.value)
    assert not (cache / "bases").exists()


@pytest.mark.parametrize("name", ["x" * 5000, "/".join(["x" * 5000] * 2), "~no-such-user/model"])
def test_a_name_that_no_file_can_have_is_refused(name: str) -> None:
    with pytest.raises(FileError, match="There is no base model") as raised:
        resolve_base(name, Silent())
    assert len(str(raised.value)) < 250


def test_a_snapshot_of_links_is_read_as_the_hubs_cache_lays_it_out(llama: Path, tmp_path: Path) -> None:
    copy_of(llama, tmp_path / "blobs")
    (tmp_path / "snapshot").mkdir()
    for path in (tmp_path / "blobs").iterdir():
        (tmp_path / "snapshot" / path.name).symlink_to(path)
    check_directory(tmp_path / "snapshot")
    assert conversion_inputs(tmp_path / "snapshot", "m") == conversion_inputs(llama, "m")


def test_a_tokenizer_that_the_converter_does_not_know_is_said_in_its_words(llama: Path, cache: Path, tmp_path: Path) -> None:
    directory = copy_of(llama, tmp_path / "model")
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:100]
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ExportError, match="llama.cpp's convert_hf_to_gguf.py failed: .*pre-tokenizer was not recognized") as raised:
        resolve_base(directory, Silent())
    assert "\n" not in str(raised.value)
    assert not [path for path in (cache / "bases").iterdir() if path.is_dir()]


def test_a_gguf_is_returned_as_it_is_and_nonsense_is_a_missing_file(llama_base: Path, tmp_path: Path) -> None:
    assert resolve_base(llama_base, Silent()) == llama_base
    with pytest.raises(FileError, match="No such file"):
        open_base(tmp_path / "none.gguf")
    with pytest.raises(FileError, match="No such file"):
        open_base("models/none.gguf")


def test_a_missing_package_names_the_extra(llama: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(MissingDependency, match=r"sentencepiece.*cdcda-mobile\[hf\]"):
        resolve_base(llama, Silent())


def test_nothing_half_written_is_trusted_after_a_kill(llama: Path, cache: Path) -> None:
    code = "import sys; from cdcda_export.base import open_base; open_base(sys.argv[1])"
    process = subprocess.Popen([sys.executable, "-c", code, str(llama)], env=plain_environment(), stderr=subprocess.DEVNULL)
    began = time.monotonic()
    while not list((cache / "bases").glob("*.partial/model.gguf")) and process.poll() is None and time.monotonic() - began < 120:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it finished before it was killed"
    assert not [path for path in (cache / "bases").iterdir() if path.is_dir() and path.suffix != ".partial"]
    base = open_base(llama)
    with LlamaCpp(base.path, n_ctx=64) as runtime:
        assert runtime.logits(IDS).shape == (len(IDS), 49152)
    assert not list((cache / "bases").glob("*.partial"))
    assert not (base.path.parent / "source").exists()


@pytest.mark.model
def test_the_real_base_survives_the_way_there_and_back(real_base: Path, cache: Path, tmp_path: Path) -> None:
    """Dequantized, saved by transformers and converted, every tensor is bit for bit the dequantized one: a sound reference."""
    base, back = GgufFile(real_base), GgufFile(convert_f32(hf_directory_of(real_base, tmp_path / "hf"), tmp_path / "f32.gguf"))
    assert set(back) == set(base)
    for name, tensor in base.items():
        assert back[name].type.name == "F32"
        np.testing.assert_array_equal(back[name].data, dequantize(tensor.data, tensor.type, tensor.shape).reshape(-1).view(np.uint8))
    for key in ("tokenizer.ggml.pre", "tokenizer.ggml.tokens", "tokenizer.ggml.merges", "tokenizer.ggml.eos_token_id"):
        assert back.get_value(key) == base.get_value(key)


# The converter itself


def test_the_converter_is_kept_and_needs_no_index_again(converter_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (converter_cache / CONVERT_MODEL).is_file()
    assert (converter_cache / CONVERT_LORA).is_file()
    assert "MIT" in (converter_cache / "LICENSE").read_text()
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert converters() == converter_cache


def sdist(path: Path, version: str | None = None, leave_out: str = "none") -> Path:
    """A source distribution in miniature, with members that try to escape."""
    root = f"llama_cpp_python-{version or converter_version()}/vendor/llama.cpp"
    names = [CONVERT_MODEL, CONVERT_LORA, "LICENSE", "conversion/base.py", "gguf-py/gguf/__init__.py", "src/llama.cpp", "tests/big.bin"]
    names += ["conversion/../../../../evil.py", "conversion/../../../../../../../../tmp/evil.py"]
    with tarfile.open(path, "w:gz") as archive:
        for name in names:
            if not name.startswith(leave_out):
                member = tarfile.TarInfo(f"{root}/{name}")
                member.size = 4
                archive.addfile(member, io.BytesIO(b"MIT\n"))
        link = tarfile.TarInfo(f"{root}/conversion/link.py")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    return path


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CDCDA_CACHE", str(tmp_path / "cache"))
    return cache_folder()


def test_a_named_sdist_is_taken_and_only_what_is_needed_of_it(empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SDIST_VARIABLE, str(sdist(tmp_path / "sources.tar.gz")))
    folder = converters()
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}
    assert found == {CONVERT_MODEL, CONVERT_LORA, "LICENSE", "conversion/base.py", "gguf-py/gguf/__init__.py", "facts.json"}
    assert not list(tmp_path.rglob("evil.py"))
    assert (tmp_path / "sources.tar.gz").exists()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: sdist(path, version="0.0.1"), "lacks llama_cpp_python-.*must name llama_cpp_python-"),
        (lambda path: sdist(path, leave_out="conversion"), "lacks .*/conversion"),
        (lambda path: path.write_bytes(b"no archive"), "no readable source distribution"),
        (lambda path: path.write_bytes(sdist(path).read_bytes()[:-150]), "no readable source distribution"),
        (lambda path: None, "Cannot read"),
    ],
    ids=["another version", "incomplete", "no archive", "truncated", "missing"],
)
def test_a_wrong_sdist_is_refused(
    make: Callable[[Path], Any], message: str, empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "sources.tar.gz")
    monkeypatch.setenv(SDIST_VARIABLE, str(tmp_path / "sources.tar.gz"))
    with pytest.raises(FileError, match=message):
        converters()
    assert not [path for path in (empty_cache / "converters").iterdir() if path.is_dir()]


def test_without_an_index_or_without_pip_one_sentence_says_what_to_do(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(FileError, match=rf"Cannot fetch the sources of llama-cpp-python .*{SDIST_VARIABLE}") as raised:
        converters()
    assert "\n" not in str(raised.value)
    monkeypatch.setitem(sys.modules, "pip", None)
    with pytest.raises(FileError, match=rf"has no pip for it.*{SDIST_VARIABLE}"):
        converters()


# The hub


class FakeHub(BaseHTTPRequestHandler):
    """As much of a hub's protocol as a snapshot download speaks: one model, served from a directory."""

    model: Path
    asked: list[str]
    commit = "0123456789abcdef0123456789abcdef01234567"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        name = self.path.rsplit("/", 1)[-1]
        if self.path.startswith("/api/models/org/tiny-model/"):
            siblings = [{"rfilename": str(path.relative_to(self.model))} for path in self.model.rglob("*") if path.is_file()]
            self.answer(json.dumps({"id": "org/tiny-model", "sha": self.commit, "siblings": siblings}).encode())
        elif self.path.startswith(f"/org/tiny-model/resolve/{self.commit}/"):
            self.asked.append(name)
            self.answer((self.model / name).read_bytes(), ETag=f'"{name}"', **{"X-Repo-Commit": self.commit})
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

    def answer(self, body: bytes, **headers: str) -> None:
        self.send_response(200)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


def plain_environment(**more: str) -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("COV")} | more


@pytest.fixture
def hub(llama: Path, tmp_path: Path) -> Iterator[tuple[str, list[str]]]:
    model = copy_of(llama, tmp_path / "served")
    (model / "pytorch_model.bin").write_bytes(b"a pickle")
    (model / "modeling_evil.py").write_text("raise SystemExit('run')")
    (model / "original").mkdir()
    (model / "original" / "model.safetensors").write_bytes(b"huge")
    handler = type("Handler", (FakeHub,), {"model": model, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", handler.asked
    server.shutdown()
    server.server_close()


def resolve_in_a_process(model: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The hub's address is read when its library is imported, so each try has a process of its own."""
    code = (
        "import sys\nfrom cdcda_export.errors import CdcdaError\nfrom cdcda_export.base import open_base\n"
        "try: base = open_base(sys.argv[1]); print(base.path, base.get_value('general.name'), sep='|')\n"
        "except CdcdaError as error: sys.exit(f'{type(error).__name__}: {error}')\n"
    )
    command = [sys.executable, "-c", code, model]
    return subprocess.run(command, capture_output=True, text=True, env=plain_environment(**environment), check=False)


def test_a_hub_id_is_fetched_once_without_pickles_and_code(hub: tuple[str, list[str]], cache: Path, tmp_path: Path) -> None:
    address, asked = hub
    environment = {"HF_HOME": str(tmp_path / "hf-home"), "HF_ENDPOINT": address, "HF_HUB_DISABLE_XET": "1"}
    first = resolve_in_a_process("org/tiny-model", **environment)
    assert first.returncode == 0, first.stderr
    assert first.stdout.strip().endswith("|Tiny Model")
    assert set(HF_FILES) <= set(asked) <= {*HF_FILES, "generation_config.json"}
    asked.clear()
    again = resolve_in_a_process("org/tiny-model", **environment | {"HF_HUB_OFFLINE": "1"})
    assert again.stdout == first.stdout, again.stderr
    assert asked == []


def test_a_hub_id_that_cannot_be_fetched_is_one_sentence(hub: tuple[str, list[str]], cache: Path, tmp_path: Path) -> None:
    for endpoint in (hub[0], "http://127.0.0.1:9"):
        environment = {"HF_HOME": str(tmp_path / "hf-home"), "HF_ENDPOINT": endpoint}
        done = resolve_in_a_process("org/no-such-model", **environment)
        assert done.returncode == 1
        assert done.stderr.startswith("FileError: There is no file or directory org/no-such-model, and no model of that name"), done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
