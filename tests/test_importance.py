"""Importance: equal to a direct computation in transformers, usable by ggml, and never from held-out records."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from cdcda_export.adapter import read_peft
from cdcda_export.base_model import load_base_model
from cdcda_export.decoder import Decoder
from cdcda_export.errors import DataError
from cdcda_export.ggml import TYPES, dequantize, quantize
from cdcda_export.gguf import GgufFile, InMemory, write_gguf
from cdcda_export.importance import RECORDS, check_disjoint, gather_importance
from cdcda_export.progress import Silent
from cdcda_export.reference import lora_of
from cdcda_export.verify import Probe
from tiny import make_adapter, make_gguf, merge_peft


def _probes(count: int, seed: int = 0) -> list[Probe]:
    rng = np.random.default_rng(seed)
    rows = [[int(token) for token in rng.integers(3, 250, rng.integers(6, 30))] for _ in range(count)]
    return [Probe("", "", tuple(row[:4]), tuple(row[4:])) for row in rows]


def _untie(base: GgufFile, path: Path) -> GgufFile:
    embedding = base["token_embd.weight"]
    output = InMemory("output.weight", embedding.shape, embedding.type, embedding.data.view(np.float32)[::-1].copy().view(np.uint8))
    same = [InMemory(t.name, t.shape, t.type, t.data) for t in base.values()]
    write_gguf(path, [base.raw_pair(key) for key in base.keys_of_metadata()], [*same, output])
    return GgufFile(path)


def _directly(base: GgufFile, adapter: Path, probes: list[Probe]) -> dict[str, np.ndarray]:
    """Mean squared inputs of the linear layers of the merged model in transformers, one record at a time."""
    model = load_base_model(base)
    merge_peft(model, read_peft(adapter))
    seen: dict[str, list[torch.Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _, inputs, name=name: seen.setdefault(name, []).append(inputs[0][0]))
    with torch.no_grad():
        for probe in probes:
            model(torch.tensor([probe.ids]))
    return {name: torch.cat(inputs).square().mean(0).numpy() for name, inputs in seen.items()}


@pytest.mark.parametrize("tied", [True, False])
def test_importance_equals_a_direct_computation_in_transformers(tiny_base: Path, tmp_path: Path, tied: bool) -> None:
    base = GgufFile(tiny_base) if tied else _untie(GgufFile(tiny_base), tmp_path / "untied.gguf")
    adapter = make_adapter(tmp_path / "a", tiny_base)
    probes, decoder = _probes(19), Decoder(base)
    found = gather_importance(decoder, lora_of(read_peft(adapter)), probes, Silent())
    expected = _directly(base, adapter, probes)
    if tied:
        del expected["lm_head"]  # llama.cpp gives an embedding that is also the output no importance
    assert set(found) == {decoder.architecture.gguf_name(f"{name}.weight") for name in expected}
    for name, values in expected.items():
        np.testing.assert_allclose(found[str(decoder.architecture.gguf_name(f"{name}.weight"))], values, rtol=1e-3, err_msg=name)
    assert set(found) == {n for n, t in base.items() if t.rows > 1 and len(t.shape) > 1 and n != "token_embd.weight"}
    assert all(found[name].shape == (base[name].shape[-1],) and found[name].dtype == np.float32 for name in found)
    assert decoder.observe is None


def test_importance_is_the_users(llama_base: Path, llama_adapter: Path) -> None:
    decoder, layers = Decoder(GgufFile(llama_base)), lora_of(read_peft(llama_adapter))
    mine, again = (gather_importance(decoder, layers, _probes(9), Silent()) for _ in range(2))
    other, without = gather_importance(decoder, layers, _probes(9, seed=1), Silent()), gather_importance(decoder, {}, _probes(9), Silent())
    for name, values in mine.items():
        np.testing.assert_array_equal(values, again[name])
        assert np.abs(values - other[name]).max() > 0
    assert np.abs(mine["blk.1.ffn_down.weight"] - without["blk.1.ffn_down.weight"]).max() > 0


def test_only_the_newest_records_count(llama_base: Path) -> None:
    decoder, probes = Decoder(GgufFile(llama_base)), _probes(RECORDS + 8)
    limited, newest = (gather_importance(decoder, {}, some, Silent()) for some in (probes, probes[8:]))
    np.testing.assert_array_equal(limited["blk.0.attn_q.weight"], newest["blk.0.attn_q.weight"])


def test_no_record_at_all_is_an_error(llama_base: Path) -> None:
    with pytest.raises(DataError, match="--importance none"):
        gather_importance(Decoder(GgufFile(llama_base)), {}, [], Silent())


@pytest.mark.parametrize("kind", ["Q4_0", "Q5_0", "IQ4_NL", "Q4_K"])
def test_channels_that_no_record_excites_survive_quantization(kind: str, tmp_path: Path) -> None:
    base = GgufFile(make_gguf(tmp_path / "base.gguf", hidden=256))
    decoder = Decoder(base)
    decoder.weights["model.layers.0.input_layernorm.weight"][:128] = 0
    decoder.weights["model.layers.1.input_layernorm.weight"][:] = 0
    found = gather_importance(decoder, {}, _probes(4), Silent())
    for name in ("blk.0.attn_q.weight", "blk.1.attn_q.weight"):
        weights = dequantize(base[name].data, base[name].type, base[name].shape)
        silent = np.arange(256) < 128
        stored = dequantize(quantize(weights, TYPES[kind], found[name]), TYPES[kind], weights.shape)
        assert np.square(stored - weights)[:, silent].mean() < 0.05 * np.square(weights).mean()
    zeros = np.where(silent, 0, found["blk.0.attn_q.weight"]).astype(np.float32)
    lost = dequantize(quantize(weights, TYPES[kind], zeros), TYPES[kind], weights.shape)
    assert kind == "Q4_K" or not lost[:, silent].any(), "ggml no longer drops what weighs nothing: the floor may go"


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q4_K", "Q2_K"])
def test_importance_lowers_the_error_that_counts(kind: str, tmp_path: Path) -> None:
    base = GgufFile(make_gguf(tmp_path / "base.gguf", hidden=256))
    found = gather_importance(Decoder(base), {}, _probes(16), Silent())
    name = "blk.1.ffn_down.weight"
    weights = dequantize(base[name].data, base[name].type, base[name].shape)

    def error(importance: np.ndarray | None) -> float:
        stored = dequantize(quantize(weights, TYPES[kind], importance), TYPES[kind], weights.shape)
        return float((np.square(stored - weights) * found[name]).sum())

    assert error(found[name]) < 0.97 * error(None)


def test_held_out_records_may_not_be_among_the_training_records() -> None:
    probes = _probes(12)
    check_disjoint(probes[:9], probes[9:])
    with pytest.raises(DataError, match=r"1 of 3 held-out records.*--importance none"):
        check_disjoint(probes[:10], probes[9:])
    moved = Probe("other text", "", probes[0].prompt[:2], probes[0].prompt[2:] + probes[0].answer)
    check_disjoint(probes, [moved])
