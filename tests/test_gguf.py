"""Reading and writing GGUF, held against the reference reader and against damaged files."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from cdcda_export.architectures import heads_of
from cdcda_export.chat_template import template_of
from cdcda_export.errors import ExportError, FileError
from cdcda_export.ggml import GgmlType
from cdcda_export.gguf import GgufFile, InMemory, write_gguf
from tiny import make_gguf


def test_metadata_and_tensors_equal_the_reference_readers(tiny_base: Path) -> None:
    ours, reference = GgufFile(tiny_base), gguf.GGUFReader(tiny_base)
    assert list(ours) == [t.name for t in reference.tensors]
    for tensor in reference.tensors:
        assert ours[tensor.name].shape == tuple(int(n) for n in tensor.shape[::-1])
        np.testing.assert_array_equal(ours[tensor.name].data.view(np.float32), np.asarray(tensor.data).reshape(-1))
    for key in ours.keys_of_metadata():
        expected = reference.fields[key].contents()
        got = ours.get_value(key)
        assert (list(got) if isinstance(got, np.ndarray | list) else got) == expected, key


def test_a_copy_is_the_same_file(tiny_base: Path, tmp_path: Path) -> None:
    base = GgufFile(tiny_base)

    class Copy:
        def __init__(self, name: str) -> None:
            self.name, self.shape, self.type = name, base[name].shape, base[name].type

        def read(self) -> np.ndarray:
            return base[self.name].data

    copy = tmp_path / "copy.gguf"
    write_gguf(copy, [base.raw_pair(k) for k in base.keys_of_metadata()], [Copy(n) for n in base])
    assert copy.read_bytes() == tiny_base.read_bytes()


@pytest.mark.parametrize("keep", [0, 3, 20, 200, 5000, -1000, -1])
def test_a_truncated_file_is_refused_in_one_sentence(llama_base: Path, tmp_path: Path, keep: int) -> None:
    damaged = tmp_path / "cut.gguf"
    damaged.write_bytes(llama_base.read_bytes()[:keep])
    with pytest.raises(FileError) as caught:
        GgufFile(damaged)
    assert str(damaged) in str(caught.value)


def test_random_damage_never_escapes_as_another_error(llama_base: Path, tmp_path: Path) -> None:
    rng, whole = np.random.default_rng(0), bytearray(llama_base.read_bytes())
    damaged = tmp_path / "damaged.gguf"
    for _ in range(200):
        data = bytearray(whole)
        for at in rng.integers(0, 12000, 4):
            data[int(at)] = int(rng.integers(0, 256))
        damaged.write_bytes(data)
        try:
            file = GgufFile(damaged)
            for key in file.keys_of_metadata():
                file.get_value(key)
        except FileError:
            continue


def test_missing_file_and_wrong_format(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="Cannot read"):
        GgufFile(tmp_path / "nothing.gguf")
    other = tmp_path / "model.safetensors"
    other.write_bytes(b"PK\x03\x04" * 20)
    with pytest.raises(FileError, match="not a GGUF file"):
        GgufFile(other)


def test_missing_hyperparameter_names_the_key(tmp_path: Path) -> None:
    path = make_gguf(tmp_path / "m.gguf", **{"llama.block_count": None})
    with pytest.raises(FileError, match=r"llama\.block_count"):
        GgufFile(path).hparam("block_count")


@pytest.mark.parametrize("value", [0, "x", 0.5, True, ["a"]])
@pytest.mark.parametrize("key", ["block_count", "attention.head_count", "attention.head_count_kv", "embedding_length"])
def test_a_count_that_is_none_is_refused_by_its_key(key: str, value: object, tmp_path: Path) -> None:
    base = GgufFile(make_gguf(tmp_path / "m.gguf", **{f"llama.{key}": value}))
    with pytest.raises(FileError, match=rf"'llama\.{key}' is .*, not a positive whole number"):
        base.hparam(key)


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [
        ("general.file_type", "q4_0", "a whole number"),
        ("tokenizer.ggml.eos_token_id", "two", "a whole number"),
        ("tokenizer.ggml.tokens", "one text", "a list of texts"),
        ("tokenizer.ggml.merges", 3, "a list of texts"),
        ("llama.rope.freq_base", "x", "a positive number"),
        ("llama.attention.layer_norm_rms_epsilon", float("nan"), "a positive number"),
    ],
)
def test_metadata_of_another_kind_is_refused_by_its_key(key: str, value: object, wanted: str, tmp_path: Path) -> None:
    base = GgufFile(make_gguf(tmp_path / "m.gguf", **{key: value}))
    with pytest.raises(FileError, match=rf"'{key}' is .*, not {wanted}"):
        base.get_value(key)


@pytest.mark.parametrize("alignment", [0, "x"])
def test_a_senseless_alignment_is_refused(alignment: object, tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"'general\.alignment' is"):
        GgufFile(make_gguf(tmp_path / "m.gguf", **{"general.alignment": alignment}))


def test_heads_that_do_not_divide_the_rows_are_refused(tmp_path: Path) -> None:
    base = GgufFile(make_gguf(tmp_path / "m.gguf", **{"llama.attention.head_count": 5}))
    with pytest.raises(FileError, match=r"64 rows of blk\.0\.attn_q\.weight are no 5 heads"):
        heads_of(base, "blk.0.attn_q.weight")


def test_an_empty_tensor_is_refused(tmp_path: Path) -> None:
    empty = InMemory("a", (0, 2, 2), GgmlType("F32", 0, 1, 4), np.empty(0, np.uint8))
    write_gguf(tmp_path / "m.gguf", [], [empty])
    with pytest.raises(FileError, match=r"tensor 'a' of type F32 has shape \[0, 2, 2\]"):
        GgufFile(tmp_path / "m.gguf")


@pytest.mark.parametrize(("number", "size"), [(24, 1), (25, 2), (26, 4), (27, 8), (28, 8)])
def test_integers_and_doubles_are_refused_by_the_tensors_name(number: int, size: int, tmp_path: Path) -> None:
    """ggml has no routine that decodes them: asking for one would end the process without a word."""
    matrix = InMemory("blk.0.attn_q.weight", (2, 2), GgmlType("", number, 1, size), np.zeros(4 * size, np.uint8))
    write_gguf(tmp_path / "m.gguf", [], [matrix])
    with pytest.raises(FileError, match=rf"blk\.0\.attn_q\.weight is stored in ggml type {number}, which cannot be read"):
        GgufFile(tmp_path / "m.gguf")


@pytest.mark.parametrize(
    "template",
    [
        '{{ 1 + "x" }}',
        "{{ 1 / 0 }}",
        "{{ messages[7].content.x }}",
        "{{ strftime_now(5) }}",
        "{% for %}",
        "{{ raise_exception('a\nb') }}",
        7,
    ],
)
def test_a_template_that_cannot_be_rendered_is_one_sentence(template: object, tmp_path: Path) -> None:
    base = GgufFile(make_gguf(tmp_path / "m.gguf", **{"tokenizer.chat_template": template}))
    with pytest.raises(ExportError, match="chat template") as raised:
        template_of(base).prompt("hello")
    assert "\n" not in str(raised.value)


def test_special_tokens_outside_of_the_vocabulary_are_left_out(tmp_path: Path) -> None:
    base = GgufFile(make_gguf(tmp_path / "m.gguf", **{"tokenizer.ggml.bos_token_id": 1 << 30}))
    assert (template_of(base).bos_token, template_of(base).eos_token) == ("", "<|im_end|>")


def test_type_histogram_counts_every_tensor(tmp_path: Path) -> None:
    file = GgufFile(make_gguf(tmp_path / "q.gguf", kind="Q8_0"))
    assert file.type_histogram() == {"Q8_0": 15, "F32": 5}
