"""Which builds of the engine there are, and which one a phone can run."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

from cdcda_export.errors import ConfigError


@dataclass(frozen=True)
class Variant:
    """A build of the engine.

    Attributes:
        abi: what Android calls the instruction set.
        target: what zig calls it.
        cpu: the cores that ggml-cpu is compiled for, as zig names them.
        features: what a core must list in ``/proc/cpuinfo`` to run it.
    """

    abi: str
    target: str
    cpu: str
    features: frozenset[str] = frozenset()


_ARM, _X86 = "aarch64-linux-musl", "x86_64-linux-musl"
_DOTPROD = frozenset({"asimddp", "asimdhp"})
# From the most able to the plainest of each instruction set: the first that fits is the fastest.
VARIANTS: dict[str, Variant] = {
    "arm64-i8mm": Variant("arm64-v8a", _ARM, "generic+v8_2a+dotprod+fullfp16+i8mm", _DOTPROD | {"i8mm"}),
    "arm64-dotprod": Variant("arm64-v8a", _ARM, "generic+v8_2a+dotprod+fullfp16", _DOTPROD),
    "arm64-v8": Variant("arm64-v8a", _ARM, "generic+v8a"),
    "x86_64": Variant("x86_64", _X86, "x86_64_v2"),  # what Android's ABI has in all its emulators
}


def features_of(cpuinfo: str) -> set[str]:
    """Return what every core of a ``/proc/cpuinfo`` lists: threads move between cores."""
    cores = [set(value.split()) for name, _, value in (line.partition(":") for line in cpuinfo.splitlines()) if name.strip() == "Features"]
    return set.intersection(*cores) if cores else set()


def best_variant(abi: str, features: Set[str]) -> str:
    """Return the name of the fastest variant that a phone can run.

    Args:
        abi: of the phone, as Android names it.
        features: what all its cores have.

    Raises:
        ConfigError: there is none for this instruction set.
    """
    for name, variant in VARIANTS.items():
        if variant.abi == abi and variant.features <= features:
            return name
    known = ", ".join(dict.fromkeys(variant.abi for variant in VARIANTS.values()))
    raise ConfigError(f"The engine is built for {known}, and this phone has {abi}; 32-bit phones are not supported.")
