"""The gate: a faithful artifact passes, and every known way to ruin one does not."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import cdcda_export.artifact as artifact_module
from cdcda_export.adapter import Adapter, read_adapter
from cdcda_export.architectures import heads_of, unpermute_rows
from cdcda_export.artifact import Artifact, Order, gate_of, open_artifact, verify_artifact, write_artifact
from cdcda_export.base import Base
from cdcda_export.errors import ConfigError, ExportError, VerificationFailed
from cdcda_export.gates import get_gate
from cdcda_export.progress import Silent
from cdcda_export.recipe import ExportConfig
from cdcda_export.runtime import LlamaCpp, keep_log_to_ourselves, last_words
from cdcda_export.verify import Verification, log_softmax, make_probe, neutral_texts, nll_of, paragraphs
from tiny import make_adapter, make_gguf

CONFIG = ExportConfig(quant="q8_0")


def _scaled(adapter: Adapter, factor: float) -> Adapter:
    return dataclasses.replace(adapter, deltas={n: dataclasses.replace(d, scale=d.scale * factor) for n, d in adapter.deltas.items()})


def _unpermuted(adapter: Adapter, base: Base) -> Adapter:
    deltas = dict(adapter.deltas)
    for name, delta in deltas.items():
        if ".attn_q." in name or ".attn_k." in name:
            deltas[name] = dataclasses.replace(delta, up=unpermute_rows(delta.up, heads_of(base.file, name)))
    return dataclasses.replace(adapter, deltas=deltas)


def _check(base: Base, written: Adapter, true: Adapter, config: ExportConfig, folder: Path) -> Verification:
    """Write an artifact with one adapter, and verify it as if another had been meant."""
    folder.mkdir(exist_ok=True)
    made = write_artifact(Order(base, written, config, folder, folder / "_shared"), Silent())
    probes = base.neutral_probes(neutral_texts()[:4], config.max_tokens)
    with open_artifact(made, config.max_tokens) as (runtime, template):
        return verify_artifact(made, runtime, template, probes, base, true, config, Silent())


@pytest.fixture
def case(llama_base: Path, llama_adapter: Path) -> Iterator[tuple[Base, Adapter]]:
    base = Base(llama_base)
    yield base, read_adapter(llama_adapter, base.file)


@pytest.mark.parametrize("kind", ["gguf", "gguf-lora"])
def test_a_faithful_artifact_passes(tiny_base: Path, tmp_path: Path, kind: str) -> None:
    base = Base(tiny_base)
    adapter = read_adapter(make_adapter(tmp_path / "a", tiny_base), base.file)
    result = _check(base, adapter, adapter, ExportConfig(format=kind, quant="q8_0"), tmp_path / "out")
    assert result.passed
    assert result.texts == result.texts_equal == 4
    assert set(result.arrived) == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert all(abs(share - 1) < 0.01 for share in result.arrived.values())
    assert 0 < result.kl_mean < get_gate("q8_0").kl


@pytest.mark.parametrize("kind", ["gguf", "gguf-lora"])
@pytest.mark.parametrize("mutation", ["left out", "doubled", "unpermuted"])
def test_ruined_adapters_fail(case: tuple[Base, Adapter], tmp_path: Path, mutation: str, kind: str) -> None:
    base, adapter = case
    wrong = {"left out": _scaled(adapter, 0.0), "doubled": _scaled(adapter, 2.0), "unpermuted": _unpermuted(adapter, base)}[mutation]
    with pytest.raises(VerificationFailed, match="of the adapter's change arrived"):
        _check(base, wrong, adapter, ExportConfig(format=kind, quant="q8_0"), tmp_path / "out")


def test_the_runtime_alone_sees_them_too(case: tuple[Base, Adapter], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The KL gate does not lean on the arrival check."""
    monkeypatch.setitem(artifact_module.CHECKS, "gguf", lambda *_: [])
    base, adapter = case
    for name, wrong in (("none", _scaled(adapter, 0.0)), ("double", _scaled(adapter, 2.0)), ("rows", _unpermuted(adapter, base))):
        with pytest.raises(VerificationFailed, match="KL divergence"):
            _check(base, wrong, adapter, CONFIG, tmp_path / name)


