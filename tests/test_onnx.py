"""ONNX directories of tiny models and of the real one, in ONNX Runtime."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from cdcda_export.base_model import load_base_model
from cdcda_export.chat_template import template_of
from cdcda_export.errors import ExportError, FileError, MissingDependency, QuantizationError
from cdcda_export.gguf import GgufFile
from cdcda_export.onnx import OnnxModel, OnnxResult, end_tokens, export_onnx
from cdcda_export.onnx_quant import Blocks, Skeleton, blocks_of, quantize_blocks, save_model, trace
from cdcda_export.progress import Plain, Silent
from cdcda_export.verify import log_softmax
from tiny import make_gguf

IDS = [int(i) for i in np.random.default_rng(3).integers(3, 250, 40)]


@dataclass(frozen=True)
class Tiny:
    base: GgufFile
    model: object
    directory: Path
    results: dict[str, OnnxResult]


def reference(model: object, ids: list[int]) -> np.ndarray:
    import torch

    with torch.no_grad():
        return np.asarray(model(torch.tensor([ids])).logits[0])  # type: ignore[operator]


def kl(expected: np.ndarray, found: np.ndarray) -> float:
    p, q = log_softmax(expected), log_softmax(found)
    return float((np.exp(p) * (p - q)).sum(-1).mean())


@pytest.fixture(scope="module")
def tiny(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    base = GgufFile(tiny_base)
    model = load_base_model(base)
    directory = tmp_path_factory.mktemp("onnx")
    results = {quant: export_onnx(model, base, quant, directory / quant, Silent()) for quant in ("int8", "int4")}
    return Tiny(base, model, directory, results)


@pytest.mark.parametrize(("quant", "bound"), [("int8", 0.01), ("int4", 0.3)])
def test_logits_are_those_of_the_model(tiny: Tiny, quant: str, bound: float) -> None:
    expected = reference(tiny.model, IDS)
    with OnnxModel(tiny.directory / quant) as model:
        found = model.logits(IDS)
    assert found.shape == expected.shape and found.dtype == np.float32
    assert kl(expected, found) < bound
    # The bound means something: predictions of other positions are far outside it.
    assert kl(expected, np.roll(found, 1, axis=0)) > 2 * bound


@pytest.mark.parametrize("quant", ["int8", "int4"])
def test_cached_steps_equal_full_recomputation(tiny: Tiny, quant: str) -> None:
    with OnnxModel(tiny.directory / quant) as model:
        prompt = IDS[:10]
        ids, past = list(prompt), model._step(prompt, model._empty(), 0)[1]
        for token in IDS[10:34]:  # beyond the sliding window of the tiny gemma3
            step, past = model._step([token], past, len(ids))
            ids.append(token)
            whole = model.logits(ids)[-1]
            assert np.abs(step[-1] - whole).max() < 0.02 * np.abs(whole).max()
        model.ends = frozenset()
        assert len(model.greedy(prompt, 12)) == 12


def test_no_large_float_remains_and_the_checker_passes(tiny: Tiny) -> None:
    import onnx

    for quant, result in tiny.results.items():
        model = onnx.load(str(result.files["model.onnx"]))
        onnx.checker.check_model(model)
        rows = [t for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT and not t.name.endswith(".scales")]
        assert rows and all(len(t.dims) <= 1 for t in rows)
        assert sum(t.name.startswith("model.embed_tokens") and t.name.endswith(".int8") for t in model.graph.initializer) == 1
        assert {n.op_type for n in model.graph.node} >= {"MatMulNBits", "GatherBlockQuantized"}
        assert set(result.tensor_types) == ({"int8", "float32"} if quant == "int8" else {"int8", "int4", "float32"})
        assert result.bytes == (tiny.directory / quant / "model.onnx").stat().st_size


def test_the_directory_is_complete_and_nothing_else(tiny: Tiny) -> None:
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    result, directory = tiny.results["int8"], tiny.directory / "int8"
    assert {p.name for p in directory.iterdir()} == set(result.files)
    assert AutoConfig.from_pretrained(directory).model_type.startswith(tiny.base.architecture)
    assert GenerationConfig.from_pretrained(directory).eos_token_id == end_tokens(tiny.base) == [2, 0]
    text = template_of(tiny.base).prompt("the string, 42")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    with OnnxModel(directory) as model:
        ids = model.encode(text)
        assert tokenizer(text, add_special_tokens=False).input_ids == ids
        assert "the string, 42" in model.decode(ids) and "<|im_end|>" not in model.decode(ids)
    turns = [{"role": "user", "content": "the string, 42"}]
    assert tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) == text
    assert (directory / "chat_template.jinja").read_text() == template_of(tiny.base).source


def test_equal_inputs_give_equal_bytes_and_no_noise(llama_base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    base = GgufFile(llama_base)
    for name in ("one", "two"):
        export_onnx(load_base_model(base), base, "int4", tmp_path / name, Silent())
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name
    assert str(tmp_path).encode() not in (tmp_path / "one" / "model.onnx").read_bytes()
    assert b"site-packages" not in (tmp_path / "one" / "model.onnx").read_bytes()
    assert capfd.readouterr() == ("", "")


def test_a_skeleton_serves_other_weights(llama_base: Path, tmp_path: Path) -> None:
    model = load_base_model(GgufFile(llama_base))
    skeleton = trace(model, tmp_path / ".trace")
    assert not (tmp_path / ".trace").exists()
    weights = {name: p.detach().numpy() for name, p in model.named_parameters()}
    assert len(skeleton.graph) < 400_000
    other, _ = Skeleton(skeleton.graph).fill(weights | {"model.norm.weight": weights["model.norm.weight"] * 2}, "int8")
    same, _ = skeleton.fill(weights, "int8")
    pairs = zip(same.graph.initializer, other.graph.initializer, strict=True)
    assert [a.name for a, b in pairs if a.raw_data != b.raw_data] == ["model.norm.weight"]


def test_a_large_model_keeps_its_tensors_beside_the_graph(tiny: Tiny, tmp_path: Path) -> None:
    import shutil

    import onnx

    copy = tmp_path / "copy"
    shutil.copytree(tiny.directory / "int8", copy)
    save_model(onnx.load(str(copy / "model.onnx")), copy / "model.onnx", limit=1000)
    assert (copy / "model.onnx.data").stat().st_size > 30_000
    with OnnxModel(copy) as split, OnnxModel(tiny.directory / "int8") as whole:
        assert np.array_equal(split.logits(IDS), whole.logits(IDS))


def test_an_untied_head_is_quantized_too(tmp_path: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    base = GgufFile(make_gguf(tmp_path / "t.gguf"))
    vocabulary = base["token_embd.weight"].shape[0]
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).eval()
    result = export_onnx(model, base, "int4", tmp_path / "out", Silent())
    assert result.tensor_types == {"float32": 3, "int4": 5, "int8": 4}
    with OnnxModel(tmp_path / "out") as loaded:
        assert kl(reference(model, IDS), loaded.logits(IDS)) < 0.05


def test_rows_no_block_divides_are_refused() -> None:
    assert blocks_of("model.layers.0.mlp.up_proj.weight", 40, "int8") == Blocks(8, 32, symmetric=True)
    with pytest.raises(QuantizationError, match="rows of 40 values"):
        blocks_of("model.embed_tokens.weight", 40, "int8")


def test_broken_weights_are_refused() -> None:
    with pytest.raises(ExportError, match="finite"):
        quantize_blocks(np.full((32, 32), np.nan, np.float32), Blocks(8, 32, symmetric=True))


@pytest.mark.parametrize("name", ["model.onnx", "tokenizer.json", "config.json", "generation_config.json"])
def test_missing_and_truncated_files_have_a_sentence(tiny: Tiny, tmp_path: Path, name: str) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(tiny.directory / "int8", copy)
    content = (copy / name).read_bytes()
    (copy / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(FileError, match="truncated"):
        OnnxModel(copy)
    (copy / name).unlink()
    with pytest.raises(FileError, match=name):
        OnnxModel(copy)


def test_an_unknown_tokenizer_is_refused_before_the_export(tmp_path: Path) -> None:
    base = GgufFile(make_gguf(tmp_path / "t.gguf", **{"tokenizer.ggml.pre": "strange"}))
    with pytest.raises(ExportError, match="strange"):
        export_onnx(load_base_model(base), base, "int8", tmp_path / "out", Silent())
    assert not (tmp_path / "out" / "model.onnx").exists()


def test_missing_packages_name_the_extra(llama_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_base_model(GgufFile(llama_base))
    monkeypatch.setitem(sys.modules, "optimum.exporters.onnx.convert", None)
    with pytest.raises(MissingDependency, match=r"cdcda-mobile\[onnx\]"):
        trace(model, tmp_path / ".trace")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingDependency, match=r"cdcda-mobile\[onnx\]"):
        OnnxModel(tmp_path)


def test_progress_names_both_steps(llama_base: Path, tmp_path: Path) -> None:
    import io

    base, stream = GgufFile(llama_base), io.StringIO()
    export_onnx(load_base_model(base), base, "int8", tmp_path, Plain(stream))
    assert "exporting the graph: done" in stream.getvalue() and "quantizing to int8: done" in stream.getvalue()


@pytest.mark.model
def test_the_real_model_stays_inside_its_bounds(real_base: Path, tmp_path: Path) -> None:
    import resource
    import time

    base = GgufFile(real_base)
    model = load_base_model(base)
    began = time.monotonic()
    results = {quant: export_onnx(model, base, quant, tmp_path / quant, Silent()) for quant in ("int8", "int4")}
    seconds = time.monotonic() - began
    text = template_of(base).prompt(
        "Summarise: the town council met on Tuesday to discuss the old bridge. Most members want to repair it before winter, "
        "because the detour through the valley costs the school bus twenty minutes every morning. One member asked for a new "
        "bridge instead, wide enough for bicycles, and the council will vote on both plans at its next meeting in October."
    )
    # Measured: 0.011 and 0.158.
    bounds = {"int8": (0.03, 150e6), "int4": (0.2, 120e6)}
    for quant, (bound, size) in bounds.items():
        with OnnxModel(tmp_path / quant) as loaded:
            ids = loaded.encode(text)
            divergence = kl(reference(model, ids), loaded.logits(ids))
            began = time.monotonic()
            answer = loaded.greedy(ids, 24)
            rate = len(answer) / (time.monotonic() - began)
            print(f"{quant}: KL {divergence:.4f}, {results[quant].bytes / 1e6:.1f} MB, {rate:.1f} tok/s: {loaded.decode(answer)!r}")
        assert divergence < bound and results[quant].bytes < size
        assert len(loaded.decode(answer).split()) >= 5
    print(f"two exports: {seconds:.1f} s, peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.1f} GB")
