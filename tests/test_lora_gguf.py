"""The adapter GGUF: byte for byte llama.cpp's own, right at run time, switched while the base stays."""

from __future__ import annotations

import ctypes
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from cdcda_export.adapter import read_adapter
from cdcda_export.errors import AdapterError
from cdcda_export.ggml import TYPES
from cdcda_export.gguf import GgufFile, InMemory, write_gguf
from cdcda_export.lora_card import describing_pairs
from cdcda_export.lora_gguf import write_lora_gguf
from cdcda_export.merge import merge_to_gguf
from cdcda_export.quantization import get_quant
from cdcda_export.runtime import LlamaCpp
from reference import convert_lora, hf_directory_of
from tiny import make_adapter, make_gguf

IDS = [3, 40, 41, 70, 99, 200, 123, 17]
PEFT_CARD = """---
base_model: some-org/Tiny-135M-Instruct
library_name: peft
pipeline_tag: text-generation
tags:
- base_model:adapter:some-org/Tiny-135M-Instruct
- lora
license: apache-2.0
language:
- en
---

# Model Card
"""


def lora_of(base: Path, adapter: Path, path: Path) -> Path:
    file = GgufFile(base)
    return write_lora_gguf(file, read_adapter(adapter, file), path).path


def logits_with(base: Path, lora: Path | None = None) -> np.ndarray:
    with LlamaCpp(base, n_ctx=64, adapter=lora) as runtime:
        return runtime.logits(IDS)


def merged_logits(base: Path, adapter: Path, path: Path) -> np.ndarray:
    file = GgufFile(base)
    merge_to_gguf(file, read_adapter(adapter, file), {name: TYPES["F32"] for name in file}, get_quant("f32"), path)
    return logits_with(path)


def assert_same_logits(got: np.ndarray, wanted: np.ndarray, unlike: np.ndarray) -> None:
    """The run-time adapter is the merged model up to float16 in llama.cpp's attention cache, and clearly not the base."""
    assert np.abs(got - wanted).max() < 0.02
    assert np.abs(got - unlike).max() > 0.5


# The four architectures; the settings of the later ones exercise what else the converter reads.
CASES: dict[str, dict[str, Any]] = {
    "llama": {"name": "adapter", "dtype": np.float32},
    "qwen2": {"name": "tiny-0.5B-chat-v1.2", "dtype": np.float16},
    "qwen3": {"name": "user-42-lora", "dtype": np.float32, "card": PEFT_CARD},
    "gemma3": {"name": "adapter", "dtype": np.float32, "alpha": 3.0, "rank": 6},
}


@pytest.mark.parametrize("arch", CASES)
def test_the_file_is_byte_for_byte_that_of_llama_cpp(arch: str, tmp_path: Path) -> None:
    case = CASES[arch]
    base = make_gguf(tmp_path / f"tiny-{arch}.gguf", arch, layers=11)  # layers 1, 10, 2: names are not numbers
    adapter = make_adapter(tmp_path / case["name"], base, alpha=case.get("alpha", 8.0), rank=case.get("rank", 4))
    weights = {name: values.astype(case["dtype"]) for name, values in load_file(adapter / "adapter_model.safetensors").items()}
    save_file(weights, adapter / "adapter_model.safetensors")
    if "card" in case:
        (adapter / "README.md").write_text(case["card"])
    theirs = convert_lora(adapter, hf_directory_of(base, tmp_path / "hf"), tmp_path / "theirs.gguf")
    ours = lora_of(base, adapter, tmp_path / "ours.gguf")
    assert list(GgufFile(ours)) == list(GgufFile(theirs))
    assert GgufFile(ours).keys_of_metadata() == GgufFile(theirs).keys_of_metadata()
    assert ours.read_bytes() == theirs.read_bytes()


