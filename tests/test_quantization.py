"""Every choice of type and every byte, held to llama.cpp's own ``llama_model_quantize``."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest

from cdcda_export.errors import ConfigError, QuantizationError
from cdcda_export.ggml import TYPES, dequantize, quantize
from cdcda_export.gguf import GgufFile, InMemory, write_gguf
from cdcda_export.quantization import BASE, QUANTS, choose_types, file_type_of, get_quant, is_double_quantized, quant_of_base
from tiny import make_gguf

ARCHS = ("llama", "qwen2", "qwen3", "gemma3")
WRITTEN = [name for name in QUANTS if name not in ("f32", "base")]
_ROWS = 4


def _model(path: Path, arch: str = "llama", layers: int = 9, tied: bool = True, hidden: int = 256, **changes: Any) -> GgufFile:
    """One layer, repeated, its matrices cut to four rows: types depend on names, layers and row lengths, and time on the rows."""
    one = GgufFile(make_gguf(path.with_suffix(".one"), arch, hidden=hidden, layers=1, **{f"{arch}.block_count": layers}, **changes))
    tensors = []
    for name, tensor in one.items():
        shape = (_ROWS, tensor.shape[1]) if tensor.rows > 1 else tensor.shape
        data = tensor.data[: 4 * int(np.prod(shape))]
        names = [name.replace("blk.0.", f"blk.{layer}.") for layer in range(layers)] if name.startswith("blk.") else [name]
        tensors += [InMemory(each, shape, TYPES["F32"], data) for each in names]
    if not tied:
        backwards = tensors[0].data.view(np.float32)[::-1].copy().view(np.uint8)
        tensors.append(InMemory("output.weight", tensors[0].shape, TYPES["F32"], backwards))
    write_gguf(path, [one.raw_pair(key) for key in one.keys_of_metadata()], tensors)
    return GgufFile(path)


def _importance(base: GgufFile) -> dict[str, np.ndarray]:
    """Random weights for what llama.cpp's imatrix covers: the matrices of the layers."""
    rng = np.random.default_rng(7)
    return {name: rng.gamma(0.5, 1, t.shape[-1]).astype(np.float32) + 1e-4 for name, t in base.items() if t.rows > 1 and name[:4] == "blk."}


def _theirs(
    base: GgufFile, quant: str, path: Path, overrides: dict[str, str] | None = None, importance: dict[str, np.ndarray] | None = None
) -> GgufFile:
    """What llama-quantize makes of a base."""
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype, parameters.nthread = QUANTS[quant].file_type, 2
    if overrides:
        rows = [(pattern.encode(), TYPES[name.upper()].id) for pattern, name in overrides.items()]
        parameters.tt_overrides = (llama_cpp.llama_model_tensor_override * (len(rows) + 1))(*rows, (None, 0))
    if importance:
        pointer = ctypes.POINTER(ctypes.c_float)
        entries = [(name.encode(), values.ctypes.data_as(pointer), values.size) for name, values in importance.items()]
        parameters.imatrix = (llama_cpp.llama_model_imatrix_data * (len(entries) + 1))(*entries, (None, None, 0))
    assert llama_cpp.llama_model_quantize(str(base.path).encode(), str(path).encode(), parameters) == 0
    return GgufFile(path)


def _assert_same(
    base: GgufFile, quant: str, path: Path, overrides: dict[str, str] | None = None, importance: dict[str, np.ndarray] | None = None
) -> GgufFile:
    theirs = _theirs(base, quant, path, overrides, importance)
    types = choose_types(base, get_quant(quant), True, overrides, importance is not None)
    assert {name: kind.name for name, kind in types.items()} == {name: tensor.type.name for name, tensor in theirs.items()}
    for name, tensor in base.items():
        ours = quantize(dequantize(tensor.data, tensor.type, tensor.shape), types[name], (importance or {}).get(name))
        assert bytes(ours) == bytes(theirs[name].data), name
    assert file_type_of(base, get_quant(quant)) == theirs.get_value("general.file_type")
    return theirs


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("arch", ARCHS)
def test_types_and_bytes_are_those_of_llama_quantize(arch: str, tied: bool, tmp_path: Path) -> None:
    base = _model(tmp_path / "base.gguf", arch, layers=9 if tied else 17, tied=tied)
    for quant in WRITTEN:
        _assert_same(base, quant, tmp_path / "theirs.gguf")


@pytest.mark.parametrize("arch", ARCHS)
def test_importance_changes_types_and_bytes_as_in_llama_quantize(arch: str, tmp_path: Path) -> None:
    base = _model(tmp_path / "base.gguf", arch, layers=16)
    for quant in WRITTEN:
        _assert_same(base, quant, tmp_path / "theirs.gguf", importance=_importance(base))
    both = {quant: [choose_types(base, get_quant(quant), True, importance=given) for given in (False, True)] for quant in WRITTEN}
    differ = {quant for quant, (plain, weighed) in both.items() if plain != weighed}
    assert differ == {"q4_0", "q5_0", "iq4_nl"}


@pytest.mark.parametrize(("arch", "layers", "kv_heads"), [("llama", 16, 1), ("llama", 80, 1), ("llama", 80, 4), ("qwen2", 80, 4)])
def test_shared_heads_and_the_70b_rule(arch: str, layers: int, kv_heads: int, tmp_path: Path) -> None:
    base = _model(tmp_path / "base.gguf", arch, layers, **{f"{arch}.attention.head_count_kv": kv_heads})
    for quant in ("iq4_nl", "q2_k", "q3_k_s", "q3_k_m", "q4_k_s", "q4_k_m", "q5_k_m"):
        _assert_same(base, quant, tmp_path / "theirs.gguf")


