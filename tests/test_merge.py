"""The merged file: algebra first, then llama.cpp's own tools as the reference."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from cdcda_export.adapter import read_adapter, read_peft
from cdcda_export.base import Base
from cdcda_export.base_model import load_base_model
from cdcda_export.errors import DiskFull
from cdcda_export.gguf import GgufFile
from cdcda_export.manifest import sha256_file
from cdcda_export.merge import merge_to_gguf, quantized_base
from cdcda_export.quantization import choose_types, get_quant, is_double_quantized
from tiny import make_adapter, make_gguf, merge_peft


def _merge(base: GgufFile, adapter: object, quant: str, path: Path, fallback: bool = False) -> GgufFile:
    chosen = get_quant(quant)
    merge_to_gguf(base, adapter, choose_types(base, chosen, fallback), chosen, path)
    return GgufFile(path)


def test_merged_f32_equals_transformers_and_leaves_the_rest_alone(tiny_base: Path, tmp_path: Path) -> None:
    base = GgufFile(tiny_base)
    directory = make_adapter(tmp_path / "a", tiny_base, targets=("q_proj", "k_proj", "down_proj"))
    merged = _merge(base, read_adapter(directory, base), "f32", tmp_path / "m.gguf")
    model = load_base_model(base)
    merge_peft(model, read_peft(directory))
    again = load_base_model(merged)
    for name, weights in model.state_dict().items():
        np.testing.assert_allclose(again.state_dict()[name].numpy(), weights.numpy(), atol=1e-5, err_msg=name)
    touched = {f"blk.{layer}.{part}.weight" for layer in (0, 1) for part in ("attn_q", "attn_k", "ffn_down")}
    for name in base:
        same = bytes(base[name].data) == bytes(merged[name].data)
        assert same == (name not in touched), name
    assert [base.raw_pair(k) for k in base.keys_of_metadata() if not k.startswith("general.file_type")] == [
        merged.raw_pair(k) for k in merged.keys_of_metadata() if k in base.keys_of_metadata() and not k.startswith("general.file_type")
    ]


def test_quantizing_twice_is_named(tmp_path: Path) -> None:
    base = GgufFile(make_gguf(tmp_path / "base.gguf", kind="Q4_1"))
    assert "the base was Q4_1 already" in str(is_double_quantized(base, choose_types(base, get_quant("q4_0"))))
    assert is_double_quantized(base, choose_types(base, get_quant("f16"))) is None


def test_untouched_tensors_of_the_same_type_are_copied_bit_for_bit(tmp_path: Path) -> None:
    path = make_gguf(tmp_path / "base.gguf", kind="Q4_0")
    base = GgufFile(path)
    adapter = read_adapter(make_adapter(tmp_path / "a", path, targets=("v_proj",)), base)
    merged = _merge(base, adapter, "q4_0", tmp_path / "m.gguf")
    assert bytes(merged["blk.0.attn_q.weight"].data) == bytes(base["blk.0.attn_q.weight"].data)
    assert bytes(merged["blk.0.attn_v.weight"].data) != bytes(base["blk.0.attn_v.weight"].data)


def test_the_same_inputs_give_the_same_file(llama_base: Path, llama_adapter: Path, tmp_path: Path) -> None:
    base = GgufFile(llama_base)
    adapter = read_adapter(llama_adapter, base)
    first, second = (_merge(base, adapter, "q4_0", tmp_path / f"{n}.gguf") for n in (1, 2))
    assert first.path.read_bytes() == second.path.read_bytes()


def test_no_room_is_known_before_writing(llama_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(DiskFull, match="free some space"):
        _merge(GgufFile(llama_base), None, "q8_0", tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()


def test_a_disk_that_fills_up_while_writing_leaves_nothing(llama_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskFull, match="filled up"):
        _merge(GgufFile(llama_base), None, "q8_0", tmp_path / "m.gguf")
    assert list(tmp_path.iterdir()) == []


_PEAK = """
import sys
from pathlib import Path
from cdcda_export.adapter import read_adapter
from cdcda_export.base import Base
from cdcda_export.manifest import sha256_file
from cdcda_export.merge import merge_to_gguf, quantized_base
from cdcda_export.quantization import choose_types, get_quant

def peak():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))

base, quant = Base(sys.argv[1]), get_quant("q4_0")
types = choose_types(base.file, quant)
before = peak()
kept = quantized_base(base.file, base.sha256, types, quant)
merge_to_gguf(base.file, read_adapter(sys.argv[2], base.file), types, quant, Path(sys.argv[3]), quantized=kept)
print(peak() - before)
"""


def test_memory_stays_at_three_of_the_largest_tensors_whatever_the_size(tmp_path: Path) -> None:
    """226 MB of base, of which nothing but a few tensors is ever held: neither as arrays nor as mapped pages."""
    path = make_gguf(tmp_path / "base.gguf", hidden=2048, layers=3, kind="F16")
    largest = max(int(np.prod(tensor.shape)) for tensor in GgufFile(path).values()) * 4
    adapter = make_adapter(tmp_path / "a", path, targets=("q_proj", "up_proj", "down_proj"))
    command = [sys.executable, "-c", _PEAK, str(path), str(adapter), str(tmp_path / "m.gguf")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 3 * largest < path.stat().st_size / 2


def test_memory_stays_there_with_whole_tensors_too(tmp_path: Path) -> None:
    path = make_gguf(tmp_path / "base.gguf", hidden=2048, layers=1, kind="F16")
    largest = 2048 * 4096 * 4
    adapter = make_adapter(tmp_path / "a", path, targets=("q_proj",))
    shapes = {"gate": (4096, 2048), "up": (4096, 2048), "down": (2048, 4096)}
    whole = {f"base_model.model.model.layers.0.mlp.{part}_proj.weight": np.ones(shape, np.float32) for part, shape in shapes.items()}
    save_file(whole, adapter / "adapter_model.safetensors")
    command = [sys.executable, "-c", _PEAK, str(path), str(adapter), str(tmp_path / "m.gguf")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 3 * largest


def test_untouched_tensors_come_from_the_cached_base_and_are_the_same(llama_base: Path, tmp_path: Path) -> None:
    base, quant = Base(llama_base), get_quant("q4_0")
    types = choose_types(base.file, quant)
    adapter = read_adapter(make_adapter(tmp_path / "a", llama_base, targets=("v_proj",)), base.file)
    kept = quantized_base(base.file, base.sha256, types, quant)
    assert kept.path == quantized_base(base.file, base.sha256, types, quant).path
    with_cache = merge_to_gguf(base.file, adapter, types, quant, tmp_path / "one.gguf", quantized=kept)
    without = merge_to_gguf(base.file, adapter, types, quant, tmp_path / "two.gguf")
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "two.gguf").read_bytes()
    assert with_cache.sha256 == without.sha256 == sha256_file(tmp_path / "one.gguf")
    assert (with_cache.rewritten, without.rewritten) == (2, 15)
