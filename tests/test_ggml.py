"""The quantizer against the reference implementation in the ``gguf`` package."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from cdcda_export.ggml import TYPES, dequantize, quantize, row_bytes, type_by_id

EXACT = ("F32", "F16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")


@pytest.mark.parametrize("name", EXACT)
def test_quantized_bytes_equal_the_reference(name: str) -> None:
    weights = np.random.default_rng(0).normal(0, 1, (37, 96)).astype(np.float32)
    expected = gguf.quants.quantize(weights, gguf.GGMLQuantizationType[name])
    np.testing.assert_array_equal(quantize(weights, TYPES[name]), expected.reshape(-1).view(np.uint8))


@pytest.mark.parametrize("name", [n for n, t in TYPES.items() if t.block_size > 1 and n not in ("Q2_K", "Q3_K")])
def test_round_trip_stays_close_and_uses_all_rows(name: str) -> None:
    kind = TYPES[name]
    weights = np.random.default_rng(1).normal(0, 1, (5000, 512)).astype(np.float32)
    data = quantize(weights, kind)
    assert data.nbytes == 5000 * row_bytes(kind, 512)
    error = np.sqrt(np.mean((dequantize(data, kind, weights.shape) - weights) ** 2, axis=1))
    assert error.max() < 0.2


@pytest.mark.parametrize("name", ["Q4_0", "Q8_0", "Q4_K", "Q6_K", "IQ4_NL", "BF16"])
def test_dequantized_values_equal_the_reference(name: str) -> None:
    kind = TYPES[name]
    if name == "BF16":
        data = np.random.default_rng(2).integers(0, 30000, 4 * 256).astype(np.uint16).view(np.uint8)
    else:
        data = quantize(np.random.default_rng(2).normal(0, 1, (4, 256)).astype(np.float32), kind)
    expected = gguf.quants.dequantize(data.reshape(4, -1), gguf.GGMLQuantizationType[name])
    np.testing.assert_allclose(dequantize(data, kind, (4, 256)), expected, rtol=1e-6, atol=1e-7)


def test_importance_lowers_the_error_where_it_is_high() -> None:
    weights = np.random.default_rng(3).normal(0, 1, (64, 256)).astype(np.float32)
    importance = np.ones(256, np.float32)
    importance[:8] = 1000.0
    kind = TYPES["Q4_0"]

    def error(data: np.ndarray) -> float:
        return float(np.mean((dequantize(data, kind, weights.shape) - weights)[:, :8] ** 2))

    assert error(quantize(weights, kind, importance)) < 0.8 * error(quantize(weights, kind))


@pytest.mark.parametrize("name", TYPES)
def test_every_type_can_be_decoded(name: str) -> None:
    kind = TYPES[name]
    assert dequantize(np.zeros(2 * row_bytes(kind, 256), np.uint8), kind, (2, 256)).tolist() == [[0.0] * 256] * 2


def test_unknown_type_is_named() -> None:
    with pytest.raises(Exception, match="ggml type 99"):
        type_by_id(99, "x.gguf")