@pytest.mark.parametrize("hidden", [96, 64, 48])
def test_short_rows_fall_back_as_in_llama_quantize(hidden: int, tmp_path: Path) -> None:
    base = _model(tmp_path / "base.gguf", hidden=hidden)
    for quant in WRITTEN:
        _assert_same(base, quant, tmp_path / "theirs.gguf")


@pytest.mark.parametrize(
    "overrides",
    [
        {"attn_v": "q8_0", "ffn_down": "Q5_0"},
        {r"blk\.[0-3]\.attn_v": "f16", "attn_v": "q5_k", "token_embd": "q4_0"},  # the counted places move on
        {r"blk\.1\.": "iq4_nl", "attn": "q6_k", r"\.ffn_(up|gate)\.": "iq4_xs"},
    ],
)
@pytest.mark.parametrize("quant", ["q4_0", "q3_k_m", "q4_k_m", "q4_k_s"])
def test_overrides_are_those_of_llama_quantize(quant: str, overrides: dict[str, str], tmp_path: Path) -> None:
    _assert_same(_model(tmp_path / "base.gguf", layers=12), quant, tmp_path / "theirs.gguf", overrides)


@pytest.mark.parametrize("quant", ["q4_k_m", "q2_k", "q6_k", "iq4_nl"])
def test_an_override_that_does_not_fit_is_refused_or_falls_back(quant: str, tmp_path: Path) -> None:
    base = _model(tmp_path / "base.gguf", hidden=64)
    overrides = {"ffn_down": "q4_k"}
    with pytest.raises(QuantizationError, match=r"multiple of 256.*rows of \d+.*q4_0 or q8_0.*--allow-fallback"):
        choose_types(base, get_quant(quant), overrides=overrides)
    _assert_same(base, quant, tmp_path / "theirs.gguf", overrides)


def test_what_a_mix_makes_better_falls_back_silently(tmp_path: Path) -> None:
    base = _model(tmp_path / "base.gguf", layers=16, hidden=64, **{"llama.attention.head_count_kv": 1})
    types = choose_types(base, get_quant("iq4_nl"))
    assert [types[name].name for name in ("token_embd.weight", "blk.9.attn_v.weight", "blk.9.attn_q.weight")] == ["Q8_0", "Q5_1", "IQ4_NL"]


def test_rows_of_no_block_at_all_are_refused_with_a_way_out(tmp_path: Path) -> None:
    with pytest.raises(QuantizationError, match=r"q4_0 needs rows that are a multiple of 32.*--quant f16.*F16"):
        choose_types(_model(tmp_path / "base.gguf", hidden=48), get_quant("q4_0"))


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ({"attn_v": "q8"}, "type 'q8'.*Did you mean 'q8_0'"),
        ({"attn_v": "q4_k_m"}, "Did you mean 'q4_k'"),
        ({"attn_v": "i32"}, "type 'i32'"),
        ({"attn_v": 8}, "type '8'"),
        ({"attn_(v": "q8_0"}, "no regular expression"),
        ({"atn_v": "q8_0"}, "decides no matrix.*Did you mean 'attn_v'"),
        ({"attn_norm": "q8_0"}, "decides no matrix"),
        ({"attn": "q8_0", "attn_v": "q4_0"}, "'attn_v' in tensor_types decides no matrix"),
    ],
)
def test_overrides_that_do_nothing_are_errors(overrides: dict[str, str], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=sentence):
        choose_types(_model(tmp_path / "base.gguf"), get_quant("q4_0"), overrides=overrides)


def test_overrides_of_a_float_file_are_refused_because_llama_quantize_ignores_them(tmp_path: Path) -> None:
    base = _model(tmp_path / "base.gguf")
    assert _theirs(base, "f16", tmp_path / "theirs.gguf", {"attn_v": "q8_0"})["blk.0.attn_v.weight"].type.name == "F16"
    with pytest.raises(ConfigError, match="no effect on f16"):
        choose_types(base, get_quant("f16"), overrides={"attn_v": "q8_0"})


@pytest.mark.parametrize("quant", WRITTEN)
def test_the_quantization_of_a_base_is_recognised(quant: str, tmp_path: Path) -> None:
    made = _theirs(_model(tmp_path / "base.gguf"), quant, tmp_path / "made.gguf")
    assert quant_of_base(made).name == quant
    assert choose_types(made, BASE) == {name: tensor.type for name, tensor in made.items()}
    assert file_type_of(made, BASE) == QUANTS[quant].file_type


@pytest.mark.parametrize("stated", [None, 1, 9999])
def test_a_missing_or_wrong_header_does_not_decide_what_a_base_is(stated: int | None, tmp_path: Path) -> None:
    base = GgufFile(make_gguf(tmp_path / "base.gguf", hidden=256, kind="Q4_K", **{"general.file_type": stated}))
    assert quant_of_base(base).name == "q4_k_m"
    assert file_type_of(base, BASE) == (15 if stated is None else stated)


def test_overrides_of_the_bases_own_types(tmp_path: Path) -> None:
    base = GgufFile(make_gguf(tmp_path / "base.gguf", kind="Q4_1"))
    types = choose_types(base, BASE, overrides={"attn_v": "q8_0"})
    assert {name for name, kind in types.items() if kind != base[name].type} == {"blk.0.attn_v.weight", "blk.1.attn_v.weight"}
    assert is_double_quantized(base, types) == "quantized twice: the base was Q4_1 already, its tensors became Q8_0"
    assert is_double_quantized(base, choose_types(base, BASE)) is None
    assert is_double_quantized(base, choose_types(base, get_quant("bf16"))) is None