def test_a_bfloat16_adapter_becomes_float32_as_in_the_converter(llama_base: Path, llama_adapter: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file as load_torch
    from safetensors.torch import save_file as save_torch

    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_bytes((llama_adapter / "adapter_config.json").read_bytes())
    weights = load_torch(llama_adapter / "adapter_model.safetensors")
    save_torch({name: tensor.to(torch.bfloat16) for name, tensor in weights.items()}, adapter / "adapter_model.safetensors")
    theirs = convert_lora(adapter, hf_directory_of(llama_base, tmp_path / "hf"), tmp_path / "theirs.gguf")
    assert lora_of(llama_base, adapter, tmp_path / "ours.gguf").read_bytes() == theirs.read_bytes()


@pytest.mark.model
def test_the_real_base_too(real_base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", real_base, rank=8)
    theirs = convert_lora(adapter, hf_directory_of(real_base, tmp_path / "hf"), tmp_path / "theirs.gguf")
    assert lora_of(real_base, adapter, tmp_path / "ours.gguf").read_bytes() == theirs.read_bytes()


NAMES = [
    "adapter", "adapter-42", "user-42-lora", "Mixtral-8x7B-Instruct-v0.1", "bloom-7b1-petals", "tiny-0.5B-chat-v1.2", "a b c", "lora",
    "my-Q4_0-model-128k", "Llama-3-8B-Instruct-1048k", "SmolLM2-135M", "phi-3-mini-4k-instruct", "-x--y-", "v2", "x-large-7B",
    "gemma-fp16-chat",
]  # fmt: skip
CARDS = {
    "none": "",
    "peft": PEFT_CARD,
    "path": PEFT_CARD.replace("some-org/Tiny-135M-Instruct", "/data/models/smol-135M"),
    "trl": "---\nbase_model: org/Base-1B-v2\nlibrary_name: transformers\nmodel_name: my-run\ntags:\n- trl\n- sft\nlicence: license\n---\n",
    "datasets": "---\ndatasets:\n- org/data-v1\n- 'other'\nbase_model:\n  - a/b\n  - https://huggingface.co/org/Name-3B\n---\n",
    "broken": "---\nbase_model: never/closed\n",
}


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("name", NAMES)
def test_it_describes_itself_as_gguf_py_would(name: str, card: str, tmp_path: Path) -> None:
    import gguf

    directory = tmp_path / name
    directory.mkdir()
    if CARDS[card]:
        (directory / "README.md").write_text(CARDS[card])
    # gguf-py marks an adapter by a negative number of weights
    writer = gguf.GGUFWriter(tmp_path / "theirs.gguf", "llama")
    gguf.Metadata.load(None, directory, None, -100_000_000).set_gguf_meta_model(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    theirs = GgufFile(tmp_path / "theirs.gguf")
    write_gguf(tmp_path / "ours.gguf", describing_pairs(directory, 100_000_000), [])
    ours = GgufFile(tmp_path / "ours.gguf")
    wanted = {key: theirs.get_value(key) for key in theirs.keys_of_metadata() if key != "general.architecture"}
    assert {key: ours.get_value(key) for key in ours.keys_of_metadata()} == wanted
    assert ours.keys_of_metadata() == list(wanted)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"alpha_pattern": {"q_proj": 20.0, r"layers\.1\.mlp\.down_proj": 1.0}},
        {"lora_alpha": 0, "alpha_pattern": {"v_proj": 12.0}},
        {"lora_alpha": 7, "use_rslora": True, "alpha_pattern": {"up_proj": 3.0}},
    ],
    ids=str,
)
def test_at_run_time_it_is_the_merged_model(tiny_base: Path, settings: dict[str, Any], tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", tiny_base, **settings)
    lora = lora_of(tiny_base, adapter, tmp_path / "lora.gguf")
    assert_same_logits(logits_with(tiny_base, lora), merged_logits(tiny_base, adapter, tmp_path / "merged.gguf"), logits_with(tiny_base))


def test_a_rank_for_each_module(llama_base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", llama_base, rank=4, alpha=8.0, rank_pattern={"q_proj": 9})
    weights = load_file(adapter / "adapter_model.safetensors")
    rng = np.random.default_rng(3)
    for name in [name for name in weights if re.search(r"q_proj\.lora_A", name)]:
        down, up = weights[name], weights[name.replace("lora_A", "lora_B")]
        weights[name] = rng.normal(0, 0.2, (9, down.shape[1])).astype(np.float32)
        weights[name.replace("lora_A", "lora_B")] = rng.normal(0, 0.3, (up.shape[0], 9)).astype(np.float32)
    save_file(weights, adapter / "adapter_model.safetensors")
    lora = lora_of(llama_base, adapter, tmp_path / "lora.gguf")
    assert_same_logits(logits_with(llama_base, lora), merged_logits(llama_base, adapter, tmp_path / "m.gguf"), logits_with(llama_base))


def untied(base: Path, path: Path) -> Path:
    """A copy of a tiny base with an output layer of its own."""
    file = GgufFile(base)
    weights = np.random.default_rng(7).normal(0, 0.2, file["token_embd.weight"].shape).astype(np.float32)
    output = InMemory("output.weight", weights.shape, TYPES["F32"], weights.reshape(-1).view(np.uint8))
    tensors = [InMemory(t.name, t.shape, t.type, t.data) for t in file.values()]
    write_gguf(path, [file.raw_pair(key) for key in file.keys_of_metadata()], [*tensors, output])
    return path


def embedding_adapter(base: Path, folder: Path) -> Path:
    adapter = make_adapter(folder, base, targets=("v_proj",), use_rslora=True)
    rng = np.random.default_rng(5)
    rows, columns = GgufFile(base)["token_embd.weight"].shape
    weights = load_file(adapter / "adapter_model.safetensors")
    prefix = "base_model.model.model.embed_tokens"
    weights[f"{prefix}.lora_embedding_A"] = rng.normal(0, 0.5, (4, rows)).astype(np.float32)
    weights[f"{prefix}.lora_embedding_B"] = rng.normal(0, 0.3, (columns, 4)).astype(np.float32)
    save_file(weights, adapter / "adapter_model.safetensors")
    return adapter


def test_an_adapted_embedding_works_at_run_time_and_is_stored_as_the_converter_does(llama_base: Path, tmp_path: Path) -> None:
    base = untied(llama_base, tmp_path / "untied.gguf")
    adapter = embedding_adapter(base, tmp_path / "adapter")
    lora = lora_of(base, adapter, tmp_path / "lora.gguf")
    assert_same_logits(logits_with(base, lora), merged_logits(base, adapter, tmp_path / "merged.gguf"), logits_with(base))
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"use_rslora": False}))
    theirs = convert_lora(adapter, hf_directory_of(base, tmp_path / "hf"), tmp_path / "theirs.gguf")
    assert lora_of(base, adapter, tmp_path / "plain.gguf").read_bytes() == theirs.read_bytes()


