"""Identifiers as people write them, made up from a seed: no value is anybody's, checksums are right where the kind has one.

A kind is a table of forms; a form makes a :class:`Value`. In patterns ``#`` is a digit, ``N`` a digit above zero, ``@`` a capital
letter, ``~`` an area code of the United States.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass

ALNUM = string.ascii_letters + string.digits
HEX = "0123456789abcdef"
UPPER = string.ascii_uppercase
_AREAS = ("212", "312", "415", "503", "617", "702", "206", "303", "512", "919")
NBSP, NB_HYPHEN = "\u00a0", "\u2011"


@dataclass(frozen=True)
class Value:
    """One identifier.

    ``cores`` are the parts of which each alone would give it away: both names of a person, the street of an address, the password in
    a URL. ``label`` is what people call it where the bare value says nothing (``SSN``), else ''. ``numeric``: it is the same value
    with other separators.
    """

    kind: str
    form: str
    text: str
    cores: tuple[str, ...]
    label: str = ""
    numeric: bool = False


Maker = Callable[[random.Random], Value]


def fill(rng: random.Random, pattern: str) -> str:
    """Replace the signs of a pattern (see above) by random characters."""
    sets: dict[str, Sequence[str]] = {"#": string.digits, "N": "123456789", "@": UPPER, "~": _AREAS}
    return "".join(rng.choice(sets[char]) if char in sets else char for char in pattern)


def token(rng: random.Random, length: int, alphabet: str = ALNUM) -> str:
    """Return random characters, with a digit, a small and a capital letter among them where the alphabet has them."""
    while True:
        text = "".join(rng.choices(alphabet, k=length))
        if length < 6 or all(set(text) & set(some) for some in (string.digits, string.ascii_letters) if set(some) & set(alphabet)):
            return text


def luhn(digits: str) -> str:
    """Return the digits with their Luhn check digit."""
    total = sum(sum(divmod(int(d) * (2 - i % 2), 10)) for i, d in enumerate(reversed(digits)))
    return digits + str(-total % 10)


def grouped(text: str, sizes: Sequence[int], separator: str = " ") -> str:
    """Cut a text into groups of these sizes; the last size repeats."""
    parts, sizes = [], list(sizes)
    while text:
        size = sizes.pop(0) if len(sizes) > 1 else sizes[0]
        parts.append(text[:size])
        text = text[size:]
    return separator.join(parts)


def patterns(kind: str, table: dict[str, str], label: str = "") -> dict[str, Maker]:
    """Return the forms of a kind of number from patterns, each after its label and a bar where it has one."""

    def maker(form: str, pattern: str) -> Maker:
        def make(rng: random.Random) -> Value:
            named, _, shape = pattern.rpartition("|")
            text = fill(rng, shape)
            return Value(kind, form, text, (text,), named or label, numeric=True)

        return make

    return {form: maker(form, pattern) for form, pattern in table.items()}


def made(kind: str, form: str, label: str, write: Callable[[random.Random], str], numeric: bool = True) -> Maker:
    """Return a form that a function writes."""

    def make(rng: random.Random) -> Value:
        text = write(rng)
        return Value(kind, form, text, (text,), label, numeric)

    return make
