"""The tokenizer that a GGUF describes, for training and for bundles that need a ``tokenizer.json``.

Export never re-derives a tokenizer: a GGUF artifact keeps the base's metadata byte for byte. This one is compared with
llama.cpp's own on the user's text before an adapter is trusted.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from cdcda_export.errors import ExportError
from cdcda_export.gguf import GgufFile

if TYPE_CHECKING:
    from tokenizers import Tokenizer as FastTokenizer

_CONTROL, _USER_DEFINED = 3, 4
# Split patterns as published in the models' own tokenizer.json (llama.cpp src/llama-vocab.cpp holds the same ones).
_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


class Tokenizer(Protocol):
    """Text to token ids and back; special tokens inside the text are recognised."""

    def encode(self, text: str) -> list[int]:
        """Return the ids of a rendered text, nothing added."""

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids, special tokens left out."""


class BpeTokenizer:
    """A byte-level BPE tokenizer built from GGUF metadata with the ``tokenizers`` library (0.2 s where transformers takes 13 s)."""

    def __init__(self, fast: FastTokenizer) -> None:
        self.fast = fast

    def encode(self, text: str) -> list[int]:
        """Return the ids of a rendered text, nothing added."""
        return list(self.fast.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids, special tokens left out."""
        return str(self.fast.decode(ids, skip_special_tokens=True))

    def save(self, path: Path) -> None:
        """Write ``tokenizer.json``."""
        self.fast.save(str(path))


def _gpt2_pre() -> Any:
    from tokenizers import pre_tokenizers as pre

    return pre.ByteLevel(add_prefix_space=False, use_regex=True)


def _smollm_pre() -> Any:
    from tokenizers import pre_tokenizers as pre

    return pre.Sequence([pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False, use_regex=True)])


def _split_pre(pattern: str) -> Callable[[], Any]:
    def make() -> Any:
        from tokenizers import Regex
        from tokenizers import pre_tokenizers as pre

        split = pre.Split(Regex(pattern), behavior="isolated")
        return pre.Sequence([split, pre.ByteLevel(add_prefix_space=False, use_regex=False)])

    return make


# tokenizer.ggml.pre -> (pre-tokenizer, keep whole-word tokens before merging)
_PRE_TOKENIZERS: dict[str, tuple[Callable[[], Any], bool]] = {
    "smollm": (_smollm_pre, False),
    "gpt-2": (_gpt2_pre, False),
    "qwen2": (_split_pre(_QWEN2), False),
    "llama-bpe": (_split_pre(_LLAMA3), True),
}


def has_known_tokenizer(base: GgufFile) -> bool:
    """Say whether ``bpe_tokenizer`` can rebuild this file's tokenizer."""
    return base.get_value("tokenizer.ggml.model") == "gpt2" and base.get_value("tokenizer.ggml.pre") in _PRE_TOKENIZERS


def bpe_tokenizer(base: GgufFile) -> BpeTokenizer:
    """Build the tokenizer that a GGUF describes.

    Raises:
        ExportError: its kind is not a byte-level BPE that we know.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models

    if not has_known_tokenizer(base):
        kind = f"{base.get_value('tokenizer.ggml.model')}/{base.get_value('tokenizer.ggml.pre')}"
        known = ", ".join(f"gpt2/{name}" for name in _PRE_TOKENIZERS)
        raise ExportError(f"{base.path} has a tokenizer of kind {kind}, which cannot be written as tokenizer.json. Known: {known}.")
    make, ignore_merges = _PRE_TOKENIZERS[base.get_value("tokenizer.ggml.pre")]
    tokens = base.get_value("tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ", 1)) for merge in base.get_value("tokenizer.ggml.merges")]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    fast = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=ignore_merges, fuse_unk=False))
    fast.pre_tokenizer = make()
    fast.decoder = decoders.ByteLevel()
    if base.get_value("tokenizer.ggml.pre") == "qwen2":
        from tokenizers import normalizers

        fast.normalizer = normalizers.NFC()
    types = base.get_value("tokenizer.ggml.token_type")
    for index, kind in enumerate(types if types is not None else []):
        if kind in (_CONTROL, _USER_DEFINED):
            fast.add_special_tokens([AddedToken(tokens[index], special=kind == _CONTROL, normalized=False)])
    return BpeTokenizer(fast)
