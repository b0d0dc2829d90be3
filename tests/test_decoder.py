"""Our decoder against transformers and against llama.cpp, for every architecture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from cdcda_export.adapter import read_peft
from cdcda_export.base_model import load_base_model
from cdcda_export.chat_template import template_of
from cdcda_export.decoder import Decoder
from cdcda_export.errors import FileError, UnsupportedArchitecture
from cdcda_export.gguf import GgufFile
from cdcda_export.reference import lora_of
from cdcda_export.runtime import LlamaCpp
from cdcda_export.tokenizer import bpe_tokenizer
from tiny import LAYERS, make_adapter, make_gguf, merge_peft

TEXT = "<|im_start|>user\nThe rain in the north is 42 m deep, and on it goes: resting.<|im_end|>\n"


@torch.no_grad()
def test_logits_equal_transformers(tiny_base: Path) -> None:
    base = GgufFile(tiny_base)
    ids = bpe_tokenizer(base).encode(TEXT)
    ours = Decoder(base).logits([ids])
    theirs = load_base_model(base)(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_logits_equal_llama_cpp(tiny_base: Path) -> None:
    base = GgufFile(tiny_base)
    with LlamaCpp(tiny_base, n_ctx=128) as runtime:
        ids = runtime.encode(TEXT)
        theirs = runtime.logits(ids)
    np.testing.assert_allclose(Decoder(base).logits([ids]).numpy(), theirs, atol=0.05)


@torch.no_grad()
def test_packed_rows_equal_single_rows(tiny_base: Path) -> None:
    decoder = Decoder(GgufFile(tiny_base))
    rows = [[5, 9, 30, 7], [44, 3], list(range(20, 60))]
    packed = decoder.logits(rows)
    single = torch.cat([decoder.logits([row]) for row in rows])
    torch.testing.assert_close(packed, single, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_an_adapter_beside_the_layers_equals_one_merged_in_transformers(tiny_base: Path, tmp_path: Path) -> None:
    base = GgufFile(tiny_base)
    peft = read_peft(make_adapter(tmp_path / "a", tiny_base))
    model = load_base_model(base)
    merge_peft(model, peft)
    ids = list(range(10, 50))
    ours = Decoder(base).logits([ids], lora_of(peft))
    torch.testing.assert_close(ours, model(torch.tensor([ids])).logits[0], rtol=1e-3, atol=1e-3)
    assert (ours - Decoder(base).logits([ids])).abs().max() > 0.5  # the adapter does something


@torch.no_grad()
def test_an_observer_sees_the_input_of_every_linear_layer_and_changes_nothing(tiny_base: Path) -> None:
    decoder, ids = Decoder(GgufFile(tiny_base)), [5, 9, 30, 7]
    plain, seen = decoder.logits([ids]), {}
    decoder.observe = seen.__setitem__
    torch.testing.assert_close(decoder.logits([ids]), plain, rtol=0, atol=0)
    assert set(seen) == {*decoder.linear, "lm_head"}
    for name, x in seen.items():
        assert x.shape == (len(ids), decoder.weights[f"{name}.weight"].shape[1]), name


def test_global_layers_of_gemma_see_everything(tmp_path: Path) -> None:
    path = make_gguf(tmp_path / "g.gguf", "gemma3", layers=6)
    base, ids = GgufFile(path), list(range(3, 60))
    with torch.no_grad():
        ours, theirs = Decoder(base).logits([ids]), load_base_model(base)(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    with LlamaCpp(path, n_ctx=128) as runtime:
        np.testing.assert_allclose(ours.numpy(), runtime.logits(ids), atol=0.05)


def test_an_incomplete_file_names_the_tensor(tmp_path: Path) -> None:
    path = make_gguf(tmp_path / "m.gguf", **{"llama.block_count": LAYERS + 1})
    with pytest.raises(FileError, match=r"blk\.2\."):
        Decoder(GgufFile(path))


def test_unknown_architectures_and_scalings_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedArchitecture, match="mamba"):
        Decoder(GgufFile(make_gguf(tmp_path / "m.gguf", **{"general.architecture": "mamba"})))
    with pytest.raises(UnsupportedArchitecture, match="yarn"):
        Decoder(GgufFile(make_gguf(tmp_path / "y.gguf", **{"llama.rope.scaling.type": "yarn"})))


@pytest.mark.parametrize("text", [TEXT, "naïve café 漢字 🙂 1234567 don't  stop\n\n\tnow", "<|im_end|><|im_end|> x", "", "   "])
def test_token_ids_equal_llama_cpps(tiny_base: Path, text: str) -> None:
    base = GgufFile(tiny_base)
    with LlamaCpp(tiny_base, vocab_only=True) as runtime:
        assert bpe_tokenizer(base).encode(text) == runtime.encode(text)


def test_answers_continue_their_prompt(tiny_base: Path) -> None:
    template = template_of(GgufFile(tiny_base))
    assert template.prompt("hello").endswith("<|im_start|>assistant\n")
    assert template.answer("hello", "yes") == "yes<|im_end|>\n"
