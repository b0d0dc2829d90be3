"""What the values of a GGUF's metadata must be for us to compute with them: the file is anybody's, and says of a key what it likes."""

from __future__ import annotations

import math
from typing import Any

# By the end of the key.
_COUNTS = (
    "general.alignment",
    ".block_count",
    ".context_length",
    ".embedding_length",
    ".feed_forward_length",
    ".attention.head_count",
    ".attention.head_count_kv",
    ".attention.key_length",
    ".attention.value_length",
    ".attention.sliding_window",
)
_IDS = ("general.file_type", "_token_id")
_REALS = (".attention.layer_norm_rms_epsilon", ".rope.freq_base")
_TEXT_LISTS = ("tokenizer.ggml.tokens", "tokenizer.ggml.merges")


def wanted_instead(key: str, value: Any) -> str:
    """Return what a value should have been, or '' where it is that, or where nothing is known of its key."""
    if key.endswith(_COUNTS) and not (type(value) is int and value > 0):
        return "a positive whole number"
    if key.endswith(_IDS) and type(value) is not int:
        return "a whole number"
    if key.endswith(_REALS) and not (type(value) in (int, float) and 0 < value < math.inf):
        return "a positive number"
    return "a list of texts" if key in _TEXT_LISTS and not isinstance(value, list) else ""
