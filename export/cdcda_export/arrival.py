"""Is the personal change in the file? The question that quantization noise cannot hide, asked of every tensor that was rewritten.

For a tensor with change D (scale * B A, or the new weights minus the old ones), in Hugging Face's layout and from the adapter's own
file, two numbers are taken from the artifact:

- the share that *arrived*, <W_artifact - W_base, D> / <D, D>. Rounding noise is nearly orthogonal to D, so a faithful artifact is near 1
  even at 4 bits; an adapter left out gives 0, a doubled scale 2, unpermuted rows about 0 for q and k. It also shows what merging into a
  base of the same 4-bit type does: weights that lie on the grid already fall back onto it, and the change is gone.
- the *error*, |W_artifact - (W_base + D)| / |W_base + D|: what the type costs, bounded for each type by a committed measurement.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cdcda_export.adapter import PeftWeights
from cdcda_export.architectures import Architecture, get_architecture, heads_of, unpermute_rows
from cdcda_export.base_model import hf_tensor
from cdcda_export.ggml import dequantize
from cdcda_export.gguf import GgufFile
from cdcda_export.runtime import cpu_threads


@dataclass(frozen=True)
class TensorCheck:
    """One rewritten tensor: its GGUF name, kind of layer (``q_proj``), stored type, arrived share (None: no change), relative error.

    ``noise`` is the spread that rounding errors of this size, were they independent of the change, would give the share.
    """

    tensor: str
    kind: str
    type: str
    arrived: float | None
    error: float
    noise: float = 0.0


def by_kind(checks: Iterable[TensorCheck]) -> dict[str, float]:
    """Return the arrived share by kind of layer, the mean over its tensors."""
    shares: dict[str, list[float]] = {}
    for check in checks:
        if check.arrived is not None:
            shares.setdefault(check.kind, []).append(check.arrived)
    return {kind: float(np.mean(values)) for kind, values in shares.items()}


# Says how an artifact holds a parameter (its Hugging Face name, its name in the base GGUF): type, and float32 in Hugging Face's layout.
Stored = Callable[[str, str], tuple[str, np.ndarray]]


def check_tensors(base: GgufFile, peft: PeftWeights, stored: Stored) -> list[TensorCheck]:
    """Compare every tensor that an adapter changes with what base and adapter say it should be, on every core."""
    architecture = get_architecture(base.architecture, str(base.path))

    def check(parameter: str) -> TensorCheck | None:
        name = architecture.gguf_name(parameter)
        if name is None or name not in base:
            return None  # an lm_head tied to the embedding
        before = hf_tensor(base, architecture, name)
        replaced, module = peft.replaced.get(parameter), parameter.removesuffix(".weight")
        change = peft.change(module) if replaced is None else replaced - before
        kind, after = stored(parameter, name)
        moved = after - before
        arrived = _share(moved, change)
        moved -= change
        wrong, size = _norm(moved), _norm(change)
        weights = np.add(before, change, out=change)
        if architecture.norm_offset and name.endswith("norm.weight"):
            weights += np.float32(architecture.norm_offset)  # Gemma's norms are stored with 1 added, and rounded so
        base.release(name)
        noise = wrong / (size * moved.size**0.5) if size else 0.0
        return TensorCheck(name, _kind(module), kind, arrived, wrong / max(_norm(weights), 1e-30), noise)

    return _all(check, [*(f"{module}.weight" for module in peft.pairs), *peft.replaced])


def check_merged(base: GgufFile, artifact: GgufFile, peft: PeftWeights) -> list[TensorCheck]:
    """Check a merged GGUF."""
    architecture = get_architecture(base.architecture, str(base.path))
    return check_tensors(base, peft, lambda _, name: (artifact[name].type.name, hf_tensor(artifact, architecture, name)))


def check_lora(base: GgufFile, path: Path, peft: PeftWeights) -> list[TensorCheck]:
    """Check the change that an adapter GGUF applies at run time; the error is relative to the change."""
    architecture, file = get_architecture(base.architecture, str(base.path)), GgufFile(path)
    alpha = float(file.get_value("adapter.lora.alpha"))

    def check(module: str) -> TensorCheck:
        name = architecture.gguf_name(f"{module}.weight") or ""
        wanted, got = peft.change(module), _applied(file, name, base, architecture, alpha)
        if got is None:
            return TensorCheck(name, _kind(module), "none", 0.0, 1.0)
        error = _norm(got - wanted) / max(_norm(wanted), 1e-30)
        return TensorCheck(name, _kind(module), file[f"{name}.lora_a"].type.name, _share(got, wanted), error)

    return _all(check, list(peft.pairs))


def _all(check: Callable[[str], TensorCheck | None], names: list[str]) -> list[TensorCheck]:
    with ThreadPoolExecutor(cpu_threads()) as pool:
        return [found for found in pool.map(check, names) if found is not None]


def _applied(file: GgufFile, name: str, base: GgufFile, architecture: Architecture, alpha: float) -> np.ndarray | None:
    """Return alpha / rank * B A as llama.cpp applies it, in Hugging Face's row order."""
    if f"{name}.lora_a" not in file or f"{name}.lora_b" not in file:
        return None
    down, up = (dequantize(t.data, t.type, t.shape) for t in (file[f"{name}.lora_a"], file[f"{name}.lora_b"]))
    if name == "token_embd.weight":  # rows are looked up: A lies transposed, and the product is (B A^T)^T
        return (down @ up.T) * np.float32(alpha / down.shape[1] if alpha else 1)
    dense = (up @ down) * np.float32(alpha / down.shape[0] if alpha else 1)  # llama.cpp takes alpha 0 for "no scaling"
    return unpermute_rows(dense, heads_of(base, name)) if architecture.is_permuted(name) else dense


def _kind(module: str) -> str:
    return module.rsplit(".", 1)[-1]


def _norm(values: np.ndarray) -> float:
    return float(np.sqrt(np.vdot(values, values)))


def _share(moved: np.ndarray, change: np.ndarray) -> float | None:
    size = float(np.vdot(change, change))
    return float(np.vdot(moved, change)) / size if size > 0 else None
