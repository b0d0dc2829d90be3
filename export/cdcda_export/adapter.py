"""Read a PEFT LoRA adapter as changes of GGUF tensors, whoever trained it.

Format: ``adapter_config.json`` and ``adapter_model.safetensors`` as written by ``peft.PeftModel.save_pretrained``. Pickles are never
opened. What cannot be applied exactly is refused by name.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cdcda_export.architectures import Architecture, get_architecture, heads_of, permute_rows
from cdcda_export.errors import AdapterError, FileError
from cdcda_export.gguf import GgufFile
from cdcda_export.safetensors_file import FLOATS, FloatReader, OneAtATime

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
_PREFIX = "base_model.model."
# These initialisations change the base weights, so the saved pair is not what was learned on top of the base.
_BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class Delta:
    """The change of one tensor: ``scale * up @ down``, in the GGUF's row order.

    ``down`` is A, float32 (rank, columns); ``up`` is B, float32 (rows, rank).
    """

    tensor: str
    down: np.ndarray
    up: np.ndarray
    scale: float

    def dense(self) -> np.ndarray:
        """Return the change itself, float32, shape (rows, columns)."""
        return np.matmul(self.up, self.down) * np.float32(self.scale)


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter matched to one base: GGUF tensor name -> change, or -> whole new weights (``modules_to_save``).

    Whole weights are as large as the base's, so they are read from the file each time one is asked for.
    """

    path: Path
    config: dict[str, Any]
    deltas: dict[str, Delta]
    replaced: Mapping[str, np.ndarray] = field(default_factory=dict)

    @property
    def touched(self) -> set[str]:
        """Names of the GGUF tensors that this adapter changes."""
        return {*self.deltas, *self.replaced}

    @property
    def base_name(self) -> str:
        """The base model that the adapter says it was trained on, or ''."""
        return str(self.config.get("base_model_name_or_path") or "")