def test_an_adapted_embedding_that_is_the_output_layer_too_is_refused(llama_base: Path, tmp_path: Path) -> None:
    adapter = embedding_adapter(llama_base, tmp_path / "adapter")
    with pytest.raises(AdapterError, match="also uses as its output layer.*--format gguf"):
        lora_of(llama_base, adapter, tmp_path / "lora.gguf")
    assert not (tmp_path / "lora.gguf").exists()


def test_whole_tensors_are_refused(llama_base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", llama_base)
    weights = load_file(adapter / "adapter_model.safetensors")
    weights["base_model.model.model.norm.weight"] = np.ones(64, np.float32)
    save_file(weights, adapter / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="replaces whole tensors"):
        lora_of(llama_base, adapter, tmp_path / "lora.gguf")


def test_two_people_share_one_base_in_memory(llama_base: Path, tmp_path: Path) -> None:
    import llama_cpp

    adapters = [make_adapter(tmp_path / f"adapter-{seed}", llama_base, seed=seed) for seed in (1, 2)]
    wanted = [merged_logits(llama_base, adapter, tmp_path / f"merged-{i}.gguf") for i, adapter in enumerate(adapters)]
    alone = logits_with(llama_base)
    with LlamaCpp(llama_base, n_ctx=64) as runtime:
        model, context = runtime._llm._model.model, runtime._llm._ctx.ctx
        loras = [lora_of(llama_base, adapter, tmp_path / f"lora-{i}.gguf") for i, adapter in enumerate(adapters)]
        loaded = [llama_cpp.llama_adapter_lora_init(model, str(lora).encode()) for lora in loras]
        assert all(loaded)
        for person in (0, 1, None, 0, 1):
            chosen = [] if person is None else [loaded[person]]
            pointers = (llama_cpp.llama_adapter_lora_p_ctypes * len(chosen))(*chosen)
            scales = (ctypes.c_float * len(chosen))(*[1.0] * len(chosen))
            assert llama_cpp.llama_set_adapters_lora(context, pointers, len(chosen), scales) == 0
            got = runtime.logits(IDS)
            if person is None:
                np.testing.assert_array_equal(got, alone)
            else:
                assert_same_logits(got, wanted[person], wanted[1 - person])
