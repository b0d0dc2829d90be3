"""Bit for bit the standard route: PEFT's merge, llama.cpp's converter and its quantizer, against our one pass."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from cdcda_export.adapter import read_adapter
from cdcda_export.base import Base
from cdcda_export.gguf import GgufFile
from cdcda_export.merge import merge_to_gguf, quantized_base
from cdcda_export.quantization import choose_types, get_quant
from reference import convert_f32, hf_directory_of, merge_with_peft, quantize_with_llama_cpp, tiny_hf
from tiny import make_adapter

QUANTS = ("f16", "q8_0", "q4_0", "q4_k_m")
_WIDE = {"hidden_size": 256, "intermediate_size": 256}  # K-quants need rows of 256


def _ours(hf: Path, adapter: Path, quant: str, path: Path) -> GgufFile:
    """Our route from the same directory: the base converted once, the adapter merged into its tensors."""
    base, chosen = Base(hf), get_quant(quant)
    types = choose_types(base.file, chosen, allow_fallback=True)
    kept = quantized_base(base.file, base.sha256, types, chosen)
    merge_to_gguf(base.file, read_adapter(adapter, base.file), types, chosen, path, quantized=kept)
    return GgufFile(path)


def _differing(ours: GgufFile, theirs: GgufFile) -> list[str]:
    assert set(ours) == set(theirs)
    return [n for n in theirs if ours[n].type != theirs[n].type or bytes(ours[n].data) != bytes(theirs[n].data)]


def _compare(hf: Path, adapter: Path, quants: tuple[str, ...], folder: Path) -> None:
    merged = convert_f32(merge_with_peft(hf, adapter, folder / "merged"), folder / "merged.gguf")
    for quant in quants:
        theirs = GgufFile(quantize_with_llama_cpp(merged, folder / f"theirs-{quant}.gguf", quant))
        ours = _ours(hf, adapter, quant, folder / f"ours-{quant}.gguf")
        assert _differing(ours, theirs) == [], quant
        assert ours.get_value("general.file_type") == theirs.get_value("general.file_type")


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3", "gemma3"])
def test_every_architecture(arch: str, tmp_path: Path) -> None:
    hf = tiny_hf(arch, tmp_path / "hf", **_WIDE)
    adapter = make_adapter(tmp_path / "adapter", Base(hf).file.path)
    _compare(hf, adapter, QUANTS, tmp_path)


def _patterns(directory: Path) -> None:
    """Another rank and alpha for some modules."""
    tensors = load_file(directory / "adapter_model.safetensors")
    for name in list(tensors):
        if "v_proj" in name:
            tensors[name] = np.ascontiguousarray(tensors[name][:2] if ".lora_A." in name else tensors[name][:, :2])
    save_file(tensors, directory / "adapter_model.safetensors")
    _configure(directory, rank_pattern={"v_proj": 2}, alpha_pattern={"layers.1.mlp.up_proj": 3.0})


def _embedding(directory: Path) -> None:
    """A low-rank change of the embedding."""
    rng = np.random.default_rng(3)
    tensors = load_file(directory / "adapter_model.safetensors")
    prefix = "base_model.model.model.embed_tokens"
    tensors[f"{prefix}.lora_embedding_A"] = rng.normal(0, 0.1, (4, 49152)).astype(np.float32)
    tensors[f"{prefix}.lora_embedding_B"] = rng.normal(0, 0.1, (64, 4)).astype(np.float32)
    save_file(tensors, directory / "adapter_model.safetensors")
    config = json.loads((directory / "adapter_config.json").read_text())
    _configure(directory, target_modules=[*config["target_modules"], "embed_tokens"])


def _saved_whole(directory: Path) -> None:
    """A norm and the embedding trained whole (``modules_to_save``)."""
    rng = np.random.default_rng(4)
    tensors = load_file(directory / "adapter_model.safetensors")
    tensors["base_model.model.model.norm.weight"] = rng.normal(1, 0.1, 64).astype(np.float32)
    tensors["base_model.model.model.embed_tokens.weight"] = rng.normal(0, 0.5, (49152, 64)).astype(np.float32)
    save_file(tensors, directory / "adapter_model.safetensors")
    _configure(directory, modules_to_save=["model.norm", "embed_tokens"])


def _configure(directory: Path, **changes: Any) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "change",
    [
        lambda directory: _configure(directory, use_rslora=True),
        lambda directory: _configure(directory, lora_alpha=7.3),
        _patterns,
        _embedding,
        _saved_whole,
    ],
    ids=["rslora", "odd alpha", "patterns", "embedding", "modules_to_save"],
)
def test_every_kind_of_adapter(change: Callable[[Path], None], tmp_path: Path) -> None:
    hf = tiny_hf("llama", tmp_path / "hf")
    adapter = make_adapter(tmp_path / "adapter", Base(hf).file.path)
    change(adapter)
    _compare(hf, adapter, ("f16", "q8_0", "q4_0"), tmp_path)


@pytest.mark.model
def test_the_real_model(real_base: Path, tmp_path: Path) -> None:
    hf = hf_directory_of(real_base, tmp_path / "hf")
    adapter = make_adapter(tmp_path / "adapter", real_base, rank=8, alpha=16.0)
    _compare(hf, adapter, ("f16", "q8_0", "q4_0"), tmp_path)
