"""Reading and writing GGUF, held against the reference reader and against damaged files."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from cdcda_export.errors import FileError
from cdcda_export.gguf import GgufFile, write_gguf
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


def test_type_histogram_counts_every_tensor(tmp_path: Path) -> None:
    file = GgufFile(make_gguf(tmp_path / "q.gguf", kind="Q8_0"))
    assert file.type_histogram() == {"Q8_0": 15, "F32": 5}
