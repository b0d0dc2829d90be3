"""Predictions: the work read off an artifact, the formula, and coefficients that are what the published measurements give."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cdcda_export.ggml import TYPES
from cdcda_export.gguf import GgufFile
from cdcda_mobile.phone.classes import Fact, get_phone
from cdcda_mobile.phone.predict import Work, bytes_of, coefficients, interval_factor, predict, token_seconds, work_of

SMALL = Work({"Q4_0": 106_000_000, "F32": 35_000}, "Q8_0", 28_311_552, 30, 576, 23_040)
LARGE = Work({"Q4_0": 1_610_000_000}, "Q6_K", 100_663_296, 24, 2048, 196_608)


def test_work_is_what_a_token_reads_and_multiplies(llama_base: Path) -> None:
    file = GgufFile(llama_base)
    work = work_of(file)
    stored = sum(tensor.data.nbytes for tensor in file.values())
    embedding = file["token_embd.weight"].data.nbytes
    read = sum(work.decode_gb().values()) * 1e9
    assert read == pytest.approx(stored - embedding if "output.weight" in file else stored)
    assert sum(work.prefill_gw().values()) * 1e9 + work.output_weights == pytest.approx(sum(math.prod(t.shape) for t in file.values()))
    assert work.layers == file.hparam("block_count")
    heads, columns = file.hparam("attention.head_count_kv"), file.hparam("embedding_length") // file.hparam("attention.head_count")
    assert work.kv_bytes == work.layers * heads * 2 * columns * 2
    assert work.memory_gb(10) == pytest.approx(10 * work.kv_bytes / 1e9)


def test_every_storage_type_has_a_price_on_every_chip() -> None:
    for table in (coefficients()["decode"], coefficients()["prefill"]):
        for chip in (*table["chips"].values(), table["others"]):
            assert set(chip["types"]) == set(TYPES)
            assert all(value > 0 for value in (*chip["types"].values(), chip["memory"], chip["layers"]))


def test_seconds_are_the_sum_of_what_is_read_and_of_the_layers() -> None:
    chip = {"types": {"Q4_0": 0.03, "Q8_0": 0.02}, "memory": 0.1, "layers": 0.001}
    seconds, share = token_seconds(chip, {"Q4_0": 2.0, "Q8_0": 1.0}, 0.5, 10)
    assert seconds == pytest.approx(0.03 * 2 + 0.02 + 0.05 + 0.01) and share == pytest.approx(0.01 / seconds)
    other = {**chip, "strength": 40.0, "exponent": 0.5}
    assert token_seconds(other, {"Q4_0": 2.0, "Q8_0": 1.0}, 0.5, 10, 10.0)[0] == pytest.approx(2 * seconds)


def test_a_small_model_and_a_chip_that_nobody_measured_are_told_less_surely() -> None:
    def width(phone: str, work: Work) -> float:
        decode = predict(get_phone(phone), work).decode
        assert decode is not None and decode.low < decode.expected < decode.high
        return decode.high / decode.low

    assert width("galaxy-s23", LARGE) < width("galaxy-s23", SMALL)
    assert width("galaxy-s23", LARGE) < width("oneplus-12", LARGE)
    assert interval_factor(0.1, 0.0, 5.0) == pytest.approx(1.1)


def test_more_bits_and_a_longer_context_are_slower() -> None:
    phone = get_phone("galaxy-s23")

    def decode(work: Work, position: int = 288) -> float:
        found = predict(phone, work, position).decode
        assert found is not None
        return found.expected

    assert decode(replace(LARGE, weights={"Q8_0": LARGE.weights["Q4_0"]})) < decode(LARGE)
    assert decode(LARGE, 2000) < decode(LARGE)


def test_what_is_not_known_is_not_told() -> None:
    phone = get_phone("oneplus-12")
    assert predict(phone, LARGE).decode is not None and not predict(phone, LARGE).measured
    assert predict(replace(phone, soc=replace(phone.soc, bandwidth_gb_s=Fact())), LARGE).decode is None
    assert predict(replace(phone, soc=replace(phone.soc, dotprod=Fact(False, "x"))), LARGE).prefill is None
    assert predict(get_phone("redmi-7a"), LARGE).decode is None
    assert predict(get_phone("galaxy-a21s"), LARGE).prefill is None  # little cores alone: a clock of theirs is worth less
    assert not predict(get_phone("raspberry-pi-5"), LARGE).measured  # with one model


def test_the_coefficients_are_what_the_published_measurements_give(shared_data: Path) -> None:
    import phone_prediction

    assert coefficients()["source"] == phone_prediction.SOURCE
    rows = phone_prediction.measurements(shared_data)
    for name, kind in phone_prediction.KINDS.items():
        made, _, _ = phone_prediction.shipped_of(rows, kind)
        assert leaves(made) == pytest.approx(leaves(coefficients()[name]), rel=1e-6)


def leaves(table: Mapping[str, Any], path: str = "") -> dict[str, float]:
    """Return path -> number of a table of tables."""
    found: dict[str, float] = {}
    for key, value in table.items():
        found |= leaves(value, f"{path}/{key}") if isinstance(value, Mapping) else {f"{path}/{key}": float(value)}
    return found


def test_the_measured_files_are_as_large_as_their_weights() -> None:
    """Of published file sizes: 7 MB of vocabulary and metadata beside the tensors (DeepSeek-R1-Distill-Qwen-1.5B-Q4_0, Qwen3-1.7B-Q8_0)."""
    import phone_prediction

    work = phone_prediction.measured_work()
    deepseek, qwen = work["deepseek-r1-distill-qwen-1.5b", "q4_0"], work["qwen3-1.7b", "q8_0"]
    for one, embedding, mib in ((deepseek, "Q4_0", 1013.62), (qwen, "Q8_0", 2059.07)):
        stored = sum(one.decode_gb().values()) * 1e9 + bytes_of(embedding, one.output_weights)
        assert stored / 2**20 == pytest.approx(mib, rel=1e-3)


def test_the_fit_finds_what_made_the_measurements() -> None:
    import numpy as np

    from phone_prediction import KINDS
    from roofline import Cells, Roofline

    chance = np.random.default_rng(0)
    kinds, chips = [*TYPES], ["a", "b"]
    amounts = np.zeros((80, len(kinds)))
    for row in range(80):
        amounts[row, [kinds.index(name) for name in ("Q4_0", "Q6_K")]] = chance.uniform(0.2, 2.0, 2)
    where, layers = np.arange(80) % 2, chance.uniform(16, 40, 80)
    prices = np.array([[0.03, 0.05], [0.015, 0.02]])
    seconds = (amounts[:, [kinds.index("Q4_0"), kinds.index("Q6_K")]] * prices[where]).sum(1) + layers * 3e-4
    seconds[5] *= 3  # a phone that ran short of memory
    fitted = Roofline(Cells(where, amounts, np.zeros(80), layers, seconds), chips, kinds, KINDS["decode"].priors)
    by_type, _, by_layer = fitted.tables()
    for at, chip in enumerate(chips):
        assert [by_type[chip]["Q4_0"], by_type[chip]["Q6_K"]] == pytest.approx(prices[at], rel=0.08)
        assert by_layer[chip] == pytest.approx(3e-4, rel=0.15)
    assert json.dumps(by_type)  # plain numbers: they ship as JSON
