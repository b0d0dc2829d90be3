"""Reading PEFT adapters: the scales of every variant against peft itself, and every refusal."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from cdcda_export.adapter import base_warning, read_adapter, read_peft
from cdcda_export.architectures import permute_rows, unpermute_rows
from cdcda_export.base_model import load_base_model
from cdcda_export.errors import AdapterError, UnsupportedArchitecture
from cdcda_export.gguf import GgufFile
from tiny import make_adapter, make_gguf, merge_peft


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.mlp.up_proj": 32}},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["v_proj"], "layers_to_transform": [1]},
    ],
)
def test_merged_weights_equal_pefts_own_merge(tiny_base: Path, tmp_path: Path, options: dict[str, object]) -> None:
    from peft import LoraConfig, get_peft_model

    base = GgufFile(tiny_base)
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "k_proj", "up_proj"], "task_type": "CAUSAL_LM"} | options
    tuned = get_peft_model(load_base_model(base), LoraConfig(**settings))
    torch.manual_seed(0)
    for name, parameter in tuned.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    tuned.save_pretrained(tmp_path / "a")
    ours = load_base_model(base)
    merge_peft(ours, read_peft(tmp_path / "a"))
    expected = tuned.merge_and_unload().state_dict()
    for name, weights in ours.state_dict().items():
        torch.testing.assert_close(weights, expected[name], rtol=1e-5, atol=1e-5, msg=name)


def test_peft_loads_an_adapter_of_ours_with_equal_logits(llama_base: Path, llama_adapter: Path) -> None:
    from peft import PeftModel

    base = GgufFile(llama_base)
    ids = torch.tensor([list(range(10, 40))])
    theirs = PeftModel.from_pretrained(load_base_model(base), str(llama_adapter))(ids).logits
    ours = load_base_model(base)
    merge_peft(ours, read_peft(llama_adapter))
    torch.testing.assert_close(ours(ids).logits, theirs, rtol=1e-3, atol=1e-3)


def test_bfloat16_adapters_are_read(llama_base: Path, llama_adapter: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file as load_torch
    from safetensors.torch import save_file as save_torch

    tensors = {k: v.to(torch.bfloat16) for k, v in load_torch(llama_adapter / "adapter_model.safetensors").items()}
    (tmp_path / "adapter_config.json").write_text((llama_adapter / "adapter_config.json").read_text())
    save_torch(tensors, tmp_path / "adapter_model.safetensors")
    base = GgufFile(llama_base)
    wide, narrow = read_adapter(llama_adapter, base), read_adapter(tmp_path, base)
    for name, delta in wide.deltas.items():
        np.testing.assert_allclose(narrow.deltas[name].dense(), delta.dense(), atol=0.05)


def test_row_permutation_is_undone_and_only_moves_rows_within_heads() -> None:
    weights = np.arange(4 * 6 * 3, dtype=np.float32).reshape(24, 3)
    moved = permute_rows(weights, 4)
    np.testing.assert_array_equal(unpermute_rows(moved, 4), weights)
    np.testing.assert_array_equal(moved[:6], weights[[0, 3, 1, 4, 2, 5]])


def _edit(source: Path, target: Path, tensors: object = None, **config: object) -> Path:
    target.mkdir()
    settings = json.loads((source / "adapter_config.json").read_text()) | config
    (target / "adapter_config.json").write_text(json.dumps(settings))
    weights = load_file(source / "adapter_model.safetensors")
    save_file(tensors(weights) if callable(tensors) else weights, target / "adapter_model.safetensors")
    return target


FIRST_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
FIRST_B = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"peft_type": "IA3"}, "type IA3"),
        ({"use_dora": True}, "DoRA"),
        ({"bias": "all"}, "biases"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa"),
    ],
)
def test_other_kinds_are_refused_by_name(
    llama_base: Path, llama_adapter: Path, tmp_path: Path, config: dict[str, object], sentence: str
) -> None:
    with pytest.raises(AdapterError, match=sentence):
        read_adapter(_edit(llama_adapter, tmp_path / "a", **config), GgufFile(llama_base))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda t: {k: v for k, v in t.items() if k != FIRST_B}, "only one of"),
        (lambda t: t | {FIRST_A: np.zeros((4, 80), np.float32)}, r"q_proj changes a \[64, 80\]"),
        (lambda t: t | {FIRST_A: t[FIRST_A] * np.nan}, "NaN"),
        (lambda t: t | {FIRST_A.replace("layers.0", "layers.9"): t[FIRST_A]}, r"layers\.9.*no counterpart"),
        (
            lambda t: t | {"base_model.model.model.layers.0.mlp.up_proj.lora_magnitude_vector": np.ones(4, np.float32)},
            "kind of LoRA",
        ),
        (lambda t: t | {"base_model.model.model.embed_tokens.weight": np.zeros((320, 64), np.float32)}, "vocabulary was grown"),
        (lambda t: t | {"base_model.model.lm_head.weight": np.zeros((288, 64), np.float32)}, "ties it"),
        (lambda t: {"other": np.zeros(1, np.float32)}, "no counterpart"),
        (lambda t: t | {FIRST_A: np.zeros((4, 64), np.int8)}, "stored as I8"),
    ],
)
def test_adapters_that_do_not_fit_name_the_tensor(
    llama_base: Path, llama_adapter: Path, tmp_path: Path, change: object, sentence: str
) -> None:
    with pytest.raises(AdapterError, match=sentence):
        read_adapter(_edit(llama_adapter, tmp_path / "a", change), GgufFile(llama_base))


def test_pickles_missing_and_truncated_files_are_refused(llama_base: Path, llama_adapter: Path, tmp_path: Path) -> None:
    base = GgufFile(llama_base)
    with pytest.raises(AdapterError, match="no adapter directory"):
        read_adapter(tmp_path / "none", base)
    with pytest.raises(AdapterError, match=r"holds no adapter_config\.json"):
        read_adapter(tmp_path, base)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(AdapterError, match="not readable JSON"):
        read_adapter(tmp_path, base)
    (tmp_path / "adapter_config.json").write_text((llama_adapter / "adapter_config.json").read_text())
    with pytest.raises(AdapterError, match="holds no adapter_model"):
        read_adapter(tmp_path, base)
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(AdapterError, match="pickle"):
        read_adapter(tmp_path, base)
    (tmp_path / "adapter_model.safetensors").write_bytes((llama_adapter / "adapter_model.safetensors").read_bytes()[:-100])
    with pytest.raises(AdapterError, match="truncated"):
        read_adapter(tmp_path, base)


def test_modules_to_save_replace_whole_tensors(llama_base: Path, llama_adapter: Path, tmp_path: Path) -> None:
    base = GgufFile(llama_base)
    new = np.random.default_rng(0).normal(0, 1, base["token_embd.weight"].shape).astype(np.float32)
    edited = _edit(llama_adapter, tmp_path / "a", lambda t: t | {"base_model.model.model.embed_tokens.weight": new})
    np.testing.assert_array_equal(read_adapter(edited, base).replaced["token_embd.weight"], new)


def test_an_adapter_of_another_base_of_the_same_shape_is_warned_about(llama_base: Path, llama_adapter: Path, tmp_path: Path) -> None:
    base = GgufFile(llama_base)
    assert base_warning(read_adapter(llama_adapter, base), base) is None
    other = read_adapter(_edit(llama_adapter, tmp_path / "a", base_model_name_or_path="acme/Other-3B-Chat"), base)
    assert "acme/Other-3B-Chat" in str(base_warning(other, base))


def test_unknown_architecture(tmp_path: Path, llama_adapter: Path) -> None:
    strange = make_gguf(tmp_path / "m.gguf", **{"general.architecture": "lama"})
    with pytest.raises(UnsupportedArchitecture, match="Did you mean 'llama'"):
        read_adapter(llama_adapter, GgufFile(strange))


def test_scale_is_alpha_over_rank(llama_base: Path, tmp_path: Path) -> None:
    peft = read_peft(make_adapter(tmp_path / "a", llama_base, rank=4, alpha=10))
    assert peft.scale("model.layers.0.mlp.up_proj") == 2.5
