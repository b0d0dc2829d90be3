"""Reading PEFT adapters: the scales of every variant against peft itself, and every refusal."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from cdcda_export.adapter import base_warning, read_adapter, read_peft
from cdcda_export.architectures import permute_rows, unpermute_rows
from cdcda_export.base_model import load_base_model
from cdcda_export.errors import AdapterError, FileError, UnsupportedArchitecture
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
        ({"lora_alpha": "big"}, "alpha of 'lora_alpha' is 'big', no finite number"),
        ({"lora_alpha": None}, "no finite number"),
        ({"lora_alpha": True}, "no finite number"),
        ({"lora_alpha": float("nan")}, "no finite number"),
        ({"lora_alpha": 10**400}, "no finite number"),
        ({"alpha_pattern": ["x"]}, "alpha_pattern is no table"),
        ({"alpha_pattern": {"q_proj": "much"}}, "alpha of 'q_proj' is 'much'"),
        ({"alpha_pattern": {"q_proj": float("inf")}}, "alpha of 'q_proj' is 'inf'"),
        ({"alpha_pattern": {"(": 1}}, "no regular expression"),
        ({"alpha_pattern": {"x{99999999999}": 1}}, "no regular expression"),
    ],
)
def test_other_kinds_and_senseless_numbers_are_refused_by_name(
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
        (lambda t: t | {FIRST_A: np.zeros((0, 64), np.float32), FIRST_B: np.zeros((64, 0), np.float32)}, r"\[0, 64\], which is no matrix"),
        (lambda t: t | {FIRST_A: np.zeros((), np.float32)}, r"\[\], which is no matrix"),
        (lambda t: t | {FIRST_B: t[FIRST_B].astype(np.float64) * 1e300}, "infinite"),
        (lambda t: t | {"base_model.model.model.norm.weight": np.full(64, np.nan, np.float32)}, "model.norm.weight holds NaN"),
        (lambda t: t | {"base_model.model.model.norm.weight": np.array([np.inf] * 64, np.float16)}, "infinite"),
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
    (tmp_path / "adapter_config.json").write_text("[" * 100_000)
    with pytest.raises(AdapterError, match="not readable JSON"):
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


def _safetensors(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def _tensor(begin: object, end: object, shape: object = (2,), dtype: object = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\1\0",
        _safetensors({}, length=1 << 62),
        _safetensors({}, length=3),
        _safetensors(b"[" * 100_000),
        _safetensors([1]),
        _safetensors({"a": 1}),
        _safetensors({"a": {"dtype": "F32"}}),
        _safetensors({"a": _tensor(0, 16)}, bytes(8)),
        _safetensors({"a": _tensor(0, 8)}, bytes(9)),
        _safetensors({"a": _tensor(4, 12)}, bytes(12)),
        _safetensors({"a": _tensor(-8, 0)}, bytes(8)),
        _safetensors({"a": _tensor(8, 0)}, bytes(8)),
        _safetensors({"a": _tensor(0, "8")}, bytes(8)),
        _safetensors({"a": _tensor(0, 8.0)}, bytes(8)),
        _safetensors({"a": _tensor(0, 8, (-2,))}, bytes(8)),
        _safetensors({"a": _tensor(0, 8, (3,))}, bytes(8)),
        _safetensors({"a": _tensor(0, 8, "2")}, bytes(8)),
        _safetensors({"a": _tensor(0, 4, [1] * 70)}, bytes(4)),
        _safetensors({"a": _tensor(0, 8), "b": _tensor(4, 12)}, bytes(12)),
        _safetensors({"a": _tensor(0, 8), "b": _tensor(0, 8)}, bytes(8)),
    ],
    ids=range(21),
)
def test_headers_that_lie_are_refused_in_one_sentence(llama_adapter: Path, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "adapter_config.json").write_text((llama_adapter / "adapter_config.json").read_text())
    (tmp_path / "adapter_model.safetensors").write_bytes(content)
    with pytest.raises(AdapterError, match="is truncated or no safetensors file"):
        read_peft(tmp_path)


def test_random_damage_never_escapes_as_another_error(llama_base: Path, llama_adapter: Path, tmp_path: Path) -> None:
    base, whole = GgufFile(llama_base), (llama_adapter / "adapter_model.safetensors").read_bytes()
    (tmp_path / "adapter_config.json").write_text((llama_adapter / "adapter_config.json").read_text())
    rng, refused = np.random.default_rng(0), 0
    for _ in range(200):
        data = bytearray(whole)
        for at in rng.integers(0, 4000, 3):
            data[int(at)] = int(rng.integers(0, 256))
        (tmp_path / "adapter_model.safetensors").write_bytes(data)
        try:
            read_adapter(tmp_path, base)
        except AdapterError:
            refused += 1
    assert refused > 150


def test_every_stored_type_is_read_as_safetensors_reads_it(llama_adapter: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file as save_torch

    (tmp_path / "adapter_config.json").write_text((llama_adapter / "adapter_config.json").read_text())
    torch.manual_seed(0)
    kinds = {"a": torch.float32, "b": torch.float16, "c": torch.bfloat16, "d": torch.float64}
    tensors = {name: torch.randn(3, 5).to(kind) for name, kind in kinds.items()} | {"e": torch.tensor([-0.0])}
    save_torch(tensors, tmp_path / "adapter_model.safetensors")
    found = read_peft(tmp_path).replaced
    assert list(found) == list("abcde") and "f" not in found and found.get("f") is None
    for name, tensor in tensors.items():
        assert found[name].dtype == np.float32
        assert found[name].tobytes() == tensor.to(torch.float32).numpy().tobytes(), name


def test_a_file_that_is_replaced_while_it_is_read_changes_nothing(llama_adapter: Path, tmp_path: Path) -> None:
    def write(value: float) -> None:
        save_file({"a": np.full(4, value, np.float32)}, tmp_path / "new.safetensors")
        (tmp_path / "new.safetensors").rename(tmp_path / "adapter_model.safetensors")

    (tmp_path / "adapter_config.json").write_text((llama_adapter / "adapter_config.json").read_text())
    write(1)
    found = read_peft(tmp_path).replaced
    write(2)
    assert found["a"].tolist() == [1] * 4
    found = read_peft(tmp_path).replaced
    with (tmp_path / "adapter_model.safetensors").open("r+b") as stream:
        stream.truncate(20)
    with pytest.raises(FileError, match="truncated"):
        found["a"]


_PEAK = """
import sys
from pathlib import Path
from cdcda_export.adapter import read_adapter
from cdcda_export.gguf import GgufFile

def peak():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))

base = GgufFile(sys.argv[1])
before = peak()
adapter = read_adapter(sys.argv[2], base)
for name, weights in adapter.replaced.items():
    assert weights.shape == base[name].shape
print(peak() - before)
"""


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_memory_stays_at_the_largest_of_the_whole_tensors(dtype: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file as save_torch

    path = make_gguf(tmp_path / "base.gguf", hidden=1536, layers=1, kind="Q8_0")
    adapter, largest = make_adapter(tmp_path / "a", path, targets=("q_proj",)), 1536 * 3072
    names = [f"base_model.model.model.layers.0.mlp.{part}_proj.weight" for part in ("gate", "up", "down")]
    shapes = [(3072, 1536), (3072, 1536), (1536, 3072)]
    tensors = {name: torch.ones(shape, dtype=getattr(torch, dtype)) for name, shape in zip(names, shapes, strict=True)}
    save_torch(tensors, adapter / "adapter_model.safetensors")
    done = subprocess.run([sys.executable, "-c", _PEAK, str(path), str(adapter)], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 3 * 4 * largest


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