@pytest.mark.parametrize("template", [None, "{% for m in messages %}{{ m['content'] }}{% endfor %}"])
def test_a_dropped_or_changed_template_fails(case: tuple[Base, Adapter], tmp_path: Path, template: str | None) -> None:
    base, adapter = case
    folder = tmp_path / "out"
    folder.mkdir()
    stripped = Base(make_gguf(tmp_path / "stripped.gguf", **{"tokenizer.chat_template": template or "{{ 'x' }}"}))
    made = write_artifact(Order(stripped, adapter, CONFIG, folder, folder), Silent())
    probes = base.neutral_probes(neutral_texts()[:3], 512)
    with open_artifact(made, 512) as (runtime, carried), pytest.raises(VerificationFailed, match="other token ids.*3 of 3"):
        verify_artifact(made, runtime, carried, probes, base, adapter, CONFIG, Silent())


def test_a_changed_tokenizer_fails(case: tuple[Base, Adapter], tmp_path: Path) -> None:
    base, adapter = case
    other = Base(make_gguf(tmp_path / "other.gguf", **{"tokenizer.ggml.merges": ["t h"]}))
    (tmp_path / "o").mkdir()
    made = write_artifact(Order(other, adapter, CONFIG, tmp_path / "o", tmp_path), Silent())
    probes = base.neutral_probes(neutral_texts()[:3], 512)
    with open_artifact(made, 512) as (runtime, carried), pytest.raises(VerificationFailed, match="other token ids"):
        verify_artifact(made, runtime, carried, probes, base, adapter, CONFIG, Silent())


def test_a_base_of_the_same_type_that_swallows_the_change_is_refused(tmp_path: Path) -> None:
    path = make_gguf(tmp_path / "base.gguf", kind="Q4_1")
    base = Base(path)
    faint = _scaled(read_adapter(make_adapter(tmp_path / "a", path), base.file), 0.02)
    peft = make_adapter(tmp_path / "b", path, alpha=8.0 * 0.02)
    with pytest.raises(VerificationFailed, match=r"swallows small changes.*q4_0 or q8_0"):
        _check(base, faint, read_adapter(peft, base.file), ExportConfig(quant="q4_1"), tmp_path / "out")


def test_gates_come_from_the_file_unless_a_recipe_says_otherwise(case: tuple[Base, Adapter]) -> None:
    base = case[0].file
    assert gate_of(ExportConfig(quant="q8_0"), base) == get_gate("q8_0")
    assert gate_of(ExportConfig(quant="q8_0", max_kl=0.5), base).kl == 0.5
    with pytest.raises(ConfigError, match="no measured gate"):
        get_gate("q3_k")


def test_stricter_types_have_stricter_gates() -> None:
    assert get_gate("f16").kl <= get_gate("q8_0").kl < get_gate("q4_0").kl
    assert get_gate("f16").top1 >= get_gate("q8_0").top1 > get_gate("q4_0").top1


def test_nll_and_log_softmax_are_exact() -> None:
    logits = np.array([[0.0, np.log(3.0)], [1000.0, 0.0]], np.float32)
    np.testing.assert_allclose(np.exp(log_softmax(logits)), [[0.25, 0.75], [1.0, 0.0]], atol=1e-7)
    np.testing.assert_allclose(nll_of(logits, [1, 0]), [-np.log(0.75), 0.0], atol=1e-6)


def test_an_answer_ends_with_its_first_end_marker_and_a_long_prompt_is_refused(case: tuple[Base, Adapter]) -> None:
    from cdcda_mobile.dataset import encoding_of

    encoding = encoding_of(case[0].file)
    probe = make_probe(encoding.template, encoding.tokenizer, encoding.eos, "hello", "world", 256)
    assert probe.answer[-1] == 2
    assert probe.answer.count(2) == 1
    with pytest.raises(ExportError, match="takes"):
        make_probe(encoding.template, encoding.tokenizer, encoding.eos, "hello " * 200, "world", 64)


def test_neutral_text_ships_and_paragraphs_are_split() -> None:
    assert len(neutral_texts()) >= 8
    assert paragraphs("short\n\nthis one is long enough\nfor use\n\n") == ["this one is long enough for use"]


def test_artifact_card_names_the_final_place(case: tuple[Base, Adapter], tmp_path: Path) -> None:
    base, adapter = case
    made: Artifact = write_artifact(Order(base, adapter, CONFIG, tmp_path, tmp_path), Silent())
    assert made.as_card(Path("runs/42/gguf-q8_0"))["file"] == "runs/42/gguf-q8_0/model.gguf"


def test_the_log_is_quiet_again_after_somebody_heard_it_aloud(llama_base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keep_log_to_ourselves(aloud=True)
    LlamaCpp(llama_base, vocab_only=True).close()  # which llama.cpp warns of, and a new model asks for silence
    assert capsys.readouterr().err == "" and last_words()