def read_config(directory: Path) -> dict[str, Any]:
    """Return ``adapter_config.json``, refusing every kind of adapter that is not a plain LoRA.

    Raises:
        AdapterError: there is no such file, its numbers are none, or the adapter is of a kind that cannot be merged exactly.
    """
    path = directory / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise AdapterError(f"{directory} holds no {CONFIG}; name the directory that peft's save_pretrained wrote.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"{path} is not readable JSON; save the adapter again with peft.") from error
    if not isinstance(config, dict):
        raise AdapterError(f"{path} is not a JSON object; save the adapter again with peft.")
    kind = config.get("peft_type")
    if kind != "LORA":
        raise AdapterError(f"{path} is an adapter of type {kind}; only LORA can be merged into a phone model.")
    if config.get("use_dora"):
        raise AdapterError(f"{path} uses DoRA, which cannot be merged here; train with use_dora=False.")
    if config.get("alora_invocation_tokens"):
        raise AdapterError(
            f"{path} is an activated LoRA, which acts after an invocation text only and cannot be merged; train a plain LoRA."
        )
    init = str(config.get("init_lora_weights", True)).lower()
    if init.startswith(_BASE_CHANGING_INITS):
        raise AdapterError(f"{path} was initialised with {init}, which changes the base; convert it to plain LoRA with peft first.")
    if config.get("bias", "none") != "none" or config.get("lora_bias"):
        raise AdapterError(f"{path} trains biases (bias={config.get('bias')!r}), which cannot be merged here; train with bias='none'.")
    _check_alphas(config, path)
    return config


def _check_alphas(config: Mapping[str, Any], path: Path) -> None:
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise AdapterError(f"{path}: alpha_pattern is no table of modules and numbers; save the adapter again with peft.")
    for name, alpha in {"lora_alpha": config.get("lora_alpha", 8), **patterns}.items():
        # Beyond this float32 overflows; NaN is not below it.
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) < 1e30:
            raise AdapterError(f"{path}: the alpha of {name!r} is {str(alpha)[:40]!r}, no finite number; save the adapter again with peft.")
    for pattern in patterns:
        try:
            _compiled(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise AdapterError(f"{path}: {pattern!r} in alpha_pattern is no regular expression ({error}).") from error


def _open_weights(directory: Path) -> FloatReader:
    path = directory / WEIGHTS
    if not path.is_file():
        if (directory / PICKLE).exists():
            raise AdapterError(f"{directory} holds a pickle ({PICKLE}), which is never loaded; save it with safe_serialization=True.")
        raise AdapterError(f"{directory} holds no {WEIGHTS}; save the adapter again with peft.")
    try:
        return FloatReader(path)
    except FileError as error:
        raise AdapterError(f"{path} is truncated or no safetensors file; copy or save the adapter again.") from error


def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({pattern})$")


def _pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """Return peft's per-module value: a pattern matches the whole module name or its end after a dot."""
    return next((value for pattern, value in patterns.items() if _compiled(pattern).match(module)), default)


@dataclass(frozen=True)
class PeftWeights:
    """An adapter as peft stores it: module -> (A, B) in Hugging Face's layout, and parameter -> whole new weights (read when asked for)."""

    config: dict[str, Any]
    pairs: dict[str, dict[str, np.ndarray]]
    replaced: Mapping[str, np.ndarray]

    def scale(self, module: str) -> float:
        """Return what B A is multiplied by in this module: alpha / r, or alpha / sqrt(r) for rsLoRA, after peft's patterns."""
        pair = self.pairs[module]
        rank = next(weights for name, weights in pair.items() if name.endswith("_A")).shape[0]
        alpha = float(_pattern(self.config.get("alpha_pattern") or {}, module, self.config.get("lora_alpha", 8)))
        return alpha / rank**0.5 if self.config.get("use_rslora") else alpha / rank

    def change(self, module: str) -> np.ndarray:
        """Return what the adapter adds to a module's weight: float32, (outputs, inputs), (B A) * scale in peft's order of operations."""
        pair = self.pairs[module]
        embedding = "lora_embedding_A" in pair
        product = pair["lora_embedding_B"] @ pair["lora_embedding_A"] if embedding else pair["lora_B"] @ pair["lora_A"]
        product *= np.float32(self.scale(module))
        return product.T if embedding else product


def read_peft(directory: str | Path) -> PeftWeights:
    """Read a PEFT LoRA directory without any base.

    Raises:
        AdapterError: a file is missing or broken, or the adapter is no plain LoRA.
    """
    directory = Path(directory)
    if not os.path.isdir(directory):  # unlike Path.is_dir it bears any name
        raise AdapterError(f"There is no adapter directory {directory}.")
    config, file = read_config(directory), _open_weights(directory)
    pairs: dict[str, dict[str, np.ndarray]] = {}
    replaced: dict[str, Callable[[], np.ndarray]] = {}
    for name, entry in sorted(file.entries.items()):
        match = re.fullmatch(re.escape(_PREFIX) + r"(.+)\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B)(\.default)?(\.weight)?", name)
        if entry.dtype not in FLOATS:
            raise AdapterError(f"{file.path}: {name} is stored as {entry.dtype}; only floating-point adapters can be merged.")
        if 0 in entry.shape or (match and len(entry.shape) != 2):
            raise AdapterError(f"{file.path}: {name} has the shape {list(entry.shape)}, which is no matrix; save the adapter again.")
        if match:
            pairs.setdefault(match[1], {})[match[2]] = file.read(name)
        elif ".base_layer." in name:
            continue  # peft saves an unchanged copy of an adapted embedding
        elif "lora_" in name:
            raise AdapterError(f"{file.path}: tensor {name} belongs to a kind of LoRA that cannot be merged here.")
        else:
            parameter = re.sub(r"\.modules_to_save(\.default)?", "", name.removeprefix(_PREFIX))
            replaced[parameter] = partial(file.read, name)
    if not pairs and not replaced:
        raise AdapterError(f"{file.path} holds no LoRA tensors; nothing was learned or another format was saved.")
    return PeftWeights(config, pairs, OneAtATime(replaced))


def read_adapter(directory: str | Path, base: GgufFile) -> Adapter:
    """Match a PEFT adapter directory to a base GGUF.

    Raises:
        AdapterError: a file is missing or broken, the adapter is no plain LoRA, or it does not fit the base (names the tensor).
        UnsupportedArchitecture: the base's tensor mapping is not known.
    """
    directory = Path(directory)
    architecture = get_architecture(base.architecture, str(base.path))
    peft = read_peft(directory)
    deltas = [_delta(module, peft, base, architecture, directory) for module in peft.pairs]
    names = _without_tied_copy(peft.replaced, base)
    whole = OneAtATime(dict(_replacement(name, peft.replaced, base, architecture, directory) for name in names))
    return Adapter(directory, peft.config, {delta.tensor: delta for delta in deltas}, whole)


def _is_finite(weights: np.ndarray) -> bool:
    """Say whether all weights are finite, without another array of their size."""
    return bool(np.isfinite(weights.min()) and np.isfinite(weights.max()))


def _without_tied_copy(replaced: Mapping[str, np.ndarray], base: GgufFile) -> list[str]:
    """Leave out an lm_head that trainers save beside the embedding it is tied to, where both hold the same."""
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    both = head in replaced and embedding in replaced and "output.weight" not in base
    tied = both and np.array_equal(replaced[head], replaced[embedding])
    return [name for name in replaced if not (tied and name == head)]


def _delta(module: str, peft: PeftWeights, base: GgufFile, architecture: Architecture, directory: Path) -> Delta:
    pair = peft.pairs[module]
    target = _target(f"{module}.weight", base, architecture, directory)
    embedding = "lora_embedding_A" in pair or "lora_embedding_B" in pair
    a_name, b_name = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
    if a_name not in pair or b_name not in pair:
        raise AdapterError(f"{directory / WEIGHTS}: {module} has only one of {a_name} and {b_name}; save the adapter again.")
    first, second = pair[a_name], pair[b_name]
    # peft stores an embedding's A as (rank, vocabulary) and B as (hidden, rank), and adds (B A)^T.
    down, up = (second.T, first.T) if embedding else (first, second)
    shape = base[target].shape
    if (up.shape[0], down.shape[1]) != shape or up.shape[1] != down.shape[0]:
        grown = embedding and up.shape[0] > shape[0]
        _refuse_shape(module, (up.shape[0], down.shape[1]), shape, directory, base, grown)
    scale = peft.scale(module)
    if not _is_finite(down) or not _is_finite(up):
        raise AdapterError(f"{directory / WEIGHTS}: {module} holds NaN or infinite weights; the training diverged.")
    if architecture.is_permuted(target):
        up = permute_rows(up, heads_of(base, target))
    return Delta(target, np.ascontiguousarray(down), np.ascontiguousarray(up), scale)


def _replacement(
    name: str, replaced: Mapping[str, np.ndarray], base: GgufFile, architecture: Architecture, directory: Path
) -> tuple[str, Callable[[], np.ndarray]]:
    if name == "lm_head.weight" and "output.weight" not in base:
        raise AdapterError(f"{directory / WEIGHTS}: lm_head was trained apart, but the base ties it to the embedding; it cannot be merged.")
    target, weights = _target(name, base, architecture, directory), replaced[name]
    shape, wanted = weights.shape, base[target].shape
    if shape != wanted:
        _refuse_shape(name, shape, wanted, directory, base, grown=len(shape) == len(wanted) == 2 and shape[0] > wanted[0])
    if not _is_finite(weights):
        raise AdapterError(f"{directory / WEIGHTS}: {name} holds NaN or infinite weights; the training diverged.")

    def read() -> np.ndarray:
        weights = replaced[name]
        if architecture.is_permuted(target):
            weights = permute_rows(weights, heads_of(base, target))
        if target.endswith("norm.weight"):
            weights += np.float32(architecture.norm_offset)
        return weights

    return target, read


def _target(parameter: str, base: GgufFile, architecture: Architecture, directory: Path) -> str:
    target = architecture.gguf_name(parameter)
    if target == "output.weight" and target not in base:
        raise AdapterError(f"{directory / WEIGHTS}: lm_head is adapted, but the base ties it to the embedding; it cannot be merged.")
    if target is None or target not in base:
        raise AdapterError(
            f"{directory / WEIGHTS}: {parameter} has no counterpart in {base.path.name} ({base.architecture}); is this the right base?"
        )
    return target


def _refuse_shape(module: str, got: tuple[int, ...], expected: tuple[int, ...], directory: Path, base: GgufFile, grown: bool) -> None:
    if grown:
        raise AdapterError(
            f"{directory / WEIGHTS}: {module} has {got[0]} rows where {base.path.name} has {expected[0]}: "
            "the vocabulary was grown in training; export needs a base GGUF with the same tokenizer."
        )
    raise AdapterError(
        f"{directory / WEIGHTS}: {module} changes a {list(got)} matrix, but in {base.path.name} it is {list(expected)}; "
        "is this the right base?"
    )


def base_warning(adapter: Adapter, base: GgufFile, name: str = "") -> str | None:
    """Return a warning if the adapter names another base model than this one, called ``name`` (the shapes alone cannot tell)."""
    named = adapter.base_name
    if not named:
        return None
    called = name or base.path.name
    own = [str(base.get_value(key) or "") for key in ("general.name", "general.basename")]
    own += [called.removesuffix(".gguf"), base.path.parent.name]
    repository = str(base.get_value("general.repo_url") or base.get_value("general.base_model.0.repo_url") or "")
    wanted = _words(Path(named).name.removesuffix(".gguf"))
    if any(wanted and wanted <= _words(name) for name in (*own, repository)):
        return None
    return f"The adapter says it was trained on '{named}', the base is '{called}'; if they differ, the result will be gibberish."


def _words(text: str) -> set[str]:
    return {word for word in re.split(r"[^a-z0-9.]+", text.lower()) if word and word not in ("gguf", "hf")}
