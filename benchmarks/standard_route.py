"""The standard route from an adapter to a phone file, with its authors' own tools: PEFT merges, llama.cpp converts and quantizes.

What our export is compared with, in speed (``export_speed.py``) and byte for byte (``tests/reference.py``).

    python benchmarks/standard_route.py HF_DIRECTORY ADAPTER OUT.gguf q4_0
"""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from cdcda_export.converter import CONVERT_LORA, CONVERT_MODEL, run_converter
from cdcda_export.gguf import GgufFile

TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja")


def merge_with_peft(hf_directory: Path, adapter: Path, out: Path) -> Path:
    """Merge as everybody does: the base in float32, ``merge_and_unload``, ``save_pretrained``, the tokenizer copied."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(hf_directory, dtype=torch.float32)
    merged = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    merged.save_pretrained(out)
    copy_tokenizer(hf_directory, out)
    return out


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy a tokenizer's files from one Hugging Face directory to another."""
    for pattern in TOKENIZER_FILES:
        for path in source.glob(pattern):
            shutil.copyfile(path, target / path.name)


def convert_f32(hf_directory: Path, out: Path) -> Path:
    """Run ``convert_hf_to_gguf.py --outtype f32``."""
    run_converter(CONVERT_MODEL, [hf_directory, "--outfile", out, "--outtype", "f32"])
    return out


def convert_lora(adapter: Path, hf_directory: Path, out: Path) -> Path:
    """Run ``convert_lora_to_gguf.py``."""
    run_converter(CONVERT_LORA, [adapter, "--base", hf_directory, "--outfile", out])
    return out


def quantize_with_llama_cpp(
    f32_gguf: Path,
    out: Path,
    ftype_name: str,
    imatrix: Path | Mapping[str, np.ndarray] | None = None,
    pure: bool = False,
    tensor_types: Mapping[str, int] | None = None,
    threads: int = 0,
) -> Path:
    """Quantize a file as ``llama-quantize`` does: through ``llama_model_quantize``, the function that it calls.

    Args:
        f32_gguf: the file to quantize.
        out: where to.
        ftype_name: for example ``q4_k_m``.
        imatrix: an importance matrix, as GGUF or as tensor name -> mean squared input of each column.
        pure: every matrix in the one type.
        tensor_types: regular expression of tensor names -> ggml's type number (``--tensor-type``).
        threads: 0 for all.

    Raises:
        RuntimeError: llama.cpp refused.
    """
    import llama_cpp

    from cdcda_export.runtime import keep_log_to_ourselves

    keep_log_to_ourselves()
    params = llama_cpp.llama_model_quantize_default_params()
    params.nthread, params.pure, params.allow_requantize = threads, pure, True
    params.ftype = 0 if ftype_name == "f32" else getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{ftype_name.upper()}")
    if imatrix is not None:
        entries = read_imatrix(imatrix) if isinstance(imatrix, Path) else dict(imatrix)
        kept = {name.encode(): np.ascontiguousarray(values, np.float32) for name, values in entries.items()}
        data = (llama_cpp.llama_model_imatrix_data * (len(kept) + 1))()
        for item, (name, values) in zip(data, kept.items(), strict=False):
            item.name, item.data, item.size = name, values.ctypes.data_as(ctypes.POINTER(ctypes.c_float)), values.size
        params.imatrix = data
    if tensor_types:
        overrides = (llama_cpp.llama_model_tensor_override * (len(tensor_types) + 1))()
        for override, (pattern, kind) in zip(overrides, tensor_types.items(), strict=False):
            override.pattern, override.type = pattern.encode(), kind
        params.tt_overrides = overrides
    status = llama_cpp.llama_model_quantize(str(f32_gguf).encode(), str(out).encode(), ctypes.byref(params))
    if status:
        raise RuntimeError(f"llama_model_quantize({f32_gguf}, {ftype_name}) returned {status}")
    return out


def read_imatrix(path: Path) -> dict[str, np.ndarray]:
    """Read an importance matrix in llama.cpp's GGUF form as ``llama-quantize`` does: sums over counts, dense models only."""
    file = GgufFile(path)
    names = [name.removesuffix(".in_sum2") for name in file if name.endswith(".in_sum2")]
    floats = {name: tensor.data.view(np.float32) for name, tensor in file.items()}
    return {name: floats[f"{name}.in_sum2"] / floats[f"{name}.counts"] for name in names}


def main() -> None:
    """Run the whole route: base directory, adapter directory, file to write, quantization."""
    hf_directory, adapter, out = map(Path, sys.argv[1:4])
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        merged = merge_with_peft(hf_directory, adapter, Path(folder) / "merged")
        quantize_with_llama_cpp(convert_f32(merged, Path(folder) / "merged-f32.gguf"), out, sys.argv[4])
        with out.open("rb") as stream:
            os.fsync(stream.fileno())


if __name__ == "__main__":
    main()
