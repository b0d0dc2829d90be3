"""Which type each tensor takes: the choices of ``llama-quantize``, rewritten as a small table.

Source: ``llama_tensor_get_type``, ``llama_tensor_get_type_impl`` and ``tensor_type_fallback`` in llama.cpp's ``src/llama-quant.cpp``
(dense models only). ``tests/test_quantization.py`` holds every row to llama.cpp itself.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from cdcda_export.errors import ConfigError, QuantizationError, did_you_mean
from cdcda_export.ggml import TYPES, GgmlType
from cdcda_export.gguf import GgufFile, Tensor


@dataclass(frozen=True)
class Quant:
    """One name of ``--quant``: the type of most matrices, and the number that GGUF files call it by (enum llama_ftype in llama.h)."""

    name: str
    main: str
    file_type: int


BASE = Quant("base", "", -1)
"""Every tensor keeps the type it has in the base; ``file_type_of`` knows the number."""

QUANTS: dict[str, Quant] = {
    quant.name: quant
    for quant in (
        Quant("f32", "F32", 0),
        Quant("f16", "F16", 1),
        Quant("bf16", "BF16", 32),
        Quant("q8_0", "Q8_0", 7),
        Quant("q4_0", "Q4_0", 2),
        Quant("q4_1", "Q4_1", 3),
        Quant("q5_0", "Q5_0", 8),
        Quant("q5_1", "Q5_1", 9),
        Quant("iq4_nl", "IQ4_NL", 25),
        # The medium mix comes first: a base in this type that does not name its mix is taken for it.
        Quant("q2_k", "Q2_K", 10),
        Quant("q3_k_m", "Q3_K", 12),
        Quant("q3_k_s", "Q3_K", 11),
        Quant("q3_k_l", "Q3_K", 13),
        Quant("q4_k_m", "Q4_K", 15),
        Quant("q4_k_s", "Q4_K", 14),
        Quant("q5_k_m", "Q5_K", 17),
        Quant("q5_k_s", "Q5_K", 16),
        Quant("q6_k", "Q6_K", 18),
        BASE,
    )
}


IGNORE_IMPORTANCE = ("F32", "F16", "BF16", "Q8_0")
"""Types whose quantizer in ggml looks at no importance."""


@dataclass(frozen=True)
class _Place:
    """Where a matrix stands: the how-maniest of its kind, of how many, in what model."""

    index: int
    count: int
    heads_per_kv: int
    importance: bool


def _more_bits(place: _Place) -> bool:
    i, n = place.index, place.count
    return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2


_WHERE: dict[str, Callable[[_Place], bool]] = {
    "everywhere": lambda place: True,
    "in the first two": lambda place: place.index < 2,
    "in the first four": lambda place: place.index < 4,
    "in the first 16th": lambda place: place.index < place.count // 16,
    "in the first 8th, with importance": lambda place: place.importance and place.index < place.count // 8,
    "in the first 8th, without importance": lambda place: not place.importance and place.index < place.count // 8,
    "in the first 8th": lambda place: place.index < place.count // 8,
    "where four heads share it": lambda place: place.heads_per_kv >= 4,
    "more bits": _more_bits,
}
# Quantization, part of a layer, type, where; the first row that fits wins, and what no row names takes the main type.
_EXCEPTIONS = (
    ("q4_0", "ffn_down", "Q4_1", "in the first 8th, with importance"),
    ("q5_0", "ffn_down", "Q5_1", "in the first 8th, with importance"),
    ("iq4_nl", "attn_v", "Q5_K", "where four heads share it"),
    ("iq4_nl", "ffn_down", "Q5_K", "in the first 8th, without importance"),
    ("q2_k", "attn_v", "Q4_K", "where four heads share it"),
    ("q2_k", "attn_v", "Q3_K", "everywhere"),
    ("q2_k", "attn_output", "Q3_K", "everywhere"),
    ("q2_k", "ffn_down", "Q3_K", "everywhere"),
    ("q3_k_m", "attn_v", "Q5_K", "in the first two"),
    ("q3_k_m", "attn_v", "Q4_K", "everywhere"),
    ("q3_k_m", "attn_output", "Q4_K", "everywhere"),
    ("q3_k_m", "ffn_down", "Q5_K", "in the first 16th"),
    ("q3_k_m", "ffn_down", "Q4_K", "everywhere"),
    ("q3_k_l", "attn_v", "Q5_K", "everywhere"),
    ("q3_k_l", "attn_output", "Q5_K", "everywhere"),
    ("q3_k_l", "ffn_down", "Q5_K", "everywhere"),
    ("q4_k_s", "attn_v", "Q5_K", "in the first four"),
    ("q4_k_s", "ffn_down", "Q5_K", "in the first 8th"),
    ("q4_k_m", "attn_v", "Q6_K", "more bits"),
    ("q4_k_m", "ffn_down", "Q6_K", "more bits"),
    ("q5_k_m", "attn_v", "Q6_K", "more bits"),
    ("q5_k_m", "ffn_down", "Q6_K", "more bits"),
)
_FALLBACK = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0", "IQ4_XS": "IQ4_NL"}
_STORABLE = {name.lower(): kind for name, kind in TYPES.items()}
_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.weight")
_OUTPUT = "output.weight"
_EMBEDDING = "token_embd.weight"

Overrides = list[tuple[re.Pattern[str], GgmlType]]


def get_quant(name: str) -> Quant:
    """Return a quantization by its name.

    Raises:
        ConfigError: there is no such quantization for GGUF.
    """
    if name not in QUANTS:
        raise ConfigError(f"There is no GGUF quantization '{name}'.{did_you_mean(name, QUANTS)}")
    return QUANTS[name]


def quant_of_base(base: GgufFile) -> Quant:
    """Return the quantization that a base is in: what its header names, or else what most of its matrices are.

    The header is believed only where the matrices agree with it: some converters write a wrong number, and gates hang on this name.
    """
    counted = Counter(tensor.type.name for tensor in base.values() if _may_quantize(tensor)).most_common(1)
    main = counted[0][0] if counted else "none"
    main = "IQ4_NL" if main == "IQ4_XS" else main  # the same code book, with 0.25 bits less for its scales
    candidates = [quant for quant in QUANTS.values() if quant.main == main]
    if not candidates:
        raise QuantizationError(f"Most matrices of {base.path.name} are {main}, which no --quant writes; name one, such as q8_0.")
    return next((quant for quant in candidates if quant.file_type == base.get_value("general.file_type")), candidates[0])


def file_type_of(base: GgufFile, quant: Quant) -> int:
    """Return the ``general.file_type`` of an artifact: for ``base`` that of the base itself."""
    if quant is not BASE:
        return quant.file_type
    return int(base.get_value("general.file_type", quant_of_base(base).file_type))


def compile_overrides(tensor_types: Mapping[str, str]) -> Overrides:
    """Return patterns with the types they ask for, in order: llama-quantize's ``--tensor-type``.

    Raises:
        ConfigError: no such type, or no regular expression.
    """
    compiled: Overrides = []
    for pattern, name in tensor_types.items():
        if not isinstance(name, str) or name.lower() not in _STORABLE:
            raise ConfigError(f"tensor_types asks for the type '{name}', which does not exist.{did_you_mean(str(name).lower(), _STORABLE)}")
        try:
            # llama-quantize lower-cases the pattern, which would also turn \D into \d; tensor names are lower-case.
            compiled.append((re.compile(pattern, re.IGNORECASE | re.ASCII), _STORABLE[name.lower()]))
        except re.error as error:
            raise ConfigError(f"tensor_types holds '{pattern}', which is no regular expression: {error}.") from error
    return compiled


def choose_types(
    base: GgufFile,
    quant: Quant,
    allow_fallback: bool = False,
    overrides: Mapping[str, str] | None = None,
    importance: bool = False,
) -> dict[str, GgmlType]:
    """Return the type of every tensor in the artifact.

    Args:
        base: the base model.
        quant: what was asked for.
        allow_fallback: where rows are no multiple of a K-quant's 256, take the type that llama-quantize takes; otherwise refuse.
        overrides: regular expression -> type name; the first one found in a tensor's name decides it.
        importance: the rounding will be weighed, which changes a few choices.

    Raises:
        QuantizationError: a type does not fit the rows and no fallback is allowed.
        ConfigError: an override makes no sense or decides nothing.
    """
    matrices = [tensor for tensor in base.values() if _may_quantize(tensor)]
    forced = _forced_types(base, quant, matrices, compile_overrides(overrides or {}))
    chosen = {name: tensor.type for name, tensor in base.items()}
    if quant is not BASE:
        chosen |= _standard_types(base, quant, [tensor for tensor in matrices if tensor.name not in forced], importance)
    chosen |= forced
    for tensor in matrices:
        wanted, columns = chosen[tensor.name], tensor.shape[-1]
        if columns % wanted.block_size:
            # A type above the main one falls back silently, as in llama-quantize: Q8_0 or Q5_1 are not worse than what was asked for.
            above = tensor.name not in forced and (_is_output(tensor.name, base) or wanted.block_size > TYPES[quant.main].block_size)
            if not allow_fallback and not above:
                asked = f"{wanted.name} in tensor_types" if tensor.name in forced else quant.name
                raise QuantizationError(_refusal(asked, base, tensor, wanted))
            chosen[tensor.name] = _fitting(wanted, columns)
    return chosen


def _may_quantize(tensor: Tensor) -> bool:
    return tensor.rows > 1 and tensor.name.endswith("weight") and "_norm.weight" not in tensor.name


def _is_output(name: str, base: GgufFile) -> bool:
    return name == _OUTPUT or (name == _EMBEDDING and _OUTPUT not in base)


def _forced_types(base: GgufFile, quant: Quant, matrices: list[Tensor], overrides: Overrides) -> dict[str, GgmlType]:
    if overrides and quant.main in ("F32", "F16", "BF16"):
        raise ConfigError(f"tensor_types has no effect on {quant.name}, in llama-quantize neither; choose a --quant such as q8_0.")
    forced: dict[str, GgmlType] = {}
    for pattern, kind in overrides:
        found = [tensor.name for tensor in matrices if tensor.name not in forced and pattern.search(tensor.name)]
        if not found:
            parts = {tensor.name.split(".")[-2] for tensor in matrices}
            hint = did_you_mean(pattern.pattern, parts)
            raise ConfigError(f"The pattern '{pattern.pattern}' in tensor_types decides no matrix of {base.path.name}.{hint}")
        forced |= dict.fromkeys(found, kind)
    return forced


def _standard_types(base: GgufFile, quant: Quant, matrices: list[Tensor], importance: bool) -> dict[str, GgmlType]:
    """Return what the mix gives to the matrices that no override names."""
    layers, heads = int(base.hparam("block_count")), int(base.hparam("attention.head_count"))
    kv_heads = int(base.hparam("attention.head_count_kv", heads))
    counts = {"attn_v": sum(name.endswith(".attn_v.weight") for name in base), "attn_output": layers, "ffn_down": layers}
    # LLM_TYPE_70B in src/models/{llama,qwen2}.cpp: by the number of layers, for llama only with shared keys and values.
    is_70b = layers == 80 and (base.architecture == "qwen2" or (base.architecture == "llama" and heads != kv_heads))
    passed: Counter[str] = Counter()
    chosen: dict[str, GgmlType] = {}
    for tensor in sorted(matrices, key=_layer_of):
        block = _BLOCK.fullmatch(tensor.name)
        part = block[2] if block else ""
        name = quant.main
        if _is_output(tensor.name, base):
            name = quant.main if quant.main in ("F32", "F16", "BF16", "Q8_0") else "Q6_K"
        elif part in counts:
            # Counted as llama-quantize counts: a matrix that an override decides moves the later ones forward.
            place = _Place(passed[part], counts[part], heads // max(1, kv_heads), importance)
            fitting = (kind for mix, where, kind, rule in _EXCEPTIONS if (mix, where) == (quant.name, part) and _WHERE[rule](place))
            name = next(fitting, quant.main)
            passed[part] += 1
        if is_70b and part == "attn_v" and name in ("Q3_K", "Q4_K"):
            name = "Q5_K"
        chosen[tensor.name] = TYPES[name]
    return chosen


def _layer_of(tensor: Tensor) -> int:
    block = _BLOCK.fullmatch(tensor.name)
    return int(block[1]) if block else -1


def _fitting(kind: GgmlType, columns: int) -> GgmlType:
    if columns % kind.block_size:
        kind = TYPES[_FALLBACK.get(kind.name, kind.name)]
    return TYPES["F16"] if columns % kind.block_size else kind


def _refusal(asked: str, base: GgufFile, tensor: Tensor, wanted: GgmlType) -> str:
    better = "q4_0 or q8_0 (smaller and faster on ARM)" if wanted.block_size > 32 else "f16"
    return (
        f"{asked} needs rows that are a multiple of {wanted.block_size}, but {tensor.name} of {base.path.name} has rows of "
        f"{tensor.shape[-1]}; use --quant {better}, or --allow-fallback for llama-quantize's substitute "
        f"{_fitting(wanted, tensor.shape[-1]).name}."
    )


def is_double_quantized(base: GgufFile, types: dict[str, GgmlType]) -> str | None:
    """Return a sentence if tensors that are quantized already take another quantized type, None if none does."""
    changed = {n: t.type.name for n, t in base.items() if min(t.type.block_size, types[n].block_size) > 1 and t.type != types[n]}
    if not changed:
        return None
    before, after = sorted(set(changed.values())), sorted({types[name].name for name in changed})
    return f"quantized twice: the base was {'/'.join(before)} already, its tensors became {'/'.join(after)}"
